"""Call the model for a file by batches: requests go up as files, and hours later come the answers.

Requests that wait are spooled to disk, as many to a spool as a batch may hold. For each spool one
batch follows another: all of its requests, then those that are still missing or have to be mended.
What a batch brings is journalled by the addresses in its `custom_id`s, so a batch that outlives its
run is taken up by the next one.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import islice
from tempfile import TemporaryFile
from typing import IO, TYPE_CHECKING
from uuid import uuid4

from modelcall_assets.errors import (
    BatchOutstanding,
    EndpointDown,
    EndpointRefused,
    ModelcallError,
    RunStopped,
)
from modelcall_assets.journal.journal import Position
from modelcall_assets.journal.lines import Address, BatchNote, Entry
from modelcall_assets.llm.classify import Refused, Reply, Said, TryAgain, classify
from modelcall_assets.llm.engine import UNANSWERED_LIMIT
from modelcall_assets.records.outcome import Failure, short
from modelcall_assets.stages.replay import NO_REPLY, Asks, Pending, Replay, said_in
from modelcall_assets.stages.spool import ROWS_AT_ONCE, Spool, Told
from modelcall_assets.stages.standing import Unanswered
from modelcall_assets.storage.files import in_thread

if TYPE_CHECKING:
    from modelcall_assets.llm.batch import BatchClient

MOST_BYTES = 190_000_000
"""In a batch's file; OpenAI takes 200 MB."""
FIRST_WITH_BUDGET = 1000
"""Requests in flight before a task with a budget knows what one costs."""
SHOWN_STRANGERS = 3
_CUSTOM_ID = re.compile(r"([0-9a-f]{32})-(\d+)-(\d+)-(\d+)")


