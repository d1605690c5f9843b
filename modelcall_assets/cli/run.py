"""`modelcall run-task`: make what is missing."""

import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from contextlib import closing
from dataclasses import replace
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

import click

from modelcall_assets.cli.terminal import (
    RunDisplay,
    echo,
    file_option,
    load,
    misuse,
    task_argument,
)
from modelcall_assets.records.data_files import decode_key
from modelcall_assets.stages.asking import AskingStage
from modelcall_assets.stages.raw import WARNINGS
from modelcall_assets.stages.report import Tally
from modelcall_assets.stages.source import Published
from modelcall_assets.stages.stage import Stage
from modelcall_assets.stages.standing import Retry, out_of_date
from modelcall_assets.stages.task import Task
from modelcall_assets.storage.listing import matches
from modelcall_assets.storage.publishing import Manifest, read_manifest

SHOWN_WARNINGS = 20


@click.command("run-task")
@task_argument
@file_option
@click.option(
    "--fresh",
    is_flag=True,
    help="Ask for all rows again; what comes replaces what was there, failures too.",
)
@click.option("--job-index", type=click.IntRange(0), help="Which of those jobs this is, from 0.")
@click.option("--world-size", type=click.IntRange(1), help="Jobs that share the files.")
def run_task(
    task: Path, pattern: str | None, fresh: bool, job_index: int | None, world_size: int | None
) -> None:
    """Score or distil the input files of TASK.yaml: what is missing, failed or out of date.

    Runs the same assets as the Dagster UI in this one process, and the UI shows the runs. Stop it
    at any time: every reply is kept, and the next run asks only for what is missing.

    \b
      modelcall run-task configs/tasks/my_task.yaml
      modelcall run-task my_task.yaml --file 'python/*.jsonl'
      modelcall run-task my_task.yaml --job-index 0 --world-size 4   (one of four machines)
    """
    loaded = load(task)
    job, size = _job(loaded, job_index, world_size)
    options = {stage.name: {"fresh": True} for stage in loaded.stages if stage.answers and fresh}
    code = 0 if fresh or pattern or size > 1 else go_on(loaded)
    choose = partial(_selected, loaded, pattern=pattern, job_index=job, world_size=size)
    sys.exit(run_files(loaded, choose, options) or code)


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


def run_files(
    task: Task,
    choose: Callable[[Sequence[str]], Sequence[str]],
    options: Mapping[str, Mapping[str, Any]],
    files: Set[str] | None = None,
) -> int:
    """Materialise what `choose` takes of the keys of all input files, and tell how it ended; gives
    the exit code. `options` and `files` are for
    `TaskRunner.run`."""
    # Dagster takes most of a second to import: `--help` and set-up mistakes need not wait for it.
    from modelcall_assets.defs.instance import open_instance, register
    from modelcall_assets.defs.runs import TaskRunner

    task.check_ready()
    with open_instance(task.spec.root) as instance:
        keys = choose(register(instance, task).keys)
        if not keys and not any(stage.gathers and stage.keys.now() for stage in task.stages):
            echo(f"{task.spec.name}: no input files to work on")
            return 0
        started = time.monotonic()
        with closing(RunDisplay()) as display:
            runner = TaskRunner(task, instance, display.watcher)
            summary = runner.run(keys, options, files)
        seconds = time.monotonic() - started
    for message in summary.failed:
        echo(f"error: {message}", err=True)
    for key in summary.busy:
        echo(f"{decode_key(key)}: another run is working on it", err=True)
    is_wrong, nothing = bool(summary.failed or summary.busy), ""
    if not any(summary.ran.values()):
        nothing = "nothing done" if is_wrong else "nothing to do: every file is up to date"
    tallies = [*display.tallies.values()]
    echo("\n".join(_told(task, keys, summary.behind, nothing, tallies, seconds)))
    return 1 if is_wrong or summary.behind else 0


def go_on(task: Task) -> int:
    """With a retry that was killed, if there is one; gives the exit code. Files that
    are made anew anyway are left out."""
    if (killed := Retry.killed(task)) is None:
        return 0
    stage, choice = task.stage(killed.stages[-1]), killed.choice
    files = [Published(stage, key, made) for key in killed.files if (made := stage.latest(key))]
    old = {*out_of_date(stage, files, choice)} if isinstance(stage, AskingStage) else set[str]()
    left = {file.key: file.manifest.published for file in files if file.name not in old}
    if not left:
        echo(f"{told_retry(killed)} is dropped: its files are out of date", err=True)
        Retry.end(task)
        return 0
    echo(f"goes on with {told_retry(killed)}", err=True)
    return run_retry(task, replace(killed, files=left))


def told_retry(retry: Retry) -> str:
    told = {"ids": "{} ids", "where": "where {}", "reason": "reason {}", "again": "failed rows"}
    choice = ", ".join(
        told[name].format(f"{len(value):,}" if name == "ids" else value)
        for name, value in retry.choice.items()
    )
    return f"a retry that was interrupted ({choice}; {len(retry.files):,} files left)"


def run_retry(task: Task, retry: Retry) -> int:
    """Kept in mind until it ends by itself."""
    retry.begin(task)
    choose = keys_of(task.stage(retry.stages[-1]), retry.files)
    options = dict.fromkeys(retry.stages, retry.choice)
    code = run_files(task, choose, options, retry.files.keys())
    if code == 0 or Retry.killed(task) is None:
        Retry.end(task)
    return code


