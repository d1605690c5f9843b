"""The TASK.yaml argument that most commands take."""

from __future__ import annotations

from pathlib import Path

import click

from modelcall_assets.cli.display import echo
from modelcall_assets.config.catalog import find_root, load_linked
from modelcall_assets.stages.task import Task

task_argument = click.argument(
    "task", metavar="TASK.yaml", type=click.Path(exists=True, dir_okay=False, path_type=Path)
)


def load(task: Path) -> Task:
    """Loads the task; its warnings go to standard error. SetupError when it is wrong."""
    spec = load_linked(task, find_root(task.resolve().parent))
    for warning in spec.warnings:
        echo(f"warning: {warning}", err=True)
    return Task(spec)
