"""A lean HTTP/1.1 connection, and one request's reply as it comes over it.

The engine sends thousands of requests a second from one core, and a general client costs several
times what the rest of a call does (docs/performance.md). Parsing is httptools'; redirects, cookies
and HTTP/2 are not here because a chat endpoint needs none of them.

A connection only carries bytes. An exchange owns its parser, headers and body and dies with the
reply, so that nothing of one can become part of another. Whatever comes that no request asked for
ends the connection, so that no row can be given another one's answer.
"""

from __future__ import annotations

import asyncio
import select
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from typing import cast

import httptools

from modelcall_assets.llm.body import EVENT_STREAM, Body, StreamedAnswer, Unreadable, too_large
from modelcall_assets.llm.classify import Reply
from modelcall_assets.records.outcome import Reason

SOON_S = 5.0
"""What comes later on an idle connection may be a server's farewell; sooner, it is a reply."""
MOST_HEADER_BYTES = 64 << 10
"""Of all that is no body: headers, notices before them, trailers, and what is between chunks."""
TOO_LONG = f"more than {MOST_HEADER_BYTES} bytes of headers"


@dataclass(eq=False, repr=False, slots=True)
class HttpExchange:
    """One request's reply as it comes. httptools calls the `on_` methods."""

    most_body: int
    answer: asyncio.Future[Reply] = field(default_factory=asyncio.Future[Reply])
    stream: StreamedAnswer | None = None
    """What comes as server-sent events; the body is then the completion that they make."""
    may_keep: bool = False
    """Whether the connection is as good as before."""
    is_followed: bool = False
    """Whether more came right behind the reply."""
    is_sent: bool = False
    heard: int = 0
    """Bytes that have come back for the request."""
    _body_until: int = 0
    """What was heard when the last bytes of a body came."""
    _headers: list[tuple[bytes, bytes]] = field(init=False)
    _reply: Reply | None = None
    _parts: list[bytes] = field(init=False)
    _decoded: Body | None = None
    _parser: httptools.HttpResponseParser = field(init=False)

    def feed(self, data: memoryview) -> bool:
        """Whether there is more to come. `data` is another's afterwards. The last byte goes alone:
        a reply that is whole without it has something behind it."""
        if not self.heard:
            self._parser, self._headers, self._parts = httptools.HttpResponseParser(self), [], []
        self.heard += len(data)
        try:
            self._parser.feed_data(data[:-1])
            if self.answer.done():
                self.may_keep, self.is_followed = False, self.may_keep
            else:
                self._parser.feed_data(data[-1:])
        except httptools.HttpParserUpgrade:
            self.fail(Reason.DROPPED, "the server changed to another protocol")
        except httptools.HttpParserError as error:
            self.fail(Reason.DROPPED, f"not HTTP: {error}")
        if self.heard - self._body_until > MOST_HEADER_BYTES:
            self.fail(Reason.DROPPED, TOO_LONG)
        if self.heard - MOST_HEADER_BYTES > self.most_body:
            self._give_up(too_large(self.most_body))
        if not self.answer.done():
            return True
        del self._parser  # it knows this exchange, and they would wait for the garbage collector
        return False

    def lost(self, error: Exception | None) -> None:
        if error is None and self._reply is not None:
            headers = self._reply.headers
            is_chunked = "chunked" in headers.get("transfer-encoding", "").lower()
            if "content-length" not in headers and not is_chunked:
                self.on_message_complete()  # its end is that of the connection
        text = str(error) if error else "the server closed the connection without a whole answer"
        self.fail(Reason.DROPPED, text)

    def fail(self, reason: Reason, text: str) -> None:
        """Unless there is an answer already, or a stream has said all of it."""
        self.may_keep = False
        if self.answer.done():
            return
        reply = Reply(0, {}, text.encode(), reason)
        if self.stream is not None and self._reply is not None:
            streamed = self.stream.reply(self._reply.headers)
            reply = streamed if reason is Reason.DROPPED or streamed.status else reply
        self.answer.set_result(reply)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name, value))  # behind the body they are trailers, and not looked at

    def on_headers_complete(self) -> None:
        status, raw, self._headers = self._parser.get_status_code(), self._headers, []
        if status < 200 or self.answer.done():
            return  # only a notice before the response, or what is behind it
        may_be_long = self.heard > MOST_HEADER_BYTES  # or the body begins in the same bytes
        if may_be_long and sum(map(len, chain(*raw))) > MOST_HEADER_BYTES:
            self.fail(Reason.DROPPED, TOO_LONG)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in raw}
        self._reply = Reply(status, headers, b"")
        if status == 200 and headers.get("content-type", "").lower().startswith(EVENT_STREAM):
            self.stream = StreamedAnswer()
        if "content-encoding" in headers:
            encodings = [value for name, value in raw if name.lower() == b"content-encoding"]
            try:
                self._decoded = Body(b",".join(encodings).decode("latin-1"), self.most_body)
            except Unreadable as error:
                self._give_up(error)

    def on_body(self, data: bytes) -> None:
        self._body_until = self.heard
        if self.answer.done():
            return
        take = self._parts.append if self.stream is None else self.stream.feed
        if self._decoded is None:
            take(data)
            return
        try:
            for piece in self._decoded.feed(data):
                take(piece)
        except Unreadable as error:
            self._give_up(error)

    def on_message_complete(self) -> None:
        reply = self._reply
        if reply is None or self.answer.done():
            return
        if self._decoded is not None and not self._decoded.is_whole:
            self._give_up(Unreadable(Reason.DROPPED, "the compressed body is cut off"))
            return
        self.may_keep = self._parser.should_keep_alive()
        if self.stream is None:
            reply.body = b"".join(self._parts)
        else:
            reply = self.stream.reply(reply.headers)
        self.answer.set_result(reply)

    def _give_up(self, error: Unreadable) -> None:
        """The status of an error counts even if nobody can read its body."""
        if self._reply is not None and self._reply.status >= 300 and not self.answer.done():
            self._reply.body = str(error).encode()
            self.answer.set_result(self._reply)
        self.fail(error.reason, str(error))


