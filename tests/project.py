"""A project on disk as tests build it, and `modelcall` in it."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, chdir, closing, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NamedTuple
from unittest.mock import patch
from uuid import uuid4

import dagster as dg
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from dagster._core.definitions.data_version import CachingStaleStatusResolver, StaleStatus
from dagster._core.loader import LoadingContextForTest
from dagster._core.storage.partition_status_cache import AssetPartitionStatus
from s3_server import S3Server

from modelcall_assets.cli.main import main
from modelcall_assets.config.catalog import load_catalog, load_linked
from modelcall_assets.defs import project_definitions
from modelcall_assets.defs.instance import open_instance, partitions_of, register
from modelcall_assets.defs.runs import RunSummary, TaskRunner
from modelcall_assets.defs.sensors import files_sensor
from modelcall_assets.llm import Engine
from modelcall_assets.records import decode_key, encode_key
from modelcall_assets.rehearsal import serve_in_thread
from modelcall_assets.stages import Run
from modelcall_assets.stages.asking import AskingStage
from modelcall_assets.stages.report import Report, Tally
from modelcall_assets.stages.score_table import VOLATILE_COLUMNS
from modelcall_assets.stages.task import Task
from modelcall_assets.storage.publishing import read_manifest

Row = dict[str, Any]

TASK = "configs/tasks/rate.yaml"
MODEL_FILE, PROMPT_FILE = "configs/models/rehearsal.yaml", "configs/prompts/quality.yaml"
A, B, C = NAMES = ("a.jsonl", "deep/b.parquet", "deep/er/c.jsonl")
"""The input files of the `project` fixture."""
GREEN, RED = AssetPartitionStatus.MATERIALIZED, AssetPartitionStatus.FAILED
FRESH, STALE = StaleStatus.FRESH, StaleStatus.STALE
QUIET = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}
"""For runs in this process."""

RATING: Row = {
    "task_name": "rate",
    "description": "Rates a few texts.",
    "owners": ["team:tests"],
    "data": {"input_folder": "data/in", "output_folder": "data/{task_name}/scores"},
    "model": {"config_path": MODEL_FILE},
    "prompt": {"config_path": PROMPT_FILE},
    "concurrency": {"max_concurrent_requests": 4, "files_per_run": 10},
}
PREPROCESS: Row = {
    "enabled": True,
    "script_type": "universal",
    "output_folder": "data/{task_name}/preprocessed",
    "max_tokens": 8192,
}
MODEL: Row = {
    "client_config": {
        "base_url": "${REHEARSAL_BASE_URL}",
        "api_key": "not-needed",
        "timeout": 20,
        "max_retries": 2,
    },
    "chat_config": {"model": "rehearsal-rater-1", "temperature": 0},
}
PROMPT: Row = {
    "prompt_template": {
        "system_text": "You judge texts and answer with one JSON object.",
        "prompt_text": "Judge this text:\n{text}\n",
    },
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
DAGSTER_YAML = """
telemetry: {enabled: false}
nux: {enabled: false}
concurrency: {pools: {granularity: op, default_limit: 1}}
compute_logs:
  module: dagster._core.storage.noop_compute_log_manager
  class: NoOpComputeLogManager
