"""`raw` and `chatml` of a task whose conversations come from sources: benchmarks and task sets."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path, PurePosixPath
from shutil import copyfileobj
from tempfile import TemporaryFile
from typing import IO, Any

from modelcall_assets.config.distillation import DistillationTask
from modelcall_assets.config.steps import SourcesStep
from modelcall_assets.errors import InputError, Problem, RunStopped, SetupError
from modelcall_assets.records import decode_key, encode_key
from modelcall_assets.records.outcome import Failure, Reason, Row
from modelcall_assets.sources import FewShot, Source, find_source
from modelcall_assets.sources import Sequence as Several
from modelcall_assets.sources.data import DatasetSplit
from modelcall_assets.sources.env_service import ServiceGone
from modelcall_assets.sources.tuner import read_tuner, sources_of
from modelcall_assets.stages.chatml import Conversations
from modelcall_assets.stages.inputs import ABSENT, Inputs, digest_of_versions
from modelcall_assets.stages.publication import Draft
from modelcall_assets.stages.raw import SHOWN_MEMBERS, Raw, RawReport
from modelcall_assets.stages.report import Distribution, Report, Tally, last_line
from modelcall_assets.stages.source import MEMBERS, changed
from modelcall_assets.storage.files import NewFile, file_digest
from modelcall_assets.storage.listing import FileInfo
from modelcall_assets.transforms import encode
from modelcall_assets.transforms.chatml import failed_row
from modelcall_assets.transforms.user_code import RAISED, create, load_object, source_digest

_SLICING = ("start", "stop", "step")
_WHICH = ("subset", "split", *_SLICING)
"""Options of `few_shot` that say which rows the examples are, as those do that the source has."""
MOST_NAME = 200


@dataclass(frozen=True)
class SourceInputs(Inputs):
    """Each of the task's sources, by the name of its conversations."""

    step: SourcesStep

    @cached_property
    def sources(self) -> Mapping[str, Source]:
        """SetupError when one cannot be made, or two would have one output."""
        found: dict[str, Source] = {}
        for field, options in self._named:
            source, name = self._source(options, field), _name(options)
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
        return {leaf.grader for each in self.sources.values() for leaf in each.leaves()}

    def listed(self) -> list[FileInfo]:
        return [self.file(encode_key(name)) for name in self.sources]

    def all_keys(self) -> set[str]:
        return {*map(encode_key, self.sources)}

    def members(self, key: str) -> Sequence[FileInfo]:
        """What is not here is fetched."""
        return self.source(key).fetch()

    def source(self, key: str) -> Source:
        """InputError when it is gone."""
        if (source := self.sources.get(decode_key(key))) is None:
            raise InputError(f"{self.task.spec.file_name}: there is no source for '{key}' any more")
        return source

    def made(self, key: str) -> Sequence[Row | Failure]:
        task = self.task.spec.task
        return _Rows(self.source(key), isinstance(task, DistillationTask) and task.is_graded)

    def file(self, key: str) -> FileInfo:
        """Its files as one, whose version changes also with what is made of them."""
        place, name = self.task.layout.input_folder, decode_key(key)
        try:
            files = self.source(key).files()
            versions = {"": self.recipe(key), **{file.uri: file.version for file in files}}
        except (InputError, OSError):
            return FileInfo(name, place, 0, ABSENT)
        size = sum(file.size for file in files)
        return FileInfo(name, place, size, digest_of_versions(versions))

    def recipe(self, key: str) -> str:
        """What shapes its conversations beside its files: options, and code of the user's own."""
        named = dict(zip(self.sources, self._named, strict=True))
        _, options = named[decode_key(key)]
        version = self.source(key).version()
        return repr([options, version, *map(source_digest, _own_names([options]))])

    @cached_property
    def _named(self) -> Sequence[tuple[str, Mapping[str, Any]]]:
        """The options of each source, and the field that has them."""
        if (reader := self.step.task_reader) is None:
            return [(f"sources.tasks[{n}]", options) for n, options in enumerate(self.step.tasks)]
        spec, field = self.task.spec, "sources.task_reader"
        file, place = spec.file_name, field
        if isinstance(reader, str):
            file = reader
            reader, place = read_tuner(Path(spec.resolved(reader)), file)
        return [(field, options) for options in sources_of(reader, file, place)]

    def _source(self, options: Mapping[str, Any], field: str) -> Source:
        spec = self.task.spec
        kind = find_source(options["name"], spec.root, spec.file_name, f"{field}.name")
        own = {n: v for n, v in options.items() if n not in ("name", "as", "few_shot")}
        shots = options.get("few_shot")
        if issubclass(kind, Several):
            if shots is not None:
                fix = "give it to each of its members"
                raise self._wrong(f"{field}.few_shot", "not of several sources at once", fix)
            of = own.pop("of", None)
            if not isinstance(of, list) or not of or not all(map(_is_named, of)):
                wrong = "expected a list of sources, each with a name"
                raise self._wrong(f"{field}.of", wrong, "`of: [{name: GSM8K, …}]`")
            own["sources"] = [self._source(each, f"{field}.of[{n}]") for n, each in enumerate(of)]
        if "folder" in kind.paths:
            own = {"folder": self.step.data_dir, **own}
        for name in kind.paths:
            if isinstance(text := own.get(name), str) and not text.startswith("http"):
                own[name] = self.task.layout.place(spec.resolved(text))
        for name in kind.code:
            if isinstance(path := own.get(name), str):
                file, its = spec.file_name, f"{field}.{name}"
                own[name] = load_object(path, spec.root, "__call__(…)", file, its)
        source = self._made(kind, own, field)
        if shots is None:
            return source
        field = f"{field}.few_shot"
        if not isinstance(shots, dict):
            raise self._wrong(field, "expected a mapping", "`few_shot: {split: train, n: 5}`")
        which = {name: value for name, value in shots.items() if name in (*_WHICH, *own)}
        how = {name: value for name, value in shots.items() if name not in which}
        base = {name: value for name, value in own.items() if name not in _SLICING}
        examples = self._made(kind, base | which, field)
        return self._made(FewShot, {"source": source, "examples": examples, **how}, field)

    def _made(self, kind: type[Source], options: Mapping[str, Any], field: str) -> Any:
        path, method = f"{kind.__module__}:{kind.__qualname__}", "__getitem__(index)"
        spec = self.task.spec
        return create(path, spec.root, method, spec.file_name, field, field, **options)

    def _wrong(self, field: str, wrong: str, fix: str) -> SetupError:
        return SetupError([Problem(self.task.spec.file_name, field, wrong, fix=fix)])


