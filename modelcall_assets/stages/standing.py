"""The file that stands at an output's place: ours, or somebody else's that we do not replace.

Ours is what our manifest describes, and what a publication of ours has left or was about to leave:
its digest is noted before, for a kill can come between the output and its manifest, and a manifest
can be damaged or lost. All else is somebody's: a result of the old system, a file that another
program has put there, one of ours that was changed since.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, ValidationError

from modelcall_assets.errors import InputError
from modelcall_assets.records.data_files import decode_key, encode_key, stem_of
from modelcall_assets.storage.files import file_digest, read_bytes, write_bytes
from modelcall_assets.storage.listing import FileInfo, beside, exists, stat_file
from modelcall_assets.storage.manifest import Manifest, read_manifest
from modelcall_assets.storage.places import Place, is_absent

if TYPE_CHECKING:
    from modelcall_assets.stages.stage import Stage

NOT_OURS = "was not written by this task"
CHANGED = "was changed since it was published"


class Note(BaseModel):
    """What is known of an output's place beside the manifest."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    written: tuple[str, ...] = ()
    """Digests of what the last publication left there, and of what those that did not end may
    have."""
    adopt: bool = False
    """The user has said that old results may be taken over: see `modelcall adopt`."""


def read_note(stage: Stage, key: str) -> Note:
    """An empty one when there is none, or it is damaged."""
    try:
        return Note.model_validate_json(read_bytes(stage.note_path(key)))
    except (FileNotFoundError, ValidationError):
        return Note()


def write_note(stage: Stage, key: str, note: Note) -> None:
    write_bytes(stage.note_path(key), note.model_dump_json().encode())


def stranger(stage: Stage, key: str, place: Place, made: Manifest | None) -> FileInfo | None:
    """The file at a place of a partition's that is not ours, if there is one; `made` is our
    manifest as it was. What another run has published since is ours, and so is what another
    partition's manifest describes: that of an input which has gone, or has another name now."""
    try:
        found = stat_file(place)
    except InputError as error:
        if is_absent(error):
            return None
        raise
    if made is not None and (made.output, made.output_version) == (str(place), found.version):
        return None
    digest = file_digest(place)
    now = read_manifest(stage.manifest_path(key))
    for each in filter(None, (made, now)):
        if digest in (each.output_digest, *each.beside.values()):
            return None
    if digest in read_note(stage, key).written:
        return None
    for other in stage.published_keys():
        if stage.output(other) == place:
            now = read_manifest(stage.manifest_path(other))
            if now is not None and now.output_digest == digest:
                return None
    return found


@dataclass(frozen=True, slots=True)
class Others:
    """What others have left where a partition's results belong: what lies at our `places`, and the
    files of `answers` that may be read. `is_new` when there is no result of ours; `adopts` when the
    next run takes over what there is, instead of refusing."""

    places: list[Place]
    answers: list[Place]
    is_new: bool
    adopts: bool


def others(stage: Stage, key: str) -> Others | None:
    """None when there is nothing. InputError when that cannot be told."""
    made = read_manifest(stage.manifest_path(key))
    places = [
        place
        for place in (stage.output(key), *stage.beside(key))
        if stranger(stage, key, place, made) is not None
    ]
    answers = list[Place]()
    if made is None and stage.asks:
        answers = [*places, *old_files(stage, key)]
    if not places and not answers:
        return None
    adopts = may_replace(stage, read_note(stage, key), is_new=made is None)
    return Others(places, answers, made is None, adopts)


def may_replace(stage: Stage, note: Note, *, is_new: bool) -> bool:
    """Whether what is not ours may be taken over; `is_new` when there is no result of ours."""
    return note.adopt or (is_new and stage.adopts)


def old_files(stage: Stage, key: str) -> list[Place]:
    """Where others have left answers of a partition beside the output's place, in the order in
    which they count. Files of errors hold none."""
    output = stage.output(key)
    stem = stem_of(output.name)
    lines = output.with_name(f"{stem}.jsonl")
    others = (each for each in stage.task.stages if each.suffix and each is not stage)
    taken = [stage.layout.input_place(key), *(each.output(key) for each in others)]
    if not stage.asks or lines in taken:
        return []
    number = re.compile(re.escape(stem) + r"_success(?:_retry_(\d+))?\.jsonl")
    found = {
        int(match[1] or 0): old
        for old in beside(output, f"{stem}_success")
        if (match := number.fullmatch(old.name)) and not _is_anothers(stage, key, old)
    }
    whole = [lines] if lines != output and exists(lines) else []
    return [*whole, *(found[each] for each in sorted(found))]


def _is_anothers(stage: Stage, key: str, old: Place) -> bool:
    """Whether it is the input, or the result, of a file that has such a name."""
    own = encode_key(str(PurePosixPath(decode_key(key)).with_name(old.name)))
    if old == stage.layout.input_place(own):
        return True
    made = read_manifest(stage.manifest_path(own))
    return stranger(stage, own, old, made) is None
