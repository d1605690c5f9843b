"""A lean HTTP/1.1 client: POSTs to one URL over connections that are kept.

The engine sends thousands of requests a second from one core, and a general client costs several
times what the rest of a call does (docs/performance.md). Parsing is httptools'; redirects, cookies
and HTTP/2 are not here because a chat endpoint needs none of them.
"""

from __future__ import annotations

import asyncio
import ssl
import zlib
from base64 import b64encode
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast
from urllib.parse import SplitResult, unquote, urlsplit

import httptools

from modelcall_assets.llm.stream import StreamedAnswer, is_event_stream

CLOSED_BEFORE_S = 0.5
IDLE_S = 15.0
"""A connection idle for longer is not used again: servers close theirs without a word."""
MOST_HEADER_BYTES = 64 << 10
_COMPRESSED = ("gzip", "x-gzip", "deflate")
_GZIP_OR_ZLIB = 32 + zlib.MAX_WBITS
_PORTS = {"http": 80, "https": 443}


@dataclass(slots=True)
class Response:
    """Header names are in lower case; the body is as the server meant it, decompressed. `stream`
    has what came as server-sent events, and then there is no body."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    stream: StreamedAnswer | None = None


class ConnectFailed(Exception):
    """There is no connection, so nothing was asked."""


class Dropped(Exception):
    """The connection ended before the response did; `partial` is what had come of it."""

    def __init__(self, text: str, partial: Response | None = None) -> None:
        self.partial = partial
        super().__init__(text)


class HttpClient:
    """`headers` are sent with every request. `proxy` is an http(s) URL, perhaps with a user."""

    def __init__(
        self,
        url: str,
        headers: Mapping[str, str],
        *,
        timeout_s: float,
        connect_timeout_s: float,
        proxy: str | None = None,
        tls: Callable[[], ssl.SSLContext] = ssl.create_default_context,
    ) -> None:
        self._target = urlsplit(url)
        self._proxy = urlsplit(proxy) if proxy else None
        self._timeout_s = timeout_s
        self._connect_timeout_s = connect_timeout_s
        is_tls = "https" in (self._target.scheme, self._proxy.scheme if self._proxy else "")
        self._tls = tls() if is_tls else None
        self._head = _head(self._target, headers, self._proxy)
        self._idle: list[_Connection] = []
        self._open: set[_Connection] = set()

    async def aclose(self) -> None:
        for connection in tuple(self._open):
            connection.abort()
        while self._open:  # noqa: ASYNC110  their ends are a turn of the loop away
            await asyncio.sleep(0)

    async def post(self, payload: bytes) -> Response:
        """Raises ConnectFailed, Dropped, or TimeoutError after `timeout_s` in all.

        A kept connection that ends at once and without a byte of the reply is taken for one that
        the server had closed already, and the request is sent once more on a new one.
        """
        request = b"%b%d\r\n\r\n%b" % (self._head, len(payload), payload)
        loop = asyncio.get_running_loop()
        now = loop.time()
        until, connection = now + self._timeout_s, self._kept(now)
        if connection is not None:
            try:
                return await self._asked(connection, request, until)
            except Dropped:
                if connection.has_heard or loop.time() - now > CLOSED_BEFORE_S:
                    raise
        return await self._asked(await self._connect(), request, until)

    async def _asked(self, connection: _Connection, request: bytes, until: float) -> Response:
        loop = asyncio.get_running_loop()
        answer = connection.ask(request)
        timer = loop.call_at(until, _time_out, answer)
        try:
            return await answer
        finally:
            timer.cancel()
            if connection.is_usable:
                connection.idle_since = loop.time()
                self._idle.append(connection)
            else:
                connection.abort()

    def _kept(self, now: float) -> _Connection | None:
        """The connection used last, for that is the one most surely alive."""
        while self._idle:
            connection = self._idle.pop()
            if connection.is_usable and now - connection.idle_since < IDLE_S:
                return connection
            connection.abort()
        return None

    async def _connect(self) -> _Connection:
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                connection = await self._dial(self._proxy or self._target)
                if self._proxy is not None and self._target.scheme == "https":
                    await self._tunnel(connection, self._proxy)
        except TimeoutError:
            raise
        except OSError as error:  # ssl.SSLError is one
            raise ConnectFailed(str(error) or type(error).__name__) from error
        return connection

    async def _dial(self, to: SplitResult) -> _Connection:
        host, is_tls = _host(to), to.scheme == "https"
        _, protocol = await asyncio.get_running_loop().create_connection(
            lambda: _Connection(self._open),
            host,
            to.port or _PORTS[to.scheme],
            ssl=self._tls if is_tls else None,
            server_hostname=host if is_tls else None,
            happy_eyeballs_delay=0.25,
        )
        return protocol

    async def _tunnel(self, connection: _Connection, proxy: SplitResult) -> None:
        """Through the proxy to the target, then TLS with that."""
        host = _host(self._target)
        name = f"[{host}]" if ":" in host else host
        to = f"{name}:{self._target.port or 443}"
        lines = [f"CONNECT {to} HTTP/1.1", f"Host: {to}", *_proxy_authorization(proxy), "", ""]
        try:
            status = await connection.open_tunnel("\r\n".join(lines).encode("latin-1"))
        except Dropped as error:
            raise ConnectFailed(f"the proxy: {error}") from error
        if not 200 <= status < 300:
            connection.abort()
            raise ConnectFailed(f"the proxy answered {status}")
        assert self._tls is not None
        await connection.start_tls(self._tls, host)


class _Connection(asyncio.Protocol):
    """One connection, one request at a time. httptools calls the `on_` methods."""

    def __init__(self, open_ones: set[_Connection]) -> None:
        self.idle_since = 0.0
        self.has_heard = False
        """Whether anything has come back for the request."""
        self._open_ones = open_ones
        self._answer: asyncio.Future[Response] | None = None
        self._tunnel: asyncio.Future[int] | None = None
        self._is_lost = False
        self._keep = True
        self._parser = httptools.HttpResponseParser(self)
        self._head_bytes = 0
        self._raw_headers: list[tuple[bytes, bytes]] = []
        self._response: Response | None = None
        self._body: list[bytes] = []
        self._inflate: _Inflater | None = None

    @property
    def is_usable(self) -> bool:
        """For another request."""
        return self._keep and self._answer is None and not self._is_lost

    def ask(self, request: bytes) -> asyncio.Future[Response]:
        self.has_heard = False
        answer = self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return answer

    async def open_tunnel(self, request: bytes) -> int:
        """The status that a proxy answers with."""
        self._tunnel = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._tunnel

    async def start_tls(self, tls: ssl.SSLContext, host: str) -> None:
        plain, self._tunnel = self._transport, None
        self._parser = httptools.HttpResponseParser(self)
        transport = await asyncio.get_running_loop().start_tls(
            plain, self, tls, server_hostname=host
        )
        assert transport is not None
        self._transport = transport

    def abort(self) -> None:
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._open_ones.add(self)

    def data_received(self, data: bytes) -> None:
        if self._tunnel is None and self._answer is None:  # nobody asked
            self._keep = False
            return
        self.has_heard = True
        if self._response is None:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass  # a CONNECT's answer
        except httptools.HttpParserError as error:
            self._fail(Dropped(f"not HTTP: {error}"))
        if self._head_bytes > MOST_HEADER_BYTES and self._response is None:
            self._fail(_too_long_head())

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_lost = True
        self._open_ones.discard(self)
        if self._ends_with_connection and exc is None:
            self.on_message_complete()
        else:
            text = str(exc) if exc else "the server closed the connection without a whole answer"
            self._fail(Dropped(text, self._response))

    def on_header(self, name: bytes, value: bytes) -> None:
        self._raw_headers.append((name, value))

    def on_headers_complete(self) -> None:
        if self._head_bytes > MOST_HEADER_BYTES:  # or the body begins in the same bytes
            size = sum(len(name) + len(value) for name, value in self._raw_headers)
            if size > MOST_HEADER_BYTES:
                self._fail(_too_long_head())
                return
        status = self._parser.get_status_code()
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1")
            for name, value in self._raw_headers
        }
        self._raw_headers = []
        if status < 200:
            return  # only a notice before the response
        self._response = Response(status, headers, b"")
        if status == 200 and is_event_stream(headers.get("content-type", "")):
            self._response.stream = StreamedAnswer()
        if headers.get("content-encoding", "") in _COMPRESSED:
            self._inflate = _Inflater()
        if self._tunnel is not None and not self._tunnel.done():
            self._tunnel.set_result(status)

    def on_body(self, body: bytes) -> None:
        if self._inflate is not None:
            body = self._inflate.feed(body)
        if self._response is not None and self._response.stream is not None:
            self._response.stream.feed(body)
        else:
            self._body.append(body)

    def on_message_complete(self) -> None:
        if self._response is None:
            return
        response, self._response = self._response, None
        answer, self._answer = self._answer, None
        self._keep = self._keep and answer is not None and self._parser.should_keep_alive()
        if answer is not None and not answer.done():
            if self._inflate is not None and self._inflate.error:
                answer.set_exception(Dropped(self._inflate.error))
            else:
                response.body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
                answer.set_result(response)
        self._head_bytes, self._body, self._inflate = 0, [], None

    @property
    def _ends_with_connection(self) -> bool:
        """Whether the end of the connection is that of the response: it told no length."""
        if self._response is None:
            return False
        return self._response.headers.keys().isdisjoint(("content-length", "transfer-encoding"))

    def _fail(self, error: Dropped) -> None:
        self._keep = False
        for waiting in (self._answer, self._tunnel):
            if waiting is not None and not waiting.done():
                waiting.set_exception(error)
        self._answer = None


def _too_long_head() -> Dropped:
    return Dropped(f"more than {MOST_HEADER_BYTES} bytes of headers")


class _Inflater:
    """Decompresses gzip and deflate as it comes."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(_GZIP_OR_ZLIB)
        self._broken = ""

    def feed(self, data: bytes) -> bytes:
        try:
            return self._inner.decompress(data)
        except zlib.error as error:
            self._broken = str(error)
            return b""

    @property
    def error(self) -> str:
        """Why what was fed is not a whole body; empty when it is."""
        if self._broken or self._inner.eof:
            return self._broken
        return "the compressed body is cut off"


