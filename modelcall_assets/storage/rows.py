"""Input files as a stream of chunks: row by row for Python, column by column for Arrow."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, repeat
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from modelcall_assets.errors import InputChanged, InputError
from modelcall_assets.records.record import BadLine, Row
from modelcall_assets.storage.files import open_input
from modelcall_assets.storage.jsonl import parse_deep_line, parse_line
from modelcall_assets.storage.parquet import (
    open_arrow,
    open_parquet,
    parquet_schema,
    plain_rows,
    read_as,
)
from modelcall_assets.storage.places import Place
from modelcall_assets.storage.schema import is_json_text

CHUNK_BYTES = 32 << 20
SHOWN_LEVELS = 20
_CHANGED = "does not fit the schema that its raw asset recorded; materialise raw again"


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive records of one file. `start` is the index of the first; a bad line counts."""

    start: int
    items: Sequence[Row | BadLine]
    schema: pa.Schema
    batch: pa.RecordBatch | None = None
    """What a Parquet file holds of these rows."""

    def to_arrow(self) -> pa.RecordBatch:
        """One row per item, a bad line as nulls. InputChanged when one does not fit `schema`."""
        if self.batch is not None:
            return self.batch
        rows = [{} if isinstance(item, BadLine) else item for item in self.items]
        try:
            columns = [
                _column(field, [row.get(field.name) for row in rows]) for field in self.schema
            ]
        except (pa.ArrowException, OverflowError) as error:
            raise InputChanged(f"near row {self.start}: {error}: the file {_CHANGED}") from error
        if not columns:
            return pa.RecordBatch.from_struct_array(pa.array([{}] * len(rows), pa.struct([])))
        return pa.RecordBatch.from_arrays(columns, schema=self.schema)


def read_chunks(
    place: Place, schema: pa.Schema, limit: int | None = None, chunk_rows: int = 1000
) -> Iterator[Chunk]:
    """Stream the first `limit` records of a JSONL or Parquet file, in order, blank lines left out.

    A chunk has at most `chunk_rows` rows and about 32 MiB of text. InputError when the file cannot
    be read as what its name says, InputChanged when a Parquet file does not have `schema`.
    """
    read = _parquet_chunks if is_parquet(place) else _jsonl_chunks
    return read(place, schema, limit, chunk_rows)


def read_rows(place: Place, chunk_rows: int = 1000) -> Iterator[Row | BadLine]:
    """Stream the rows of a JSONL (`.jsonl`, `.json`), Parquet or Arrow file, in order, blank lines
    left out; a row that has no plain values is a BadLine in its place. A row may be nested deeper
    than orjson writes. InputError when the file cannot be read as what its name says."""
    return (item for item, _ in read_items(place, chunk_rows))


def read_items(
    place: Place, chunk_rows: int = 1000
) -> Iterator[tuple[Row | BadLine, bytes | None]]:
    """`read_rows`, each with its line where the file is of lines."""
    if is_parquet(place):
        with open_parquet(place) as parquet:
            rows = _batch_rows(parquet, chunk_rows)
            for batch in parquet.iter_batches(batch_size=rows):
                yield from zip(_rows_of(batch, place), repeat(None))
    elif place.name.lower().endswith(".arrow"):
        with open_arrow(place) as batches:
            for batch in batches:
                for part in _parts(batch, chunk_rows):
                    yield from zip(_rows_of(part, place), repeat(None))
    else:
        with open_input(place) as file:
            if place.name.lower().endswith(".json") and file.peek(64).lstrip()[:1] == b"[":
                raise InputError(f"{place}: one JSON array; write it as one object per line")
            for number, line in enumerate(file, 1):
                item = parse_deep_line(line, number)
                if item is not None:
                    yield item, line


def is_parquet(place: Place) -> bool:
    return place.name.lower().endswith(".parquet")


def record_id(item: Row | BadLine, index: int, source: str) -> str:
    """The row's own `id`, else `uid`, else a hash of the row, its file and its place in it."""
    if isinstance(item, BadLine):
        return _hashed(b"", index, source)
    own = own_id(item)
    if own is not None:
        return own
    return _hashed(orjson.dumps(item, default=str, option=orjson.OPT_SORT_KEYS), index, source)


