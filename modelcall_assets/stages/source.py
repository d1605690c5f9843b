"""The rows that a stage has left: for the next one, as its asset recorded them, and for people and
other programs, with why some failed."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, groupby
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from modelcall_assets.errors import InputChanged, InputError
from modelcall_assets.records import decode_key, is_data_file, stem_of
from modelcall_assets.records.outcome import BadLine, Failure, Reason, Row
from modelcall_assets.storage.columns import read_columns, read_schema
from modelcall_assets.storage.files import file_digest
from modelcall_assets.storage.formats import OURS, Reading, format_of
from modelcall_assets.storage.listing import FileInfo, matches, stat_file
from modelcall_assets.storage.places import Place
from modelcall_assets.storage.publishing import InputFingerprint, Manifest
from modelcall_assets.storage.rows import (
    STREAM_BYTES,
    Batch,
    DocumentBatch,
    RowBatch,
    document_batches,
    read_batches,
    read_rows,
    record_id,
)
from modelcall_assets.storage.values import schema_from_json

if TYPE_CHECKING:
    from modelcall_assets.stages import Stage

MEMBERS = "members"
"""In the detail of a manifest: the files, or partitions, that make one."""
SAMPLE = "sample"
"""The column that numbers several answers to one record, from 0."""
ROWS_LOOKED_AT = 20
ROWS_ASKED_AT_ONCE = 100
ROWS_WRITTEN_AT_ONCE = 1000
BATCH_BYTES = 4 << 20
"""What a process gets at once."""
MAKE_ANEW = "delete it and the output that it describes, and run the task again"
AGAIN = "delete it and run the task again: its rows are made anew, from the replies in its journal"
_FAILURE_COLUMNS = [
    "api_record_id",
    "api_status",
    "api_fail_reason",
    "api_fail_detail",
    "api_attempts",
    "api_endpoint",
]


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

    def of_one_file(
        self, rows: int = ROWS_WRITTEN_AT_ONCE, size: int = BATCH_BYTES, *, whole: bool = True
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


def batches_of(
    parts: Iterable[Part], reading: Reading, limit: int | None, rows: int = ROWS_WRITTEN_AT_ONCE
) -> Iterator[tuple[str, Batch]]:
    """The first `limit` rows of several files, at most so many `rows` at a time, each batch with
    the name of its file. Files that are one record each share batches, which have no name."""
    left = limit
    for _, group in groupby(parts, lambda part: part.is_document or id(part)):
        if not (some := [*group][:left]):
            return
        first = some[0]
        if first.is_document:
            files = [FileInfo(each.name, each.place, each.size, each.digest) for each in some]
            name, batches = "", document_batches(files, BATCH_BYTES)
        else:
            read = read_batches(first.place, reading, limit=left, rows=rows, size=BATCH_BYTES)
            name, batches = first.name, read
        for batch in batches:
            yield name, batch
            left = None if left is None else left - batch.rows


def changed(place: Place) -> InputChanged:
    """Of a file that is not as a stage left it, or `raw` found it."""
    return InputChanged(
        f"{place} changed since it was looked at; run the task again (if the task made the file, "
        "delete it first): replies received so far are kept"
    )


@dataclass(frozen=True)
class Published:
    """A file of rows that a stage has left. `key` is its partition key."""

    stage: Stage
    key: str
    manifest: Manifest

    @property
    def name(self) -> str:
        return decode_key(self.key)

    @property
    def place(self) -> Place:
        return self.stage.result(self.manifest)

    @property
    def _has_members(self) -> bool:
        """Whether it is the `raw` of a split or group, which is several files together."""
        return isinstance(self.manifest.detail.get(MEMBERS), list)

    @property
    def stem(self) -> PurePosixPath:
        """The relative path without the suffix."""
        name = PurePosixPath(self.name).name if self._has_members else self.place.name
        return PurePosixPath(self.name).parent / stem_of(name)

    @property
    def schema(self) -> pa.Schema | None:
        """None when nobody has recorded one."""
        if self.is_table:
            return read_schema(self.place)
        recorded = self.manifest.detail.get("schema")
        schema = schema_from_json(recorded) if recorded else None
        return schema if schema is not None and len(schema) else None

    @cached_property
    def column_names(self) -> frozenset[str]:
        """Those of all its rows."""
        if (schema := self.schema) is not None:
            return frozenset(schema.names)
        return frozenset(column_names(item for _, item in self.items()))

    @property
    def is_table(self) -> bool:
        """Whether it is a Parquet file of ours."""
        return (self.manifest.output or "").endswith(".parquet")

    def batches(self, schema: pa.Schema | None = None) -> Iterator[Batch]:
        """The rows. InputChanged when a file of columns has not `schema`, InputError when the stage
        has none."""
        if not self.stage.has_rows:
            what = f"{self.stage.name} is files, of which the next stage makes rows"
            raise InputError(f"{self.stage.spec.name}: {what}; name that one with --stage")
        if self._has_members:
            return self._of_members()
        rows, reading = self.manifest.rows, self.stage.reading
        expected = self.schema if schema is None else schema
        batches = read_batches(self.place, reading, limit=rows, schema=expected)
        return batches if self.manifest.output is None else self._whole(batches)

    def check(self) -> None:
        """InputError when an output is not as it was published."""
        recorded = self.manifest.output_digest
        if recorded is not None and file_digest(self.place) != recorded:
            raise InputError(f"{self.place}: not what {self.stage.name} published; {AGAIN}")

    def _whole(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """InputError where an output has lines that are none, or too few."""
        rows = 0
        for batch in batches:
            bad = next((item for item in batch.items if isinstance(item, BadLine)), None)
            if bad is not None:
                raise InputError(f"{self.place}: damaged: {bad.detail}; {AGAIN}")
            rows += batch.rows
            yield batch
        if rows != self.manifest.rows:
            what = f"{rows:,} of the {self.manifest.rows:,} rows that were published"
            raise InputError(f"{self.place}: damaged: {what}; {AGAIN}")

    def _of_members(self) -> Iterator[Batch]:
        """Their files' rows have numbers of their own; here they have one for the partition."""
        parts, start = self.stage.parts(self.key, self.manifest), 0
        for _, batch in batches_of(parts, self.stage.reading, self.manifest.rows):
            items = batch.deep_items()
            yield RowBatch(
                start, [*map(_readable, items)] if isinstance(batch, DocumentBatch) else items
            )
            start += batch.rows

    def items(self) -> Iterator[tuple[int, Row | BadLine]]:
        """Each row with its index."""
        for batch in self.batches():
            yield from enumerate(batch.items, batch.start)

    def failure_of(self, item: Row | BadLine) -> Failure | None:
        """Why a row is none, or holds no result; what tells is its stage's own."""
        if isinstance(item, BadLine):
            return Failure(Reason.BAD_LINE, item.detail)
        return self.stage.maker.failure_of(item)

    def identity(self, index: int, item: Row | BadLine) -> str:
        """The record's id, as it is in a scores file."""
        return record_id(item, index, self.key, is_result=self.stage.maker.answers)