def _is_path(name: str) -> bool:
    parts = name.split("/")
    return len(name) <= MOST_NAME and "\0" not in name and not {"", ".", ".."} & {*parts}


def _is_named(options: object) -> bool:
    return isinstance(options, dict) and isinstance(options.get("name"), str)


def _name(options: Mapping[str, Any]) -> str:
    """Of the file of its conversations."""
    if isinstance(own := options.get("as"), str):
        return f"{own}.jsonl"
    parts = [options["name"].rpartition(":")[2], options.get("subset"), options.get("split")]
    if isinstance(path := options.get("filepath"), str):
        parts.append(PurePosixPath(path).stem)
    return f"{'-'.join(part for part in parts if part)}.jsonl"


def _own_names(tasks: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    for options in tasks:
        named = (options["name"], options.get("loader"))
        yield from (name for name in named if isinstance(name, str) and ":" in name)
        yield from _own_names(options.get("of") or ())


@dataclass(frozen=True)
class _Rows(Sequence[Row | Failure]):
    """The conversations of a source as rows: with an `id`, and by what they are graded."""

    source: Source
    is_graded: bool

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[at] for at in range(len(self))[index]]
        member, at = self.source.member(index)
        row: Row = {"id": "", "format": "chatml", "task": member.name}
        if self.is_graded:
            row |= {"grader": member.grader, "baseline": member.baseline}
        try:
            row |= {"id": self.source.id_of(index), **member[at]}
            roles = [turn["role"] for turn in row["messages"]]
        except ServiceGone:
            raise
        except InputError as error:
            return Failure(Reason.CHATML_ERROR, str(error))
        except RAISED as error:
            return Failure(Reason.CHATML_ERROR, f"{member.name}, row {index}: {last_line(error)}")
        has_reference = roles[1:] and roles[-1] == "assistant"
        if self.is_graded and member.grader is not None and not has_reference:
            what = "a question and, as the last turn, the assistant's, its reference"
            return Failure(Reason.CHATML_ERROR, f"{member.name}, row {index}: expected {what}")
        return row


