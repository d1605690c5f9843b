"""`modelcall logs`: what runs have told."""

from pathlib import Path
from typing import Any

import click
import orjson

from modelcall_assets.cli.options import TASK, load, misuse
from modelcall_assets.cli.terminal import echo, json_option, print_rows
from modelcall_assets.config.catalog import find_root, load_catalog
from modelcall_assets.config.spec import TaskSpec
from modelcall_assets.errors import InputError, Problem, SetupError


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
        rows = [row for row in _left(own, kind) if row["run"].startswith(asked)]
        print_rows(rows[-limit:], as_json=as_json)
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
        raise InputError("no such run yet; `modelcall run-task TASK` makes one")
    if own is None or as_json:
        print_rows(rows, as_json=as_json)
    else:
        for row in rows:
            echo(" | ".join(row.values()))


def _left(spec: TaskSpec, kind: str) -> list[dict[str, Any]]:
    """What is in such files of a task's runs, the newest last."""
    if (folder := spec.log_folder) is None:
        fix = "add `logging:` and below it `  log_dir: logs`; runs leave such files from then on"
        raise SetupError([Problem(spec.file_name, "logging.log_dir", "not given", fix=fix)])
    files = folder.glob(f"{folder.name}_{kind}*")
    rows = [orjson.loads(line) for file in files for line in file.read_bytes().splitlines()]
    rows = [row | row.pop("stats", {}) for row in rows]
    return sorted(rows, key=lambda row: row.get("timestamp") or row["completion_time"])
