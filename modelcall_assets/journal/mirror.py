"""A journal whose home is an object store. A run works on a copy on this machine, and brings what
it appends to the store every few seconds.

The names of segments hold the id of their run: runs on several machines never write to one. What is
here and was not copied from the store was written here; after a kill the next run brings it. A
segment of another machine that may be written to is left as it is, and nothing is packed then.

In the store a segment that has ended is an object under its own name. Before, it is parts: objects
named `<segment>@<first byte>-<end>`, whole lines each. Eight of one size become one: a few dozen a
run.
"""

import hashlib
import os
import re
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from modelcall_assets.errors import InputError
from modelcall_assets.journal import Journal, segments
from modelcall_assets.journal.packed import PACKED_SUFFIX, replaced_by
from modelcall_assets.journal.segments import FolderLock
from modelcall_assets.storage.files import delete, open_input, publish, read_bytes, write_bytes
from modelcall_assets.storage.listing import FileInfo, list_files
from modelcall_assets.storage.places import Place, RemotePath, is_absent

FLUSH_S = 5.0
"""What a machine that is lost takes with it at most."""
MERGED_PARTS = 8
MERGED_BYTES = 64 << 20
"""Larger parts stay as they are: while they are merged nothing new is brought."""
DEAD_S = 7 * 86400.0
"""A segment that has got no part for so long is no more written to. A batch may take a day."""
_PUT_BYTES = 8 << 20
_PART = re.compile(r"@(\d+)-(\d+)\Z")
_LOOKS = 5
"""At a journal that others change meanwhile."""
_COPIES = ".copies"


def open_journal(
    place: Place,
    scratch: Path,
    run_id: str,
    *,
    fresh: bool = False,
    samples: int = 1,
    flush_s: float = FLUSH_S,
    read_only: bool = False,
) -> Journal:
    """The journal of a partition, wherever it is; `scratch` is for copies of remote ones, and with
    `read_only` nothing changes there. InputError or StoreError when the store does not answer."""
    if isinstance(place, Path):
        return Journal(place, run_id, fresh=fresh, samples=samples)
    folder = scratch_folder(place, scratch)
    return _Mirror(place, folder, run_id, fresh, samples, flush_s, read_only)


def remove(place: Place, scratch: Path) -> bool:
    """Delete a journal; False, and nothing done, when a process of this machine has it open."""
    is_local = isinstance(place, Path)
    folder = place if is_local else scratch_folder(place, scratch)
    if folder.is_dir():
        with closing(FolderLock(folder)) as lock:
            if not lock.exclusive():
                return False
            segments.empty(folder)
    for info in () if is_local else journal_files(place):
        delete(info.place)
    return True


def scratch_folder(home: RemotePath, scratch: Path) -> Path:
    return scratch / "journals" / hashlib.sha256(str(home).encode()).hexdigest()[:32]


