"""The body of a reply as it comes: decompressed in small steps, within a limit; the events of a
stream put together to one chat completion."""

from __future__ import annotations

import re
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from modelcall_assets.llm.classify import FILTER_RESULTS, Reply, error_in
from modelcall_assets.llm.completion import NO_WHOLE_ANSWER, UNFINISHED, Texts, ending_of
from modelcall_assets.llm.json_text import BOM, Json, JsonValue, as_object, encoded, parsed
from modelcall_assets.records.outcome import Reason

ACCEPTED_ENCODINGS = "gzip, deflate"
EVENT_STREAM = "text/event-stream"
_MOST_ENCODINGS = 3
"""Each takes a window of its own in memory."""
_MOST_MEMBERS = 4096
_STEP = 1 << 20
_GZIP, _ZLIB, _RAW_DEFLATE = 16 + zlib.MAX_WBITS, zlib.MAX_WBITS, -zlib.MAX_WBITS
_GZIP_MAGIC = b"\x1f\x8b"

_COMMON = ("id", "created", "model", "system_fingerprint", "service_tier")
_TEXTS = ("reasoning_content", "reasoning", "refusal")
_NOTHING = re.compile(rb"[\s\[\]{}\"]*(?:null|ping|keep[-_ ]?alive|heartbeat)?[\s\[\]{}\"]*", re.I)
"""Data of events that only keep the connection alive."""


class Unreadable(Exception):
    """What came cannot be taken for a body; `reason` is what that makes of the reply."""

    def __init__(self, reason: Reason, text: str) -> None:
        self.reason = reason
        super().__init__(text)


class Body:
    """Decodes what a Content-Encoding says. Raises Unreadable for another encoding than those we
    ask for, and from then on for what is broken or decoded is more than `most` bytes."""

    def __init__(self, encodings: str, most: float) -> None:
        listed = [each.strip() for each in encodings.lower().split(",")]
        names = [name for name in listed if name not in ("", "identity")]
        if len(names) > _MOST_ENCODINGS or not {"gzip", "x-gzip", "deflate"}.issuperset(names):
            raise Unreadable(
                Reason.BAD_REPLY,
                f"the reply is encoded as {encodings!r}; asked for was {ACCEPTED_ENCODINGS}",
            )
        self._inflaters = [_Inflater(name) for name in reversed(names)]
        self._most = self._left = most

    def feed(self, data: bytes) -> Iterator[bytes]:
        pieces: Iterable[bytes] = (data,)
        for inflater in self._inflaters:
            pieces = inflater.of(pieces)
        for piece in pieces:
            self._left -= len(piece)
            if self._left < 0:
                raise too_large(self._most)
            yield piece

    @property
    def is_whole(self) -> bool:
        """Whether what was fed ends where the encodings say, or is nothing at all."""
        return all(inflater.is_whole for inflater in self._inflaters)


def too_large(most: float) -> Unreadable:
    text = f"the reply is larger than {most / (1 << 20):g} MiB (max_reply_mib)"
    return Unreadable(Reason.BAD_REPLY, text)


