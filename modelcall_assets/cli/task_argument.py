"""The TASK.yaml argument that most commands take."""

from __future__ import annotations

from pathlib import Path

import click

from modelcall_assets.cli.display import echo
from modelcall_assets.config.catalog import find_root, load_linked
from modelcall_assets.steps.distillation_steps import steps_of
from modelcall_assets.steps.task_steps import TaskSteps

task_argument = click.argument(
    "task", metavar="TASK.yaml", type=click.Path(exists=True, dir_okay=False, path_type=Path)
)


def task_steps(task: Path) -> TaskSteps:
    """Loads the task; its warnings go to standard error. SetupError when it is wrong."""
    spec = load_linked(task, find_root(task.resolve().parent))
    for warning in spec.warnings:
        echo(f"warning: {warning}", err=True)
    return steps_of(spec)
