"""What commands share: text for the terminal, how a run shows itself, options that choose files."""

import os
import re
import sys
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from modelcall_assets.config.catalog import find_root, load_linked
from modelcall_assets.config.places import is_within
from modelcall_assets.errors import Problem, did_you_mean
from modelcall_assets.records import decode_key
from modelcall_assets.records.outcome import Reason, Row
from modelcall_assets.stages import Stage
from modelcall_assets.stages.figures import joined
from modelcall_assets.stages.raw import WARNINGS
from modelcall_assets.stages.report import Tally, Watcher, by_count
from modelcall_assets.stages.selection import check_columns
from modelcall_assets.stages.source import Published, published_files
from modelcall_assets.stages.summary import Results
from modelcall_assets.stages.task import Task
from modelcall_assets.storage.listing import exists
from modelcall_assets.storage.places import Place
from modelcall_assets.transforms import Where

if TYPE_CHECKING:
    from modelcall_assets.defs.runs import RunSummary

TERMINAL_EVERY_S = 0.25
SHOWN_WARNINGS = 20
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
    """Shows a run on standard error until it is closed; `told` says what came of it."""

    def __init__(self) -> None:
        self._started_at, self.seconds = time.monotonic(), 0.0
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
        self.seconds = time.monotonic() - self._started_at

    def told(self, task: Task, keys: Sequence[str], ended: "RunSummary") -> Iterator[str]:
        """The whole selection's state, and what the run that was shown did for it."""
        *before, last = (stage for stage in task.stages if stage.done)
        results = Results(task)
        latest = {stage.name: _latest(results, stage, keys) for stage in task.stages}
        yield _totals(last, latest[last.name], ended.behind)
        yield from _figures(latest[last.name])
        for stage in (*before, last):
            found, is_last = latest[stage.name], stage is last
            flawed = (row is None or row["failed"] or row["dropped"] for row in found.values())
            if not is_last and any(flawed):
                yield f"  {_totals(stage, found)}"
            of = "" if is_last else f"{stage.name} of "
            for key, row in found.items():
                if row and not row["accepted"] and (made := stage.latest(key)):
                    yield f"  rejected: {of}{decode_key(key)}: {made.why_rejected}"
        for key in ended.behind:
            if (row := latest[last.name].get(key)) and row["accepted"]:
                why = "the result of an earlier run, since this one did not make it"
                yield f"  kept: {decode_key(key)}: {why}"
        tallies = self.tallies.values()
        yield from _warnings(task.stages[0], latest[task.stages[0].name])
        yield from (f"  warning: {warning}" for tally in tallies for warning in tally.warnings)
        requests = sum(tally.requests for tally in tallies)
        replayed = sum(tally.replayed for tally in tallies)
        if any(ended.ran.values()):
            for stage in task.stages:
                yield from _adopted(stage, latest[stage.name])
            rate = f" ({requests / self.seconds:,.0f}/s)" if requests else ""
            yield (
                f"{requests:,} requests sent in {self.seconds:.1f} s{rate}, "
                f"{replayed:,} rows answered from the journal"
                if any(stage.asks for stage in task.stages)
                else f"{last.done} in {self.seconds:.1f} s, no model was asked: {last.about}"
            )
        elif ended.failed or ended.busy:
            yield "nothing done, no request was sent"
        else:
            yield "nothing to do: every file is up to date, no request was sent"
        yield f"{last.name}: {last.folder}"

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


task_argument = click.argument(
    "task",
    metavar="TASK.yaml",
    type=EXISTING_FILE,
    callback=lambda context, _, path: None if context.resilient_parsing else load(path),
)


def load(task: Path) -> Task:
    """Loads the task; its warnings go to standard error. SetupError when it is wrong."""
    spec = load_linked(task, find_root(task.resolve().parent))
    for warning in spec.warnings:
        echo(f"warning: {warning}", err=True)
    return Task(spec)


def _latest(results: Results, stage: Stage, keys: Sequence[str]) -> dict[str, Row | None]:
    """The latest results, accepted or not, of the selected keys of the first stage, or of all the
    stage has where these are others."""
    has_others, rows = stage.keys is not stage.task.stages[0].keys, results.rows
    return {
        key: rows.get((stage.name, key, False)) or rows.get((stage.name, key, True))
        for key in (stage.keys.now() if has_others else keys)
    }


def _details(stage: Stage, found: Mapping[str, Row | None]) -> Iterator[tuple[str, dict[str, Any]]]:
    """By key what manifests say beside their numbers, of those that do."""
    for key, row in found.items():
        if row and row["says_more"] and (made := stage.latest(key)):
            yield key, made.detail


def _adopted(stage: Stage, found: Mapping[str, Row | None]) -> Iterator[str]:
    for key, detail in _details(stage, found):
        name = f"{stage.name} of {decode_key(key)}"
        if adopted := detail.get("adopted"):
            torn = adopted["torn"]
            yield (
                f"  adopted: {name}: {adopted['rows']:,} of {adopted['good']:,} good rows; "
                f"{adopted['failed']:,} rows without an answer, {len(torn):,} torn lines"
                + (f", the first: {torn[0]}" if torn else "")
            )
        for aside in detail.get("set_aside", ()):
            yield f"  set aside: {name}: the file that was there is kept as {aside}"


def _warnings(first: Stage, found: Mapping[str, Row | None]) -> list[str]:
    told = [
        f"  warning: {decode_key(key)}: {warning}"
        for key, detail in _details(first, found)
        for warning in detail.get(WARNINGS, ())
    ]
    more = len(told) - SHOWN_WARNINGS
    return told[:SHOWN_WARNINGS] + ([f"  … {more} more warnings"] if more > 0 else [])


def _figures(found: Mapping[str, Row | None]) -> Iterator[str]:
    """Of an evaluation: `accuracy 0.7125 (0.6931 to 0.7312) of 1,319 items`."""
    if (figures := joined(found.values())) is None:
        return
    numbers = figures.numbers()
    items = numbers.pop("items", 0)
    for name, value in numbers.items():
        if name.startswith("items_with_"):
            items = value  # what follows is of these
        elif not name.endswith(("_low", "_high")):
            low, high = numbers.get(f"{name}_low"), numbers.get(f"{name}_high")
            interval = "" if low is None else f" ({low:.4f} to {high:.4f})"
            yield f"  {name} {value:.4f}{interval} of {items:,} items"


def _totals(stage: Stage, found: Mapping[str, Row | None], behind: Collection[str] = ()) -> str:
    made, reasons = [row for row in found.values() if row is not None], Counter[str]()
    rows, ok = sum(row["rows"] for row in made), sum(row["ok"] for row in made)
    for row in made:
        reasons.update(row["failures"])
    behind = {*behind}
    current = (row for key, row in found.items() if key not in behind)
    accepted = sum(row is not None and row["accepted"] for row in current)
    text = f"{accepted} of {len(found)} {stage.keys.what} {stage.done}: {rows:,} rows, "
    text += f"{ok:,} succeeded, {rows - ok:,} failed"
    text += f" ({by_count(reasons)})" if reasons else ""
    dropped = sum(row["dropped"] for row in made)
    return f"{text}, {dropped:,} dropped" if dropped else text
