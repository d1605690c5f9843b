"""Parquet files as they are written: whole or not at all."""

import io
from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from modelcall_assets.errors import InputError
from modelcall_assets.records.outcome import short
from modelcall_assets.storage.columns import MOST_ROWS
from modelcall_assets.storage.files import NewFile
from modelcall_assets.storage.places import Place
from modelcall_assets.storage.values import read_as

GROUP_BYTES = 16 << 20
BUFFER_BYTES = 1 << 20
"""Arrow writes pages and headers one by one."""
LONG_VALUE_BYTES = 1024


def as_stored(schema: pa.Schema) -> pa.Schema:
    """How a file with these columns is read back: Parquet has no date64 and no whole seconds."""
    return _as_stored(schema.serialize().to_pybytes())


@lru_cache(maxsize=256)
def _as_stored(serialized: bytes) -> pa.Schema:
    sink = pa.BufferOutputStream()
    pq.ParquetWriter(sink, pa.ipc.read_schema(pa.py_buffer(serialized))).close()
    return read_as(pq.read_schema(pa.BufferReader(sink.getvalue())))


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


class _Drain(io.RawIOBase):
    """To the file, which stays open. Arrow writes what its buffer holds once more when that is
    destroyed: a drain that is `cut` takes that and keeps nothing."""

    is_cut = False

    def __init__(self, file: NewFile) -> None:
        super().__init__()
        self._file = file

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        is_cut = self.is_cut or self._file.closed
        return memoryview(data).nbytes if is_cut else self._file.write(data)


class ParquetSink(AbstractContextManager["ParquetSink"]):
    """A file that is complete when the `with` block ends well. Batches are gathered into row groups
    of up to 65,536 rows or 16 MiB. InputError when a type or value has no place in Parquet."""

    def __init__(
        self,
        file: NewFile,
        stage: str,
        schema: pa.Schema,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        # Other names or types of the columns that stages write are another version.
        own = {"modelcall.schema_version": "1", "modelcall.stage": stage}
        self._file, self._drain = file, _Drain(file)
        # Of Arrow's own: it needs the interpreter's lock for each write to one of Python's.
        self._buffer = pa.BufferedOutputStream(pa.PythonFile(self._drain, "w"), BUFFER_BYTES)
        self.schema = schema.with_metadata({**own, **(metadata or {})})
        self._writer: pq.ParquetWriter | None = None
        self._waiting: list[pa.RecordBatch] = []

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self._drain.is_cut = kind is not None
        try:
            if kind is None:
                self.close()
            elif self._writer is not None:
                self._writer.close()
        finally:
            self._drain.is_cut = True

    def close(self) -> None:
        """Write what is waiting and the end of the file; once is enough."""
        self._flush()
        assert self._writer is not None
        if self._writer.is_open:
            self._writer.close()
            self._buffer.detach()

    def write(self, batch: pa.RecordBatch) -> None:
        self._waiting.append(batch)
        rows = sum(waiting.num_rows for waiting in self._waiting)
        if rows >= MOST_ROWS or sum(part.nbytes for part in self._waiting) >= GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        try:
            self._writer = self._writer or self._opened()
            if self._waiting:
                table = pa.Table.from_batches(self._waiting)
                self._writer.write_table(table, row_group_size=MOST_ROWS)
        except pa.ArrowException as error:
            what = f"a column of these rows cannot be written as Parquet: {error}"
            raise InputError(f"{self._file.place}: {what}; make it a string") from error
        self._waiting.clear()

    def _opened(self) -> pq.ParquetWriter:
        """A dictionary of long values, or the least and the greatest of them, help nobody and take
        several times their size in memory."""
        most = LONG_VALUE_BYTES * sum(batch.num_rows for batch in self._waiting)
        short = [
            name
            for at, name in enumerate(self.schema.names)
            if sum(batch.column(at).nbytes for batch in self._waiting) <= most
        ]
        return pq.ParquetWriter(
            self._buffer,
            self.schema,
            compression="zstd",
            write_page_checksum=True,
            use_dictionary=short,  # pyright: ignore[reportArgumentType]
            write_statistics=short,  # pyright: ignore[reportArgumentType]
        )
