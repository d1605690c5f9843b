"""`modelcall plan` and `modelcall try`: what a task would send and cost, and a few rows of it."""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from typing import NoReturn

import click
import orjson
from rich.console import Console
from rich.table import Table

from modelcall_assets.cli.terminal import cell, echo, load, misuse, task_argument
from modelcall_assets.config.catalog import load_model
from modelcall_assets.errors import InputError, Problem, SetupError
from modelcall_assets.llm.completion import Answer
from modelcall_assets.llm.dialogue import Rules, Said, said
from modelcall_assets.llm.engine import Engine, GaveUp
from modelcall_assets.records.data_files import decode_key
from modelcall_assets.records.outcome import Dropped, Failure, Outcome, Row
from modelcall_assets.stages.asking import AskingStage
from modelcall_assets.stages.preview import FilePlan, first_rows, looks_up, plan_file
from modelcall_assets.stages.publication import CHANGED, NOT_OURS, others
from modelcall_assets.stages.replay import Asked
from modelcall_assets.stages.scorer_scores import ScorerScores, rate
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
            raise misuse("--model", "the task has a scorer")
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
