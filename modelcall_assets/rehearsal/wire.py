"""The part of HTTP/1.1 a chat endpoint needs: requests out of bytes, bytes out of responses."""

from __future__ import annotations

from collections import deque
from http import HTTPStatus
from typing import NamedTuple

import httptools
import orjson

MAX_HEAD = 64 * 1024
MAX_BODY = 256 * 1024 * 1024
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_REASONS = {status.value: status.phrase.encode() for status in HTTPStatus}


class Request(NamedTuple):
    method: str
    path: str
    headers: dict[bytes, bytes]
    body: bytes
    keep_alive: bool


class BadHttp(Exception):
    """The byte stream is not HTTP we speak; the connection cannot go on after the answer."""

    def __init__(self, status: int, message: str) -> None:
        self.status = status
        super().__init__(message)


class RequestParser:
    """Puts into `found` each Request, CONTINUE before a body that waits for that, and what ends
    it all. httptools calls the `on_` methods."""

    def __init__(self) -> None:
        self.found: deque[Request | bytes | BadHttp] = deque()
        self._parser = httptools.HttpRequestParser(self)
        self._begin()

    def _begin(self) -> None:
        self._url = b""
        self._headers: dict[bytes, bytes] = {}
        self._body: list[bytes] = []
        self._heard, self._most = 0, MAX_HEAD
        """Bytes of the head or the body, so far and at most."""

    def feed(self, data: bytes) -> None:
        self._heard += len(data)
        try:
            self._parser.feed_data(data)
            if self._heard > self._most:
                raise _too_large(self._most)
        except BadHttp as bad:
            self.found.append(bad)
        except httptools.HttpParserUpgrade as upgrade:  # to what we do not speak
            self._parser = httptools.HttpRequestParser(self)
            self.feed(data[upgrade.args[0] :])
        except httptools.HttpParserError as error:
            bad = error.__context__
            self.found.append(bad if isinstance(bad, BadHttp) else BadHttp(400, str(error)))

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        self._heard, self._most = 0, MAX_BODY
        if int(self._headers.get(b"content-length", 0)) > MAX_BODY:
            raise _too_large(MAX_BODY)
        if self._headers.get(b"expect", b"").lower() == b"100-continue":
            self.found.append(CONTINUE)

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        path = self._url.partition(b"?")[0].decode("latin-1")
        method, keep_alive = self._parser.get_method().decode(), self._parser.should_keep_alive()
        body = b"".join(self._body)
        self.found.append(Request(method, path, self._headers, body, keep_alive))
        self._begin()


def _too_large(most: int) -> BadHttp:
    if most == MAX_HEAD:
        return BadHttp(431, f"more than {most} bytes of headers")
    return BadHttp(413, f"a body of more than {most} bytes")


def response(
    status: int, body: bytes, kind: bytes = b"application/json", more: bytes = b""
) -> bytes:
    """`more`: further header lines, each ending in CRLF."""
    return (
        b"HTTP/1.1 %d %b\r\nServer: modelcall-rehearsal\r\nContent-Type: %b\r\n"
        b"Content-Length: %d\r\n%b\r\n%b"
    ) % (status, _REASONS[status], kind, len(body), more, body)


def json_response(value: object) -> bytes:
    return response(200, orjson.dumps(value))


def event_stream(events: list[bytes]) -> bytes:
    """Server-sent events, each in a chunk of its own, so the connection stays usable."""
    framed = [b"data: %b\n\n" % event for event in events]
    return (
        b"HTTP/1.1 200 OK\r\nServer: modelcall-rehearsal\r\nContent-Type: text/event-stream\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n"
        + b"".join(b"%x\r\n%b\r\n" % (len(event), event) for event in framed)
        + b"0\r\n\r\n"
    )
