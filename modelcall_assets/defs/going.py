"""What of tasks is done, what goes on or is queued, and its end."""

import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import dagster as dg
import orjson
from dagster._core.event_api import PartitionKeyFilter
from dagster._core.execution.backfill import BulkActionsFilter, BulkActionStatus
from dagster._core.storage.dagster_run import NOT_FINISHED_STATUSES

from modelcall_assets.defs.chain import Chain
from modelcall_assets.defs.instance import (
    GREEN,
    HOST,
    IN_PROGRESS,
    RED,
    TASK_TAG,
    asset_key,
    lock_path,
    tasks_of,
)
from modelcall_assets.defs.ledger import COMPLETE
from modelcall_assets.defs.logs import ENDED
from modelcall_assets.defs.runs import PROCESS_TAG, end_dead_runs, is_held
from modelcall_assets.stages import Stage
from modelcall_assets.stages.task import Task

LOOK_EVERY_S = 0.2
STATES = {GREEN: "done", RED: "failed", None: "missing", IN_PROGRESS: "running"}
OLD = "out_of_date"


def states_of(chain: Chain, stage: Stage, before: Mapping[str, str]) -> dict[str, str]:
    """By key, as the next run would find it after those of the stage `before`. InputError when
    inputs cannot be listed."""
    chain.results.look(stage)
    found = {key: STATES[chain.statuses[stage.name].get(key)] for key in stage.keys.now()}
    done = (key for key, state in found.items() if state == "done")
    old = (key for key in done if before.get(key) == OLD or chain.is_due(stage, key))
    return found | dict.fromkeys(old, OLD)


def known_states(instance: dg.DagsterInstance, task: Task) -> list[Counter[str]]:
    """Of the files that Dagster knows of, by stage; nothing is listed."""
    statuses = Chain(task, instance, (), {}, None, None).statuses.values()
    return [Counter(map(STATES.__getitem__, each.values())) for each in statuses]


def why_failed(instance: dg.DagsterInstance, stage: Stage, key: str) -> str:
    """As the file's page in the UI says it."""
    check, only = dg.AssetCheckKey(asset_key(stage), COMPLETE), PartitionKeyFilter(key=key)
    latest = instance.event_log_storage.get_latest_asset_check_execution_by_key([check], only)
    told = latest[check].evaluation if latest else None
    if told and getattr(told, "severity", None) == dg.AssetCheckSeverity.ERROR:
        return told.description or ""
    return "its run was stopped, or its process killed, before it was made"


def last_end(instance: dg.DagsterInstance, task: str) -> str:
    for record in instance.get_run_records(dg.RunsFilter(tags={TASK_TAG: task}), limit=1):
        how = ENDED.get(record.dagster_run.status)
        return f"{how} {datetime.fromtimestamp(record.end_time or 0):%Y-%m-%d %H:%M}"
    return "never run"


class Going(NamedTuple):
    """A process, run or backfill that has not ended, `running` or `queued`; `end` asks it to."""

    what: Literal["process", "run", "backfill"]
    id: str
    tasks: set[str]
    state: str
    host: str
    end: Callable[[], object]

    @property
    def is_here(self) -> bool:
        return self.host == HOST


def going(instance: dg.DagsterInstance) -> Iterator[Going]:
    """Backfills, then runs, then the processes of this home."""
    by_name = dict[str, set[str]]()
    end_dead_runs(instance)
    for backfill in instance.get_backfills(
        BulkActionsFilter(statuses=[BulkActionStatus.REQUESTED])
    ):
        end = partial(instance.update_backfill, backfill.with_status(BulkActionStatus.CANCELING))
        yield Going("backfill", backfill.backfill_id, tasks_of(backfill), "queued", HOST, end)
    for run in instance.get_runs(dg.RunsFilter(statuses=NOT_FINISHED_STATUSES)):
        host, _, name = run.tags.get(PROCESS_TAG, "").rpartition("/")
        by_name[name] = tasks = tasks_of(run)
        is_queued = not name and run.status != dg.DagsterRunStatus.STARTED
        end = instance.report_run_canceled if is_queued else instance.report_run_canceling
        state = "queued" if is_queued else "running"
        yield Going("run", run.run_id, tasks, state, host or HOST, partial(end, run))
    for path in lock_path(instance, "").glob("*"):
        if is_held(path):
            with suppress(FileNotFoundError, ValueError):  # it is about to write that, or has ended
                told = orjson.loads(path.read_bytes())
                tasks = by_name.get(path.name, {told["task"]})
                end = partial(_interrupt, path, told["pid"])
                yield Going("process", path.name, tasks, "running", told["host"], end)


def _interrupt(lock: Path, pid: int) -> None:
    """Once, however many ask: a second signal would not wait for replies."""
    with suppress(FileExistsError, ProcessLookupError):
        lock.with_suffix(".stop").touch(exist_ok=False)
        os.kill(pid, signal.SIGINT)


def stop(instance: dg.DagsterInstance, is_wanted: Callable[[str], bool]) -> list[Going]:
    """End what goes on of tasks on this machine, as Ctrl-C does, and wait for it; gives what there
    was, also elsewhere. Cancelled runs whose processes end have not failed."""
    seen, is_left = dict[tuple[str, str], Going](), True
    while is_left:
        is_left = False
        for each in (each for each in going(instance) if any(map(is_wanted, each.tasks))):
            is_left |= each.is_here and each.state == "running"
            if each[:2] not in seen and each.is_here:
                each.end()
            seen.setdefault(each[:2], each)
        time.sleep(LOOK_EVERY_S if is_left else 0)
    return [*seen.values()]
