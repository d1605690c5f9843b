"""The files of a journal: a segment per run as lines, and at most one that packs earlier ones, so
that their number is bounded.

A segment may be read while its run writes it. Whoever has the journal open shares a lock of its
folder, so that segments are packed only when nobody else reads or writes them. A lock says too
which requests are asked now.
"""

import asyncio
import fcntl
import os
import re
from array import array
from bisect import bisect_right
from collections.abc import Awaitable, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import orjson

from modelcall_assets.errors import InputError
from modelcall_assets.journal import lines
from modelcall_assets.journal.lines import FRESH, HEADER, SEAL
from modelcall_assets.journal.packed import PACKED_SUFFIX, PackedSegment, PackWriter, replaced_by
from modelcall_assets.storage.files import publish
from modelcall_assets.storage.publishing import locks

SMALL_BYTES = 1 << 20
FEW_SEGMENTS = 8
_LOST = -1
_SUFFIX = ".jsonl"
_NAME = re.compile(r"\d{6,}-.*\.jsonl(\.zst)?")
_LOCK = ".lock"
POLL_S = 0.25
"""Between two looks at what another process asks."""
_READ_BYTES, _STEP_BYTES = 8192, 8 << 20


class PlainSegment:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        """As far as it was scanned."""
        self.damaged = 0
        """Lines among those."""
        self._fd: int | None = None

    def lines(self) -> Iterator[tuple[int, int, bytes]]:
        """Offset, kind and text of each sound line. InputError when a newer version wrote them."""
        with self.path.open("rb") as file:
            found = lines.Lines(file)
            for offset, kind, line in found:
                if kind in (HEADER, FRESH) and orjson.loads(line)["format"] > lines.FORMAT:
                    what = "written by a newer version of modelcall; use that one"
                    raise InputError(f"{self.path}: {what}")
                yield offset, kind, line
        self.size, self.damaged = found.size, found.damaged

    def scan(self) -> Iterator[tuple[int, int]]:
        """Offset and kind of each sound line."""
        return ((offset, kind) for offset, kind, _ in self.lines())

    def line(self, offset: int) -> bytes:
        """Without its end where the file ends before that."""
        if self._fd is None:
            self._fd = os.open(self.path, os.O_RDONLY)
        size, data = _READ_BYTES, b""
        while not (end := data.find(b"\n") + 1):
            known = len(data)
            data = os.pread(self._fd, size, offset)
            if len(data) == known:
                return data
            size *= 8
        return data[:end]

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


class OwnSegment(PlainSegment):
    """Of this run; each line is in the operating system's hands when `append` returns."""

    def __init__(self, folder: Path, run_id: str, header: Mapping[str, Any]) -> None:
        """Two runs that ask at the same time get the same number but never the same name."""
        last = all_paths(folder)[-1:]
        number = int(last[0].name.partition("-")[0]) + 1 if last else 1
        super().__init__(folder / f"{number:06d}-{run_id[:12]}{_SUFFIX}")
        flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_APPEND
        self._fd = self._own = os.open(self.path, flags, 0o644)
        self._synced = 0
        try:
            self.append(lines.line_of({"format": lines.FORMAT, "run": run_id, **header}))
        except OSError:
            super().close()
            self.path.unlink()
            raise

    def append(self, line: bytes) -> int:
        """Returns the offset of the line. OSError when the disk does not take it whole."""
        try:
            written = os.write(self._own, line)
            while written < len(line):
                written += os.write(self._own, memoryview(line)[written:])
        except OSError:
            os.ftruncate(self._own, self.size)
            raise
        offset, self.size = self.size, self.size + len(line)
        return offset

    def sync(self) -> None:
        """Force what was appended to the disk; cheap when there is nothing new."""
        size = self.size
        if size > self._synced:
            os.fsync(self._own)
            self._synced = size


Segment = PlainSegment | PackedSegment


class FolderLock:
    """Shared by all who have the journal open. Where there are no locks nothing is ever packed."""

    def __init__(self, folder: Path) -> None:
        self._fd: int | None = None
        with suppress(OSError):
            self._fd = _shared(folder / _LOCK)

    def exclusive(self) -> bool:
        """Whether nobody else has the journal open now, until `share` or `close`."""
        if self._fd is None:
            return False
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.share()
            return False
        return True

    def share(self) -> None:
        if self._fd is not None:
            with suppress(OSError):
                fcntl.flock(self._fd, fcntl.LOCK_SH)

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def _shared(path: Path) -> int:
    """A descriptor of the file, made where it is absent, that shares its lock until it is closed.
    OSError."""
    while True:
        try:
            fd = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
        except FileNotFoundError:
            path.parent.mkdir(parents=True, exist_ok=True)
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_SH)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), path.stat()):
                    return fd
        except OSError:
            os.close(fd)
            raise
        os.close(fd)  # the journal was removed meanwhile


class Asking:
    """Request keys in hand, so that others wait for the answer instead of paying for another: what
    a process asked is free when it ends."""

    def __init__(self, path: Path) -> None:
        self._locks = locks(path)
        self._own: dict[str, asyncio.Event] = {}

    def take(self, key: str) -> Awaitable[object] | None:
        """None when the key is ours until `release`; else what to wait for before trying again."""
        if (ended := self._own.get(key)) is not None:
            return ended.wait()
        with suppress(OSError):  # of a disk without locks: then they do not see each other
            if not self._locks.take(key):
                return asyncio.sleep(POLL_S)
        self._own[key] = asyncio.Event()
        return None

    def release(self, key: str) -> None:
        """Nothing happens when it is not ours."""
        if (ended := self._own.pop(key, None)) is not None:
            self._locks.release(key)
            ended.set()


