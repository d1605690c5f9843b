"""The options with which commands choose among what a task has published."""

from __future__ import annotations

from collections.abc import Sequence

import click

from modelcall_assets.cli.display import echo
from modelcall_assets.config.block import did_you_mean
from modelcall_assets.errors import Problem, SetupError
from modelcall_assets.stages.export import check_columns
from modelcall_assets.stages.published import Published, published_files
from modelcall_assets.stages.stage import Stage
from modelcall_assets.stages.task import Task
from modelcall_assets.transforms.values import Where

stage_option = click.option("--stage", help="An asset of the task; default: its last one.")
file_option = click.option(
    "--file", "pattern", metavar="GLOB", help="Only input files whose path matches."
)
rejected_option = click.option(
    "--rejected",
    is_flag=True,
    help="Of files whose latest result was rejected that one, not what was accepted before.",
)
where_option = click.option(
    "--where",
    "condition",
    metavar="'COLUMN OP VALUE'",
    help="Only rows of which this is true, such as 'score >= 4 and language = python'.",
)


def chosen_files(
    task: Task, command: str, stage: str | None, pattern: str | None, *, rejected: bool
) -> list[Published]:
    """What the stage has left, `rejected` results rather than accepted ones or not; rejected files
    are named on standard error."""
    files = published_files(stage_of(task, command, stage), pattern, rejected=rejected)
    for file in files:
        if not file.manifest.accepted:
            echo(f"warning: {file.name}: rejected, {file.manifest.why_rejected}", err=True)
    return files


def stage_of(task: Task, command: str, name: str | None) -> Stage:
    """The stage of that name, else the last one."""
    names = [stage.name for stage in task.stages]
    if name is not None and name not in names:
        fix, expected = did_you_mean(name, names), ", ".join(names)
        wrong = f"{task.spec.name} has no such asset"
        raise SetupError([Problem(f"modelcall {command}", "--stage", wrong, expected, name, fix)])
    return task.stages[-1] if name is None else task.stage(name)


def parsed_where(command: str, condition: str | None, files: Sequence[Published]) -> Where | None:
    """SetupError when the condition cannot be read, or names a column that no row has."""
    where = condition_of(command, condition)
    if where is not None:
        check_columns(where, files)
    return where


def condition_of(command: str, condition: str | None) -> Where | None:
    """SetupError when it cannot be read."""
    if condition is None:
        return None
    try:
        return Where.parse(condition)
    except ValueError as error:
        expected = "'column op value', joined by 'and'"
        raise SetupError(
            [Problem(f"modelcall {command}", "--where", str(error), expected, condition)]
        ) from None
