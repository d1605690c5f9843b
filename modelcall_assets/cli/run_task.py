"""`modelcall run-task`: materialise what is missing, failed or out of date."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from math import ceil
from pathlib import Path

import click

from modelcall_assets.cli.display import RunDisplay, echo
from modelcall_assets.cli.task_argument import task_argument, task_steps
from modelcall_assets.config.spec import CHATML, MERGED, RESPONSES, SCORES
from modelcall_assets.errors import Problem, SetupError
from modelcall_assets.records.keys import decode_key
from modelcall_assets.steps.published import result_of
from modelcall_assets.steps.raw import WARNINGS
from modelcall_assets.steps.task_steps import GROUPS, RAW, TaskSteps
from modelcall_assets.storage.files import matches
from modelcall_assets.storage.manifest import Manifest, read_manifest

SHOWN_WARNINGS = 20
_DONE = {CHATML: "converted", MERGED: "merged", RESPONSES: "answered", SCORES: "scored"}


@click.command("run-task")
@task_argument
@click.option("--file", "pattern", metavar="GLOB", help="Only input files whose path matches.")
@click.option("--fresh", is_flag=True, help="Ask the model again, also for rows with an answer.")
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
    steps = task_steps(task)
    job, size = _job(steps, job_index, world_size)

    def choose(keys: Sequence[str]) -> list[str]:
        return _selected(steps, keys, pattern, job, size)

    sys.exit(run_files(steps, choose, fresh=fresh))


def _job(steps: TaskSteps, index: int | None, asked: int | None) -> tuple[int, int]:
    """Which of how many jobs this is. A merge needs all files, so that one job does such a task;
    so does a job that is not told which one it is."""
    size = asked or steps.spec.task.distributed.world_size or 1
    if MERGED in steps.stages:
        if asked is not None and asked > 1:
            wrong = "a task that merges cannot be shared: each group needs all of its members"
            fix = "give each step a task file of its own, and share those that convert or answer"
            raise SetupError([Problem("modelcall run-task", "--world-size", wrong, fix=fix)])
        size = 1
    if index is None and size > 1:
        if asked is not None:
            wrong, expected = f"missing: which of the {size} jobs is this?", f"0 to {size - 1}"
            raise SetupError([Problem("modelcall run-task", "--job-index", wrong, expected)])
        told = f"distributed.world_size is {size}, but without --job-index this job takes all files"
        echo(f"{steps.spec.name}: {told}", err=True)
        size = 1
    if (index or 0) >= size:
        wrong = f"there is no job {index} among {size}"
        raise SetupError([Problem("modelcall run-task", "--job-index", wrong, f"0 to {size - 1}")])
    return index or 0, size


def run_files(
    steps: TaskSteps,
    choose: Callable[[Sequence[str]], Sequence[str]],
    *,
    fresh: bool = False,
    again: bool = False,
) -> int:
    """Materialise what `choose` takes of the keys of all input files, and tell how it ended; gives
    the exit code. With `again` files that are up to date have their failed rows asked again."""
    # Dagster takes most of a second to import: `--help` and set-up mistakes need not wait for it.
    from modelcall_assets.defs.instance import open_instance
    from modelcall_assets.defs.partitions import add_new_files
    from modelcall_assets.defs.runs import TaskRunner

    steps.check_ready()
    with open_instance(steps.spec.root) as instance:
        keys = choose(add_new_files(instance, steps))
        if not keys and not (MERGED in steps.stages and steps.keys(GROUPS)):
            echo(f"{steps.spec.name}: no input files to work on")
            return 0
        started = time.monotonic()
        with RunDisplay() as display:
            runner = TaskRunner(steps, instance, display.watcher)
            summary = runner.run(keys, fresh=fresh, again=again)
        seconds = time.monotonic() - started
    for message in summary.failed:
        echo(f"error: {message}", err=True)
    for key in summary.busy:
        echo(f"{decode_key(key)}: another run is working on it", err=True)
    nothing = ""
    if not any(summary.ran.values()):
        is_fine = not (summary.busy or summary.failed)
        nothing = "nothing to do: every file is up to date" if is_fine else "nothing done"
    echo(_summary(steps, keys, summary.behind, nothing, display, seconds))
    return 1 if summary.failed or summary.busy or summary.behind else 0


def _selected(
    steps: TaskSteps, keys: Sequence[str], pattern: str | None, job_index: int, world_size: int
) -> list[str]:
    """This job's share of the files, by the rule ceil(files / jobs) each, then the pattern."""
    share = ceil(len(keys) / world_size)
    own = list(keys[job_index * share : (job_index + 1) * share])
    if pattern is None:
        return own
    matching = [key for key in keys if matches(decode_key(key), pattern)]
    if not matching:
        folder = steps.spec.input_folder
        wrong = f"no input file under {folder} matches '{pattern}'"
        raise SetupError([Problem("modelcall run-task", "--file", wrong)])
    return [key for key in matching if key in own]


