"""The Dagster instance of a project: DAGSTER_HOME, else `<root>/dagster_home`."""

import os
from pathlib import Path

import dagster as dg

from modelcall_assets.defs.home import whole_home
from modelcall_assets.storage.files import write_bytes

HOME = "dagster_home"
SETTINGS = Path(__file__).with_name("dagster.yaml")


def open_instance(root: Path) -> dg.DagsterInstance:
    """The instance the UI shows. A new home gets the settings that come with the package."""
    home = Path(os.environ.get("DAGSTER_HOME") or root / HOME)
    home.mkdir(parents=True, exist_ok=True)
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
