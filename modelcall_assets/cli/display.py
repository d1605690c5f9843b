"""What reaches the terminal: text without the control characters of others, and how a run shows
itself: a bar on a terminal, a line every 30 s elsewhere."""

from __future__ import annotations

import os
import re
import sys
from types import TracebackType
from typing import Any, Self

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from modelcall_assets.stages.progress import Tally, Watcher

TERMINAL_EVERY_S = 0.25
LOG_EVERY_S = 30.0
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
    """Text of others, in which nothing is markup."""
    return Text(shown(text))


class RunDisplay:
    """Shows the tallies of a process's runs, added up."""

    def __init__(self) -> None:
        # Dagster may redirect the standard streams while an asset runs.
        self._stream = os.fdopen(os.dup(sys.stderr.fileno()), "w")
        self._console = Console(file=self._stream)
        self._tallies: dict[int, Tally] = {}
        self._progress: Progress | None = None
        is_terminal = self._console.is_terminal
        self.watcher = Watcher(self._show, TERMINAL_EVERY_S if is_terminal else LOG_EVERY_S)
        if is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[detail]}"),
                console=self._console,
            )

    def __enter__(self) -> Self:
        if self._progress is not None:
            self._progress.start()
            self._bar = self._progress.add_task("rows", total=None, detail="")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
        self._stream.close()

    @property
    def requests(self) -> int:
        return sum(tally.requests for tally in self._tallies.values())

    @property
    def replayed(self) -> int:
        return sum(tally.replayed for tally in self._tallies.values())

    @property
    def warnings(self) -> list[str]:
        return [warning for tally in self._tallies.values() for warning in tally.warnings]

    def _show(self, tally: Tally) -> None:
        self._tallies[id(tally)] = tally
        if self._progress is None:
            self._console.print(tally.line(), highlight=False)
            return
        tallies = [each for each in self._tallies.values() if each.stage == tally.stage]
        self._progress.update(
            self._bar,
            description=tally.stage,
            total=sum(each.rows for each in tallies),
            completed=sum(each.done for each in tallies),
            detail=tally.detail(),
        )
