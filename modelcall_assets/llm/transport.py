"""How bytes reach an endpoint and come back: the contract, and the transport that needs no SDK."""

from __future__ import annotations

import ssl
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import TracebackType
from typing import Protocol, Self
from urllib.parse import unquote, urljoin, urlsplit, urlunsplit
from urllib.request import getproxies, proxy_bypass

from modelcall_assets.config.endpoint import MAX_REPLY_MIB
from modelcall_assets.errors import Problem, SetupError
from modelcall_assets.llm.error import error_in
from modelcall_assets.llm.exchange import NoReply
from modelcall_assets.llm.http import LEAST_REST_S, HttpClient
from modelcall_assets.llm.message import first_choice, parsed, with_changed_parts
from modelcall_assets.llm.stream import BOM, StreamedAnswer, begins_as_events
from modelcall_assets.records.outcome import Reason
from modelcall_assets.records.secrets import (
    Remover,
    in_header,
    in_url,
    is_unusual,
    looks_secret,
    names_secret,
)

CONNECT_TIMEOUT_S = 30.0


@dataclass(slots=True)
class Reply:
    """What came back; `headers` knows names in lower case. With `fault` set nothing did: status
    is 0 and `body` says what happened."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    fault: Reason | None = None
    sent: int = 1
    """How often the request went out: twice when a kept connection turned out to be closed."""


class Transport(Protocol):
    """Sends one chat-completion body. Never raises for what the network or the server does."""

    name: str

    async def send(self, payload: bytes) -> Reply: ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


@dataclass
class HttpTransport:
    """What every transport over HTTP is made from, and what it makes of it."""

    name: str
    base_url: str = field(repr=False)
    api_key: str | None = field(default=None, repr=False)
    timeout_s: float = 600.0
    headers: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)
    """A header here wins over one of our own, whatever the case of its name."""
    proxy: str | None = field(default=None, repr=False)
    """None: the one of the process environment, if any."""
    ca_file: str | None = None
    secrets: tuple[str, ...] = field(default=(), repr=False)
    """Besides those that the fields above show by their names: headers of the environment."""
    max_reply_mib: int = MAX_REPLY_MIB
    private: tuple[str, ...] = field(default=(), repr=False)
    """What an answer may hold all the same, but nothing else."""
    least_rest_s: float = field(default=LEAST_REST_S, repr=False)

    async def send(self, payload: bytes) -> Reply:
        """A server may echo what it was sent."""
        return self.cleaned(await self.exchange(payload))

    async def exchange(self, payload: bytes) -> Reply:
        """`send`, but the reply may hold secrets."""
        raise NotImplementedError

    @property
    def chat_url(self) -> str:
        """Without a user: that is sent as a header."""
        parts = urlsplit(self.base_url)
        host, path = parts.netloc.rpartition("@")[2], parts.path.rstrip("/") + "/chat/completions"
        return urlunsplit(parts._replace(netloc=host, path=path))

    @property
    def sent_headers(self) -> dict[str, str]:
        own = {"Content-Type": "application/json", "User-Agent": "modelcall"}
        user, has_user, _ = urlsplit(self.base_url).netloc.rpartition("@")
        if has_user:
            own["Authorization"] = f"Basic {b64encode(unquote(user).encode()).decode()}"
        elif self.api_key:
            own["Authorization"] = f"Bearer {self.api_key}"
        given = {name.lower() for name in self.headers}
        return {**{k: v for k, v in own.items() if k.lower() not in given}, **self.headers}

    @property
    def used_proxy(self) -> str | None:
        return self.proxy or _proxy_of_environment(self.chat_url)

    @property
    def tls(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=self.ca_file)

    @property
    def most_body(self) -> int:
        """Bytes of a reply, on the wire and again decompressed."""
        return self.max_reply_mib << 20

    @property
    def connect_timeout_s(self) -> float:
        return min(CONNECT_TIMEOUT_S, self.timeout_s)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Give up what entering opened."""
        raise NotImplementedError

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
        """What a server said that is no answer."""
        return self._removers[0].text(text)

    @cached_property
    def _removers(self) -> tuple[Remover, Remover]:
        """Of all secrets, and of those that no answer holds by chance. Nobody shows the headers of
        an answer."""
        secrets = [self.api_key or "", *self.secrets]
        for url in (self.base_url, self.used_proxy or ""):
            secrets += in_url(url)
        for name, value in self.headers.items():
            if names_secret(name, of_anyone=True) or looks_secret(value):
                secrets += in_header(value)
        return Remover((*secrets, *self.private)), Remover(filter(is_unusual, secrets))

    def replied(self, status: int, headers: Mapping[str, str], body: bytes) -> Reply:
        """The reply that came in one piece."""
        if 300 <= status < 400 and (to := headers.get("location")):
            body = f"it redirects to {self._base_of(to)}; set base_url to that address".encode()
        elif 200 <= status < 300 and begins_as_events(body):  # under another content type
            answer = StreamedAnswer()
            answer.feed(body)
            return self.streamed(answer, headers)
        return Reply(status, headers, body)

    def streamed(self, answer: StreamedAnswer, headers: Mapping[str, str]) -> Reply:
        """The reply that a stream was, once it has ended."""
        if (finished := answer.finish()) is None:
            return Reply(0, {}, b"the stream ended before the answer", Reason.DROPPED)
        return Reply(finished[0], headers, finished[1])

    def _base_of(self, location: str) -> str:
        """The base URL that a redirect leads to, without what may be secret in it."""
        try:
            parts = urlsplit(urljoin(self.chat_url, location))
        except ValueError:
            return "what is no URL"
        host, path = parts.netloc.rpartition("@")[2], parts.path.removesuffix("/chat/completions")
        return "".join(filter(str.isprintable, f"{parts.scheme}://{host}{path}"))

    def timed_out(self) -> Reply:
        return Reply(0, {}, f"no answer within {self.timeout_s:g} s".encode(), Reason.TIMEOUT)


