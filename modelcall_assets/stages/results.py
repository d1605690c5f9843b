"""What the stages of a task have left, known in bulk: from listings, and from the lines of the
summary, which has one for each manifest. Only manifests that changed since are read."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Set
from dataclasses import dataclass, field
from functools import cached_property
from threading import Lock
from typing import TYPE_CHECKING, Any

from modelcall_assets.errors import InputError
from modelcall_assets.records.data_files import decode_key, encode_key
from modelcall_assets.records.outcome import Row
from modelcall_assets.stages.inputs import digest_of_versions
from modelcall_assets.stages.source import MEMBERS
from modelcall_assets.stages.stage import Stage
from modelcall_assets.storage.files import file_digest
from modelcall_assets.storage.listing import FileInfo, list_files
from modelcall_assets.storage.publishing import Manifest, read_manifest
from modelcall_assets.storage.rows import read_rows

if TYPE_CHECKING:
    from modelcall_assets.stages.task import Task

COUNTS = ("rows", "ok", "failed", "dropped")
Result = tuple[str, str, bool]
"""Stage, partition, and whether it is accepted."""


@dataclass(frozen=True)
class Results:
    """As they were when they were first looked at."""

    task: Task
    _looking: Lock = field(default_factory=Lock)
    _outputs: dict[str, Set[str]] = field(default_factory=dict[str, Set[str]])
    """By stage, the places of all files in its folder."""

    @cached_property
    def manifests(self) -> Mapping[Result, FileInfo]:
        return {
            (stage.name, file.key_path.removesuffix(".json"), accepted): file
            for stage in self.task.stages
            for accepted in (True, False)
            for file in list_files(stage.manifest_folder(rejected=not accepted), may_be_absent=True)
            if file.key_path.endswith(".json")
        }

    @cached_property
    def inputs(self) -> Mapping[str, str]:
        """Versions by key; none where they cannot be listed."""
        try:
            files = self.task.inputs.files()
        except InputError:
            return {}
        return {encode_key(file.key_path): file.version for file in files}

    @cached_property
    def rows(self) -> Mapping[Result, Row]:
        """A line for each."""
        return {key_of(row): row for row in self._rows()}

    @cached_property
    def digest(self) -> str:
        """Changes with the manifests, the input files, and what shapes rows."""
        versions = {repr(each): file.version for each, file in self.manifests.items()}
        versions |= {stage.name: stage.code_version for stage in self.task.stages}
        return digest_of_versions({**versions, **self.inputs})

    def look(self, stage: Stage) -> None:
        """What `is_due` needs, but for stages that gather; takes a while."""
        with self._looking:
            is_known = stage.name in self._outputs or stage.gathers
            if stage.upstream is not None and not is_known:
                files = list_files(stage.folder, may_be_absent=True)
                self._outputs[stage.name] = {str(file.place) for file in files}
                self._there(stage.upstream).rows  # noqa: B018
            if stage.upstream is None:
                self.inputs  # noqa: B018
            self.rows  # noqa: B018

    def says_by_what(self, stage: Stage, key: str) -> bool:
        """Whether a result says by what it was made; those of earlier versions do not."""
        row = self.rows.get((stage.name, key, True))
        return row is None or row["code_version"] is not None

    def is_due(self, stage: Stage, key: str, before: str | None = None) -> bool:
        """Whether an accepted result is gone, or would be made elsewhere or otherwise now."""
        row = self.rows.get((stage.name, key, True))
        if row is None or self.changed(stage, key, before):
            return True
        if stage.gathers:
            return bool(stage.outdated([key])) or stage.members_changed(key)
        if stage.upstream is None:
            has_moved = row["uri"] not in (None, str(stage.layout.input_place(key)))
            return has_moved or key not in self.inputs
        place = str(stage.output(key))
        return row["output"] != place or place not in self._outputs[stage.name]

    def changed(self, stage: Stage, key: str, before: str | None = None) -> str:
        """Why an accepted result would be made otherwise now; empty when it would not, or is none.
        `before` is the content of its upstream where that is newer than this."""
        if (row := self.rows.get((stage.name, key, True))) is None:
            return ""
        if row["code_version"] not in (None, stage.code_version):
            now, made = stage.provenance, row["made_with"]
            if made == now:
                same = told(now) or "the task"
                return f"{stage.name} made with other settings of {same}"
            old, new = told(made, now.items()), told(now, made.items())
            return f"{stage.name} made with {old or 'others'}, now {new}"
        if stage.upstream is None:
            is_same = self.inputs.get(key, row["input"]) == row["input"]
            return "" if is_same else "the input file has changed"
        if stage.gathers:
            return ""
        before = before or self._there(stage.upstream).rows.get(
            (stage.upstream.name, key, True), {}
        ).get("content")
        is_same = before == row["made_of"]
        return "" if is_same else f"{stage.upstream.name} has changed since {stage.name} was made"

    def _there(self, stage: Stage) -> Results:
        """Those of its task: it may be another one's."""
        return self if stage.task is self.task else self._linked

    @cached_property
    def _linked(self) -> Results:
        assert self.task.linked is not None
        return Results(self.task.linked.task)

    def _rows(self) -> Iterator[Row]:
        known = self._known()
        for each, file in self.manifests.items():
            row = known.get(each)
            if row is not None and row["version"] == file.version:
                yield row
            elif (manifest := read_manifest(file.place)) is not None:
                yield _row(each, manifest, file.version)

    def _known(self) -> Mapping[Result, Row]:
        """The lines of the summary as it is."""
        (summary,) = (each for each in self.task.overviews if each.name == "summary")
        (key,) = summary.keys.now()
        made = summary.accepted(key)
        if made is None or made.detail["code_version"] != summary.code_version:
            return {}
        if summary.outdated([key]) or file_digest(summary.result(made)) != made.output_digest:
            return {}
        lines = read_rows(summary.result(made))
        return {key_of(row): row for row in lines if isinstance(row, dict)}


def key_of(row: Row) -> Result:
    return row["stage"], row["key"], row["accepted"]


def told(named: Mapping[str, Any], but: Collection[tuple[str, Any]] = ()) -> str:
    found = (each for each in named.items() if each not in but)
    return ", ".join(f"{name.removeprefix('api_')} {value}" for name, value in found)


def _row(each: Result, made: Manifest, version: str) -> Row:
    stage, key, accepted = each
    detail = made.detail
    names = "numbers", "examples", "histograms", "made_with"
    return {
        "stage": stage,
        "key": key,
        "partition": decode_key(key),
        "accepted": accepted,
        **{name: getattr(made, name) for name in COUNTS},
        "failures": made.failures,
        **{name: detail.get(name, {}) for name in names},
        "code_version": detail.get("code_version"),
        "content": made.output_digest or detail.get("digest") or made.input.digest,
        "made_of": made.input.digest,
        "input": made.input.version,
        "output": made.output,
        "uri": None if MEMBERS in detail else made.input.uri,
        "version": version,
    }
