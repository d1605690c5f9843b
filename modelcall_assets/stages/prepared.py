"""`raw` and `chatml` of an evaluation: benchmarks and other task sets as conversations, each with
its reference answer."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import PurePosixPath
from typing import Any

from modelcall_assets.config.distillation import EvaluationTask
from modelcall_assets.config.steps import SourcesStep
from modelcall_assets.errors import InputError, Problem, SetupError
from modelcall_assets.records import encode_key
from modelcall_assets.records.outcome import Failure, Reason, Row
from modelcall_assets.sources import FewShot, Mixture, find_source
from modelcall_assets.sources import Sequence as InOrder
from modelcall_assets.sources.base import HubSource
from modelcall_assets.stages.chatml import Conversations
from modelcall_assets.stages.inputs import ABSENT, Inputs, version_of
from modelcall_assets.stages.publication import Draft
from modelcall_assets.stages.raw import SHOWN_MEMBERS, Raw, RawReport
from modelcall_assets.stages.report import Distribution, Report, Tally, last_line
from modelcall_assets.stages.source import MEMBERS, changed
from modelcall_assets.storage.files import NewFile, file_digest, write_lines
from modelcall_assets.storage.listing import FileInfo
from modelcall_assets.transforms import encode
from modelcall_assets.transforms.chatml import failed_row
from modelcall_assets.transforms.user_code import RAISED, create, source_digest

_SLICING = ("start", "stop", "step")
_SEVERAL = {"Mixture": Mixture, "Sequence": InOrder}
MOST_NAME = 200
_FILES = ("filepath", "word_list")
"""Options that are paths, from the project root."""


@dataclass(frozen=True)
class SourceInputs(Inputs):
    """Each of the task's sources, by the name of its conversations."""

    step: SourcesStep

    @cached_property
    def sources(self) -> Mapping[str, Any]:
        """SetupError when one cannot be made, or two would have one output."""
        found: dict[str, Any] = {}
        for number, options in enumerate(self.step.tasks):
            field = f"sources.tasks[{number}]"
            source, name = self._source(options, field), f"{_name(options)}.jsonl"
            if not _is_path(name) or not isinstance(options.get("as", ""), str):
                fix = "take a short relative path without `..`"
                raise self._wrong(f"{field}.as", f"{name}: not a name for its file", fix)
            if name in found:
                fix = "give one of them another name, with `as`"
                raise self._wrong(f"{field}.as", f"another source is {name} too", fix)
            found[name] = source
        return found

    @property
    def graders(self) -> set[str | None]:
        """Of the sources, of those of mixtures too."""
        return {getattr(each, "grader", None) for each in _leaves(self.sources.values())}

    def all_keys(self) -> set[str]:
        return {*map(encode_key, self.sources)}

    def files(self) -> list[FileInfo]:
        return [self._listed(name, each) for name, each in self.sources.items()][: self.most]

    def members(self, key: str) -> Sequence[FileInfo]:
        """What is not here is fetched."""
        fetch = getattr(self.source(key), "fetch", list)
        return fetch()

    def source(self, key: str) -> Any:
        """InputError when it is gone."""
        found = {encode_key(name): each for name, each in self.sources.items()}
        if key not in found:
            raise InputError(f"{self.task.spec.file_name}: there is no source for '{key}' any more")
        return found[key]

    def made(self, key: str) -> Sequence[Row | Failure]:
        return _Rows(self.source(key))

    def _listed(self, name: str, source: Any) -> FileInfo:
        place = self.task.layout.input_folder
        try:
            files = source.files() if hasattr(source, "files") else []
        except (InputError, OSError):
            return FileInfo(name, place, 0, ABSENT)
        return FileInfo(name, place, sum(file.size for file in files), version_of(files))

    def _source(self, options: Mapping[str, Any], field: str) -> Any:
        own = {n: v for n, v in options.items() if n not in ("name", "as", "few_shot")}
        if (several := _SEVERAL.get(options["name"])) is not None:
            if "few_shot" in options:
                fix = "give it to each of its members"
                raise self._wrong(f"{field}.few_shot", "not of several sources at once", fix)
            of = own.pop("of", None)
            if not isinstance(of, list) or not of or not all(map(_is_named, of)):
                wrong = "expected a list of sources, each with a name"
                raise self._wrong(f"{field}.of", wrong, "`of: [{name: GSM8K, …}]`")
            members = [
                self._source(each, f"{field}.of[{number}]") for number, each in enumerate(of)
            ]
            return self._made(several, {"sources": members, **own}, field)
        spec = self.task.spec
        kind = find_source(options["name"], spec.root, spec.file_name, f"{field}.name")
        if isinstance(kind, type) and issubclass(kind, HubSource):
            own["folder"] = self.task.layout.input_folder
        for name in _FILES:
            if isinstance(text := own.get(name), str) and not text.startswith("http"):
                own[name] = self.task.layout.place(spec.resolved(text))
        source = self._made(kind, own, field)
        if (shots := options.get("few_shot")) is None:
            return source
        field = f"{field}.few_shot"
        if not isinstance(shots, dict):
            raise self._wrong(field, "expected a mapping", "`few_shot: {split: train, n: 5}`")
        theirs = ("subset", "split", *_SLICING)
        base = {name: value for name, value in own.items() if name not in _SLICING}
        base |= {name: shots[name] for name in theirs if name in shots}
        rest = {name: value for name, value in shots.items() if name not in theirs}
        examples = self._made(kind, base, field)
        return self._made(FewShot, {"source": source, "examples": examples, **rest}, field)

    def _made(self, kind: Any, options: Mapping[str, Any], field: str) -> Any:
        path, method = f"{kind.__module__}:{kind.__qualname__}", "__getitem__(index)"
        spec = self.task.spec
        return create(path, spec.root, method, spec.file_name, field, field, **options)

    def _wrong(self, field: str, wrong: str, fix: str) -> SetupError:
        return SetupError([Problem(self.task.spec.file_name, field, wrong, fix=fix)])


