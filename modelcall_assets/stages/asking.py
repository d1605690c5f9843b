"""A stage that asks a model about each row: over the partition's journal, within the task's budget,
to a publication."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from abc import abstractmethod
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, closing, contextmanager
from dataclasses import asdict, fields
from functools import cached_property
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from threading import Lock
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import finalize

from modelcall_assets.config.endpoint import Address, Endpoint, Resolver
from modelcall_assets.config.model import BatchConfig, ModelConfig
from modelcall_assets.errors import EndpointDown, EndpointRefused, InHand, RunStopped, StoreError
from modelcall_assets.journal import Journal, SharedReplies
from modelcall_assets.journal.segments import Asking
from modelcall_assets.llm import Engine
from modelcall_assets.llm.channel import Channel, Lease
from modelcall_assets.llm.classify import PATIENCE, Patience
from modelcall_assets.llm.dialogue import NOT_IN_KEY, PARSER_VERSION, Rules
from modelcall_assets.llm.transport import DirectTransport, HttpTransport
from modelcall_assets.records import decode_key
from modelcall_assets.records.outcome import BadLine, Row
from modelcall_assets.stages import Run, Stage, Work
from modelcall_assets.stages.adopt import Adoption, OldAnswer, adopt
from modelcall_assets.stages.batch_calls import BatchCaller
from modelcall_assets.stages.calls import Budget, Caller
from modelcall_assets.stages.publication import Draft, old_files
from modelcall_assets.stages.replay import Asked, Replay, Reuse
from modelcall_assets.stages.report import Report
from modelcall_assets.stages.score_table import Rate
from modelcall_assets.stages.source import Source
from modelcall_assets.stages.standing import Standing, Wanted, standing
from modelcall_assets.storage.files import NewFile, in_thread
from modelcall_assets.storage.places import explained
from modelcall_assets.storage.publishing import held
from modelcall_assets.transforms.user_code import Fields

if TYPE_CHECKING:
    from modelcall_assets.llm.batch import BatchClient


_ONE_MAKES = Lock()


class AskingStage(Stage):
    asks = True
    answers = True
    shows_progress = True
    again = "call only the failed ones"
    samples: int = 1
    """Answers to each row."""
    model_in: ClassVar[str] = "model"
    """Which of the task's model files it asks."""

    @cached_property
    def model(self) -> ModelConfig:
        return getattr(self.spec, self.model_in)

    @cached_property
    def params(self) -> dict[str, Any]:
        """Of each request, beside its messages."""
        return self.model.request_params()

    @property
    @abstractmethod
    def most_in_flight(self) -> int:
        """Requests of one run."""

    @cached_property
    @abstractmethod
    def rules(self) -> Rules:
        """When an answer is one."""

    @property
    @abstractmethod
    def shaped_by(self) -> dict[str, Any]:
        """What of the task's files shapes the rows beside the model's name and parameters."""

    @cached_property
    def version(self) -> str:
        """Digest of what shapes the rows: not prices, limits, endpoints or keys."""
        shape = {
            "parser": PARSER_VERSION,
            "params": {name: v for name, v in self.params.items() if name not in NOT_IN_KEY},
            "revision": self.model.revision,
            **self.shaped_by,
        }
        return hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def provenance(self) -> dict[str, str]:
        return {"api_model": str(self.params["model"])}

    @abstractmethod
    def ask(self, row: Row | BadLine) -> Asked:
        """The request of one row, or the Failure that says why it has none."""

    @abstractmethod
    def old_answer(self, row: Row) -> OldAnswer | None:
        """Of a row that others have left; None when it holds no answer to what is asked now."""

    @abstractmethod
    def write(self, source: Source, rate: Rate, out: NewFile, shared: Fields) -> Report:
        """Every row of the source in its order, `samples` times, with what `rate` says of it.
        `shared` are the types of values whose type nobody declares."""

    def asks_of(self, source: Source) -> Iterator[list[tuple[Row | BadLine, Asked]]]:
        """The rows of the source, each `samples` times, with what they ask; as many at a time as
        are read at once."""
        maker = source.maker
        assert maker is not None
        may_have_failed = maker.answers or maker.error_column is not None
        for batch in source.to_ask():
            asks: list[tuple[Row | BadLine, Asked]] = []
            for item in batch.items:
                asked = (maker.failure_of(item) if may_have_failed else None) or self.ask(item)
                asks += [(item, asked)] * self.samples
            yield asks

    def rows_to_work(self, keys: Iterable[str]) -> int:
        return super().rows_to_work(keys) * self.samples

    @property
    def definition(self) -> dict[str, dict[str, Any]]:
        """What it asks, and within which limits, for people."""
        task, model = self.spec.task, self.spec.files[self.model_in]
        limits = task.concurrency.model_dump() | {"max_concurrent_requests": self.most_in_flight}
        names = ("max_failure_rate", "budget_usd", "budget_tokens")
        limits |= {name: value for name in names if (value := getattr(task, name)) is not None}
        return {"model": {"file": model, **self.params}, "limits": limits}

    def endpoints(self) -> tuple[Endpoint, ...]:
        """Where requests go, one or more; SetupError names the variables that are missing."""
        spec, model, task = self.spec, self.model, self.spec.task
        timeout_s, max_retries = task.environment.timeout, task.retry.max_retries
        file = spec.files[self.model_in]
        resolver = Resolver(spec.env, file, spec.root, timeout_s, max_retries)
        return resolver.endpoints(model.client_config, model.client_field)

    def check_ready(self) -> None:
        self.endpoints()

    def engine(self, patience: Patience = PATIENCE) -> Engine:
        """To be entered; SetupError when a key or host is not set."""
        endpoints, model, most = self.endpoints(), self.model, self.most_in_flight
        by_batches, channels = model.mode == "batch", list[Channel]()
        for each in endpoints:
            most_there = each.max_in_flight or most
            lease = None if by_batches else Lease(_lease_folder(each), most_there)
            minute = each.requests_per_minute, each.tokens_per_minute
            is_declared = each.max_in_flight is not None
            channels.append(Channel(_transport(each), most_there, *minute, lease, is_declared))

        def collector(name: str) -> BatchClient | None:
            named = [each for each in endpoints if each.name == name]
            return _batches(named[0], model.batch) if named else None

        return Engine(
            channels,
            max_in_flight=most,
            max_retries=endpoints[0].max_retries,
            patience=patience,
            batches=_batches(endpoints[0], model.batch) if by_batches else None,
            collector=collector,
        )

    @asynccontextmanager
    async def open(self, run: Run) -> AsyncIterator[Work]:
        """One engine for the partitions of a run."""
        async with self.engine() as engine:
            run.stop = lambda: engine.stop(RunStopped("interrupted; every reply is kept"))
            run.tune, run.tally.engine = engine.tune, engine

            async def work(key: str) -> Report:
                return await self.answer(key, engine, run)

            yield work

    async def answer(self, key: str, engine: Engine, run: Run) -> Report:
        """Every row of a partition. What `max_failure_rate` rejects lies aside. InHand when another
        run asks for it now."""
        with ExitStack() as opened:
            begun = await in_thread(self._begin, key, run, opened)
            source, draft, adoption, journal, reuse, stands = begun
            given = (self, engine, journal, run.tally, reuse, stands)
            caller = batches = BatchCaller(*given)
            if engine.batches is None:
                await batches.take_up_left_behind()
                counted = {"requests": batches.requests, "warnings": batches.warnings}
                caller = Caller(*given, **counted)
                caller.cost_usd = batches.cost_usd
            began = time.monotonic()
            try:
                await caller.run(self.asks_of(source))
            except (EndpointRefused, EndpointDown):
                if reuse.published:  # the failures are the endpoint's: they may be tried anew
                    await in_thread(journal.give_second_tries)
                raise
            seconds = time.monotonic() - began
            return await in_thread(self._publish, key, source, draft, adoption, caller, seconds)

    def _begin(
        self, key: str, run: Run, opened: ExitStack
    ) -> tuple[Source, Draft, Adoption | None, Journal, Reuse, Standing]:
        source = self.source(key)
        opened.enter_context(self._in_hand(key))
        draft = opened.enter_context(Draft(self, key))
        journal = opened.enter_context(self._journal(key, run))
        reuse = opened.enter_context(closing(self._reuse(key, run)))
        stands = standing(self, key, source, run, journal)
        reuse.published |= stands is not None
        adoption = None
        if draft.adopts and not run.fresh:
            at_place = [] if draft.stranger is None else [draft.stranger.place]
            if files := [*at_place, *old_files(self, key)]:
                adoption = adopt(self, source, journal, files)
        return source, draft, adoption, journal, reuse, stands or Standing(settled=False)

    def _publish(
        self,
        key: str,
        source: Source,
        draft: Draft,
        adoption: Adoption | None,
        caller: Replay,
        seconds: float,
    ) -> Report:
        if kept := caller.stayed:
            caller.warnings.append(f"{kept} rows keep their answer: asked again, they failed")
        report = draft.written(
            lambda out: self.write(source, caller.rate, out, caller.types.fields())
        )
        report.warnings = caller.warnings
        report.numbers = caller.numbers(report.rows, seconds) | report.numbers
        if damaged := caller.journal.damaged:
            report.numbers["damaged_journal_lines"] = damaged
            lines = ", ".join(f"{count:,} in {name}" for name, count in damaged.items())
            caller.tally.warnings.append(
                f"{decode_key(key)}: damaged lines in its journal: {lines}; the replies in "
                "them were asked for again where rows need them, all others are kept"
            )
        caller.tally.warnings += [f"{decode_key(key)}: {told}" for told in report.warnings]
        report.detail["made_by"] = self.version
        if adoption is not None:
            report.detail["adopted"] = asdict(adoption)
        draft.publish(report, source.fingerprint())
        caller.journal.seal(report.data_version)
        return report

    def choose(self, keys: Sequence[str], run: Run) -> None:
        """Note what a run is to ask anew in files that it has not begun: killed, it leaves all of
        them red. SetupError when its options say nothing."""
        Wanted.of(run.choice)
        for key in keys if run.choice and not run.fresh else ():
            if self.latest(key) is not None:
                with self._journal(key, run) as journal:
                    journal.choose(run.choice)

    @contextmanager
    def _in_hand(self, key: str) -> Iterator[None]:
        """By the run that asks a model for a partition."""
        path = self.layout.in_hand_path
        with ExitStack() as holding:
            with explained(path, StoreError):
                try:
                    holding.enter_context(held(path, f"{self.name}/{key}"))
                except BlockingIOError:
                    raise InHand(f"{decode_key(key)}: another run is working on it") from None
            yield

    def _journal(self, key: str, run: Run) -> Journal:
        return self.layout.open_journal(
            self.journal_folder(key), run.id, fresh=run.fresh, samples=self.samples
        )

    @cached_property
    def budget(self) -> Budget:
        """The task's, of all its runs and stages, at this model's prices."""
        task, prices = self.spec.task, self.model.token_prices
        path, file = self.layout.spent_path, self.spec.file_name
        return Budget(file, path, prices, task.budget_usd, task.budget_tokens)

    def _reuse(self, key: str, run: Run) -> Reuse:
        """The project has a table of answers, or else the run, whose files run side by side.
        Several samples of one request are to differ: they are never waited for."""
        policy = self.spec.task.reuse
        is_of_project = policy.scope == "project" and not run.fresh
        if not is_of_project and not policy.identical_once:
            return Reuse(policy.scope != "off")
        owner = "" if is_of_project else run.id
        with _ONE_MAKES:
            if owner not in self._tables:
                table = self.layout.shared_answers_path
                if owner:
                    table = Path(mkdtemp(prefix="modelcall-")) / table.name
                    finalize(self, rmtree, table.parent, ignore_errors=True)
                self._tables[owner] = table, Asking(table.with_suffix(".asking"))
        table, asking = self._tables[owner]
        shared = SharedReplies(table, self.layout.read_journal)
        wait_for = asking if self.samples == 1 else None
        folder = str(self.journal_folder(key))
        return Reuse(policy.scope != "off", shared, not is_of_project, wait_for, folder)

    @cached_property
    def _tables(self) -> dict[str, tuple[Path, Asking]]:
        """By run, and the project's: where answers are, and who asks now."""
        return {}


def _transport(endpoint: Endpoint) -> HttpTransport:
    kind = DirectTransport
    if endpoint.transport == "sdk":
        from modelcall_assets.llm.sdk_transport import SdkTransport

        kind = SdkTransport
    return kind(**_where(endpoint))


def _batches(endpoint: Endpoint, config: BatchConfig) -> BatchClient:
    from modelcall_assets.llm.batch import BatchClient

    return BatchClient(
        **_where(endpoint),
        completion_window=config.completion_window,
        most_requests=config.max_requests_per_file,
        poll_s=config.poll_seconds,
        max_retries=endpoint.max_retries,
    )


def _where(endpoint: Endpoint) -> dict[str, Any]:
    """What a transport is made from."""
    return {each.name: getattr(endpoint, each.name) for each in fields(Address)}


def _lease_folder(endpoint: Endpoint) -> Path:
    """One per user and endpoint of this machine; the name holds nothing secret."""
    digest = hashlib.sha256(f"{endpoint.name} {endpoint.base_url}".encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"modelcall-{os.getuid()}" / digest
