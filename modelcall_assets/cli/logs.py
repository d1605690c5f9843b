"""`modelcall logs`: what runs have told."""

from pathlib import Path

import click

from modelcall_assets.cli.options import EXISTING_FILE, load
from modelcall_assets.cli.terminal import echo, json_option, print_rows
from modelcall_assets.config.catalog import find_root, load_catalog
from modelcall_assets.errors import InputError


@click.command()
@click.argument("given", metavar="[TASK.yaml]", required=False, type=EXISTING_FILE)
@click.option("--task", type=EXISTING_FILE, help="The same as TASK.yaml.")
@click.option("--run", "asked", default="", metavar="ID", help="That run; its first letters do.")
@click.option("--limit", type=click.IntRange(1), default=100, help="Lines; default: the last 100.")
@json_option
def logs(given: Path | None, task: Path | None, asked: str, limit: int, as_json: bool) -> None:
    """Show what the last run of TASK.yaml has told, and last of all why it failed.

    Without TASK.yaml: the last runs of all tasks.

    \b
      modelcall logs
      modelcall logs my_task.yaml --run 1f2e
    """
    from modelcall_assets.defs.instance import open_instance
    from modelcall_assets.defs.logs import runs_of, shown, told
    from modelcall_assets.defs.runs import end_dead_runs

    path = given or task
    own = None if path is None else load(path).spec
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
        raise InputError("no such run yet; `modelcall run-task TASK.yaml` makes one")
    if own is None or as_json:
        print_rows(rows, as_json=as_json)
    else:
        for row in rows:
            echo(" | ".join(row.values()))
