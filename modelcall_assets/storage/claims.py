"""One at a time: a claim on something that several runs may want to change."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from modelcall_assets.errors import StoreError
from modelcall_assets.storage.files import delete
from modelcall_assets.storage.places import Place, RemotePath
from modelcall_assets.storage.trouble import code_of, explained

POLL_S = 0.5
STALE_S = 120.0
"""A claim in a store that stands for so long was left by a process that is dead."""
_TAKEN = ("PreconditionFailed", "ConditionalRequestConflict", "412", "409")
_UNKNOWN = ("NotImplemented", "501")
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


@contextmanager
def claimed(place: Place) -> Iterator[None]:
    """Hold `place`, a file of its own, for the length of the block; wait while another one does.

    A kill gives it up: at once on a disk, after two minutes in a store. Where a disk has no locks,
    or a store no conditional writes, everybody holds it. StoreError when a store does not answer.
    """
    hold = _locked if isinstance(place, Path) else _created
    with hold(place):  # pyright: ignore[reportArgumentType]
        yield


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            os.close(fd)
            raise
    try:
        yield
    finally:
        os.close(fd)


@contextmanager
def _created(place: RemotePath) -> Iterator[None]:
    """The object's name ends in a number: who finds one that is stale claims the next."""
    seen: dict[int, float] = {}
    number = 1
    while not _create(_numbered(place, number)):
        if time.monotonic() - seen.setdefault(number, time.monotonic()) > STALE_S:
            number += 1
            continue
        time.sleep(POLL_S)
        number = 1
    try:
        yield
    finally:
        for each in range(1, number + 1):
            delete(_numbered(place, each))


def _numbered(place: RemotePath, number: int) -> RemotePath:
    return place.with_name(f"{place.name}.{number}")


def _create(place: RemotePath) -> bool:
    """Whether it was not there before."""
    with explained(place, StoreError):
        try:
            place.store.fs.pipe_file(place.key, b"claimed", mode="create")
        except FileExistsError:
            return False
        except NotImplementedError:
            return True
        except OSError as error:
            if code_of(error) in _TAKEN:
                return False
            if code_of(error) not in _UNKNOWN:
                raise
    return True
