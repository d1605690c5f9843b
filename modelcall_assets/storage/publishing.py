"""What stands beside an output: a claim, so that one process at a time may change it, and the
manifest, written last, so that its presence means complete."""

import errno
import fcntl
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from modelcall_assets.errors import InputError, StoreError
from modelcall_assets.storage.files import delete, read_bytes, write_bytes
from modelcall_assets.storage.listing import FileInfo, list_files
from modelcall_assets.storage.places import Place, RemotePath, explained

POLL_S = 0.5
STALE_S = 120.0
"""A claim in a store that was not renewed for so long was left by a process that is dead."""
_RENEWALS = 4
"""In that time."""
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
_DEADLOCK_S = 0.01

Check = Callable[[], None]


class Locks:
    """A file on a disk, of which each name locks a byte. What a process holds is free when it ends,
    however that comes. Where a disk has no locks processes do not see each other. OSError."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Open as long as the process: to close any descriptor of a file frees all its locks.
        self._fd = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
        self._own, self._change = set[str](), threading.Condition()

    @property
    def is_deleted(self) -> bool:
        return not os.fstat(self._fd).st_nlink

    def close(self) -> None:
        """All that the process holds of the file is free."""
        os.close(self._fd)

    def take(self, name: str, *, wait: bool = False) -> bool:
        """Whether the name is the caller's until it is released; with `wait` it is in the end."""
        with self._change:
            if not wait and name in self._own:
                return False
            self._change.wait_for(lambda: name not in self._own)
            self._own.add(name)
        is_ours = False
        try:
            is_ours = self._lock(name, 0 if wait else fcntl.LOCK_NB)
        finally:
            if not is_ours:
                self._forget(name)
        return is_ours

    def release(self, name: str) -> None:
        try:
            with suppress(OSError):
                fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, _byte(name))
        finally:
            self._forget(name)

    def _forget(self, name: str) -> None:
        with self._change:
            self._own.discard(name)
            self._change.notify_all()

    def _lock(self, name: str, how: int) -> bool:
        while True:
            try:
                fcntl.lockf(self._fd, fcntl.LOCK_EX | how, 1, _byte(name))
                return True
            except BlockingIOError:
                return False
            except OSError as error:
                if error.errno in _NO_LOCKS:
                    return True
                if error.errno != errno.EDEADLK:  # of processes; it is other threads that wait
                    raise
                time.sleep(_DEADLOCK_S)


def _byte(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest())


def locks(path: Path) -> Locks:
    """One for all of a process."""
    path = Path(os.path.realpath(path))
    with _one_opens:
        known = open_locks.get(path)
        if known is None or known.is_deleted:
            known = open_locks[path] = Locks(path)
        return known


_one_opens, open_locks = threading.Lock(), dict[Path, Locks]()


@contextmanager
def held(path: Path, name: str = "", *, wait: bool = False) -> Iterator[None]:
    """BlockingIOError when somebody on this machine holds the name, and it is not waited for."""
    while True:
        file = locks(path)
        if not file.take(name, wait=wait):
            raise BlockingIOError(errno.EAGAIN, name, str(path))
        if not file.is_deleted:
            break
        file.release(name)  # somebody has deleted it meanwhile
    try:
        yield
    finally:
        file.release(name)


@contextmanager
def claimed(
    place: Place, name: str = "", *, poll_s: float = POLL_S, stale_s: float = STALE_S
) -> Iterator[Check]:
    """Hold the name at `place` for the length of the block; wait while another one does. On a disk
    that is a file with `Locks`, in a store a folder of claims. A kill gives it up: at once on a
    disk, after two minutes in a store.

    The yielded check raises StoreError when the claim is held no more, because the store has not
    answered for so long. StoreError when a store does not answer, or a disk does not take the file.
    """
    if isinstance(place, RemotePath):
        with _listed(place / name if name else place, poll_s, stale_s) as check:
            yield check
        return
    with ExitStack() as holding:
        with explained(place, StoreError):
            holding.enter_context(held(place, name, wait=True))
        yield lambda: None


def claims(folder: RemotePath) -> list[FileInfo]:
    """The claims in a folder or below. StoreError when the store does not answer."""
    try:
        return list_files(folder, may_be_absent=True)
    except InputError as error:
        raise StoreError(str(error)) from error


@contextmanager
def _listed(folder: RemotePath, poll_s: float, stale_s: float) -> Iterator[Check]:
    """Needs no conditional writes, which few stores do as they should, but listings that show what
    was written before: whoever sees no claim but its own is alone, because a later one sees it.
    Of those that came together the first by name stays, and the others step back."""
    own = _Claim(folder, stale_s)
    try:
        own.write()
        while (others := own.others()) or own.is_expired:
            if others and min(others) < own.place.name:
                delete(own.place)
                while own.others():
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
            for each in (own.place, *own.stale):
                delete(each)


class _Claim:
    """An object that stands for this process while it is written again and again."""

    def __init__(self, folder: RemotePath, stale_s: float) -> None:
        self._folder, self._stale_s = folder, stale_s
        self.place = folder / uuid4().hex
        self._writes = 0
        self._written = 0.0
        self._ended = threading.Event()
        self._seen: dict[tuple[str, str], float] = {}
        """Name and version of others, and when that was first seen."""
        self.stale: list[Place] = []

    def others(self) -> list[str]:
        """The names of the other claims in the folder; the stale ones do not count."""
        now = time.monotonic()
        fresh: list[str] = []
        self.stale = []
        for info in claims(self._folder):
            if "/" in info.key_path or info.key_path == self.place.name:
                continue
            if now - self._seen.setdefault((info.key_path, info.version), now) > self._stale_s:
                self.stale.append(info.place)
            else:
                fresh.append(info.key_path)
        return fresh

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


class InputFingerprint(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    uri: str
    digest: str
    size: int
    version: str


class Manifest(BaseModel):
    """`rows == ok + failed`; rows that a filter dropped are counted apart."""

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)

    format: int = 1
    stage: str
    accepted: bool = True
    data_version: str
    rows: int
    ok: int
    failed: int
    dropped: int = 0
    failures: dict[str, int] = Field(default_factory=dict)
    """Failed rows by reason."""
    output: str | None = None
    output_digest: str | None = None
    output_version: str | None = None
    """What the file system or store said of the output when it was published."""
    beside: dict[str, str] = Field(default_factory=dict)
    """What else was published with it: place → digest."""
    published: str | None = None
    """Tells one publication from another."""
    input: InputFingerprint
    schema_: list[tuple[str, str]] = Field(default_factory=list, alias="schema")
    """Column name and type, for people; a schema to read with belongs in `detail`."""
    moved: dict[str, str] = Field(default_factory=dict)
    """Input columns that are called like ours → their names in the output."""
    detail: dict[str, Any] = Field(default_factory=dict)

    @property
    def why_rejected(self) -> str:
        if not self.rows:
            return f"all {self.dropped:,} rows were dropped"
        return f"{self.failed:,} of {self.rows:,} rows failed"


def read_manifest(place: Place) -> Manifest | None:
    """None when absent or damaged: the output may be incomplete. InputError when unreadable."""
    try:
        return Manifest.model_validate_json(read_bytes(place))
    except (FileNotFoundError, ValidationError):
        return None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return None
        with explained(place):
            raise


def write_manifest(place: Place, manifest: Manifest) -> None:
    write_bytes(place, manifest.model_dump_json(by_alias=True, indent=2).encode())
