"""Run a task's graph in this process, through the same assets and instance as the UI.

A Dagster run takes one key or one contiguous range of keys, so that scattered keys become one run
per range, stage after stage.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import dagster as dg
from dagster._core.events import RunFailureReason
from dagster._core.storage.partition_status_cache import AssetPartitionStatus

from modelcall_assets.config.spec import MERGED, RAW, RESPONSES, SCORES
from modelcall_assets.defs.dead_runs import PROCESS_TAG, dead_runs_ended, process_lock
from modelcall_assets.defs.partitions import partitions_of
from modelcall_assets.defs.project import task_definitions
from modelcall_assets.defs.stage import SYSTEMIC_KEY
from modelcall_assets.defs.versions import asset_key, is_stale
from modelcall_assets.steps.progress import Watcher
from modelcall_assets.steps.raw import MEMBERS
from modelcall_assets.steps.task_steps import TaskSteps
from modelcall_assets.storage.files import exists
from modelcall_assets.storage.manifest import read_manifest

_GREEN = AssetPartitionStatus.MATERIALIZED
_RANGE_TAGS = ("dagster/asset_partition_range_start", "dagster/asset_partition_range_end")


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

    steps: TaskSteps
    instance: dg.DagsterInstance
    watcher: Watcher | None = None

    def run(self, keys: Sequence[str], *, fresh: bool = False, again: bool = False) -> RunSummary:
        """Stage after stage; a file that fails in one stage is left out of the next, and a group
        that lacks a member says so. Ends at once when the endpoint refuses everybody or is down.
        `again` asks also for failed rows of what is up to date or accepted now."""
        summary, wanted = RunSummary(), list(keys)
        in_set = self.steps.partitions(self.steps.stages[0])
        job = task_definitions(
            self.steps.spec, self.watcher
        ).resolve_implicit_global_asset_job_def()
        with process_lock(self.instance) as process, dead_runs_ended(self.instance):
            for stage in self.steps.stages:
                asks = stage in (RESPONSES, SCORES)
                if self.steps.partitions(stage) != in_set:
                    in_set = self.steps.partitions(stage)
                    wanted = self.steps.keys(in_set)
                options, is_over = {"fresh": asks and fresh, "again": asks and again}, False
                due, busy = self.due(stage, wanted, everything=asks and (fresh or again))
                summary.ran[stage] = len(due)
                summary.busy += busy
                for start, end in self._ranges(stage, due):
                    tags = {PROCESS_TAG: process}
                    failures = self._execute(job, stage, start, end, tags, options)
                    summary.failed += [failure.message for failure in failures]
                    if is_over := any(failure.is_systemic for failure in failures):
                        break
                statuses = self._statuses(stage, wanted)
                if any(status != _GREEN for status in statuses.values()):
                    # Dagster's cache of them can miss what several processes note at a time.
                    self.instance.wipe_asset_cached_status([asset_key(self.steps.spec, stage)])
                    statuses = self._statuses(stage, wanted)
                summary.behind += [key for key in wanted if statuses[key] != _GREEN]
                wanted = [key for key in wanted if statuses[key] == _GREEN]
                if is_over:
                    break
        return summary

    def due(
        self, stage: str, keys: Sequence[str], *, everything: bool = False
    ) -> tuple[list[str], list[str]]:
        """The keys that have to be materialised, and those that another run has in hand."""
        statuses = self._statuses(stage, keys)
        in_progress = AssetPartitionStatus.IN_PROGRESS
        busy = [key for key in keys if statuses[key] == in_progress]
        green = () if everything else [key for key in keys if statuses[key] == _GREEN]
        versions = self.steps.inputs.versions(green) if stage == RAW else {}
        fine = {key for key in green if not self._outdated(stage, key, versions.get(key))}
        due = [key for key in keys if statuses[key] != in_progress and key not in fine]
        return due, busy

    def _outdated(self, stage: str, key: str, version: str | None) -> bool:
        """Materialised, but from something else than now, or its files are gone, or the task looks
        for them elsewhere now. `version` is the input's, for `raw`."""
        layout = self.steps.layout
        manifest = read_manifest(layout.manifest_path(stage, key))
        if manifest is None or is_stale(self.instance, self.steps, stage, key):
            return True
        if stage == RAW:  # where several files lie is in their version
            is_one, uri = MEMBERS not in manifest.detail, manifest.input.uri
            has_moved = is_one and uri != str(layout.input_place(key))
            return has_moved or version != manifest.input.version
        output = layout.output_path(stage, key)
        return manifest.output != str(output) or not exists(output)

    def _statuses(self, stage: str, keys: Sequence[str]) -> dict[str, AssetPartitionStatus | None]:
        asset, files = asset_key(self.steps.spec, stage), partitions_of(self.steps, stage)
        statuses = self.instance.get_status_by_partition(asset, keys, files) or {}
        return {key: statuses.get(key) for key in keys}

    def _ranges(self, stage: str, keys: Sequence[str]) -> Iterator[tuple[str, str]]:
        """First and last key of each run of neighbours, in the order Dagster keeps the keys."""
        if stage == MERGED:  # a run each: see defs/stage.py
            yield from ((key, key) for key in keys)
            return
        wanted = set(keys)
        name = partitions_of(self.steps, stage).name
        assert name is not None
        start = last = None
        for key in self.instance.get_dynamic_partitions(name):
            if key in wanted:
                start, last = start or key, key
            elif start is not None and last is not None:
                yield start, last
                start = last = None
        if start is not None and last is not None:
            yield start, last

    def _execute(
        self,
        job: dg.JobDefinition,
        stage: str,
        start: str,
        end: str,
        tags: dict[str, str],
        options: Mapping[str, bool],
    ) -> list["_StepFailure"]:
        """Run one stage over a range; gives what failed."""
        asset = asset_key(self.steps.spec, stage)
        if start != end:
            tags = {**tags, **dict(zip(_RANGE_TAGS, (start, end), strict=True))}
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
        if any(_is_interruption(event) for event in result.all_events):
            raise KeyboardInterrupt
        return [
            _StepFailure.of(event)
            for event in result.all_events
            if event.event_type == dg.DagsterEventType.STEP_FAILURE
        ]


def _is_interruption(event: dg.DagsterEvent) -> bool:
    """Dagster keeps Ctrl-C to itself and ends the run as failed."""
    if event.event_type != dg.DagsterEventType.RUN_FAILURE:
        return False
    return event.job_failure_data.failure_reason == RunFailureReason.UNEXPECTED_TERMINATION


@dataclass(frozen=True)
class _StepFailure:
    """`is_systemic`: other files would end in the same way."""

    message: str
    is_systemic: bool

    @classmethod
    def of(cls, event: dg.DagsterEvent) -> "_StepFailure":
        """The Failure's own words where there are any, else the exception."""
        data = event.step_failure_data
        own = data.user_failure_data
        if own is not None and own.description:
            systemic = own.metadata.get(SYSTEMIC_KEY)
            return cls(own.description, systemic is not None and bool(systemic.value))
        return cls(data.error.to_string() if data.error else "the step failed", False)
