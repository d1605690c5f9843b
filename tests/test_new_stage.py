"""A stage is one new file and one line: the one of docs/architecture.md in a copy of the package,
and `summary`, the last that came so."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson
import pytest
from project import ALL, ONLY_INS, TASK, A, B, C, Project, chat, instruction, read_rows, some_rows

ROOT = Path(__file__).parents[1]
RUN = "from modelcall_assets.cli.main import main; main()"
BEFORE = "        stages: list[Stage] = []\n"


@pytest.fixture
def with_longest(tmp_path: Path) -> Path:
    """A folder with the package and the stage of the documentation."""
    package = tmp_path / "changed/modelcall_assets"
    shutil.copytree(ROOT / "modelcall_assets", package)
    text = (ROOT / "docs/architecture.md").read_text()
    stage, line = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[:2]
    (package / "stages/longest.py").write_text(stage)
    task = package / "stages/task.py"
    source = task.read_text()
    assert source.count(BEFORE) == 1
    source = source.replace(BEFORE, line + BEFORE)
    added = "from modelcall_assets.stages.longest import Longest\n"
    first = source.index("from modelcall_assets.stages.merged")
    task.write_text(source[:first] + added + source[first:])
    return package.parent


def test_the_stage_of_the_documentation(project: Project, with_longest: Path) -> None:
    texts = ["short", "much longer", "mid"]
    project.write_input(A, [{"id": text, "text": text} for text in texts])
    project.write_task({"reuse": {"scope": "off"}})
    command = [sys.executable, "-c", RUN, "run-task", TASK, "--file", A]
    ran = subprocess.run(
        command,
        cwd=project.root,
        env={**os.environ, "PYTHONPATH": str(with_longest)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "1 of 1 files looked through" in ran.stdout
    (output,) = project.root.rglob("longest/*.jsonl")
    assert orjson.loads(output.read_bytes()) == {"text": "much longer"}


class TestSummary:
    def materialised(self, project: Project) -> Mapping[str, Any]:
        """Its metadata, by name."""
        key = project.asset_key("summary")
        job = project.definitions().resolve_implicit_global_asset_job_def()
        result = job.execute_in_process(instance=project.instance, asset_selection=[key])
        assert result.success
        assert [each.passed for each in result.get_asset_check_evaluations()] == [True]
        (event,) = result.asset_materializations_for_node(key.to_python_identifier())
        return {name: value.value for name, value in event.metadata.items()}

    def test_has_the_totals_of_all_partitions(self, project: Project) -> None:
        project.write_task({"max_failure_rate": 1})
        project.write_input(B, [*some_rows(2), {"id": "no text"}])
        project.materialize()
        shown, of_each = self.materialised(project), {n: len(project.scores(n)) for n in (A, B, C)}
        totals = {name: shown[f"total_{name}"] for name in ("rows", "ok", "failed", "dropped")}
        rows = sum(of_each.values())
        assert totals == {"rows": rows, "ok": rows - 1, "failed": 1, "dropped": 0}
        assert "missing_input | 1" in shown["total_failures"]
        found = {row["partition"]: row for row in read_rows(Path(shown["output"]))}
        assert {name: row["rows"] for name, row in found.items()} == of_each
        assert found[B]["failures"] == {"missing_input": 1}

    def test_has_no_partitions_and_follows_what_is_there(self, project: Project) -> None:
        assert self.materialised(project)["total_rows"] == 0
        project.materialize([A])
        specs = {spec.key: spec for spec in project.definitions().resolve_all_asset_specs()}
        assert specs[project.asset_key("summary")].partitions_def is None
        for _ in range(2):
            assert self.materialised(project)["total_rows"] == len(project.scores(A))

    def test_of_a_chain(self, distilling: Project) -> None:
        distilling.write_chain(max_failure_rate=1)
        distilling.write_dataset("Chats", [chat(number) for number in range(3)])
        distilling.write_dataset("Ins", [instruction(number) for number in range(4)])
        distilling.materialize()
        rows = sum(len(distilling.scores(name)) for name in (ALL, ONLY_INS))
        assert self.materialised(distilling)["total_rows"] == rows > 0
