"""Conversations converted and merged, beside a loop that only parses and writes them.

python -m benchmarks.conversion PROGRAM FOLDER      # one program; what it took is printed
"""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import orjson

from benchmarks.measure import CLIENT_CORE, start
from benchmarks.stub import Stub
from modelcall_assets.stages.chatml import convert_split
from modelcall_assets.stages.merged import invalid_file_of, merge_group
from modelcall_assets.storage.files import publish
from modelcall_assets.storage.listing import stat_file
from modelcall_assets.transforms.chatml import ChatmlOptions

BARE = "bare"
SIZES_MB = (128, 1024)
"""Peak memory is measured with both, speed with the second."""
ROUNDS = 3
PARTS = ("part-0.jsonl", "part-1.jsonl")
TURNS, TURN_CHARS = 4, 480
DUPLICATE_EVERY = 20
WORDS = (
    "the of a to in is that for it as with was on be by this are from or an which data model text "
    "function returns value list when each because therefore naïve “quoted” 例えば\n def x: \t"
)


def measure_all(root: Path, _stub: Stub, quick: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """Round after round, each program in its turn and in a fresh process; medians."""
    few, many = (0.25, 1) if quick else SIZES_MB
    found: dict[str, Any] = {"mb": [few, many], "rounds": 1 if quick else ROUNDS}
    small, large = ({"folder": root / str(mb), **make(root / str(mb), mb)} for mb in (few, many))
    rounds: list[dict[str, dict[str, float]]] = []
    for number in range(found["rounds"]):
        rounds.append({})
        for name in PROGRAMS:
            say(f"{large['rows']:,} conversations, round {number + 1}: {name}")
            rounds[-1][name] = _run(name, **large)
    found["programs"] = {
        name: {
            "per_cpu_s": median(large["rows"] / each[name]["cpu_s"] for each in rounds),
            "of_bare": median(each[BARE]["cpu_s"] / each[name]["cpu_s"] for each in rounds),
            "rss_mb": [
                _run(name, **small)["rss_mb"],
                max(each[name]["rss_mb"] for each in rounds),
            ],
        }
        for name in PROGRAMS
    }
    return {**found, "rows": large["rows"]}


def make(folder: Path, mb: float) -> dict[str, int]:
    """ShareGPT lines in two files; how many, and how many of them are there already."""
    folder.mkdir(parents=True)
    dice, rows = random.Random(mb), 0
    turns = [" ".join(dice.choices(WORDS.split(" "), k=TURN_CHARS // 5)) for _ in range(500)]
    for part in PARTS:
        with (folder / part).open("wb", 1 << 20) as out:
            line = b""
            while out.tell() < mb * 2**20 / len(PARTS):
                rows += 1
                line = line if rows % DUPLICATE_EVERY == 0 and line else _line(rows, turns, dice)
                out.write(line)
    return {"rows": rows, "duplicates": rows // DUPLICATE_EVERY}


def _line(number: int, turns: list[str], dice: random.Random) -> bytes:
    speakers = ("human", "gpt") * (TURNS // 2)
    said = [{"from": who, "value": dice.choice(turns)} for who in speakers]
    return orjson.dumps({"id": f"chat-{number}", "conversations": said}) + b"\n"


def _run(name: str, folder: Path, rows: int, duplicates: int) -> dict[str, float]:
    """RuntimeError when a row is missing."""
    command = [sys.executable, "-m", "benchmarks.conversion", name, str(folder)]
    process = start(command, CLIENT_CORE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    output, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: {errors.decode()}")
    took = orjson.loads(output)
    expected = rows - duplicates if name == "merged_dedup" else rows
    if took["rows"] != expected:
        raise RuntimeError(f"{name}: {took['rows']:,} of {expected:,} rows")
    return took


# In the fresh process


def bare(folder: Path, output: Path) -> int:
    """What any program must do that looks at the rows."""
    rows = 0
    with output.open("wb", 1 << 20) as out:
        for line in _lines(folder):
            out.write(orjson.dumps(orjson.loads(line), option=orjson.OPT_APPEND_NEWLINE))
            rows += 1
    return rows


def _lines(folder: Path) -> Iterator[bytes]:
    for part in PARTS:
        with (folder / part).open("rb", 1 << 20) as lines:
            yield from lines


def chatml(folder: Path, output: Path, *, raw_data: bool = False, system: bool = False) -> int:
    options = ChatmlOptions(
        format_style="sharegpt",
        column_mapping={"conversations": "conversations"},
        keep_raw_data=raw_data,
        system_prompt="You are a helpful assistant and an expert coder." if system else None,
    )
    files = [stat_file(folder / part) for part in PARTS]
    with publish(output) as out:
        report = convert_split(files, options, out)
    return report.rows - report.failed


def merged(
    folder: Path, output: Path, *, source_column: str | None = None, dedup: bool = False
) -> int:
    members = {part: folder / part for part in PARTS}
    with publish(output) as out, ExitStack() as rejects:
        report = merge_group(
            members,
            out,
            lambda: rejects.enter_context(publish(invalid_file_of(output))),
            source_column=source_column,
            dedup=dedup,
        )
    return report.rows


PROGRAMS: dict[str, Callable[[Path, Path], int]] = {
    BARE: bare,
    "chatml": chatml,
    "chatml_raw_data": partial(chatml, raw_data=True),
    "chatml_system": partial(chatml, raw_data=True, system=True),
    "merged": merged,
    "merged_source": partial(merged, source_column="source"),
    "merged_dedup": partial(merged, dedup=True),
}


def main(name: str, folder: str) -> None:
    """CPU is that of the work, without the imports; the peak has them in it."""
    began, output = time.process_time(), Path(folder) / "out.jsonl"
    rows = PROGRAMS[name](Path(folder), output)
    cpu_s = time.process_time() - began
    output.unlink()
    status = Path("/proc/self/status").read_text()
    peak_kb = int(status.partition("VmHWM:")[2].split()[0])
    took = {"rows": rows, "cpu_s": cpu_s, "rss_mb": peak_kb / 1024}
    sys.stdout.write(orjson.dumps(took).decode())


if __name__ == "__main__":
    main(*sys.argv[1:])