@dataclass
class BatchCaller(Replay):
    """The call phase of one file, by batches."""

    _client: BatchClient = field(init=False)
    _outstanding: int = 0
    """Requests in batches that are being written or have not ended."""
    _running: dict[str, None] = field(default_factory=dict[str, None])
    """Ids of those batches."""
    _in_spools: set[str] = field(default_factory=set[str])
    """Request keys, where identical requests are asked once."""
    _has_answers: bool = False
    _given_up: int = 0
    _ended: int = 0
    """Batches."""

    async def run(self, asks: Iterator[Asks]) -> None:
        """Raises RunStopped when the run is over and InputError when the file cannot be read on.
        The batches that run then go on; the next run takes them up."""
        stopped: BaseException | None = None
        try:
            async with self.synced():
                with ExitStack() as self._open_spools:
                    await self.take_up_left_behind()
                    assert self.engine.batches is not None
                    self._client = self.engine.batches
                    held = await self._work_off(self.pending(asks))
                    while len(held):
                        held = await self._work_off(self._again(held))
        except* ModelcallError as errors:
            stopped = errors.exceptions[0]
        if stopped is None:
            return
        if isinstance(stopped, RunStopped):
            self.engine.stop(stopped)  # files that share it end too
            if self._running:
                ids = ", ".join(self._running)
                raise type(stopped)(
                    f"{stopped}. What was submitted goes on at {self._client.name} ({ids}): the "
                    "next run of this file takes it up instead of paying again"
                )
        raise stopped

    async def take_up_left_behind(self) -> None:
        """Journal what the batches of earlier runs bring. Raises BatchOutstanding when one lies at
        an endpoint that the task does not ask now, or goes on and the task does not use batches."""
        for since, note in self.journal.open_batches():
            client = await self.engine.batches_at(note.endpoint)
            if client is None:
                why = "which the model file does not name any more"
                raise _outstanding(note, note.id, why, "Name that endpoint again")
            self._client = client
            batch_id = note.id or await client.find(note.token, note.noted_at)
            if batch_id is None:
                self.journal.note(replace(note, ended="not submitted"))
                continue
            if self.engine.batches is None and (status := await client.goes_on(batch_id)):
                ways = "Write `mode: batch` until it has ended, or cancel it at the provider"
                raise _outstanding(note, batch_id, f"where it is {status}", ways)
            self._outstanding += note.requests
            await self._collect(replace(note, id=batch_id), batch_id, since)

    async def _work_off(self, items: AsyncIterator[Pending]) -> Spool:
        """Give each item its outcome, but for those that wait for an identical one."""
        spool, held = self._new_spool(), self._new_spool()
        async with asyncio.TaskGroup() as batches:
            async for item in items:
                if await self.adopted(item):
                    continue
                key = item.address.key
                if self.reuse.asking is not None and key in self._in_spools:
                    held.add(item)
                else:
                    self._in_spools.add(key)
                    spool.add(item)
                    if len(spool) >= self._client.most_requests or spool.size >= MOST_BYTES:
                        batches.create_task(self._finish(spool))
                        spool = self._new_spool()
            batches.create_task(self._finish(spool))
        return held

    async def _again(self, held: Spool) -> AsyncIterator[Pending]:
        """Those that have no answer of their own yet."""
        self._in_spools.clear()
        async for _, item in held.unsettled():
            if (item := self.look_up(item, is_new=True)) is not None:
                yield item

    def _new_spool(self) -> Spool:
        spool = Spool()
        self._open_spools.callback(spool.close)
        return spool

    async def _finish(self, spool: Spool) -> None:
        """One batch after another, until each request has its outcome."""
        while True:
            ended_before = self._ended
            with TemporaryFile() as file:
                asked = await self._write(spool, file)
                submitted = await self._submit(file, len(asked)) if asked else None
            if submitted is not None:
                spool.told = await self._collect(*submitted, asked)
                await self._consider(spool.told, self._ended - ended_before - 1)
            elif all(spool.settled):
                spool.close()
                return
            else:
                reason = self.budget.spent(self._outstanding)
                if reason is not None and not self._outstanding:
                    raise reason
                await self.engine.wait(self._client.poll_s)  # it may turn out cheaper than it looks

    async def _write(self, spool: Spool, file: IO[bytes]) -> set[str]:
        """Settle what is answered, write what is to be asked; gives the ids of those requests."""
        asked, size = set[str](), 0
        async for number, spooled in spool.unsettled():
            item = self.look_up(spooled, is_new=True)
            if item is not None and await self.adopted(item):
                item = None
            if item is None or self._gives_up(spool, number, item):
                spool.settled[number] = True
                continue
            spool.asked[number] = 0
            if (size and size >= MOST_BYTES) or not self._has_room():
                continue
            turns = [] if item.known is None else said_in(item.known.entries)
            payload = self.rules.next_request(item.request, turns).payload
            custom_id = _custom_id(item.address, len(turns))
            size += file.write(self._client.line(custom_id, payload))
            spool.asked[number] = len(turns) + 1
            self._outstanding += 1
            asked.add(custom_id)
        return asked

    def _gives_up(self, spool: Spool, number: int, item: Pending) -> bool:
        """Whether the request was without an answer too often."""
        turn = len(item.known.entries) if item.known else 0
        if spool.told is None or spool.asked[number] == 0:
            return False
        if spool.asked[number] != turn + 1:
            spool.tries[number] = 0
            return False
        spool.tries[number] += spool.told.counts
        tries = spool.tries[number]
        if tries <= self._client.max_retries:
            return False
        failure = spool.told.failure_of(_custom_id(item.address, turn))
        self._given_up += 1
        if not self._has_answers and self._given_up >= UNANSWERED_LIMIT:
            raise EndpointDown(
                f"{self._client.name}: {UNANSWERED_LIMIT} records failed in batch after batch and "
                f"none was answered; the last: {failure.reason}: {failure.detail}. "
                "Mend that and materialise again: what was answered is kept"
            )
        position = item.known.positions[-1] if item.known else NO_REPLY
        why = Unanswered(failure, item.address.key, tries, self._client.name)
        self.leave(item.index, why, position)
        return True

    def _has_room(self) -> bool:
        """Whether the budget, at the mean cost so far, allows one request more."""
        if not self.budget.is_limited:
            return True
        if not self.budget.total.replies:
            return self._outstanding < FIRST_WITH_BUDGET
        return self.budget.spent(self._outstanding) is None

    async def _submit(self, file: IO[bytes], count: int) -> tuple[BatchNote, str, Position]:
        """Noted before and after, so that a kill at any moment leaves a trace of the batch."""
        note = BatchNote(uuid4().hex, self._client.name, count, time.time())
        since = self.journal.note(note)
        await in_thread(self.journal.sync)
        batch_id = await self._client.submit(file, note.token, note.noted_at)
        note = replace(note, id=batch_id)
        self.journal.note(note)
        self._running[batch_id] = None
        await in_thread(self.journal.sync)
        return note, batch_id, since

    async def _collect(
        self, note: BatchNote, batch_id: str, since: Position, asked: set[str] | None = None
    ) -> Told:
        """Wait for the end and journal the answers; `since` is where the batch was noted first, and
        `asked` has the ids of its requests where this run has written them."""
        self._running[batch_id] = None
        told = Told(batch_id, await self._client.until_ended(batch_id))
        if told.ended is not None:
            told.asked = asked or await self._client.custom_ids(told.ended.input)
        files = told.ended.files if told.ended else ()
        for file_id in files:
            with TemporaryFile() as file:
                await self._client.download(file_id, file)
                await self._read(file, told, since)
        await in_thread(self.journal.sync)
        self.journal.note(replace(note, ended=told.ended.status if told.ended else "gone"))
        del self._running[batch_id]
        self._outstanding -= note.requests
        self._ended += 1
        if told.ended is not None:
            await self._client.delete((*files, told.ended.input))
        if told.strangers:
            shown = islice(told.strangers, SHOWN_STRANGERS)
            first = (short(self._client.without_secrets(each)) for each in shown)
            self.warnings.append(
                f"batch {batch_id} gave {told.strangers.total():,} lines with ids that it was not "
                "asked for, or that had their answer already; they count for nothing: "
                f"{', '.join(first)}"
            )
        return told

    async def _read(self, file: IO[bytes], told: Told, since: Position) -> None:
        for number, (custom_id, reply) in enumerate(self._client.results(file)):
            if number % ROWS_AT_ONCE == 0:
                await asyncio.sleep(0)
            told.lines += 1
            if told.is_strange(custom_id):
                continue
            if reply.fault is None:
                self.requests += 1
                self.tally.requests += 1
            match classify(reply):
                case Refused(record=Failure() as failure):  # the endpoint took the batch itself
                    self._journal(custom_id, reply, failure, since)
                case Refused(detail):
                    told.refusal = detail
                case TryAgain(failure):
                    told.fail(custom_id, failure)
                case said:
                    told.answered.add(custom_id)
                    self._journal(custom_id, reply, said, since)

    def _journal(self, custom_id: str, reply: Reply, said: Said, since: Position) -> None:
        """Unless a run that was killed had done so, or the turn before is lost, or came after the
        batch was submitted."""
        found = _CUSTOM_ID.fullmatch(custom_id)
        if found is None:
            return
        occurrence, sample, turn = map(int, found.groups()[1:])
        address = Address(found[1], occurrence, sample)
        previous: Position | None = None
        for known in self.journal.dialogues(address):
            if len(known.positions) > turn and known.positions[turn] > since:
                return
            if len(known.positions) == turn and known.positions[-1] < since:
                previous = known.positions[-1]
        if turn and previous is None:
            return
        entry = Entry(
            address=address,
            turn=turn,
            status=reply.status,
            body=reply.body,
            endpoint=self._client.name,
            attempts=1,
            latency_ms=0,
            answered_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
            previous=None if previous is None else self.journal.reference(previous),
        )
        self.journal.append(entry, findable=True)
        self._has_answers = self._has_answers or not isinstance(said, Failure)
        self.pay(said, len(reply.body))

    async def _consider(self, told: Told, others_ended: int) -> None:
        """Stop when no batch can do better; when this one did nothing, pause, and if others left no
        room for it, until one of them has ended. `others_ended` in its time."""
        ended = told.ended
        if told.refusal is not None or (ended is not None and ended.refused):
            raise EndpointRefused(
                f"{self._client.name} refuses batch {told.batch_id}: "
                f"{told.refusal or (ended and ended.error)}. "
                "Check api_key, model and base_url in the model file, and the account's quota"
            )
        if told.has_nothing:
            had_no_room = ended is not None and ended.queue_full
            told.counts = not (had_no_room and (self._outstanding or others_ended))
            enough = self._ended + (not told.counts and not others_ended)
            await self.engine.wait(self._client.poll_s)
            while self._ended < enough:
                await self.engine.wait(self._client.poll_s)


def _outstanding(note: BatchNote, batch_id: str | None, why: str, way: str) -> BatchOutstanding:
    named = batch_id or "whose id is not known"
    return BatchOutstanding(
        f"a batch of {note.requests:,} requests ({named}) was submitted to {note.endpoint}, {why}, "
        f"and is not collected: asking now would pay for them twice. {way}, so that the next run "
        "collects it; or give it up with `modelcall clean TASK --batches`"
    )


def _custom_id(address: Address, turn: int) -> str:
    return f"{address.key}-{address.occurrence}-{address.sample}-{turn}"
