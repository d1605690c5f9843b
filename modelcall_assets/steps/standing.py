"""The file that stands at an output's place: ours, or somebody else's that we do not replace.

Ours is what our manifest describes, and what a publication of ours was about to leave when it was
killed between the output and its manifest: that one's digest is noted before. All else is
somebody's: a result of the old system, a file that another program has put there, one of ours that
was changed since.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, ValidationError

from modelcall_assets.errors import InputError
from modelcall_assets.steps.layout import Layout
from modelcall_assets.storage.files import delete, file_digest, read_bytes, stat_file, write_bytes
from modelcall_assets.storage.listing import FileInfo
from modelcall_assets.storage.manifest import Manifest
from modelcall_assets.storage.places import Place
from modelcall_assets.storage.trouble import is_absent


class Note(BaseModel):
    """What is known of an output's place beside the manifest, until the next publication."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    written: tuple[str, ...] = ()
    """Digests of what publications that did not end may have left there."""
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


def forget_note(layout: Layout, stage: str, key: str) -> None:
    delete(layout.standing_path(stage, key))


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
