"""What of a task can be deleted: leavings of crashes, old journals, results of deleted inputs."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import uuid4

from modelcall_assets.errors import InputError
from modelcall_assets.journal.home import journal_files
from modelcall_assets.journal.journal import BatchNote, Journal
from modelcall_assets.journal.mirror import remove as remove_journal
from modelcall_assets.journal.segments import is_segment_name
from modelcall_assets.records.data_files import decode_key
from modelcall_assets.stages.stage import MEMBERS, Keys, Stage
from modelcall_assets.stages.standing import stranger
from modelcall_assets.stages.task import Task
from modelcall_assets.storage.claims import claims
from modelcall_assets.storage.files import delete
from modelcall_assets.storage.listing import FileInfo, LeftOver, left_overs, list_files, stat_file
from modelcall_assets.storage.manifest import read_manifest
from modelcall_assets.storage.places import Place, RemotePath, is_absent

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
    scratch: Path = Path()
    """For journals that are in a store."""
    key: str | None = None
    """The partition key that goes with it."""
    keys: Keys | None = None
    """The set that the key is of."""
    kept: tuple[Place, ...] = ()
    """What stands at its outputs' places and is not ours."""

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    def delete(self) -> bool:
        """False when a run has the journal open: then nothing is deleted."""
        if not all(remove_journal(journal, self.scratch) for journal in self.journals):
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
    if isinstance(layout.claims_folder, RemotePath):
        for claim in claims(layout.claims_folder):
            if 0 < claim.modified < before:
                yield Garbage(LEFT_OVER, claim.uri, (claim,))


def old_journals(task: Task, days: int) -> Iterator[Garbage]:
    """Journals of published files whose newest reply is older than that, but where a rejected
    result waits for the rest of its answers."""
    layout = task.layout
    asking = (stage for stage in task.stages if stage.answers)
    for stage, key in ((each, key) for each in asking for key in each.published_keys()):
        folder = stage.journal_folder(key)
        files = tuple(journal_files(folder))
        written = [file.modified for file in files]
        if not written or time.time() - max(written) <= days * _DAY_S:
            continue
        with layout.read_journal(str(folder)) as journal:
            published = not journal.has_unpublished
        stands, waits = (
            read_manifest(stage.manifest_path(key, rejected=rejected)) is not None
            for rejected in (False, True)
        )
        if published and stands and not waits:
            yield Garbage(OLD_JOURNAL, decode_key(key), files, (folder,), layout.scratch)


def open_batches(task: Task) -> list[tuple[str, BatchNote]]:
    """Batches that are not collected, with the partition keys of the rows they ask for."""
    return [(key, note) for key, _, note in _open_batches(task)]


def give_up_batches(task: Task) -> None:
    """Nobody will look for them any more."""
    for _, journal, note in _open_batches(task):
        journal.note(replace(note, ended="given up"))


def _open_batches(task: Task) -> Iterator[tuple[str, Journal, BatchNote]]:
    run_id = uuid4().hex
    for stage in (each for each in task.stages if each.answers):
        for key in stage.keys.now():
            with task.layout.open_journal(stage.journal_folder(key), run_id) as journal:
                for _, note in journal.open_batches():
                    yield key, journal, note


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
                manifests += (stage.manifest_path(key, rejected=each) for each in (False, True))
                manifests += (stage.note_path(key), stage.output(key, rejected=True))
                manifests += stage.beside(key, rejected=True)
            outputs = {
                place: _is_ours(stage, key, place)
                for stage, place in _outputs(stages, key)
                if place not in in_use
            }
            journals = tuple(each.journal_folder(key) for each in stages if each.answers)
            replies = [file for journal in journals for file in journal_files(journal)]
            files = (*_there([*manifests, *(each for each in outputs if outputs[each])]), *replies)
            name, kept = decode_key(key), tuple(each for each in outputs if not outputs[each])
            scratch = task.layout.scratch
            yield Garbage(DELETED_INPUT, name, files, journals, scratch, key, keys, kept)


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


def _there(places: Iterable[Place]) -> Iterator[FileInfo]:
    for place in places:
        try:
            yield stat_file(place)
        except InputError as error:
            if not is_absent(error):
                raise


def _outputs(stages: Iterable[Stage], key: str) -> Iterator[tuple[Stage, Place]]:
    for stage in (each for each in stages if each.suffix):
        for place in (stage.output(key), *stage.beside(key)):
            yield stage, place


def _is_ours(stage: Stage, key: str, place: Place) -> bool:
    """Or nothing is there."""
    return stranger(stage, key, place, read_manifest(stage.manifest_path(key))) is None


def _is_gone(task: Task, key: str) -> bool:
    """Also from where it was when its `raw` asset was made: the task may look elsewhere now."""
    first, layout = task.stages[0], task.layout
    manifest = None if first.suffix else read_manifest(first.manifest_path(key))
    members = manifest.detail.get(MEMBERS) if manifest else None
    if members is not None:
        places = [layout.place(member["uri"]) for member in members]
    else:
        places = [layout.place(manifest.input.uri) if manifest else layout.input_place(key)]
    return not list(_there(places))
