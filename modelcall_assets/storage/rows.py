"""The rows of input files: one by one, or in pieces that are read in one process and parsed in this
or another; their ids, and how they are shown."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import orjson
import pyarrow as pa

from modelcall_assets.errors import InputChanged
from modelcall_assets.records.outcome import BadLine, Row
from modelcall_assets.storage.columns import MOST_ROWS, open_columns, plain_values, rows_of
from modelcall_assets.storage.formats import (
    OURS,
    Format,
    Reading,
    format_of,
    numbered,
    open_lines,
    read_document,
)
from modelcall_assets.storage.jsonl import (
    dumps,
    line_parser,
    loads,
    parse_deep_line,
    parse_line,
    refuse,
)
from modelcall_assets.storage.listing import FileInfo
from modelcall_assets.storage.parquet import is_json_text
from modelcall_assets.storage.places import Place

GIVEN_ID = "api_record_id"
ID_COLUMNS = ("id", "uid")
PIECE_BYTES = 8 << 20
_CHANGED = "does not fit the schema that its raw asset recorded; materialise raw again"


def read_rows(
    place: Place, reading: Reading = OURS, chunk_rows: int = 1000
) -> Iterator[Row | BadLine]:
    """The rows of a file of any format, in order, blank lines left out. A row may be nested deeper
    than orjson writes. InputError when the file cannot be read, or has a bad line and `reading`
    refuses those."""
    return (item for item, _ in read_items(place, reading, chunk_rows) if item is not None)


def read_items(
    place: Place,
    reading: Reading = OURS,
    chunk_rows: int = 1000,
    read: Callable[[bytes], Any] = loads,
) -> Iterator[tuple[Row | BadLine | None, bytes | None]]:
    """`read_rows`, each with its line where the file is of lines; None for blank ones, which come
    as `numbered` gives them. `read` may be `orjson.loads`, for a caller that copies the lines."""
    format_ = format_of(place)
    if format_.has_columns:
        start = 0
        with open_columns(place, format_) as columns:
            for batch in columns.batches(chunk_rows, None):
                yield from zip(plain_rows(batch, start, place, reading), repeat(None))
                start += batch.num_rows
        return
    with open_lines(place, format_, reading) as file:
        parse = line_parser(parse_deep_line, place, reading)
        for number, line in numbered(file):
            try:
                row = read(line)
            except orjson.JSONDecodeError:
                row = None
            yield row if isinstance(row, dict) else parse(line, number), line


def count_rows(place: Place, reading: Reading) -> int:
    """Bad lines count. Nothing is parsed that need not be. InputError as `read_rows` has it."""
    format_ = format_of(place)
    if format_.has_columns:
        with open_columns(place, format_) as columns:
            return sum(batch.num_rows for batch in columns.batches(MOST_ROWS, ()))
    if reading.on_bad_line == "fail":
        return sum(1 for _ in read_rows(place, reading))
    with open_lines(place, format_, reading) as lines:
        return sum(not line.isspace() for _, line in numbered(lines))


def record_id(item: Row | BadLine, index: int, source: str, *, is_result: bool = False) -> str:
    """The row's own `id`, else `uid`, else a hash of the row, its file and its place in it; what is
    a result of ours has its id already."""
    content = b""
    if not isinstance(item, BadLine):
        own = (item.get(GIVEN_ID) if is_result else None) or own_id(item)
        if own is not None:
            return own
        content = orjson.dumps(item, default=str, option=orjson.OPT_SORT_KEYS)
    line = f"{source}#{index}".encode("utf-8", "surrogateescape")
    return hashlib.sha256(content + line).hexdigest()[:32]


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
    return {name: _shown(value, 20) for name, value in row.items()}


def plain_rows(
    batch: pa.RecordBatch, start: int, place: Place, reading: Reading
) -> list[Row | BadLine]:
    """What `rows_of` gives; InputError for a bad one if `reading` refuses those."""
    items = rows_of(batch, start)
    if reading.on_bad_line == "fail":
        for item in items:
            if isinstance(item, BadLine):
                refuse(place, item)
    return items


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive records of one file. `start` is the index of the first, here and in pieces; a bad
    line counts."""

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
        values = ((field, [row.get(field.name) for row in rows]) for field in self.schema)
        try:
            columns = [_column(*each) for each in values]
        except (pa.ArrowException, OverflowError) as error:
            raise InputChanged(f"near row {self.start}: {error}: the file {_CHANGED}") from error
        if not columns:
            return pa.RecordBatch.from_struct_array(pa.array([{}] * len(rows), pa.struct([])))
        return pa.RecordBatch.from_arrays(columns, schema=self.schema)


@dataclass(frozen=True, slots=True)
class LinePiece:
    """Lines that are not blank; `numbers` count all lines of the file from 1."""

    place: Place
    start: int
    lines: Sequence[bytes]
    numbers: Sequence[int]

    @property
    def rows(self) -> int:
        return len(self.lines)

    def chunk(self, schema: pa.Schema, reading: Reading) -> Chunk:
        """InputError when a line is bad and `reading` refuses those."""
        items = map(line_parser(parse_line, self.place, reading), self.lines, self.numbers)
        return Chunk(self.start, [item for item in items if item is not None], schema)


