"""`modelcall tasks`, `status` and `stop`: how far tasks are, and an end to what goes on."""

import socket
import sys
from collections import Counter
from fnmatch import fnmatchcase
from pathlib import Path
from shlex import quote

import click

from modelcall_assets.cli.options import TASK, load, misuse
from modelcall_assets.cli.terminal import echo, json_option, print_rows
from modelcall_assets.config.catalog import find_root, legal_key, load_catalog, named_tasks
from modelcall_assets.config.files import written_name
from modelcall_assets.errors import SetupError
from modelcall_assets.records import decode_key
from modelcall_assets.records.outcome import Row
from modelcall_assets.stages import Stage
from modelcall_assets.stages.summary import COUNTS, Results
from modelcall_assets.stages.task import Task

SHOWN = 20
COUNTED = "files", "done", "failed"


@click.command()
@json_option
def tasks(as_json: bool) -> None:
    """List the tasks of the project, broken ones too, with what goes on or how the last run ended.

    Files are those that a run, `modelcall register` or the daemon has found. A done one may be out
    of date: `modelcall status TASK` looks.

    \b
      modelcall tasks
    """
    print_rows(_tasks(), as_json=as_json)


@click.command()
@click.argument("task", metavar="[TASK]", type=TASK, required=False)
@json_option
def status(task: Path | None, as_json: bool) -> None:
    """Show how far TASK is, step by step, why files failed, and the commands to go on with.

    What is out of date `run-task` makes anew. Without TASK: all tasks, and their totals.

    \b
      modelcall status my_task
      modelcall status --json
    """
    if task is not None:
        _show(load(task), as_json)
    elif rows := _tasks():
        sums = {name: sum(row[name] or 0 for row in rows) for name in COUNTED}
        print_rows(rows, as_json=as_json, total={"task": "together", **sums})


def _tasks() -> list[Row]:
    from modelcall_assets.defs.going import going, known_states, last_end
    from modelcall_assets.defs.instance import open_instance  # takes most of a second

    catalog, rows, unknown = load_catalog(root := find_root(Path.cwd())), list[Row](), [None] * 3
    with open_instance(root) as instance:
        now = {key: each.state for each in going(instance) for key in each.tasks}
        for spec in catalog.tasks:
            state, counts = now.get(spec.key) or last_end(instance, spec.key), unknown
            try:
                by_stage = known_states(instance, Task(spec))
                failed = sum(each["failed"] for each in by_stage)
                counts = [by_stage[-1].total(), by_stage[-1]["done"], failed]
            except SetupError as error:  # as a scorer that cannot be imported
                state = f"broken: {error}"
            row = {"task": spec.name, "file": spec.file_name, "type": spec.task.task_type}
            rows.append(row | dict(zip(COUNTED, counts, strict=True)) | {"state": state})
    for each in catalog.broken:
        row = {"task": written_name(each.path), "file": each.file_name, "type": None}
        state = "broken: `modelcall check` says why"
        rows.append(row | dict.fromkeys(COUNTED) | {"state": state})
    return rows


def _show(task: Task, as_json: bool) -> None:
    from modelcall_assets.defs.chain import Chain
    from modelcall_assets.defs.going import OLD, STATES, states_of, why_failed
    from modelcall_assets.defs.instance import open_instance

    rows, counted, why = list[Row](), Counter[str](), list[str]()
    with open_instance(task.spec.root) as instance:
        chain = Chain(task, instance, (), {}, None, None)
        for stage in task.stages:
            states = states_of(chain, stage)
            counts = Counter(states.values())
            row = {"step": stage.name, "files": len(states)}
            row |= {state: counts[state] for state in (*STATES.values(), OLD)}
            rows.append(row := row | _sums(chain.results, stage, [*states]))
            counted.update({name: value for name, value in row.items() if type(value) is int})
            for key in [key for key, state in states.items() if state == "failed"][:SHOWN]:
                told = why_failed(instance, stage, key)
                why.append(f"{decode_key(key)}: {stage.name} failed: {told}")
    print_rows(rows, as_json=as_json)
    commands = ["run-task"] if counted["failed"] + counted["missing"] + counted[OLD] else []
    commands += ["failures", "retry"] if counted["failed_rows"] else []
    commands += ["monitor"] if counted["running"] else []
    why += (f"next: modelcall {command} {quote(task.spec.name)}" for command in commands)
    for line in [] if as_json else why:
        echo(line)


def _sums(results: Results, stage: Stage, keys: list[str]) -> Row:
    """Of the latest results, accepted or not; the cost only where that of all is known."""
    each = ((stage.name, key) for key in keys)
    found = (results.rows.get((*at, False)) or results.rows.get((*at, True)) for at in each)
    made = [row for row in found if row is not None]
    costs = [row["numbers"].get("cost_usd") for row in made] if stage.asks else []
    counts = {name: sum(row[name] for row in made) for name in COUNTS}
    counts["failed_rows"] = counts.pop("failed")
    return counts | {"cost_usd": sum(costs) if costs and None not in costs else None}


@click.command()
@click.argument("task", metavar="[TASK]", required=False, shell_complete=TASK.shell_complete)
@click.option("--all", "is_all", is_flag=True, help="Those of all tasks.")
def stop(task: str | None, is_all: bool) -> None:
    """End the runs of TASK on this machine, those of the daemon too, as Ctrl-C does: requests in
    flight are waited for, every reply is kept. What is queued is cancelled. TASK may be a pattern.

    \b
      modelcall stop my_task
      modelcall stop 'code_*'
    """
    from modelcall_assets.defs.going import stop as ended
    from modelcall_assets.defs.instance import open_instance

    if (task is None) != is_all:
        raise misuse("TASK", "name one, or say --all", fix="`modelcall tasks` shows what runs")
    root, pattern = find_root(Path.cwd()), task or "*"
    named = ((name, (name, file.stem)) for name, file in named_tasks(root))
    keys = {legal_key(n) for n, both in named if any(fnmatchcase(each, pattern) for each in both)}
    if not keys and task is not None:
        keys = {legal_key(written_name(TASK.convert(task, None, None)))}
    with open_instance(root) as instance:
        found = ended(instance, lambda key: is_all or key in keys)
    here = socket.gethostname()
    for each in found:
        said = "stopped" if each.host == here else f"goes on at {each.host}: stop it there"
        echo(f"{', '.join(sorted(each.tasks))}: {each.id}: {said}")
    if not found:
        echo("nothing to stop")
    sys.exit(1 if any(each.host != here for each in found) else 0)
