"""merged: the files of a merge group as one of JSON lines, file after file and row after row.

A valid line is copied as it is. With a source column, `"<column>":"<member>"` is written behind the
last key of each row; a row that has the column already is written anew, its own value under the
name that `moved_names` gives it. What is no JSON object goes as it is to `<output>.invalid`: no
byte is lost. Rows of columns are written as lines first.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import chain, repeat
from typing import Any

import orjson

from modelcall_assets.config.datasets import MergeGroup
from modelcall_assets.config.places import shown_place
from modelcall_assets.errors import InputError, Problem, SetupError
from modelcall_assets.journal.lines import Words
from modelcall_assets.records import decode_key, encode_key, is_data_file
from modelcall_assets.records.outcome import BadLine, Numbered, Row, moved_names
from modelcall_assets.stages import Stage
from modelcall_assets.stages.chatml import UNWRITABLE
from modelcall_assets.stages.inputs import digest_of_versions
from modelcall_assets.stages.publication import Draft
from modelcall_assets.stages.report import Report, Tally
from modelcall_assets.stages.source import MEMBERS, column_names
from modelcall_assets.storage.files import NewFile, write_lines
from modelcall_assets.storage.formats import OURS, Reading
from modelcall_assets.storage.listing import matches
from modelcall_assets.storage.places import Place
from modelcall_assets.storage.publishing import InputFingerprint, Manifest, read_manifest
from modelcall_assets.storage.rows import STREAM_BYTES, LineBatch, read_batches
from modelcall_assets.storage.values import loads
from modelcall_assets.transforms import encode

SHOWN_INVALID = 3
BLANK, INVALID, DUPLICATE = "blank line", "no JSON object", "duplicate"
"""Why a line of a member is not in the output."""


class Merged(Stage):
    """A partition is a merge group."""

    name = "merged"
    about = "conversations of a merge group"
    suffix = ".jsonl"
    done = "merged"
    gathers = True

    @property
    def maker(self) -> Stage:
        return self.before.maker

    def own_shape(self) -> dict[str, Any]:
        return {"groups": [group.model_dump() for group in self.spec.groups]}

    @cached_property
    def groups(self) -> Mapping[str, MergeGroup]:
        """By partition key."""
        return {encode_key(group.output_file): group for group in self.spec.groups}

    def beside(self, key: str, *, rejected: bool = False) -> list[Place]:
        return [invalid_file_of(self.output(key, rejected=rejected))]

    def make(self, key: str, tally: Tally) -> Report:
        """InputError names the members that are not there."""
        group, upstream = self.groups[key], self.before
        manifests = self._members(key)
        missing = [name for name, made in manifests.items() if made is None]
        if missing:
            raise InputError(
                f"{key}: {len(missing)} of {len(manifests)} members have no accepted "
                f"{upstream.name}: {', '.join(missing)}; make {upstream.name} of these first"
            )
        made = {name: manifest for name, manifest in manifests.items() if manifest is not None}
        for each in made.values():
            upstream.check(each)
        places, versions = {name: upstream.result(made[name]) for name in made}, _versions(made)
        with Draft(self, key) as draft:
            report = draft.written(
                lambda out: merge_group(
                    places,
                    out,
                    lambda: draft.beside(invalid_file_of(out.place)),
                    reading=upstream.reading,
                    source_column=group.source_column,
                    dedup=group.dedup,
                    are_ours=all(each.output is not None for each in made.values()),
                )
            )
            report.detail[MEMBERS] = versions
            digest, folder = digest_of_versions(versions), str(upstream.folder)
            draft.publish(report, InputFingerprint(uri=folder, digest=digest, size=0, version=""))
        return report

    def members_changed(self, key: str) -> bool:
        return self._merged_from(key) != _versions(self._members(key))

    def to_follow(self, key: str) -> str | None:
        members = self._members(key)
        versions = _versions(members)
        is_complete = len(versions) == len(members)
        is_new = is_complete and versions != self._merged_from(key)
        return digest_of_versions(versions) if is_new else None

    def _merged_from(self, key: str) -> dict[str, str] | None:
        """The members' versions that a group was made of; None before it was."""
        made = read_manifest(self.manifest_path(key))
        return None if made is None else made.detail[MEMBERS]

    def _members(self, key: str) -> dict[str, Manifest | None]:
        """What there is of each member of a group, in order; None where that is not accepted."""
        upstream = self.before
        paths = [decode_key(member) for member in upstream.keys.now()]
        names = members_of(self.groups[key], paths, str(upstream.folder))
        return {name: upstream.accepted(encode_key(name)) for name in names}

    def lacks(self) -> Iterator[Problem]:
        """Members of the groups that are not there now."""
        keys, spec = self.before.keys, self.spec
        try:
            now = keys.now()
        except (InputError, SetupError) as error:
            of = f"{spec.link.spec.name} leaves nothing yet: " if spec.link is not None else ""
            yield self.task.warning(f"{of}{error}")
            return
        if not keys.every() >= {*now}:
            return  # data sets are missing, which has been told
        folder = shown_place(str(self.before.folder), spec.root)
        for group in spec.groups:
            try:
                members_of(group, map(decode_key, now), folder)
            except InputError as error:
                yield self.task.warning(str(error), field="jsonl_merge.merge_config_path")


