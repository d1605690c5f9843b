"""`modelcall rehearse`: the rehearsal server, alone or around a command."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from modelcall_assets.cli.terminal import echo, misuse
from modelcall_assets.rehearsal import Faults, RehearsalServer, new_event_loop

DEFAULT_PORT = 8377


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
      modelcall rehearse -- modelcall run-task my_task
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
        echo(_welcome(server.base_url))
        await stop.wait()
        return 0
    finally:
        await server.stop()


async def _run(command: tuple[str, ...], base_url: str) -> int:
    try:
        child = await asyncio.create_subprocess_exec(
            *command, env={**os.environ, "REHEARSAL_BASE_URL": base_url}
        )
    except OSError as error:
        wrong = f"cannot run {command[0]!r} ({error.strerror})"
        fix = "give a program on PATH, after --"
        raise misuse("COMMAND", wrong, fix=fix) from error

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


def _welcome(base_url: str) -> str:
    return f"""The rehearsal model answers at {base_url} until Ctrl-C. Try:
curl {base_url}/chat/completions -H 'Content-Type: application/json' -d \\
  '{{"model": "rehearsal-rater-1", "messages": [{{"role": "user", "content": "Rate me."}}]}}'"""


def summary(stats: dict[str, Any]) -> str:
    """One line of what the server saw."""
    errors = {f"HTTP {s}": n for s, n in sorted(stats["statuses"].items()) if s != "200"}
    oddities = ("malformed", "truncated", "filtered", "junk", "dropped", "abandoned")
    oddities += ("repeated_ok", "early_retries", "retried_bad_request")
    counts = errors | {name.replace("_", " "): stats[name] for name in oddities if stats[name]}
    parts = [
        f"{stats['requests']} requests ({stats['distinct']} distinct)",
        f"{stats['answered']} answered",
        *(f"{count} {name}" for name, count in counts.items()),
        f"at most {stats['max_in_flight']} in flight",
    ]
    return "rehearsal: " + ", ".join(parts)
