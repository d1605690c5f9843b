"""One program in a fresh process on a core of its own: its time, CPU and memory. Linux only."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.stub import Stub

ROOT = Path(__file__).parent.parent
CORES = sorted(os.sched_getaffinity(0))
CLIENT_CORE, STUB_CORE = CORES[0], CORES[1 % len(CORES)]
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Measured:
    """`before`: from the start of the process to its first request; `after`: from the last answer
    to its end; `call` lies between. `stats` is what the endpoint saw."""

    wall_s: float
    cpu_s: float
    rss_mb: float
    before_s: float
    before_cpu_s: float
    call_s: float
    after_s: float
    after_cpu_s: float
    stats: dict[str, Any]
    output: str = field(repr=False)


def start(command: Sequence[str], core: int | None, **options: Any) -> subprocess.Popen[Any]:
    """On one core, or all. Imports come from this checkout, whatever the folder it runs in."""
    cores = CORES if core is None else {core}
    return subprocess.Popen(
        command,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
        **{"cwd": ROOT, "env": environment(), **options},
    )


def environment(checkout: Path = ROOT, **more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    return {**kept, "PYTHONPATH": str(checkout), **more}


def cpu_s(pid: int) -> float:
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / _TICKS


def client(name: str, *arguments: object) -> list[str]:
    return [sys.executable, "-m", "benchmarks.clients", name, *map(str, arguments)]


def measure(
    command: Sequence[str],
    stub: Stub,
    checkout: Path = ROOT,
    core: int | None = CLIENT_CORE,
    **environ: str,
) -> Measured:
    """RuntimeError when it does not end well or asks the endpoint nothing."""
    stub.reset()
    with tempfile.TemporaryFile("w+") as output:
        began = time.monotonic()
        process = start_client(command, stub, output, checkout, core, **environ)
        watch = _Watch(process.pid)
        usage = _until_ended(process, watch.look)
        ended = time.monotonic()
        output.seek(0)
        text = output.read()
    stats = stub.stats()
    if process.returncode or not stats["requests"]:
        raise RuntimeError(f"{' '.join(command)}: exit code {process.returncode}\n{text}")
    first, last = stats["first_request_at"], stats["last_answer_at"]
    cpu = usage.ru_utime + usage.ru_stime
    return Measured(
        wall_s=ended - began,
        cpu_s=cpu,
        rss_mb=watch.rss_kb / 1024,
        before_s=first - began,
        before_cpu_s=watch.cpu_at(first),
        call_s=last - first,
        after_s=ended - last,
        after_cpu_s=cpu - watch.cpu_at(last),
        stats=stats,
        output=text,
    )


def start_client(
    command: Sequence[str],
    stub: Stub,
    output: IO[str],
    checkout: Path = ROOT,
    core: int | None = CLIENT_CORE,
    **environ: str,
) -> subprocess.Popen[str]:
    env = environment(checkout, REHEARSAL_BASE_URL=stub.base_url, **environ)
    options = {"cwd": checkout, "env": env, "stdout": output, "stderr": subprocess.STDOUT}
    return start(command, core, text=True, **options)


def _until_ended(process: subprocess.Popen[str], look: Callable[[], None]) -> Any:
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            return usage
        look()
        time.sleep(0.02)


class _Watch:
    """Looks at a process from outside. Its peak memory is that of its own program: `ru_maxrss`
    may be its parent's."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._times: list[float] = []
        self._cpu: list[float] = []
        self.rss_kb = 0

    def look(self) -> None:
        self._times.append(time.monotonic())
        self._cpu.append(cpu_s(self._pid))
        for line in Path(f"/proc/{self._pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                self.rss_kb = max(self.rss_kb, int(line.split()[1]))

    def cpu_at(self, moment: float) -> float:
        at = bisect_right(self._times, moment) - 1
        return self._cpu[at] if at >= 0 else 0.0
