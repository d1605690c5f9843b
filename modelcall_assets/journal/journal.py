"""What was asked of a model for one partition, and every reply, as it came.

A reply's address is (request key, occurrence among equal keys in input order, sample, turn).
Turn 0 opens a dialogue; later turns mend its answer and point back at the line before.
`seal` marks that an output was published: from then on a dialogue that failed may be tried
anew, while before it (after a kill) every finished dialogue stands as it is.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import orjson

from modelcall_assets.journal.segments import (
    FORMAT,
    SegmentWriter,
    next_segment_path,
    read_lines,
    segment_paths,
)

_OFFSET_BITS = 44
_OFFSET_MASK = (1 << _OFFSET_BITS) - 1

Position = int
"""Segment number and byte offset of a line in one integer, so that a row costs 8 bytes."""


Reference = tuple[str, int]
"""Segment name and offset of a line."""


class Address(NamedTuple):
    key: str
    occurrence: int = 0
    sample: int = 0


@dataclass(frozen=True, slots=True)
class Entry:
    """One journalled reply and what it took. `body` is the reply as received."""

    address: Address
    turn: int
    status: int
    body: bytes
    endpoint: str
    attempts: int
    latency_ms: int
    answered_at: str
    previous: Reference | None = None
    """The turn before."""


@dataclass(frozen=True, slots=True)
class Dialogue:
    """The replies to one record so far. `open_round`: nothing was published since the last."""

    positions: tuple[Position, ...]
    entries: tuple[Entry, ...]
    open_round: bool


class Journal:
    """The journal of one partition, open for one run. Use as a context manager.

    `fresh=True` starts a new history: earlier replies stay on disk but are not looked at.
    """

    def __init__(self, folder: Path, run_id: str, *, fresh: bool = False) -> None:
        self._folder = folder
        self._segments = [path.name for path in segment_paths(folder)]
        self._readers: dict[str, int] = {}
        self._index: dict[Address, list[tuple[Position, int]]] = {}
        self._round = 0
        self._unsealed = False
        if not fresh:
            for number, name in enumerate(self._segments):
                self._scan(number, name)
        path = next_segment_path(folder, run_id)
        self._header = {"format": FORMAT, "run": run_id, "fresh": fresh}
        self._path = path
        self._writer: SegmentWriter | None = None
        self._segments.append(path.name)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._writer is not None:
            self._writer.close()
        for descriptor in self._readers.values():
            os.close(descriptor)

    def __len__(self) -> int:
        """Addresses that had a reply when the journal was opened."""
        return len(self._index)

    def __contains__(self, address: Address) -> bool:
        """Whether earlier runs have a reply to this record."""
        return address in self._index

    def dialogues(self, address: Address) -> list[Dialogue]:
        """What earlier runs have of this record, by age of the last turn. A turn without the one
        before it is nothing; two runs that mended the same answer make two dialogues."""
        dialogues: dict[Reference, Dialogue] = {}
        continued: set[Reference] = set()
        for position, round_number in self._index.get(address, ()):
            entry, before = self.read(position), None
            if entry.previous is not None:
                before = dialogues.get(entry.previous)
                if before is None:
                    continue
                continued.add(entry.previous)
            dialogues[self.reference(position)] = Dialogue(
                positions=(*before.positions, position) if before else (position,),
                entries=(*before.entries, entry) if before else (entry,),
                open_round=round_number == self._round,
            )
        return [known for end, known in dialogues.items() if end not in continued]

    def append(self, entry: Entry) -> Position:
        """Raises OSError when the disk does not take it; a paid reply must not be dropped."""
        self._unsealed = True
        return _position(len(self._segments) - 1, self._write(_to_line(entry)))

    def seal(self, data_version: str) -> None:
        """Call when the partition's output has been published."""
        if self._unsealed:
            self._write({"sealed": data_version})
            self._unsealed = False

    def sync(self) -> None:
        """Force appended replies to the disk; meant for a thread."""
        if self._writer is not None:
            self._writer.sync()

    def read(self, position: Position) -> Entry:
        number, offset = position >> _OFFSET_BITS, position & _OFFSET_MASK
        return self._read(self._segments[number], offset)

    def chain(self, position: Position) -> list[Entry]:
        """The dialogue that ends at `position`, first turn first."""
        entries = [self.read(position)]
        while (previous := entries[-1].previous) is not None:
            entries.append(self._read(*previous))
        return entries[::-1]

    def reference(self, position: Position) -> Reference:
        """What the next turn's `previous` must hold."""
        return self._segments[position >> _OFFSET_BITS], position & _OFFSET_MASK

    def _write(self, line: dict[str, Any]) -> int:
        if self._writer is None:
            self._writer = SegmentWriter(self._path)
            self._writer.append(self._header)
        return self._writer.append(line)

    def _scan(self, number: int, name: str) -> None:
        for offset, line in read_lines(self._folder / name):
            if "k" in line:
                address = Address(line["k"], line.get("o", 0), line.get("s", 0))
                where = _position(number, offset)
                self._index.setdefault(address, []).append((where, self._round))
                self._unsealed = True
            elif "sealed" in line:
                self._round += 1
                self._unsealed = False
            elif line.get("fresh"):
                self._index.clear()

    def _read(self, segment: str, offset: int) -> Entry:
        descriptor = self._readers.get(segment)
        if descriptor is None:
            descriptor = os.open(self._folder / segment, os.O_RDONLY)
            self._readers[segment] = descriptor
        size, data = 8192, b""
        while not (end := data.find(b"\n") + 1):
            known = len(data)
            data = os.pread(descriptor, size, offset)
            if len(data) == known:
                raise OSError(f"{self._folder / segment}: no whole line at {offset}")
            size *= 8
        return _from_line(orjson.loads(data[:end]))


def _position(segment: int, offset: int) -> Position:
    return segment << _OFFSET_BITS | offset


def _to_line(entry: Entry) -> dict[str, Any]:
    """Defaults are left out; the body is embedded as JSON when it comes back out of the line."""
    line: dict[str, Any] = {"k": entry.address.key}
    if entry.address.occurrence:
        line["o"] = entry.address.occurrence
    if entry.address.sample:
        line["s"] = entry.address.sample
    if entry.turn:
        line["t"] = entry.turn
        line["p"] = entry.previous
    line |= {"st": entry.status, "e": entry.endpoint, "n": entry.attempts}
    line |= {"ms": entry.latency_ms, "at": entry.answered_at}
    if b"\n" in entry.body or not _is_shallow_json(entry.body):
        line["text"] = entry.body.decode("utf-8", "replace")
    else:
        line["r"] = orjson.Fragment(entry.body)
    return line


def _is_shallow_json(body: bytes) -> bool:
    try:
        orjson.dumps(orjson.loads(body))  # which nests less deep than it reads
    except (orjson.JSONDecodeError, orjson.JSONEncodeError):
        return False
    return True


def _from_line(line: dict[str, Any]) -> Entry:
    previous = line.get("p")
    return Entry(
        address=Address(line["k"], line.get("o", 0), line.get("s", 0)),
        turn=line.get("t", 0),
        status=line["st"],
        body=line["text"].encode() if "text" in line else orjson.dumps(line["r"]),
        endpoint=line["e"],
        attempts=line["n"],
        latency_ms=line["ms"],
        answered_at=line["at"],
        previous=(previous[0], previous[1]) if previous else None,
    )
