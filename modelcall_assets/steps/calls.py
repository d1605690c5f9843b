"""Call the model for every record of a file that the journal does not answer yet.

Memory per record is one journal position (8 bytes); only records without one keep an object.
"""

from __future__ import annotations

import asyncio
from array import array
from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime

from modelcall_assets.errors import ModelcallError
from modelcall_assets.journal.journal import Address, Dialogue, Entry, Journal, Position
from modelcall_assets.llm.dialogue import Finished, Rules, Turn
from modelcall_assets.llm.engine import Engine, GaveUp
from modelcall_assets.llm.request import ChatRequest
from modelcall_assets.records.outcome import Failure, Success
from modelcall_assets.steps.progress import Tally

NO_REPLY: Position = -1
WORKERS_PER_SLOT = 4
"""Records that wait for a retry hold no slot; so many may wait before reading on stops."""
MOST_WORKERS = 8192
ROWS_PER_BREATH = 500
SYNC_EVERY_S = 1.0

Asked = ChatRequest | Failure
"""What a record asks of the model, or why it cannot ask."""


@dataclass(frozen=True, slots=True)
class Unanswered:
    """A failure that left no reply: nothing asked, or no retries left."""

    failure: Failure
    key: str | None = None
    attempts: int = 0
    endpoint: str | None = None


@dataclass
class Ledger:
    """Per record, in input order: where its last reply lies, else why there is none."""

    positions: array[Position] = field(default_factory=lambda: array("q"))
    unanswered: dict[int, Unanswered] = field(default_factory=dict[int, Unanswered])


@dataclass(frozen=True, slots=True)
class _Pending:
    """A record whose dialogue goes on: its address, first request and the turns so far."""

    index: int
    address: Address
    request: ChatRequest
    known: Dialogue | None


@dataclass
class Caller:
    """The call phase of one file."""

    rules: Rules
    engine: Engine
    journal: Journal
    tally: Tally
    prices: tuple[float | None, float | None]
    ledger: Ledger = field(default_factory=Ledger)
    requests: int = 0
    replayed: int = 0
    _stopped: ModelcallError | None = None
    _occurrences: Counter[str] = field(default_factory=Counter[str])

    async def run(self, asked: Iterator[Asked]) -> Ledger:
        """Raises RunStopped when the run is over and InputError when the file cannot be read on;
        replies in flight are journalled first."""
        pending = self._pending(asked)
        async with self._synced(), asyncio.TaskGroup() as workers:
            for _ in range(min(self.engine.max_in_flight * WORKERS_PER_SLOT, MOST_WORKERS)):
                workers.create_task(self._work(pending))
        if self._stopped is not None:
            raise self._stopped
        return self.ledger

    async def _work(self, pending: Iterator[_Pending | None]) -> None:
        try:
            for item in pending:
                if item is None:
                    await asyncio.sleep(0)
                else:
                    await self._converse(item)
        except ModelcallError as error:
            self._stopped = self._stopped or error

    def _pending(self, asked: Iterator[Asked]) -> Iterator[_Pending | None]:
        """Records still to call; None now and then, so that a long replay lets others run."""
        for index, request in enumerate(asked):
            self.ledger.positions.append(NO_REPLY)
            item = None
            if isinstance(request, Failure):
                self.ledger.unanswered[index] = Unanswered(request)
                self.tally.count(request)
            else:
                item = self._replay(index, request)
            if item is not None or index % ROWS_PER_BREATH == 0:
                yield item

    def _replay(self, index: int, request: ChatRequest) -> _Pending | None:
        """None when the journal settles the record: a success, or a failure of this round."""
        key = request.key()
        address = Address(key, self._occurrences[key])
        self._occurrences[key] += 1
        last, finished = None, None
        for last in self.journal.dialogues(address):
            finished = self.rules.judge(_turns(last.entries))
            if finished is not None and isinstance(finished.outcome, Success):
                break
        if last is None or finished is None:
            return _Pending(index, address, request, last)
        if isinstance(finished.outcome, Failure) and not last.open_round:
            return _Pending(index, address, request, None)
        self.replayed += 1
        self.tally.replayed += 1
        self._settle(index, last.positions[-1], finished)
        return None

    async def _converse(self, item: _Pending) -> None:
        entries = list(item.known.entries) if item.known else []
        position = item.known.positions[-1] if item.known else NO_REPLY
        while (finished := self.rules.judge(_turns(entries))) is None:
            request = self.rules.next_request(item.request, _turns(entries))
            result = await self.engine.ask(request.payload())
            self.requests += result.attempts
            self.tally.requests += result.attempts
            if isinstance(result, GaveUp):
                self.ledger.unanswered[item.index] = Unanswered(
                    result.failure, item.address.key, result.attempts, result.endpoint
                )
                self.ledger.positions[item.index] = position
                self.tally.count(result.failure)
                return
            entry = Entry(
                address=item.address,
                turn=len(entries),
                status=result.reply.status,
                body=result.reply.body,
                endpoint=result.endpoint,
                attempts=result.attempts,
                latency_ms=result.latency_ms,
                answered_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
                previous=self.journal.reference(position) if entries else None,
            )
            position = self.journal.append(entry)
            entries.append(entry)
        self._settle(item.index, position, finished)

    def _settle(self, index: int, position: Position, finished: Finished) -> None:
        self.ledger.positions[index] = position
        cost = finished.usage.cost(*self.prices)
        if cost is None or self.tally.cost_usd is None:
            self.tally.cost_usd = None
        else:
            self.tally.cost_usd += cost
        self.tally.count(finished.outcome)

    @asynccontextmanager
    async def _synced(self) -> AsyncGenerator[None]:
        """Force the journal to disk about once a second, off the event loop."""

        async def sync() -> None:
            while True:
                await asyncio.sleep(SYNC_EVERY_S)
                await asyncio.to_thread(self.journal.sync)

        task = asyncio.create_task(sync())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def _turns(entries: list[Entry] | tuple[Entry, ...]) -> list[Turn]:
    return [Turn(entry.status, entry.body) for entry in entries]