def _versions(members: Mapping[str, Manifest | None]) -> dict[str, str]:
    """Of the members that there are."""
    return {name: each.data_version for name, each in members.items() if each is not None}


def invalid_file_of(output: Place) -> Place:
    """Of the lines that a merged file cannot hold; no listing of data files takes it for one."""
    return output.with_name(f"{output.name}.invalid")


def members_of(group: MergeGroup, listing: Iterable[str], folder: str) -> list[str]:
    """The group's members among the relative paths of `listing`, in the group's order, each once.

    A member is an exact path, else the matches of a glob pattern by name, else a bare file name
    that lies in one sub-folder. InputError names all that are missing or in several; `folder` is
    what it calls the place.
    """
    paths = sorted(filter(is_data_file, listing))
    found: dict[str, None] = {}
    wrong: list[str] = []
    for pattern in group.input_files:
        is_glob = any(char in pattern for char in "*?[")
        if pattern in paths:
            candidates = [pattern]
        elif is_glob:
            candidates = [path for path in paths if matches(path, pattern)]
        else:
            ending, is_bare = f"/{pattern}", "/" not in pattern
            candidates = [path for path in paths if is_bare and path.endswith(ending)]
        if not candidates:
            wrong.append(f"{pattern} is not there")
        elif len(candidates) > 1 and not is_glob:
            wrong.append(f"{pattern} is in several places: {', '.join(candidates)}")
        found.update(dict.fromkeys(candidates))
    if wrong:
        raise InputError(
            f"merge group '{group.name}': of the members under {folder}, {'; '.join(wrong)}"
        )
    return list(found)


@dataclass(slots=True)
class MemberCount:
    """`rows` are in the output; every line of the member is counted once."""

    name: str
    rows: int = 0
    blank: int = 0
    invalid: int = 0
    duplicates: int = 0


@dataclass
class MergeReport(Report):
    members: list[MemberCount] = field(default_factory=list[MemberCount])
    first_invalid: list[str] = field(default_factory=list[str])
    """File, line and what is wrong."""

    def total(self) -> None:
        blank = sum(member.blank for member in self.members)
        invalid = sum(member.invalid for member in self.members)
        duplicates = sum(member.duplicates for member in self.members)
        self.dropped += Counter({BLANK: blank, INVALID: invalid, DUPLICATE: duplicates})
        self.rows = sum(member.rows for member in self.members)
        self.rows_in = self.rows + self.dropped.total()
        self.numbers = {"blank_lines": blank, "invalid_lines": invalid, "duplicates": duplicates}
        self.tables["members"] = [asdict(member) for member in self.members]
        if invalid:
            first = "; ".join(self.first_invalid)
            self.warnings.append(f"{invalid:,} lines are not JSON objects: {first}")
            if not self.rows:
                told = f"none of {invalid:,} lines is a JSON object"
                self.emptied = f"{told}; the first: {self.first_invalid[0]}"


