"""Runs: a task's graph run in this process, through the same assets and instance as the UI; and the
end of runs whose process was killed. Dagster's own launcher does not look after those: they would
stay "started" for ever, keep their pool slots, and hold up every later run of the task.

Every process that runs assets holds a file lock for its lifetime, called by its run; the lock goes
with it, however it ends, so a run whose lock can be taken is dead.

`task_job` is one run for all files that are due (`defs.chain`), by `TaskRunner` or the daemon.
"""

import atexit
import fcntl
import json
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread
from uuid import uuid4

import dagster as dg
from dagster._core.events import DagsterEvent, RunFailureReason
from dagster._core.execution.context.system import PlanOrchestrationContext
from dagster._core.execution.plan.objects import StepFailureData
from dagster._core.execution.plan.plan import ExecutionPlan
from dagster._core.execution.retries import RetryMode
from dagster._core.executor.in_process import InProcessExecutor
from dagster._core.remote_origin import RegisteredCodeLocationOrigin, RemoteRepositoryOrigin
from dagster._core.storage.dagster_run import ACTIVE_RUN_STATUSES
from pydantic import Field
from sqlalchemy.exc import DatabaseError

from modelcall_assets.config.spec import TaskSpec
from modelcall_assets.defs.assets import failure
from modelcall_assets.defs.chain import Chain, StageOptions
from modelcall_assets.defs.instance import HOST, TASK_TAG, lock_path, register, tasks_of, unusable
from modelcall_assets.defs.ledger import Ended, events_of
from modelcall_assets.defs.logs import JOB_TAG, job_of, message_of
from modelcall_assets.errors import ModelcallError, PublishedMeanwhile
from modelcall_assets.stages.live import forget
from modelcall_assets.stages.report import Tally, Watcher
from modelcall_assets.stages.task import Task, share_of

PROCESS_TAG = "modelcall/process"
LOOK_EVERY_S, BEATS_S = 5.0, 60.0
OVERVIEWS_EVERY_S = 60.0
_UNFINISHED = [*ACTIVE_RUN_STATUSES, dg.DagsterRunStatus.NOT_STARTED]


@contextmanager
def process_lock(instance: dg.DagsterInstance, task: str, run_id: str) -> Iterator[dict[str, str]]:
    """Of a process that works on a task; yields the tags of its run."""
    path = lock_path(instance, run_id)
    path.parent.mkdir(parents=True, exist_ok=True)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as with `&` in a script
        signal.signal(signal.SIGINT, signal.default_int_handler)  # `stop` sends it
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps({"task": task, "pid": os.getpid(), "host": HOST}))
        file.flush()
        try:
            yield {PROCESS_TAG: f"{HOST}/{run_id}", TASK_TAG: task}
        finally:
            forget(path)


class _LockedExecutor(InProcessExecutor):
    def execute(
        self, plan_context: PlanOrchestrationContext, execution_plan: ExecutionPlan
    ) -> Iterator[DagsterEvent]:
        instance, run_id = plan_context.instance, plan_context.run_id
        # Not only while steps run: the run is not finished before its process says so.
        lifetime = ExitStack()
        atexit.register(lifetime.close)
        task = min(tasks_of(plan_context.dagster_run), default="")
        tags = lifetime.enter_context(process_lock(instance, task, run_id))
        instance.add_run_tags(run_id, tags)
        for event in super().execute(plan_context, execution_plan):
            # The run's own failure repeats the words of a step's, and would repeat its frames.
            data = event.event_specific_data
            if isinstance(data, StepFailureData) and data.error:
                data = data._replace(error=data.error.to_exception_message_only())
            yield event._replace(event_specific_data=data)


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
    runs = [*instance.get_runs(filters=dg.RunsFilter(statuses=_UNFINISHED))]
    storage = instance.event_log_storage
    pools = storage.get_concurrency_infos([*storage.get_concurrency_keys()]).values()
    holders = {each.run_id for pool in pools for each in (*pool.claimed_slots, *pool.pending_steps)}
    holders.difference_update(run.run_id for run in runs)
    if holders:
        runs += instance.get_runs(filters=dg.RunsFilter(run_ids=[*holders]))
    for run in (run for run in runs if _is_dead(instance, run)):
        now = instance.get_run_by_id(run.run_id)  # it may have ended well since it was listed
        if now is not None and not now.is_finished:
            instance.report_run_failed(now, "The process of this run was killed.")
            ended.append(run.run_id)
        storage.free_concurrency_slots_for_run(run.run_id)
    return ended


def _is_dead(instance: dg.DagsterInstance, run: dg.DagsterRun) -> bool:
    """Only of runs on this machine that have told their process."""
    host, _, name = run.tags.get(PROCESS_TAG, "").rpartition("/")
    if not name or host not in ("", HOST):
        return False
    # Dagster copies tags to a run that is launched again from the UI: they tell of another process.
    if run.parent_run_id is not None and name != run.run_id:
        return False
    if is_held(path := lock_path(instance, name)):
        return False
    forget(path)
    return True


