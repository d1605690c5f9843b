"""`modelcall try` and `modelcall rehearse`: a few rows, and a free endpoint."""

import asyncio
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import click
import orjson

from modelcall_assets.cli.options import EXISTING_FILE, file_option, misuse, task_argument
from modelcall_assets.cli.plan import prepared_rows
from modelcall_assets.cli.terminal import echo
from modelcall_assets.config.catalog import load_model
from modelcall_assets.errors import Problem, SetupError
from modelcall_assets.llm import Engine
from modelcall_assets.llm.classify import GaveUp, Said
from modelcall_assets.llm.completion import Answer
from modelcall_assets.llm.dialogue import Rules
from modelcall_assets.records.outcome import Dropped, Failure, Outcome, Row, Success
from modelcall_assets.rehearsal import Faults, RehearsalServer, new_event_loop
from modelcall_assets.stages.asking import AskingStage
from modelcall_assets.stages.replay import Asked
from modelcall_assets.stages.report import by_count
from modelcall_assets.stages.scores import ScorerScores, Scores, rate
from modelcall_assets.stages.task import Task
from modelcall_assets.storage.listing import matches

DEFAULT_PORT = 8377
SCANNED_PER_ROW = 20
SHOWN = 2_000
"""Characters of a text."""
WELCOME = """The rehearsal model answers at {0} until Ctrl-C. Try:
curl {0}/chat/completions -H 'Content-Type: application/json' -d \\
  '{{"model": "rehearsal-rater-1", "messages": [{{"role": "user", "content": "Rate me."}}]}}'"""


def _fault_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for each in reversed(fields(Faults)):
        command = click.option(
            "--" + each.name.replace("_", "-"),
            each.name,
            type=type(each.default),
            default=each.default,
            show_default=True,
            help=each.metadata["help"],
        )(command)
    return command


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    show_default=f"{DEFAULT_PORT}; any free one with a COMMAND",
    help="Port to listen on; 0: any free one.",
)
@click.option("--api-key", help="Refuse requests that do not carry this key.")
@_fault_options
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def rehearse(
    host: str, port: int | None, api_key: str | None, command: tuple[str, ...], **faults: Any
) -> None:
    """Rehearse a task for free, against a small local server instead of a paid model.

    The server speaks the OpenAI chat API as model "rehearsal-rater-1". It rates texts by simple
    heuristics and says so in each reply: it shows that a task runs, never how good the data is.

    \b
    Serve until Ctrl-C, then point a model's endpoint at the printed URL:
      modelcall rehearse
    Serve only while a command runs; it finds the URL in REHEARSAL_BASE_URL:
      modelcall rehearse -- modelcall run-task configs/tasks/my_task.yaml
    See how a task copes with a bad day (the same seed gives the same faults):
      modelcall rehearse --latency-ms 200 --rate-429 0.1 --rate-malformed 0.05 -- COMMAND...
    Look at what the server saw, change its faults while it runs:
      curl localhost:8377/stats
      curl localhost:8377/faults -d '{"rate_500": 0.2}'

    A summary goes to stderr at the end; with a COMMAND, its exit code is ours.
    """
    server = RehearsalServer(Faults(**faults), api_key)
    if port is None:
        port = 0 if command else DEFAULT_PORT
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        code = runner.run(_serve(server, host, port, command))
    echo(summary(server.stats()), err=True)
    click.get_current_context().exit(code)


async def _serve(server: RehearsalServer, host: str, port: int, command: tuple[str, ...]) -> int:
    await server.start(host, port)
    try:
        if command:
            return await _run(command, server.base_url)
        stop = asyncio.Event()
        _on_signals(lambda _: stop.set())
        echo(WELCOME.format(server.base_url))
        await stop.wait()
        return 0
    finally:
        await server.stop()


async def _run(command: tuple[str, ...], base_url: str) -> int:
    environment = {**os.environ, "REHEARSAL_BASE_URL": base_url}
    try:
        child = await asyncio.create_subprocess_exec(*command, env=environment)
    except OSError as error:
        wrong = f"cannot run {command[0]!r} ({error.strerror})"
        raise misuse("COMMAND", wrong, fix="give a program on PATH, after --") from error

    def forward(number: int) -> None:
        if child.returncode is None and not (number == signal.SIGINT and _from_terminal()):
            child.send_signal(number)

    _on_signals(forward)
    code = await child.wait()
    return code if code >= 0 else 128 - code


def _on_signals(react: Callable[[int], object]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, react, number)


def _from_terminal() -> bool:
    """Ctrl-C reaches the whole foreground group: the child has it already."""
    try:
        with Path("/dev/tty").open("rb") as terminal:
            return os.tcgetpgrp(terminal.fileno()) == os.getpgrp()
    except OSError:
        return False


def summary(stats: dict[str, Any]) -> str:
    errors = {f"HTTP {s}": n for s, n in sorted(stats["statuses"].items()) if s != "200"}
    oddities = "malformed", "truncated", "filtered", "junk", "dropped", "abandoned"
    counts = errors | {name.replace("_", " "): stats[name] for name in oddities if stats[name]}
    parts = [
        f"{stats['requests']} requests ({stats['distinct']} distinct)",
        f"{stats['answered']} answered",
        *(f"{count} {name}" for name, count in counts.items()),
        f"at most {stats['max_in_flight']} in flight",
    ]
    return "rehearsal: " + ", ".join(parts)


