"""Projects and folders that are somewhere else now."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from project import NAMES, TASK, A, Project, some_rows

from modelcall_assets.rehearsal import RehearsalServer


@pytest.mark.parametrize("way", [shutil.move, shutil.copytree])
def test_a_project_that_was_moved_or_copied_works_there(
    project: Project,
    server: RehearsalServer,
    monkeypatch: pytest.MonkeyPatch,
    way: Callable[[Path, Path], object],
) -> None:
    assert project.run("run-task", TASK).code == 0
    asked = server.stats()["requests"]
    moved = Project(project.root.with_name("elsewhere"))
    way(project.root, moved.root)
    monkeypatch.setenv("DAGSTER_HOME", str(moved.root / "dagster_home"))
    first = moved.scores(A)
    moved.write_input(A, some_rows(5, "first"))
    ended = moved.run("run-task", TASK)
    assert (ended.code, "3 of 3 files scored" in ended.out) == (0, True), ended
    assert server.stats()["requests"] == asked + 1, "only the row that is new"
    assert [row["api_return"] for row in moved.scores(A)][:4] == [
        row["api_return"] for row in first
    ]
    assert "all is sound" in moved.run("verify", TASK).out
    exported = moved.run("export", TASK, "--stage", "raw", "--output", "copies")
    assert exported.code == 0 and (moved.root / "copies" / A).exists()
    if project.root.exists():
        assert len(project.scores(A)) == 4


def test_inputs_that_were_moved_are_read_where_they_are(project: Project) -> None:
    assert project.run("run-task", TASK).code == 0
    (project.input_folder).rename(project.root / "data/elsewhere")
    project.write_task({"data": {"input_folder": "data/elsewhere"}})
    project.write_prompt({"prompt_template": {"prompt_text": "Judge it anew:\n{text}\n"}})
    ended = project.run("run-task", TASK)
    assert (ended.code, "12 requests sent" in ended.out) == (0, True), ended


def test_another_output_folder_gets_the_results_for_nothing(project: Project) -> None:
    """The journal lies elsewhere, and so stays."""
    data = {"journal_folder": "data/journal", "output_folder": "data/one"}
    project.write_task({"data": data})
    assert project.run("run-task", TASK).code == 0
    project.write_task({"data": data | {"output_folder": "data/two"}})
    ended = project.run("run-task", TASK)
    assert (ended.code, "0 requests sent" in ended.out) == (0, True), ended
    for folder in ("one", "two"):
        made = [*(project.root / "data" / folder).rglob("*.parquet")]
        assert len(made) == len(NAMES), "what was there before stays"
