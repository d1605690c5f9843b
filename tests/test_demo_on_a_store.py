"""The demo's two tasks with input, output and journal in a store: the same as on disk."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from project import Project, Row, some_rows, write_rows
from s3_server import S3Server

from modelcall_assets.config.catalog import load_catalog
from modelcall_assets.rehearsal import RehearsalServer
from modelcall_assets.stages import Stage
from modelcall_assets.stages.score_table import VOLATILE_COLUMNS
from modelcall_assets.stages.task import Task
from modelcall_assets.storage.files import read_bytes
from modelcall_assets.storage.publishing import read_manifest

CONFIGS = Path(__file__).parent.parent / "configs"
TASKS = ("demo_code_quality", "demo_distillation")
CODE = [{"path": f"{row['id']}.py", **row, "text": row["text"] * 9} for row in some_rows(12)]
TALK = [
    {"conversations": [{"from": "human", "value": f"q{n}"}, {"from": "gpt", "value": f"a{n}"}]}
    for n in range(6)
]
ASKED = [{"instruction": f"do {n}", "input": "", "output": f"done {n}"} for n in range(5)]
INPUTS: dict[str, Sequence[Row]] = {
    "data/demo/corpus/one.jsonl": CODE[:7],
    "data/demo/corpus/deep/two.parquet": CODE[7:],
    "data/demo/chats/doctests/train.jsonl": TALK,
    "data/demo/chats/docstrings/train.jsonl": [*ASKED, ASKED[0]],
}


def run(project: Project) -> dict[str, Any]:
    """What was published: the manifests but for places and times, and the rows."""
    for task in TASKS:
        assert project.run("run-task", f"configs/tasks/{task}.yaml").code == 0
    return {
        f"{spec.key}/{stage.name}/{key}": published(stage, key)
        for spec in load_catalog(project.root).tasks
        for stage in Task(spec).stages
        for key in stage.published_keys()
    }


def published(stage: Stage, key: str) -> Any:
    manifest = read_manifest(stage.manifest_path(key))
    assert manifest is not None
    kept = manifest.model_dump(include={"accepted", "data_version", "rows", "ok", "failed"})
    if stage.upstream is None or stage.upstream.name != "responses":
        kept["digest"] = manifest.input.digest  # a file of responses has times in it
    if manifest.output is None:
        return kept
    content = read_bytes(stage.output(key))
    if manifest.output.endswith(".parquet"):
        rows = pq.read_table(pa.BufferReader(content)).to_pylist()
    else:
        rows = [orjson.loads(line) for line in content.splitlines()]
    for row in rows:
        for column in (*VOLATILE_COLUMNS, *(f"input_{name}" for name in VOLATILE_COLUMNS)):
            row.pop(column, None)
    return kept, rows


def test_the_demo_has_the_same_results_in_a_store_as_on_disk(
    bare: Project, server: RehearsalServer, empty_home: Path, s3_server: S3Server, bucket: str
) -> None:
    shutil.rmtree(bare.root / "configs")
    shutil.copytree(CONFIGS, bare.root / "configs", ignore=shutil.ignore_patterns("tasks"))
    (bare.root / "configs/tasks").mkdir()
    for task in TASKS:
        shutil.copy(CONFIGS / f"tasks/{task}.yaml", bare.root / "configs/tasks")
    for name, rows in INPUTS.items():
        write_rows(bare.root / name, rows)
    on_disk = run(bare)
    paid = server.stats()["requests"]

    with closing(s3_server.client()) as client:
        for name in INPUTS:
            client.put_object(Bucket=bucket, Key=name, Body=(bare.root / name).read_bytes())
    for folder in ("data", "dagster_home", ".modelcall"):
        shutil.rmtree(bare.root / folder, ignore_errors=True)
    shutil.copytree(empty_home, bare.root / "dagster_home")
    (bare.root / ".env").write_text(
        f"LAB_KEY={s3_server.key}\nLAB_SECRET={s3_server.secret}\nLAB_URL={s3_server.endpoint}\n"
    )
    lab = {"prefix": "s3://", "endpoint": "${LAB_URL}", "region": s3_server.region}
    lab |= {"access_key": "${LAB_KEY}", "secret_key": "${LAB_SECRET}"}
    bare.write_yaml("storage", {"stores": {"lab": lab}, "data_root": f"s3://{bucket}"})
    assert run(bare) == on_disk
    assert server.stats()["requests"] == 2 * paid
    assert sum(name.startswith("demo_distillation/scores/") for name in on_disk) == 2
    run(bare)
    assert server.stats()["requests"] == 2 * paid
    assert not list((bare.root / "data").rglob("*")), "something was written to the disk"
