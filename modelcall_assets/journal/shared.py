"""Where in the project the answer to a request lies, for tasks that share theirs.

A table from request key to journal. It can be deleted at any time: only reuse is lost.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

from modelcall_assets.errors import InputError, StoreError
from modelcall_assets.journal.journal import Address, Entry, Journal
from modelcall_assets.storage.sqlite import BUSY_S, write_ahead

_TABLES = """
CREATE TABLE IF NOT EXISTS folders (id INTEGER PRIMARY KEY, path TEXT UNIQUE NOT NULL);
CREATE TABLE IF NOT EXISTS replies (
    key TEXT PRIMARY KEY, folder INTEGER NOT NULL, occurrence INTEGER NOT NULL
) WITHOUT ROWID;
"""
_OPEN_JOURNALS = 8


class SharedReplies:
    """The table at `path`, made on first use; `opened` gives the journal of a folder. Raises
    InputError when it is no such table."""

    def __init__(self, path: Path, opened: Callable[[str], Journal]) -> None:
        self._path = path
        self._opened = opened
        self._journals: dict[str, Journal] = {}
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
            self._journals.popitem()[1].__exit__(None, None, None)

    def find(self, key: str) -> Iterator[Sequence[Entry]]:
        """Finished dialogues of other journals about this request. InputError when the table is
        damaged."""
        of_key = "SELECT path, occurrence FROM replies JOIN folders ON folder = id WHERE key = ?"
        try:
            row = self._reader.execute(of_key, (key,)).fetchone()
        except sqlite3.DatabaseError as error:
            raise self._unusable(error) from error
        if row is not None:
            folder, address = row[0], Address(key, row[1])
            found = self._journal(folder).dialogues(address)
            if not found:  # it may have grown since it was opened
                self._journals.pop(folder).__exit__(None, None, None)
                found = self._journal(folder).dialogues(address)
            yield from (dialogue.entries for dialogue in found)

    def add(self, folder: str, answered: Iterable[tuple[str, int]]) -> None:
        """Key and occurrence of requests that the journal in `folder` answers. StoreError when the
        table does not take it."""
        try:
            with closing(self._connect()) as connection, connection:
                connection.execute("INSERT OR IGNORE INTO folders (path) VALUES (?)", (folder,))
                number = connection.execute(
                    "SELECT id FROM folders WHERE path = ?", (folder,)
                ).fetchone()[0]
                connection.executemany(
                    "INSERT OR IGNORE INTO replies VALUES (?, ?, ?)",
                    ((key, number, occurrence) for key, occurrence in answered),
                )
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
        return sqlite3.connect(self._path, timeout=BUSY_S)

    def _journal(self, folder: str) -> Journal:
        """Open for reading; the ones used last stay open."""
        journal = self._journals.pop(folder, None) or self._opened(folder)
        self._journals[folder] = journal
        if len(self._journals) > _OPEN_JOURNALS:
            oldest = next(iter(self._journals))
            self._journals.pop(oldest).__exit__(None, None, None)
        return journal
