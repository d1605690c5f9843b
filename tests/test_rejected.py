"""A run of which nothing is left replaces nothing, nor does any run what others have left."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import orjson
import pytest
from project import CHATML, DATASETS, INS, TASK, A, Project, instruction, read_rows, some_rows

from modelcall_assets.rehearsal import NO_FAULTS, Faults, RehearsalServer
from modelcall_assets.stages.merged import invalid_file_of


def write_conversion(project: Project, column: str, **fields: Any) -> str:
    """The task that converts `Ins`, its question in that column."""
    mapping = {"prompt": column, "input": "input", "response": "output"}
    datasets = {"org/Ins": {**DATASETS["org/Ins"], "column_mapping": mapping}}
    project.write_yaml("distillation/datasets", datasets)
    project.write_steps(chatml_conversion=CHATML, **fields)
    return str(project.task_file)


def test_a_wrong_column_mapping_leaves_the_conversations_that_there_are(
    distilling: Project,
) -> None:
    task = write_conversion(distilling, "instruction")
    distilling.write_dataset("Ins", [instruction(2 * number) for number in range(3)])
    assert distilling.run("run-task", task).code == 0
    output = distilling.root / "data/chatml" / INS
    before = output.read_bytes()
    assert before.count(b"\n") == 3

    write_conversion(distilling, "instructions")
    ended = distilling.run("run-task", task)
    assert ended.code == 1
    assert "all 3 rows were dropped: missing_prompt 3; compare column_mapping" in ended.err
    assert f"rejected: {INS}: all 3 rows were dropped" in ended.out
    assert "kept:" not in ended.out, "this run did make a result of it"
    assert output.read_bytes() == before

    write_conversion(distilling, "instructions", max_failure_rate=1)
    assert distilling.run("run-task", task).code == 0
    assert output.read_bytes() == b"", "as was asked for"
    write_conversion(distilling, "instruction")
    assert distilling.run("run-task", task).code == 0
    assert output.read_bytes() == before


def test_retry_asks_again_for_the_failed_rows_that_the_task_accepts_now(
    project: Project, server: RehearsalServer
) -> None:
    """Running the task accepts them as they are."""
    server.set_faults(Faults(rate_400=0.5))
    assert project.run("run-task", TASK).code == 1
    aside = project.rejected(A)
    failed = sum(row["api_status"] == "error" for row in read_rows(aside))
    assert failed
    project.write_task({"max_failure_rate": 1})
    server.set_faults(NO_FAULTS)
    assert "all is sound" in project.run("verify", TASK).out
    ended = project.run("retry", TASK, "--file", A)
    assert f"{failed} request" in ended.out, ended
    assert all(row["api_status"] == "success" for row in project.scores(A))


def test_what_a_failed_run_left_is_not_counted_as_made_by_it(project: Project) -> None:
    assert project.run("run-task", TASK).code == 0
    project.output(A).write_bytes(b"somebody's")
    project.write_input(A, some_rows(3))
    ended = project.run("run-task", TASK)
    assert ended.code == 1 and "is not replaced" in ended.err
    assert (
        "kept: a.jsonl: the result of an earlier run, since this one did not make it" in ended.out
    )
    assert ended.out.count("kept:") == 1


def test_an_empty_split_is_none_of_that(distilling: Project) -> None:
    task = write_conversion(distilling, "instruction")
    distilling.write_dataset("Ins", [])
    assert distilling.run("run-task", task).code == 0
    assert (distilling.root / "data/chatml" / INS).read_bytes() == b""


def test_required_columns_that_no_row_has_leave_the_clean_rows_that_there_are(
    project: Project,
) -> None:
    block = {"enabled": True, "output_folder": "data/clean"}
    project.write_task({"preprocess": block})
    project.write_input(A, some_rows(3))
    clean = project.root / "data/clean/a.parquet"
    assert project.run("run-task", TASK, "--file", A).code == 0
    before = clean.read_bytes(), project.output(A).read_bytes()

    wrong = {**block, "filters": {"required_fields": ["txt"]}}
    project.write_task({"preprocess": wrong})
    ended = project.run("run-task", TASK, "--file", A)
    assert ended.code == 1
    assert "all 3 rows were dropped: required_fields: txt 3; compare required_fields" in ended.err
    assert (clean.read_bytes(), project.output(A).read_bytes()) == before

    strict = {**block, "filters": {"min_text_length": 10**6}}
    project.write_task({"preprocess": strict})
    ended = project.run("run-task", TASK, "--file", A)
    assert ended.code == 0, "a filter may leave nothing"


def test_a_scorer_that_gives_no_values_fails_the_rows(project: Project) -> None:
    """A key of null is a value; none at all is a mistake."""
    module = project.root / "ratings.py"
    scorer = "def score(self, item):\n        return {}\n"
    module.write_text("class Length:\n    def score(self, item):\n        return {'n': None}\n")
    project.write_task({"scorer": "ratings:Length", "model": None, "prompt": None})
    assert project.run("run-task", TASK, "--file", A).code == 0
    before = project.output(A).read_bytes()
    module.write_text(f"class Length:\n    {scorer}")
    ended = project.run("run-task", TASK, "--file", A)
    assert ended.code == 1, ended
    assert "score() returned an empty dict" in ended.err
    assert project.output(A).read_bytes() == before


class TestBeside:
    @pytest.fixture
    def merging(self, distilling: Project) -> Path:
        """Two members of which one has an invalid line; gives where such lines go."""
        groups = [{"name": "all", "output_file": "all.jsonl", "input_files": [A, "b.jsonl"]}]
        distilling.write_yaml("distillation/groups", {"merge_groups": groups})
        merge = {
            "merge_config_path": "configs/distillation/groups.yaml",
            "base_input_dir": distilling.inputs,
            "base_output_dir": "data/merged",
        }
        distilling.write_steps(jsonl_merge=merge)
        distilling.write_input(A, [b'{"n": 1}', b"{torn"])
        distilling.write_input("b.jsonl", [b'{"n": 2}'])
        side = invalid_file_of(distilling.root / "data/merged/all.jsonl")
        assert isinstance(side, Path)
        return side

    def test_invalid_lines_of_somebody_else_stay(self, distilling: Project, merging: Path) -> None:
        merging.parent.mkdir(parents=True)
        merging.write_bytes(b"precious")
        task = str(distilling.task_file)
        ended = distilling.run("run-task", task)
        assert ended.code == 1 and f"{merging}: this file was not written" in ended.err
        assert merging.read_bytes() == b"precious"
        assert str(merging) in distilling.run("adopt", task).out
        ended = distilling.run("run-task", task)
        assert ended.code == 0, ended
        assert merging.read_bytes() == b"{torn\n"
        (kept,) = (distilling.root / "data").rglob("set_aside/merged/*/all.jsonl.invalid")
        assert kept.read_bytes() == b"precious" and str(kept) in ended.out
        distilling.write_input(A, [b'{"n": 1}'])
        assert distilling.run("run-task", task).code == 0
        assert not merging.exists(), "ours goes when there are no such lines"
        merging.write_bytes(b"precious")
        distilling.write_input(A, [b'{"n": 3}'])
        assert distilling.run("run-task", task).code == 0
        assert merging.read_bytes() == b"precious"

    def test_those_of_a_project_stay_when_a_copy_of_it_has_none_any_more(
        self, distilling: Project, merging: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert distilling.run("run-task", distilling.task_file).code == 0
        copy = Project(distilling.root.with_name("copy"), task=distilling.task)
        shutil.copytree(distilling.root, copy.root)
        monkeypatch.setenv("DAGSTER_HOME", str(copy.root / "dagster_home"))
        copy.write_input(A, [b'{"n": 1}'])
        assert copy.run("run-task", copy.task_file).code == 0
        assert merging.read_bytes() == b"{torn\n"
        assert [path.name for path in (copy.root / "data/merged").glob("all*")] == ["all.jsonl"]

    def test_lines_of_which_none_is_a_row_replace_no_merged_file(
        self, distilling: Project, merging: Path
    ) -> None:
        task = str(distilling.task_file)
        assert distilling.run("run-task", task).code == 0
        output = merging.with_name("all.jsonl")
        before = output.read_bytes(), merging.read_bytes()
        for name in (A, "b.jsonl"):
            distilling.write_input(name, [b"not", b"JSON"])
        ended = distilling.run("run-task", task)
        assert ended.code == 1
        assert ended.err.count("none of 2 lines can be read; the first: line 1") == 2
        assert (output.read_bytes(), merging.read_bytes()) == before
        distilling.write_input(A, [b'{"n": 1}', b"{torn"])
        distilling.write_input("b.jsonl", [b'{"n": 2}'])
        assert distilling.run("run-task", task).code == 0
        assert not [*(distilling.root / "data").rglob("rejected/merged/all*")]

    def test_all_of_a_group_that_is_gone_goes(self, distilling: Project, merging: Path) -> None:
        task = str(distilling.task_file)
        assert distilling.run("run-task", task).code == 0
        groups = [{"name": "b", "output_file": "b_only.jsonl", "input_files": ["b.jsonl"]}]
        distilling.write_yaml("distillation/groups", {"merge_groups": groups})
        assert distilling.run("run-task", task).code == 0
        told = distilling.run("verify", task)
        assert "all.jsonl: its input is gone" in " ".join(told.out.split())
        ended = distilling.run("clean", task, "--deleted-inputs", "--yes")
        assert (ended.code, "deleted 1 of 1" in ended.out) == (0, True), ended
        left = [path.name for path in sorted((distilling.root / "data/merged").glob("*"))]
        assert left == [".modelcall", "b_only.jsonl"]
        found = (distilling.root / "data/merged/.modelcall").rglob("all*")
        assert not [path for path in found if path.parent.name != "summary"]
        assert "all is sound" in distilling.run("verify", task).out

    def test_a_stat_file_of_the_old_system_stays(self, project: Project) -> None:
        block = {"enabled": True, "output_folder": "data/clean", "stat_folder": "data/stats"}
        project.write_task({"preprocess": block})
        stat = project.root / "data/stats/preprocess/a.jsonl.json"
        stat.parent.mkdir(parents=True)
        stat.write_bytes(b'{"old": 1}')
        ended = project.run("run-task", TASK, "--file", A)
        assert ended.code == 1 and f"{stat}: this file was not written" in ended.err
        assert stat.read_bytes() == b'{"old": 1}'
        assert str(stat) in project.run("adopt", TASK).out
        ended = project.run("run-task", TASK, "--file", A)
        assert ended.code == 0, ended
        (kept,) = (project.root / "data").rglob("set_aside/preprocessed/*/a.jsonl.json")
        assert kept.read_bytes() == b'{"old": 1}'
        assert orjson.loads(stat.read_bytes())["processing_complete"] is True
        assert [*project.manifest(A, "preprocessed").beside] == [str(stat)]
        project.write_input(A, some_rows(5))
        assert project.run("run-task", TASK, "--file", A).code == 0
        assert orjson.loads(stat.read_bytes())["n_sample"] == 5
