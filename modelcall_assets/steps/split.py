"""raw of a split: the files that make it, their content and their rows."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from modelcall_assets.storage.files import file_digest, open_input
from modelcall_assets.storage.listing import FileInfo
from modelcall_assets.storage.parquet import open_parquet
from modelcall_assets.storage.places import Place
from modelcall_assets.storage.rows import is_parquet, read_rows


@dataclass(frozen=True, slots=True)
class SplitReport:
    """`members` have uri, digest, rows and size; `rows` leaves out blank lines."""

    members: tuple[dict[str, Any], ...]
    rows: int
    size: int
    data_version: str


def look_at_split(files: Sequence[FileInfo]) -> SplitReport:
    """Reads every file once. InputError when one cannot be read."""
    members = tuple(
        {
            "uri": file.uri,
            "digest": file_digest(file.place),
            "rows": _rows(file.place),
            "size": file.size,
        }
        for file in files
    )
    content = repr([member["digest"] for member in members]).encode()
    return SplitReport(
        members=members,
        rows=sum(member["rows"] for member in members),
        size=sum(file.size for file in files),
        data_version=hashlib.sha256(content).hexdigest()[:32],
    )


def _rows(place: Place) -> int:
    """Without parsing what has to be parsed once more anyway."""
    if is_parquet(place):
        with open_parquet(place) as parquet:
            return parquet.metadata.num_rows
    if place.name.lower().endswith(".arrow"):
        return sum(1 for _ in read_rows(place))
    with open_input(place) as file:
        return sum(1 for line in file if line.strip())
