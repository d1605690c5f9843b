"""Training forms: conversations as trainers read them, by value and by `modelcall export --to`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import orjson
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pages import ROOT, write_examples
from project import GENERATE, JUDGE, TASK, Ended, Project, Row, asked, merged, read_rows, turn

from modelcall_assets.sources import CustomJSON, Mixture
from modelcall_assets.stages.export import ORIGINS
from modelcall_assets.transforms.training import (
    FORMS,
    Exchange,
    LeftOut,
    openai_batch,
    sharegpt_pair,
    trl_pair,
    tuner,
)

CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}
ASKED = [turn("system", "Be brief."), turn("user", "q1"), turn("assistant", "a1")]
CHAT = [*ASKED, turn("user", "q2"), turn("assistant", "a2")]
CALLING = [
    turn("user", "1 and 1?"),
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {**turn("tool", "2"), "tool_call_id": "1"},
    turn("assistant", "Two."),
]
ORIGIN = {"task": "rate", "file": "a.jsonl", "row": 3, "id": "x", "sample": 1}


def line(form: str, row: Row) -> Any:
    """Of any form."""
    if form == "tuner":
        return tuner(Exchange.of(row), "x#1", {"score": 4}, ORIGIN)
    if form == "openai-batch":
        return openai_batch(Exchange.of(row), "x#1", {"model": "m", "temperature": 0})
    return FORMS[form](Exchange.answered(row))


def left_out(form: str, messages: Sequence[Any], **row: Any) -> str:
    with pytest.raises(LeftOut) as why:
        line(form, {"messages": messages, **row})
    return str(why.value)


def turns(row: Row) -> list[Row]:
    return Exchange.of(row).turns


class TestAConversation:
    def test_is_what_was_sent_and_the_answer(self) -> None:
        assert turns({"messages": CHAT}) == CHAT
        assert turns({"messages": CHAT, "response": "new"})[-1] == turn("assistant", "new")
        assert len(turns({"messages": CHAT, "response": "new"})) == 5
        final = [turn("user", "q"), turn("assistant", "a")]
        row = {"messages": CHAT, "final_messages": final, "response": "x"}
        assert turns(row) == final
        assert turns({"messages": json.dumps(CHAT)}) == CHAT
        columnar = [{**each, "tool_calls": None} for each in CHAT]
        assert turns({"messages": columnar}) == CHAT

    @pytest.mark.parametrize("form", [*FORMS, "tuner"])
    def test_that_is_none_is_left_out(self, form: str) -> None:
        assert left_out(form, []) == "no messages"
        assert left_out(form, ["hi"]) == "messages that are no turns"
        assert left_out(form, [turn("critic", "hm"), *CHAT]) == "a turn of another role"
        for content in (None, {"a": 1}):
            odd = {"role": "user", "content": content}
            assert left_out(form, [odd, CHAT[2]]) == "content that is not text"

    @pytest.mark.parametrize("form", FORMS)
    def test_has_a_question_and_an_answer(self, form: str) -> None:
        assert left_out(form, CHAT[:2]) == "no answer at the end"
        assert left_out(form, CHAT[2:3]) == "nothing that is asked"
        nothing = {"role": "assistant", "content": None, "tool_calls": []}
        assert left_out(form, [*CHAT[:2], nothing]) == "content that is not text"


class TestForms:
    def test_customjson(self) -> None:
        first = turn("user", "Be brief.\n\nq1")
        assert line("customjson", {"messages": CHAT}) == [first, *CHAT[2:]]
        assert left_out("customjson", CALLING) == "calls of tools"
        assert left_out("customjson", CHAT[2:]) == "turns that do not alternate"
        parts = [{"type": "python", "text": "1+1"}]
        assert left_out("customjson", [CHAT[1], turn("assistant", parts)]).startswith("content")
        assert left_out("customjson", [*CHAT[1:3], *CHAT[:3]]).startswith("a system's turn")

    def test_tuner(self) -> None:
        row = {"messages": CHAT, "reference": "42"}
        assert line("tuner", row) == {
            "main_query": "q2",
            "init_messages": CHAT[:-1],
            "task_id": "x#1",
            "env_type": "no_env",
            "metadata": {"reference": "42", "scores": {"score": 4}, "provenance": ORIGIN},
        }
        own = {"metadata": {"answer": 3, "reference": "c"}, "env_type": "gym", **row}
        kept = line("tuner", own)
        assert isinstance(kept, dict) and kept["env_type"] == "gym"
        assert kept["metadata"] == {
            "answer": 3, "reference": "c", "scores": {"score": 4}, "provenance": ORIGIN,
        }  # fmt: skip
        alone = line("tuner", {"messages": CHAT[1:3]})
        assert isinstance(alone, dict)
        assert (alone["main_query"], alone["init_messages"]) == ("q1", [])
        assert alone["metadata"]["reference"] == "a1"
        assert left_out("tuner", [turn("assistant", "a")]) == "no question of a user"

    def test_openai(self) -> None:
        row = {"messages": CALLING, "tools": [TOOL]}
        assert line("openai", row) == row
        read = {**CALL, "function": {"name": "add", "arguments": {"a": 1}}}
        calling = [CALLING[0], {**CALLING[1], "tool_calls": [read]}, *CALLING[2:]]
        written = line("openai", {"messages": calling})
        assert isinstance(written, dict)
        (call,) = written["messages"][1]["tool_calls"]
        assert json.loads(call["function"]["arguments"]) == {"a": 1}
        calls_nobody = [CHAT[1], {**CHAT[2], "tool_calls": []}]
        assert line("openai", {"messages": calls_nobody}) == {"messages": CHAT[1:3]}
        nameless = [CALLING[0], {**CALLING[1], "tool_calls": [{"id": "1"}]}, *CALLING[2:]]
        assert left_out("openai", nameless) == "calls that name no function"
        assert left_out("openai", CHAT, tools="calculator") == "tools that are no list"

    def test_sharegpt(self) -> None:
        assert line("sharegpt", {"messages": CALLING, "tools": json.dumps([TOOL])}) == {
            "conversations": [
                {"from": "human", "value": "1 and 1?"},
                {"from": "function_call", "value": '[{"name":"add","arguments":{"a":1}}]'},
                {"from": "observation", "value": "2"},
                {"from": "gpt", "value": "Two."},
            ],
            "system": "",
            "tools": '[{"name":"add","parameters":{}}]',
        }
        chat = line("sharegpt", {"messages": CHAT})
        assert isinstance(chat, dict) and chat["system"] == "Be brief."
        said = [*CALLING[:1], {**CALLING[1], "content": "Let me see."}, *CALLING[2:]]
        assert left_out("sharegpt", said) == "text beside calls of tools"

    def test_alpaca(self) -> None:
        assert line("alpaca", {"messages": CHAT}) == {
            "instruction": "q2",
            "input": "",
            "output": "a2",
            "system": "Be brief.",
            "history": [["q1", "a1"]],
            "tools": "",
        }
        assert left_out("alpaca", CALLING) == "calls of tools"

    def test_requests(self) -> None:
        row = {"messages": CHAT, "tools": [TOOL]}
        assert line("openai-batch", row) == {
            "custom_id": "x#1",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"model": "m", "temperature": 0, "messages": CHAT[:-1], "tools": [TOOL]},
        }

    def test_pairs(self) -> None:
        rows = [{"messages": CHAT[:4], "response": text} for text in ("good", "bad")]
        pair_of = [*map(Exchange.answered, rows)]
        answers = [turn("assistant", "good")], [turn("assistant", "bad")]
        pair = {"prompt": CHAT[:4], "chosen": answers[0], "rejected": answers[1]}
        assert trl_pair(*pair_of) == pair
        ranked = sharegpt_pair(*pair_of)
        assert [each["value"] for each in ranked["conversations"]] == ["q1", "a1", "q2"]
        assert ranked["chosen"] == {"from": "gpt", "value": "good"}
        assert ranked["rejected"] == {"from": "gpt", "value": "bad"}


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
exchanges = st.lists(st.tuples(texts, texts), min_size=1, max_size=4)


def read_back(form: str, line: Any) -> tuple[str, list[tuple[str, str]]]:
    """System's text and exchanges, by what others say about the forms."""
    if form == "alpaca":
        return line["system"], [
            *((q, a) for q, a in line["history"]), (line["instruction"], line["output"])
        ]  # fmt: skip
    if form == "sharegpt":
        said = [each["value"] for each in line["conversations"]]
        return line["system"], [*zip(said[::2], said[1::2], strict=True)]
    if form == "tuner":
        begun = line["init_messages"] or [turn("user", line["main_query"])]
        turns = [*begun, turn("assistant", line["metadata"]["reference"])]
    elif form == "trl":
        turns = [*line["prompt"], *line["completion"]]
    else:
        turns = line["messages"] if form == "openai" else line
    system = turns.pop(0)["content"] if turns[0]["role"] == "system" else ""
    said = [each["content"] for each in turns]
    return system, [*zip(said[::2], said[1::2], strict=True)]


