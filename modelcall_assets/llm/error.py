"""An error as a server says it, wherever it stands: a body, an event of a stream, a choice."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

from modelcall_assets.llm.message import Ending, ending_of, first_choice

Json = dict[str, Any]

QUOTA_CODES = frozenset(
    {
        "insufficient_quota",
        "insufficient_user_quota",
        "quota_exceeded",
        "usage_limit_reached",
        "billing_hard_limit_reached",
        "access_terminated",
        "insufficient_balance",
        "insufficient_credits",
        "billing_not_active",
        "account_deactivated",
        "arrearage",
        "exceeded_current_quota_error",
        "1113",
    }
)
_CONTEXT = re.compile(
    r"context_?(length|window|size|limit)|(prompt|input|message|request)\w*_too_(long|large)"
    r"|string_above_max_length|tokens_limit_reached|too_many_tokens|^1261$"
)
_FILTER = re.compile(
    r"content_?(filter|policy|block|safety)|moderat|inspection_?failed|sensitive|policy_?violation"
    r"|flagged|prohibited_content|guardrail|safety|^1301$"
)
_STATUS = (
    (429, re.compile(r"rate_?limit|too_?many_?requests|throttl|resource_?exhausted|^130[235]$")),
    (
        503,
        re.compile(
            r"overload|unavailable|insufficient_system_resource|no_capacity|capacity_exceeded"
        ),
    ),
    (404, re.compile(r"model_?not_?found|^not_found(_error)?$")),
    (401, re.compile(r"invalid_api_key|authenticat|unauthori")),
    (403, re.compile(r"permission|forbidden|access_?denied")),
    (400, re.compile(r"invalid_?(request|argument|parameter)|bad_request|_not_found$")),
)
"""Of codes that stand for an HTTP status, the first that fits; each from a provider's list."""
_CODES = ("code", "type", "status", "error_code", "errorCode", "status_code")
_NUMBERS = {
    ("status_code", "1002"): "rate_limit",  # these of MiniMax, in `base_resp`
    ("status_code", "1004"): "unauthorized",
    ("status_code", "1008"): "insufficient_balance",
    ("status_code", "1026"): "content_filter",
    ("status_code", "1027"): "content_filter",
    ("status_code", "1039"): "rate_limit",
    ("status_code", "1041"): "rate_limit",
    ("status_code", "2013"): "invalid_parameter",
    ("status_code", "2049"): "invalid_api_key",
    ("error_code", "4"): "rate_limit",  # these of Baidu
    ("error_code", "17"): "quota_exceeded",
    ("error_code", "18"): "rate_limit",
    ("error_code", "19"): "quota_exceeded",
    ("error_code", "110"): "unauthorized",
    ("error_code", "111"): "unauthorized",
}
"""What a number means depends on the field that it stands in."""
_NO_ERROR = frozenset({"200", "ok", "success", "none", "null"})
_MESSAGES = ("message", "msg", "detail", "error_msg", "status_msg")


@dataclass(frozen=True, slots=True)
class ErrorSaid:
    """`codes` are in lower case with `_` between words; `status` is the HTTP status meant; where
    none can be told 400 of what is wrong with the request, else 500."""

    codes: frozenset[str]
    message: str

    @property
    def is_quota(self) -> bool:
        return not self.codes.isdisjoint(QUOTA_CODES)

    @property
    def is_model(self) -> bool:
        """Whether it is the model that there is none of."""
        return any("model_not_found" in code for code in self.codes)

    @property
    def is_context(self) -> bool:
        return any(map(_CONTEXT.search, self.codes))

    @property
    def is_filter(self) -> bool:
        return any(map(_FILTER.search, self.codes))

    @property
    def status(self) -> int:
        return self._known_status or (400 if self.is_context or self.is_filter else 500)

    @property
    def says_what(self) -> bool:
        """Whether a code is one that is known here."""
        return self.is_quota or self.is_context or self.is_filter or bool(self._known_status)

    @property
    def _known_status(self) -> int | None:
        numbers = [int(code) for code in self.codes if code.isdecimal() and len(code) == 3]
        named = (number for number, fits in _STATUS if any(map(fits.search, self.codes)))
        return next((n for n in numbers if 400 <= n <= 599), None) or next(named, None)


def error_in(body: object, choice: Json | None = None) -> ErrorSaid | None:
    """The error that a parsed body, an event or a choice is or has; None when it says of none.
    `choice` is its first one, where that is known."""
    if isinstance(body, list) and len(cast("list[object]", body)) == 1:  # as Gemini sends it
        body = cast("list[object]", body)[0]
    if not isinstance(body, dict):
        return None
    outer = cast("Json", body)
    error = outer.get("error")
    if not error and "base_resp" in outer:
        match outer.get("base_resp"):
            case {"status_code": int() | str() as code} as error if code not in (0, "0", ""):
                pass
            case _:
                error = None
    choice = choice or first_choice(outer)
    if not error and choice is not None:
        error = choice.get("error")
    is_error = "error" in (outer.get("object"), outer.get("type"))
    if not error and not is_error and outer.get("choices"):
        return None
    inner = cast("Json", error) if isinstance(error, dict) else {}
    said = error if isinstance(error, str) else next(_texts(inner, outer), "")
    found = ErrorSaid(frozenset(_codes(inner, outer)), said)
    if not is_error and found.codes <= _NO_ERROR and choice is not None and _is_whole(choice):
        return None
    if isinstance(error, dict):
        is_error = is_error or any(_texts(inner)) or any(_codes(inner))
    elif error:
        is_error = True
    return found if is_error or (not outer.get("choices") and found.says_what) else None


def _is_whole(choice: Json) -> bool:
    """Whether the endpoint itself says so."""
    said = choice.get("finish_reason") and isinstance(choice.get("message"), dict)
    return bool(said) and ending_of(choice) is Ending.WHOLE


def _codes(*places: Json) -> Iterator[str]:
    for place in places:
        values = [(name, place.get(name)) for name in _CODES]
        match place:
            case {"innererror": {"code": code}}:  # Azure
                values.append(("innererror", code))
            case {"metadata": {"flagged_input": _}}:  # OpenRouter
                values.append(("metadata", "moderation"))
            case _:
                pass
        for name, value in values:
            if value and isinstance(value, str | int) and value not in (True, "0"):
                yield (code := re.sub(r"[\s.-]+", "_", str(value)[:200]).lower())
                if meant := _NUMBERS.get((name, code)):
                    yield meant


def _texts(*places: Json) -> Iterator[str]:
    for place in places:
        for name in _MESSAGES:
            if isinstance(value := place.get(name), str) and value:
                yield value
