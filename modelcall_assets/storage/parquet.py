"""Parquet in, as batches and as plain rows; Parquet out, whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Self

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from modelcall_assets.errors import InputError, StoreError
from modelcall_assets.records.record import Row
from modelcall_assets.storage.files import NewFile, open_input
from modelcall_assets.storage.places import Place, RemotePath
from modelcall_assets.storage.schema import JSON_TEXT, is_json_text, map_leaves

GROUP_ROWS = 65_536
GROUP_BYTES = 16 << 20
_ARROW_MAGIC = b"ARROW1"


@contextmanager
def open_parquet(place: Place) -> Iterator[pq.ParquetFile]:
    """InputError when `place` is no Parquet file, is damaged, or names a column twice."""
    with open_input(place, at_random=True) as file:
        try:
            with pq.ParquetFile(file, pre_buffer=isinstance(place, RemotePath)) as parquet:
                _check_names(place, parquet.schema_arrow.names)
                yield parquet
        except pa.ArrowException as error:
            raise InputError(
                f"{place}: not a readable Parquet file: {error}; write it again or leave it out"
            ) from error


@contextmanager
def open_arrow(place: Place) -> Iterator[Iterator[pa.RecordBatch]]:
    """The batches of an Arrow file, IPC stream and IPC file format alike. InputError when `place`
    is no Arrow file, is damaged, or names a column twice."""
    with open_input(place) as file:
        try:
            is_file = file.peek(len(_ARROW_MAGIC)).startswith(_ARROW_MAGIC)
            with (pa.ipc.open_file if is_file else pa.ipc.open_stream)(file) as reader:
                _check_names(place, reader.schema.names)
                yield _batches(reader)
        except pa.ArrowException as error:
            raise InputError(
                f"{place}: not a readable Arrow file: {error}; write it again or leave it out"
            ) from error


def parquet_schema(parquet: pq.ParquetFile) -> pa.Schema:
    """`read_as` of the file's own schema."""
    return read_as(parquet.schema_arrow)


def read_as(schema: pa.Schema) -> pa.Schema:
    """Columns and types as they are read: nullable, views as plain strings, and of the metadata
    only the JSON text mark."""
    return pa.schema(
        [
            pa.field(
                field.name,
                map_leaves(field.type, _without_view),
                metadata=JSON_TEXT if is_json_text(field) else None,
            )
            for field in schema
        ]
    )


def plain_rows(batch: pa.RecordBatch, place: Place) -> list[Row]:
    """Row dicts of plain values: dates, times, durations and decimals as text of full precision,
    JSON text parsed. InputError names `place` and the column that cannot be read so."""
    columns = [
        _plain_values(field, column, place)
        for field, column in zip(batch.schema, batch.columns, strict=True)
    ]
    names = batch.schema.names
    if not names:
        return [{} for _ in range(batch.num_rows)]
    return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]


def read_columns(place: Place, columns: list[str]) -> pa.Table:
    """Some columns of a file of ours, whole."""
    with open_parquet(place) as parquet:
        return parquet.read(columns=columns)


def read_schema(place: Place) -> pa.Schema:
    with open_parquet(place) as parquet:
        return parquet_schema(parquet)


class ParquetSink:
    """`with ParquetSink(file, schema, metadata) as sink: sink.write(batch)`.

    Batches are gathered into row groups of up to 65,536 rows or 16 MiB. The file is complete when
    the block ends well.
    """

    def __init__(
        self, file: NewFile, schema: pa.Schema, metadata: Mapping[str, str] | None = None
    ) -> None:
        schema = schema.with_metadata(dict(metadata or {}))
        self._writer = pq.ParquetWriter(file, schema, compression="zstd")
        self._waiting: list[pa.RecordBatch] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is None:
            self.close()
        else:
            with suppress(StoreError):
                self._writer.close()

    def close(self) -> None:
        """Write what is waiting and the end of the file; once is enough."""
        self._flush()
        self._writer.close()

    def write(self, batch: pa.RecordBatch) -> None:
        self._waiting.append(batch)
        rows = sum(waiting.num_rows for waiting in self._waiting)
        if rows >= GROUP_ROWS or sum(part.nbytes for part in self._waiting) >= GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            self._writer.write_table(
                pa.Table.from_batches(self._waiting), row_group_size=GROUP_ROWS
            )
            self._waiting.clear()


def _batches(reader: pa.RecordBatchFileReader | pa.RecordBatchReader) -> Iterator[pa.RecordBatch]:
    if isinstance(reader, pa.RecordBatchReader):
        return iter(reader)
    return map(reader.get_batch, range(reader.num_record_batches))


def _check_names(place: Place, names: list[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"{place}: two columns are called {twice[0]!r}; rename one of them")


def _plain_values(field: pa.Field, column: pa.Array, place: Place) -> list[Any]:
    try:
        values = _to_python(column)
        if is_json_text(field):
            return [None if value is None else orjson.loads(value) for value in values]
    except (pa.ArrowException, ValueError, OverflowError) as error:
        wrong = f"column {field.name!r} ({field.type}) cannot be read: {error}"
        raise InputError(f"{place}: {wrong}; make it a string") from error
    return values


def _to_python(column: pa.Array) -> list[Any]:
    try:
        return column.cast(map_leaves(column.type, _plain_type)).to_pylist()
    except UnicodeDecodeError:
        if not pa.types.is_string(column.type):
            raise
        raw = column.view(pa.binary()).to_pylist()
        return [None if value is None else value.decode("utf-8", "replace") for value in raw]


def _plain_type(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_temporal(kind) or pa.types.is_decimal(kind):
        return pa.string()
    if pa.types.is_dictionary(kind):
        return _plain_type(kind.value_type)
    return kind


def _without_view(kind: pa.DataType) -> pa.DataType:
    """Arrow cannot gather rows of view types."""
    if pa.types.is_string_view(kind):
        return pa.string()
    return pa.binary() if pa.types.is_binary_view(kind) else kind
