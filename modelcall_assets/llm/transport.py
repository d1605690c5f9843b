"""How a request reaches an endpoint and its reply comes back; the transport that needs no SDK."""

import asyncio
import re
import ssl
from base64 import b64encode
from collections import deque
from dataclasses import dataclass, field
from functools import cached_property
from typing import Self
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit, urlunsplit
from urllib.request import proxy_bypass_environment  # type: ignore[attr-defined]

from modelcall_assets.config.endpoint import Address
from modelcall_assets.errors import Problem, SetupError
from modelcall_assets.llm.body import ACCEPTED_ENCODINGS, StreamedAnswer
from modelcall_assets.llm.classify import Reply, error_in
from modelcall_assets.llm.completion import first_choice, with_changed_parts
from modelcall_assets.llm.http import MOST_HEADER_BYTES, TOO_LONG, Connection, HttpExchange
from modelcall_assets.llm.json_text import BOM, parsed
from modelcall_assets.records import secrets
from modelcall_assets.records.outcome import Reason
from modelcall_assets.records.secrets import Remover

CONNECT_TIMEOUT_S = 30.0
CLOSED_BEFORE_S = 0.5
IDLE_S = 15.0
"""A connection idle for longer is not used again: servers close theirs without a word."""
REST_S, LEAST_REST_S = 0.05, 0.01
"""A connection rests before its next request: a server that sends a reply twice, or one to nobody,
is found out by what comes meanwhile. Others are opened for that, up to as many as are in use and
`SPARE`; from then on the least rest has to do."""
SPARE = 8
READ_BYTES = 256 << 10
"""At most, at once."""
_PORTS = {"http": 80, "https": 443}
_EVENTS = re.compile(rb"(?:%b)?\s*(?:data|event|id|retry)?:" % BOM)
_IN_PATH = "/%:@!$&'()*+,;=~"
"""What a path may hold as it is, beside letters, digits and `-._`."""


def ca_hint(error: BaseException) -> str:
    """What to do about a server's certificate that nobody known has signed."""
    if not isinstance(error, ssl.SSLCertVerificationError):
        return ""
    return "; where the server has a CA of its own, name the CA's file as ca_file in the model file"


@dataclass
class HttpTransport(Address):
    """What every transport over HTTP makes of the address that it is made from."""

    least_rest_s: float = field(default=LEAST_REST_S, repr=False)

    async def __aenter__(self) -> Self:
        raise NotImplementedError

    async def __aexit__(self, *_: object) -> None:
        raise NotImplementedError

    async def send(self, payload: bytes) -> Reply:
        """The reply to one chat-completion body, without what it may echo of secrets. Never raises
        for what the network or the server does."""
        raise NotImplementedError

    @property
    def chat_url(self) -> str:
        """Without a user: that is sent as a header."""
        parts = urlsplit(self.base_url)
        path = parts.path.rstrip("/") + "/chat/completions"
        return urlunsplit(parts._replace(netloc=_without_user(parts), path=path))

    @property
    def sent_headers(self) -> dict[str, str]:
        own = {"Content-Type": "application/json", "User-Agent": "modelcall"}
        own |= _basic(urlsplit(self.base_url), "Authorization")
        if self.api_key:
            own.setdefault("Authorization", f"Bearer {self.api_key}")
        given = {name.lower() for name in self.headers}
        return {**{k: v for k, v in own.items() if k.lower() not in given}, **self.headers}

    @property
    def used_proxy(self) -> str | None:
        """Else that of HTTP_PROXY and its like, unless NO_PROXY names the host."""
        if self.proxy:
            return self.proxy
        url = urlsplit(self.chat_url)
        named = {name.lower(): self.env[name] for name in sorted(self.env)}
        proxies = {n.removesuffix("_proxy"): v for n, v in named.items() if n.endswith("_proxy")}
        proxy, hosts = proxies.get(url.scheme), (url.hostname or "", url.netloc)
        if not proxy or any(proxy_bypass_environment(each, proxies) for each in hosts):  # type: ignore
            return None
        proxy = proxy if "://" in proxy else f"http://{proxy}"
        if urlsplit(proxy).scheme not in ("http", "https"):
            wrong, fix = "not an HTTP proxy", "set another, or add the endpoint's host to NO_PROXY"
            raise SetupError([Problem("environment", f"{url.scheme}_proxy", wrong, fix=fix)])
        return proxy

    @property
    def proxy_from(self) -> str:
        return " of the model file" if self.proxy else " of the environment"

    @property
    def connect_timeout_s(self) -> float:
        return min(CONNECT_TIMEOUT_S, self.timeout_s)

    def cleaned(self, reply: Reply) -> Reply:
        """Without any secret that was sent, in whatever form it comes back. In an answer only what
        is unusual counts: it may hold the words of a simple password by itself."""
        everything, unusual = self._removers
        if not everything.has_any:
            return reply
        if 200 <= reply.status < 300 and _is_answer(reply.body):
            reply.body = with_changed_parts(unusual(reply.body), unusual.text)
            return reply
        reply.headers = {k.lower(): everything.text(value) for k, value in reply.headers.items()}
        reply.body = everything(reply.body)
        return reply

    def without_secrets(self, text: str) -> str:
        return self._removers[0].text(text)

    @cached_property
    def _removers(self) -> tuple[Remover, Remover]:
        """Of all secrets, and of those that no answer holds by chance."""
        found = [self.api_key or "", *self.secrets]
        for url in (self.base_url, self.used_proxy or ""):
            found += secrets.in_url(url)
        for name, value in self.headers.items():
            if secrets.names_secret(name, of_anyone=True) or secrets.looks_secret(value):
                found += secrets.in_header(value)
        return Remover((*found, *self.private)), Remover(filter(secrets.is_unusual, found))

    def in_one_piece(self, reply: Reply) -> Reply:
        """What a reply stands for that did not come as a stream."""
        if 300 <= reply.status < 400 and (to := reply.headers.get("location")):
            try:
                url = urlsplit(urljoin(self.chat_url, to))
                path = url.path.removesuffix("/chat/completions")
                base = f"{url.scheme}://{_without_user(url)}{path}"  # without what may be secret
            except ValueError:
                base = "what is no URL"
            base = "".join(filter(str.isprintable, base))
            reply.body = f"it redirects to {base}; set base_url to that address".encode()
        elif 200 <= reply.status < 300 and _EVENTS.match(reply.body):
            answer = StreamedAnswer()
            answer.feed(reply.body)
            return answer.reply(reply.headers)
        return reply


