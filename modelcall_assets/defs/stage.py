"""One asset body for every stage: one file per run, or several with exact status per file."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

import dagster as dg

from modelcall_assets.config.spec import MERGED
from modelcall_assets.defs.partitions import partitions_of
from modelcall_assets.defs.versions import asset_key, code_version, provenance_tags, upstream_key
from modelcall_assets.errors import BudgetSpent, EndpointDown, EndpointRefused, ModelcallError
from modelcall_assets.steps.task_steps import TaskSteps
from modelcall_assets.steps.upstream import Upstream

SYSTEMIC = (EndpointRefused, EndpointDown, BudgetSpent)
SYSTEMIC_KEY = "systemic"


class RunOptions(dg.Config):
    """Launchpad options of an asset."""

    fresh: bool = False
    """Ask the model again, also for rows that the journal answers."""
    again: bool = False
    """Ask again for the failed rows of a rejected result too that the task accepts now."""


@dataclass(frozen=True)
class Done:
    """What became of one partition. `rejected` says why its result is not accepted."""

    data_version: str
    metadata: Mapping[str, Any]
    checks: Sequence[dg.AssetCheckResult]
    rejected: str | None = None


OnePartition = Callable[[str], Awaitable[Done]]
Opened = Callable[[dg.AssetExecutionContext, RunOptions], AbstractAsyncContextManager[OnePartition]]


@dataclass(frozen=True)
class Stage:
    """How a stage looks in the graph, and how to work through its partitions."""

    name: str
    description: str
    kinds: Set[str]
    checks: tuple[str, ...]
    opened: Opened
    pool: str | None = None


def stage_asset(steps: TaskSteps, stage: Stage) -> dg.AssetsDefinition:
    """The asset `[task, stage]`. A several-file run logs each file's end as it comes and yields no
    result: one would re-emit every key with a single shared data version."""
    spec, partitions = steps.spec, partitions_of(steps, stage.name)
    key = asset_key(steps.spec, stage.name)
    upstream = steps.upstream_of(stage.name)
    check_outputs = [f"{key.to_python_identifier()}_{name}" for name in stage.checks]

    @dg.asset(
        key=key,
        deps=[_dependency(stage.name, upstream)] if upstream else [],
        partitions_def=partitions,
        group_name=spec.key,
        description=f"**{spec.name}**: {stage.description}\n\n{spec.task.description}",
        kinds=set(stage.kinds),
        owners=spec.task.owners,
        metadata={"task": spec.name, "task_file": spec.file_name},
        code_version=code_version(steps, stage.name),
        backfill_policy=dg.BackfillPolicy.multi_run(_files_per_run(steps, stage.name)),
        pool=stage.pool,
        output_required=False,
        check_specs=[
            dg.AssetCheckSpec(name, asset=key, partitions_def=partitions) for name in stage.checks
        ],
    )
    async def body(context: dg.AssetExecutionContext, config: RunOptions):
        keys = list(context.partition_keys)
        try:
            async with stage.opened(context, config) as one:
                if len(keys) == 1:
                    results: list[Any] = [await _single(context, key, keys[0], one)]
                else:
                    await _several(context, steps, stage.name, keys, one)
                    results = [dg.Output(None, output_name=name) for name in check_outputs]
        except ModelcallError as error:
            raise _failure(str(error), [error]) from None
        for result in results:
            yield result

    return body


def _dependency(stage: str, upstream: Upstream) -> dg.AssetDep:
    """A group may read any file; it reads its own members, and says which are missing."""
    asset = upstream_key(upstream)
    if stage != MERGED:
        return dg.AssetDep(asset)
    return dg.AssetDep(asset, partition_mapping=dg.AllPartitionMapping())


def _files_per_run(steps: TaskSteps, stage: str) -> int:
    """Neighbours must not share a several-file run, so that their numbers differ. A merge is one
    file's run, because Dagster itself notes what it has read."""
    if stage == MERGED:
        return 1
    wanted = steps.spec.task.concurrency.files_per_run
    distance = len(steps.stages) - 1 - steps.stages.index(stage)
    return wanted + distance if wanted > 1 else 1


async def _single(
    context: dg.AssetExecutionContext, asset: dg.AssetKey, key: str, one: OnePartition
) -> dg.MaterializeResult[Any]:
    done = await one(key)
    if done.rejected is not None:
        _log_rejection(context, asset, key, done)
        raise _failure(f"{key}: {done.rejected}")
    return dg.MaterializeResult(
        metadata=done.metadata,
        data_version=dg.DataVersion(done.data_version),
        check_results=done.checks,
    )


async def _several(
    context: dg.AssetExecutionContext,
    steps: TaskSteps,
    stage: str,
    keys: Sequence[str],
    one: OnePartition,
) -> None:
    """Raises one Failure at the end that lists every file that failed."""
    asset = context.asset_key
    failed: dict[str, str] = {}
    errors: list[Exception] = []
    slots = asyncio.Semaphore(steps.spec.task.concurrency.max_concurrent_files)

    async def file(key: str) -> None:
        async with slots:
            try:
                done = await one(key)
            except ModelcallError as error:
                failed[key] = str(error)
                errors.append(error)
                return
            except Exception as error:  # its neighbours go on
                context.log.error(f"{key} failed", exc_info=True)
                cause = _first(error)
                failed[key] = f"{type(cause).__name__}: {cause}"
                return
        if done.rejected is not None:
            failed[key] = done.rejected
            _log_rejection(context, asset, key, done)
            return
        tags = provenance_tags(context.instance, steps, stage, key, done.data_version)
        context.log_event(
            dg.AssetMaterialization(asset, partition=key, metadata=done.metadata, tags=tags)
        )
        for evaluation in _evaluations(asset, key, done):
            context.log_event(evaluation)

    async with asyncio.TaskGroup() as files:
        for key in keys:
            files.create_task(file(key))
    if failed:
        lines = "\n".join(f"{key}: {failed[key]}" for key in keys if key in failed)
        raise _failure(f"{len(failed)} of {len(keys)} files failed:\n{lines}", errors)


def _first(error: BaseException) -> BaseException:
    """What a task group only says that it had."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _failure(message: str, errors: Sequence[Exception] = ()) -> dg.Failure:
    """Tells `defs.runs` by its metadata whether other files would end in the same way."""
    is_systemic = any(isinstance(error, SYSTEMIC) for error in errors)
    return dg.Failure(message, metadata={SYSTEMIC_KEY: is_systemic}, allow_retries=False)


def _log_rejection(
    context: dg.AssetExecutionContext, asset: dg.AssetKey, key: str, done: Done
) -> None:
    """An observation keeps the numbers in the UI; a materialisation would show green."""
    context.log_event(dg.AssetObservation(asset, partition=key, metadata=done.metadata))
    for evaluation in _evaluations(asset, key, done):
        context.log_event(evaluation)


def _evaluations(asset: dg.AssetKey, key: str, done: Done) -> Iterator[Any]:
    """AssetCheckEvaluation events; `log_event` takes them, though its type does not say so."""
    for check in done.checks:
        assert check.check_name is not None
        yield dg.AssetCheckEvaluation(
            asset_key=asset,
            check_name=check.check_name,
            passed=check.passed,
            severity=check.severity,
            description=check.description,
            metadata=check.metadata,
            partition=key,
        )
