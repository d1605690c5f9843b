"""Parquet files of ours: written whole or not at all, and read column by column."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from modelcall_assets.errors import InputError, StoreError
from modelcall_assets.records.outcome import short
from modelcall_assets.storage.columns import MOST_ROWS, open_columns, read_as
from modelcall_assets.storage.files import NewFile
from modelcall_assets.storage.formats import Format
from modelcall_assets.storage.places import Place

GROUP_ROWS = 65_536
GROUP_BYTES = 16 << 20
LONG_VALUE_BYTES = 1024
SCHEMA_VERSION = "1"
"""Of the columns that stages write; other names or types of them are another version."""


def read_columns(place: Place, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Some columns of all rows, a part of the rows at a time."""
    with open_columns(place, Format.PARQUET) as columns:
        yield from columns.batches(MOST_ROWS, names)


def read_schema(place: Place) -> pa.Schema:
    with open_columns(place, Format.PARQUET) as columns:
        return columns.schema


def as_stored(schema: pa.Schema) -> pa.Schema:
    """How a file with these columns is read back: Parquet has no date64 and no whole seconds."""
    sink = io.BytesIO()
    pq.ParquetWriter(sink, schema).close()
    return read_as(pq.read_schema(io.BytesIO(sink.getvalue())))


def check_writable(place: Place, schema: pa.Schema) -> None:
    """InputError names the first column of a file whose type Parquet does not have."""
    for field in schema:
        try:
            pq.ParquetWriter(io.BytesIO(), pa.schema([field])).close()
        except (pa.ArrowException, OSError) as error:
            what = f"column {short(field.name)!r} ({short(str(field.type))}) cannot be written"
            raise InputError(
                f"{place}: {what} as Parquet: {error}; make it a string or leave it out"
            ) from error


class ParquetSink:
    """`with ParquetSink(file, stage, schema, metadata) as sink: sink.write(batch)`.

    Batches are gathered into row groups of up to 65,536 rows or 16 MiB. The file is complete when
    the block ends well. InputError when a type or value has no place in Parquet.
    """

    def __init__(
        self,
        file: NewFile,
        stage: str,
        schema: pa.Schema,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        own = {"modelcall.schema_version": SCHEMA_VERSION, "modelcall.stage": stage}
        self._file = file
        self._schema = schema.with_metadata({**own, **(metadata or {})})
        self._writer: pq.ParquetWriter | None = None
        self._waiting: list[pa.RecordBatch] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is None:
            self.close()
        elif self._writer is not None:
            with suppress(StoreError):
                self._writer.close()

    def close(self) -> None:
        """Write what is waiting and the end of the file; once is enough."""
        self._flush()
        assert self._writer is not None
        self._writer.close()

    def write(self, batch: pa.RecordBatch) -> None:
        self._waiting.append(batch)
        rows = sum(waiting.num_rows for waiting in self._waiting)
        if rows >= GROUP_ROWS or sum(part.nbytes for part in self._waiting) >= GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        with self._explained():
            self._writer = self._writer or self._opened()
            if self._waiting:
                table = pa.Table.from_batches(self._waiting)
                self._writer.write_table(table, row_group_size=GROUP_ROWS)
        self._waiting.clear()

    def _opened(self) -> pq.ParquetWriter:
        """A dictionary of long values, or the least and the greatest of them, help nobody and take
        several times their size in memory."""
        short = [
            name
            for at, name in enumerate(self._schema.names)
            if sum(batch.column(at).nbytes for batch in self._waiting)
            <= LONG_VALUE_BYTES * sum(batch.num_rows for batch in self._waiting)
        ]
        return pq.ParquetWriter(
            self._file,
            self._schema,
            compression="zstd",
            write_page_checksum=True,
            use_dictionary=short,  # pyright: ignore[reportArgumentType]
            write_statistics=short,  # pyright: ignore[reportArgumentType]
        )

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except pa.ArrowException as error:
            what = f"a column of these rows cannot be written as Parquet: {error}"
            raise InputError(f"{self._file.place}: {what}; make it a string") from error
