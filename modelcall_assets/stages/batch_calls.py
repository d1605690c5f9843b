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
from modelcall_assets.journal import Position
from modelcall_assets.journal.lines import Address, BatchNote
from modelcall_assets.llm import UNANSWERED_LIMIT
from modelcall_assets.llm.classify import Exchange, Refused, Reply, Said, TryAgain, classify
from modelcall_assets.records.outcome import Failure, short
from modelcall_assets.stages.replay import NO_REPLY, ROWS_AT_ONCE, Asks, Pending, Replay, Spool
from modelcall_assets.stages.standing import Unanswered
from modelcall_assets.storage.files import in_thread

if TYPE_CHECKING:
    from modelcall_assets.llm.batch import BatchClient, Ended

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
        if isinstance(stopped, RunStopped):
            self.engine.stop(stopped)  # files that share it end too
            if self._running:
                ids = ", ".join(self._running)
                raise type(stopped)(
                    f"{stopped}. What was submitted goes on at {self._client.name} ({ids}): the "
                    "next run of this file takes it up instead of paying again"
                )
        if stopped is not None:
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
            await self._collect(replace(note, id=batch_id), since)

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
            payload = self.rules.next_request(item.request, item.turns).payload
            custom_id = _custom_id(item.address, len(item.turns))
            size += file.write(self._client.line(custom_id, payload))
            spool.asked[number] = len(item.turns) + 1
            self._outstanding += 1
            asked.add(custom_id)
        return asked

    def _gives_up(self, spool: Spool, number: int, item: Pending) -> bool:
        """Whether the request was without an answer too often."""
        turn = len(item.turns)
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
                "Mend that and run the task again: what was answered is kept"
            )
        why = Unanswered(failure, item.address.key, tries, self._client.name)
        self.leave(item.index, why, item.position)
        return True

    def _has_room(self) -> bool:
        """Whether the budget, at the mean cost so far, allows one request more."""
        if not self.budget.is_limited:
            return True
        if not self.budget.total.replies:
            return self._outstanding < FIRST_WITH_BUDGET
        return self.budget.spent(self._outstanding) is None

    async def _submit(self, file: IO[bytes], count: int) -> tuple[BatchNote, Position]:
        """Noted before and after, so that a kill at any moment leaves a trace of the batch."""
        note = BatchNote(uuid4().hex, self._client.name, count, time.time())
        since = self.journal.note(note)
        await in_thread(self.journal.sync)
        batch_id = await self._client.submit(file, note.token, note.noted_at)
        note = replace(note, id=batch_id)
        self.journal.note(note)
        self._running[batch_id] = None
        await in_thread(self.journal.sync)
        return note, since

    async def _collect(
        self, note: BatchNote, since: Position, asked: set[str] | None = None
    ) -> Ended:
        """Wait for the end and journal the answers; `since` is where the batch was noted first, and
        `asked` has the ids of its requests where this run has written them."""
        assert note.id is not None
        self._running[note.id] = None
        ended = await self._client.until_ended(note.id)
        if not ended.is_gone:
            ended.asked = asked or await self._client.custom_ids(ended.input)
        for file_id in ended.files:
            with TemporaryFile() as file:
                await self._client.download(file_id, file)
                await self._read(file, ended, since)
        await in_thread(self.journal.sync)
        self.journal.note(replace(note, ended=ended.status))
        del self._running[note.id]
        self._outstanding -= note.requests
        self._ended += 1
        if not ended.is_gone:
            await self._client.delete((*ended.files, ended.input))
        if ended.strangers:
            shown = islice(ended.strangers, SHOWN_STRANGERS)
            first = (short(self._client.without_secrets(each)) for each in shown)
            self.warnings.append(
                f"batch {note.id} gave {ended.strangers.total():,} lines with ids that it was not "
                "asked for, or that had their answer already; they count for nothing: "
                f"{', '.join(first)}"
            )
        return ended

    async def _read(self, file: IO[bytes], ended: Ended, since: Position) -> None:
        for number, (custom_id, reply) in enumerate(self._client.results(file)):
            if number % ROWS_AT_ONCE == 0:
                await asyncio.sleep(0)
            ended.lines += 1
            if ended.is_strange(custom_id):
                continue
            if reply.fault is None:
                self.requests += 1
                self.tally.requests += 1
            match classify(reply):
                case Refused(record=Failure() as failure):  # the endpoint took the batch itself
                    self._journal(custom_id, reply, failure, since)
                case Refused(detail):
                    ended.refuse(detail)
                case TryAgain(failure):
                    ended.fail(custom_id, failure)
                case said:
                    ended.answered.add(custom_id)
                    self._journal(custom_id, reply, said, since)

    def _journal(self, custom_id: str, reply: Reply, said: Said, since: Position) -> None:
        """Unless a run that was killed had done so, or the turn before is lost, or came after the
        batch was submitted."""
        found = _CUSTOM_ID.fullmatch(custom_id)
        if found is None:
            return
        occurrence, sample, turn = map(int, found.groups()[1:])
        address = Address(found[1], occurrence, sample)
        previous = NO_REPLY
        for known in self.journal.dialogues(address):
            if len(known.positions) > turn and known.positions[turn] > since:
                return
            if len(known.positions) == turn and known.positions[-1] < since:
                previous = known.positions[-1]
        if turn and previous == NO_REPLY:
            return
        got = Exchange(reply, said, attempts=1, latency_ms=0, endpoint=self._client.name)
        self.received(got, address, turn, previous, findable=True)
        self._has_answers = self._has_answers or not isinstance(said, Failure)

    async def _consider(self, ended: Ended, others_ended: int) -> None:
        """Stop when no batch can do better; when this one did nothing, pause, and if others left no
        room for it, until one of them has ended. `others_ended` in its time."""
        if ended.refused:
            raise EndpointRefused(
                f"{self._client.name} refuses batch {ended.id}: {ended.error}. "
                "Check api_key, model and base_url in the model file, and the account's quota"
            )
        if ended.has_nothing:
            ended.counts = not (ended.queue_full and (self._outstanding or others_ended))
            enough = self._ended + (not ended.counts and not others_ended)
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
