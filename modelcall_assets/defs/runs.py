"""Run a task's graph in this process, through the same assets and instance as the UI.

A Dagster run takes one key or one contiguous range of keys, so that scattered keys become one run
per range, stage after stage.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import dagster as dg
from dagster._core.events import RunFailureReason
from dagster._core.execution.plan.objects import StepFailureData
from dagster._core.storage.partition_status_cache import AssetPartitionStatus
from dagster._core.storage.tags import (
    ASSET_PARTITION_RANGE_END_TAG,
    ASSET_PARTITION_RANGE_START_TAG,
)

from modelcall_assets.defs.assets import SYSTEMIC_KEY, task_assets
from modelcall_assets.defs.graph import asset_key, is_stale, partitions_of
from modelcall_assets.defs.instance import PROCESS_TAG, dead_runs_ended, process_lock
from modelcall_assets.stages.report import Watcher
from modelcall_assets.stages.stage import Stage
from modelcall_assets.stages.task import Task

_GREEN = AssetPartitionStatus.MATERIALIZED


@dataclass
class RunSummary:
    """`ran` counts partitions per stage; `failed` has the message of each run that went wrong;
    `busy` are files that another live run is working on, `behind` those whose result, if there is
    one, an earlier run has left."""

    ran: dict[str, int] = field(default_factory=dict[str, int])
    failed: list[str] = field(default_factory=list[str])
    busy: list[str] = field(default_factory=list[str])
    behind: list[str] = field(default_factory=list[str])


@dataclass(frozen=True)
class TaskRunner:
    """Materialises what is missing, failed or out of date."""

    task: Task
    instance: dg.DagsterInstance
    watcher: Watcher | None = None

    def run(self, keys: Sequence[str], *, fresh: bool = False, again: bool = False) -> RunSummary:
        """Stage after stage; a file that fails in one stage is left out of the next, and a group
        that lacks a member says so. Ends at once when the endpoint refuses everybody or is down.
        `again` asks also for failed rows of what is up to date or accepted now."""
        summary, wanted = RunSummary(), list(keys)
        task, in_set = self.task, self.task.stages[0].keys
        assets = task_assets(task, self.watcher)
        definitions = dg.Definitions(assets=assets, executor=dg.in_process_executor)
        job = definitions.resolve_implicit_global_asset_job_def()
        with process_lock(self.instance) as process, dead_runs_ended(self.instance):
            for stage in task.stages:
                if stage.keys != in_set:
                    in_set, wanted = stage.keys, stage.keys.now()
                options = {"fresh": stage.answers and fresh, "again": stage.answers and again}
                due, busy = self.due(stage, wanted, everything=any(options.values()))
                summary.ran[stage.name] = len(due)
                summary.busy += busy
                is_over = False
                for keys_of_run in self._ranges(stage, due):
                    failures = self._execute(job, stage, keys_of_run, process, options)
                    summary.failed += [message for message, _ in failures]
                    if is_over := any(is_systemic for _, is_systemic in failures):
                        break
                statuses = self._statuses(stage, wanted)
                if any(status != _GREEN for status in statuses.values()):
                    # Dagster's cache of them can miss what several processes note at a time.
                    self.instance.wipe_asset_cached_status([asset_key(stage)])
                    statuses = self._statuses(stage, wanted)
                summary.behind += [key for key in wanted if statuses[key] != _GREEN]
                wanted = [key for key in wanted if statuses[key] == _GREEN]
                if is_over:
                    break
        return summary

    def due(
        self, stage: Stage, keys: Sequence[str], *, everything: bool = False
    ) -> tuple[list[str], list[str]]:
        """The keys that have to be materialised, and those that another run has in hand."""
        statuses = self._statuses(stage, keys)
        in_progress = AssetPartitionStatus.IN_PROGRESS
        busy = [key for key in keys if statuses[key] == in_progress]
        green = [] if everything else [key for key in keys if statuses[key] == _GREEN]
        outdated = stage.outdated(green)
        outdated |= {key for key in green if is_stale(self.instance, stage, key)}
        fine = {*green} - outdated
        due = [key for key in keys if statuses[key] != in_progress and key not in fine]
        return due, busy

    def _statuses(
        self, stage: Stage, keys: Sequence[str]
    ) -> dict[str, AssetPartitionStatus | None]:
        asset, files = asset_key(stage), partitions_of(stage.keys)
        statuses = self.instance.get_status_by_partition(asset, keys, files) or {}
        return {key: statuses.get(key) for key in keys}

    def _ranges(self, stage: Stage, keys: Sequence[str]) -> Iterator[tuple[str, str]]:
        """First and last key of each run of neighbours, in the order Dagster keeps the keys."""
        if stage.gathers:  # a run each: see defs/assets.py
            yield from ((key, key) for key in keys)
            return
        known = self.instance.get_dynamic_partitions(stage.keys.name)
        for is_wanted, neighbours in groupby(known, {*keys}.__contains__):
            if is_wanted:
                first, *others = neighbours
                yield first, others[-1] if others else first

    def _execute(
        self,
        job: dg.JobDefinition,
        stage: Stage,
        keys: tuple[str, str],
        process: str,
        options: Mapping[str, bool],
    ) -> list[tuple[str, bool]]:
        """Run one stage from the first to the second key. Gives what failed: the message of each
        step, and whether other files would end in the same way. KeyboardInterrupt after Ctrl-C,
        which Dagster keeps to itself."""
        asset, (start, end), tags = asset_key(stage), keys, {PROCESS_TAG: process}
        if start != end:
            tags[ASSET_PARTITION_RANGE_START_TAG] = start
            tags[ASSET_PARTITION_RANGE_END_TAG] = end
        result = job.execute_in_process(
            instance=self.instance,
            asset_selection=[asset],
            partition_key=start if start == end else None,
            tags=tags,
            run_config={
                "ops": {asset.to_python_identifier(): {"config": dict(options)}},
                "loggers": {"console": {"config": {"log_level": "CRITICAL"}}},
            },
            raise_on_error=False,
        )
        failures: list[tuple[str, bool]] = []
        for event in result.all_events:
            if event.event_type == dg.DagsterEventType.RUN_FAILURE:
                reason = event.job_failure_data.failure_reason
                if reason == RunFailureReason.UNEXPECTED_TERMINATION:
                    raise KeyboardInterrupt
            elif event.event_type == dg.DagsterEventType.STEP_FAILURE:
                failures.append(_message_of(event.step_failure_data))
        return failures


def _message_of(data: StepFailureData) -> tuple[str, bool]:
    """The Failure's own words where there are any, else the exception; whether it is systemic."""
    own = data.user_failure_data
    if own is None or not own.description:
        return data.error.to_string() if data.error else "the step failed", False
    systemic = own.metadata.get(SYSTEMIC_KEY)
    return own.description, systemic is not None and bool(systemic.value)
