"""The rows that a stage reads, as its upstream asset recorded them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

from modelcall_assets.errors import InputChanged
from modelcall_assets.records.record import BadLine, Row
from modelcall_assets.storage.files import file_digest
from modelcall_assets.storage.rows import read_chunks

ROWS_READ_AT_ONCE = 100


@dataclass(frozen=True)
class Source:
    """An input file, or the preprocessed one. `name` enters the ids of rows that have none."""

    name: str
    uri: str
    digest: str
    schema: pa.Schema
    rows: int
    limit: int | None = None

    def items(self) -> Iterator[Row | BadLine]:
        """Rows to ask about, a few at a time: reading more would keep answers in flight waiting."""
        for chunk in read_chunks(self.uri, self.schema, self.limit, ROWS_READ_AT_ONCE):
            yield from chunk.items

    def verify(self) -> None:
        """InputChanged when the file no longer has the content that was recorded."""
        if file_digest(self.uri) != self.digest:
            raise InputChanged(
                f"{self.uri} changed since its upstream asset was materialised; "
                "materialise that again, then this: replies received so far are kept"
            )
