"""Parquet files of ours: the Arrow schema of JSON rows, inferred while they stream past and kept in
manifests as text, and the file, written whole or not at all.

A column that no Parquet type holds without loss (conflicting types, `{}`, numbers too wide, very
many keys) becomes JSON text: a string field marked with `JSON_TEXT`.
"""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import chain
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from modelcall_assets.errors import InputError, StoreError
from modelcall_assets.records.outcome import Numbered, Row, short
from modelcall_assets.storage.files import NewFile
from modelcall_assets.storage.jsonl import holds_number
from modelcall_assets.storage.places import Place

JSON_TEXT = {b"modelcall.json": b"1"}
SCHEMA_VERSION = "1"
"""Of the columns that stages write; other names or types of them are another version."""
BATCH_ROWS = 1000
BATCH_BYTES = 16 << 20
"""Looked at once to infer a schema."""
MOST_NODES = 500
MOST_LEVELS = 50
GROUP_ROWS = 65_536
GROUP_BYTES = 16 << 20
LONG_VALUE_BYTES = 1024


class SchemaInference:
    """Add every row once, then ask for the schema; the order of columns is first seen first."""

    def __init__(self) -> None:
        self._types: dict[str, pa.DataType | None] = {}
        """None: JSON text."""
        self._wide: set[str] = set()
        """Columns with integers that a double cannot hold."""
        self._waiting: list[Row] = []
        self._waiting_bytes = 0

    def add(self, rows: Sequence[Row]) -> None:
        for name in dict.fromkeys(chain.from_iterable(rows)):
            known = self._types.setdefault(name, pa.null())
            if known is not None:
                self._types[name] = self._widen(name, known, [row.get(name) for row in rows])
        for row in rows:
            if isinstance(row, Numbered):
                self._types.update((name, None) for name in row if holds_number(row[name]))

    def __len__(self) -> int:
        return len(self._types)

    def take(self, row: Row, size: int) -> None:
        """Add one row, of about `size` bytes, once there are enough to look at."""
        self._waiting.append(row)
        self._waiting_bytes += size
        if len(self._waiting) >= BATCH_ROWS or self._waiting_bytes >= BATCH_BYTES:
            self._look()

    def add_types(self, schema: pa.Schema) -> None:
        self._look()
        for field in schema:
            known = self._types.setdefault(field.name, pa.null())
            if known is not None:
                try:
                    known = None if is_json_text(field) else _unify(known, field.type)
                except pa.ArrowException:
                    known = None
                self._types[field.name] = known

    def schema(self) -> pa.Schema:
        self._look()
        return pa.schema([_field(name, kind) for name, kind in self._types.items()])

    def _look(self) -> None:
        self.add(self._waiting)
        self._waiting.clear()
        self._waiting_bytes = 0

    def _widen(self, name: str, known: pa.DataType, values: list[Any]) -> pa.DataType | None:
        """The type that holds the column so far and `values`; None when only JSON text does."""
        try:
            found = pa.infer_type(values)
            are_mixed = pa.types.is_floating(found) and bool in set(map(type, values))
            if _too_big(found) or are_mixed:  # Arrow would turn [0.5, true] into [0.5, 1.0]
                return None
            array = pa.array(values, type=found)
            if has(found, pa.types.is_integer) and not _fits_double(array):
                self._wide.add(name)
            unified = _unify(known, found)
        except (pa.ArrowException, OverflowError):
            return None
        wide_double = name in self._wide and has(unified, pa.types.is_floating)
        return None if wide_double or _too_big(unified) else unified


def is_json_text(field: pa.Field) -> bool:
    return bool(field.metadata and field.metadata.get(b"modelcall.json"))


def readable_schema(schema: pa.Schema) -> list[tuple[str, str]]:
    """Column names and types for people; JSON text shows as `json`."""
    return [(field.name, "json" if is_json_text(field) else str(field.type)) for field in schema]


def schema_to_json(schema: pa.Schema) -> str:
    """A JSON-safe text that `schema_from_json` turns back into an equal schema."""
    return base64.b64encode(schema.serialize().to_pybytes()).decode()


def schema_from_json(text: str) -> pa.Schema:
    return pa.ipc.read_schema(pa.py_buffer(base64.b64decode(text)))


def map_leaves(kind: pa.DataType, change: Callable[[pa.DataType], pa.DataType]) -> pa.DataType:
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(map_leaves(field.type, change)) for field in kind])
    if pa.types.is_map(kind):
        return pa.map_(map_leaves(kind.key_type, change), map_leaves(kind.item_type, change))
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(map_leaves(kind.value_type, change), kind.list_size)
    if pa.types.is_list(kind):
        return pa.list_(map_leaves(kind.value_type, change))
    if pa.types.is_large_list(kind):
        return pa.large_list(map_leaves(kind.value_type, change))
    return change(kind)


def _unify(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    if one.equals(other):
        return one
    schemas = [pa.schema([("x", kind)]) for kind in (one, other)]
    return pa.unify_schemas(schemas, promote_options="permissive").field(0).type


def _field(name: str, kind: pa.DataType | None) -> pa.Field:
    if kind is None or has(kind, lambda part: pa.types.is_struct(part) and not part.num_fields):
        return pa.field(name, pa.string(), metadata=JSON_TEXT)
    return pa.field(name, map_leaves(kind, lambda leaf: pa.string() if leaf == pa.null() else leaf))


def _fits_double(array: pa.Array) -> bool:
    double = pa.float64()
    target = map_leaves(array.type, lambda leaf: double if pa.types.is_integer(leaf) else leaf)
    try:
        array.cast(target)
    except pa.ArrowInvalid:
        return False
    return True


def has(kind: pa.DataType, test: Callable[[pa.DataType], bool]) -> bool:
    """Whether `test` is true of the type or of one in it."""
    return test(kind) or any(has(kind.field(i).type, test) for i in range(kind.num_fields))


def _too_big(kind: pa.DataType) -> bool:
    return _nodes(kind, MOST_LEVELS) > MOST_NODES


def _nodes(kind: pa.DataType, levels: int) -> int:
    if levels == 0:
        return MOST_NODES + 1
    return 1 + sum(_nodes(kind.field(i).type, levels - 1) for i in range(kind.num_fields))


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
    """A file that is complete when the `with` block ends well. Batches are gathered into row groups
    of up to 65,536 rows or 16 MiB. InputError when a type or value has no place in Parquet."""

    def __init__(
        self,
        file: NewFile,
        stage: str,
        schema: pa.Schema,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        own = {"modelcall.schema_version": SCHEMA_VERSION, "modelcall.stage": stage}
        self._file = file
        self.schema = schema.with_metadata({**own, **(metadata or {})})
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
        try:
            self._writer = self._writer or self._opened()
            if self._waiting:
                table = pa.Table.from_batches(self._waiting)
                self._writer.write_table(table, row_group_size=GROUP_ROWS)
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
            self._file,
            self.schema,
            compression="zstd",
            write_page_checksum=True,
            use_dictionary=short,  # pyright: ignore[reportArgumentType]
            write_statistics=short,  # pyright: ignore[reportArgumentType]
        )
