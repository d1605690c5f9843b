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
    task = prepare_files(root, name, 1, rows, in_flight, limits)
    folder, made = root / "data" / name, root / "out" / name
    return Job(task, folder / KEY, made / "records.parquet", rows)


def prepare_files(
    root: Path,
    name: str,
    files: int,
    rows: int,
    in_flight: int,
    limits: dict[str, Any] | None = None,
    **more: Any,
) -> Path:
    """The file of a task that rates so many rows of each of so many files."""
    folder, made = _folders(root, name, files, rows)
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
        **more,
    }
    return _write(root / f"configs/tasks/{name}.yaml", task)


def prepare_answers(
    root: Path, name: str, files: int, rows: int, in_flight: int, *, judged: bool = False
) -> Path:
    """The file of a task that answers conversations, and has another endpoint judge the answers."""
    folder, made = _folders(root, name, files, rows, chats=True)
    for model, variable in (("answers", "REHEARSAL_BASE_URL"), ("judge", "JUDGE_BASE_URL")):
        client_config = {"base_url": f"${{{variable}}}", "api_key": "none"}
        model_file = {"client_config": client_config, "chat_config": {"model": MODEL}}
        _write(root / f"configs/models/{model}.yaml", model_file)
    _write(root / "configs/prompts/quality.yaml", _PROMPT_FILE)
    task: dict[str, Any] = {
        "task_name": name,
        "task_type": "data_distillation",
        "generate_response": {
            "response_config_path": "configs/models/answers.yaml",
            "input_path": str(folder),
            "output_path": str(made / "answers"),
            "concurrency": in_flight,
        },
        "concurrency": {"max_concurrent_requests": in_flight},
    }
    if judged:
        task["scores"] = {
            "model": {"config_path": "configs/models/judge.yaml"},
            "prompt": {"config_path": "configs/prompts/quality.yaml"},
            "output_dir": str(made / "scores"),
            "prompt_format_key": "text",
        }
    return _write(root / f"configs/tasks/{name}.yaml", task)


def _folders(
    root: Path, name: str, files: int, rows: int, *, chats: bool = False
) -> tuple[Path, Path]:
    """That of the input files, which are made, and that of the results, where none are."""
    folder, made = root / "data" / name, root / "out" / name
    shutil.rmtree(made, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        path = folder / (KEY if files == 1 else f"{number:05}.jsonl")
        if not path.exists():
            with path.open("wb") as file:
                file.writelines(_lines(name if files == 1 else f"{name}-{number}", rows, chats))
    return folder, made


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


def _lines(name: str, rows: int, chats: bool) -> Iterator[bytes]:
    dice, vocabulary = random.Random(name), _WORDS.split()
    for number in range(rows):
        words = " ".join(dice.choices(vocabulary, k=RECORD_BYTES // 5))
        text = f"{name} {number} {words}"[:RECORD_BYTES]
        asked = {"messages": [{"role": "user", "content": text}]} if chats else {"text": text}
        yield orjson.dumps({"id": f"{name}-{number}", **asked}) + b"\n"


def _write(path: Path, content: dict[str, Any]) -> Path:
    """In one step: another process may be reading it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(yaml.safe_dump(content, sort_keys=False))
    return temporary.replace(path)
