"""Text and tables for the terminal, and for programs."""

import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import click
import orjson
from rich.box import HEAVY_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

ENDLESS = 100_000
"""Columns of a pipe that says nothing else."""
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


json_option = click.option(
    "--json", "as_json", is_flag=True, help="For programs: one JSON object a line, and all of them."
)


def print_rows(
    rows: Sequence[Mapping[str, Any]],
    *,
    as_json: bool = False,
    most: int | None = None,
    total: Mapping[str, Any] | None = None,
) -> None:
    """A table of rows with the same names, numbers at the right; or `json_option`'s lines. At most
    so many of the rows are shown. No word is cut: where the terminal, or COLUMNS, is too narrow,
    each row is a block of lines, and a pipe gets a line a row."""
    if as_json:
        for row in rows:
            echo_data(orjson.dumps(row, default=str).decode() + "\n")
        return
    if not rows:
        return
    is_page = sys.stdout.isatty() or "COLUMNS" in os.environ
    console = Console() if is_page else Console(width=ENDLESS)
    shown_rows = [*rows[:most], *([{name: total.get(name) for name in rows[0]}] if total else [])]
    columns = {_head(name): [_told(row[name]) for row in shown_rows] for name in rows[0]}
    if widths := _widths(columns, console.width):
        table = Table(box=HEAVY_HEAD if is_page else None)
        for (head, _), value, width in zip(columns.items(), rows[0].values(), widths, strict=True):
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            table.add_column(head, justify="right" if is_number else "left", width=width)
        for at, row in enumerate(zip(*columns.values(), strict=True)):
            if at == len(rows[:most]):
                table.add_section()
            table.add_row(*map(cell, row))
        console.print(table)
    else:
        wide = max(map(len, columns))
        for row in zip(*columns.values(), strict=True):
            for head, text in zip(columns, row, strict=True):
                if text:
                    console.print(cell(f"{head:{wide}}  {text}"), soft_wrap=True)
            console.print()
    if (more := len(rows) - len(rows[:most])) > 0:
        echo(f"… {more:,} more")


def _widths(columns: Mapping[str, Sequence[str]], most: int) -> list[int]:
    """With all words whole; the widest columns wrap. None fit: an empty list."""
    texts = [[head, *map(shown, cells)] for head, cells in columns.items()]
    widths = [min(most, max(map(cell_len, each))) for each in texts]
    words = [
        max(cell_len(word) for text in each for word in text.split() or [""]) for each in texts
    ]
    room = most - 3 * len(widths) - 1
    while sum(widths) > room:
        at = max(range(len(widths)), key=lambda at: (widths[at] > words[at], widths[at]))
        if widths[at] <= words[at]:
            return []
        widths[at] -= 1
    return widths


def _head(name: str) -> str:
    return name.replace("_", " ")


def _told(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return "" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)
