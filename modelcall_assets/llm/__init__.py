"""One run's access to one model: bounded, retried, stopped in time."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, Self

from modelcall_assets.errors import RunStopped
from modelcall_assets.llm.channel import Channel, all_refuse, held_up, is_down
from modelcall_assets.llm.classify import (
    PATIENCE,
    Exchange,
    GaveUp,
    Patience,
    Refused,
    Reply,
    TryAgain,
    Verdict,
    classify,
)
from modelcall_assets.llm.completion import Answer, UsageEstimate
from modelcall_assets.records.outcome import Failure, Reason

if TYPE_CHECKING:
    from modelcall_assets.llm.batch import BatchClient

OVERLOADS_BORNE = 8
"""So often a server that answers others is overloaded before that uses up a record's retries."""
UNANSWERED_LIMIT = 25
"""So many records in a row failing, with no answer between, stop the run."""
LEASE_EVERY_S, LEASE_EVERY_S_UNSETTLED = 1.0, 0.1

Held = Mapping[Channel, float]
"""Channels that one request is not to be sent to before a time."""
Parked = Callable[[bool], object]
"""Told True when a record begins to wait for its retry, without a slot, and False at the end."""


def _ignore(_: object) -> None: ...


@dataclass(eq=False, slots=True)
class _Waiter:
    tokens: int
    held: Held
    turn: asyncio.Future[Channel]


