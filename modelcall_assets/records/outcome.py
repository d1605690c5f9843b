"""One record: its row, or why a line is none, and what became of it: never an exception."""

import base64
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from modelcall_assets.errors import InputError

Row = dict[str, Any]
INT64 = range(-(2**63), 2**63)


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


def short(text: str) -> str:
    """The beginning of what stands in the user's data, as messages quote it."""
    return text if len(text) <= 100 else f"{text[:100]}…"


def count_of(number: int, what: str) -> str:
    """`1 file`, `2,000 files`."""
    return f"{number:,} {what}{'s' * (number != 1)}"


def text_of_bytes(value: bytes) -> str:
    """The UTF-8 text that they are, else base64."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return base64.b64encode(value).decode()


def moved_names(theirs: Iterable[str], ours: Iterable[str]) -> dict[str, str]:
    """New names for columns of a file that are called like ours: `input_<name>`, with one more
    `input_` for as long as that is taken. The order of the columns makes no difference."""
    theirs, ours = {*theirs}, {*ours}
    taken, moved = theirs | ours, dict[str, str]()
    for name in sorted(theirs & ours):
        free = name
        while free in taken:
            free = f"input_{free}"
        taken.add(free)
        moved[name] = free
    return moved


class Reason(StrEnum):
    """Why a record failed. The value is what `api_fail_reason` holds."""

    BAD_LINE = "bad_line"
    PREPROCESS_ERROR = "preprocess_error"
    CHATML_ERROR = "chatml_error"
    SCORER_ERROR = "scorer_error"
    MISSING_INPUT = "missing_input"
    BAD_REQUEST = "bad_request"
    CONTEXT_LENGTH = "context_length"
    CONTENT_FILTER = "content_filter"
    REFUSED = "refused"
    TRUNCATED = "truncated"
    TOOL_CALLS = "tool_calls"
    EMPTY = "empty"
    NOT_AN_OBJECT = "not_an_object"
    MISSING_KEYS = "missing_keys"
    WRONG_VALUE = "wrong_value"
    RATE_LIMITED = "rate_limited"
    SERVER_ERROR = "server_error"
    TIMEOUT = "timeout"
    CONNECT = "connect"
    DROPPED = "dropped"
    INTERRUPTED = "interrupted"
    BAD_REPLY = "bad_reply"


NEVER_ASKED = frozenset(
    (
        Reason.BAD_LINE,
        Reason.PREPROCESS_ERROR,
        Reason.CHATML_ERROR,
        Reason.SCORER_ERROR,
        Reason.MISSING_INPUT,
    )
)
"""Of rows that no model is asked about."""


@dataclass(slots=True)
class Success:
    values: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Failure:
    """A typed reason and one sentence for people."""

    reason: Reason
    detail: str


class RowFailed(InputError):
    """What a row needs of a service is not to be had; the text is the detail of its failure."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.failure = Failure(reason, detail)


@dataclass(frozen=True, slots=True)
class Dropped:
    """The row was left out on purpose; `rule` is the option, with its item where it has several."""

    rule: str


Outcome = Success | Failure


def bad_line(line: BadLine) -> Failure:
    """What becomes of a line that is no row; its text is kept."""
    return Failure(Reason.BAD_LINE, f"{line.detail}; the line reads: {line.raw}")
