"""A task's stages as its assets: one body for all of them, for one file a run or more with exact
status per file. What a stage does is in its own file of `stages/`; how its report is shown, in
`ledger.py`."""

import asyncio
import signal
import threading
import time
import warnings
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from itertools import chain, repeat
from pathlib import PurePath
from typing import Any

import dagster as dg
from pydantic import Field

from modelcall_assets.config.catalog import legal_key
from modelcall_assets.config.endpoint import EndpointConfig
from modelcall_assets.defs.instance import asset_key, lock_path, partitions_of
from modelcall_assets.defs.ledger import (
    CHECKED,
    COMPLETE,
    Ended,
    check_event,
    check_of,
    definition_metadata,
    events_of,
    failed_check,
    metadata_of,
)
from modelcall_assets.defs.logs import listen
from modelcall_assets.errors import (
    InHand,
    ModelcallError,
    RunStopped,
)
from modelcall_assets.records import decode_key
from modelcall_assets.records.outcome import count_of
from modelcall_assets.stages import Run, Stage, Work
from modelcall_assets.stages.asking import AskingStage
from modelcall_assets.stages.live import AS_WRITTEN, EVERY_S, exchange, figures, line, note_path
from modelcall_assets.stages.report import Report, Tally, Watcher, last_line
from modelcall_assets.stages.task import Task
from modelcall_assets.storage.files import in_thread

