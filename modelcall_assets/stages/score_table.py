"""The file of scores, what is told of each row that is answered or rated, and the totals."""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heappush, heapreplace
from typing import Any

import orjson
import pyarrow as pa

from modelcall_assets.config.model import TokenPrices
from modelcall_assets.journal.lines import Entry
from modelcall_assets.llm.completion import Usage
from modelcall_assets.llm.dialogue import ChatRequest, Finished
from modelcall_assets.records.outcome import BadLine, Failure, Outcome, Row, moved_names, short
from modelcall_assets.stages.distribution import Distribution
from modelcall_assets.stages.report import Report, Seen
from modelcall_assets.stages.source import Source
from modelcall_assets.storage.columns import ParquetSink, as_stored
from modelcall_assets.storage.files import NewFile
from modelcall_assets.storage.rows import record_id
from modelcall_assets.transforms.values import value_at

VOLATILE_COLUMNS = (
    "api_attempts",
    "api_endpoint",
    "api_latency_ms",
    "api_request_id",
    "api_answered_at",
)
"""What may differ between two undisturbed runs that got the same answers."""

API_FIELDS: tuple[tuple[str, pa.DataType], ...] = (
    ("api_record_id", pa.string()),
    ("api_status", pa.string()),
    ("api_fail_reason", pa.string()),
    ("api_fail_detail", pa.string()),
    ("api_return", pa.string()),
    ("api_reasoning", pa.string()),
    ("api_finish_reason", pa.string()),
    ("api_request_key", pa.string()),
    ("api_model", pa.string()),
    ("api_prompt", pa.string()),
    ("api_turns", pa.int32()),
    ("api_prompt_tokens", pa.int64()),
    ("api_completion_tokens", pa.int64()),
    ("api_cost_usd", pa.float64()),
    ("api_attempts", pa.int32()),
    ("api_endpoint", pa.string()),
    ("api_latency_ms", pa.int64()),
    ("api_request_id", pa.string()),
    ("api_answered_at", pa.string()),
)
API_ABOUT = {
    "api_record_id": "the row's own id, else a hash of its content",
    "api_status": "success or error",
    "api_fail_reason": "why the row holds no result",
    "api_fail_detail": "what exactly was wrong",
    "api_return": "the answer's text",
    "api_reasoning": "what a reasoning model thought",
    "api_finish_reason": "why the model stopped",
    "api_request_key": "hash of what was asked: rows with the same one were asked the same",
    "api_model": "the model's name",
    "api_prompt": "the prompt file's name and version",
    "api_turns": "replies it took, with those that mended an answer",
    "api_prompt_tokens": "as the endpoint counted",
    "api_completion_tokens": "as the endpoint counted",
    "api_cost_usd": "by the model file's prices; null where it is unknown",
    "api_attempts": "requests it took; 0 where the answer was there",
    "api_endpoint": "who answered",
    "api_latency_ms": "milliseconds until the answer, in all",
    "api_request_id": "the endpoint's own",
    "api_answered_at": "UTC",
}
ApiRow = dict[str, Any]

ADOPTED = "adopted"
"""The endpoint of an answer that was taken over: see `stages/adopt.py`."""
UNKNOWN_OF_ADOPTED = dict.fromkeys(
    ("api_finish_reason", "api_model", "api_prompt", "api_answered_at", "api_latency_ms")
)


def answered_row(finished: Finished, entries: Sequence[Entry], prices: TokenPrices) -> ApiRow:
    """Status, values and provenance of a record that has a reply. One that was taken over from
    another request has no attempts and cost nothing."""
    answer, last = finished.answer, entries[-1]
    known = finished.usage if finished.usage.known and answer else None
    attempts = sum(entry.attempts for entry in entries)
    cost = finished.usage.cost(*prices) if attempts else 0.0
    return {
        **outcome_row(finished.outcome),
        "api_return": answer.text if answer else last.body.decode("utf-8", "replace"),
        "api_reasoning": answer.reasoning if answer else None,
        "tool_calls": answer.tool_calls if answer else None,
        "api_finish_reason": answer.finish_reason if answer else None,
        "api_request_key": last.address.key,
        "api_turns": len(entries),
        "api_prompt_tokens": known.prompt_tokens if known else None,
        "api_completion_tokens": known.completion_tokens if known else None,
        "api_cost_usd": cost,
        "api_attempts": attempts,
        "api_endpoint": last.endpoint,
        "api_latency_ms": sum(entry.latency_ms for entry in entries),
        "api_request_id": answer.request_id if answer else None,
        "api_answered_at": last.answered_at,
    }


