"""`modelcall monitor` and `tune`: see runs while they go on, and change how fast they go."""

import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import click

from modelcall_assets.cli.options import any_task_argument, misuse, task_argument
from modelcall_assets.cli.run_display import Bars
from modelcall_assets.cli.terminal import echo, json_option, print_rows
from modelcall_assets.config.catalog import find_root
from modelcall_assets.records.outcome import Row
from modelcall_assets.stages.live import EVERY_S, line, notes, want, wish_of
from modelcall_assets.stages.task import Task


@click.command()
@any_task_argument
@click.option("--once", is_flag=True, help="Print what goes on now, and end.")
@json_option
def monitor(task: Task | None, once: bool, as_json: bool) -> None:
    """Watch the runs of TASK, or of all tasks, until none goes on: rows, failures by reason,
    requests, cost, time left, and what holds them up.

    Ctrl-C ends the view, and no run. Exits with 1 when a run failed. With --json, as with --once,
    what goes on now is printed.

    \b
      modelcall monitor my_task.yaml
      modelcall monitor --once --json
    """
    from modelcall_assets.defs.instance import open_instance

    code, before, said = 0, dict[str, str](), set[str]()
    root = find_root(Path.cwd()) if task is None else task.spec.root
    with open_instance(root) as instance, closing(Bars()) as bars:
        while True:
            rows = _rows(instance, task)
            if as_json:
                print_rows(rows, as_json=True)
                break
            for row in rows:
                if "stage" in row and not once:
                    bars.show(f"{row['task']} {row['stage']}", row)
                elif (told := _told(row)) not in said:
                    said.add(told)
                    echo(told)
            now = {row["run_id"]: row["task"] for row in rows}
            for run_id in before.keys() - now.keys():
                run = instance.get_run_by_id(run_id)
                is_well = run is not None and run.is_success
                code |= not is_well
                why = "failed, or was stopped; `modelcall logs` says why"
                echo(f"{before[run_id]}: {'done' if is_well else why}")
            if once or not now:
                break
            before = now
            time.sleep(bars.every_s)
    if not rows and not before:
        echo("nothing runs", err=True)
    sys.exit(code)


def _rows(instance: Any, task: Task | None) -> list[Row]:
    """Of each run, or of each of its stages at work."""
    from modelcall_assets.defs.going import going

    noted, rows = [*notes(Path(instance.root_directory))], list[Row]()
    at_work = {each.id: each for each in going(instance) if each.what != "backfill"}
    for run in at_work.values():  # a process that has no run yet, too
        if task is None or task.spec.key in run.tasks:
            told: Row = {"task": min(run.tasks), "run_id": run.id, "state": run.state}
            rows += [told | note for note in noted if note["run_id"] == run.id] or [told]
    return rows


def _told(row: Row) -> str:
    if "stage" in row:
        return line(f"{row['task']} {row['stage']}", row)
    return f"{row['task']}: {row['state']}"


@click.command()
@task_argument
@click.option("--requests", type=click.IntRange(1), help="At most so many in flight.")
@click.option("--pause/--resume", "paused", default=None, help="Send no requests; send them again.")
def tune(task: Task, requests: int | None, paused: bool | None) -> None:
    """Change how fast the runs of TASK go on, until they end; the next ones go by the files.

    Fewer requests: those in flight end by themselves. More than an endpoint's max_in_flight in the
    model file are not sent. Batches go on as they are.

    \b
      modelcall tune my_task.yaml --requests 16
      modelcall tune my_task.yaml --pause
    """
    from modelcall_assets.defs.instance import lock_path, open_instance

    if requests is None and paused is None:
        raise misuse("tune", "nothing to change", "--requests, --pause or --resume")
    with open_instance(task.spec.root) as instance:
        rows = _asking(instance, task)
        for run_id in {row["run_id"] for row in rows}:
            want(lock_path(instance, run_id), requests=requests, paused=paused)
        while any(row["wish"] != wish_of(lock_path(instance, row["run_id"])) for row in rows):
            time.sleep(EVERY_S / 4)
            rows = _asking(instance, task)
    for row in rows:
        echo(_told(row))
        if row["limit"] < (row["wish"]["requests"] or 0):
            echo(f"  max_in_flight in the model file allows {row['limit']:,} requests at most")
    if not rows:
        echo(f"{task.spec.name}: no run of it asks a model now", err=True)
        sys.exit(1)


def _asking(instance: Any, task: Task) -> list[Row]:
    return [row for row in _rows(instance, task) if "limit" in row and row["state"] == "running"]
