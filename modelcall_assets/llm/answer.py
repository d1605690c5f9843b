"""From a chat completion to parsed values, or to the mistake in it. Pure: replay re-runs it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import jsonschema_rs

from modelcall_assets.llm.json_text import read, strip_thinking
from modelcall_assets.llm.message import CALLS, Ending, Texts, ending_of, first_choice, tool_calls
from modelcall_assets.records.outcome import Failure, Outcome, Reason, Success

PARSER_VERSION = 4
"""Raise when the same reply and the same declaration would give another outcome."""

MOST_TOKENS = 2**53
"""A sum beyond this is none."""
MOST_TOKENS_OF_A_REPLY = 10_000_000
"""A count beyond this, or below 0, is none: no model reads or writes so much at once."""

_SCALARS = frozenset(("string", "integer", "number", "boolean", "null"))
_NUMERIC = ("integer", "number")
_HUGE = re.compile(r"(?<![\d.])\d{19,}+(?![.eE])")
_INTEGER = re.compile(r"[+-]?\d{1,18}")
_NUMBER = re.compile(r"[+-]?\d{1,18}(\.\d+)?")


@dataclass(slots=True)
class Usage:
    """Tokens of one or more replies; `known` is False when a server left them out."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    known: bool = True

    @classmethod
    def of(cls, reported: Any) -> Usage:
        """From a completion's `usage`, whatever a server puts there."""
        if isinstance(reported, dict):
            counts = cast("dict[str, Any]", reported)
            prompt, completion = counts.get("prompt_tokens"), counts.get("completion_tokens")
            if type(prompt) is int and type(completion) is int:
                most = MOST_TOKENS_OF_A_REPLY
                if 0 <= prompt <= most and 0 <= completion <= most:
                    return cls(prompt, completion)
        return cls(known=False)

    def __add__(self, other: Usage) -> Usage:
        prompt = self.prompt_tokens + other.prompt_tokens
        completion = self.completion_tokens + other.completion_tokens
        if prompt > MOST_TOKENS or completion > MOST_TOKENS:
            return Usage(known=False)
        return Usage(prompt, completion, self.known and other.known)

    def cost(
        self, usd_per_million_input: float | None, usd_per_million_output: float | None
    ) -> float | None:
        """US dollars; None when a price or the usage is unknown, never 0 for it."""
        if self.known and not (self.prompt_tokens or self.completion_tokens):
            return 0.0
        if usd_per_million_input is None or usd_per_million_output is None or not self.known:
            return None
        million = 1_000_000
        return (
            self.prompt_tokens * usd_per_million_input / million
            + self.completion_tokens * usd_per_million_output / million
        )


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

    @classmethod
    def of(cls, completion: Mapping[str, Any], choice: Mapping[str, Any] | None = None) -> Answer:
        """`reasoning_content` and `reasoning` are two servers' names for one thing; a third way is
        to have it among the parts of `content`. `choice` is the first one, where that is known."""
        choice = choice or first_choice(completion) or {}
        reason, given = choice.get("finish_reason"), choice.get("message")
        message = cast("dict[str, Any]", given) if isinstance(given, dict) else {}
        said = Texts.of(message.get("content"))
        reasoning = _text(message.get("reasoning_content")) or _text(message.get("reasoning"))
        refusal = _text(message.get("refusal")) or said.refusal
        return cls(
            text=said.answer or refusal,
            reasoning=reasoning or said.thinking or None,
            finish_reason=reason if isinstance(reason, str) else None,
            usage=Usage.of(completion.get("usage")),
            request_id=_text(completion.get("id")),
            model=_text(completion.get("model")),
            ending=ending_of(choice),
            refusal=refusal,
            tool_calls=None if message.keys().isdisjoint(CALLS) else tool_calls(message),
        )


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


