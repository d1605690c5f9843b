"""One at a time: a claim on something that several runs may want to change."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self
from uuid import uuid4

from modelcall_assets.errors import InputError, StoreError
from modelcall_assets.storage.files import delete, list_files, write_bytes
from modelcall_assets.storage.listing import FileInfo
from modelcall_assets.storage.places import Place, RemotePath
from modelcall_assets.storage.trouble import explained

POLL_S = 0.5
STALE_S = 120.0
"""A claim in a store that was not renewed for so long was left by a process that is dead."""
_RENEWALS = 4
"""In that time."""
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)

Check = Callable[[], None]


@contextmanager
def claimed(place: Place, *, poll_s: float = POLL_S, stale_s: float = STALE_S) -> Iterator[Check]:
    """Hold `place` for the length of the block; wait while another one does. On a disk it is a file
    that is locked, in a store a folder of claims.

    A kill gives it up: at once on a disk, after two minutes in a store. What is given raises
    StoreError when the claim is held no more, because the store has not answered for so long.
    Where a disk has no locks everybody holds it. StoreError when a store does not answer, or a
    disk does not take the file.
    """
    if isinstance(place, Path):
        with _locked(place):
            yield lambda: None
    else:
        with _listed(place, poll_s, stale_s) as check:
            yield check


class Hold:
    """`path`, held from now on until the end of the block or of the process. BlockingIOError when
    somebody on this machine holds it. Where a disk has no locks everybody holds it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = self._taken()
        while not self._is_there():  # who held it before has taken the file away meanwhile
            os.close(self._fd)
            self._fd = self._taken()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._path.unlink(missing_ok=True)
        os.close(self._fd)

    def _is_there(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._fd), self._path.stat())
        except FileNotFoundError:
            return False

    def _taken(self) -> int:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        return _lock(self._path, fcntl.LOCK_EX | fcntl.LOCK_NB)


def claims(folder: RemotePath) -> list[FileInfo]:
    """Those in a folder or below. StoreError when the store does not answer."""
    try:
        return list_files(folder, may_be_absent=True)
    except InputError as error:
        raise StoreError(str(error)) from error


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with explained(path, StoreError):
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = _lock(path, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(fd)


def _lock(path: Path, how: int) -> int:
    """Closing what is given frees it."""
    fd = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(fd, how)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            os.close(fd)
            raise
    return fd


@contextmanager
def _listed(folder: RemotePath, poll_s: float, stale_s: float) -> Iterator[Check]:
    """Needs no conditional writes, which few stores do as they should, but listings that show what
    was written before: whoever sees no claim but its own is alone, because a later one sees it.
    Of those that came together the first by name stays, and the others step back."""
    own, others = _Claim(folder / uuid4().hex, stale_s), _Others(folder, stale_s)
    try:
        own.write()
        while (found := others.of(own)) or own.is_expired:
            if found and min(found) < own.place.name:
                delete(own.place)
                while others.of(own):
                    time.sleep(poll_s)
                own.write()
                continue
            time.sleep(poll_s)
            if own.is_due:
                own.write()
        with own.renewed():
            yield own.check
    finally:
        with suppress(StoreError):  # what stays is stale soon
            for each in (own.place, *others.stale):
                delete(each)


class _Others:
    """The claims that stand in a folder, as one process has seen them."""

    def __init__(self, folder: RemotePath, stale_s: float) -> None:
        self._folder = folder
        self._stale_s = stale_s
        self._seen: dict[tuple[str, str], float] = {}
        """Name and version, and when that was first seen."""
        self.stale: list[Place] = []

    def of(self, own: _Claim) -> list[str]:
        """Their names, but for `own`; the stale ones do not count."""
        now = time.monotonic()
        fresh: list[str] = []
        self.stale = []
        for info in claims(self._folder):
            if "/" in info.key_path or info.key_path == own.place.name:
                continue
            if now - self._seen.setdefault((info.key_path, info.version), now) > self._stale_s:
                self.stale.append(info.place)
            else:
                fresh.append(info.key_path)
        return fresh


class _Claim:
    """An object that stands for this process while it is written again and again."""

    def __init__(self, place: RemotePath, stale_s: float) -> None:
        self.place = place
        self._stale_s = stale_s
        self._writes = 0
        self._written = 0.0
        self._ended = threading.Event()

    def write(self) -> None:
        """The content differs each time, and with it the version."""
        begun = time.monotonic()
        self._writes += 1
        write_bytes(self.place, f"{os.uname().nodename} {os.getpid()} {self._writes}".encode())
        self._written = begun

    @property
    def is_due(self) -> bool:
        return time.monotonic() > self._written + self._stale_s / _RENEWALS

    @property
    def is_expired(self) -> bool:
        """Others may think that this process is dead."""
        return time.monotonic() > self._written + self._stale_s

    def check(self) -> None:
        if self.is_expired:
            raise StoreError(
                f"{self.place}: the store did not take this claim for {self._stale_s:.0f} s, and "
                "another run may hold it now; run it again, nothing is paid twice"
            )

    @contextmanager
    def renewed(self) -> Iterator[None]:
        thread = threading.Thread(target=self._renew, name="claim", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join()

    def _renew(self) -> None:
        """What has expired meanwhile stays so, because another process may be in its place."""
        while not self._ended.wait(self._stale_s / _RENEWALS) and not self.is_expired:
            expires = self._written + self._stale_s
            with suppress(StoreError):
                self.write()
            if time.monotonic() > expires:
                self._written = expires - self._stale_s
                return
