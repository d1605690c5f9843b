"""The columns of scores, what is told of each row that is answered or rated, and the totals."""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappush, heapreplace
from typing import Any

import orjson
import pyarrow as pa

from modelcall_assets.config.model import TokenPrices
from modelcall_assets.journal.lines import Entry, Words
from modelcall_assets.llm.completion import Usage
from modelcall_assets.llm.dialogue import Finished
from modelcall_assets.records.outcome import BadLine, Failure, Outcome, Row, moved_names, short
from modelcall_assets.stages.report import Distribution, Report
from modelcall_assets.stages.source import Source
from modelcall_assets.storage.rows import record_id
from modelcall_assets.storage.values import JSON_TEXT

TEXT, WHOLE, REAL = pa.string(), pa.int64(), pa.float64()
_STEADY: tuple[tuple[str, pa.DataType, str], ...] = (
    ("api_record_id", TEXT, "the row's own id, else a hash of its content"),
    ("api_status", TEXT, "success or error"),
    ("api_fail_reason", TEXT, "why the row holds no result"),
    ("api_fail_detail", TEXT, "what exactly was wrong"),
    ("api_return", TEXT, "the answer's text"),
    ("api_reasoning", TEXT, "what a reasoning model thought"),
    ("api_finish_reason", TEXT, "why the model stopped"),
    ("api_request_key", TEXT, "hash of what was asked: rows with the same one were asked the same"),
    ("api_model", TEXT, "the model's name"),
    ("api_prompt", TEXT, "the prompt file's name and version"),
    ("api_turns", pa.int32(), "replies it took, with those that mended an answer"),
    ("api_prompt_tokens", WHOLE, "as the endpoint counted"),
    ("api_completion_tokens", WHOLE, "as the endpoint counted"),
    ("api_cost_usd", REAL, "by the model file's prices; null where it is unknown"),
)
_VOLATILE = (
    ("api_attempts", pa.int32(), "requests it took; 0 where the answer was there"),
    ("api_endpoint", TEXT, "who answered"),
    ("api_latency_ms", WHOLE, "milliseconds until the answer, in all"),
    ("api_request_id", TEXT, "the endpoint's own"),
    ("api_answered_at", TEXT, "UTC"),
)
API_FIELDS = tuple((name, kind) for name, kind, _ in _STEADY + _VOLATILE)
API_ABOUT = {name: about for name, _, about in _STEADY + _VOLATILE}
VOLATILE_COLUMNS = tuple(name for name, *_ in _VOLATILE)
"""What may differ between two undisturbed runs that got the same answers."""
ApiRow = dict[str, Any]


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
        "logprobs": answer.logprobs if answer else None,
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


