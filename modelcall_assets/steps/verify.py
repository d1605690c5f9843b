"""Whether all that a task has published is as it was written: outputs, manifests and journals, what
lies aside, what a crash has left, and what belongs to inputs that are gone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from modelcall_assets.config.spec import RAW
from modelcall_assets.errors import InputError, StoreError
from modelcall_assets.journal.home import journal_files
from modelcall_assets.records.keys import decode_key
from modelcall_assets.steps.budget import read_spent
from modelcall_assets.steps.clean import (
    ASKING,
    left_over,
    present_keys,
    recorded_keys,
    stages_by_set,
)
from modelcall_assets.steps.published import MAKE_ANEW, Published
from modelcall_assets.steps.standing import Note, published_keys, read_note
from modelcall_assets.steps.task_steps import TaskSteps
from modelcall_assets.storage.files import exists, file_digest, list_files
from modelcall_assets.storage.formats import OURS
from modelcall_assets.storage.manifest import Manifest, read_manifest
from modelcall_assets.storage.places import Place
from modelcall_assets.storage.rows import count_rows

KILLED = "a kill came between it and its manifest"
_NO_FREE_ROWS = "run the task again; its journal is gone: all its rows are asked again"


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it should be, and what to do about it."""

    stage: str
    name: str
    wrong: str
    fix: str