"""
WORKSPACE = "load_from: [{python_module: {module_name: modelcall_assets.definitions}}]\n"

CHATS, INS = "Chats/org_Chats-train.jsonl", "Ins/org_Ins-train.jsonl"
"""The data sets of `write_chain`, converted."""
ALL, ONLY_INS = "all.jsonl", "ins.jsonl"
"""Its merge groups."""
DATASETS: Row = {
    "org/Chats": {
        "configs": [None],
        "format_style": "sharegpt",
        "column_mapping": {"conversations": "conversations"},
    },
    "org/Ins": {
        "format_style": "instruction_input",
        "column_mapping": {"prompt": "instruction", "input": "input", "response": "output"},
    },
}
GROUPS: Row = {
    "merge_groups": [
        {"name": "all", "output_file": ALL, "input_files": [CHATS, "Ins/*.jsonl"]},
        {"name": "ins", "output_file": ONLY_INS, "input_files": ["org_Ins-train.jsonl"]},
    ]
}
CHATML: Row = {
    "dataset_config_path": "configs/distillation/datasets.yaml",
    "input_dir": "data/sets",
    "output_dir": "data/chatml",
}
MERGE: Row = {
    "merge_config_path": "configs/distillation/groups.yaml",
    "base_output_dir": "data/merged",
}
GENERATE: Row = {
    "response_config_path": MODEL_FILE,
    "output_path": "data/responses",
    "concurrency": 4,
}
JUDGE: Row = {
    "model": {"config_path": MODEL_FILE},
    "prompt": {"config_path": PROMPT_FILE},
    "output_dir": "data/scores",
    "prompt_format_key": "text",
}
CONVERSATIONS = "talk.jsonl"


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> Row:
    """`base` with `changes` laid over it, mapping by mapping."""
    result = dict(base)
    for key, value in changes.items():
        deeper = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merged(result[key], value) if deeper else value
    return result


def some_rows(count: int, word: str = "plain") -> list[Row]:
    """Different texts whose ratings differ: every second one is commented code."""
    code = '# What it does. And why.\ndef f{}(x):\n    """Adds one. Twice."""\n    return x + 1\n'
    return [
        {
            "id": f"{word}-{number}",
            "text": f"{word} {number} "
            + (code.format(number) * 6 if number % 2 else "and no more"),
        }
        for number in range(count)
    ]


def lines(*rows: Mapping[str, Any] | bytes) -> bytes:
    """JSONL; bytes are a line as it is."""
    return b"".join((r if isinstance(r, bytes) else orjson.dumps(r)) + b"\n" for r in rows)


def write_rows(path: Path, rows: Sequence[Mapping[str, Any] | bytes]) -> Path:
    """Parquet, Arrow or JSONL by the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([*rows]), path)
    elif path.suffix == ".arrow":
        table = pa.Table.from_pylist([*rows])
        with pa.ipc.new_file(path, table.schema) as file:
            file.write_table(table)
    else:
        path.write_bytes(lines(*rows))
    return path


def read_rows(path: Path) -> list[Row]:
    """Of a Parquet or JSONL file."""
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    return [orjson.loads(line) for line in path.read_bytes().splitlines()]


def stable(rows: Sequence[Row]) -> list[Row]:
    """Without what differs from run to run."""
    return [{name: row[name] for name in row if name not in VOLATILE_COLUMNS} for row in rows]


@contextmanager
def ran(project: Project, home: Path, code: int, **task: Any) -> Iterator[Project]:
    """A project whose task has been run over three files, and ended with the code: 68 good rows,
    and two bad lines in A. `home` is an empty one, to be copied."""
    project.write_task(task)
    project.write_model()
    project.write_prompt()
    project.write_input(A, [*some_rows(4, "first"), b"{torn", b"[2]"])
    project.write_input(B, some_rows(4, "second"))
    project.write_input(C, some_rows(60, "third"))
    own = shutil.copytree(home, project.root / "dagster_home")
    with serve_in_thread() as server, pytest.MonkeyPatch.context() as environment:
        environment.setenv("DAGSTER_HOME", str(own))
        environment.setenv("REHEARSAL_BASE_URL", server.base_url)
        assert project.run("run-task", TASK).code == code
        yield project


def turn(role: str, content: Any) -> Row:
    return {"role": role, "content": content}


def asked(text: str, **more: Any) -> Row:
    """A conversation of one question."""
    return {"messages": [turn("user", text)], **more}


def chat(number: int, question: str = "") -> Row:
    said = {
        "system": "Be brief.",
        "human": "Look it up.",
        "gpt": "Looking.",
        "tool": f"found {number}",
        "user": question or f"chat {number}?",
        "chatgpt": f"old answer {number}",
    }
    turns = [{"from": speaker, "value": value} for speaker, value in said.items()]
    return {"id": f"c{number}", "conversations": turns}


