"""Bad days, measured: faults, shared endpoints, kills. Nothing here is asserted."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import IO, Any

import orjson

from benchmarks.measure import client, measure, start_client
from benchmarks.project import Job, prepare, published
from benchmarks.stub import Stub

LATENCY_MS = 50
LIMIT = 64
Progress = list[tuple[float, int]]
"""(time, rows done)."""


def measure_all(root: Path, stub: Stub, quick: bool, say: Callable[[str], None]) -> dict[str, Any]:
    parts = {"busy": busy, "refused": refused, "shared": shared, "killed": killed}
    found: dict[str, Any] = {}
    for name, part in parts.items():
        say(f"robustness: {name}")
        found[name] = part(root, stub, quick)
    return found


def busy(root: Path, stub: Stub, quick: bool) -> dict[str, Any]:
    """5 % of the attempts 429 with `Retry-After`, 5 % 500."""
    wait = 0.2 if quick else 3.0
    stub.behave(latency_ms=LATENCY_MS, rate_429=0.05, retry_after_s=wait, rate_500=0.05)
    job = prepare(root, "busy", 100 if quick else 5_000, 256)
    measured = measure(client("engine", job.file), stub)
    kept = ("requests", "early_retries", "repeated_ok", "statuses")
    seen = {name: measured.stats[name] for name in kept}
    return {**seen, "rows": str(published(job)), "call_s": measured.call_s}


def refused(root: Path, stub: Stub, quick: bool) -> dict[str, Any]:
    """1 % of the records 400 at every attempt, beside none."""
    job = prepare(root, "refused", 100 if quick else 5_000, 256)
    walls: dict[float, list[float]] = {0.0: [], 0.01: []}
    stats: dict[str, Any] = {}
    for rate in [0.0, 0.01] * (1 if quick else 3):
        stub.behave(latency_ms=LATENCY_MS, rate_400=rate)
        prepare(root, "refused", job.rows, 256)
        measured = measure(client("engine", job.file), stub)
        walls[rate].append(measured.wall_s)
        stats = measured.stats
    return {
        "rows": str(published(job)),
        "retried_bad_request": stats["retried_bad_request"],
        "statuses": stats["statuses"],
        "wall_s": median(walls[0.01]),
        "wall_s_without": median(walls[0.0]),
    }


def shared(root: Path, stub: Stub, quick: bool) -> dict[str, Any]:
    """Two processes on an endpoint that allows 64 in flight; one ends sooner, or is killed."""
    rows = (400, 100) if quick else (14_000, 4_000)
    found: dict[str, Any] = {}
    for ending, kill_after_s in (("ended", None), ("killed", 0.3 if quick else 3.0)):
        stub.behave(latency_ms=LATENCY_MS, max_in_flight=LIMIT, retry_after_s=1)
        limits = {"max_in_flight": LIMIT}
        jobs = [prepare(root, f"shared_{n}", count, LIMIT, limits) for n, count in enumerate(rows)]
        long, short = _side_by_side(stub, jobs, kill_after_s)
        stats = stub.stats()
        both, gone = max(long[0][0], short[0][0]) + 1, short[-1][0]
        alone = _rate(long, gone + 2, long[-1][0])
        found[ending] = {
            "max_in_flight": stats["max_in_flight"],
            "requests": stats["requests"],
            "told_to_wait": stats["statuses"].get("429", 0),
            "per_s_side_by_side": [_rate(each, both, gone) for each in (long, short)],
            "per_s_alone": alone,
            "alone_after_s": _reached(long, gone, 0.8 * alone),
            "per_s_over_time": [_each_second(each, long[0][0]) for each in (long, short)],
            "rows": str(published(jobs[0])),
        }
    return found


def _side_by_side(
    stub: Stub, jobs: Sequence[Job], kill_after_s: float | None
) -> tuple[Progress, Progress]:
    with tempfile.TemporaryFile("w+") as first, tempfile.TemporaryFile("w+") as second:
        outputs = (first, second)
        processes = [
            start_client(client("engine", job.file, "watched"), stub, output)
            for job, output in zip(jobs, outputs, strict=True)
        ]
        if kill_after_s is not None:
            _until_asked(stub, 1)
            time.sleep(kill_after_s)
            processes[1].kill()
        for process in processes:
            process.wait()
        if processes[0].returncode:
            first.seek(0)
            raise RuntimeError(first.read())
        return _progress(first), _progress(second)


def _progress(output: IO[str]) -> Progress:
    """From the first row done to the last."""
    output.seek(0)
    lines = [orjson.loads(line) for line in output if line.startswith("[")]
    rising = [now for was, now in zip([[0, 0], *lines], lines, strict=False) if now[1] > was[1]]
    return [(moment, done) for moment, done in rising] or [(time.monotonic(), 0)]


def _rate(progress: Progress, start: float, end: float) -> float:
    """Rows per second in that time; 0 when it is too short to tell."""
    within = [(moment, done) for moment, done in progress if start <= moment <= end]
    if len(within) < 2:
        return 0.0
    (t0, n0), (t1, n1) = within[0], within[-1]
    return (n1 - n0) / (t1 - t0)


def _reached(progress: Progress, since: float, rate: float) -> float | None:
    """How long after `since` half a second went at that rate for the first time."""
    ends = (moment for moment, _ in progress if moment > since + 0.5)
    return next((e - since for e in ends if _rate(progress, e - 0.5, e) >= rate), None)


def _each_second(progress: Progress, start: float) -> list[int]:
    seconds = range(int(progress[-1][0] - start) + 1)
    return [round(_rate(progress, start + s, start + s + 1)) for s in seconds]


def killed(root: Path, stub: Stub, quick: bool) -> dict[str, Any]:
    """kill -9 at random moments of the call phase, then a run to the end."""
    stub.behave(latency_ms=LATENCY_MS)
    dice, kills = random.Random(1), 0
    job = prepare(root, "killed", 600 if quick else 8_000, LIMIT)
    for _ in range(1 if quick else 10):
        asked = stub.stats()["requests"]
        with tempfile.TemporaryFile("w+") as output:
            process = start_client(client("engine", job.file), stub, output)
            _until_asked(stub, asked + 1)
            time.sleep(dice.uniform(0.05, 0.1 if quick else 0.8))
            kills += process.poll() is None
            process.kill()
            process.wait()
    before = stub.stats()
    with tempfile.TemporaryFile("w+") as output:
        start_client(client("engine", job.file), stub, output).wait()
    stats = stub.stats()
    return {
        "kills": kills,
        "rows": str(published(job)),
        "in_flight": LIMIT,
        "requests": stats["requests"],
        "more_per_kill": (stats["requests"] - job.rows) / max(kills, 1),
        "answered_before_last_run": before["answered"],
    }


def _until_asked(stub: Stub, requests: int) -> None:
    deadline = time.monotonic() + 60
    while stub.stats()["requests"] < requests:
        if time.monotonic() > deadline:
            raise RuntimeError("no request within a minute")
        time.sleep(0.01)
