"""`modelcall agreement`: how far judges agree, with each other and with people."""

from collections.abc import Sequence
from pathlib import Path

import click

from modelcall_assets.cli.compare import RESULT, ratings_at
from modelcall_assets.cli.options import EXISTING_FILE, misuse, stage_option
from modelcall_assets.cli.terminal import echo, json_option, print_rows
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
@json_option
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
        print_rows([plain], as_json=True)
        return
    for name, ids in told.unmatched.items():
        if ids:
            such = ", ".join(ids[:SHOWN])
            echo(f"warning: {name}: {len(ids):,} labels of no such row: {such}", err=True)
    of = f"{told.items:,} items with two labels or more"
    echo(f"Krippendorff's α ({told.scale}): {told.alpha:.3f}, of {of}")
    print_rows([pair.told() for pair in told.pairs])
