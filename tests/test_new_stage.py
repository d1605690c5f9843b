"""A stage is one new file and one line: that of docs/architecture.md in a copy of the package."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import orjson
import pytest
from project import TASK, A, Project

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
    assert "1 of 1 file looked through" in ran.stdout
    (output,) = project.root.rglob("*_longest/*.jsonl")
    assert orjson.loads(output.read_bytes()) == {"text": "much longer"}
