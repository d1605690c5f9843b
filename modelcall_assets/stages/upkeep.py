"""What of a task can be deleted, and whether what it has published is as it was written."""

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from uuid import uuid4

from modelcall_assets.errors import InputError, StoreError
from modelcall_assets.journal.lines import BatchNote
from modelcall_assets.journal.mirror import journal_files
from modelcall_assets.journal.mirror import remove as remove_journal
from modelcall_assets.journal.segments import is_segment_name
from modelcall_assets.records import decode_key
from modelcall_assets.stages import Stage
from modelcall_assets.stages.calls import read_spent
from modelcall_assets.stages.publication import Note, read_note, stranger
from modelcall_assets.stages.source import MAKE_ANEW
from modelcall_assets.stages.task import Keys, Task
from modelcall_assets.storage.files import delete, file_digest
from modelcall_assets.storage.formats import OURS
from modelcall_assets.storage.listing import (
    FileInfo,
    LeftOver,
    exists,
    find_file,
    left_overs,
    list_files,
)
from modelcall_assets.storage.places import Place, RemotePath
from modelcall_assets.storage.publishing import Manifest, claims, read_manifest
from modelcall_assets.storage.rows import count_rows

LEFT_OVER, OLD_JOURNAL, DELETED_INPUT = "left by a crash", "old journal", "input is gone"
IN_USE_S = 3600.0
"""A temporary file younger than this may be in use."""
_DAY_S = 86400.0


@dataclass(frozen=True, slots=True)
class Garbage:
    """Something to delete as a whole."""

    why: str
    name: str
    files: tuple[FileInfo | LeftOver, ...] = ()
    journals: tuple[Place, ...] = ()
    partition: tuple[Keys, str] | None = None
    """That goes with it: a key, and the set that it is of."""
    kept: tuple[Place, ...] = ()
    """What stands at its outputs' places and is not ours."""

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    def delete(self, task: Task) -> bool:
        """False when a run has the journal open: then nothing is deleted."""
        if not all(remove_journal(each, task.layout.scratch) for each in self.journals):
            return False
        for file in self.files:
            delete(file.place) if isinstance(file, FileInfo) else file.delete()
        return True


def left_over(task: Task, in_use_s: float = IN_USE_S) -> Iterator[Garbage]:
    """What publishes that never ended have left."""
    before, layout = time.time() - in_use_s, task.layout
    found = {each.name: each for folder in task.own_folders for each in left_overs(folder, before)}
    for name, each in sorted(found.items()):
        yield Garbage(LEFT_OVER, name, (each,))
    if isinstance(layout.claims, RemotePath):
        for claim in claims(layout.claims):
            if 0 < claim.modified < before:
                yield Garbage(LEFT_OVER, claim.uri, (claim,))


def old_journals(task: Task, days: int) -> Iterator[Garbage]:
    """Journals of published files whose newest reply is older than that, but where a rejected
    result waits for the rest of its answers."""
    asking = (stage for stage in task.stages if stage.answers)
    for stage, key in ((each, key) for each in asking for key in each.published_keys()):
        folder = stage.journal_folder(key)
        files = tuple(journal_files(folder))
        written = [file.modified for file in files]
        if not written or time.time() - max(written) <= days * _DAY_S:
            continue
        with task.layout.read_journal(str(folder)) as journal:
            published = not journal.has_unpublished
        stands, waits = (
            read_manifest(stage.manifest_path(key, rejected=rejected)) is not None
            for rejected in (False, True)
        )
        if published and stands and not waits:
            yield Garbage(OLD_JOURNAL, decode_key(key), files, (folder,))


def open_batches(task: Task, *, give_up: bool = False) -> list[tuple[str, BatchNote]]:
    """Batches that are not collected, with the partition keys of the rows they ask for. For one
    that is given up nobody will look any more."""
    run_id, found = uuid4().hex, list[tuple[str, BatchNote]]()
    for stage in (each for each in task.stages if each.answers):
        for key in stage.keys.now():
            with task.layout.open_journal(stage.journal_folder(key), run_id) as journal:
                for _, note in journal.open_batches():
                    found.append((key, note))
                    if give_up:
                        journal.note(replace(note, ended="given up"))
    return found


