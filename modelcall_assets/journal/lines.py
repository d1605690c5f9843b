"""One line of a journal: a header (`format`, `run`, `fresh`, `choice`), a reply (`k` …), a seal
(`sealed`) or a note of where a batch stands (`batch`).

A reply's line starts with its address and ends with its body, so that either is found without
parsing the other. The body is embedded as it came where that makes a line of JSON, which is so for
the answers of common servers; else it is in `text`, or in `b64` when it is no text.

Behind all that stands the line's checksum, `crc`. A line that does not fit its own is damaged, and
as if it had never come.
"""

import re
from base64 import b64decode, b64encode
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass
from typing import Any, NamedTuple
from zlib import crc32

import orjson

from modelcall_assets.journal.index import COUNTED, HASH_MASK, Address

FORMAT = 3
"""Lines of format 2 have no checksum. Those of 1 did not keep bodies whole that are no text."""

HEADER, FRESH, SEAL, DAMAGED, BATCH = -1, -2, -3, -4, -5
"""What a line is when it is no reply."""

Reference = tuple[str, int]
"""Segment name and offset of a line. On disk, in packed segments, no name is that of the same."""

_BODY = b',"r":'
_CRC, _SUM = b',"crc":"', b',"crc":"%08x"}\n'
_CRC_AT = -19
_START = re.compile(rb'\{"(?:k":"[0-9a-f]{32}"|sealed"|batch"|format")')
_NEEDED = frozenset(("k", "st", "e", "n", "ms", "at"))
_OLD_NAMES = _NEEDED | {
    *("o", "s", "t", "p", "r", "text", "b64"),
    *("format", "run", "fresh", "choice", "sealed", "batch", "id", "ended"),
}


class Entry(NamedTuple):
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
class BatchNote:
    """Where a batch stands; a later note of the same token replaces an earlier one.

    `token` goes with the batch to the endpoint, so that it is found there when the process died
    before `id` was known. `ended` is the status it ended with, once its replies are journalled.
    """

    token: str
    endpoint: str
    requests: int
    noted_at: float
    """Unix time of the first note."""
    id: str | None = None
    ended: str | None = None


_NOTE = ("batch", "e", "n", "at", "id", "ended")
"""Names of the fields in the line."""


def batch_line(note: BatchNote) -> bytes:
    """What is not known yet is left out."""
    content = zip(_NOTE, astuple(note), strict=True)
    return line_of({name: value for name, value in content if value is not None})


def batch_note_of(line: bytes) -> BatchNote:
    content = orjson.loads(line)
    return BatchNote(*(content.get(name) for name in _NOTE))


def reply_line(entry: Entry) -> bytes:
    """Defaults are left out, but for the sample of a row that is not the first of its kind."""
    head: dict[str, Any] = {"k": entry.address.key}
    if entry.address.occurrence:
        head["o"] = entry.address.occurrence
    if entry.address.sample or entry.address.occurrence:
        head["s"] = entry.address.sample
    if entry.turn:
        head["t"] = entry.turn
        head["p"] = entry.previous
    head |= {"st": entry.status, "e": entry.endpoint, "n": entry.attempts}
    head |= {"ms": entry.latency_ms, "at": entry.answered_at}
    body = entry.body
    is_object = 200 <= entry.status < 300 and body[:1] == b"{" and body[-1:] == b"}"
    if is_object and b"\n" not in body and b"\0" not in body:
        return with_sum(b"".join((orjson.dumps(head)[:-1], _BODY, body)))
    try:
        head["text"] = body.decode()
    except UnicodeDecodeError:
        head["b64"] = b64encode(body).decode()
    return line_of(head)


def line_of(content: dict[str, Any]) -> bytes:
    """The JSON of it with a checksum."""
    return with_sum(orjson.dumps(content)[:-1])


def with_sum(line: bytes) -> bytes:
    """`line` is without its closing brace."""
    return line + _SUM % crc32(line)


def summed(line: bytes) -> bytes:
    """A sound line; one of an older format gets its checksum."""
    return line if line[_CRC_AT:].startswith(_CRC) else with_sum(line[: content_end(line)])


def content_end(line: bytes) -> int:
    """The negative index of the checksum, or of the closing brace in an older format, whose lines
    are sound when they are JSON with the right names; 0 when the line is damaged."""
    end = line[_CRC_AT:]
    if end == _SUM % crc32(memoryview(line)[:_CRC_AT]):
        return _CRC_AT
    if end.startswith(_CRC):
        return 0
    try:
        content: Any = orjson.loads(line) if line.endswith(b"}\n") else None
    except orjson.JSONDecodeError:
        return 0
    names: set[str] = {*content} if isinstance(content, dict) else {""}
    return -2 if names <= _OLD_NAMES and ("k" not in names or names >= _NEEDED) else 0


class Lines:
    """Offset, kind and text of each sound line of `file`. How many are damaged is known at the end:
    `damaged`, with one that has no end."""

    def __init__(self, file: Iterable[bytes]) -> None:
        self._file = file
        self.damaged = 0
        self.size = 0
        """Up to the end of the last line."""

    def __iter__(self) -> Iterator[tuple[int, int, bytes]]:
        is_open = False
        for line in self._file:
            at, kind = self.size, kind_of(line)
            self.size += len(line)
            if kind != DAMAGED:
                is_open = False
                yield at, kind, line
                continue
            # A byte that became a line's end makes two of one.
            self.damaged += not (is_open and not line.startswith(b'{"'))
            is_open = not line.endswith(b'"}\n')
            for found in _START.finditer(line, 1):  # an end of line that was hit makes one of two
                rest = line[found.start() :]
                if (kind := kind_of(rest)) != DAMAGED:
                    is_open = False
                    yield at + found.start(), kind, rest
                    break


def kind_of(line: bytes) -> int:
    """The hash of a reply's address, else HEADER, FRESH (the header of a run that starts a new
    history), SEAL, BATCH or DAMAGED. Parses no body."""
    if not content_end(line):
        return DAMAGED
    if line[:6] != b'{"k":"':
        if line.startswith(b'{"format":'):
            return FRESH if b'"fresh":true' in line else HEADER
        if line.startswith(b'{"batch":'):
            return BATCH
        return SEAL if line.startswith(b'{"sealed":') else DAMAGED
    try:
        if line[40:43] in (b'"o"', b'"s"'):
            head = orjson.loads(line[: line.index(b',"st":')] + b"}")
            return Address(head["k"], head.get("o", 0), head.get("s", 0)).hash()
        return int(line[6:14], 16) & HASH_MASK
    except ValueError:
        return DAMAGED


def entry_of(line: bytes, segment: str) -> Entry | None:
    """`segment` is the name of the one that the line is in; None when it is damaged."""
    stop = content_end(line)
    if not stop:
        return None
    end = line.find(_BODY)
    if end < 0:
        head = orjson.loads(line)
        body = head["text"].encode() if "text" in head else b64decode(head["b64"])
    else:
        head = orjson.loads(line[:end] + b"}")
        body = line[end + len(_BODY) : stop]
    previous = head.get("p")
    return Entry(
        address=Address(head["k"], head.get("o", 0), head.get("s", COUNTED if "o" in head else 0)),
        turn=head.get("t", 0),
        status=head["st"],
        body=body,
        endpoint=head["e"],
        attempts=head["n"],
        latency_ms=head["ms"],
        answered_at=head["at"],
        previous=(previous[0] or segment, previous[1]) if previous else None,
    )
