"""The Dagster instance of a project: its home, DAGSTER_HOME or else `<root>/dagster_home`, made
whole; and what it keeps of a stage: key, partitions, versions.

Versions and provenance make the UI say "unsynced", and only that. Dagster sets provenance on
results that a body yields, not on logged materialisations; these tags are the ones it would set.
`tests/test_assets.py` checks both ways against the installed release.
"""

import hashlib
import os
import socket
import sqlite3
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from itertools import groupby, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import dagster as dg
from dagster._core.definitions.asset_checks.asset_check_evaluation import (
    AssetCheckEvaluationTargetMaterializationData,
)
from dagster._core.execution.backfill import PartitionBackfill
from dagster._core.instance.ref import InstanceRef
from dagster._core.storage import tags as its_tags
from dagster._core.storage.partition_status_cache import AssetPartitionStatus
from dagster._core.storage.sqlite import LAST_KNOWN_STAMPED_SQLITE_ALEMBIC_REVISION
from dagster._core.storage.sqlite_storage import DagsterSqliteStorage
from sqlalchemy.exc import DatabaseError, IntegrityError

from modelcall_assets.defs.storage import KeptSqliteStorage
from modelcall_assets.errors import Problem, SetupError, StoreError
from modelcall_assets.stages import Stage
from modelcall_assets.stages.task import Keys, Task
from modelcall_assets.storage.files import BUSY_S, write_ahead, write_bytes
from modelcall_assets.storage.publishing import claimed

HOME = "dagster_home"
SETTINGS = Path(__file__).with_name("dagster.yaml")
_LOCK, _WHOLE = ".home.lock", ".home.whole"
_DATABASES = ("history/runs.db", "history/runs/index.db", "schedules/schedules.db")
_OF_THE_SCHEMA = {"alembic_version", "secondary_indexes", "instance_info"}
"""Tables that tell of the database, not of runs."""
HOST = socket.gethostname()
TASK_TAG = "modelcall/task"
"""Of runs and backfills: the key of their task."""
GREEN, IN_PROGRESS = AssetPartitionStatus.MATERIALIZED, AssetPartitionStatus.IN_PROGRESS
RED = AssetPartitionStatus.FAILED
_CODE, _DATA = "dagster/code_version", "dagster/data_version"


@contextmanager
def whole_home(home: Path) -> Iterator[None]:
    """For the block this process alone opens the home, and its databases are whole: what is missing
    of them was added, in one transaction each. Other storages than SQLite's are left alone."""
    storage = InstanceRef.from_dir(str(home)).storage_data
    ours = DagsterSqliteStorage.__name__, KeptSqliteStorage.__name__
    if storage is None or storage.class_name not in ours:
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
        raise StoreError(unusable(home, error)) from error


def unusable(home: Path | str, error: Exception) -> str:
    why = getattr(error, "orig", None) or error
    return (
        f"{home}: a database of Dagster in it cannot be used ({why}); make room if the disk is "
        "full. If it is damaged, move the folder away: what is made is made again, at no cost, "
        "from the replies in the journals"
    )


def lock_path(instance: dg.DagsterInstance, run_id: str) -> Path:
    """Of the process that runs assets."""
    return Path(instance.root_directory) / "processes" / run_id


def mend_own_home() -> None:
    home = Path(os.environ.get("DAGSTER_HOME") or os.devnull)
    if home.is_dir() and os.access(home, os.W_OK):
        with whole_home(home):
            pass


def partitions_of(keys: Keys) -> dg.DynamicPartitionsDefinition:
    return dg.DynamicPartitionsDefinition(name=keys.name)


FORGOTTEN_AT_ONCE = 500
"""Partitions; Dagster takes 4 ms for each."""


class Registered(NamedTuple):
    """`keys` are those of the first stage, in order; `new` and `gone` count partitions."""

    keys: list[str]
    new: int
    gone: int


def register(instance: dg.DagsterInstance, task: Task) -> Registered:
    """Make every input file, and every merge group, a partition, and take those back that are gone
    and have no result. A set that is another task's is that one's to look after. InputError when
    the input cannot be listed."""
    found: dict[str, list[str]] = {}
    new = gone = 0
    for keys, stages in task.stages_by_keys():
        found[keys.name] = now = keys.now()
        before = add_partitions(instance, keys.name, now)
        new += len(set(now) - before)
        if keys.task is task and (absent := before.difference(now)):
            absent -= keys.every()
            absent -= _held(instance, stages[0], absent)
            some = sorted(absent)[:FORGOTTEN_AT_ONCE]
            gone += len(some)
            for key in some:
                instance.delete_dynamic_partition(keys.name, key)
    return Registered(found[task.stages[0].keys.name], new, gone)


def _held(instance: dg.DagsterInstance, stage: Stage, keys: set[str]) -> set[str]:
    """Of the keys those with a result, or a run that may leave one."""
    made = latest_events(instance, stage, dg.DagsterEventType.ASSET_MATERIALIZATION)
    statuses = statuses_of(instance, stage, [*keys])
    return {key for key in keys if key in made or statuses[key] == IN_PROGRESS}


