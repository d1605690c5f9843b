"""The Dagster instance of a project: DAGSTER_HOME, else `<root>/dagster_home`."""

import os
from pathlib import Path

import dagster as dg

HOME = "dagster_home"


def open_instance(root: Path) -> dg.DagsterInstance:
    """The instance the UI shows. Created with Dagster's defaults when there is none yet."""
    home = Path(os.environ.get("DAGSTER_HOME") or root / HOME)
    home.mkdir(parents=True, exist_ok=True)
    os.environ["DAGSTER_HOME"] = str(home.resolve())
    return dg.DagsterInstance.get()
