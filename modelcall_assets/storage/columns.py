"""Files of columns, Parquet and Arrow ones, read as batches, and batches as plain rows."""

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from modelcall_assets.errors import InputError
from modelcall_assets.records.outcome import BadLine, Row, short
from modelcall_assets.storage.files import open_input
from modelcall_assets.storage.formats import Format
from modelcall_assets.storage.places import Place, RemotePath
from modelcall_assets.storage.values import (
    has,
    holds_bytes,
    is_json_text,
    loads,
    map_leaves,
    plain_type,
    read_as,
    type_of_bytes,
    with_units,
)

MOST_ROWS = 65_536
"""Of a batch that is read, and of a row group that is written."""
BATCH_BYTES = 32 << 20
FETCHED_BYTES = 64 << 20
"""A row group in a store that is read at once."""
LOCAL_BYTES, REMOTE_BYTES = 1 << 20, 8 << 20
"""Read at once of a column."""
_IPC_FILE, _FEATHER_1 = b"ARROW1", b"FEA1"


@dataclass(frozen=True, slots=True)
class Columns:
    """An open file. `batches(rows, names)`, which may be asked for once, have at most `rows` rows
    and about 32 MiB each. With `names`, other columns are left out where that saves reading."""

    schema: pa.Schema
    batches: Callable[[int, Sequence[str] | None], Iterator[pa.RecordBatch]]


@contextmanager
def open_columns(place: Place, format_: Format) -> Iterator[Columns]:
    """InputError: no such file, a damaged one, a column named twice or of a type not read."""
    is_parquet = format_ is Format.PARQUET
    with open_input(place, at_random=is_parquet) as file:
        try:
            with (_parquet if is_parquet else _arrow)(place, file) as columns:
                yield columns
        except (pa.ArrowException, UnicodeDecodeError, MemoryError, OSError) as error:
            if getattr(error, "errno", None) is not None:  # the disk's, not of what the file says
                raise
            why = str(error) or "a part of it says that it is larger than all memory"
            raise InputError(
                f"{place}: not a readable {format_} file: {why}; write it again or leave it out. "
                "What a task of this project has written can be deleted and made again, its rows "
                "cost nothing then; results of another system cannot"
            ) from error


def read_columns(place: Place, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
    with open_columns(place, Format.PARQUET) as columns:
        yield from columns.batches(MOST_ROWS, names)


def read_schema(place: Place) -> pa.Schema:
    with open_columns(place, Format.PARQUET) as columns:
        return columns.schema


def rows_of(batch: pa.RecordBatch, start: int) -> list[Row | BadLine]:
    """Row dicts of plain values: dates, times, durations and decimals as text of full precision,
    bytes that are UTF-8 as text, JSON text parsed. Durations are as ISO 8601 has them, in seconds.
    A row that has none is a BadLine in its place; `start` is the index of the first."""
    names, count = batch.schema.names, batch.num_rows
    if not names:
        return [{} for _ in range(count)]
    try:
        columns = [*map(plain_values, batch.schema, batch.columns)]
        return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]
    except _Unreadable as error:
        if count == 1:
            return [BadLine(f"row {start + 1}: {' '.join(str(error).split())}", "")]
    return [item for at in range(count) for item in rows_of(batch.slice(at, 1), start + at)]


@contextmanager
def _parquet(place: Place, file: io.BufferedReader) -> Iterator[Columns]:
    """Row groups are read a part at a time. In a store, where each read is a request, a row group
    that is not too large is fetched in few of them."""
    metadata = pq.read_metadata(file)
    groups = range(metadata.num_row_groups)
    is_remote = isinstance(place, RemotePath)
    by_group = is_remote and all(
        sum(group.column(at).total_compressed_size for at in range(group.num_columns))
        <= FETCHED_BYTES
        for group in map(metadata.row_group, groups)
    )
    parts = [[group] for group in groups] if by_group else [[*groups]]
    with pq.ParquetFile(
        file,
        metadata=metadata,
        pre_buffer=by_group,
        page_checksum_verification=True,
        buffer_size=0 if by_group else REMOTE_BYTES if is_remote else LOCAL_BYTES,
    ) as parquet:
        schema = _schema_of(place, parquet.schema_arrow)

        def batches(rows: int, names: Sequence[str] | None) -> Iterator[pa.RecordBatch]:
            size = sum(metadata.row_group(group).total_byte_size for group in groups)
            few, kept = _few(rows, size, metadata.num_rows), None if names is None else [*names]
            missing = metadata.num_rows
            for part in parts:
                for batch in parquet.iter_batches(few, part, kept):
                    fields = [schema.field(name) for name in batch.schema.names]
                    yield _sound(batch).cast(pa.schema(fields)) if fields else batch
                    missing -= batch.num_rows
            if missing:  # a column that ends early may end all of them without an error
                raise pa.ArrowInvalid(f"{missing} of {metadata.num_rows} rows are missing")

        yield Columns(schema, batches)


