"""Find, open and fingerprint files; write files that appear whole or not at all."""

from __future__ import annotations

import glob
import hashlib
import io
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from itertools import islice, takewhile
from pathlib import Path
from types import TracebackType
from typing import Any, cast

from modelcall_assets.errors import StoreError
from modelcall_assets.records.data_files import is_data_file
from modelcall_assets.storage.listing import FileInfo, in_pages, walk
from modelcall_assets.storage.places import Place
from modelcall_assets.storage.streams import StoreReader, target_of
from modelcall_assets.storage.trouble import explained, patiently

LINES_BYTES = 256 << 10
"""Read at once of a file from its beginning to its end."""


def list_inputs(root: Place, pattern: str = "*", exclude: Sequence[Place] = ()) -> list[FileInfo]:
    """Every data file under `root`, sorted by `key_path`.

    `pattern` must match the relative path or the file name. Hidden names are skipped, and so is all
    that lies under a folder of `exclude`. InputError when `root` is missing or unreadable.
    """
    return list_page(root, pattern, exclude)[0]


def list_page(
    root: Place,
    pattern: str = "*",
    exclude: Sequence[Place] = (),
    after: str = "",
    most: int | None = None,
) -> tuple[list[FileInfo], str]:
    """`list_inputs` behind the path `after`, of `most` files of any kind where `in_pages` holds;
    with the path where the next page begins, which is empty at the end."""
    most = most if in_pages(root) else None
    with explained(root):
        seen = list(islice(walk(root, exclude, after), most))
    found = [info for info in seen if _wanted(info.key_path, pattern)]
    last = seen[-1].key_path if len(seen) == most else ""
    return sorted(found, key=lambda info: info.key_path), last


def list_files(
    root: Place, exclude: Sequence[Place] = (), *, may_be_absent: bool = False
) -> list[FileInfo]:
    """Every file under `root` whatever its kind, sorted by `key_path`; hidden names are skipped,
    and so is all under a folder of `exclude`. InputError when `root` is unreadable, or missing
    unless it `may_be_absent`."""
    with explained(root):
        files = walk(root, exclude, may_be_absent=may_be_absent)
        found = [info for info in files if not _is_hidden(info.key_path)]
    return sorted(found, key=lambda info: info.key_path)


def matches(key_path: str, pattern: str) -> bool:
    """Whether the glob fits the whole relative path, or the file name alone."""
    return fnmatchcase(key_path, pattern) or fnmatchcase(key_path.rsplit("/", 1)[-1], pattern)


def stat_file(place: Place) -> FileInfo:
    """Size and version of one file; `key_path` is its name. InputError when it is missing."""
    with explained(place):
        if isinstance(place, Path):
            return FileInfo.of_local(place.name, place)
        details = place.store.fs.info(place.key)
        if details.get("type") == "directory":
            raise FileNotFoundError(str(place))
        return FileInfo.of_remote(place.name, place, details)


def exists(place: Place) -> bool:
    """Whether there is a file. StoreError when that cannot be told."""
    if isinstance(place, Path):
        return place.exists()
    with explained(place, StoreError, "read"):
        return bool(place.store.fs.exists(place.key))


def beside(place: Place, beginning: str) -> list[Place]:
    """The files in the folder of `place` whose names begin so."""
    folder = place.parent
    if isinstance(folder, Path):
        return [*folder.glob(f"{glob.escape(beginning)}*")]
    with explained(folder):
        found = walk(folder, after=beginning)
        begins = (takewhile if in_pages(folder) else filter)(
            lambda info: info.key_path.startswith(beginning), found
        )
        return [info.place for info in begins if "/" not in info.key_path]


def file_digest(place: Place) -> str:
    """`sha256:<hex>` of the content, streamed."""
    with open_input(place) as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


@contextmanager
def open_input(place: Place, *, at_random: bool = False) -> Iterator[io.BufferedReader[Any]]:
    """The file, open for reading bytes; whatever the store raises becomes an InputError.
    `at_random` is for readers that know which parts they want, and how to gather them."""
    if isinstance(place, Path):
        size = io.DEFAULT_BUFFER_SIZE if at_random else LINES_BYTES
        with explained(place), io.BufferedReader(io.FileIO(place), size) as file:
            yield file
        return
    reader = StoreReader(place, "none" if at_random else "readahead")
    with io.BufferedReader(reader, 64 << 10 if at_random else LINES_BYTES) as file:
        yield file


def read_bytes(place: Place) -> bytes:
    """FileNotFoundError when there is no file, StoreError when it cannot be read."""
    if isinstance(place, Path):
        return place.read_bytes()
    fs, one_request = place.store.fs, {"max_concurrency": 1} if place.store.is_s3 else {}
    with explained(place, StoreError, "read", absent=FileNotFoundError):
        return cast("bytes", patiently(lambda: fs.cat_file(place.key, **one_request)))


def write_bytes(place: Place, data: bytes) -> None:
    """Publish `data` as the whole content of `place`."""
    if isinstance(place, Path):
        with publish(place) as out:
            out.write(data)
        return
    with explained(place, StoreError):
        place.store.fs.pipe_file(place.key, data)


def delete(place: Place) -> None:
    """Nothing happens when it is gone already."""
    if isinstance(place, Path):
        place.unlink(missing_ok=True)
        return
    with explained(place, StoreError, "deleted"), suppress(FileNotFoundError):
        place.store.fs.rm_file(place.key)


def copy(source: Place, target: Place) -> None:
    """InputError when the one cannot be read, StoreError when the other cannot be written."""
    with open_input(source) as file, publish(target) as out:
        shutil.copyfileobj(file, out)


@contextmanager
def publish(place: Place) -> Iterator[NewFile]:
    """A file to write to; on success it becomes `place`, after an exception nothing does."""
    with NewFile(place) as file:
        yield file
        file.commit()


class NewFile(io.RawIOBase):
    """A file that nobody sees before `commit`, when it replaces what was there. Without that it is
    gone when it is closed. StoreError when it cannot be written. Folders are made."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.place = place
        self._content = hashlib.sha256()
        self._size = 0
        with explained(place, StoreError):
            self._target = target_of(place)

    @property
    def digest(self) -> str:
        """`sha256:<hex>` of what was written so far."""
        return f"sha256:{self._content.hexdigest()}"

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._size

    def write(self, data: Any, /) -> int:
        """Takes all of it."""
        self._content.update(data)
        with explained(self.place, StoreError):
            self._target.write(data)
        size = memoryview(data).nbytes
        self._size += size
        return size

    def commit(self) -> None:
        with explained(self.place, StoreError):
            self._target.commit()

    def close(self) -> None:
        if not self.closed:
            super().close()
            with explained(self.place, StoreError):
                self._target.discard()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Where something has gone wrong already, that is what is told."""
        if error is None:
            self.close()
            return
        with suppress(StoreError):
            self.close()


def _wanted(key_path: str, pattern: str) -> bool:
    return is_data_file(key_path) and not _is_hidden(key_path) and matches(key_path, pattern)


def _is_hidden(key_path: str) -> bool:
    return any(part.startswith(".") for part in key_path.split("/"))