@dataclass(eq=False, repr=False)
class Engine:
    """Shared by the files of a run. Use as an async context manager.

    `ask` never raises for a record. It raises RunStopped when the run as a whole is over: calls in
    flight still finish and return. With `batches` the model is to be called by those, though `ask`
    works too; `collector` makes a client for those that an endpoint was given before, None where it
    is unknown. `spent` says, with so many others in flight, why nothing more may be sent.
    """

    channels: Sequence[Channel]
    _: KW_ONLY
    max_in_flight: int
    max_retries: int
    patience: Patience = PATIENCE
    batches: BatchClient | None = None
    collector: Callable[[str], BatchClient | None] = lambda _: None
    spent: Callable[[int], RunStopped | None] | None = None

    def __post_init__(self) -> None:
        self.in_flight = self.requests = self.retries = 0
        self._counts_tokens = any(each.tokens_per_minute for each in self.channels)
        self._estimate = UsageEstimate()
        self._waiting: deque[_Waiter] = deque()
        self._alarm = self._lease_timer = self._first_call = None
        self._most = 1  # in flight at a time, until the first call has ended; 0 while paused
        self._paused_at = self._paused_s = 0.0
        self._stopped = asyncio.Event()
        self._stop_reason: RunStopped | None = None
        self._unanswered_in_a_row = 0
        self._answered = self._is_idle = False
        self._waits = dict[int, tuple[float, str]]()
        """Until when, and why, records wait to be sent again."""
        self._opened = AsyncExitStack()

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._now = self._loop.time
        async with AsyncExitStack() as opened:
            for channel in self.channels:
                await opened.enter_async_context(channel.transport)
                if channel.lease is not None:
                    opened.enter_context(channel.lease)
            if self.batches is not None:
                await self._open_client(self.batches, opened)
            self._opened = opened.pop_all()
        if any(channel.lease is not None for channel in self.channels):
            self._share()
        return self

    async def __aexit__(self, *_: object) -> None:
        for timer in (self._alarm, self._lease_timer, self._first_call):
            if timer is not None:
                timer.cancel()
        await self._opened.aclose()

    async def batches_at(self, endpoint: str) -> BatchClient | None:
        """For batches that were submitted there before."""
        if self.batches is not None:
            return self.batches if self.batches.name == endpoint else None
        client = self.collector(endpoint)
        return client and await self._open_client(client, self._opened)

    async def _open_client(self, client: BatchClient, opened: AsyncExitStack) -> BatchClient:
        client.pause, client.patience = self.wait, self.patience
        return await opened.enter_async_context(client)

    @property
    def limit(self) -> int:
        """Requests in flight that are allowed, other runs apart."""
        return min(self.max_in_flight, sum(each.max_in_flight for each in self.channels))

    def state(self) -> dict[str, Any]:
        """For people, from any thread."""
        why = held_up([*self._waits.values()], self._now())
        for channel in self.channels:
            why = channel.transport.without_secrets(why)
        found = {"in_flight": self.in_flight, "limit": self.limit, "held_up": why}
        return found | {"paused": not self._most}

    def tune(self, most: int | None, paused: bool) -> None:
        """So many in flight from now on (None: as before), as far as the endpoints' own limits
        allow; none is sent while it is paused."""
        self.max_in_flight = most or self.max_in_flight
        for channel in self.channels:
            channel.widen(self.max_in_flight)
        self._paused_s += 0 if self._most else self._now() - self._paused_at
        self._most, self._paused_at = 0 if paused else self.max_in_flight, self._now()
        self._dispatch()

    def stop(self, reason: RunStopped) -> None:
        """Send nothing more. Idempotent: the first reason is kept."""
        if self._stop_reason is not None:
            return
        self._stop_reason = reason
        self._stopped.set()
        for waiter in self._waiting:
            if not waiter.turn.done():
                waiter.turn.set_exception(reason)
        self._waiting.clear()

    async def wait(self, seconds: float) -> None:
        """Sleep; a stop ends that and raises its reason."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopped.wait()
        if self._stop_reason is not None:
            raise self._stop_reason

    async def ask(
        self, payload: bytes, parked: Parked = _ignore, sent: Callable[[int], object] = _ignore
    ) -> Exchange | GaveUp:
        """Send until answered, refused for good, or out of retries. `sent` hears how often."""
        attempts, failed_attempts, overloads = 0, 0, 0
        held: dict[Channel, float] = {}
        busy_until = self._now() - self._paused_s + self.patience.busy_s
        while True:
            attempts += 1
            channel, reply, verdict, latency_s = await self._send(payload, held)
            self.requests += reply.sent
            sent(reply.sent)
            record = verdict.record if isinstance(verdict, Refused) else None
            if record is not None and await self._answers_others(channel, record.detail, parked):
                verdict = record
            match verdict:
                case Answer() | Failure():
                    if isinstance(verdict, Answer):
                        self._unanswered_in_a_row, self._answered = 0, True
                    elif verdict.reason is Reason.BAD_REQUEST and not self._answered:
                        self._note_failure(verdict, channel)
                    latency_ms = round(latency_s * 1000)
                    return Exchange(reply, verdict, attempts, latency_ms, channel.name)
                case Refused():
                    if (refused := all_refuse(self.channels)) is not None:
                        self.stop(refused)
                        raise refused
                case TryAgain(failure, after_s, busy):
                    asked_to_wait = after_s is not None or failure.reason is Reason.RATE_LIMITED
                    if busy and self._answered and not asked_to_wait:
                        overloads += 1
                        asked_to_wait = overloads <= OVERLOADS_BORNE
                    patient = self._now() - self._paused_s + (after_s or 0.0) < busy_until
                    failed_attempts += not (asked_to_wait and patient)
                    too_long = after_s is not None and after_s > self.patience.busy_s
                    if too_long or failed_attempts > self.max_retries:
                        self._note_failure(failure, channel)
                        return GaveUp(failure, attempts, channel.name)
                    held[channel] = self._now() + self.patience.backoff(attempts, after_s)
                    why = f"{reply.status or ''} {failure.reason} from {channel.name}".strip()
                    await self._pause(held, parked, why)

    async def _send(self, payload: bytes, held: Held) -> tuple[Channel, Reply, Verdict, float]:
        tokens = self._estimate.of(payload) if self._counts_tokens else 0
        if self._stop_reason is not None:
            raise self._stop_reason
        channel = None if self._waiting else self._take(tokens, held)
        if channel is None:
            channel = await self._turn(tokens, held)
        started = self._now()
        try:
            if self.spent is not None and (reason := self.spent(self.in_flight - 1)):
                self.stop(reason)
                raise reason
            reply = await channel.transport.send(payload)
            now = self._now()
            verdict = channel.replied(
                classify(reply), started, now, may_eject=len(self.channels) > 1
            )
            if self._counts_tokens and isinstance(verdict, Answer):
                tokens -= self._estimate.learn(payload, verdict.usage)
            if channel.tokens is not None:
                channel.tokens.give_back(tokens)
            self._most = self._most and self.max_in_flight
            return channel, reply, verdict, now - started
        except BaseException:
            channel.is_probed = False  # if it was the probe, the next one is
            raise
        finally:
            channel.in_flight -= 1
            self.in_flight -= 1
            if self._waiting:
                self._dispatch()

    async def _turn(self, tokens: int, held: Held) -> Channel:
        """A slot, in the order of asking."""
        waiter = _Waiter(tokens, held, self._loop.create_future())
        self._waiting.append(waiter)
        if self._is_idle and self._lease_timer is not None:
            self._lease_timer.cancel()
            self._share()
        self._set_alarm()
        try:
            return await waiter.turn
        except asyncio.CancelledError:
            if waiter.turn.done() and not waiter.turn.cancelled():
                waiter.turn.result().in_flight -= 1
                self.in_flight -= 1
                self._dispatch()
            raise

    def _take(self, tokens: int, held: Held) -> Channel | None:
        """A slot at the least loaded endpoint, if there is one now."""
        if self.in_flight >= self._most:
            return None
        now, channel = self._now(), None
        for each in self.channels:
            if held.get(each, now) <= now and each.wait(tokens, now) == 0:
                channel = each if channel is None or each.load() < channel.load() else channel
        if channel is None:
            return None
        channel.is_probed = channel.ejected_until is not None
        channel.in_flight += 1
        self.in_flight += 1
        if channel.requests is not None:
            channel.requests.take(1, now)
        if channel.tokens is not None:
            channel.tokens.take(tokens, now)
        if self._first_call is None:
            alone_s = self.patience.first_call_alone_s
            self._first_call = self._loop.call_later(alone_s, self._dispatch, self.max_in_flight)
        return channel

    def _dispatch(self, most: int = 0) -> None:
        """Give free slots, of which there are `most` from now on, to those who wait, the oldest
        first; who may not use one lets the next one have it."""
        self._most = self._most and (most or self._most)
        passed_over: list[_Waiter] = []
        while self._waiting:
            waiter = self._waiting.popleft()
            if waiter.turn.done():
                continue
            if (channel := self._take(waiter.tokens, waiter.held)) is not None:
                waiter.turn.set_result(channel)
            else:
                passed_over.append(waiter)
                if not waiter.held:
                    break
        self._waiting.extendleft(reversed(passed_over))
        self._set_alarm()

    def _set_alarm(self) -> None:
        """Look again when time alone will let one of those go on whom `_dispatch` asks."""
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        if not self._waiting or self.in_flight >= self._most:
            return
        now, shortest = self._now(), float("inf")
        for waiter in self._waiting:
            for each in self.channels:
                if (wait := each.wait(waiter.tokens, now)) is not None:
                    shortest = min(shortest, max(wait, waiter.held.get(each, now) - now))
            if not waiter.held and not waiter.turn.done():
                break
        if shortest < float("inf"):
            self._alarm = self._loop.call_later(shortest, self._dispatch)

    def _share(self) -> None:
        """Look how many engines share the endpoints, now and again."""
        is_idle = self._is_idle = not self._waiting and not self.in_flight
        now = self._now()
        settled = [each.look_at_others(now, is_idle=is_idle) for each in self.channels]
        pause = LEASE_EVERY_S if all(settled) else LEASE_EVERY_S_UNSETTLED
        self._lease_timer = self._loop.call_later(pause, self._share)
        self._dispatch()

    async def _answers_others(self, channel: Channel, detail: str, parked: Parked) -> bool:
        """Wait until a 403 is known to be of its record only (True), or of all."""
        parked(True)
        try:
            while not channel.has_answered and channel.refusal is None:
                if not channel.in_flight:
                    channel.refusal = detail
                else:
                    await self.wait(self.patience.until_one_answers_s)
        finally:
            parked(False)
        return channel.has_answered

    async def _pause(self, held: Held, parked: Parked, why: str) -> None:
        """Wait without a slot until some endpoint may be asked again; a stop ends the wait."""
        self.retries += 1
        usable = [channel for channel in self.channels if channel.refusal is None]
        until = min((held.get(each, 0.0) for each in usable), default=0.0)
        if (seconds := until - self._now()) <= 0:
            await asyncio.sleep(0)
            return
        self._waits[id(held)] = until, why
        parked(True)
        try:
            await self.wait(seconds)
        finally:
            del self._waits[id(held)]
            parked(False)

    def _note_failure(self, failure: Failure, channel: Channel) -> None:
        self._unanswered_in_a_row += 1
        if self._unanswered_in_a_row >= UNANSWERED_LIMIT:
            self.stop(is_down(channel, UNANSWERED_LIMIT, failure))
