"""The Dagster instance of a project: DAGSTER_HOME, else `<root>/dagster_home`."""

import os
import sqlite3
from pathlib import Path

import dagster as dg
from sqlalchemy.exc import DatabaseError

from modelcall_assets.defs.home import whole_home
from modelcall_assets.errors import Problem, SetupError, StoreError
from modelcall_assets.storage.files import write_bytes

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
