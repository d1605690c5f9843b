"""Files of any size through raw and preprocessed, and long listings of a store.

python -m benchmarks.storage PROGRAM ARGUMENT      # one program; what it took is printed
"""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import orjson

from benchmarks.conversion import WORDS
from benchmarks.listing_server import listing_server
from benchmarks.measure import CLIENT_CORE, start
from modelcall_assets.config.preprocess import Preprocess
from modelcall_assets.records import StoreOptions
from modelcall_assets.stages.preprocessed import preprocess
from modelcall_assets.stages.raw import read_raw
from modelcall_assets.stages.recipe import Recipe
from modelcall_assets.stages.source import Part, Source
from modelcall_assets.storage.files import publish
from modelcall_assets.storage.listing import list_page, stat_file
from modelcall_assets.storage.places import Stores

FILES = 16
SIZES_MB = (512, 5120)
"""All files together. Peak memory is measured with both, speed with the second."""
ROUNDS = 1
PEAK_MB = 400
"""What `raw` and `preprocessed` may take, however large the files are."""
OBJECTS = (10_000, 100_000)


def measure_all(root: Path, _stub: Any, quick: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """RuntimeError when a row is missing, or more memory is used than PEAK_MB."""
    few, many = (0.5, 2) if quick else SIZES_MB
    small, large = (_made(root / str(mb), mb, say) for mb in (few, many))
    rounds: list[dict[str, dict[str, float]]] = []
    for number in range(1 if quick else ROUNDS):
        rounds.append({})
        for name in PROGRAMS:
            say(f"{many:,g} MB in {FILES} files, round {number + 1}: {name}")
            rounds[-1][name] = _run(name, **large)
    bare = [each["bare"]["cpu_s"] for each in rounds]
    programs = {
        name: {
            "rows_per_s": median(large["rows"] / each[name]["cpu_s"] for each in rounds),
            "mb_per_s": median(many / each[name]["cpu_s"] for each in rounds),
            "of_bare": median(
                b / each[name]["cpu_s"] for b, each in zip(bare, rounds, strict=True)
            ),
            "rss_mb": [_run(name, **small)["rss_mb"], max(each[name]["rss_mb"] for each in rounds)],
        }
        for name in PROGRAMS
    }
    for name, found in programs.items():
        if max(found["rss_mb"]) > PEAK_MB:
            raise RuntimeError(f"{name}: {max(found['rss_mb']):.0f} MB, more than {PEAK_MB} MB")
    sizes = (1500, 3000) if quick else OBJECTS
    say(f"{sizes[-1]:,} objects listed")
    return {
        "mb": [few, many],
        "rows": large["rows"],
        "bound_mb": PEAK_MB,
        "programs": programs,
        "listings": {str(size): _listing(size) for size in sizes},
    }


def _made(folder: Path, mb: float, say: Callable[[str], None]) -> dict[str, Any]:
    """JSON lines of about 2 KB in FILES files."""
    say(f"making {mb:,g} MB")
    folder.mkdir(parents=True)
    dice, rows = random.Random(mb), 0
    texts = [" ".join(dice.choices(WORDS.split(" "), k=380)) for _ in range(500)]
    for number in range(FILES):
        with (folder / f"part-{number:02}.jsonl").open("wb", 1 << 20) as out:
            while out.tell() < mb * 2**20 / FILES:
                row = {"id": f"row-{rows}", "text": dice.choice(texts), "stars": rows % 7}
                out.write(orjson.dumps(row) + b"\n")
                rows += 1
    return {"folder": folder, "rows": rows}


def _run(name: str, folder: Path, rows: int) -> dict[str, float]:
    took = _in_process(name, str(folder))
    if took["rows"] != rows:
        raise RuntimeError(f"{name}: {took['rows']:,} of {rows:,} rows")
    return took


def _listing(size: int) -> dict[str, float]:
    with listing_server(size) as endpoint:
        took = _in_process("listing", endpoint)
    if took["rows"] != size:
        raise RuntimeError(f"listing: {took['rows']:,} of {size:,} objects")
    return took


def _in_process(name: str, argument: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.storage", name, argument]
    process = start(command, CLIENT_CORE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    output, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: {errors.decode()}")
    return orjson.loads(output)


# In the fresh process


def bare(folder: Path) -> int:
    """What any program must do that looks at the rows and leaves them."""
    rows, output = 0, folder / "out" / "bare.jsonl"
    output.parent.mkdir(exist_ok=True)
    for path in sorted(folder.glob("*.jsonl")):
        with path.open("rb", 1 << 20) as lines, output.open("wb", 1 << 20) as out:
            for line in lines:
                out.write(orjson.dumps(orjson.loads(line), option=orjson.OPT_APPEND_NEWLINE))
                rows += 1
    return rows


def raw(folder: Path) -> int:
    return sum(read_raw(stat_file(path)).rows for path in sorted(folder.glob("*.jsonl")))


def raw_and_preprocessed(folder: Path, config: Preprocess) -> int:
    rows = 0
    for path in sorted(folder.glob("*.jsonl")):
        seen = read_raw(stat_file(path))
        source = Source((Part(path.name, path, seen.digest),), seen.schema, seen.rows)
        with publish(folder / "out" / f"{path.stem}.parquet") as out:
            rows += preprocess(source, Recipe(config, folder, "task.yaml"), out).rows
    return rows


def listing(endpoint: str) -> int:
    options = {
        "key": "key",
        "secret": "secret",
        "endpoint_url": endpoint,
        "client_kwargs": {"region_name": "us-east-1"},
        "config_kwargs": {"s3": {"addressing_style": "path"}},
    }
    stores = Stores([StoreOptions("benchmark", "s3://", "s3", options)])
    return len(list_page(stores.place("s3://bucket/in"))[0])


_CLEANED = Preprocess.model_validate(
    {
        "filters": {"min_text_length": 10},
        "transformations": {
            "text_cleaning": {"remove_extra_whitespace": True},
            "computed_fields": {"characters": {"type": "text_length"}},
        },
    }
)
PROGRAMS: dict[str, Callable[[Path], int]] = {
    "bare": bare,
    "raw": raw,
    "preprocessed": partial(raw_and_preprocessed, config=Preprocess()),
    "cleaned": partial(raw_and_preprocessed, config=_CLEANED),
}


def main(name: str, argument: str) -> None:
    """CPU is that of the work, without the imports; the peak has them in it."""
    began, cpu = time.monotonic(), time.process_time()
    rows = listing(argument) if name == "listing" else PROGRAMS[name](Path(argument))
    took = {"rows": rows, "wall_s": time.monotonic() - began, "cpu_s": time.process_time() - cpu}
    status = Path("/proc/self/status").read_text()
    took["rss_mb"] = int(status.partition("VmHWM:")[2].split()[0]) / 1024
    for path in Path(argument).glob("out/*"):
        path.unlink()
    sys.stdout.write(orjson.dumps(took).decode())


if __name__ == "__main__":
    main(*sys.argv[1:])
