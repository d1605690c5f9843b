"""A small project on disk, the endpoint that its model file names, and a Dagster instance."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import dagster as dg
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from s3_server import S3Server
from swift_server import swift_server

from modelcall_assets.cli.main import main
from modelcall_assets.config.catalog import load_catalog, load_task
from modelcall_assets.defs.home import whole_home
from modelcall_assets.defs.instance import open_instance
from modelcall_assets.defs.project import project_definitions
from modelcall_assets.defs.sensors import files_sensor
from modelcall_assets.records.data_files import stem_of
from modelcall_assets.rehearsal import RehearsalServer, serve_in_thread
from modelcall_assets.stages.task import Task

TASK: dict[str, Any] = {
    "task_name": "rate",
    "description": "Rates a few texts.",
    "owners": ["team:tests"],
    "data": {"input_folder": "data/in", "output_folder": "data/{task_name}/scores"},
    "model": {"config_path": "configs/models/rehearsal.yaml"},
    "prompt": {"config_path": "configs/prompts/quality.yaml"},
    "concurrency": {"max_concurrent_requests": 4, "files_per_run": 10},
}
PREPROCESS: dict[str, Any] = {
    "enabled": True,
    "script_type": "universal",
    "output_folder": "data/{task_name}/preprocessed",
    "max_tokens": 8192,
}
MODEL: dict[str, Any] = {
    "client_config": {
        "base_url": "${REHEARSAL_BASE_URL}",
        "api_key": "not-needed",
        "timeout": 20,
        "max_retries": 2,
    },
    "chat_config": {"model": "rehearsal-rater-1", "temperature": 0},
}
PROMPT: dict[str, Any] = {
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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What waits for a daemon begins first, so that other tests fill the time."""
    items.sort(key=lambda item: item.path.name != "test_daemon.py")


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `changes` laid over it, mapping by mapping."""
    result = dict(base)
    for key, value in changes.items():
        deeper = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merged(result[key], value) if deeper else value
    return result


def some_rows(count: int, word: str = "plain") -> list[dict[str, Any]]:
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


def looked_at_by(check: dg.AssetCheckEvaluation) -> dict[str, bool]:
    """The rows of the check's table, and whether each is as it should be."""
    table = check.metadata["findings"].value
    assert isinstance(table, str)
    rows = [line.split("|")[1:3] for line in table.splitlines()[2:]]
    return {name.strip(): mark.strip() == "✓" for mark, name in rows}


def until(what: Callable[[], object], seconds: float = 60, every: float = 0.02) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(every)


@dataclass
class Project:
    """A project folder; the methods without `write_` read it as it is at that time."""

    root: Path
    task: str = "rate"
    """The task that the methods are about."""
    inputs: str = "data/in"

    def write_task(self, changes: Mapping[str, Any] | None = None, file: str = "") -> Path:
        own = {"task_name": self.task, "data": {"input_folder": self.inputs}}
        content = merged(merged(TASK, own), changes or {})
        return self._write_yaml(f"tasks/{file or self.task}", content)

    def write_model(
        self, changes: Mapping[str, Any] | None = None, file: str = "rehearsal"
    ) -> Path:
        return self._write_yaml(f"models/{file}", merged(MODEL, changes or {}))

    def write_prompt(self, changes: Mapping[str, Any] | None = None, file: str = "quality") -> Path:
        return self._write_yaml(f"prompts/{file}", merged(PROMPT, changes or {}))

    def write_input(self, name: str, rows: Sequence[Mapping[str, Any] | bytes]) -> Path:
        """JSONL or Parquet by the suffix; bytes are a line as it is."""
        path = self.root / self.inputs / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist(list(rows)), path)
        else:
            lines = (row if isinstance(row, bytes) else orjson.dumps(row) for row in rows)
            path.write_bytes(b"".join(line + b"\n" for line in lines))
        return path

    @property
    def task_file(self) -> Path:
        return self.root / "configs" / "tasks" / f"{self.task}.yaml"

    def steps(self) -> Task:
        return Task(load_task(self.task_file, self.root))

    def definitions(self) -> dg.Definitions:
        return project_definitions(load_catalog(self.root))

    def output(self, name: str) -> Path:
        """Where the scores of an input file are published."""
        path = self.root / "data" / self.task / "scores" / name
        return path.with_name(f"{stem_of(path.name)}.parquet")

    def scores(self, name: str) -> list[dict[str, Any]]:
        """What was accepted, else what was rejected."""
        accepted = self.output(name)
        return pq.read_table(accepted if accepted.exists() else self.rejected(name)).to_pylist()

    def rejected(self, name: str) -> Path:
        """Where the scores of an input file lie that were not accepted."""
        return Path(str(self.steps().stage("scores").output(name, rejected=True)))

    def start(self, *arguments: str, **options: Any) -> subprocess.Popen[str]:
        """`python -m modelcall …` in the project's folder."""
        return subprocess.Popen(
            [sys.executable, "-m", "modelcall", *arguments],
            **{
                "cwd": self.root,
                "env": {**os.environ, "COLUMNS": "120"},
                "stdout": subprocess.PIPE,
                "stderr": subprocess.PIPE,
                "text": True,
                **options,
            },
        )

    def _write_yaml(self, name: str, content: Mapping[str, Any]) -> Path:
        path = self.root / "configs" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True))
        return path


