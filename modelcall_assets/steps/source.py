"""The rows that a stage reads, as its upstream asset recorded them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

from modelcall_assets.errors import InputChanged
from modelcall_assets.records.record import BadLine, Row
from modelcall_assets.storage.files import file_digest, stat_file
from modelcall_assets.storage.formats import OURS, Reading
from modelcall_assets.storage.manifest import InputFingerprint
from modelcall_assets.storage.places import Place
from modelcall_assets.storage.rows import Chunk, read_chunks

ROWS_ASKED_AT_ONCE = 100
ROWS_WRITTEN_AT_ONCE = 1000


@dataclass(frozen=True)
class Source:
    """An input file, or the preprocessed one. `name` enters the ids of rows that have none."""

    name: str
    place: Place
    digest: str
    schema: pa.Schema
    rows: int
    limit: int | None = None
    reading: Reading = OURS

    def chunks(self, rows: int = ROWS_WRITTEN_AT_ONCE) -> Iterator[Chunk]:
        """All of it, at most so many rows at a time."""
        return read_chunks(self.place, self.schema, self.limit, rows, self.reading)

    def items(self) -> Iterator[Row | BadLine]:
        """Rows to ask about, a few at a time: reading more would keep answers in flight waiting."""
        for chunk in self.chunks(ROWS_ASKED_AT_ONCE):
            yield from chunk.items

    @property
    def rows_read(self) -> int:
        """Of `rows`, those within the limit."""
        return self.rows if self.limit is None else min(self.rows, self.limit)

    def verify(self) -> None:
        """InputChanged when the file no longer has the content that was recorded."""
        if file_digest(self.place) != self.digest:
            raise InputChanged(
                f"{self.place} changed since its upstream asset was materialised; "
                "materialise that again, then this: replies received so far are kept"
            )

    def fingerprint(self) -> InputFingerprint:
        """As it is now, for the manifest of what is made of it."""
        info = stat_file(self.place)
        return InputFingerprint(
            uri=str(self.place), digest=self.digest, size=info.size, version=info.version
        )
