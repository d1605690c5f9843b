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
from modelcall_assets.cli.task_argument import load, task_argument
from modelcall_assets.errors import InputError
from modelcall_assets.records.data_files import decode_key
from modelcall_assets.stages.asking import AskingStage
from modelcall_assets.stages.preview import FilePlan, looks_up, plan_file
from modelcall_assets.stages.standing import CHANGED, NOT_OURS, others
from modelcall_assets.stages.task import Task

SHOWN_FILES = 40
MILLION = 1_000_000
_TITLES = {"rows": "rows", "prompt_tokens": "prompt tokens", "journalled": "in journal"}


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
    loaded = load(task)
    plans: list[FilePlan] = []
    unreadable: list[InputError] = []
    for file in loaded.inputs.files():
        try:
            plans.append(plan_file(loaded, file))
        except InputError as error:
            unreadable.append(error)
    console = Console()
    console.print(_table(plans, _model_columns(loaded)))
    for line in _outlook(loaded, plans, answer_tokens):
        console.print(cell(line))
    try:
        in_the_way = [*_in_the_way(loaded)]
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


def _in_the_way(task: Task) -> Iterator[str]:
    """What others have left where the outputs belong, and what the next run does about it."""
    for stage in (each for each in task.stages if each.suffix):
        for key in stage.keys.now():
            if (found := others(stage, key)) is None:
                continue
            does = "adopted" if found.adopts else "refused"
            does += "" if found.is_new else " when it is made anew"
            files = ", ".join(map(str, dict.fromkeys((*found.places, *found.answers))))
            whose = NOT_OURS if found.is_new else CHANGED
            ways = "" if found.adopts else f"; see `modelcall adopt {task.spec.file_name}`"
            yield f"{does}: {stage.name} of {decode_key(key)}: {files} {whose}{ways}"


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


def _model_columns(task: Task) -> list[str]:
    """A journal is looked into where its partitions are the files."""
    asking = task.first_answering
    if not isinstance(asking, AskingStage):
        return []
    return ["prompt_tokens", "journalled"] if looks_up(task, asking) else ["prompt_tokens"]


def _outlook(task: Task, plans: list[FilePlan], answer_tokens: int | None) -> list[str]:
    asking, left_out = task.first_answering, _left_out(plans)
    if asking is None:
        return [*left_out, "to send: nothing; no step of the task asks a model"]
    if not isinstance(asking, AskingStage):
        return [*left_out, f"to send: nothing; {asking.about}"]
    lines = [*left_out, *_estimate(asking, plans, answer_tokens)]
    if not looks_up(task, asking):
        lines.append("before merging, and without what the journal answers")
    later = [stage.name for stage in task.stages if stage.asks and stage is not asking]
    return [*lines, *(f"the requests of {name} are not counted" for name in later)]


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


def _estimate(asking: AskingStage, plans: list[FilePlan], answer_tokens: int | None) -> list[str]:
    """Cost of what the journal does not hold; the answers' length is the user's guess or a cap."""
    rows = sum(each.rows for each in plans)
    to_send = sum(max(0, each.rows - each.failed - each.journalled) for each in plans)
    askable = rows - sum(each.failed for each in plans)
    share = to_send / askable if askable > 0 else 0.0
    prompt = round(sum(each.prompt_tokens for each in plans) * share)
    params, prices = asking.params, asking.model.prices.pair
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
