"""Which answers stand for a record: its journal's, those of others; and what became of each.

Memory per record is one journal position (8 bytes) and its key's fingerprint; only records in hand
are objects.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Iterator,
    Sequence,
)
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from modelcall_assets.errors import StoreError
from modelcall_assets.journal.journal import Dialogue, Journal, Position, SharedReplies
from modelcall_assets.journal.lines import Address, Addresses, Entry
from modelcall_assets.journal.segments import Asking
from modelcall_assets.llm.classify import Said
from modelcall_assets.llm.completion import Usage
from modelcall_assets.llm.dialogue import ChatRequest, Finished, replayed
from modelcall_assets.llm.engine import Engine
from modelcall_assets.records.outcome import BadLine, Failure, Row, Success
from modelcall_assets.stages.adopt import kept_of
from modelcall_assets.stages.report import Tally
from modelcall_assets.stages.score_table import (
    ADOPTED,
    UNKNOWN_OF_ADOPTED,
    ApiRow,
    answered_row,
    outcome_row,
)
from modelcall_assets.stages.standing import Standing, Unanswered
from modelcall_assets.storage.files import in_thread
from modelcall_assets.transforms.user_code import SharedTypes

if TYPE_CHECKING:
    from modelcall_assets.stages.asking import AskingStage


@dataclass
class Reuse:
    """A task's policy, for one file whose journal is in `folder`. Only successes stand for another
    request.

    `published`: whether answers that were published may be used when the file is materialised
    again; an interrupted run is always gone on with. `shared`: answers of whoever shares with this
    file, all of this run if `is_of_run`. `asking`: what they ask at this time; with it identical
    requests are asked once (memory: an entry per distinct request).
    """

    published: bool = True
    shared: SharedReplies | None = None
    is_of_run: bool = False
    asking: Asking | None = None
    folder: str = ""
    _kept: dict[str, Position] = field(default_factory=dict[str, Position])
    _answered: list[tuple[str, int]] = field(default_factory=list[tuple[str, int]])
    _taken: set[str] = field(default_factory=set[str])

    async def find(
        self, journal: Journal, key: str, is_anew: bool = False
    ) -> Sequence[Sequence[Entry]]:
        """Answers to the same request that are not this record's own, to be judged anew; for one
        that `is_anew` those of this run."""
        if key in self._kept:
            return [journal.chain(self._kept[key])]
        if self.shared is None or (is_anew and not self.is_of_run):
            return []
        return await in_thread(self.shared.find, key)

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

    async def tell(self) -> None:
        """Let others find what was answered. StoreError when the table does not take it."""
        if self.shared is None or not self._answered:
            return
        answered, self._answered = self._answered, []
        await in_thread(self.shared.add, self.folder, answered)
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
SYNC_EVERY_S = 1.0
TOLD_PER_SYNC = 4

Asked = ChatRequest | Failure
"""What a record asks of the model, or why it cannot ask."""
Asks = Sequence[tuple[Row | BadLine, Asked]]


@dataclass(slots=True)
class Pending:
    """A record whose dialogue goes on: its address, first request and the turns so far."""

    index: int
    address: Address
    request: ChatRequest
    known: Dialogue | None = None


@dataclass
class Replay:
    """The call phase of one file, as far as it is the same however the model is called, and what
    became of each record."""

    stage: AskingStage
    engine: Engine
    journal: Journal
    tally: Tally
    reuse: Reuse
    stands: Standing | None = None
    kept: dict[int, tuple[Pending, Position, Finished]] = field(default_factory=dict)
    """Of those in hand the answers that stand if no new one comes."""
    requests: int = 0
    waits: int = 0
    """Before a request was sent again."""
    cost_usd: float | None = 0.0
    """Of what was answered now; None when that is unknown."""
    replayed: int = 0
    stayed: int = 0
    """Records that were asked again, in vain, and keep their answer."""
    warnings: list[str] = field(default_factory=list[str])
    types: SharedTypes = field(default_factory=SharedTypes)
    """Of the values that the prompt declares no type for."""
    positions: array[Position] = field(default_factory=lambda: array("q"))
    """By record, in input order, where its last reply lies."""
    unanswered: dict[int, Unanswered] = field(default_factory=dict[int, Unanswered])
    """Why a record has none."""

    def __post_init__(self) -> None:
        self.rules, self.budget = self.stage.rules, self.stage.budget
        self.engine.spent = self.budget.spent if self.budget.is_limited else None
        self._prices, self._provenance = self.stage.model.token_prices, self.stage.provenance

    async def pending(self, asks: Iterator[Asks]) -> AsyncIterator[Pending]:
        """Records still to call."""
        addresses, index = Addresses(self.stage.samples), -1
        while (some := await in_thread(next, asks, None)) is not None:
            for _, request in some:
                index += 1
                self.positions.append(NO_REPLY)
                if isinstance(request, Failure):
                    self.leave(index, Unanswered(request))
                    continue
                item = Pending(index, addresses.next(request.key()), request)
                if (item := self.look_up(item)) is not None:
                    if self.stands and index in self.stands.failed:
                        self.leave(index, self.stands.failed[index])
                    else:
                        yield item

    def look_up(self, item: Pending, *, is_new: bool = False) -> Pending | None:
        """None when a reply settles the record: a success, or a failure of this round; `is_new`
        when this run paid for it."""
        last, finished, is_anew = None, None, self._is_anew(item)
        for known in reversed(self.journal.dialogues(item.address)):
            turns = said_in(known.entries)
            if not (count := len(turns)) or not (known.open_round or self.reuse.published):
                continue
            judged = self.rules.judge(turns)
            is_good = judged is not None and isinstance(judged.outcome, Success)
            if is_anew and not known.open_round:
                if judged is not None and is_good:
                    self.kept.setdefault(item.index, (item, known.positions[count - 1], judged))
            elif last is None or is_good:
                entries, positions = known.entries[:count], known.positions[:count]
                last = replace(known, entries=entries, positions=positions)
                finished = judged
                if is_good:
                    break
        if last is None or finished is None:
            return item if last is None else replace(item, known=last)
        stands = last.open_round or (self.stands is not None and self.stands.settled)
        if isinstance(finished.outcome, Failure) and not stands:
            return item
        if not is_new:
            self._note_replayed()
        self.settle(item, last.positions[-1], finished)
        return None

    async def adopted(self, item: Pending) -> bool:
        """Whether an answer from elsewhere stands for this record's own, of which there is none. It
        is journalled as that; no attempts say that it was not paid for here."""
        if item.known is not None:
            return False
        is_anew = self._is_anew(item)
        for entries in await self.reuse.find(self.journal, item.address.key, is_anew):
            finished = self.rules.judge(said_in(entries))
            if finished is None or isinstance(finished.outcome, Failure):
                continue
            position, address = NO_REPLY, item.address
            for entry in entries:
                before = self.journal.reference(position) if entry.turn else None
                own = entry._replace(address=address, attempts=0, latency_ms=0, previous=before)
                position = self.journal.append(own)
            self._note_replayed()
            self.settle(item, position, finished)
            return True
        return False

    def settle(self, item: Pending, position: Position, finished: Finished) -> None:
        """The record has its outcome."""
        if isinstance(finished.outcome, Failure) and self._keeps(item.index):
            return
        self.kept.pop(item.index, None)
        self.positions[item.index] = position
        self.tally.count(finished.outcome)
        if isinstance(outcome := finished.outcome, Success):
            if self.reuse.shared is not None:
                self.reuse.keep(item.address, position)
            if untyped := self.rules.parser.untyped:
                self.types.note({key: outcome.values[key] for key in untyped})

    def leave(self, index: int, why: Unanswered, position: Position = NO_REPLY) -> None:
        """The record has none; `position` is that of its last turn."""
        if self._keeps(index):
            return
        self.unanswered[index] = why
        self.positions[index] = position
        self.tally.count(why.failure)

    def _is_anew(self, item: Pending) -> bool:
        return self.stands is not None and item.index in self.stands.anew

    def _keeps(self, index: int) -> bool:
        """Whether an answer that it had stands, as no new one came."""
        if (kept := self.kept.pop(index, None)) is None:
            return False
        self.stayed += 1
        self.settle(*kept)
        return True

    def pay(self, turn: Said, exchanged_bytes: int) -> None:
        """Count what an answer cost."""
        if isinstance(turn, Failure):
            return
        cost = self.budget.pay(turn.usage, exchanged_bytes)
        for each in (self, self.tally):
            before = each.cost_usd
            each.cost_usd = None if cost is None or before is None else before + cost

    def rate(self, index: int, item: Row | BadLine) -> tuple[ApiRow, Usage]:
        """Reads every reply back from the journal and parses it again. The usage is what was paid
        for this record."""
        if (why := self.unanswered.get(index)) is not None:
            row = {
                **outcome_row(why.failure),
                "api_request_key": why.key,
                "api_turns": 0,
                "api_attempts": why.attempts,
                "api_endpoint": why.endpoint,
            }
            return row | self._provenance, Usage()
        entries = self.journal.chain(self.positions[index])
        finished = self.rules.judge(said_in(entries))
        assert finished is not None, "the call phase settled every record"
        row = answered_row(finished, entries, self._prices)
        if row["api_endpoint"] == ADOPTED:
            kept = kept_of(entries[-1].body)
            return {**row, **UNKNOWN_OF_ADOPTED, **kept, ADOPTED: kept}, Usage()
        return row | self._provenance, finished.usage if row["api_attempts"] else Usage()

    @asynccontextmanager
    async def synced(self) -> AsyncGenerator[None]:
        """Force the journal to disk about once a second, off the event loop; whoever shares with
        this file hears of answers more often."""

        async def sync() -> None:
            while True:
                try:
                    for _ in range(TOLD_PER_SYNC):
                        await asyncio.sleep(SYNC_EVERY_S / TOLD_PER_SYNC)
                        await self.reuse.tell()
                    await self.budget.sync()
                    await in_thread(self.journal.sync)
                except StoreError as error:
                    self.engine.stop(error)
                    return

        task = asyncio.create_task(sync())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await self.budget.sync()
            await self.reuse.tell()

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
