"""Everything around the requests: many small files, few failures in many files, two models one
after the other, kills, and the start of a task. Each program has both cores, and so have the
endpoints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, Measured, environment, measure, start_client
from benchmarks.project import prepare_answers, prepare_files
from benchmarks.stub import Stub

IN_FLIGHT = 256
STATUSES = """
import json, sys
import dagster as dg
task, *stages = sys.argv[1:]
files = dg.DynamicPartitionsDefinition(name=f"{task}/files")
with dg.DagsterInstance.get() as instance:
    keys = instance.get_dynamic_partitions(files.name)
    for stage in stages:
        found = instance.get_status_by_partition(dg.AssetKey([task, stage]), keys, files) or {}
        print(json.dumps([found[key].name if found.get(key) else "MISSING" for key in keys]))
"""


class Bench:
    """What a checkout does in a project folder and Dagster home of its own."""

    def __init__(self, root: Path, stub: Stub, checkout: Path, postgres: str = "") -> None:
        self.root, self.stub, self.checkout = root, stub, checkout
        home = root / "dagster_home"
        self._environ = {"DAGSTER_HOME": str(home)}
        if postgres:
            home.mkdir(parents=True)
            storage = f"storage: {{postgres: {{postgres_url: {postgres!r}}}}}\n"
            (home / "dagster.yaml").write_text(storage)

    def run(self, task: Path, command: str = "run-task", **environ: str) -> Measured:
        asked = _modelcall(command, task)
        return measure(asked, self.stub, self.checkout, core=None, **self._environ, **environ)

    def used(self, task: Path, command: str, *options: str) -> dict[str, float]:
        """By a command that may have nothing to ask."""
        env = environment(self.checkout, REHEARSAL_BASE_URL=self.stub.base_url, **self._environ)
        return _used([*_modelcall(command, task), *options], cwd=self.checkout, env=env)

    def kill(self, task: Path, requests: int, **environ: str) -> None:
        """-9 after so many more requests."""
        command, asked = _modelcall("run-task", task), self.stub.stats()["requests"]
        with tempfile.TemporaryFile("w+") as output:
            options = {**self._environ, **environ}
            process = start_client(command, self.stub, output, self.checkout, None, **options)
            while process.poll() is None and self.stub.stats()["requests"] < asked + requests:
                time.sleep(0.01)
            process.kill()
            process.wait()

    def statuses(self, task: Path) -> list[Counter[str]]:
        """How many partitions of each stage have which, as Dagster says it."""
        env = environment(self.checkout, REHEARSAL_BASE_URL=self.stub.base_url, **self._environ)
        command = [sys.executable, "-c", STATUSES, task.stem, "raw", "scores"]
        done = subprocess.run(
            command, cwd=self.checkout, env=env, check=True, capture_output=True, text=True
        )
        return [Counter(json.loads(line)) for line in done.stdout.splitlines()]


def _modelcall(command: str, task: Path) -> list[str]:
    return [sys.executable, "-m", "modelcall", command, str(task)]


def measure_all(
    root: Path,
    stub: Stub,
    quick: bool,
    say: Callable[[str], None],
    before: Path | None = None,
    postgres: str = "",
) -> dict[str, Any]:
    """By checkout; many files with Dagster's storage in a database of Postgres too."""
    parts = {"many": many, "killed": killed, "failures": failures}
    parts |= {"judged": judged, "started": started}
    checkouts = {"this commit": ROOT, **({"before": before} if before else {})}
    found: dict[str, Any] = {name: {} for name in checkouts}
    if postgres:
        say("files: many, Postgres")
        found["Postgres"] = {"many": many(Bench(root / "postgres", stub, ROOT, postgres), quick)}
    for part, work in parts.items():
        for name, checkout in checkouts.items():
            if work is killed and checkout is not ROOT:
                continue
            say(f"files: {part}, {name}")
            found[name][part] = work(Bench(root / name.replace(" ", "_"), stub, checkout), quick)
    return found