def add_partitions(instance: dg.DagsterInstance, name: str, keys: Sequence[str]) -> set[str]:
    """Those that are not there yet; gives those that were. Dagster looks and then adds, so that
    another process may have added some in between."""
    while True:
        known = set(instance.get_dynamic_partitions(name))
        new = [key for key in keys if key not in known]
        try:
            if new:
                instance.add_dynamic_partitions(name, new)
        except IntegrityError:
            continue
        return known


def neighbours(
    instance: dg.DagsterInstance, stage: Stage, keys: Collection[str], most: int | None = None
) -> Iterator[list[str]]:
    """The keys in lists of at most `most` that a run can take as a range, in the order in which
    Dagster keeps them."""
    known = instance.get_dynamic_partitions(stage.keys.name) if keys else ()
    for is_wanted, found in groupby(known, {*keys}.__contains__):
        while is_wanted and (together := [*islice(found, most)]):
            yield together


def range_tags(keys: Sequence[str]) -> dict[str, str]:
    """Of a run over neighbouring keys; one of a single key is told it as its partition."""
    names = its_tags.ASSET_PARTITION_RANGE_START_TAG, its_tags.ASSET_PARTITION_RANGE_END_TAG
    return dict(zip(names, (keys[0], keys[-1]), strict=True)) if len(keys) > 1 else {}


def statuses_of(
    instance: dg.DagsterInstance, stage: Stage, keys: Sequence[str]
) -> dict[str, AssetPartitionStatus | None]:
    files = partitions_of(stage.keys)
    found = instance.get_status_by_partition(asset_key(stage), keys, files) or {}
    return {key: found.get(key) for key in keys}


def latest_events(
    instance: dg.DagsterInstance, stage: Stage, kind: dg.DagsterEventType
) -> Mapping[str, int]:
    """By key."""
    return instance.event_log_storage.get_latest_storage_id_by_partition(asset_key(stage), kind)


def asset_key(stage: Stage) -> dg.AssetKey:
    return dg.AssetKey([stage.spec.key, stage.name])


def tasks_of(run: dg.DagsterRun | PartitionBackfill) -> set[str]:
    """The keys of the tasks that it is of; what was chosen in the UI may be of several."""
    chosen = {asset.path[0] for asset in run.asset_selection or ()}
    return {run.tags[TASK_TAG]} if TASK_TAG in run.tags else chosen


def provenance_tags(
    instance: dg.DagsterInstance, stage: Stage, key: str, data_version: str
) -> dict[str, str]:
    """Tags of a materialisation that is logged instead of yielded. What gathers was made of all
    that there were at its input's latest event."""
    tags = {_DATA: data_version, f"{_DATA}_is_user_provided": "true", _CODE: stage.code_version}
    if stage.upstream is None:
        return tags
    asset, partition = asset_key(stage.upstream), None if stage.gathers else key
    record = instance.get_latest_data_version_record(asset, partition_key=partition)
    name, made = asset.to_user_string(), record and record.event_log_entry.tags
    tags[f"dagster/input_data_version/{name}"] = _as_input(made)
    tags[f"dagster/input_event_pointer/{name}"] = str(record.storage_id) if record else "NULL"
    return tags


def latest_result(
    instance: dg.DagsterInstance, stage: Stage, partition: str | None
) -> AssetCheckEvaluationTargetMaterializationData | None:
    """What a check that is logged now is of."""
    partitions = None if partition is None else [partition]
    wanted = dg.AssetRecordsFilter(asset_key(stage), partitions)
    found = instance.fetch_materializations(wanted, limit=1).records
    if not found:
        return None
    record = found[0]
    return AssetCheckEvaluationTargetMaterializationData(
        storage_id=record.storage_id, run_id=record.run_id, timestamp=record.timestamp
    )


def knows_of(instance: dg.DagsterInstance, stage: Stage, key: str, data_version: str) -> bool:
    """Whether the latest materialisation of a partition is of that result."""
    return _latest_tags(instance, stage, key).get(_DATA) == data_version


def is_stale(instance: dg.DagsterInstance, stage: Stage, key: str) -> bool:
    """Whether a materialised partition was made by other code or from other upstream content."""
    made = _latest_tags(instance, stage, key)
    if made.get(_CODE) != stage.code_version:
        return True
    if stage.upstream is None or stage.gathers:
        return stage.members_changed(key)
    used = made.get(f"dagster/input_data_version/{asset_key(stage.upstream).to_user_string()}")
    return used != _as_input(_latest_tags(instance, stage.upstream, key))


def _as_input(tags: Mapping[str, str] | None) -> str:
    """The upstream version as Dagster notes it: a digest over those of the partitions read, here
    one, or none when somebody only reported the materialisation."""
    return hashlib.sha256((tags or {}).get(_DATA, "").encode()).hexdigest()


def _latest_tags(instance: dg.DagsterInstance, stage: Stage, key: str) -> Mapping[str, str]:
    record = instance.get_latest_data_version_record(asset_key(stage), partition_key=key)
    return (record.event_log_entry.tags or {}) if record is not None else {}
