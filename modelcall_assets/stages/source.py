"""The rows that a stage reads, as its upstream asset recorded them."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from typing import TYPE_CHECKING

import pyarrow as pa

from modelcall_assets.errors import InputChanged
from modelcall_assets.records import is_data_file
from modelcall_assets.storage.files import file_digest
from modelcall_assets.storage.formats import OURS, Reading, format_of
from modelcall_assets.storage.listing import FileInfo, stat_file
from modelcall_assets.storage.places import Place
from modelcall_assets.storage.publishing import InputFingerprint
from modelcall_assets.storage.rows import STREAM_BYTES, Batch, document_batches, read_batches

if TYPE_CHECKING:
    from modelcall_assets.stages.stage import Stage

ROWS_ASKED_AT_ONCE = 100
ROWS_WRITTEN_AT_ONCE = 1000
BATCH_BYTES = 4 << 20
"""What a process gets at once."""


@dataclass(frozen=True, slots=True)
class Part:
    """A file of a source. `name` enters the ids of its rows that have none."""

    name: str
    place: Place
    digest: str
    size: int = 0
    is_document: bool = False
    """One record as a whole."""

    @classmethod
    def of(cls, file: FileInfo) -> Part:
        """Of a file that nobody has looked at."""
        return cls(file.key_path, file.place, "", file.size, not is_data_file(file.place.name))


@dataclass(frozen=True)
class Source:
    """An input file, several that are one partition, or what a stage made of them."""

    parts: tuple[Part, ...]
    schema: pa.Schema
    rows: int
    limit: int | None = None
    reading: Reading = OURS
    names: Collection[str] | None = None
    """Columns that its items need, where that is known."""
    maker: Stage | None = None
    """Whose rows these are; None where nobody has looked at them."""

    @property
    def name(self) -> str:
        """Of the one file that it is."""
        return self.parts[0].name

    def batches(self, rows: int = ROWS_WRITTEN_AT_ONCE) -> Iterator[tuple[str, Batch]]:
        """All of it in order, at most so many rows at a time, each with the name of its file."""
        left = self.limit
        for are_documents, group in groupby(self.parts, lambda part: part.is_document):
            parts = [*group]
            batches = _documents(parts, left) if are_documents else self._rows(parts, left, rows)
            for name, batch in batches:
                yield name, batch
                left = None if left is None else left - batch.rows

    def of_one_file(
        self,
        rows: int = ROWS_WRITTEN_AT_ONCE,
        size: int = BATCH_BYTES,
        *,
        whole: bool = True,
    ) -> Iterator[Batch]:
        """All of the one file, at most so many rows and bytes at a time. InputChanged when there
        are more rows than were recorded, or, at the latest behind the last, another content."""
        part, content, read = self.parts[0], hashlib.sha256(), 0
        has_columns = format_of(part.place).has_columns
        if has_columns and whole:
            self.verify()
        for batch in read_batches(
            part.place,
            self.reading,
            limit=self.limit,
            rows=rows,
            size=size,
            names=self.names,
            whole=whole,
            schema=self.schema,
            content=content,
        ):
            read += batch.rows
            if read > self.rows_read:
                raise changed(part.place)
            yield batch
        if not has_columns and f"sha256:{content.hexdigest()}" != part.digest:
            raise changed(part.place)

    def to_ask(self) -> Iterator[Batch]:
        """The rows, a few at a time: reading more would keep answers in flight waiting."""
        return self.of_one_file(ROWS_ASKED_AT_ONCE, STREAM_BYTES, whole=False)

    def column_names(self) -> set[str]:
        """Those of all its rows."""
        rows = chain.from_iterable(batch.items for batch in self.to_ask())
        return set[str]().union(*(item for item in rows if isinstance(item, dict)))

    @property
    def rows_read(self) -> int:
        """Of `rows`, those within the limit."""
        return self.rows if self.limit is None else min(self.rows, self.limit)

    def verify(self) -> None:
        """InputChanged when a file no longer has the content that was recorded."""
        for part in self.parts:
            if file_digest(part.place) != part.digest:
                raise changed(part.place)

    def fingerprint(self) -> InputFingerprint:
        """Of the one file as it is now, for the manifest of what is made of it."""
        part = self.parts[0]
        info = stat_file(part.place)
        return InputFingerprint(
            uri=str(part.place), digest=part.digest, size=info.size, version=info.version
        )

    def _rows(
        self, parts: Sequence[Part], limit: int | None, rows: int
    ) -> Iterator[tuple[str, Batch]]:
        for part in parts:
            if limit == 0:
                return
            for batch in read_batches(
                part.place, self.reading, limit=limit, rows=rows, size=BATCH_BYTES
            ):
                yield part.name, batch
                limit = None if limit is None else limit - batch.rows


def _documents(parts: Sequence[Part], limit: int | None) -> Iterator[tuple[str, Batch]]:
    files = [FileInfo(part.name, part.place, part.size, part.digest) for part in parts[:limit]]
    return (("", batch) for batch in document_batches(files, BATCH_BYTES))


def changed(place: Place) -> InputChanged:
    """Of a file that is not as a stage left it, or `raw` found it."""
    return InputChanged(
        f"{place} changed since its upstream asset was materialised; materialise that again, then "
        "this (if the task made the file, delete it first): replies received so far are kept"
    )