@dataclass(frozen=True, slots=True)
class ColumnPiece:
    """Rows of a file of columns. With `names`, items have those columns only."""

    place: Place
    start: int
    batch: pa.RecordBatch
    names: Collection[str] | None = None

    @property
    def rows(self) -> int:
        return self.batch.num_rows

    def chunk(self, schema: pa.Schema, reading: Reading) -> Chunk:
        """`schema` has the same columns, or more, of the same types or wider ones."""
        shown = self.batch
        if self.names is not None:
            shown = shown.select(_fields(shown.schema, self.names).names)
        items = plain_rows(shown, self.start, self.place, reading)
        batch = self.batch if self.batch.schema.equals(schema) else _widened(self.batch, schema)
        kept = [None if isinstance(item, BadLine) else at for at, item in enumerate(items)]
        batch = batch.take(pa.array(kept, pa.int64())) if None in kept else batch
        return Chunk(self.start, items, schema, batch)


@dataclass(frozen=True, slots=True)
class DocumentPiece:
    """Files that are one record each; they are read where they are parsed."""

    files: Sequence[FileInfo]
    start: int

    @property
    def rows(self) -> int:
        return len(self.files)

    def chunk(self, schema: pa.Schema, reading: Reading) -> Chunk:
        return Chunk(self.start, [*map(read_document, self.files)], schema)


Piece = LinePiece | ColumnPiece | DocumentPiece
"""What a process gets to parse; can be pickled."""


def read_pieces(
    place: Place,
    limit: int | None = None,
    piece_rows: int = 1000,
    reading: Reading = OURS,
    piece_bytes: int = PIECE_BYTES,
    names: Collection[str] | None = None,
    *,
    whole: bool = True,
) -> Iterator[LinePiece | ColumnPiece]:
    """The first `limit` records of a file of any format, in order, blank lines left out, at most
    `piece_rows` and about `piece_bytes` of text at a time. With `names` the items of a file of
    columns have those only, and so have its batches unless they are to be `whole`. InputError when
    the file cannot be read."""
    format_ = format_of(place)
    if format_.has_columns:
        return _column_pieces(place, format_, limit, piece_rows, names, whole)
    return _line_pieces(place, format_, reading, limit, piece_rows, piece_bytes)


def read_chunks(
    place: Place,
    schema: pa.Schema,
    limit: int | None = None,
    chunk_rows: int = 1000,
    reading: Reading = OURS,
    names: Collection[str] | None = None,
    *,
    whole: bool = True,
) -> Iterator[Chunk]:
    """`read_pieces`, parsed. InputError for a bad line that `reading` refuses, InputChanged when
    a file of columns does not have `schema`."""
    expected = schema if whole or names is None else _fields(schema, names)
    for piece in read_pieces(place, limit, chunk_rows, reading, names=names, whole=whole):
        if isinstance(piece, ColumnPiece) and not piece.batch.schema.equals(expected):
            raise InputChanged(f"{place} {_CHANGED}")
        yield piece.chunk(schema, reading)


def document_pieces(files: Sequence[FileInfo], piece_bytes: int) -> Iterator[DocumentPiece]:
    """About `piece_bytes` of files at a time, in order, one at least."""
    start, at, size = 0, 0, 0
    for at, file in enumerate(files):
        if at > start and size + file.size > piece_bytes:
            yield DocumentPiece(files[start:at], start)
            start, size = at, 0
        size += file.size
    if files:
        yield DocumentPiece(files[start : at + 1], start)


def _line_pieces(
    place: Place, format_: Format, reading: Reading, limit: int | None, most_rows: int, most: int
) -> Iterator[LinePiece]:
    start, size = 0, 0
    lines: list[bytes] = []
    numbers: list[int] = []
    with open_lines(place, format_, reading) as file:
        for number, line in numbered(file):
            if start + len(lines) == limit:
                break
            if line.isspace():
                continue
            lines.append(line)
            numbers.append(number)
            size += len(line)
            if len(lines) >= most_rows or size >= most:
                yield LinePiece(place, start, lines, numbers)
                start, size, lines, numbers = start + len(lines), 0, [], []
    if lines:
        yield LinePiece(place, start, lines, numbers)


def _column_pieces(
    place: Place,
    format_: Format,
    limit: int | None,
    piece_rows: int,
    names: Collection[str] | None,
    whole: bool,
) -> Iterator[ColumnPiece]:
    start = 0
    with open_columns(place, format_) as columns:
        kept = None if whole or names is None else _fields(columns.schema, names).names
        for batch in columns.batches(piece_rows, kept):
            batch = batch if kept is None else batch.select(kept)
            batch = batch.slice(0, None if limit is None else limit - start)
            if limit is not None and not batch.num_rows:
                return
            yield ColumnPiece(place, start, batch, names)
            start += batch.num_rows


def _fields(schema: pa.Schema, names: Collection[str]) -> pa.Schema:
    return pa.schema([field for field in schema if field.name in names])


def _widened(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """The batch with the columns that other files of its group have."""
    columns: list[pa.Array] = []
    for field in schema:
        if field.name not in batch.schema.names:
            columns.append(pa.nulls(batch.num_rows, field.type))
        elif is_json_text(field) and not is_json_text(batch.schema.field(field.name)):
            values = plain_values(batch.schema.field(field.name), batch.column(field.name))
            columns.append(_column(field, values))
        else:
            columns.append(batch.column(field.name).cast(field.type))
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _column(field: pa.Field, values: list[Any]) -> pa.Array:
    if is_json_text(field):
        values = [None if value is None else dumps(value).decode() for value in values]
    return pa.array(values, type=field.type)


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
