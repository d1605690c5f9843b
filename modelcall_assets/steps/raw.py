"""raw: what an input file, or a group of them, is: content hash, rows, schema and mistakes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from itertools import islice
from typing import TypedDict

import pyarrow as pa

from modelcall_assets.config.spec import RAW
from modelcall_assets.errors import InputError
from modelcall_assets.records.data_files import is_data_file
from modelcall_assets.records.record import BadLine, Row, short
from modelcall_assets.steps.seen import Seen
from modelcall_assets.storage.columns import MOST_ROWS, open_columns, rows_of
from modelcall_assets.storage.files import file_digest
from modelcall_assets.storage.formats import (
    OURS,
    Format,
    Reading,
    blank_lines,
    format_of,
    numbered,
    open_lines,
)
from modelcall_assets.storage.jsonl import line_parser, parse_line
from modelcall_assets.storage.listing import FileInfo
from modelcall_assets.storage.manifest import InputFingerprint, Manifest
from modelcall_assets.storage.rows import ID_COLUMNS, own_id, read_rows, sample_row
from modelcall_assets.storage.schema import SchemaInference, readable_schema, schema_to_json

WARNINGS, MEMBERS = "warnings", "members"
"""In the detail of a manifest."""
SAMPLE_ROWS = 3
SHOWN_DUPLICATES = 5
MOST_COLUMNS = 10_000


class Member(TypedDict):
    """A file of a partition, as manifests have it. `name` is its path in the input folder."""

    name: str
    uri: str
    digest: str
    rows: int
    size: int
    whole: bool
    """One record as a whole: what no data file is."""


@dataclass(frozen=True, slots=True)
class RawReport:
    """`rows` counts bad lines and leaves out blank ones; `first_bad` says where and why."""

    members: tuple[Member, ...]
    formats: tuple[Format, ...]
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


def read_raw(
    *files: FileInfo, limit: int | None = None, reading: Reading = OURS, is_group: bool = False
) -> RawReport:
    """Look at the whole of each file once, at the first `limit` rows of all only if given (digests
    are always of the whole). What is no data file counts as one record. The digest of a group has
    the names of its files too: rows are made of them, and where one lies if it is a row itself.
    InputError when one cannot be read, or has a bad line and `reading` refuses those."""
    findings = _Findings()
    members = tuple(_look_at(file, limit, reading, findings) for file in files)
    named = [(m["uri"] if m["whole"] else m["name"], m["digest"]) for m in members]
    together = f"sha256:{hashlib.sha256(repr(named).encode()).hexdigest()}"
    digest = together if is_group else members[0]["digest"]
    return RawReport(
        members=members,
        formats=tuple(findings.formats),
        digest=digest,
        data_version=digest if limit is None else f"{digest}|limit={limit}",
        rows=findings.rows,
        blank_lines=findings.blank_lines,
        bad_lines=findings.bad_lines,
        first_bad=findings.first_bad,
        duplicate_ids=findings.duplicate_ids,
        first_duplicates=tuple(findings.first_duplicates),
        schema=findings.schema(),
        sample=findings.sample,
    )


def raw_manifest(report: RawReport, fingerprint: InputFingerprint, *, is_group: bool) -> Manifest:
    """What is remembered of the partition; of a group which files it has."""
    members = {MEMBERS: list(report.members)} if is_group else {}
    return Manifest(
        stage=RAW,
        accepted=True,
        data_version=report.data_version,
        rows=report.rows,
        ok=report.rows - report.bad_lines,
        failed=report.bad_lines,
        input=fingerprint,
        schema=readable_schema(report.schema),
        detail={
            "schema": schema_to_json(report.schema),
            "format": ", ".join(report.formats),
            WARNINGS: report.warnings(),
            **members,
        },
    )


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
    formats: dict[Format, None] = field(default_factory=dict)
    inference: SchemaInference = field(default_factory=SchemaInference)
    columns: list[pa.Schema] = field(default_factory=list)

    def add_line(self, item: Row | BadLine | None, line: bytes) -> Row | None:
        """Count what a line turned out to be; give it back if it is a row."""
        if item is None:
            self.blank_lines += blank_lines(line)
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

    def add_document(self, file: FileInfo, limit: int | None) -> None:
        self.formats[Format.WHOLE] = None
        if self.rows == limit:
            return
        self.rows += 1
        if len(self.sample) < SAMPLE_ROWS:
            self.sample.append({"path": file.key_path, "bytes": file.size})

    def add_id(self, own: str | None) -> None:
        if own is None or self.seen.is_new(own):
            return
        self.duplicate_ids += 1
        if len(self.first_duplicates) < SHOWN_DUPLICATES:
            self.first_duplicates.append(short(own))

    def schema(self) -> pa.Schema:
        """That of the one file of columns, else the columns of all files."""
        if self.columns and not self.inference.schema():
            first = self.columns[0]
            if all(first.equals(other, check_metadata=True) for other in self.columns):
                return first
        for schema in self.columns:
            self.inference.add_types(schema)
        return self.inference.schema()


def _look_at(file: FileInfo, limit: int | None, reading: Reading, findings: _Findings) -> Member:
    before = findings.rows
    is_whole = not is_data_file(file.place.name)
    if is_whole:
        digest = file_digest(file.place)
        findings.add_document(file, limit)
    else:
        format_ = format_of(file.place)
        findings.formats[format_] = None
        look = _look_at_columns if format_.has_columns else _look_at_lines
        digest = look(file, format_, limit, reading, findings)
    return Member(
        name=file.key_path,
        uri=file.uri,
        digest=digest,
        rows=findings.rows - before,
        size=file.size,
        whole=is_whole,
    )


def _look_at_lines(
    file: FileInfo, format_: Format, limit: int | None, reading: Reading, findings: _Findings
) -> str:
    content, inference = hashlib.sha256(), findings.inference
    parse = line_parser(parse_line, file.place, reading)
    with open_lines(file.place, format_, reading, content) as lines:
        for number, line in numbered(lines):
            if findings.rows == limit:
                break
            row = findings.add_line(parse(line, number), line)
            if row is not None:
                inference.take(row, len(line))
            if len(inference) > MOST_COLUMNS:
                what = f"more than {MOST_COLUMNS:,} different keys up to line {number:,}"
                raise InputError(f"{file.place}: {what}; put them into one column, as an object")
    return f"sha256:{content.hexdigest()}"


def _look_at_columns(
    file: FileInfo, format_: Format, limit: int | None, reading: Reading, findings: _Findings
) -> str:
    before = findings.rows
    with open_columns(file.place, format_) as columns:
        findings.columns.append(columns.schema)
        names = [name for name in ID_COLUMNS if name in columns.schema.names]
        for batch in columns.batches(MOST_ROWS, names):
            if findings.rows == limit:
                break
            batch = batch.slice(0, None if limit is None else limit - findings.rows)
            for item in rows_of(batch.select(names), findings.rows) if names else ():
                findings.add_id(own_id(item) if isinstance(item, dict) else None)
            findings.rows += batch.num_rows
    wanted = min(SAMPLE_ROWS - len(findings.sample), findings.rows - before)
    first = islice(read_rows(file.place, reading, SAMPLE_ROWS), wanted)
    findings.sample += [sample_row(item) for item in first if isinstance(item, dict)]
    return file_digest(file.place)
