"""What lies under a folder, on this machine or in a store."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from modelcall_assets.storage.places import Place, RemotePath

_STAMPS = ("mtime", "LastModified", "last_modified", "modified", "created")


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
    def of_local(cls, key_path: str, path: Path) -> FileInfo:
        stat = path.stat()
        version = f"{stat.st_size}-{stat.st_mtime_ns}"
        return cls(key_path, path.absolute(), stat.st_size, version, stat.st_mtime)

    @classmethod
    def of_remote(cls, key_path: str, place: Place, details: Mapping[str, Any]) -> FileInfo:
        size = int(details.get("size", details.get("Size", 0)))
        etag = details.get("ETag") or details.get("etag")
        stamp = next((details[name] for name in _STAMPS if name in details), 0.0)
        modified = stamp.timestamp() if isinstance(stamp, datetime) else stamp
        version = str(etag).strip('"') if etag else f"{size}-{modified}"
        is_known = isinstance(modified, int | float)
        return cls(key_path, place, size, version, float(modified) if is_known else 0.0)


def walk(
    root: Place, exclude: Sequence[Place] = (), after: str = "", *, may_be_absent: bool = False
) -> Iterator[FileInfo]:
    """Every file, hidden ones in folders that are not hidden too. Where `in_pages` holds, in the
    order of their UTF-8 paths, and only those behind `after`. FileNotFoundError when there is no
    such folder, unless it `may_be_absent`."""
    if isinstance(root, Path):
        if may_be_absent and not root.exists():
            return iter(())
        return _walk_local(root, [each for each in exclude if isinstance(each, Path)])
    folders = [each for each in exclude if isinstance(each, RemotePath)]
    found = _walk_remote(root, tuple(f"{folder.key}/" for folder in folders), after)
    return found if may_be_absent or after else _not_absent(root, found)


def in_pages(root: Place) -> bool:
    """Whether a listing can begin in the middle."""
    return isinstance(root, RemotePath) and root.store.is_s3


def _walk_local(top: Path, exclude: Sequence[Path]) -> Iterator[FileInfo]:
    """Linked files count, linked folders are not entered, dangling links are passed over."""
    excluded = {folder.resolve() for folder in exclude}
    for folder, folders, names in os.walk(top, onerror=_raise):
        here = Path(folder)
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and (here / name).resolve() not in excluded
        ]
        for path in (here / name for name in names):
            if path.is_file():
                yield FileInfo.of_local(path.relative_to(top).as_posix(), path)


def _raise(error: OSError) -> None:
    raise error


def _walk_remote(root: RemotePath, exclude: tuple[str, ...], after: str) -> Iterator[FileInfo]:
    top = f"{root.key}/"
    for key, details in _objects_of(root, after) if root.store.is_s3 else _found(root):
        if not key.endswith("/") and not key.startswith(exclude):
            yield FileInfo.of_remote(key.removeprefix(top), root.at(key), details)


def _not_absent(root: RemotePath, found: Iterator[FileInfo]) -> Iterator[FileInfo]:
    first = next(found, None)
    if first is None:
        if not root.store.fs.exists(root.key):
            raise FileNotFoundError(str(root))
        return
    yield first
    yield from found


def _objects_of(root: RemotePath, after: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """A request for every 1,000 objects, without the entries of folders that fsspec makes up."""
    bucket, _, prefix = root.key.partition("/")
    prefix = f"{prefix}/" if prefix else ""
    where = {"StartAfter": f"{prefix}{after}"} if after else {}
    while True:
        page = root.store.fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, **where)
        for each in page.get("Contents", ()):
            yield f"{bucket}/{each['Key']}", each
        if not page.get("IsTruncated"):
            return
        where = {"ContinuationToken": page["NextContinuationToken"]}


def _found(root: RemotePath) -> Iterator[tuple[str, Mapping[str, Any]]]:
    root.store.fs.invalidate_cache()
    for path, details in root.store.fs.find(root.key, detail=True).items():
        yield path.lstrip("/"), details