class DirectTransport(HttpTransport):
    """Kept connections to one endpoint, and no more than a call needs."""

    async def __aenter__(self) -> Self:
        self._client = HttpClient(
            self.chat_url,
            self.sent_headers,
            timeout_s=self.timeout_s,
            connect_timeout_s=self.connect_timeout_s,
            proxy=self.used_proxy,
            tls=lambda: self.tls,
            most_body=self.most_body,
            least_rest_s=self.least_rest_s,
        )
        return self

    async def aclose(self) -> None:
        await self._client.aclose()

    async def exchange(self, payload: bytes) -> Reply:
        try:
            response = await self._client.post(payload)
        except NoReply as error:
            reply, partial = Reply(0, {}, str(error).encode(), error.reason), error.partial
            if partial is not None and partial.stream is not None:
                streamed = self.streamed(partial.stream, partial.headers)
                reply = streamed if error.reason is Reason.DROPPED or streamed.status else reply
            reply.sent = error.sent
            return reply
        if response.stream is not None:
            reply = self.streamed(response.stream, response.headers)
        else:
            reply = self.replied(response.status, response.headers, response.body)
        reply.sent = response.sent
        return reply


def _is_answer(body: bytes) -> bool:
    """Whether it has choices and says of no error. Parsed only where there is reason to doubt."""
    if b'"choices"' not in body:
        return False
    if body.rstrip().endswith(b"}") and b'"error' not in body and b'"base_resp"' not in body:
        return True
    completion = parsed(body.removeprefix(BOM))
    return first_choice(completion) is not None and error_in(completion) is None


def _proxy_of_environment(url: str) -> str | None:
    """Of HTTP_PROXY and its like, unless NO_PROXY names the host."""
    parts = urlsplit(url)
    proxy = getproxies().get(parts.scheme)
    if not proxy or proxy_bypass(parts.hostname or "") or proxy_bypass(parts.netloc):
        return None
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    if urlsplit(proxy).scheme not in ("http", "https"):
        wrong, fix = "not an HTTP proxy", "set another, or add the endpoint's host to NO_PROXY"
        raise SetupError([Problem("environment", f"{parts.scheme}_proxy", wrong, fix=fix)])
    return proxy
