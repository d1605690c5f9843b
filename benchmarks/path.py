"""One record's way: the functions and files of the package that it goes through, and how often a
row is parsed and written on the way from a data set to responses.

python -m benchmarks.path      # prints both; some 20 s

A task runs with 100 records and again with 200. What is entered at least 90 times more for the 100
more records belongs to a record's way; comprehensions are not counted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from contextlib import suppress
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import orjson
import yaml

from benchmarks.project import prepare
from modelcall_assets.rehearsal import serve_in_thread

FEW, MANY, ENTERED = 100, 200, 90
PACKAGE = str(Path(__file__).parents[1] / "modelcall_assets")
PARSERS, WRITERS = ("loads",), ("dumps",)


def main() -> None:
    if len(sys.argv) > 1:
        _profiled(sys.argv[1])
        return
    with tempfile.TemporaryDirectory() as folder, serve_in_thread() as server:
        os.environ["REHEARSAL_BASE_URL"] = server.base_url
        functions, _ = _of_a_record(Path(folder) / "scores", _scoring)
        files = {name.rsplit(":", 2)[0] for name in functions}
        say(f"a record through scores: {len(functions)} functions in {len(files)} files")
        _, calls = _of_a_record(Path(folder) / "chain", _chain)
        per_row = {name: count / (MANY - FEW) for name, count in calls.items()}
        parsed, written = (sum(per_row.get(n, 0) for n in names) for names in (PARSERS, WRITERS))
        say(f"a row through the chain: parsed {parsed:.1f} times, written {written:.1f} times")
        if os.environ.get("NAMES"):
            say("\n".join(sorted(functions)))


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")


def _of_a_record(root: Path, write: Any) -> tuple[set[str], Counter[str]]:
    few, many = (_run(write(root / str(rows), rows)) for rows in (FEW, MANY))
    entered = Counter(many["entered"])
    entered.subtract(few["entered"])
    calls = Counter(many["calls"])
    calls.subtract(few["calls"])
    return {name for name, count in entered.items() if count >= ENTERED}, calls


def _run(task: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.path", str(task)]
    home = {"DAGSTER_HOME": str(task.parents[2] / "dagster_home")}
    done = subprocess.run(
        command, env={**os.environ, **home}, stdout=subprocess.PIPE, check=True, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def _profiled(task: str) -> None:
    """In a process of its own: what `modelcall run-task` enters and calls."""
    entered, calls = Counter[CodeType](), Counter[str]()

    def counted(name: str, call: Any) -> Any:
        def called(*given: Any, **options: Any) -> Any:
            calls[name] += 1
            return call(*given, **options)

        return called

    for name in (*PARSERS, *WRITERS):
        setattr(orjson, name, counted(name, getattr(orjson, name)))
    from modelcall_assets.cli.main import modelcall

    def look(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            entered[frame.f_code] += 1

    threading.setprofile(look)
    sys.setprofile(look)
    with suppress(SystemExit):
        modelcall(["run-task", task], standalone_mode=False)
    sys.setprofile(None)
    threading.setprofile(None)  # type: ignore[arg-type]
    own = {
        f"{code.co_filename.removeprefix(PACKAGE)}:{code.co_firstlineno}:{code.co_name}": count
        for code, count in entered.items()
        if code.co_filename.startswith(PACKAGE) and not code.co_name.endswith("comp>")
    }
    own = {name: count for name, count in own.items() if not name.endswith("<genexpr>")}
    say(json.dumps({"entered": own, "calls": calls}))


def _scoring(root: Path, rows: int) -> Path:
    (root / "configs").mkdir(parents=True)
    return prepare(root, "path", rows, 4).file


def _chain(root: Path, rows: int) -> Path:
    task = _scoring(root, 1).with_name("chain.yaml")
    data = root / "sets/org/talk/train.jsonl"
    data.parent.mkdir(parents=True)
    row = {"conversations": [{"from": "human", "value": "What is {}?"}]}
    data.write_bytes(
        b"".join(orjson.dumps(row).replace(b"{}", b"%d" % n) + b"\n" for n in range(rows))
    )
    sets = {"org/talk": {"configs": [None], "format_style": "sharegpt",
                         "column_mapping": {"conversations": "conversations"}}}  # fmt: skip
    merge = {"name": "all", "output_file": "all.jsonl", "input_files": ["*.jsonl"]}
    steps = {
        "chatml_conversion": {"dataset_config_path": "configs/sets.yaml",
                              "input_dir": str(root / "sets"), "output_dir": str(root / "chatml")},
        "jsonl_merge": {"merge_config_path": "configs/groups.yaml",
                        "base_output_dir": str(root / "merged")},
        "generate_response": {"response_config_path": "configs/models/path.yaml",
                              "output_path": str(root / "responses")},
    }  # fmt: skip
    task.write_text(
        yaml.safe_dump({"task_name": "chain", "task_type": "data_distillation", **steps})
    )
    (root / "configs/sets.yaml").write_text(yaml.safe_dump(sets))
    (root / "configs/groups.yaml").write_text(yaml.safe_dump({"merge_groups": [merge]}))
    return task


if __name__ == "__main__":
    main()
