"""A task's stages as its assets: one body for all of them, for one file a run or more with exact
status per file; and a stage's report as Dagster shows it. What a stage does is in its own file of
`stages/`."""

import asyncio
import signal
import threading
import warnings
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import dagster as dg
import orjson

from modelcall_assets.defs.instance import asset_key, code_version, partitions_of, provenance_tags
from modelcall_assets.errors import BudgetSpent, EndpointDown, EndpointRefused, ModelcallError
from modelcall_assets.stages.report import Report, Tally, Watcher, counted
from modelcall_assets.stages.stage import Run, Stage, Work
from modelcall_assets.stages.task import Task
from modelcall_assets.transforms.transcript import markdown, turns_of

COMPLETE = "complete"
GRACE_S = 20.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
SYSTEMIC_KEY = "systemic"
_MOST_CELL, _MOST_TURN = 160, 600
"""Characters that are shown."""
_BAR = 24


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
    return wanted + len(stages) - 1 - stages.index(stage) if wanted > 1 else 1


async def _single(
    context: dg.AssetExecutionContext, stage: Stage, key: str, work: Work
) -> dg.MaterializeResult[Any]:
    report = await work(key)
    if (rejected := stage.why_rejected(report)) is not None:
        _log(context, stage, key, report, rejected)
        raise _failure(f"{key}: {rejected}")
    return dg.MaterializeResult(
        metadata=_metadata_of(stage, key, report, None),
        data_version=dg.DataVersion(report.data_version),
        check_results=[_check_of(report, None)],
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
                report = await work(key)
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
        if (rejected := stage.why_rejected(report)) is not None:
            failed[key] = rejected
        _log(context, stage, key, report, rejected)

    async with asyncio.TaskGroup() as files:
        for key in keys:
            files.create_task(file(key))
    if failed:
        lines = "\n".join(f"{key}: {failed[key]}" for key in keys if key in failed)
        raise _failure(f"{len(failed)} of {len(keys)} files failed:\n{lines}", errors)


def _failure(message: str, errors: Sequence[Exception] = ()) -> dg.Failure:
    """Tells `defs.runs` by its metadata whether other files would end in the same way."""
    systemic = EndpointRefused, EndpointDown, BudgetSpent
    is_systemic = any(isinstance(error, systemic) for error in errors)
    return dg.Failure(message, metadata={SYSTEMIC_KEY: is_systemic}, allow_retries=False)


def _log(
    context: dg.AssetExecutionContext,
    stage: Stage,
    key: str,
    report: Report,
    rejected: str | None,
) -> None:
    """What came of one file, and its check. Of a rejected result an observation keeps the numbers
    in the UI; a materialisation would show green."""
    asset = asset_key(stage)
    metadata, check = _metadata_of(stage, key, report, rejected), _check_of(report, rejected)
    if rejected is not None:
        context.log_event(dg.AssetObservation(asset, partition=key, metadata=metadata))
    else:
        tags = provenance_tags(context.instance, stage, key, report.data_version)
        context.log_event(
            dg.AssetMaterialization(asset, partition=key, metadata=metadata, tags=tags)
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


def _metadata_of(stage: Stage, key: str, report: Report, rejected: str | None) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "dagster/row_count": report.rows,
        "rows_in": report.rows_in,
        "ok": report.ok,
        "failed": report.failed,
        "failure_rate": round(report.failure_rate, 6),
    }
    if len(report.schema):
        columns = [dg.TableColumn(field.name, str(field.type)) for field in report.schema]
        shown["dagster/column_schema"] = dg.TableSchema(columns)
    if report.failures:
        shown["failures_by_reason"] = _table(counted("reason", dict(report.failures.most_common())))
        shown["first_failures"] = _table([each._asdict() for each in report.failed_rows])
    if report.dropped:
        shown["dropped"] = report.dropped.total()
        shown["dropped_by_rule"] = _table(counted("rule", dict(report.dropped.most_common())))
    shown |= report.numbers
    shown |= {name: _table(rows) for name, rows in report.tables.items()}
    for name, counts in report.histograms.items():
        most = max(counts.values(), default=0)
        bars = [
            {name: value, "rows": count, "": "█" * max(1, round(_BAR * count / most))}
            for value, count in sorted(counts.items())
        ]
        shown[f"histogram_{name}"] = _table(bars)
    if report.warnings:
        shown["warnings"] = report.warnings
    if stage.suffix:  # else the rows are in the user's own file
        output = stage.output(key, rejected=rejected is not None)
        shown["output"] = dg.MetadataValue.path(str(output))
    sample = report.sample
    if sample and turns_of(dict(sample[0])):  # conversations are read, other rows compared
        texts = [markdown(dict(row), most_chars=_MOST_TURN) for row in sample[:3]]
        shown["sample"] = dg.MetadataValue.md("\n\n---\n\n".join(texts))
    else:
        shown["sample"] = _table(sample)
    return shown


def _check_of(report: Report, rejected: str | None) -> dg.AssetCheckResult:
    """Whether the partition is complete: a table with a row for each thing that is looked at, the
    worst of which gives the severity. `rejected` says why the result is not accepted."""
    findings = report.findings(rejected)
    wrong = [finding for finding in findings if not finding.passed]
    is_error = any(finding.severity == "error" for finding in wrong)
    table = [
        {"": "✓" if each.passed else "✗", "looked at": each.name, "found": each.told}
        for each in findings
    ]
    return dg.AssetCheckResult(
        check_name=COMPLETE,
        passed=not wrong,
        description="; ".join(finding.told for finding in wrong) or findings[0].told,
        severity=dg.AssetCheckSeverity.ERROR if is_error else dg.AssetCheckSeverity.WARN,
        metadata={"findings": _table(table)},
    )


def _table(rows: Sequence[Mapping[str, Any]]) -> dg.MarkdownMetadataValue:
    """A Markdown table; long cells are cut, line breaks and bars made harmless."""
    if not rows:
        return dg.MetadataValue.md("no rows")
    names = list(rows[0])
    cells = ([_cell(row.get(name)) for name in names] for row in rows)
    lines = [names, ["---"] * len(names), *cells]
    return dg.MetadataValue.md("\n".join(f"| {' | '.join(cells)} |" for cells in lines))


def _cell(value: Any) -> str:
    if value is None:
        return ""
    text = value if isinstance(value, str) else orjson.dumps(value, default=str).decode()
    text = " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
    return text if len(text) <= _MOST_CELL else text[:_MOST_CELL] + "…"
