"""What a choice of a completion says: whether it is whole, its texts, the tools that it calls."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, cast

import orjson


class Ending(Enum):
    """How an answer came to its end."""

    WHOLE = auto()
    CUT_OFF = auto()
    """At a limit of tokens: asking again gives the same."""
    FILTERED = auto()
    REFUSED = auto()
    INTERRUPTED = auto()
    """By trouble at the endpoint: asking again may help."""
    UNKNOWN = auto()


_REASONS = {
    Ending.WHOLE: "stop eos eos_token end_turn stop_sequence endoftext end complete completed "
    "finished normal tool_calls tool_call tool_use function_call",
    Ending.CUT_OFF: "length max_tokens max_length max_output max_output_tokens model_length "
    "max_completion_tokens max_new_tokens token_limit time_limit error_limit "
    "model_context_window_exceeded",
    Ending.FILTERED: "content_filter content_filtered safety recitation language blocklist "
    "prohibited_content spii sensitive image_safety model_armor error_toxic guardrail_intervened",
    Ending.REFUSED: "refusal",
    Ending.INTERRUPTED: "insufficient_system_resource abort aborted error network_error timeout "
    "server_error internal_error user_cancel cancelled canceled not_finished overloaded "
    "malformed_function_call malformed_response malformed_model_output unexpected_tool_call",
}
_ENDINGS = {
    name.replace("_", ""): ending for ending, names in _REASONS.items() for name in names.split()
}
"""finish_reason in lower case, of letters and digits only → how the answer ended, as OpenAI, Azure,
Anthropic, Bedrock, Gemini, Cohere, Mistral, DeepSeek, Zhipu, watsonx, vLLM, SGLang, TGI and
llama.cpp have them."""

NO_WHOLE_ANSWER = (Ending.CUT_OFF, Ending.FILTERED, Ending.REFUSED)
"""Endings that count whatever else is said."""
UNFINISHED = "unfinished"
"""Marks a choice whose stream ended without a finish_reason."""

_SURROGATE = re.compile("[\ud800-\udfff]")
_BETWEEN = re.compile(r"[\W_]+")
_THINKING = ("thinking", "reasoning")
_CONTENT = b'"content"'
_IN_PARTS = re.compile(rb"\"content\"\s*:\s*[\[{]")


def parsed(body: bytes | str, *, in_pieces: bool = False) -> object:
    """A body of JSON; None for what is none. A lone surrogate is U+FFFD, and a number that no
    double holds is null: what else is in a reply was paid for. `in_pieces`: a lone surrogate
    stays, as its other half may be in the next piece."""
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        pass
    try:
        value = json.loads(
            body, parse_float=_double, parse_int=_double, parse_constant=lambda _: None
        )
        if in_pieces:
            return value
        text = json.dumps(value, ensure_ascii=False)
        return orjson.loads(_SURROGATE.sub("\ufffd", text))
    except (ValueError, RecursionError):
        return None


def encoded(completion: object) -> bytes:
    """The body of a completion that we have put together, perhaps from halves of surrogates."""
    with suppress(orjson.JSONEncodeError):
        return orjson.dumps(completion)
    with suppress(orjson.JSONEncodeError, RecursionError):
        if (joined := parsed(json.dumps(completion))) is not None:
            return orjson.dumps(joined)
    return b"a reply that is nested too deeply"


def _double(text: str) -> float | int | None:
    value = float(text)
    if not math.isfinite(value):
        return None
    return int(text) if text.lstrip("-").isdigit() else value


def first_choice(body: Any) -> dict[str, Any] | None:
    """That of index 0, wherever it is listed; where none says so, the first."""
    try:
        choices = body["choices"]
        first = choices[0]
    except (TypeError, LookupError):
        return None
    if len(choices) > 1:
        first = next((choice for choice in choices if _index(choice) == 0), first)
    return cast("dict[str, Any]", first) if isinstance(first, dict) else None


def _index(choice: object) -> object:
    index = cast("dict[str, Any]", choice).get("index") if isinstance(choice, dict) else None
    return index if type(index) is int else None


def ending_of(choice: Mapping[str, Any]) -> Ending:
    """A reply in one piece that says nothing of its end is believed; a stream has to say it."""
    reason = choice.get("finish_reason")
    if reason and isinstance(reason, str):
        if (known := _ENDINGS.get(reason)) is not None:
            return known
        plain = _BETWEEN.sub("", reason[:200].lower()).removeprefix("finishreason")
        return _ENDINGS.get(plain, Ending.UNKNOWN)
    return Ending.UNKNOWN if reason or choice.get(UNFINISHED) else Ending.WHOLE


@dataclass(slots=True)
class Texts:
    """Of a message's `content`; what there is none of is empty."""

    answer: str = ""
    thinking: str = ""
    refusal: str = ""

    @classmethod
    def of(cls, content: object) -> Texts:
        """A text, or a list of parts: texts, thoughts and refusals, each joined."""
        if isinstance(content, str):
            return cls(content)
        found = cls()
        for part in _parts(content):
            kind = str(part.get("type"))
            if kind.startswith(_THINKING):
                found.thinking += "".join(_texts(part, (*_THINKING, "text")))
            elif kind == "refusal":
                found.refusal += "".join(_texts(part, ("refusal", "text")))
            else:
                found.answer += "".join(_texts(part, ("text", "content")))
        return found


def with_changed_parts(body: bytes, change: Callable[[str], str]) -> bytes:
    """The body, but where `change` changes a text that its content has in parts, with the changed
    text in one part."""
    if not _has_parts(body):
        return body
    completion = parsed(body)
    message = (first_choice(completion) or {}).get("message")
    if not isinstance(message, dict):
        return body
    message = cast("dict[str, Any]", message)
    texts = Texts.of(message.get("content"))
    changed = Texts(change(texts.answer), change(texts.thinking), change(texts.refusal))
    if changed == texts:
        return body
    message["content"] = [
        {"type": "thinking", "thinking": changed.thinking},
        {"type": "refusal", "refusal": changed.refusal},
        {"type": "text", "text": changed.answer},
    ]
    return encoded(completion)


def _has_parts(body: bytes) -> bool:
    """A pattern alone takes three times as long."""
    at = body.find(_CONTENT)
    while at >= 0:
        if _IN_PARTS.match(body, at):
            return True
        at = body.find(_CONTENT, at + 1)
    return False


CALLS = ("tool_calls", "function_call")
"""Where a message has those of tools."""


def tool_calls(message: Mapping[str, Any]) -> str | None:
    """The calls as JSON text, the older `function_call` as one of them."""
    calls = message.get("tool_calls")
    if not calls and (function := message.get("function_call")):
        calls = [{"type": "function", "function": function}]
    try:
        return orjson.dumps(calls).decode() if calls and isinstance(calls, list) else None
    except orjson.JSONEncodeError:  # nested too deeply
        return None


def _parts(content: object) -> Iterator[Mapping[str, Any]]:
    for part in cast("list[object]", content if isinstance(content, list) else [content]):
        if isinstance(part, str):
            yield {"text": part}
        elif isinstance(part, dict):
            yield cast("dict[str, Any]", part)


def _texts(part: Mapping[str, Any], names: tuple[str, ...]) -> Iterator[str]:
    """Of the first of the fields that the part has: a text, or a list of parts with one."""
    value = next((part[name] for name in names if part.get(name)), None)
    for inner in cast("list[object]", value if isinstance(value, list) else [value]):
        text = cast("dict[str, Any]", inner).get("text") if isinstance(inner, dict) else inner
        if isinstance(text, str):
            yield text
