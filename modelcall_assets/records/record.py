"""One input row, or the reason why a line is not one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line that could not be read; it keeps its place and its text."""

    detail: str
    raw: str


@dataclass(frozen=True, slots=True)
class Record:
    """A row with a stable id. `index` counts every line of the file from 0, bad ones too."""

    index: int
    id: str
    row: Row
