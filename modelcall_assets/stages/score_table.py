"""The file of scores: every row of the source in its order, beside what it was rated."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import orjson
import pyarrow as pa

from modelcall_assets.llm.answer import Usage
from modelcall_assets.records.outcome import BadLine, Row, moved_names
from modelcall_assets.stages.answer_columns import (
    API_FIELDS,
    VOLATILE_COLUMNS,
    AnswerTotals,
    ApiRow,
)
from modelcall_assets.stages.source import Source
from modelcall_assets.storage.columns import as_stored
from modelcall_assets.storage.files import NewFile
from modelcall_assets.storage.parquet import ParquetSink
from modelcall_assets.transforms.values import value_at

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


def write_scores(
    source: Source,
    fields: Mapping[str, Mapping[str, Any]],
    input_key: str,
    rate: Rate,
    out: NewFile,
) -> AnswerTotals:
    """`input_key` is the column that people want to see in a sample. InputChanged when the source
    is no longer what its upstream asset recorded."""
    source.verify()
    maker = source.maker
    table = ScoreTable(source.schema, fields, maker.error_column if maker else None)
    totals, digest = AnswerTotals(), hashlib.sha256()
    report = totals.report

    def rated(index: int, item: Row | BadLine) -> ApiRow:
        row, usage = rate(index, item)
        row["api_record_id"] = source.identity(item, index)
        is_row = isinstance(item, dict)
        sample = item.get("sample") if is_row and maker and maker.answers else None
        totals.count(row, usage, sample, fields)
        if report.shows_more:
            names = [*fields, "api_status", "api_fail_reason", "api_return"]
            scored = value_at(item, input_key) if is_row else None
            shown = {name: row.get(name) for name in names}
            report.show({"id": row["api_record_id"], input_key: scored, **shown})
        content = [row["api_record_id"], row["api_status"], row.get("api_fail_reason")]
        values = [row.get(key) for key in fields] or [row.get("api_return")]
        digest.update(orjson.dumps([content, values], option=orjson.OPT_SORT_KEYS))
        return row

    metadata = {"modelcall.volatile_columns": ",".join(VOLATILE_COLUMNS)}
    with ParquetSink(out, "scores", table.schema, metadata) as sink:
        for chunk in source.chunks():
            rows = [rated(chunk.start + at, item) for at, item in enumerate(chunk.items)]
            sink.write(table.batch(chunk.to_arrow(), rows))
    totals.finish(source.rows_read)
    report.moved, report.schema = table.moved, as_stored(table.schema)
    report.data_version = digest.hexdigest()[:32]
    return totals


def _as_json(value: Any) -> str | None:
    return None if value is None else orjson.dumps(value).decode()
