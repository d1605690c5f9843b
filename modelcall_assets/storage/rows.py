"""Input files as a stream of chunks: row by row for Python, column by column for Arrow."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, repeat
from typing import Any

import orjson
import pyarrow as pa

from modelcall_assets.errors import InputChanged
from modelcall_assets.records.record import BadLine, Row
from modelcall_assets.storage.columns import open_columns, rows_of
from modelcall_assets.storage.formats import OURS, Format, Reading, format_of, open_lines
from modelcall_assets.storage.jsonl import line_parser, parse_deep_line, parse_line, refuse
from modelcall_assets.storage.places import Place
from modelcall_assets.storage.schema import is_json_text

GIVEN_ID = "api_record_id"
CHUNK_BYTES = 32 << 20
ID_COLUMNS = ("id", "uid")
SHOWN_LEVELS = 20
_CHANGED = "does not fit the schema that its raw asset recorded; materialise raw again"


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive records of one file. `start` is the index of the first; a bad line counts."""

    start: int
    items: Sequence[Row | BadLine]
    schema: pa.Schema
    batch: pa.RecordBatch | None = None
    """What a file of columns holds of these rows."""

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
    place: Place,
    schema: pa.Schema,
    limit: int | None = None,
    chunk_rows: int = 1000,
    reading: Reading = OURS,
) -> Iterator[Chunk]:
    """Stream the first `limit` records of a file of any format, in order, blank lines left out.

    A chunk has at most `chunk_rows` rows and about 32 MiB of text. InputError when the file cannot
    be read, or has a bad line and `reading` refuses those; InputChanged when a file of columns does
    not have `schema`.
    """
    format_ = format_of(place)
    read = _column_chunks if format_.has_columns else _line_chunks
    return read(place, format_, reading, schema, limit, chunk_rows)


def read_rows(
    place: Place, reading: Reading = OURS, chunk_rows: int = 1000
) -> Iterator[Row | BadLine]:
    """Stream the rows of a file of any format, in order, blank lines left out. A row may be nested
    deeper than orjson writes. InputError as for `read_chunks`."""
    items = read_items(place, reading, chunk_rows)
    return (item for item, _ in items if item is not None)


def read_items(
    place: Place, reading: Reading = OURS, chunk_rows: int = 1000
) -> Iterator[tuple[Row | BadLine | None, bytes | None]]:
    """`read_rows`, each with its line where the file is of lines; None for a blank one."""
    format_ = format_of(place)
    if format_.has_columns:
        start = 0
        with open_columns(place, format_) as columns:
            for batch in columns.batches(chunk_rows, None):
                yield from zip(_rows(batch, start, place, reading), repeat(None))
                start += batch.num_rows
        return
    with open_lines(place, format_, reading) as file:
        parse = line_parser(parse_deep_line, place, reading)
        for number, line in enumerate(file, 1):
            yield parse(line, number), line


def record_id(item: Row | BadLine, index: int, source: str) -> str:
    """The id that an earlier stage of ours gave the row, else its own `id`, else `uid`, else a hash
    of the row, its file and its place in it."""
    if isinstance(item, BadLine):
        return _hashed(b"", index, source)
    given = item.get(GIVEN_ID)
    own = given if given and isinstance(given, str) else own_id(item)
    if own is not None:
        return own
    return _hashed(orjson.dumps(item, default=str, option=orjson.OPT_SORT_KEYS), index, source)


def own_id(row: Row) -> str | None:
    """`id` or `uid` as text, bytes in hexadecimal; None when the row has neither."""
    for name in ID_COLUMNS:
        value = row.get(name)
        if value is not None and value != "":
            return value.hex() if isinstance(value, bytes) else str(value)
    return None


def sample_row(row: Row) -> Row:
    """A copy fit for showing: JSON values only, strings of 300 characters, lists of 10 items, of
    what is nested the first 20 levels."""
    return {name: _shown(value, SHOWN_LEVELS) for name, value in row.items()}


def _line_chunks(
    place: Place,
    format_: Format,
    reading: Reading,
    schema: pa.Schema,
    limit: int | None,
    chunk_rows: int,
) -> Iterator[Chunk]:
    start, size = 0, 0
    items: list[Row | BadLine] = []
    with open_lines(place, format_, reading) as file:
        parse = line_parser(parse_line, place, reading)
        lines = ((line, parse(line, number)) for number, line in enumerate(file, 1))
        records = ((line, item) for line, item in lines if item is not None)
        for line, item in islice(records, limit):
            items.append(item)
            size += len(line)
            if len(items) >= chunk_rows or size >= CHUNK_BYTES:
                yield Chunk(start, items, schema)
                start, size, items = start + len(items), 0, []
    if items:
        yield Chunk(start, items, schema)


def _column_chunks(
    place: Place,
    format_: Format,
    reading: Reading,
    schema: pa.Schema,
    limit: int | None,
    chunk_rows: int,
) -> Iterator[Chunk]:
    start = 0
    with open_columns(place, format_) as columns:
        if not columns.schema.equals(schema):
            raise InputChanged(f"{place} {_CHANGED}")
        for batch in columns.batches(chunk_rows, None):
            batch = batch.slice(0, None if limit is None else limit - start)
            if limit is not None and not batch.num_rows:
                return
            items = _rows(batch, start, place, reading)
            yield Chunk(start, items, schema, _without_bad(batch, items))
            start += batch.num_rows


def _rows(batch: pa.RecordBatch, start: int, place: Place, reading: Reading) -> list[Row | BadLine]:
    items = rows_of(batch, start)
    if reading.on_bad_line == "fail":
        for item in items:
            if isinstance(item, BadLine):
                refuse(place, item)
    return items


def _without_bad(batch: pa.RecordBatch, items: Sequence[Row | BadLine]) -> pa.RecordBatch:
    kept = [None if isinstance(item, BadLine) else at for at, item in enumerate(items)]
    return batch.take(pa.array(kept, pa.int64())) if None in kept else batch


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
