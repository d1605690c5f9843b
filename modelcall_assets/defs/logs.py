"""What runs tell: as Dagster keeps it, and in a file where the task names a folder for that."""

import logging
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import dagster as dg
from dagster._core.execution.plan.objects import StepFailureData

from modelcall_assets.config.places import shown_path
from modelcall_assets.config.spec import TaskSpec
from modelcall_assets.errors import StoreError
from modelcall_assets.records import decode_key
from modelcall_assets.storage.places import explained

JOB_TAG = "modelcall/job"
"""Of a run: which job of how many."""
_RUNS = 1000
_STATUS = dg.DagsterRunStatus
_ENDED = {_STATUS.SUCCESS: "well", _STATUS.FAILURE: "failed", _STATUS.CANCELED: "stopped"}


def told_at(at: float) -> str:
    return f"{datetime.fromtimestamp(at):%Y-%m-%d %H:%M:%S}"


def job_of(run: dg.DagsterRun) -> tuple[int, int]:
    job, jobs = run.tags.get(JOB_TAG, "0/1").split("/")
    return int(job), int(jobs)


def log_of(folder: Path, record: dg.RunRecord) -> Path:
    job, jobs = job_of(record.dagster_run)
    began = f"{record.create_timestamp.astimezone():%Y%m%d_%H%M%S}"
    return folder / f"{folder.name}_{began}{f'_job{job:03}' if jobs > 1 else ''}.log"


def told(entry: dg.EventLogEntry, run: dg.DagsterRun) -> dict[str, str] | None:
    """What people are to hear of an event; a message is one line."""
    level, text, event = entry.level, entry.message, entry.dagster_event
    match event and event.event_specific_data:
        case dg.AssetCheckEvaluation() as check:
            level = logging.INFO if check.passed else getattr(logging, check.severity.value)
            file = f"{decode_key(check.partition)}: " if check.partition else ""
            text = f"{check.asset_key.path[-1]}: {file}{check.description}"
        case StepFailureData() as failed:
            level, text = logging.ERROR, message_of(failed)
        case data:  # of a run that ended by itself, whose step has said why, there is some
            if event and (data or event.event_type != dg.DagsterEventType.RUN_FAILURE):
                return None
    line = {"time": told_at(entry.timestamp), "level": logging.getLevelName(level)}
    return line | {"job": f"Job{job_of(run)[0]}", "message": " ".join(text.splitlines())}


def message_of(data: StepFailureData) -> str:
    """The Failure's own words where there are any, else the exception."""
    own = data.user_failure_data
    if own is None or not own.description:
        return data.error.to_string() if data.error else "the step failed"
    return own.description


def listen(spec: TaskSpec, context: Any) -> None:
    """Have what an op's run tells written to its file, if the task asks for one. StoreError when
    that cannot be."""
    instance, run, folder = context.instance, context.run, spec.log_folder
    if folder is None or instance._subscribers[run.run_id]:  # by an op before
        return
    path = log_of(folder, instance.get_run_record_by_id(run.run_id))

    def hear(entry: dg.EventLogEntry) -> None:
        row, least = told(entry, run), logging.getLevelNamesMapping()[spec.task.logging.level]
        if row and logging.getLevelNamesMapping()[row["level"]] >= least:
            with explained(path, StoreError), path.open("ab", buffering=0) as file:
                file.write(f"{' | '.join(row.values())}\n".encode())

    with explained(folder, StoreError):
        folder.mkdir(parents=True, exist_ok=True)
        path.touch()
    instance.add_event_listener(run.run_id, hear)


def runs_of(
    instance: dg.DagsterInstance, specs: Sequence[TaskSpec]
) -> Iterator[tuple[TaskSpec, dg.RunRecord]]:
    """The last ones, the newest first."""
    by_key = {spec.key: spec for spec in specs}
    for record in instance.get_run_records(limit=_RUNS):
        run = record.dagster_run
        assets = {asset.path[0] for asset in run.asset_selection or ()}
        for key in by_key.keys() & (assets or {run.job_name.removeprefix("run_")}):
            yield by_key[key], record


def shown(spec: TaskSpec, record: dg.RunRecord) -> dict[str, str]:
    """A run in a table."""
    run, path = record.dagster_run, spec.log_folder and log_of(spec.log_folder, record)
    return {
        "task": spec.name,
        "run": run.run_id[:8],
        "begun": told_at(record.create_timestamp.timestamp()),
        "ended": _ENDED.get(run.status, "not yet"),
        "log_file": shown_path(path, spec.root) if path and path.exists() else "",
    }
