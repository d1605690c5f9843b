"""A task that only preprocesses, and the one-off commands of the old system: each leaves the files
that it left there, by a task that it writes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml
from config_files import with_fields
from packs import repomix_xml
from pages import ROOT
from project import (
    MODEL_FILE,
    PREPROCESS,
    PROMPT_FILE,
    RATING,
    A,
    B,
    C,
    Ended,
    Project,
    read_rows,
    write_rows,
)

from modelcall_assets.rehearsal import RehearsalServer

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
    assert preparing.run("failures", task).code == 0


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


# The old commands

ROWS = [{"text": "x" * 120, "n": 1}, {"text": "y" * 900, "n": 2}, {"text": "", "n": 3}]
CHATS = [
    {"uid": f"u{n}", "messages": [{"role": "user", "content": f"Question {n}?"}]} for n in range(4)
]


@pytest.fixture
def old(bare: Project) -> Project:
    """No task file."""
    bare.task_file.unlink()
    return bare


def task_of(project: Project) -> Path:
    """The one file that commands have written."""
    (path,) = (project.root / "configs/tasks/one_off").iterdir()
    return path


@pytest.mark.parametrize(
    ("source", "target"), [("in.jsonl", "x.jsonl"), ("in.parquet", "x.parquet")]
)
def test_pipeline_leaves_its_file(old: Project, source: str, target: str):
    write_rows(old.root / source, ROWS)
    ended = old.run("pipeline", source, f"out/{target}", "--fs", "local")
    assert ended.code == 0, ended
    assert visible(old.root / "out") == [target]
    rows = read_rows(old.root / "out" / target)
    assert [(row["n"], row["score"]) for row in rows] == [(1, 1.2), (2, 5.0), (3, 0.0)]
    again = old.run("pipeline", source, f"out/{target}")
    assert again.code == 0 and "nothing to do" in again.out


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def test_pipeline_keeps_what_is_not_its_own(old: Project):
    write_rows(old.root / "in.jsonl", ROWS)
    write_rows(old.root / "out.jsonl", ROWS)
    ended = old.run("pipeline", "in.jsonl", "out.jsonl")
    assert ended.code == 2 and "is there, and not by this command" in ended.err
    assert read_rows(old.root / "out.jsonl") == ROWS
    ended = old.run("pipeline", "in.jsonl", "in.csv")
    assert ended.code == 2 and "neither JSONL nor Parquet" in ended.err


def test_the_task_file_says_who_wrote_it_and_is_kept_once_it_is_changed(old: Project):
    write_rows(old.root / "in.jsonl", ROWS)
    ended = old.run("pipeline", "in.jsonl", "out/x.jsonl")
    path = task_of(old)
    assert f"task file: {path}" in ended.out
    assert path.read_text().startswith("# Written by `modelcall pipeline in.jsonl out/x.jsonl`")
    assert old.run("check", path).code == 0
    path.write_text(path.read_text() + "description: mine\n")
    ended = old.run("pipeline", "in.jsonl", "out/x.jsonl")
    assert ended.code == 2 and f"modelcall run-task {path}" in ended.err
    assert old.run("run-task", path).code == 0


def test_api_call_leaves_scores_with_the_options_of_old(old: Project):
    for name in ("a.jsonl", "b.parquet"):
        old.write_input(name, ROWS[:2])
    files = ("--model_config_path", MODEL_FILE, "--prompt_config_path", PROMPT_FILE)
    folders = ("--input_folder", "data/in", "--output_folder", "tagged")
    limits = ("--chunk_size", "100", "--parquet_save_interval", "-1", "--stat_folder", "stats")
    ended = old.run("api_call", *folders, *files, *limits, "--prompt_format_key", "text")
    assert ended.code == 0, ended
    assert visible(old.root / "tagged") == ["a.parquet", "b.parquet"]
    assert [row["api_status"] for row in read_rows(old.root / "tagged/b.parquet")] == [
        "success"
    ] * 2
    (told,) = [line for line in ended.out.splitlines() if line.startswith("not needed here: ")]
    assert all(name in told for name in ("--chunk-size (", "--parquet-save", "--stat-folder"))
    ended = old.run(
        "api-call", *folders, *files, "--prompt_format_key", "text", "--delete_existing",
        "--debug_items", "1", "--debug_files", "1", "--disable_format_validation_retry",
    )  # fmt: skip
    assert ended.code == 0 and "1 request sent" in ended.out, ended
    assert len(read_rows(old.root / "tagged/a.parquet")) == 1


def test_jobs_of_api_call_share_the_files(old: Project):
    for name in ("a.jsonl", "b.jsonl"):
        old.write_input(name, ROWS[:2])
    options = ("--input-folder", "data/in", "--output-folder", "tagged", "--prompt-format-key")
    files = ("--model-config-path", MODEL_FILE, "--prompt-config-path", PROMPT_FILE)
    job = ("--job_index", "1", "--world_size", "2")
    assert old.run("api-call", *options, "text", *files, *job).code == 0
    assert visible(old.root / "tagged") == ["b.parquet"]


def test_distillation_generate_leaves_answers_and_errors(old: Project, server: RehearsalServer):
    write_rows(old.root / "chats.jsonl", [*CHATS, {"uid": "bad", "messages": []}])
    command = ("distillation-generate", "-i", "chats.jsonl", "-o", "answers", "-m", MODEL_FILE)
    ended = old.run(*command, "-c", "2", "-b", "30", "-f", "2.0", "--log-level", "INFO")
    assert ended.code == 1, ended
    assert "not needed here: --batch-size (" in ended.out
    assert visible(old.root / "answers") == ["chats.jsonl", "chats_error.jsonl"]
    good, bad = (read_rows(old.root / f"answers/chats{end}.jsonl") for end in ("", "_error"))
    assert [row["uid"] for row in good] == ["u0", "u1", "u2", "u3"]
    assert [row["uid"] for row in bad] == ["bad"] and bad[0]["error"]
    write_rows(old.root / "chats.jsonl", CHATS)
    ended = old.run(*command, "--retry")
    assert ended.code == 0, ended
    names = ["chats.jsonl", "chats_error_retry_1.jsonl", "chats_success_retry_1.jsonl"]
    assert visible(old.root / "answers") == names
    before = server.tally.counts["requests"]
    assert old.run(*command, "--no-resume").code == 0
    assert server.tally.counts["requests"] == before + 4


def test_a_retry_does_not_hide_that_the_run_before_it_failed(old: Project):
    write_rows(old.root / "chats/a.jsonl", CHATS)
    (old.root / "chats/b.parquet").write_bytes(b"none")
    ended = old.run(
        "distillation-generate", "-i", "chats", "-o", "answers", "-m", MODEL_FILE, "--retry"
    )
    assert ended.code == 1 and "not a readable Parquet file" in ended.err, ended
    assert "no row failed" in ended.out
    assert len(read_rows(old.root / "answers/a.jsonl")) == 4


def test_preprocess_leaves_its_files(old: Project):
    old.write_input("a.jsonl", [{"text": "def f(): pass"}])
    options = ("--raw_path", "data/in", "--output_dir", "clean", "--stat_dir", "stats")
    ended = old.run("preprocess", "github", *options, "--seed", "42", "--max_tokens", "1024")
    assert ended.code == 0, ended
    assert visible(old.root / "clean") == ["a.parquet"]
    assert (old.root / "stats/preprocess/a.jsonl.json").is_file()
    assert "content_truncate_1k" in read_rows(old.root / "clean/a.parquet")[0]
    assert "not needed here: --seed (nothing in preprocessing is random)" in ended.out


def write_pack(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "me_it_abc123.xml").write_bytes(repomix_xml({"a.py": "x = 1"}))


def test_preprocess_takes_the_languages_of_repositories(old: Project):
    for language in ("Go", "Python", "Rust"):
        write_pack(old.root / "packs" / language)
    options = ("--raw_path", "packs", "--output_dir", "clean", "--languages", "Python", "Go")
    assert old.run("preprocess", "repomix", *options, "--num_proc", "1").code == 0
    assert visible(old.root / "clean") == ["Go.parquet", "Python.parquet"]


# The table of docs/migration.md

SUBMITTED = {
    "task_name": "batch",
    "task_type": "batch_distillation_submit",
    "data_split": {"input_file": "./chats.jsonl"},
    "batch_submit": {"output_base_dir": "./generated", "models": [{"config_path": MODEL_FILE}]},
}


def test_each_row_of_the_table_of_old_commands_runs(project: Project):
    page = (
        (ROOT / "docs/migration.md").read_text().partition("## Commands")[2].partition("\n## ")[0]
    )
    commands = re.findall(r"^\|.*\| `modelcall (.*)` \|$", page, re.M)
    assert len(commands) == len(re.findall(r"^\| .*\|$", page, re.M)) - 2
    write_rows(project.root / "in.jsonl", ROWS)
    write_rows(project.root / "code/a.jsonl", ROWS)
    write_rows(project.root / "triplets/pt_data_Go_part01.jsonl", ROWS)
    write_rows(project.root / "chats.jsonl", CHATS)
    for language in ("Go", "Python"):
        write_pack(project.root / "packs" / language)
    (project.root / "old").mkdir()
    (project.root / "old/batch.yaml").write_text(yaml.safe_dump(SUBMITTED))
    failed = list[Ended]()
    for command in map(shlex.split, commands):
        if (ended := project.run(*command)).code:
            failed.append(ended)
    assert failed == []