class _Inflater:
    """One layer of gzip, or of deflate with or without zlib's frame, as the first bytes show.
    Gzip may have several members; what is behind the last one is padding."""

    def __init__(self, name: str) -> None:
        self._other = _RAW_DEFLATE if name == "deflate" else _GZIP
        self._start = b""
        self._inner = None
        self._is_gzip = False
        self._members = 0
        self._is_padding = False

    @property
    def is_whole(self) -> bool:
        """Also when nothing came at all."""
        return self._inner is None and (self._members > 0 or not self._start)

    def of(self, pieces: Iterable[bytes]) -> Iterator[bytes]:
        for data in pieces:
            while not self._is_padding:
                if self._inner is None:
                    data = self._start + data
                    if len(data) < len(_GZIP_MAGIC):
                        self._start = data
                        break
                    self._begin(data)
                    continue
                try:
                    piece = self._inner.decompress(data, _STEP)
                except zlib.error as error:
                    text = f"the compressed body is broken: {error}"
                    raise Unreadable(Reason.DROPPED, text) from error
                if piece:
                    yield piece
                data = self._inner.unconsumed_tail
                if self._inner.eof:
                    data, self._inner = self._inner.unused_data, None
                    self._members += 1
                    if self._members > _MOST_MEMBERS:
                        text = f"more than {_MOST_MEMBERS} gzip members"
                        raise Unreadable(Reason.BAD_REPLY, text)
                elif not data and len(piece) < _STEP:
                    break

    def _begin(self, data: bytes) -> None:
        self._start = b""
        is_gzip = data.startswith(_GZIP_MAGIC)
        if self._members:
            self._is_padding = not (self._is_gzip and is_gzip)
        self._is_gzip = is_gzip
        is_zlib = data[0] & 15 == zlib.DEFLATED and int.from_bytes(data[:2]) % 31 == 0
        window = _GZIP if is_gzip else _ZLIB if is_zlib else self._other
        self._inner = None if self._is_padding else zlib.decompressobj(window)


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
    _usage: Json = field(default_factory=dict[str, Any])
    """The field of that name, if there is one."""
    _choices: dict[int, _Choice] = field(default_factory=lambda: dict[int, _Choice]())
    _done: bool = False
    _error: tuple[int, bytes] | None = None
    _junk: bytes | None = None

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

    def reply(self, headers: Mapping[str, str]) -> Reply:
        """Once the stream has ended: as if nothing had been streamed."""
        junk, self._ends_in_cr = self._junk, False
        self.feed(b"\n\n")  # the last event may lack its empty line, or its other half
        plain = b"\n".join(self._no_event)
        if self._error is not None:
            return Reply(self._error[0], headers, self._error[1])
        if junk is not None:
            return Reply(200, headers, junk)
        if not self._all_finished and parsed(plain) is not None:
            return Reply(200, headers, plain)
        if self._done or self._all_finished:
            return Reply(200, headers, self._completion())
        return Reply(0, {}, b"the stream ended before the answer", Reason.DROPPED)

    @property
    def is_settled(self) -> bool:
        """Whether a break of the connection would change nothing any more."""
        return bool(self._done or self._all_finished or self._error or self._junk)

    @property
    def _all_finished(self) -> bool:
        choices = self._choices.values()
        return bool(choices) and all(choice.finish_reason is not None for choice in choices)

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
        event: JsonValue = parsed(data, in_pieces=True)
        error = error_in(event)
        if name == b"error" or error is not None:
            self._error = error.status if error else 500, data
        elif isinstance(event, dict):
            self._add(event)
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
            self._usage["usage"] = usage
        for name in FILTER_RESULTS:
            if results := chunk.get(name):
                self._filter_results[name] = results
        for choice in choices:
            index = choice.get("index")
            self._choices.setdefault(index if type(index) is int else 0, _Choice()).add(choice)

    def _completion(self) -> bytes:
        choices = [
            {
                "index": index,
                "message": choice.message(),
                "finish_reason": choice.finish_reason,
                **({"logprobs": {"content": choice.logprobs}} if choice.logprobs else {}),
                **({UNFINISHED: True} if choice.finish_reason is None else {}),
            }
            for index, choice in sorted(self._choices.items())
        ]
        common = {**self._common, "object": "chat.completion", "choices": choices, **self._usage}
        return encoded(common if choices else {**common, **self._filter_results})


@dataclass
class _Choice:
    finish_reason: str | None = None
    role: str | None = None
    has_delta: bool = False
    texts: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    tool_calls: defaultdict[int, list[Json]] = field(default_factory=lambda: defaultdict(list))
    logprobs: list[Json] = field(default_factory=list[Json])
    once: Json = field(default_factory=dict[str, Any])
    again: _Choice | None = None
    """What came up to the first finish_reason, and what came behind it."""

    def add(self, choice: Json) -> None:
        """Servers set a finish_reason in every chunk, or send the whole answer twice."""
        if self.finish_reason is not None:
            delta = as_object(choice.get("delta"))
            if any(delta.get(name) for name in ("content", "tool_calls", *_TEXTS)):
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
        delta: JsonValue = choice.get("delta")
        if isinstance(delta, dict):
            self.has_delta = True
        elif not self.has_delta:  # else it repeats what came
            delta = choice.get("message")
        self.logprobs += _objects(as_object(choice.get("logprobs")).get("content"))
        given = as_object(delta)
        content = given.get("content")
        if isinstance(content, str):
            self.texts["content"].append(content)
        elif content:
            parts = Texts.of(content)
            self.texts["content"].append(parts.answer)
            for name, text in (("reasoning_content", parts.thinking), ("refusal", parts.refusal)):
                if text:
                    self.texts[name].append(text)
        for name in _TEXTS:
            if isinstance(text := given.get(name), str):
                self.texts[name].append(text)
        if isinstance(role := given.get("role"), str):
            self.role = role
        calls = _objects(given.get("tool_calls"))
        if isinstance(function := given.get("function_call"), dict):  # as it was called before
            calls.append({"type": "function", "function": function})
        for position, call in enumerate(calls):
            index = call.get("index")
            self._add_call(index if type(index) is int else position, call)

    def _add_call(self, index: int, call: Json) -> None:
        """Some servers count none: each of several calls is at 0, with a name and an id."""
        said = as_object(call.get("function"))
        calls = self.tool_calls[index]
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


def _objects(value: JsonValue) -> list[Json]:
    items: list[JsonValue] = value if isinstance(value, list) else []
    return [each for each in items if isinstance(each, dict)]


def _text(values: Json, name: str) -> str:
    value = values.get(name)
    return value if isinstance(value, str) else ""
