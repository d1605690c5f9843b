"""`modelcall try`: a few rows through the model, nothing published."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path

import click
import orjson

from modelcall_assets.cli.task_argument import task_argument, task_steps
from modelcall_assets.config.catalog import load_model
from modelcall_assets.errors import Problem, SetupError
from modelcall_assets.llm.answer import Answer
from modelcall_assets.llm.dialogue import Turn
from modelcall_assets.llm.engine import Engine, GaveUp
from modelcall_assets.records.outcome import Failure, Outcome
from modelcall_assets.steps.calls import Asked
from modelcall_assets.steps.preview import first_asks
from modelcall_assets.steps.task_steps import TaskSteps
from modelcall_assets.transforms.universal import Dropped

SCANNED_PER_ROW = 20


@click.command("try")
@task_argument
@click.option("--rows", type=click.IntRange(1, 1000), default=5, show_default=True)
@click.option("--file", "pattern", metavar="GLOB", default="*", help="Rows of a matching file.")
@click.option(
    "--model",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Ask this model file's model instead of the task's.",
)
def trial(task: Path, rows: int, pattern: str, model: Path | None) -> None:
    """Send the first rows of TASK.yaml; show prompt, raw reply and parsed result.

    Nothing is published or journalled, and the calls are paid. For free, let the rehearsal
    endpoint answer:

    \b
      modelcall rehearse -- modelcall try my_task.yaml --model configs/models/rehearsal.yaml
    """
    steps = task_steps(task)
    if model is not None:
        steps = TaskSteps(replace(steps.spec, model=load_model(model, steps.spec.root)))
    asks = list(_first(steps, pattern, rows))
    results = asyncio.run(_ask_all(steps, asks))
    for number, (asked, result) in enumerate(zip(asks, results, strict=True), start=1):
        _show(number, asked, *result)


def _first(steps: TaskSteps, pattern: str, rows: int) -> list[Asked]:
    """Of the first matching file with rows that preprocessing keeps."""
    for file in steps.inputs():
        if fnmatchcase(file.key_path, pattern):
            asks = first_asks(steps, file, rows * SCANNED_PER_ROW)
            kept = [asked for asked in asks if not isinstance(asked, Dropped)]
            if kept:
                return list(islice(kept, rows))
    wrong = f"no rows under {steps.spec.input_folder} in a file that matches '{pattern}'"
    raise SetupError([Problem(steps.spec.file_name, "data.input_folder", wrong)])


async def _ask_all(steps: TaskSteps, asks: Sequence[Asked]) -> list[tuple[list[str], Outcome]]:
    async with steps.engine() as engine:
        return await asyncio.gather(*(_converse(steps, engine, asked) for asked in asks))


async def _converse(steps: TaskSteps, engine: Engine, asked: Asked) -> tuple[list[str], Outcome]:
    """The raw replies, in turn, and what came of them."""
    if isinstance(asked, Failure):
        return [], asked
    rules, turns = steps.score_stage.rules, list[Turn]()
    while (finished := rules.judge(turns)) is None:
        result = await engine.ask(rules.next_request(asked, turns).payload())
        if isinstance(result, GaveUp):
            return [_reply_text(turn) for turn in turns], result.failure
        turns.append(Turn(result.reply.status, result.reply.body))
    return [_reply_text(turn) for turn in turns], finished.outcome


def _reply_text(turn: Turn) -> str:
    verdict = turn.verdict()
    return verdict.text if isinstance(verdict, Answer) else turn.body.decode(errors="replace")


def _show(number: int, asked: Asked, replies: Sequence[str], outcome: Outcome) -> None:
    click.secho(f"── row {number} ──", bold=True)
    for message in () if isinstance(asked, Failure) else asked.messages:
        click.secho(f"{message['role']}:", fg="cyan")
        click.echo(message["content"])
    for reply in replies:
        click.secho("reply:", fg="cyan")
        click.echo(reply)
    if isinstance(outcome, Failure):
        click.secho(f"error: {outcome.reason}: {outcome.detail}", fg="red")
    else:
        click.secho("parsed:", fg="green")
        click.echo(orjson.dumps(outcome.values, option=orjson.OPT_INDENT_2).decode())
