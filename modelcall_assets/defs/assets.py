"""The table of contents: a task's assets, upstream first."""

import asyncio
import warnings
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

import dagster as dg

from modelcall_assets.config.catalog import TaskSpec
from modelcall_assets.defs.checks import (
    PREPROCESSED_CHECKS,
    RAW_CHECKS,
    SCORES_CHECKS,
    check_preprocessed,
    check_raw,
    check_scores,
)
from modelcall_assets.defs.housekeeping import task_pool
from modelcall_assets.defs.interrupts import interruptible
from modelcall_assets.defs.metadata import preprocessed_metadata, raw_metadata, scores_metadata
from modelcall_assets.defs.stage import Done, OnePartition, Opened, RunOptions, Stage, stage_asset
from modelcall_assets.defs.watching import watched
from modelcall_assets.errors import RunStopped
from modelcall_assets.steps.progress import Watcher
from modelcall_assets.steps.score_report import ScoreReport
from modelcall_assets.steps.task_steps import PREPROCESSED, RAW, SCORES, TaskSteps


def task_assets(spec: TaskSpec, watcher: Watcher | None = None) -> list[dg.AssetsDefinition]:
    """`[task, raw]`, `[task, preprocessed]` where the task asks for it, `[task, scores]`."""
    steps = TaskSteps(spec)
    stages = {
        RAW: Stage(
            RAW,
            "an input file's fingerprint, schema and first mistakes",
            frozenset({"file"}),
            RAW_CHECKS,
            _raw(steps),
        ),
        PREPROCESSED: Stage(
            PREPROCESSED,
            "cleaned, filtered and truncated rows",
            frozenset({"python", "parquet"}),
            PREPROCESSED_CHECKS,
            _preprocessed(steps),
        ),
        SCORES: _scores_stage(steps, watcher),
    }
    with warnings.catch_warnings():
        # Partitioned checks and backfill policies: used on purpose, tested against this release.
        warnings.simplefilter("ignore", dg.PreviewWarning)
        warnings.simplefilter("ignore", dg.BetaWarning)
        return [stage_asset(steps, stages[name]) for name in steps.stages]


def _scores_stage(steps: TaskSteps, watcher: Watcher | None) -> Stage:
    spec = steps.spec
    if steps.rule_stage is not None:
        description, kinds = f"ratings by {spec.task.scorer}", frozenset({"python", "parquet"})
        return Stage(SCORES, description, kinds, SCORES_CHECKS, _rule_scores(steps, watcher))
    assert spec.model is not None and spec.prompt is not None
    return Stage(
        SCORES,
        f"ratings by {spec.model.chat_config.model} with the prompt {spec.prompt.version}",
        frozenset({"openai", "parquet"}),
        SCORES_CHECKS,
        _scores(steps, watcher),
        pool=task_pool(spec),
    )


def _raw(steps: TaskSteps) -> Opened:
    def one(key: str) -> Done:
        report = steps.raw(key)
        return Done(report.data_version, raw_metadata(report), check_raw(report))

    return _in_threads(one)


def _preprocessed(steps: TaskSteps) -> Opened:
    def one(key: str) -> Done:
        report = steps.preprocessed(key)
        metadata = preprocessed_metadata(report, steps.layout.output_path(PREPROCESSED, key))
        return Done(report.data_version, metadata, check_preprocessed(report))

    return _in_threads(one)


def _scores(steps: TaskSteps, watcher: Watcher | None) -> Opened:
    @asynccontextmanager
    async def opened(
        context: dg.AssetExecutionContext, options: RunOptions
    ) -> AsyncGenerator[OnePartition]:
        async with (
            steps.engine() as engine,
            interruptible(lambda: engine.stop(RunStopped("interrupted; every reply is kept"))),
            watched(context, watcher) as tally,
        ):
            tally.rows = steps.rows_to_score(context.partition_keys)

            async def one(key: str) -> Done:
                report = await steps.scores(
                    key, engine, tally, context.run.run_id, fresh=options.fresh
                )
                return await asyncio.to_thread(_scores_done, steps, key, report)

            yield one

    return opened


def _rule_scores(steps: TaskSteps, watcher: Watcher | None) -> Opened:
    @asynccontextmanager
    async def opened(
        context: dg.AssetExecutionContext, options: RunOptions
    ) -> AsyncGenerator[OnePartition]:
        async with watched(context, watcher) as tally, interruptible(tally.stop):
            tally.rows = steps.rows_to_score(context.partition_keys)

            async def one(key: str) -> Done:
                report = await asyncio.to_thread(steps.rule_scores, key, tally)
                return await asyncio.to_thread(_scores_done, steps, key, report)

            yield one

    return opened


def _scores_done(steps: TaskSteps, key: str, report: ScoreReport) -> Done:
    return Done(
        report.data_version,
        scores_metadata(report, steps.layout.output_path(SCORES, key)),
        check_scores(report, steps.audit(key, report)),
        rejected=steps.rejection(report),
    )


def _in_threads(one: Callable[[str], Done]) -> Opened:
    @asynccontextmanager
    async def opened(
        context: dg.AssetExecutionContext, options: RunOptions
    ) -> AsyncGenerator[OnePartition]:
        async def in_thread(key: str) -> Done:
            return await asyncio.to_thread(one, key)

        yield in_thread

    return opened
