"""A million rated rows as a data set: how much memory it takes to write, and that it opens."""

from __future__ import annotations

import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from project import TASK, Project

FILES, ROWS = 4, 1_000_000
MOST_MB = 400
SCORER = """
class Length:
    fields = {"score": {"type": "integer"}}

    def score(self, row):
        return {"score": len(row["text"]) % 5}
"""
MEASURED = """
import atexit, re, sys
from pathlib import Path

def tell():
    peak = re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())
    print(f"{int(peak[1]) >> 10}", file=sys.stderr)

atexit.register(tell)
from modelcall_assets.cli.main import main
main()
"""
"""The command, and its peak in MiB as the last that it says."""


@pytest.mark.timeout(3600)
@pytest.mark.skipif(sys.platform != "linux", reason="/proc says how much memory it took")
def test_a_million_rows(bare: Project) -> None:
    datasets = pytest.importorskip("datasets", reason="pip install -e '.[dev]'")
    (bare.root / "lengths.py").write_text(SCORER)
    bare.write_task({"scorer": "lengths:Length", "model": None, "prompt": None})
    for number in range(FILES):
        texts = [os.urandom(50 + at % 100).hex() for at in range(ROWS // FILES)]
        pq.write_table(pa.table({"text": texts}), bare.input_folder / f"{number}.parquet")
    with bare.start("run-task", TASK) as running:
        assert running.wait() == 0
    command = [sys.executable, "-c", MEASURED, "publish", TASK, "set", "--split", "0.1"]
    ended = subprocess.run(command, cwd=bare.root, capture_output=True, text=True, check=True)
    peak_mb = int(ended.stderr.splitlines()[-1])
    cache = str(bare.root / "cache")
    found = datasets.load_dataset(str(bare.root / "set"), cache_dir=cache)
    assert sum(split.num_rows for split in found.values()) == ROWS
    assert peak_mb < MOST_MB, peak_mb