@pytest.mark.parametrize("form", [*FORMS, "tuner"])
@given(texts, exchanges)
def test_nothing_is_lost(form: str, system: str, said: list[tuple[str, str]]) -> None:
    turns = [turn("system", system)] if system else []
    for question, answer in said:
        turns += [turn("user", question), turn("assistant", answer)]
    written = orjson.loads(orjson.dumps(line(form, {"messages": turns})))
    if system and form in ("customjson", "mixture"):
        said = [(f"{system}\n\n{said[0][0]}", said[0][1]), *said[1:]]
        system = ""
    assert read_back(form, written) == (system, said)


SCORER = """
class Given:
    def score(self, item):
        return {"score": item["given"]}
"""
A, B = "a.jsonl", "deep/b.jsonl"
ONE, TWO = "configs/tasks/one.yaml", "configs/tasks/two.yaml"


def answers(prompt: str, *scores: int, **more: Any) -> list[Row]:
    return [
        {
            "id": prompt,
            "sample": at,
            "given": score,
            "text": prompt,
            "messages": [*ASKED, turn("user", f"{prompt}?")],
            "response": f"{prompt} answer {at}",
            **more,
        }
        for at, score in enumerate(scores)
    ]


@pytest.fixture(scope="module")
def rated(tmp_path_factory: pytest.TempPathFactory, empty_home: Path) -> Iterator[Project]:
    """Only to be read: two tasks, and samples of prompts with the scores that they were given."""
    made = Project(tmp_path_factory.mktemp("rated") / "project")
    scorer = {"model": None, "prompt": None, "scorer": "my_rules:Given"}
    made.task, made.inputs = "two", "data/other"
    made.write_task(scorer)
    made.write_input("a.jsonl", answers("p9", 2, extra="text", wide=0.5))
    made.task, made.inputs = "one", "data/in"
    made.write_task(scorer)
    (made.root / "my_rules.py").write_text(SCORER)
    rows = [*answers("p1", 1, 5, 5), *answers("p2", 3, 3), *answers("p3", 2, extra=7)]
    made.write_input(A, rows)
    many = [row for number in range(40) for row in answers(f"m{number}", 1, 2 + number % 2)]
    odd = {"id": "odd", "given": 1, "text": "x", "wide": 2**60}
    made.write_input(B, [*many, {**odd, "messages": CALLING}, {**odd, "id": "none"}])
    home = shutil.copytree(empty_home, made.root / "dagster_home")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("DAGSTER_HOME", str(home))
        for task in (ONE, TWO):
            ended = made.run("run-task", task)
            assert ended.code == 0, ended
        yield made
        made.close()


