"""The demo's two tasks with input, output and journal in a store: the same as on disk."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import orjson
import pyarrow.parquet as pq
import pytest
import yaml
from botocore.client import BaseClient
from project import WORKSPACE, some_rows
from s3_server import S3Server

from modelcall_assets.config.catalog import load_catalog
from modelcall_assets.defs.instance import open_instance
from modelcall_assets.defs.partitions import add_new_files
from modelcall_assets.defs.runs import TaskRunner
from modelcall_assets.rehearsal import RehearsalServer
from modelcall_assets.steps.distillation_steps import steps_of
from modelcall_assets.steps.published import published_keys
from modelcall_assets.steps.score_table import VOLATILE_COLUMNS
from modelcall_assets.steps.task_steps import TaskSteps
from modelcall_assets.storage.manifest import read_manifest

CONFIGS = Path(__file__).parent.parent / "configs"
TASKS = ("demo_code_quality", "demo_distillation")
CODE = [{"path": f"{row['id']}.py", **row, "text": row["text"] * 9} for row in some_rows(12)]
TALK = [
    {"conversations": [{"from": "human", "value": f"q{n}"}, {"from": "gpt", "value": f"a{n}"}]}
    for n in range(6)
]
ASKED = [{"instruction": f"do {n}", "input": "", "output": f"done {n}"} for n in range(5)]
INPUTS: dict[str, Sequence[dict[str, Any]]] = {
    "corpus/one.jsonl": CODE[:7],
    "corpus/deep/two.parquet": CODE[7:],
    "chats/doctests/train.jsonl": TALK,
    "chats/docstrings/train.jsonl": [*ASKED, ASKED[0]],
}


def content_of(name: str) -> bytes:
    out = BytesIO()
    if name.endswith(".parquet"):
        import pyarrow as pa

        pq.write_table(pa.Table.from_pylist(list(INPUTS[name])), out)
    else:
        out.write(b"".join(orjson.dumps(row) + b"\n" for row in INPUTS[name]))
    return out.getvalue()


@dataclass
class Demo:
    """A copy of the demo's project, whose `data/` is somewhere else when `client` is given."""

    root: Path
    client: BaseClient | None = None
    bucket: str = ""

    def put(self, name: str) -> None:
        if self.client is not None:
            key = f"data/demo/{name}"
            self.client.put_object(Bucket=self.bucket, Key=key, Body=content_of(name))
        else:
            path = self.root / "data/demo" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content_of(name))

    def steps(self) -> dict[str, TaskSteps]:
        return {spec.key: steps_of(spec) for spec in load_catalog(self.root).tasks}

    def run(self) -> None:
        with open_instance(self.root) as instance:
            for steps in self.steps().values():
                summary = TaskRunner(steps, instance).run(add_new_files(instance, steps))
                assert summary.failed == []

    def results(self) -> dict[str, Any]:
        """What was published: the manifests but for places and times, and the rows."""
        found: dict[str, Any] = {}
        for steps in self.steps().values():
            for stage in steps.stages:
                for key in published_keys(steps.layout, stage):
                    name = f"{steps.spec.key}/{stage}/{key}"
                    found[name] = self._result(steps, stage, key)
        return found

    def _result(self, steps: TaskSteps, stage: str, key: str) -> Any:
        manifest = read_manifest(steps.layout.manifest_path(stage, key))
        assert manifest is not None
        kept = manifest.model_dump(include={"accepted", "data_version", "rows", "ok", "failed"})
        if "responses" not in steps.stages or stage != "scores":
            kept["digest"] = manifest.input.digest  # a file of responses has times in it
        if manifest.output is None:
            return kept
        content = self._read(str(steps.layout.output_path(stage, key)))
        if manifest.output.endswith(".parquet"):
            rows = pq.read_table(BytesIO(content)).to_pylist()
        else:
            rows = [orjson.loads(line) for line in content.splitlines()]
        for row in rows:
            for column in (*VOLATILE_COLUMNS, *(f"input_{name}" for name in VOLATILE_COLUMNS)):
                row.pop(column, None)
        return kept, rows

    def _read(self, place: str) -> bytes:
        if self.client is None:
            return Path(place).read_bytes()
        key = place.removeprefix(f"s3://{self.bucket}/")
        return self.client.get_object(Bucket=self.bucket, Key=key)["Body"].read()


@pytest.fixture
def demo(
    tmp_path: Path, empty_home: Path, server: RehearsalServer, monkeypatch: pytest.MonkeyPatch
) -> Demo:
    monkeypatch.setenv("REHEARSAL_BASE_URL", server.base_url)
    return project(tmp_path / "disk", empty_home, monkeypatch)


def project(root: Path, empty_home: Path, monkeypatch: pytest.MonkeyPatch) -> Demo:
    shutil.copytree(CONFIGS, root / "configs", ignore=shutil.ignore_patterns("tasks"))
    (root / "configs/tasks").mkdir()
    for task in TASKS:
        shutil.copy(CONFIGS / f"tasks/{task}.yaml", root / "configs/tasks")
    (root / "workspace.yaml").write_text(WORKSPACE)
    monkeypatch.setenv("DAGSTER_HOME", str(shutil.copytree(empty_home, root / "dagster_home")))
    return Demo(root)


@pytest.fixture
def stored(
    tmp_path: Path,
    empty_home: Path,
    s3_server: S3Server,
    bucket: str,
    demo: Demo,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Demo]:
    made = project(tmp_path / "store", empty_home, monkeypatch)
    (made.root / ".env").write_text(
        f"LAB_KEY={s3_server.key}\nLAB_SECRET={s3_server.secret}\nLAB_URL={s3_server.endpoint}\n"
    )
    lab = {"prefix": "s3://", "endpoint": "${LAB_URL}", "region": s3_server.region}
    lab |= {"access_key": "${LAB_KEY}", "secret_key": "${LAB_SECRET}"}
    storage = {"stores": {"lab": lab}, "data_root": f"s3://{bucket}"}
    (made.root / "configs/storage.yaml").write_text(yaml.safe_dump(storage))
    with closing(s3_server.client()) as client:
        made.client, made.bucket = client, bucket
        yield made


def test_has_the_same_results_as_on_disk(
    demo: Demo, stored: Demo, server: RehearsalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for each in (demo, stored):
        for name in INPUTS:
            each.put(name)
    stored.run()
    paid = server.stats()["requests"]
    stored.run()
    assert server.stats()["requests"] == paid
    assert not list((stored.root / "data").rglob("*")), "something was written to the disk"
    found = stored.results()
    monkeypatch.setenv("DAGSTER_HOME", str(demo.root / "dagster_home"))
    demo.run()
    assert server.stats()["requests"] == 2 * paid
    assert found == demo.results()
    assert sum(name.startswith("demo_distillation/scores/") for name in found) == 2
