"""The rehearsal server: sockets, routes, and the meeting of a request with its fault."""

from __future__ import annotations

import asyncio
import errno
import importlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, TypeVar, cast

import orjson

from modelcall_assets.errors import Problem, SetupError
from modelcall_assets.rehearsal import replies
from modelcall_assets.rehearsal.batches import Batches
from modelcall_assets.rehearsal.faults import NO_FAULTS, Faults
from modelcall_assets.rehearsal.heuristics import FirstAnswer, answer
from modelcall_assets.rehearsal.replies import Refusal
from modelcall_assets.rehearsal.tally import Ending, Tally, identify
from modelcall_assets.rehearsal.wire import BadHttp, Request, requests, response

T = TypeVar("T")
_CHAT = ("POST", "/v1/chat/completions")


class _Connection(asyncio.Protocol):
    """One client. While an answer is due nothing further is read from the buffer."""

    def __init__(self, server: RehearsalServer) -> None:
        self._server = server
        self._buffer = bytearray()
        self._requests = requests(self._buffer)
        self._busy = False
        self._keep_alive = True
        self._due: Ending | None = None
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._server.opened(self)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer:
            self._timer.cancel()
        self._busy = True
        self._server.closed(self, self._due)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        self._serve()

    def _serve(self) -> None:
        try:
            while not self._busy and (item := next(self._requests)) is not None:
                if isinstance(item, bytes):
                    self.transport.write(item)
                else:
                    self._busy, self._keep_alive = True, item.keep_alive
                    self._server.handle(self, item)
        except BadHttp as bad:
            self._keep_alive = False
            self.send(Refusal(bad.status, str(bad)).http())

    def promise(self, ending: Ending, latency_s: float) -> None:
        self._due = ending
        if ending.what == "hung":
            return
        if latency_s > 0:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(latency_s, self._keep_promise, True)
        else:
            self._keep_promise()

    def _keep_promise(self, late: bool = False) -> None:
        due, self._due = cast(Ending, self._due), None
        self._server.ended(due)
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
    """An OpenAI-compatible endpoint that costs nothing. Its public methods suit any thread.

    With `same_answer` texts are not looked at: it is for measuring how fast a client is."""

    def __init__(
        self, faults: Faults = NO_FAULTS, api_key: str | None = None, *, same_answer: bool = False
    ) -> None:
        self.host, self.port = "127.0.0.1", 0
        self._use(faults)
        self._tally = Tally()
        self._answer = FirstAnswer() if same_answer else answer
        self._authorization = None if api_key is None else f"Bearer {api_key}".encode()
        self._batches = Batches(self._batch_line, lambda: self._faults, self._count)
        self._connections: set[_Connection] = set()
        self._listener: asyncio.Server | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = 0
        self._routes: dict[tuple[str, str], Callable[[Request], bytes]] = {
            ("GET", "/v1/models"): lambda _: _json(replies.MODELS),
            ("GET", "/health"): lambda _: _json({"status": "ok"}),
            ("GET", "/stats"): lambda _: _json(self._tally.stats()),
            ("GET", "/stats/requests"): lambda _: _json(self._tally.request_stats()),
            ("POST", "/stats/reset"): lambda _: _json(self._reset()),
            ("POST", "/faults"): self._change_faults,
        }

    @property
    def base_url(self) -> str:
        return f"http://{self.host}:{self.port}/v1"

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> None:
        self._loop, self._thread = asyncio.get_running_loop(), threading.get_ident()
        try:
            self._listener = await self._loop.create_server(
                lambda: _Connection(self), host, port, backlog=4096
            )
        except OSError as error:
            port_is_wrong = error.errno in (errno.EADDRINUSE, errno.EACCES)
            place = "--port" if port_is_wrong else "--host"
            fix = "choose another, or --port 0 for any free one" if port_is_wrong else ""
            wrong = f"cannot listen on {host}:{port} ({error.strerror or error})"
            raise SetupError([Problem("modelcall rehearse", place, wrong, fix=fix)]) from error
        self.host, self.port = host, self._listener.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Closes every connection, answered or not."""
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.close()
            await self._batches.stop()
            for connection in list(self._connections):
                connection.transport.abort()
            while self._connections:  # noqa: ASYNC110  their ends are a turn of the loop away
                await asyncio.sleep(0)
            await listener.wait_closed()

    def stats(self) -> dict[str, Any]:
        return self._on_loop(lambda: self._tally.stats())

    def request_stats(self) -> dict[str, dict[str, int]]:
        return self._on_loop(lambda: self._tally.request_stats())

    def set_faults(self, faults: Faults) -> None:
        self._on_loop(lambda: self._use(faults))

    def reset(self) -> None:
        self._on_loop(self._reset)

    def _use(self, faults: Faults) -> None:
        self._faults, self._only_verdict = faults, faults.only_verdict

    def _on_loop(self, function: Callable[[], T]) -> T:
        loop = self._loop
        if loop is None or self._listener is None or threading.get_ident() == self._thread:
            return function()
        done: Future[T] = Future()
        loop.call_soon_threadsafe(lambda: done.set_result(function()))
        return done.result()

    def opened(self, connection: _Connection) -> None:
        self._connections.add(connection)
        self._tally.counts["connections"] += 1

    def closed(self, connection: _Connection, due: Ending | None) -> None:
        self._connections.discard(connection)
        if due is not None:
            self.ended(Ending("abandoned"))

    def ended(self, ending: Ending) -> None:
        self._tally.ended(ending, time.monotonic())

    def handle(self, connection: _Connection, request: Request) -> None:
        where = (request.method, request.path)
        allowed = self._authorization in (None, request.headers.get(b"authorization"))
        refusal: Refusal | None = None
        if request.path.startswith("/v1/") and not allowed:
            refusal = Refusal(401, "incorrect API key provided", code="invalid_api_key")
        if where == _CHAT:
            now = time.monotonic()
            self._tally.arrived(now)
            if refusal:
                connection.promise(Ending("error", 401, refusal.http()), 0)
            else:
                connection.promise(*self._chat(request.body, now))
        elif refusal is None and where in self._routes:
            connection.send(self._routes[where](request))
        elif refusal is None and request.path.startswith(("/v1/files", "/v1/batches")):
            connection.send(self._batches.handle(request))
        else:
            refusal = refusal or Refusal(404, f"nothing at {request.method} {request.path}")
            connection.send(refusal.http())

    def _chat(self, raw: bytes, now: float) -> tuple[Ending, float]:
        """How the exchange of this body will end, and after how many seconds."""
        body = _parse(raw)
        identity = identify(raw, body)
        attempt = self._tally.met(identity, now)
        if refusal := replies.refuse(body):
            return Ending("error", refusal.status, refusal.http(), identity), 0
        faults = self._faults
        what, latency_s = self._only_verdict or faults.verdict(identity, attempt)
        if 0 < faults.max_in_flight < self._tally.in_flight:
            what, latency_s = "rate_limited", 0.0
        if what in ("dropped", "hung"):
            return Ending(what, identity=identity), latency_s
        if what == "junk":
            page = response(200, replies.JUNK, b"text/html")
            return Ending(what, 200, page, identity), latency_s
        if what in replies.FAULT_ERRORS:
            wait = faults.retry_after_s if what == "rate_limited" else 0.0
            refusal = replies.fault_error(what, wait)
            header = b"Retry-After: %b\r\n" % f"{wait:g}".encode() if wait else b""
            return Ending("error", refusal.status, refusal.http(header), identity, wait), latency_s
        try:
            reply = replies.draft(body, what, identity, self._answer)
        except (AttributeError, LookupError, TypeError, RecursionError):
            refusal = Refusal(400, "a schema beyond the rehearsal model", param="response_format")
            return Ending("error", 400, refusal.http(), identity), 0
        data = replies.completion(body, reply, identity)
        return Ending(reply.what, 200, data, identity), latency_s

    def _batch_line(self, body: bytes) -> Ending:
        """How a line of a batch ends: as a chat request would, but for the waiting."""
        now = time.monotonic()
        self._tally.arrived(now)
        self._count("batch_lines")
        ending = self._chat(body, now)[0]._replace(retry_after_s=0.0)
        self.ended(Ending("abandoned") if ending.what == "hung" else ending)
        return ending

    def _count(self, what: str) -> None:
        self._tally.counts[what] += 1

    def _change_faults(self, request: Request) -> bytes:
        changes = _parse(request.body)
        if changes is None:
            return Refusal(400, "the body must be one JSON object").http()
        try:
            self._use(self._faults.changed(changes))
        except SetupError as error:
            return Refusal(400, str(error)).http()
        return _json(asdict(self._faults))

    def _reset(self) -> dict[str, Any]:
        self._tally = Tally(self._tally.in_flight)
        return self._tally.stats()


def _parse(body: bytes) -> Any:
    """None stands for whatever is no JSON object."""
    try:
        parsed = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    return parsed if isinstance(parsed, dict) else None


def _json(value: object) -> bytes:
    return response(200, orjson.dumps(value))


def new_event_loop() -> asyncio.AbstractEventLoop:
    """uvloop's if it happens to be installed."""
    try:
        return importlib.import_module("uvloop").new_event_loop()
    except ImportError:
        return asyncio.new_event_loop()


@contextmanager
def serve_in_thread(
    faults: Faults = NO_FAULTS,
    port: int = 0,
    api_key: str | None = None,
    *,
    same_answer: bool = False,
) -> Iterator[RehearsalServer]:
    """Serves from a thread of its own while the block runs."""
    server = RehearsalServer(faults, api_key, same_answer=same_answer)
    loop = new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="rehearsal", daemon=True)
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(server.start(port=port), loop).result()
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
