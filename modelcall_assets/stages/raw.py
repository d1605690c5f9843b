"""raw: what an input file, a group of them or a split of a data set is: content hash, rows, schema
and mistakes. It leaves the files where they are."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from modelcall_assets.config.task import ScoringTask
from modelcall_assets.errors import InputError
from modelcall_assets.journal.lines import Words
from modelcall_assets.records import decode_key, is_data_file
from modelcall_assets.records.outcome import BadLine, Reason, Row
from modelcall_assets.stages import Stage
from modelcall_assets.stages.inputs import GroupedInputs, SplitInputs, version_of
from modelcall_assets.stages.report import SAMPLE_ROWS, Report, Tally
from modelcall_assets.stages.source import MEMBERS, Part
from modelcall_assets.storage.columns import MOST_ROWS, open_columns, rows_of
from modelcall_assets.storage.files import file_digest
from modelcall_assets.storage.formats import OURS, Digest, Format, Reading, format_of
from modelcall_assets.storage.listing import FileInfo
from modelcall_assets.storage.parquet import check_writable
from modelcall_assets.storage.places import Place
from modelcall_assets.storage.publishing import (
    InputFingerprint,
    Manifest,
    read_manifest,
    write_manifest,
)
from modelcall_assets.storage.rows import (
    ID_COLUMNS,
    STREAM_BYTES,
    LineBatch,
    count_rows,
    own_id,
    read_batches,
    read_rows,
)
from modelcall_assets.storage.values import SchemaInference

WARNINGS = "warnings"
"""In the detail of a manifest."""
MOST_COLUMNS = 10_000
SHOWN_MEMBERS = 50


class Raw(Stage):
    """A partition is a file, or a group of files that a preprocessor puts together."""

    name = "raw"
    about = "an input file's fingerprint, schema and first mistakes"
    kinds = ("file",)
    suffix = ""
    again = ""

    @property
    def folder(self) -> Place:
        return self.layout.input_folder

    @property
    def reading(self) -> Reading:
        block = self.spec.task.reads
        return Reading(block.encoding, block.on_bad_line, block.on_empty_file)

    def own_shape(self) -> dict[str, Any]:
        return {"limit": self.task.row_limit}

    def make(self, key: str, tally: Tally) -> Report:
        """InputError when a file cannot be read, has no readable line, or is text without a line,
        as a failed upload leaves it, unless the task accepts those; a file of columns without rows
        is taken at its word."""
        self.layout.check_name(key)
        inputs = self.task.inputs
        files, is_group = inputs.members(key), isinstance(inputs, GroupedInputs)
        report = read_raw(
            *files, limit=self.task.row_limit, reading=self.reading, is_group=is_group
        )
        place = files[0].place
        is_empty = not report.rows and not any(kind.has_columns for kind in report.formats)
        if is_empty and self.reading.on_empty_file == "fail":
            wrong = "there is no line in this file; fill it or take it away"
            raise InputError(f"{place}: {wrong}, or write `on_empty_file: accept`")
        if report.rows and report.failed == report.rows and self.spec.task.max_failure_rate < 1:
            wrong = f"none of {report.rows:,} lines can be read; the first: {report.first_bad}"
            raise InputError(f"{place}: {wrong}; correct the file or take it away")
        if Format.ARROW in report.formats and isinstance(self.spec.task, ScoringTask):
            check_writable(place, report.schema)
        whole = files[0].uri if len(files) == 1 else f"{self.spec.input_folder}/{decode_key(key)}"
        version = version_of(files) if is_group else files[0].version
        self.write(key, report, files, whole, version)
        return report

    def write(
        self, key: str, report: RawReport, files: Sequence[FileInfo], uri: str, version: str
    ) -> None:
        size = sum(file.size for file in files)
        made_of = InputFingerprint(uri=uri, digest=report.digest, size=size, version=version)
        write_manifest(self.manifest_path(key), report.manifest(self.name, made_of))

    def check(self, manifest: Manifest) -> None:
        """Those that are several files are looked at when their rows have been read."""
        if MEMBERS not in manifest.detail:
            super().check(manifest)

    def parts(self, key: str, manifest: Manifest) -> tuple[Part, ...]:
        if MEMBERS not in manifest.detail:
            return super().parts(key, manifest)
        place = self.layout.place
        return tuple(
            Part(name, place(uri), each["digest"], each["size"], each.get("whole", False))
            for each in manifest.detail[MEMBERS]
            for uri, name in [(each["uri"], each.get("name") or each["uri"])]
        )

    def outdated(self, keys: Sequence[str]) -> set[str]:
        """Where several files lie is in their version."""
        versions = self.task.inputs.versions(keys)

        def is_outdated(key: str) -> bool:
            made = read_manifest(self.manifest_path(key))
            if made is None or versions.get(key) != made.input.version:
                return True
            has_moved = made.input.uri != str(self.layout.input_place(key))
            return has_moved and MEMBERS not in made.detail

        return {*filter(is_outdated, keys)}


class Split(Raw):
    """A partition is a split of a data set: its rows are looked at when they are converted."""

    about = "a split's files and their fingerprints"

    def make(self, key: str, tally: Tally) -> Report:
        inputs = self.task.inputs
        assert isinstance(inputs, SplitInputs)
        files = inputs.members(key)
        report = read_split(files, self.reading)
        self.write(key, report, files, str(inputs.place(key).path), version_of(files))
        return report


@dataclass
class RawReport(Report):
    """`rows` counts bad lines and leaves out blank ones."""

    members: Sequence[Mapping[str, Any]] = ()
    formats: tuple[Format, ...] = ()
    digest: str = ""
    blank_lines: int = 0

    @property
    def first_bad(self) -> str | None:
        return self.failed_rows[0].detail if self.failed_rows else None

    def told(self) -> list[str]:
        """What people should know of the file although its rows are rated."""
        found: list[str] = []
        if self.failed:
            what = f"{self.failed} of {self.rows} lines are not JSON objects"
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
    look = _Look(limit, reading)
    report = look.report
    report.members = tuple(map(look.at, files))
    report.rows_in = report.rows
    named = [(m["uri"] if m["whole"] else m["name"], m["digest"]) for m in report.members]
    together = f"sha256:{hashlib.sha256(repr(named).encode()).hexdigest()}"
    report.digest = together if is_group else report.members[0]["digest"]
    report.data_version = report.digest if limit is None else f"{report.digest}|limit={limit}"
    report.schema = look.schema()
    shown = ", ".join(report.formats)
    report.detail = {
        "format": shown,
        WARNINGS: report.told(),
        **({MEMBERS: [*report.members]} if is_group else {}),
    }
    report.numbers = {
        "format": shown,
        "bytes": sum(member["size"] for member in report.members),
        "bad_lines": report.failed,
        "first_bad_line": report.first_bad or "none",
        "duplicate_ids": report.duplicate_ids,
    }
    if len(files) > 1:
        _show_members(report)
    return report


def read_split(files: Sequence[FileInfo], reading: Reading) -> RawReport:
    """Rows without blank lines and digests, without parsing what has to be parsed once more anyway.
    InputError when a file cannot be read, or has a bad line and `reading` refuses those."""
    members: list[dict[str, Any]] = []
    for file in files:
        heard = hashlib.sha256()
        rows = count_rows(file.place, reading, heard)
        digest = _digest(file.place, format_of(file.place), heard)
        members.append({"uri": file.uri, "digest": digest, "rows": rows, "size": file.size})
    content = repr([member["digest"] for member in members]).encode()
    digest = hashlib.sha256(content).hexdigest()[:32]
    rows = sum(member["rows"] for member in members)
    report = RawReport(rows_in=rows, rows=rows, digest=digest, data_version=digest, members=members)
    report.detail = {MEMBERS: members}
    report.numbers = {"bytes": sum(file.size for file in files)}
    _show_members(report)
    return report


def _digest(place: Place, format_: Format, heard: Digest) -> str:
    """Of a file that was read; what is no file of lines was not read from end to end."""
    is_heard = not format_.has_columns and format_ is not Format.WHOLE
    return f"sha256:{heard.hexdigest()}" if is_heard else file_digest(place)


def _show_members(report: RawReport) -> None:
    """The first ones: a partition may have very many."""
    report.numbers["files"] = len(report.members)
    report.tables["members"] = [
        {"file": each.get("name") or each["uri"], "rows": each["rows"], "bytes": each["size"]}
        for each in report.members[:SHOWN_MEMBERS]
    ]


@dataclass
class _Look:
    """Counts rows while they stream past."""

    limit: int | None
    reading: Reading
    report: RawReport = field(default_factory=RawReport)
    ids: Words = field(default_factory=Words)
    """By 64 bits: among 100 million ids two are taken for one with a chance of 1 in 3,000."""
    inference: SchemaInference = field(default_factory=SchemaInference)
    columns: list[pa.Schema] = field(default_factory=list)

    def at(self, file: FileInfo) -> dict[str, Any]:
        """The file as manifests have it. `name` is its path in the input folder, `whole` says that
        it is one record: what no data file is."""
        before, content = self.report.rows, hashlib.sha256()
        is_whole = not is_data_file(file.place.name)
        format_ = Format.WHOLE if is_whole else format_of(file.place)
        if format_ not in self.report.formats:
            self.report.formats += (format_,)
        if format_.has_columns:
            self._columns(file.place, format_)
        elif not is_whole:
            self._lines(file, content)
        elif before != self.limit:
            self.report.rows += 1
            self.report.show({"path": file.key_path, "bytes": file.size})
        rows, digest = self.report.rows - before, _digest(file.place, format_, content)
        found = {"name": file.key_path, "uri": file.uri, "digest": digest, "rows": rows}
        return {**found, "size": file.size, "whole": is_whole}

    def _lines(self, file: FileInfo, content: Digest) -> None:
        report = self.report
        left = None if self.limit is None else self.limit - report.rows
        for batch in read_batches(
            file.place, self.reading, limit=left, size=STREAM_BYTES, content=content
        ):
            assert isinstance(batch, LineBatch)
            report.blank_lines += batch.blank
            lines = zip(batch.items, batch.lines, batch.numbers, strict=True)
            for row, (item, line, number) in enumerate(lines, report.rows + 1):
                if isinstance(item, BadLine):
                    report.fail(row, file.key_path, Reason.BAD_LINE, item.detail)
                    continue
                report.show(item)
                self._id(item)
                self.inference.take(item, len(line))
                if len(self.inference) > MOST_COLUMNS:
                    what = f"more than {MOST_COLUMNS:,} different keys up to line {number:,}"
                    raise InputError(
                        f"{file.place}: {what}; put them into one column, as an object"
                    )
            report.rows += batch.rows

    def _columns(self, place: Place, format_: Format) -> None:
        """The schema is known also where there is no batch."""
        report, before = self.report, self.report.rows
        with open_columns(place, format_) as columns:
            self.columns.append(columns.schema)
            names = [name for name in ID_COLUMNS if name in columns.schema.names]
            for batch in columns.batches(MOST_ROWS, names):
                if report.rows == self.limit:
                    break
                batch = batch.slice(0, None if self.limit is None else self.limit - report.rows)
                for item in rows_of(batch.select(names), report.rows) if names else ():
                    if isinstance(item, dict):
                        self._id(item)
                report.rows += batch.num_rows
        wanted = min(SAMPLE_ROWS - len(report.sample), report.rows - before)
        for item in read_rows(place, self.reading, wanted, SAMPLE_ROWS):
            if isinstance(item, dict):
                report.show(item)

    def _id(self, row: Row) -> None:
        if (own := own_id(row)) is not None and not self.ids.add(hash(own)):
            self.report.repeats(own)

    def schema(self) -> pa.Schema:
        """That of the one file of columns, else the columns of all files."""
        if self.columns and not self.inference.schema():
            first = self.columns[0]
            if all(first.equals(other, check_metadata=True) for other in self.columns):
                return first
        for schema in self.columns:
            self.inference.add_types(schema)
        return self.inference.schema()
