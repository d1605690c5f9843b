"""What became of one record: a Success, a Failure or Dropped, never an exception."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from modelcall_assets.records.record import BadLine


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


FORMAT_MISTAKES = frozenset(
    {Reason.EMPTY, Reason.NOT_AN_OBJECT, Reason.MISSING_KEYS, Reason.WRONG_VALUE}
)
"""Reasons that a repair turn can mend."""


@dataclass(slots=True)
class Success:
    """The parsed values, one per declared key."""

    values: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Failure:
    """A typed reason and one sentence for people."""

    reason: Reason
    detail: str


@dataclass(frozen=True, slots=True)
class Dropped:
    """The row was left out on purpose; `rule` is the option, with its item where it has several."""

    rule: str


Outcome = Success | Failure


def bad_line(line: BadLine) -> Failure:
    """What becomes of a line that is no row; its text is kept."""
    return Failure(Reason.BAD_LINE, f"{line.detail}; the line reads: {line.raw}")
