"""The table of contents: a task's assets, upstream first."""

import asyncio
import warnings
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial

import dagster as dg

from modelcall_assets.config.model import ModelConfig
from modelcall_assets.config.spec import (
    CHATML,
    MERGED,
    PREPROCESSED,
    RAW,
    RESPONSES,
    SCORES,
    TaskSpec,
)
from modelcall_assets.defs.checks import (
    CHATML_CHECKS,
    MERGED_CHECKS,
    PREPROCESSED_CHECKS,
    RAW_CHECKS,
    SCORES_CHECKS,
    check_chatml,
    check_merged,
    check_preprocessed,
    check_raw,
    check_scores,
)
from modelcall_assets.defs.housekeeping import task_pool
from modelcall_assets.defs.interrupts import interruptible
from modelcall_assets.defs.metadata import (
    chatml_metadata,
    merged_metadata,
    preprocessed_metadata,
    raw_metadata,
    scores_metadata,
    split_metadata,
)
from modelcall_assets.defs.stage import Done, OnePartition, Opened, RunOptions, Stage, stage_asset
from modelcall_assets.defs.watching import watched
from modelcall_assets.errors import RunStopped
from modelcall_assets.steps.distillation_steps import DistillationSteps, steps_of
from modelcall_assets.steps.progress import Tally, Watcher
from modelcall_assets.steps.score_report import ScoreReport
from modelcall_assets.steps.task_steps import TaskSteps

Ask = Callable[..., Awaitable[ScoreReport]]


def task_assets(spec: TaskSpec, watcher: Watcher | None = None) -> list[dg.AssetsDefinition]:
    """`[task, raw] → … → [task, scores]`: the stages that the task has."""
    steps = steps_of(spec)
    with warnings.catch_warnings():
        # Partitioned checks and backfill policies: used on purpose, tested against this release.
        warnings.simplefilter("ignore", dg.PreviewWarning)
        warnings.simplefilter("ignore", dg.BetaWarning)
        return [stage_asset(steps, _stage(steps, name, watcher)) for name in steps.stages]


def _stage(steps: TaskSteps, name: str, watcher: Watcher | None) -> Stage:
    """The table of contents: what each stage is, and what works through its partitions."""
    files, parquet, model = {"file"}, {"python", "parquet"}, {"openai"}

    if isinstance(steps, DistillationSteps):
        if name == RAW and CHATML in steps.stages:
            about = "a split's files and their fingerprints"
            opened = _in_threads(partial(_split, steps))
            return Stage(RAW, about, files, (), opened)
        if name == CHATML:
            opened = _in_threads(partial(_converted, steps))
            return Stage(CHATML, "conversations of a split", {"python"}, CHATML_CHECKS, opened)
        if name == MERGED:
            about = "conversations of a merge group"
            opened = _in_threads(partial(_merged, steps))
            return Stage(MERGED, about, {"python"}, MERGED_CHECKS, opened)
        if name == RESPONSES:
            about = f"answers by {_model_of(steps.spec.generator)}"
            opened = _asking(steps, RESPONSES, steps.responses, watcher)
            return Stage(RESPONSES, about, model, SCORES_CHECKS, opened, task_pool(steps.spec))
    if name == RAW:
        about = "an input file's fingerprint, schema and first mistakes"
        return Stage(RAW, about, files, RAW_CHECKS, _in_threads(partial(_looked_at, steps)))
    if name == PREPROCESSED:
        about = "cleaned, filtered and truncated rows"
        opened = _working(steps, PREPROCESSED, partial(_preprocessed, steps), watcher)
        return Stage(PREPROCESSED, about, parquet, PREPROCESSED_CHECKS, opened)
    if steps.rule_stage is not None:
        about = f"ratings by {steps.rule_stage.path}"
        opened = _working(steps, SCORES, partial(_rated, steps), watcher)
        return Stage(SCORES, about, parquet, SCORES_CHECKS, opened)
    assert steps.spec.prompt is not None
    about = f"ratings by {_model_of(steps.spec.model)} with the prompt {steps.spec.prompt.version}"
    opened = _asking(steps, SCORES, steps.scores, watcher)
    return Stage(SCORES, about, {*model, "parquet"}, SCORES_CHECKS, opened, task_pool(steps.spec))


