"""What a reply means for the request, by status and `error.code`; never by message text."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any, cast

from modelcall_assets.llm.answer import Answer
from modelcall_assets.llm.error import ErrorSaid, error_in
from modelcall_assets.llm.message import NO_WHOLE_ANSWER, Ending, first_choice, parsed
from modelcall_assets.llm.stream import BOM, FILTER_RESULTS
from modelcall_assets.llm.transport import Reply
from modelcall_assets.records.outcome import Failure, Reason

RETRIED_STATUS = frozenset({408, 409, 425, 429})
REFUSED_STATUS = frozenset({401, 402})
FORBIDDEN_STATUS = frozenset({*range(300, 400), 403, 404, 405})
"""Said of the key, model or address, or of one record: by a web firewall, for one."""
BUSY_STATUS = frozenset({429, 502, 503, 504, 529})
_DURATION_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|[smhd])")
_UNIT_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


@dataclass(slots=True)
class Answered:
    """By a chat completion."""

    answer: Answer


@dataclass(frozen=True, slots=True)
class TryAgain:
    """Nothing was answered; asking again may help, but not before `after_s` seconds. `busy`: the
    endpoint has too much to do."""

    failure: Failure
    after_s: float | None = None
    busy: bool = False


@dataclass(frozen=True, slots=True)
class Refused:
    """The endpoint will answer nobody with this key and model; FORBIDDEN_STATUS may be of one
    `record` only, and then this is its Failure."""

    detail: str
    record: Failure | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class BadRecord:
    """This request can never be answered; others can."""

    failure: Failure


Verdict = Answered | TryAgain | Refused | BadRecord


def classify(reply: Reply) -> Verdict:
    """Total over every status and body."""
    if reply.fault is not None:
        return TryAgain(Failure(reply.fault, reply.body[:1000].decode(errors="replace")))
    if 200 <= reply.status < 300:
        return _completion(reply)
    error = error_in(parsed(reply.body.decode(errors="replace"))) or ErrorSaid(frozenset(), "")
    said = error.message or reply.body[:1000].decode(errors="replace")
    is_busy = error.status in BUSY_STATUS and reply.status not in REFUSED_STATUS
    status = error.status if is_busy and 400 <= reply.status < 500 else reply.status
    return _failed(status, error, f"HTTP {reply.status}: {said[:1000]}", reply.headers)


def _failed(status: int, error: ErrorSaid, detail: str, headers: Mapping[str, str]) -> Verdict:
    """Of an HTTP status, or of an error that means it."""
    if status in REFUSED_STATUS or error.is_quota or error.is_model:
        return Refused(detail)
    retried = status in RETRIED_STATUS or status >= 500
    if error.is_context and not retried:
        return BadRecord(Failure(Reason.CONTEXT_LENGTH, detail))
    if error.is_filter and not retried:
        return BadRecord(Failure(Reason.CONTENT_FILTER, detail))
    if retried:
        after_s = retry_after(headers)
        if status == 429 and after_s is None:
            after_s = limit_reset(headers)
        reason = Reason.RATE_LIMITED if status == 429 else Reason.SERVER_ERROR
        return TryAgain(Failure(reason, detail), after_s, status in BUSY_STATUS)
    failure = Failure(Reason.BAD_REQUEST, detail)
    return Refused(detail, failure) if status in FORBIDDEN_STATUS else BadRecord(failure)


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
    with every reply, so they ask for a wait only beside a 429. More than a day is
    some other number."""
    resets = [
        seconds
        for name in ("x-ratelimit-reset-requests", "x-ratelimit-reset-tokens")
        if (seconds := _duration(headers.get(name, ""))) is not None
        and seconds <= _UNIT_SECONDS["d"]
    ]
    return max(resets, default=None)


def _completion(reply: Reply) -> Verdict:
    body = parsed(reply.body.removeprefix(BOM))
    first = first_choice(body)
    if (error := error_in(body, first)) is not None:
        said = error.message or reply.body[:1000].decode(errors="replace")
        detail = f"HTTP {reply.status} with error {error.status}: {said[:1000]}"
        return _failed(error.status, error, detail, reply.headers)
    if first is None:
        return _without_choice(reply, body)
    answer = Answer.of(cast("dict[str, Any]", body), first)
    if answer.ending is Ending.INTERRUPTED:
        what = f"the endpoint ended the answer with finish_reason {answer.finish_reason!r:.100}"
        return TryAgain(Failure(Reason.INTERRUPTED, what), retry_after(reply.headers))
    if isinstance(first.get("message"), dict) or answer.ending in NO_WHOLE_ANSWER:
        return Answered(answer)
    return _bad_reply("the reply has no choices[0].message", reply.body)


def _without_choice(reply: Reply, body: object) -> Verdict:
    """Azure and Gemini leave out the choice that they filtered."""
    known = cast("dict[str, Any]", body) if isinstance(body, dict) else {}
    if any(known.get(name) for name in FILTER_RESULTS):
        what = "the endpoint filtered the request: filter results and no choice"
        return BadRecord(Failure(Reason.CONTENT_FILTER, what))
    what = "is not JSON" if body is None else "has no choices[0].message"
    return _bad_reply(f"the reply {what}", reply.body)


def _bad_reply(what: str, body: bytes) -> TryAgain:
    start = body[:200].decode(errors="replace")
    return TryAgain(Failure(Reason.BAD_REPLY, f"{what}; it starts with {start!r}"))


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 <= value < float("inf") else None


def _seconds_until(date: str) -> float | None:
    try:
        return max(0.0, parsedate_to_datetime(date).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def _duration(text: str) -> float | None:
    """`1h2m3.5s` in seconds; a bare number is seconds."""
    parts = _DURATION_PART.findall(text)
    if "".join(number + unit for number, unit in parts) != text:
        return _number(text)
    return sum(float(number) * _UNIT_SECONDS[unit] for number, unit in parts) if parts else None