@dataclass(frozen=True)
class AnswerParser:
    """Checks an answer against what the prompt declares.

    `schema` is a JSON Schema of the answer object, `keys` the columns wanted from it, `defaults`
    fill optional keys only. With `schema=None` the answer is free text: the endpoint must say that
    it is whole, and it must not be empty, unless it `may_call` tools instead.
    """

    keys: Sequence[str]
    required: frozenset[str]
    schema: Mapping[str, Any] | None
    defaults: Mapping[str, Any] = field(default_factory=dict[str, Any])
    may_call: bool = False
    _validator: Any = field(init=False, repr=False, compare=False)
    _numbers: Mapping[str, str] = field(init=False, repr=False, compare=False)
    """Keys that are to be, or to hold, integers or numbers → which."""
    _integers: Sequence[str] = field(init=False, repr=False, compare=False)
    """Keys that may have integers in them."""

    def __post_init__(self) -> None:
        if self.schema is not None:
            validator = jsonschema_rs.Draft202012Validator(_bounded(self.schema))
            scalars = dict(_declared_scalars(self.schema))
            numbers = {key: kind for key, kind in scalars.items() if kind in _NUMERIC}
            object.__setattr__(self, "_validator", validator)
            object.__setattr__(self, "_numbers", numbers)
            integers = [key for key in self.keys if scalars.get(key, "integer") == "integer"]
            object.__setattr__(self, "_integers", integers)

    @cached_property
    def untyped(self) -> list[str]:
        """Keys without one declared type."""
        fields = cast("dict[str, Any]", (self.schema or {}).get("properties", {}))
        return [key for key in self.keys if _type_in(fields.get(key)) is None]

    def parse(self, answer: Answer) -> Outcome:
        is_plain = answer.ending is Ending.WHOLE and not answer.refusal
        if not is_plain and (why := _no_whole_answer(answer)) is not None:
            return why
        outcome = self._parse_text(answer) if self.schema is None else self._parse_json(answer.text)
        if isinstance(outcome, Failure) and answer.tool_calls:
            return Failure(
                Reason.TOOL_CALLS, f"the model called a tool instead: {answer.tool_calls[:1000]}"
            )
        return outcome

    def _parse_text(self, answer: Answer) -> Outcome:
        if answer.ending is Ending.UNKNOWN:
            what = f"finish_reason {answer.finish_reason!r:.100} does not say that it is whole"
            return Failure(Reason.INTERRUPTED, f"the answer may be cut off: {what}")
        if strip_thinking(answer.text) or (self.may_call and answer.tool_calls):
            return Success({})
        return Failure(Reason.EMPTY, "the answer is empty")

    def _parse_json(self, text: str) -> Outcome:
        text, found = read(text)
        if not text:
            return Failure(Reason.EMPTY, "the answer is empty")
        if found is None:
            return Failure(Reason.NOT_AN_OBJECT, "the answer holds no JSON object")
        if missing := self.required - found.keys():
            return Failure(Reason.MISSING_KEYS, ", ".join(filter(missing.__contains__, self.keys)))
        values = {key: found[key] for key in self.keys if key in found}
        lost = self._lost_digits(values, text) if self._integers else ""
        for key, kind in self._numbers.items():
            if key in values:
                values[key] = _as_number(kind, values[key])
        if wrong := self._wrong_values(values) or lost:
            return Failure(Reason.WRONG_VALUE, wrong)
        if len(values) < len(self.keys):
            values = {key: values.get(key, self.defaults.get(key)) for key in self.keys}
        return Success(values)

    def _lost_digits(self, values: Mapping[str, Any], text: str) -> str:
        """What is wrong with integers that 64 bits do not hold; else empty."""
        huge = next((key for key in self._integers if _has_huge(values.get(key))), None)
        if huge is not None and _HUGE.search(text):
            return f"{huge}: an integer beyond 64 bits; write it as a string"
        return ""

    def _wrong_values(self, values: Mapping[str, Any]) -> str:
        if None not in values.values() and self._validator.is_valid(values):
            return ""
        needed = [key for key in self.keys if key in self.required]
        wrong = [f"{key}: null" for key in needed if values.get(key) is None]
        present = {
            key: value for key, value in values.items() if value is not None or key in self.required
        }
        wrong += [
            f"{'.'.join(str(part) for part in error.instance_path)}: {error.message[:300]}"
            for error in self._validator.iter_errors(present)
        ]
        return "; ".join(wrong[:5])


