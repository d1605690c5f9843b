"""A new output, from its draft to what everybody sees, and what stands at its place.

Ours is what our manifest describes, and what a publication of ours has left or was about to leave:
its digest is noted before, for a kill can come between the output and its manifest, and a manifest
can be damaged or lost. All else is somebody's: a result of the old system, a file that another
program has put there, one of ours that was changed since.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from math import inf
from pathlib import PurePosixPath
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, ValidationError

from modelcall_assets.errors import PlaceTaken, PublishedMeanwhile
from modelcall_assets.records import decode_key, encode_key, stem_of
from modelcall_assets.stages.report import Report
from modelcall_assets.storage.files import (
    NewFile,
    copy,
    delete,
    file_digest,
    read_bytes,
    write_bytes,
)
from modelcall_assets.storage.listing import FileInfo, beginning_with, exists, find_file, stat_file
from modelcall_assets.storage.places import Place, RemotePath
from modelcall_assets.storage.publishing import (
    InputFingerprint,
    Manifest,
    read_manifest,
    write_manifest,
)

if TYPE_CHECKING:
    from modelcall_assets.stages import Stage


NOT_OURS = "was not written by this task"
CHANGED = "was changed since it was published"
OLD_KEPT_S = 5.0
_OLD = re.compile(r"(.+)_success(?:_retry_(\d+))?\.jsonl")


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
    if (found := find_file(place)) is None:
        return None
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
    adopts = may_replace(stage, read_note(stage, key), made)
    return Others(places, answers, made is None, adopts)


def may_replace(stage: Stage, note: Note, made: Manifest | None) -> bool:
    """Whether what is not ours may be taken over; `made` is our result."""
    return note.adopt or (made is None and stage.adopts)


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
    found = _old_answers(stage, output).get(stem, {})
    old = (found[number] for number in sorted(found))
    whole = [lines] if lines != output and exists(lines) else []
    return [*whole, *(each for each in old if not _is_anothers(stage, key, each))]


def _old_answers(stage: Stage, output: Place) -> Mapping[str, Mapping[int, Place]]:
    """In its folder, by stem and the number of the retry; in a store those of its stem alone. A
    folder of a disk may hold thousands of files: it is listed every few seconds, not for each."""
    folder, known = output.parent, stage.layout.old_answers
    if isinstance(folder, RemotePath):
        return _by_stem(beginning_with(folder, f"{stem_of(output.name)}_success"))
    listed, found = known.get(folder, (-inf, {}))
    if time.monotonic() - listed > OLD_KEPT_S:
        found = _by_stem(folder.glob("*_success*"))
        known[folder] = time.monotonic(), found
    return found


def _by_stem(places: Iterable[Place]) -> Mapping[str, Mapping[int, Place]]:
    found: dict[str, dict[int, Place]] = {}
    for place in places:
        if match := _OLD.fullmatch(place.name):
            found.setdefault(match[1], {})[int(match[2] or 0)] = place
    return found


def _is_anothers(stage: Stage, key: str, old: Place) -> bool:
    """Whether it is the input, or the result, of a file that has such a name."""
    own = encode_key(str(PurePosixPath(decode_key(key)).with_name(old.name)))
    if old == stage.layout.input_place(own):
        return True
    made = read_manifest(stage.manifest_path(own))
    return stranger(stage, own, old, made) is None


class Draft:
    """The new output of a partition, from the beginning of a stage to its publication. Of several
    runs that work on one partition the first to end publishes. Use as a context manager: what is
    not published is gone at the end.

    PlaceTaken when a file that is not ours stands at the output's place, or old answers beside it
    while there is no result of ours, unless they may be adopted.
    """

    def __init__(self, stage: Stage, key: str) -> None:
        self._stage, self._key = stage, key
        self._manifest = stage.manifest_path(key)
        self._before = read_manifest(self._manifest)
        self._files: list[NewFile] = []
        self._out: NewFile | None = None
        self._open = ExitStack()
        self._set_aside: list[str] = []
        self.is_rejected = False
        self.note = read_note(stage, key)
        self._may_replace = may_replace(stage, self.note, self._before)
        self.stranger = self.check(stage.output(key))
        is_new = self._before is None
        if is_new and not self._may_replace and (old := old_files(stage, key)):
            raise self._taken(str(old[0]), NOT_OURS)
        self.adopts = self._may_replace and (is_new or self.stranger is not None)
        """Whether results of the old system, or of somebody else, are taken over now."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.__exit__(kind, error, trace)

    @property
    def out(self) -> NewFile:
        """The output file, made when it is first asked for."""
        if self._out is None:
            self._out = self.beside(self._stage.output(self._key, rejected=self.is_rejected))
        return self._out

    def check(self, place: Place) -> FileInfo | None:
        """What stands there and is not ours. PlaceTaken when it may not be taken over."""
        found = stranger(self._stage, self._key, place, self._before)
        if found is None or self._may_replace:
            return found
        raise self._taken(found.uri, CHANGED if self._before else NOT_OURS)

    def beside(self, place: Place) -> NewFile:
        """One more file, published before those that were made before it. PlaceTaken as above."""
        if not self.is_rejected:
            self.check(place)
        self._files.append(self._open.enter_context(NewFile(place)))
        return self._files[-1]

    def written(self, write: Callable[[NewFile], Report]) -> Report:
        """The output by `write`. When too many rows failed it is called once more, to write what
        lies aside: a store cannot rename."""
        report = write(self.out)
        if self._stage.why_rejected(report) is not None:
            self._open.close()
            self._files, self._out, self.is_rejected = [], None, True
            report = write(self.out)
        return report

    def publish(self, report: Report, made_of: InputFingerprint) -> None:
        """The files first, then the manifest, which says that they are complete. What is rejected
        lies aside and replaces nothing that was accepted.

        When another run has published the same content since this draft was begun, that stands.
        PublishedMeanwhile when the content differs.
        """
        manifest = report.manifest(self._stage.name, made_of)
        with self._stage.claimed(self._key) as check_claim:
            now = read_manifest(self._manifest)
            if now is not None and _publication(now) != _publication(self._before):
                if now.data_version == manifest.data_version:
                    return
                raise PublishedMeanwhile(
                    f"{self._stage.spec.key}/{self._stage.name}: another run has published "
                    f"'{self._key}' since this one began, and its result stands; the replies of "
                    "both are kept: run the task again to have all of them, nothing is paid twice"
                )
            check_claim()
            if not self.is_rejected:
                self._make_room()
            for file in reversed(self._files):
                file.commit()
            check_claim()
            self._describe(manifest)
            if not self.is_rejected:
                self._tidy(now)

    def _make_room(self) -> None:
        """What may stand there is noted before it does; somebody's files are kept elsewhere."""
        stage = self._stage
        for file in self._files:
            if (found := self.check(file.place)) is not None:
                name, digest = file.place.name, file_digest(file.place)
                aside = stage.set_aside_folder / digest[-12:] / name
                copy(found.place, aside)
                self._set_aside.append(str(aside))
        self._note(written=(*self.note.written, *(file.digest for file in self._files)))

    def _note(self, **changes: Any) -> None:
        note = self.note.model_copy(update=changes)
        if note != self.note:
            write_note(self._stage, self._key, note)
            self.note = note

    def _describe(self, manifest: Manifest) -> None:
        place = self.out.place
        aside = {"set_aside": self._set_aside} if self._set_aside else {}
        stage = self._stage
        made_by = {"code_version": stage.code_version, "made_with": stage.provenance}
        own = {
            "accepted": not self.is_rejected,
            "output": str(place),
            "output_digest": self.out.digest,
            "output_version": stat_file(place).version,
            "beside": self._beside,
            "published": uuid4().hex,
            "detail": {**made_by, **manifest.detail, **aside},
        }
        described = self._stage.manifest_path(self._key, rejected=self.is_rejected)
        write_manifest(described, manifest.model_copy(update=own))

    @property
    def _beside(self) -> dict[str, str]:
        return {str(each.place): each.digest for each in self._files if each is not self._out}

    def _tidy(self, before: Manifest | None) -> None:
        """What is accepted takes the place of what was rejected, and of what was beside it."""
        stage, key = self._stage, self._key
        self._note(written=tuple(file.digest for file in self._files), adopt=False)
        for place in stage.aside(key):
            delete(place)
        old = () if before is None else before.beside.values()
        for place in stage.beside(key) if old else ():
            is_new = str(place) in self._beside
            if not is_new and exists(place) and file_digest(place) in old:
                delete(place)

    def _taken(self, file: str, whose: str) -> PlaceTaken:
        asks, task_file = self._stage.asks, self._stage.spec.file_name
        does = "pays nothing for its good rows" if asks else "lets the stage be made anew"
        return PlaceTaken(
            f"{file}: this file {whose}, and is not replaced; to go on, either "
            f"`modelcall adopt {task_file}`, which keeps it and {does}, "
            "or move it away or give it another name"
        )


def _publication(manifest: Manifest | None) -> tuple[str | None, str] | None:
    return None if manifest is None else (manifest.published, manifest.data_version)
