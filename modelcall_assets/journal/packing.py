"""Pack the segments of a journal into one that is compressed, so that their number is bounded."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from pathlib import Path

import orjson

from modelcall_assets.journal.lines import (
    HERE,
    SEAL,
    Reference,
    kind_of,
    summed,
    with_sum,
    without_sum,
)
from modelcall_assets.journal.packed import PACKED_SUFFIX, PackedSegment, PackWriter
from modelcall_assets.journal.segments import (
    PlainSegment,
    Segment,
    all_paths,
    open_segment,
    replaced_in,
    segment_paths,
)
from modelcall_assets.storage.files import publish

SMALL_BYTES = 1 << 20
FEW_SEGMENTS = 8
LOST = -1
"""An offset that no line has."""


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
    segments = [open_segment(path) for path in paths]
    try:
        with publish(target) as file:
            writer = PackWriter(file, sorted(names))
            _Packing(writer, anew).take(segments)
            writer.close()
    finally:
        for segment in segments:
            segment.close()
    for path in replaced:
        path.unlink()


class _Packing:
    """Copies segments in their order; references between them become those within the new one."""

    def __init__(self, writer: PackWriter, anew: bool) -> None:
        self._writer, self._anew = writer, anew
        self._kept_in_place = ""
        self._moved: dict[str, _Moved] = {}

    def take(self, segments: list[Segment]) -> None:
        plain = ((at, each) for at, each in enumerate(segments) if isinstance(each, PlainSegment))
        fresh = (at for at, each in plain if each.is_fresh())
        visible = segments[max(fresh, default=0) :]
        first = visible[0]
        if isinstance(first, PackedSegment) and first.is_whole and not self._anew:
            self._kept_in_place = first.path.name
            self._writer.copy(first)
        for segment in visible:
            if segment.path.name != self._kept_in_place:
                self._take_lines(segment)

    def _take_lines(self, segment: Segment) -> None:
        moved = self._moved[segment.path.name] = _Moved(segment)
        for offset, kind, line in segment.lines():
            if kind >= 0:
                line = self._referring(line, segment.path.name)
                moved.note(offset, self._writer.add(line, kind))
            elif kind == SEAL:
                self._writer.add(summed(line), kind)

    def _referring(self, line: bytes, segment: str) -> bytes:
        """The line, with its reference to the turn before as it is in the new segment. One to a
        reply that is lost leads nowhere."""
        end = line.index(b',"st":')
        if line.find(b',"p":', 0, end) < 0:
            return summed(line)
        head = orjson.loads(line[:end] + b"}")
        name, offset = head["p"]
        head["p"] = (HERE, self._new_offset((name or segment, offset)))
        return with_sum(orjson.dumps(head)[:-1] + without_sum(line)[end:])

    def _new_offset(self, reference: Reference) -> int:
        name, offset = reference
        if name == self._kept_in_place:
            return offset
        return self._moved[name].find(offset) if name in self._moved else LOST


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
        """LOST when the reply is."""
        place = bisect_right(self._offsets, offset) - 1
        is_there = place >= 0 and kind_of(self._segment.line(offset)) >= 0
        return offset + self._shifts[place] if is_there else LOST
