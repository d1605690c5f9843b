"""`modelcall clean`: delete what a task does not need any more."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import click
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from modelcall_assets.cli.display import cell, echo
from modelcall_assets.cli.task_argument import load, task_argument
from modelcall_assets.errors import Problem, SetupError
from modelcall_assets.records.data_files import decode_key
from modelcall_assets.stages.clean import (
    OLD_JOURNAL,
    Garbage,
    deleted_inputs,
    give_up_batches,
    left_over,
    old_journals,
    open_batches,
)
from modelcall_assets.stages.duplicates import forget
from modelcall_assets.stages.task import Task

SHOWN = 40


@click.command()
@task_argument
@click.option(
    "--journal-older-than",
    "days",
    type=click.IntRange(0),
    metavar="DAYS",
    help="Also the journals of published files without a reply in so many days.",
)
@click.option("--deleted-inputs", "gone", is_flag=True, help="Also all of inputs that are gone.")
@click.option("--batches", is_flag=True, help="Instead: give up batches that go on somewhere.")
@click.option("--dry-run", is_flag=True, help="Only show what would be deleted.")
@click.option("--yes", is_flag=True, help="Do not ask before deleting.")
def clean(
    task: Path, days: int | None, gone: bool, batches: bool, dry_run: bool, yes: bool
) -> None:
    """Delete what TASK.yaml has left behind: temporary files of crashes, and more on demand.

    Without its journal a published file stays as it is, but all its rows are asked again when it
    has to be made again: because prompt, parser or preprocessing change, its output is damaged, or
    the Dagster home that knows of it is lost or another. With a deleted input go its
    outputs, as far as they are as the task wrote them, manifests, journal and partition key. A
    batch that is given up is paid for, if the provider does not cancel it, and its rows are asked
    again.

    \b
      modelcall clean configs/tasks/my_task.yaml --dry-run
      modelcall clean my_task.yaml --journal-older-than 90
      modelcall clean my_task.yaml --deleted-inputs --yes
    """
    loaded = load(task)
    if batches:
        _give_up(loaded, dry_run=dry_run, yes=yes)
        return
    found = list(left_over(loaded))
    if gone:
        found += deleted_inputs(loaded, _partition_keys(loaded))
    if days is not None:
        named = {journal for garbage in found for journal in garbage.journals}
        found += (old for old in old_journals(loaded, days) if not named.intersection(old.journals))
    if not found:
        echo(f"{loaded.spec.name}: nothing to delete")
        return
    _show(found)
    if dry_run:
        echo("nothing deleted: --dry-run")
    elif yes or _confirmed():
        _delete(loaded, found)
    else:
        echo("nothing deleted")


def _show(found: Sequence[Garbage]) -> None:
    table = Table()
    table.add_column("why")
    table.add_column("file", overflow="fold")
    table.add_column("size", justify="right")
    for garbage in found[:SHOWN]:
        table.add_row(garbage.why, cell(garbage.name), decimal(garbage.size))
    if len(found) > SHOWN:
        table.add_row("", f"… {len(found) - SHOWN:,} more")
    table.add_section()
    table.add_row("", "together", decimal(sum(garbage.size for garbage in found)))
    Console().print(table)
    for place in (place for garbage in found for place in garbage.kept):
        echo(f"{place}: stays: it is not as this task wrote it")
    if any(garbage.why == OLD_JOURNAL for garbage in found):
        echo("without its journal a file that becomes out of date is asked again in full")


def _give_up(task: Task, *, dry_run: bool, yes: bool) -> None:
    for key, note in (found := open_batches(task)):
        name = note.id or "a batch without an id"
        echo(f"{decode_key(key)}: {name}, {note.requests:,} requests at {note.endpoint}")
    if found and not dry_run and (yes or _confirmed()):
        give_up_batches(task)
        echo(f"given up: {len(found)}")
    else:
        echo("no batch given up")


def _confirmed() -> bool:
    if not sys.stdin.isatty():
        wrong = "there is no terminal to ask on"
        raise SetupError([Problem("modelcall clean", "--yes", wrong, fix="add --yes")])
    return click.confirm("delete this?")


def _delete(task: Task, found: Sequence[Garbage]) -> None:
    deleted = [garbage for garbage in found if garbage.delete()]
    _forget(task, [garbage for garbage in deleted if garbage.key is not None])
    for garbage in found:
        if garbage not in deleted:
            echo(f"{garbage.name}: a run is working on it; not deleted", err=True)
    echo(f"deleted {len(deleted)} of {len(found)}")
    sys.exit(0 if len(deleted) == len(found) else 1)


def _partition_keys(task: Task) -> Sequence[str]:
    from modelcall_assets.defs.instance import open_instance

    with open_instance(task.spec.root) as instance:
        return instance.get_dynamic_partitions(task.stages[0].keys.name)


def _forget(task: Task, gone: Sequence[Garbage]) -> None:
    from modelcall_assets.defs.instance import open_instance

    if not gone:
        return
    forget(task.layout.duplicates_path, [garbage.key or "" for garbage in gone])
    with open_instance(task.spec.root) as instance:
        for garbage in gone:
            if garbage.keys is not None and garbage.keys.task is task:
                instance.delete_dynamic_partition(garbage.keys.name, garbage.key or "")
