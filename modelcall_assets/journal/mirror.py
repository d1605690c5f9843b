"""A journal whose home is an object store. A run works on a copy on this machine, and brings what
it appends to the store every few seconds.

The names of segments hold the id of their run: runs on several machines never write to one. What is
here and was not copied from the store was written here; after a kill the next run brings it. A
segment of another machine that may be written to is left as it is, and nothing is packed then.
"""

import hashlib
import os
import threading
import time
from contextlib import closing, suppress
from pathlib import Path

from modelcall_assets.errors import InputError, ModelcallError
from modelcall_assets.journal import segments
from modelcall_assets.journal.home import Home, journal_files
from modelcall_assets.journal.journal import Journal, remove_folder
from modelcall_assets.journal.packed import PACKED_SUFFIX, replaced_by
from modelcall_assets.journal.segments import FolderLock
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
    folder = scratch_folder(place, scratch)
    return _Mirror(Home(place), folder, run_id, fresh, samples, flush_s, read_only)


def remove(place: Place, scratch: Path) -> bool:
    """Delete a journal; False, and nothing done, when a process of this machine has it open."""
    if isinstance(place, Path):
        return remove_folder(place)
    if not remove_folder(scratch_folder(place, scratch)):
        return False
    for info in journal_files(place):
        delete(info.place)
    return True


def scratch_folder(home: RemotePath, scratch: Path) -> Path:
    return scratch / "journals" / hashlib.sha256(str(home).encode()).hexdigest()[:32]


class _Mirror(Journal):
    """May be called in several threads, as when one that waits for the store was given up."""

    def __init__(
        self,
        home: Home,
        folder: Path,
        run_id: str,
        fresh: bool,
        samples: int,
        flush_s: float,
        read_only: bool,
    ) -> None:
        self._home, self._folder, self._run_id = home, folder, run_id
        self._flush_s, self._read_only = flush_s, read_only
        self._pushed = time.monotonic()
        self._busy = threading.RLock()
        self._is_closed = False
        with closing(FolderLock(folder)) as lock:
            self._pull()
            if lock.exclusive():
                self._bring_all()
                lock.share()
            super().__init__(folder, run_id, fresh=fresh, samples=samples)

    def sync(self) -> None:
        with self._busy:
            if self._is_closed:
                return
            super().sync()
            if time.monotonic() - self._pushed >= self._flush_s:
                for path in self._own():
                    if segments.is_of_run(path, self._run_id) and not self._home.has(path):
                        self._home.put_rest(path)
                self._pushed = time.monotonic()

    def seal(self, data_version: str) -> None:
        with self._busy:
            super().seal(data_version)
            self._bring()

    def close(self) -> None:
        """The copy goes, unless another process of this machine has it open."""
        with self._busy:
            self._is_closed = True
            super().close()
            self._bring()
            with closing(FolderLock(self._folder)) as lock:
                if lock.exclusive():
                    self._bring_all()
                    if all(map(self._home.has, self._own())):
                        for path in segments.all_paths(self._folder):
                            path.unlink()
                        segments.empty(self._folder)  # what says which ones are copies goes last

    def __exit__(self, *raised: object) -> None:
        """Where something has gone wrong already, that is raised and no error of closing."""
        if raised[0] is None:
            self.close()
            return
        with suppress(ModelcallError):  # what was not brought is here, for the next run
            self.close()

    def _may_pack(self) -> bool:
        """Whether all that is in the store is here, and no other machine writes to it."""
        home = self._home
        home.look()
        copies = self._copies()
        if any(name in copies and not home.is_dead(name) for name in home.unended):
            return False
        counting = home.names - segments.replaced_in(segments.all_paths(self._folder))
        return all(_size(self._folder / name) >= home.size_of(name) for name in counting)

    def _pull(self) -> None:
        """Fetch what is not here. Again when somebody packs or merges meanwhile."""
        for looks in range(1, _LOOKS + 1):
            self._home.look()
            try:
                self._fetch()
            except (FileNotFoundError, InputError) as error:
                is_moved = isinstance(error, FileNotFoundError) or is_absent(error)
                if looks == _LOOKS or not is_moved:
                    raise
            else:
                if not self._home.has_gaps:
                    return

    def _fetch(self) -> None:
        """Newest first, because a packed segment says which ones it replaces."""
        replaced = segments.replaced_in(self._own())
        for name in sorted(self._home.names, reverse=True):
            path = self._folder / name
            if name in replaced:
                continue
            if _size(path) < self._home.size_of(name):
                if not path.exists():
                    with (self._folder / _COPIES).open("ab") as copies:
                        copies.write(f"{name}\n".encode())
                        copies.flush()
                        os.fsync(copies.fileno())
                with publish(path) as out:
                    for block in self._home.blocks(name):
                        out.write(block)
            if name.endswith(PACKED_SUFFIX):
                replaced.update(replaced_by(path))

    def _bring(self) -> None:
        """Bring what has ended: segments of the run, and one that packs others."""
        if not self._read_only:
            for path in self._own():
                if segments.is_of_run(path, self._run_id) or path.name.endswith(PACKED_SUFFIX):
                    self._home.put_whole(path)
            self._tidy()

    def _bring_all(self) -> None:
        """All that was written here by processes that have ended, and what other machines have
        left. Needs the folder's lock for itself."""
        if not self._read_only:
            for path in self._own():
                self._home.put_whole(path)
            for name in self._home.unended:
                if self._home.is_dead(name) and (path := self._folder / name).exists():
                    self._home.put_whole(path)
            self._tidy()

    def _tidy(self) -> None:
        """Delete from the store what is in it twice."""
        home = self._home
        for name in [name for name in home.parts if name in home.whole]:
            home.drop_parts(name)
        packed = [path for path in segments.all_paths(self._folder) if path.name in home.whole]
        for name in segments.replaced_in(packed) & home.names:
            home.forget(name)

    def _copies(self) -> set[str]:
        file = self._folder / _COPIES
        return set(file.read_text(errors="replace").split()) if file.exists() else set()

    def _own(self) -> list[Path]:
        copies = self._copies()
        return [path for path in segments.segment_paths(self._folder) if path.name not in copies]


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else -1
