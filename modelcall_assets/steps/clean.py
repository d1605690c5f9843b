"""What of a task can be deleted: leavings of crashes, old journals, results of deleted inputs."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from modelcall_assets.errors import InputError
from modelcall_assets.journal.journal import Journal
from modelcall_assets.journal.journal import remove as remove_journal
from modelcall_assets.journal.segments import segment_paths
from modelcall_assets.records.keys import decode_key, encode_key
from modelcall_assets.steps.task_steps import RAW, SCORES, TaskSteps
from modelcall_assets.storage.files import list_inputs, stat_file
from modelcall_assets.storage.manifest import read_manifest

LEFT_OVER, OLD_JOURNAL, DELETED_INPUT = "left by a crash", "old journal", "input is gone"
IN_USE_S = 3600.0
"""A temporary file younger than this may be in use."""
_TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.tmp")
_DAY_S = 86400.0


@dataclass(frozen=True, slots=True)
class Garbage:
    """Something to delete as a whole."""

    why: str
    name: str
    files: tuple[Path, ...] = ()
    journal: Path | None = None
    key: str | None = None
    """The partition key that goes with it."""

    @property
    def size(self) -> int:
        own = self.journal.glob("*") if self.journal is not None else ()
        return sum(path.stat().st_size for path in (*self.files, *own) if path.is_file())

    def delete(self) -> bool:
        """False when a run has the journal open: then nothing is deleted."""
        if self.journal is not None and not remove_journal(self.journal):
            return False
        for path in self.files:
            path.unlink(missing_ok=True)
        return True


def left_over(steps: TaskSteps) -> Iterator[Garbage]:
    """Temporary files of publishes that never ended."""
    spec = steps.spec
    folders = (*map(spec.folder, spec.stages[1:]), spec.journal_folder)
    found = {path for folder in folders for path in _temporary_files(Path(folder))}
    for path in sorted(found):
        if time.time() - path.stat().st_mtime > IN_USE_S:
            yield Garbage(LEFT_OVER, str(path), (path,))


def old_journals(steps: TaskSteps, days: int) -> Iterator[Garbage]:
    """Journals of published files whose newest reply is older than that."""
    for key in _keys_with_manifest(steps, SCORES):
        folder = steps.layout.journal_folder(SCORES, key)
        written = [path.stat().st_mtime for path in segment_paths(folder)]
        if not written or time.time() - max(written) <= days * _DAY_S:
            continue
        with Journal(folder, "clean") as journal:
            published = not journal.has_unpublished
        if published and read_manifest(steps.layout.manifest_path(SCORES, key)) is not None:
            yield Garbage(OLD_JOURNAL, decode_key(key), journal=folder)


def deleted_inputs(steps: TaskSteps, known: Iterable[str]) -> Iterator[Garbage]:
    """All that there is of input files that are gone; `known` are the partition keys.

    InputError when the input folder is missing or empty, as that of a disk that is not mounted is.
    """
    present = {encode_key(file.key_path) for file in list_inputs(steps.spec.input_folder)}
    if not present:
        raise InputError(
            f"{steps.spec.input_folder}: there is no file at all; is the disk mounted? If all are "
            "gone for good, delete the task's output and journal folders by hand"
        )
    in_use = {path for key in present for path in _outputs(steps, key)}
    for key in sorted({*known, *_keys_with_manifest(steps, RAW)} - present):
        if _is_gone(steps, key):
            manifests = [steps.layout.manifest_path(stage, key) for stage in steps.stages]
            files = [*manifests, *(path for path in _outputs(steps, key) if path not in in_use)]
            yield Garbage(
                DELETED_INPUT,
                decode_key(key),
                tuple(path for path in files if path.exists()),
                steps.layout.journal_folder(SCORES, key),
                key,
            )


def _temporary_files(folder: Path) -> Iterator[Path]:
    for here, _, names in os.walk(folder):
        yield from (Path(here, name) for name in names if _TEMPORARY.fullmatch(name))


def _keys_with_manifest(steps: TaskSteps, stage: str) -> Iterator[str]:
    folder = steps.layout.manifest_path(stage, "any").parent
    for path in folder.rglob("*.json"):
        yield path.relative_to(folder).as_posix().removesuffix(".json")


def _outputs(steps: TaskSteps, key: str) -> list[Path]:
    return [steps.layout.output_path(stage, key) for stage in steps.stages if stage != RAW]


def _is_gone(steps: TaskSteps, key: str) -> bool:
    """Also from where it was when its `raw` asset was made: the task may look elsewhere now."""
    manifest = read_manifest(steps.layout.manifest_path(RAW, key))
    try:
        stat_file(manifest.input.uri if manifest else steps.layout.input_uri(key))
    except InputError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return True
        raise
    return False
