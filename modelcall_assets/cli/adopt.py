"""`modelcall adopt`: what lies at the outputs' places, and is not ours, may be taken over."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from modelcall_assets.cli.display import echo
from modelcall_assets.cli.selection import file_option, stage_of
from modelcall_assets.cli.task_argument import load, task_argument
from modelcall_assets.errors import InputError
from modelcall_assets.records.data_files import decode_key
from modelcall_assets.stages.adopt import Adoption, look
from modelcall_assets.stages.asking import AskingStage
from modelcall_assets.stages.stage import Stage
from modelcall_assets.stages.standing import others, read_note, write_note
from modelcall_assets.storage.listing import matches


@click.command()
@task_argument
@click.option("--stage", help="Only this asset of the task; default: all of them.")
@file_option
@click.option("--dry-run", is_flag=True, help="Only show what is there.")
def adopt(task: Path, stage: str | None, pattern: str | None, dry_run: bool) -> None:
    """Let TASK.yaml take over files that lie where its outputs belong and that it has not written:
    results of the old system, or of a task by another name.

    Changes no file and asks nothing: the next run does it. Good scores and responses are kept as
    they are, where an input row has the same id and asks the same, and only the others are asked.
    What other assets would make is made anew. The old files are kept below `.modelcall`.

    \b
      modelcall adopt my_task.yaml --dry-run
      modelcall adopt my_task.yaml
      modelcall run-task my_task.yaml
    """
    loaded = load(task)
    chosen = loaded.stages if stage is None else [stage_of(loaded, "adopt", stage)]
    count, unreadable = 0, list[str]()
    for each in (stage for stage in chosen if stage.suffix):
        for key in each.keys.now():
            if pattern is None or matches(decode_key(key), pattern):
                try:
                    for line in _adopted(each, key, dry_run=dry_run):
                        echo(line)
                        count += 1
                except InputError as error:
                    unreadable.append(str(error))
    if not count and not unreadable:
        echo(f"{loaded.spec.name}: nothing to adopt, every file is the task's own")
    elif dry_run or not count:
        echo("nothing adopted" + ": --dry-run" * dry_run)
    else:
        echo(f"the next run does it: modelcall run-task {task}")
    if unreadable:
        raise InputError("\n".join(unreadable))


def _adopted(stage: Stage, key: str, *, dry_run: bool) -> Iterator[str]:
    """What is told of a partition that has something to take over."""
    found = others(stage, key)
    if found is None:
        return
    name, adoption = f"{stage.name} of {decode_key(key)}", Adoption()
    there = ", ".join(map(str, found.places))
    if isinstance(stage, AskingStage) and found.is_new:
        try:
            for _ in look(stage, found.answers, adoption):
                pass
        except InputError as error:
            what = "it stays as it is; it is not adopted: mend it, or move it away to begin anew"
            raise InputError(f"{name}: {error}; {what}") from error
    if not dry_run:
        note = read_note(stage, key)
        write_note(stage, key, note.model_copy(update={"adopt": True}))
    if not stage.asks:
        yield f"{name}: {there} will be kept, and made anew"
    elif not found.is_new:
        yield (
            f"{name}: {there} was changed since the task made it; the replies that the task has "
            "count, not the changes: it will be kept aside, and made anew. To use it as it is, "
            "move it to another folder"
        )
    else:
        yield (
            f"{name}: {adoption.good:,} good rows, {adoption.failed:,} without an answer, "
            f"{len(adoption.torn):,} torn lines in {', '.join(adoption.files)}"
        )
        yield from (f"  torn: {line}" for line in adoption.torn)
