"""What a task has published, for people and for other programs: its files, and why rows failed."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, islice
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from modelcall_assets.errors import InputError
from modelcall_assets.records.data_files import decode_key, stem_of
from modelcall_assets.records.outcome import BadLine, Failure, Reason, Row
from modelcall_assets.stages.stage import MEMBERS, Stage
from modelcall_assets.storage.columns import read_columns, read_schema
from modelcall_assets.storage.files import file_digest
from modelcall_assets.storage.formats import read_document
from modelcall_assets.storage.listing import matches, stat_file
from modelcall_assets.storage.places import Place
from modelcall_assets.storage.publishing import Manifest
from modelcall_assets.storage.rows import (
    BATCH_ROWS,
    Batch,
    RowBatch,
    read_batches,
    read_rows,
    record_id,
)
from modelcall_assets.storage.values import schema_from_json

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
    def _members(self) -> list[Mapping[str, Any]]:
        """The files of a split or group, which together are its `raw`."""
        members = self.manifest.detail.get(MEMBERS)
        return members if isinstance(members, list) else []

    @property
    def stem(self) -> PurePosixPath:
        """The relative path without the suffix."""
        name = PurePosixPath(self.name).name if self._members else self.place.name
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
        rows = (item for _, item in self.items() if isinstance(item, dict))
        return frozenset(chain.from_iterable(rows))

    @property
    def is_table(self) -> bool:
        """Whether it is a Parquet file of ours."""
        return (self.manifest.output or "").endswith(".parquet")

    def batches(self, schema: pa.Schema | None = None) -> Iterator[Batch]:
        """The rows. InputChanged when a file of columns has not `schema`."""
        rows, reading = self.manifest.rows, self.stage.reading
        if self._members:
            return self._of_members(
                islice(chain.from_iterable(map(self._rows_of, self._members)), rows)
            )
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

    def _of_members(self, rows: Iterator[Row | BadLine]) -> Iterator[Batch]:
        """Their files' rows have numbers of their own; here they have one for the partition."""
        start = 0
        while some := list(islice(rows, BATCH_ROWS)):
            yield RowBatch(start, some)
            start += len(some)

    def _rows_of(self, member: Mapping[str, Any]) -> Iterator[Row | BadLine]:
        place = self.stage.layout.place(member["uri"])
        if not member.get("whole"):
            yield from read_rows(place, self.stage.reading)
            return
        item = read_document(replace(stat_file(place), key_path=member["name"]))
        yield {**item, "text": item["text"].decode()} if isinstance(item, dict) else item

    def items(self) -> Iterator[tuple[int, Row | BadLine]]:
        """Each row with its index."""
        for batch in self.batches():
            yield from enumerate(batch.items, batch.start)


@dataclass(frozen=True, slots=True)
class FailedRow:
    """A failed row, for people."""

    file: str
    record_id: str
    reason: str
    detail: str
    attempts: int | None = None
    endpoint: str | None = None


def published_files(
    stage: Stage, pattern: str | None = None, *, rejected: bool = False
) -> list[Published]:
    """What the stage has published, by name, and what was rejected of partitions of which nothing
    was accepted; with `rejected` of all that have such a result. InputError when there is nothing,
    or a manifest is damaged: its file would be missing."""
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
        name = stage.spec.name
        raise InputError(f"{name}: {what} published by {stage.name} yet; run the task first")
    return sorted(found, key=lambda file: file.name)


def failure_of(file: Published, item: Row | BadLine) -> Failure | None:
    """Why a row is none, or holds no result; what tells is its stage's own."""
    if isinstance(item, BadLine):
        return Failure(Reason.BAD_LINE, item.detail)
    return file.stage.maker.failure_of(item)


def failed_rows(file: Published) -> Iterator[FailedRow]:
    """The failed rows of a file, in order; a file without any is not opened. InputError when it is
    not as it was published."""
    if not file.manifest.failed:
        return
    file.check()
    if file.stage.answers and file.is_table:
        for batch in read_columns(file.place, _FAILURE_COLUMNS):
            for row in batch.filter(pc.field("api_status") != "success").to_pylist():
                yield _failed_row(file, row, row["api_record_id"])
        return
    for index, item in file.items():
        if failure_of(file, item) is not None:
            yield _failed_row(file, item, identity(file, index, item))


def identity(file: Published, index: int, item: Row | BadLine) -> str:
    """The record's id, as it is in a scores file."""
    return record_id(item, index, file.key, is_result=file.stage.maker.answers)


def _failed_row(file: Published, item: Row | BadLine, record: str) -> FailedRow:
    failure = failure_of(file, item)
    assert failure is not None
    fields: dict[str, Any] = {} if isinstance(item, BadLine) else item
    attempts, endpoint = fields.get("api_attempts"), fields.get("api_endpoint")
    reason, detail = str(failure.reason), failure.detail
    return FailedRow(file.name, record, reason, detail, attempts, endpoint)
