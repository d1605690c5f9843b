"""What a kill leaves behind while a file is written: temporary files, uploads that never ended,
claims of processes that are dead."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from modelcall_assets.errors import StoreError
from modelcall_assets.storage.files import delete
from modelcall_assets.storage.places import Place, RemotePath
from modelcall_assets.storage.trouble import explained

_TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.tmp")
_CLAIM = re.compile(r".*\.claim\.\d+")


@dataclass(frozen=True, slots=True)
class LeftOver:
    """Something to delete; what was written last has `modified`, Unix time."""

    name: str
    size: int
    modified: float
    delete: Callable[[], None]


def left_overs(folder: Place) -> Iterator[LeftOver]:
    """All at any depth, of living processes too. StoreError when a store does not answer."""
    if isinstance(folder, Path):
        yield from _temporary_files(folder)
    else:
        with explained(folder, StoreError):
            yield from _claims(folder)
            if folder.store.is_s3:
                yield from _uploads(folder)


def _temporary_files(folder: Path) -> Iterator[LeftOver]:
    for here, _, names in os.walk(folder):
        for path in (Path(here, name) for name in names if _TEMPORARY.fullmatch(name)):
            stat = path.stat()
            yield LeftOver(str(path), stat.st_size, stat.st_mtime, partial(delete, path))


def _claims(folder: RemotePath) -> Iterator[LeftOver]:
    for key, details in folder.store.fs.find(folder.key, detail=True).items():
        if _CLAIM.fullmatch(key):
            place, modified = folder.at(key), details.get("LastModified")
            when = modified.timestamp() if modified is not None else 0.0
            yield LeftOver(str(place), details["size"], when, partial(delete, place))


def _uploads(folder: RemotePath) -> Iterator[LeftOver]:
    """Their size is not known: it would take a request for each."""
    fs, (bucket, _, prefix) = folder.store.fs, folder.key.partition("/")
    marker: dict[str, str] = {}
    while True:
        page = fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=f"{prefix}/", **marker)
        for upload in page.get("Uploads", ()):
            key, upload_id = upload["Key"], upload["UploadId"]
            abort = partial(
                fs.call_s3, "abort_multipart_upload", Bucket=bucket, Key=key, UploadId=upload_id
            )
            name = f"{folder.at(f'{bucket}/{key}')} (upload)"
            yield LeftOver(name, 0, upload["Initiated"].timestamp(), abort)
        if not page.get("IsTruncated"):
            return
        marker = {
            "KeyMarker": page["NextKeyMarker"],
            "UploadIdMarker": page["NextUploadIdMarker"],
        }
