"""`modelcall agreement`: how far judges agree, with each other and with people."""

from collections.abc import Sequence
from pathlib import Path

import click
import orjson
from rich.console import Console

from modelcall_assets.cli.compare import RESULT, ratings_at
from modelcall_assets.cli.options import EXISTING_FILE, misuse, stage_option
from modelcall_assets.cli.terminal import echo, echo_data, table_of
from modelcall_assets.stages.agreement import Panel
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

    Judges are tasks, scores files or folders of them, or several columns of one.

    \b
      modelcall agreement judge_a.yaml judge_b.yaml --labels people.csv
      modelcall agreement judge_a.yaml --figure score --figure human_score
    """
    found = Panel()
    for path in results:
        ratings = ratings_at(path, stage)
        for column in figures or [ratings.figure]:
            found.judge(str(path), ratings._replace(figure=column), ("--figure", column or ""))
    for path in labels:
        found.add_people(str(path), path, label)
    if len(found.judges) + len(found.people) < 2:
        raise misuse(
            "--figure", "one rater has nobody to agree with", "two results, columns or --labels"
        )
    told = found.agreement(found.scale(scale, ("--scale", "")))
    if as_json:
        plain = {**told._asdict(), "pairs": [pair._asdict() for pair in told.pairs]}
        echo_data(orjson.dumps(plain, option=orjson.OPT_INDENT_2).decode() + "\n")
        return
    for name, ids in told.unmatched.items():
        if ids:
            such = ", ".join(ids[:SHOWN])
            echo(f"warning: {name}: {len(ids):,} labels of no such row: {such}", err=True)
    of = f"{told.items:,} items with two labels or more"
    echo(f"Krippendorff's α ({told.scale}): {told.alpha:.3f}, of {of}")
    columns = {"rater": "fold", "and": "fold", "items": "right", "same": "right", "κ": "right"}
    lines = [[*map(_shown, pair.told().values())] for pair in told.pairs]
    Console().print(table_of({**columns, "quadratic κ": "right"}, lines))


def _shown(value: str | float | None) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else value or ""
