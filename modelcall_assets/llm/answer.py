"""From a chat completion to parsed values, or to the mistake in it. Pure: replay re-runs it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import jsonschema_rs
import orjson

from modelcall_assets.records.outcome import Failure, Outcome, Reason, Success

PARSER_VERSION = 1
"""Raise when the same reply and the same declaration would give another outcome."""

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
            if isinstance(prompt, int) and isinstance(completion, int):
                return cls(prompt, completion)
        return cls(known=False)

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.known and other.known,
        )

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

    @classmethod
    def of(cls, completion: Mapping[str, Any]) -> Answer:
        """`reasoning_content` and `reasoning` are two servers' names for one thing."""
        choice = completion["choices"][0]
        message = choice["message"]
        text, reason = message.get("content"), choice.get("finish_reason")
        return cls(
            text=text if isinstance(text, str) else "",
            reasoning=_text(message.get("reasoning_content")) or _text(message.get("reasoning")),
            finish_reason=reason if isinstance(reason, str) else None,
            usage=Usage.of(completion.get("usage")),
            request_id=_text(completion.get("id")),
            model=_text(completion.get("model")),
        )


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


@dataclass(frozen=True)
class AnswerParser:
    """Checks an answer against what the prompt declares.

    `schema` is a JSON Schema of the answer object, `keys` the columns wanted from it, `defaults`
    fill optional keys only. With `schema=None` the answer is free text and must not be empty.
    """

    keys: Sequence[str]
    required: frozenset[str]
    schema: Mapping[str, Any] | None
    defaults: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        if self.schema is not None:
            validator = jsonschema_rs.Draft202012Validator(_bounded(self.schema))
            object.__setattr__(self, "_validator", validator)
            numbers = dict(_declared_numbers(self.schema))
            object.__setattr__(self, "_numbers", numbers)

    def parse(self, answer: Answer) -> Outcome:
        if answer.finish_reason == "content_filter":
            return Failure(Reason.CONTENT_FILTER, "the endpoint filtered the answer")
        if answer.finish_reason == "length":
            return Failure(Reason.TRUNCATED, "the answer was cut off at the token limit")
        text = strip_thinking(answer.text)
        if not text:
            return Failure(Reason.EMPTY, "the answer is empty")
        return Success({}) if self.schema is None else self._parse_object(text)

    def _parse_object(self, text: str) -> Outcome:
        found = last_object(text)
        if found is None:
            return Failure(Reason.NOT_AN_OBJECT, "the answer holds no JSON object")
        missing = [key for key in self.keys if key in self.required and key not in found]
        if missing:
            return Failure(Reason.MISSING_KEYS, ", ".join(missing))
        values = {key: found[key] for key in self.keys if key in found}
        numbers: Mapping[str, str] = cast("Any", self)._numbers
        for key, kind in numbers.items():
            if key in values:
                values[key] = _as_number(kind, values[key])
        if wrong := self._wrong_values(values):
            return Failure(Reason.WRONG_VALUE, wrong)
        return Success({key: values.get(key, self.defaults.get(key)) for key in self.keys})

    def _wrong_values(self, values: Mapping[str, Any]) -> str:
        validator: Any = cast("Any", self)._validator
        if None not in values.values() and validator.is_valid(values):
            return ""
        needed = [key for key in self.keys if key in self.required]
        wrong = [f"{key}: null" for key in needed if values.get(key) is None]
        present = {
            key: value for key, value in values.items() if value is not None or key in self.required
        }
        errors: Any = validator.iter_errors(present)
        wrong += [
            f"{'.'.join(str(part) for part in error.instance_path)}: {error.message[:300]}"
            for error in errors
        ]
        return "; ".join(wrong[:5])


def _declared_numbers(schema: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Keys that are to be an integer or a number, and which."""
    fields = cast("dict[str, Any]", schema.get("properties", {}))
    for key, field_schema in fields.items():
        kind = (
            cast("dict[str, Any]", field_schema).get("type")
            if isinstance(field_schema, dict)
            else None
        )
        if kind in ("integer", "number"):
            yield key, kind


def _as_number(kind: str, value: Any) -> Any:
    """A number in quotes is a number where one is declared (`"3"` → 3)."""
    if isinstance(value, str):
        pattern = _INTEGER if kind == "integer" else _NUMBER
        if not pattern.fullmatch(value.strip()):
            return value
        return int(value) if kind == "integer" else float(value)
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    return float(value) if is_whole and kind == "number" else value


def strip_thinking(text: str) -> str:
    """The text after the model's `<think>` block; a missing opening tag is tolerated."""
    if "think>" not in text or _object(text) is not None:
        return text.strip()  # no tags, or tags that are talked about
    _, closed, after = text.rpartition("</think>")
    if closed:
        return after.strip()
    head, opened, _ = text.partition("<think>")
    return (head if opened else text).strip()


def last_object(text: str) -> dict[str, Any] | None:
    """The last JSON object in `text` that is not inside another one."""
    if (whole := _object(text)) is not None:
        return whole
    decoder = json.JSONDecoder()
    found: dict[str, Any] | None = None
    at = text.find("{")
    while at >= 0:
        try:
            _, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            end = at + 1
        else:
            candidate = _object(text[at:end])
            found = found if candidate is None else candidate
        at = text.find("{", end)
    return found


def _object(text: str) -> dict[str, Any] | None:
    """The object that `text` is. None for what no output can hold: NaN, a lone surrogate, nesting
    too deep for a writer that puts it two levels down."""
    try:
        value: object = orjson.loads(text)
        orjson.dumps([[value]])
    except (orjson.JSONDecodeError, orjson.JSONEncodeError):
        return None
    return cast("dict[str, Any]", value) if isinstance(value, dict) else None


def _bounded(schema: Any) -> Any:
    """The schema of an answer with its integers kept to 64 bits, as a column is."""
    match schema:
        case {"type": "object", "properties": {}}:
            fields = cast("dict[str, Any]", schema["properties"])
            return {**schema, "properties": {key: _bounded(fields[key]) for key in fields}}
        case {"type": "array", "items": items}:
            return {**schema, "items": _bounded(items)}
        case {"type": "integer"}:
            return {"minimum": -(2**63), "maximum": 2**63 - 1, **schema}
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
