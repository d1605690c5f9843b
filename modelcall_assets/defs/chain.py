"""The files of a task side by side through its stages, in one Dagster run of this process.

A run of assets takes one key or a range of neighbours, and one stage after the other. This one
takes any keys, and tells Dagster itself, key by key, what it begins and what came of it: these keys
alone are in progress meanwhile, and red when it fails or is killed before they are made.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence, Set
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import dagster as dg
from sqlalchemy.exc import DatabaseError

from modelcall_assets.defs.assets import (
    failure,
    failure_text,
    interruptible,
    made,
    watched,
)
from modelcall_assets.defs.instance import (
    GREEN,
    IN_PROGRESS,
    asset_key,
    is_stale,
    knows_of,
    statuses_of,
    unusable,
)
from modelcall_assets.defs.ledger import Ended, Ledger
from modelcall_assets.defs.logs import listen
from modelcall_assets.errors import InputError, ModelcallError
from modelcall_assets.stages import Run, Stage, Work
from modelcall_assets.stages.report import Report, Tally, Watcher
from modelcall_assets.stages.summary import Results
from modelcall_assets.stages.task import Task

StageOptions = Mapping[str, Mapping[str, Any]]
"""Run options by stage: see `RunOptions`."""
LOOK_EVERY_S = 0.01
LOOK_AT = 32
"""Files in one go."""
WAITED_S = 2.0


@dataclass
class Chain:
    """Of the `keys` of the first stage; a stage with `options` makes all of its partitions anew, or
    just these `files`."""

    task: Task
    instance: dg.DagsterInstance
    keys: Sequence[str]
    options: StageOptions
    files: Set[str] | None
    watcher: Watcher | None
    ran: dict[str, int] = field(default_factory=dict[str, int])
    failed: dict[str, dict[str, Ended]] = field(default_factory=dict[str, dict[str, Ended]])
    """By stage, the files that are red."""
    busy: list[str] = field(default_factory=list[str])
    behind: list[str] = field(default_factory=list[str])
    is_over: bool = False
    looked_at: float = 0.0
    """When statuses and results were."""
    made: set[tuple[str, str]] = field(default_factory=set[tuple[str, str]])
    """What this run has made, by stage and partition."""
    stops: list[Callable[[], None]] = field(default_factory=list[Callable[[], None]])

    def __post_init__(self) -> None:
        self.ran |= dict.fromkeys((stage.name for stage in self.task.stages), 0)

    @cached_property
    def results(self) -> Results:
        return Results(self.task)

    @cached_property
    def statuses(self) -> Mapping[str, Mapping[str, Any]]:
        """By stage and partition, as Dagster had them at first. Read once more where one is not
        green: its cache can miss what several processes note at a time."""
        found, instance = dict[str, Mapping[str, Any]](), self.instance
        for stage in self.task.stages:
            known = instance.get_dynamic_partitions(stage.keys.name)
            found[stage.name] = statuses_of(instance, stage, known)
            if any(status != GREEN for status in found[stage.name].values()):
                instance.wipe_asset_cached_status([asset_key(stage)])
                found[stage.name] = statuses_of(instance, stage, known)
        return found

    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        self.looked_at = time.monotonic()
        keys, in_set = self.keys, self.task.stages[0].keys
        for stage in self.task.stages:
            if stage.keys != in_set:
                in_set, keys = stage.keys, stage.keys.now()
            self.results.look(stage)
            if any(self.is_due(stage, key) for key in keys):
                return False
        return True

    def is_due(self, stage: Stage, key: str) -> bool:
        """Whether a partition is not green, is to be made anew, or would be made otherwise now; or
        that cannot be told, as its making will say."""
        try:
            return self._is_due(stage, key)
        except InputError:
            return True

    def _is_due(self, stage: Stage, key: str) -> bool:
        is_anew = self.options.get(stage.name) and (self.files is None or key in self.files)
        if is_anew or self.statuses[stage.name].get(key) != GREEN:
            return True
        content = None
        if stage.upstream is not None and (stage.upstream.name, key) in self.made:
            made = stage.upstream.accepted(key)
            content = made and stage.upstream.digest_of(made)
        return self.results.is_due(stage, key, content) or (
            not self.results.says_by_what(stage, key) and is_stale(self.instance, stage, key)
        )

    def is_untold(self, stage: Stage, key: str) -> bool:
        """Whether a run published the partition and was killed before it could say so."""
        if self.results.is_due(stage, key) or (made := stage.accepted(key)) is None:
            return False
        return not knows_of(self.instance, stage, key, made.data_version)

    def stop(self) -> None:
        self.is_over = True
        for stop in self.stops:
            stop()

    async def run(self, context: dg.OpExecutionContext) -> None:
        """Raises one Failure at the end that says why each file failed."""
        if time.monotonic() - self.looked_at > WAITED_S:  # for its slot: others have gone on
            self.__dict__.pop("results", None)
            self.__dict__.pop("statuses", None)
            await asyncio.to_thread(self.is_idle)
        ledger = Ledger(context, self.task)
        links = [Link(self, stage, context, ledger) for stage in self.task.stages]
        for link, after in pairwise(links):
            link.after = after
        texts = list[str]()
        try:
            listen(self.task, context)
            async with interruptible(self.stop), asyncio.TaskGroup() as group:
                for link in links:
                    group.create_task(link.run())
                for key in (*self.keys, None):
                    links[0].keys.put_nowait(key)
        except* ModelcallError as errors:
            texts += map(str, _each(errors))
        finally:
            try:
                await asyncio.to_thread(ledger.close)
            except DatabaseError as error:
                texts.append(unusable(self.instance.root_directory, error))
        texts += map(failure_text, filter(None, self.failed.values()))
        if texts:
            raise failure("\n".join(texts))


def _each(group: BaseExceptionGroup[Any]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _each(error)
        else:
            yield error


class Link:
    """One stage of the chain. Files come from the stage before, and go on to the one `after`."""

    def __init__(
        self, chain: Chain, stage: Stage, context: dg.OpExecutionContext, ledger: Ledger
    ) -> None:
        self.after: Link | None = None
        self.keys = asyncio.Queue[str | None]()
        """None ends them."""
        self._chain, self._stage, self._context, self._ledger = chain, stage, context, ledger
        self._tally = Tally(stage.name)
        self._options, self._untold = chain.options.get(stage.name, {}), set[str]()
        self._failed = chain.failed.setdefault(stage.name, {})
        self._in_work = self._rows_begun = 0
        self._most_files = stage.spec.task.concurrency.max_concurrent_files

    async def run(self) -> None:
        stage, due, is_open, work = self._stage, deque[tuple[str, int]](), True, None
        stages = self._chain.task.stages
        if stage.keys != stages[max(0, stages.index(stage) - 1)].keys:
            await self._all_before()
        statuses = self._chain.statuses[stage.name]
        if statuses:
            await asyncio.to_thread(self._chain.results.look, stage)
        async with AsyncExitStack() as opened, asyncio.TaskGroup() as files:
            while is_open or due:
                if due and self._chain.is_over:
                    self._chain.behind += (key for key, _ in due)
                    due.clear()
                elif due and self._has_room():
                    if work is None:
                        work = await self._opened(opened)
                    key, rows = due.popleft()
                    self._in_work += 1
                    self._rows_begun += rows
                    self._ledger.begun(stage, key)
                    files.create_task(self._file(key, rows, work))
                else:
                    keys = list[str | None]()
                    with suppress(TimeoutError):
                        async with asyncio.timeout(LOOK_EVERY_S if due else None):
                            keys.append(await self.keys.get())
                    while keys and not self.keys.empty() and len(keys) < LOOK_AT:
                        keys.append(self.keys.get_nowait())
                    is_open = is_open and (not keys or keys[-1] is not None)
                    for key, rows in await self._due([key for key in keys if key], statuses):
                        due.append((key, rows))
                        self._chain.ran[stage.name] += 1
                        self._tally.rows += rows
        self._pass_on(None)

    async def _all_before(self) -> None:
        """Wait for what the stage before passes on; then the stage's own keys come."""
        while await self.keys.get() is not None:
            pass
        for key in (*self._stage.keys.now(), None):
            self.keys.put_nowait(key)

    async def _due(self, keys: Sequence[str], statuses: Mapping[str, Any]) -> list[tuple[str, int]]:
        """The files that have to be made, with their rows as far as people are shown how they go
        on; what need not be goes on, or stays behind."""
        if not keys:
            return []
        busy = [key for key in keys if statuses.get(key) == IN_PROGRESS]
        self._chain.busy += busy
        self._chain.behind += busy
        keys, due = [key for key in keys if key not in busy], list[tuple[str, int]]()
        found = await asyncio.to_thread(
            lambda: [self._rows_due(key, statuses.get(key)) for key in keys]
        )
        for key, rows in zip(keys, found, strict=True):
            if rows is None:
                self._pass_on(key)
            else:
                due.append((key, rows))
        return due

    def _rows_due(self, key: str, status: Any) -> int | None:
        chain, stage = self._chain, self._stage
        if not chain.is_due(stage, key):
            return None
        may_be_untold = status != GREEN and not self._options and stage.answers
        with suppress(InputError):  # it is told when the file is made
            if may_be_untold and chain.is_untold(stage, key):
                self._untold.add(key)
            return stage.rows_to_work([key]) if stage.shows_progress else 0
        return 0

    def _has_room(self) -> bool:
        """Whether the rows of the files in work leave slots of the model empty."""
        rows, engine = self._rows_begun - self._tally.done, self._tally.engine
        return self._in_work < self._most_files or rows < (engine.limit if engine else 0)

    async def _opened(self, stack: AsyncExitStack) -> Work:
        """The stage's work; where it cannot be opened, every file fails for that."""
        try:
            return await stack.enter_async_context(self._open())
        except ModelcallError as error:
            refused = error

        async def work(_: str) -> Report:
            raise refused

        return work

    @asynccontextmanager
    async def _open(self) -> AsyncGenerator[Work]:
        run = Run(self._context.run_id, self._tally, untold=self._untold, **self._options)
        async with self._stage.open(run) as work:
            self._chain.stops.append(lambda: run.stop())
            if not self._stage.shows_progress:
                yield work
                return
            async with watched(self._context, self._chain.watcher, self._stage, run):
                yield work

    async def _file(self, key: str, rows: int, work: Work) -> None:
        chain, stage = self._chain, self._stage
        done = self._tally.done
        ended = await made(self._context, stage, key, work)
        self._in_work -= 1
        self._ledger.ended(stage, key, ended)
        chain.is_over |= ended.is_systemic
        if ended.report is None:
            self._rows_begun -= max(0, rows - (self._tally.done - done))
        if ended.why or ended.report is None:
            self._failed[key] = ended
            chain.behind.append(key)
        else:
            chain.made.add((stage.name, key))
            self._pass_on(key)

    def _pass_on(self, key: str | None) -> None:
        if self.after is not None:
            self.after.keys.put_nowait(key)