def segment_paths(folder: Path) -> list[Path]:
    """Oldest first: names start with a number that only grows. Without those that were packed."""
    paths = all_paths(folder)
    replaced = replaced_in(paths)
    return [path for path in paths if path.name not in replaced]


def replaced_in(paths: Iterable[Path]) -> set[str]:
    packed = (path for path in paths if path.name.endswith(PACKED_SUFFIX))
    return {name for path in packed for name in replaced_by(path)}


def all_paths(folder: Path) -> list[Path]:
    """Those too that a packed one replaces, and that a crash left there."""
    if not folder.is_dir():
        return []
    named = (path for path in folder.iterdir() if _NAME.fullmatch(path.name))
    return sorted(path for path in named if path.is_file())


def is_segment_name(name: str) -> bool:
    return _NAME.fullmatch(name) is not None


def is_of_run(path: Path, run_id: str) -> bool:
    return path.name.removesuffix(_SUFFIX).endswith(f"-{run_id[:12]}")


def whole_lines(path: Path) -> int:
    """Bytes up to the last line's end; a packed segment is whole."""
    size = path.stat().st_size
    if path.name.endswith(PACKED_SUFFIX):
        return size
    with path.open("rb") as file:
        while size:
            start = max(0, size - _STEP_BYTES)
            file.seek(start)
            if (at := file.read(size - start).rfind(b"\n")) >= 0:
                return start + at + 1
            size = start
    return 0


def empty(folder: Path) -> None:
    """Delete all files, and the folder unless it has others below. Hidden ones go last, as they say
    which of the others are copies, and of these the lock."""
    for path in sorted(
        folder.iterdir(), key=lambda path: (path.name[0] == ".", path.name == _LOCK)
    ):
        if path.is_file():
            path.unlink()
    with suppress(OSError):  # journals of a folder that once was a file
        folder.rmdir()


def open_segment(path: Path) -> Segment:
    return (PackedSegment if path.name.endswith(PACKED_SUFFIX) else PlainSegment)(path)


def is_untidy(folder: Path) -> bool:
    """Many segments, or large ones, or some that a crash left after they were packed."""
    current = segment_paths(folder)
    plain = [path for path in current if not path.name.endswith(PACKED_SUFFIX)]
    return (
        len(plain) >= FEW_SEGMENTS
        or sum(path.stat().st_size for path in plain) >= SMALL_BYTES
        or len(current) < len(all_paths(folder))
    )


def pack(folder: Path, *, anew: bool = False) -> None:
    """Needs the folder's lock for itself. A kill at any moment leaves every reply where it was, or
    the packed segment, which names what it replaces, and what that had replaced: another machine
    may still have a copy. What a fresh start hides is left out, and so are damaged lines: of what
    was packed before, they are with `anew`."""
    paths = segment_paths(folder)
    target = folder / f"{paths[-1].name.partition('.jsonl')[0]}{PACKED_SUFFIX}"
    replaced = [path for path in all_paths(folder) if path != target]
    names = {path.name for path in replaced} | replaced_in(replaced)
    with ExitStack() as stack:
        segments = [stack.enter_context(closing(open_segment(path))) for path in paths]
        file = stack.enter_context(publish(target))
        writer = PackWriter(file, sorted(names))
        _copy(segments, writer, anew)
        writer.end_block()
    for path in replaced:
        path.unlink()


class _Moved:
    """Where the replies of a segment went: by how much, from each offset where that changes."""

    def __init__(self, segment: Segment) -> None:
        self._segment = segment
        self._offsets, self._shifts = array("q"), array("q")

    def note(self, old: int, new: int) -> None:
        if not self._shifts or self._shifts[-1] != new - old:
            self._offsets.append(old)
            self._shifts.append(new - old)

    def find(self, offset: int) -> int:
        """The new offset of a reply; _LOST when it is lost."""
        at = bisect_right(self._offsets, offset) - 1
        is_there = at >= 0 and lines.kind_of(self._segment.line(offset)) >= 0
        return offset + self._shifts[at] if is_there else _LOST


def _copy(segments: list[Segment], writer: PackWriter, anew: bool) -> None:
    """In their order; references between them become those within the new one."""
    plain = ((at, each) for at, each in enumerate(segments) if isinstance(each, PlainSegment))
    fresh = (at for at, each in plain if next(each.scan(), (0, HEADER))[1] == FRESH)
    moved: dict[str, _Moved] = {}
    for segment in segments[max(fresh, default=0) :]:
        is_first, here = not moved, _Moved(segment)
        moved[segment.path.name] = here
        if isinstance(segment, PackedSegment) and segment.is_whole and is_first and not anew:
            writer.copy(segment)
            here.note(0, 0)
            continue
        for offset, kind, line in segment.lines():
            if kind >= 0:
                line = _referring(line, segment.path.name, moved)
                here.note(offset, writer.add(line, kind))
            elif kind == SEAL:
                writer.add(lines.summed(line), kind)


def _referring(line: bytes, segment: str, moved: Mapping[str, _Moved]) -> bytes:
    """The line, with its reference to the turn before as it is in the new segment, which has no
    name in it. One to a reply that is lost leads nowhere."""
    end = line.index(b',"st":')
    if line.find(b',"p":', 0, end) < 0:
        return lines.summed(line)
    head = orjson.loads(line[:end] + b"}")
    name, offset = head["p"]
    other = moved.get(name or segment)
    head["p"] = ("", other.find(offset) if other else _LOST)
    return lines.with_sum(orjson.dumps(head)[:-1] + line[end : lines.content_end(line)])
