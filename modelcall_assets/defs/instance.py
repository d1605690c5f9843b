"""The Dagster instance of a project: DAGSTER_HOME, else `<root>/dagster_home`, made whole; and what
has to happen in it now and then: each task's pool gets its slots, and runs whose process was killed
are ended. Dagster's own launcher does not look after those: they would stay "started" for ever,
keep their pool slots, and hold up every later run of the task.

Every process that runs assets holds a file lock for its lifetime; the lock goes with it, however it
ends, so a run whose lock can be taken is dead.
"""

import atexit
import fcntl
import os
import socket
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Thread
from uuid import uuid4

import dagster as dg
from dagster._core.events import DagsterEvent
from dagster._core.execution.context.system import PlanOrchestrationContext
from dagster._core.execution.plan.plan import ExecutionPlan
from dagster._core.execution.retries import RetryMode
from dagster._core.executor.in_process import InProcessExecutor
from dagster._core.instance.ref import InstanceRef
from dagster._core.storage.sqlite import LAST_KNOWN_STAMPED_SQLITE_ALEMBIC_REVISION
from dagster._core.storage.sqlite_storage import DagsterSqliteStorage
from sqlalchemy.exc import DatabaseError

from modelcall_assets.config.spec import TaskSpec
from modelcall_assets.errors import Problem, SetupError, StoreError
from modelcall_assets.storage.files import BUSY_S, write_ahead, write_bytes
from modelcall_assets.storage.publishing import claimed

HOME = "dagster_home"
SETTINGS = Path(__file__).with_name("dagster.yaml")
_LOCK, _WHOLE = ".home.lock", ".home.whole"
_DATABASES = ("history/runs.db", "history/runs/index.db", "schedules/schedules.db")
_OF_THE_SCHEMA = {"alembic_version", "secondary_indexes", "instance_info"}
"""Tables that tell of the database, not of runs."""


@contextmanager
def whole_home(home: Path) -> Iterator[None]:
    """For the block this process alone opens the home, and its databases are whole: what is missing
    of them was added, in one transaction each. Other storages than SQLite's are left alone."""
    storage = InstanceRef.from_dir(str(home)).storage_data
    if storage is None or storage.class_name != DagsterSqliteStorage.__name__:
        yield
        return
    base = Path(storage.config_dict["base_dir"])
    with claimed(home / _LOCK):
        paths = [base / name for name in _DATABASES]
        is_there = (path.exists() and path.stat().st_size > 0 for path in paths)
        is_whole = (home / _WHOLE).exists() and all(is_there)
        had_data = False
        if not is_whole:
            with TemporaryDirectory() as fresh:
                DagsterSqliteStorage(fresh).dispose()
                completed = [_complete(base / name, Path(fresh, name)) for name in _DATABASES]
            had_data = any(completed)
        yield
        if had_data:
            with dg.DagsterInstance.from_config(str(home)) as instance:
                instance.run_storage.migrate()
                instance.reindex()
        if not is_whole:
            (home / _WHOLE).write_text(dg.__version__)


