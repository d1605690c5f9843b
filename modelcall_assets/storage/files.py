"""Files as they are read and written: one that is written appears whole or not at all."""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast
from uuid import uuid4

from modelcall_assets.errors import StoreError
from modelcall_assets.storage.places import Place, RemotePath, explained, patiently

LINES_BYTES = 256 << 10
"""Read at once of a file from its beginning to its end."""
READ_BYTES = 8 << 20
"""Requested at once from a store."""
WRITE_BYTES = 16 << 20
"""A part of a multipart upload; S3 takes 10,000."""
BUSY_S, _RETRY_S = 60.0, 0.02
"""How long SQLite waits for another process, and between two looks of ours."""


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
    reader = _StoreReader(place, "none" if at_random else "readahead")
    with io.BufferedReader(reader, 64 << 10 if at_random else LINES_BYTES) as file:
        yield file


def read_bytes(place: Place) -> bytes:
    """FileNotFoundError when there is no file, StoreError when it cannot be read."""
    if isinstance(place, Path):
        return place.read_bytes()
    fs, one_request = place.store.fs, {"max_concurrency": 1} if place.store.is_s3 else {}
    with explained(place, StoreError, "read", may_be_absent=True):
        return cast("bytes", patiently(lambda: fs.cat_file(place.key, **one_request)))


def write_bytes(place: Place, data: bytes) -> None:
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
    """A file to write to; it becomes `place` when the block ends well, else nothing does."""
    with NewFile(place) as file:
        yield file
        file.commit()


def write_lines(out: NewFile, lines: Iterable[bytes]) -> None:
    block, size = list[bytes](), 0
    for line in lines:
        block.append(line)
        size += len(line)
        if size >= LINES_BYTES:
            out.write(b"".join(block))
            block, size = [], 0
    out.write(b"".join(block))


class NewFile(io.RawIOBase):
    """A file that nobody sees before `commit`, when it replaces what was there. Without that it is
    gone when it is closed. StoreError when it cannot be written. Folders are made."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.place = place
        self._content = hashlib.sha256()
        self._size, self._is_committed = 0, False
        with explained(place, StoreError):
            if isinstance(place, Path):
                self._target = _LocalTarget(place)
            else:
                self._target = (_S3Target if place.store.is_s3 else _DriverTarget)(place)

    @property
    def digest(self) -> str:
        return f"sha256:{self._content.hexdigest()}"

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._size

    def write(self, data: Any, /) -> int:
        self._content.update(data)
        with explained(self.place, StoreError):
            self._target.write(data)
        size = memoryview(data).nbytes
        self._size += size
        return size

    def commit(self) -> None:
        with explained(self.place, StoreError):
            self._target.commit()
        self._is_committed = True

    def close(self) -> None:
        if not self.closed:
            super().close()
            if not self._is_committed:
                with explained(self.place, StoreError):
                    self._target.discard()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Where something has gone wrong already, that is raised and no error of closing."""
        with suppress(*([] if kind is None else [StoreError])):
            self.close()


class _StoreReader(io.RawIOBase):
    """A file of a store. What the store raises becomes an InputError, also while it is read."""

    def __init__(self, place: RemotePath, cache: str) -> None:
        super().__init__()
        self._place = place
        self._file: Any = None
        with explained(place):
            self._file = place.store.fs.open(
                place.key, "rb", block_size=READ_BYTES, cache_type=cache
            )

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        with explained(self._place):
            data = patiently(lambda: self._file.read(len(buffer)))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        if not self.closed and self._file is not None:
            self._file.close()
        super().close()


class _LocalTarget:
    """The temporary name starts with a dot, so that no listing sees it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._temporary = path.parent / f".{uuid4().hex}.tmp"
        try:
            self._file = self._temporary.open("xb", 0)
        except FileNotFoundError:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._temporary.open("xb", 0)

    def write(self, data: Any) -> None:
        view = memoryview(data).cast("B")
        while view:
            view = view[self._file.write(view) :]

    def commit(self) -> None:
        os.fsync(self._file.fileno())
        self._file.close()
        self._temporary.replace(self._path)
        folder = os.open(self._path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def discard(self) -> None:
        self._file.close()
        self._temporary.unlink(missing_ok=True)


class _S3Target:
    """A multipart upload; of a small file one request."""

    def __init__(self, place: RemotePath) -> None:
        self._fs, self._path = place.store.fs, place.key
        bucket, _, key = place.key.partition("/")
        self._object = {"Bucket": bucket, "Key": key}
        self._waiting = bytearray()
        self._upload_id: str | None = None
        self._parts: list[dict[str, Any]] = []

    def write(self, data: Any) -> None:
        self._waiting += memoryview(data).cast("B")
        while len(self._waiting) > WRITE_BYTES:
            self._put_part()

    def commit(self) -> None:
        if self._upload_id is None:
            self._fs.pipe_file(self._path, bytes(self._waiting))
            return
        self._put_part()
        self._call("complete_multipart_upload", MultipartUpload={"Parts": self._parts})

    def discard(self) -> None:
        if self._upload_id is not None:
            self._call("abort_multipart_upload")

    def _put_part(self) -> None:
        if self._upload_id is None:
            made = self._fs.call_s3("create_multipart_upload", **self._object)
            self._upload_id = made["UploadId"]
        body, number = bytes(self._waiting[:WRITE_BYTES]), len(self._parts) + 1
        put = self._call("upload_part", PartNumber=number, Body=body)
        self._parts.append({"PartNumber": number, "ETag": put["ETag"]})
        del self._waiting[:WRITE_BYTES]

    def _call(self, method: str, **arguments: Any) -> Any:
        return self._fs.call_s3(method, **self._object, UploadId=self._upload_id, **arguments)


class _DriverTarget:
    """What the store's driver does for files that are not there before they are whole."""

    def __init__(self, place: RemotePath) -> None:
        self._file: Any = place.store.fs.open(
            place.key, "wb", block_size=WRITE_BYTES, autocommit=False
        )

    def write(self, data: Any) -> None:
        self._file.write(bytes(data))

    def commit(self) -> None:
        self._file.close()
        self._file.commit()

    def discard(self) -> None:
        with suppress(AttributeError):  # some have no such switch, and need none
            self._file.closed = True
        self._file.discard()


def write_ahead(connection: sqlite3.Connection) -> None:
    """Turn SQLite's write-ahead log on: two processes that do so at once get no timeout from it."""
    deadline = time.monotonic() + BUSY_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
        time.sleep(_RETRY_S)


P = ParamSpec("P")
T = TypeVar("T")


async def in_thread(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What `work` gives. Who is cancelled meanwhile goes on when it has ended: no thread can be
    stopped, and what it works on is to be there that long."""
    working = asyncio.ensure_future(asyncio.to_thread(work, *args, **kwargs))
    try:
        return await asyncio.shield(working)
    finally:
        await asyncio.wait([working])
