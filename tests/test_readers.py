"""Task readers of AgentScope Tuner and AgentJet: what they make of tasks, and what they tell."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import orjson
import pyarrow.parquet as pq
import pytest
import yaml
from environment_server import environment
from project import GENERATE, Project, read_rows, write_rows

from modelcall_assets.errors import InputError, SetupError
from modelcall_assets.sources import Dummies, Task, TaskDataset, TaskFile
from modelcall_assets.sources.tuner import sources_of

ROOT = Path(__file__).parent.parent
READERS = ROOT / "configs/tasks/readers"


def lines(path: Path, *rows: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = [row if isinstance(row, str) else orjson.dumps(row).decode() for row in rows]
    path.write_text("".join(f"{text}\n" for text in texts))
    return str(path)


class TestTask:
    def test_the_first_messages_are_sent_else_the_query(self) -> None:
        said = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Why?"}]
        both = Task.of({"main_query": "How?", "init_messages": said, "task_id": "a"})
        assert both.conversation()["messages"] == said
        alone = Task.of({"main_query": "How?"}).conversation()
        assert alone["messages"] == [{"role": "user", "content": "How?"}]
        assert (alone["task_id"], alone["env_type"]) == ("", "no_env")

    def test_metadata_is_the_row_where_there_is_none(self) -> None:
        row = {"main_query": "How?", "level": 3, "task_id": None}
        assert Task.of(row).metadata == row
        assert Task.of({**row, "metadata": {}}).metadata == {}

    @pytest.mark.parametrize(("given", "read"), [(17, "17"), (2.5, "2.5"), ("007", "007")])
    def test_ids_are_texts(self, given: Any, read: str) -> None:
        assert Task.of({"main_query": "x", "task_id": given}).task_id == read

    @pytest.mark.parametrize(
        ("row", "told"),
        [
            ({"task_id": "a"}, "neither main_query nor init_messages"),
            ({"main_query": ["a"]}, "main_query: expected a text; have list"),
            ({"main_query": "a", "task_id": True}, "task_id: expected a text; have bool"),
            ({"main_query": "a", "metadata": "easy"}, "metadata: expected an object; have str"),
            ({"init_messages": "hello"}, "init_messages"),
            ({"init_messages": [{"role": "user"}]}, "content"),
            ({"init_messages": [{"content": "hello"}]}, "role"),
            ({"init_messages": [{"role": "user", "content": 4}]}, "content"),
        ],
    )
    def test_what_is_wrong_is_named(self, row: dict[str, Any], told: str) -> None:
        with pytest.raises(ValueError) as raised:
            Task.of(row).conversation()
        assert told in str(raised.value)


class TestFiles:
    def test_lines_are_tasks_in_their_order(self, tmp_path: Path) -> None:
        path = lines(
            tmp_path / "some.jsonl",
            {"main_query": "One?", "task_id": 1, "own": "kept"},
            "",
            {"main_query": "Two?", "task_id": "b", "metadata": {"answer": "2"}},
        )
        first, second = TaskFile(path)
        assert (first["id"], first["task_id"], first["metadata"]["own"]) == ("1", "1", "kept")
        assert (second["id"], second["metadata"]) == ("b", {"answer": "2"})

    def test_a_line_that_is_none_is_named_and_the_others_are_read(self, tmp_path: Path) -> None:
        path = lines(
            tmp_path / "some.jsonl",
            {"main_query": "One?"},
            "{torn",
            "[1]",
            "",
            {"main_query": 5},
            {"task_id": "x"},
            {"main_query": "Last?"},
        )
        tasks = TaskFile(path)
        assert len(tasks) == 6 and tasks[5]["messages"][0]["content"] == "Last?"
        for index, told in enumerate(("line 2", "line 3", "", "line 6: neither"), 1):
            if index == 3:
                assert tasks[index]["main_query"] == "5"
                continue
            with pytest.raises(InputError) as raised:
                tasks[index]
            assert path in str(raised.value) and told in str(raised.value)

    def test_tasks_without_an_id_have_one_of_their_content(self, tmp_path: Path) -> None:
        path = lines(tmp_path / "a.jsonl", {"main_query": "One?"}, {"main_query": "Two?"})
        one, two = (task["id"] for task in TaskFile(path))
        assert one != two and len(one) == 32
        assert [task["id"] for task in TaskFile(path, start=1)] == [two]

    def test_a_shuffle_is_the_same_every_time(self, tmp_path: Path) -> None:
        rows = [{"main_query": f"{n}?", "task_id": n} for n in range(20)]
        path = lines(tmp_path / "a.jsonl", *rows)
        ids = [[t["id"] for t in TaskFile(path, shuffle=seed)] for seed in (None, 7, 7, 8)]
        assert ids[0] == [str(n) for n in range(20)]
        assert ids[1] == ids[2] != ids[3] and sorted(ids[1], key=int) == ids[0]

    def test_an_absent_or_empty_file_is_told(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="not found; expected a task in each line"):
            TaskFile(str(tmp_path / "none.jsonl")).files()
        with pytest.raises(InputError, match="there is no task in it"):
            len(TaskFile(lines(tmp_path / "empty.jsonl", "")))


class TestDatasets:
    def test_the_question_is_asked_and_the_row_kept(self) -> None:
        tasks = TaskDataset("openai/gsm8k", "main", "test", folder=str(ROOT / "demo/benchmarks"))
        first = tasks[0]
        assert first["messages"] == [{"role": "user", "content": first["metadata"]["question"]}]
        assert (first["id"], first["env_type"]) == ("0", "no_env")
        assert "####" in first["metadata"]["answer"]

    def test_a_folder_is_one_too(self, tmp_path: Path) -> None:
        write_rows(tmp_path / "mine/train.jsonl", [{"ask": "One?"}, {"ask": None}, {"ask": "Two?"}])
        tasks = TaskDataset(str(tmp_path / "mine"), query="ask")
        assert len(tasks) == 3 and tasks[2]["main_query"] == "Two?"
        with pytest.raises(InputError, match="line 2: no text in the column ask; there are ask"):
            tasks[1]
        with pytest.raises(InputError, match="no such folder"):
            TaskDataset(str(tmp_path / "yours")).files()


class TestDummies:
    def test_the_numbers_come_in_the_old_order(self) -> None:
        tasks = Dummies()
        assert [tasks[n]["id"] for n in range(5)] == ["521", "737", "740", "660", "411"]
        assert tasks[0]["main_query"] == "[dummy task @ 521]" and len(tasks) == 1000
        assert tasks[0]["metadata"] == {"random_number": 521}

    def test_a_loader_makes_the_tasks(self) -> None:
        assert Dummies(lambda number: f"{number}²?")[0]["main_query"] == "521²?"
        made = Dummies(lambda number: {"main_query": "x", "metadata": {"n": number}})[1]
        assert (made["metadata"], made["task_id"]) == ({"n": 737}, "737")


class TestConfig:
    @pytest.mark.parametrize("kind", ["dataset_file", "jsonl_dataset_file"])
    def test_both_names_of_a_file(self, kind: str) -> None:
        block = {"training": {"file_path": "a.jsonl"}, "validation": {"file_path": "b.jsonl"}}
        found = sources_of({"type": kind, kind: block}, "x.yaml", "task_reader")
        assert [(each["as"], each["filepath"]) for each in found] == [
            ("training", "a.jsonl"),
            ("validation", "b.jsonl"),
        ]

    def test_the_subset_of_a_data_set_is_read(self) -> None:
        block = {"dataset_path": "openai/gsm8k", "dataset_name": "main", "validation_split": "test"}
        reader = {"type": "huggingface_dat_repo", "huggingface_dat_repo": block}
        found = sources_of(reader, "x.yaml", "task_reader")
        assert [(each["subset"], each["split"], each["as"]) for each in found] == [
            ("main", "train", "training"),
            ("main", "test", "validation"),
        ]

    def test_an_environment_has_a_partition_for_each_split(self) -> None:
        block = {"env_type": "gym", "env_url": "http://h:1", "validation_split": "dev"}
        block |= {"training_split": "train", "env_action_preference": "text"}
        found = sources_of({"type": "env_service", "env_service": block}, "x.yaml", "task_reader")
        assert [each["as"] for each in found] == ["gym-train", "gym-dev"]

    def test_the_later_form(self) -> None:
        reader = {"path": "openai/gsm8k", "name": "main", "split": "test"}
        (found,) = sources_of(reader, "x.yaml", "task_reader")
        assert (found["path"], found["subset"], found["split"]) == tuple(reader.values())

    @pytest.mark.parametrize(
        ("reader", "told"),
        [
            ({}, "x.yaml:task_reader.type: missing; expected one of jsonl_dataset_file"),
            ({"type": "env_servce"}, "did you mean env_service?"),
            (
                {"type": "dataset_file", "dataset_file": {"training": {}}},
                "x.yaml:task_reader.dataset_file.training.file_path: missing",
            ),
            (
                {"type": "huggingface_dat_repo"},
                "x.yaml:task_reader.huggingface_dat_repo.dataset_path: missing",
            ),
            (
                {"type": "dataset_file", "dataset_file": {"training": {"file_path": None}}},
                "x.yaml:task_reader.dataset_file: neither training nor validation is named",
            ),
            (
                {"type": "dataset_file", "dataset_file": {"training": {"file_path": "${d}/a"}}},
                "x.yaml:task_reader.dataset_file: a `${…}`, which is read as it is written",
            ),
            ({"type": None}, "x.yaml:task_reader.type: missing"),
            ({"path": "a/b", "splt": "x"}, "x.yaml:task_reader.splt: unknown key"),
        ],
    )
    def test_mistakes_are_named(self, reader: dict[str, Any], told: str) -> None:
        with pytest.raises(SetupError) as raised:
            sources_of(reader, "x.yaml", "task_reader")
        assert told in str(raised.value)


def write_reader(project: Project, reader: Any, **fields: Any) -> str:
    step = {"task_reader": reader, "output_dir": "data/read"}
    return str(project.write_steps(sources=step, generate_response=GENERATE, **fields))


def distilling_rows(root: Path, name: str) -> list[dict[str, Any]]:
    return read_rows(root / f"data/responses/{name}.jsonl")


NAMES = {"training": "train", "validation": "val"}


class TestTasks:
    def test_training_and_validation_are_apart(self, distilling: Project) -> None:
        root = distilling.root
        lines(root / "train.jsonl", {"main_query": "One?", "task_id": 1}, "{torn", {"task_id": 2})
        lines(root / "val.jsonl", *({"main_query": f"{n}?", "task_id": n} for n in range(3)))
        files = {"training": {"file_path": "train.jsonl"}, "validation": {"file_path": "val.jsonl"}}
        tuner = {"astuner": {"task_reader": {"type": "dataset_file", "dataset_file": files}}}
        (root / "tuner.yaml").write_text(yaml.safe_dump(tuner))
        task = write_reader(distilling, "tuner.yaml")
        checked = distilling.run("check", task)
        assert checked.code == 0, checked
        ended = distilling.run("run-task", task)
        assert ended.code == 1 and "training.jsonl" in ended.out, ended
        answered = read_rows(root / "data/responses/validation.jsonl")
        assert [row["task_id"] for row in answered] == ["0", "1", "2"]
        assert all(row["response"] for row in answered)
        told = distilling.run("failures", task, "--stage", "chatml", "--json").out
        assert "train.jsonl, line 2" in told and "train.jsonl, line 3: neither" in told

    def test_a_loader_of_the_users_own(self, distilling: Project) -> None:
        code = "def squares(number):\n    return f'What is {number} squared?'\n"
        (distilling.root / "loaders.py").write_text(code)
        block = {"loader": "loaders:squares"}
        limit = {"enabled": True, "max_items_per_file": 4}
        task = write_reader(
            distilling, {"type": "random_dummy", "random_dummy": block}, debug=limit
        )
        ended = distilling.run("run-task", task)
        assert ended.code == 0, ended
        rows, others = (
            read_rows(distilling.root / f"data/responses/{name}.jsonl")
            for name in ("training", "validation")
        )
        assert rows[0]["main_query"] == "What is 521 squared?" and len(rows) == 4
        assert [row["id"] for row in rows] == [row["id"] for row in others]

    def test_an_environment(self, distilling: Project) -> None:
        with environment() as gym:
            block = {"env_type": "gym", "env_url": gym.url}
            task = write_reader(distilling, {"type": "env_service", "env_service": block})
            ended = distilling.run("run-task", task)
            assert ended.code == 0, ended
        rows = read_rows(distilling.root / "data/responses/gym-train.jsonl")
        assert [row["task_id"] for row in rows] == ["sum-1", "sum-2", "sum-3"]

    def test_an_export_is_read_back(self, distilling: Project) -> None:
        root = distilling.root
        said = [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": "Why?"},
            {"role": "assistant", "content": "So."},
            {"role": "user", "content": "And how?"},
        ]
        lines(
            root / "tasks.jsonl",
            {"main_query": "One?", "task_id": "a", "metadata": {"level": 3}},
            {"init_messages": said, "task_id": "b"},
            *({"main_query": f"{n}?", "task_id": n} for n in range(8)),
        )
        block = {"training": {"file_path": "tasks.jsonl"}}
        reader = {"type": "dataset_file", "dataset_file": block}
        task = write_reader(distilling, reader)
        assert distilling.run("run-task", task).code == 0
        command = ("export", task, "--to", "tuner", "--split", "0.3", "--output", "tuner")
        ended = distilling.run(*command)
        assert ended.code == 0, ended
        asked = {row["id"]: row["messages"] for row in distilling_rows(root, "training")}
        write_reader(distilling, "tuner/tuner.yaml")
        ended = distilling.run("run-task", task)
        assert ended.code == 0, ended
        found = [distilling_rows(root, name) for name in ("training", "validation")]
        assert {row["task_id"]: row["messages"] for rows in found for row in rows} == asked
        assert all(found)
        levels = [row["metadata"].get("level") for rows in found for row in rows]
        assert levels.count(3) == 1, "its own metadata stay"
        ended = distilling.run("export", task, "--to", "tuner", "--output", "apart")
        assert ended.code == 0, ended
        parts = [read_rows(root / f"apart/{part}/tasks.jsonl") for part in ("train", "validation")]
        assert [len(part) for part in parts] == [*map(len, found)]
        ended = distilling.run("publish", task, "published")
        assert ended.code == 0, ended
        for part, rows in zip(("train", "validation"), found, strict=True):
            shard = pq.read_table(root / f"published/data/{part}-00000.parquet")
            assert shard["task_id"].to_pylist() == [row["task_id"] for row in rows]

    def test_another_slice_and_a_split_that_goes_and_comes(self, distilling: Project) -> None:
        root = distilling.root
        for name in ("train", "val"):
            lines(root / f"{name}.jsonl", *({"main_query": f"{name} {n}?"} for n in range(5)))
        both = {name: {"file_path": f"{file}.jsonl"} for name, file in NAMES.items()}
        for blocks, asked in (
            (both, 10), ({"training": both["training"], "validation": None}, 0), (both, 0),
        ):  # fmt: skip
            task = write_reader(distilling, {"type": "dataset_file", "dataset_file": blocks})
            ended = distilling.run("run-task", task)
            assert ended.code == 0 and (f"{asked} requests" in ended.out or not asked), ended
            assert distilling.run("check", task).code == 0
        source = {"name": "TaskFile", "as": "training", "filepath": "train.jsonl"}
        for stop, rows in ((3, 3), (None, 5)):
            step = {"tasks": [{**source, "stop": stop}], "output_dir": "data/read"}
            distilling.write_steps(sources=step, generate_response=GENERATE)
            ended = distilling.run("run-task", task)
            assert ended.code == 0 and "0 requests sent" in ended.out, ended
            assert len(distilling_rows(root, "training")) == rows

    def test_a_loader_that_is_edited_makes_tasks_anew(self, distilling: Project) -> None:
        code = distilling.root / "edited.py"
        reader = {"type": "random_dummy", "random_dummy": {"loader": "edited:task"}}
        limit = {"enabled": True, "max_items_per_file": 2}
        task = write_reader(distilling, reader, debug=limit)
        for made, told in (("number", "gave int"), ("None", "gave NoneType"), ("1 / 0", "Zero")):
            code.write_text(f"def task(number):\n    return {made}\n")
            with distilling.start("run-task", task) as running:
                assert told in running.communicate()[1] and running.returncode == 1
        for asked in ("one", "another"):
            code.write_text(f"def task(number):\n    return '{asked}'\n")
            with distilling.start("run-task", task) as running:
                running.communicate()
            assert [row["main_query"] for row in distilling_rows(distilling.root, "training")] == [
                asked, asked,
            ]  # fmt: skip

    def test_one_of_both_is_named(self, distilling: Project) -> None:
        both = {"task_reader": "tuner.yaml", "tasks": [{"name": "GSM8K"}], "output_dir": "x"}
        task = str(distilling.write_steps(sources=both, generate_response=GENERATE))
        told = distilling.run("check", task).out
        assert "chain.yaml:sources: expected either tasks or task_reader" in told
        (distilling.root / "tuner.yaml").write_text("ajet: {trainer: {}}\n")
        write_reader(distilling, "tuner.yaml")
        told = distilling.run("check", task).out
        assert "tuner.yaml: no task reader; expected ajet.task_reader or astuner" in told


class TestShipped:
    @pytest.mark.parametrize("name", [path.stem for path in READERS.glob("*.yaml")])
    def test_each_reads_its_tasks(self, distilling: Project, name: str) -> None:
        shutil.copytree(ROOT / "configs", distilling.root / "configs", dirs_exist_ok=True)
        (distilling.root / "demo").symlink_to(ROOT / "demo")
        task = distilling.root / f"configs/tasks/readers/{name}.yaml"
        with environment() as gym:
            limit = "debug: {enabled: true, max_items_per_file: 5}\n"
            task.write_text(task.read_text().replace("http://127.0.0.1:8080", gym.url) + limit)
            ended = distilling.run("run-task", task)
            assert ended.code == 0 and gym.open == {}, ended
        answered = [*(distilling.root / f"data/{name}/responses").glob("*.jsonl")]
        assert answered and all(row["response"] for path in answered for row in read_rows(path))
        if (graded := distilling.root / f"data/{name}/grades").exists():
            assert {path.name for path in graded.glob("*.parquet")} == {
                f"{path.stem}.parquet" for path in answered
            }
