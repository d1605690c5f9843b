"""One input row, or the reason why a line is not one."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]

SHOWN_CHARS = 100


class Number(str):
    """A number of JSON that 64 bits do not hold, as it was written."""

    __slots__ = ()


class Numbered(Row):
    """A row with such a number somewhere in it."""


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


def short(text: str) -> str:
    """What stands in the user's data, as messages quote it: its beginning."""
    return text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}…"


def text_of_bytes(value: bytes) -> str:
    """The UTF-8 text that they are, else base64."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return base64.b64encode(value).decode()


def moved_names(theirs: Iterable[str], ours: Iterable[str]) -> dict[str, str]:
    """New names for those columns of a file that are called like ours: `input_<name>`, with one
    more `input_` in front for as long as that is taken. The others keep theirs. The order of the
    columns makes no difference."""
    theirs, ours = {*theirs}, {*ours}
    taken, moved = theirs | ours, dict[str, str]()
    for name in sorted(theirs & ours):
        free = name
        while free in taken:
            free = f"input_{free}"
        taken.add(free)
        moved[name] = free
    return moved
