"""What was asked of a model for one partition, and every reply, as it came.

A reply is found by its address and turn. Turn 0 opens a dialogue; later turns mend its answer and
point back at the line before. `seal` marks that an output was published: from then on a dialogue
that failed may be tried anew, while before it (after a kill) every finished dialogue stands as it
is. `note` keeps where batches stand, so that a batch which outlives its run is not paid again, and
`choose` what a run asks anew, so that the next one goes on with it.
"""

import sqlite3
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import orjson

from modelcall_assets.errors import InputError, ModelcallError, StoreError
from modelcall_assets.journal import lines, segments
from modelcall_assets.journal.lines import COUNTED, Address, BatchNote, Entry, Reference, Words
from modelcall_assets.journal.segments import FolderLock, Segment
from modelcall_assets.storage.files import BUSY_S, write_ahead
from modelcall_assets.storage.places import explained

POSITION_BITS = 40
Position = int
"""Offset of a line as if all segments were one file, so that a row costs 8 bytes. It holds while
the Journal is open, and until `seal`."""


@dataclass(frozen=True, slots=True)
class Dialogue:
    """The replies to one record so far. `open_round`: nothing was published since the last."""

    positions: tuple[Position, ...]
    entries: tuple[Entry, ...]
    open_round: bool


class Journal(AbstractContextManager["Journal"]):
    """The journal of one partition, open for one run. `fresh` starts a new history: earlier replies
    are not looked at any more. Replies of older formats, which counted samples as rows, are dealt
    to rows of `samples` each."""

    def __init__(self, folder: Path, run_id: str, *, fresh: bool = False, samples: int = 1) -> None:
        self._folder, self._run_id = folder, run_id
        self._fresh, self._samples = fresh, samples
        self._segments: list[Segment] = []
        self._starts: list[Position] = []
        self._end: Position = 0
        self._index = Words(POSITION_BITS)
        self._last_reply = self._last_seal = -1
        self.choice: Mapping[str, Any] | None = None
        """What was asked anew by a run that has not published."""
        self._lost: set[Reference] = set()
        """Lines that were found damaged when they were read."""
        self._batches: dict[str, tuple[Position, BatchNote]] = {}
        self._writer: segments.OwnSegment | None = None
        self._lock = FolderLock(folder) if folder.is_dir() else None
        try:
            for path in () if fresh else segments.segment_paths(folder):
                self._load(segments.open_segment(path))
        except BaseException:
            self.close()
            raise

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Where something has gone wrong already, that is raised and no error of closing."""
        with suppress(*([] if kind is None else [ModelcallError])):
            self.close()

    def close(self) -> None:
        self._end_segment()
        for segment in self._segments:
            segment.close()
        if self._lock is not None:
            self._lock.close()

    def __len__(self) -> int:
        """Replies that `dialogues` finds."""
        return self._index.count

    def __contains__(self, address: Address) -> bool:
        return next(self._of(address), None) is not None

    @property
    def damaged(self) -> dict[str, int]:
        """Segments with damaged lines, and how many are known: of a packed one those that were
        looked up. They are as if they had never come."""
        counts = {each.path.name: each.damaged for each in self._segments}
        for name, _ in self._lost:
            counts[name] += 1
        return {name: count for name, count in counts.items() if count}

    @property
    def has_unpublished(self) -> bool:
        return self._last_reply > self._last_seal or self.choice is not None

    def verify(self) -> tuple[int, dict[str, int]]:
        """Reads all of it: sound lines, and `damaged` with every line that is."""
        sound = sum(1 for segment in self._segments for _ in segment.lines())
        return sound, self.damaged

    def dialogues(self, address: Address) -> list[Dialogue]:
        """What is findable of this record, by age of the last turn. A turn whose previous one is
        lost does not count; two runs that mended the same answer make two dialogues."""
        if not self._index.count:
            return []
        dialogues: dict[Reference, Dialogue] = {}
        continued: set[Reference] = set()
        for position, entry in self._of(address):
            positions, entries = (position,), (entry,)
            if entry.previous is not None:
                if (before := dialogues.get(entry.previous)) is None:
                    continue
                positions, entries = (*before.positions, position), (*before.entries, entry)
                continued.add(entry.previous)
            is_open = position > self._last_seal
            dialogues[self.reference(position)] = Dialogue(positions, entries, is_open)
        return [known for end, known in dialogues.items() if end not in continued]

    def choose(self, choice: Mapping[str, Any]) -> None:
        """Call before the first reply of a run."""
        self.choice = choice
        self._writer = self._new_segment()

    def give_second_tries(self) -> None:
        """Failures of this round do not stand any more."""
        choice = self.choice
        self.seal("")
        if choice is not None:
            self.choose(choice)

    def append(self, entry: Entry, *, findable: bool = False) -> Position:
        """Raises StoreError when the disk does not take it; a paid reply must not be dropped.
        `findable` by `dialogues` costs about 9 bytes."""
        self._last_reply = self._write(lines.reply_line(entry))
        if findable:
            self._index.add(entry.address.hash(), self._last_reply)
        return self._last_reply

    def note(self, batch: BatchNote) -> Position:
        position = self._write(lines.batch_line(batch))
        self._remember(position, batch)
        return position

    def open_batches(self) -> list[tuple[Position, BatchNote]]:
        """Batches that were begun since the last seal and have not ended, each with the position of
        its first note: its replies lie behind that."""
        return [(first, note) for first, note in self._batches.values() if note.ended is None]

    def seal(self, data_version: str) -> None:
        """Call last of all when the output has been published. Packs what has become large without
        what is damaged; that can take seconds, and a failure leaves the journal as it is."""
        is_damaged = bool(self.damaged)
        if not self.has_unpublished and not is_damaged:
            return
        if self.has_unpublished:
            self._last_seal = self._write(lines.line_of({"sealed": data_version}))
            self.choice = None
        self._batches.clear()
        self._end_segment()
        assert self._lock is not None
        with suppress(OSError, ModelcallError):
            is_due = is_damaged or segments.is_untidy(self._folder)
            if is_due and self._may_pack() and self._lock.exclusive():
                try:
                    segments.pack(self._folder, anew=is_damaged)
                finally:
                    self._lock.share()

    def sync(self) -> None:
        """Force appended replies to the disk; meant for a thread. StoreError when it fails."""
        if self._writer is not None:
            with explained(self._folder, StoreError):
                self._writer.sync()

    def chain(self, position: Position) -> list[Entry]:
        """The dialogue that ends at `position`. StoreError when a line was damaged meanwhile."""
        segment, offset = self._at(position)
        entries: list[Entry] = []
        while (entry := lines.entry_of(segment.line(offset), segment.path.name)) is not None:
            entries.append(entry)
            if entry.previous is None:
                return entries[::-1]
            name, offset = entry.previous
            segment = next(each for each in self._segments if each.path.name == name)
        self._lost.add((segment.path.name, offset))
        raise StoreError(
            f"{segment.path}: the line at {offset} was damaged while it was in use; check the "
            "disk and run it again: what is lost is asked again, all else is kept"
        )

    def reference(self, position: Position) -> Reference:
        segment, offset = self._at(position)
        return segment.path.name, offset

    def _of(self, address: Address) -> Iterator[tuple[Position, Entry]]:
        """Every reply to this record, in ascending order."""
        counted = address.occurrence * self._samples + address.sample
        known = (address, Address(address.key, counted, COUNTED))
        positions = self._index.find(address.hash())
        if counted != address.occurrence:
            positions = sorted({*positions, *self._index.find(known[1].hash())})
        for position in positions:
            segment, offset = self._at(position)
            if (entry := lines.entry_of(segment.line(offset), segment.path.name)) is None:
                self._lost.add((segment.path.name, offset))
            elif entry.address in known:
                yield position, entry

    def _may_pack(self) -> bool:
        return True

    def _at(self, position: Position) -> tuple[Segment, int]:
        number = bisect_right(self._starts, position) - 1
        return self._segments[number], position - self._starts[number]

    def _load(self, segment: Segment) -> None:
        self._segments.append(segment)
        self._starts.append(self._end)
        start = self._end
        for offset, kind in segment.scan():
            if kind >= 0:
                self._last_reply = start + offset
                self._index.add(kind, self._last_reply)
            elif kind == lines.SEAL:
                self._last_seal, self.choice = start + offset, None
                self._batches.clear()
            elif kind == lines.BATCH:
                self._remember(start + offset, lines.batch_note_of(segment.line(offset)))
            elif kind == lines.HEADER:
                self.choice = orjson.loads(segment.line(offset)).get("choice") or self.choice
            elif kind == lines.FRESH:
                self._index, self._last_reply, self.choice = Words(POSITION_BITS), -1, None
                self._batches.clear()
        self._end += segment.size

    def _remember(self, position: Position, note: BatchNote) -> None:
        first, _ = self._batches.get(note.token, (position, note))
        self._batches[note.token] = (first, note)

    def _write(self, line: bytes) -> Position:
        try:
            self._writer = self._writer or self._new_segment()
            return self._starts[-1] + self._writer.append(line)
        except OSError as error:
            with explained(self._folder, StoreError):
                raise error

    def _new_segment(self) -> segments.OwnSegment:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lock = self._lock or FolderLock(self._folder)
        header = {"fresh": self._fresh, **({"choice": self.choice} if self.choice else {})}
        writer = segments.OwnSegment(self._folder, self._run_id, header)
        self._segments.append(writer)
        self._starts.append(self._end)
        self._fresh = False
        return writer

    def _end_segment(self) -> None:
        if self._writer is not None:
            writer, self._writer = self._writer, None
            self._end += writer.size
            with explained(self._folder, StoreError):
                writer.sync()


_OPEN_JOURNALS = 8
_TABLES = """
CREATE TABLE IF NOT EXISTS folders (id INTEGER PRIMARY KEY, path TEXT UNIQUE NOT NULL);
CREATE TABLE IF NOT EXISTS replies (
    key TEXT PRIMARY KEY, folder INTEGER NOT NULL, occurrence INTEGER NOT NULL
) WITHOUT ROWID;
"""


class SharedReplies:
    """Where in the project the answer to a request lies: the table at `path`, made on first use.
    `opened` gives the journal of a folder. InputError when the file is no such table."""

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
