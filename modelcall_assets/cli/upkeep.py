"""`modelcall register`, `verify`, `clean` and `adopt`: what lies there of a task, and what becomes
of it."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import click

from modelcall_assets.cli.options import (
    TASK,
    file_option,
    load,
    misuse,
    stage_of,
    task_argument,
)
from modelcall_assets.cli.terminal import echo, echo_first, json_option, print_rows
from modelcall_assets.config.catalog import find_root, load_catalog
from modelcall_assets.errors import InputError, SetupError
from modelcall_assets.records import decode_key
from modelcall_assets.records.outcome import Row, count_of
from modelcall_assets.stages import Stage
from modelcall_assets.stages.adopt import Adoption, look
from modelcall_assets.stages.asking import AskingStage
from modelcall_assets.stages.duplicates import forget
from modelcall_assets.stages.publication import others, read_note, write_note
from modelcall_assets.stages.task import Task
from modelcall_assets.stages.upkeep import (
    OLD_JOURNAL,
    Defect,
    Garbage,
    Verification,
    deleted_inputs,
    left_over,
    old_journals,
    open_batches,
)
from modelcall_assets.storage.listing import matches

SHOWN = 100


@click.command()
@click.argument("tasks", nargs=-1, metavar="[TASK]...", type=TASK)
@json_option
def register(tasks: tuple[Path, ...], as_json: bool) -> None:
    """Show the input files of each TASK, or of all tasks, in the Dagster UI as missing.

    Each file becomes a partition that a backfill can be asked for; one that is gone and has no
    result is one no more. Nothing is run or paid. Where a Dagster daemon runs, its sensor
    `housekeeping` does the same twice a minute.

    \b
      modelcall register
      modelcall register configs/tasks/my_task.yaml
    """
    from modelcall_assets.defs.instance import open_instance  # takes most of a second
    from modelcall_assets.defs.instance import register as registered

    catalog = load_catalog(find_root(Path.cwd()))
    found = [load(path) for path in tasks] if tasks else [*map(Task, catalog.tasks)]
    rows = list[Row]()
    for broken in () if tasks else catalog.broken:
        echo(f"{broken.file_name}: left out; `modelcall check` says what is wrong", err=True)
    for task in found:
        with open_instance(task.spec.root) as instance:
            try:
                of_task = registered(instance, task)
            except (InputError, SetupError) as error:
                echo(f"{task.spec.name}: {error}", err=True)
                continue
        files = len(of_task.keys)
        row: Row = {"task": task.spec.name, "files": files, "new": of_task.new}
        rows.append({**row, "gone": of_task.gone})
    print_rows(rows, as_json=as_json)
    sys.exit(1 if tasks and not rows else 0)


@click.command()
@task_argument
@json_option
def verify(task: Task, as_json: bool) -> None:
    """Check all that TASK has published, on disk or in a store; nothing is changed.

    Outputs are compared with the digests in their manifests, each line of the journals with its
    checksum. What a crash has left, and what belongs to inputs that are gone or were renamed, is
    named too. Each finding says what to do; with any, the exit code is 1. All bytes are read.
    --json gives the findings.

    \b
      modelcall verify configs/tasks/my_task.yaml
    """
    verification = Verification(task)
    findings = list(verification.findings())
    if as_json:
        print_rows([*map(asdict, findings)], as_json=True)
    else:
        print_rows([_verified(verification, stage, findings) for stage in task.stages])
        of = ((f"{each.stage}: " if each.stage else "", each) for each in findings)
        echo_first(SHOWN, [f"{stage}{each.name}: {each.wrong}; {each.fix}" for stage, each in of])
    told = f"{task.spec.name}: {count_of(len(findings), 'finding')}"
    echo(told if findings else "all is sound", err=as_json)
    sys.exit(1 if findings else 0)


def _verified(verification: Verification, stage: Stage, findings: Sequence[Defect]) -> Row:
    name = stage.name
    return {
        "stage": name,
        "outputs": verification.outputs[name],
        "rows": verification.rows[name],
        "journal_lines": verification.journal_lines[name] if stage.answers else None,
        "findings": sum(finding.stage == name for finding in findings),
    }


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
@json_option
def clean(
    task: Task,
    days: int | None,
    gone: bool,
    batches: bool,
    dry_run: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Delete what TASK has left behind: temporary files of crashes, and more on demand.

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
    if as_json and (batches or not dry_run):
        raise misuse("--json", "is of --dry-run", fix="add that, and leave out --batches")
    if batches:
        _give_up(task, dry_run=dry_run, yes=yes)
        return
    found = list(left_over(task))
    if gone:
        from modelcall_assets.defs.instance import open_instance  # takes most of a second

        with open_instance(task.spec.root) as instance:
            known = instance.get_dynamic_partitions(task.stages[0].keys.name)
        found += deleted_inputs(task, known)
    if days is not None:
        named = {journal for garbage in found for journal in garbage.journals}
        found += (old for old in old_journals(task, days) if not named.intersection(old.journals))
    if not found:
        echo(f"{task.spec.name}: nothing to delete", err=as_json)
        return
    _show(found, as_json)
    if dry_run:
        echo("nothing deleted: --dry-run", err=as_json)
    elif yes or _confirmed():
        _delete(task, found)
    else:
        echo("nothing deleted")


def _show(found: Sequence[Garbage], as_json: bool) -> None:
    rows = [{"why": each.why, "file": each.name, "bytes": each.size} for each in found]
    total = {"file": "together", "bytes": sum(garbage.size for garbage in found)}
    print_rows(rows, as_json=as_json, most=SHOWN, total=total)
    for place in (place for garbage in found for place in garbage.kept):
        echo(f"{place}: stays: it is not as this task wrote it", err=as_json)
    if any(garbage.why == OLD_JOURNAL for garbage in found):
        told = "without its journal a file that becomes out of date is asked again in full"
        echo(told, err=as_json)


def _give_up(task: Task, *, dry_run: bool, yes: bool) -> None:
    for key, note in (found := open_batches(task)):
        name = note.id or "a batch without an id"
        asked = count_of(note.requests, "request")
        echo(f"{decode_key(key)}: {name}, {asked} at {note.endpoint}")
    if found and not dry_run and (yes or _confirmed()):
        open_batches(task, give_up=True)
        echo(f"given up: {len(found)}")
    else:
        echo("no batch given up")


def _confirmed() -> bool:
    if not sys.stdin.isatty():
        raise misuse("--yes", "there is no terminal to ask on", fix="add --yes")
    return click.confirm("delete this?")


def _delete(task: Task, found: Sequence[Garbage]) -> None:
    deleted = [garbage for garbage in found if garbage.delete(task)]
    gone = [garbage.partition for garbage in deleted if garbage.partition is not None]
    if gone:
        forget(task.layout.duplicates_path, [key for _, key in gone])
        from modelcall_assets.defs.instance import open_instance

        with open_instance(task.spec.root) as instance:
            for keys, key in gone:
                if keys.task is task:
                    instance.delete_dynamic_partition(keys.name, key)
    for garbage in found:
        if garbage not in deleted:
            echo(f"{garbage.name}: a run is working on it; not deleted", err=True)
    echo(f"deleted {len(deleted)} of {len(found)}")
    sys.exit(0 if len(deleted) == len(found) else 1)


@click.command()
@task_argument
@click.option("--stage", help="Only this stage of the task; default: all of them.")
@file_option
@click.option("--dry-run", is_flag=True, help="Only show what is there.")
@json_option
def adopt(task: Task, stage: str | None, pattern: str | None, dry_run: bool, as_json: bool) -> None:
    """Let TASK take over files that lie where its outputs belong and that it has not written:
    results of the old system, or of a task by another name.

    Changes no file and asks nothing: the next run does it. Good scores and responses are kept as
    they are, where an input row has the same id and asks the same, and only the others are asked.
    What other stages would make is made anew. The old files are kept below `.modelcall`.

    \b
      modelcall adopt my_task.yaml --dry-run
      modelcall adopt my_task.yaml
      modelcall run-task my_task.yaml
    """
    chosen = task.stages if stage is None else [stage_of(task, stage)]
    rows, unreadable = list[Row](), list[str]()
    for asset, key in ((each, key) for each in chosen if each.suffix for key in each.keys.now()):
        if pattern is None or matches(decode_key(key), pattern):
            try:
                rows += _adopted(asset, key, dry_run=dry_run)
            except InputError as error:
                unreadable.append(str(error))
    print_rows(rows, as_json=as_json)
    if not rows and not unreadable:
        told = f"{task.spec.name}: nothing to adopt, every file is the task's own"
    elif dry_run or not rows:
        told = "nothing adopted" + ": --dry-run" * dry_run
    else:
        told = f"the next run does it: modelcall run-task {task.spec.file_name}"
    echo(told, err=as_json)
    if unreadable:
        raise InputError("\n".join(unreadable))


def _adopted(stage: Stage, key: str, *, dry_run: bool) -> Iterator[Row]:
    found = others(stage, key)
    if found is None:
        return
    name, adoption = decode_key(key), Adoption()
    is_read = found.is_new and stage.asks
    if isinstance(stage, AskingStage) and is_read:
        try:
            for _ in look(stage, found.answers, adoption):
                pass
        except InputError as error:
            what = "it stays as it is; it is not adopted: mend it, or move it away to begin anew"
            raise InputError(f"{stage.name} of {name}: {error}; {what}") from error
    if not dry_run:
        write_note(stage, key, read_note(stage, key).model_copy(update={"adopt": True}))
    for line in adoption.torn:
        echo(f"torn: {line}", err=True)
    becomes = "kept aside, and made anew"
    if is_read:
        becomes = "the good rows are kept, the others are asked"
    elif stage.asks:
        becomes += (
            ": it was changed since the task made it, and the replies that the task has count, "
            "not the changes; to use it as it is, move it to another folder"
        )
    yield {
        "stage": stage.name,
        "file": name,
        "good_rows": adoption.good if is_read else None,
        "without_an_answer": adoption.failed if is_read else None,
        "torn_lines": len(adoption.torn) if is_read else None,
        "there": ", ".join(adoption.files or map(str, found.places)),
        "becomes": becomes,
    }
