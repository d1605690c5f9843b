"""`modelcall ui`: Dagster's webserver, daemon and code server, which end together."""

import asyncio
import ctypes
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import click

from modelcall_assets.cli.options import misuse
from modelcall_assets.cli.terminal import echo
from modelcall_assets.config.catalog import find_root
from modelcall_assets.rehearsal import RehearsalServer, new_event_loop

LOCATION = "modelcall"
"""As workspace.yaml calls it: the code server takes the place of what that file would start."""
SOCKET = "code.sock"
GRACE_S = 20.0
PAUSE_S, POLL_S = 1.0, 0.2
SURVIVES_RESTARTS = {"DAGSTER_BACKFILL_RETRY_DEFINITION_CHANGED_ERROR": "1"}
"""Of backfills: those of the code server."""
_PARENT_DIES = 1
"""PR_SET_PDEATHSIG."""


@click.command()
@click.option("--port", type=click.IntRange(1, 65535), default=3000, show_default=True)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--rehearse", is_flag=True, help="Also serve the free rehearsal endpoint.")
def ui(port: int, host: str, rehearse: bool) -> None:
    """Open the page of all tasks, with all that works behind it, until Ctrl-C.

    These are three processes: the web page, the daemon that starts runs and looks for new files,
    and the server of the project's tasks. One that dies is started again.

    \b
      modelcall ui
      modelcall ui --port 3001 --rehearse
    """
    root = find_root(Path.cwd())
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            wrong, fix = f"cannot listen on {host}: {error.strerror}", "choose another"
            raise misuse("--port", wrong, have=str(port), fix=fix) from None

    from modelcall_assets.defs.instance import open_instance  # takes most of a second

    with open_instance(root):
        pass  # a home that is new or half made is whole now
    with (
        TemporaryDirectory(prefix="modelcall-") as scratch,
        asyncio.Runner(loop_factory=new_event_loop) as runner,
    ):
        runner.run(_serve(root, Path(scratch), host, port, rehearse))


def _commands(root: Path, scratch: Path, host: str, port: int) -> dict[str, Sequence[str]]:
    """By what each is. Webserver and daemon reach the code server by its socket; other locations of
    the project's workspace.yaml are theirs to start."""
    at, file = scratch / SOCKET, scratch / "workspace.yaml"
    server = f"{{socket: '{at}', location_name: {LOCATION}}}"
    file.write_text(f"load_from: [{{grpc_server: {server}}}]\n")
    files = [each for each in (root / "workspace.yaml", file) if each.exists()]
    spaces = [word for each in files for word in ("-w", str(each))]
    code = ("-m", "modelcall_assets.definitions", "--location-name", LOCATION, "-s", str(at))
    page, quiet = ("-h", host, "-p", str(port)), "warning"
    return {
        "the server of tasks": ("dagster", "code-server", "start", *code, "--log-level", quiet),
        "the web page": ("dagster_webserver", *page, *spaces, "--dagster-log-level", quiet),
        "the daemon": ("dagster._daemon", "run", *spaces, "--log-level", quiet),
    }


async def _serve(root: Path, scratch: Path, host: str, port: int, rehearse: bool) -> None:
    """Until a signal, or until one of the processes ends before the page is open."""
    env, server = {**os.environ, **SURVIVES_RESTARTS}, RehearsalServer() if rehearse else None
    if server:
        await server.start()
        env["REHEARSAL_BASE_URL"] = server.base_url
        echo(f"the rehearsal model answers at {server.base_url}")
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as `nohup` has it
            loop.add_signal_handler(number, stop.set)
    code, *others = _commands(root, scratch, host, port).items()
    kept, opened = partial(_kept_alive, root, env), asyncio.Event()
    jobs = [kept(opened, *code), *(kept(opened, *each, scratch / SOCKET) for each in others)]
    opening = _tell_when_open(host, port, opened)
    tasks = [*map(asyncio.create_task, (*jobs, stop.wait(), opening))]
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    if server:
        await server.stop()
    for task in done:
        task.result()


async def _kept_alive(
    root: Path,
    env: Mapping[str, str],
    opened: asyncio.Event,
    name: str,
    command: Sequence[str],
    needs: Path | None = None,
) -> None:
    """What one that has died leaves, such as runs, goes on; it ends with the last one."""
    groups = list[int]()
    try:
        await _until(lambda: needs is None or needs.exists())
        while True:
            child = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", *command),
                cwd=root,
                env=env,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )
            groups = [*filter(_lives, groups), child.pid]
            code = await child.wait()
            if not opened.is_set():
                raise click.ClickException(f"{name} has ended with {code}; what it said is above")
            echo(f"{name} has ended with {code}, and is started again", err=True)
            await asyncio.sleep(PAUSE_S)
    finally:
        await _end(groups)


def _end_with_parent() -> None:
    """On Linux also with one that is killed. Who has started us may have had SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PARENT_DIES, signal.SIGINT)


def _lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


async def _end(groups: Sequence[int]) -> None:
    """Those that take too long are killed."""
    for number in (signal.SIGINT, signal.SIGKILL):
        for group in filter(_lives, groups):
            os.killpg(group, number)
        with suppress(TimeoutError):
            async with asyncio.timeout(GRACE_S):
                await _until(lambda: not any(map(_lives, groups)))


async def _until(holds: Callable[[], bool]) -> None:
    while True:
        if holds():
            return
        await asyncio.sleep(POLL_S)


async def _tell_when_open(host: str, port: int, opened: asyncio.Event) -> None:
    while not opened.is_set():
        with suppress(OSError):
            (await asyncio.open_connection(host, port))[1].close()
            opened.set()
        await asyncio.sleep(POLL_S)
    echo(f"all tasks are at http://{host}:{port}, until Ctrl-C")
    await asyncio.Event().wait()
