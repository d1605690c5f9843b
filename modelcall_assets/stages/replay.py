"""Which answers stand for a record: its journal's, those of others; and what became of each.

Memory per record is one journal position (8 bytes) and its key's fingerprint; only records in hand
are objects.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import AsyncGenerator, Awaitable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

from modelcall_assets.errors import StoreError
from modelcall_assets.grading.scorer import SharedTypes
from modelcall_assets.journal.index import Address, Addresses, Asking, SharedReplies
from modelcall_assets.journal.journal import Dialogue, Journal, Position
from modelcall_assets.journal.lines import Entry
from modelcall_assets.llm.dialogue import ChatRequest, Finished, Rules, Said, replayed
from modelcall_assets.llm.engine import Engine
from modelcall_assets.records.outcome import Failure, Reason, Success
from modelcall_assets.stages.budget import Budget
from modelcall_assets.stages.report import Tally
from modelcall_assets.storage.places import Place
from modelcall_assets.storage.rows import read_rows


@dataclass
class Reuse:
    """A task's policy, for one file whose journal is in `folder`. Only successes stand for another
    request.

    `published`: whether answers that were published may be used when the file is materialised
    again; an interrupted run is always gone on with. `shared`: answers of whoever shares with this
    file. `asking`: what they ask at this time; with it identical requests are asked once (memory:
    an entry per distinct request).
    """

    published: bool = True
    shared: SharedReplies | None = None
    asking: Asking | None = None
    folder: str = ""
    _kept: dict[str, Position] = field(default_factory=dict[str, Position])
    _answered: list[tuple[str, int]] = field(default_factory=list[tuple[str, int]])
    _taken: set[str] = field(default_factory=set[str])

    def of_file(self, journal: Journal, address: Address) -> list[Dialogue]:
        """What the file's own journal has of this record."""
        known = journal.dialogues(address)
        return known if self.published else [one for one in known if one.open_round]

    def of_others(self, journal: Journal, key: str) -> Iterator[Sequence[Entry]]:
        """Answers to the same request that are not this record's own, to be judged anew."""
        if key in self._kept:
            yield journal.chain(self._kept[key])
        elif self.shared is not None:
            yield from self.shared.find(key)

    def keep(self, address: Address, position: Position) -> None:
        """This request has its answer, a success; where it is shared."""
        self._answered.append((address.key, address.occurrence))
        if self.asking is not None:
            self._kept[address.key] = position

    def take(self, key: str) -> Awaitable[object] | None:
        """None when this file is to ask; else what to wait for before trying again."""
        if self.asking is None:
            return None
        if (other := self.asking.take(key)) is None:
            self._taken.add(key)
        return other

    def leave(self, key: str) -> None:
        """Nobody asks this now. What was answered is told first: see `tell`."""
        if key not in self._kept:
            self._let_go(key)

    def tell(self) -> None:
        """Let others find what was answered. StoreError when the table does not take it."""
        if self.shared is None or not self._answered:
            return
        answered, self._answered = self._answered, []
        self.shared.add(self.folder, answered)
        for key, _ in answered:
            self._let_go(key)

    def close(self) -> None:
        """What is in hand was not answered."""
        for key in tuple(self._taken):
            self._let_go(key)
        if self.shared is not None:
            self.shared.close()

    def _let_go(self, key: str) -> None:
        if self.asking is not None and key in self._taken:
            self._taken.discard(key)
            self.asking.release(key)


NO_REPLY: Position = -1
ROWS_PER_BREATH = 500
SYNC_EVERY_S = 1.0
TOLD_PER_SYNC = 4

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


Standing = Mapping[int, Unanswered]
"""Of a result, the records that failed, by index."""


def standing_in(output: Place) -> Standing:
    """Of a file of scores or responses."""
    return {
        index: Unanswered(
            Failure(Reason(row["api_fail_reason"]), row["api_fail_detail"]),
            row["api_request_key"],
            row["api_attempts"],
            row["api_endpoint"],
        )
        for index, row in enumerate(read_rows(output))
        if isinstance(row, dict) and row["api_status"] == "error"
    }


@dataclass(slots=True)
class Pending:
    """A record whose dialogue goes on: its address, first request and the turns so far."""

    index: int
    address: Address
    request: ChatRequest
    known: Dialogue | None = None


