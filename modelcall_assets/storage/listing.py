"""What lies under a folder, on this machine or in a store: files, and what a kill leaves behind."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from errno import ELOOP, ENOENT, ENOTDIR
from fnmatch import fnmatchcase
from functools import partial
from itertools import islice, takewhile
from pathlib import Path
from stat import S_ISREG
from typing import Any, NamedTuple

from modelcall_assets.errors import InputError, StoreError
from modelcall_assets.records import is_data_file
from modelcall_assets.storage.files import delete
from modelcall_assets.storage.places import Place, RemotePath, explained, is_absent

_STAMPS = ("mtime", "LastModified", "last_modified", "modified", "created")
_TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.tmp")


@dataclass(frozen=True, slots=True)
class FileInfo:
    """One file. `key_path` is relative to the listed root and uses `/`; `version` changes whenever
    the content does (the store's etag, else size and modification time); `modified` is Unix time,
    0 where the store does not say."""

    key_path: str
    place: Place
    size: int
    version: str
    modified: float = 0.0

    @property
    def uri(self) -> str:
        return str(self.place)

    @classmethod
    def of_local(cls, key_path: str, path: Path, stat: os.stat_result) -> FileInfo:
        version = f"{stat.st_size}-{stat.st_mtime_ns}"
        return cls(key_path, path, stat.st_size, version, stat.st_mtime)

    @classmethod
    def of_remote(cls, key_path: str, place: Place, details: Mapping[str, Any]) -> FileInfo:
        size = int(details.get("size", details.get("Size", 0)))
        etag = details.get("ETag") or details.get("etag")
        stamp = next((details[name] for name in _STAMPS if name in details), 0.0)
        modified = stamp.timestamp() if isinstance(stamp, datetime) else stamp
        version = str(etag).strip('"') if etag else f"{size}-{modified}"
        is_known = isinstance(modified, int | float)
        return cls(key_path, place, size, version, float(modified) if is_known else 0.0)


def list_page(
    root: Place,
    pattern: str = "*",
    exclude: Sequence[Place] = (),
    after: str = "",
    most: int | None = None,
) -> tuple[list[FileInfo], str]:
    """Every data file under `root` whose relative path or name matches `pattern`, sorted by
    `key_path`. Hidden names are skipped, and so is all that lies under a folder of `exclude`. Where
    `in_pages` holds only those behind the path `after`, of `most` files of any kind; and the path
    where the next page begins, empty at the end. InputError when `root` is missing or unreadable.
    """
    most = most if in_pages(root) else None
    with explained(root):
        seen = list(islice(walk(root, exclude, after), most))
    data = (info for info in seen if is_data_file(info.key_path) and not _is_hidden(info.key_path))
    found = [info for info in data if matches(info.key_path, pattern)]
    last = seen[-1].key_path if len(seen) == most else ""
    return sorted(found, key=lambda info: info.key_path), last


def list_files(
    root: Place, exclude: Sequence[Place] = (), *, may_be_absent: bool = False
) -> list[FileInfo]:
    """Every file under `root`, of any kind, skipped and sorted as by `list_page`. InputError when
    `root` is unreadable, or missing unless it `may_be_absent`."""
    with explained(root):
        files = walk(root, exclude, may_be_absent=may_be_absent)
        found = [info for info in files if not _is_hidden(info.key_path)]
    return sorted(found, key=lambda info: info.key_path)


def matches(key_path: str, pattern: str) -> bool:
    """Whether the glob fits the whole relative path, or, without a slash at its start, the name."""
    if pattern.startswith("/"):
        return fnmatchcase(key_path, pattern[1:])
    return fnmatchcase(key_path, pattern) or fnmatchcase(key_path.rsplit("/", 1)[-1], pattern)


def stat_file(place: Place) -> FileInfo:
    """Size and version of one file; `key_path` is its name. InputError when it is missing."""
    with explained(place):
        if isinstance(place, Path):
            return FileInfo.of_local(place.name, place.absolute(), place.stat())
        details = place.store.fs.info(place.key)
        if details.get("type") == "directory":
            raise FileNotFoundError(str(place))
        return FileInfo.of_remote(place.name, place, details)


def find_file(place: Place) -> FileInfo | None:
    """As `stat_file`; None when it is missing."""
    try:
        return stat_file(place)
    except InputError as error:
        if is_absent(error):
            return None
        raise


def exists(place: Place) -> bool:
    """Whether there is a file. StoreError when that cannot be told."""
    if isinstance(place, Path):
        return place.exists()
    with explained(place, StoreError, "read"):
        return bool(place.store.fs.exists(place.key))


def beginning_with(folder: RemotePath, beginning: str) -> list[Place]:
    """The files of the folder itself with such names."""
    fitting = takewhile if in_pages(folder) else filter
    with explained(folder):
        found = walk(folder, after=beginning)
        begins = fitting(lambda info: info.key_path.startswith(beginning), found)
        return [info.place for info in begins if "/" not in info.key_path]


class LeftOver(NamedTuple):
    """Something to delete; what was written last has `modified`, Unix time."""

    name: str
    size: int
    modified: float
    delete: Callable[[], None]


def left_overs(folder: Place, before: float) -> Iterator[LeftOver]:
    """What a kill has left at any depth, last written to before `before`. StoreError."""
    found: Iterator[LeftOver] = iter(())
    if isinstance(folder, Path):
        found = _temporary_files(folder)
    elif folder.store.is_s3:
        found = _uploads(folder, before)
    return (each for each in found if each.modified < before)


def walk(
    root: Place, exclude: Sequence[Place] = (), after: str = "", *, may_be_absent: bool = False
) -> Iterator[FileInfo]:
    """Every file, hidden ones in folders that are not hidden too. Where `in_pages` holds, in the
    order of their UTF-8 paths, and only those behind `after`. FileNotFoundError when there is no
    such folder, unless it `may_be_absent`."""
    if isinstance(root, Path):
        if may_be_absent and not root.exists():
            return iter(())
        return _walk_local(root, exclude)
    return _walk_remote(root, exclude, after, may_be_absent)


def in_pages(root: Place) -> bool:
    """Whether a listing can begin in the middle."""
    return isinstance(root, RemotePath) and root.store.is_s3


def _walk_local(top: Path, exclude: Sequence[Place]) -> Iterator[FileInfo]:
    """Linked files count, linked folders are not entered, dangling links are passed over."""
    excluded = {folder.resolve() for folder in exclude if isinstance(folder, Path)}

    def refuse(error: OSError) -> None:
        raise error

    top = top.absolute()
    for folder, folders, names in os.walk(top, onerror=refuse):
        here = Path(folder)
        entered = (name for name in folders if not name.startswith("."))
        folders[:] = [name for name in entered if (here / name).resolve() not in excluded]
        parents = "" if here == top else f"{here.relative_to(top).as_posix()}/"
        for name in names:
            path = here / name
            try:
                stat = path.stat()
            except OSError as error:
                if error.errno not in (ENOENT, ENOTDIR, ELOOP):
                    raise
                continue
            if S_ISREG(stat.st_mode):
                yield FileInfo.of_local(f"{parents}{name}", path, stat)


def _walk_remote(
    root: RemotePath, exclude: Sequence[Place], after: str, may_be_absent: bool
) -> Iterator[FileInfo]:
    top, is_empty = f"{root.key}/", True
    excluded = tuple(f"{folder.key}/" for folder in exclude if isinstance(folder, RemotePath))
    if root.store.is_s3:
        found = _objects_of(root, after)
    else:
        root.store.fs.invalidate_cache()
        files = root.store.fs.find(root.key, detail=True)
        found = ((path.lstrip("/"), files[path]) for path in files)
    for key, details in found:
        if not key.endswith("/") and not key.startswith(excluded):
            is_empty = False
            yield FileInfo.of_remote(key.removeprefix(top), root.at(key), details)
    if is_empty and not (may_be_absent or after) and not root.store.fs.exists(root.key):
        raise FileNotFoundError(str(root))


def _objects_of(root: RemotePath, after: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """A request for every 1,000 objects, without the entries of folders that fsspec makes up."""
    which = _in_bucket(root)
    first = {"StartAfter": f"{which['Prefix']}{after}"} if after else {}
    for page in _pages(root, "list_objects_v2", which, ("ContinuationToken",), **first):
        for each in page.get("Contents", ()):
            yield f"{which['Bucket']}/{each['Key']}", each


def _is_hidden(key_path: str) -> bool:
    return key_path.startswith(".") or "/." in key_path


def _temporary_files(folder: Path) -> Iterator[LeftOver]:
    for here, _, names in os.walk(folder):
        for path in (Path(here, name) for name in names if _TEMPORARY.fullmatch(name)):
            with suppress(FileNotFoundError):
                stat = path.stat()
                yield LeftOver(str(path), stat.st_size, stat.st_mtime, partial(delete, path))


def _uploads(folder: RemotePath, before: float) -> Iterator[LeftOver]:
    """Those that were begun before it; their newest part says when they were written to."""
    which, markers = _in_bucket(folder), ("KeyMarker", "UploadIdMarker")
    with explained(folder, StoreError, "read", may_be_absent=True):
        for page in _pages(folder, "list_multipart_uploads", which, markers):
            for upload in page.get("Uploads", ()):
                if (begun := upload["Initiated"].timestamp()) < before:
                    place = folder.at(f"{which['Bucket']}/{upload['Key']}")
                    yield _upload(place, upload["UploadId"], begun)


def _upload(place: RemotePath, upload_id: str, begun: float) -> LeftOver:
    bucket, _, key = place.key.partition("/")
    which = {"Bucket": bucket, "Key": key, "UploadId": upload_id}
    size, modified = 0, begun
    with suppress(FileNotFoundError), explained(place, StoreError, "read", may_be_absent=True):
        for page in _pages(place, "list_parts", which, ("PartNumberMarker",)):
            for part in page.get("Parts", ()):
                size += part["Size"]
                modified = max(modified, part["LastModified"].timestamp())

    def abort() -> None:
        with explained(place, StoreError, "deleted"), suppress(FileNotFoundError):
            place.store.fs.call_s3("abort_multipart_upload", **which)

    return LeftOver(f"{place} (upload {upload_id[:12]})", size, modified, abort)


def _in_bucket(folder: RemotePath) -> dict[str, str]:
    bucket, _, prefix = folder.key.partition("/")
    return {"Bucket": bucket, "Prefix": f"{prefix}/" if prefix else ""}


def _pages(
    place: RemotePath,
    method: str,
    which: Mapping[str, str],
    markers: tuple[str, ...],
    **after: Any,
) -> Iterator[dict[str, Any]]:
    """The answers of a listing of S3's that begins `after` something."""
    while True:
        page = place.store.fs.call_s3(method, **which, **after)
        yield page
        if not page.get("IsTruncated"):
            return
        after = {marker: page[f"Next{marker}"] for marker in markers}
