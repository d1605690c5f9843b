"""A free, honest stand-in for a model endpoint, to rehearse a task, to demo and to test faults:
sockets, the part of HTTP/1.1 that a chat endpoint needs, routes, and how a request meets its fault.
"""

import asyncio
import errno
import importlib
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple, TypeVar, cast

import httptools

from modelcall_assets.errors import Problem, SetupError
from modelcall_assets.rehearsal import replies
from modelcall_assets.rehearsal.batches import Batches
from modelcall_assets.rehearsal.faults import NO_FAULTS, Ending, Faults, Tally, identify
from modelcall_assets.rehearsal.replies import Refusal, json_response, parse, response

MAX_HEAD = 64 * 1024
MAX_BODY = 256 * 1024 * 1024
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

T = TypeVar("T")


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
        self._url, self._body = b"", list[bytes]()
        self._headers: dict[bytes, bytes] = {}
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


class _Connection(asyncio.Protocol):
    """One client. While an answer is due what else it asks has to wait."""

    def __init__(self, server: "RehearsalServer") -> None:
        self._server, self._parser = server, RequestParser()
        self._busy, self._keep_alive = False, True
        self._due: Ending | None = None
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._server.connections.add(self)
        self._server.tally.counts["connections"] += 1

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer:
            self._timer.cancel()
        self._busy = True
        self._server.connections.discard(self)
        if self._due is not None:
            self._server.tally.ended(Ending("abandoned"))

    def data_received(self, data: bytes) -> None:
        self._parser.feed(data)
        self._serve()

    def _serve(self) -> None:
        found = self._parser.found
        while found and not self._busy:
            item = found.popleft()
            if isinstance(item, Request):
                self._busy, self._keep_alive = True, item.keep_alive
                self._server.handle(self, item)
            elif isinstance(item, BadHttp):
                self._keep_alive = False
                self.send(Refusal(item.status, str(item)).http())
            elif not found:  # else the body is here already
                self.transport.write(CONTINUE)

    def promise(self, ending: Ending, latency_s: float) -> None:
        self._due = ending
        if latency_s > 0 and ending.what != "hung":
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(latency_s, self._keep_promise, True)
        elif ending.what != "hung":
            self._keep_promise()

    def _keep_promise(self, late: bool = False) -> None:
        due, self._due = cast(Ending, self._due), None
        self._server.tally.ended(due)
        self.send(due.data)
        if late:
            self._serve()

    def send(self, data: bytes) -> None:
        """No data: the connection closes without an answer."""
        self.transport.write(data)
        self._busy = not (data and self._keep_alive)
        if self._busy:
            self.transport.close()