def export(project: Project, folder: Path, *options: str) -> Ended:
    ended = project.run("export", *options, "--output", str(folder))
    assert ended.code == 0, ended
    return ended


def loaded(folder: Path, cache: Path) -> datasets.DatasetDict:
    return datasets.load_dataset(str(folder), cache_dir=str(cache))  # type: ignore[return-value]


class TestExport:
    @pytest.mark.parametrize("form", sorted({*FORMS, "tuner"} - {"customjson", "mixture"}))
    def test_is_loaded_as_it_was_written(
        self, rated: Project, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        ended = export(rated, tmp_path / "out", ONE, "--file", A, "--to", form)
        assert "left out" not in ended.out
        name = "tasks.jsonl" if form == "tuner" else A
        lines = read_rows(tmp_path / "out" / name)
        assert [*loaded(tmp_path / "out", tmp_path / "cache")["train"]] == lines
        assert len(lines) == 6
        for at, (row, found) in enumerate(zip(rated.scores(A), lines, strict=True), 1):
            wanted = line(form, row)
            if form == "tuner":
                origin = {"task": "one", "file": A, "row": at, "id": row["id"]}
                scores = {"score": row["score"]}
                told = {"scores": scores, "provenance": {**origin, "sample": row["sample"]}}
                wanted["metadata"] |= told
                wanted["task_id"] = row["id"] + (f":{row['sample'] + 1}" if row["sample"] else "")
            assert found == wanted

    def test_tells_what_a_form_cannot_say(self, rated: Project, tmp_path: Path) -> None:
        ended = export(rated, tmp_path, ONE, "--to", "alpaca")
        assert "left out: 2 rows: calls of tools 1, no messages 1" in ended.out
        assert len(read_rows(tmp_path / B)) == 80
        record = orjson.loads((tmp_path / ORIGINS / "export.json").read_bytes())
        assert record["left_out"] == {"calls of tools": 1, "no messages": 1}
        assert record["written"] == {A: 6, B: 80} and record["rows"] == {"one/scores": 88}

    def test_says_where_each_row_came_from(self, rated: Project, tmp_path: Path) -> None:
        export(rated, tmp_path, ONE, TWO, "--to", "openai", "--into", "all", "--split", "0.3")
        files = {"one": rated.scores(A), "two": pq.read_table(
            rated.root / "data/two/scores/a.parquet").to_pylist()}  # fmt: skip
        seen, parts = 0, dict[str, set[str]]()
        for part in ("train", "validation"):
            origins = read_rows(tmp_path / ORIGINS / part / "all.jsonl.jsonl")
            lines = read_rows(tmp_path / part / "all.jsonl")
            for line, origin in zip(lines, origins, strict=True):
                parts.setdefault(origin["id"], set()).add(part)
                if origin["file"] == A:
                    row = files[origin["task"]][origin["row"] - 1]
                    assert line["messages"][-1]["content"] == row["response"]
                    assert (origin["id"], origin["sample"]) == (row["id"], row["sample"])
                    seen += 1
        assert seen == 7 and len(parts) == 45
        assert all(len(found) == 1 for found in parts.values()), "no record is in both"

    def test_of_customjson_is_a_mixture_in_its_order(self, rated: Project, tmp_path: Path) -> None:
        options = ("--to", "mixture", "--split", "0.2", "--repeat", "*/a.jsonl=2")
        export(rated, tmp_path, ONE, TWO, *options)
        manifest = orjson.loads((tmp_path / "mixture.json").read_bytes())
        train = [
            CustomJSON(str(tmp_path / each["file"]))
            for each in manifest["train"]
            for _ in range(each["repeat"])
        ]
        lines = [line for each in train for line in (*each,)]
        assert [each["file"] for each in manifest["train"]] == [
            "train/one/a.jsonl", "train/one/deep/b.jsonl", "train/two/a.jsonl",
        ]  # fmt: skip
        assert [each["repeat"] for each in manifest["train"]] == [2, 1, 2]
        assert {each["repeat"] for each in manifest["validation"]} == {1}
        held_out = sum(each["rows"] for each in manifest["validation"])
        assert sum(each["rows"] for each in manifest["train"]) + held_out == 87
        mixed = [*Mixture(train)]
        assert len(mixed) == len(lines) and mixed != lines
        assert sorted(map(orjson.dumps, mixed)) == sorted(map(orjson.dumps, lines))

    def test_of_tasks_names_its_files_for_both_readers(
        self, rated: Project, tmp_path: Path
    ) -> None:
        export(rated, tmp_path, ONE, "--to", "tuner", "--split", "0.5")
        config = yaml.safe_load((tmp_path / "tuner.yaml").read_text())
        for root, kind in (("astuner", "dataset_file"), ("ajet", "jsonl_dataset_file")):
            reader = config[root]["task_reader"]
            assert reader["type"] == kind
            paths = [reader[kind][split]["file_path"] for split in ("training", "validation")]
            tasks = [task for path in paths for task in read_rows(Path(path))]
            assert len(tasks) == 87
            fields = {"main_query": str, "init_messages": list, "task_id": str, "env_type": str}
            for task in tasks:
                assert all(isinstance(task[name], kind) for name, kind in fields.items())
                assert {*task} == {*fields, "metadata"}
            assert tasks[0]["metadata"]["scores"].keys() == {"score"}

    def test_is_added_to_the_data_sets_that_are_listed(
        self, rated: Project, tmp_path: Path
    ) -> None:
        (tmp_path / "dataset_info.json").write_text('{"mine": {"file_name": "x"}}')
        export(rated, tmp_path, ONE, "--file", A, "--to", "sharegpt")
        export(rated, tmp_path, ONE, "--to", "alpaca", "--into", "flat.jsonl")
        export(rated, tmp_path, ONE, "--to", "sharegpt", "--into", "mine")
        export(rated, tmp_path, ONE, "--to", "sharegpt", "--into", "mine", "--force")
        info = orjson.loads((tmp_path / "dataset_info.json").read_bytes())
        assert info.pop("mine_")["file_name"] == "mine.jsonl", "a name that another file has"
        assert [*info] == ["mine", "a", "flat"] and info["mine"] == {"file_name": "x"}
        assert info["flat"]["file_name"] == "flat.jsonl"
        assert set(info["flat"]["columns"].values()) == {*read_rows(tmp_path / "flat.jsonl")[0]}

    def test_of_requests_is_as_the_model_is_asked(self, rated: Project, tmp_path: Path) -> None:
        none = rated.run("export", ONE, "--to", "openai-batch")
        assert none.code == 2 and "one asks no model" in none.err
        export(rated, tmp_path, ONE, ONE, "--to", "openai-batch", "--model", "m", "--into", "r")
        requests = read_rows(tmp_path / "r.jsonl")
        ids = [request["custom_id"] for request in requests]
        assert ids[:2] == ["p1#0", "p1#1"] and len({*ids}) == len(ids) == 174
        turns = [*ASKED, turn("user", "p1?")]
        assert requests[0]["body"] == {"model": "m", "messages": turns}


class TestSamples:
    def test_the_best_is_taken_and_ties_are_told(self, rated: Project, tmp_path: Path) -> None:
        ended = export(rated, tmp_path, ONE, "--file", A, "--best", "score")
        assert "the best of each record: a tie, the first taken 2" in ended.err
        best = [(row["id"], row["sample"]) for row in read_rows(tmp_path / A)]
        assert best == [("p1", 1), ("p2", 0), ("p3", 0)]
        none = rated.run("export", ONE, "--best", "id")
        assert none.code == 1 and "--best id: no selected row has a number there" in none.err
        wrong = rated.run("export", ONE, "--best", "scor")
        assert wrong.code == 2 and "--best:scor: no row has this column" in wrong.err
        assert "did you mean score?" in wrong.err

    def test_pairs_are_the_best_and_the_worst(
        self, rated: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        ended = export(rated, tmp_path / "out", ONE, "--pairs", "score", "--to", "trl")
        assert "left out: 4 records: a single answer 3, a tie 1" in ended.out, ended.out
        (pair,) = read_rows(tmp_path / "out" / A)
        assert pair["prompt"] == [*ASKED, turn("user", "p1?")]
        assert pair["chosen"] == [turn("assistant", "p1 answer 1")]
        assert pair["rejected"] == [turn("assistant", "p1 answer 0")]
        assert len([*loaded(tmp_path / "out", tmp_path / "cache")["train"]]) == 41
        (origin,) = read_rows(tmp_path / "out" / ORIGINS / f"{A}.jsonl")
        assert (origin["row"], origin["rejected"]["row"]) == (2, 1)

    def test_pairs_are_apart_by_the_margin(self, rated: Project, tmp_path: Path) -> None:
        options = ("--pairs", "score", "--margin", "2", "--to", "sharegpt", "--file", B)
        ended = export(rated, tmp_path, ONE, *options)
        assert "less than the margin apart 20" in ended.out
        assert len(read_rows(tmp_path / B)) == 20
        info = orjson.loads((tmp_path / "dataset_info.json").read_bytes())["deep/b"]
        assert info["ranking"] is True and info["formatting"] == "sharegpt"
        assert set(info["columns"].values()) == {*read_rows(tmp_path / B)[0]}

    def test_pairs_answer_one_prompt(self, bare: Project, tmp_path: Path) -> None:
        """Decimal scores are as far apart as they look."""
        (bare.root / "my_rules.py").write_text(SCORER)
        bare.write_task({"model": None, "prompt": None, "scorer": "my_rules:Given"})
        near, other = answers("near", 0.1, 0.3), answers("other", 0.1, 0.3)
        other[1]["messages"] = [turn("user", "something else")]
        bare.write_input(A, [*near, *other])
        assert bare.run("run-task", TASK).code == 0
        ended = export(bare, tmp_path, TASK, "--pairs", "score", "--margin", "0.2", "--to", "trl")
        assert "left out: 1 records: answers to different prompts 1" in ended.out
        (pair,) = read_rows(tmp_path / A)
        assert pair["prompt"][-1] == turn("user", "near?")

    def test_requests_have_ids_of_their_own(self, bare: Project, tmp_path: Path) -> None:
        (bare.root / "my_rules.py").write_text(SCORER)
        bare.write_task({"model": None, "prompt": None, "scorer": "my_rules:Given"})
        bare.write_input(A, [{**answers(name, 1)[0], "sample": None} for name in ("x", "x", "x:2")])
        assert bare.run("run-task", TASK).code == 0
        export(bare, tmp_path, TASK, "--to", "openai-batch", "--model", "m")
        ids = [request["custom_id"] for request in read_rows(tmp_path / A)]
        assert ids == ["x", "x:2", "x:2:2"]


def test_the_example_of_the_page(tmp_path: Path) -> None:
    (example,) = write_examples(ROOT / "docs/training.md", tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, example], cwd=tmp_path, env=environment, capture_output=True, check=False
    )
    assert done.stdout.split() == [b"2", b"2"], done.stderr.decode()


class TestSeveralFiles:
    def test_have_one_schema(self, rated: Project, tmp_path: Path) -> None:
        export(rated, tmp_path, ONE, TWO, "--into", "all", "--format", "parquet")
        table = pq.read_table(tmp_path / "all.parquet")
        rows = table.to_pylist()
        assert len(rows) == 89
        by_id = {row["id"]: row for row in rows}
        extra = [by_id[name]["extra"] for name in ("p3", "p9", "p1")]
        assert [text and orjson.loads(text) for text in extra] == [7, "text", None]
        wide = [by_id[name]["wide"] for name in ("odd", "p9")]
        assert [orjson.loads(text) for text in wide] == [2**60, 0.5], "no digit is lost"
        assert by_id["odd"]["messages"][1]["tool_calls"][0]["id"] == "1"
        assert len(read_rows(tmp_path / ORIGINS / "all.parquet.jsonl")) == 89


def test_old_names_of_retries(rated: Project, tmp_path: Path) -> None:
    names = ("a.jsonl", "a_error.jsonl", "a_success_retry_1.jsonl")
    for name, text in zip(names, "123", strict=True):
        (tmp_path / name).write_text(text)
    export(rated, tmp_path, ONE, "--file", A, "--old-names", "--keep-retries")
    assert len(read_rows(tmp_path / A)) == 6 and not (tmp_path / "a_error.jsonl").exists()
    kept = {path.name: path.read_text() for path in tmp_path.glob("a_*.jsonl")}
    assert kept == {
        "a_success_retry_1.jsonl": "3",
        "a_success_retry_2.jsonl": "1",
        "a_error_retry_2.jsonl": "2",
    }


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--pairs", "score"], "add --to trl or sharegpt"),
        (["--pairs", "score", "--to", "trl", "--best", "score"], "leave out --best"),
        (["--margin", "1"], "add --pairs SCORE"),
        (["--to", "openai", "--failures"], "leave out --failures, or use --to openai-batch"),
        (["--to", "openai", "--format", "parquet"], "leave out --format"),
        (["--model", "m"], "add --to openai-batch"),
        (["--repeat", "a=2"], "add --to mixture"),
        (["--to", "mixture", "--repeat", "a=no"], "expected GLOB=N"),
        (["--to", "mixture", "--repeat", "none*=2"], "no file matches; expected a.jsonl"),
        (["--keep-retries"], "add --old-names"),
        (["--into", "../x"], "leads out of the folder"),
        ([TWO], "several tasks have no folder of their own"),
    ],
)
def test_options_that_contradict_each_other(rated: Project, options: list[str], told: str) -> None:
    ended = rated.run("export", ONE, *options)
    assert ended.code == 2 and told in ended.err, ended


