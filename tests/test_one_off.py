"""A task that only preprocesses, and the one-off commands of the old system: each leaves the files
that it left there, by a task that it writes."""

from __future__ import annotations

from pathlib import Path

import pytest
from config_files import with_fields
from project import PREPROCESS, RATING, A, B, C, Project, read_rows

ROWS_ONLY = with_fields(RATING, {"model": ..., "prompt": ..., "preprocess": PREPROCESS})


@pytest.fixture
def preparing(project: Project) -> Project:
    """Its task has neither model nor prompt."""
    project.write_yaml("tasks/rate", ROWS_ONLY)
    return project


def test_a_task_that_only_preprocesses(preparing: Project):
    task = preparing.task_file
    checked = preparing.run("check", task)
    assert (checked.code, "0 errors, 0 warnings" in checked.out) == (0, True), checked
    assert "to send: nothing" in preparing.run("plan", task).out
    ended = preparing.run("run-task", task)
    assert ended.code == 0, ended
    assert [len(preparing.rows(name, "preprocessed")) for name in (A, B, C)] == [4, 4, 4]
    assert preparing.statuses("preprocessed").keys() == {A, B, C}
    assert "nothing to do" in preparing.run("run-task", task).out
    assert preparing.run("verify", task).code == preparing.run("report", task).code == 0
    exported = preparing.run("export", task, "--output", "copies")
    assert exported.code == 0 and len(read_rows(preparing.root / "copies/a.jsonl")) == 4
    refused = preparing.run("retry", task)
    assert refused.code == 2 and "preprocessed asks nothing" in refused.err
    for command in ("failures", "try"):
        print(preparing.run(command, task))


def test_rows_of_a_task_that_only_preprocesses_lie_in_its_output_folder(preparing: Project):
    preparing.write_yaml("tasks/rate", with_fields(ROWS_ONLY, {"preprocess__output_folder": ...}))
    assert preparing.run("run-task", preparing.task_file).code == 0
    assert (preparing.root / "data/rate/scores/a.parquet").is_file()


def test_a_model_can_be_added_later(preparing: Project):
    assert preparing.run("run-task", preparing.task_file).code == 0
    preparing.write_task({"preprocess": PREPROCESS})
    ended = preparing.run("run-task", preparing.task_file)
    assert ended.code == 0, ended
    assert len(preparing.scores(A)) == 4


def test_a_task_may_read_one_file(project: Project):
    project.write_task({"data": {"input_folder": f"data/in/{B}"}})
    assert project.run("run-task", project.task_file).code == 0
    assert len(project.scores("b.parquet")) == 4
