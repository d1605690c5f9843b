"""The project folder that a benchmark works in: 2 KB records and one task for each set of them."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import yaml

MODEL = "rehearsal-rater-1"
KEY = "records.jsonl"
RECORD_BYTES = 2048
SYSTEM = (
    "You judge the quality of texts for the training of language models. Look at how much a text "
    "explains, how well it is written and whether it repeats itself. Answer with one JSON object "
    'and nothing else: {"score": a whole number from 1 (useless) to 5 (excellent), "quality_tags": '
    'a list of short labels, "recommended_use_case": one sentence}.'
)
PROMPT = "Judge this text:\n{text}\n"
_PROMPT_FILE = {
    "prompt_template": {"system_text": SYSTEM, "prompt_text": PROMPT},
    "output_config": {
        "require_json": True,
        "json_keys": ["score", "quality_tags", "recommended_use_case"],
        "json_key_must_exists": ["score"],
        "json_schema": {
            "properties": {
                "score": {"type": "integer", "minimum": 1, "maximum": 5},
                "quality_tags": {"type": "array", "items": {"type": "string"}},
                "recommended_use_case": {"type": "string"},
            }
        },
    },
}
_WORDS = (
    "the of a to in is that for it as with was on be by this are from or an which data model text "
    "function returns value list when each because therefore example following system result"
)


@dataclass(frozen=True)
class Job:
    """A task over one input file."""

    file: Path
    input: Path
    output: Path
    rows: int


def prepare(
    root: Path, name: str, rows: int, in_flight: int, limits: dict[str, Any] | None = None
) -> Job:
    """A job that has not run yet; `limits` go into the model file's `client_config`."""
    folder, made = root / "data" / name, root / "out" / name
    shutil.rmtree(made, ignore_errors=True)
    job = Job(root / f"configs/tasks/{name}.yaml", folder / KEY, made / "records.parquet", rows)
    if not job.input.exists():
        folder.mkdir(parents=True)
        with job.input.open("wb") as file:
            file.writelines(_lines(name, rows))
    client_config = {"base_url": "${REHEARSAL_BASE_URL}", "api_key": "none", **(limits or {})}
    chat_config = {"model": MODEL, "temperature": 0}
    model = {"client_config": client_config, "chat_config": chat_config}
    _write(root / f"configs/models/{name}.yaml", model)
    _write(root / "configs/prompts/quality.yaml", _PROMPT_FILE)
    task = {
        "task_name": name,
        "data": {"input_folder": str(folder), "output_folder": str(made), "input_key": "text"},
        "model": {"config_path": f"configs/models/{name}.yaml"},
        "prompt": {"config_path": "configs/prompts/quality.yaml"},
        "concurrency": {"max_concurrent_requests": in_flight},
    }
    _write(job.file, task)
    return job


@dataclass(frozen=True)
class Rows:
    """What a job published."""

    asked: int
    rows: int
    ok: int
    in_input_order: bool

    def __str__(self) -> str:
        order = "in input order" if self.in_input_order else "NOT in input order"
        return f"{self.rows:,} of {self.asked:,} rows, {self.ok:,} answered, {order}"


def published(job: Job) -> Rows:
    import pyarrow.parquet as pq

    table = pq.read_table(job.output, columns=["id", "api_status"])
    with job.input.open("rb") as lines:
        ids = [orjson.loads(line)["id"] for line in lines]
    ok = table["api_status"].to_pylist().count("success")
    return Rows(job.rows, table.num_rows, ok, table["id"].to_pylist() == ids)


def _lines(name: str, rows: int) -> Iterator[bytes]:
    dice, vocabulary = random.Random(name), _WORDS.split()
    for number in range(rows):
        words = " ".join(dice.choices(vocabulary, k=RECORD_BYTES // 5))
        text = f"{name} {number} {words}"[:RECORD_BYTES]
        yield orjson.dumps({"id": f"{name}-{number}", "text": text}) + b"\n"


def _write(path: Path, content: dict[str, Any]) -> None:
    """In one step: another process may be reading it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(yaml.safe_dump(content, sort_keys=False))
    temporary.replace(path)
