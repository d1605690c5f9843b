"""What a kill leaves behind while a file is written: temporary files, uploads that never ended."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from modelcall_assets.errors import StoreError
from modelcall_assets.storage.files import delete
from modelcall_assets.storage.places import Place, RemotePath
from modelcall_assets.storage.trouble import explained

_TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.tmp")


@dataclass(frozen=True, slots=True)
class LeftOver:
    """Something to delete; what was written last has `modified`, Unix time."""

    name: str
    size: int
    modified: float
    delete: Callable[[], None]


def left_overs(folder: Place, before: float) -> Iterator[LeftOver]:
    """Those at any depth that nobody has written to since `before`. StoreError when a store does
    not answer."""
    if isinstance(folder, Path):
        found = _temporary_files(folder)
    else:
        found = _uploads(folder, before) if folder.store.is_s3 else iter(())
    return (each for each in found if each.modified < before)


def _temporary_files(folder: Path) -> Iterator[LeftOver]:
    for here, _, names in os.walk(folder):
        for path in (Path(here, name) for name in names if _TEMPORARY.fullmatch(name)):
            with suppress(FileNotFoundError):
                stat = path.stat()
                yield LeftOver(str(path), stat.st_size, stat.st_mtime, partial(delete, path))


def _uploads(folder: RemotePath, before: float) -> Iterator[LeftOver]:
    """Of those that were begun before it, by their newest part."""
    bucket, _, prefix = folder.key.partition("/")
    what = {"Bucket": bucket, "Prefix": f"{prefix}/" if prefix else ""}
    for page in _pages(folder, "list_multipart_uploads", what, ("KeyMarker", "UploadIdMarker")):
        for upload in page.get("Uploads", ()):
            if (begun := upload["Initiated"].timestamp()) < before:
                place = folder.at(f"{bucket}/{upload['Key']}")
                yield _upload(place, upload["UploadId"], begun)


def _upload(place: RemotePath, upload_id: str, begun: float) -> LeftOver:
    bucket, _, key = place.key.partition("/")
    which = {"Bucket": bucket, "Key": key, "UploadId": upload_id}
    size, modified = 0, begun
    with suppress(FileNotFoundError):
        for page in _pages(place, "list_parts", which, ("PartNumberMarker",)):
            for part in page.get("Parts", ()):
                size += part["Size"]
                modified = max(modified, part["LastModified"].timestamp())

    def abort() -> None:
        with explained(place, StoreError, "deleted"), suppress(FileNotFoundError):
            place.store.fs.call_s3("abort_multipart_upload", **which)

    return LeftOver(f"{place} (upload {upload_id[:12]})", size, modified, abort)


def _pages(
    place: RemotePath, method: str, what: Mapping[str, Any], markers: tuple[str, ...]
) -> Iterator[dict[str, Any]]:
    """The answers of a listing; FileNotFoundError when what is listed has ended meanwhile."""
    after: dict[str, Any] = {}
    while True:
        with explained(place, StoreError, "read", absent=FileNotFoundError):
            page = place.store.fs.call_s3(method, **what, **after)
        yield page
        if not page.get("IsTruncated"):
            return
        after = {marker: page[f"Next{marker}"] for marker in markers}
