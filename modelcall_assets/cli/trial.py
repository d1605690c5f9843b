"""`modelcall try`: a few rows through the model, nothing published."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from typing import NoReturn

import click
import orjson

from modelcall_assets.cli.display import echo
from modelcall_assets.cli.task_argument import load, task_argument
from modelcall_assets.config.catalog import load_model
from modelcall_assets.errors import Problem, SetupError
from modelcall_assets.llm.answer import Answer
from modelcall_assets.llm.dialogue import Rules, Said, said
from modelcall_assets.llm.engine import Engine, GaveUp
from modelcall_assets.records.outcome import Dropped, Failure, Outcome, Row
from modelcall_assets.stages.asking import AskingStage
from modelcall_assets.stages.preview import first_rows
from modelcall_assets.stages.replay import Asked
from modelcall_assets.stages.scorer_scores import ScorerScores, rate
from modelcall_assets.stages.task import Task

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

    Nothing is published or journalled, and the calls are paid. A task with a scorer shows each row
    and its result. Exits with 1 when no row succeeded. For free, let the rehearsal endpoint answer:

    \b
      modelcall rehearse -- modelcall try my_task.yaml --model configs/models/rehearsal.yaml
    """
    loaded = load(task)
    if (stage := loaded.find(ScorerScores)) is not None:
        if model is not None:
            raise SetupError([Problem("modelcall try", "--model", "the task has a scorer")])
        scorer, outcomes = stage.scorer(), list[Outcome]()
        for number, row in enumerate(_first(loaded, pattern, rows), start=1):
            _show_row(number, row)
            outcomes.append(row if isinstance(row, Failure) else rate(scorer, row))
            _show_outcome(outcomes[-1])
        _end(outcomes)
    asking = loaded.first_answering
    if not isinstance(asking, AskingStage):
        wrong = "no step of this task asks a model"
        raise SetupError([Problem(loaded.spec.file_name, "", wrong, fix="use `modelcall plan`")])
    if model is not None:
        changed = {asking.model_in: load_model(model, loaded.spec.root)}
        loaded = Task(replace(loaded.spec, **changed))
        asking = loaded.first_answering
        assert isinstance(asking, AskingStage)
    first = _first(loaded, pattern, rows)
    asks = [row if isinstance(row, Failure) else asking.ask(row) for row in first]
    results = asyncio.run(_ask_all(asking, asks))
    for number, (asked, (replies, outcome)) in enumerate(zip(asks, results, strict=True), start=1):
        _show_dialogue(number, asked, replies)
        _show_outcome(outcome)
    _end([outcome for _, outcome in results])


def _end(outcomes: Sequence[Outcome]) -> NoReturn:
    ok = sum(not isinstance(outcome, Failure) for outcome in outcomes)
    echo(f"{ok} of {len(outcomes)} rows succeeded")
    sys.exit(0 if ok else 1)


def _first(task: Task, pattern: str, rows: int) -> list[Row | Failure]:
    """Of the first matching file with rows that preprocessing keeps."""
    for file in task.inputs.files():
        if fnmatchcase(file.key_path, pattern):
            found = first_rows(task, file, rows * SCANNED_PER_ROW)
            kept = (row for row in found if not isinstance(row, Dropped))
            if first := list(islice(kept, rows)):
                return first
    wrong = f"no rows under {task.spec.input_folder} in a file that matches '{pattern}'"
    raise SetupError([Problem(task.spec.file_name, "data.input_folder", wrong)])


async def _ask_all(asking: AskingStage, asks: Sequence[Asked]) -> list[tuple[list[str], Outcome]]:
    async with asking.engine() as engine:
        return await asyncio.gather(*(_converse(asking.rules, engine, each) for each in asks))


async def _converse(rules: Rules, engine: Engine, asked: Asked) -> tuple[list[str], Outcome]:
    """The raw replies, in turn, and what came of them."""
    if isinstance(asked, Failure):
        return [], asked
    turns, texts = list[Said](), list[str]()
    while (finished := rules.judge(turns)) is None:
        result = await engine.ask(rules.next_request(asked, turns).payload)
        if isinstance(result, GaveUp):
            return texts, result.failure
        turns.append(said(result.verdict))
        texts.append(_reply_text(turns[-1], result.reply.body))
    return texts, finished.outcome


def _reply_text(turn: Said, body: bytes) -> str:
    return turn.text if isinstance(turn, Answer) else body.decode(errors="replace")


def _show_row(number: int, row: Row | Failure) -> None:
    echo(f"── row {number} ──", bold=True)
    if not isinstance(row, Failure):
        echo("row:", fg="cyan")
        echo(_json(row))


def _show_dialogue(number: int, asked: Asked, replies: Sequence[str]) -> None:
    echo(f"── row {number} ──", bold=True)
    for message in () if isinstance(asked, Failure) else asked.messages:
        echo(f"{message['role']}:", fg="cyan")
        echo(message["content"])
    for reply in replies:
        echo("reply:", fg="cyan")
        echo(reply)


def _show_outcome(outcome: Outcome) -> None:
    if isinstance(outcome, Failure):
        echo(f"error: {outcome.reason}: {outcome.detail}", fg="red")
    else:
        echo("parsed:", fg="green")
        echo(_json(outcome.values))


def _json(values: Row) -> str:
    return orjson.dumps(values, default=str, option=orjson.OPT_INDENT_2).decode()