@dataclass(frozen=True, slots=True)
class FailedRow:
    """A failed row, for people."""

    file: str
    record_id: str
    reason: str
    detail: str
    attempts: int | None = None
    endpoint: str | None = None
    sample: int | None = None


def first_rows(place: Place, reading: Reading) -> list[Row]:
    """To look at before anything runs; lines that cannot be read are left out."""
    items = read_rows(place, reading, ROWS_LOOKED_AT)
    return [item for item in items if isinstance(item, dict)]


def column_names(items: Iterable[Row | BadLine]) -> Collection[str]:
    """Those of all rows, in the order in which they come."""
    return dict.fromkeys(chain.from_iterable(item for item in items if isinstance(item, dict)))


def published_files(
    stage: Stage, pattern: str | None = None, *, rejected: bool = False
) -> list[Published]:
    """The accepted result of each partition, sorted by name, or the rejected one where nothing was
    accepted; with `rejected` the rejected one wherever there is one. InputError when there is no
    result, or a manifest is damaged: its file would be missing."""
    found = list[Published]()
    for key in {*stage.published_keys(), *stage.published_keys(rejected=True)}:
        if pattern is not None and not matches(decode_key(key), pattern):
            continue
        if (manifest := stage.latest(key, rejected=rejected)) is None:
            place = stage.manifest_path(key)
            raise InputError(f"{decode_key(key)}: its manifest is damaged: {place}; {MAKE_ANEW}")
        found.append(Published(stage, key, manifest))
    if not found:
        what = f"no file that matches '{pattern}' is" if pattern else "nothing is"
        told, before = "run the task first", stage.upstream
        while before is not None:
            if any(before.published_keys(rejected=True)):
                told = f"results of {before.name} were rejected: see `--stage {before.name}`"
            before = before.upstream
        raise InputError(f"{stage.spec.name}: {what} published by {stage.name} yet; {told}")
    return sorted(found, key=lambda file: file.name)


def failed_rows(file: Published) -> Iterator[FailedRow]:
    """The failed rows of a file, in order; a file without any is not opened. InputError when it is
    not as it was published."""
    if not file.manifest.failed:
        return
    file.check()
    rows = file.items()
    if file.stage.answers and file.is_table:
        samples = {SAMPLE}.intersection(read_schema(file.place).names)
        batches = read_columns(file.place, [*_FAILURE_COLUMNS, *samples])
        failed = (batch.filter(pc.field("api_status") != "success") for batch in batches)
        rows = ((0, row) for batch in failed for row in batch.to_pylist())
    for index, item in rows:
        if (failure := file.failure_of(item)) is not None:
            told: Row = {} if isinstance(item, BadLine) else item
            asked = told.get("api_attempts"), told.get("api_endpoint")
            sample = number if isinstance(number := told.get(SAMPLE), int) else None
            name, reason = file.identity(index, item), str(failure.reason)
            yield FailedRow(file.name, name, reason, failure.detail, *asked, sample)


def _readable(item: Row | BadLine) -> Row | BadLine:
    """A file that is one record, with its text as such."""
    return {**item, "text": item["text"].decode()} if isinstance(item, dict) else item
