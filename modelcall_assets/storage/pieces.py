"""Input files as pieces of consecutive records: read in one process, parsed in this or another."""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa

from modelcall_assets.errors import InputChanged
from modelcall_assets.records.outcome import BadLine, Row
from modelcall_assets.storage.columns import open_columns, plain_values
from modelcall_assets.storage.files import open_input
from modelcall_assets.storage.formats import OURS, Format, Reading, format_of, numbered, open_lines
from modelcall_assets.storage.jsonl import line_parser, parse_line
from modelcall_assets.storage.listing import FileInfo
from modelcall_assets.storage.numbers import dumps
from modelcall_assets.storage.places import Place
from modelcall_assets.storage.rows import plain_rows
from modelcall_assets.storage.schema import is_json_text

PIECE_BYTES = 8 << 20
MOST_DOCUMENT_BYTES = 1 << 30
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


class Piece(Protocol):
    """What a process gets to parse; can be pickled. `start` is the index of its first record."""

    @property
    def start(self) -> int: ...
    @property
    def rows(self) -> int: ...
    def chunk(self, schema: pa.Schema, reading: Reading) -> Chunk: ...


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
        parse = line_parser(parse_line, self.place, reading)
        items = map(parse, self.lines, self.numbers)
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
        names = self.names
        shown = self.batch
        if names is not None:
            shown = shown.select(_fields(shown.schema, names).names)
        items = plain_rows(shown, self.start, self.place, reading)
        batch = self.batch if self.batch.schema.equals(schema) else _widened(self.batch, schema)
        return Chunk(self.start, items, schema, _without_bad(batch, items))


@dataclass(frozen=True, slots=True)
class DocumentPiece:
    """Files that are one record each; they are read where they are parsed."""

    files: Sequence[FileInfo]
    start: int

    @property
    def rows(self) -> int:
        return len(self.files)

    def chunk(self, schema: pa.Schema, reading: Reading) -> Chunk:
        """`text` is bytes, in UTF-8 without a mark; what is not UTF-8 has replacement characters.
        `path` is relative to the input folder. InputError when a file cannot be read."""
        return Chunk(self.start, [*map(_read_document, self.files)], schema)


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
    """The first `limit` records of a file of any format, in order, blank lines left out.

    A piece has at most `piece_rows` rows and about `piece_bytes` of text. With `names` the items of
    a file of columns have those only, and so have its batches unless they are to be `whole`.
    InputError when the file cannot be read.
    """
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
    """`read_pieces`, parsed. InputError also for a bad line that `reading` refuses; InputChanged
    when a file of columns does not have `schema`."""
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


def _read_document(file: FileInfo) -> Row | BadLine:
    if file.size > MOST_DOCUMENT_BYTES:
        return BadLine(f"{file.uri}: larger than {MOST_DOCUMENT_BYTES >> 30} GiB", file.key_path)
    with open_input(file.place) as opened:
        content = opened.read()
    text = _as_utf8(content.removeprefix(codecs.BOM_UTF8))
    identity = hashlib.sha256(file.key_path.encode("utf-8", "surrogateescape") + b"\0")
    identity.update(text)
    return {
        "id": identity.hexdigest()[:32],
        "path": file.key_path,
        "uri": file.uri,
        "text": text,
    }


def _as_utf8(content: bytes) -> bytes:
    try:
        text_array(content).validate(full=True)
    except pa.ArrowInvalid:
        return content.decode("utf-8", "replace").encode()
    return content


def text_array(text: bytes) -> pa.StringArray:
    """Of one text, without a copy of it."""
    offsets = pa.array([0, len(text)], pa.int32()).buffers()[1]
    return pa.StringArray.from_buffers(1, offsets, pa.py_buffer(text))


def _line_pieces(
    place: Place,
    format_: Format,
    reading: Reading,
    limit: int | None,
    piece_rows: int,
    piece_bytes: int,
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
            if len(lines) >= piece_rows or size >= piece_bytes:
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


def _without_bad(batch: pa.RecordBatch, items: Sequence[Row | BadLine]) -> pa.RecordBatch:
    kept = [None if isinstance(item, BadLine) else at for at, item in enumerate(items)]
    return batch.take(pa.array(kept, pa.int64())) if None in kept else batch


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