def outcome_row(outcome: Outcome) -> ApiRow:
    """Status, reason and values."""
    if isinstance(outcome, Failure):
        return {
            "api_status": "error",
            "api_fail_reason": str(outcome.reason),
            "api_fail_detail": outcome.detail,
        }
    return {"api_status": "success", **outcome.values}


@dataclass
class AnswerTotals:
    """Counts a report's rows as they are written."""

    report: Report = field(default_factory=Report)
    usage: Usage = field(default_factory=Usage)
    cost_usd: float | None = 0.0
    repair_turns: int = 0
    latencies_ms: array[int] = field(default_factory=lambda: array("I"))
    ids: Seen = field(default_factory=Seen)

    def count(self, row: ApiRow, usage: Usage, sample: int | None, keys: Iterable[str]) -> None:
        """`sample` tells several answers to one record apart; of the numbers under `keys` it is
        shown how they are distributed."""
        report, identity = self.report, row["api_record_id"]
        report.rows += 1
        self.usage += usage
        self.repair_turns += (row.get("api_turns") or 1) - 1
        cost: float | None = row.get("api_cost_usd", 0.0)
        if cost is None or self.cost_usd is None:
            self.cost_usd = None
        else:
            self.cost_usd += cost
        if not self.ids.is_new(identity if sample is None else f"{identity}#{sample}"):
            report.repeats(identity)
        if row["api_status"] != "success":
            record = f"record {short(identity)}"
            report.fail(report.rows, record, row["api_fail_reason"], row["api_fail_detail"])
            return
        if (latency := row.get("api_latency_ms")) is not None:
            self.latencies_ms.append(latency)
        for key in keys:
            value = row.get(key)
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if math.isfinite(value):
                report.histograms.setdefault(key, Distribution()).add(value)

    def finish(self, rows_in: int) -> Report:
        """`rows_in` are those that there should be."""
        self.report.rows_in = rows_in
        for key, values in self.report.histograms.items():
            self.report.numbers |= values.numbers(key)
        return self.report

    def numbers(self) -> dict[str, Any]:
        """Of a stage that asks a model; what is not known is not there."""
        found: dict[str, Any] = {"repair_turns": self.repair_turns}
        if self.usage.known:
            found["prompt_tokens"] = self.usage.prompt_tokens
            found["completion_tokens"] = self.usage.completion_tokens
            if self.usage.cached_tokens:
                found["cached_prompt_tokens"] = self.usage.cached_tokens
        if self.cost_usd is not None:
            found["cost_usd"] = self.cost_usd
        if ordered := sorted(self.latencies_ms):
            for name, share in (("median", 0.5), ("p95", 0.95)):
                at = min(len(ordered) - 1, int(len(ordered) * share))
                found[f"latency_ms_{name}"] = ordered[at]
        return found


PICKED = 2
Pick = tuple[float, int, ApiRow, Row | BadLine]
"""What it is picked by, its number, from the last, the row and what it was made from."""


@dataclass
class Picks:
    """Rows to show: two of the best, two of the worst, by the first of the keys that has a number,
    and two that failed."""

    keys: Sequence[str]
    best: list[Pick] = field(default_factory=list[Pick])
    worst: list[Pick] = field(default_factory=list[Pick])
    failed: list[Pick] = field(default_factory=list[Pick])
    _rows: int = 0

    def look(self, row: ApiRow, item: Row | BadLine) -> None:
        self._rows += 1
        if row["api_status"] != "success":
            if len(self.failed) < PICKED:
                self.failed.append((0, -self._rows, row, item))
            return
        numbers = (value for key in self.keys if isinstance(value := row.get(key), int | float))
        value = next(numbers, 0)
        for picked, sign in ((self.best, 1), (self.worst, -1)):
            pick = sign * value, -self._rows, row, item
            if len(picked) < PICKED:
                heappush(picked, pick)
            elif pick[0] > picked[0][0]:
                heapreplace(picked, pick)

    def found(self) -> Iterator[tuple[str, ApiRow, Row | BadLine]]:
        """Each row once, with what it is."""
        seen = set[int]()
        for label, picked in (("best", self.best), ("worst", self.worst), ("failed", self.failed)):
            for _, number, row, item in sorted(picked, key=lambda pick: pick[:2], reverse=True):
                if number not in seen:
                    seen.add(number)
                    yield label, row, item


Rate = Callable[[int, "Row | BadLine"], tuple[ApiRow, Usage]]
"""Status, values and provenance of the row at an index, and what was used for it."""
_ARROW_TYPES = {
    "integer": pa.int64(),
    "number": pa.float64(),
    "boolean": pa.bool_(),
    "string": pa.string(),
}


