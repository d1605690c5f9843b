"""All tasks of a project as one Definitions object, and a task's stages as its assets: one body for
all of them, for one file a run or more with exact status per file. What a stage does is in its own
file of `stages/`."""

import asyncio
import signal
import threading
import warnings
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import dagster as dg

from modelcall_assets.config.catalog import BrokenTask, Catalog
from modelcall_assets.defs.graph import (
    COMPLETE,
    asset_key,
    check_of,
    code_version,
    metadata_of,
    partitions_of,
    provenance_tags,
)
from modelcall_assets.defs.instance import housekeeping_sensor, locked_executor
from modelcall_assets.defs.sensors import task_sensors
from modelcall_assets.errors import (
    BudgetSpent,
    EndpointDown,
    EndpointRefused,
    ModelcallError,
    SetupError,
)
from modelcall_assets.stages.report import Report, Tally, Watcher
from modelcall_assets.stages.stage import Run, Stage, Work
from modelcall_assets.stages.task import Task

GRACE_S = 20.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
SYSTEMIC = (EndpointRefused, EndpointDown, BudgetSpent)
SYSTEMIC_KEY = "systemic"


def project_definitions(catalog: Catalog) -> dg.Definitions:
    """Loads whatever the state of single task files; an LLM asset runs in the process of its run,
    because its concurrency is asyncio's."""
    # The sensors launch one file a run: that neighbours have different backfill policies does not
    # concern them.
    warnings.filterwarnings("ignore", message=r"Asset job __anonymous_asset_job_\w+ materializes")
    assets: list[dg.AssetsDefinition | dg.AssetSpec] = [*map(_broken_asset, catalog.broken)]
    sensors: list[dg.SensorDefinition] = [housekeeping_sensor(catalog.tasks)]
    for spec in catalog.tasks:
        try:
            task = Task(spec)
            assets += task_assets(task)
        except SetupError as error:  # a scorer that cannot be imported
            broken = BrokenTask(spec.path, spec.file_name, spec.key, error.problems)
            assets.append(_broken_asset(broken))
        else:
            sensors += task_sensors(task)
    return dg.Definitions(assets=assets, sensors=sensors, executor=locked_executor)


def _broken_asset(task: BrokenTask) -> dg.AssetSpec:
    """A stub in the graph that says what is wrong with a task file."""
    listed = "\n".join(f"- `{problem}`" for problem in task.problems)
    only_waits = all(problem.unready for problem in task.problems)
    group = "configs_that_wait" if only_waits else "broken_configs"
    verdict = "cannot run here yet" if only_waits else "cannot be loaded"
    return dg.AssetSpec(
        dg.AssetKey([group, task.key]),
        description=(
            f"**{task.file_name} {verdict}.** Mend it, then reload definitions; "
            f"`modelcall check {task.file_name}` prints the same:\n\n{listed}"
        ),
        group_name=group,
        kinds={"yaml"},
        metadata={"task_file": task.file_name, "problems": dg.MetadataValue.md(listed)},
        tags={"modelcall/broken": "true"},
    )


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
    context: dg.AssetExecutionContext, watcher: Watcher | None, tally: Tally
) -> AsyncGenerator[None]:
    """Without a watcher of its own it is logged every 30 s."""
    shown_to = watcher or Watcher(lambda tally: context.log.info(tally.line()))

    async def show() -> None:
        while True:
            await asyncio.sleep(shown_to.every_s)
            shown_to.show(tally)

    task = asyncio.create_task(show())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        shown_to.show(tally)


class RunOptions(dg.Config):
    """Launchpad options of an asset."""

    fresh: bool = False
    """Ask the model again, also for rows that the journal answers."""
    again: bool = False
    """Ask again for the failed rows of a rejected result too that the task accepts now."""


def task_assets(task: Task, watcher: Watcher | None = None) -> list[dg.AssetsDefinition]:
    """`[task, raw] → … → [task, scores]`: the stages that the task has."""
    with warnings.catch_warnings():
        # Partitioned checks and backfill policies: used on purpose, tested against this release.
        warnings.simplefilter("ignore", dg.PreviewWarning)
        warnings.simplefilter("ignore", dg.BetaWarning)
        return [_asset(stage, watcher) for stage in (*task.stages, *task.overviews)]


def _asset(stage: Stage, watcher: Watcher | None) -> dg.AssetsDefinition:
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
        metadata={"task": spec.name, "task_file": spec.file_name},
        code_version=code_version(stage),
        backfill_policy=None if has_one else dg.BackfillPolicy.multi_run(_files_per_run(stage)),
        pool=spec.key if stage.asks else None,
        output_required=False,
        check_specs=[dg.AssetCheckSpec(COMPLETE, asset=key, partitions_def=partitions)],
    )
    async def body(context: dg.AssetExecutionContext, config: RunOptions):
        keys, result = _keys(stage, context), None
        try:
            async with _opened(stage, context, config, watcher) as work:
                if len(keys) == 1:
                    result = await _single(context, stage, keys[0], work)
                else:
                    await _several(context, stage, keys, work)
        except ModelcallError as error:
            raise _failure(str(error), [error]) from None
        check_output = f"{key.to_python_identifier()}_{COMPLETE}"
        yield result or dg.Output(None, output_name=check_output)

    return body


