"""`modelcall publish`: a task's rows as a data set that others load, with a card."""

import re
from pathlib import Path
from tempfile import TemporaryDirectory

import click

from modelcall_assets.cli.options import (
    chosen_files,
    file_option,
    misuse,
    parsed_where,
    refuse_own,
    split_option,
    stage_of,
    stage_option,
    task_argument,
    where_option,
)
from modelcall_assets.cli.terminal import echo, json_option, print_rows
from modelcall_assets.records.outcome import Row
from modelcall_assets.sources.hub import HUB, HubDataset
from modelcall_assets.stages.card import Told, card
from modelcall_assets.stages.dataset import (
    CARD,
    SHARD,
    Dataset,
    Shards,
    check_free,
    finish,
)
from modelcall_assets.stages.selection import Selection, named_split
from modelcall_assets.stages.task import Task
from modelcall_assets.storage.places import Place

SHOWN_SHARDS = 20
NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


@click.command()
@task_argument
@click.argument("destination")
@stage_option
@file_option
@where_option
@split_option
@click.option("--seed", default=42, show_default=True, help="Another seed is another split.")
@click.option("--license", help="As the Hub calls it, such as apache-2.0; default: not stated.")
@click.option(
    "--shard-mb",
    type=click.IntRange(1),
    default=256,
    show_default=True,
    help="Size of a file's rows in memory; on disk they are smaller.",
)
@click.option("--private", is_flag=True, help="Of a new data set on the Hub: only for its members.")
@click.option("--revision", metavar="BRANCH", help="On the Hub: a branch; default: the main one.")
@click.option("--force", is_flag=True, help="Replace what was published there before.")
@click.option("--dry-run", is_flag=True, help="Only show what would be written, and the card.")
@json_option
def publish(
    task: Task,
    destination: str,
    stage: str | None,
    pattern: str | None,
    condition: str | None,
    share: float | None,
    seed: int,
    license: str | None,
    shard_mb: int,
    private: bool,
    revision: str | None,
    force: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Publish the good rows of TASK as a data set: a folder, a URI in a store, or
    hf://datasets/ORG/NAME on the Hugging Face Hub.

    It has Parquet files of each split below data/, and README.md, its card: rows, scores, model,
    prompt, failures, cost, and where the rows are from. The card is written last. On the Hub all of
    it is one commit; the token is taken from HF_TOKEN.

    \b
      modelcall publish my_task.yaml /data/my_set --where 'score >= 4' --split 0.05
      modelcall publish my_task.yaml hf://datasets/org/my_set --license apache-2.0 --dry-run
      modelcall publish my_task.yaml s3://bucket/my_set --force
    """
    shown = stage_of(task, stage)
    files = chosen_files(shown, pattern, rejected=False)
    split = named_split(files, share or 0.0, seed)
    chosen = Selection("successes", parsed_where(condition, files))
    dataset = Dataset(files, chosen, split, shard_mb << 20)
    hub = _hub_dataset(task, destination, revision, private)
    options = {"stage": stage, "file": pattern, "where": condition, "license": license}
    options |= {"split": share, "seed": seed if share else None}
    command = ["modelcall", "publish", task.spec.file_name, str(hub or "DESTINATION")]
    for name, value in options.items():
        command += [] if value is None else [f"--{name}", str(value)]
    said = Told(hub.name if hub else "path/to/this/folder", license, command)
    folder = task.layout.elsewhere(destination, "DESTINATION")
    if hub is None:
        refuse_own(folder, [task], "DESTINATION")
        check_free(folder, force=force)
    if dry_run:
        made = dataset.write(None)
        ended = f"{card(dataset, made, said)}\nnothing is written; it would be: {hub or folder}"
    elif hub is None:
        made, ended = _written(dataset, folder, said), f"published: {folder}"
    else:
        parent, there = hub.open()
        old = [name for name in there if SHARD.fullmatch(name)]
        if (old or CARD in there) and not force:
            fix = "choose another name, or add --force: the Hub keeps what was there as history"
            raise misuse(str(hub), f"{[*old, CARD][0]} is there already", fix=fix)
        with TemporaryDirectory(prefix="modelcall-") as scratch:
            made = _written(dataset, Path(scratch), said)
            ended = f"published: {hub.commit(Path(scratch), old, parent)}"
    counts = [_row(each.name, each.rows, each.size) for each in made.all]
    total = _row("together", made.rows, sum(each.size for each in made.all))
    print_rows(counts, as_json=as_json, most=SHOWN_SHARDS, total=total)
    echo(ended, err=as_json)


def _row(file: str, rows: int, size: int) -> Row:
    return {"file": file, "rows": rows, "bytes_in_memory": size}


def _hub_dataset(
    task: Task, destination: str, revision: str | None, private: bool
) -> HubDataset | None:
    """None for a folder or a store."""
    if not destination.startswith("hf://"):
        if revision or private:
            option = "--revision" if revision else "--private"
            raise misuse(option, "is of the Hub", have=destination, fix="leave it out")
        return None
    name = destination.removeprefix(HUB).strip("/")
    if not destination.startswith(HUB) or not NAME.fullmatch(name):
        raise misuse("DESTINATION", "names no data set", f"{HUB}ORG/NAME", destination)
    return HubDataset(name, task.spec.env, revision, private)


def _written(dataset: Dataset, folder: Place, said: Told) -> Shards:
    made = dataset.write(folder)
    finish(folder, made, card(dataset, made, said))
    return made
