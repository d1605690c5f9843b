"""A journal whose home is an object store. A run works on a copy on this machine, and brings what
it appends to the store every few seconds.

A segment is an object under its own name once its run has ended. Before, it is parts: objects named
`<segment>@<first byte>-<end>`, whole lines each. Eight parts of one size become one, so that a run
of any length has a few dozen. The names of segments hold the id of their run: runs on several
machines never write to one.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from modelcall_assets.errors import InputError
from modelcall_assets.journal.journal import Journal, remove_folder
from modelcall_assets.journal.packed import PACKED_SUFFIX, replaced_by
from modelcall_assets.journal.segments import FolderLock, all_paths, empty, is_of_run
from modelcall_assets.storage.files import delete, list_files, open_input, publish, write_bytes
from modelcall_assets.storage.listing import FileInfo
from modelcall_assets.storage.places import Place, RemotePath
from modelcall_assets.storage.trouble import is_absent

FLUSH_S = 5.0
"""What a machine that is lost takes with it at most."""
MERGED_PARTS = 8
DEAD_S = 3600.0
"""A segment that has got no part for so long is no more written to."""
_PUT_BYTES = 8 << 20
_PART = re.compile(r"(?P<segment>.+)@(?P<start>\d+)-(?P<end>\d+)")


def open_journal(
    place: Place, scratch: Path, run_id: str, *, fresh: bool = False, flush_s: float = FLUSH_S
) -> Journal:
    """The journal of a partition, wherever it is; `scratch` is for copies of remote ones.
    InputError or StoreError when the store does not answer."""
    if isinstance(place, Path):
        return Journal(place, run_id, fresh=fresh)
    return _MirroredJournal(_Mirror.of(place, scratch), run_id, fresh=fresh, flush_s=flush_s)


def remove(place: Place, scratch: Path) -> bool:
    """Delete a whole journal; False, and nothing done, when a process of this machine has it
    open."""
    if isinstance(place, Path):
        return remove_folder(place)
    if not remove_folder(_Mirror.of(place, scratch).folder):
        return False
    for info in journal_files(place):
        delete(info.place)
    return True


def journal_files(place: Place) -> list[FileInfo]:
    """Of one partition; none when it has no journal."""
    try:
        return list_files(place)
    except InputError as error:
        if is_absent(error):
            return []
        raise


class _MirroredJournal(Journal):
    def __init__(self, mirror: _Mirror, run_id: str, *, fresh: bool, flush_s: float) -> None:
        self._mirror, self._flush_s = mirror, flush_s
        self._pushed = time.monotonic()
        lock = FolderLock(mirror.folder)
        try:
            mirror.pull()
            super().__init__(mirror.folder, run_id, fresh=fresh)
        finally:
            lock.close()

    def sync(self) -> None:
        super().sync()
        if time.monotonic() - self._pushed >= self._flush_s:
            self._mirror.push()
            self._pushed = time.monotonic()

    def seal(self, data_version: str) -> None:
        super().seal(data_version)
        self._mirror.push()

    def close(self) -> None:
        super().close()
        self._mirror.close(self._run_id)

    def _may_pack(self) -> bool:
        return not self._mirror.open


@dataclass(frozen=True, slots=True)
class _Part:
    """Bytes `start` to `end` of a segment. `level`: how often its bytes were merged."""

    start: int
    end: int
    level: int = 0


@dataclass
class _Mirror:
    """The copy of a remote journal in `folder`. What is in the store is known from `pull` on."""

    home: RemotePath
    folder: Path
    open: set[str] = field(default_factory=set[str])
    """Segments that another machine may be writing."""
    whole: dict[str, int] = field(default_factory=dict[str, int])
    """In the store under their own name; their sizes."""
    parts: dict[str, list[_Part]] = field(default_factory=dict[str, list[_Part]])
    """In the store in parts; without gaps from the first byte on."""

    @classmethod
    def of(cls, home: RemotePath, scratch: Path) -> _Mirror:
        name = hashlib.sha256(str(home).encode()).hexdigest()[:32]
        return cls(home, scratch / "journals" / name)

    def pull(self) -> None:
        """Bring what is not here. Again when a segment was packed meanwhile."""
        while True:
            self._look()
            try:
                self._fetch()
            except InputError as error:
                if not is_absent(error):
                    raise
            else:
                return

    def push(self) -> None:
        """Bring what the store does not have, then delete there what was packed here."""
        local = {path.name: path for path in all_paths(self.folder)}
        for name, path in local.items():
            if name in self.whole:
                continue
            if name.endswith(PACKED_SUFFIX):
                self._put_whole(path)
            else:
                self._put_rest(path)
        for name in [*self.whole, *self.parts]:
            if name not in local:
                self._forget(name)

    def close(self, run_id: str) -> None:
        """Bring everything, segments that have ended as a whole. The copy goes, unless another
        process of this machine has it open."""
        lock = FolderLock(self.folder)
        try:
            alone = lock.exclusive()
            self.push()
            for path in all_paths(self.folder):
                is_ended = path.name not in self.open and (alone or is_of_run(path, run_id))
                if path.name not in self.whole and is_ended:
                    self._put_whole(path)
            if alone:
                empty(self.folder)
        finally:
            lock.close()

    def _look(self) -> None:
        self.whole, self.parts, self.open = {}, {}, set()
        newest: dict[str, float] = {}
        found: dict[str, list[_Part]] = {}
        for info in journal_files(self.home):
            if (part := _PART.fullmatch(info.key_path)) is None:
                self.whole[info.key_path] = info.size
                continue
            name = part["segment"]
            found.setdefault(name, []).append(_Part(int(part["start"]), int(part["end"])))
            newest[name] = max(newest.get(name, 0.0), info.modified)
        for name, parts in found.items():
            if name not in self.whole:
                self.parts[name] = _without_gaps(parts)
                is_here = (self.folder / name).exists()
                if not is_here and time.time() - newest[name] < DEAD_S:
                    self.open.add(name)

    def _fetch(self) -> None:
        """Newest first, because a packed segment says which ones it replaces."""
        replaced: set[str] = set()
        for name in sorted(self.whole, reverse=True):
            path = self.folder / name
            if name in replaced:
                continue
            if _size(path) < self.whole[name]:
                self._download([self.home / name], path)
            if name.endswith(PACKED_SUFFIX):
                replaced.update(replaced_by(path))
        for name, parts in self.parts.items():
            if name not in replaced and parts and _size(self.folder / name) < parts[-1].end:
                places = [self._place(name, part) for part in parts]
                self._download(places, self.folder / name)

    def _download(self, places: list[RemotePath], path: Path) -> None:
        with publish(path) as out:
            for place in places:
                with open_input(place) as file:
                    while block := file.read(_PUT_BYTES):
                        out.write(block)

    def _put_whole(self, path: Path) -> None:
        size = _whole_lines(path)
        _upload(path, 0, size, self.home / path.name)
        self.whole[path.name] = size
        for part in self.parts.pop(path.name, ()):
            delete(self._place(path.name, part))

    def _put_rest(self, path: Path) -> None:
        parts = self.parts.setdefault(path.name, [])
        start, end = parts[-1].end if parts else 0, _whole_lines(path)
        if end > start:
            self._put_part(path, parts, _Part(start, end))
        while len(parts) >= MERGED_PARTS and parts[-MERGED_PARTS].level == parts[-1].level:
            last = parts[-MERGED_PARTS:]
            del parts[-MERGED_PARTS:]
            merged = _Part(last[0].start, last[-1].end, last[-1].level + 1)
            self._put_part(path, parts, merged)
            for part in last:
                delete(self._place(path.name, part))

    def _put_part(self, path: Path, parts: list[_Part], part: _Part) -> None:
        _upload(path, part.start, part.end, self._place(path.name, part))
        parts.append(part)

    def _forget(self, name: str) -> None:
        if self.whole.pop(name, None) is not None:
            delete(self.home / name)
        for part in self.parts.pop(name, ()):
            delete(self._place(name, part))

    def _place(self, name: str, part: _Part) -> RemotePath:
        return self.home / f"{name}@{part.start:012d}-{part.end:012d}"


def _without_gaps(parts: list[_Part]) -> list[_Part]:
    """Of overlapping ones, as a kill in the middle of merging leaves them, the longest."""
    chain: list[_Part] = []
    end = 0
    for part in sorted(parts, key=lambda part: (part.start, -part.end)):
        if part.start == end:
            chain.append(part)
            end = part.end
    return chain


def _upload(path: Path, start: int, end: int, place: RemotePath) -> None:
    with path.open("rb") as file:
        file.seek(start)
        if end - start <= _PUT_BYTES:
            write_bytes(place, file.read(end - start))
            return
        with publish(place) as out:
            for block in _blocks(end - start):
                out.write(file.read(block))


def _blocks(size: int) -> Iterator[int]:
    for done in range(0, size, _PUT_BYTES):
        yield min(_PUT_BYTES, size - done)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _whole_lines(path: Path) -> int:
    """Bytes up to the last line's end; a packed segment is whole."""
    size = path.stat().st_size
    if path.name.endswith(PACKED_SUFFIX):
        return size
    with path.open("rb") as file:
        while size:
            start = max(0, size - _PUT_BYTES)
            file.seek(start)
            if (at := file.read(size - start).rfind(b"\n")) >= 0:
                return start + at + 1
            size = start
    return 0
