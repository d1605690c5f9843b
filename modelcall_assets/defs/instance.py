"""The Dagster instance of a project: DAGSTER_HOME, else `<root>/dagster_home`."""

import os
import shutil
from pathlib import Path

import dagster as dg

HOME = "dagster_home"
SETTINGS = Path(__file__).with_name("dagster.yaml")


def open_instance(root: Path) -> dg.DagsterInstance:
    """The instance the UI shows. A new home gets the settings that come with the package."""
    home = Path(os.environ.get("DAGSTER_HOME") or root / HOME)
    home.mkdir(parents=True, exist_ok=True)
    if not (home / SETTINGS.name).exists():
        shutil.copyfile(SETTINGS, home / SETTINGS.name)
    os.environ["DAGSTER_HOME"] = str(home.resolve())
    return dg.DagsterInstance.get()