def is_held(lock: Path) -> bool:
    with suppress(FileNotFoundError), lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def housekeeping_sensor(specs: Sequence[TaskSpec]) -> dg.SensorDefinition:
    """Ends dead runs, gives each task's pool its slots, registers input files, and keeps summaries
    current. The pool, called by the task's key, limits how many runs of a task score at a time; an
    endpoint's own limits are kept by the engines that share it."""

    @dg.sensor(
        name="housekeeping",
        description="Ends runs whose process was killed, so that they hold nothing up; lets as "
        "many runs of a task go on at a time as its max_concurrent_files says; and makes each "
        "input file a partition, missing until it is materialised; and keeps each task's summary "
        "current. Launches nothing.",
        minimum_interval_seconds=30,
        default_status=dg.DefaultSensorStatus.RUNNING,
    )
    def sensor(context: dg.SensorEvaluationContext) -> dg.SkipReason:
        done = [f"ended dead run {run_id}" for run_id in end_dead_runs(context.instance)]
        storage = context.instance.event_log_storage
        limits = {
            pool.name: pool.limit for pool in storage.get_pool_limits() if not pool.from_default
        }
        for spec in specs:
            slots = spec.task.concurrency.max_concurrent_files
            if limits.get(spec.key) != slots:
                storage.set_concurrency_slots(spec.key, slots)
                done.append(f"pool {spec.key}: {slots} slots")
        waiting, tasks = list[str](), [*map(Task, specs)]
        for task in tasks:
            try:
                found = register(context.instance, task)
            except ModelcallError as error:
                waiting.append(f"{task.spec.name} ({error})")
                continue
            if found.new or found.gone:
                done.append(f"{task.spec.name}: {found.new:,} new files, {found.gone:,} gone")
        if time.time() - float(context.cursor or 0) >= OVERVIEWS_EVERY_S:
            for task in tasks:
                try:
                    noted = note_overviews(context.instance, task)
                except ModelcallError as error:
                    noted = [str(error)]
                done += (f"{task.spec.name}: {each}" for each in noted)
            context.update_cursor(str(time.time()))
        if waiting:
            done.append(f"tasks whose input cannot be listed: {', '.join(waiting)}")
        return dg.SkipReason("; ".join(done) or "nothing to do")

    return sensor


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


class JobOptions(dg.Config):
    """Launchpad options of a task's job; the tag `modelcall/job` says which of how many it is."""

    pattern: str | None = Field(None, description="Only such input files, as in `python/*`.")
    options: StageOptions = Field({}, description="By stage, as in `{scores: {fresh: true}}`.")


def task_job(task: Task, chain: Chain | None = None) -> dg.JobDefinition:
    """Makes what is due, of all files or of the chain's."""
    name = task.spec.key

    @dg.op(name=f"{name}_all_stages", pool=name)
    async def body(context: dg.OpExecutionContext, config: JobOptions) -> None:
        work, instance = chain, context.instance
        try:
            if work is None:
                keys = share_of(register(instance, task).keys, config.pattern, *job_of(context.run))
                work = Chain(task, instance, keys, config.options, None, None)
        except ModelcallError as error:
            raise failure(str(error)) from None
        await work.run(context)

    return dg.GraphDefinition(f"run_{name}", node_defs=[body]).to_job(tags={TASK_TAG: name})


def queue(
    instance: dg.DagsterInstance, task: Task, options: Mapping[str, object], job: str
) -> tuple[str, bool]:
    """Have the daemon run the task's job; gives the run's id, and whether a daemon lives."""
    made, beats = task_job(task), instance.get_daemon_heartbeats().values()
    origin = RemoteRepositoryOrigin(RegisteredCodeLocationOrigin("modelcall"), "__repository__")
    run = instance.create_run_for_job(
        made,
        run_config={"ops": {made.nodes[0].name: {"config": options}}},
        tags={**made.tags, JOB_TAG: job},
        status=dg.DagsterRunStatus.QUEUED,
        remote_job_origin=origin.get_job_origin(made.name),
    )
    return run.run_id, time.time() - max((each.timestamp for each in beats), default=0) < BEATS_S


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
    job: str = "0/1"
    """Which of how many that share the files."""

    def run(
        self,
        keys: Sequence[str],
        options: StageOptions | None = None,
        files: Set[str] | None = None,
    ) -> RunSummary:
        """Ends at once when the endpoint refuses everybody or is down. A group that lacks a member
        says so. A stage with `options` makes all of its partitions anew, or just these `files`."""
        task = self.task
        chain = Chain(task, self.instance, keys, options or {}, files, self.watcher)
        summary, run_id = RunSummary(chain.ran, [], chain.busy, chain.behind), str(uuid4())
        process = process_lock(self.instance, task.spec.key, run_id)
        with process as tags, dead_runs_ended(self.instance):
            if not chain.is_idle():
                summary.failed += self._execute(task_job(task, chain), run_id, tags)
            try:
                note_overviews(self.instance, task)
            except PublishedMeanwhile:
                pass  # by another run, which has seen more
            except ModelcallError as error:
                summary.failed.append(f"the summary of the task: {error}")
            except DatabaseError as error:
                summary.failed.append(unusable(self.instance.root_directory, error))
        return summary

    def _execute(self, job: dg.JobDefinition, run_id: str, tags: Mapping[str, str]) -> list[str]:
        """Gives what failed. KeyboardInterrupt after Ctrl-C or `stop`, which Dagster keeps to
        itself."""
        result = job.execute_in_process(
            instance=self.instance,
            run_id=run_id,
            tags={**tags, JOB_TAG: self.job},
            run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
            raise_on_error=False,
        )
        failures: list[str] = []
        for event in result.all_events:
            if event.event_type == dg.DagsterEventType.RUN_FAILURE:
                reason = event.job_failure_data.failure_reason
                if reason == RunFailureReason.UNEXPECTED_TERMINATION:
                    raise KeyboardInterrupt
            elif event.event_type == dg.DagsterEventType.RUN_CANCELED:
                raise KeyboardInterrupt
            elif event.event_type == dg.DagsterEventType.STEP_FAILURE:
                failures.append(message_of(event.step_failure_data))
        return failures
