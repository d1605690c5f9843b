"""The rows of input files, by batches that are read in one process and parsed in this or another;
their ids, and how they are shown."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import chain, islice, repeat
from typing import Any

import orjson
import pyarrow as pa

from modelcall_assets.errors import InputChanged, InputError
from modelcall_assets.records.outcome import BadLine, Row
from modelcall_assets.storage.columns import MOST_ROWS, open_columns, plain_values, rows_of
from modelcall_assets.storage.formats import (
    OURS,
    Digest,
    Format,
    Reading,
    format_of,
    line_blocks,
    open_lines,
    parse_line,
    read_document,
)
from modelcall_assets.storage.listing import FileInfo
from modelcall_assets.storage.places import Place
from modelcall_assets.storage.values import dumps, is_json_text

GIVEN_ID = "api_record_id"
ID_COLUMNS = ("id", "uid")
BATCH_ROWS = 1000
BATCH_BYTES = 8 << 20
STREAM_BYTES = 64 << 10
"""Of a batch whose rows are worked on one by one."""
_CHANGED = "does not fit the schema that was recorded of it; run the task again"


@dataclass(frozen=True)
class Batch(ABC):
    """Consecutive records of one file, read and not parsed yet; can be pickled. `start` is the
    index of the first; a bad line counts. `blank` lines were left out."""

    start: int
    blank: int = field(default=0, kw_only=True)

    @cached_property
    @abstractmethod
    def items(self) -> Sequence[Row | BadLine]:
        """InputError when one is bad and the task refuses those."""

    @property
    def rows(self) -> int:
        return len(self.items)

    def deep_items(self) -> Sequence[Row | BadLine]:
        """The items; a row may be nested deeper than orjson writes."""
        return self.items

    def with_lines(self) -> Iterable[tuple[Row | BadLine, bytes | None]]:
        """The items, each with its line where the file has lines, for a caller that copies those.
        Numbers are doubles then, and a row may be nested deeper than orjson writes."""
        return zip(self.items, repeat(None), strict=False)

    def to_arrow(self, schema: pa.Schema) -> pa.RecordBatch:
        """One row per item, a bad line as nulls. InputChanged when one does not fit `schema`."""
        return columns_of(self.items, schema, self.start)


@dataclass(frozen=True)
class LineBatch(Batch):
    """Lines; `numbers` count all lines of the file from 1."""

    place: Place
    reading: Reading
    lines: Sequence[bytes]
    numbers: Sequence[int]

    @property
    def rows(self) -> int:
        return len(self.lines)

    @cached_property
    def items(self) -> Sequence[Row | BadLine]:
        return self._parsed(may_be_deep=False)

    def deep_items(self) -> Sequence[Row | BadLine]:
        return self._parsed(may_be_deep=True)

    def _parsed(self, *, may_be_deep: bool) -> Sequence[Row | BadLine]:
        parse = partial(parse_line, encoding=self.reading.encoding, may_be_deep=may_be_deep)
        return _accepted(self.place, self.reading, [*map(parse, self.lines, self.numbers)])

    def with_lines(self) -> Iterable[tuple[Row | BadLine, bytes]]:
        items = map(_copied, self.lines, self.numbers, repeat(self.reading.encoding))
        if self.reading.on_bad_line == "fail":
            return zip(_accepted(self.place, self.reading, [*items]), self.lines, strict=True)
        return zip(items, self.lines, strict=True)


@dataclass(frozen=True)
class ColumnBatch(Batch):
    """Rows of a file of columns. With `names`, items have those columns only."""

    place: Place
    reading: Reading
    columns: pa.RecordBatch
    names: Collection[str] | None = None

    @property
    def rows(self) -> int:
        return self.columns.num_rows

    @cached_property
    def items(self) -> Sequence[Row | BadLine]:
        shown = self.columns
        if self.names is not None:
            shown = shown.select(_fields(shown.schema, self.names).names)
        return _accepted(self.place, self.reading, rows_of(shown, self.start))

    def to_arrow(self, schema: pa.Schema) -> pa.RecordBatch:
        """`schema` has the same columns, or more, of the same types or wider ones."""
        whole = self.columns
        batch = whole if whole.schema.equals(schema) else _widened(whole, schema)
        kept = [None if isinstance(item, BadLine) else at for at, item in enumerate(self.items)]
        return batch.take(pa.array(kept, pa.int64())) if None in kept else batch


@dataclass(frozen=True)
class DocumentBatch(Batch):
    """Files that are one record each; they are read where they are parsed."""

    files: Sequence[FileInfo]

    @property
    def rows(self) -> int:
        return len(self.files)

    @cached_property
    def items(self) -> Sequence[Row | BadLine]:
        return [*map(read_document, self.files)]


@dataclass(frozen=True)
class RowBatch(Batch):
    items: Sequence[Row | BadLine] = ()  # type: ignore[assignment]


def read_batches(
    place: Place,
    reading: Reading = OURS,
    *,
    limit: int | None = None,
    rows: int = BATCH_ROWS,
    size: int = BATCH_BYTES,
    names: Collection[str] | None = None,
    whole: bool = True,
    schema: pa.Schema | None = None,
    content: Digest | None = None,
) -> Iterator[LineBatch | ColumnBatch]:
    """The first `limit` records of a file of any format, in order, blank lines left out, at most
    `rows` and about `size` bytes of text at a time. With `names` the items of a file of columns
    have those only, and so have its batches unless they are to be `whole`. `content` hears all
    bytes of a file of lines.

    InputError when the file cannot be read, InputChanged when a file of columns has not `schema`.
    """
    format_ = format_of(place)
    if not format_.has_columns:
        yield from _line_batches(place, format_, reading, limit, rows, size, content)
        return
    start, some = 0, None if whole else names
    expected = schema if schema is None or some is None else _fields(schema, some)
    with open_columns(place, format_) as columns:
        kept = None if some is None else _fields(columns.schema, some).names
        for batch in columns.batches(rows, kept):
            batch = batch if kept is None else batch.select(kept)
            batch = batch.slice(0, None if limit is None else limit - start)
            if limit is not None and not batch.num_rows:
                return
            if expected is not None and not batch.schema.equals(expected):
                raise InputChanged(f"{place} {_CHANGED}")
            yield ColumnBatch(start, place, reading, batch, names)
            start += batch.num_rows


def read_rows(
    place: Place, reading: Reading = OURS, limit: int | None = None, rows: int = BATCH_ROWS
) -> Iterator[Row | BadLine]:
    """The first `limit` records of a file, `rows` at a time; one may be nested deeper than orjson
    writes. Raises what `read_batches` does."""
    batches = read_batches(place, reading, limit=limit, rows=rows, size=STREAM_BYTES)
    return chain.from_iterable(batch.deep_items() for batch in batches)


def count_rows(place: Place, reading: Reading, content: Digest | None = None) -> int:
    """Bad lines count. Nothing is parsed that need not be. Raises what `read_batches` does."""
    batches = read_batches(place, reading, rows=MOST_ROWS, names=(), whole=False, content=content)
    if reading.on_bad_line == "fail":
        return sum(len(batch.deep_items()) for batch in batches)
    return sum(batch.rows for batch in batches)


def document_batches(files: Sequence[FileInfo], size: int) -> Iterator[DocumentBatch]:
    """About `size` bytes of files at a time, in order, one file at least."""
    start, at, held = 0, 0, 0
    for at, file in enumerate(files):
        if at > start and held + file.size > size:
            yield DocumentBatch(start, files[start:at])
            start, held = at, 0
        held += file.size
    if files:
        yield DocumentBatch(start, files[start : at + 1])


def columns_of(items: Sequence[Row | BadLine], schema: pa.Schema, start: int = 0) -> pa.RecordBatch:
    """Rows, the first of which has the index `start`, as `Batch.to_arrow` has them."""
    rows = [{} if isinstance(item, BadLine) else item for item in items]
    try:
        columns = [_column(each, [row.get(each.name) for row in rows]) for each in schema]
    except (pa.ArrowException, OverflowError) as error:
        raise InputChanged(f"near row {start}: {error}: the file {_CHANGED}") from error
    if not columns:
        return pa.RecordBatch.from_struct_array(pa.array([{}] * len(rows), pa.struct([])))
    return pa.RecordBatch.from_arrays(columns, schema=schema)


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


def _copied(line: bytes, number: int, encoding: str) -> Row | BadLine:
    """Of a line that is copied."""
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError:
        row = None
    return row if type(row) is dict else parse_line(line, number, encoding, may_be_deep=True)


def _accepted(
    place: Place, reading: Reading, items: Sequence[Row | BadLine]
) -> Sequence[Row | BadLine]:
    bad = (item.detail for item in items if isinstance(item, BadLine))
    if reading.on_bad_line == "fail" and (first := next(bad, None)) is not None:
        raise InputError(f"{place}: {first}; correct it, or write `on_bad_line: keep`")
    return items


def _line_batches(
    place: Place,
    format_: Format,
    reading: Reading,
    limit: int | None,
    rows: int,
    size: int,
    content: Digest | None,
) -> Iterator[LineBatch]:
    start = 0
    with open_lines(place, format_, reading, content) as file:
        if limit is not None:  # nothing behind it is looked at: it may be damaged
            blocks = islice((each for each in line_blocks(file, 1) if each[0]), limit)
            lines, numbers, held = list[bytes](), list[int](), 0
            for found, at, _ in blocks:
                lines += found
                numbers += at
                held += len(found[0])
                if len(lines) >= rows or held >= size:
                    yield LineBatch(start, place, reading, lines, numbers)
                    start, lines, numbers, held = start + len(lines), [], [], 0
            if lines:
                yield LineBatch(start, place, reading, lines, numbers)
            return
        for lines, numbers, blank in line_blocks(file, size):
            for at in range(0, max(1, len(lines)), rows):
                some = lines[at : at + rows]
                of_some = numbers[at : at + len(some)]
                yield LineBatch(start + at, place, reading, some, of_some, blank=blank)
                blank = 0
            start += len(lines)


def _fields(schema: pa.Schema, names: Collection[str]) -> pa.Schema:
    return pa.schema([each for each in schema if each.name in names])


def _widened(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """The batch with the columns that other files of its group have."""
    columns: list[pa.Array] = []
    for wide in schema:
        if wide.name not in batch.schema.names:
            columns.append(pa.nulls(batch.num_rows, wide.type))
        elif is_json_text(wide) and not is_json_text(batch.schema.field(wide.name)):
            values = plain_values(batch.schema.field(wide.name), batch.column(wide.name))
            columns.append(_column(wide, values))
        else:
            columns.append(batch.column(wide.name).cast(wide.type))
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _column(kind: pa.Field, values: list[Any]) -> pa.Array:
    if is_json_text(kind):
        values = [None if value is None else dumps(value).decode() for value in values]
    return pa.array(values, type=kind.type)


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
