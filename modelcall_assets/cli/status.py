"""`modelcall tasks`, `status` and `stop`: how far tasks are, and an end to what goes on."""

import sys
from collections import Counter
from fnmatch import fnmatchcase
from pathlib import Path
from shlex import quote

import click

from modelcall_assets.cli.options import TASK, any_task_argument, misuse
from modelcall_assets.cli.terminal import echo, json_option, print_rows
from modelcall_assets.config.catalog import find_root, legal_key, load_catalog, named_tasks
from modelcall_assets.config.files import written_name
from modelcall_assets.errors import SetupError
from modelcall_assets.records import decode_key
from modelcall_assets.records.outcome import Row
from modelcall_assets.stages.task import Task

SHOWN = 20
COUNTED = "files", "done", "failed"
ALWAYS = "step", "files", "done", "rows", "ok"
DOES = {"evaluation": "evaluates", "data_distillation": "distils"}


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
@any_task_argument
@json_option
def status(task: Task | None, as_json: bool) -> None:
    """Show how far TASK is, step by step, why files failed, and the commands to go on with.

    What is out of date `run-task` makes anew. Without TASK: all tasks, and their totals.

    \b
      modelcall status my_task
      modelcall status --json
    """
    if task is not None:
        _show(task, as_json)
    elif rows := _tasks():
        sums = {name: sum(row[name] or 0 for row in rows) for name in COUNTED}
        print_rows(rows, as_json=as_json, total={"task": "together", **sums})


def _tasks() -> list[Row]:
    from modelcall_assets.defs.going import going, known_states, last_end
    from modelcall_assets.defs.instance import open_instance  # takes most of a second

    catalog, rows = load_catalog(root := find_root(Path.cwd())), list[Row]()
    with open_instance(root) as instance:
        now = {key: each.state for each in going(instance) for key in each.tasks}
        for spec in catalog.tasks:
            counts, state = [None] * 3, now.get(spec.key) or last_end(instance, spec.key)
            try:
                by_stage = known_states(instance, Task(spec))
                failed = sum(each["failed"] for each in by_stage)
                counts = [by_stage[-1].total(), by_stage[-1]["done"], failed]
            except SetupError as error:  # as a scorer that cannot be imported
                state = f"broken: {error}"
            row = {"task": spec.name, "file": _short(spec.file_name)}
            row["it"] = DOES.get(spec.task.task_type, "rates")
            rows.append(row | dict(zip(COUNTED, counts, strict=True)) | {"state": state})
    for each in catalog.broken:
        row = {"task": written_name(each.path), "file": _short(each.file_name), "it": None}
        state = "broken: `modelcall check` says why"
        rows.append(row | dict.fromkeys(COUNTED) | {"state": state})
    if not rows:
        echo("no task yet; `modelcall create-task NAME` makes one", err=True)
    return rows


def _short(file: str) -> str:
    return file.removeprefix("configs/tasks/")


def _show(task: Task, as_json: bool) -> None:
    from modelcall_assets.defs.chain import Chain
    from modelcall_assets.defs.going import OLD, STATES, states_of, why_failed
    from modelcall_assets.defs.instance import open_instance

    rows, why = list[Row](), list[str]()
    with open_instance(task.spec.root) as instance:
        chain = Chain(task, instance, (), {}, None, None)
        states = dict[str, str]()
        for stage in task.stages:
            states = states_of(chain, stage, states)
            of = [row for row in chain.results.latest(stage, [*states]).values() if row]
            row: Row = {"step": stage.name, "files": len(states)}
            counts = Counter(states.values())
            row |= {state: counts[state] for state in (*STATES.values(), OLD)}
            names = {"rows": "rows", "ok": "ok", "failed": "failed_rows", "dropped": "dropped"}
            row |= {told: sum(each[name] for each in of) for name, told in names.items()}
            costs = [each["numbers"].get("cost_usd") for each in of]
            rows.append(row | {"cost_usd": None if None in costs else sum(costs)})
            for key in [key for key, state in states.items() if state == "failed"][:SHOWN]:
                told = why_failed(instance, stage, key)
                why.append(f"{decode_key(key)}: {stage.name} failed: {told}")
    if as_json:
        print_rows(rows, as_json=True)
        return
    told = [name for name in rows[0] if name in ALWAYS or any(row[name] for row in rows)]
    print_rows([{name: row[name] for name in told} for row in rows])
    asks = ("failures", "retry") if why or any(row["failed_rows"] for row in rows) else ()
    is_due = any(row[state] for row in rows for state in ("failed", "missing", "out_of_date"))
    goes_on = any(row["running"] for row in rows)
    for command in ("monitor",) if goes_on else (*("run-task",) * is_due, *asks):
        why.append(f"next: modelcall {command} {quote(task.spec.name)}")
    for line in why:
        echo(line)


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
    from modelcall_assets.defs.going import stop as end
    from modelcall_assets.defs.instance import open_instance

    if (task is None) != is_all:
        raise misuse("TASK", "name one, or say --all", fix="`modelcall tasks` shows what runs")
    files = named_tasks(root := find_root(Path.cwd()))
    found = [file for name, file in files.items() if task and fnmatchcase(name, task)]
    if task and not found:
        found = [TASK.convert(task, None, None)]
    keys = {legal_key(written_name(file)) for file in found}
    with open_instance(root) as instance:
        ended = end(instance, lambda key: is_all or key in keys)
    for each in {each.id: each for each in sorted(ended)}.values():  # a run, not its process too
        said = "stopped" if each.is_here else f"goes on at {each.host}: stop it there"
        echo(f"{', '.join(sorted(each.tasks))}: {each.what} {each.id}: {said}")
    if not ended:
        echo("nothing to stop")
    sys.exit(1 if any(not each.is_here for each in ended) else 0)
