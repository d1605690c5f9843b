"""The part of HTTP/1.1 a chat endpoint needs: requests out of bytes, bytes out of responses."""

from __future__ import annotations

from collections.abc import Generator
from functools import lru_cache
from http import HTTPStatus
from typing import NamedTuple

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


class _Head(NamedTuple):
    method: str
    path: str
    headers: dict[bytes, bytes]
    keep_alive: bool
    waits: bool  # sends the body only after a 100 Continue
    size: int | None  # of the body; None: it comes in chunks


class BadHttp(Exception):
    """The byte stream is not HTTP we speak; the connection cannot go on after the answer."""

    def __init__(self, status: int, message: str) -> None:
        self.status = status
        super().__init__(message)


def requests(buffer: bytearray) -> Generator[Request | bytes | None, None, None]:
    """Eats `buffer`. Yields each Request, bytes that must be sent, or None for "feed me more"."""
    while True:
        head = b""
        while not head:  # empty lines before a request are allowed
            head = (yield from _until(buffer, b"\r\n\r\n")).lstrip(b"\r\n")
        method, path, headers, keep_alive, waits, size = _parse_head(head)
        if waits and not buffer:
            yield CONTINUE
        body = yield from (_chunks(buffer) if size is None else _take(buffer, size))
        yield Request(method, path, headers, body, keep_alive)


@lru_cache(4096)
def _parse_head(head: bytes) -> _Head:
    """A client's heads differ in little but the length of the body, so most were met before."""
    start, *lines = head.split(b"\r\n")
    words = start.split()
    if len(words) != 3 or not words[2].startswith(b"HTTP/1."):
        raise BadHttp(400, "not an HTTP/1.1 request line")
    fields = [line.partition(b":") for line in lines]
    headers = {name.lower(): value.strip() for name, _, value in fields}
    chunked = b"chunked" in headers.get(b"transfer-encoding", b"").lower()
    close = headers.get(b"connection", b"").lower() == b"close" or words[2] == b"HTTP/1.0"
    return _Head(
        method=words[0].decode("latin-1"),
        path=words[1].partition(b"?")[0].decode("latin-1"),
        headers=headers,
        keep_alive=not close,
        waits=headers.get(b"expect", b"").lower() == b"100-continue",
        size=None if chunked else _size(headers.get(b"content-length", b"0"), 10),
    )


def _until(buffer: bytearray, end: bytes) -> Generator[None, None, bytes]:
    while (at := buffer.find(end)) < 0:
        if len(buffer) > MAX_HEAD:
            raise BadHttp(431, f"more than {MAX_HEAD} bytes of headers")
        yield None
    found = bytes(buffer[:at])
    del buffer[: at + len(end)]
    return found


def _take(buffer: bytearray, size: int) -> Generator[None, None, bytes]:
    while len(buffer) < size:
        yield None
    taken = bytes(buffer[:size])
    del buffer[:size]
    return taken


def _chunks(buffer: bytearray) -> Generator[None, None, bytes]:
    body = bytearray()
    while size := _size((yield from _until(buffer, b"\r\n")).partition(b";")[0], 16, len(body)):
        body += yield from _take(buffer, size)
        if (yield from _take(buffer, 2)) != b"\r\n":
            raise BadHttp(400, "a chunk is longer than it says")
    while (yield from _until(buffer, b"\r\n")):
        pass  # trailers
    return bytes(body)


def _size(digits: bytes, base: int, so_far: int = 0) -> int:
    try:
        size = int(digits, base)
    except ValueError:
        size = -1
    if size < 0:
        raise BadHttp(400, "the length of the body is not a number")
    if so_far + size > MAX_BODY:
        raise BadHttp(413, f"a body of more than {MAX_BODY} bytes")
    return size


def response(
    status: int, body: bytes, kind: bytes = b"application/json", more: bytes = b""
) -> bytes:
    """`more`: further header lines, each ending in CRLF."""
    return (
        b"HTTP/1.1 %d %b\r\nServer: modelcall-rehearsal\r\nContent-Type: %b\r\n"
        b"Content-Length: %d\r\n%b\r\n%b"
    ) % (status, _REASONS[status], kind, len(body), more, body)


def event_stream(events: list[bytes]) -> bytes:
    """Server-sent events, each in a chunk of its own, so the connection stays usable."""
    framed = [b"data: %b\n\n" % event for event in events]
    return (
        b"HTTP/1.1 200 OK\r\nServer: modelcall-rehearsal\r\nContent-Type: text/event-stream\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n"
        + b"".join(b"%x\r\n%b\r\n" % (len(event), event) for event in framed)
        + b"0\r\n\r\n"
    )
