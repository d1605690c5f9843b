"""The addresses of requests, where replies to them lie, and who asks them now."""

from __future__ import annotations

import asyncio
import fcntl
import os
import sqlite3
from array import array
from bisect import bisect_left
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import closing, suppress
from functools import cache
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple

from modelcall_assets.errors import InputError, StoreError
from modelcall_assets.storage.files import BUSY_S, write_ahead

if TYPE_CHECKING:
    from modelcall_assets.journal.journal import Journal
    from modelcall_assets.journal.lines import Entry

COUNTED = -1
POLL_S = 0.25
"""Between two looks at what another process asks."""
POSITION_BITS = 40
HASH_MASK = (1 << 30) - 1
_PLACE_BITS, _PER_BUCKET = 6, 128
_COUNT_BITS = 8
_MOST = (1 << _COUNT_BITS) - 1
_OPEN_JOURNALS = 8
_TABLES = """
CREATE TABLE IF NOT EXISTS folders (id INTEGER PRIMARY KEY, path TEXT UNIQUE NOT NULL);
CREATE TABLE IF NOT EXISTS replies (
    key TEXT PRIMARY KEY, folder INTEGER NOT NULL, occurrence INTEGER NOT NULL
) WITHOUT ROWID;
"""


class Words:
    """A set of hashes with a payload of so many bits each, as 64-bit words in sorted buckets: it
    costs little more than 8 bytes a word and never grows in a leap. Of a hash count as many bits
    as find room, and 6 more.

    Grows by linear hashing: every now and then one bucket is split, so that nothing is rebuilt and
    the old and the new table never exist side by side.
    """

    def __init__(self, payload_bits: int = 0) -> None:
        self._level = _PLACE_BITS
        self._split = self._count = 0
        self._payload_bits = payload_bits
        self._mask = (1 << 64 - payload_bits + _PLACE_BITS) - 1
        self._buckets = [array("Q") for _ in range(1 << _PLACE_BITS)]

    def __len__(self) -> int:
        return self._count

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
        self.insert(bucket, at, word)
        return True

    def insert(self, bucket: array[int], at: int, word: int) -> None:
        bucket.insert(at, word)
        self._count += 1
        if self._count > _PER_BUCKET * len(self._buckets):
            self._grow()

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
                self._words.insert(bucket, at, word)
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


class Asking:
    """Request keys in hand, so that others wait for the answer instead of paying for another. Of
    the file at `path` a byte is locked for each: what a process asked is free when it ends, however
    that comes. Where a disk has no locks processes do not see each other."""

    def __init__(self, path: Path) -> None:
        self._fd = _descriptor(path)
        self._own: dict[str, asyncio.Event] = {}

    def take(self, key: str) -> Awaitable[object] | None:
        """None when the key is ours until `release`; else what to wait for before trying again."""
        if (ended := self._own.get(key)) is not None:
            return ended.wait()
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, int(key[:15], 16))
        except (BlockingIOError, PermissionError):
            return asyncio.sleep(POLL_S)
        except OSError:
            pass
        self._own[key] = asyncio.Event()
        return None

    def release(self, key: str) -> None:
        """Nothing happens when it is not ours."""
        if (ended := self._own.pop(key, None)) is not None:
            with suppress(OSError):
                fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, int(key[:15], 16))
            ended.set()


@cache
def _descriptor(path: Path) -> int:
    """Never closed: closing any of a file frees all the locks that the process has on it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return os.open(path, os.O_CREAT | os.O_RDWR, 0o644)


class SharedReplies:
    """Where in the project the answer to a request lies, for tasks that share theirs: the table at
    `path`, made on first use. It can be deleted at any time, only reuse is lost. `opened` gives the
    journal of a folder. InputError when the file is no such table."""

    def __init__(self, path: Path, opened: Callable[[str], Journal]) -> None:
        self._path, self._opened = path, opened
        self._journals: dict[str, Journal] = {}
        self._one_looks = Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with closing(self._connect()) as connection, connection:
                write_ahead(connection)
                connection.executescript(_TABLES)
            self._reader = self._connect()
        except sqlite3.DatabaseError as error:
            raise self._unusable(error) from error

    def close(self) -> None:
        self._reader.close()
        while self._journals:
            self._journals.popitem()[1].close()

    def find(self, key: str) -> list[Sequence[Entry]]:
        """Finished dialogues of other journals about this request; in any thread. InputError."""
        of_key = "SELECT path, occurrence FROM replies JOIN folders ON folder = id WHERE key = ?"
        with self._one_looks:
            try:
                row = self._reader.execute(of_key, (key,)).fetchone()
            except sqlite3.DatabaseError as error:
                raise self._unusable(error) from error
            if row is None:
                return []
            folder, address = row[0], Address(key, row[1])
            found = self._journal(folder).dialogues(address)
            if not found:  # it may have grown since it was opened
                self._journals.pop(folder).close()
                found = self._journal(folder).dialogues(address)
            return [dialogue.entries for dialogue in found]

    def add(self, folder: str, answered: Iterable[tuple[str, int]]) -> None:
        """Key and occurrence of requests that the journal in `folder` answers. StoreError."""
        try:
            with closing(self._connect()) as connection, connection:
                connection.execute("INSERT OR IGNORE INTO folders (path) VALUES (?)", (folder,))
                found = connection.execute("SELECT id FROM folders WHERE path = ?", (folder,))
                number = found.fetchone()[0]
                rows = ((key, number, occurrence) for key, occurrence in answered)
                connection.executemany("INSERT OR IGNORE INTO replies VALUES (?, ?, ?)", rows)
        except sqlite3.Error as error:
            raise StoreError(
                f"{self._path}: the table of shared answers cannot be written ({error}); is the "
                "disk full? Delete it: only reuse across files is lost"
            ) from error

    def _unusable(self, error: sqlite3.DatabaseError) -> InputError:
        return InputError(
            f"{self._path}: cannot be used as the table of shared answers ({error}); delete it: "
            "only reuse across files is lost"
        )

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self._path, timeout=BUSY_S, check_same_thread=False)

    def _journal(self, folder: str) -> Journal:
        """Open for reading; the ones used last stay open."""
        journal = self._journals.pop(folder, None) or self._opened(folder)
        self._journals[folder] = journal
        if len(self._journals) > _OPEN_JOURNALS:
            self._journals.pop(next(iter(self._journals))).close()
        return journal
