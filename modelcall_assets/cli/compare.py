"""`modelcall compare`: two results on the same items, as pairs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import orjson
from rich.console import Console

from modelcall_assets.cli.page import Record, cards, page, records_json, table
from modelcall_assets.cli.terminal import (
    NEW_FILE,
    chosen_files,
    echo,
    echo_data,
    file_option,
    force_option,
    load,
    misuse,
    refuse_existing,
    stage_of,
    stage_option,
    table_of,
)
from modelcall_assets.config.catalog import SUFFIXES as TASK_SUFFIXES
from modelcall_assets.records.outcome import Row
from modelcall_assets.stages.compare import (
    Changed,
    Comparison,
    Figures,
    Side,
    compare,
    side_of,
    side_of_copy,
)
from modelcall_assets.storage.files import write_bytes
from modelcall_assets.storage.rows import GIVEN_ID
from modelcall_assets.transforms.statistics import Estimate

PAGE_RECORDS = 1000
REPLY_CHARS = 300
WIDE = 10_000
"""Columns of what is read by programs: no word is cut in two."""
NAMES = "A", "B"
RESULT = click.Path(exists=True, path_type=Path)


@click.command("compare")
@click.argument("first", metavar="A", type=RESULT)
@click.argument("second", metavar="B", type=RESULT)
@stage_option
@file_option
@click.option("--figure", metavar="COLUMN", help="What is compared; default: the first rating.")
@click.option("--by", metavar="COLUMN", help="The figures of each of its values too.")
@click.option(
    "--cluster",
    metavar="COLUMN|file|item",
    help="What rows share that are not independent; default: item, where it has several samples.",
)
@click.option(
    "--show",
    type=click.IntRange(0, PAGE_RECORDS),
    default=0,
    help="So many rows that differ, those that differ most.",
)
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.option("--page", "path", metavar="FILE.html", type=NEW_FILE, help="Write a page too.")
@force_option
def compare_results(
    first: Path,
    second: Path,
    stage: str | None,
    pattern: str | None,
    figure: str | None,
    by: str | None,
    cluster: str | None,
    show: int,
    as_json: bool,
    path: Path | None,
    force: bool,
) -> None:
    """Compare two results on the same items: of task files, or copies of a task's scores files.

    A and B are a TASK.yaml, a scores file, or a folder of them, such as an older copy of the output
    folder. Rows are joined by file, record id and sample, and differences are B − A.

    \b
      modelcall compare old_prompt.yaml new_prompt.yaml --by subject
      modelcall compare backup/scores my_task.yaml --figure score --show 20
      modelcall compare a.yaml b.yaml --page a_and_b.html
    """
    if path is not None:
        refuse_existing([path], force)
    sides = _side(first, stage, pattern), _side(second, stage, pattern)
    found = compare(sides, figure, by, cluster)
    figures = [found.total(), *found.groups()]
    shown = found.changed(PAGE_RECORDS if path else show)
    if as_json:
        told = _as_json((first, second), found, figures, shown[:show])
        echo_data(orjson.dumps(told, default=str, option=orjson.OPT_INDENT_2).decode() + "\n")
    else:
        _show((first, second), found, figures, shown[:show])
    if path is not None:
        title = f"{first.name} and {second.name}"
        differ = figures[0].fell + figures[0].rose
        records = records_json([_record(found, each) for each in shown], differ, None)
        text = page(title, _sections((first, second), found, figures), records)
        write_bytes(path, text.encode("utf-8", "replace"))
        echo(f"page: {path}", err=as_json)
