"""The `openai` client as a transport, for what only it can do; slow to import, so import late."""

import asyncio
import select
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, ClassVar, Self, cast
from weakref import WeakKeyDictionary

import aiohttp
import httpx2
import openai
from aiohttp.connector import Connection

from modelcall_assets.llm.body import (
    ACCEPTED_ENCODINGS,
    EVENT_STREAM,
    Body,
    StreamedAnswer,
    Unreadable,
    too_large,
)
from modelcall_assets.llm.classify import Reply
from modelcall_assets.llm.transport import IDLE_S, LEAST_REST_S, HttpTransport, ca_hint
from modelcall_assets.records.outcome import Reason

_FROM_ENVIRONMENT = ("Authorization", "OpenAI-Organization", "OpenAI-Project")
FAILED = (openai.APIStatusError, openai.APIConnectionError, httpx2.HTTPError, aiohttp.ClientError,
          ssl.SSLError, OSError, Unreadable)  # fmt: skip
"""What a call through the client raises that has no good answer."""
_UNLIMITED = "/content"
"""How the URL ends of what is streamed to a file."""


class SdkTransport(HttpTransport):
    """One AsyncOpenAI client on aiohttp; it neither retries nor follows redirects.

    What is sent and where is the same as with the direct transport, whatever variables of the SDK
    the environment holds; only OPENAI_CUSTOM_HEADERS adds to it.
    """

    async def __aenter__(self) -> Self:
        self._url = self.chat_url
        sent = self.sent_headers
        unset = {name: openai.omit for name in _FROM_ENVIRONMENT if name not in sent}
        self._sent = {**unset, **sent}
        self._client = openai.AsyncOpenAI(
            api_key=self.api_key or "none",
            base_url=self.base_url,
            max_retries=0,
            timeout=httpx2.Timeout(None, connect=self.connect_timeout_s),
            http_client=httpx2.AsyncClient(
                transport=_Backend(self),
                headers={"Accept-Encoding": ACCEPTED_ENCODINGS},
                trust_env=False,
            ),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()

    async def send(self, payload: bytes) -> Reply:
        answer = StreamedAnswer()
        try:
            async with asyncio.timeout(self.timeout_s):
                reply = await self._send(payload, answer)
        except TimeoutError as error:  # a server may not end what is whole
            streamed = answer.reply({})
            reply = streamed if streamed.status else self.failed(error)
        except FAILED as error:
            reply = self.in_one_piece(self.failed(error))
        return self.cleaned(reply)

    async def _send(self, payload: bytes, answer: StreamedAnswer) -> Reply:
        raw = await self._client.post(
            self._url,
            cast_to=httpx2.Response,
            content=payload,
            options={"headers": self._sent},
            stream=True,
            stream_cls=openai.AsyncStream[object],
        )
        response = cast("httpx2.Response", raw)
        try:
            if not response.headers.get("Content-Type", "").lower().startswith(EVENT_STREAM):
                body = await response.aread()
                return self.in_one_piece(Reply(response.status_code, response.headers, body))
            try:
                async for chunk in response.aiter_bytes():
                    answer.feed(chunk)
            except FAILED:
                if not answer.is_settled:
                    raise
            return answer.reply(response.headers)
        finally:
            await response.aclose()

    def failed(self, error: Exception) -> Reply:
        """What one of FAILED stands for: by what aiohttp raised first, as the SDK's own types call
        a dropped connection a timeout."""
        if isinstance(error, openai.APIStatusError):
            response = error.response
            return Reply(response.status_code, response.headers, response.content)
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, aiohttp.ClientError):
            cause = cause.__cause__
        first = cause or error
        reason, text = Reason.DROPPED, f"{type(first).__name__}: {first}"
        match first:
            case TimeoutError():
                reason, text = Reason.TIMEOUT, f"no answer within {self.timeout_s:g} s"
            case Unreadable():
                reason, text = first.reason, str(first)
            case aiohttp.ClientHttpProxyError():
                reason, text = Reason.CONNECT, f"the proxy answered {first.status}"
            case aiohttp.ClientProxyConnectionError():
                reason, text = Reason.CONNECT, f"the proxy {first.host}:{first.port}"
                text += f"{self.proxy_from}: {first}"
            case aiohttp.ClientConnectorError() | ssl.SSLError():
                reason, text = Reason.CONNECT, f"{text}{ca_hint(first)}"
            case aiohttp.ClientResponseError() | aiohttp.ClientPayloadError():
                # their texts quote it
                text = f"{type(first).__name__}: the reply is broken off or no HTTP"
            case aiohttp.InvalidURL():
                reason, text = Reason.CONNECT, "the base URL or the proxy's is no URL for aiohttp"
            case _:
                pass
        return Reply(0, {}, text.encode(), reason, sent=int(reason is not Reason.CONNECT))


