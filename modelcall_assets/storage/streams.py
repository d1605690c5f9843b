"""What lies under a file that is read or written, on this machine or in a store."""

from __future__ import annotations

import io
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

from modelcall_assets.storage.places import Place, RemotePath
from modelcall_assets.storage.trouble import explained, patiently

READ_BYTES = 8 << 20
WRITE_BYTES = 16 << 20
"""A part of a multipart upload; S3 takes 10,000."""


class StoreReader(io.RawIOBase):
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


class Target(Protocol):
    """Where a new file is gathered until it is committed."""

    def write(self, data: Any) -> None:
        """Any buffer; takes all of it."""
        ...

    def commit(self) -> None: ...

    def discard(self) -> None:
        """What was committed stays."""
        ...


def target_of(place: Place) -> Target:
    """Raises what the disk or store does."""
    if isinstance(place, Path):
        return _LocalTarget(place)
    return (_S3Target if place.store.is_s3 else _DriverTarget)(place)


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
        self._upload_id = None

    def discard(self) -> None:
        if self._upload_id is not None:
            self._call("abort_multipart_upload")
            self._upload_id = None

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
            with suppress(AttributeError):  # some have no such switch, and need none
                self._file.closed = True
            self._file.discard()


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
