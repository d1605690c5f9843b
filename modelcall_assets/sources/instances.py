"""Which instances of a service are open, written down so that a kill leaves none behind."""

from __future__ import annotations

import fcntl
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from modelcall_assets.errors import StoreError
from modelcall_assets.storage.places import explained


class OpenInstances:
    """Their ids, in a file that is locked while its process lives. The next one in the folder takes
    over what a process has left that ended."""

    def __init__(self, folder: Path) -> None:
        """StoreError when the folder cannot be written."""
        self.ids = set[str]()
        with explained(folder, StoreError):
            folder.mkdir(parents=True, exist_ok=True)
            self._path = folder / uuid4().hex
            self._file = (folder / f".{self._path.name}").open("a", buffering=1)
            fcntl.flock(self._file, fcntl.LOCK_EX)
            Path(self._file.name).rename(self._path)  # nobody sees it without its lock
            for path in folder.glob("[!.]*"):
                self._take_over(path)

    def _take_over(self, path: Path) -> None:
        with suppress(FileNotFoundError, BlockingIOError), path.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            left = set[str]()
            for sign, instance in ((line[0], line[1:]) for line in file.read().split()):
                (left.add if sign == "+" else left.discard)(instance)
            for instance in left:
                self.add(instance)
            path.unlink()

    def add(self, instance: str) -> None:
        self.ids.add(instance)
        self._file.write(f"+{instance}\n")

    def cross_out(self, instance: str) -> None:
        self.ids.discard(instance)
        self._file.write(f"-{instance}\n")

    def close(self) -> None:
        if not self.ids:
            self._path.unlink(missing_ok=True)
        self._file.close()
