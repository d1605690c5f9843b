"""preprocessed: an input file cleaned, filtered and truncated, as Parquet, order kept.

A line or row that cannot be processed stays in its place: `id` and `preprocess_error` are set, all
else is null. `preprocess_error` is JSON, {"reason", "detail", "raw"}, and null in good rows.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson
import pyarrow as pa

from modelcall_assets.config.preprocess import Preprocess
from modelcall_assets.config.spec import PREPROCESSED
from modelcall_assets.records.outcome import Failure, Reason
from modelcall_assets.records.record import BadLine, Row
from modelcall_assets.steps.source import Source
from modelcall_assets.storage.files import NewFile
from modelcall_assets.storage.jsonl import clip
from modelcall_assets.storage.parquet import ParquetSink
from modelcall_assets.storage.rows import Chunk, record_id, sample_row
from modelcall_assets.transforms.universal import (
    Copied,
    Dropped,
    UniversalOptions,
    output_columns,
    process,
)

ERROR_COLUMN = "preprocess_error"
PROCESS_ERRORS = (TypeError, ValueError, KeyError)
"""What `process` raises for a row that it cannot work on."""
SAMPLE_ROWS = 3
_TYPES = {"string": pa.string(), "int": pa.int64(), "float": pa.float64(), "bool": pa.bool_()}


@dataclass(frozen=True, slots=True)
class PreprocessReport:
    """`rows_in` = `rows_out` + all `dropped`, by rule; `failed` of the `rows_out` hold an error."""

    rows_in: int
    rows_out: int
    dropped: dict[str, int]
    failed: int
    schema: pa.Schema
    data_version: str
    sample: list[Row]


def preprocess_file(source: Source, options: UniversalOptions, out: NewFile) -> PreprocessReport:
    """Write the rows of `source` to `out`.

    InputError when it cannot be read, InputChanged when it no longer fits its schema.
    """
    table = _Table(source.schema, options)
    work = _Work(source.name, options)
    with ParquetSink(out, PREPROCESSED, table.schema) as sink:
        for chunk in source.chunks():
            sink.write(table.batch(chunk, work.kept_of(chunk)))
    return PreprocessReport(
        rows_in=work.rows_in,
        rows_out=work.rows_out,
        dropped=dict(work.dropped),
        failed=work.failed,
        schema=table.schema,
        data_version=f"sha256:{work.content.hexdigest()}",
        sample=work.sample,
    )


def options_of(preprocess: Preprocess) -> UniversalOptions:
    """The `preprocess` block of a task, as the transform takes it."""
    filters, cleaning = preprocess.filters, preprocess.transformations.text_cleaning
    computed = preprocess.transformations.computed_fields
    return UniversalOptions(
        field_mapping={
            name: spec if isinstance(spec, str) else spec.model_dump()
            for name, spec in preprocess.field_mapping.items()
        },
        min_text_length=filters.min_text_length,
        max_text_length=filters.max_text_length,
        required_fields=tuple(filters.required_fields),
        blacklist_patterns=tuple(filters.blacklist_patterns),
        remove_extra_whitespace=cleaning.remove_extra_whitespace,
        remove_characters=tuple(cleaning.remove_characters),
        computed_fields={name: spec.model_dump() for name, spec in computed.items()},
        source_name=preprocess.source_name,
        max_tokens=preprocess.max_tokens,
    )


@dataclass(frozen=True, slots=True)
class _Kept:
    """An output row. `position` in its chunk is None when no column is copied from there."""

    position: int | None
    row: Row


@dataclass
class _Work:
    """Processes rows and counts what became of them."""

    source: str
    options: UniversalOptions
    rows_in: int = 0
    rows_out: int = 0
    failed: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    sample: list[Row] = field(default_factory=list)
    content: Any = field(default_factory=hashlib.sha256)

    def kept_of(self, chunk: Chunk) -> list[_Kept]:
        kept: list[_Kept] = []
        for position, item in enumerate(chunk.items):
            made = self._process(item, record_id(item, chunk.start + position, self.source))
            self.rows_in += 1
            if isinstance(made, Dropped):
                self.dropped[made.rule] += 1
                continue
            failed = made[ERROR_COLUMN] is not None
            kept.append(_Kept(None if failed else position, made))
            self._count(made, failed)
        return kept

    def _process(self, item: Row | BadLine, identity: str) -> Row | Dropped:
        if isinstance(item, BadLine):
            return _error_row(identity, Reason.BAD_LINE, item.detail, item.raw)
        try:
            made = process(item, self.options, identity)
        except PROCESS_ERRORS as error:
            raw = orjson.dumps(item, default=str).decode()
            detail = f"{type(error).__name__}: {error}"
            return _error_row(identity, Reason.PREPROCESS_ERROR, detail, clip(raw))
        return made if isinstance(made, Dropped) else {**made, ERROR_COLUMN: None}

    def _count(self, row: Row, failed: bool) -> None:
        self.rows_out += 1
        self.failed += failed
        self.content.update(orjson.dumps(row, default=str, option=orjson.OPT_SORT_KEYS) + b"\n")
        if not failed and len(self.sample) < SAMPLE_ROWS:
            self.sample.append(sample_row(row))


class _Table:
    """Builds output batches: copied columns stay Arrow, the others come from the new rows."""

    def __init__(self, input_schema: pa.Schema, options: UniversalOptions) -> None:
        origins = output_columns(input_schema.names, options)
        self._origins = {**origins, ERROR_COLUMN: "string"}
        self.schema = pa.schema(
            [
                input_schema.field(origin.source).with_name(name)
                if isinstance(origin, Copied)
                else pa.field(name, _TYPES[origin])
                for name, origin in self._origins.items()
            ]
        )

    def batch(self, chunk: Chunk, kept: Sequence[_Kept]) -> pa.RecordBatch:
        positions = pa.array([item.position for item in kept], pa.int64())
        source = chunk.to_arrow()
        columns = [
            source.column(origin.source).take(positions)
            if isinstance(origin, Copied)
            else pa.array([item.row.get(name) for item in kept], _TYPES[origin])
            for name, origin in self._origins.items()
        ]
        return pa.RecordBatch.from_arrays(columns, schema=self.schema)


def _error_row(identity: str, reason: Reason, detail: str, raw: str) -> Row:
    error = orjson.dumps({"reason": reason, "detail": detail, "raw": raw}).decode()
    return {"id": identity, ERROR_COLUMN: error}


def failure_before(row: Row) -> Failure | None:
    """Why a preprocessed row cannot be worked on, when preprocessing said so."""
    error = row.get(ERROR_COLUMN)
    if not error:
        return None
    carried = orjson.loads(error)
    if carried["reason"] == Reason.BAD_LINE:
        return bad_line(BadLine(carried["detail"], carried["raw"]))
    return Failure(Reason(carried["reason"]), carried["detail"])


def bad_line(line: BadLine) -> Failure:
    """What becomes of a line that is no row; its text is kept."""
    return Failure(Reason.BAD_LINE, f"{line.detail}; the line reads: {line.raw}")
