"""Exports as LLaMA-Factory's own loader reads them.

It has an environment of its own, see README.md; without it this is skipped.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import orjson
import pytest
from project import TASK, Project, Row, turn

TRAINER = Path(os.environ.get("TRAINER", Path(__file__).parent.parent / ".acceptance/llamafactory"))
PROGRAM = """
import json, sys
from types import SimpleNamespace
from llamafactory.data.loader import _load_single_dataset
from llamafactory.data.parser import get_dataset_list
from llamafactory.hparams import DataArguments, ModelArguments

folder, cache, *names = sys.argv[1:]
data = DataArguments(dataset_dir=folder, overwrite_cache=True)
data.preprocessing_num_workers = None
model = ModelArguments(model_name_or_path="none", cache_dir=cache)
training = SimpleNamespace(local_process_index=0, dataloader_num_workers=0)
found = {
    name: [*_load_single_dataset(attr, model, data, training)]
    for name, attr in zip(names, get_dataset_list(names, folder), strict=True)
}
print(json.dumps(found))
"""
SCORER = """
class Given:
    def score(self, item):
        return {"score": item["given"]}
"""
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}
CALLING = [
    turn("user", "1 and 1?"),
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {**turn("tool", "2"), "tool_call_id": "1"},
    turn("assistant", "Two."),
]
CHAT = [turn("system", "Brief."), turn("user", "q1"), turn("assistant", "a1"), turn("user", "q2")]


@pytest.fixture
def exported(bare: Project, tmp_path: Path) -> Path:
    """Pairs, single answers, and conversations with tools, in three forms."""
    (bare.root / "my_rules.py").write_text(SCORER)
    bare.write_task({"model": None, "prompt": None, "scorer": "my_rules:Given"})
    sample = {"id": "p", "text": "x", "messages": CHAT}
    rows: list[Row] = [
        *({**sample, "sample": n, "given": n, "response": f"a2-{n}"} for n in range(3)),
        {"id": "c", "text": "x", "given": 1, "messages": CALLING, "tools": [TOOL]},
    ]
    bare.write_input("talk.jsonl", rows)
    assert bare.run("run-task", TASK).code == 0
    folder = tmp_path / "out"
    for options in (
        ("--to", "sharegpt", "--into", "chats"),
        ("--to", "alpaca", "--into", "flat"),
        ("--to", "sharegpt", "--into", "pairs", "--pairs", "score"),
    ):
        ended = bare.run("export", TASK, "--output", str(folder), *options)
        assert ended.code == 0, ended
    return folder


def loaded(folder: Path, cache: Path, *names: str) -> dict[str, list[dict[str, Any]]]:
    python = TRAINER / "bin/python"
    if not python.exists():
        pytest.skip(f"no {TRAINER}: acceptance/README.md says how to make it")
    command = [python, "-c", PROGRAM, str(folder), str(cache), *names]
    environment = {"PATH": os.environ["PATH"], "HOME": str(cache), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return orjson.loads(done.stdout.splitlines()[-1])


def test_llama_factory_reads_what_was_written(exported: Path, tmp_path: Path) -> None:
    found = loaded(exported, tmp_path / "cache", "chats", "flat", "pairs")
    for name, rows in (("chats", 4), ("flat", 3)):
        assert len(found[name]) == rows
        for number, row in enumerate(found[name][:3]):
            assert row["_prompt"] == CHAT[1:]
            assert row["_response"] == [turn("assistant", f"a2-{number}")]
            assert (row["_system"], row["_tools"]) == ("Brief.", "")
    calling = found["chats"][3]
    assert [each["role"] for each in calling["_prompt"]] == ["user", "function", "observation"]
    assert orjson.loads(calling["_prompt"][1]["content"]) == [
        {"name": "add", "arguments": {"a": 1}}
    ]
    assert calling["_response"] == [turn("assistant", "Two.")]
    assert orjson.loads(calling["_tools"]) == [TOOL["function"]]
    (pair,) = found["pairs"]
    assert pair["_prompt"] == CHAT[1:] and pair["_system"] == "Brief."
    assert pair["_response"] == [turn("assistant", "a2-2"), turn("assistant", "a2-0")]
