"""What a chat completion says: its first choice, how that ended, its texts, what it cost."""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum, auto
from itertools import accumulate
from typing import Any

import orjson

from modelcall_assets.llm.json_text import Json, JsonValue, as_object, encoded, parsed

MOST_TOKENS = 2**53
"""A sum beyond this is none."""
MOST_TOKENS_OF_A_REPLY = 10_000_000
"""A count beyond this, or below 0, is none: no model reads or writes so much at once."""


class Ending(Enum):
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

_BETWEEN = re.compile(r"[\W_]+")
_CONTENT = b'"content"'
_IN_PARTS = re.compile(rb"\"content\"\s*:\s*[\[{]")


def first_choice(body: Any) -> Json | None:
    """That of index 0, wherever it is listed; where none says so, the first."""
    try:
        choices = body["choices"]
        first: JsonValue = choices[0]
    except (TypeError, LookupError):
        return None
    if len(choices) > 1:
        indexes = ((as_object(choice).get("index"), choice) for choice in choices)
        first = next((each for index, each in indexes if type(index) is int and not index), first)
    return first if isinstance(first, dict) else None


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
    def of(cls, content: Any) -> Texts:
        """A text, or a list of parts: texts, thoughts and refusals, each joined."""
        found = cls()
        for part in _listed(content):
            given = {"text": part} if isinstance(part, str) else as_object(part)
            kind = str(given.get("type"))
            if kind.startswith(("thinking", "reasoning")):
                found.thinking += _text_in(given, "thinking", "reasoning", "text")
            elif kind == "refusal":
                found.refusal += _text_in(given, "refusal", "text")
            else:
                found.answer += _text_in(given, "text", "content")
        return found


def _text_in(part: Json, *names: str) -> str:
    """Of the first of the fields that the part has: a text, or a list of parts with one."""
    value = next((part[name] for name in names if part.get(name)), None)
    texts = (each.get("text") if isinstance(each, dict) else each for each in _listed(value))
    return "".join(text for text in texts if isinstance(text, str))


def _listed(value: JsonValue) -> list[JsonValue]:
    return value if isinstance(value, list) else [value]


def with_changed_parts(body: bytes, change: Callable[[str], str]) -> bytes:
    """The body; each text that its content has in parts, and `change` changes, is one part then."""
    at = body.find(_CONTENT)  # a pattern alone takes three times as long
    while at >= 0 and not _IN_PARTS.match(body, at):
        at = body.find(_CONTENT, at + 1)
    if at < 0:
        return body
    completion = parsed(body)
    message = as_object((first_choice(completion) or {}).get("message"))
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


@dataclass(slots=True)
class Usage:
    """Tokens of one or more replies; `known` is False when a server left them out. Of the prompt's
    the endpoint had `cached_tokens` already."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    known: bool = True
    cached_tokens: int = 0

    @classmethod
    def of(cls, reported: Any) -> Usage:
        """From a completion's `usage`, whatever a server puts there."""
        counts = as_object(reported)
        prompt, completion = counts.get("prompt_tokens"), counts.get("completion_tokens")
        if type(prompt) is int and type(completion) is int:
            most = MOST_TOKENS_OF_A_REPLY
            if 0 <= prompt <= most and 0 <= completion <= most:
                details = as_object(counts.get("prompt_tokens_details"))
                cached = details.get("cached_tokens", counts.get("prompt_cache_hit_tokens"))
                count = cached if type(cached) is int and 0 <= cached <= prompt else 0
                return cls(prompt, completion, cached_tokens=count)
        return cls(known=False)

    def __add__(self, other: Usage) -> Usage:
        prompt = self.prompt_tokens + other.prompt_tokens
        completion = self.completion_tokens + other.completion_tokens
        if prompt > MOST_TOKENS or completion > MOST_TOKENS:
            return Usage(known=False)
        cached = self.cached_tokens + other.cached_tokens
        return Usage(prompt, completion, self.known and other.known, cached)

    def cost(
        self,
        usd_per_million_input: float | None,
        usd_per_million_output: float | None,
        usd_per_million_cached: float | None = None,
    ) -> float | None:
        """US dollars; None when a price or the usage is unknown, never 0 for it."""
        if self.known and not (self.prompt_tokens or self.completion_tokens):
            return 0.0
        if usd_per_million_input is None or usd_per_million_output is None or not self.known:
            return None
        cached = usd_per_million_cached
        if cached is None:
            cached = usd_per_million_input
        fresh = self.prompt_tokens - self.cached_tokens
        read = (fresh * usd_per_million_input + self.cached_tokens * cached) / 1_000_000
        return read + self.completion_tokens * usd_per_million_output / 1_000_000


