"""`modelcall agreement`: how far judges agree, with each other and with people."""

from collections.abc import Sequence
from pathlib import Path

import click
import orjson
from rich.console import Console

from modelcall_assets.cli.compare import RESULT, ratings_at
from modelcall_assets.cli.terminal import (
    EXISTING_FILE,
    echo,
    echo_data,
    misuse,
    stage_option,
    table_of,
)
from modelcall_assets.stages.agreement import panel
from modelcall_assets.transforms.statistics import Scale

SHOWN = 3


@click.command()
@click.argument("results", metavar="A [B]...", nargs=-1, required=True, type=RESULT)
@stage_option
@click.option(
    "--figure",
    "figures",
    metavar="COLUMN",
    multiple=True,
    help="What is compared, several of one result too; default: the first rating.",
)
@click.option(
    "--labels",
    metavar="FILE",
    multiple=True,
    type=EXISTING_FILE,
    help="Labels of people: JSONL, CSV or Parquet with id and label.",
)
@click.option("--label", default="label", show_default=True, help="Their column.")
@click.option(
    "--scale",
    type=click.Choice(["nominal", "ordinal", "interval"]),
    help="Of α. Default: interval for numbers, else nominal.",
)
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def agreement(
    results: Sequence[Path],
    stage: str | None,
    figures: Sequence[str],
    labels: Sequence[Path],
    label: str,
    scale: Scale | None,
    as_json: bool,
) -> None:
    """How far judges agree on the same items, with each other and with labels of people.

    Judges are TASK.yaml files, scores files or folders of them, or several columns of one.

    \b
      modelcall agreement judge_a.yaml judge_b.yaml --labels people.csv
      modelcall agreement judge_a.yaml --figure score --figure human_score
    """
    judges = {}
    for path in results:
        ratings = ratings_at(path, stage)
        for column in figures or [ratings.figure]:
            if column is None:
                raise misuse("--figure", f"which column of {path} is compared?")
            judges[f"{path}: {column}"] = ratings, column
    people = {str(path): (path, label) for path in labels}
    if len(judges) + len(people) < 2:
        raise misuse(
            "--figure", "one rater has nobody to agree with", "two results, columns or --labels"
        )
    both = panel(judges, people)
    found = both.agreement(scale)
    if as_json:
        told = {**found._asdict(), "pairs": [pair._asdict() for pair in found.pairs]}
        told["unmatched"] = both.unmatched
        echo_data(orjson.dumps(told, option=orjson.OPT_INDENT_2).decode() + "\n")
        return
    for name, ids in both.unmatched.items():
        if ids:
            such = ", ".join(ids[:SHOWN])
            echo(f"warning: {name}: {len(ids):,} labels of no such row: {such}", err=True)
    of = f"{found.items:,} items with two labels or more"
    echo(f"Krippendorff's α ({found.scale}): {found.alpha:.3f}, of {of}")
    columns = {"rater": "fold", "and": "fold", "items": "right", "same": "right", "κ": "right"}
    lines = [
        [pair.first, pair.second, f"{pair.items:,}", *map(_told, pair[3:])] for pair in found.pairs
    ]
    Console().print(table_of({**columns, "quadratic κ": "right"}, lines))


def _told(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
