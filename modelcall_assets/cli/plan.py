"""`modelcall plan`: what a task would send and cost, before anything is paid."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from modelcall_assets.cli.task_argument import task_argument, task_steps
from modelcall_assets.steps.preview import FilePlan, plan_file
from modelcall_assets.steps.task_steps import TaskSteps

SHOWN_FILES = 40
MILLION = 1_000_000


@click.command("plan")
@task_argument
@click.option(
    "--answer-tokens",
    type=click.IntRange(1),
    help="Tokens of one answer; default: the model file's max_tokens.",
)
def plan(task: Path, answer_tokens: int | None) -> None:
    """Show the files of TASK.yaml, their rows, estimated tokens and cost. Sends nothing.

    Prompt tokens are extrapolated from the first rows of each file with the o200k vocabulary;
    the journal column counts records that have a reply already.

    \b
      modelcall plan configs/tasks/my_task.yaml --answer-tokens 150
    """
    steps = task_steps(task)
    plans = [plan_file(steps, file) for file in steps.inputs()]
    console = Console()
    console.print(_table(plans))
    for line in _estimate(steps, plans, answer_tokens):
        console.print(line, highlight=False)


def _table(plans: list[FilePlan]) -> Table:
    table = Table()
    table.add_column("file", overflow="fold")
    for name in ("rows", "prompt tokens", "in journal"):
        table.add_column(name, justify="right")
    for each in plans[:SHOWN_FILES]:
        table.add_row(
            each.key_path, f"{each.rows:,}", f"{each.prompt_tokens:,}", f"{each.journalled:,}"
        )
    if len(plans) > SHOWN_FILES:
        table.add_row(f"… {len(plans) - SHOWN_FILES:,} more", "", "", "")
    table.add_section()
    table.add_row(
        f"{len(plans)} files",
        f"{sum(each.rows for each in plans):,}",
        f"{sum(each.prompt_tokens for each in plans):,}",
        f"{sum(each.journalled for each in plans):,}",
    )
    return table


def _estimate(steps: TaskSteps, plans: list[FilePlan], answer_tokens: int | None) -> list[str]:
    """Cost of what the journal does not hold; the answers' length is the user's guess or a cap."""
    rows = sum(each.rows for each in plans)
    to_send = sum(max(0, each.rows - each.journalled) for each in plans)
    share = to_send / rows if rows else 0.0
    prompt = round(sum(each.prompt_tokens for each in plans) * share)
    params, prices = steps.score_stage.params, steps.score_stage.prices
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