def _model_of(model: ModelConfig | None) -> str:
    assert model is not None
    return model.chat_config.model


def _asking(steps: TaskSteps, stage: str, run: Ask, watcher: Watcher | None) -> Opened:
    """A stage that asks a model: one engine for the files of a run."""

    @asynccontextmanager
    async def opened(
        context: dg.AssetExecutionContext, options: RunOptions
    ) -> AsyncGenerator[OnePartition]:
        async with (
            steps.engine(stage) as engine,
            interruptible(lambda: engine.stop(RunStopped("interrupted; every reply is kept"))),
            watched(context, watcher, stage) as tally,
        ):
            tally.rows = steps.rows_to_ask(stage, context.partition_keys)

            async def one(key: str) -> Done:
                how = options.model_dump()
                report = await run(key, engine, tally, context.run.run_id, **how)
                return await asyncio.to_thread(_answered, steps, stage, key, report)

            yield one

    return opened


def _working(
    steps: TaskSteps, stage: str, run: Callable[[str, Tally], Done], watcher: Watcher | None
) -> Opened:
    """A stage that works through its rows without a model, and can be stopped between two."""

    @asynccontextmanager
    async def opened(
        context: dg.AssetExecutionContext, options: RunOptions
    ) -> AsyncGenerator[OnePartition]:
        async with (
            watched(context, watcher, stage, asks_model=False) as tally,
            interruptible(tally.stop),
        ):
            tally.rows = steps.rows_to_ask(stage, context.partition_keys)

            async def one(key: str) -> Done:
                return await asyncio.to_thread(run, key, tally)

            yield one

    return opened


def _preprocessed(steps: TaskSteps, key: str, tally: Tally) -> Done:
    report = steps.preprocessed(key, tally)
    shown = preprocessed_metadata(report, steps.result_path(PREPROCESSED, key, report))
    rejected = steps.rejection(report, PREPROCESSED)
    return Done(report.data_version, shown, check_preprocessed(report, rejected), rejected)


def _rated(steps: TaskSteps, key: str, tally: Tally) -> Done:
    return _answered(steps, SCORES, key, steps.rule_scores(key, tally))


def _answered(steps: TaskSteps, stage: str, key: str, report: ScoreReport) -> Done:
    audit, rejected = steps.audit(stage, key, report), steps.rejection(report, stage)
    return Done(
        report.data_version,
        scores_metadata(report, steps.result_path(stage, key, report)),
        check_scores(report, audit, rejected),
        rejected,
    )


def _converted(steps: DistillationSteps, key: str) -> Done:
    report = steps.chatml(key)
    shown = chatml_metadata(report, steps.result_path(CHATML, key, report))
    rejected = steps.rejection(report, CHATML)
    return Done(report.data_version, shown, check_chatml(report, rejected), rejected)


def _merged(steps: DistillationSteps, key: str) -> Done:
    report = steps.merged(key)
    shown = merged_metadata(report, steps.result_path(MERGED, key, report))
    rejected = steps.rejection(report, MERGED)
    return Done(report.data_version, shown, check_merged(report, rejected), rejected)


def _looked_at(steps: TaskSteps, key: str) -> Done:
    report = steps.raw(key)
    return Done(report.data_version, raw_metadata(report), check_raw(report))


def _split(steps: DistillationSteps, key: str) -> Done:
    report = steps.raw_split(key)
    return Done(report.data_version, split_metadata(report), ())


def _in_threads(run: Callable[[str], Done]) -> Opened:
    """A stage that computes."""

    @asynccontextmanager
    async def opened(
        context: dg.AssetExecutionContext, options: RunOptions
    ) -> AsyncGenerator[OnePartition]:
        async def in_thread(key: str) -> Done:
            return await asyncio.to_thread(run, key)

        yield in_thread

    return opened
