"""Partitions of several files: which files they are, and one version for all of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from modelcall_assets.errors import InputError
from modelcall_assets.storage.listing import FileInfo
from modelcall_assets.transforms.preprocessor import FileList, Grouping


def as_one(name: str, files: Sequence[FileInfo]) -> FileInfo:
    """A partition of these files, listed as if it were one, with the place of the first."""
    size = sum(file.size for file in files)
    return FileInfo(name, files[0].place, size, version_of(files))


def version_of(files: Sequence[FileInfo]) -> str:
    """Changes whenever one of them does, or which ones there are."""
    return digest_of_versions({file.uri: file.version for file in files})


def digest_of_versions(versions: Mapping[str, str]) -> str:
    return hashlib.sha256(repr(sorted(versions.items())).encode()).hexdigest()[:32]


def grouped(
    grouping: Grouping, files: Sequence[FileInfo], most: int | None
) -> dict[str, list[FileInfo]]:
    """The files of each partition. `most` files are shared among the partitions, one at least of
    each. InputError when the grouping names a file that is not there, or no partition at all."""
    by_path = {file.key_path: file for file in files}
    groups = _as_groups(grouping.get_file_list([*by_path]))
    for name, paths in groups.items():
        if not name.strip("/ ") or not paths:
            raise InputError(f"get_file_list: partition {name!r} has no name or no files")
        if absent := [path for path in paths if path not in by_path]:
            raise InputError(f"get_file_list: {name!r} has {absent[0]!r}, which is not there")
    share = None if most is None else max(1, most // max(1, len(groups)))
    return {name: [by_path[path] for path in paths[:share]] for name, paths in groups.items()}


def _as_groups(found: FileList) -> dict[str, Sequence[str]]:
    if isinstance(found, Mapping):
        return dict(found)
    return {path: [path] for path in found}