GRACE_S = 20.0
_LIMITS = ("max_in_flight", "requests_per_minute", "tokens_per_minute")
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@asynccontextmanager
async def interruptible(stop: Callable[[], None]) -> AsyncGenerator[None]:
    """A signal calls `stop`, and the block ends in KeyboardInterrupt; a second one does not wait
    for what is in flight."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop, task, came = asyncio.get_running_loop(), asyncio.current_task(), list[int]()
    assert task is not None

    def on_signal(number: int) -> None:
        came.append(number)
        stop()
        timers.append(loop.call_later(GRACE_S if len(came) == 1 else 0, task.cancel))

    timers: list[asyncio.TimerHandle] = []
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    for number in _SIGNALS:
        loop.add_signal_handler(number, on_signal, number)
    try:
        yield
    except BaseException:
        if not came:
            raise
    finally:
        for timer in timers:
            timer.cancel()
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)
    if came:
        raise KeyboardInterrupt


@asynccontextmanager
async def watched(
    context: Any, watcher: Watcher | None, stage: Stage, run: Run
) -> AsyncGenerator[None]:
    """Its progress is logged and shown to a watcher. Others see it, and change how fast it goes."""
    tally, log, lock = run.tally, context.log.info, lock_path(context.instance, run.id)
    watchers = [
        Watcher(lambda tally: log(line(tally.stage, figures(tally)))),
        *filter(None, [watcher]),
    ]

    async def show(to: Watcher) -> None:
        for pause in chain(to.pauses, repeat(to.pauses[-1])):
            await asyncio.sleep(pause)
            to.show(tally)

    async def heed() -> None:
        taken = AS_WRITTEN
        while True:
            wish = await in_thread(exchange, lock, stage.spec.key, tally, taken)
            if wish != taken:
                run.tune(wish["requests"], wish["paused"])
                tally.began = time.monotonic(), tally.called, tally.requests
                log(f"tuned: {line(stage.name, figures(tally))}")
                taken = wish
            await asyncio.sleep(EVERY_S)

    tasks = [asyncio.create_task(each) for each in (*map(show, watchers), heed())]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for each in watchers:
            each.show(tally)
        note_path(lock, tally).unlink(missing_ok=True)


class RunOptions(dg.Config):
    """Launchpad options of an asset that answers or rates rows."""

    fresh: bool = Field(
        False, description="Ask for all rows again; what comes replaces what was there."
    )
    again: bool = Field(
        False, description="Ask again for failed rows also of what the task accepts now."
    )
    ids: list[str] = Field([], description="Ask again just for the records with these ids.")
    where: str = Field("", description="Ask again just for such rows, as in `score < 2`.")
    reason: str = Field("", description="Ask again just for rows that failed for this reason.")


def task_assets(task: Task) -> list[dg.AssetsDefinition]:
    """`[task, raw] → … → [task, scores]`: the stages that the task has."""
    with warnings.catch_warnings():
        # Partitioned checks and backfill policies: used on purpose, tested against this release.
        warnings.simplefilter("ignore", dg.PreviewWarning)
        warnings.simplefilter("ignore", dg.BetaWarning)
        return [_asset(stage) for stage in (*task.stages, *task.overviews)]


def _asset(stage: Stage) -> dg.AssetsDefinition:
    """The asset `[task, stage]`. A several-file run logs each file's end as it comes and yields no
    result: one would re-emit every key with a single shared data version."""
    spec, key, has_one = stage.spec, asset_key(stage), stage.keys.is_one
    partitions = None if has_one else partitions_of(stage.keys)
    # What gathers may read any partition; it says itself which of its members are missing.
    mapping = dg.AllPartitionMapping() if stage.gathers else None
    read = [] if stage.upstream is None else [asset_key(stage.upstream)]

    @dg.asset(
        key=key,
        deps=[dg.AssetDep(each, partition_mapping=mapping) for each in read],
        partitions_def=partitions,
        group_name=spec.key,
        description=f"**{spec.name}**: {stage.about}\n\n{spec.task.description}",
        kinds={*stage.kinds},
        owners=spec.task.owners,
        metadata=definition_metadata(stage),
        config_schema=RunOptions.to_fields_dict() if stage.answers else None,
        required_resource_keys=model_keys(stage),
        code_version=stage.code_version,
        backfill_policy=None if has_one else dg.BackfillPolicy.multi_run(_files_per_run(stage)),
        pool=spec.key if stage.asks else None,
        output_required=False,
        check_specs=[
            dg.AssetCheckSpec(COMPLETE, asset=key, description=CHECKED, partitions_def=partitions)
        ],
    )
    async def body(context: dg.AssetExecutionContext):
        keys = _keys(stage, context)
        try:
            listen(stage.task, context)
            async with _opened(stage, context) as work:
                report = await _work_on(context, stage, keys, work)
        except ModelcallError as error:
            for each in keys:
                failed = check_event(context.instance, stage, each, failed_check(str(error)))
                context.log_event(failed)
            raise failure(str(error)) from None
        if report is not None:
            yield dg.MaterializeResult(
                metadata=metadata_of(stage, keys[0], report),
                data_version=dg.DataVersion(report.data_version),
            )
            context.log_event(check_event(context.instance, stage, keys[0], check_of(report)))
        yield dg.Output(None, output_name=f"{key.to_python_identifier()}_{COMPLETE}")

    return body


def _keys(stage: Stage, context: dg.AssetExecutionContext) -> Sequence[str]:
    """Of the run."""
    return stage.keys.now() if stage.keys.is_one else list(context.partition_keys)


@asynccontextmanager
async def _opened(stage: Stage, context: dg.AssetExecutionContext) -> AsyncGenerator[Work]:
    """Its work. What takes long shows its progress, and ends soon after a signal."""
    tally = Tally(stage.name)
    run = Run(context.run.run_id, tally, **(context.op_execution_context.op_config or {}))
    async with stage.open(run) as work:
        if isinstance(stage, AskingStage) and len(keys := _keys(stage, context)) > 1:
            await in_thread(stage.choose, keys, run)
        if not stage.shows_progress:
            yield work
            return
        async with interruptible(lambda: run.stop()), watched(context, None, stage, run):
            tally.rows = stage.rows_to_work(_keys(stage, context))
            yield work


def _files_per_run(stage: Stage) -> int:
    """Neighbours must not share a several-file run, so that their numbers differ. What gathers is
    one partition's run, because Dagster itself notes what it has read."""
    if stage.gathers:
        return 1
    wanted, stages = stage.spec.task.concurrency.files_per_run, stage.task.stages
    return wanted + len(stages) - 1 - stages.index(stage) if wanted > 1 else 1