def _no_whole_answer(answer: Answer) -> Failure | None:
    if answer.ending is Ending.FILTERED:
        return Failure(Reason.CONTENT_FILTER, "the endpoint filtered the answer")
    if answer.refusal.strip() or answer.ending is Ending.REFUSED:
        said = answer.refusal or answer.text
        return Failure(Reason.REFUSED, f"the model refused: {said.strip()[:1000]}")
    if answer.ending is Ending.CUT_OFF:
        return Failure(Reason.TRUNCATED, "the answer was cut off at the token limit")
    return None


def _declared_scalars(schema: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Keys that are to be, or to hold, scalars of one type, and which."""
    fields = cast("dict[str, Any]", schema.get("properties", {}))
    for key, declared in fields.items():
        kind = _type_in(declared)
        kind = _type_in(declared.get("items")) if kind == "array" else kind
        if kind in _SCALARS:
            yield key, kind


def _type_in(declared: object) -> str | None:
    """The one type of a schema, if it has one."""
    kind = cast("dict[str, Any]", declared).get("type") if isinstance(declared, dict) else None
    return kind if isinstance(kind, str) else None


def _as_number(kind: str, value: Any) -> Any:
    """A number in quotes is a number where one is declared (`"3"` → 3), 3 is 3.0 and 3.0 is 3."""
    if isinstance(value, list):
        return [_as_number(kind, item) for item in cast("list[Any]", value)]
    if isinstance(value, str):
        pattern = _INTEGER if kind == "integer" else _NUMBER
        text = value.strip()  # of more than int() takes away
        if not pattern.fullmatch(text):
            return value
        return int(text) if kind == "integer" else float(text)
    if kind == "integer":
        return int(value) if isinstance(value, float) and value.is_integer() else value
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    return float(value) if is_whole else value


def _has_huge(value: Any) -> bool:
    if isinstance(value, str):
        return False
    if isinstance(value, dict | list):
        held: Any = cast("Any", value)
        return any(map(_has_huge, held.values() if isinstance(value, dict) else held))
    return isinstance(value, float) and abs(value) >= 2**63


def _bounded(schema: Any) -> Any:
    """The schema of an answer with its integers kept to 64 bits, as a column is."""
    match schema:
        case {"type": "object", "properties": {}}:
            fields = cast("dict[str, Any]", schema["properties"])
            return {**schema, "properties": {key: _bounded(fields[key]) for key in fields}}
        case {"type": "array", "items": items}:
            return {**schema, "items": _bounded(items)}
        case {"type": "integer"}:
            bounds = {"minimum": -(2**63), "maximum": 2**63 - 1}
            return {**schema, "allOf": [*schema.get("allOf", ()), bounds]}
        case _:
            return schema


def correction(mistake: Failure, keys: Sequence[str]) -> str:
    """The user turn that asks the model to mend its answer, by kind of mistake."""
    wanted = ", ".join(f'"{key}"' for key in keys)
    match mistake.reason:
        case Reason.MISSING_KEYS:
            return (
                f"Your JSON object lacks these keys: {mistake.detail}. "
                f"Send the whole object again with every key: {wanted}."
            )
        case Reason.WRONG_VALUE:
            return (
                f"Your JSON object has values that are not allowed: {mistake.detail}. "
                "Send the whole corrected object and nothing else."
            )
        case Reason.TRUNCATED:
            return (
                "Your answer was cut off because it was too long. Answer again with only one "
                f"short JSON object that has the keys {wanted}."
            )
        case Reason.EMPTY:
            return f"Your answer was empty. Answer with one JSON object that has the keys {wanted}."
        case _:
            return (
                "Your answer held no valid JSON object. Answer with exactly one JSON object that "
                f"has the keys {wanted}, without any text around it."
            )