class RehearsalServer:
    """An OpenAI-compatible endpoint that costs nothing. Its public methods suit any thread."""

    def __init__(self, faults: Faults = NO_FAULTS, api_key: str | None = None) -> None:
        self.host, self.port = "127.0.0.1", 0
        self._use(faults)
        self.tally = Tally()
        self.answer = replies.answer
        """What is said to a request."""
        self._authorization = None if api_key is None else f"Bearer {api_key}".encode()
        self._batches = Batches(self)
        self.connections: set[_Connection] = set()
        self._listener: asyncio.Server | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = 0

    @property
    def base_url(self) -> str:
        return f"http://{self.host}:{self.port}/v1"

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> None:
        self._loop, self._thread = asyncio.get_running_loop(), threading.get_ident()
        connect = partial(_Connection, self)
        try:
            self._listener = await self._loop.create_server(connect, host, port, backlog=4096)
        except OSError as error:
            place, fix = "--host", ""
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                place, fix = "--port", "choose another, or --port 0 for any free one"
            wrong = f"cannot listen on {host}:{port} ({error.strerror or error})"
            raise SetupError([Problem("modelcall rehearse", place, wrong, fix=fix)]) from error
        self.host, self.port = host, self._listener.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.close()
            await self._batches.stop()
            for connection in list(self.connections):
                connection.transport.abort()
            while self.connections:  # noqa: ASYNC110  their ends are a turn of the loop away
                await asyncio.sleep(0)
            await listener.wait_closed()

    def stats(self) -> dict[str, Any]:
        return self._on_loop(lambda: self.tally.stats())

    def request_stats(self) -> dict[str, dict[str, int]]:
        return self._on_loop(lambda: self.tally.request_stats())

    def set_faults(self, faults: Faults) -> None:
        self._on_loop(lambda: self._use(faults))

    def reset(self) -> None:
        self._on_loop(self._reset)

    def _use(self, faults: Faults) -> None:
        self.faults, self._only_verdict = faults, faults.only_verdict

    def _on_loop(self, function: Callable[[], T]) -> T:
        loop = self._loop
        if loop is None or self._listener is None or threading.get_ident() == self._thread:
            return function()
        done: Future[T] = Future()
        loop.call_soon_threadsafe(lambda: done.set_result(function()))
        return done.result()

    def handle(self, connection: _Connection, request: Request) -> None:
        allowed = self._authorization in (None, request.headers.get(b"authorization"))
        refusal: Refusal | None = None
        if request.path.startswith("/v1/") and not allowed:
            refusal = Refusal(401, "incorrect API key provided", code="invalid_api_key")
        if (request.method, request.path) == ("POST", "/v1/chat/completions"):
            self.tally.arrived()
            connection.promise(*((refusal.ending(), 0.0) if refusal else self._chat(request.body)))
        else:
            connection.send(refusal.http() if refusal else self._other(request))

    def _other(self, request: Request) -> bytes:
        match (request.method, request.path):
            case ("GET", "/v1/models"):
                return json_response(replies.MODELS)
            case ("GET", "/health"):
                return json_response({"status": "ok"})
            case ("GET", "/stats"):
                return json_response(self.tally.stats())
            case ("GET", "/stats/requests"):
                return json_response(self.tally.request_stats())
            case ("POST", "/stats/reset"):
                return json_response(self._reset())
            case ("POST", "/faults"):
                if (changes := parse(request.body)) is None:
                    return Refusal(400, replies.NO_OBJECT).http()
                try:
                    self._use(self.faults.changed(changes))
                except SetupError as error:
                    return Refusal(400, str(error)).http()
                return json_response(asdict(self.faults))
            case (_, path) if path.startswith(("/v1/files", "/v1/batches")):
                return self._batches.handle(request)
        return replies.nothing_at(request.method, request.path)

    def _chat(self, raw: bytes) -> tuple[Ending, float]:
        """How the exchange of this body will end, and after how many seconds."""
        body = parse(raw)
        identity = identify(raw, body)
        attempt = self.tally.met(identity)
        if refusal := replies.refuse(body):
            return refusal.ending(identity), 0
        faults = self.faults
        what, latency_s = self._only_verdict or faults.verdict(identity, attempt)
        if 0 < faults.max_in_flight < self.tally.in_flight:
            what, latency_s = "rate_limited", 0.0
        if what in ("dropped", "hung"):
            return Ending(what, identity=identity), latency_s
        if what == "junk":
            page = response(200, replies.JUNK, b"text/html")
            return Ending(what, 200, page, identity), latency_s
        if what in replies.FAULT_ERRORS:
            wait_s = faults.retry_after_s if what == "rate_limited" else 0.0
            return replies.fault_error(what, wait_s).ending(identity, wait_s), latency_s
        asked_before = attempt if body.get("temperature") else 0
        seed = identity + f"{faults.seed}/{asked_before}".encode()
        try:
            return replies.reply(body, what, identity, self.answer, seed), latency_s
        except (AttributeError, LookupError, TypeError, RecursionError):
            refusal = Refusal(400, "a schema beyond the rehearsal model", param="response_format")
            return refusal.ending(identity), 0

    def batch_line(self, body: bytes) -> Ending:
        """How a line of a batch ends: as a chat request would, but for the waiting."""
        self.tally.arrived()
        self.tally.counts["batch_lines"] += 1
        ending = self._chat(body)[0]._replace(retry_after_s=0.0)
        self.tally.ended(Ending("abandoned") if ending.what == "hung" else ending)
        return ending

    def _reset(self) -> dict[str, Any]:
        self.tally = Tally(self.tally.in_flight)
        return self.tally.stats()


def new_event_loop() -> asyncio.AbstractEventLoop:
    """uvloop's if it happens to be installed."""
    try:
        return importlib.import_module("uvloop").new_event_loop()
    except ImportError:
        return asyncio.new_event_loop()


@contextmanager
def serve_in_thread(
    faults: Faults = NO_FAULTS, api_key: str | None = None
) -> Iterator[RehearsalServer]:
    """Serves from a thread of its own while the block runs."""
    server, loop = RehearsalServer(faults, api_key), new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="rehearsal", daemon=True)
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(server.start(), loop).result()
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
