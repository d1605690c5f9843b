"""The Dagster instance of a project: DAGSTER_HOME, else `<root>/dagster_home`, made whole."""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import dagster as dg
from dagster._core.instance.ref import InstanceRef
from dagster._core.storage.sqlite import LAST_KNOWN_STAMPED_SQLITE_ALEMBIC_REVISION
from dagster._core.storage.sqlite_storage import DagsterSqliteStorage
from sqlalchemy.exc import DatabaseError

from modelcall_assets.errors import Problem, SetupError, StoreError
from modelcall_assets.storage.files import BUSY_S, write_ahead, write_bytes
from modelcall_assets.storage.publishing import claimed

_LOCK, _WHOLE = ".home.lock", ".home.whole"
_DATABASES = ("history/runs.db", "history/runs/index.db", "schedules/schedules.db")
_OF_THE_SCHEMA = {"alembic_version", "secondary_indexes", "instance_info"}
"""Tables that tell of the database, not of runs."""


@contextmanager
def whole_home(home: Path) -> Iterator[None]:
    """For the block this process alone opens the home, and its databases are whole: what is missing
    of them was added, in one transaction each. Other storages than SQLite's are left alone."""
    base = _sqlite_folder(home)
    if base is None:
        yield
        return
    with claimed(home / _LOCK):
        is_whole = (home / _WHOLE).exists() and all(map(_is_there, _paths(base)))
        had_data = not is_whole and _complete(base)
        yield
        if had_data:
            with dg.DagsterInstance.from_config(str(home)) as instance:
                instance.run_storage.migrate()
                instance.reindex()
        if not is_whole:
            (home / _WHOLE).write_text(dg.__version__)


def _sqlite_folder(home: Path) -> Path | None:
    """Below which Dagster keeps its databases, if they are SQLite's."""
    storage = InstanceRef.from_dir(str(home)).storage_data
    if storage is None or storage.class_name != DagsterSqliteStorage.__name__:
        return None
    return Path(storage.config_dict["base_dir"])


def _paths(base: Path) -> list[Path]:
    return [base / name for name in _DATABASES]


def _is_there(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def _complete(base: Path) -> bool:
    """Whether one that lacked something had runs, events or ticks in it."""
    with TemporaryDirectory() as folder:
        DagsterSqliteStorage(folder).dispose()
        pairs = zip(_paths(base), _paths(Path(folder)), strict=True)
        had_data = [_completed_with_data(path, fresh) for path, fresh in pairs]
    return any(had_data)


def _completed_with_data(path: Path, fresh: Path) -> bool:
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


HOME = "dagster_home"
SETTINGS = Path(__file__).with_name("dagster.yaml")


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
