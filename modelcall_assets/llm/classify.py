"""What a reply means for the request, by status and `error.code`, never by message text."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime

from modelcall_assets.llm.completion import NO_WHOLE_ANSWER, Answer, Ending, ending_of, first_choice
from modelcall_assets.llm.json_text import BOM, Json, JsonValue, as_object, parsed
from modelcall_assets.records.outcome import Failure, Reason

RETRIED_STATUS = frozenset({408, 409, 425, 429})
REFUSED_STATUS = frozenset({401, 402})
FORBIDDEN_STATUS = frozenset({*range(300, 400), 403, 404, 405})
"""Said of the key, model or address, or of one record: by a web firewall, for one."""
BUSY_STATUS = frozenset({429, 502, 503, 504, 529})
_DURATION_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|[smhd])")
_UNIT_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}

FILTER_RESULTS = ("prompt_filter_results", "content_filter_results", "prompt_feedback")
"""What a reply without a choice has when its request was filtered."""
QUOTA_CODES = frozenset((
    "insufficient_quota", "insufficient_user_quota", "quota_exceeded", "usage_limit_reached",
    "billing_hard_limit_reached", "access_terminated", "insufficient_balance",
    "insufficient_credits", "billing_not_active", "account_deactivated", "arrearage",
    "exceeded_current_quota_error", "1113",
))  # fmt: skip
_CONTEXT = re.compile(
    r"context_?(length|window|size|limit)|(prompt|input|message|request)\w*_too_(long|large)"
    r"|string_above_max_length|tokens_limit_reached|too_many_tokens|^1261$"
)
_FILTER = re.compile(
    r"content_?(filter|policy|block|safety)|moderat|inspection_?failed|sensitive|policy_?violation"
    r"|flagged|prohibited_content|guardrail|safety|^1301$"
)
_OVERLOADED = r"overload|unavailable|insufficient_system_resource|no_capacity|capacity_exceeded"
_STATUS = (
    (429, re.compile(r"rate_?limit|too_?many_?requests|throttl|resource_?exhausted|^130[235]$")),
    (503, re.compile(_OVERLOADED)),
    (404, re.compile(r"model_?not_?found|^not_found(_error)?$")),
    (401, re.compile(r"invalid_api_key|authenticat|unauthori")),
    (403, re.compile(r"permission|forbidden|access_?denied")),
    (400, re.compile(r"invalid_?(request|argument|parameter)|bad_request|_not_found$")),
)
"""Of codes that stand for an HTTP status, the first that fits; each from a provider's list."""
_CODES = ("code", "type", "status", "error_code", "errorCode", "status_code")
_NUMBERS = {
    "status_code": {  # of MiniMax, in `base_resp`
        "1002": "rate_limit", "1004": "unauthorized", "1008": "insufficient_balance",
        "1026": "content_filter", "1027": "content_filter", "1039": "rate_limit",
        "1041": "rate_limit", "2013": "invalid_parameter", "2049": "invalid_api_key",
    },
    "error_code": {  # of Baidu
        "4": "rate_limit", "17": "quota_exceeded", "18": "rate_limit", "19": "quota_exceeded",
        "110": "unauthorized", "111": "unauthorized",
    },
}  # fmt: skip
"""What a number means depends on the field that it stands in."""
_NO_ERROR = frozenset({"200", "ok", "success", "none", "null"})
_MESSAGES = ("message", "msg", "detail", "error_msg", "status_msg")


