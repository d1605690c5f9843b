"""What runs tell: as Dagster keeps it, and in a file where the task names a folder for that."""

import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import dagster as dg
from dagster._core.execution.plan.objects import StepFailureData

from modelcall_assets.config.places import shown_path
from modelcall_assets.config.spec import TaskSpec
from modelcall_assets.defs.instance import asset_key, tasks_of
from modelcall_assets.errors import StoreError
from modelcall_assets.records import decode_key
from modelcall_assets.records.outcome import Row
from modelcall_assets.stages.source import Published
from modelcall_assets.stages.task import Task
from modelcall_assets.storage.files import write_bytes
from modelcall_assets.storage.places import explained
from modelcall_assets.storage.values import dumps

JOB_TAG = "modelcall/job"
"""Of a run: which job of how many."""
SHORT = 8
"""Characters of a run's id that people see."""
_RUNS = 1000
_LEVELS = logging.getLevelNamesMapping()
_STATUS = dg.DagsterRunStatus
_INTERRUPTED = KeyboardInterrupt.__name__, dg.DagsterExecutionInterruptedError.__name__
ENDED = {_STATUS.SUCCESS: "well", _STATUS.FAILURE: "failed", _STATUS.CANCELED: "stopped"}


def told_at(at: float) -> str:
    return f"{datetime.fromtimestamp(at):%Y-%m-%d %H:%M:%S}"


def job_of(run: dg.DagsterRun) -> tuple[int, int]:
    job, jobs = run.tags.get(JOB_TAG, "0/1").split("/")
    return int(job), int(jobs)


def log_of(folder: Path, record: dg.RunRecord, what: str = "", suffix: str = ".log") -> Path:
    """The run's own log, or `what` all runs of its job share."""
    job, jobs = job_of(record.dagster_run)
    what = what or f"{record.create_timestamp.astimezone():%Y%m%d_%H%M%S}"
    return folder / f"{folder.name}_{what}{f'_job{job:03}' if jobs > 1 else ''}{suffix}"


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
    own, error = data.user_failure_data, data.error
    if error and error.cls_name in _INTERRUPTED:
        return "stopped; every reply received is kept"
    if own is None or not own.description:
        return error.to_string() if error else "the step failed"
    return own.description


def listen(task: Task, context: Any) -> None:
    """Have what an op's run tells written to files, if the task asks for that. StoreError when it
    cannot be."""
    instance, run, folder = context.instance, context.run, task.spec.log_folder
    if folder is not None and not instance._subscribers[run.run_id]:  # by an op before
        log = RunLog(task, folder, instance.get_run_record_by_id(run.run_id))
        instance.add_event_listener(run.run_id, log.hear)


class RunLog:
    """The files of a run. Rows are told of once Dagster is told of their file."""

    def __init__(self, task: Task, folder: Path, record: dg.RunRecord) -> None:
        self._stage, self._options = task.stages[-1], task.spec.task.logging
        self._run, self._counts, self._began = record.dagster_run, Counter[str](), time.monotonic()
        self._log = log_of(folder, record)
        self._details = log_of(folder, record, "batch_details", ".jsonl")
        self._stats = log_of(folder, record, "final_stats", ".json")
        with explained(folder, StoreError):
            folder.mkdir(parents=True, exist_ok=True)
            self._log.touch()

    def hear(self, entry: dg.EventLogEntry) -> None:
        line, event, levels = told(entry, self._run), entry.dagster_event, _LEVELS
        if line and levels[line["level"]] >= levels[self._options.level]:
            _append(self._log, f"{' | '.join(line.values())}\n".encode())
        if event is None:
            return
        if isinstance(event.event_specific_data, dg.AssetCheckEvaluation):
            self._counts["red"] += line is not None and line["level"] == "ERROR"
        elif event.is_step_materialization or event.is_asset_observation:
            if event.asset_key == asset_key(self._stage):
                self._add(event.partition or "")
        elif event.is_job_event and self._counts.total():
            write_bytes(self._stats, dumps(self._numbers()))

    def _add(self, key: str) -> None:
        """How each row of a file ended."""
        made, (job, _), lines = self._stage.latest(key), job_of(self._run), list[bytes]()
        assert made is not None
        self._counts["made"] += made.accepted
        file = Published(self._stage, key, made)
        for index, item in file.items():
            failure = file.failure_of(item)
            status = "success" if failure is None else "error"
            self._counts[status] += 1
            row: Row = {"timestamp": told_at(time.time()), "job_index": job, "file": file.name}
            row |= {"item_id": file.identity(index, item), "status": status}
            row["score"] = item.get("score") if isinstance(item, dict) and file.is_table else None
            row |= {"fail_reason": failure and failure.reason, "run": self._run.run_id[:SHORT]}
            lines.append(dumps(row) + b"\n")
            if len(lines) == self._options.batch_size or index + 1 == made.rows:
                _append(self._details, b"".join(lines))
                lines.clear()

    def _numbers(self) -> Row:
        (job, jobs), count = job_of(self._run), self._counts
        rows, seconds = count["success"] + count["error"], time.monotonic() - self._began
        stats: Row = {"total_files": count["made"] + count["red"], "processed_files": count["made"]}
        stats |= {"failed_files": count["red"], "total_items": rows, "processed_items": rows}
        stats |= {"success_items": count["success"], "failed_items": count["error"]}
        stats["elapsed_time"] = round(seconds, 3)
        stats["success_rate"] = round(100 * count["success"] / rows, 2) if rows else 0.0
        stats["processing_speed"] = round(60 * rows / seconds, 1)
        told: Row = {"task_name": self._stage.spec.name, "job_index": job, "world_size": jobs}
        told |= {"completion_time": told_at(time.time()), "run": self._run.run_id[:SHORT]}
        return {**told, "stats": stats}


def _append(path: Path, data: bytes) -> None:
    """At once: others may append to it too."""
    with explained(path, StoreError), path.open("ab", buffering=0) as file:
        file.write(data)


def runs_of(
    instance: dg.DagsterInstance, specs: Sequence[TaskSpec]
) -> Iterator[tuple[TaskSpec, dg.RunRecord]]:
    """The last ones, the newest first."""
    by_key = {spec.key: spec for spec in specs}
    for record in instance.get_run_records(limit=_RUNS):
        for key in by_key.keys() & tasks_of(record.dagster_run):
            yield by_key[key], record


def shown(spec: TaskSpec, record: dg.RunRecord) -> dict[str, str]:
    """A run in a table."""
    run, path = record.dagster_run, spec.log_folder and log_of(spec.log_folder, record)
    return {
        "task": spec.name,
        "run": run.run_id[:SHORT],
        "begun": told_at(record.create_timestamp.timestamp()),
        "ended": ENDED.get(run.status, "not yet"),
        "log_file": shown_path(path, spec.root) if path and path.exists() else "",
    }
