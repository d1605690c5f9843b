"""Runs whose process was killed: without a daemon nobody would end them or free their pool slots.

Every process that runs assets itself holds a file lock for its lifetime; the lock goes with it,
however it ends, so a run whose lock can be taken is dead.
"""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import dagster as dg

PROCESS_TAG = "modelcall/process"
_UNFINISHED = [
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]


@contextmanager
def process_lock(instance: dg.DagsterInstance) -> Iterator[str]:
    """Yields the value of PROCESS_TAG for the runs of this process."""
    name = uuid4().hex
    path = _folder(instance) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield name
        finally:
            path.unlink(missing_ok=True)


def end_dead_runs(instance: dg.DagsterInstance) -> list[str]:
    """Mark runs of killed processes as failed and free their slots; gives their ids."""
    ended: list[str] = []
    for run in instance.get_runs(filters=dg.RunsFilter(statuses=_UNFINISHED)):
        # Dagster copies tags to a run that is launched again from the UI: not a run of ours.
        name = run.tags.get(PROCESS_TAG) if run.parent_run_id is None else None
        if name is not None and _is_free(_folder(instance) / name):
            instance.report_run_failed(run, "The process of this run was killed.")
            instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)
            ended.append(run.run_id)
    return ended


def _folder(instance: dg.DagsterInstance) -> Path:
    return Path(instance.root_directory) / "processes"


def _is_free(path: Path) -> bool:
    try:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False
    path.unlink(missing_ok=True)
    return True