def test_real_samples_of_a_judge(distilling: Project, tmp_path: Path) -> None:
    """Answers that a model gave several times to each conversation, and another one rated."""
    talks = [asked(f"talk {number}", id=f"t{number}") for number in range(3)]
    distilling.write_steps(
        generate_response=merged(GENERATE, {"input_path": distilling.inputs, "samples": 2}),
        scores=JUDGE,
    )
    distilling.write_input("talk.jsonl", talks)
    assert distilling.run("run-task", distilling.task_file).code == 0
    file = str(distilling.task_file)
    ended = export(distilling, tmp_path / "pairs", file, "--pairs", "score", "--to", "trl")
    assert "left out: 3 records: a tie 3" in ended.out, "the same model at temperature 0"
    export(distilling, tmp_path / "best", file, "--best", "score", "--to", "tuner")
    tasks = read_rows(tmp_path / "best/tasks.jsonl")
    assert [task["task_id"] for task in tasks] == ["t0", "t1", "t2"]
    assert tasks[0]["metadata"]["scores"].keys() == {"score"}
    export(distilling, tmp_path / "asked", file, "--to", "openai-batch")
    request = read_rows(tmp_path / "asked/talk.jsonl")[0]
    assert request["body"] == {
        "model": "rehearsal-rater-1", "temperature": 0, "messages": talks[0]["messages"],
    }  # fmt: skip