def own_id(row: Row) -> str | None:
    """`id` or `uid` as text; None when the row has neither."""
    for name in ("id", "uid"):
        value = row.get(name)
        if value is not None and value != "":
            return str(value)
    return None


def sample_row(row: Row) -> Row:
    """A copy fit for showing: JSON values only, strings of 300 characters, lists of 10 items, of
    what is nested the first 20 levels."""
    return {name: _shown(value, SHOWN_LEVELS) for name, value in row.items()}


def _jsonl_chunks(
    place: Place, schema: pa.Schema, limit: int | None, chunk_rows: int
) -> Iterator[Chunk]:
    start, size = 0, 0
    items: list[Row | BadLine] = []
    with open_input(place) as file:
        lines = ((line, parse_line(line, number)) for number, line in enumerate(file, 1))
        records = ((line, item) for line, item in lines if item is not None)
        for line, item in islice(records, limit):
            items.append(item)
            size += len(line)
            if len(items) >= chunk_rows or size >= CHUNK_BYTES:
                yield Chunk(start, items, schema)
                start, size, items = start + len(items), 0, []
    if items:
        yield Chunk(start, items, schema)


def _parquet_chunks(
    place: Place, schema: pa.Schema, limit: int | None, chunk_rows: int
) -> Iterator[Chunk]:
    start = 0
    with open_parquet(place) as parquet:
        if not parquet_schema(parquet).equals(schema):
            raise InputChanged(f"{place} {_CHANGED}")
        for batch in parquet.iter_batches(batch_size=_batch_rows(parquet, chunk_rows)):
            batch = batch.slice(0, None if limit is None else limit - start).cast(schema)
            if not batch.num_rows:
                return
            yield Chunk(start, plain_rows(batch, place), schema, batch)
            start += batch.num_rows


def _batch_rows(parquet: pq.ParquetFile, chunk_rows: int) -> int:
    """Fewer rows per chunk where rows are large."""
    metadata = parquet.metadata
    groups = (metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
    row_bytes = max(1, sum(groups) // max(1, metadata.num_rows))
    return max(1, min(chunk_rows, CHUNK_BYTES // row_bytes))


def _parts(batch: pa.RecordBatch, chunk_rows: int) -> Iterator[pa.RecordBatch]:
    """Slices of the batch; fewer rows in each where rows are large."""
    row_bytes = max(1, batch.nbytes // max(1, batch.num_rows))
    rows = max(1, min(chunk_rows, CHUNK_BYTES // row_bytes))
    return (batch.slice(start, rows) for start in range(0, batch.num_rows, rows))


def _rows_of(batch: pa.RecordBatch, place: Place) -> list[Row | BadLine]:
    """The batch's rows, one by one when not all of them can be read."""
    batch = batch.cast(read_as(batch.schema))
    try:
        return [*plain_rows(batch, place)]
    except InputError as error:
        if batch.num_rows == 1:
            return [BadLine(str(error), "")]
    return [
        item for start in range(batch.num_rows) for item in _rows_of(batch.slice(start, 1), place)
    ]


def _column(field: pa.Field, values: list[Any]) -> pa.Array:
    if is_json_text(field):
        values = [None if value is None else orjson.dumps(value).decode() for value in values]
    return pa.array(values, type=field.type)


def _hashed(content: bytes, index: int, source: str) -> str:
    place = f"{source}#{index}".encode("utf-8", "surrogateescape")
    return hashlib.sha256(content + place).hexdigest()[:32]


def _shown(value: Any, levels: int) -> Any:
    if isinstance(value, str):
        return value if len(value) <= 300 else f"{value[:300]}…"
    if isinstance(value, dict | list | tuple) and not levels:
        return "…"
    if isinstance(value, dict):
        return {str(name): _shown(inner, levels - 1) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        more = [f"… {len(value) - 10} more"] if len(value) > 10 else []
        return [_shown(inner, levels - 1) for inner in value[:10]] + more
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    return value if value is None or isinstance(value, bool | int | float) else str(value)
