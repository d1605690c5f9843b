"""How bytes reach an endpoint and come back. The only importer of the HTTP client."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp

from modelcall_assets.records.outcome import Reason


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back. With `fault` set nothing did: status is 0 and `body` says what happened."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    fault: Reason | None = None


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
class DirectTransport:
    """One keep-alive session to one endpoint. Proxies are taken from the environment."""

    name: str
    base_url: str = field(repr=False)
    api_key: str | None = field(default=None, repr=False)
    timeout_s: float = 600.0

    async def __aenter__(self) -> Self:
        headers = {"Content-Type": "application/json", "User-Agent": "modelcall"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        self._url = self.base_url.rstrip("/") + "/chat/completions"
        self._session = aiohttp.ClientSession(
            headers=headers,
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(
                total=self.timeout_s, sock_connect=min(30, self.timeout_s)
            ),
            proxy=_proxy_for(self._url),
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._session.close()

    async def send(self, payload: bytes) -> Reply:
        try:
            async with self._session.post(
                self._url, data=payload, allow_redirects=False
            ) as response:
                body = await response.read()
                if response.status != 200 and self.api_key:  # some servers echo a wrong key
                    body = body.replace(self.api_key.encode(), b"***")
                return Reply(response.status, response.headers, body)
        except TimeoutError as error:
            return _fault(Reason.TIMEOUT, error, f"no answer within {self.timeout_s:g} s")
        except (aiohttp.ClientConnectorError, ssl.SSLError) as error:
            return _fault(Reason.CONNECT, error)
        except (aiohttp.ClientError, ConnectionError) as error:
            return _fault(Reason.DROPPED, error)


def _proxy_for(url: str) -> str | None:
    """From the environment, once: aiohttp's own `trust_env` looks it up, and `.netrc` too, in a
    thread for every request."""
    parts = urlsplit(url)
    if proxy_bypass(parts.hostname or ""):
        return None
    return getproxies().get(parts.scheme)


def _fault(reason: Reason, error: BaseException, text: str = "") -> Reply:
    detail = text or f"{type(error).__name__}: {error}"
    return Reply(0, {}, detail.encode(), reason)