class Fetched(Raw):
    """A partition is a source: its files are brought here, and read when they are converted."""

    about = "a source's files and their fingerprints"
    has_rows = False

    def make(self, key: str, tally: Tally) -> Report:
        """InputError when a data set is neither here nor to be had."""
        inputs = self.task.inputs
        assert isinstance(inputs, SourceInputs)
        self.layout.check_name(key)
        files, rows = inputs.members(key), len(inputs.source(key))
        digests = {each: file_digest(each.place) for each in files}
        content = repr([inputs.recipe(key), *digests.values()]).encode()
        digest = hashlib.sha256(content).hexdigest()[:32]
        members = [{"uri": e.uri, "digest": digests[e], "size": e.size} for e in files]
        report = RawReport(digest=digest, data_version=digest, detail={MEMBERS: members})
        report.rows = report.rows_in = min(rows, self.task.row_limit or rows)
        report.numbers = {"files": len(files), "bytes": sum(each.size for each in files)}
        report.tables["members"] = [{"file": e.uri, "bytes": e.size} for e in files[:SHOWN_MEMBERS]]
        self.write(key, report, files, str(self.layout.input_folder), inputs.file(key).version)
        return report


class Prepared(Conversations):
    about = "conversations of sources"
    done = "prepared"

    @cached_property
    def inputs(self) -> SourceInputs:
        assert isinstance(self.spec.task, DistillationTask) and self.spec.task.sources is not None
        return SourceInputs(self.task, self.spec.task.sources)

    def own_shape(self) -> dict[str, Any]:
        """What the sources are is in the version of `raw`."""
        assert isinstance(self.spec.task, DistillationTask)
        return {"is_graded": self.spec.task.is_graded, "limit": self.task.row_limit}

    def check_ready(self) -> None:
        assert self.inputs.sources

    def lacks(self) -> Iterator[Problem]:
        """What is not here yet."""
        sources = self.inputs.sources.values()
        for origin in {origin: None for each in sources for origin in each.origins}:
            field = "" if isinstance(origin, DatasetSplit) else "sources"
            try:
                if not origin.found():
                    fix = "or let the run fetch it" if origin.is_remote else ""
                    yield self.task.warning(origin.absent, field=field, fix=fix)
            except InputError as error:
                yield self.task.warning(str(error), field=field)
        for each in sources:
            try:
                each.version()
            except InputError as error:
                yield self.task.warning(str(error), field="sources")

    def make(self, key: str, tally: Tally) -> Report:
        """InputChanged when the files are not what raw recorded, RunStopped when the tally is
        stopped."""
        raw, limit = self.before.need(key), self.task.row_limit
        with Draft(self, key) as draft, TemporaryFile() as prepared:
            report = _prepare(self.inputs.made(key), limit, prepared, tally)
            draft.written(partial(_copy, prepared, report))
            if self.inputs.file(key).version != raw.input.version:
                raise changed(self.layout.input_folder)
            draft.publish(report, raw.input)
        return report


def _prepare(
    rows: Sequence[Row | Failure], limit: int | None, out: IO[bytes], tally: Tally
) -> Report:
    """Each row once: a source may be slow, or say something else the next time."""
    report, turns = Report(), Counter[int]()
    for at in range(len(rows))[:limit]:
        if tally.is_stopped:
            raise RunStopped("interrupted; this file is prepared from its first row again")
        report.rows_in += 1
        row = rows[at]
        if isinstance(row, Failure):
            report.fail(report.rows_in, "", row.reason, row.detail)
            out.write(encode(failed_row(row)))
        else:
            turns[len(row["messages"])] += 1
            report.show(row)
            out.write(encode(row))
    report.rows = report.rows_in
    report.histograms["messages"] = Distribution(turns)
    return report


def _copy(prepared: IO[bytes], report: Report, out: NewFile) -> Report:
    prepared.seek(0)
    copyfileobj(prepared, out)
    report.data_version = out.digest
    return report
