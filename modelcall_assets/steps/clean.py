"""What of a task can be deleted: leavings of crashes, old journals, results of deleted inputs."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import uuid4

from modelcall_assets.config.spec import RESPONSES
from modelcall_assets.errors import InputError
from modelcall_assets.journal.home import journal_files
from modelcall_assets.journal.journal import BatchNote, Journal
from modelcall_assets.journal.mirror import remove as remove_journal
from modelcall_assets.journal.segments import is_segment_name
from modelcall_assets.records.keys import decode_key
from modelcall_assets.steps.layout import Layout
from modelcall_assets.steps.raw import MEMBERS
from modelcall_assets.steps.standing import published_keys, stranger
from modelcall_assets.steps.task_steps import FILES, RAW, SCORES, TaskSteps
from modelcall_assets.storage.claims import claims
from modelcall_assets.storage.files import delete, list_files, stat_file
from modelcall_assets.storage.leftovers import LeftOver, left_overs
from modelcall_assets.storage.listing import FileInfo
from modelcall_assets.storage.manifest import read_manifest
from modelcall_assets.storage.places import Place, RemotePath
from modelcall_assets.storage.trouble import is_absent

LEFT_OVER, OLD_JOURNAL, DELETED_INPUT = "left by a crash", "old journal", "input is gone"
ASKING = (RESPONSES, SCORES)
"""Stages that have journals."""
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
    stage: str = RAW
    """One whose key that is."""
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


def left_over(steps: TaskSteps, in_use_s: float = IN_USE_S) -> Iterator[Garbage]:
    """What publishes that never ended have left."""
    before, layout = time.time() - in_use_s, steps.layout
    found = {
        each.name: each for folder in layout.own_folders for each in left_overs(folder, before)
    }
    for name, each in sorted(found.items()):
        yield Garbage(LEFT_OVER, name, (each,))
    if isinstance(layout.claims_folder, RemotePath):
        for claim in claims(layout.claims_folder):
            if 0 < claim.modified < before:
                yield Garbage(LEFT_OVER, claim.uri, (claim,))


def old_journals(steps: TaskSteps, days: int) -> Iterator[Garbage]:
    """Journals of published files whose newest reply is older than that, but where a rejected
    result waits for the rest of its answers."""
    layout = steps.layout
    asking = (stage for stage in steps.stages if stage in ASKING)
    for stage, key in ((each, key) for each in asking for key in published_keys(layout, each)):
        folder = layout.journal_folder(stage, key)
        files = tuple(journal_files(folder))
        written = [file.modified for file in files]
        if not written or time.time() - max(written) <= days * _DAY_S:
            continue
        with layout.journal_at(str(folder)) as journal:
            published = not journal.has_unpublished
        stands, waits = (
            read_manifest(layout.manifest_path(stage, key, rejected=rejected)) is not None
            for rejected in (False, True)
        )
        if published and stands and not waits:
            yield Garbage(OLD_JOURNAL, decode_key(key), files, (folder,), layout.scratch)


def open_batches(steps: TaskSteps) -> list[tuple[str, BatchNote]]:
    """Batches that are not collected, with the partition keys of the rows they ask for."""
    return [(key, note) for key, _, note in _open_batches(steps)]


def give_up_batches(steps: TaskSteps) -> None:
    """Nobody will look for them any more."""
    for _, journal, note in _open_batches(steps):
        journal.note(replace(note, ended="given up"))


def _open_batches(steps: TaskSteps) -> Iterator[tuple[str, Journal, BatchNote]]:
    run_id = uuid4().hex
    for stage in (each for each in steps.stages if each in ASKING):
        for key in steps.keys(steps.partitions(stage)):
            with steps.layout.journal(stage, key, run_id) as journal:
                for _, note in journal.open_batches():
                    yield key, journal, note


def deleted_inputs(steps: TaskSteps, known: Iterable[str]) -> Iterator[Garbage]:
    """All that there is of input files and merge groups that are gone; `known` are the partition
    keys of files.

    InputError when the input folder is missing or empty, as that of a disk that is not mounted is.
    """
    layout = steps.layout
    for which, stages in stages_by_set(steps).items():
        present = present_keys(steps, which)
        if not present and which == FILES:
            raise InputError(
                f"{steps.spec.input_folder}: there is no file at all; is the disk mounted? If all "
                "are gone for good, delete the task's output and journal folders by hand"
            )
        in_use = {place for key in present for _, place in _outputs(steps, stages, key)}
        of_dagster = known if which == FILES else ()
        for key in sorted({*of_dagster, *recorded_keys(layout, stages)} - present):
            if which == FILES and not _is_gone(steps, key):
                continue
            manifests = [
                layout.manifest_path(stage, key, rejected=rejected)
                for stage in stages
                for rejected in (False, True)
            ]
            manifests += [layout.output_path(stage, key, rejected=True) for stage in stages]
            for stage in stages:
                manifests.append(layout.standing_path(stage, key))
                manifests += layout.beside_paths(stage, key, rejected=True)
            outputs = {
                place: _is_ours(layout, stage, key, place)
                for stage, place in _outputs(steps, stages, key)
                if place not in in_use
            }
            journals = tuple(layout.journal_folder(each, key) for each in stages if each in ASKING)
            replies = [file for journal in journals for file in journal_files(journal)]
            files = (*_there([*manifests, *(each for each in outputs if outputs[each])]), *replies)
            name, kept = decode_key(key), tuple(each for each in outputs if not outputs[each])
            yield Garbage(
                DELETED_INPUT, name, files, journals, layout.scratch, key, stages[0], kept
            )


def stages_by_set(steps: TaskSteps) -> dict[str, list[str]]:
    """The stages of the task by the set of keys that they have."""
    found: dict[str, list[str]] = {}
    for stage in steps.stages:
        found.setdefault(steps.partitions(stage), []).append(stage)
    return found


def present_keys(steps: TaskSteps, which: str) -> set[str]:
    """The keys of a set whose files, or groups, are there, whatever the task takes of them."""
    is_own = steps.partitions_owner(steps.stages[0]) is steps
    return steps.inputs.all_keys() if which == FILES and is_own else {*steps.keys(which)}


def recorded_keys(layout: Layout, stages: Sequence[str]) -> set[str]:
    """Those that have a manifest, of a rejected result too, or a journal."""
    found = {
        key
        for stage in stages
        for rejected in (False, True)
        for key in published_keys(layout, stage, rejected=rejected)
    }
    for stage in stages:
        for file in list_files(layout.journal_folder(stage, ""), may_be_absent=True):
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


def _outputs(steps: TaskSteps, stages: Sequence[str], key: str) -> Iterator[tuple[str, Place]]:
    """Each with its stage."""
    layout = steps.layout
    for stage in (each for each in stages if each != RAW):
        for place in (layout.output_path(stage, key), *layout.beside_paths(stage, key)):
            yield stage, place


def _is_ours(layout: Layout, stage: str, key: str, place: Place) -> bool:
    """Or nothing is there."""
    made = read_manifest(layout.manifest_path(stage, key))
    return stranger(layout, stage, key, place, made) is None


def _is_gone(steps: TaskSteps, key: str) -> bool:
    """Also from where it was when its `raw` asset was made: the task may look elsewhere now."""
    manifest = read_manifest(steps.layout.manifest_path(RAW, key))
    layout = steps.layout
    members = manifest.detail.get(MEMBERS) if manifest else None
    if members is not None:
        places = [layout.place(member["uri"]) for member in members]
    else:
        places = [layout.place(manifest.input.uri) if manifest else layout.input_place(key)]
    return not list(_there(places))
