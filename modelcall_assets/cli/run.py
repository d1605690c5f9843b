"""`modelcall run-task` and `retry`: make what is missing, and ask again."""

import gc
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from contextlib import closing
from dataclasses import replace
from shlex import quote
from typing import Any

import click

from modelcall_assets.cli.options import (
    chosen_files,
    file_option,
    misuse,
    parsed_where,
    reason_option,
    stage_of,
    stage_option,
    task_argument,
    where_option,
)
from modelcall_assets.cli.run_display import RunDisplay
from modelcall_assets.cli.terminal import echo
from modelcall_assets.errors import InputError
from modelcall_assets.records import decode_key
from modelcall_assets.records.outcome import NEVER_ASKED, count_of, short
from modelcall_assets.stages import Stage
from modelcall_assets.stages.agreement import LEFT_OUT
from modelcall_assets.stages.asking import AskingStage
from modelcall_assets.stages.source import Published
from modelcall_assets.stages.standing import MAKE_ANEW, Retry, Wanted, out_of_date
from modelcall_assets.stages.task import Task, share_of
from modelcall_assets.storage.publishing import Manifest

SHOWN_IDS = 5


@click.command("run-task")
@task_argument
@file_option
@click.option(
    "--fresh",
    is_flag=True,
    help="Ask for all rows again; what comes replaces what was there, failures too.",
)
@click.option("--detach", is_flag=True, help="Return at once; `modelcall ui` runs it.")
@click.option("--job-index", type=click.IntRange(0), help="Which of those jobs this is, from 0.")
@click.option("--world-size", type=click.IntRange(1), help="Jobs that share the files.")
def run_task(
    task: Task,
    pattern: str | None,
    fresh: bool,
    detach: bool,
    job_index: int | None,
    world_size: int | None,
) -> None:
    """Score or distil the input files of TASK: what is missing, failed or out of date.

    Does the same as the Dagster UI in this one process, and the UI shows the runs. Stop it
    at any time: every reply is kept, and the next run asks only for what is missing.

    \b
      modelcall run-task configs/tasks/my_task.yaml
      modelcall run-task my_task.yaml --file 'python/*.jsonl'
      modelcall run-task my_task.yaml --job-index 0 --world-size 4   (one of four machines)
    """
    job, size = _job(task, job_index, world_size)
    options = {stage.name: {"fresh": True} for stage in task.stages if stage.answers and fresh}
    later = {"pattern": pattern, "options": options} if detach else None
    code = 0 if fresh or pattern or size > 1 or detach else _go_on(task)

    def choose(keys: Sequence[str]) -> list[str]:
        if pattern is not None and not share_of(keys, pattern, 0, 1):
            wrong = f"no input file under {task.spec.input_folder} matches '{pattern}'"
            raise misuse("--file", wrong)
        return share_of(keys, pattern, job, size)

    sys.exit(_run_files(task, choose, options, job=f"{job}/{size}", later=later) or code)


def _job(task: Task, index: int | None, asked: int | None) -> tuple[int, int]:
    """Which of how many jobs this is. A merge needs all files, so that one job does such a task;
    so does a job that is not told which one it is."""
    size = asked or task.spec.task.distributed.world_size or 1
    if any(stage.gathers for stage in task.stages):
        if asked is not None and asked > 1:
            wrong = "a task that merges cannot be shared: each group needs all of its members"
            fix = "give each step a task file of its own, and share those that convert or answer"
            raise misuse("--world-size", wrong, fix=fix)
        size = 1
    if index is None and size > 1:
        if asked is not None:
            wrong, expected = f"missing: which of the {size} jobs is this?", f"0 to {size - 1}"
            raise misuse("--job-index", wrong, expected)
        told = f"distributed.world_size is {size}, but without --job-index this job takes all files"
        echo(f"{task.spec.name}: {told}", err=True)
        size = 1
    if (index or 0) >= size:
        wrong = f"there is no job {index} among {size}"
        raise misuse("--job-index", wrong, f"0 to {size - 1}")
    return index or 0, size