@dataclass(slots=True)
class Reply:
    """What came back; `headers` knows names in lower case. With `fault` set nothing did: status
    is 0 and `body` says what happened."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    fault: Reason | None = None
    sent: int = 1
    """How often the request went out: twice when a kept connection turned out to be closed."""


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


Said = Answer | Failure
"""What counts for the record: an answer, or that this request can never be answered."""
Verdict = Said | TryAgain | Refused


@dataclass(slots=True)
class Exchange:
    """A reply that counts, and what it took."""

    reply: Reply
    said: Said
    attempts: int
    latency_ms: int
    endpoint: str


@dataclass(frozen=True, slots=True)
class GaveUp:
    """No reply that counts, and no retries left."""

    failure: Failure
    attempts: int
    endpoint: str


def classify(reply: Reply) -> Verdict:
    """Total over every status and body."""
    if not 200 <= reply.status < 300:
        return _without_answer(reply)
    body = parsed(reply.body.removeprefix(BOM))
    first = first_choice(body)
    if (error := error_in(body, first)) is not None:
        said = error.message or reply.body[:1000].decode(errors="replace")
        detail = f"HTTP {reply.status} with error {error.status}: {said[:1000]}"
        return _failed(error.status, error, detail, reply.headers)
    if first is not None:
        answer = Answer.of(body, first)
        if answer.ending is Ending.INTERRUPTED:
            reason = answer.finish_reason
            what = f"the endpoint ended the answer with finish_reason {reason!r:.100}"
            return TryAgain(Failure(Reason.INTERRUPTED, what), retry_after(reply.headers))
        if isinstance(first.get("message"), dict) or answer.ending in NO_WHOLE_ANSWER:
            return answer
    elif any(as_object(body).get(name) for name in FILTER_RESULTS):  # Azure and Gemini
        what = "the endpoint filtered the request: filter results and no choice"
        return Failure(Reason.CONTENT_FILTER, what)
    what = "is not JSON" if body is None else "has no choices[0].message"
    start = reply.body[:200].decode(errors="replace")
    return TryAgain(Failure(Reason.BAD_REPLY, f"the reply {what}; it starts with {start!r}"))


def _without_answer(reply: Reply) -> Verdict:
    start = reply.body[:1000].decode(errors="replace")
    if reply.fault is not None:
        return TryAgain(Failure(reply.fault, start))
    error = error_in(parsed(reply.body.decode(errors="replace"))) or ErrorSaid(frozenset(), "")
    is_busy = error.status in BUSY_STATUS and reply.status not in REFUSED_STATUS
    status = error.status if is_busy and 400 <= reply.status < 500 else reply.status
    detail = f"HTTP {reply.status}: {(error.message or start)[:1000]}"
    return _failed(status, error, detail, reply.headers)


def _failed(status: int, error: ErrorSaid, detail: str, headers: Mapping[str, str]) -> Verdict:
    if status in REFUSED_STATUS or error.is_refusal:
        return Refused(detail)
    if status in RETRIED_STATUS or status >= 500:
        after_s = retry_after(headers)
        if status == 429 and after_s is None:
            after_s = limit_reset(headers)
        reason = Reason.RATE_LIMITED if status == 429 else Reason.SERVER_ERROR
        return TryAgain(Failure(reason, detail), after_s, status in BUSY_STATUS)
    if error.is_context:
        return Failure(Reason.CONTEXT_LENGTH, detail)
    if error.is_filter:
        return Failure(Reason.CONTENT_FILTER, detail)
    failure = Failure(Reason.BAD_REQUEST, detail)
    return Refused(detail, failure) if status in FORBIDDEN_STATUS else failure


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait: `retry-after-ms`, else `Retry-After` (seconds or a date), else None."""
    if ms := _number(headers.get("retry-after-ms", "")):
        return ms / 1000
    value = headers.get("retry-after", "")
    if (seconds := _number(value)) is not None:
        return seconds
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def limit_reset(headers: Mapping[str, str]) -> float | None:
    """Seconds to the latest of `x-ratelimit-reset-*` (`1s`, `6m0s`, `20ms`). Servers send them with
    every reply: they ask to wait only beside a 429. More than a day is some other number."""
    names = ("x-ratelimit-reset-requests", "x-ratelimit-reset-tokens")
    resets = (_duration(headers.get(name, "")) for name in names)
    return max((s for s in resets if s is not None and s <= _UNIT_SECONDS["d"]), default=None)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 <= value < float("inf") else None


def _duration(text: str) -> float | None:
    """`1h2m3.5s` in seconds; a bare number is seconds."""
    parts = _DURATION_PART.findall(text)
    if "".join(number + unit for number, unit in parts) != text:
        return _number(text)
    return sum(float(number) * _UNIT_SECONDS[unit] for number, unit in parts) if parts else None