def _complete(path: Path, fresh: Path) -> bool:
    """Whether it lacked something and had runs, events or ticks in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(path, timeout=BUSY_S, isolation_level=None)) as db:
        write_ahead(db)
        db.execute("ATTACH ? AS fresh", (str(fresh),))
        db.execute("BEGIN IMMEDIATE")
        if not _is_of_this_version(db):
            db.execute("ROLLBACK")
            return False
        had_data = any(_rows(db, name) for name in _tables(db) if name not in _OF_THE_SCHEMA)
        known = {name for (name,) in db.execute("SELECT name FROM main.sqlite_master")}
        made = "SELECT name, sql FROM fresh.sqlite_master WHERE sql IS NOT NULL ORDER BY type DESC"
        for name, sql in db.execute(made).fetchall():
            if name not in known and not name.startswith("sqlite_"):
                db.execute(sql)
        db.execute("DELETE FROM main.alembic_version")
        for name in _OF_THE_SCHEMA.intersection(_tables(db)):
            if not _rows(db, name) and not (had_data and name == "secondary_indexes"):
                db.execute(f"INSERT INTO main.{name} SELECT * FROM fresh.{name}")
        db.execute("COMMIT")
    return had_data


def _is_of_this_version(db: sqlite3.Connection) -> bool:
    """Whether what is there is what this version of Dagster makes; another one's is for `dagster
    instance migrate`. Processes that made a database together may have stamped it twice."""
    stamps, tables = set[str](), _tables(db)
    if "alembic_version" in tables:
        stamps = {stamp for (stamp,) in db.execute("SELECT version_num FROM main.alembic_version")}
    (head,) = db.execute("SELECT version_num FROM fresh.alembic_version").fetchone()
    return stamps <= {head, LAST_KNOWN_STAMPED_SQLITE_ALEMBIC_REVISION} and all(
        _columns(db, "main", name) >= _columns(db, "fresh", name) for name in tables
    )


def _tables(db: sqlite3.Connection) -> list[str]:
    names = db.execute("SELECT name FROM main.sqlite_master WHERE type = 'table'")
    return [name for (name,) in names if not name.startswith("sqlite_")]


def _rows(db: sqlite3.Connection, table: str) -> bool:
    return db.execute(f'SELECT 1 FROM main."{table}" LIMIT 1').fetchone() is not None


def _columns(db: sqlite3.Connection, schema: str, table: str) -> set[str]:
    return {row[1] for row in db.execute(f'PRAGMA {schema}.table_info("{table}")')}


def open_instance(root: Path) -> dg.DagsterInstance:
    """The instance the UI shows. A new home gets the settings that come with the package.
    SetupError when there can be none, StoreError when its databases cannot be used."""
    home = Path(os.environ.get("DAGSTER_HOME") or root / HOME)
    try:
        home.mkdir(parents=True, exist_ok=True)
        why = "" if os.access(home, os.W_OK | os.X_OK) else "it cannot be written to"
    except OSError as error:
        why = error.strerror or str(error)
    if why:
        wrong, fix = f"Dagster cannot keep its runs there: {why}", "name another folder"
        have = str(home)
        raise SetupError([Problem("environment", "DAGSTER_HOME", wrong, "a folder", have, fix)])
    if not (home / SETTINGS.name).exists():
        write_bytes(home / SETTINGS.name, SETTINGS.read_bytes())
    os.environ["DAGSTER_HOME"] = str(home.resolve())
    try:
        with whole_home(home.resolve()):
            instance = dg.DagsterInstance.get()
            instance.get_dynamic_partitions(HOME)  # that of events is opened when it is first asked
            return instance
    except (sqlite3.DatabaseError, DatabaseError) as error:
        why = getattr(error, "orig", None) or error
        raise StoreError(
            f"{home}: a database of Dagster in it cannot be used ({why}); make room if the disk is "
            "full. If it is damaged, move the folder away: what is made is made again, at no cost, "
            "from the replies in the journals"
        ) from error


def mend_own_home() -> None:
    """Of the DAGSTER_HOME that this process was started with, if it may be written to."""
    home = Path(os.environ.get("DAGSTER_HOME") or os.devnull)
    if home.is_dir() and os.access(home, os.W_OK):
        with whole_home(home):
            pass


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
    path = _lock_path(instance, name)
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
    if not name or host not in ("", socket.gethostname()):
        return False
    # Dagster copies tags to a run that is launched again from the UI: they tell of another process.
    if run.parent_run_id is not None and name != run.run_id:
        return False
    path = _lock_path(instance, name)
    try:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False
    path.unlink(missing_ok=True)
    return True


def _lock_path(instance: dg.DagsterInstance, name: str) -> Path:
    return Path(instance.root_directory) / "processes" / name


def housekeeping_sensor(specs: Sequence[TaskSpec]) -> dg.SensorDefinition:
    """Ends dead runs, and gives each task's pool its slots. The pool, called by the task's key,
    limits how many runs of a task score at a time; an endpoint's own limits are kept by the engines
    that share it."""
    wanted = {spec.key: spec.task.concurrency.max_concurrent_files for spec in specs}

    @dg.sensor(
        name="housekeeping",
        description="Ends runs whose process was killed, so that they hold nothing up, and lets "
        "as many runs of a task go on at a time as its max_concurrent_files says.",
        minimum_interval_seconds=30,
        default_status=dg.DefaultSensorStatus.RUNNING,
    )
    def sensor(context: dg.SensorEvaluationContext) -> dg.SkipReason:
        done = [f"ended dead run {run_id}" for run_id in end_dead_runs(context.instance)]
        storage = context.instance.event_log_storage
        limits = {
            pool.name: pool.limit for pool in storage.get_pool_limits() if not pool.from_default
        }
        for name, slots in wanted.items():
            if limits.get(name) != slots:
                storage.set_concurrency_slots(name, slots)
                done.append(f"pool {name}: {slots} slots")
        return dg.SkipReason("; ".join(done) or "nothing to do")

    return sensor
