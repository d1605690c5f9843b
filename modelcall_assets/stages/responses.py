"""`responses`: a model's answers to the conversations of a file, failures in their place."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import orjson

from modelcall_assets.config.distillation import DistillationTask, ResponsesStep
from modelcall_assets.config.model import ModelConfig
from modelcall_assets.llm.dialogue import (
    NOT_IN_KEY,
    PARSER_VERSION,
    AnswerParser,
    ChatRequest,
    Message,
    Rules,
)
from modelcall_assets.records.outcome import BadLine, Failure, Reason, Row, bad_line, moved_names
from modelcall_assets.stages.adopt import OldAnswer
from modelcall_assets.stages.asking import AskingStage
from modelcall_assets.stages.chatml import UNWRITABLE
from modelcall_assets.stages.replay import Asked
from modelcall_assets.stages.report import Report
from modelcall_assets.stages.score_table import ADOPTED, API_FIELDS, AnswerTotals, Rate
from modelcall_assets.stages.source import ROWS_ASKED_AT_ONCE, Source
from modelcall_assets.storage.files import NewFile, write_lines
from modelcall_assets.storage.rows import STREAM_BYTES, LineBatch, record_id
from modelcall_assets.storage.values import SchemaInference, loads
from modelcall_assets.transforms.chatml import without_nulls
from modelcall_assets.transforms.user_code import Fields
from modelcall_assets.transforms.values import encode

_OWN_NAMES = {
    "api_return": "response",
    "api_reasoning": "reasoning",
    "api_finish_reason": "finish_reason",
}
"""Columns of a scores file that have names of their own here."""
FAILED_BEFORE = frozenset({"error", "error_type", "traceback", "timestamp", "task_index"})
"""What the old system left in a row that failed; it is not an answer's."""
OWN_COLUMNS = (
    "response", "final_messages", "reasoning", "tool_calls", "finish_reason", "usage", "sample",
    *(name for name, _ in API_FIELDS if name not in _OWN_NAMES),
)  # fmt: skip
_OWN = frozenset(OWN_COLUMNS)
_ALWAYS_OURS = _OWN - {"tool_calls", "sample"}
"""The columns that each of our rows has."""


