"""One run's access to one model: bounded, retried, stopped in time."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from modelcall_assets.errors import EndpointDown, EndpointRefused, RunStopped
from modelcall_assets.llm.classify import Answered, BadRecord, Refused, TryAgain, classify
from modelcall_assets.llm.transport import Reply, Transport
from modelcall_assets.records.outcome import Failure, Reason

BACKOFF_BASE_S = 0.5
BACKOFF_CAP_S = 60.0
RATE_LIMIT_PATIENCE_S = 900.0
"""How long one record keeps trying while the endpoint only says that it is busy; an endpoint
that asks for a longer wait is not waited for."""
FIRST_CALL_ALONE_S = 2.0
"""A wrong key or model costs one call: the others wait this long for the first answer."""
UNANSWERED_LIMIT = 25
"""So many records in a row failing, with no answer between, stop the run."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """A reply that counts (a completion or a final refusal of this request) and what it took."""

    reply: Reply
    attempts: int
    latency_ms: int
    endpoint: str


@dataclass(frozen=True, slots=True)
class GaveUp:
    """No reply that counts, and no retries left."""

    failure: Failure
    attempts: int
    endpoint: str


@dataclass
class Counters:
    """What the engine did so far; progress reads it."""

    requests: int = 0
    retries: int = 0
    in_flight: int = 0


class Engine:
    """Shared by the files of a run; open the transport before, close it after.

    `ask` never raises for a record. It raises RunStopped when the run as a whole is over:
    calls in flight at that time still finish and return.
    """

    def __init__(self, transport: Transport, *, max_in_flight: int, max_retries: int) -> None:
        self.max_in_flight = max_in_flight
        self.counters = Counters()
        self._transport = transport
        self._max_retries = max_retries
        self._slots = asyncio.Semaphore(max_in_flight)
        self._gate = _FirstCallGate()
        self._stopped = asyncio.Event()
        self._stop_reason: RunStopped | None = None
        self._unanswered_in_a_row = 0
        self._answered = False

    def stop(self, reason: RunStopped) -> None:
        """Send nothing more. Idempotent: the first reason is kept."""
        if self._stop_reason is None:
            self._stop_reason = reason
            self._stopped.set()

    async def ask(self, payload: bytes) -> Exchange | GaveUp:
        """Send until answered, refused for good, or out of retries."""
        attempts, failed_attempts = 0, 0
        busy_until = time.monotonic() + RATE_LIMIT_PATIENCE_S
        while True:
            attempts += 1
            reply, latency_s = await self._send(payload)
            match classify(reply):
                case Answered():
                    self._unanswered_in_a_row = 0
                    self._answered = True
                    return self._exchange(reply, attempts, latency_s)
                case BadRecord(failure):
                    if failure.reason is Reason.BAD_REQUEST and not self._answered:
                        self._note_failure(failure)
                    return self._exchange(reply, attempts, latency_s)
                case Refused(detail):
                    reason = EndpointRefused(self._refusal(detail))
                    self.stop(reason)
                    raise reason
                case TryAgain(failure, after_s):
                    asked_to_wait = after_s is not None or failure.reason is Reason.RATE_LIMITED
                    patient = time.monotonic() + (after_s or 0.0) < busy_until
                    failed_attempts += not (asked_to_wait and patient)
                    too_long = after_s is not None and after_s > RATE_LIMIT_PATIENCE_S
                    if too_long or failed_attempts > self._max_retries:
                        self._note_failure(failure)
                        return GaveUp(failure, attempts, self._transport.name)
                    await self._pause(_delay(attempts, after_s))

    async def _send(self, payload: bytes) -> tuple[Reply, float]:
        async with self._slot():
            started = time.monotonic()
            reply = await self._transport.send(payload)
            return reply, time.monotonic() - started

    @asynccontextmanager
    async def _slot(self) -> AsyncGenerator[None]:
        async with self._slots, self._gate.passage():
            if self._stop_reason is not None:
                raise self._stop_reason
            self.counters.requests += 1
            self.counters.in_flight += 1
            try:
                yield
            finally:
                self.counters.in_flight -= 1

    async def _pause(self, seconds: float) -> None:
        """Wait without a slot; a stop of the run ends the wait."""
        self.counters.retries += 1
        try:
            async with asyncio.timeout(seconds):
                await self._stopped.wait()
        except TimeoutError:
            return
        assert self._stop_reason is not None
        raise self._stop_reason

    def _note_failure(self, failure: Failure) -> None:
        self._unanswered_in_a_row += 1
        if self._unanswered_in_a_row >= UNANSWERED_LIMIT:
            self.stop(
                EndpointDown(
                    f"{self._transport.name}: {UNANSWERED_LIMIT} records in a row failed and none "
                    f"was answered; the last: {failure.reason}: {failure.detail}. "
                    "Mend that and materialise again: what was answered is kept"
                )
            )

    def _refusal(self, detail: str) -> str:
        return (
            f"{self._transport.name} refuses every request: {detail}. "
            "Check api_key, model and base_url in the model file, and the account's quota"
        )

    def _exchange(self, reply: Reply, attempts: int, latency_s: float) -> Exchange:
        return Exchange(reply, attempts, round(latency_s * 1000), self._transport.name)


@dataclass
class _FirstCallGate:
    """Lets one call through alone; opens for all at its end or after FIRST_CALL_ALONE_S."""

    _open: asyncio.Event = field(default_factory=asyncio.Event)
    _taken: bool = False

    @asynccontextmanager
    async def passage(self) -> AsyncGenerator[None]:
        if self._open.is_set():
            yield
        elif not self._taken:
            self._taken = True
            asyncio.get_running_loop().call_later(FIRST_CALL_ALONE_S, self._open.set)
            try:
                yield
            finally:
                self._open.set()
        else:
            await self._open.wait()
            yield


def _delay(attempt: int, after_s: float | None) -> float:
    """Exponential with full jitter; never shorter than what the server asked for."""
    spread = random.uniform(0, min(BACKOFF_CAP_S, BACKOFF_BASE_S * 2 ** min(attempt - 1, 30)))
    if after_s is None:
        return spread
    return after_s + min(spread, (0.1 + attempt / 50) * (after_s + 1))