class Ended(NamedTuple):
    code: int
    out: str
    err: str


def look(
    project: Project, instance: dg.DagsterInstance, cursor: str = ""
) -> tuple[dg.SensorResult | dg.SkipReason, str]:
    """What one look of the task's sensor for files gives, and its new cursor."""
    context = dg.build_sensor_context(instance=instance, cursor=cursor)
    result = files_sensor(project.steps())(context)
    assert isinstance(result, dg.SensorResult | dg.SkipReason)
    is_result = isinstance(result, dg.SensorResult) and result.cursor is not None
    return result, (result.cursor if is_result else context.cursor) or ""


@pytest.fixture
def server() -> Iterator[RehearsalServer]:
    """Without faults until `set_faults`."""
    with serve_in_thread() as running:
        yield running


@pytest.fixture(scope="session")
def empty_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DAGSTER_HOME whose databases exist; copying it is quicker than making them."""
    home = tmp_path_factory.mktemp("dagster_home")
    (home / "dagster.yaml").write_text(DAGSTER_YAML)
    with whole_home(home):
        return home


@pytest.fixture
def project(
    tmp_path: Path, empty_home: Path, server: RehearsalServer, monkeypatch: pytest.MonkeyPatch
) -> Project:
    """Three input files of four rows in sub-folders, rated by `server`; DAGSTER_HOME is its own."""
    made = Project(tmp_path / "project")
    made.write_task()
    made.write_model()
    made.write_prompt()
    made.write_input("a.jsonl", some_rows(4, "first"))
    made.write_input("deep/b.parquet", some_rows(4, "second"))
    made.write_input("deep/er/c.jsonl", some_rows(4, "third"))
    (made.root / "workspace.yaml").write_text(WORKSPACE)
    home = Path(shutil.copytree(empty_home, made.root / "dagster_home"))
    monkeypatch.setenv("DAGSTER_HOME", str(home))
    monkeypatch.setenv("REHEARSAL_BASE_URL", server.base_url)
    return made


Cli = Callable[..., Ended]


@pytest.fixture
def cli(
    project: Project, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Cli:
    """`modelcall …` in this process, in the project's folder, whose input is empty."""
    for name in ("a.jsonl", "deep/b.parquet", "deep/er/c.jsonl"):
        (project.root / "data/in" / name).unlink()
    monkeypatch.chdir(project.root)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["modelcall", *arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        assert "Traceback" not in out + err, out + err
        return Ended(ended.value.code or 0, out, err)  # type: ignore[arg-type]

    return run


@pytest.fixture
def instance(project: Project) -> Iterator[dg.DagsterInstance]:
    with open_instance(project.root) as opened:
        yield opened


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A test that kills it starts it again."""
    pytest.importorskip("swift", reason="OpenStack Swift is not installed: pip install -e '.[dev]'")
    with swift_server(tmp_path_factory.mktemp("swift")) as running:
        yield running


@pytest.fixture
def bucket(s3_server: S3Server) -> str:
    """The name of an empty one."""
    name = f"test-{uuid4().hex}"
    with closing(s3_server.client()) as client:
        client.create_bucket(Bucket=name)
    return name
