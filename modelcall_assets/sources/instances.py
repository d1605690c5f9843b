"""Notes of what is open at a service, so that a kill leaves none behind: a file for each instance,
locked while its process lives."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from modelcall_assets.errors import StoreError
from modelcall_assets.storage.places import explained

CrossOut = Callable[[], None]


@contextmanager
def noted(folder: Path, instance: str) -> Iterator[CrossOut]:
    """StoreError when the folder cannot be written."""
    note, hidden = folder / instance, folder / f".{instance}"
    with ExitStack() as open_files:
        with explained(folder, StoreError):
            folder.mkdir(parents=True, exist_ok=True)
            fcntl.flock(open_files.enter_context(hidden.open("w")), fcntl.LOCK_EX)
            hidden.rename(note)  # nobody sees it without its lock
        yield note.unlink


@contextmanager
def of_the_dead(folder: Path) -> Iterator[Mapping[str, CrossOut]]:
    """Instances whose notes nobody holds; here they are held meanwhile."""
    with ExitStack() as open_files:
        found = dict[str, CrossOut]()
        for note in folder.glob("[!.]*"):
            with suppress(FileNotFoundError, BlockingIOError):
                file = open_files.enter_context(note.open())
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                found[note.name] = note.unlink
        yield found
