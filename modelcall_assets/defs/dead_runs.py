"""Runs whose process was killed. Dagster's own launcher does not look after them: they would stay
"started" for ever, keep their pool slots, and hold up every later run of the task.

Every process that runs assets holds a file lock for its lifetime; the lock goes with it, however it
ends, so a run whose lock can be taken is dead.
"""

import atexit
import fcntl
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from threading import Event, Thread
from uuid import uuid4

import dagster as dg
from dagster._core.events import DagsterEvent
from dagster._core.execution.context.system import PlanOrchestrationContext
from dagster._core.execution.plan.plan import ExecutionPlan
from dagster._core.execution.retries import RetryMode
from dagster._core.executor.in_process import InProcessExecutor
from sqlalchemy.exc import DatabaseError

PROCESS_TAG = "modelcall/process"
LOOK_EVERY_S = 5.0
_UNFINISHED = [
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]


@contextmanager
def process_lock(instance: dg.DagsterInstance, name: str = "") -> Iterator[str]:
    """Yields the value of PROCESS_TAG for the runs of this process."""
    name = name or uuid4().hex
    path = _folder(instance) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield f"{socket.gethostname()}/{name}"
        finally:
            path.unlink(missing_ok=True)


class _LockedExecutor(InProcessExecutor):
    def execute(
        self, plan_context: PlanOrchestrationContext, execution_plan: ExecutionPlan
    ) -> Iterator[DagsterEvent]:
        instance, run_id = plan_context.instance, plan_context.run_id
        # Not only while steps run: the run is not finished before its process says so.
        lifetime = ExitStack()
        atexit.register(lifetime.close)
        process = lifetime.enter_context(process_lock(instance, run_id))
        instance.add_run_tags(run_id, {PROCESS_TAG: process})
        yield from super().execute(plan_context, execution_plan)


@dg.executor(name="in_process")
def locked_executor(_: dg.InitExecutorContext) -> dg.Executor:
    """All steps of a run in the process of the run, which can be told to be alive or dead."""
    return _LockedExecutor(retries=RetryMode.DISABLED)


@contextmanager
def dead_runs_ended(instance: dg.DagsterInstance) -> Iterator[None]:
    """`end_dead_runs` now, and again and again meanwhile: a run may be killed while others wait
    for its slot."""
    end_dead_runs(instance)
    is_over = Event()

    def watch() -> None:
        while not is_over.wait(LOOK_EVERY_S):
            with suppress(DatabaseError):  # busy: the next look will do; damaged: the run tells it
                end_dead_runs(instance)

    thread = Thread(target=watch, name="dead runs", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def end_dead_runs(instance: dg.DagsterInstance) -> list[str]:
    """Mark runs of killed processes as failed and free their slots; gives their ids. Whoever did
    that may have been killed in between, so that a run which has ended may have slots too."""
    ended: list[str] = []
    runs = instance.get_runs(filters=dg.RunsFilter(statuses=_UNFINISHED))
    holders = _runs_with_slots(instance).difference(run.run_id for run in runs)
    if holders:
        runs = [*runs, *instance.get_runs(filters=dg.RunsFilter(run_ids=[*holders]))]
    for run in filter(partial(_is_dead, instance), runs):
        now = instance.get_run_by_id(run.run_id)  # it may have ended well since it was listed
        if now is not None and not now.is_finished:
            instance.report_run_failed(now, "The process of this run was killed.")
            ended.append(run.run_id)
        instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)
    return ended


def _runs_with_slots(instance: dg.DagsterInstance) -> set[str]:
    """Those that hold one of a pool, or wait for one."""
    storage = instance.event_log_storage
    pools = storage.get_concurrency_infos([*storage.get_concurrency_keys()]).values()
    return {each.run_id for pool in pools for each in (*pool.claimed_slots, *pool.pending_steps)}


def _is_dead(instance: dg.DagsterInstance, run: dg.DagsterRun) -> bool:
    """Only of runs on this machine that have told their process."""
    host, _, name = run.tags.get(PROCESS_TAG, "").rpartition("/")
    if not name or host not in ("", socket.gethostname()):
        return False
    # Dagster copies tags to a run that is launched again from the UI: they tell of another process.
    is_own = run.parent_run_id is None or name == run.run_id
    return is_own and _is_free(_folder(instance) / name)


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