async def made(context: Any, stage: Stage, key: str, work: Work) -> Ended:
    """Whatever happens to one file, its neighbours go on."""
    try:
        report = await work(key)
    except InHand as error:  # what comes of it is the other run's to say
        return Ended(None, str(error), is_told=False)
    except ModelcallError as error:  # one that was interrupted the next run goes on with
        return Ended(None, str(error), error, is_told=type(error) is not RunStopped)
    except Exception as error:
        context.log.error(f"{key} failed", exc_info=True)
        return Ended(None, last_line(error))
    return Ended(report, stage.why_rejected(report) or "")


async def _work_on(
    context: dg.AssetExecutionContext, stage: Stage, keys: Sequence[str], work: Work
) -> Report | None:
    """Logs what came of each file. Of a run of one the report, if it is accepted: its result is
    for the caller to yield. Raises one Failure at the end that says why each file failed."""
    ends: dict[str, Ended] = {}
    slots = asyncio.Semaphore(stage.spec.task.concurrency.max_concurrent_files)

    async def file(key: str) -> None:
        async with slots:
            ends[key] = ended = await made(context, stage, key, work)
        if ended.report is None or ended.why or len(keys) > 1:
            for event in events_of(context.instance, stage, key, ended):
                context.log_event(event)

    async with asyncio.TaskGroup() as files:
        for key in keys:
            files.create_task(file(key))
    if failed := {key: ends[key] for key in keys if ends[key].why}:
        raise failure(failure_text(failed))
    return ends[keys[0]].report if len(keys) == 1 else None


def failure_text(failed: Mapping[str, Ended]) -> str:
    """Why files are red: once what several have in common, with their number."""
    alike, lines = dict[str, list[str]](), list[str]()
    for key, ended in failed.items():
        alike.setdefault(ended.cause, []).append(key)
    for first, *more in alike.values():
        lines.append(f"{decode_key(first)}: {failed[first].why}")
        if more:
            others = count_of(len(more), "more file")
            lines.append(f"the same of {others}, such as {decode_key(more[0])}")
    return "\n".join(lines)


def failure(message: str) -> dg.Failure:
    return dg.Failure(message, allow_retries=False)


class Model(dg.ConfigurableResource):
    """The model of a file in `configs/models/`: where it is asked, within which limits, at which
    prices, and never a key. Its requests go through the task's own engine."""

    file: str
    model: str
    endpoints: list[str]
    prices: dict[str, float]


def model_keys(stage: Stage) -> set[str]:
    """The resource that a stage uses, if it asks a model."""
    if not isinstance(stage, AskingStage):
        return set()
    return {legal_key(f"model_{PurePath(stage.spec.files[stage.model_in]).stem}")}


def model_resources(tasks: Sequence[Task]) -> dict[str, Model]:
    """Those of all stages, by key."""
    return {
        key: _resource(stage)
        for task in tasks
        for stage in task.stages
        if isinstance(stage, AskingStage)
        for key in model_keys(stage)
    }


def _resource(stage: AskingStage) -> Model:
    model = stage.model
    prices = model.prices.model_dump(exclude_none=True)
    endpoints = [_told(each) for each, _, _ in model.client_config.each("")]
    name = str(model.chat_config.model)
    file = stage.spec.files[stage.model_in]
    return Model(file=file, model=name, endpoints=endpoints, prices=prices)


def _told(endpoint: EndpointConfig) -> str:
    limits = (f"{name} {value}" for name in _LIMITS if (value := getattr(endpoint, name)))
    return ", ".join((endpoint.base_url or "", *limits))
