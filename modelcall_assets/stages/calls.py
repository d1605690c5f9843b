"""Call the model for every record of a file that the journal does not answer yet, within what the
task may spend over all its runs."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import orjson

from modelcall_assets.config.model import TokenPrices
from modelcall_assets.errors import BudgetSpent, ModelcallError, StoreError
from modelcall_assets.llm.classify import GaveUp
from modelcall_assets.llm.completion import MOST_TOKENS, Usage
from modelcall_assets.stages.replay import Asks, Pending, Replay
from modelcall_assets.stages.standing import Unanswered
from modelcall_assets.storage.files import in_thread, read_bytes, write_bytes
from modelcall_assets.storage.publishing import claimed

BYTES_PER_TOKEN = 4
"""Where a server does not report its usage."""


@dataclass
class Spent:
    """`usd` is what is known of the cost."""

    usd: float = 0.0
    tokens: int = 0
    replies: int = 0

    def __add__(self, other: Spent) -> Spent:
        tokens = min(self.tokens + other.tokens, MOST_TOKENS)  # a number that JSON can hold
        return Spent(self.usd + other.usd, tokens, self.replies + other.replies)


@dataclass(eq=False)
class Budget:
    """Counts what is paid. With a limit the count lives in a file that the task's runs share; a
    kill loses about a second of it."""

    file_name: str
    path: Path
    prices: TokenPrices
    usd: float | None
    tokens: int | None

    def __post_init__(self) -> None:
        self.is_limited = self.usd is not None or self.tokens is not None
        self._before = read_spent(self.path) if self.is_limited else Spent()
        self._now, self._telling = Spent(), Spent()
        self._one_tells = asyncio.Lock()

    @property
    def total(self) -> Spent:
        """By all runs, as far as they have told."""
        return self._before + self._telling + self._now

    def pay(self, usage: Usage, exchanged_bytes: int) -> float | None:
        """Count one reply; gives its cost in US dollars, None when that is unknown."""
        cost = usage.cost(*self.prices)
        used = usage.prompt_tokens + usage.completion_tokens
        self._now.usd += cost or 0.0
        self._now.tokens += used if usage.known else exchanged_bytes // BYTES_PER_TOKEN
        self._now.replies += 1
        return cost

    def left(self) -> dict[str, float]:
        """Of what is limited."""
        left: dict[str, float] = {}
        if self.usd is not None:
            left["budget_left_usd"] = max(0.0, self.usd - self.total.usd)
        if self.tokens is not None:
            left["budget_left_tokens"] = max(0, self.tokens - self.total.tokens)
        return left

    def spent(self, in_flight: int) -> BudgetSpent | None:
        """Why nothing more may be sent: the limit, counting what is in flight at its mean."""
        if not self.is_limited:
            return None
        total = self.total
        ahead = 1 + in_flight / total.replies if total.replies else 1
        if self.usd is not None and total.usd * ahead >= self.usd:
            return self._stop("budget_usd", f"{self.usd:g}", f"{total.usd:.4f} US dollars")
        if self.tokens is not None and total.tokens * ahead >= self.tokens:
            return self._stop("budget_tokens", f"{self.tokens:,}", f"{total.tokens:,} tokens")
        return None

    async def sync(self) -> None:
        """Add what this run spent to the file, and see what others did."""
        if not self.is_limited:
            return
        async with self._one_tells:
            self._telling, self._now = self._telling + self._now, Spent()
            await in_thread(self._tell)

    def _tell(self) -> None:
        with claimed(self.path.with_name(".spent")):
            spent = read_spent(self.path) + self._telling
            write_bytes(self.path, orjson.dumps(spent))
        self._before, self._telling = spent, Spent()

    def _stop(self, field: str, limit: str, spent: str) -> BudgetSpent:
        return BudgetSpent(
            f"{self.file_name}:{field}: {limit} is spent ({spent} so far by all runs of the task, "
            "the rest by what is under way). Everything answered is kept: raise it and run the "
            "task again to go on"
        )


def read_spent(path: Path) -> Spent:
    """What all runs have told. StoreError when the file is damaged: to count from nothing again is
    the user's to decide."""
    try:
        numbers = orjson.loads(read_bytes(path))
        before = Spent(**numbers)
        if len(numbers) < len(fields(Spent)) or min(numbers.values()) < 0:
            raise ValueError
        return before + Spent()
    except FileNotFoundError:
        return Spent()
    except (ValueError, TypeError) as error:
        raise StoreError(
            f"{path}: damaged: what the task has spent of its budget is not known any more; write "
            'it there as {"usd": 0.0, "tokens": 0, "replies": 0} with the numbers of your provider,'
            " or delete the file to count from nothing"
        ) from error


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
            self._grow()
        if self._stopped is not None:
            raise self._stopped

    def _grow(self) -> None:
        """Let one more work, while fewer do than requests may be in flight."""
        is_full = self._working >= self.engine.max_in_flight or self._in_hand >= MOST_WORKERS
        if self._stopped is None and not is_full:
            self._working += 1
            self._in_hand += 1
            self._workers.create_task(self._work())

    async def _work(self) -> None:
        """As many work as requests may be in flight; one too many ends."""
        is_shared = self.reuse.shared is not None
        try:
            while self._working <= self.engine.max_in_flight:
                async with self._reading:
                    item = await anext(self._records, None)
                if item is None:
                    break
                self._grow()
                await (self._answer_once(item) if is_shared else self._answer(item))
        except ModelcallError as error:
            self._stopped = self._stopped or error
        finally:
            self._working -= 1
            self._in_hand -= 1

    def _parked(self, begins: bool) -> None:
        """A record that waits without a slot lets another one be worked on."""
        self._working += -1 if begins else 1
        if begins:
            self._grow()

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
        turns, position = [*item.turns], item.position
        while (finished := self.rules.judge(turns)) is None:
            request = self.rules.next_request(item.request, turns) if turns else item.request
            got = await self.engine.ask(request.payload, self._parked, self._sent)
            self.waits += got.attempts - 1
            if isinstance(got, GaveUp):
                why = Unanswered(got.failure, item.address.key, got.attempts, got.endpoint)
                self.leave(item.index, why, position)
                return
            sent_bytes = len(request.payload)
            position = self.received(got, item.address, len(turns), position, sent_bytes=sent_bytes)
            turns.append(got.said)
        self.settle(item, position, finished)

    def _sent(self, requests: int) -> None:
        self.requests += requests
        self.tally.requests += requests