def many(bench: Bench, quick: bool) -> dict[str, Any]:
    """From the command to the first request, the last reply and the end; then nothing to do."""
    files, rows = (20, 5) if quick else (1000, 10)
    bench.stub.behave(latency_ms=50)
    task = prepare_files(bench.root, "many", files, rows, IN_FLIGHT)
    measured = bench.run(task)
    return {
        "files": files,
        "rows": rows,
        "first_s": measured.before_s,
        "last_s": measured.before_s + measured.call_s,
        "end_s": measured.wall_s,
        "cpu_s": measured.cpu_s,
        "max_in_flight": measured.stats["max_in_flight"],
        "nothing_to_do_s": bench.used(task, "run-task")["wall_s"],
    }


def killed(bench: Bench, quick: bool) -> dict[str, Any]:
    """The same, killed twice and gone on with."""
    files, rows = (20, 5) if quick else (1000, 10)
    bench.stub.behave(latency_ms=50)
    task = prepare_files(bench.root, "killed", files, rows, IN_FLIGHT)
    for _ in range(2):
        bench.kill(task, files * rows // 4)
    bench.used(task, "run-task")
    requests = bench.stub.stats()["requests"]
    statuses = [dict(each) for each in bench.statuses(task)]
    return {"more_per_kill": (requests - files * rows) / 2, "statuses": statuses}


def failures(bench: Bench, quick: bool) -> dict[str, Any]:
    """`retry` of files in each of which some rows have failed: two of ten, on average."""
    files = 10 if quick else 200
    task = prepare_files(bench.root, "failures", files, 10, IN_FLIGHT, max_failure_rate=1)
    bench.stub.behave(latency_ms=5, rate_400=0.2)
    bench.run(task)
    bench.stub.behave(latency_ms=50 if quick else 500)
    measured = bench.run(task, "retry")
    seen = {"requests": measured.stats["requests"], "most": measured.stats["max_in_flight"]}
    return {"files": files, "wall_s": measured.wall_s, **seen}


def judged(bench: Bench, quick: bool) -> dict[str, Any]:
    """Answers by one endpoint, judged by another, beside the answers alone."""
    files, rows = (4, 10) if quick else (16, 625)
    with Stub() as judge:
        bench.stub.behave(latency_ms=500)
        judge.behave(latency_ms=500)
        where = {"JUDGE_BASE_URL": judge.base_url}
        alone = bench.run(prepare_answers(bench.root, "alone", files, rows, IN_FLIGHT), **where)
        judge.reset()
        task = prepare_answers(bench.root, "judged", files, rows, IN_FLIGHT, judged=True)
        both = bench.run(task, **where)
        first = both.stats["first_request_at"]
        both_s = judge.stats()["last_answer_at"] - first
    return {"files": files, "rows": files * rows, "alone_s": alone.call_s, "both_s": both_s}


def started(bench: Bench, quick: bool) -> dict[str, Any]:
    """CPU before the first request, and that of importing Dagster; the best of some."""
    bench.stub.behave()
    times = 1 if quick else 5
    new = [
        Bench(bench.root / f"new_{number}", bench.stub, bench.checkout) for number in range(times)
    ]
    fresh = [each.run(prepare_files(each.root, "start", 1, 10, 1)).before_cpu_s for each in new]
    again = [
        new[0].run(prepare_files(new[0].root, "start", 1, 10, 1)).before_cpu_s for _ in range(times)
    ]
    imported = [_used([sys.executable, "-c", "import dagster"])["cpu_s"] for _ in range(times)]
    return {"new_s": min(fresh), "again_s": min(again), "dagster_s": min(imported)}


def large(root: Path, stub: Stub, quick: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """A task of very many files, of which a few are worked on."""
    files = 200 if quick else 100_000
    stub.behave(latency_ms=50)
    bench = Bench(root, stub, ROOT)
    task, found = prepare_files(root, "large", files, 1, IN_FLIGHT), dict[str, Any]()
    some = "--file", "0001?.jsonl"
    for name, *command in (
        ("registered", "register"),
        ("registered again", "register"),
        ("ten of them made", "run-task", *some),
        ("the same again: nothing to do", "run-task", *some),
        ("planned", "plan"),
    ):
        say(f"files: {files:,} {name}")
        found[name] = bench.used(task, *command)
    return {"files": files, "commands": found}


def _used(command: list[str], **options: Any) -> dict[str, float]:
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, **options)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(command)}: status {status}")
    cpu_s = usage.ru_utime + usage.ru_stime
    return {"wall_s": time.monotonic() - began, "cpu_s": cpu_s, "rss_mb": usage.ru_maxrss / 1024}
