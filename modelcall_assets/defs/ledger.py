"""What Dagster is told of files: the events of what came of one, and the ledger of a run that works
on many of them at once."""

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from functools import partial
from threading import Condition
from typing import Any, NamedTuple

import dagster as dg
from dagster._core.events import (
    AssetMaterializationPlannedData,
    AssetObservationData,
    DagsterEvent,
    DagsterEventType,
    StepMaterializationData,
)
from dagster._core.instance.ref import InstanceRef

from modelcall_assets.config.spec import TaskSpec
from modelcall_assets.defs.instance import asset_key, latest_result, provenance_tags
from modelcall_assets.defs.shown import COMPLETE, check_of, failed_check, metadata_of
from modelcall_assets.errors import BudgetSpent, EndpointDown, EndpointRefused
from modelcall_assets.stages.pieces import pool_of
from modelcall_assets.stages.report import Report, Tally
from modelcall_assets.stages.stage import Stage
from modelcall_assets.stages.task import Task

MANY = 100
"""So many waiting entries pay for the start of a process."""


class Ended(NamedTuple):
    """What came of a file: its report, or none; and why it is red, if it is. `is_told` says whether
    the partition's page is to say so."""

    report: Report | None
    why: str = ""
    error: Exception | None = None
    is_told: bool = True

    @property
    def is_systemic(self) -> bool:
        """Whether other files would end in the same way."""
        return isinstance(self.error, EndpointRefused | EndpointDown | BudgetSpent)


def events_of(instance: dg.DagsterInstance, stage: Stage, key: str, ended: Ended) -> Iterator[Any]:
    """What came of one file, each to be logged before the next. Of a rejected result an observation
    keeps the numbers in the UI; a materialisation would show green."""
    asset, partition, report = asset_key(stage), _partition(stage, key), ended.report
    if report is None:
        if ended.is_told:
            yield check_event(instance, stage, key, failed_check(ended.why))
        return
    metadata = metadata_of(stage, key, report, ended.why or None)
    if ended.why:
        yield dg.AssetObservation(asset, partition=partition, metadata=metadata)
    else:
        tags = provenance_tags(instance, stage, key, report.data_version)
        yield dg.AssetMaterialization(asset, partition=partition, metadata=metadata, tags=tags)
    yield check_event(instance, stage, key, check_of(report, ended.why or None))


def check_event(
    instance: dg.DagsterInstance, stage: Stage, key: str, check: dg.AssetCheckResult
) -> Any:
    """The UI takes it for current only beside the partition's latest result; one that a body yields
    loses its partition in a backfill."""
    partition = _partition(stage, key)
    return dg.AssetCheckEvaluation(
        asset_key=asset_key(stage),
        check_name=COMPLETE,
        passed=check.passed,
        severity=check.severity,
        description=check.description,
        metadata=check.metadata,
        partition=partition,
        target_materialization_data=latest_result(instance, stage, partition),
    )


def _partition(stage: Stage, key: str) -> str | None:
    return None if stage.keys.is_one else key


def note_overviews(instance: dg.DagsterInstance, task: Task) -> list[str]:
    """Make again, without a run, what shows the task as a whole, where something has changed; gives
    the names of these stages."""
    noted: list[str] = []
    for stage in task.overviews:
        (key,) = stage.keys.now()
        if stage.members_changed(key):
            for event in events_of(instance, stage, key, Ended(stage.make(key, Tally()))):
                instance.report_runless_asset_event(event)
            noted.append(stage.name)
    return noted


class Entry(NamedTuple):
    """A file that a stage has begun, or what came of it."""

    stage: str
    key: str
    ended: Ended | None


class Teller(NamedTuple):
    """Tells Dagster of files under the name of one step of a run."""

    instance: dg.DagsterInstance
    task: Task
    run_id: str
    job: str
    step: str

    def tell(self, entries: Sequence[Entry]) -> None:
        """In their order. What has ended well need not be said to have begun."""
        made = {entry[:2] for entry in entries if entry.ended is not None and not entry.ended.why}
        for name, key, ended in entries:
            stage = self.task.stage(name)
            if ended is not None:
                for event in events_of(self.instance, stage, key, ended):
                    self._log(*_kind_and_data(event))
            elif (name, key) not in made:
                planned = AssetMaterializationPlannedData(asset_key(stage), key)
                self._log(DagsterEventType.ASSET_MATERIALIZATION_PLANNED, planned, logging.DEBUG)

    def _log(self, kind: DagsterEventType, data: Any, level: int = logging.INFO) -> None:
        event = DagsterEvent(kind.value, self.job, step_key=self.step, event_specific_data=data)
        self.instance.report_dagster_event(event, self.run_id, level)


def _kind_and_data(event: Any) -> tuple[DagsterEventType, Any]:
    match event:
        case dg.AssetMaterialization():
            return DagsterEventType.ASSET_MATERIALIZATION, StepMaterializationData(event)
        case dg.AssetObservation():
            return DagsterEventType.ASSET_OBSERVATION, AssetObservationData(event)
        case _:
            return DagsterEventType.ASSET_CHECK_EVALUATION, event


class Ledger:
    """Tells Dagster what came of files, in their order, by a thread of its own; of many files by a
    process, because it takes as long as all else that is done for a small one."""

    def __init__(self, context: dg.OpExecutionContext, task: Task) -> None:
        step = str(context.op_handle)
        self._teller = Teller(context.instance, task, context.run_id, context.job_name, step)
        self._waiting, self._change, self._is_over = list[Entry](), Condition(), False
        self._thread = ThreadPoolExecutor(1, "ledger")
        self._told = self._thread.submit(self._tell_all)

    def begun(self, stage: Stage, key: str) -> None:
        self._add(Entry(stage.name, key, None))

    def ended(self, stage: Stage, key: str, ended: Ended) -> None:
        self._add(Entry(stage.name, key, ended._replace(error=None)))

    def close(self) -> None:
        """Waits until all is told; raises what has kept something from that."""
        with self._change:
            self._is_over = True
            self._change.notify()
        self._thread.shutdown()
        self._told.result()

    def _add(self, entry: Entry) -> None:
        with self._change:
            self._waiting.append(entry)
            self._change.notify()

    def _next(self) -> list[Entry]:
        """All that wait, or nothing at the end."""
        with self._change:
            self._change.wait_for(lambda: self._waiting or self._is_over)
            waiting, self._waiting = self._waiting, []
            return waiting

    def _tell_all(self) -> None:
        (instance, task, *of), pool = self._teller, None
        may_help = instance.is_persistent
        with ExitStack() as opened:
            while entries := self._next():
                if may_help and pool is None and len(entries) >= MANY:
                    start = partial(_open, instance.get_ref(), task.spec, *of)
                    pool = opened.enter_context(pool_of(1, start))
                try:
                    if pool is not None:
                        pool.submit(_tell, entries).result()
                        continue
                except BrokenProcessPool:  # killed: what it has told may be told twice
                    may_help, pool = False, None
                self._teller.tell(entries)


_here: Teller | None = None
"""In the process of a ledger."""


def _open(ref: InstanceRef, spec: TaskSpec, run_id: str, job: str, step: str) -> None:
    global _here
    _here = Teller(dg.DagsterInstance.from_ref(ref), Task(spec), run_id, job, step)


def _tell(entries: Sequence[Entry]) -> None:
    assert _here is not None
    _here.tell(entries)
