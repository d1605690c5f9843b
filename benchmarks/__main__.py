"""`python -m benchmarks`: measure, print tables, and on `--write` renew docs/performance.md."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import conversion, files, preprocess, report, robustness, speed, storage
from benchmarks.measure import CORES, ROOT, STUB_CORE
from benchmarks.stub import Stub

PARTS: dict[str, Callable[..., Any]] = {
    "capacity": speed.capacity,
    "compare": speed.compare,
    "robustness": robustness.measure_all,
    "conversion": conversion.measure_all,
    "storage": storage.measure_all,
    "preprocess": preprocess.measure_all,
    "files": files.measure_all,
    "large": files.large,
    "memory": speed.memory,
}
ORDINARY = ("capacity", "compare", "robustness", "conversion", "storage", "preprocess", "files")
RESULTS = ROOT / "build" / "benchmarks.json"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; all but large and memory"
    )
    parser.add_argument("--quick", action="store_true", help="a few hundred rows: does it work?")
    parser.add_argument("--write", action="store_true", help="renew docs/performance.md")
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON; parts are added to it")
    parser.add_argument(
        "--before",
        type=Path,
        metavar="CHECKOUT",
        help="another commit, for `files` beside this one",
    )
    parser.add_argument(
        "--postgres",
        metavar="URL",
        default="",
        help="an empty database for Dagster, for `files` beside its SQLite; needs dagster-postgres",
    )
    options = parser.parse_args()
    if unknown := sorted(set(options.parts) - set(PARTS)):
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if options.quick and options.write:
        parser.error("a quick run measures nothing worth writing down")
    os.sched_setaffinity(0, {CORES[2] if len(CORES) > 2 else STUB_CORE})
    path: Path = options.results
    results = json.loads(path.read_text()) if path.exists() else {}
    for name in options.parts or ORDINARY:
        beside: dict[str, Any] = {}
        if name == "files":
            beside["postgres"] = options.postgres
            beside |= {"before": options.before.resolve()} if options.before else {}
        results[name] = _measured(name, options.quick, beside)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1))
    for block in report.blocks(results).values():
        _say(block, sys.stdout)
    if options.write:
        report.write(ROOT / "docs" / "performance.md", results)


def _measured(name: str, quick: bool, beside: dict[str, Any]) -> dict[str, Any]:
    began = {
        "command": f"python -m benchmarks {name}" + (" --quick" if quick else ""),
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "machine": _machine(),
    }
    with tempfile.TemporaryDirectory(prefix="modelcall-bench-") as folder, Stub() as stub:
        return {**began, "results": PARTS[name](Path(folder), stub, quick, _say, **beside)}


def _machine() -> str:
    """What the figures depend on, the load before the start included."""
    model = "".join(
        line.partition(":")[2].strip() + ", "
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ).split(", ")[0]
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    packages = ", ".join(f"{name} {version(name)}" for name in ("aiohttp", "openai", "dagster"))
    python = ".".join(map(str, sys.version_info[:3]))
    load = os.getloadavg()[0]
    return (
        f"commit {commit or 'unknown'}, Python {python}, {packages}, "
        f"{len(CORES)} cores of {model or 'an unnamed CPU'}, load {load:.1f}"
    )


def _say(text: str, stream: Any = sys.stderr) -> None:
    print(text, file=stream, flush=True)


if __name__ == "__main__":
    main()
