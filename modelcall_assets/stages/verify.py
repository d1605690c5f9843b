"""Whether all that a task has published is as it was written: outputs, manifests and journals, what
lies aside, what a crash has left, and what belongs to inputs that are gone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from modelcall_assets.errors import InputError, StoreError
from modelcall_assets.journal.home import journal_files
from modelcall_assets.records.data_files import decode_key
from modelcall_assets.stages.budget import read_spent
from modelcall_assets.stages.clean import left_over, recorded_keys
from modelcall_assets.stages.published import MAKE_ANEW
from modelcall_assets.stages.stage import Stage
from modelcall_assets.stages.standing import Note, read_note
from modelcall_assets.stages.task import Task
from modelcall_assets.storage.files import file_digest
from modelcall_assets.storage.formats import OURS
from modelcall_assets.storage.listing import exists, list_files
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

    task: Task
    outputs: Counter[str] = field(default_factory=Counter[str])
    rows: Counter[str] = field(default_factory=Counter[str])
    journal_lines: Counter[str] = field(default_factory=Counter[str])

    def findings(self) -> Iterator[Finding]:
        """Reads every byte of the outputs and journals. InputError or StoreError when a disk or
        store does not answer."""
        clean = f"modelcall clean {self.task.spec.file_name}"
        for keys, stages in self.task.stages_by_keys():
            present = keys.every()
            for stage in stages:
                yield from self._outputs(stage, present)
                if stage.answers:
                    for key in sorted(recorded_keys([stage])):
                        yield from _with_errors(stage, key, self._journal(stage, key))
            for key in sorted(recorded_keys(stages) - present):
                what = "its input is gone or was renamed; what was made of it is kept"
                fix = f"`{clean} --deleted-inputs` deletes it, if it is gone for good"
                yield Finding("", decode_key(key), what, fix)
        for garbage in left_over(self.task):
            yield Finding("", garbage.name, garbage.why, f"`{clean}` deletes it")
        task = self.task.spec.task
        if task.budget_usd is not None or task.budget_tokens is not None:
            try:
                read_spent(self.task.layout.spent_path)
            except StoreError as error:
                yield Finding("", self.task.layout.spent_path.name, str(error), "see there")

    def _outputs(self, stage: Stage, present: set[str]) -> Iterator[Finding]:
        made = {*stage.published_keys()}
        for rejected in (False, True):
            for key in sorted(stage.published_keys(rejected=rejected)):
                place = stage.manifest_path(key, rejected=rejected)
                manifest = read_manifest(place)
                if manifest is None or manifest.rows != manifest.ok + manifest.failed:
                    wrong = f"its manifest is damaged: {place}"
                    yield Finding(stage.name, decode_key(key), wrong, MAKE_ANEW)
                    continue
                if not rejected:
                    self.outputs[stage.name] += 1
                    self.rows[stage.name] += manifest.rows
                if stage.suffix:
                    yield from _with_errors(stage, key, self._output(stage, key, manifest))
        for key in sorted(present) if stage.suffix else ():
            note = read_note(stage, key)
            for place in [*([] if key in made else [stage.output(key)]), *stage.beside(key)]:
                yield from _with_errors(stage, key, self._stranger(stage, key, place, note))
        yield from self._aside(stage)

    def _output(self, stage: Stage, key: str, manifest: Manifest) -> Iterator[Finding]:
        name, written = decode_key(key), read_note(stage, key).written
        places = {manifest.output or "": manifest.output_digest, **manifest.beside}
        for uri, recorded in places.items():
            place = stage.layout.place(uri)
            if not exists(place):
                fix = self._again(stage, key)
                yield Finding(stage.name, name, f"{place} is gone", fix)
            elif (digest := file_digest(place)) == recorded:
                rows = count_rows(place, OURS) if uri == manifest.output else manifest.rows
                if rows != manifest.rows:
                    what = f"it says {manifest.rows:,} rows, and {place} has {rows:,}"
                    wrong = f"its manifest is damaged: {what}"
                    yield Finding(stage.name, name, wrong, MAKE_ANEW)
            elif digest in written and recorded in written:
                fix = self._again(stage, key)
                yield Finding(stage.name, name, f"{place}: {KILLED}", fix)
            elif digest in written:
                wrong = f"its manifest is damaged: {place} is as it was published"
                yield Finding(stage.name, name, wrong, MAKE_ANEW)
            else:
                wrong = f"{place}: not what {stage.name} published"
                fix = f"delete it and {self._again(stage, key)}"
                yield Finding(stage.name, name, wrong, fix)

    def _stranger(self, stage: Stage, key: str, place: Place, note: Note) -> Iterator[Finding]:
        """What stands at a place of ours that no readable manifest describes."""
        made = read_manifest(stage.manifest_path(key))
        if not exists(place) or (made is not None and str(place) in made.beside):
            return
        name, again = decode_key(key), self._again(stage, key)
        if file_digest(place) in note.written:
            yield Finding(stage.name, name, f"{place}: {KILLED}", again)
        elif note.adopt:
            yield Finding(stage.name, name, f"{place} is to be adopted", "run the task again")
        else:
            fix = f"`modelcall adopt {stage.spec.file_name}` keeps it, or move it elsewhere; then "
            wrong = f"no manifest describes {place}: it is not this task's"
            yield Finding(stage.name, name, wrong, f"{fix}{again}")

    def _again(self, stage: Stage, key: str) -> str:
        is_paid = stage.asks and not journal_files(stage.journal_folder(key))
        return _NO_FREE_ROWS if is_paid else "run the task again: its rows cost nothing"

    def _aside(self, stage: Stage) -> Iterator[Finding]:
        """What lies below `.modelcall`: copies of files that were replaced, which are called by
        their digest, and rejected results that a kill has left without a manifest."""
        for file in list_files(stage.set_aside_folder, may_be_absent=True):
            folder = file.key_path.split("/")[0]
            if not file_digest(file.place).endswith(folder):
                wrong = f"{file.uri} is not what was set aside"
                yield Finding(stage.name, file.key_path, wrong, "bring it back from a copy")
        described = set[str]()
        for key in stage.published_keys(rejected=True):
            manifest = read_manifest(stage.manifest_path(key, rejected=True))
            described |= {manifest.output or "", *manifest.beside} if manifest else set()
        for file in list_files(stage.rejected_folder, may_be_absent=True):
            if file.uri not in described:
                wrong = f"{file.uri}: {KILLED}, or that is damaged"
                yield Finding(stage.name, file.key_path, wrong, "delete it, or run the task again")

    def _journal(self, stage: Stage, key: str) -> Iterator[Finding]:
        folder = stage.journal_folder(key)
        with stage.layout.read_journal(str(folder)) as journal:
            lines, damaged = journal.verify()
        self.journal_lines[stage.name] += lines
        for segment, count in damaged.items():
            wrong = f"{count:,} damaged lines in its journal: {folder}/{segment}"
            fix = (
                "bring the segment back from a copy; else they count as if they had never come: "
                "delete the file's output and run the task again, which asks for those that are "
                "needed and leaves the damaged ones out; what no row needs may stay"
            )
            yield Finding(stage.name, decode_key(key), wrong, fix)


def _with_errors(stage: Stage, key: str, findings: Iterator[Finding]) -> Iterator[Finding]:
    """What cannot be read is one too."""
    try:
        yield from findings
    except InputError as error:
        yield Finding(stage.name, decode_key(key), str(error), "see there")
