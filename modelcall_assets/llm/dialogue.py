"""One record's conversation with the model: a request, its replies, and what follows from them.

Everything here is pure, so a live call and the replay of a journal are the same code.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import jsonschema_rs
import orjson

from modelcall_assets.journal.lines import Entry
from modelcall_assets.llm.classify import Refused, Reply, Said, classify
from modelcall_assets.llm.completion import Answer, Ending, Usage, mean_digit
from modelcall_assets.llm.json_text import Json, as_object, read
from modelcall_assets.records.outcome import Failure, Number, Outcome, Reason, Success

Message = dict[str, Any]

NOT_IN_KEY = frozenset({"stream", "stream_options", "user"})
"""Body fields that cannot change the answer."""
PARSER_VERSION = 4
"""Raise when the same reply and the same declaration would give another outcome."""
REPAIRABLE = frozenset({
    Reason.EMPTY, Reason.NOT_AN_OBJECT, Reason.MISSING_KEYS, Reason.WRONG_VALUE, Reason.TRUNCATED,
})  # fmt: skip

_CANONICAL = orjson.OPT_SORT_KEYS | orjson.OPT_PASSTHROUGH_SUBCLASS
_HUGE = re.compile(r"(?<![\d.])\d{19,}+(?![.eE])")
_INTEGER = re.compile(r"[+-]?\d{1,18}")
_NUMBER = re.compile(r"[+-]?\d{1,18}(\.\d+)?")


@dataclass(slots=True)
class ChatRequest:
    """A chat-completion body. `revision` tells apart models that share a name."""

    params: Mapping[str, Any]
    messages: tuple[Message, ...]
    revision: str | None = None
    payload: bytes = field(init=False, repr=False)
    """The canonical JSON body, as sent."""
    key: str = field(init=False, repr=False)
    """Names it for resume, reuse and provenance: 32 hex digits of the canonical body, without
    NOT_IN_KEY, and the revision; never of the endpoint."""

    def __post_init__(self) -> None:
        body = {**self.params, "messages": self.messages}
        self.payload = named = orjson.dumps(body, default=_as_written, option=_CANONICAL)
        if not NOT_IN_KEY.isdisjoint(body):
            body = {name: value for name, value in body.items() if name not in NOT_IN_KEY}
            named = orjson.dumps(body, default=_as_written, option=_CANONICAL)
        if self.revision is not None:
            named += b"\0" + self.revision.encode()
        self.key = hashlib.sha256(named).hexdigest()[:32]

    def followed_by(self, answer: str, correction: str) -> ChatRequest:
        turn: tuple[Message, ...] = (
            {"role": "assistant", "content": answer},
            {"role": "user", "content": correction},
        )
        return ChatRequest(self.params, self.messages + turn, self.revision)


def _as_written(value: Any) -> orjson.Fragment:
    if isinstance(value, Number):
        return orjson.Fragment(str(value))
    raise TypeError(f"{type(value).__name__} has no JSON")


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
    as_it_is: bool = False
    """Whether any text is an answer that the model has ended itself, be it cut off, empty or a
    refusal."""
    digits: Sequence[int] = ()
    """Where the mean of a `score` that is one of these is wanted too, as `expected_score`."""

    @cached_property
    def untyped(self) -> list[str]:
        """Keys without one declared type."""
        return [key for key in self.keys if _type_in(self._fields.get(key)) is None]

    @cached_property
    def _fields(self) -> Json:
        return (self.schema or {}).get("properties", {})

    @cached_property
    def _validator(self) -> Any:
        return jsonschema_rs.Draft202012Validator(_bounded(self.schema))

    @cached_property
    def _kinds(self) -> dict[str, str | None]:
        """Keys that are declared → the one type of the value, or of the items of an array."""
        return {
            key: _type_in(declared.get("items") if _type_in(declared) == "array" else declared)
            for key, declared in self._fields.items()
        }

    @cached_property
    def _numbers(self) -> dict[str, type[int | float]]:
        kinds = {"integer": int, "number": float}
        return {key: kinds[kind] for key, kind in self._kinds.items() if kind in kinds}

    @cached_property
    def _integers(self) -> list[str]:
        """Keys that may have integers in them."""
        none = ("string", "number", "boolean", "null")
        return [key for key in self.keys if self._kinds.get(key) not in none]

    def parse(self, answer: Answer) -> Outcome:
        if self.as_it_is and answer.ending not in (Ending.FILTERED, Ending.UNKNOWN):
            return Success({})
        if answer.ending is not Ending.WHOLE or answer.refusal:
            if answer.ending is Ending.FILTERED:
                return Failure(Reason.CONTENT_FILTER, "the endpoint filtered the answer")
            if answer.refusal.strip() or answer.ending is Ending.REFUSED:
                said = answer.refusal or answer.text
                return Failure(Reason.REFUSED, f"the model refused: {said.strip()[:1000]}")
            if answer.ending is Ending.CUT_OFF:
                return Failure(Reason.TRUNCATED, "the answer was cut off at the token limit")
        outcome = self._parse_text(answer) if self.schema is None else self._parse_json(answer.text)
        if isinstance(outcome, Failure) and answer.tool_calls:
            called = f"the model called a tool instead: {answer.tool_calls[:1000]}"
            return Failure(Reason.TOOL_CALLS, called)
        score = outcome.values.get("score") if isinstance(outcome, Success) else None
        if isinstance(outcome, Success) and self.digits and score is not None:
            mean = mean_digit(answer.tokens, "score", score, self.digits)
            if mean is None:
                what = "expected_score: the endpoint gave no log-probabilities of the score"
                return Failure(Reason.BAD_REPLY, what)
            outcome.values["expected_score"] = mean
        return outcome

    def _parse_text(self, answer: Answer) -> Outcome:
        if answer.ending is Ending.UNKNOWN:
            what = f"finish_reason {answer.finish_reason!r:.100} does not say that it is whole"
            return Failure(Reason.INTERRUPTED, f"the answer may be cut off: {what}")
        spoken = read(answer.text)[0] if "<" in answer.text else answer.text.strip()
        if spoken or (self.may_call and answer.tool_calls):
            return Success({})
        return Failure(Reason.EMPTY, "the answer is empty")

    def _parse_json(self, text: str) -> Outcome:
        text, found = read(text)
        if not text:
            return Failure(Reason.EMPTY, "the answer is empty")
        if found is None:
            return Failure(Reason.NOT_AN_OBJECT, "the answer holds no JSON object")
        if missing := self.required - found.keys():
            lacking = ", ".join(filter(missing.__contains__, self.keys))
            return Failure(Reason.MISSING_KEYS, f"lacks these keys: {lacking}")
        values = {key: found[key] for key in self.keys if key in found}
        for key, kind in self._numbers.items():
            if key in values and type(values[key]) is not kind:
                values[key] = _as_number(kind, values[key])
        is_sound = None not in values.values() and self._validator.is_valid(values)
        if not is_sound and (wrong := self._wrong_values(values)):
            return Failure(Reason.WRONG_VALUE, wrong)
        for key in self._integers:
            may_be = isinstance(found.get(key), float | dict | list)
            if may_be and _has_huge(found[key]) and _HUGE.search(text):
                wrong = f"{key}: an integer beyond 64 bits; write it as a string"
                return Failure(Reason.WRONG_VALUE, wrong)
        if len(values) < len(self.keys):
            values = {key: values.get(key, self.defaults.get(key)) for key in self.keys}
        return Success(values)

    def _wrong_values(self, values: Mapping[str, Any]) -> str:
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


def _type_in(schema: Any) -> str | None:
    kind = as_object(schema).get("type")
    return kind if isinstance(kind, str) else None


def _as_number(kind: type[int | float], value: Any) -> Any:
    """A number in quotes is a number where one is declared (`"3"` → 3), 3 is 3.0 and 3.0 is 3."""
    if isinstance(value, list):
        return [_as_number(kind, item) for item in cast("list[Any]", value)]
    if isinstance(value, str):
        text = value.strip()  # of more than int() takes away
        return kind(text) if (_INTEGER if kind is int else _NUMBER).fullmatch(text) else value
    if kind is int:
        return int(value) if isinstance(value, float) and value.is_integer() else value
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    return float(value) if is_whole else value


def _has_huge(value: Any) -> bool:
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


_NO_OBJECT = (
    "Your answer held no valid JSON object. Answer with exactly one JSON object that has the keys "
    "{keys}, without any text around it."
)
_CORRECTIONS = {
    Reason.MISSING_KEYS: "Your JSON object {detail}. Send the whole object again "
    "with every key: {keys}.",
    Reason.WRONG_VALUE: "Your JSON object has values that are not allowed: {detail}. Send the "
    "whole corrected object and nothing else.",
    Reason.TRUNCATED: "Your answer was cut off because it was too long. Answer again with only one "
    "short JSON object that has the keys {keys}.",
    Reason.EMPTY: "Your answer was empty. Answer with one JSON object that has the keys {keys}.",
}


def correction(mistake: Failure, keys: Sequence[str]) -> str:
    text = _CORRECTIONS.get(mistake.reason, _NO_OBJECT)
    return text.format(detail=mistake.detail, keys=", ".join(f'"{key}"' for key in keys))


def said_in(replies: Iterable[Entry | Reply]) -> list[Said]:
    """What journalled replies say to their record, up to one that does not count: it is judged
    otherwise than it was, and would be asked again today."""
    turns: list[Said] = []
    for reply in replies:
        match classify(Reply(reply.status, {}, reply.body)):
            case (Answer() as said) | (Failure() as said) | Refused(record=Failure() as said):
                turns.append(said)
            case _:
                break
    return turns


@dataclass(slots=True)
class Finished:
    """The outcome, the last answer (None when the request itself was refused), the whole usage."""

    outcome: Outcome
    answer: Answer | None
    usage: Usage


@dataclass(frozen=True)
class Rules:
    parser: AnswerParser
    max_repair_turns: int

    def judge(self, turns: Sequence[Said]) -> Finished | None:
        """The outcome of the replies so far; None while the dialogue has to go on."""
        usage = Usage()
        turns_left = self.max_repair_turns if self.parser.schema is not None else 0
        for number, answer in enumerate(turns):
            if isinstance(answer, Failure):
                return Finished(answer, None, usage)
            usage = usage + answer.usage if number else answer.usage
            outcome = self.parser.parse(answer)
            is_mendable = isinstance(outcome, Failure) and outcome.reason in REPAIRABLE
            if not is_mendable or number >= turns_left:
                return Finished(outcome, answer, usage)
        return None

    def next_request(self, request: ChatRequest, turns: Sequence[Said]) -> ChatRequest:
        """The request to send after `turns`, for which `judge` gave None."""
        for answer in turns:
            assert isinstance(answer, Answer)
            mistake = self.parser.parse(answer)
            assert isinstance(mistake, Failure)
            request = request.followed_by(
                answer.text or "(empty answer)", correction(mistake, self.parser.keys)
            )
        return request
