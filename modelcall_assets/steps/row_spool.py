"""Rows on disk until all of them are there and their columns are known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from tempfile import TemporaryFile, gettempdir
from typing import Self

import orjson
import pyarrow as pa

from modelcall_assets.errors import StoreError
from modelcall_assets.storage.pieces import Chunk
from modelcall_assets.storage.schema import SchemaInference
from modelcall_assets.storage.trouble import explained

BATCH_ROWS = 1000


class RowSpool:
    """Lines of JSON, each with a line end. Columns of `known` are there whatever the rows hold. Use
    as a context manager."""

    def __init__(self, known: pa.Schema) -> None:
        self._known = known
        self._file = TemporaryFile()  # noqa: SIM115  closed by `__exit__`
        self._columns = SchemaInference()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, lines: Sequence[bytes]) -> None:
        """StoreError when they cannot be written."""
        for line in lines:
            self._columns.take(orjson.loads(line), len(line))
        with explained(Path(gettempdir()), StoreError):
            self._file.writelines(lines)

    def schema(self) -> pa.Schema:
        self._columns.add_types(self._known)
        return self._columns.schema()

    def batches(self, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        """All rows, in the order in which they came."""
        self._file.seek(0)
        start = 0
        while lines := list(islice(self._file, BATCH_ROWS)):
            yield Chunk(start, [orjson.loads(line) for line in lines], schema).to_arrow()
            start += len(lines)