def _time_out(answer: asyncio.Future[Response]) -> None:
    if not answer.done():
        answer.set_exception(TimeoutError())


def _head(target: SplitResult, headers: Mapping[str, str], proxy: SplitResult | None) -> bytes:
    """The request's start, up to the length of its body."""
    path = (target.path or "/") + (f"?{target.query}" if target.query else "")
    host = target.netloc.rpartition("@")[2]
    plain_proxy = proxy is not None and target.scheme == "http"
    lines = [
        f"POST {f'http://{host}{path}' if plain_proxy else path} HTTP/1.1",
        f"Host: {host}",
        "Accept: */*",
        "Accept-Encoding: gzip, deflate",
        *(_proxy_authorization(proxy) if proxy is not None and plain_proxy else ()),
        *(f"{name}: {value}" for name, value in headers.items()),
        "Content-Length: ",
    ]
    return "\r\n".join(lines).encode("latin-1")


def _proxy_authorization(proxy: SplitResult) -> list[str]:
    user, has_user, _ = proxy.netloc.rpartition("@")
    if not has_user:
        return []
    return [f"Proxy-Authorization: Basic {b64encode(unquote(user).encode()).decode()}"]


def _host(of: SplitResult) -> str:
    assert of.hostname is not None
    return of.hostname
