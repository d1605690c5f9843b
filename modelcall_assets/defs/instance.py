"""The Dagster instance of a project: DAGSTER_HOME, else `<root>/dagster_home`."""

import os
from pathlib import Path

import dagster as dg

from modelcall_assets.defs.home import whole_home
from modelcall_assets.errors import Problem, SetupError
from modelcall_assets.storage.files import write_bytes

HOME = "dagster_home"
SETTINGS = Path(__file__).with_name("dagster.yaml")


def open_instance(root: Path) -> dg.DagsterInstance:
    """The instance the UI shows. A new home gets the settings that come with the package.
    SetupError when there can be none."""
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
    with whole_home(home.resolve()):
        return dg.DagsterInstance.get()


def mend_own_home() -> None:
    """Of the DAGSTER_HOME that this process was started with, if it may be written to."""
    home = Path(os.environ.get("DAGSTER_HOME") or os.devnull)
    if home.is_dir() and os.access(home, os.W_OK):
        with whole_home(home):
            pass
