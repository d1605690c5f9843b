"""`modelcall logs`: what runs have told."""

import os
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

import click
import orjson

from modelcall_assets.cli.options import TASK, load, misuse
from modelcall_assets.cli.terminal import echo, json_option, print_rows
from modelcall_assets.config.catalog import find_root, load_catalog
from modelcall_assets.config.spec import TaskSpec
from modelcall_assets.errors import InputError, Problem, SetupError
from modelcall_assets.records.outcome import Row
from modelcall_assets.storage.files import LINES_BYTES
from modelcall_assets.storage.places import explained

NONE = "no such run yet; `modelcall run-task TASK` makes one"


@click.command()
@click.argument("given", metavar="[TASK]", required=False, type=TASK)
@click.option("--task", type=TASK, help="The same as TASK.")
@click.option("--details", "kind", flag_value="batch_details", help="How each row ended.")
@click.option("--stats", "kind", flag_value="final_stats", help="Numbers of the last run.")
@click.option("--run", "asked", default="", metavar="ID", help="That run; its first letters do.")
@click.option("--limit", type=click.IntRange(1), default=100, help="Lines; default: the last 100.")
@json_option
def logs(
    given: Path | None, task: Path | None, kind: str | None, asked: str, limit: int, as_json: bool
) -> None:
    """Show what the last run of TASK has told, and last of all why it failed.

    Without TASK: the last runs of all tasks. --details and --stats show files that runs leave
    where TASK says `logging: {log_dir: logs}`.

    \b
      modelcall logs
      modelcall logs my_task.yaml --details
      modelcall logs my_task.yaml --run 1f2e
    """
    from modelcall_assets.defs.instance import open_instance
    from modelcall_assets.defs.logs import runs_of, shown, told
    from modelcall_assets.defs.runs import end_dead_runs

    path = given or task
    own = None if path is None else load(path).spec
    if kind is not None:
        if own is None:
            raise misuse("TASK", "missing: whose files?")
        rows = _left(own, kind, asked, limit)
        if not rows:
            raise InputError(NONE)
        print_rows(rows, as_json=as_json)
        return
    root = find_root(Path.cwd()) if own is None else own.root
    with open_instance(root) as instance:
        end_dead_runs(instance)
        found = runs_of(instance, load_catalog(root).tasks if own is None else [own])
        runs = [each for each in found if each[1].dagster_run.run_id.startswith(asked)]
        if own is None or not runs:
            rows = [shown(*each) for each in runs[:limit]]
        else:
            run = runs[0][1].dagster_run
            lines = (told(entry, run) for entry in instance.all_logs(run.run_id))
            rows = [line for line in lines if line][-limit:]
    if not rows:
        raise InputError(NONE)
    if own is None or as_json:
        print_rows(rows, as_json=as_json)
    else:
        for row in rows:
            echo(" | ".join(row.values()))


def _left(spec: TaskSpec, kind: str, asked: str, most: int) -> list[Row]:
    """The last rows of that run in such files of a task, the newest last."""
    if (folder := spec.log_folder) is None:
        fix = "add `logging:` and below it `  log_dir: logs`; runs leave such files from then on"
        raise SetupError([Problem(spec.file_name, "logging.log_dir", "not given", fix=fix)])
    rows = list[Row]()
    for file in folder.glob(f"{folder.name}_{kind}*"):
        of_run = (row for row in _from_the_end(file) if row["run"].startswith(asked))
        rows += reversed([row | row.pop("stats", {}) for row in islice(of_run, most)])
    return sorted(rows, key=lambda row: row.get("timestamp") or row["completion_time"])[-most:]


def _from_the_end(path: Path) -> Iterator[Row]:
    """The rows of a file that may be huge, the last first, without lines that a kill has torn."""
    with explained(path), path.open("rb") as file:
        at, rest = file.seek(0, os.SEEK_END), b""
        while at:
            size = min(at, LINES_BYTES)
            at = file.seek(at - size)
            rest, *lines = (file.read(size) + rest).split(b"\n")
            for line in reversed(lines if at else [rest, *lines]):
                with suppress(orjson.JSONDecodeError):
                    yield orjson.loads(line)
