"""Engines on one machine share an endpoint: each holds a lease, a file that it keeps locked.

A lease says how many requests in flight its engine claims. Claims change only under the folder's
lock and never add up to more than the limit: a newcomer gets what the others have given up. The
lock of a killed engine falls, and with it the lease.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Self

_SUFFIX = ".lease"


@dataclass(frozen=True, slots=True)
class Share:
    """`claim` requests may be in flight now, `target` once the others have made room."""

    claim: int
    target: int
    limit: int

    @property
    def is_settled(self) -> bool:
        return self.claim == self.target

    @property
    def of_rates(self) -> float:
        """The fraction of what the endpoint allows per minute."""
        return min(self.claim, self.target) / self.limit


class Lease:
    """One engine's claim on an endpoint that allows `limit` requests in flight."""

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder = folder
        self._limit = limit
        self._claim = 0
        self._fd = -1
        name = f"{time.time_ns():020d}-{os.getpid()}-{os.urandom(3).hex()}{_SUFFIX}"
        self._path = folder / name

    def __enter__(self) -> Self:
        with self._folder_lock():
            self._fd = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
            fcntl.flock(self._fd, fcntl.LOCK_EX)
            self._write()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._path.unlink(missing_ok=True)
        os.close(self._fd)

    def refresh(self, in_flight: int) -> Share:
        """Claim this engine's share as far as the others leave it; what is in flight stays."""
        with self._folder_lock():
            others = dict(self._others())
            rank = sum(name < self._path.name for name in others)
            whole, rest = divmod(self._limit, len(others) + 1)
            target = whole + (rank < rest)
            free = int((1 - sum(others.values())) * self._limit)
            self._claim = max(min(target, free), min(in_flight, self._claim))
            self._write()
        return Share(self._claim, target, self._limit)

    def _others(self) -> Iterator[tuple[str, Fraction]]:
        """The claims of living engines as parts of the whole; leases of dead ones are removed."""
        for path in self._folder.glob(f"*{_SUFFIX}"):
            if path != self._path and (text := _read_living(path)):
                claim, limit = text.split()
                yield path.name, Fraction(int(claim), int(limit))

    def _write(self) -> None:
        os.pwrite(self._fd, f"{self._claim:10d} {self._limit:10d}\n".encode(), 0)

    @contextmanager
    def _folder_lock(self) -> Generator[None]:
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        fd = os.open(self._folder / "lock", os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)


def _read_living(path: Path) -> str | None:
    """None when nobody holds the lease any more."""
    try:
        fd = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.pread(fd, 64, 0).decode()
    else:
        path.unlink(missing_ok=True)
        return None
    finally:
        os.close(fd)
