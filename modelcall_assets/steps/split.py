"""raw of a split: the files that make it, their content and their rows."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from modelcall_assets.storage.columns import MOST_ROWS, open_columns
from modelcall_assets.storage.files import file_digest
from modelcall_assets.storage.formats import Reading, format_of, numbered, open_lines
from modelcall_assets.storage.listing import FileInfo
from modelcall_assets.storage.places import Place
from modelcall_assets.storage.rows import read_rows


@dataclass(frozen=True, slots=True)
class SplitReport:
    """`members` have uri, digest, rows and size; `rows` leaves out blank lines."""

    members: tuple[dict[str, Any], ...]
    rows: int
    size: int
    data_version: str


def look_at_split(files: Sequence[FileInfo], reading: Reading) -> SplitReport:
    """InputError when a file cannot be read, or has a bad line and `reading` refuses those."""
    members = tuple(_member(file, reading) for file in files)
    content = repr([member["digest"] for member in members]).encode()
    return SplitReport(
        members=members,
        rows=sum(member["rows"] for member in members),
        size=sum(file.size for file in files),
        data_version=hashlib.sha256(content).hexdigest()[:32],
    )


def _member(file: FileInfo, reading: Reading) -> dict[str, Any]:
    rows, digest = _looked_at(file.place, reading)
    if reading.on_bad_line == "fail":
        rows = sum(1 for _ in read_rows(file.place, reading))
    return {"uri": file.uri, "digest": digest, "rows": rows, "size": file.size}


def _looked_at(place: Place, reading: Reading) -> tuple[int, str]:
    """Rows and digest, without parsing what has to be parsed once more anyway."""
    format_ = format_of(place)
    if format_.has_columns:
        with open_columns(place, format_) as columns:
            rows = sum(batch.num_rows for batch in columns.batches(MOST_ROWS, ()))
        return rows, file_digest(place)
    content = hashlib.sha256()
    with open_lines(place, format_, reading, content) as lines:
        rows = sum(not line.isspace() for _, line in numbered(lines))
    return rows, f"sha256:{content.hexdigest()}"
