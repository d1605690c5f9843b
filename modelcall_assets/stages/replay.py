"""Which answers stand for a record: its journal's, those of others; and what became of each.

Memory per record is one journal position (8 bytes) and its key's fingerprint; only records in hand
are objects, and those that wait for a batch are on disk.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

import orjson

from modelcall_assets.errors import StoreError
from modelcall_assets.journal import Journal, Position
from modelcall_assets.journal.lines import Address, Addresses, Entry
from modelcall_assets.llm import Engine
from modelcall_assets.llm.classify import Exchange, Said
from modelcall_assets.llm.completion import Answer, Usage
from modelcall_assets.llm.dialogue import ChatRequest, Finished, said_in
from modelcall_assets.records.outcome import BadLine, Failure, Row, Success
from modelcall_assets.stages.adopt import ADOPTED, Reuse, adopted_row
from modelcall_assets.stages.report import Tally
from modelcall_assets.stages.score_table import ApiRow, answered_row, outcome_row
from modelcall_assets.stages.standing import Standing, Unanswered
from modelcall_assets.storage.files import in_thread
from modelcall_assets.transforms.user_code import SharedTypes

if TYPE_CHECKING:
    from modelcall_assets.llm.batch import Ended
    from modelcall_assets.stages.asking import AskingStage


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
    turns: Sequence[Said] = ()
    position: Position = NO_REPLY
    """Of the last turn's reply."""


ROWS_AT_ONCE = 100
"""Read before others can run."""


class Spool:
    """Pending requests on disk, for as long as the process lives, and how far each has come."""

    def __init__(self) -> None:
        self._file = TemporaryFile()  # noqa: SIM115  closed by `close`
        self.size = 0
        self.settled = bytearray()
        self.asked = array("H")
        """The turn that was in the last batch, counted from 1; 0 for none."""
        self.tries = array("H")
        """How often that turn was not answered."""
        self.told: Ended | None = None
        """Of the last batch."""

    def __len__(self) -> int:
        return len(self.settled)

    def add(self, item: Pending) -> None:
        head = orjson.dumps({"i": item.index, "a": tuple(item.address)})
        line = b"".join((head[:-1], b',"body":', item.request.payload, b"}\n"))
        self.size += self._file.write(line)
        self.settled.append(False)
        self.asked.append(0)
        self.tries.append(0)

    async def unsettled(self) -> AsyncIterator[tuple[int, Pending]]:
        """Number and request, whose revision is in its key already; others can run meanwhile."""
        self._file.seek(0)
        for number, line in enumerate(self._file):
            if number % ROWS_AT_ONCE == 0:
                await asyncio.sleep(0)
            if not self.settled[number]:
                found = orjson.loads(line)
                messages = tuple(found["body"].pop("messages"))
                request = ChatRequest(found["body"], messages)
                yield number, Pending(found["i"], Address(*found["a"]), request)

    def close(self) -> None:
        self._file.close()


@dataclass
class Replay:
    """The call phase of one file, as far as it is the same however the model is called, and what
    became of each record."""

    stage: AskingStage
    engine: Engine
    journal: Journal
    tally: Tally
    reuse: Reuse
    stands: Standing
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
                item = Pending(index, addresses.next(request.key), request)
                if (item := self.look_up(item)) is not None:
                    if index in self.stands.failed:
                        self.leave(index, self.stands.failed[index])
                    else:
                        yield item

    def look_up(self, item: Pending, *, is_new: bool = False) -> Pending | None:
        """None when a reply settles the record: a success, or a failure of this round; `is_new`
        when this run paid for it."""
        last, finished, stands = None, None, self.stands.settled
        is_anew = item.index in self.stands.anew
        for known in reversed(self.journal.dialogues(item.address)):
            turns = said_in(known.entries)
            if not turns or not (known.open_round or self.reuse.published):
                continue
            position, judged = known.positions[len(turns) - 1], self.rules.judge(turns)
            is_good = judged is not None and isinstance(judged.outcome, Success)
            if is_anew and not known.open_round:
                if judged is not None and is_good:
                    self.kept.setdefault(item.index, (item, position, judged))
            elif last is None or is_good:
                last, finished = replace(item, turns=turns, position=position), judged
                stands = known.open_round or self.stands.settled
                if is_good:
                    break
        if last is None or finished is None:
            return last or item
        if isinstance(finished.outcome, Failure) and not stands:
            return item
        self.settle(item, last.position, finished, is_replayed=not is_new)
        return None

    async def adopted(self, item: Pending) -> bool:
        """Whether an answer from elsewhere stands for this record's own, of which there is none. It
        is journalled as that; no attempts say that it was not paid for here."""
        if item.turns:
            return False
        is_anew = item.index in self.stands.anew
        for entries in await self.reuse.find(self.journal, item.address.key, is_anew):
            finished = self.rules.judge(said_in(entries))
            if finished is None or isinstance(finished.outcome, Failure):
                continue
            position, address = NO_REPLY, item.address
            for entry in entries:
                before = self.journal.reference(position) if entry.turn else None
                own = entry._replace(address=address, attempts=0, latency_ms=0, previous=before)
                position = self.journal.append(own)
            self.settle(item, position, finished, is_replayed=True)
            return True
        return False

    def settle(
        self, item: Pending, position: Position, finished: Finished, *, is_replayed: bool = False
    ) -> None:
        """The record has its outcome."""
        self.replayed += is_replayed
        self.tally.replayed += is_replayed
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

    def _keeps(self, index: int) -> bool:
        """Whether an answer that it had stands, as no new one came."""
        if (kept := self.kept.pop(index, None)) is None:
            return False
        self.stayed += 1
        self.settle(*kept)
        return True

    def received(
        self,
        got: Exchange,
        address: Address,
        turn: int,
        before: Position,
        *,
        sent_bytes: int = 0,
        findable: bool = False,
    ) -> Position:
        """Journal a reply, which mends the one `before`, and count what an answer cost."""
        entry = Entry(
            address=address,
            turn=turn,
            status=got.reply.status,
            body=got.reply.body,
            endpoint=got.endpoint,
            attempts=got.attempts,
            latency_ms=got.latency_ms,
            answered_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
            previous=self.journal.reference(before) if turn else None,
        )
        position = self.journal.append(entry, findable=findable)
        if isinstance(got.said, Answer):
            cost = self.budget.pay(got.said.usage, sent_bytes + len(got.reply.body))
            for each in (self, self.tally):
                so_far = each.cost_usd
                each.cost_usd = None if cost is None or so_far is None else so_far + cost
        return position

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
            return adopted_row(row, entries[-1].body), Usage()
        return row | self._provenance, finished.usage if row["api_attempts"] else Usage()

    def numbers(self, rows: int, seconds: float) -> dict[str, Any]:
        """What it took."""
        told: dict[str, Any] = {"requests_sent": self.requests}
        told["answered_from_journal"] = self.replayed
        if self.engine.batches is None:
            told["waits"] = self.waits
        if self.cost_usd is not None:
            told["run_cost_usd"] = self.cost_usd
        if asked := rows - self.replayed:
            told["rows_per_second"] = round(asked / seconds, 1)
        return told

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
