"""What SQLite does not do by itself."""

from __future__ import annotations

import sqlite3
import time

BUSY_S = 60.0
"""How long to wait for another process."""
_RETRY_S = 0.02


def write_ahead(connection: sqlite3.Connection) -> None:
    """Turns the write-ahead log on. SQLite does not wait when two processes do so to a new file at
    once, whatever its timeout."""
    deadline = time.monotonic() + BUSY_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
        time.sleep(_RETRY_S)
