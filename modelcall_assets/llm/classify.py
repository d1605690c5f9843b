"""What a reply means for the request, by status and `error.code`; never by message text."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, cast

import orjson

from modelcall_assets.llm.transport import Reply
from modelcall_assets.records.outcome import Failure, Reason

QUOTA_CODES = frozenset({"insufficient_quota", "billing_hard_limit_reached", "access_terminated"})
CONTEXT_CODES = frozenset(
    {"context_length_exceeded", "exceed_context_size_error", "string_above_max_length"}
)
FILTER_CODES = frozenset({"content_filter", "content_policy_violation"})
RETRIED_STATUS = frozenset({408, 409, 425, 429})
REFUSED_STATUS = frozenset({401, 402, 403, 404, 405})
_DURATION_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|[smhd])")
_UNIT_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


@dataclass(slots=True)
class Answered:
    """A chat completion, parsed."""

    completion: dict[str, Any]


@dataclass(frozen=True, slots=True)
class TryAgain:
    """Nothing was answered; asking again may help, but not before `after_s` seconds."""

    failure: Failure
    after_s: float | None = None


@dataclass(frozen=True, slots=True)
class Refused:
    """The endpoint will answer nobody with this key and model."""

    detail: str


@dataclass(frozen=True, slots=True)
class BadRecord:
    """This request can never be answered; others can."""

    failure: Failure


Verdict = Answered | TryAgain | Refused | BadRecord


def classify(reply: Reply) -> Verdict:
    """Total over every status and body."""
    if reply.fault is not None:
        return TryAgain(Failure(reply.fault, reply.body.decode(errors="replace")))
    if 200 <= reply.status < 300:
        return _completion(reply)
    codes, message = _error(reply)
    detail = f"HTTP {reply.status}: {message}"
    if reply.status in REFUSED_STATUS or codes & QUOTA_CODES or 300 <= reply.status < 400:
        return Refused(detail)
    if reply.status == 429:
        after_s = retry_after(reply.headers)
        after_s = limit_reset(reply.headers) if after_s is None else after_s
        return TryAgain(Failure(Reason.RATE_LIMITED, detail), after_s)
    if reply.status in RETRIED_STATUS or reply.status >= 500:
        return TryAgain(Failure(Reason.SERVER_ERROR, detail), retry_after(reply.headers))
    if codes & CONTEXT_CODES:
        return BadRecord(Failure(Reason.CONTEXT_LENGTH, detail))
    if codes & FILTER_CODES:
        return BadRecord(Failure(Reason.CONTENT_FILTER, detail))
    return BadRecord(Failure(Reason.BAD_REQUEST, detail))


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait: `retry-after-ms`, else `Retry-After` (seconds or a date), else None."""
    if (milliseconds := headers.get("retry-after-ms")) is not None and (
        ms := _number(milliseconds)
    ):
        return ms / 1000
    if (value := headers.get("retry-after")) is not None:
        seconds = _number(value)
        return seconds if seconds is not None else _seconds_until(value)
    return None


def limit_reset(headers: Mapping[str, str]) -> float | None:
    """Seconds to the latest of `x-ratelimit-reset-*` (`1s`, `6m0s`, `20ms`). Servers send these
    with every reply, so they ask for a wait only beside a 429."""
    resets = [
        seconds
        for name in ("x-ratelimit-reset-requests", "x-ratelimit-reset-tokens")
        if (seconds := _duration(headers.get(name, ""))) is not None
    ]
    return max(resets, default=None)


def _completion(reply: Reply) -> Verdict:
    try:
        completion = orjson.loads(reply.body)
    except orjson.JSONDecodeError:
        return _bad_reply("the reply is not JSON", reply.body)
    if _has_message(completion):
        return Answered(completion)
    return _bad_reply("the reply has no choices[0].message", reply.body)


def _has_message(completion: Any) -> bool:
    try:
        return isinstance(completion["choices"][0]["message"], dict)
    except (TypeError, LookupError):
        return False


def _bad_reply(what: str, body: bytes) -> TryAgain:
    start = body[:200].decode(errors="replace")
    return TryAgain(Failure(Reason.BAD_REPLY, f"{what}; it starts with {start!r}"))


def _error(reply: Reply) -> tuple[set[str], str]:
    """The error's code and type, and its message, in the shapes servers use."""
    try:
        parsed: object = orjson.loads(reply.body.decode(errors="replace"))
    except orjson.JSONDecodeError:
        parsed = None
    if not isinstance(parsed, dict):
        return set(), reply.body[:500].decode(errors="replace")
    outer = cast("dict[str, Any]", parsed)
    nested = outer.get("error")
    error = cast("dict[str, Any]", nested) if isinstance(nested, dict) else outer
    codes = {str(error[name]) for name in ("code", "type") if error.get(name)}
    return codes, str(error.get("message") or cast("object", nested) or outer)[:1000]


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 <= value < float("inf") else None


def _seconds_until(date: str) -> float | None:
    try:
        return max(0.0, parsedate_to_datetime(date).timestamp() - time.time())
    except ValueError:
        return None


def _duration(text: str) -> float | None:
    """`1h2m3.5s` in seconds; a bare number is seconds."""
    parts = _DURATION_PART.findall(text)
    if "".join(number + unit for number, unit in parts) != text:
        return _number(text)
    return sum(float(number) * _UNIT_SECONDS[unit] for number, unit in parts) if parts else None