class _Backend(httpx2.AsyncBaseTransport):
    """What the openai client sends through: aiohttp, with the limits of the direct transport."""

    def __init__(self, options: HttpTransport) -> None:
        self._proxy = options.used_proxy
        self._most_body = options.max_reply_mib << 20
        tls = ssl.create_default_context(cafile=options.ca_file)
        connector = _Connector(ssl=tls, limit=0, keepalive_timeout=IDLE_S)
        connector.least_rest_s = options.least_rest_s
        self._session = aiohttp.ClientSession(
            connector=connector, cookie_jar=aiohttp.DummyCookieJar(), auto_decompress=False
        )

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        try:
            data: bytes | AsyncIterator[bytes] = request.content
        except httpx2.RequestNotRead:
            data = aiter(cast("httpx2.AsyncByteStream", request.stream))
            request.headers.pop("Transfer-Encoding", None)  # aiohttp's own
        connect_s = request.extensions["timeout"]["connect"]
        try:
            response = await self._session.request(
                request.method,
                str(request.url),
                headers=request.headers.multi_items(),
                data=data or None,
                allow_redirects=False,
                proxy=self._proxy,
                timeout=aiohttp.ClientTimeout(sock_connect=connect_s),
            )
        except UnicodeError as error:  # a name that no host can have
            raise aiohttp.InvalidURL(str(request.url)) from error
        if response.status < 200:
            response.close()
            raise aiohttp.ClientConnectionError("the server changed to another protocol")
        limit = float("inf") if request.url.path.endswith(_UNLIMITED) else self._most_body
        encoded = ",".join(response.headers.getall("Content-Encoding", []))
        headers = [each for each in response.raw_headers if each[0].lower() != b"content-encoding"]
        return httpx2.Response(
            response.status, headers=headers, stream=_Stream(response, encoded, limit)
        )

    async def aclose(self) -> None:
        await self._session.close()


@dataclass
class _Stream(httpx2.AsyncByteStream):
    """A body, decoded and within the limit. Raises Unreadable for that of a success."""

    response: aiohttp.ClientResponse
    encodings: str
    most: float

    async def __aiter__(self) -> AsyncIterator[bytes]:
        if self.response.status < 300:
            async for piece in self._decoded():
                yield piece
            return
        try:
            yield b"".join([piece async for piece in self._decoded()])
        except Unreadable as error:
            yield str(error).encode()

    async def _decoded(self) -> AsyncIterator[bytes]:
        body, left = Body(self.encodings, self.most), self.most
        async for chunk in self.response.content.iter_any():
            left -= len(chunk)
            if left < 0:
                raise too_large(self.most)
            for piece in body.feed(chunk):
                yield piece
        if not body.is_whole:
            raise Unreadable(Reason.DROPPED, "the compressed body is cut off")

    async def aclose(self) -> None:
        self.response.release()


class _Connector(aiohttp.TCPConnector):
    """Connections rest before they are used again, and one that has heard something meanwhile is
    closed: aiohttp would take that for the next request's reply."""

    least_rest_s = LEAST_REST_S
    _idle_since: ClassVar[WeakKeyDictionary[asyncio.BaseProtocol, float]] = WeakKeyDictionary()

    async def connect(self, *args: Any, **more: Any) -> Connection:
        now = asyncio.get_running_loop().time
        while True:
            connection = await super().connect(*args, **more)
            protocol = connection.protocol
            assert protocol is not None
            idle_since = self._idle_since.pop(protocol, None)
            try:
                if idle_since is not None:
                    await asyncio.sleep(max(0.0, idle_since + self.least_rest_s - now()))
                is_quiet = not (protocol.should_close or (idle_since and _is_readable(connection)))
            except BaseException:
                connection.close()
                raise
            if is_quiet:
                break
            connection.close()
            if idle_since is None:
                raise aiohttp.ClientConnectionError("the server spoke before it was asked")
        connection.add_callback(lambda: self._idle_since.update({protocol: now()}))
        return connection


def _is_readable(connection: Connection) -> bool:
    """Whether bytes wait on it, or its end."""
    if connection.transport is None or connection.transport.is_closing():
        return True
    poll = select.poll()
    poll.register(connection.transport.get_extra_info("socket"), select.POLLIN)
    return bool(poll.poll(0))