def _run_files(
    task: Task,
    choose: Callable[[Sequence[str]], Sequence[str]],
    options: Mapping[str, Mapping[str, Any]],
    files: Set[str] | None = None,
    job: str = "0/1",
    later: Mapping[str, Any] | None = None,
) -> int:
    """Make what `choose` takes of the keys of all input files, and tell how it ended; gives
    the exit code. `options`, `files` and `job` are for `TaskRunner`, `later` for `queue`."""
    # Dagster takes most of a second to import: `--help` and set-up mistakes need not wait for it.
    # Nothing of that is garbage, and to look for some would take a fifth longer.
    if is_new := "dagster" not in sys.modules:
        gc.disable()
    from modelcall_assets.defs.instance import open_instance, register
    from modelcall_assets.defs.runs import TaskRunner, queue

    if is_new:
        gc.freeze()
        gc.enable()
    task.check_ready()
    with open_instance(task.spec.root) as instance:
        keys = choose(register(instance, task).keys)
        if not keys and not any(stage.gathers and stage.keys.now() for stage in task.stages):
            echo(f"{task.spec.name}: no input files to work on")
            return 0
        if later is not None:
            name, (run_id, is_soon) = quote(task.spec.name), queue(instance, task, later, job)
            echo(f"queued as {run_id}: modelcall monitor {name}, modelcall stop {name}")
            if not is_soon:
                echo("no daemon runs: it begins when `modelcall ui` does")
            return 0
        before = 0 if files is None else _failed(task, options, files)
        with closing(RunDisplay()) as display:
            ended = TaskRunner(task, instance, display.watcher, job).run(keys, options, files)
    for message in ended.failed:
        echo(f"error: {message}", err=True)
    for key in ended.busy:
        echo(f"{decode_key(key)}: another run is working on it", err=True)
    if files is not None:
        now, of = _failed(task, options, files), count_of(len(files), "file")
        echo(f"retried {of}: {count_of(now, 'row')} without an answer, {before:,} before")
    echo("\n".join(display.told(task, keys, ended)))
    for overview in task.overviews:
        if (made := overview.accepted(*overview.keys.now())) is None:
            continue
        if "agreement_alpha" in (numbers := made.detail["numbers"]):
            of = f"of {count_of(numbers['agreement_items'], 'item')} with two labels or more"
            echo(f"agreement α {numbers['agreement_alpha']:.4f} {of}")
        for each in made.detail.get(LEFT_OUT, ()):
            echo(f"left out of the agreement: {each['rater']}: {each['why']}")
    return 1 if ended.failed or ended.busy or ended.behind else 0


def _failed(task: Task, options: Iterable[str], files: Iterable[str]) -> int:
    """Of those files the rows that the last of the stages has asked about in vain."""
    *_, asked = options
    made = (task.stage(asked).latest(key) for key in files)
    return sum(_unanswered(each) for each in made if each is not None)


def _unanswered(made: Manifest) -> int:
    return sum(made.failures.values()) - sum(made.failures.get(reason, 0) for reason in NEVER_ASKED)


def _go_on(task: Task) -> int:
    """With a retry that was killed, if there is one; gives the exit code. Files that
    are made anew anyway are left out."""
    if (killed := Retry.killed(task)) is None:
        return 0
    stage, choice = task.stage(killed.stages[-1]), killed.choice
    files = [Published(stage, key, made) for key in killed.files if (made := stage.latest(key))]
    old = {*out_of_date(stage, files, choice)} if isinstance(stage, AskingStage) else set[str]()
    left = {file.key: file.manifest.published for file in files if file.name not in old}
    if not left:
        echo(f"{_told_retry(killed)} is dropped: its files are out of date", err=True)
        Retry.end(task)
        return 0
    echo(f"goes on with {_told_retry(killed)}", err=True)
    return _run_retry(task, replace(killed, files=left))


def _told_retry(retry: Retry) -> str:
    told = {"ids": "{} ids", "where": "where {}", "reason": "reason {}", "again": "failed rows"}
    choice = ", ".join(
        told[name].format(f"{len(value):,}" if name == "ids" else value)
        for name, value in retry.choice.items()
    )
    return f"a retry that was interrupted ({choice}; {count_of(len(retry.files), 'file')} left)"


def _run_retry(task: Task, retry: Retry) -> int:
    """Kept in mind until it ends by itself."""
    retry.begin(task)
    is_all = task.stage(retry.stages[-1]).keys.of_groups
    options = dict.fromkeys(retry.stages, retry.choice)

    def choose(present: Sequence[str]) -> list[str]:
        return [key for key in present if is_all or key in retry.files]

    code = _run_files(task, choose, options, retry.files.keys())
    if code == 0 or Retry.killed(task) is None:
        Retry.end(task)
    return code