class Responses(AskingStage):
    name = "responses"
    kinds = ("openai",)
    suffix = ".jsonl"
    done = "answered"
    hint = (
        "generate_response.input_path",
        "conversations are a list of turns in the column messages; chatml_conversion makes it",
    )
    model_in = "generator"
    is_capped = True

    @property
    def about(self) -> str:
        return f"answers by {self.params['model']}"

    @property
    def step(self) -> ResponsesStep:
        assert isinstance(self.spec.task, DistillationTask)
        assert self.spec.task.generate_response is not None
        return self.spec.task.generate_response

    @cached_property
    def model(self) -> ModelConfig:
        assert self.spec.generator is not None
        return self.spec.generator

    @property
    def most_in_flight(self) -> int:
        return self.step.concurrency

    @property
    def samples(self) -> int:  # type: ignore[override]
        return self.step.samples

    @cached_property
    def params(self) -> dict[str, Any]:
        return self.model.request_params()

    @cached_property
    def rules(self) -> Rules:
        return Rules(AnswerParser([], frozenset(), None, may_call=True), 0)

    @property
    def provenance(self) -> dict[str, str]:
        return {"api_model": str(self.params["model"])}

    @property
    def adopts(self) -> bool:
        """As the files of the old system say."""
        return bool(self.step.resume_mode or self.step.retry_mode)

    def version(self) -> str:
        shape = {
            "parser": PARSER_VERSION,
            "params": {name: v for name, v in self.params.items() if name not in NOT_IN_KEY},
            "revision": self.model.revision,
            "prompt_mode": self.step.prompt_mode,
            "samples": self.samples,
            "merge_reasoning": self.step.merge_reasoning,
        }
        return hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()[:16]

    def own_shape(self) -> dict[str, Any]:
        limit = {} if self.task.row_limit is None else {"limit": self.task.row_limit}
        return {"responses": self.version(), **limit}

    def ask(self, row: Row | BadLine) -> Asked:
        """The request of one conversation, or the Failure that says why it has none."""
        if isinstance(row, BadLine):
            return bad_line(row)
        match row.get("messages"):
            case [_, *_] as messages if all(map(_is_turn, messages)):
                sent = self._sent(messages)
                if not sent:
                    what = "nothing to answer: it holds only an assistant's turns"
                    return Failure(Reason.MISSING_INPUT, what)
                try:
                    return ChatRequest(self.params, sent, self.model.revision)
                except UNWRITABLE as error:  # a Parquet file may hold bytes
                    what = f"column 'messages' cannot be written as JSON: {error}"
                    return Failure(Reason.MISSING_INPUT, what)
            case _:
                what = "no list of turns" if "messages" in row else "absent"
                return Failure(Reason.MISSING_INPUT, f"column 'messages' is {what}")

    def old_answer(self, row: Row) -> OldAnswer | None:
        """Of a row that is in a file of responses; None when it failed, or answers another question
        than this task asks. Where the row is not ours, a column with the name of one of ours is the
        input's."""
        response, asked = row.get("response"), self.ask(row)
        if not isinstance(response, str) or isinstance(asked, Failure):
            return None
        if isinstance(turns := row.get("final_messages"), list):
            said_before = [_is_turn(turn) and (turn["role"], turn.get("content")) for turn in turns]
            if said_before[:-1] != [(turn["role"], turn.get("content")) for turn in asked.messages]:
                return None
        is_ours = row.keys() >= _ALWAYS_OURS
        if is_ours and row["api_status"] != "success":
            return None
        kept = {name: row[name] for name in ("response", "final_messages", "uid") if row.get(name)}
        thought = _THOUGHT.fullmatch(response)
        if thought is not None:
            return OldAnswer(thought[2], kept, reasoning=thought[1])
        return OldAnswer(response, kept, reasoning=row["reasoning"] or None if is_ours else None)

    def write(self, source: Source, rate: Rate, out: NewFile, shared: Fields) -> Report:
        totals, digest, inference = AnswerTotals(), hashlib.sha256(), SchemaInference()
        report, name = totals.report, source.name
        is_result = source.maker is not None and source.maker.answers

        def given(item: Row | BadLine) -> Row:
            """What the row has of its own, named as it will be."""
            row = {"raw": item.raw} if isinstance(item, BadLine) else _without_old_failure(item)
            if _OWN.isdisjoint(row):
                return row
            report.moved = report.moved or moved_names(source.column_names(), _OWN)
            return {report.moved.get(name, name): value for name, value in row.items()}

        def lines() -> Iterator[bytes]:
            numbered = (
                (batch.start + at, item, isinstance(batch, LineBatch) and type(item) is dict)
                for batch in source.of_one_file(ROWS_ASKED_AT_ONCE, STREAM_BYTES)
                for at, item in enumerate(batch.items)
            )
            for index, item, is_plain in numbered:
                for sample in range(self.samples):
                    api, usage = rate(index * self.samples + sample, item)
                    api["api_record_id"] = record_id(item, index, name, is_result=is_result)
                    row = {**given(item), **self._answer(item, api, sample)}
                    totals.count(api, usage, sample, ())
                    content = [api["api_record_id"], api["api_status"], row.get("response")]
                    digest.update(orjson.dumps([*content, api.get("api_fail_reason")]))
                    report.show(row)
                    line = encode(row)
                    inference.take(row if is_plain else loads(line), len(line))
                    yield line

        write_lines(out, lines())
        totals.finish(source.rows_read * self.samples)
        report.schema, report.numbers = inference.schema(), totals.numbers()
        report.data_version = digest.hexdigest()[:32]
        return report

    def _sent(self, messages: Sequence[Message]) -> tuple[Message, ...]:
        if self.step.prompt_mode == "first_message":
            return (without_nulls({"role": "user", "content": messages[0].get("content")}),)
        asked = len(messages)
        while asked and messages[asked - 1].get("role") == "assistant":
            asked -= 1
        return tuple(map(without_nulls, messages[:asked]))

    def _answer(self, item: Row | BadLine, api: Mapping[str, Any], sample: int) -> Row:
        answer, reasoning = api.get("api_return"), api.get("api_reasoning")
        response = answer
        if self.step.merge_reasoning and reasoning and reasoning.strip():
            response = merged_reasoning(reasoning, answer or "")
        is_good = api["api_status"] == "success"
        sent = self._sent(item["messages"]) if is_good and isinstance(item, dict) else None
        calls = {"tool_calls": text} if (text := api.get("tool_calls")) else {}
        said = {"role": "assistant", "content": response} | {
            name: orjson.loads(text) for name, text in calls.items()
        }
        counts = {name: api.get(f"api_{name}") for name in ("prompt_tokens", "completion_tokens")}
        kept = dict(api.get(ADOPTED, {}))
        if isinstance(item, dict) and "uid" in item:
            kept.pop("uid", None)
        return {
            "response": response if _is_answered(api) else None,
            "final_messages": sent and [*sent, said],
            "reasoning": reasoning,
            **calls,
            "finish_reason": api.get("api_finish_reason"),
            "usage": None if None in counts.values() else counts,
            **({"sample": sample} if self.samples > 1 else {}),
            **{name: api.get(name) for name, _ in API_FIELDS if name not in _OWN_NAMES},
            **kept,
        }


_THOUGHT = re.compile(r"<think>\n(.*?)\n</think>\n\n(.*)", re.DOTALL)
"""What `merged_reasoning` gives."""


def merged_reasoning(reasoning: str, answer: str) -> str:
    """As training data has it."""
    return f"<think>\n{reasoning}\n</think>\n\n{answer}"


def _is_turn(message: object) -> bool:
    match message:
        case {"role": str()}:
            return True
        case _:
            return False


def _is_answered(api: Mapping[str, Any]) -> bool:
    """Whether there is an answer; `api_return` is a refusal's body where there is none."""
    is_success = api["api_status"] == "success"
    no_reason_needed = api.get("api_fail_reason") in (Reason.EMPTY, Reason.INTERRUPTED)
    return is_success or bool(api.get("api_finish_reason")) or no_reason_needed


def _without_old_failure(row: Row) -> Row:
    if not row.keys() >= FAILED_BEFORE:
        return row
    return {name: value for name, value in row.items() if name not in FAILED_BEFORE}
