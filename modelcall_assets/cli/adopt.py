"""`modelcall adopt`: what lies at the outputs' places, and is not ours, may be taken over."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from modelcall_assets.cli.display import echo
from modelcall_assets.cli.selection import file_option, stage_of
from modelcall_assets.cli.task_argument import task_argument, task_steps
from modelcall_assets.config.spec import RAW
from modelcall_assets.errors import InputError
from modelcall_assets.records.keys import decode_key
from modelcall_assets.steps.adopt import Adoption, look, old_files
from modelcall_assets.steps.standing import read_note, stranger, write_note
from modelcall_assets.steps.task_steps import TaskSteps
from modelcall_assets.storage.files import matches
from modelcall_assets.storage.manifest import read_manifest


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
    steps = task_steps(task)
    chosen = steps.stages if stage is None else [stage_of(steps, "adopt", stage)]
    count = 0
    for each in (name for name in chosen if name != RAW):
        for key in steps.keys(steps.partitions(each)):
            if pattern is None or matches(decode_key(key), pattern):
                for line in _adopted(steps, each, key, dry_run=dry_run):
                    echo(line)
                    count += 1
    if not count:
        echo(f"{steps.spec.name}: nothing to adopt, every file is the task's own")
    elif dry_run:
        echo("nothing adopted: --dry-run")
    else:
        echo(f"adopted by the next run: modelcall run-task {task}")


def _adopted(steps: TaskSteps, stage: str, key: str, *, dry_run: bool) -> Iterator[str]:
    """What is told of a partition that has something to take over."""
    layout = steps.layout
    made, note = read_manifest(layout.manifest_path(stage, key)), read_note(layout, stage, key)
    found = stranger(layout.output_path(stage, key), made, note)
    beside = (stranger(place, made, note) for place in layout.beside_paths(stage, key))
    others = [each.uri for each in beside if each is not None]
    asking = steps.asking(stage)
    at_place = found.place if found is not None else None
    files = [*old_files(layout, stage, key, at_place)] if asking is not None else []
    if found is None and not others and (made is not None or not files):
        return
    if not dry_run:
        write_note(layout, stage, key, note.model_copy(update={"adopt": True}))
    name = f"{stage} of {decode_key(key)}"
    if asking is None:
        there = [*([found.uri] if found is not None else []), *others]
        yield f"{name}: {', '.join(there)} will be kept, and made anew"
        return
    adoption = Adoption()
    try:
        for _ in look(asking, files, adoption):
            pass
    except InputError as error:
        raise InputError(f"{error}; to begin anew, move that file away") from error
    yield (
        f"{name}: {adoption.good:,} good rows, {adoption.failed:,} without an answer, "
        f"{len(adoption.torn):,} torn lines in {', '.join(adoption.files)}"
    )
    yield from (f"  torn: {line}" for line in adoption.torn)
