"""Rows on disk until all of them are there and their columns are known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from tempfile import TemporaryFile, gettempdir
from typing import Self

import pyarrow as pa

from modelcall_assets.errors import StoreError
from modelcall_assets.records.outcome import Row, moved_names
from modelcall_assets.storage.jsonl import loads
from modelcall_assets.storage.parquet import SchemaInference
from modelcall_assets.storage.places import explained
from modelcall_assets.storage.rows import Chunk

BATCH_ROWS = 1000


class RowSpool:
    """Rows as lines of JSON, each with a line end, and what it has of the user's under our names.
    Columns of `known` are there whatever the rows hold. Use as a context manager."""

    def __init__(self, known: pa.Schema) -> None:
        self._known = known
        self._file = TemporaryFile()  # noqa: SIM115  closed by `__exit__`
        self._columns, self._clashing = SchemaInference(), SchemaInference()
        self.moved: dict[str, str] = {}
        """Names of ours that rows have too → what their columns are called; known to `schema`."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, lines: Sequence[bytes]) -> None:
        """StoreError when they cannot be written."""
        for line in lines:
            row, clashing = loads(line)
            self._columns.take(row, len(line))
            if clashing:
                self._clashing.take(clashing, len(line))
        with explained(Path(gettempdir()), StoreError):
            self._file.writelines(lines)

    def schema(self) -> pa.Schema:
        self._columns.add_types(self._known)
        own, clashing = self._columns.schema(), self._clashing.schema()
        self.moved = moved_names([*own.names, *clashing.names], clashing.names)
        return pa.schema([*own, *(each.with_name(self.moved[each.name]) for each in clashing)])

    def batches(self, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        """All rows, in the order in which they came."""
        self._file.seek(0)
        start = 0
        while lines := list(islice(self._file, BATCH_ROWS)):
            yield Chunk(start, [*map(self._row, lines)], schema).to_arrow()
            start += len(lines)

    def _row(self, line: bytes) -> Row:
        row, clashing = loads(line)
        return {**row, **{self.moved[name]: value for name, value in clashing.items()}}