def journal_files(place: Place) -> list[FileInfo]:
    """The files of a journal, wherever it is; none when there is none. Not those of another one
    below, as that of a file in a folder that once was a file."""
    found = list_files(place, may_be_absent=True)
    return [info for info in found if segments.is_segment_name(_PART.sub("", info.key_path))]


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes `start` to `end` of a segment. `level`: how often its bytes were merged."""

    start: int
    end: int
    level: int = 0


class Home:
    """What is in the store, as of now and of what is done here from then on. InputError when the
    store does not answer."""

    def __init__(self, place: RemotePath) -> None:
        self.place = place
        self.whole: dict[str, int] = {}
        """Segments under their own name; their sizes."""
        self.parts: dict[str, list[Part]] = {}
        """Of whole segments too, where a kill has left some."""
        self._newest: dict[str, float] = {}
        for info in journal_files(place):
            if (found := _PART.search(info.key_path)) is None:
                self.whole[info.key_path] = info.size
                continue
            name = info.key_path[: found.start()]
            self.parts.setdefault(name, []).append(Part(int(found[1]), int(found[2])))
            # A store that does not say when may have got it just now.
            self._newest[name] = max(self._newest.get(name, 0.0), info.modified or time.time())

    @property
    def names(self) -> set[str]:
        return {*self.whole, *self.parts}

    @property
    def unended(self) -> list[str]:
        """Segments that are in parts only."""
        return [name for name in self.parts if name not in self.whole]

    @property
    def has_gaps(self) -> bool:
        """Whether parts are there without those before them: somebody merges just now."""
        ends = {name: max(part.end for part in self.parts[name]) for name in self.unended}
        return any(end > self.size_of(name) for name, end in ends.items())

    def is_dead(self, name: str) -> bool:
        """Whether nobody writes to a segment that is in parts."""
        return time.time() - self._newest.get(name, time.time()) > DEAD_S

    def size_of(self, name: str) -> int:
        """Bytes of a segment that are there, from its first on without a gap."""
        if name in self.whole:
            return self.whole[name]
        chain = _without_gaps(self.parts.get(name, ()))
        return chain[-1].end if chain else 0

    def has(self, path: Path) -> bool:
        """Whether all of a segment that has ended is there under its own name."""
        return self.whole.get(path.name, -1) >= segments.whole_lines(path)

    def blocks(self, name: str) -> Iterator[bytes]:
        """The content. FileNotFoundError or InputError when it has just been moved elsewhere."""
        chain = _without_gaps(self.parts.get(name, ()))
        pieces = {self._location(name, part): part.end - part.start for part in chain}
        if name in self.whole:
            pieces = {self.place / name: self.whole[name]}
        for place, size in pieces.items():
            if size <= _PUT_BYTES:
                yield read_bytes(place)
                continue
            with open_input(place) as file:
                while block := file.read(_PUT_BYTES):
                    yield block

    def put_whole(self, path: Path) -> None:
        """Bring a segment that has ended, unless it is there; its parts go."""
        if self.has(path):
            return
        size = segments.whole_lines(path)
        _upload(path, 0, size, self.place / path.name)
        self.whole[path.name] = size
        self.drop_parts(path.name)

    def put_rest(self, path: Path) -> None:
        """Bring what was appended to a segment of this process since the last time."""
        parts = self.parts.setdefault(path.name, [])
        start, end = parts[-1].end if parts else 0, segments.whole_lines(path)
        if end > start:
            self._put_part(path, parts, Part(start, end))
        while len(last := parts[-MERGED_PARTS:]) == MERGED_PARTS:
            merged = Part(last[0].start, last[-1].end, last[-1].level + 1)
            if last[0].level != last[-1].level or merged.end - merged.start > MERGED_BYTES:
                break
            self._put_part(path, parts, merged)
            for part in last:
                delete(self._location(path.name, part))
                parts.remove(part)

    def drop_parts(self, name: str) -> None:
        for part in self.parts.pop(name, ()):
            delete(self._location(name, part))

    def forget(self, name: str) -> None:
        if self.whole.pop(name, None) is not None:
            delete(self.place / name)
        self.drop_parts(name)

    def _put_part(self, path: Path, parts: list[Part], part: Part) -> None:
        _upload(path, part.start, part.end, self._location(path.name, part))
        parts.append(part)

    def _location(self, name: str, part: Part) -> RemotePath:
        return self.place / f"{name}@{part.start:012d}-{part.end:012d}"


class _Mirror(Journal):
    """May be called in several threads, as when one that waits for the store was given up."""

    def __init__(
        self,
        place: RemotePath,
        folder: Path,
        run_id: str,
        fresh: bool,
        samples: int,
        flush_s: float,
        read_only: bool,
    ) -> None:
        self._place, self._folder, self._run_id = place, folder, run_id
        self._flush_s, self._read_only = flush_s, read_only
        self._pushed = time.monotonic()
        self._busy = threading.RLock()
        self._is_closed = False
        with closing(FolderLock(folder)) as lock:
            self._pull()
            if lock.exclusive():
                self._bring(of_others=True)
                lock.share()
            super().__init__(folder, run_id, fresh=fresh, samples=samples)

    def sync(self) -> None:
        with self._busy:
            if self._is_closed:
                return
            super().sync()
            if time.monotonic() - self._pushed >= self._flush_s:
                for path in self._own():
                    if segments.is_of_run(path, self._run_id) and not self._home.has(path):
                        self._home.put_rest(path)
                self._pushed = time.monotonic()

    def seal(self, data_version: str) -> None:
        with self._busy:
            super().seal(data_version)
            self._bring()

    def close(self) -> None:
        """The copy goes, unless another process of this machine has it open."""
        with self._busy:
            self._is_closed = True
            super().close()
            self._bring()
            with closing(FolderLock(self._folder)) as lock:
                if lock.exclusive():
                    self._bring(of_others=True)
                    if all(map(self._home.has, self._own())):
                        segments.empty(self._folder)

    def _may_pack(self) -> bool:
        """Whether all that is in the store is here, and no other machine writes to it."""
        home = self._home = Home(self._place)
        copies = self._copies()
        if any(name in copies and not home.is_dead(name) for name in home.unended):
            return False
        counting = home.names - segments.replaced_in(segments.all_paths(self._folder))
        return all(_size(self._folder / name) >= home.size_of(name) for name in counting)

    def _pull(self) -> None:
        """Fetch what is not here. Again when somebody packs or merges meanwhile."""
        for looks in range(1, _LOOKS + 1):
            self._home = Home(self._place)
            try:
                self._fetch()
                if not self._home.has_gaps:
                    return
            except (FileNotFoundError, InputError) as error:
                is_moved = isinstance(error, FileNotFoundError) or is_absent(error)
                if looks == _LOOKS or not is_moved:
                    raise

    def _fetch(self) -> None:
        """Newest first, because a packed segment says which ones it replaces."""
        replaced = segments.replaced_in(self._own())
        for name in sorted(self._home.names, reverse=True):
            path = self._folder / name
            if name in replaced:
                continue
            if _size(path) < self._home.size_of(name):
                if not path.exists():
                    with (self._folder / _COPIES).open("ab", 0) as copies:
                        copies.write(f"{name}\n".encode())
                        os.fsync(copies.fileno())
                with publish(path) as out:
                    for block in self._home.blocks(name):
                        out.write(block)
            if name.endswith(PACKED_SUFFIX):
                replaced.update(replaced_by(path))

    def _bring(self, *, of_others: bool = False) -> None:
        """Bring what has ended: segments of the run, and one that packs others. `of_others`, which
        needs the folder's lock for itself: also what processes that have ended wrote here, and what
        other machines have left. What is in the store twice then is deleted from it."""
        if self._read_only:
            return
        home = self._home
        for path in self._own():
            is_ended = path.name.endswith(PACKED_SUFFIX) or segments.is_of_run(path, self._run_id)
            if of_others or is_ended:
                home.put_whole(path)
        for name in home.unended if of_others else ():
            if home.is_dead(name) and (path := self._folder / name).exists():
                home.put_whole(path)
        for name in home.parts.keys() & home.whole.keys():
            home.drop_parts(name)
        packed = [path for path in segments.all_paths(self._folder) if path.name in home.whole]
        for name in segments.replaced_in(packed) & home.names:
            home.forget(name)

    def _copies(self) -> set[str]:
        file = self._folder / _COPIES
        return set(file.read_text(errors="replace").split()) if file.exists() else set()

    def _own(self) -> list[Path]:
        copies = self._copies()
        return [path for path in segments.segment_paths(self._folder) if path.name not in copies]


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else -1


def _without_gaps(parts: Iterable[Part]) -> list[Part]:
    """From the first byte on; of overlapping ones, as a killed merge leaves them, the longest."""
    chain: list[Part] = []
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
            for done in range(start, end, _PUT_BYTES):
                out.write(file.read(min(_PUT_BYTES, end - done)))
