"""Find, open and fingerprint input files; publish output files whole or not at all."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from uuid import uuid4

from modelcall_assets.errors import InputError

SUFFIXES = (".jsonl", ".parquet")
REMOTE_BUFFER_BYTES = 1 << 20
_STAMPS = ("mtime", "LastModified", "last_modified", "modified", "created")


@dataclass(frozen=True, slots=True)
class FileInfo:
    """One input file. `key_path` is relative to the listed root and uses `/`; `version` changes
    whenever the content does (the store's etag, else size and modification time)."""

    key_path: str
    uri: str
    size: int
    version: str


def list_inputs(root: str, pattern: str = "*", exclude: Sequence[str] = ()) -> list[FileInfo]:
    """Every JSONL and Parquet file under `root`, sorted by `key_path`.

    `pattern` must match the relative path or the file name. Hidden names are skipped, and so is all
    that lies under a folder of `exclude`. InputError when `root` is missing or unreadable.
    """
    walk = _walk_local if is_local(root) else _walk_remote
    with explained(root):
        found = [info for info in walk(root, exclude) if _wanted(info.key_path, pattern)]
    return sorted(found, key=lambda info: info.key_path)


def list_files(root: str) -> list[FileInfo]:
    """Every file under `root` whatever its kind, sorted by `key_path`; hidden names are skipped.
    InputError when `root` is missing or unreadable."""
    walk = _walk_local if is_local(root) else _walk_remote
    with explained(root):
        found = [info for info in walk(root, ()) if not _is_hidden(info.key_path)]
    return sorted(found, key=lambda info: info.key_path)


def matches(key_path: str, pattern: str) -> bool:
    """Whether the glob fits the whole relative path, or the file name alone."""
    return fnmatchcase(key_path, pattern) or fnmatchcase(key_path.rsplit("/", 1)[-1], pattern)


def stat_file(uri: str) -> FileInfo:
    """Size and version of one file; `key_path` is its name. InputError when it is missing."""
    with explained(uri):
        if is_local(uri):
            path = _local(uri)
            return _local_info(path.name, path)
        fs, path = _remote(uri)
        fs.invalidate_cache(fs._parent(path))
        return _remote_info(fs, path.rsplit("/", 1)[-1], path, fs.info(path))


def file_digest(uri: str) -> str:
    """`sha256:<hex>` of the content, streamed."""
    with open_input(uri) as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


@contextmanager
def open_input(uri: str) -> Iterator[io.BufferedReader]:
    """The file, open for reading bytes; whatever the store raises becomes an InputError."""
    with explained(uri):
        if is_local(uri):
            with _local(uri).open("rb") as file:
                yield file
            return
        fs, path = _remote(uri)
        with io.BufferedReader(fs.open(path, "rb"), REMOTE_BUFFER_BYTES) as file:
            yield file


@contextmanager
def publish(path: str | Path) -> Iterator[str]:
    """Yield a temporary path to write to; on success it replaces `path`, on an exception it goes.

    Creates the folder. The temporary name starts with a dot, so that no listing sees it.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{uuid4().hex}.tmp"
    try:
        yield str(temporary)
        _sync(temporary)
        temporary.replace(target)
        _sync(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: str | Path, data: bytes) -> None:
    """Publish `data` as the whole content of `path`."""
    with publish(path) as temporary:
        Path(temporary).write_bytes(data)


def is_local(uri: str) -> bool:
    return "://" not in uri or uri.startswith("file://")


@contextmanager
def explained(uri: str) -> Iterator[None]:
    """Turn what a store raises into an InputError that names `uri`."""
    try:
        yield
    except FileNotFoundError as error:
        raise InputError(f"{uri}: not found; correct the path or put the data there") from error
    except _store_errors(uri) as error:
        raise InputError(f"{uri}: cannot be read: {error}") from error


def _store_errors(uri: str) -> tuple[type[Exception], ...]:
    if is_local(uri):
        return (OSError,)
    from botocore.exceptions import BotoCoreError  # a dead endpoint is not an OSError

    return (OSError, BotoCoreError)


def _wanted(key_path: str, pattern: str) -> bool:
    return (
        key_path.lower().endswith(SUFFIXES)
        and not _is_hidden(key_path)
        and matches(key_path, pattern)
    )


def _is_hidden(key_path: str) -> bool:
    return any(part.startswith(".") for part in key_path.split("/"))


def _walk_local(root: str, exclude: Sequence[str]) -> Iterator[FileInfo]:
    """Linked files count, linked folders are not entered, dangling links are passed over."""
    top = _local(root)
    excluded = {_local(folder).resolve() for folder in exclude if is_local(folder)}
    for folder, folders, names in os.walk(top, onerror=_raise):
        here = Path(folder)
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and (here / name).resolve() not in excluded
        ]
        for path in (here / name for name in names):
            if path.is_file():
                yield _local_info(path.relative_to(top).as_posix(), path)


def _raise(error: OSError) -> None:
    raise error


def _walk_remote(root: str, exclude: Sequence[str]) -> Iterator[FileInfo]:
    fs, top = _remote(root)
    excluded = tuple(_remote(folder)[1] + "/" for folder in exclude if not is_local(folder))
    fs.invalidate_cache()
    if not fs.exists(top):
        raise FileNotFoundError(root)
    for path, details in fs.find(top, detail=True).items():
        if not path.startswith(excluded):
            yield _remote_info(fs, path.removeprefix(top).lstrip("/"), path, details)


def _local(uri: str) -> Path:
    return Path(uri.removeprefix("file://")).absolute()


def _remote(uri: str) -> tuple[Any, str]:
    import fsspec

    try:
        fs = fsspec.filesystem(uri.split("://", 1)[0])
    except (ImportError, ValueError) as error:
        raise InputError(f"{uri}: no driver for this kind of store: {error}") from error
    return fs, fs._strip_protocol(uri).rstrip("/")


def _local_info(key_path: str, path: Path) -> FileInfo:
    stat = path.stat()
    return FileInfo(key_path, str(path), stat.st_size, f"{stat.st_size}-{stat.st_mtime_ns}")


def _remote_info(fs: Any, key_path: str, path: str, details: dict[str, Any]) -> FileInfo:
    size = int(details["size"])
    etag = details.get("ETag") or details.get("etag")
    stamp = next((details[name] for name in _STAMPS if name in details), "")
    stamp = stamp.timestamp() if isinstance(stamp, datetime) else stamp
    version = str(etag).strip('"') if etag else f"{size}-{stamp}"
    return FileInfo(key_path, fs.unstrip_protocol(path), size, version)


def _sync(path: Path) -> None:
    """fsync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
