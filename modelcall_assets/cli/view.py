"""`modelcall view`: sampled records as a page to read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from random import Random

import click

from modelcall_assets.cli.display import echo
from modelcall_assets.cli.output import force_option, refuse_existing
from modelcall_assets.cli.selection import (
    chosen_files,
    condition_of,
    file_option,
    parsed_where,
    rejected_option,
    stage_option,
    where_option,
)
from modelcall_assets.cli.task_argument import load
from modelcall_assets.config.catalog import SUFFIXES as TASK_SUFFIXES
from modelcall_assets.errors import InputError, Problem, SetupError
from modelcall_assets.records.data_files import DATA_SUFFIXES, is_data_file
from modelcall_assets.records.outcome import BadLine, Row
from modelcall_assets.storage.files import write_bytes
from modelcall_assets.storage.rows import read_rows
from modelcall_assets.transforms.transcript import html_page

Placed = tuple[str, Row]
"""A row, and where it is."""


@click.command()
@click.argument(
    "source",
    metavar="TASK.yaml|FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
)
@stage_option
@file_option
@click.option("--rows", type=click.IntRange(1, 10_000), default=50, show_default=True)
@click.option(
    "--sample/--first", default=True, help="Rows from everywhere (the default), or the first."
)
@click.option("--seed", default=42, show_default=True, help="Another seed is another sample.")
@where_option
@rejected_option
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Default: view.html, where an earlier page is replaced.",
)
@force_option
def view(
    source: Path,
    stage: str | None,
    pattern: str | None,
    rows: int,
    sample: bool,
    seed: int,
    condition: str | None,
    rejected: bool,
    output: Path | None,
    force: bool,
) -> None:
    """Write an HTML page of records: what TASK.yaml has published, or a data FILE.

    Messages show as a conversation with its reasoning folded, all else as columns. The page needs
    nothing from elsewhere and can be sent to others.

    \b
      modelcall view my_task.yaml --where 'score <= 2'
      modelcall view my_task.yaml --stage raw --first --rows 5
      modelcall view data/chats.jsonl --output chats.html
    """
    if output is not None and not force:
        refuse_existing("view", [output])
    placed = (
        _of_task(source, stage, pattern, condition, rejected=rejected)
        if _is_task(source)
        else _of_file(source, condition)
    )
    shown = _sample(placed, rows, Random(seed)) if sample else list(islice(placed, rows))
    if not shown:
        raise InputError(f"{source}: there is no such row")
    page = output or Path("view.html")
    write_bytes(page, html_page(source.stem, shown).encode("utf-8", "replace"))
    echo(f"{len(shown)} records: {page}")


def _is_task(source: Path) -> bool:
    if source.suffix not in TASK_SUFFIXES and not is_data_file(source.name):
        expected = ", ".join((*TASK_SUFFIXES, *DATA_SUFFIXES))
        raise SetupError([Problem("modelcall view", source.name, "unknown kind of file", expected)])
    return source.suffix in TASK_SUFFIXES


def _of_task(
    task: Path, stage: str | None, pattern: str | None, condition: str | None, *, rejected: bool
) -> Iterator[Placed]:
    files = chosen_files(load(task), "view", stage, pattern, rejected=rejected)
    where = parsed_where("view", condition, files)
    for file in files:
        file.check()
        for index, item in file.items():
            if where is None or (not isinstance(item, BadLine) and where(item)):
                yield f"{file.name}, row {index + 1:,}", _row(item)


def _of_file(path: Path, condition: str | None) -> Iterator[Placed]:
    where = condition_of("view", condition)
    for number, item in enumerate(read_rows(path), 1):
        if where is None or (not isinstance(item, BadLine) and where(item)):
            yield f"{path.name}, row {number:,}", _row(item)


def _row(item: Row | BadLine) -> Row:
    if isinstance(item, BadLine):
        return {"api_status": "error", "api_fail_reason": item.detail, "line": item.raw}
    return item


def _sample(rows: Iterable[Placed], size: int, random: Random) -> list[Placed]:
    """So many rows, each as likely as any other, in their order."""
    kept: list[tuple[int, Placed]] = []
    for number, row in enumerate(rows):
        if len(kept) < size:
            kept.append((number, row))
        elif (place := random.randrange(number + 1)) < size:
            kept[place] = (number, row)
    return [row for _, row in sorted(kept, key=lambda each: each[0])]