@dataclass(eq=False, repr=False)
class Connection(asyncio.BufferedProtocol):
    """Carries bytes for one exchange at a time. Anything without one ends it, and is told to
    `unasked`.

    What comes is read into the one `buffer` of all connections and taken out of it at once: memory
    for each read, as asyncio takes it by itself, costs as much as all that is done with a reply."""

    open_ones: set[Connection]
    unasked: Callable[[], None]
    buffer: memoryview
    timeout_s: float
    idle_since: float = float("-inf")
    is_sound: bool = True
    _until: float = 0.0
    _alarm: asyncio.TimerHandle | None = None
    _asked: HttpExchange | None = None

    def ask(self, exchange: HttpExchange, request: bytes, until: float) -> None:
        """The exchange fails when it is not answered `until` then."""
        is_kept = self.idle_since > 0
        if not self.is_sound or (is_kept and self._readable.poll(0)):
            self.is_sound = False
            exchange.fail(Reason.DROPPED, "the server spoke, or hung up, before it was asked")
            return
        self._asked, self._until = exchange, until
        if self._alarm is None:
            self._alarm = asyncio.get_running_loop().call_at(until, self._on_alarm)
        exchange.is_sent = True
        self._transport.write(request)

    def _on_alarm(self) -> None:
        """One alarm goes off for the first of many requests; for each one they would cost more."""
        self._alarm = None
        if self._asked is None:
            return
        loop = asyncio.get_running_loop()
        if loop.time() < self._until:
            self._alarm = loop.call_at(self._until, self._on_alarm)
        else:
            self._asked.fail(Reason.TIMEOUT, f"no answer within {self.timeout_s:g} s")

    def abort(self) -> None:
        self.is_sound = False
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._readable = select.poll()
        self._readable.register(transport.get_extra_info("socket"), select.POLLIN)
        self.open_ones.add(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        asked = self._asked
        if asked is None:
            self.abort()
            if asyncio.get_running_loop().time() - self.idle_since < SOON_S:
                self.unasked()
        elif not asked.feed(self.buffer[:nbytes]):
            self._asked = None
            if not asked.may_keep or self._transport.get_write_buffer_size():
                self.is_sound = False

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_sound = False
        if self._alarm is not None:
            self._alarm.cancel()
        self.open_ones.discard(self)
        if self._asked is not None:
            self._asked.lost(exc)
