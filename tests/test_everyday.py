"""What one asks every day: which tasks, how far, why red; and an end to what goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import orjson
import pytest
from project import TASK, A, B, C, Project, Row, some_rows, until

from modelcall_assets.rehearsal import Faults, RehearsalServer

NAMES = ("rate", "configs/tasks/rate.yaml")


def rows(project: Project, *command: str) -> list[Row]:
    ended = project.run(*command, "--json")
    assert ended.code == 0, ended
    return [orjson.loads(line) for line in ended.out.splitlines()]


class TestATask:
    @pytest.mark.parametrize("name", NAMES)
    def test_is_its_file_or_its_name(self, project: Project, name: str) -> None:
        ended = project.run("plan", name)
        assert ended.code == 0 and "12" in ended.out, ended
        assert project.run("register", name).code == 0

    def test_is_called_as_its_file_too(self, project: Project) -> None:
        project.task_file.rename(project.task_file.with_name("other name.yaml"))
        assert project.run("plan", "other name").code == project.run("plan", "rate").code == 0
        project.write_input("rate", [])
        (project.root / "rate").mkdir()  # a folder is no task
        assert project.run("plan", "rate").code == 0

    def test_that_is_unknown_is_told_with_what_was_meant(self, project: Project) -> None:
        for command in ("run-task", "export", "adopt", "report", "compare", "stop", "status"):
            ended = project.run(command, "raet", *["raet"] * (command == "compare"))
            assert ended.code == 2, ended
            assert "did you mean rate? `modelcall tasks` lists them" in ended.err

    def test_is_completed_by_the_shell_whatever_its_files_are(self, project: Project) -> None:
        project.task_file.with_name("torn.yaml").write_text("task_name: [")
        project.task_file.with_name("more.yaml").write_text("task_name: rather")

        def completed(words: str) -> set[str]:
            environment = {"COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)}
            environment |= {"_MODELCALL_COMPLETE": "bash_complete"}
            job = project.start(env={**os.environ, **environment})
            out, err = job.communicate(timeout=60)
            assert err == "", err
            return {*out.splitlines()}

        assert completed("modelcall plan ra") == {"plain,rate", "plain,rather"}
        assert completed("modelcall stop tor") == {"plain,torn"}
        assert completed("modelcall plan configs/") == {"file,configs/"}
        assert completed("modelcall sta") == {"plain,status"}


class TestTasks:
    def test_lists_them_with_what_is_done(self, project: Project, server: RehearsalServer) -> None:
        project.task_file.with_name("torn.yaml").write_text("task_name: [")
        new, torn = rows(project, "tasks")
        expected = {"task": "rate", "file": TASK, "type": "data_scoring"}
        assert new == {**expected, "files": 0, "done": 0, "failed": 0, "state": "never run"}
        assert (torn["task"], torn["files"]) == ("torn", None) and "broken" in torn["state"]
        assert project.run("run-task", "rate", "--file", A).code == 0
        project.write_input(B, [b"no Parquet"] if False else some_rows(2))
        made, _ = rows(project, "status")
        assert (made["files"], made["done"], made["failed"]) == (3, 1, 0)
        assert made["state"].startswith("done 20")
        assert "together" in project.run("status").out

    def test_of_nothing_is_nothing(self, project: Project) -> None:
        project.task_file.unlink()
        assert rows(project, "tasks") == rows(project, "status") == []


class TestStatus:
    def test_tells_what_the_next_run_would_do(self, project: Project) -> None:
        raw, scores = rows(project, "status", "rate")
        assert (raw["step"], raw["files"], raw["missing"], raw["done"]) == ("raw", 3, 3, 0)
        assert project.run("run-task", "rate").code == 0
        raw, scores = rows(project, "status", "rate")
        assert (scores["done"], scores["rows"], scores["ok"]) == (3, 12, 12)
        assert "next:" not in project.run("status", "rate").out
        project.write_prompt({"prompt_template": {"system_text": "Otherwise."}})
        project.write_input(A, some_rows(5))
        raw, scores = rows(project, "status", "rate")
        assert (raw["out_of_date"], scores["out_of_date"]) == (1, 3)
        shown = project.run("status", "rate").out
        assert "next: modelcall run-task rate" in shown and "retry" not in shown
        assert project.run("run-task", "rate").code == 0
        raw, scores = rows(project, "status", "rate")
        assert (raw["done"], scores["done"], scores["rows"]) == (3, 3, 13)

    def test_says_why_a_file_failed(self, project: Project) -> None:
        (project.input_folder / B).write_bytes(b"no Parquet")
        project.write_input(C, [*some_rows(4), b"{torn"])
        assert project.run("run-task", "rate").code == 1
        raw, scores = rows(project, "status", "rate")
        assert (raw["failed"], scores["missing"], scores["failed"]) == (1, 1, 1)
        assert scores["failed_rows"] == 1
        shown = project.run("status", "rate").out
        assert f"{B}: raw failed: " in shown and "not a Parquet file" in shown
        assert f"{C}: scores failed: 1 of 5 rows failed (20.00%)" in shown
        for command in ("run-task", "failures", "retry"):
            assert f"next: modelcall {command} rate" in shown
