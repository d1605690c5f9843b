"""Scores files as others read them: DuckDB, pandas, polars and Hugging Face's `datasets`.

They have an environment of their own, see README.md; what is absent there is skipped.
"""

from __future__ import annotations

import datetime as dt
import os
import subprocess
from decimal import Decimal
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from project import TASK, Project, some_rows

from modelcall_assets.stages.score_table import API_FIELDS, VOLATILE_COLUMNS

READERS = Path(os.environ.get("READERS", Path(__file__).parent.parent / ".acceptance/readers"))
PROGRAMS = {
    "duckdb": """
import duckdb
found = duckdb.sql(f"select * from read_parquet('{path}')")
rows = [dict(zip(found.columns, row)) for row in found.fetchall()]
""",
    "pandas": """
import pandas
rows = pandas.read_parquet(path).to_dict("records")
""",
    "polars": """
import polars
rows = polars.read_parquet(path).to_dicts()
""",
    "datasets": """
import datasets
rows = list(datasets.load_dataset("parquet", data_files=path, split="train", cache_dir=cache))
""",
}
PRELUDE = """
import sys
path, cache = sys.argv[1:]
"""
PRINT = '''
import datetime, decimal, json

def plain(value):
    """As JSON has it; what pandas puts in place of null is null."""
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    if hasattr(value, "tolist") and not isinstance(value, str):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    if isinstance(value, (bytes, bytearray)):
        return bytes(value).hex()
    if value is None or value != value:
        return None
    if isinstance(value, datetime.datetime):
        return value.astimezone(datetime.timezone.utc).isoformat()[:26]
    return value if isinstance(value, (str, bool, int, float)) else str(value)

print(json.dumps([plain(row) for row in rows]))
'''


@pytest.fixture
def scored(bare: Project) -> list[Path]:
    """Scores of lines with failures among them, and of every kind of column."""
    odd = {"id": 7, "text": "one", "mixed": [1], "deep": {"a": [{"b": None}]}, "n": 2**60}
    lines = [*some_rows(70), b"{torn", odd, {"text": None, "mixed": "x", "n": 1}]
    bare.write_input("lines.jsonl", lines)
    moments = [dt.datetime(2026, 1, 2, 3, 4, 5, 678, dt.UTC), None] * 20
    table = pa.table(
        {
            "id": [f"row {n}" for n in range(40)],
            "text": pa.array([f"text {n % 3}" for n in range(40)]).dictionary_encode(),
            "png": [b"\x89PNG" + bytes([n]) for n in range(39)] + [None],
            "tags": [["a", "ü"] * (n % 3) for n in range(40)],
            "meta": [{"n": n, "of": {"x": n / 2}} if n % 4 else None for n in range(40)],
            "at": pa.array(moments, pa.timestamp("us", "UTC")),
            "day": pa.array([dt.date(2026, 1, 2)] * 40),
            "price": pa.array([Decimal("1.20")] * 40, pa.decimal128(9, 2)),
            "wide": pa.array([2**62 + n for n in range(40)]),
        }
    )
    pq.write_table(table, bare.input_folder / "columns.parquet")
    with pa.ipc.new_file(bare.input_folder / "arrow.arrow", table.schema) as out:
        out.write_table(table, max_chunksize=7)
    bare.write_task({"max_failure_rate": 1.0})
    ended = bare.run("run-task", TASK)
    assert ended.code == 0, ended
    return [bare.output(name) for name in ("lines.jsonl", "columns.parquet", "arrow.arrow")]


@pytest.fixture(params=PROGRAMS)
def reader(request: pytest.FixtureRequest) -> str:
    """The name of one that is there."""
    name: str = request.param
    python = READERS / "bin/python"
    if not python.exists():
        pytest.skip(f"no {READERS}: acceptance/README.md says how to make it")
    found = subprocess.run([python, "-c", f"import {name}"], capture_output=True, check=False)
    if found.returncode:
        pytest.skip(f"{name} is not in {READERS}: acceptance/README.md says how to install it")
    return name


def read_by(reader: str, path: Path, cache: Path) -> list[dict[str, Any]]:
    program = PRELUDE + PROGRAMS[reader] + PRINT
    command = [READERS / "bin/python", "-c", program, str(path), str(cache)]
    environment = {"PATH": os.environ["PATH"], "HOME": str(cache), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return orjson.loads(done.stdout)


def plain(value: Any) -> Any:
    """As the readers print it."""
    if isinstance(value, dict):
        return {name: plain(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [plain(inner) for inner in value]
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, dt.datetime):
        return value.isoformat()[:26]
    return value if value is None or isinstance(value, str | int | float) else str(value)


def test_every_reader_sees_the_same_rows(scored: list[Path], reader: str, tmp_path: Path) -> None:
    for path in scored:
        expected = [plain(row) for row in pq.read_table(path).to_pylist()]
        assert len(expected) in (40, 73)
        assert read_by(reader, path, tmp_path / "cache") == expected


def test_the_files_say_what_they_are(scored: list[Path]) -> None:
    for path in scored:
        schema = pq.read_schema(path)
        metadata = schema.metadata or {}
        assert metadata[b"modelcall.schema_version"] == b"1"
        assert metadata[b"modelcall.stage"] == b"scores"
        assert metadata[b"modelcall.volatile_columns"].decode() == ",".join(VOLATILE_COLUMNS)
        assert {name: schema.field(name).type for name, _ in API_FIELDS} == dict(API_FIELDS)
        groups = pq.read_metadata(path).row_group(0)
        assert {groups.column(n).compression for n in range(groups.num_columns)} == {"ZSTD"}
