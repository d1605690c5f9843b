"""Find, open and fingerprint files; write files that appear whole or not at all."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, cast
from uuid import uuid4

from modelcall_assets.errors import StoreError
from modelcall_assets.storage.listing import FileInfo, in_pages, walk
from modelcall_assets.storage.places import Place, RemotePath
from modelcall_assets.storage.trouble import explained

READ_BYTES = 8 << 20
WRITE_BYTES = 16 << 20
"""A part of a multipart upload; S3 takes 10,000."""
DATA_SUFFIXES = (".jsonl", ".parquet")


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


def list_files(root: Place) -> list[FileInfo]:
    """Every file under `root` whatever its kind, sorted by `key_path`; hidden names are skipped.
    InputError when `root` is missing or unreadable."""
    with explained(root):
        found = [info for info in walk(root) if not _is_hidden(info.key_path)]
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
    with explained(place, StoreError):
        return bool(place.store.fs.exists(place.key))


def file_digest(place: Place) -> str:
    """`sha256:<hex>` of the content, streamed."""
    with open_input(place) as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


@contextmanager
def open_input(place: Place, *, at_random: bool = False) -> Iterator[io.BufferedReader]:
    """The file, open for reading bytes; whatever the store raises becomes an InputError.
    `at_random` is for readers that know which parts they want, and how to gather them."""
    with explained(place):
        if isinstance(place, Path):
            with place.open("rb") as file:
                yield file
            return
        cache = "none" if at_random else "readahead"
        remote = place.store.fs.open(place.key, "rb", block_size=READ_BYTES, cache_type=cache)
        with io.BufferedReader(remote, 64 << 10 if at_random else 1 << 20) as file:
            yield file


def read_bytes(place: Place) -> bytes:
    """FileNotFoundError when there is no file, StoreError when it cannot be read."""
    if isinstance(place, Path):
        return place.read_bytes()
    with explained(place, StoreError, absent=FileNotFoundError):
        return cast("bytes", place.store.fs.cat_file(place.key))


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
    with explained(place, StoreError), suppress(FileNotFoundError):
        place.store.fs.rm_file(place.key)


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
            self._target: _Target = (
                _LocalTarget(place) if isinstance(place, Path) else _RemoteTarget(place)
            )

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


class _Target(Protocol):
    def write(self, data: Any) -> None: ...

    def commit(self) -> None: ...

    def discard(self) -> None:
        """What was committed stays."""
        ...


class _LocalTarget:
    """The temporary name starts with a dot, so that no listing sees it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = path.parent / f".{uuid4().hex}.tmp"
        self._file = self._temporary.open("xb", 0)

    def write(self, data: Any) -> None:
        view = memoryview(data).cast("B")
        while view:
            view = view[self._file.write(view) :]

    def commit(self) -> None:
        os.fsync(self._file.fileno())
        self._file.close()
        self._temporary.replace(self._path)
        _sync_folder(self._path.parent)

    def discard(self) -> None:
        self._file.close()
        self._temporary.unlink(missing_ok=True)


class _RemoteTarget:
    """A multipart upload, where the store has such."""

    def __init__(self, place: RemotePath) -> None:
        self._file: Any = place.store.fs.open(
            place.key, "wb", block_size=WRITE_BYTES, autocommit=False
        )
        self._ended = False

    def write(self, data: Any) -> None:
        self._file.write(bytes(data))

    def commit(self) -> None:
        self._file.close()
        self._file.commit()
        self._ended = True

    def discard(self) -> None:
        if not self._ended:
            self._ended = True
            self._file.closed = True
            self._file.discard()


def stem_of(name: str) -> str:
    """A data file's name without the suffixes that say what it is."""
    return next((name[: -len(end)] for end in DATA_SUFFIXES if name.lower().endswith(end)), name)


def _wanted(key_path: str, pattern: str) -> bool:
    return (
        key_path.lower().endswith(DATA_SUFFIXES)
        and not _is_hidden(key_path)
        and matches(key_path, pattern)
    )


def _is_hidden(key_path: str) -> bool:
    return any(part.startswith(".") for part in key_path.split("/"))


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
