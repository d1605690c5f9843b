"""Call the model for every record of a file that the journal does not answer yet.

Memory per record is one journal position (8 bytes) and its key's fingerprint; only records in hand
are objects.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from modelcall_assets.errors import ModelcallError
from modelcall_assets.journal.journal import Address, Dialogue, Entry, Journal, Position
from modelcall_assets.journal.occurrences import Occurrences
from modelcall_assets.llm.dialogue import Finished, Rules, Said, replayed, said
from modelcall_assets.llm.engine import Engine, Exchange, GaveUp
from modelcall_assets.llm.request import ChatRequest
from modelcall_assets.records.outcome import Failure, Success
from modelcall_assets.steps.budget import Budget
from modelcall_assets.steps.progress import Tally
from modelcall_assets.steps.reuse import Reuse

NO_REPLY: Position = -1
MOST_WORKERS = 8192
"""Records in hand at most: those in flight, and those that wait for a retry without a slot."""
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
    reuse: Reuse
    budget: Budget
    ledger: Ledger = field(default_factory=Ledger)
    requests: int = 0
    replayed: int = 0
    _in_hand: int = 0
    _working: int = 0
    _stopped: ModelcallError | None = None
    _occurrences: Occurrences = field(default_factory=Occurrences)

    async def run(self, asked: Iterator[Asked]) -> Ledger:
        """Raises RunStopped when the run is over and InputError when the file cannot be read on;
        replies in flight are journalled first."""
        self._records = self._pending(asked)
        async with self._synced(), asyncio.TaskGroup() as self._workers:
            for _ in range(self.engine.max_in_flight):
                self._start_worker()
        if self._stopped is not None:
            raise self._stopped
        return self.ledger

    def _start_worker(self) -> None:
        self._working += 1
        self._in_hand += 1
        self._workers.create_task(self._work())

    async def _work(self) -> None:
        """As many work as requests may be in flight; one too many, after a wait, ends."""
        try:
            for item in self._records:
                if item is None:
                    await asyncio.sleep(0)
                    continue
                await self._answer(item)
                if self._working > self.engine.max_in_flight:
                    break
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
        """None when an earlier reply settles the record: a success, or a failure of this round."""
        key = request.key()
        address = Address(key, self._occurrences.next(key))
        last, finished = None, None
        for last in self.reuse.of_file(self.journal, address):
            finished = self.rules.judge(_said(last.entries))
            if finished is not None and isinstance(finished.outcome, Success):
                break
        item = _Pending(index, address, request, last)
        if last is None or finished is None:
            return None if last is None and self._adopted(item) else item
        if isinstance(finished.outcome, Failure) and not last.open_round:
            return _Pending(index, address, request, None)
        self._note_replayed()
        self._settle(item, last.positions[-1], finished)
        return None

    def _adopted(self, item: _Pending) -> bool:
        """Whether an answer from elsewhere stands for this record's own."""
        for entries in self.reuse.of_others(self.journal, item.address.key):
            finished = self.rules.judge(_said(entries))
            if finished is not None and isinstance(finished.outcome, Success):
                self._adopt(item, entries, finished)
                return True
        return False

    def _adopt(self, item: _Pending, entries: Sequence[Entry], finished: Finished) -> None:
        """Journal the answer as this record's; no attempts say that it was not paid for here."""
        position = NO_REPLY
        for entry in entries:
            previous = self.journal.reference(position) if entry.turn else None
            own = replace(entry, address=item.address, attempts=0, latency_ms=0, previous=previous)
            position = self.journal.append(own)
        self._note_replayed()
        self._settle(item, position, finished)

    async def _answer(self, item: _Pending) -> None:
        """Ask, unless the task wants identical requests to wait for the first one's answer."""
        key = item.address.key
        while (first := self.reuse.asked_now(key)) is not None:
            self._parked(True)
            try:
                await first.wait()
            finally:
                self._parked(False)
            if self._adopted(item):
                return
        with self.reuse.asking(key):
            await self._converse(item)

    async def _converse(self, item: _Pending) -> None:
        entries = list(item.known.entries) if item.known else []
        position = item.known.positions[-1] if item.known else NO_REPLY
        turns = _said(entries)
        while (finished := self.rules.judge(turns)) is None:
            request = self.rules.next_request(item.request, turns)
            self._stop_when_spent()
            result = await self.engine.ask(request.payload, self._parked)
            self.requests += result.attempts
            self.tally.requests += result.attempts
            if isinstance(result, GaveUp):
                self.ledger.unanswered[item.index] = Unanswered(
                    result.failure, item.address.key, result.attempts, result.endpoint
                )
                self.ledger.positions[item.index] = position
                self.tally.count(result.failure)
                return
            before = self.journal.reference(position) if entries else None
            entries.append(_entry(item.address, len(entries), result, before))
            position = self.journal.append(entries[-1])
            turns.append(said(result.verdict))
            self._pay(turns[-1], len(request.payload) + len(result.reply.body))
        self._settle(item, position, finished)

    def _pay(self, turn: Said, exchanged_bytes: int) -> None:
        if isinstance(turn, Failure):
            return
        cost = self.budget.pay(turn.usage, exchanged_bytes)
        if cost is None or self.tally.cost_usd is None:
            self.tally.cost_usd = None
        else:
            self.tally.cost_usd += cost

    def _stop_when_spent(self) -> None:
        if (reason := self.budget.spent(self.engine.in_flight)) is not None:
            self.engine.stop(reason)
            raise reason

    def _note_replayed(self) -> None:
        self.replayed += 1
        self.tally.replayed += 1

    def _settle(self, item: _Pending, position: Position, finished: Finished) -> None:
        self.ledger.positions[item.index] = position
        self.tally.count(finished.outcome)
        if isinstance(finished.outcome, Success):
            self.reuse.keep(item.address.key, position)

    @asynccontextmanager
    async def _synced(self) -> AsyncGenerator[None]:
        """Force the journal to disk about once a second, off the event loop."""

        async def sync() -> None:
            while True:
                await asyncio.sleep(SYNC_EVERY_S)
                self.budget.sync()
                await asyncio.to_thread(self.journal.sync)

        task = asyncio.create_task(sync())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            self.budget.sync()


def _entry(
    address: Address, turn: int, result: Exchange, previous: tuple[str, int] | None
) -> Entry:
    return Entry(
        address=address,
        turn=turn,
        status=result.reply.status,
        body=result.reply.body,
        endpoint=result.endpoint,
        attempts=result.attempts,
        latency_ms=result.latency_ms,
        answered_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
        previous=previous,
    )


def _said(entries: Sequence[Entry]) -> list[Said]:
    return [replayed(entry.status, entry.body) for entry in entries]