Tried = tuple[list[tuple[str, str]], Outcome]
"""What was said about a row, by whom, and what came of it."""


@click.command("try")
@task_argument
@file_option
@click.option("--rows", type=click.IntRange(1, 1000), default=5, show_default=True)
@click.option(
    "--model", type=EXISTING_FILE, help="Ask this model file's model instead of the task's."
)
@click.option("--full", is_flag=True, help="Show long texts to their end.")
def trial(task: Task, pattern: str | None, rows: int, model: Path | None, full: bool) -> None:
    """Send the first rows of TASK; show prompt, reasoning, raw reply and parsed result.

    Nothing is published or journalled, and the calls are paid. A task with a scorer shows each row
    and its result, an evaluation each answer and its grade. Exits with 1 when no row succeeded. For
    free, let the rehearsal endpoint answer:

    \b
      modelcall rehearse -- modelcall try my_task.yaml --model configs/models/rehearsal.yaml
    """
    stage = task.find(ScorerScores)
    if stage is None or isinstance(task.first_answering, AskingStage):
        tried = _asked(task, model, pattern, rows)
    elif model is not None:
        raise misuse("--model", "the task has a scorer")
    else:
        tried = _rated(stage, pattern, rows)
    number, failed, before = 0, Counter[str](), list[tuple[str, str]]()
    for number, (said, outcome) in enumerate(tried, start=1):
        echo(f"── row {number} ──", bold=True)
        for who, text in said:
            if who == "system" and (who, text) in before:
                continue  # as in the row before
            echo(f"{who}:", fg="cyan")
            more = 0 if full else len(text) - SHOWN
            echo(text if more <= 0 else f"{text[:SHOWN]}\n… {more:,} characters more: --full")
        before = said
        if isinstance(outcome, Failure):
            failed[outcome.reason] += 1
            echo(f"error: {outcome.reason}: {outcome.detail}", fg="red")
        else:
            echo("parsed:", fg="green")
            echo(_json(outcome.values))
    ok, why = number - failed.total(), f"; failed: {by_count(failed)}" * bool(failed)
    echo(f"{ok} of {number} rows succeeded{why}")
    sys.exit(0 if ok else 1)


def _rated(stage: ScorerScores, pattern: str | None, rows: int) -> Iterator[Tried]:
    scorer = stage.scorer()
    for row in _first(stage.task, pattern, rows):
        yield ([], row) if isinstance(row, Failure) else ([("row", _json(row))], rate(scorer, row))


def _asked(task: Task, model: Path | None, pattern: str | None, rows: int) -> list[Tried]:
    asking = task.first_answering
    if not isinstance(asking, AskingStage):
        wrong = "no step of this task asks a model"
        raise SetupError([Problem(task.spec.file_name, "", wrong, fix="use `modelcall plan`")])
    if model is not None:
        task = Task(replace(task.spec, **{asking.model_in: load_model(model, task.spec.root)}))
        asking = task.first_answering
        assert isinstance(asking, AskingStage)
    found = _first(task, pattern, rows)
    asks = [row if isinstance(row, Failure) else asking.ask(row) for row in found]

    async def ask_all() -> list[Tried]:
        async with asking.engine() as engine:
            return await asyncio.gather(*(_conversed(asking.rules, engine, each) for each in asks))

    tried, graded = asyncio.run(ask_all()), task.find(ScorerScores)
    if task.find(Scores) not in (None, asking):
        echo("the judge is not tried: `modelcall run-task` asks it about the answers")
    return [
        (said, rate(graded.scorer(), {**row, "response": said[-1][1]}))
        if graded and isinstance(row, dict) and isinstance(outcome, Success)
        else (said, outcome)
        for row, (said, outcome) in zip(found, tried, strict=True)
    ]


def _first(task: Task, pattern: str | None, rows: int) -> list[Row | Failure]:
    """Of the first matching file with rows that preprocessing keeps."""
    for file in task.inputs.files():
        if matches(file.key_path, pattern or "*"):
            found = prepared_rows(task, file, rows * SCANNED_PER_ROW)
            kept = (row for row in found if not isinstance(row, Dropped))
            if first := list(islice(kept, rows)):
                return first
    wrong = f"no rows under {task.spec.input_folder} in a file that matches '{pattern or '*'}'"
    raise SetupError([Problem(task.spec.file_name, "data.input_folder", wrong)])


async def _conversed(rules: Rules, engine: Engine, asked: Asked) -> Tried:
    if isinstance(asked, Failure):
        return [], asked
    turns, said = list[Said](), [(each["role"], each["content"]) for each in asked.messages]
    while (finished := rules.judge(turns)) is None:
        result = await engine.ask(rules.next_request(asked, turns).payload)
        if isinstance(result, GaveUp):
            return said, result.failure
        turns.append(turn := result.said)
        if isinstance(turn, Answer) and turn.reasoning:
            said.append(("reasoning", turn.reasoning))
        raw = result.reply.body.decode(errors="replace")
        said.append(("reply", turn.text if isinstance(turn, Answer) else raw))
    return said, finished.outcome


def _json(values: Row) -> str:
    return orjson.dumps(values, default=str, option=orjson.OPT_INDENT_2).decode()
