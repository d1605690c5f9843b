"""raw: what an input file is. Its content hash, its rows, its schema and its mistakes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq

from modelcall_assets.records.record import BadLine, Row
from modelcall_assets.storage.files import file_digest, open_input
from modelcall_assets.storage.jsonl import parse_line
from modelcall_assets.storage.listing import FileInfo
from modelcall_assets.storage.parquet import open_parquet, parquet_schema, plain_rows
from modelcall_assets.storage.places import Place
from modelcall_assets.storage.rows import is_parquet, own_id, sample_row
from modelcall_assets.storage.schema import SchemaInference

SAMPLE_ROWS = 3
SHOWN_DUPLICATES = 5
BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class RawReport:
    """`rows` counts bad lines and leaves out blank ones; `first_bad` says where and why."""

    info: FileInfo
    digest: str
    data_version: str
    rows: int
    blank_lines: int
    bad_lines: int
    first_bad: str | None
    duplicate_ids: int
    first_duplicates: tuple[str, ...]
    schema: pa.Schema
    sample: list[Row]

    def warnings(self) -> list[str]:
        """What people should know of the file although its rows are rated."""
        found: list[str] = []
        if self.bad_lines:
            what = f"{self.bad_lines} of {self.rows} lines are not JSON objects"
            found.append(f"{what}; the first: {self.first_bad}")
        if self.duplicate_ids:
            which = ", ".join(self.first_duplicates)
            found.append(f"{self.duplicate_ids} rows repeat the id of another: {which}")
        return found


def read_raw(file: FileInfo, limit: int | None = None) -> RawReport:
    """Look at the whole file once, at its first `limit` rows only if given (the digest is always of
    the whole). InputError when it cannot be read."""
    look = _look_at_parquet if is_parquet(file.place) else _look_at_jsonl
    return look(file, limit)


@dataclass
class _Findings:
    """What accumulates while rows stream past."""

    rows: int = 0
    blank_lines: int = 0
    bad_lines: int = 0
    first_bad: str | None = None
    duplicate_ids: int = 0
    first_duplicates: list[str] = field(default_factory=list)
    sample: list[Row] = field(default_factory=list)
    seen_ids: set[int] = field(default_factory=set)

    def add_line(self, item: Row | BadLine | None) -> Row | None:
        """Count what a line turned out to be; give it back if it is a row."""
        if item is None:
            self.blank_lines += 1
            return None
        self.rows += 1
        if isinstance(item, BadLine):
            self.bad_lines += 1
            self.first_bad = self.first_bad or item.detail
            return None
        if len(self.sample) < SAMPLE_ROWS:
            self.sample.append(sample_row(item))
        self.add_id(own_id(item))
        return item

    def add_id(self, own: str | None) -> None:
        """Only a 64-bit hash of each id is kept."""
        if own is None:
            return
        key = hash(own)
        if key in self.seen_ids:
            self.duplicate_ids += 1
            if len(self.first_duplicates) < SHOWN_DUPLICATES:
                self.first_duplicates.append(own)
        self.seen_ids.add(key)

    def report(
        self, file: FileInfo, digest: str, limit: int | None, schema: pa.Schema
    ) -> RawReport:
        return RawReport(
            info=file,
            digest=digest,
            data_version=digest if limit is None else f"{digest}|limit={limit}",
            rows=self.rows,
            blank_lines=self.blank_lines,
            bad_lines=self.bad_lines,
            first_bad=self.first_bad,
            duplicate_ids=self.duplicate_ids,
            first_duplicates=tuple(self.first_duplicates),
            schema=schema,
            sample=self.sample,
        )


def _look_at_jsonl(file: FileInfo, limit: int | None) -> RawReport:
    content, findings, inference = hashlib.sha256(), _Findings(), SchemaInference()
    with open_input(file.place) as lines:
        for number, line in enumerate(lines, 1):
            content.update(line)
            if findings.rows == limit:
                break
            row = findings.add_line(parse_line(line, number))
            if row is not None:
                inference.take(row, len(line))
        while block := lines.read(BLOCK_BYTES):
            content.update(block)
    digest = f"sha256:{content.hexdigest()}"
    return findings.report(file, digest, limit, inference.schema())


def _look_at_parquet(file: FileInfo, limit: int | None) -> RawReport:
    findings = _Findings()
    with open_parquet(file.place) as parquet:
        rows = parquet.metadata.num_rows
        findings.rows = rows if limit is None else min(rows, limit)
        schema = parquet_schema(parquet)
        first = next(parquet.iter_batches(batch_size=SAMPLE_ROWS), None)
        if first is not None:
            sample = plain_rows(first.slice(0, limit), file.place)
            findings.sample = [sample_row(row) for row in sample]
        for own in islice(_own_ids(parquet, file.place), limit):
            findings.add_id(own)
    return findings.report(file, file_digest(file.place), limit, schema)


def _own_ids(parquet: pq.ParquetFile, place: Place) -> Iterator[str | None]:
    names = [name for name in ("id", "uid") if name in parquet.schema_arrow.names]
    if names:
        for batch in parquet.iter_batches(columns=names):
            yield from map(own_id, plain_rows(batch, place))
