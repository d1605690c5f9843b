"""What of a task can be deleted: leavings of crashes, old journals, results of deleted inputs."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import uuid4

from modelcall_assets.config.spec import RESPONSES
from modelcall_assets.errors import InputError
from modelcall_assets.journal.home import journal_files
from modelcall_assets.journal.journal import BatchNote, Journal
from modelcall_assets.journal.mirror import remove as remove_journal
from modelcall_assets.records.keys import decode_key
from modelcall_assets.steps.published import published_keys
from modelcall_assets.steps.raw import MEMBERS
from modelcall_assets.steps.task_steps import RAW, SCORES, TaskSteps
from modelcall_assets.storage.claims import claims
from modelcall_assets.storage.files import delete, stat_file
from modelcall_assets.storage.leftovers import LeftOver, left_overs
from modelcall_assets.storage.listing import FileInfo
from modelcall_assets.storage.manifest import read_manifest
from modelcall_assets.storage.places import Place, RemotePath
from modelcall_assets.storage.trouble import is_absent

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
    journal: Place | None = None
    scratch: Path = Path()
    """For a journal that is in a store."""
    key: str | None = None
    """The partition key that goes with it."""

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    def delete(self) -> bool:
        """False when a run has the journal open: then nothing is deleted."""
        if self.journal is not None and not remove_journal(self.journal, self.scratch):
            return False
        for file in self.files:
            delete(file.place) if isinstance(file, FileInfo) else file.delete()
        return True


def left_over(steps: TaskSteps) -> Iterator[Garbage]:
    """What publishes that never ended have left."""
    before, layout = time.time() - IN_USE_S, steps.layout
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
    """Journals of published files whose newest reply is older than that."""
    layout = steps.layout
    asking = (stage for stage in steps.stages if stage in (RESPONSES, SCORES))
    for stage, key in ((each, key) for each in asking for key in published_keys(layout, each)):
        folder = layout.journal_folder(stage, key)
        files = tuple(journal_files(folder))
        written = [file.modified for file in files]
        if not written or time.time() - max(written) <= days * _DAY_S:
            continue
        with layout.journal_at(str(folder)) as journal:
            published = not journal.has_unpublished
        if published and read_manifest(layout.manifest_path(stage, key)) is not None:
            yield Garbage(OLD_JOURNAL, decode_key(key), files, folder, layout.scratch)


def open_batches(steps: TaskSteps) -> list[tuple[str, BatchNote]]:
    """Batches that are not collected, with the partition keys of the rows they ask for."""
    return [(key, note) for key, _, note in _open_batches(steps)]


def give_up_batches(steps: TaskSteps) -> None:
    """Nobody will look for them any more."""
    for _, journal, note in _open_batches(steps):
        journal.note(replace(note, ended="given up"))


def _open_batches(steps: TaskSteps) -> Iterator[tuple[str, Journal, BatchNote]]:
    run_id = uuid4().hex
    for stage in (each for each in steps.stages if each in (RESPONSES, SCORES)):
        for key in steps.keys(steps.partitions(stage)):
            with steps.layout.journal(stage, key, run_id) as journal:
                for _, note in journal.open_batches():
                    yield key, journal, note


def deleted_inputs(steps: TaskSteps, known: Iterable[str]) -> Iterator[Garbage]:
    """All that there is of input files that are gone; `known` are the partition keys.

    InputError when the input folder is missing or empty, as that of a disk that is not mounted is.
    """
    layout = steps.layout
    present = steps.inputs.all_keys()
    if not present:
        raise InputError(
            f"{steps.spec.input_folder}: there is no file at all; is the disk mounted? If all are "
            "gone for good, delete the task's output and journal folders by hand"
        )
    in_use = {path for key in present for path in _outputs(steps, key)}
    for key in sorted({*known, *published_keys(steps.layout, RAW)} - present):
        if _is_gone(steps, key):
            manifests = [steps.layout.manifest_path(stage, key) for stage in steps.stages]
            outputs = [place for place in _outputs(steps, key) if place not in in_use]
            journal = layout.journal_folder(SCORES, key)
            files = (*_there([*manifests, *outputs]), *journal_files(journal))
            yield Garbage(DELETED_INPUT, decode_key(key), files, journal, layout.scratch, key)


def _there(places: Iterable[Place]) -> Iterator[FileInfo]:
    for place in places:
        try:
            yield stat_file(place)
        except InputError as error:
            if not is_absent(error):
                raise


def _outputs(steps: TaskSteps, key: str) -> list[Place]:
    return [steps.layout.output_path(stage, key) for stage in steps.stages if stage != RAW]


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
