"""A journal whose home is an object store. A run works on a copy on this machine, and brings what
it appends to the store every few seconds.

The names of segments hold the id of their run: runs on several machines never write to one. What is
here and was not copied from the store was written here; after a kill the next run brings it. A
segment of another machine that may be written to is left as it is, and nothing is packed then.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

from modelcall_assets.errors import InputError, ModelcallError
from modelcall_assets.journal.home import Home, journal_files
from modelcall_assets.journal.journal import Journal, remove_folder
from modelcall_assets.journal.packed import PACKED_SUFFIX, replaced_by
from modelcall_assets.journal.segments import (
    FolderLock,
    all_paths,
    empty,
    is_of_run,
    replaced_in,
    segment_paths,
)
from modelcall_assets.storage.files import delete, publish
from modelcall_assets.storage.places import Place, RemotePath, is_absent

FLUSH_S = 5.0
"""What a machine that is lost takes with it at most."""
_LOOKS = 5
"""At a journal that others change meanwhile."""
_COPIES = ".copies"


def open_journal(
    place: Place,
    scratch: Path,
    run_id: str,
    *,
    fresh: bool = False,
    samples: int = 1,
    flush_s: float = FLUSH_S,
    read_only: bool = False,
) -> Journal:
    """The journal of a partition, wherever it is; `scratch` is for copies of remote ones, and with
    `read_only` nothing changes there. InputError or StoreError when the store does not answer."""
    if isinstance(place, Path):
        return Journal(place, run_id, fresh=fresh, samples=samples)
    mirror = _Mirror(Home(place), scratch_folder(place, scratch), read_only)
    return _MirroredJournal(mirror, run_id, fresh=fresh, samples=samples, flush_s=flush_s)


def remove(place: Place, scratch: Path) -> bool:
    """Delete a whole journal; False, and nothing done, when a process of this machine has it
    open."""
    if isinstance(place, Path):
        return remove_folder(place)
    if not remove_folder(scratch_folder(place, scratch)):
        return False
    for info in journal_files(place):
        delete(info.place)
    return True


def scratch_folder(home: RemotePath, scratch: Path) -> Path:
    """Where the copy of a remote journal lies."""
    return scratch / "journals" / hashlib.sha256(str(home).encode()).hexdigest()[:32]


class _MirroredJournal(Journal):
    """Its methods may be called in several threads, as when one that waits for the store was given
    up."""

    def __init__(
        self, mirror: _Mirror, run_id: str, *, fresh: bool, samples: int, flush_s: float
    ) -> None:
        self._mirror, self._flush_s = mirror, flush_s
        self._pushed = time.monotonic()
        self._busy = threading.RLock()
        self._is_closed = False
        with closing(FolderLock(mirror.folder)) as lock:
            mirror.pull()
            if lock.exclusive():
                mirror.bring_all()
                lock.share()
            super().__init__(mirror.folder, run_id, fresh=fresh, samples=samples)

    def sync(self) -> None:
        with self._busy:
            if self._is_closed:
                return
            super().sync()
            if time.monotonic() - self._pushed >= self._flush_s:
                for path in self._mirror.own():
                    if is_of_run(path, self._run_id) and not self._mirror.home.has(path):
                        self._mirror.home.put_rest(path)
                self._pushed = time.monotonic()

    def seal(self, data_version: str) -> None:
        with self._busy:
            super().seal(data_version)
            self._mirror.bring(self._run_id)

    def close(self) -> None:
        with self._busy:
            self._is_closed = True
            super().close()
            self._mirror.close(self._run_id)

    def __exit__(self, *raised: object) -> None:
        """Where something has gone wrong already, that is raised and no error of closing."""
        if raised[0] is None:
            self.close()
            return
        with suppress(ModelcallError):  # what was not brought is here, for the next run
            self.close()

    def _may_pack(self) -> bool:
        return self._mirror.has_all()


@dataclass
class _Mirror:
    """The copy of a remote journal in `folder`."""

    home: Home
    folder: Path
    read_only: bool

    def pull(self) -> None:
        """Fetch what is not here. Again when somebody packs or merges meanwhile."""
        for looks in range(1, _LOOKS + 1):
            self.home.look()
            try:
                self._fetch()
            except (FileNotFoundError, InputError) as error:
                is_moved = isinstance(error, FileNotFoundError) or is_absent(error)
                if looks == _LOOKS or not is_moved:
                    raise
            else:
                if not self.home.has_gaps:
                    return

    def bring(self, run_id: str) -> None:
        """Bring what has ended: segments of the run, and one that packs others."""
        if self.read_only:
            return
        for path in self.own():
            if is_of_run(path, run_id) or path.name.endswith(PACKED_SUFFIX):
                self.home.put_whole(path)
        self._tidy()

    def bring_all(self) -> None:
        """All that was written here by processes that have ended, and what other machines have
        left. Needs the folder's lock for itself."""
        if self.read_only:
            return
        for path in self.own():
            self.home.put_whole(path)
        for name in self.home.unended:
            if self.home.is_dead(name) and (path := self.folder / name).exists():
                self.home.put_whole(path)
        self._tidy()

    def close(self, run_id: str) -> None:
        """The copy goes, unless another process of this machine has it open."""
        self.bring(run_id)
        with closing(FolderLock(self.folder)) as lock:
            if lock.exclusive():
                self.bring_all()
                if all(map(self.home.has, self.own())):
                    for path in all_paths(self.folder):
                        path.unlink()
                    empty(self.folder)  # what says which ones are copies goes last

    def has_all(self) -> bool:
        """Whether all that is in the store is here, and no other machine writes to it."""
        self.home.look()
        copies = self._copies()
        if any(name in copies and not self.home.is_dead(name) for name in self.home.unended):
            return False
        counting = {*self.home.whole, *self.home.parts} - replaced_in(all_paths(self.folder))
        return all(_size(self.folder / name) >= self.home.size_of(name) for name in counting)

    def _fetch(self) -> None:
        """Newest first, because a packed segment says which ones it replaces."""
        replaced = replaced_in(self.own())
        for name in sorted({*self.home.whole, *self.home.parts}, reverse=True):
            path = self.folder / name
            if name in replaced:
                continue
            if _size(path) < self.home.size_of(name):
                self._copy(name, path)
            if name.endswith(PACKED_SUFFIX):
                replaced.update(replaced_by(path))

    def _copy(self, name: str, path: Path) -> None:
        if not path.exists():
            with (self.folder / _COPIES).open("ab") as copies:
                copies.write(f"{name}\n".encode())
                copies.flush()
                os.fsync(copies.fileno())
        with publish(path) as out:
            for block in self.home.blocks(name):
                out.write(block)

    def _copies(self) -> set[str]:
        """The names of segments that were brought here from the store."""
        file = self.folder / _COPIES
        return set(file.read_text(errors="replace").split()) if file.exists() else set()

    def own(self) -> list[Path]:
        """Segments that were written here."""
        copies = self._copies()
        return [path for path in segment_paths(self.folder) if path.name not in copies]

    def _tidy(self) -> None:
        """Delete from the store what is in it twice."""
        for name in [*self.home.parts]:
            if name in self.home.whole:
                self.home.drop_parts(name)
        packed = [path for path in all_paths(self.folder) if path.name in self.home.whole]
        for name in replaced_in(packed) & {*self.home.whole, *self.home.parts}:
            self.home.forget(name)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else -1
