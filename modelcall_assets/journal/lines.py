"""The lines of a journal and their addresses. A line is a header (`format`, `run`, `fresh`,
`choice`), a reply (`k` …), a seal (`sealed`) or a note of where a batch stands (`batch`).

A reply's line starts with its address and ends with its body, so that either is found without
parsing the other. The body is embedded as it came where that makes a line of JSON, which is so for
the answers of common servers; else it is in `text`, or in `b64` when it is no text.

Behind all that stands the line's checksum, `crc`. A line that does not fit its own is damaged, and
as if it had never come.
"""

from __future__ import annotations

import re
from array import array
from base64 import b64decode, b64encode
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass
from typing import Any, NamedTuple
from zlib import crc32

import orjson

FORMAT = 3
"""Lines of format 2 have no checksum. Those of 1 did not keep bodies whole that are no text."""

HEADER, FRESH, SEAL, DAMAGED, BATCH = -1, -2, -3, -4, -5
"""What a line is when it is no reply."""

Reference = tuple[str, int]
"""Segment name and offset of a line. On disk, in packed segments, no name is that of the same."""

COUNTED = -1
HASH_MASK = (1 << 30) - 1
_PLACE_BITS, _PER_BUCKET = 6, 128
_COUNT_BITS = 8
_MOST = (1 << _COUNT_BITS) - 1
_BODY = b',"r":'
_CRC, _SUM = b',"crc":"', b',"crc":"%08x"}\n'
_CRC_AT = -19
_START = re.compile(rb'\{"(?:k":"[0-9a-f]{32}"|sealed"|batch"|format")')
_NEEDED = frozenset(("k", "st", "e", "n", "ms", "at"))
_OLD_NAMES = _NEEDED | {
    *("o", "s", "t", "p", "r", "text", "b64"),
    *("format", "run", "fresh", "choice", "sealed", "batch", "id", "ended"),
}


class Words:
    """A set of hashes with a payload of so many bits each, as 64-bit words in sorted buckets: it
    costs little more than 8 bytes a word and never grows in a leap. Of a hash count as many bits
    as find room, and 6 more.

    Grows by linear hashing: every now and then one bucket is split, so that nothing is rebuilt and
    the old and the new table never exist side by side.
    """

    def __init__(self, payload_bits: int = 0) -> None:
        self._level = _PLACE_BITS
        self._split = self.count = 0
        self._payload_bits = payload_bits
        self._mask = (1 << 64 - payload_bits + _PLACE_BITS) - 1
        self._buckets = [array("Q") for _ in range(1 << _PLACE_BITS)]

    def where(self, hash_: int) -> tuple[array[int], int, int]:
        """The bucket and the place in it of the least word that this hash may have, and that."""
        hash_ &= self._mask
        at = hash_ & (1 << self._level) - 1
        if at < self._split:
            at = hash_ & (2 << self._level) - 1
        bucket, word = self._buckets[at], hash_ >> _PLACE_BITS << self._payload_bits
        return bucket, bisect_left(bucket, word), word

    def find(self, hash_: int) -> list[int]:
        """The payloads in ascending order."""
        bucket, start, first = self.where(hash_)
        end = bisect_left(bucket, first + (1 << self._payload_bits), start)
        return [word - first for word in bucket[start:end]]

    def add(self, hash_: int, payload: int = 0) -> bool:
        """False when it is there already."""
        bucket, at, word = self.where(hash_)
        if payload:
            word |= payload
            at = bisect_left(bucket, word, at)
        if at < len(bucket) and bucket[at] == word:
            return False
        bucket.insert(at, word)
        self.count += 1
        if self.count > _PER_BUCKET * len(self._buckets):
            self._grow()
        return True

    def _grow(self) -> None:
        shift = self._payload_bits + self._level - _PLACE_BITS
        old, buckets = self._buckets[self._split], self._buckets
        buckets[self._split] = array("Q", [word for word in old if not word >> shift & 1])
        buckets.append(array("Q", [word for word in old if word >> shift & 1]))
        self._split += 1
        if self._split == 1 << self._level:
            self._level, self._split = self._level + 1, 0


class Address(NamedTuple):
    """`key` has 32 hex digits; `occurrence` counts the rows with that key in input order. Lines of
    older formats count all requests, samples too: their `sample` is COUNTED."""

    key: str
    occurrence: int = 0
    sample: int = 0

    def hash(self) -> int:
        """30 bits, the same in every process."""
        spread = self.occurrence * 0x9E3779B1 + max(0, self.sample) * 0x85EBCA77
        return (int(self.key[:8], 16) ^ spread) & HASH_MASK


class Addresses:
    """The addresses of the requests of a file, in input order, `samples` to a row: about 9 bytes
    per distinct key.

    Keys are told apart by 62 bits, which among 10 million differ but for one chance in 90,000. The
    occurrence would then still be the same in every run over the same rows.
    """

    def __init__(self, samples: int) -> None:
        self._samples = samples
        self._words = Words(_COUNT_BITS)
        self._often: dict[int, int] = {}
        """Times a key was met beyond what fits a word."""
        self._occurrence = self._sample = 0

    def next(self, key: str) -> Address:
        """That of the next request, which has this key (hex digits)."""
        if not self._sample:
            hash_ = int(key[:16], 16)
            bucket, at, word = self._words.where(hash_)
            if at == len(bucket) or bucket[at] > word + _MOST:
                self._words.add(hash_)
                self._occurrence = 0
            elif bucket[at] < word + _MOST:
                bucket[at] += 1
                self._occurrence = bucket[at] - word
            else:
                self._often[hash_] = self._often.get(hash_, 0) + 1
                self._occurrence = _MOST + self._often[hash_]
        address = Address(key, self._occurrence, self._sample)
        self._sample = (self._sample + 1) % self._samples
        return address


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
        line = b"".join((orjson.dumps(head)[:-1], _BODY, body))
        return line + _SUM % crc32(line)
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