def _is_path(name: str) -> bool:
    parts = name.split("/")
    return len(name) <= MOST_NAME and "\0" not in name and not {"", ".", ".."} & {*parts}


def _leaves(sources: Iterable[Any]) -> Iterator[Any]:
    """The sources that several are made of, and themselves where they are one."""
    for source in sources:
        inside = getattr(source, "sources", None)
        yield from [source] if inside is None else _leaves(inside)


def _is_named(options: object) -> bool:
    return isinstance(options, dict) and isinstance(options.get("name"), str)


def _name(options: Mapping[str, Any]) -> str:
    """Of the file of its conversations."""
    if isinstance(own := options.get("as"), str):
        return own
    parts = [options["name"].rpartition(":")[2], options.get("subset"), options.get("split")]
    if isinstance(path := options.get("filepath"), str):
        parts.append(PurePosixPath(path).stem)
    return "-".join(part for part in parts if part)


@dataclass(frozen=True)
class _Rows(Sequence[Row | Failure]):
    """The conversations of a source as rows: with an `id`, and by what they are graded."""

    source: Any

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[at] for at in range(len(self))[index]]
        member, at = self.source, index
        while hasattr(member, "member"):
            member, at = member.member(at)
        name = getattr(member, "name", type(member).__name__)
        try:
            identity = self.source.id_of(index) if hasattr(self.source, "id_of") else None
            conversation = self.source[index]
            roles = [turn["role"] for turn in conversation["messages"]]
        except InputError as error:
            return Failure(Reason.CHATML_ERROR, str(error))
        except RAISED as error:
            return Failure(Reason.CHATML_ERROR, f"{name}, row {index}: {last_line(error)}")
        grader = getattr(member, "grader", None)
        if grader is not None and (roles[-1:] != ["assistant"] or not roles[1:]):
            what = "a question and, as the last turn, the assistant's, its reference"
            return Failure(Reason.CHATML_ERROR, f"{name}, row {index}: expected {what}")
        baseline = getattr(member, "baseline", 0.0)
        about = {"task": name, "grader": grader, "baseline": baseline}
        return {"id": identity or f"{name}/{index}", "format": "chatml", **about, **conversation}


class Fetched(Raw):
    """A partition is a source: its files are brought here, and read when they are converted."""

    about = "a source's files and their fingerprints"

    def make(self, key: str, tally: Tally) -> Report:
        """InputError when a data set is neither here nor to be had."""
        inputs = self.task.inputs
        assert isinstance(inputs, SourceInputs)
        self.layout.check_name(key)
        files, rows = inputs.members(key), len(inputs.source(key))
        members = [
            {"uri": each.uri, "digest": file_digest(each.place), "size": each.size}
            for each in files
        ]
        digest = hashlib.sha256(repr(members).encode()).hexdigest()[:32]
        report = RawReport(digest=digest, data_version=digest, detail={MEMBERS: members})
        report.rows = report.rows_in = min(rows, self.task.row_limit or rows)
        report.numbers = {"files": len(files), "bytes": sum(each.size for each in files)}
        report.tables["members"] = [{"file": e.uri, "bytes": e.size} for e in files[:SHOWN_MEMBERS]]
        self.write(key, report, files, str(self.layout.input_folder), version_of(files))
        return report


class Prepared(Conversations):
    about = "conversations with their reference answers"
    done = "prepared"

    @property
    def step(self) -> SourcesStep:
        assert isinstance(self.spec.task, EvaluationTask) and self.spec.task.sources is not None
        return self.spec.task.sources

    @cached_property
    def inputs(self) -> SourceInputs:
        return SourceInputs(self.task, self.step)

    def own_shape(self) -> dict[str, Any]:
        """Changes with the code of sources of the user's own."""
        assert self.inputs.sources
        code = {name: source_digest(name) for name in _own_names(self.step.tasks)}
        return {"sources": self.step.tasks, "limit": self.task.row_limit, "code": code}

    def check_ready(self) -> None:
        assert self.inputs.sources

    def make(self, key: str, tally: Tally) -> Report:
        """InputChanged when the files are not what raw recorded."""
        raw = self.before.need(key)
        with Draft(self, key) as draft:
            report = draft.written(partial(_write, self.inputs.made(key), self.task.row_limit))
            if version_of(self.inputs.members(key)) != raw.input.version:
                raise changed(self.layout.input_folder)
            draft.publish(report, raw.input)
        return report


def _write(rows: Sequence[Row | Failure], limit: int | None, out: NewFile) -> Report:
    report, turns = Report(), Counter[int]()

    def lines() -> Iterator[bytes]:
        for at in range(len(rows))[:limit]:
            report.rows_in += 1
            row = rows[at]
            if isinstance(row, Failure):
                report.fail(report.rows_in, "", row.reason, row.detail)
                yield encode(failed_row(row))
            else:
                turns[len(row["messages"])] += 1
                report.show(row)
                yield encode(row)

    write_lines(out, lines())
    report.rows, report.data_version = report.rows_in, out.digest
    report.histograms["messages"] = Distribution(turns)
    return report


def _own_names(tasks: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    for options in tasks:
        if ":" in options["name"]:
            yield options["name"]
        yield from _own_names(options.get("of") or ())