def _keys(stage: Stage, context: dg.AssetExecutionContext) -> Sequence[str]:
    """Of the run."""
    return stage.keys.now() if stage.keys.is_one else list(context.partition_keys)


@asynccontextmanager
async def _opened(
    stage: Stage, context: dg.AssetExecutionContext, config: RunOptions, watcher: Watcher | None
) -> AsyncGenerator[Work]:
    """Its work. What takes long shows its progress, and ends soon after a signal."""
    tally = Tally(stage.name, stage.asks)
    run = Run(context.run.run_id, tally, **config.model_dump())
    async with stage.open(run) as work:
        if not stage.shows_progress:
            yield work
            return
        async with interruptible(lambda: run.stop()), watched(context, watcher, tally):
            tally.rows = stage.rows_to_work(_keys(stage, context))
            yield work


def _files_per_run(stage: Stage) -> int:
    """Neighbours must not share a several-file run, so that their numbers differ. What gathers is
    one partition's run, because Dagster itself notes what it has read."""
    if stage.gathers:
        return 1
    wanted, stages = stage.spec.task.concurrency.files_per_run, stage.task.stages
    distance = len(stages) - 1 - stages.index(stage)
    return wanted + distance if wanted > 1 else 1


@dataclass(frozen=True)
class _Done:
    """A report with what Dagster shows of it."""

    report: Report
    metadata: dict[str, Any]
    check: dg.AssetCheckResult
    rejected: str | None

    @classmethod
    def of(cls, stage: Stage, key: str, report: Report) -> "_Done":
        rejected = stage.why_rejected(report)
        output = stage.output(key, rejected=rejected is not None) if stage.suffix else None
        return cls(report, metadata_of(report, output), check_of(report, rejected), rejected)


async def _single(
    context: dg.AssetExecutionContext, stage: Stage, key: str, work: Work
) -> dg.MaterializeResult[Any]:
    done = _Done.of(stage, key, await work(key))
    if done.rejected is not None:
        _log(context, stage, key, done)
        raise _failure(f"{key}: {done.rejected}")
    return dg.MaterializeResult(
        metadata=done.metadata,
        data_version=dg.DataVersion(done.report.data_version),
        check_results=[done.check],
    )


async def _several(
    context: dg.AssetExecutionContext, stage: Stage, keys: Sequence[str], work: Work
) -> None:
    """Raises one Failure at the end that lists every file that failed."""
    failed: dict[str, str] = {}
    errors: list[Exception] = []
    slots = asyncio.Semaphore(stage.spec.task.concurrency.max_concurrent_files)

    async def file(key: str) -> None:
        async with slots:
            try:
                done = _Done.of(stage, key, await work(key))
            except ModelcallError as error:
                failed[key] = str(error)
                errors.append(error)
                return
            except Exception as error:  # its neighbours go on
                context.log.error(f"{key} failed", exc_info=True)
                cause: BaseException = error
                while isinstance(cause, BaseExceptionGroup):  # only says that it had some
                    cause = cause.exceptions[0]
                failed[key] = f"{type(cause).__name__}: {cause}"
                return
        if done.rejected is not None:
            failed[key] = done.rejected
        _log(context, stage, key, done)

    async with asyncio.TaskGroup() as files:
        for key in keys:
            files.create_task(file(key))
    if failed:
        lines = "\n".join(f"{key}: {failed[key]}" for key in keys if key in failed)
        raise _failure(f"{len(failed)} of {len(keys)} files failed:\n{lines}", errors)


def _failure(message: str, errors: Sequence[Exception] = ()) -> dg.Failure:
    """Tells `defs.runs` by its metadata whether other files would end in the same way."""
    is_systemic = any(isinstance(error, SYSTEMIC) for error in errors)
    return dg.Failure(message, metadata={SYSTEMIC_KEY: is_systemic}, allow_retries=False)


def _log(context: dg.AssetExecutionContext, stage: Stage, key: str, done: _Done) -> None:
    """What came of one file, and its check. Of a rejected result an observation keeps the numbers
    in the UI; a materialisation would show green."""
    asset, check = asset_key(stage), done.check
    if done.rejected is not None:
        context.log_event(dg.AssetObservation(asset, partition=key, metadata=done.metadata))
    else:
        tags = provenance_tags(context.instance, stage, key, done.report.data_version)
        context.log_event(
            dg.AssetMaterialization(asset, partition=key, metadata=done.metadata, tags=tags)
        )
    evaluation: Any = dg.AssetCheckEvaluation(
        asset_key=asset,
        check_name=COMPLETE,
        passed=check.passed,
        severity=check.severity,
        description=check.description,
        metadata=check.metadata,
        partition=key,
    )
    context.log_event(evaluation)  # which takes it, though its type does not say so