@dataclass
class Verification:
    """Looks at one task; what was counted, by stage, is known when `findings` has ended."""

    steps: TaskSteps
    outputs: Counter[str] = field(default_factory=Counter[str])
    rows: Counter[str] = field(default_factory=Counter[str])
    journal_lines: Counter[str] = field(default_factory=Counter[str])

    def findings(self) -> Iterator[Finding]:
        """Reads every byte of the outputs and journals. InputError or StoreError when a disk or
        store does not answer."""
        clean = f"modelcall clean {self.steps.spec.file_name}"
        for which, stages in stages_by_set(self.steps).items():
            present = present_keys(self.steps, which)
            for stage in stages:
                yield from self._outputs(stage, present)
                if stage in ASKING:
                    for key in sorted(recorded_keys(self.steps.layout, [stage])):
                        yield from _with_errors(stage, key, self._journal(stage, key))
            for key in sorted(recorded_keys(self.steps.layout, stages) - present):
                what = "its input is gone or was renamed; what was made of it is kept"
                fix = f"`{clean} --deleted-inputs` deletes it, if it is gone for good"
                yield Finding("", decode_key(key), what, fix)
        for garbage in left_over(self.steps):
            yield Finding("", garbage.name, garbage.why, f"`{clean}` deletes it")
        task = self.steps.spec.task
        if task.budget_usd is not None or task.budget_tokens is not None:
            try:
                read_spent(self.steps.layout.spent_path)
            except StoreError as error:
                yield Finding("", self.steps.layout.spent_path.name, str(error), "see there")

    def _outputs(self, stage: str, present: set[str]) -> Iterator[Finding]:
        layout = self.steps.layout
        made = {*published_keys(layout, stage)}
        for rejected in (False, True):
            for key in sorted(published_keys(layout, stage, rejected=rejected)):
                place = layout.manifest_path(stage, key, rejected=rejected)
                manifest = read_manifest(place)
                if manifest is None or manifest.rows != manifest.ok + manifest.failed:
                    wrong = f"its manifest is damaged: {place}"
                    yield Finding(stage, decode_key(key), wrong, MAKE_ANEW)
                    continue
                if not rejected:
                    self.outputs[stage] += 1
                    self.rows[stage] += manifest.rows
                if stage != RAW:
                    yield from _with_errors(stage, key, self._output(key, manifest))
        for key in sorted(present) if stage != RAW else ():
            note = read_note(layout, stage, key)
            beside = layout.beside_paths(stage, key)
            for place in [*([] if key in made else [layout.output_path(stage, key)]), *beside]:
                yield from _with_errors(stage, key, self._stranger(stage, key, place, note))
        yield from self._aside(stage)

    def _output(self, key: str, manifest: Manifest) -> Iterator[Finding]:
        layout, file = self.steps.layout, Published(key, manifest, self.steps.layout.place)
        written = read_note(layout, manifest.stage, key).written
        places = {manifest.output or "": manifest.output_digest, **manifest.beside}
        for uri, recorded in places.items():
            place = layout.place(uri)
            if not exists(place):
                fix = self._again(manifest.stage, key)
                yield Finding(manifest.stage, file.name, f"{place} is gone", fix)
            elif (digest := file_digest(place)) == recorded:
                rows = count_rows(place, OURS) if uri == manifest.output else manifest.rows
                if rows != manifest.rows:
                    what = f"it says {manifest.rows:,} rows, and {place} has {rows:,}"
                    wrong = f"its manifest is damaged: {what}"
                    yield Finding(manifest.stage, file.name, wrong, MAKE_ANEW)
            elif digest in written and recorded in written:
                fix = self._again(manifest.stage, key)
                yield Finding(manifest.stage, file.name, f"{place}: {KILLED}", fix)
            elif digest in written:
                wrong = f"its manifest is damaged: {place} is as it was published"
                yield Finding(manifest.stage, file.name, wrong, MAKE_ANEW)
            else:
                wrong = f"{place}: not what {manifest.stage} published"
                fix = f"delete it and {self._again(manifest.stage, key)}"
                yield Finding(manifest.stage, file.name, wrong, fix)

    def _stranger(self, stage: str, key: str, place: Place, note: Note) -> Iterator[Finding]:
        """What stands at a place of ours that no readable manifest describes."""
        layout = self.steps.layout
        made = read_manifest(layout.manifest_path(stage, key))
        if not exists(place) or (made is not None and str(place) in made.beside):
            return
        name, again = decode_key(key), self._again(stage, key)
        if file_digest(place) in note.written:
            yield Finding(stage, name, f"{place}: {KILLED}", again)
        elif note.adopt:
            yield Finding(stage, name, f"{place} is to be adopted", "run the task again")
        else:
            fix = f"`modelcall adopt {layout.spec.file_name}` keeps it, or move it elsewhere; then "
            wrong = f"no manifest describes {place}: it is not this task's"
            yield Finding(stage, name, wrong, f"{fix}{again}")

    def _again(self, stage: str, key: str) -> str:
        layout = self.steps.layout
        is_paid = layout.spec.asks(stage) and not journal_files(layout.journal_folder(stage, key))
        return _NO_FREE_ROWS if is_paid else "run the task again: its rows cost nothing"

    def _aside(self, stage: str) -> Iterator[Finding]:
        """What lies below `.modelcall`: copies of files that were replaced, which are called by
        their digest, and rejected results that a kill has left without a manifest."""
        layout = self.steps.layout
        for file in list_files(layout.set_aside_folder(stage), may_be_absent=True):
            folder = file.key_path.split("/")[0]
            if not file_digest(file.place).endswith(folder):
                wrong = f"{file.uri} is not what was set aside"
                yield Finding(stage, file.key_path, wrong, "bring it back from a copy")
        described = set[str]()
        for key in published_keys(layout, stage, rejected=True):
            manifest = read_manifest(layout.manifest_path(stage, key, rejected=True))
            described |= {manifest.output or "", *manifest.beside} if manifest else set()
        for file in list_files(layout.rejected_folder(stage), may_be_absent=True):
            if file.uri not in described:
                wrong = f"{file.uri}: {KILLED}, or that is damaged"
                yield Finding(stage, file.key_path, wrong, "delete it, or run the task again")

    def _journal(self, stage: str, key: str) -> Iterator[Finding]:
        folder = self.steps.layout.journal_folder(stage, key)
        with self.steps.layout.journal_at(str(folder)) as journal:
            lines, damaged = journal.verify()
        self.journal_lines[stage] += lines
        for segment, count in damaged.items():
            wrong = f"{count:,} damaged lines in its journal: {folder}/{segment}"
            fix = (
                "bring the segment back from a copy; else they count as if they had never come: "
                "delete the file's output and run the task again, which asks for those that are "
                "needed and leaves the damaged ones out; what no row needs may stay"
            )
            yield Finding(stage, decode_key(key), wrong, fix)


def _with_errors(stage: str, key: str, findings: Iterator[Finding]) -> Iterator[Finding]:
    """What cannot be read is one too."""
    try:
        yield from findings
    except InputError as error:
        yield Finding(stage, decode_key(key), str(error), "see there")
