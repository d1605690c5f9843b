"""The rows of a scores file: input columns, parsed keys, status and provenance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import orjson
import pyarrow as pa

from modelcall_assets.journal.journal import Entry
from modelcall_assets.llm.dialogue import Finished
from modelcall_assets.records.outcome import Failure, Outcome
from modelcall_assets.records.record import moved_names
from modelcall_assets.steps.replay import Unanswered

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
_ARROW_TYPES = {
    "integer": pa.int64(),
    "number": pa.float64(),
    "boolean": pa.bool_(),
    "string": pa.string(),
}

ApiRow = dict[str, Any]

ADOPTED = "adopted"
"""The endpoint of an answer that was taken over: see `steps/adopt.py`."""
UNKNOWN_OF_ADOPTED = dict.fromkeys(
    ("api_finish_reason", "api_model", "api_prompt", "api_answered_at", "api_latency_ms")
)


class ScoreTable:
    """Builds the output batches of one task. `fields` declares a JSON-schema type per key.

    An input column that has the name of a parsed key or of an `api_` column is `moved`; columns in
    `internal` are left out.
    """

    def __init__(
        self,
        input_schema: pa.Schema,
        fields: Mapping[str, Mapping[str, Any]],
        internal: Sequence[str],
    ) -> None:
        self._kept = [
            index for index, field in enumerate(input_schema) if field.name not in internal
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
        for field in self._answers:
            values = [row.get(field.name) for row in rows]
            if field.metadata:
                values = [_as_json(value) for value in values]
            columns.append(pa.array(values, field.type))
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


def answered_row(finished: Finished, entries: Sequence[Entry], prices: tuple[Any, Any]) -> ApiRow:
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


def unanswered_row(unanswered: Unanswered) -> ApiRow:
    """Status and reason of a record without a reply that counts."""
    return {
        **outcome_row(unanswered.failure),
        "api_request_key": unanswered.key,
        "api_turns": 0,
        "api_attempts": unanswered.attempts,
        "api_endpoint": unanswered.endpoint,
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


def _as_json(value: Any) -> str | None:
    return None if value is None else orjson.dumps(value).decode()