class ScoreTable:
    """Builds the output batches of one task. `fields` declares a JSON-schema type per key.

    An input column that has the name of a parsed key or of an `api_` column is `moved`; the
    `error_column` of the stage before is left out.
    """

    def __init__(
        self,
        input_schema: pa.Schema,
        fields: Mapping[str, Mapping[str, Any]],
        error_column: str | None,
    ) -> None:
        self._kept = [
            index for index, field in enumerate(input_schema) if field.name != error_column
        ]
        self._keys = [_key_field(key, declared) for key, declared in fields.items()]
        api = [pa.field(name, kind) for name, kind in API_FIELDS]
        self._answers = pa.schema([*self._keys, *api])
        kept = [input_schema.field(index) for index in self._kept]
        self.moved = moved_names((field.name for field in kept), self._answers.names)
        renamed = [field.with_name(self.moved.get(field.name, field.name)) for field in kept]
        self.schema = pa.schema([*renamed, *self._answers])

    def batch(self, source: pa.RecordBatch, rows: Sequence[ApiRow]) -> pa.RecordBatch:
        """`rows[i]` belongs to row i of `source`."""
        columns = [source.column(index) for index in self._kept]
        for column in self._answers:
            values = [row.get(column.name) for row in rows]
            if column.metadata:
                values = [_as_json(value) for value in values]
            columns.append(pa.array(values, column.type))
        return pa.RecordBatch.from_arrays(columns, schema=self.schema)


def arrow_type(declared: Mapping[str, Any]) -> pa.DataType:
    """Scalars and lists of scalars have a type of their own; all else is JSON text."""
    kind = declared.get("type")
    if kind == "array":
        item = _ARROW_TYPES.get(declared.get("items", {}).get("type"))
        return pa.list_(item) if item is not None else pa.string()
    return _ARROW_TYPES.get(kind, pa.string()) if isinstance(kind, str) else pa.string()


def _key_field(key: str, declared: Mapping[str, Any]) -> pa.Field:
    kind = arrow_type(declared)
    is_json = kind == pa.string() and declared.get("type") != "string"
    return pa.field(key, kind, metadata={"modelcall.json": "1"} if is_json else None)


def write_scores(
    source: Source,
    fields: Mapping[str, Mapping[str, Any]],
    input_key: str,
    rate: Rate,
    out: NewFile,
    sent: Callable[[Row | BadLine], object] | None = None,
) -> AnswerTotals:
    """`input_key` is the column that people want to see in a sample, `sent` gives what was asked
    about a row. InputChanged when the source is no longer what its upstream asset recorded."""
    maker, name = source.maker, source.name
    is_result = maker is not None and maker.answers
    table = ScoreTable(source.schema, fields, maker.error_column if maker else None)
    totals, digest, picks = AnswerTotals(), hashlib.sha256(), Picks([*fields])
    report = totals.report

    def rated(index: int, item: Row | BadLine) -> ApiRow:
        row, usage = rate(index, item)
        row["api_record_id"] = record_id(item, index, name, is_result=is_result)
        is_row = isinstance(item, dict)
        sample = item.get("sample") if is_row and is_result else None
        totals.count(row, usage, sample, fields)
        picks.look(row, item)
        content = [row["api_record_id"], row["api_status"], row.get("api_fail_reason")]
        values = [row.get(key) for key in fields] or [row.get("api_return")]
        digest.update(orjson.dumps([content, values], option=orjson.OPT_SORT_KEYS))
        return row

    metadata = {"modelcall.volatile_columns": ",".join(VOLATILE_COLUMNS)}
    with ParquetSink(out, "scores", table.schema, metadata) as sink:
        for batch in source.of_one_file():
            rows = [rated(batch.start + at, item) for at, item in enumerate(batch.items)]
            sink.write(table.batch(batch.to_arrow(source.schema), rows))
    totals.finish(source.rows_read)
    for number, (label, row, item) in enumerate(picks.found()):
        scored = value_at(item, input_key) if isinstance(item, dict) else item.raw
        answer = {name: row.get(name) for name in (*fields, "api_fail_reason", "api_fail_detail")}
        known = {name: value for name, value in answer.items() if value is not None}
        record = {"sample": label, "id": row["api_record_id"], input_key: scored, **known}
        if sent is not None and not number and isinstance(asked := sent(item), ChatRequest):
            record["sent"] = [*asked.messages]
        report.show({**record, "reply": row.get("api_return")})
    report.moved, report.schema = table.moved, as_stored(table.schema)
    report.data_version = digest.hexdigest()[:32]
    return totals


def _as_json(value: Any) -> str | None:
    return None if value is None else orjson.dumps(value).decode()
