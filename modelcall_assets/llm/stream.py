"""Server-sent events of a streamed answer, put together to one chat completion."""

from __future__ import annotations

import re
from collections.abc import AsyncIterable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, cast

from modelcall_assets.llm.error import error_in
from modelcall_assets.llm.message import (
    NO_WHOLE_ANSWER,
    UNFINISHED,
    Texts,
    encoded,
    ending_of,
    parsed,
)

Json = dict[str, Any]

BOM = b"\xef\xbb\xbf"
FILTER_RESULTS = ("prompt_filter_results", "content_filter_results", "prompt_feedback")
"""What a reply without a choice has when its request was filtered."""

_COMMON = ("id", "created", "model", "system_fingerprint", "service_tier")
_TEXTS = ("reasoning_content", "reasoning", "refusal")
_NOTHING = re.compile(rb"[\s\[\]{}\"]*(?:null|ping|keep[-_ ]?alive|heartbeat)?[\s\[\]{}\"]*", re.I)
"""Data of events that only keep the connection alive."""
_BEGINNING = re.compile(rb"(?:%b)?\s*(?:data|event|id|retry)?:" % BOM)


def begins_as_events(body: bytes) -> bool:
    """Whether a body is one, whatever its content type says."""
    return body[:1] != b"{" and _BEGINNING.match(body) is not None


def is_event_stream(content_type: str) -> bool:
    """Whether a reply's body is a stream of events."""
    return content_type[:17].lower() == "text/event-stream"


@dataclass
class StreamedAnswer:
    """Takes the bytes of a stream as they come and keeps only what the answer is made of."""

    _rest: list[bytes] = field(default_factory=list[bytes])
    _event: bytes = b""
    _data: list[bytes] = field(default_factory=list[bytes])
    _no_event: list[bytes] = field(default_factory=list[bytes])
    """Lines that are of no event: some servers send plain JSON, an error above all."""
    _common: Json = field(default_factory=dict[str, Any])
    _ends_in_cr: bool = False
    _filter_results: Json = field(default_factory=dict[str, Any])
    _usage: Json | None = None
    _choices: dict[int, _Choice] = field(default_factory=lambda: dict[int, _Choice]())
    _done: bool = False
    _error: tuple[int, bytes] | None = None
    _junk: bytes | None = None

    async def read(
        self, chunks: AsyncIterable[bytes], broken: tuple[type[Exception], ...]
    ) -> StreamedAnswer:
        """To the end of the stream. What is settled by then survives a break of the connection."""
        try:
            async for chunk in chunks:
                self.feed(chunk)
        except broken:
            if not (self._whole or self._error or self._junk):
                raise
        return self

    def feed(self, chunk: bytes) -> None:
        if self._ends_in_cr and chunk:  # and its other half is no line of its own
            chunk, self._ends_in_cr = chunk.removeprefix(b"\n"), False
        if b"\r" in chunk:
            self._ends_in_cr = chunk.endswith(b"\r")
            chunk = chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        if b"\n" not in chunk:
            self._rest.append(chunk)  # and put together once: a line may be as long as a reply
            return
        *lines, rest = b"".join([*self._rest, chunk]).split(b"\n")
        self._rest = [rest]
        for line in lines:
            self._line(line)

    def finish(self) -> tuple[int, bytes] | None:
        """Status and body as if nothing had been streamed; None if the stream ended too soon."""
        junk, self._ends_in_cr = self._junk, False
        self.feed(b"\n\n")  # the last event may lack its empty line, or its other half
        if self._error is not None:
            return self._error
        if junk is not None:
            return 200, junk
        plain = b"\n".join(self._no_event)
        if not self._all_finished and parsed(plain) is not None:
            return 200, plain
        return (200, self._completion()) if self._whole else None

    @property
    def _whole(self) -> bool:
        return self._done or self._all_finished

    @property
    def _all_finished(self) -> bool:
        unfinished = (choice.finish_reason is None for choice in self._choices.values())
        return bool(self._choices) and not any(unfinished)

    def _line(self, line: bytes) -> None:
        if line.startswith(b"data:"):
            self._data.append(line[5:].removeprefix(b" "))
        elif line.startswith(b"event:"):
            self._event = line[6:].strip()
        elif not line:
            data, name = self._data, self._event
            self._data, self._event = [], b""
            if data:
                self._take(b"\n".join(data), name)
        elif line.startswith(BOM):
            self._line(line[len(BOM) :])
        elif not line.startswith((b":", b"id", b"retry")):
            self._no_event.append(line)

    def _take(self, data: bytes, name: bytes) -> None:
        if self._done or data.strip() == b"[DONE]":
            self._done = True
            return
        if name == b"ping" or (name != b"error" and len(data) < 50 and _NOTHING.fullmatch(data)):
            return
        event = parsed(data, in_pieces=True)
        error = error_in(event)
        if name == b"error" or error is not None:
            self._error = error.status if error else 500, data
        elif isinstance(event, dict):
            self._add(cast("Json", event))
        else:
            self._junk = data

    def _add(self, chunk: Json) -> None:
        choices = _objects(chunk.get("choices"))
        other = chunk.get("id") not in (None, "", self._common.get("id"))
        if choices and other and "id" in self._common and self._all_finished:
            self._done = True  # what follows is another reply
            return
        for name in _COMMON:
            if isinstance(value := chunk.get(name), str | int) and not self._common.get(name):
                self._common[name] = value
        if isinstance(usage := chunk.get("usage"), dict):
            self._usage = cast("Json", usage)
        for name in FILTER_RESULTS:
            if results := chunk.get(name):
                self._filter_results[name] = results
        for choice in choices:
            index = choice.get("index")
            self._choices.setdefault(index if type(index) is int else 0, _Choice()).add(choice)

    def _completion(self) -> bytes:
        found = sorted(self._choices.items())
        choices = [
            {
                "index": index,
                "message": choice.message(),
                "finish_reason": choice.finish_reason,
                **({UNFINISHED: True} if choice.finish_reason is None else {}),
            }
            for index, choice in found
        ]
        more = {} if self._usage is None else {"usage": self._usage}
        more |= {} if choices else self._filter_results
        whole = {**self._common, "object": "chat.completion", "choices": choices, **more}
        return encoded(whole)


