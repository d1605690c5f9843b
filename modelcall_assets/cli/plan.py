"""`modelcall plan`: what a task would send and cost, before anything is paid."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from modelcall_assets.cli.display import cell, echo
from modelcall_assets.cli.task_argument import task_argument, task_steps
from modelcall_assets.config.spec import MERGED, RAW, SCORES
from modelcall_assets.errors import InputError
from modelcall_assets.records.keys import decode_key
from modelcall_assets.steps.preview import FilePlan, plan_file
from modelcall_assets.steps.responses import ResponseStage
from modelcall_assets.steps.scores import ScoreStage
from modelcall_assets.steps.standing import CHANGED, NOT_OURS, others
from modelcall_assets.steps.task_steps import TaskSteps

SHOWN_FILES = 40
MILLION = 1_000_000
_TITLES = {"rows": "rows", "prompt_tokens": "prompt tokens", "journalled": "in journal"}


Asking = ScoreStage | ResponseStage


@click.command("plan")
@task_argument
@click.option(
    "--answer-tokens",
    type=click.IntRange(1),
    help="Tokens of one answer; default: the model file's max_tokens.",
)
def plan(task: Path, answer_tokens: int | None) -> None:
    """Show the files of TASK.yaml, their rows, estimated tokens and cost. Sends nothing.

    Prompt tokens are extrapolated from fifty rows of each file with the o200k vocabulary;
    the journal column counts records that have a reply already. Files that others have left where
    the outputs belong are named, and whether the next run adopts them or refuses.

    \b
      modelcall plan configs/tasks/my_task.yaml --answer-tokens 150
    """
    steps = task_steps(task)
    plans: list[FilePlan] = []
    unreadable: list[InputError] = []
    for file in steps.inputs.files():
        try:
            plans.append(plan_file(steps, file))
        except InputError as error:
            unreadable.append(error)
    console = Console()
    asking = steps.first_asking
    console.print(_table(plans, _model_columns(asking)))
    for line in _outlook(steps, plans, answer_tokens):
        console.print(cell(line))
    try:
        in_the_way = [*_in_the_way(steps)]
    except InputError as error:
        in_the_way = []
        unreadable.append(error)
    for line in in_the_way[:SHOWN_FILES]:
        echo(line)
    if len(in_the_way) > SHOWN_FILES:
        echo(f"… {len(in_the_way) - SHOWN_FILES:,} more")
    if in_the_way:
        echo("the numbers above count the rows of these files as if there were nothing")
    for error in unreadable:
        echo(f"error: {error}", err=True)
    sys.exit(1 if unreadable else 0)


def _in_the_way(steps: TaskSteps) -> Iterator[str]:
    """What others have left where the outputs belong, and what the next run does about it."""
    for stage in (name for name in steps.stages if name != RAW):
        for key in steps.keys(steps.partitions(stage)):
            if (found := others(steps.layout, stage, key)) is None:
                continue
            does = "adopted" if found.adopts else "refused"
            does += "" if found.is_new else " when it is made anew"
            files = ", ".join(map(str, dict.fromkeys((*found.places, *found.answers))))
            whose = NOT_OURS if found.is_new else CHANGED
            ways = "" if found.adopts else f"; see `modelcall adopt {steps.spec.file_name}`"
            yield f"{does}: {stage} of {decode_key(key)}: {files} {whose}{ways}"


def _table(plans: list[FilePlan], of_model: Sequence[str]) -> Table:
    """`of_model` are the numbers that only a task with a model has."""
    numbers = ["rows", *of_model]
    table = Table()
    table.add_column("file", overflow="fold")
    for name in numbers:
        table.add_column(_TITLES[name], justify="right")
    for each in plans[:SHOWN_FILES]:
        # Text, because a file name may hold what looks like markup.
        table.add_row(cell(each.key_path), *(f"{getattr(each, name):,}" for name in numbers))
    if len(plans) > SHOWN_FILES:
        table.add_row(f"… {len(plans) - SHOWN_FILES:,} more")
    table.add_section()
    sums = (sum(getattr(each, name) for each in plans) for name in numbers)
    table.add_row(f"{len(plans)} files", *(f"{total:,}" for total in sums))
    return table


def _model_columns(asking: Asking | None) -> list[str]:
    """A journal is looked into where its partitions are the files."""
    if asking is None:
        return []
    return ["prompt_tokens", "journalled"] if isinstance(asking, ScoreStage) else ["prompt_tokens"]


def _outlook(steps: TaskSteps, plans: list[FilePlan], answer_tokens: int | None) -> list[str]:
    asking, left_out = steps.first_asking, _left_out(plans)
    if steps.rule_stage is not None:
        return [*left_out, f"to send: nothing; {steps.rule_stage.path} rates the rows"]
    if asking is None:
        return [*left_out, "to send: nothing; no step of the task asks a model"]
    lines = [*left_out, *_estimate(asking, plans, answer_tokens)]
    if isinstance(asking, ScoreStage):
        return lines
    notes = (
        ["before merging, and without what the journal answers"] if MERGED in steps.stages else []
    )
    notes += ["the judge's requests are not counted"] if SCORES in steps.stages else []
    return [*lines, *notes]


def _left_out(plans: list[FilePlan]) -> list[str]:
    """What some rows of each file tell of the others."""
    rules = Counter[str]()
    for each in plans:
        rules.update(each.dropped)
    failed, lines = sum(each.failed for each in plans), list[str]()
    if rules:
        by_rule = ", ".join(f"{rule} {count:,}" for rule, count in rules.most_common())
        lines.append(f"dropped: about {rules.total():,} rows before that: {by_rule}")
    if failed:
        lines.append(f"failed: about {failed:,} rows cannot be asked; `modelcall try` shows why")
    return lines


def _estimate(asking: Asking, plans: list[FilePlan], answer_tokens: int | None) -> list[str]:
    """Cost of what the journal does not hold; the answers' length is the user's guess or a cap."""
    rows = sum(each.rows for each in plans)
    to_send = sum(max(0, each.rows - each.failed - each.journalled) for each in plans)
    askable = rows - sum(each.failed for each in plans)
    share = to_send / askable if askable > 0 else 0.0
    prompt = round(sum(each.prompt_tokens for each in plans) * share)
    params, prices = asking.params, asking.prices
    cap = params.get("max_tokens") or params.get("max_completion_tokens")
    answer = answer_tokens or cap
    lines = [f"to send: about {to_send:,} requests, {prompt:,} prompt tokens"]
    if None in prices:
        lines.append("cost: unknown; give `prices` in the model file")
    elif answer is None:
        lines.append("cost: unknown; give --answer-tokens, or max_tokens in the model file")
    else:
        usd = prompt * (prices[0] or 0) / MILLION + to_send * answer * (prices[1] or 0) / MILLION
        word = "about" if answer_tokens else "at most about"
        lines.append(f"cost: {word} {usd:,.4f} USD with {answer:,} tokens per answer")
    return lines