@click.command()
@task_argument
@stage_option
@file_option
@reason_option
@click.option(
    "--ids", metavar="ID,…", help="Only these records, failed or not; `-` reads one a line."
)
@where_option
@click.option("--dry-run", is_flag=True, help="Only count the rows.")
def retry(
    task: Task,
    stage: str | None,
    pattern: str | None,
    reason: str | None,
    ids: str | None,
    condition: str | None,
    dry_run: bool,
) -> None:
    """Ask the model again for the failed rows of TASK, in files that are red or green.

    Makes the files that have such rows once more; all other rows are read from the journal, and
    nothing is paid for them. With --ids or --where rows are asked anew that have an answer: it
    stays where the new one fails. A file that was never finished is for run-task, and so is one
    that is out of date. A retry of chosen rows that was killed is gone on with by the same command,
    or by run-task.

    \b
      modelcall retry my_task.yaml
      modelcall retry my_task.yaml --reason timeout --file 'python/*'
      modelcall retry my_task.yaml --where 'score < 2'
      modelcall retry my_task.yaml --ids a17,b4
    """
    asked = _stage_with(task, reason) if reason and not stage else stage_of(task, stage)
    if not asked.answers:
        raise misuse(
            "--stage", f"{asked.name} asks nothing", fix="choose one that answers or rates"
        )
    if reason in NEVER_ASKED:
        fix = "mend the input, then run the task"
        raise misuse("--reason", f"nothing was asked about rows with {reason}", fix=fix)
    files = chosen_files(asked, pattern, rejected=True)
    names = _ids(ids)
    given = {"ids": sorted(names or ()), "where": condition, "reason": reason}
    choice = {name: value for name, value in given.items() if value}
    choice |= {"again": True} if names is None and not choice else {}
    if (killed := Retry.killed(task)) and not dry_run:
        is_same = (killed.stages[-1], killed.choice) == (asked.name, choice)
        if is_same and killed.files.keys() <= {file.key for file in files}:
            sys.exit(_go_on(task))
        echo(f"warning: {_told_retry(killed)} is given up", err=True)
    wanted = Wanted(names, parsed_where(condition, files), reason or "")
    stages = [asked] if wanted or stage else [each for each in task.stages if each.answers]
    chosen = _chosen(files, wanted)
    files = [file for file, _ in chosen]
    if isinstance(asked, AskingStage) and (old := out_of_date(asked, files, choice)):
        more = f" and {count_of(len(old) - 1, 'more file')}" * (len(old) > 1)
        raise InputError(f"{old[0]}{more}: {asked.name} out of date or gone; {MAKE_ANEW}")
    if not chosen:
        is_chosen = ids is not None or condition
        what = " is chosen" if is_chosen else " failed" + f" for {reason}" * bool(reason)
        echo(f"{task.spec.name}: no row{what}, nothing to do")
    elif dry_run:
        for file, count in chosen:
            echo(f"{file.name}: {count:,} of {count_of(file.manifest.rows, 'row')}")
    else:
        publications = {each.key: each.manifest.published for each in files}
        sys.exit(_run_retry(task, Retry([each.name for each in stages], choice, publications)))


def _stage_with(task: Task, reason: str) -> Stage:
    """The first that asks and has rows which failed for that reason: the next ones only say it
    after it."""
    asking = [stage for stage in task.stages if stage.answers]
    for stage in asking[:-1]:
        made = (stage.latest(key) for key in stage.keys.now())
        if any(each is not None and each.failures.get(reason) for each in made):
            return stage
    return task.stages[-1]


def _chosen(files: Sequence[Published], wanted: Wanted) -> list[tuple[Published, int]]:
    """Of which files how many rows; ids that no row has are named on standard error."""
    chosen, absent = list[tuple[Published, int]](), {*(wanted.ids or ())}
    for file in files:
        rows = [name for _, name in wanted.rows(file)] if wanted else []
        absent.difference_update(rows)
        if count := len(rows) if wanted else _unanswered(file.manifest):
            chosen.append((file, count))
    if absent:
        told = ", ".join(map(short, sorted(absent)[:SHOWN_IDS])) + ", …" * (len(absent) > SHOWN_IDS)
        hint = "; with --ids -, ids may hold commas"
        echo(f"warning: no such row is chosen: {told} ({len(absent):,} ids){hint}", err=True)
    return chosen


def _ids(given: str | None) -> Set[str] | None:
    """Those of the option; None when it is not given."""
    if given is None:
        return None
    if given != "-":
        return {name for each in given.split(",") if (name := each.strip())}
    lines = sys.stdin.read().removeprefix("\ufeff").split("\n")
    return {name for each in lines if (name := each.removesuffix("\r"))}
