"""A lean HTTP/1.1 client: POSTs to one URL over connections that are kept.

The engine sends thousands of requests a second from one core, and a general client costs several
times what the rest of a call does (docs/performance.md). Parsing is httptools'; redirects, cookies
and HTTP/2 are not here because a chat endpoint needs none of them.

A connection only carries bytes; what a reply is made of belongs to one exchange (llm/exchange.py).
Whatever comes that no request asked for ends the connection, so that no row can be given another
one's answer.
"""

from __future__ import annotations

import asyncio
import select
import ssl
from base64 import b64encode
from collections import deque
from collections.abc import Callable, Mapping
from typing import Protocol, cast
from urllib.parse import SplitResult, quote, unquote, urlsplit

from modelcall_assets.llm.body import ACCEPTED_ENCODINGS
from modelcall_assets.llm.exchange import HttpExchange, NoReply, Response, Tunnel
from modelcall_assets.records.outcome import Reason

CLOSED_BEFORE_S = 0.5
IDLE_S = 15.0
"""A connection idle for longer is not used again: servers close theirs without a word."""
REST_S, LEAST_REST_S = 0.05, 0.01
"""A connection rests before its next request: a server that sends a reply twice, or one to nobody,
is found out by what comes meanwhile. Others are opened for that, up to as many as are in use and
`SPARE`; from then on the least rest has to do."""
SPARE = 8
SOON_S = 5.0
"""What comes later on an idle connection may be a server's farewell; sooner, it is a reply."""
READ_BYTES = 256 << 10
"""At most, at once."""
_PORTS = {"http": 80, "https": 443}
_IN_PATH = "/%:@!$&'()*+,;=~"
"""What a path may hold as it is, beside letters, digits and `-._`."""


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
        most_body: int,
        least_rest_s: float = LEAST_REST_S,
        tls: Callable[[], ssl.SSLContext] = ssl.create_default_context,
    ) -> None:
        self._target = urlsplit(url)
        self._proxy = urlsplit(proxy) if proxy else None
        self._timeout_s = timeout_s
        self._connect_timeout_s = connect_timeout_s
        self._most_body = most_body
        self._least_rest_s = least_rest_s
        is_tls = "https" in (self._target.scheme, self._proxy.scheme if self._proxy else "")
        self._tls = tls() if is_tls else None
        self._head = _head(self._target, headers, self._proxy)
        self._idle: deque[_Connection] = deque()
        self._open: set[_Connection] = set()
        self._may_keep = True
        self._buffer = memoryview(bytearray(READ_BYTES))

    async def aclose(self) -> None:
        for connection in tuple(self._open):
            connection.abort()
        while self._open:  # noqa: ASYNC110  their ends are a turn of the loop away
            await asyncio.sleep(0)

    async def post(self, payload: bytes) -> Response:
        """Raises NoReply, and that after `timeout_s` in all.

        A kept connection that ends at once and without a byte of the reply is taken for one that
        the server had closed already, and the request is sent once more on a new one.
        """
        request = b"%b%d\r\n\r\n%b" % (self._head, len(payload), payload)
        loop = asyncio.get_running_loop()
        now = loop.time()
        until, connection, sent = now + self._timeout_s, self._kept(now), 0
        try:
            if connection is not None:
                exchange = connection.ask(request, self._most_body, now, until)
                try:
                    return await self._reply(connection, exchange)
                except NoReply as error:
                    was_closed = error.reason is Reason.DROPPED and not exchange.heard
                    if not was_closed or loop.time() - now > CLOSED_BEFORE_S:
                        raise
                finally:
                    sent += exchange.is_sent
            connection = await self._connect(until)
            exchange = connection.ask(request, self._most_body, now, until)
            sent += exchange.is_sent
            response = await self._reply(connection, exchange)
        except NoReply as error:
            error.sent = sent
            raise
        response.sent = sent
        return response

    async def _reply(self, connection: _Connection, exchange: HttpExchange) -> Response:
        try:
            return await exchange.answer
        finally:
            if exchange.is_followed:
                self._distrust()
            if connection.is_usable and self._may_keep:
                connection.idle_since = asyncio.get_running_loop().time()
                self._idle.append(connection)
            else:
                connection.abort()

    def _kept(self, now: float) -> _Connection | None:
        """The connection that has rested longest; None where a new one is to be opened."""
        while self._idle:
            rested = now - self._idle[0].idle_since
            in_use = len(self._open) - len(self._idle)
            if rested < REST_S and len(self._idle) <= in_use + SPARE:
                return None
            connection = self._idle.popleft()
            if connection.is_usable and rested < IDLE_S:
                return connection
            connection.abort()
        return None

    def _distrust(self) -> None:
        """A server that says more than it was asked for gets a connection for each request."""
        self._may_keep = False
        while self._idle:
            self._idle.pop().abort()

    async def _connect(self, until: float) -> _Connection:
        latest = min(until, asyncio.get_running_loop().time() + self._connect_timeout_s)
        by = f"the proxy {_without_user(self._proxy)}: " if self._proxy else ""
        try:
            async with asyncio.timeout_at(latest):
                connection = await self._dial(self._proxy or self._target)
                if self._proxy is not None and self._target.scheme == "https":
                    await self._tunnel(connection, self._proxy)
        except TimeoutError as error:
            text = f"{by}no connection within {self._connect_timeout_s:g} s"
            raise NoReply(Reason.TIMEOUT, text) from error
        except (OSError, ValueError) as error:  # of TLS; of a name that is none
            text = f"{by}{str(error) or type(error).__name__}"
            raise NoReply(Reason.CONNECT, text) from error
        return connection

    async def _dial(self, to: SplitResult) -> _Connection:
        host, is_tls = _host(to), to.scheme == "https"
        _, protocol = await asyncio.get_running_loop().create_connection(
            lambda: _Connection(
                self._open, self._distrust, self._buffer, self._timeout_s, self._least_rest_s
            ),
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
            status = await connection.open_tunnel("\r\n".join(lines).encode())
            assert self._tls is not None
            if status.startswith("2"):
                await connection.start_tls(self._tls, host)
                return
        except BaseException:
            connection.abort()
            raise
        connection.abort()
        raise OSError(f"answered {status}")


class _Listener(Protocol):
    """Who is told what a connection hears."""

    may_keep: bool
    """Whether the connection is as good as before, once there is nothing more to come."""

    def feed(self, data: memoryview) -> bool:
        """Whether there is more to come. `data` is another's afterwards."""
        ...

    def lost(self, error: Exception | None) -> None: ...


class _Connection(asyncio.BufferedProtocol):
    """Carries bytes for one listener at a time. Anything without a listener ends it.

    What comes is read into the one `buffer` of all connections and taken out of it at once: memory
    for each read, as asyncio takes it by itself, costs as much as all that is done with a reply."""

    def __init__(
        self,
        open_ones: set[_Connection],
        unasked: Callable[[], None],
        buffer: memoryview,
        timeout_s: float,
        least_rest_s: float,
    ) -> None:
        self._buffer = buffer
        self._timeout_s = timeout_s
        self._least_rest_s = least_rest_s
        self._asked: HttpExchange | None = None
        self._until = 0.0
        self._alarm: asyncio.TimerHandle | None = None
        self.idle_since = float("-inf")
        self._open_ones = open_ones
        self._unasked = unasked
        self._listener: _Listener | None = None
        self._is_sound = True

    @property
    def is_usable(self) -> bool:
        """For another request."""
        return self._is_sound and self._listener is None

    def ask(self, request: bytes, most_body: int, now: float, until: float) -> HttpExchange:
        """The request goes out when the connection has rested, and fails `until` then."""
        exchange = self._asked = HttpExchange(most_body)
        self._until = until
        if self._alarm is None:
            self._alarm = asyncio.get_running_loop().call_at(until, self._on_alarm)
        if (more := self._least_rest_s - now + self.idle_since) > 0:
            asyncio.get_running_loop().call_later(more, self._send, exchange, request)
        else:
            self._send(exchange, request)
        return exchange

    def _send(self, exchange: HttpExchange, request: bytes) -> None:
        if exchange.answer.done():  # nobody waits any more
            return
        is_kept = self.idle_since > 0
        if not self._is_sound or (is_kept and self._readable.poll(0)):
            self._is_sound = False
            exchange.fail(Reason.DROPPED, "the server spoke, or hung up, before it was asked")
            return
        self._listener = exchange
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
            self._asked.fail(Reason.TIMEOUT, f"no answer within {self._timeout_s:g} s")

    async def open_tunnel(self, request: bytes) -> str:
        """The status that a proxy answers with. Raises OSError."""
        tunnel = self._listener = Tunnel()
        self._transport.write(request)
        return await tunnel.status

    async def start_tls(self, tls: ssl.SSLContext, host: str) -> None:
        """Raises OSError, also when the proxy has said more than that the tunnel is open."""
        if not self._is_sound:
            raise OSError("it sent something before the tunnel was used")
        transport = await asyncio.get_running_loop().start_tls(
            self._transport, self, tls, server_hostname=host
        )
        if transport is None or not self._is_sound:
            raise OSError("the connection ended in the handshake")
        self._transport = transport

    def abort(self) -> None:
        self._is_sound = False
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._readable = select.poll()
        self._readable.register(transport.get_extra_info("socket"), select.POLLIN)
        self._open_ones.add(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        listener = self._listener
        if listener is None:
            self.abort()
            if asyncio.get_running_loop().time() - self.idle_since < SOON_S:
                self._unasked()
        elif not listener.feed(self._buffer[:nbytes]):
            self._listener = self._asked = None
            if not listener.may_keep or self._transport.get_write_buffer_size():
                self._is_sound = False

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_sound = False
        if self._alarm is not None:
            self._alarm.cancel()
        self._open_ones.discard(self)
        if self._listener is not None:
            self._listener.lost(exc)


def _head(target: SplitResult, headers: Mapping[str, str], proxy: SplitResult | None) -> bytes:
    """The request's start, up to the length of its body."""
    path = quote(target.path or "/", _IN_PATH)
    path += f"?{quote(target.query, _IN_PATH + '?')}" if target.query else ""
    host = _without_user(target)
    plain_proxy = proxy is not None and target.scheme == "http"
    lines = [
        f"POST {f'http://{host}{path}' if plain_proxy else path} HTTP/1.1",
        f"Host: {host}",
        "Accept: */*",
        f"Accept-Encoding: {ACCEPTED_ENCODINGS}",
        *(_proxy_authorization(proxy) if proxy is not None and plain_proxy else ()),
        *(f"{name}: {value}" for name, value in headers.items()),
        "Content-Length: ",
    ]
    return "\r\n".join(lines).encode()


def _proxy_authorization(proxy: SplitResult) -> list[str]:
    user, has_user, _ = proxy.netloc.rpartition("@")
    if not has_user:
        return []
    return [f"Proxy-Authorization: Basic {b64encode(unquote(user).encode()).decode()}"]


def _host(of: SplitResult) -> str:
    if not of.hostname:
        raise ValueError("the URL names no host")
    return of.hostname


def _without_user(of: SplitResult) -> str:
    return of.netloc.rpartition("@")[2]