class DirectTransport(HttpTransport):
    """Kept connections to one endpoint, and no more than a call needs."""

    async def __aenter__(self) -> Self:
        self._target = urlsplit(self.chat_url)
        self._proxy = urlsplit(proxy) if (proxy := self.used_proxy) else None
        is_tls = "https" in (self._target.scheme, self._proxy.scheme if self._proxy else "")
        self._tls = ssl.create_default_context(cafile=self.ca_file) if is_tls else None
        self._head = self._request_head()
        self._idle: deque[Connection] = deque()
        self._open: set[Connection] = set()
        self._may_keep = True
        self._buffer = memoryview(bytearray(READ_BYTES))
        return self

    async def __aexit__(self, *_: object) -> None:
        for connection in tuple(self._open):
            connection.abort()
        while self._open:  # noqa: ASYNC110  their ends are a turn of the loop away
            await asyncio.sleep(0)

    async def send(self, payload: bytes) -> Reply:
        """A kept connection that ends at once and without a byte of the reply is taken for one that
        the server had closed already, and the request is sent once more on a new one."""
        request = b"%b%d\r\n\r\n%b" % (self._head, len(payload), payload)
        loop = asyncio.get_running_loop()
        now = loop.time()
        until, kept, sent = now + self.timeout_s, self._kept(now), 0
        while True:
            connection = kept or await self._connect(until)
            if isinstance(connection, Reply):
                connection.sent = sent
                return self.cleaned(connection)
            asked = HttpExchange(self.max_reply_mib << 20)
            try:
                if (rest := self.least_rest_s - now + connection.idle_since) > 0:
                    await asyncio.sleep(rest)
                connection.ask(asked, request, until)
                reply = await asked.answer
            finally:
                if asked.is_followed:
                    self._distrust()
                if asked.may_keep and connection.is_sound and self._may_keep:
                    connection.idle_since = loop.time()
                    self._idle.append(connection)
                else:
                    connection.abort()
            sent += asked.is_sent
            was_closed = kept is not None and reply.fault is Reason.DROPPED and not asked.heard
            if not was_closed or loop.time() - now > CLOSED_BEFORE_S:
                break
            kept = None
        if asked.stream is None and (reply.status >= 300 or reply.body[:1] != b"{"):
            reply = self.in_one_piece(reply)
        reply.sent = sent
        return self.cleaned(reply)

    def _kept(self, now: float) -> Connection | None:
        """The connection that has rested longest; None where a new one is to be opened."""
        while self._idle:
            rested = now - self._idle[0].idle_since
            in_use = len(self._open) - len(self._idle)
            if rested < REST_S and len(self._idle) <= in_use + SPARE:
                return None
            connection = self._idle.popleft()
            if connection.is_sound and rested < IDLE_S:
                return connection
            connection.abort()
        return None

    def _distrust(self) -> None:
        """A server that says more than it was asked for gets a connection for each request."""
        self._may_keep = False
        while self._idle:
            self._idle.pop().abort()

    async def _connect(self, until: float) -> Connection | Reply:
        latest = min(until, asyncio.get_running_loop().time() + self.connect_timeout_s)
        by = f"the proxy {_without_user(self._proxy)}{self.proxy_from}: " if self._proxy else ""
        connection = Connection(self._open, self._distrust, self._buffer, self.timeout_s)
        try:
            async with asyncio.timeout_at(latest):
                if self._proxy is not None and self._target.scheme == "https":
                    await self._tunnel(connection, self._proxy)
                else:
                    await self._reach(self._proxy or self._target, connection)
                return connection
        except TimeoutError:
            reason, text = Reason.TIMEOUT, f"no connection within {self.connect_timeout_s:g} s"
        except (OSError, ValueError) as error:  # of TLS; of a name that is none
            reason, text = Reason.CONNECT, f"{str(error) or type(error).__name__}{ca_hint(error)}"
        return Reply(0, {}, f"{by}{text}".encode(), reason)

    async def _reach(self, to: SplitResult, protocol: asyncio.BaseProtocol) -> asyncio.Transport:
        host, is_tls = _host(to), to.scheme == "https"
        transport, _ = await asyncio.get_running_loop().create_connection(
            lambda: protocol,
            host,
            to.port or _PORTS[to.scheme],
            ssl=self._tls if is_tls else None,
            server_hostname=host if is_tls else None,
            happy_eyeballs_delay=0.25,
        )
        return transport

    async def _tunnel(self, connection: Connection, proxy: SplitResult) -> None:
        """Through a proxy, then TLS with what is behind it. Raises OSError, also when the proxy has
        said more than that the tunnel is open: its answer is a head, whatever that says."""
        host, heard = _host(self._target), asyncio.StreamReader(MOST_HEADER_BYTES)
        to = f"{f'[{host}]' if ':' in host else host}:{self._target.port or 443}"
        own = [f"{k}: {v}" for k, v in _basic(proxy, "Proxy-Authorization").items()]
        head = "\r\n".join([f"CONNECT {to} HTTP/1.1", f"Host: {to}", *own, "", ""])
        transport = await self._reach(proxy, asyncio.StreamReaderProtocol(heard))
        try:
            transport.write(head.encode())
            answer = await heard.readuntil(b"\r\n\r\n")
            heard.feed_eof()  # so that what came behind it can be read without waiting for more
            version, _, status = answer.partition(b"\r\n")[0].partition(b" ")
            if not version.startswith(b"HTTP/1."):
                raise OSError("not HTTP")
            if not status.startswith(b"2"):
                raise OSError(f"answered {status[:3].decode('latin-1')}")
            if await heard.read():
                raise OSError("it sent something before the tunnel was used")
            connection.connection_made(transport)
            assert self._tls is not None
            encrypted = await asyncio.get_running_loop().start_tls(
                transport, connection, self._tls, server_hostname=host
            )
            if encrypted is None or not connection.is_sound:
                raise OSError("the connection ended in the handshake")
            connection.connection_made(encrypted)
        except BaseException as error:
            transport.abort()
            connection.connection_lost(None)
            match error:
                case asyncio.IncompleteReadError():
                    raise OSError("closed the connection without an answer") from error
                case asyncio.LimitOverrunError():
                    raise OSError(TOO_LONG) from error
                case _:
                    raise

    def _request_head(self) -> bytes:
        target, host = self._target, _without_user(self._target)
        path = quote(target.path or "/", _IN_PATH)
        path += f"?{quote(target.query, _IN_PATH + '?')}" if target.query else ""
        headers = {"Host": host, "Accept": "*/*", "Accept-Encoding": ACCEPTED_ENCODINGS}
        if self._proxy is not None and target.scheme == "http":
            path = f"http://{host}{path}"
            headers |= _basic(self._proxy, "Proxy-Authorization")
        lines = [f"{k}: {v}" for some in (headers, self.sent_headers) for k, v in some.items()]
        return "\r\n".join([f"POST {path} HTTP/1.1", *lines, "Content-Length: "]).encode()


def _is_answer(body: bytes) -> bool:
    """Whether it has choices and says of no error. Parsed only where there is reason to doubt."""
    if b'"choices"' not in body:
        return False
    if body.rstrip().endswith(b"}") and b'"error' not in body and b'"base_resp"' not in body:
        return True
    completion = parsed(body.removeprefix(BOM))
    return first_choice(completion) is not None and error_in(completion) is None


def _basic(url: SplitResult, header: str) -> dict[str, str]:
    """The header that authorizes the URL's user, if it has one."""
    user, has_user, _ = url.netloc.rpartition("@")
    return {header: f"Basic {b64encode(unquote(user).encode()).decode()}"} if has_user else {}


def _host(url: SplitResult) -> str:
    if not url.hostname:
        raise ValueError("the URL names no host")
    return url.hostname


def _without_user(url: SplitResult) -> str:
    return url.netloc.rpartition("@")[2]