@contextmanager
def _arrow(place: Place, file: io.BufferedReader) -> Iterator[Columns]:
    head = file.peek(len(_IPC_FILE))
    if head.startswith(_FEATHER_1):
        raise InputError(f"{place}: Feather version 1; write it as version 2, or as Parquet")
    is_file = head.startswith(_IPC_FILE)
    with (pa.ipc.open_file if is_file else pa.ipc.open_stream)(file) as reader:
        schema = _schema_of(place, reader.schema)

        def batches(rows: int, _names: Sequence[str] | None) -> Iterator[pa.RecordBatch]:
            is_stream = isinstance(reader, pa.RecordBatchReader)
            whole = reader if is_stream else map(reader.get_batch, range(reader.num_record_batches))
            for batch in map(_sound, whole):  # even to ask a damaged one for its size is dangerous
                few = _few(rows, batch.nbytes, batch.num_rows)
                batch = batch.cast(schema)
                yield from (batch.slice(at, few) for at in range(0, batch.num_rows, few))

        yield Columns(schema, batches)


def _few(rows: int, size: int, of_rows: int) -> int:
    """Fewer rows at once where rows are large."""
    row_bytes = max(1, size // max(1, of_rows))
    return max(1, min(rows, BATCH_BYTES // row_bytes))


def _schema_of(place: Place, schema: pa.Schema) -> pa.Schema:
    """As it is read. UnicodeDecodeError when a name is not UTF-8, a nested one too."""
    names = schema.names
    for field in schema:
        _check_nested_names(field.type)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"{place}: two columns are called {twice[0]!r}; rename one of them")
    schema = read_as(schema)
    for field in schema:
        try:
            _check_fields(field.type)
            map_leaves(field.type, _readable)
        except (pa.ArrowException, ValueError) as error:
            raise InputError(
                f"{place}: {_unreadable(field, error)}; make it a string or leave it out"
            ) from error
    return schema


def _check_nested_names(kind: pa.DataType) -> None:
    for at in range(kind.num_fields):
        assert kind.field(at).name is not None
        _check_nested_names(kind.field(at).type)


def _check_fields(kind: pa.DataType) -> None:
    """ValueError when two fields of a struct have one name, or Arrow cannot cast what is in it."""
    fields = [kind.field(at) for at in range(kind.num_fields)]
    names = [field.name for field in fields]
    if pa.types.is_struct(kind) and len({*names}) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"two of its fields are called {twice!r}")
    is_view = pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind)
    if is_view and has(kind, pa.types.is_temporal):
        raise ValueError("times are read from lists, not from views of lists")
    for field in fields:
        _check_fields(field.type)


def _readable(kind: pa.DataType) -> pa.DataType:
    """The type; ArrowException when its values have no plain ones, as for want of a time zone."""
    if (plain := plain_type(kind)) != kind:
        pa.nulls(1, kind).cast(plain)
    return kind


def _unreadable(field: pa.Field, error: Exception) -> str:
    return f"column {short(field.name)!r} ({short(str(field.type))}) cannot be read: {error}"


def _sound(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch, in which text that is not UTF-8 has got replacement characters; it may be left in
    nested columns. ArrowInvalid when the batch is damaged."""
    try:
        batch.validate(full=True)
        return batch
    except pa.ArrowInvalid:
        columns = [_mended(column) for column in batch.columns]
        return pa.RecordBatch.from_arrays(columns, schema=batch.schema)


def _mended(column: pa.Array) -> pa.Array:
    with suppress(pa.ArrowInvalid):
        column.validate(full=True)
        return column
    as_bytes = column.view(map_leaves(column.type, type_of_bytes))
    as_bytes.validate(full=True)
    if as_bytes.type.num_fields or as_bytes.type == column.type:
        return column
    values = as_bytes.to_pylist()
    texts = [None if value is None else value.decode("utf-8", "replace") for value in values]
    return pa.array(texts, column.type)


class _Unreadable(Exception):
    """The column and what is wrong with it."""


def plain_values(field: pa.Field, column: pa.Array) -> list[Any]:
    """The values of a column as they are in `rows_of`."""
    try:
        values = column.cast(map_leaves(column.type, plain_type)).to_pylist()
        if is_json_text(field):
            return [None if value is None else loads(str(value).encode()) for value in values]
    except (pa.ArrowException, ValueError, OverflowError) as error:
        raise _Unreadable(f"{_unreadable(field, error)}; make it a string") from error
    if has(column.type, pa.types.is_duration):
        return [with_units(value, column.type) for value in values]
    return [_text_of(value) for value in values] if holds_bytes(column.type) else values


def _text_of(value: bytes | None) -> str | bytes | None:
    try:
        return value.decode() if value is not None else None
    except UnicodeDecodeError:
        return value