def keys_of(stage: Stage, chosen: Collection[str]) -> Callable[[Sequence[str]], Sequence[str]]:
    """Of the first stage."""
    is_all = stage.keys.of_groups
    return lambda present: [key for key in present if is_all or key in chosen]


def _selected(
    task: Task, keys: Sequence[str], pattern: str | None, job_index: int, world_size: int
) -> list[str]:
    """This job's share of the files, by the rule ceil(files / jobs) each, then the pattern."""
    share = ceil(len(keys) / world_size)
    own = list(keys[job_index * share : (job_index + 1) * share])
    if pattern is None:
        return own
    matching = [key for key in keys if matches(decode_key(key), pattern)]
    if not matching:
        raise misuse("--file", f"no input file under {task.spec.input_folder} matches '{pattern}'")
    return [key for key in matching if key in own]


def _told(
    task: Task,
    keys: Sequence[str],
    behind: Sequence[str],
    nothing: str,
    tallies: Sequence[Tally],
    seconds: float,
) -> Iterator[str]:
    """The whole selection's state, and what this run did for it; `nothing` says why it did not."""
    *before, last = (stage for stage in task.stages if stage.done)
    yield _totals(last, keys, behind)
    for stage in (*before, last):
        found, is_last = _manifests(stage, keys), stage is last
        manifests = found.values()
        if not is_last and any(made is None or made.failed or made.dropped for made in manifests):
            yield f"  {_totals(stage, keys)}"
        of = "" if is_last else f"{stage.name} of "
        for key, made in found.items():
            if made is not None and not made.accepted:
                yield f"  rejected: {of}{decode_key(key)}: {made.why_rejected}"
    for key in behind:
        if (made := last.latest(key)) and made.accepted:
            why = "the result of an earlier run, since this one did not make it"
            yield f"  kept: {decode_key(key)}: {why}"
    yield from _warnings(task.stages[0], keys)
    yield from (f"  warning: {warning}" for tally in tallies for warning in tally.warnings)
    requests = sum(tally.requests for tally in tallies)
    replayed = sum(tally.replayed for tally in tallies)
    if nothing:
        yield f"{nothing}, no request was sent"
    else:
        for stage in task.stages:
            yield from _adopted(stage, keys)
        rate = f" ({requests / seconds:,.0f}/s)" if requests else ""
        yield (
            f"{requests:,} requests sent in {seconds:.1f} s{rate}, "
            f"{replayed:,} rows answered from the journal"
            if last.asks
            else f"{last.done} in {seconds:.1f} s, no model was asked: {last.about}"
        )
    yield f"{last.name}: {last.folder}"


def _manifests(stage: Stage, keys: Sequence[str]) -> dict[str, Manifest | None]:
    """The latest results, accepted or not, of the selected keys of the first stage, or of all the
    stage has where these are others."""
    has_others = stage.keys is not stage.task.stages[0].keys
    return {key: stage.latest(key) for key in (stage.keys.now() if has_others else keys)}


def _adopted(stage: Stage, keys: Sequence[str]) -> Iterator[str]:
    for key, made in _manifests(stage, keys).items():
        detail = made.detail if made is not None else {}
        name = f"{stage.name} of {decode_key(key)}"
        if adopted := detail.get("adopted"):
            torn = adopted["torn"]
            yield (
                f"  adopted: {name}: {adopted['rows']:,} of {adopted['good']:,} good rows; "
                f"{adopted['failed']:,} rows without an answer, {len(torn):,} torn lines"
                + (f", the first: {torn[0]}" if torn else "")
            )
        for aside in detail.get("set_aside", ()):
            yield f"  set aside: {name}: the file that was there is kept as {aside}"


def _warnings(first: Stage, keys: Sequence[str]) -> list[str]:
    found = [
        f"  warning: {decode_key(key)}: {warning}"
        for key in keys
        if (made := read_manifest(first.manifest_path(key)))
        for warning in made.detail.get(WARNINGS, ())
    ]
    more = len(found) - SHOWN_WARNINGS
    return found[:SHOWN_WARNINGS] + ([f"  … {more} more warnings"] if more > 0 else [])


def _totals(stage: Stage, keys: Sequence[str], behind: Sequence[str] = ()) -> str:
    found = _manifests(stage, keys)
    manifests = [made for made in found.values() if made is not None]
    rows, ok = sum(m.rows for m in manifests), sum(m.ok for m in manifests)
    reasons = sum((Counter(manifest.failures) for manifest in manifests), Counter[str]())
    current = (made for key, made in found.items() if key not in behind)
    accepted = sum(made is not None and made.accepted for made in current)
    text = f"{accepted} of {len(found)} {stage.keys.what} {stage.done}: {rows:,} rows, "
    text += f"{ok:,} succeeded, {rows - ok:,} failed"
    by_reason = ", ".join(f"{reason} {count:,}" for reason, count in reasons.most_common())
    text += f" ({by_reason})" if by_reason else ""
    dropped = sum(manifest.dropped for manifest in manifests)
    return f"{text}, {dropped:,} dropped" if dropped else text
