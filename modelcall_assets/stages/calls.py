"""Call the model for every record of a file that the journal does not answer yet."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

from modelcall_assets.errors import ModelcallError
from modelcall_assets.journal.lines import Entry
from modelcall_assets.llm.engine import GaveUp
from modelcall_assets.stages.replay import NO_REPLY, Asks, Pending, Replay, Unanswered, said_in

MOST_WORKERS = 8192
"""Records in hand at most: those in flight, and those that wait for a retry without a slot."""


@dataclass
class Caller(Replay):
    """The call phase of one file, a request at a time."""

    _in_hand: int = 0
    _working: int = 0
    _stopped: ModelcallError | None = None

    async def run(self, asks: Iterator[Asks]) -> None:
        """Raises RunStopped when the run is over and InputError when the file cannot be read on;
        replies in flight are journalled first."""
        self._records, self._reading = self.pending(asks), asyncio.Lock()
        async with self.synced(), asyncio.TaskGroup() as self._workers:
            for _ in range(self.engine.max_in_flight):
                self._start_worker()
        if self._stopped is not None:
            raise self._stopped

    def _start_worker(self) -> None:
        self._working += 1
        self._in_hand += 1
        self._workers.create_task(self._work())

    async def _work(self) -> None:
        """As many work as requests may be in flight; one too many, after a wait, ends."""
        is_shared = self.reuse.shared is not None
        try:
            while self._working <= self.engine.max_in_flight:
                async with self._reading:
                    item = await anext(self._records, None)
                if item is None:
                    break
                await (self._answer_once(item) if is_shared else self._answer(item))
        except ModelcallError as error:
            self._stopped = self._stopped or error
        finally:
            self._working -= 1
            self._in_hand -= 1

    def _parked(self, begins: bool) -> None:
        """A record that waits without a slot lets another one be worked on."""
        self._working += -1 if begins else 1
        if begins and self._stopped is None and self._in_hand < MOST_WORKERS:
            self._start_worker()

    async def _answer_once(self, item: Pending) -> None:
        """Where others ask the same now, their answer is waited for."""
        key = item.address.key
        while (other := self.reuse.take(key)) is not None:
            self._parked(True)
            try:
                await other
            finally:
                self._parked(False)
            if self._stopped is not None:  # who waits need not see that the run has ended
                raise self._stopped
        try:
            if not await self.adopted(item):
                await self._answer(item)
        finally:
            self.reuse.leave(key)

    async def _answer(self, item: Pending) -> None:
        entries = list(item.known.entries) if item.known else []
        position = item.known.positions[-1] if item.known else NO_REPLY
        turns = said_in(entries) if entries else []
        while (finished := self.rules.judge(turns)) is None:
            request = self.rules.next_request(item.request, turns)
            if (reason := self.budget.spent(self.engine.in_flight)) is not None:
                self.engine.stop(reason)
                raise reason
            result = await self.engine.ask(request.payload, self._parked, self._sent)
            if isinstance(result, GaveUp):
                why = Unanswered(result.failure, item.address.key, result.attempts, result.endpoint)
                self.leave(item.index, why, position)
                return
            before = self.journal.reference(position) if entries else None
            entries.append(
                Entry(
                    address=item.address,
                    turn=len(entries),
                    status=result.reply.status,
                    body=result.reply.body,
                    endpoint=result.endpoint,
                    attempts=result.attempts,
                    latency_ms=result.latency_ms,
                    answered_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
                    previous=before,
                )
            )
            position = self.journal.append(entries[-1])
            turns.append(result.said)
            self.pay(turns[-1], len(request.payload) + len(result.reply.body))
        self.settle(item, position, finished)

    def _sent(self, requests: int) -> None:
        self.requests += requests
        self.tally.requests += requests
