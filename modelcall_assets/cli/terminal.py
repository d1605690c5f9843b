"""What commands share: text for the terminal, how a run shows itself, options that choose files."""

import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from modelcall_assets.config.block import did_you_mean
from modelcall_assets.config.catalog import find_root, load_linked
from modelcall_assets.errors import Problem
from modelcall_assets.stages.export import check_columns
from modelcall_assets.stages.report import Tally, Watcher
from modelcall_assets.stages.source import Published, published_files
from modelcall_assets.stages.stage import Stage
from modelcall_assets.stages.task import Task
from modelcall_assets.storage.listing import exists
from modelcall_assets.storage.places import Place
from modelcall_assets.transforms.values import Where

TERMINAL_EVERY_S = 0.25
_CONTROLS = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""All but the tab and the line feed; what turns the direction of text; halves of characters."""


def shown(text: str) -> str:
    """With escapes such as `\\x1b` where the text would steer the terminal."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def echo(text: str, *, err: bool = False, **style: Any) -> None:
    """A line; `style` is `click.style`'s."""
    click.secho(shown(text), err=err, **style)


def echo_data(text: str) -> None:
    """What is for programs: as it is, unless it goes to a terminal."""
    click.echo(shown(text) if sys.stdout.isatty() else text, nl=False)


def cell(text: str) -> Text:
    return Text(shown(text))


def echo_first(most: int, lines: Sequence[str]) -> None:
    for line in lines[:most]:
        echo(line)
    if len(lines) > most:
        echo(f"… {len(lines) - most:,} more")


def table_of(
    columns: Mapping[str, str],
    rows: Sequence[Sequence[str]],
    most: int | None = None,
    total: Sequence[str] = (),
) -> Table:
    """At most so many of the rows. A column is `left` or `right`, or `fold` where long text goes
    on in another line; the first of those says how many more rows there are."""
    table = Table()
    for name, kind in columns.items():
        justify = "right" if kind == "right" else "left"
        table.add_column(name, justify=justify, overflow="fold" if kind == "fold" else "ellipsis")
    for row in rows[:most]:
        table.add_row(*map(cell, row))
    if (more := len(rows) - len(rows[:most])) > 0:
        before = [*columns.values()].index("fold")
        table.add_row(*[""] * before, f"… {more:,} more")
    if total:
        table.add_section()
        table.add_row(*total)
    return table


class RunDisplay:
    def __init__(self) -> None:
        # Dagster may redirect the standard streams while an asset runs.
        self._stream = os.fdopen(os.dup(sys.stderr.fileno()), "w")
        self._console = Console(file=self._stream)
        self.tallies: dict[int, Tally] = {}
        self._is_terminal = self._console.is_terminal
        of_terminal = {"pauses": (TERMINAL_EVERY_S,)} if self._is_terminal else {}
        self.watcher = Watcher(self._show, **of_terminal)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[detail]}"),
            console=self._console,
            disable=not self._is_terminal,
        )
        self._progress.start()
        self._bar = self._progress.add_task("rows", total=None, detail="")

    def close(self) -> None:
        self._progress.stop()
        self._stream.close()

    def _show(self, tally: Tally) -> None:
        self.tallies[id(tally)] = tally
        if not self._is_terminal:
            self._console.print(tally.line(), highlight=False, soft_wrap=True)
            return
        tallies = [each for each in self.tallies.values() if each.stage == tally.stage]
        self._progress.update(
            self._bar,
            description=tally.stage,
            total=sum(each.rows for each in tallies),
            completed=sum(each.done for each in tallies),
            detail=tally.detail(),
        )


def misuse(
    option: str, wrong: str, expected: str = "", have: str = "", fix: str = ""
) -> click.UsageError:
    """Of an option or argument of the command that runs."""
    return click.UsageError(str(Problem(option, "", wrong, expected, have, fix)))


EXISTING_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
NEW_FILE = click.Path(dir_okay=False, path_type=Path)

force_option = click.option("--force", is_flag=True, help="Replace files that are there.")


def refuse_existing(places: Iterable[Place], force: bool) -> None:
    """UsageError when one of them is there, unless `force` says so: it may be anybody's."""
    if not force and (taken := next(filter(exists, places), None)) is not None:
        fix = "choose another place, or add --force to replace what is there"
        raise misuse("--output", f"{taken} is there already", fix=fix)


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
where_option = click.option(
    "--where",
    "condition",
    metavar="'COLUMN OP VALUE'",
    help="Only rows of which this is true, such as 'score >= 4 and language = python'.",
)


def chosen_files(
    task: Task, stage: str | None, pattern: str | None, *, rejected: bool
) -> list[Published]:
    """What the stage has left, `rejected` results rather than accepted ones or not; rejected files
    are named on standard error."""
    files = published_files(stage_of(task, stage), pattern, rejected=rejected)
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
        expected = "'column op value', joined by 'and'"
        raise misuse("--where", str(error), expected, condition) from None
    check_columns(where, files)
    return where


task_argument = click.argument("task", metavar="TASK.yaml", type=EXISTING_FILE)


def load(task: Path) -> Task:
    """Loads the task; its warnings go to standard error. SetupError when it is wrong."""
    spec = load_linked(task, find_root(task.resolve().parent))
    for warning in spec.warnings:
        echo(f"warning: {warning}", err=True)
    return Task(spec)
