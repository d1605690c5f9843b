"""Server-sent events of a streamed answer, put together to one chat completion."""

from __future__ import annotations

from collections.abc import AsyncIterable
from dataclasses import dataclass, field
from typing import Any, cast

import orjson

Json = dict[str, Any]

_COMMON = ("id", "created", "model", "system_fingerprint", "service_tier")
_TEXTS = ("content", "reasoning_content", "reasoning", "refusal")


def is_event_stream(content_type: str) -> bool:
    """Whether a reply's body is a stream of events."""
    return content_type[:17].lower() == "text/event-stream"


@dataclass
class StreamedAnswer:
    """Takes the bytes of a stream as they come and keeps only what the answer is made of."""

    _rest: bytes = b""
    _event: bytes = b""
    _data: list[bytes] = field(default_factory=list[bytes])
    _common: Json = field(default_factory=dict[str, Any])
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
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            self._line(line.removesuffix(b"\r"))

    def finish(self) -> tuple[int, bytes] | None:
        """Status and body as if nothing had been streamed; None if the stream ended too soon."""
        junk = self._junk
        self.feed(b"\n\n")  # the last event may lack its empty line, or its other half
        if self._error is not None:
            return self._error
        if junk is not None:
            return 200, junk
        return (200, self._completion()) if self._whole else None

    @property
    def _whole(self) -> bool:
        unfinished = (choice.finish_reason is None for choice in self._choices.values())
        return self._done or (bool(self._choices) and not any(unfinished))

    def _line(self, line: bytes) -> None:
        if line.startswith(b"data:"):
            self._data.append(line[5:].removeprefix(b" "))
        elif line.startswith(b"event:"):
            self._event = line[6:].strip()
        elif not line and self._data:
            data, name = b"\n".join(self._data), self._event
            self._data, self._event = [], b""
            self._take(data, name)

    def _take(self, data: bytes, name: bytes) -> None:
        if self._done or data == b"[DONE]":
            self._done = True
            return
        try:
            parsed: object = orjson.loads(data)
        except orjson.JSONDecodeError:
            parsed = None
        if not isinstance(parsed, dict):
            self._junk = data
            return
        event = cast("Json", parsed)
        if name == b"error" or event.get("error") or event.get("object") == "error":
            self._error = _error_status(event), data
        else:
            self._add(event)

    def _add(self, chunk: Json) -> None:
        for name in _COMMON:
            if isinstance(value := chunk.get(name), str | int) and not self._common.get(name):
                self._common[name] = value
        if isinstance(usage := chunk.get("usage"), dict):
            self._usage = cast("Json", usage)
        for choice in _objects(chunk.get("choices")):
            index = choice.get("index")
            self._choices.setdefault(index if type(index) is int else 0, _Choice()).add(choice)

    def _completion(self) -> bytes:
        found = sorted(self._choices.items())
        choices = [
            {"index": index, "message": choice.message(), "finish_reason": choice.finish_reason}
            for index, choice in found
        ]
        usage = {} if self._usage is None else {"usage": self._usage}
        whole = {**self._common, "object": "chat.completion", "choices": choices, **usage}
        try:
            return orjson.dumps(whole)
        except orjson.JSONEncodeError:
            return b"a usage that is nested too deeply"


@dataclass
class _Choice:
    """One of the answers, as far as it has come."""

    finish_reason: str | None = None
    role: str | None = None
    texts: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    tool_calls: dict[int, Json] = field(default_factory=dict[int, Json])

    def add(self, choice: Json) -> None:
        if isinstance(reason := choice.get("finish_reason"), str):
            self.finish_reason = reason
        delta = choice.get("delta")
        if not isinstance(delta, dict):
            return
        given = cast("Json", delta)
        for name in _TEXTS:
            if isinstance(text := given.get(name), str):
                self.texts.setdefault(name, []).append(text)
        if isinstance(role := given.get("role"), str):
            self.role = role
        for position, call in enumerate(_objects(given.get("tool_calls"))):
            index = call.get("index")
            self._add_call(index if type(index) is int else position, call)

    def _add_call(self, index: int, call: Json) -> None:
        function: Json = {"name": "", "arguments": ""}
        known = self.tool_calls.setdefault(index, {"id": "", "type": "", "function": function})
        function = known["function"]
        for name in ("id", "type"):
            known[name] = known[name] or _text(call, name)
        more = call.get("function")
        if isinstance(more, dict):
            function["name"] = function["name"] or _text(cast("Json", more), "name")
            function["arguments"] += _text(cast("Json", more), "arguments")

    def message(self) -> Json:
        texts = {name: "".join(parts) for name, parts in self.texts.items()}
        calls = [call for _, call in sorted(self.tool_calls.items())]
        message: Json = {"role": self.role or "assistant", "content": None, **texts}
        return {**message, "tool_calls": calls} if calls else message


def _objects(value: object) -> list[Json]:
    items = cast("list[object]", value) if isinstance(value, list) else []
    return [cast("Json", item) for item in items if isinstance(item, dict)]


def _text(values: Json, name: str) -> str:
    value = values.get(name)
    return value if isinstance(value, str) else ""


def _error_status(event: Json) -> int:
    """The code of an error in a stream, if it is that of an HTTP error."""
    match event:
        case {"error": {"code": int(code)}} | {"code": int(code)} if 400 <= code <= 599:
            return code
        case _:
            return 500
