"""The engine beside hand-written clients, what Dagster adds, memory, and the stub's own speed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import orjson

from benchmarks.measure import Measured, client, measure
from benchmarks.project import Job, prepare, published
from benchmarks.stub import Stub

ENGINE, ASSET = "engine", "asset"
LOOPS = ("minimal_aiohttp", "sdk_aiohttp", "sdk")


@dataclass(frozen=True)
class Scenario:
    """`rows`: of each client's short and long run; what tells them apart is the cost of a row,
    without that of starting."""

    in_flight: int
    latency_ms: int
    rows: Mapping[str, tuple[int, int]]

    def ideal_s(self, rows: int) -> float:
        return ceil(rows / self.in_flight) * self.latency_ms / 1000


def scenarios(quick: bool) -> list[Scenario]:
    names = (ENGINE, *LOOPS, ASSET)
    if quick:
        return [Scenario(16, 5, dict.fromkeys(names, (50, 200)))]
    most = {"sdk_aiohttp": 5_000, "sdk": 3_000}
    rows = {name: (1_000, most.get(name, 20_000)) for name in names}
    return [Scenario(256, 50, rows), Scenario(1024, 500, rows)]


class Pair(NamedTuple):
    short: Measured
    long: Measured


def compare(root: Path, stub: Stub, quick: bool, say: Callable[[str], None]) -> list[Any]:
    """Round after round, each client in its turn; medians over the rounds."""
    found: list[Any] = []
    for scenario in scenarios(quick):
        stub.behave(latency_ms=scenario.latency_ms)
        _run(ASSET, root, stub, prepare(root, "warm_up", 10, scenario.in_flight))
        rounds: list[dict[str, Pair]] = []
        for number in range(1 if quick else 3):
            rounds.append({})
            for name, sizes in scenario.rows.items():
                say(f"{scenario.in_flight} in flight, round {number + 1}: {name}")
                jobs = [prepare(root, f"rows_{n}", n, scenario.in_flight) for n in sizes]
                short, long = (_run(name, root, stub, job, scenario.in_flight) for job in jobs)
                rounds[-1][name] = Pair(short, long)
        clients = {name: _summary(scenario, rounds, name) for name in scenario.rows}
        found.append({**asdict(scenario), "rounds": len(rounds), "clients": clients})
    return found


def _run(name: str, root: Path, stub: Stub, job: Job, in_flight: int = 1) -> Measured:
    """RuntimeError when a row is missing or failed."""
    if name == ENGINE:
        measured = measure(client(ENGINE, job.file), stub)
    elif name == ASSET:
        command = [sys.executable, "-m", "modelcall", "run-task", str(job.file)]
        measured = measure(command, stub, DAGSTER_HOME=str(root / "dagster_home"))
    else:
        target = root / "answers.jsonl"
        measured = measure(client(name, job.input, target, in_flight), stub)
        rows = target.read_bytes().count(b"\n")
        if rows != job.rows:
            raise RuntimeError(f"{name}: {rows} of {job.rows} rows")
        return measured
    rows = published(job)
    if not rows.in_input_order or rows.ok != job.rows:
        raise RuntimeError(f"{name}: {rows}")
    return measured


def _summary(scenario: Scenario, rounds: Sequence[dict[str, Pair]], name: str) -> dict[str, Any]:
    rows = scenario.rows[name][1]
    longs = [each[name].long for each in rounds]

    def per_1k(each: dict[str, Pair], what: str, who: str = name) -> float:
        fewer, more = scenario.rows[who]
        difference = getattr(each[who].long, what) - getattr(each[who].short, what)
        return difference / (more - fewer) * 1000

    def ratio(each: dict[str, Pair]) -> float:
        return per_1k(each, "cpu_s") / per_1k(each, "cpu_s", ENGINE)

    parts = ("wall_s", "cpu_s", "rss_mb", "before_s", "before_cpu_s", "after_s", "after_cpu_s")
    return {
        "rows": rows,
        "cpu_s_per_1k": median(per_1k(each, "cpu_s") for each in rounds),
        "wall_s_per_1k": median(per_1k(each, "wall_s") for each in rounds),
        "cpu_of_engine": median(ratio(each) for each in rounds),
        "efficiency": median(scenario.ideal_s(rows) / each.call_s for each in longs),
        "max_in_flight": max(each.stats["max_in_flight"] for each in longs),
        "connections": max(each.stats["connections"] for each in longs),
        **{part: median(getattr(each, part) for each in longs) for part in parts},
    }


def memory(root: Path, stub: Stub, quick: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """Peak memory of the engine over few rows and many; traced runs count Python's objects only."""
    stub.behave(latency_ms=50)
    found: dict[str, Any] = {}
    for rows in (100, 200, 400) if quick else (20_000, 100_000, 200_000):
        job = prepare(root, f"memory_{rows}", rows, 256)
        for option in ("", "traced"):
            say(f"memory of {rows:,} rows {option}")
            prepare(root, f"memory_{rows}", rows, 256)
            measured = measure(client(ENGINE, job.file, option), stub)
            seen = found.setdefault(str(rows), {})
            if option:
                peak = orjson.loads(measured.output.splitlines()[-1])["peak_bytes"]
                seen["traced_mb"] = peak / 2**20
            else:
                seen["rss_mb"] = measured.rss_mb
    return found


def capacity(root: Path, stub: Stub, quick: bool, say: Callable[[str], None]) -> list[Any]:
    """What the stub answers when asked by bare sockets."""
    rows = 300 if quick else 20_000
    cases = [(False, 256, 0), (False, 1024, 0), (False, 1024, 50), (True, 256, 0)]
    found: list[Any] = []
    for rates, in_flight, latency_ms in cases:
        say(f"stub: {in_flight} connections, {latency_ms} ms{', rating' if rates else ''}")
        job = prepare(root, f"rows_{rows}", rows, in_flight)
        with Stub(rates=rates) as own:
            own.behave(latency_ms=latency_ms)
            used, rounds = own.cpu_s(), 1 if quick else 5
            runs = [measure(client("floor", job.input, in_flight), own) for _ in range(rounds)]
            cost = (own.cpu_s() - used) / rounds / rows
        rate = median(rows / run.call_s for run in runs)
        case = {"rates": rates, "in_flight": in_flight, "latency_ms": latency_ms}
        found.append({**case, "per_s": rate, "cpu_us": cost * 1e6})
    return found