def _summary(
    steps: TaskSteps,
    keys: Sequence[str],
    behind: Sequence[str],
    nothing: str,
    display: RunDisplay,
    seconds: float,
) -> str:
    """The whole selection's state, and what this run did for it; `nothing` says why it did not."""
    *before, last = (stage for stage in steps.stages if stage in _DONE)
    lines = [_totals(steps, last, keys)]
    for stage in before:
        if any(made is None or made.failed for made in _manifests(steps, stage, keys).values()):
            lines.append(f"  {_totals(steps, stage, keys)}")
        lines += _rejected(steps, stage, keys, f"{stage} of ")
    lines += _rejected(steps, last, keys)
    lines += [
        f"  kept: {decode_key(key)}: the result of an earlier run, since this one did not make it"
        for key in behind
        if (made := result_of(steps.layout, last, key, rejected=True)) and made.accepted
    ]
    lines += _warnings(steps, keys)
    lines += (f"  warning: {warning}" for warning in display.warnings)
    if not nothing:
        lines += [line for stage in steps.stages for line in _adopted(steps, stage, keys)]
    if nothing:
        lines.append(f"{nothing}, no request was sent")
    elif steps.rule_stage is not None:
        lines.append(f"rated by {steps.rule_stage.path} in {seconds:.1f} s, no model was asked")
    elif last in (CHATML, MERGED):
        lines.append(f"{_DONE[last]} in {seconds:.1f} s, no model was asked")
    else:
        rate = f" ({display.requests / seconds:,.0f}/s)" if display.requests else ""
        lines.append(
            f"{display.requests:,} requests sent in {seconds:.1f} s{rate}, "
            f"{display.replayed:,} rows answered from the journal"
        )
    lines.append(f"{last}: {steps.spec.output_folder}")
    return "\n".join(lines)


def _manifests(steps: TaskSteps, stage: str, keys: Sequence[str]) -> dict[str, Manifest | None]:
    """The latest results, accepted or not, of the selected keys of the first stage, or of all the
    stage has where these are others."""
    has_others = steps.partitions(stage) != steps.partitions(steps.stages[0])
    own = steps.keys(steps.partitions(stage)) if has_others else keys
    return {key: result_of(steps.layout, stage, key, rejected=True) for key in own}


def _rejected(steps: TaskSteps, stage: str, keys: Sequence[str], of: str = "") -> list[str]:
    return [
        f"  rejected: {of}{decode_key(key)}: {made.why_rejected}"
        for key, made in _manifests(steps, stage, keys).items()
        if made is not None and not made.accepted
    ]


def _adopted(steps: TaskSteps, stage: str, keys: Sequence[str]) -> Iterator[str]:
    """What became of files that were not ours."""
    for key, made in _manifests(steps, stage, keys).items():
        detail = made.detail if made is not None else {}
        name = f"{stage} of {decode_key(key)}"
        if adopted := detail.get("adopted"):
            torn = adopted["torn"]
            text = f"  adopted: {name}: {adopted['rows']:,} of {adopted['good']:,} good rows; "
            text += f"{adopted['failed']:,} rows without an answer, {len(torn):,} torn lines"
            yield text + (f", the first: {torn[0]}" if torn else "")
        for aside in detail.get("set_aside", ()):
            yield f"  set aside: {name}: the file that was there is kept as {aside}"


def _warnings(steps: TaskSteps, keys: Sequence[str]) -> list[str]:
    """What `raw` found in the files."""
    manifests = ((key, read_manifest(steps.layout.manifest_path(RAW, key))) for key in keys)
    found = [
        f"  warning: {decode_key(key)}: {warning}"
        for key, manifest in manifests
        if manifest
        for warning in manifest.detail.get(WARNINGS, ())
    ]
    more = len(found) - SHOWN_WARNINGS
    return found[:SHOWN_WARNINGS] + ([f"  … {more} more warnings"] if more > 0 else [])


def _totals(steps: TaskSteps, stage: str, keys: Sequence[str]) -> str:
    found = _manifests(steps, stage, keys)
    manifests = [manifest for manifest in found.values() if manifest is not None]
    rows, ok = sum(m.rows for m in manifests), sum(m.ok for m in manifests)
    reasons = sum((Counter(manifest.failures) for manifest in manifests), Counter[str]())
    what = "merge groups" if steps.partitions(stage) == GROUPS else "files"
    accepted = sum(manifest.accepted for manifest in manifests)
    text = f"{accepted} of {len(found)} {what} {_DONE[stage]}: {rows:,} rows, "
    text += f"{ok:,} succeeded, {rows - ok:,} failed"
    by_reason = ", ".join(f"{reason} {count:,}" for reason, count in reasons.most_common())
    text += f" ({by_reason})" if by_reason else ""
    dropped = sum(manifest.dropped for manifest in manifests)
    return f"{text}, {dropped:,} dropped" if dropped else text
