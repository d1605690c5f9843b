"""raw: what an input file is. Its content hash, its rows, its schema and its mistakes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from itertools import islice

import pyarrow as pa

from modelcall_assets.errors import InputError
from modelcall_assets.records.record import BadLine, Row
from modelcall_assets.steps.seen import Seen
from modelcall_assets.storage.columns import MOST_ROWS, open_columns, rows_of
from modelcall_assets.storage.files import file_digest
from modelcall_assets.storage.formats import OURS, Format, Reading, format_of, open_lines
from modelcall_assets.storage.jsonl import line_parser, parse_line
from modelcall_assets.storage.listing import FileInfo
from modelcall_assets.storage.rows import ID_COLUMNS, own_id, read_rows, sample_row
from modelcall_assets.storage.schema import SchemaInference

SAMPLE_ROWS = 3
SHOWN_DUPLICATES = 5
MOST_COLUMNS = 10_000


@dataclass(frozen=True, slots=True)
class RawReport:
    """`rows` counts bad lines and leaves out blank ones; `first_bad` says where and why."""

    info: FileInfo
    format: Format
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


def read_raw(file: FileInfo, limit: int | None = None, reading: Reading = OURS) -> RawReport:
    """Look at the whole file once, at its first `limit` rows only if given (the digest is always of
    the whole). InputError when it cannot be read, or has a bad line and `reading` refuses those."""
    format_ = format_of(file.place)
    if format_.has_columns:
        return _look_at_columns(file, format_, limit, reading)
    return _look_at_lines(file, format_, limit, reading)


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
    seen: Seen = field(default_factory=Seen)

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
        if own is None or self.seen.is_new(own):
            return
        self.duplicate_ids += 1
        if len(self.first_duplicates) < SHOWN_DUPLICATES:
            self.first_duplicates.append(own)

    def report(
        self, file: FileInfo, format_: Format, digest: str, limit: int | None, schema: pa.Schema
    ) -> RawReport:
        return RawReport(
            info=file,
            format=format_,
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


def _look_at_lines(
    file: FileInfo, format_: Format, limit: int | None, reading: Reading
) -> RawReport:
    content, findings, inference = hashlib.sha256(), _Findings(), SchemaInference()
    parse = line_parser(parse_line, file.place, reading)
    with open_lines(file.place, format_, reading, content) as lines:
        for number, line in enumerate(lines, 1):
            if findings.rows == limit:
                break
            row = findings.add_line(parse(line, number))
            if row is not None:
                inference.take(row, len(line))
            if len(inference) > MOST_COLUMNS:
                what = f"more than {MOST_COLUMNS:,} different keys up to line {number:,}"
                raise InputError(f"{file.place}: {what}; put them into one column, as an object")
    digest = f"sha256:{content.hexdigest()}"
    return findings.report(file, format_, digest, limit, inference.schema())


def _look_at_columns(
    file: FileInfo, format_: Format, limit: int | None, reading: Reading
) -> RawReport:
    findings = _Findings()
    with open_columns(file.place, format_) as columns:
        schema = columns.schema
        names = [name for name in ID_COLUMNS if name in schema.names]
        for batch in columns.batches(MOST_ROWS, names):
            if findings.rows == limit:
                break
            batch = batch.slice(0, None if limit is None else limit - findings.rows)
            for item in rows_of(batch.select(names), findings.rows) if names else ():
                findings.add_id(own_id(item) if isinstance(item, dict) else None)
            findings.rows += batch.num_rows
    first = islice(read_rows(file.place, reading, SAMPLE_ROWS), min(SAMPLE_ROWS, findings.rows))
    findings.sample = [sample_row(item) for item in first if isinstance(item, dict)]
    return findings.report(file, format_, file_digest(file.place), limit, schema)
