"""Who asks what at this time, so that others wait for the answer instead of paying for another."""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import Awaitable
from contextlib import suppress
from functools import cache
from pathlib import Path

POLL_S = 0.25
"""Between two looks at what another process asks."""
_HEX_DIGITS = 15
"""Of a key; they make an offset."""


class Asking:
    """Request keys in hand. Of the file at `path` a byte is locked for each, so that what a process
    asked is free when it ends, however that comes. Where a disk has no locks processes do not see
    each other."""

    def __init__(self, path: Path) -> None:
        self._fd = _descriptor(path)
        self._own: dict[str, asyncio.Event] = {}

    def take(self, key: str) -> Awaitable[object] | None:
        """None when the key is ours now, until `release`; else what to wait for before trying
        again."""
        if (ended := self._own.get(key)) is not None:
            return ended.wait()
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _offset(key))
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
                fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, _offset(key))
            ended.set()


@cache
def _descriptor(path: Path) -> int:
    """Never closed: closing any of a file frees all the locks that the process has on it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return os.open(path, os.O_CREAT | os.O_RDWR, 0o644)


def _offset(key: str) -> int:
    return int(key[:_HEX_DIGITS], 16)
