"""The objects of a journal in a store.

A segment that has ended is an object under its own name. Before, it is parts: objects named
`<segment>@<first byte>-<end>`, whole lines each. Eight of one size become one: a few dozen a run.
"""

import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from modelcall_assets.journal.packed import PACKED_SUFFIX
from modelcall_assets.journal.segments import is_segment_name
from modelcall_assets.storage.files import delete, open_input, publish, read_bytes, write_bytes
from modelcall_assets.storage.listing import FileInfo, list_files
from modelcall_assets.storage.places import Place, RemotePath

MERGED_PARTS = 8
MERGED_BYTES = 64 << 20
"""Larger parts stay as they are: while they are merged nothing new is brought."""
DEAD_S = 7 * 86400.0
"""A segment that has got no part for so long is no more written to. A batch may take a day."""
_PUT_BYTES = 8 << 20
_PART = re.compile(r"@(\d+)-(\d+)\Z")


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes `start` to `end` of a segment. `level`: how often its bytes were merged."""

    start: int
    end: int
    level: int = 0


@dataclass
class Home:
    """What is in the store, as of `look` and of what was done here since."""

    place: RemotePath
    whole: dict[str, int] = field(default_factory=dict[str, int])
    """Segments under their own name; their sizes."""
    parts: dict[str, list[Part]] = field(default_factory=dict[str, list[Part]])
    """Of whole segments too, where a kill has left some."""
    _newest: dict[str, float] = field(default_factory=dict[str, float])

    def look(self) -> None:
        """InputError when the store does not answer."""
        self.whole, self.parts, self._newest = {}, {}, {}
        for info in journal_files(self.place):
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
        return self.whole.get(path.name, -1) >= _whole_lines(path)

    def blocks(self, name: str) -> Iterator[bytes]:
        """The content. FileNotFoundError or InputError when it has just been moved elsewhere."""
        if name in self.whole:
            yield from _blocks_of(self.place / name, self.whole[name])
        else:
            for part in _without_gaps(self.parts[name]):
                yield from _blocks_of(self._location(name, part), part.end - part.start)

    def put_whole(self, path: Path) -> None:
        """Bring a segment that has ended, unless it is there; its parts go."""
        if self.has(path):
            return
        size = _whole_lines(path)
        _upload(path, 0, size, self.place / path.name)
        self.whole[path.name] = size
        self.drop_parts(path.name)

    def put_rest(self, path: Path) -> None:
        """Bring what was appended to a segment of this process since the last time."""
        parts = self.parts.setdefault(path.name, [])
        start, end = parts[-1].end if parts else 0, _whole_lines(path)
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
        if name in self.whole:
            delete(self.place / name)
            del self.whole[name]
        self.drop_parts(name)

    def _put_part(self, path: Path, parts: list[Part], part: Part) -> None:
        _upload(path, part.start, part.end, self._location(path.name, part))
        parts.append(part)

    def _location(self, name: str, part: Part) -> RemotePath:
        return self.place / f"{name}@{part.start:012d}-{part.end:012d}"


def journal_files(place: Place) -> list[FileInfo]:
    """The files of a journal, wherever it is; none when there is none. Not those of another one
    below, as that of a file in a folder that once was a file."""
    found = list_files(place, may_be_absent=True)
    return [info for info in found if is_segment_name(_PART.sub("", info.key_path))]


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


def _without_gaps(parts: Iterable[Part]) -> list[Part]:
    """From the first byte on; of overlapping ones, as a killed merge leaves them, the longest."""
    chain: list[Part] = []
    end = 0
    for part in sorted(parts, key=lambda part: (part.start, -part.end)):
        if part.start == end:
            chain.append(part)
            end = part.end
    return chain


def _blocks_of(place: RemotePath, size: int) -> Iterator[bytes]:
    if size <= _PUT_BYTES:
        yield read_bytes(place)
        return
    with open_input(place) as file:
        while block := file.read(_PUT_BYTES):
            yield block


def _upload(path: Path, start: int, end: int, place: RemotePath) -> None:
    with path.open("rb") as file:
        file.seek(start)
        if end - start <= _PUT_BYTES:
            write_bytes(place, file.read(end - start))
            return
        with publish(place) as out:
            for done in range(start, end, _PUT_BYTES):
                out.write(file.read(min(_PUT_BYTES, end - done)))