def merge_group(
    members: Mapping[str, Place],
    out: NewFile,
    rejects: Callable[[], NewFile],
    *,
    source_column: str | None = None,
    dedup: bool = False,
    reading: Reading = OURS,
    are_ours: bool = False,
) -> MergeReport:
    """Write the members, name → place, as one file; `rejects` makes the one of the invalid lines,
    if there are any. Members that `are_ours` were found to be as a stage left them. InputError when
    a member cannot be read, or has a bad line and `reading` refuses those."""
    copies = are_ours and source_column is None and not dedup
    merge = _Merge(members, rejects, source_column, Words() if dedup else None, reading, copies)
    write_lines(out, chain.from_iterable(merge.lines(*member) for member in members.items()))
    report = merge.report
    report.total()
    report.data_version = out.digest
    return report


@dataclass
class _Merge:
    """What goes into the output, counted."""

    members: Mapping[str, Place]
    new_rejects: Callable[[], NewFile]
    column: str | None
    seen: Words | None
    """Which contents were met, about 9 bytes each; None when they may repeat."""
    reading: Reading
    copies: bool
    """Whether nothing has to be known of the lines."""
    report: MergeReport = field(default_factory=MergeReport)

    @cached_property
    def rejects(self) -> NewFile:
        return self.new_rejects()

    @cached_property
    def moved(self) -> dict[str, str]:
        """Asked for when a row has the source column: then all have to be looked at for names."""
        items = (
            item
            for place in self.members.values()
            for batch in read_batches(place, self.reading, size=STREAM_BYTES)
            for item, _ in batch.with_lines()
        )
        assert self.column is not None
        self.report.moved = moved_names(column_names(items), [self.column])
        return self.report.moved

    def lines(self, name: str, place: Place) -> Iterator[bytes]:
        """The output's lines of one member."""
        count = MemberCount(name)
        self.report.members.append(count)
        for item, line in chain.from_iterable(self._items(place, count)):
            if line is None:
                item, line = _as_line(item)
            if isinstance(item, BadLine):
                count.invalid += 1
                self.rejects.write(line if line.endswith(b"\n") else line + b"\n")
                if len(self.report.first_invalid) < SHOWN_INVALID:
                    self.report.first_invalid.append(f"{name}, {item.detail}")
            elif self.seen is not None and not _is_new(self.seen, item, line):
                count.duplicates += 1
            else:
                count.rows += 1
                if self.column is not None:
                    line = self._with_source(self.column, name, item, line)
                elif line[-1] != _NEWLINE:
                    line += b"\n"
                if self.report.shows_more:
                    self.report.show(loads(line))
                yield line

    def _items(
        self, place: Place, count: MemberCount
    ) -> Iterator[Iterable[tuple[Row | BadLine, bytes | None]]]:
        for batch in read_batches(place, self.reading, size=STREAM_BYTES):
            count.blank += batch.blank
            if self.copies and isinstance(batch, LineBatch):
                yield zip(repeat({}), batch.lines)
            else:
                yield batch.with_lines()

    def _with_source(self, column: str, name: str, row: Row, line: bytes) -> bytes:
        if column in row:
            own: Row = loads(line)
            own = {self.moved.get(key, key): own[key] for key in own}
            return encode({**own, column: name})
        added = orjson.dumps({column: name})[1:]
        return line.rstrip()[:-1].rstrip() + (b"," if row else b"") + added + b"\n"


def _as_line(item: Row | BadLine) -> tuple[Row | BadLine, bytes]:
    """A row of columns; one that no line can hold is represented by what is wrong with it."""
    if isinstance(item, BadLine):
        return item, item.detail.encode()
    try:
        line = encode(item)
    except UNWRITABLE as error:
        detail = f"cannot be written as JSON: {error}"
        return BadLine(detail, ""), detail.encode()
    return loads(line), line


def _is_new(seen: Words, row: Row, line: bytes) -> bool:
    """Contents are told apart by 70 bits, which among 100 million differ but for one chance in
    200,000. Numbers of more digits than a double has are compared as they are written."""
    if isinstance(row, Numbered) or _LONG_NUMBER in line.translate(_DIGITS_AS_0):
        content = line.strip()
    else:
        try:
            content = orjson.dumps(row, option=orjson.OPT_SORT_KEYS)
        except orjson.JSONEncodeError:  # nested too deeply
            content = line.strip()
    return seen.add(int.from_bytes(hashlib.sha256(content).digest()[:9]))


_DIGITS_AS_0 = bytes.maketrans(b"123456789.", b"0" * 10)
_LONG_NUMBER = b"0" * 17
_NEWLINE = ord("\n")
