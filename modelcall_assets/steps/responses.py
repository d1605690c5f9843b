"""`responses`: a model's answers to the conversations of a file, failures in their place."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from modelcall_assets.config.distillation import DistillationTask
from modelcall_assets.config.spec import CHATML, TaskSpec
from modelcall_assets.grading.values import Fields
from modelcall_assets.llm.answer import PARSER_VERSION, AnswerParser
from modelcall_assets.llm.dialogue import Rules
from modelcall_assets.llm.request import NOT_IN_KEY, ChatRequest, Message
from modelcall_assets.records.outcome import Failure, Reason
from modelcall_assets.records.record import BadLine, Row, moved_names
from modelcall_assets.steps.adopt import OldAnswer
from modelcall_assets.steps.chatml import UNWRITABLE
from modelcall_assets.steps.preprocess import bad_line
from modelcall_assets.steps.publish_scores import SAMPLE_ROWS, Rate
from modelcall_assets.steps.replay import Asked
from modelcall_assets.steps.score_report import Prices, ScoreReport
from modelcall_assets.steps.score_table import ADOPTED, API_FIELDS
from modelcall_assets.steps.source import Source
from modelcall_assets.storage.files import NewFile
from modelcall_assets.storage.jsonl import write_lines
from modelcall_assets.storage.numbers import loads
from modelcall_assets.storage.schema import SchemaInference
from modelcall_assets.transforms.chatml import encode, without_nulls

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


@dataclass(frozen=True)
class ResponseStage:
    """Everything of a task that shapes its responses."""

    params: dict[str, Any]
    revision: str | None
    prompt_mode: str
    samples: int
    merge_reasoning: bool
    rules: Rules
    provenance: dict[str, str]
    prices: Prices

    @classmethod
    def of(cls, spec: TaskSpec) -> ResponseStage:
        model, task = spec.generator, spec.task
        assert model is not None and isinstance(task, DistillationTask)
        step = task.generate_response
        assert step is not None
        params = model.request_params()
        return cls(
            params=params,
            revision=model.revision,
            prompt_mode=step.prompt_mode,
            samples=step.samples,
            merge_reasoning=step.merge_reasoning,
            rules=Rules(AnswerParser([], frozenset(), None, may_call=True), 0),
            provenance={"api_model": str(params["model"])},
            prices=model.prices.pair,
        )

    def version(self) -> str:
        """Digest of what shapes the rows: not prices, limits, endpoints or keys."""
        shape = {
            "parser": PARSER_VERSION,
            "params": {name: v for name, v in self.params.items() if name not in NOT_IN_KEY},
            "revision": self.revision,
            "prompt_mode": self.prompt_mode,
            "samples": self.samples,
            "merge_reasoning": self.merge_reasoning,
        }
        return hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()[:16]

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
                    return ChatRequest(self.params, sent, self.revision)
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

    def asks(self, source: Source) -> Iterator[Asked]:
        """`samples` for each row of the source, in order."""
        for item in source.items():
            failed = failed_conversion(item) if source.stage == CHATML else None
            asked = failed or self.ask(item)
            for _ in range(self.samples):
                yield asked

    def write(self, source: Source, rate: Rate, out: NewFile, _shared: Fields) -> ScoreReport:
        """Every row of the source in its order, `samples` times, with its answers."""
        source.verify()
        report, digest, inference = ScoreReport(), hashlib.sha256(), SchemaInference()

        def given(item: Row | BadLine) -> Row:
            """What the row has of its own, named as it will be."""
            row = {"raw": item.raw} if isinstance(item, BadLine) else _without_old_failure(item)
            if _OWN.isdisjoint(row):
                return row
            report.moved = report.moved or moved_names(source.column_names(), _OWN)
            return {report.moved.get(name, name): value for name, value in row.items()}

        def lines() -> Iterator[bytes]:
            for index, item in enumerate(source.items()):
                for sample in range(self.samples):
                    api, usage = rate(index * self.samples + sample, item)
                    api["api_record_id"] = source.identity(item, index)
                    row = {**given(item), **self._answer(item, api, sample)}
                    report.add_usage(usage, api.get("api_cost_usd", 0.0))
                    report.count(api, ())
                    content = [api["api_record_id"], api["api_status"], row.get("response")]
                    digest.update(orjson.dumps([*content, api.get("api_fail_reason")]))
                    if len(report.sample) < SAMPLE_ROWS:
                        report.sample.append(row)
                    line = encode(row)
                    inference.take(loads(line), len(line))
                    yield line

        write_lines(out, lines())
        report.schema = inference.schema()
        report.data_version = digest.hexdigest()[:32]
        return report

    def _sent(self, messages: Sequence[Message]) -> tuple[Message, ...]:
        if self.prompt_mode == "first_message":
            return (without_nulls({"role": "user", "content": messages[0].get("content")}),)
        asked = len(messages)
        while asked and messages[asked - 1].get("role") == "assistant":
            asked -= 1
        return tuple(map(without_nulls, messages[:asked]))

    def _answer(self, item: Row | BadLine, api: Mapping[str, Any], sample: int) -> Row:
        answer, reasoning = api.get("api_return"), api.get("api_reasoning")
        response = answer
        if self.merge_reasoning and reasoning and reasoning.strip():
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


def failed_conversion(row: Row | BadLine) -> Failure | None:
    """Why a row of ChatML holds no conversation, when the conversion said so."""
    match None if isinstance(row, BadLine) else row.get("error"):
        case {"reason": str(reason), "detail": str(detail)} if reason in set(Reason):
            return Failure(Reason(reason), detail)
        case _:
            return None


def _without_old_failure(row: Row) -> Row:
    if not row.keys() >= FAILED_BEFORE:
        return row
    return {name: value for name, value in row.items() if name not in FAILED_BEFORE}