@dataclass
class UsageEstimate:
    """What a request will count for, from what the ones before counted."""

    per_byte: float = 0.3
    answer: float = 256.0

    def of(self, payload: bytes) -> int:
        return round(len(payload) * self.per_byte + self.answer)

    def learn(self, payload: bytes, usage: Usage) -> int:
        """The tokens that the endpoint counted; the estimate where it does not say."""
        if not usage.known:
            return self.of(payload)
        self.per_byte = _nearer(self.per_byte, usage.prompt_tokens / len(payload), 0.01)
        self.answer = _nearer(self.answer, usage.completion_tokens, 1)
        return usage.prompt_tokens + usage.completion_tokens


def _nearer(estimate: float, counted: float, least: float) -> float:
    """A sixteenth of the way, but at most to twice as much: a single count may be nonsense."""
    return min(estimate + (counted - estimate) / 16, 2 * max(estimate, least))


@dataclass(slots=True)
class Answer:
    """The parts of a chat completion that anything here looks at."""

    text: str
    reasoning: str | None
    finish_reason: str | None
    usage: Usage
    request_id: str | None
    model: str | None
    ending: Ending = Ending.WHOLE
    refusal: str = ""
    """What the model said instead of an answer."""
    tool_calls: str | None = None
    """As JSON text."""
    tokens: Sequence[Json] = ()
    """Of the text, each with the likeliest in its place, where the endpoint gives them."""

    @property
    def logprobs(self) -> dict[str, float] | None:
        """Of the tokens that the answer was likeliest to begin with, where the endpoint says so."""
        return (_likely(self.tokens[0]) or None) if self.tokens else None

    @classmethod
    def of(cls, completion: Mapping[str, Any], choice: Mapping[str, Any] | None = None) -> Answer:
        """`reasoning_content` and `reasoning` are two servers' names for one thing; a third way is
        to have it among the parts of `content`. `choice` is the first one, where that is known."""
        choice = choice or first_choice(completion) or {}
        reason, message = choice.get("finish_reason"), as_object(choice.get("message"))
        content, calls = message.get("content"), message.get("tool_calls")
        said = Texts(content) if isinstance(content, str) else Texts.of(content)
        if not calls and (function := message.get("function_call")):  # as it was called before
            calls = [{"type": "function", "function": function}]
        calls_text = None
        if calls and isinstance(calls, list):
            with suppress(orjson.JSONEncodeError):  # nested too deeply
                calls_text = orjson.dumps(calls).decode()
        texts = {name: text for name, text in message.items() if isinstance(text, str)}
        request_id, model = completion.get("id"), completion.get("model")
        reasoning = texts.get("reasoning_content") or texts.get("reasoning") or said.thinking
        refusal = texts.get("refusal") or said.refusal
        return cls(
            text=said.answer or refusal,
            reasoning=reasoning or None,
            finish_reason=reason if isinstance(reason, str) else None,
            usage=Usage.of(completion.get("usage")),
            request_id=request_id if isinstance(request_id, str) and request_id else None,
            model=model if isinstance(model, str) and model else None,
            ending=ending_of(choice),
            refusal=refusal,
            tool_calls=calls_text,
            tokens=_tokens(choice["logprobs"]) if choice.get("logprobs") else (),
        )


def mean_digit(
    tokens: Sequence[Json], key: str, digit: int, allowed: Sequence[int]
) -> float | None:
    """The `digit` that the key has in the tokens' JSON as the mean of those `allowed`, each as
    likely as it was in that place; None where the endpoint does not say it of any."""
    texts = [str(token.get("token")) for token in tokens]
    before = re.search(rf'(?s)(.*"{re.escape(key)}"\s*:\s*"?){digit}(?!\d)', "".join(texts))
    if before is None:
        return None
    at = bisect_right([*accumulate(map(len, texts))], before.end(1))
    shares = dict.fromkeys(map(str, allowed), 0.0)
    for said, logprob in _likely(tokens[at]).items():
        if said.strip() in shares:
            shares[said.strip()] += math.exp(logprob)
    whole = math.fsum(shares.values())
    return sum(int(each) * share for each, share in shares.items()) / whole if whole else None


def _tokens(told: JsonValue) -> list[Json]:
    return [*map(as_object, _listed(as_object(told).get("content")))]


def _likely(token: Json) -> dict[str, float]:
    """Token → logarithm of its probability, of those likely in the place of this one. Of tokens
    that read the same, the likeliest, which comes first."""
    found: dict[str, float] = {}
    for each in map(as_object, _listed(token.get("top_logprobs"))):
        said, logprob = each.get("token"), each.get("logprob")
        if isinstance(said, str) and isinstance(logprob, int | float):
            found.setdefault(said, float(logprob))
    return found