def deleted_inputs(task: Task, known: Iterable[str]) -> Iterator[Garbage]:
    """All that there is of input files and merge groups that are gone; `known` are the partition
    keys of files.

    InputError when the input folder is missing or empty, as that of a disk that is not mounted is.
    """
    for keys, stages in task.stages_by_keys():
        present = keys.every()
        if not present and not keys.of_groups:
            raise InputError(
                f"{task.spec.input_folder}: there is no file at all; is the disk mounted? If all "
                "are gone for good, delete the task's output and journal folders by hand"
            )
        in_use = {place for key in present for _, place in _outputs(stages, key)}
        of_dagster = () if keys.of_groups else known
        for key in sorted({*of_dagster, *recorded_keys(stages)} - present):
            if not keys.of_groups and not _is_gone(task, key):
                continue
            manifests = list[Place]()
            for stage in stages:
                manifests += stage.manifest_path(key), stage.note_path(key), *stage.aside(key)
            outputs = {
                place: stranger(stage, key, place, read_manifest(stage.manifest_path(key))) is None
                for stage, place in _outputs(stages, key)
                if place not in in_use
            }
            journals = tuple(each.journal_folder(key) for each in stages if each.answers)
            replies = [file for journal in journals for file in journal_files(journal)]
            own = [*manifests, *(each for each in outputs if outputs[each])]
            files = (*filter(None, map(find_file, own)), *replies)
            name, kept = decode_key(key), tuple(each for each in outputs if not outputs[each])
            yield Garbage(DELETED_INPUT, name, files, journals, (keys, key), kept)


def recorded_keys(stages: Iterable[Stage]) -> set[str]:
    """Those that have a manifest, of a rejected result too, or a journal."""
    found = set[str]()
    for stage in stages:
        found.update(stage.published_keys(), stage.published_keys(rejected=True))
        for file in list_files(stage.journal_folder(""), may_be_absent=True):
            folder, _, name = file.key_path.rpartition("/")
            if is_segment_name(name):
                found.add(folder)
    return found


def _outputs(stages: Iterable[Stage], key: str) -> Iterator[tuple[Stage, Place]]:
    for stage in (each for each in stages if each.suffix):
        for place in (stage.output(key), *stage.beside(key)):
            yield stage, place


def _is_gone(task: Task, key: str) -> bool:
    """Also from where it was when its `raw` asset was made: the task may look elsewhere now."""
    first, places = task.stages[0], [task.layout.input_place(key)]
    if not first.suffix and (manifest := read_manifest(first.manifest_path(key))) is not None:
        places = [part.place for part in first.parts(key, manifest)]
    return not any(map(find_file, places))


KILLED = "a kill came between it and its manifest"
_NO_FREE_ROWS = "run the task again; its journal is gone: all its rows are asked again"


