"""One request's reply as it comes over a connection, from its first byte to its last.

An exchange owns its parser, headers and body and dies with the reply, so that nothing of one can
become part of another. httptools parses; what it calls is here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain

import httptools

from modelcall_assets.llm.body import Body, Unreadable, too_large
from modelcall_assets.llm.stream import StreamedAnswer, is_event_stream
from modelcall_assets.records.outcome import Reason

MOST_HEADER_BYTES = 64 << 10
"""Of all that is no body: headers, notices before them, trailers, and what is between chunks."""
_TOO_LONG = f"more than {MOST_HEADER_BYTES} bytes of headers"


@dataclass(slots=True)
class Response:
    """Header names are in lower case; the body is as the server meant it, decompressed. `stream`
    has what came as server-sent events, and then there is no body."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    stream: StreamedAnswer | None = None
    sent: int = 1
    """How often the request went out."""


class NoReply(Exception):
    """There is no reply that could be used, or only part of one; `sent` is 0 when nothing was
    asked because there is no connection."""

    def __init__(self, reason: Reason, text: str, partial: Response | None = None) -> None:
        self.reason = reason
        self.partial = partial
        self.sent = 0
        super().__init__(text)


class HttpExchange:
    """One request's reply as it comes. httptools calls the `on_` methods."""

    __slots__ = (
        "_body_until", "_decoded", "_headers", "_most_body", "_parser", "_parts", "_response",
        "answer", "heard", "is_followed", "is_sent", "may_keep",
    )  # fmt: skip

    def __init__(self, most_body: int) -> None:
        self.answer: asyncio.Future[Response] = asyncio.get_running_loop().create_future()
        self.may_keep = self.is_followed = False
        """`is_followed`: there was more behind the reply, in the same bytes."""
        self.is_sent = False
        self.heard = 0
        """Bytes that have come back for the request."""
        self._parser = httptools.HttpResponseParser(self)
        self._most_body = most_body
        self._body_until = 0
        """What was heard when the last bytes of a body came."""
        self._headers: list[tuple[bytes, bytes]] = []
        self._response: Response | None = None
        self._parts: list[bytes] = []
        self._decoded: Body | None = None

    def feed(self, data: memoryview) -> bool:
        """The last byte goes alone: a reply that is whole without it has something behind it."""
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
            self.fail(Reason.DROPPED, _TOO_LONG)
        if self.heard - MOST_HEADER_BYTES > self._most_body:
            self._give_up(too_large(self._most_body))
        if not self.answer.done():
            return True
        del self._parser  # it knows this exchange, and they would wait for the garbage collector
        return False

    def lost(self, error: Exception | None) -> None:
        if error is None and self._response is not None and _tells_no_length(self._response):
            self.on_message_complete()
        text = str(error) if error else "the server closed the connection without a whole answer"
        self.fail(Reason.DROPPED, text)

    def fail(self, reason: Reason, text: str) -> None:
        """Unless there is an answer already."""
        self.may_keep = False
        if not self.answer.done():
            self.answer.set_exception(NoReply(reason, text, self._response))

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name, value))  # behind the body they are trailers, and not looked at

    def on_headers_complete(self) -> None:
        status, raw, self._headers = self._parser.get_status_code(), self._headers, []
        if status < 200 or self.answer.done():
            return  # only a notice before the response, or what is behind it
        may_be_long = self.heard > MOST_HEADER_BYTES  # or the body begins in the same bytes
        if may_be_long and sum(map(len, chain(*raw))) > MOST_HEADER_BYTES:
            self.fail(Reason.DROPPED, _TOO_LONG)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in raw}
        self._response = Response(status, headers, b"")
        if status == 200 and is_event_stream(headers.get("content-type", "")):
            self._response.stream = StreamedAnswer()
        if "content-encoding" in headers:
            encodings = [value for name, value in raw if name.lower() == b"content-encoding"]
            try:
                self._decoded = Body(b",".join(encodings).decode("latin-1"), self._most_body)
            except Unreadable as error:
                self._give_up(error)

    def on_body(self, data: bytes) -> None:
        self._body_until = self.heard
        if self.answer.done():
            return
        assert self._response is not None
        stream = self._response.stream
        take = self._parts.append if stream is None else stream.feed
        if self._decoded is None:
            take(data)
            return
        try:
            for piece in self._decoded.feed(data):
                take(piece)
        except Unreadable as error:
            self._give_up(error)

    def on_message_complete(self) -> None:
        if self._response is None or self.answer.done():
            return
        if self._decoded is not None and not self._decoded.is_whole:
            self._give_up(Unreadable(Reason.DROPPED, "the compressed body is cut off"))
            return
        self.may_keep = self._parser.should_keep_alive()
        self._response.body = b"".join(self._parts)
        self.answer.set_result(self._response)

    def _give_up(self, error: Unreadable) -> None:
        """The status of an error counts even if nobody can read its body."""
        response = self._response
        if response is not None and response.status >= 300 and not self.answer.done():
            response.body = str(error).encode()
            self.answer.set_result(response)
        self.fail(error.reason, str(error))


class Tunnel:
    """A proxy's answer to CONNECT: a head and nothing behind it, whatever the head says."""

    def __init__(self) -> None:
        self.status: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.may_keep = False
        self._heard = b""

    def feed(self, data: memoryview) -> bool:
        self._heard += data
        head, end, rest = self._heard.partition(b"\r\n\r\n")
        if len(head) > MOST_HEADER_BYTES:
            self._fail(_TOO_LONG)
        elif end:
            version, _, status = head.partition(b"\r\n")[0].partition(b" ")
            if not version.startswith(b"HTTP/1."):
                self._fail("not HTTP")
            elif not self.status.done():
                self.may_keep = not rest
                self.status.set_result(status[:3].decode("latin-1"))
        return not self.status.done()

    def lost(self, error: Exception | None) -> None:
        self._fail(str(error) if error else "closed the connection without an answer")

    def _fail(self, text: str) -> None:
        if not self.status.done():
            self.status.set_exception(OSError(text))


def _tells_no_length(response: Response) -> bool:
    """Whether the end of the connection is that of the response."""
    headers = response.headers
    is_chunked = "chunked" in headers.get("transfer-encoding", "").lower()
    return "content-length" not in headers and not is_chunked
