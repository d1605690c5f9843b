"""Arguments and options that commands share."""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from modelcall_assets.cli.terminal import echo
from modelcall_assets.config.catalog import find_root, load_linked, named_tasks
from modelcall_assets.config.places import is_file, is_within
from modelcall_assets.errors import Problem, SetupError, did_you_mean
from modelcall_assets.records.outcome import Reason
from modelcall_assets.stages import Stage
from modelcall_assets.stages.selection import check_columns
from modelcall_assets.stages.source import Published, published_files
from modelcall_assets.stages.task import Task
from modelcall_assets.storage.listing import exists
from modelcall_assets.storage.places import Place
from modelcall_assets.transforms import Where


def misuse(
    option: str, wrong: str, expected: str = "", have: str = "", fix: str = ""
) -> click.UsageError:
    """Of an option or argument of the command that runs."""
    return click.UsageError(str(Problem(option, "", wrong, expected, have, fix)))


EXISTING_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


class TaskFile(click.Path):
    """The path of a file, or the name of a task of the project; of a result also of a folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        if is_file(value) or (self.dir_okay and Path(value).is_dir()):
            return Path(value)
        known = named_tasks(find_root(Path.cwd()))
        if value not in known:
            fix = f"{did_you_mean(value, known)} `modelcall tasks` lists them".strip()
            raise misuse("TASK", "no such file, and no task of that name", have=value, fix=fix)
        return known[value]

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        names = list[str]()
        with suppress(SetupError):  # there is no project: files are left
            names += named_tasks(find_root(Path.cwd()))
        items = [CompletionItem(name) for name in names if name.startswith(incomplete)]
        return items or super().shell_complete(ctx, param, incomplete)


TASK = TaskFile(dir_okay=False)
NEW_FILE = click.Path(dir_okay=False, path_type=Path)

force_option = click.option("--force", is_flag=True, help="Replace files that are there.")


def refuse_existing(places: Iterable[Place], force: bool, option: str = "--output") -> None:
    """UsageError when one of them is there, unless `force` says so: it may be anybody's."""
    if not force and (taken := next(filter(exists, places), None)) is not None:
        fix = "choose another place, or add --force to replace what is there"
        raise misuse(option, f"{taken} is there already", fix=fix)


stage_option = click.option("--stage", help="An asset of the task; default: its last one.")

file_option = click.option(
    "--file",
    "pattern",
    metavar="GLOB",
    help="Only input files whose path or name matches; /x.jsonl is not also sub/x.jsonl.",
)

rejected_option = click.option(
    "--rejected",
    is_flag=True,
    help="Of files whose latest result was rejected that one, not what was accepted before.",
)


def _known(_context: click.Context, _option: click.Parameter, reason: str | None) -> str | None:
    if reason is not None and reason not in list(Reason):
        fix = did_you_mean(reason, Reason)
        raise misuse("--reason", "unknown", ", ".join(Reason), reason, fix)
    return reason


reason_option = click.option(
    "--reason", callback=_known, help="Only rows that failed for this reason."
)

where_option = click.option(
    "--where",
    "condition",
    metavar="'COLUMN OP VALUE'",
    help="Only rows of which this is true, such as 'score >= 4 and language = python'.",
)

split_option = click.option(
    "--split",
    "share",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Put this share of the rows in validation, the others in train, by record id.",
)


def refuse_own(folder: Place, tasks: Iterable[Task], option: str) -> None:
    """UsageError when a task reads what is there, or has published it."""
    for taken in (str(stage.folder) for task in tasks for stage in task.stages):
        if is_within(str(folder), taken):
            wrong = "the folder is one of the task's own"
            raise misuse(option, wrong, have=taken, fix="choose another")


def chosen_files(stage: Stage, pattern: str | None, *, rejected: bool) -> list[Published]:
    """What `published_files` gives; rejected results are named on standard error."""
    files = published_files(stage, pattern, rejected=rejected)
    for file in files:
        if not file.manifest.accepted:
            echo(f"warning: {file.name}: rejected, {file.manifest.why_rejected}", err=True)
    return files


def stage_of(task: Task, name: str | None) -> Stage:
    """The stage of that name, else the last one."""
    names = [stage.name for stage in task.stages]
    if name is not None and name not in names:
        wrong, expected = f"{task.spec.name} has no such asset", ", ".join(names)
        raise misuse("--stage", wrong, expected, name, did_you_mean(name, names))
    return task.stages[-1] if name is None else task.stage(name)


def parsed_where(condition: str | None, files: Sequence[Published] = ()) -> Where | None:
    """UsageError when the condition cannot be read, SetupError when it names a column that no row
    of the files has."""
    if condition is None:
        return None
    try:
        where = Where.parse(condition)
    except ValueError as error:
        raise misuse("--where", str(error), Where.expected, condition) from None
    check_columns(where.columns, files, "--where")
    return where


def _loaded(context: click.Context, _: click.Parameter, path: Path | None) -> Task | None:
    return None if path is None or context.resilient_parsing else load(path)


task_argument = click.argument("task", metavar="TASK", type=TASK, callback=_loaded)

any_task_argument = click.argument(
    "task", metavar="[TASK]", type=TASK, callback=_loaded, required=False
)


def load(task: Path) -> Task:
    """Loads the task; its warnings go to standard error. SetupError when it is wrong."""
    spec = load_linked(task, find_root(task.resolve().parent))
    for warning in spec.warnings:
        echo(f"warning: {warning}", err=True)
    return Task(spec)