@dataclass
class Replay:
    """The call phase of one file, as far as it is the same however the model is called."""

    rules: Rules
    engine: Engine
    journal: Journal
    tally: Tally
    reuse: Reuse
    budget: Budget
    samples: int = 1
    stands: Standing | None = None
    """Failures that are not to be asked about again."""
    ledger: Ledger = field(default_factory=Ledger)
    requests: int = 0
    replayed: int = 0
    warnings: list[str] = field(default_factory=list[str])
    types: SharedTypes = field(default_factory=SharedTypes)
    """Of the values that the prompt declares no type for."""

    def pending(self, asked: Iterator[Asked]) -> Iterator[Pending | None]:
        """Records still to call; None now and then, so that a long replay lets others run."""
        addresses = Addresses(self.samples)
        for index, request in enumerate(asked):
            self.ledger.positions.append(NO_REPLY)
            item = None
            if isinstance(request, Failure):
                self.leave(index, Unanswered(request))
            else:
                item = self.look_up(Pending(index, addresses.next(request.key()), request))
                if item is not None and self.stands and index in self.stands:
                    self.leave(index, self.stands[index])
                    item = None
            if item is not None or index % ROWS_PER_BREATH == 0:
                yield item

    def look_up(self, item: Pending, *, is_new: bool = False) -> Pending | None:
        """None when a reply settles the record: a success, or a failure of this round; `is_new`
        when this run paid for it."""
        last, finished = None, None
        for known in self.reuse.of_file(self.journal, item.address):
            turns = said_in(known.entries)
            if not (count := len(turns)):
                continue
            entries, positions = known.entries[:count], known.positions[:count]
            last = replace(known, entries=entries, positions=positions)
            finished = self.rules.judge(turns)
            if finished is not None and isinstance(finished.outcome, Success):
                break
        if last is None or finished is None:
            if last is None and self.reuse.shared is not None and self.adopted(item):
                return None
            return item if last is None else replace(item, known=last)
        stands = last.open_round or self.stands is not None
        if isinstance(finished.outcome, Failure) and not stands:
            return item
        if not is_new:
            self._note_replayed()
        self.settle(item, last.positions[-1], finished)
        return None

    def adopted(self, item: Pending) -> bool:
        """Whether an answer from elsewhere stands for this record's own."""
        for entries in self.reuse.of_others(self.journal, item.address.key):
            finished = self.rules.judge(said_in(entries))
            if finished is not None and isinstance(finished.outcome, Success):
                self._adopt(item, entries, finished)
                return True
        return False

    def settle(self, item: Pending, position: Position, finished: Finished) -> None:
        """The record has its outcome."""
        self.ledger.positions[item.index] = position
        self.tally.count(finished.outcome)
        if isinstance(outcome := finished.outcome, Success):
            if self.reuse.shared is not None:
                self.reuse.keep(item.address, position)
            if untyped := self.rules.parser.untyped:
                self.types.note({key: outcome.values[key] for key in untyped})

    def leave(self, index: int, why: Unanswered, position: Position = NO_REPLY) -> None:
        """The record has none; `position` is that of its last turn."""
        self.ledger.unanswered[index] = why
        self.ledger.positions[index] = position
        self.tally.count(why.failure)

    def pay(self, turn: Said, exchanged_bytes: int) -> None:
        """Count what an answer cost."""
        if isinstance(turn, Failure):
            return
        cost = self.budget.pay(turn.usage, exchanged_bytes)
        if cost is None or self.tally.cost_usd is None:
            self.tally.cost_usd = None
        else:
            self.tally.cost_usd += cost

    @asynccontextmanager
    async def synced(self) -> AsyncGenerator[None]:
        """Force the journal to disk about once a second, off the event loop; whoever shares with
        this file hears of answers more often."""

        async def sync() -> None:
            while True:
                try:
                    for _ in range(TOLD_PER_SYNC):
                        await asyncio.sleep(SYNC_EVERY_S / TOLD_PER_SYNC)
                        self.reuse.tell()
                    self.budget.sync()
                    await asyncio.to_thread(self.journal.sync)
                except StoreError as error:
                    self.engine.stop(error)
                    return

        task = asyncio.create_task(sync())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            self.budget.sync()
            self.reuse.tell()

    def _adopt(self, item: Pending, entries: Sequence[Entry], finished: Finished) -> None:
        """Journal the answer as this record's; no attempts say that it was not paid for here."""
        position = NO_REPLY
        for entry in entries:
            previous = self.journal.reference(position) if entry.turn else None
            own = entry._replace(address=item.address, attempts=0, latency_ms=0, previous=previous)
            position = self.journal.append(own)
        self._note_replayed()
        self.settle(item, position, finished)

    def _note_replayed(self) -> None:
        self.replayed += 1
        self.tally.replayed += 1


def said_in(entries: Sequence[Entry]) -> list[Said]:
    """What journalled replies say to their record, up to one that does not count."""
    turns: list[Said] = []
    for entry in entries:
        if (turn := replayed(entry.status, entry.body)) is None:
            break
        turns.append(turn)
    return turns