@dataclass
class _Choice:
    """One of the answers, as far as it has come."""

    finish_reason: str | None = None
    role: str | None = None
    has_delta: bool = False
    texts: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    tool_calls: dict[int, list[Json]] = field(default_factory=dict[int, list[Json]])
    once: Json = field(default_factory=dict[str, Any])
    again: _Choice | None = None
    """What came up to the first finish_reason, and what came behind it."""

    def add(self, choice: Json) -> None:
        """Servers set a finish_reason in every chunk, or send the whole answer twice."""
        if self.finish_reason is not None and _says_more(choice):
            self.once = self.once or deepcopy(self.message())
            self.again = self.again or _Choice()
            self.finish_reason = None
        if self.again is not None:
            self.again._take(choice)
        self._take(choice)

    def _take(self, choice: Json) -> None:
        reason = choice.get("finish_reason")
        says_reason = isinstance(reason, str) and reason not in ("", "null")
        if says_reason and ending_of({"finish_reason": self.finish_reason}) not in NO_WHOLE_ANSWER:
            self.finish_reason = reason
        delta = choice.get("delta")
        if isinstance(delta, dict):
            self.has_delta = True
        elif not self.has_delta:  # else it repeats what came
            delta = choice.get("message")
        if not isinstance(delta, dict):
            return
        given = cast("Json", delta)
        self._add_content(given.get("content"))
        for name in _TEXTS:
            if isinstance(text := given.get(name), str):
                self.texts.setdefault(name, []).append(text)
        if isinstance(role := given.get("role"), str):
            self.role = role
        calls = _objects(given.get("tool_calls"))
        if isinstance(function := given.get("function_call"), dict):  # as it was called before
            calls.append({"type": "function", "function": function})
        for position, call in enumerate(calls):
            index = call.get("index")
            self._add_call(index if type(index) is int else position, call)

    def _add_content(self, content: object) -> None:
        """A text, or a list of parts."""
        if isinstance(content, str):
            self.texts.setdefault("content", []).append(content)
        elif content:
            texts = Texts.of(content)
            self.texts.setdefault("content", []).append(texts.answer)
            for name, text in (("reasoning_content", texts.thinking), ("refusal", texts.refusal)):
                if text:
                    self.texts.setdefault(name, []).append(text)

    def _add_call(self, index: int, call: Json) -> None:
        """Some servers count none: each of several calls is at 0, with a name and an id."""
        more = call.get("function")
        said = cast("Json", more) if isinstance(more, dict) else {}
        calls = self.tool_calls.setdefault(index, [])
        other = calls and calls[-1]["id"] not in ("", _text(call, "id") or calls[-1]["id"])
        if not calls or (other and _text(said, "name")):
            calls.append({"id": "", "type": "", "function": {"name": "", "arguments": ""}})
        known, function = calls[-1], calls[-1]["function"]
        for name in ("id", "type"):
            known[name] = known[name] or _text(call, name)
        function["name"] = function["name"] or _text(said, "name")
        function["arguments"] += _text(said, "arguments")

    def message(self) -> Json:
        if self.again is not None and self.again.message() == self.once:
            return self.once
        texts = {name: text for name, parts in self.texts.items() if (text := "".join(parts))}
        calls = [call for _, calls in sorted(self.tool_calls.items()) for call in calls]
        message: Json = {"role": self.role or "assistant", "content": None, **texts}
        return {**message, "tool_calls": calls} if calls else message


def _says_more(choice: Json) -> bool:
    delta = choice.get("delta")
    given = cast("Json", delta) if isinstance(delta, dict) else {}
    return any(given.get(name) for name in ("content", "tool_calls", *_TEXTS))


def _objects(value: object) -> list[Json]:
    items = cast("list[object]", value) if isinstance(value, list) else []
    return [cast("Json", item) for item in items if isinstance(item, dict)]


def _text(values: Json, name: str) -> str:
    value = values.get(name)
    return value if isinstance(value, str) else ""