class AnswerTotals:
    """Counts a report's rows as they are written, `samples` to each of the source; of the numbers
    under `keys` it is shown how they are distributed."""

    def __init__(self, source: Source, keys: Collection[str] = (), samples: int = 1) -> None:
        self.report = Report(rows_in=source.rows_read * samples)
        self.digest = hashlib.sha256()
        """Of ids, status and answers."""
        self._source, self._keys = source.name, keys
        self.is_result = source.maker is not None and source.maker.answers
        """Whether the source is answers itself."""
        self.usage, self.repair_turns = Usage(), 0
        self.cost_usd: float | None = 0.0
        self._latencies_ms, self._ids = array("I"), Words()

    def count(
        self, index: int, item: Row | BadLine, row: ApiRow, usage: Usage, sample: int | None
    ) -> None:
        """Give the row of an item its id. `sample` tells several answers to one record apart."""
        report = self.report
        identity = record_id(item, index, self._source, is_result=self.is_result)
        row["api_record_id"] = identity
        report.rows += 1
        self.usage += usage
        self.repair_turns += (row.get("api_turns") or 1) - 1
        cost: float | None = row.get("api_cost_usd", 0.0)
        if cost is None or self.cost_usd is None:
            self.cost_usd = None
        else:
            self.cost_usd += cost
        if not self._ids.add(hash(identity if sample is None else f"{identity}#{sample}")):
            report.repeats(identity)
        if row["api_status"] != "success":
            record = f"record {short(identity)}"
            report.fail(report.rows, record, row["api_fail_reason"], row["api_fail_detail"])
            return
        if (latency := row.get("api_latency_ms")) is not None:
            self._latencies_ms.append(latency)
        for key in self._keys:
            value = row.get(key)
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if math.isfinite(value):
                if key not in report.histograms:
                    report.histograms[key] = Distribution()
                report.histograms[key].add(value)

    def finish(self) -> None:
        self.report.data_version = self.digest.hexdigest()[:32]
        for key, values in self.report.histograms.items():
            self.report.numbers |= values.numbers(key)

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
        if ordered := sorted(self._latencies_ms):
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
    _rows: int = 0

    def __post_init__(self) -> None:
        self._picked: dict[str, list[Pick]] = {"best": [], "worst": [], "failed": []}

    def look(self, row: ApiRow, item: Row | BadLine) -> None:
        self._rows += 1
        places = {"failed": 0.0}
        if row["api_status"] == "success":
            numbers = (value for key in self.keys if isinstance(value := row.get(key), int | float))
            value = next(numbers, 0)
            places = {"best": value, "worst": -value}
        for label, value in places.items():
            picked, pick = self._picked[label], (value, -self._rows, row, item)
            if len(picked) < PICKED:
                heappush(picked, pick)
            elif value > picked[0][0]:
                heapreplace(picked, pick)

    def found(self) -> Iterator[tuple[str, ApiRow, Row | BadLine]]:
        """Each row once, with what it is."""
        seen = set[int]()
        for label, picked in self._picked.items():
            for _, number, row, item in sorted(picked, key=lambda pick: pick[:2], reverse=True):
                if number not in seen:
                    seen.add(number)
                    yield label, row, item


Rate = Callable[[int, "Row | BadLine"], tuple[ApiRow, Usage]]
"""Status, values and provenance of the row at an index, and what was used for it."""
_ARROW_TYPES = {"integer": WHOLE, "number": REAL, "boolean": pa.bool_(), "string": TEXT}


class ScoreTable:
    """The output of one task. `fields` declares a JSON-schema type per key.

    An input column that has the name of a parsed key or of an `api_` column is `moved`; the
    `error_column` of the stage before is left out.
    """

    def __init__(
        self,
        input_schema: pa.Schema,
        fields: Mapping[str, Mapping[str, Any]],
        error_column: str | None,
    ) -> None:
        self._kept = [at for at, name in enumerate(input_schema.names) if name != error_column]
        keys = (_key_field(key, declared) for key, declared in fields.items())
        self._answers = pa.schema([*keys, *API_FIELDS])
        kept = [input_schema.field(at) for at in self._kept]
        self.moved = moved_names((field.name for field in kept), self._answers.names)
        renamed = (field.with_name(self.moved.get(field.name, field.name)) for field in kept)
        self.schema = pa.schema([*renamed, *self._answers])

    def batch(self, source: pa.RecordBatch, rows: Sequence[ApiRow]) -> pa.RecordBatch:
        """`rows[i]` belongs to row i of `source`."""
        columns = [source.column(at) for at in self._kept]
        for column in self._answers:
            values = [row.get(column.name) for row in rows]
            if column.metadata:
                values = [v if v is None else orjson.dumps(v).decode() for v in values]
            columns.append(pa.array(values, column.type))
        return pa.RecordBatch.from_arrays(columns, schema=self.schema)


def _key_field(key: str, declared: Mapping[str, Any]) -> pa.Field:
    """Scalars and lists of scalars have a type of their own; all else is JSON text."""
    kind, own = declared.get("type"), None
    if kind == "array":
        item = _ARROW_TYPES.get(declared.get("items", {}).get("type"))
        own = None if item is None else pa.list_(item)
    elif isinstance(kind, str):
        own = _ARROW_TYPES.get(kind)
    return pa.field(key, TEXT, metadata=JSON_TEXT) if own is None else pa.field(key, own)