@dataclass(frozen=True, slots=True)
class Defect:
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

    def findings(self) -> Iterator[Defect]:
        """Reads every byte of the outputs and journals. InputError or StoreError when a disk or
        store does not answer."""
        clean = f"modelcall clean {self.task.spec.file_name}"
        for keys, stages in self.task.stages_by_keys():
            present = keys.every()
            for stage in stages:
                yield from self._outputs(stage, present)
                if stage.answers:
                    for key in sorted(recorded_keys([stage])):
                        yield from _found(stage, key, self._journal(stage, key))
            for key in sorted(recorded_keys(stages) - present):
                what = "its input is gone or was renamed; what was made of it is kept"
                fix = f"`{clean} --deleted-inputs` deletes it, if it is gone for good"
                yield Defect("", decode_key(key), what, fix)
        for garbage in left_over(self.task):
            yield Defect("", garbage.name, garbage.why, f"`{clean}` deletes it")
        task = self.task.spec.task
        if task.budget_usd is not None or task.budget_tokens is not None:
            try:
                read_spent(self.task.layout.spent_path)
            except StoreError as error:
                yield Defect("", self.task.layout.spent_path.name, str(error), "see there")

    def _outputs(self, stage: Stage, present: set[str]) -> Iterator[Defect]:
        made = {*stage.published_keys()}
        for rejected in (False, True):
            for key in sorted(stage.published_keys(rejected=rejected)):
                place = stage.manifest_path(key, rejected=rejected)
                manifest = read_manifest(place)
                if manifest is None or manifest.rows != manifest.ok + manifest.failed:
                    wrong = f"its manifest is damaged: {place}"
                    yield Defect(stage.name, decode_key(key), wrong, MAKE_ANEW)
                    continue
                if not rejected:
                    self.outputs[stage.name] += 1
                    self.rows[stage.name] += manifest.rows
                if stage.suffix:
                    yield from _found(stage, key, self._output(stage, key, manifest))
        for key in sorted(present) if stage.suffix else ():
            note = read_note(stage, key)
            for place in [*([] if key in made else [stage.output(key)]), *stage.beside(key)]:
                yield from _found(stage, key, self._stranger(stage, key, place, note))
        yield from self._aside(stage)

    def _output(self, stage: Stage, key: str, manifest: Manifest) -> Iterator[tuple[str, str]]:
        written = read_note(stage, key).written
        places = {manifest.output or "": manifest.output_digest, **manifest.beside}
        for uri, recorded in places.items():
            place = stage.layout.place(uri)
            if not exists(place):
                yield f"{place} is gone", self._again(stage, key)
            elif (digest := file_digest(place)) == recorded:
                rows = count_rows(place, OURS) if uri == manifest.output else manifest.rows
                if rows != manifest.rows:
                    what = f"it says {manifest.rows:,} rows, and {place} has {rows:,}"
                    yield f"its manifest is damaged: {what}", MAKE_ANEW
            elif digest in written and recorded in written:
                yield f"{place}: {KILLED}", self._again(stage, key)
            elif digest in written:
                yield f"its manifest is damaged: {place} is as it was published", MAKE_ANEW
            else:
                fix = f"delete it and {self._again(stage, key)}"
                yield f"{place}: not what {stage.name} published", fix

    def _stranger(
        self, stage: Stage, key: str, place: Place, note: Note
    ) -> Iterator[tuple[str, str]]:
        """What stands at a place of ours that no readable manifest describes."""
        made = read_manifest(stage.manifest_path(key))
        if not exists(place) or (made is not None and str(place) in made.beside):
            return
        again = self._again(stage, key)
        if file_digest(place) in note.written:
            yield f"{place}: {KILLED}", again
        elif note.adopt:
            yield f"{place} is to be adopted", "run the task again"
        else:
            fix = f"`modelcall adopt {stage.spec.file_name}` keeps it, or move it elsewhere; then "
            yield f"no manifest describes {place}: it is not this task's", f"{fix}{again}"

    def _again(self, stage: Stage, key: str) -> str:
        is_paid = stage.asks and not journal_files(stage.journal_folder(key))
        return _NO_FREE_ROWS if is_paid else "run the task again: its rows cost nothing"

    def _aside(self, stage: Stage) -> Iterator[Defect]:
        """What lies below `.modelcall`: copies of files that were replaced, which are called by
        their digest, and rejected results that a kill has left without a manifest."""
        for file in list_files(stage.set_aside_folder, may_be_absent=True):
            folder = file.key_path.split("/")[0]
            if not file_digest(file.place).endswith(folder):
                wrong = f"{file.uri} is not what was set aside"
                yield Defect(stage.name, file.key_path, wrong, "bring it back from a copy")
        described = set[str]()
        for key in stage.published_keys(rejected=True):
            manifest = read_manifest(stage.manifest_path(key, rejected=True))
            described |= {manifest.output or "", *manifest.beside} if manifest else set()
        for file in list_files(stage.rejected_folder, may_be_absent=True):
            if file.uri not in described:
                wrong = f"{file.uri}: {KILLED}, or that is damaged"
                yield Defect(stage.name, file.key_path, wrong, "delete it, or run the task again")

    def _journal(self, stage: Stage, key: str) -> Iterator[tuple[str, str]]:
        folder = stage.journal_folder(key)
        with stage.layout.read_journal(str(folder)) as journal:
            lines, damaged = journal.verify()
        self.journal_lines[stage.name] += lines
        for segment, count in damaged.items():
            fix = (
                "bring the segment back from a copy; else they count as if they had never come: "
                "delete the file's output and run the task again, which asks for those that are "
                "needed and leaves the damaged ones out; what no row needs may stay"
            )
            yield f"{count:,} damaged lines in its journal: {folder}/{segment}", fix


def _found(stage: Stage, key: str, findings: Iterator[tuple[str, str]]) -> Iterator[Defect]:
    """Of pairs of what is wrong and what to do; what cannot be read is wrong too."""
    name = decode_key(key)
    try:
        for wrong, fix in findings:
            yield Defect(stage.name, name, wrong, fix)
    except InputError as error:
        yield Defect(stage.name, name, str(error), "see there")