@dataclass(frozen=True, slots=True)
class Patience:
    """How long an engine waits, all in seconds."""

    busy_s: float = 900.0
    """How long one record keeps trying while the endpoint only says that it is busy, and a call
    about batches where it has answered before; who asks for a longer wait is not waited for."""
    first_call_alone_s: float = 0.25
    """A wrong key or model costs one call: the others wait this long for the first answer."""
    until_one_answers_s: float = 0.5
    base_s: float = 0.5
    cap_s: float = 60.0

    def backoff(self, attempt: int, after_s: float | None) -> float:
        """Exponential with full jitter; never shorter than what the server asked for."""
        spread = random.uniform(0, min(self.cap_s, self.base_s * 2 ** min(attempt - 1, 30)))
        if after_s is None:
            return spread
        return after_s + min(spread, (0.1 + attempt / 50) * (after_s + 1))


PATIENCE = Patience()


class ErrorSaid:
    """An error as a server says it, by `codes` in lower case with `_` between words.

    `status` is the HTTP status meant; where none can be told 400 of what is wrong with the request,
    else 500. `says_what`: a code is one that is known here.
    """

    def __init__(self, codes: frozenset[str], message: str) -> None:
        self.codes, self.message = codes, message
        self.is_context, self.is_filter = self._has(_CONTEXT), self._has(_FILTER)
        is_model = any("model_not_found" in code for code in codes)
        self.is_refusal = is_model or not codes.isdisjoint(QUOTA_CODES)
        numbers = [int(code) for code in codes if code.isdecimal() and len(code) == 3]
        named = (number for number, pattern in _STATUS if self._has(pattern))
        known = next((n for n in numbers if 400 <= n <= 599), None) or next(named, None)
        is_wrong = self.is_context or self.is_filter
        self.status = known or (400 if is_wrong else 500)
        self.says_what = is_wrong or self.is_refusal or known is not None

    def _has(self, pattern: re.Pattern[str]) -> bool:
        return any(map(pattern.search, self.codes))


def error_in(body: JsonValue, choice: Json | None = None) -> ErrorSaid | None:
    """The error that a parsed body, an event of a stream or a choice is or has; None when it says
    of none. `choice` is its first one, where that is known."""
    if isinstance(body, list) and len(body) == 1:  # as Gemini sends it
        body = body[0]
    if not isinstance(body, dict):
        return None
    error = body.get("error")
    if not error and "base_resp" in body:
        base = as_object(body["base_resp"])
        code = base.get("status_code")
        error = base if isinstance(code, int | str) and code not in (0, "0", "") else None
    choice = choice or first_choice(body)
    if not error and choice is not None:
        error = choice.get("error")
    is_error = "error" in (body.get("object"), body.get("type"))
    if not error and not is_error and body.get("choices"):
        return None
    inner = as_object(error)
    said = error if isinstance(error, str) else next(_texts(inner, body), "")
    found = ErrorSaid(frozenset(_codes(inner, body)), said)
    if not is_error and found.codes <= _NO_ERROR and choice is not None:
        is_said = choice.get("finish_reason") and isinstance(choice.get("message"), dict)
        if is_said and ending_of(choice) is Ending.WHOLE:  # the endpoint itself says so
            return None
    if isinstance(error, dict):
        is_error = is_error or any(_texts(inner)) or any(_codes(inner))
    elif error:
        is_error = True
    return found if is_error or (not body.get("choices") and found.says_what) else None


def _codes(*places: Json) -> Iterator[str]:
    for place in places:
        values = [(name, place.get(name)) for name in _CODES]
        if "code" in (inner := as_object(place.get("innererror"))):  # Azure
            values.append(("innererror", inner["code"]))
        elif "flagged_input" in as_object(place.get("metadata")):  # OpenRouter
            values.append(("metadata", "moderation"))
        for name, value in values:
            if value and isinstance(value, str | int) and value not in (True, "0"):
                yield (code := re.sub(r"[\s.-]+", "_", str(value)[:200]).lower())
                if meant := _NUMBERS.get(name, {}).get(code):
                    yield meant


def _texts(*places: Json) -> Iterator[str]:
    found = (place.get(name) for place in places for name in _MESSAGES)
    return (text for text in found if isinstance(text, str) and text)
