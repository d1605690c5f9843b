"""The `openai` client as a transport, for what only it can do; slow to import, so import late."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterator
from typing import Self, cast

import aiohttp
import httpx2
import openai

from modelcall_assets.llm.stream import StreamedAnswer, is_event_stream
from modelcall_assets.llm.transport import HttpTransport, Reply
from modelcall_assets.records.outcome import Reason

_FROM_ENVIRONMENT = ("Authorization", "OpenAI-Organization", "OpenAI-Project")
BROKEN = (openai.APIConnectionError, httpx2.HTTPError, aiohttp.ClientError, ssl.SSLError, OSError)


class SdkTransport(HttpTransport):
    """One AsyncOpenAI client on its aiohttp backend; it neither retries nor follows redirects.

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
            http_client=openai.DefaultAioHttpClient(
                proxy=self.used_proxy,
                verify=self.tls,
                trust_env=False,
                follow_redirects=False,
                limits=httpx2.Limits(max_connections=0, keepalive_expiry=15.0),
            ),
        )
        return self

    async def aclose(self) -> None:
        await self._client.close()

    async def send(self, payload: bytes) -> Reply:
        try:
            async with asyncio.timeout(self.timeout_s):
                return await self._send(payload)
        except openai.APIStatusError as error:
            response = error.response
            body = self.without_secrets(response.content)
            return Reply(response.status_code, response.headers, body)
        except TimeoutError:
            return self.timed_out()
        except BROKEN as error:
            return self._fault(cause_of(error))

    async def _send(self, payload: bytes) -> Reply:
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
            if is_event_stream(response.headers.get("Content-Type", "")):
                answer = await StreamedAnswer().read(response.aiter_bytes(), BROKEN)
                return self.streamed(answer, response.headers)
            return Reply(response.status_code, response.headers, await response.aread())
        finally:
            await response.aclose()

    def _fault(self, error: BaseException) -> Reply:
        reason, text = Reason.DROPPED, f"{type(error).__name__}: {error}"
        match error:
            case TimeoutError():
                return self.timed_out()
            case aiohttp.ClientHttpProxyError():
                reason, text = Reason.CONNECT, f"the proxy answered {error.status}"
            case aiohttp.ClientConnectorError() | ssl.SSLError():
                reason = Reason.CONNECT
            case aiohttp.ClientResponseError():
                text = f"{type(error).__name__}: {error.message}"
            case aiohttp.InvalidURL():
                text = "the base URL or the proxy's is no URL for aiohttp"
            case _:
                pass
        return Reply(0, {}, text.encode(), reason)


def cause_of(error: BaseException) -> BaseException:
    """What aiohttp raised first: the SDK's own types call a dropped connection a timeout."""
    return next((e for e in _chain(error) if isinstance(e, aiohttp.ClientError)), error)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
