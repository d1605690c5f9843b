"""The file that stands at an output's place: ours, or somebody else's that we do not replace.

Ours is what our manifest describes, and what a publication of ours has left or was about to leave:
its digest is noted before, for a kill can come between the output and its manifest, and a manifest
can be damaged or lost. All else is somebody's: a result of the old system, a file that another
program has put there, one of ours that was changed since.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, ValidationError

from modelcall_assets.errors import InputError
from modelcall_assets.steps.layout import Layout
from modelcall_assets.storage.files import (
    file_digest,
    list_files,
    read_bytes,
    stat_file,
    write_bytes,
)
from modelcall_assets.storage.listing import FileInfo
from modelcall_assets.storage.manifest import Manifest, read_manifest
from modelcall_assets.storage.places import Place
from modelcall_assets.storage.trouble import is_absent


class Note(BaseModel):
    """What is known of an output's place beside the manifest."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    written: tuple[str, ...] = ()
    """Digests of what the last publication left there, and of what those that did not end may
    have."""
    adopt: bool = False
    """The user has said that old results may be taken over: see `modelcall adopt`."""


def read_note(layout: Layout, stage: str, key: str) -> Note:
    """An empty one when there is none, or it is damaged."""
    try:
        return Note.model_validate_json(read_bytes(layout.standing_path(stage, key)))
    except (FileNotFoundError, ValidationError):
        return Note()


def write_note(layout: Layout, stage: str, key: str, note: Note) -> None:
    write_bytes(layout.standing_path(stage, key), note.model_dump_json().encode())


def stranger(place: Place, made: Manifest | None, note: Note) -> FileInfo | None:
    """The file at a place of ours that is not ours, if there is one; `made` is our manifest."""
    try:
        found = stat_file(place)
    except InputError as error:
        if is_absent(error):
            return None
        raise
    known = {*note.written}
    if made is not None:
        if (made.output, made.output_version) == (str(place), found.version):
            return None
        known |= {made.output_digest or "", *made.beside.values()}
    return None if file_digest(place) in known else found


def is_of_another(layout: Layout, stage: str, found: FileInfo) -> bool:
    """Whether another partition's manifest describes the file: that of an input which has gone, or
    has another name now."""
    digest = file_digest(found.place)
    for file in list_files(layout.manifest_folder(stage), may_be_absent=True):
        made = read_manifest(file.place)
        if made is not None and (made.output, made.output_digest) == (str(found.place), digest):
            return True
    return False
