"""`responses`: a model's answers to the conversations of a file, failures in their place."""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain
from typing import Any

import orjson

from modelcall_assets.config.distillation import DistillationTask
from modelcall_assets.config.steps import ResponsesStep
from modelcall_assets.llm.dialogue import AnswerParser, ChatRequest, Message, Rules
from modelcall_assets.records.outcome import BadLine, Failure, Reason, Row, bad_line, moved_names
from modelcall_assets.stages.adopt import ADOPTED, OldAnswer
from modelcall_assets.stages.asking import AskingStage
from modelcall_assets.stages.chatml import UNWRITABLE
from modelcall_assets.stages.graded import Graded
from modelcall_assets.stages.replay import Asked
from modelcall_assets.stages.report import Report
from modelcall_assets.stages.score_table import API_FIELDS, AnswerTotals, Rate
from modelcall_assets.stages.source import ROWS_ASKED_AT_ONCE, Source, column_names
from modelcall_assets.storage.files import NewFile, write_lines
from modelcall_assets.storage.rows import STREAM_BYTES, LineBatch
from modelcall_assets.storage.values import SchemaInference, loads
from modelcall_assets.transforms import encode
from modelcall_assets.transforms.chatml import without_nulls
from modelcall_assets.transforms.user_code import Fields

_RENAMED = ("api_return", "api_reasoning", "api_finish_reason")
"""Columns of a scores file that have names of their own here."""
_SAME = [name for name, _ in API_FIELDS if name not in _RENAMED]
FAILED_BEFORE = frozenset({"error", "error_type", "traceback", "timestamp", "task_index"})
"""What the old system left in a row that failed; it is not an answer's."""
OWN_COLUMNS = (
    "response", "final_messages", "reasoning", "tool_calls", "finish_reason", "usage", "logprobs",
    "sample", *_SAME,
)  # fmt: skip
_OWN = frozenset(OWN_COLUMNS)
_ALWAYS_OURS = _OWN - {"tool_calls", "logprobs", "sample"}
"""The columns that each of our rows has."""


class Responses(AskingStage):
    name = "responses"
    kinds = ("openai",)
    suffix = ".jsonl"
    done = "answered"
    model_in = "generator"
    is_capped = True

    @property
    def about(self) -> str:  # type: ignore[override]
        return f"answers by {self.params['model']}"

    @property
    def hint(self) -> tuple[str, str]:  # type: ignore[override]
        if self._graded is not None:
            return self._graded.hint
        fix = "conversations are a list of turns in the column messages; chatml_conversion makes it"
        return "generate_response.input_path", fix

    @property
    def step(self) -> ResponsesStep:
        assert isinstance(self.spec.task, DistillationTask)
        assert self.spec.task.generate_response is not None
        return self.spec.task.generate_response

    @property
    def most_in_flight(self) -> int:
        return self.step.concurrency

    @property
    def samples(self) -> int:  # type: ignore[override]
        return self.step.samples

    @cached_property
    def rules(self) -> Rules:
        parser = AnswerParser(
            [], frozenset(), None, may_call=True, as_it_is=self._graded is not None
        )
        return Rules(parser, 0)

    @cached_property
    def _graded(self) -> Graded | None:
        """If there is one, what a model leaves is its answer, and not asked for again until there
        is a better one."""
        return self.task.find(Graded)

    @cached_property
    def params(self) -> dict[str, Any]:
        most = self.step.logprobs
        asked = {} if most is None else {"logprobs": True, "top_logprobs": most}
        return super().params | asked

    @property
    def adopts(self) -> bool:
        """As the files of the old system say."""
        return bool(self.step.resume_mode or self.step.retry_mode)

    @property
    def shaped_by(self) -> dict[str, Any]:
        return {
            "prompt_mode": self.step.prompt_mode,
            "samples": self.samples,
            "merge_reasoning": self.step.merge_reasoning,
            **({} if self._graded is None else {"as_it_is": True}),
        }

    def own_shape(self) -> dict[str, Any]:
        limit = {} if self.task.row_limit is None else {"limit": self.task.row_limit}
        return {"responses": self.version, **limit}

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
                if self._graded is not None and (unfit := self._graded.unfit(row)):
                    return unfit
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
        totals, inference = AnswerTotals(source, samples=self.samples), SchemaInference()
        report = totals.report

        def given(item: Row | BadLine) -> Row:
            """What the row has of its own, named as it will be."""
            row = {"raw": item.raw} if isinstance(item, BadLine) else item
            if row.keys() >= FAILED_BEFORE:
                row = {name: value for name, value in row.items() if name not in FAILED_BEFORE}
            if _OWN.isdisjoint(row):
                return row
            if not report.moved:
                items = chain.from_iterable(batch.items for batch in source.to_ask())
                report.moved = moved_names(column_names(items), _OWN)
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
                    totals.count(index, item, api, usage, sample)
                    row = {**given(item), **self._answer(item, api, sample)}
                    content = [api["api_record_id"], api["api_status"], row.get("response")]
                    content.append(api.get("api_fail_reason"))
                    if self.step.logprobs:
                        content.append(row["logprobs"])
                    totals.digest.update(orjson.dumps(content))
                    report.show(row)
                    line = encode(row)
                    inference.take(row if is_plain else loads(line), len(line))
                    yield line

        write_lines(out, lines())
        totals.finish()
        report.schema, report.numbers = inference.schema(), totals.numbers()
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
            response = f"<think>\n{reasoning}\n</think>\n\n{answer or ''}"
        is_good = api["api_status"] == "success"
        # Where there is no answer `api_return` is the body of a refusal.
        without_reason = api.get("api_fail_reason") in (Reason.EMPTY, Reason.INTERRUPTED)
        is_answered = is_good or api.get("api_finish_reason") or without_reason
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
            "response": response if is_answered else None,
            "final_messages": sent and [*sent, said],
            "reasoning": reasoning,
            **calls,
            "finish_reason": api.get("api_finish_reason"),
            "usage": None if None in counts.values() else counts,
            **({"logprobs": api.get("logprobs")} if self.step.logprobs else {}),
            **({"sample": sample} if self.samples > 1 else {}),
            **{name: api.get(name) for name in _SAME},
            **kept,
        }


_THOUGHT = re.compile(r"<think>\n(.*?)\n</think>\n\n(.*)", re.DOTALL)
"""An answer that its reasoning is merged with, as training data has it."""


def _is_turn(message: object) -> bool:
    match message:
        case {"role": str()}:
            return True
        case _:
            return False
