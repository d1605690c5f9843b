"""`modelcall ui`: Dagster's webserver, daemon and code server, which end together."""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

import click

from modelcall_assets.cli.options import misuse
from modelcall_assets.cli.terminal import echo
from modelcall_assets.config.catalog import find_root
from modelcall_assets.rehearsal import serve_in_thread

LOG = ("--log-level", "warning")
TASKS = ("-m", "modelcall_assets.definitions", "--location-name", "modelcall")
PAGE = ("dagster_webserver", "--dagster-log-level", "warning")
GRACE_S, POLL_S = 15.0, 0.3
PARENT_DIES = 1  # PR_SET_PDEATHSIG


@click.command()
@click.option("--port", type=click.IntRange(1, 65535), default=3000, show_default=True)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--rehearse", is_flag=True, help="Also serve the free rehearsal endpoint.")
def ui(port: int, host: str, rehearse: bool) -> None:
    """Open the page of all tasks, with all that works behind it, until Ctrl-C.

    These are three processes: the page, the daemon, which starts runs and looks for new files, and
    the server that knows the project's tasks. One that dies is started again.

    \b
      modelcall ui
      modelcall ui --port 3001 --rehearse
    """
    root = find_root(Path.cwd())
    if _is_open(host, port):
        raise misuse("--port", "taken: another process listens there", have=str(port))

    from modelcall_assets.defs.instance import open_instance  # takes most of a second

    with open_instance(root):
        pass  # a home that is new or half made is whole now
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as `nohup` has it
            signal.signal(number, signal.default_int_handler)
    # Backfills go on when the code server has been away.
    env = {**os.environ, "DAGSTER_BACKFILL_RETRY_DEFINITION_CHANGED_ERROR": "1"}
    endpoint = serve_in_thread() if rehearse else nullcontext()
    with TemporaryDirectory(prefix="modelcall-") as scratch, endpoint as server:
        if server is not None:
            env["REHEARSAL_BASE_URL"] = server.base_url
            echo(f"the rehearsal model answers at {server.base_url}")
        with suppress(KeyboardInterrupt):
            _keep_alive(root, env, Path(scratch), host, port)


def _keep_alive(root: Path, env: Mapping[str, str], scratch: Path, host: str, port: int) -> None:
    """ClickException when a process ends before the page is open. What one that has died leaves,
    such as runs, goes on, and ends with the others."""
    at, others = scratch / "code.sock", scratch / "workspace.yaml"
    others.write_text(f"load_from: [{{grpc_server: {{socket: '{at}', location_name: modelcall}}}}]")
    spaces = [f"-w{each}" for each in (root / "workspace.yaml", others) if each.exists()]
    commands = {
        "the server of tasks": ("dagster", "code-server", "start", *TASKS, "-s", str(at), *LOG),
        "the daemon": ("dagster._daemon", "run", *spaces, *LOG),
        "the page": (*PAGE, "-h", host, "-p", str(port), *spaces),
    }
    started = {name: list[subprocess.Popen[bytes]]() for name in commands}
    is_open = False
    try:
        while True:
            for name, command in [*commands.items()][: None if at.exists() else 1]:
                if (before := started[name]) and before[-1].poll() is None:
                    continue
                if before:
                    told = f"{name} has ended with {before[-1].returncode}"
                    if not is_open:
                        raise click.ClickException(f"{told}; what it said is above")
                    echo(f"{told}, and is started again", err=True)
                before.append(_started(command, root, env))
            time.sleep(POLL_S)
            if not is_open and (is_open := _is_open(host, port)):
                echo(f"all tasks are at http://{host}:{port}, until Ctrl-C")
    finally:
        _end([*chain(*started.values())])


def _started(command: Sequence[str], root: Path, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    def end_with_parent() -> None:
        """On Linux also with one that is killed; what runs in the background may ignore SIGINT."""
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(PARENT_DIES, signal.SIGINT)

    python = (sys.executable, "-m", *command)
    return subprocess.Popen(
        python, cwd=root, env=env, start_new_session=True, preexec_fn=end_with_parent
    )


def _is_open(host: str, port: int) -> bool:
    with suppress(OSError), socket.create_connection((host, port)):
        return True
    return False


def _end(started: Sequence[subprocess.Popen[bytes]]) -> None:
    """With all that they have started; those that take too long are killed."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for child in started:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, number)
        for child in started:
            with suppress(subprocess.TimeoutExpired):
                child.wait(GRACE_S)