def instruction(number: int, what: str = "do") -> Row:
    given = "with x" if number % 2 else ""
    return {"instruction": f"{what} {number}", "input": given, "output": f"old answer {number}"}


def until(what: Callable[[], object], seconds: float = 60, every: float = 0.02) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(every)


def looked_at_by(check: dg.AssetCheckEvaluation) -> dict[str, bool]:
    """The rows of the check's table, and whether each is as it should be."""
    table = check.metadata["findings"].value
    assert isinstance(table, str)
    rows = [line.split("|")[1:3] for line in table.splitlines()[2:]]
    return {name.strip(): mark.strip() == "✓" for mark, name in rows}


class Ended(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def told(self) -> str:
        """All of it."""
        return self.out + self.err


@dataclass
class Project:
    """A project folder; the methods without `write_` read it as it is at that time."""

    root: Path
    task: str = "rate"
    """The task that the methods are about."""
    inputs: str = "data/in"
    _opened: ExitStack = field(default_factory=ExitStack, repr=False, compare=False)

    @cached_property
    def instance(self) -> dg.DagsterInstance:
        """Opened when it is first needed."""
        return self._opened.enter_context(open_instance(self.root))

    def close(self) -> None:
        self._opened.close()

    def write_task(self, changes: Mapping[str, Any] | None = None, file: str = "") -> Path:
        """A task that rates."""
        own = {"task_name": self.task, "data": {"input_folder": self.inputs}}
        content = merged(merged(RATING, own), changes or {})
        return self.write_yaml(f"tasks/{file or self.task}", content)

    def write_task_in_store(
        self, server: S3Server, bucket: str, endpoint: str = "", **changes: Any
    ) -> None:
        """Its output and journal; the input stays on the disk."""
        (self.root / ".env").write_text(
            f"AWS_ACCESS_KEY_ID={server.key}\nAWS_SECRET_ACCESS_KEY={server.secret}\n"
            f"AWS_ENDPOINT_URL={endpoint or server.endpoint}\nAWS_REGION={server.region}\n"
        )
        self.write_task({"data": {"output_folder": f"s3://{bucket}/scores"}, **changes})

    def write_steps(self, task_type: str = "data_distillation", **fields: Any) -> Path:
        """A task of these steps; other fields as they are."""
        content = {"task_name": self.task, "task_type": task_type, **fields}
        return self.write_yaml(f"tasks/{self.task}", content)

    def write_chain(self, encoding: str = "utf-8", **fields: Any) -> None:
        """A task that converts, merges, answers and rates."""
        self.write_yaml("distillation/datasets", DATASETS)
        self.write_yaml("distillation/groups", GROUPS)
        chatml = {**CHATML, "encoding": encoding}
        steps = {"chatml_conversion": chatml, "jsonl_merge": MERGE, "generate_response": GENERATE}
        self.write_steps(**steps, scores=JUDGE, **fields)

    def write_generation(self, step: Mapping[str, Any] | None = None, **fields: Any) -> None:
        """A task that only answers the conversations of `inputs`, one after another."""
        generate = {**GENERATE, "input_path": self.inputs, "concurrency": 1, **(step or {})}
        self.write_steps(**{"generate_response": generate, **fields})

    def write_model(
        self, changes: Mapping[str, Any] | None = None, file: str = "rehearsal"
    ) -> Path:
        return self.write_yaml(f"models/{file}", merged(MODEL, changes or {}))

    def write_prompt(self, changes: Mapping[str, Any] | None = None, file: str = "quality") -> Path:
        return self.write_yaml(f"prompts/{file}", merged(PROMPT, changes or {}))

    def write_yaml(self, name: str, content: Mapping[str, Any]) -> Path:
        path = self.root / "configs" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True))
        return path

    def write_input(self, name: str, rows: Sequence[Mapping[str, Any] | bytes]) -> Path:
        return write_rows(self.input_folder / name, rows)

    def write_dataset(self, name: str, rows: Sequence[Row]) -> Path:
        return write_rows(self.root / "data/sets/org" / name / "train.jsonl", rows)

    @property
    def input_folder(self) -> Path:
        return self.root / self.inputs

    @property
    def task_file(self) -> Path:
        return self.root / "configs" / "tasks" / f"{self.task}.yaml"

    def steps(self) -> Task:
        return Task(load_linked(self.task_file, self.root))

    def definitions(self) -> dg.Definitions:
        assert self.instance  # an open one: Dagster takes the last that was, else
        return project_definitions(load_catalog(self.root))

    def asset_key(self, stage: str) -> dg.AssetKey:
        return dg.AssetKey([self.task, stage])

    def statuses(self, stage: str = "scores") -> dict[str, AssetPartitionStatus | None]:
        """Of every partition that Dagster knows of."""
        asset, partitions = self.asset_key(stage), partitions_of(self.steps().stage(stage).keys)
        keys = self.instance.get_dynamic_partitions(partitions.name or "")
        found = self.instance.get_status_by_partition(asset, keys, partitions) or {}
        return {decode_key(key): found.get(key) for key in keys}

    def staleness(self, stage: str = "scores") -> dict[str, StaleStatus]:
        """What Dagster itself says, from the definitions as they are on disk now."""
        graph = self.definitions().resolve_asset_graph()
        context = LoadingContextForTest(self.instance)
        resolver = CachingStaleStatusResolver(self.instance, graph, context)
        keys = self.instance.get_dynamic_partitions(
            partitions_of(self.steps().stage(stage).keys).name or ""
        )
        return {decode_key(key): resolver.get_status(self.asset_key(stage), key) for key in keys}

    def manifest(self, name: str, stage: str = "scores", *, rejected: bool = False) -> Any:
        """None if there is none."""
        key = encode_key(name)
        return read_manifest(self.steps().stage(stage).manifest_path(key, rejected=rejected))

    def output(self, name: str, stage: str = "scores") -> Path:
        """Where what is accepted of a partition is published."""
        return Path(str(self.steps().stage(stage).output(encode_key(name))))

    def rejected(self, name: str, stage: str = "scores") -> Path:
        """Where what is not accepted of a partition lies."""
        task = self.steps()
        return Path(str(task.stage(stage).output(encode_key(name), rejected=True)))

    def result(self, name: str, stage: str = "scores") -> Path:
        """What was accepted, else what was rejected."""
        accepted = self.output(name, stage)
        return accepted if accepted.exists() else self.rejected(name, stage)

    def rows(self, name: str, stage: str) -> list[Row]:
        return read_rows(self.result(name, stage))

    def scores(self, name: str) -> list[Row]:
        return self.rows(name, "scores")

    def responses(self, name: str = CONVERSATIONS) -> list[Row]:
        return self.rows(name, "responses")

    def materialize(self, keys: Sequence[str] | None = None, **options: Any) -> RunSummary:
        """All stages of the partitions, of all that there are unless `keys` are given."""
        steps = self.steps()
        present = register(self.instance, steps).keys
        asked = {stage.name: options for stage in steps.stages if stage.answers}
        return TaskRunner(steps, self.instance).run(present if keys is None else keys, asked)

    def look(self, cursor: str = "", **options: Any) -> tuple[dg.SensorResult | dg.SkipReason, str]:
        """What one look of the task's sensor for files gives, and its new cursor."""
        context = dg.build_sensor_context(instance=self.instance, cursor=cursor)
        result = files_sensor(self.steps(), **options)(context)
        assert isinstance(result, dg.SensorResult | dg.SkipReason)
        return result, getattr(result, "cursor", None) or context.cursor or ""

    def launched(
        self, cursor: str = "", **options: Any
    ) -> tuple[list[tuple[set[str], list[str]]], str]:
        """The stages and keys of each run that one look asks for, and the new cursor."""
        result, cursor = self.look(cursor, **options)
        known = list(self.instance.get_dynamic_partitions(self.steps().stages[0].keys.name))
        requests = (result.run_requests or ()) if isinstance(result, dg.SensorResult) else ()
        found: list[tuple[set[str], list[str]]] = []
        for each in requests:
            start = each.tags.get("dagster/asset_partition_range_start", each.partition_key)
            end = each.tags.get("dagster/asset_partition_range_end", each.partition_key)
            keys = known[known.index(start or "") : known.index(end or "") + 1]
            found.append(({asset.path[-1] for asset in each.asset_selection or ()}, keys))
        return found, cursor

    def score(self, name: str = A, engine: Engine | None = None, *, fresh: bool = False) -> Report:
        """Raw and scores of one file, without Dagster."""
        steps, key = self.steps(), encode_key(name)
        scores, run = steps.stage("scores"), Run(uuid4().hex, Tally(), fresh=fresh)
        assert isinstance(scores, AskingStage)

        async def work() -> Report:
            async with engine or scores.engine() as opened:
                return await scores.answer(key, opened, run)

        steps.stage("raw").make(key, Tally())
        return asyncio.run(work())

    def journal(self, name: str = A, stage: str = "scores") -> Path:
        """The folder of a partition's journal."""
        return Path(str(self.steps().stage(stage).journal_folder(encode_key(name))))

    def run(self, *arguments: str | Path, columns: int = 200) -> Ended:
        """`modelcall …` in this process, in the project's folder, on a terminal so wide."""
        with (
            chdir(self.root),
            patch.dict(os.environ, {"COLUMNS": str(columns)}),
            patch.object(sys, "argv", ["modelcall", *map(str, arguments)]),
            _captured(1, "stdout") as out,
            _captured(2, "stderr") as err,
            pytest.raises(SystemExit) as ended,
        ):
            main()
        self.forget()
        assert "Traceback" not in out() + err(), out() + err()
        return Ended(ended.value.code or 0, out(), err())  # type: ignore[arg-type]

    def listed(self, *arguments: str | Path) -> list[Row]:
        """What a command lists, for programs."""
        return [*map(orjson.loads, self.run(*arguments, "--json").out.splitlines())]

    def forget(self) -> None:
        """The own modules of a project, but not of this checkout, as in a new process."""
        root = str(self.root)
        if __file__.startswith(root):
            return
        sys.path[:] = [place for place in sys.path if place != root]
        for name, module in list(sys.modules.items()):
            if module and (module.__dict__.get("__file__") or "").startswith(root):
                while name:  # packages without a file too
                    sys.modules.pop(name, None)
                    name = name.rpartition(".")[0]

    def signalled(
        self, when: Callable[[], object], *arguments: str | Path, number: int = signal.SIGKILL
    ) -> Ended:
        """A process of its own that gets the signal as soon as `when` holds."""
        with self.start(*arguments) as process:
            until(lambda: when() or process.poll() is not None)
            assert process.poll() is None, process.communicate()
            process.send_signal(number)
            out, err = process.communicate(timeout=60)
        return Ended(process.returncode, out, err)

    def start(self, *arguments: str | Path, **options: Any) -> subprocess.Popen[str]:
        """`python -m modelcall …` in the project's folder, a process of its own."""
        return subprocess.Popen(
            [sys.executable, "-m", "modelcall", *arguments],
            **{
                "cwd": self.root,
                "env": {**os.environ, "COLUMNS": "200"},
                "stdout": subprocess.PIPE,
                "stderr": subprocess.PIPE,
                "text": True,
                **options,
            },
        )


@contextmanager
def _captured(fd: int, name: str) -> Iterator[Callable[[], str]]:
    """What is written to the descriptor, and to the stream of `sys`, meanwhile."""
    with TemporaryFile() as file, closing(os.fdopen(os.dup(fd), "w")) as before:
        os.dup2(file.fileno(), fd)
        told = ""
        try:
            with open(fd, "w", closefd=False) as stream, patch.object(sys, name, stream):
                yield lambda: told
        finally:
            os.dup2(before.fileno(), fd)
            file.seek(0)
            told = file.read().decode()
