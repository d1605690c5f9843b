"""`modelcall check` of what keeps right tasks from running, and `try`'s few words."""

from __future__ import annotations

from contextlib import closing
from socket import create_server

import pytest
from project import TASK, A, B, C, Project, asked

from modelcall_assets.cli import readiness
from modelcall_assets.rehearsal import RehearsalServer


def test_all_files_are_looked_at_and_a_cause_is_told_once(project: Project) -> None:
    for name in (B, C):
        project.write_input(name, [{"id": 1, "txt": "misspelt"}])
    checked = project.run("check")
    wrong = (
        f"none of the first 1 rows of {B} and of 1 more files can be scored: input column 'text'"
    )
    assert wrong in checked.out and "0 errors, 1 warnings" in checked.out, checked
    assert "found the columns id, txt" in checked.out


def test_what_waits_is_one_line_unless_it_is_asked_for(project: Project) -> None:
    project.write_task({"data": {"input_folder": "data/nowhere"}})
    checked = project.run("check")
    assert checked.code == 0 and "1 files wait for keys, variables or data: rate;" in checked.out
    assert "0 errors, 0 warnings" in checked.out
    for arguments in ([TASK], ["--strict"]):
        told = project.run("check", *arguments)
        assert "no such folder yet: data/nowhere" in told.out and "1 warnings" in told.out


def test_a_store_that_says_nothing_is_a_warning(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readiness, "STORES_S", 0.2)
    with closing(create_server(("127.0.0.1", 0))) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        keys = "AWS_ACCESS_KEY_ID=a\nAWS_SECRET_ACCESS_KEY=b\n"
        (project.root / ".env").write_text(f"{keys}AWS_ENDPOINT_URL={url}\n")
        project.write_task({"data": {"input_folder": "s3://bucket/in"}})
        checked = project.run("check")
    assert checked.code == 0 and "the store has not said all within 0.2 s" in checked.out, checked


def test_samples_at_temperature_0_are_told(project: Project) -> None:
    project.write_input("talk.jsonl", [asked("Why?")])
    for name in (A, B, C):
        (project.input_folder / name).unlink()
    project.write_generation({"samples": 3})
    checked = project.run("check", project.task_file)
    assert "3 answers to a row by a model at temperature 0 are alike" in checked.out, checked


def test_try_cuts_long_texts_and_sums_up_by_reason(
    project: Project, server: RehearsalServer
) -> None:
    project.write_input(A, [{"id": 1, "text": "word " * 1000 + "the end"}, {"id": 2}])
    tried = project.run("try", TASK)
    assert "the end" not in tried.out and "characters more: --full" in tried.out
    assert "1 of 2 rows succeeded; failed: missing_input 1" in tried.out
    assert "the end" in project.run("try", TASK, "--full").out
