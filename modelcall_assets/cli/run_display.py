"""How a run shows itself, and what came of it."""

import os
import sys
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Column

from modelcall_assets.records import decode_key
from modelcall_assets.records.outcome import Row, count_of
from modelcall_assets.stages import Stage
from modelcall_assets.stages.figures import joined
from modelcall_assets.stages.live import figures, in_words, line
from modelcall_assets.stages.raw import WARNINGS
from modelcall_assets.stages.report import DROPPED, Tally, Watcher, by_count
from modelcall_assets.stages.summary import Results
from modelcall_assets.stages.task import Task

if TYPE_CHECKING:
    from modelcall_assets.defs.runs import RunSummary

TERMINAL_EVERY_S, PIPE_EVERY_S = 0.5, 5.0

SHOWN = 20


class Bars:
    """On standard error, until they are closed; elsewhere than on a terminal lines."""

    def __init__(self) -> None:
        # Dagster may redirect the standard streams while an asset runs.
        self._stream = os.fdopen(os.dup(sys.stderr.fileno()), "w")
        self._console = Console(file=self._stream)
        self.is_terminal = self._console.is_terminal
        self.every_s = TERMINAL_EVERY_S if self.is_terminal else PIPE_EVERY_S
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[detail]}", markup=False, table_column=Column(overflow="fold")),
            console=self._console,
            disable=not self.is_terminal,
        )
        self._progress.start()
        self._bars: dict[str, TaskID] = {}

    def close(self) -> None:
        self._progress.stop()
        self._stream.close()

    def show(self, name: str, shown: Mapping[str, Any]) -> None:
        if not self.is_terminal:
            self._console.print(line(name, shown), markup=False, highlight=False, soft_wrap=True)
            return
        if name not in self._bars:
            self._bars[name] = self._progress.add_task(name, detail="")
        numbers = {"total": shown["rows"], "completed": shown["done"]}
        self._progress.update(self._bars[name], detail=in_words(shown), **numbers)


class RunDisplay:
    """Shows a run until it is closed; `told` says what came of it."""

    def __init__(self) -> None:
        self._started_at, self.seconds = time.monotonic(), 0.0
        self._bars = Bars()
        self.tallies: dict[str, Tally] = {}
        pauses = {"pauses": (TERMINAL_EVERY_S,)} if self._bars.is_terminal else {}
        self.watcher = Watcher(self._show, **pauses)

    def close(self) -> None:
        self._bars.close()
        self.seconds = time.monotonic() - self._started_at

    def told(self, task: Task, keys: Sequence[str], ended: "RunSummary") -> Iterator[str]:
        """The whole selection's state, and what the run that was shown did for it."""
        *before, last = (stage for stage in task.stages if stage.done)
        results = Results(task)
        latest = {stage.name: results.latest(stage, keys) for stage in task.stages}
        yield _totals(last, latest[last.name], ended.behind)
        yield from _figures(latest[last.name])
        for stage in (*before, last):
            found, is_last = latest[stage.name], stage is last
            flawed = (row is None or row["failed"] or row["dropped"] for row in found.values())
            if not is_last and any(flawed):
                yield f"  {_totals(stage, found)}"
            of = "" if is_last else f"{stage.name} of "
            yield from _first(
                "rejected",
                [
                    f"{of}{decode_key(key)}: {made.why_rejected}"
                    for key, row in found.items()
                    if row and not row["accepted"] and (made := stage.latest(key))
                ],
            )
        for key in ended.behind:
            if (row := latest[last.name].get(key)) and row["accepted"]:
                why = "the result of an earlier run, since this one did not make it"
                yield f"  kept: {decode_key(key)}: {why}"
        tallies = self.tallies.values()
        warnings = _warnings(task.stages[0], latest[task.stages[0].name])
        yield from _first("warning", [*warnings, *(w for tally in tallies for w in tally.warnings)])
        requests = sum(tally.requests for tally in tallies)
        replayed = sum(tally.replayed for tally in tallies)
        if any(ended.ran.values()):
            for stage in task.stages:
                yield from _adopted(stage, latest[stage.name])
            rate = f" ({requests / self.seconds:,.0f}/s)" if requests else ""
            yield (
                f"{count_of(requests, 'request')} sent in {self.seconds:.1f} s{rate}, "
                f"{count_of(replayed, 'row')} answered from the journal"
                if any(stage.asks for stage in task.stages)
                else f"{last.done} in {self.seconds:.1f} s, no model was asked: {last.about}"
            )
        elif ended.failed or ended.busy:
            yield "nothing done, no request was sent"
        else:
            yield "nothing to do: every file is up to date, no request was sent"
        yield f"{last.name}: {last.folder}"

    def _show(self, tally: Tally) -> None:
        self.tallies[tally.stage] = tally
        self._bars.show(tally.stage, figures(tally))


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
            good = f"{adopted['rows']:,} of {count_of(adopted['good'], 'good row')}"
            failed = f"{count_of(adopted['failed'], 'row')} without an answer"
            first = f", the first: {torn[0]}" if torn else ""
            lines = f"{count_of(len(torn), 'torn line')}{first}"
            yield f"  adopted: {name}: {good}; {failed}, {lines}"
        for aside in detail.get("set_aside", ()):
            yield f"  set aside: {name}: the file that was there is kept as {aside}"


def _warnings(first: Stage, found: Mapping[str, Row | None]) -> list[str]:
    return [
        f"{decode_key(key)}: {warning}"
        for key, detail in _details(first, found)
        for warning in detail.get(WARNINGS, ())
    ]


def _first(kind: str, told: Sequence[str]) -> Iterator[str]:
    yield from (f"  {kind}: {each}" for each in told[:SHOWN])
    if (more := len(told) - SHOWN) > 0:
        yield f"  {kind}: … {more:,} more"


def _figures(found: Mapping[str, Row | None]) -> Iterator[str]:
    """Of an evaluation: `accuracy 0.7125 of 1,319 items, 95 % interval 0.6931 to 0.7312`."""
    if (figures := joined(found.values())) is None:
        return
    numbers = figures.numbers()
    items = numbers.pop("items", 0)
    for name, value in numbers.items():
        if name.startswith("items_with_"):
            items = value  # what follows is of these
        elif not name.endswith(("_low", "_high")):
            low, high = numbers.get(f"{name}_low"), numbers.get(f"{name}_high")
            interval = "" if low is None else f", 95 % interval {low:.4f} to {high:.4f}"
            yield f"  {name} {value:.4f} of {count_of(items, 'item')}{interval}"


def _totals(stage: Stage, found: Mapping[str, Row | None], behind: Collection[str] = ()) -> str:
    made = [row for row in found.values() if row is not None]
    reasons, rules = Counter[str](), Counter[str]()
    rows, ok = sum(row["rows"] for row in made), sum(row["ok"] for row in made)
    for row in made:
        reasons.update(row["failures"])
        rules.update(row[DROPPED])
    behind = {*behind}
    current = (row for key, row in found.items() if key not in behind)
    accepted = sum(row is not None and row["accepted"] for row in current)
    files = f"{accepted} of {count_of(len(found), stage.keys.what)} {stage.done}"
    text = f"{files}: {count_of(rows, 'row')}, {ok:,} succeeded, {rows - ok:,} failed"
    text += f" ({by_count(reasons)})" if reasons else ""
    dropped = sum(row["dropped"] for row in made)
    by_rule = f" ({by_count(rules)})" if rules else ""
    return f"{text}, {dropped:,} dropped{by_rule}" if dropped else text
