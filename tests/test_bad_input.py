"""Each kind of bad input: a message that names file and place, and nothing lost."""

from __future__ import annotations

import gzip
import io
import os
import re
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from project import GREEN, RED, TASK, Project, lines, some_rows

from modelcall_assets.cli.plan import prepared_rows
from modelcall_assets.cli.terminal import shown
from modelcall_assets.llm.dialogue import ChatRequest
from modelcall_assets.records import decode_key, encode_key
from modelcall_assets.rehearsal import RehearsalServer, serve_in_thread
from modelcall_assets.stages.asking import AskingStage
from modelcall_assets.storage.listing import stat_file

MODEL, PROMPT = "configs/models/rehearsal.yaml", "configs/prompts/quality.yaml"
GOOD = "good.jsonl"
FINE = {"id": "fine", "text": "a fine text"}


@pytest.fixture
def project(bare: Project) -> Project:
    """With one good file."""
    bare.write_input(GOOD, some_rows(3, "good"))
    return bare


class File(NamedTuple):
    """A bad file; what is told of it; and its rows, as far as they are published."""

    name: str
    content: bytes
    told: Sequence[str]
    rows: Sequence[tuple[str, str | None]] | None
    code: int = 1


def parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as out:
        out.write(content)
    return sink.getvalue().to_pybytes()


OK, BAD, NO_TEXT = ("success", None), ("error", "bad_line"), ("error", "missing_input")
FILES = {
    "a malformed line": File(
        "bad.jsonl",
        lines(FINE, b'{"id": "torn", "text": "cut he', FINE | {"id": "last"}),
        [
            "bad.jsonl: 1 of 3 rows failed (33.33%), more than max_failure_rate 5.00%: bad_line 1",
            "The first: line 2, column 31: ",
            '{"id": "torn", "text": "cut he',
            "rejected: bad.jsonl: 1 of 3 rows failed",
        ],
        [OK, BAD, OK],
    ),
    "binary": File(
        "bad.jsonl",
        bytes(range(256)) * 2,
        ["/bad.jsonl: none of 3 lines can be read; the first: line 1, column 1: "],
        None,
    ),
    "binary in one line": File(
        "bad.jsonl",
        b"\x89PNG\r\x1a\x00" + b"\xff\x00\xfe" * 10_000,
        ["/bad.jsonl: none of 1 lines can be read", "line 1, column 1"],
        None,
    ),
    "no valid line": File(
        "bad.jsonl",
        b'[1]\n"text"\nid,text\n',
        ["/bad.jsonl: none of 3 lines can be read", "the first: line 1: not an object but a list"],
        None,
    ),
    "UTF-16": File(
        "bad.jsonl",
        '{"id": 1, "text": "x"}\n'.encode("utf-16"),
        [
            "/bad.jsonl: none of 2 lines can be read",
            "the first: line 1, column 1: UTF-16 by its first bytes, set `encoding`",
        ],
        None,
    ),
    "empty JSONL": File(
        "bad.jsonl", b"", ["/bad.jsonl: there is no line in this file; fill it or"], None
    ),
    "blank lines only": File(
        "bad.jsonl", b"\n  \n", ["/bad.jsonl: there is no line in this file; fill it or"], None
    ),
    "empty Parquet": File(
        "bad.parquet",
        b"",
        ["/bad.parquet: not a readable Parquet file", "write it again or leave it out"],
        None,
    ),
    "a compressed file that is cut off": File(
        "bad.jsonl.gz",
        gzip.compress(b"".join(b'{"id": %d, "text": "x"}\n' % n for n in range(900)))[:-1],
        [
            "/bad.jsonl.gz: damaged or cut off after line ",
            "as gzip says: Compressed file ended before the end-of-stream marker was reached",
        ],
        None,
    ),
    "Parquet that is compressed once more": File(
        "bad.parquet.zst",
        zstd(parquet([FINE])),
        ["/bad.parquet.zst: a file of Parquet inside zstd, which can only be read from its beg"],
        None,
    ),
    "Parquet by another name": File("bad.jsonl", parquet([FINE, FINE]), [], [OK] * 2, code=0),
    "lines by another name": File("bad.parquet", lines(FINE, FINE), [], [OK] * 2, code=0),
    "zstd by another name": File("bad.json", zstd(lines(FINE, FINE)), [], [OK] * 2, code=0),
    "a JSON array": File(
        "bad.json",
        b'\n[{"id": 1}]\n',
        ["/bad.json: one JSON array; write it as one object per line"],
        None,
    ),
    "no Parquet at all": File(
        "bad.parquet", b"PAR1 no", ["/bad.parquet: not a readable Parquet file"], None
    ),
    "the input key is missing in some rows": File(
        "bad.jsonl",
        lines(FINE, {"id": "without", "txt": "x"}, {"id": "null", "text": None}),
        [
            "bad.jsonl: 2 of 3 rows failed",
            "missing_input 2. The first: input column 'text' is absent (record without, row",
        ],
        [OK, NO_TEXT, NO_TEXT],
    ),
    "the input key is missing in all rows": File(
        "bad.jsonl",
        lines({"id": 1, "txt": "x"}, {"id": 2, "txt": "x"}),
        [
            "bad.jsonl: 2 of 2 rows failed (100.00%)",
            "missing_input 2. The first: input column 'text' is absent (record 1, row",
        ],
        [NO_TEXT] * 2,
    ),
    "duplicate ids": File(
        "bad.jsonl",
        lines(FINE, FINE | {"text": "another"}, FINE),
        ["warning: bad.jsonl: 2 rows repeat the id of another: fine, fine"],
        [OK] * 3,
        code=0,
    ),
}


class TestFiles:
    @pytest.mark.parametrize("bad", FILES.values(), ids=FILES)
    def test_a_bad_file_says_so_and_its_neighbour_is_rated(
        self, project: Project, server: RehearsalServer, bad: File
    ) -> None:
        path = project.input_folder / bad.name
        path.write_bytes(bad.content)
        ended = project.run("run-task", TASK)
        assert ended.code == bad.code, ended
        for part in bad.told:
            assert part in ended.told
        stage = "raw" if bad.rows is None else "scores"
        ending = GREEN if bad.code == 0 else RED
        assert project.statuses(stage) == {GOOD: GREEN, bad.name: ending}
        assert [row["api_status"] for row in project.scores(GOOD)] == ["success"] * 3
        sent = server.stats()["requests"]
        assert sent == 3 + (list(bad.rows or ()).count(OK))
        assert path.read_bytes() == bad.content
        if bad.rows is None:
            assert not project.output(bad.name).exists()
        else:
            is_red = bad.code != 0
            assert project.output(bad.name).exists() != is_red
            rows = project.scores(bad.name)
            assert [(row["api_status"], row["api_fail_reason"]) for row in rows] == bad.rows
            assert project.manifest(bad.name, rejected=is_red).accepted == (bad.code == 0)
        if bad.code == 0:
            return
        path.unlink()
        project.write_input(bad.name, [FINE, FINE | {"id": "last"}])
        assert project.run("run-task", TASK).code == 0, "mended"
        assert [row["api_status"] for row in project.scores(bad.name)] == ["success"] * 2

    def test_what_a_bad_line_held_is_in_its_row(self, project: Project) -> None:
        raw = b'{"id": 7, "text": "\xff\xfe torn'
        project.write_input("bad.jsonl", [FINE, b"", raw, b"x" * 30_000])
        project.run("run-task", TASK)
        _, torn, long = project.scores("bad.jsonl")
        assert torn["api_fail_detail"].startswith("line 3, column ")
        assert torn["api_fail_detail"].endswith(raw.decode(errors="replace"))
        assert "20000 more characters" in long["api_fail_detail"]

    def test_a_few_bad_rows_are_a_warning(self, project: Project) -> None:
        project.write_input("bad.jsonl", [*some_rows(30), b"{torn"])
        ended = project.run("run-task", TASK)
        assert ended.code == 0
        assert "34 rows, 33 succeeded, 1 failed (bad_line 1)" in ended.out
        warning = "warning: bad.jsonl: 1 of 31 lines are not JSON objects; the first: line 31, "
        assert warning in ended.out

    def test_a_bad_line_stops_a_file_that_wants_that(
        self, project: Project, server: RehearsalServer
    ) -> None:
        project.write_task({"data": {"on_bad_line": "fail"}})
        path = project.write_input("bad.jsonl", [FINE, b"{torn"])
        ended = project.run("run-task", TASK)
        assert ended.code == 1
        told = "/bad.jsonl: line 2, column 2: "
        assert told in ended.err and "correct it, or write `on_bad_line: keep`" in ended.err
        assert project.statuses("raw") == {GOOD: GREEN, "bad.jsonl": RED}
        assert not project.output("bad.jsonl").exists()
        assert server.stats()["requests"] == 3
        assert told in project.run("plan", TASK).err
        path.write_bytes(lines(FINE))
        assert project.run("run-task", TASK).code == 0, "mended"

    def test_another_encoding_is_read_and_makes_old_results_stale(
        self, project: Project, server: RehearsalServer
    ) -> None:
        (project.input_folder / GOOD).unlink()
        path = project.input_folder / "bad.jsonl"
        path.write_bytes('{"id": 1, "text": "中文"}\n'.encode("gb18030") + b'{"text": "\xff"}\n')
        project.write_task({"max_failure_rate": 1.0})
        assert "2 failed (bad_line 2)" in project.run("run-task", TASK).out
        project.write_task({"max_failure_rate": 1.0, "data": {"encoding": "gb18030"}})
        assert "1 succeeded, 1 failed (bad_line 1)" in project.run("run-task", TASK).out
        first, second = project.scores("bad.jsonl")
        assert (first["text"], first["api_status"]) == ("中文", "success")
        assert second["api_fail_detail"].startswith("line 2, column 11: not gb18030; the line ")
        assert "nothing to do" in project.run("run-task", TASK).out
        assert server.stats()["requests"] == 1
        exported = project.run("export", TASK, "--stage", "raw", "--successes", "--output", "copy")
        assert exported.code == 0, exported
        (copy,) = (project.root / "copy").glob("*.jsonl")
        assert orjson.loads(copy.read_bytes()) == {"id": 1, "text": "中文"}

    @pytest.mark.parametrize("preprocesses", [False, True], ids=["as it is", "preprocessed"])
    def test_an_empty_file_is_accepted_where_the_task_says_so(
        self, project: Project, server: RehearsalServer, preprocesses: bool
    ) -> None:
        path = project.write_input("empty.jsonl", [])
        (project.input_folder / "blank.jsonl.gz").write_bytes(gzip.compress(b"\n \n"))
        data = {"on_empty_file": "accept"}
        pre = {"enabled": preprocesses, "output_folder": "data/pre"}
        project.write_task({"data": data, "preprocess": pre})
        assert project.run("plan", TASK).code == 0
        ended = project.run("run-task", TASK)
        assert ended.code == 0, ended
        assert "3 of 3 files scored: 3 rows, 3 succeeded, 0 failed" in ended.out
        assert set(project.statuses().values()) == {GREEN}
        assert project.scores("empty.jsonl") == []
        assert "nothing to do" in project.run("run-task", TASK).out
        assert project.run("export", TASK, "--output", "out").code == 0
        project.write_input(path.name, [FINE])
        assert project.run("run-task", TASK).code == 0, "filled later"
        assert [row["api_status"] for row in project.scores("empty.jsonl")] == ["success"]
        assert server.stats()["requests"] == 4

    def test_what_is_no_file_or_cannot_be_opened(
        self, project: Project, server: RehearsalServer
    ) -> None:
        folder = project.input_folder
        (folder / "folder.jsonl").mkdir()
        (folder / "loop").symlink_to(folder, target_is_directory=True)
        (folder / "itself.jsonl").symlink_to("itself.jsonl")
        os.mkfifo(folder / "pipe.jsonl")
        for arguments in (("check",), ("plan", TASK), ("run-task", TASK)):
            ended = project.run(*arguments)
            assert ended.code == 0, ended
        assert project.statuses() == {GOOD: GREEN}
        assert server.stats()["requests"] == 3

    def test_bytes_go_through_and_are_not_asked_about(
        self, project: Project, server: RehearsalServer
    ) -> None:
        """Text in a binary column is text."""
        rows = [
            {"id": b"\x00\xff", "text": b"a fine text", "png": b"\x89PNG"},
            {"id": b"second", "text": b"\xff\xfe", "png": None},
        ]
        project.write_task({"max_failure_rate": 1.0})
        (project.input_folder / "bad.parquet").write_bytes(parquet(rows))
        assert project.run("run-task", TASK).code == 0
        first, second = project.scores("bad.parquet")
        assert (first["png"], first["api_status"]) == (b"\x89PNG", "success")
        assert [row["api_record_id"] for row in (first, second)] == ["00ff", "second"]
        assert second["api_fail_detail"] == (
            "the row has bytes that are no text in column 'text', which the prompt asks for"
        )
        assert pq.read_schema(project.output("bad.parquet")).field("png").type == pa.binary()
        assert server.stats()["requests"] == 4
        for stage, good in (("raw", 2), ("scores", 1)):
            arguments = ("--stage", stage, "--successes", "--output", stage)
            assert project.run("export", TASK, *arguments).code == 0
            assert len((project.root / stage / "bad.jsonl").read_bytes().splitlines()) == good
        assert project.run("report", TASK, "--stage", "raw").code == 0
        assert project.run("report", "data/in/bad.parquet").code == 0

    @pytest.mark.parametrize("name", ["empty JSONL", "empty Parquet", "binary"])
    def test_plan_shows_the_other_files(self, project: Project, name: str) -> None:
        bad = FILES[name]
        (project.input_folder / bad.name).write_bytes(bad.content)
        ended = project.run("plan", TASK)
        assert "good.jsonl" in ended.out
        assert ("not a readable Parquet file" in ended.err) == (ended.code == 1)
        assert ended.code == (1 if bad.name.endswith("parquet") else 0)

    def test_a_row_that_preprocessing_fails_on_breaks_no_preview(self, project: Project) -> None:
        project.write_task({"preprocess": {"enabled": True, "output_folder": "data/pre"}})
        project.write_input(GOOD, [{"id": 1, "text": 17}, FINE])
        assert (
            "error: preprocess_error: TypeError: the text is not a string"
            in project.run("try", TASK).out
        )
        assert re.search(r"1 files *│ *│ *2 ", project.run("plan", TASK).out)

    def test_columns_that_preprocessing_names_and_no_row_has(self, project: Project) -> None:
        mapping = {
            "title": "headline",
            "both": {"type": "combine", "fields": ["text", "bodi"]},
            "lang": {"type": "constant", "value": "en"},
        }
        computed = {"n": {"type": "text_length", "source_field": "tittle"}}
        pre = {"enabled": True, "output_folder": "data/pre", "field_mapping": mapping}
        project.write_task(
            {"preprocess": {**pre, "transformations": {"computed_fields": computed}}}
        )
        project.write_input(GOOD, [FINE | {"body": "x"}])
        absent = {
            "field_mapping.title": "headline",
            "field_mapping.both.fields[1]": "bodi",
            "transformations.computed_fields.n.source_field": "tittle",
        }
        checked, ended = project.run("check"), project.run("run-task", TASK)
        assert (checked.code, ended.code) == (0, 0)
        for place, column in absent.items():
            assert f"{TASK}:preprocess.{place}: no column {column} in the first 1 rows of" in (
                checked.out
            )
            told = f"good.jsonl: no row has the column '{column}', which preprocess.{place} names"
            assert told in ended.out
        assert "did you mean body?" in checked.out
        assert ended.out.count("no row has the column") == len(absent)

    def test_plan_looks_at_rows_of_the_whole_file(self, project: Project) -> None:
        """Long texts at the head, and a file of columns of which only the end is read to count."""
        rows = [{"id": n, "text": "word " * (1000 if n < 50 else 10)} for n in range(1000)]
        (project.input_folder / GOOD).unlink()
        for name in ("x.jsonl", "y.parquet"):
            project.write_input(name, rows)
        tokens = [
            int(line.split("│")[5].replace(",", ""))
            for line in project.run("plan", TASK).out.split("\n")
            if ".jsonl" in line or ".parquet" in line
        ]
        exact = 50 * 1000 + 950 * 10 + 1000 * 30
        assert all(0.7 < each / exact < 1.3 for each in tokens), tokens


class Setup(NamedTuple):
    """A mistake in the project's files or its environment, and what is told of it."""

    prepare: Callable[[Project, pytest.MonkeyPatch], object]
    told: Sequence[str]
    check_code: int = 1


SETUPS = {
    "unknown key in the task": Setup(
        lambda project, _: project.write_task({"data": {"input_foldr": "x"}}),
        [f"{TASK}:data.input_foldr: unknown key; did you mean input_folder?"],
    ),
    "unknown key in the model": Setup(
        lambda project, _: project.write_model({"client_config": {"time_out": 3}}),
        [f"{MODEL}:client_config.time_out: unknown key; did you mean timeout?"],
    ),
    "unknown key in the prompt": Setup(
        lambda project, _: project.write_prompt({"prompt_template": {"prompt": "x"}}),
        [f"{PROMPT}:prompt_template.prompt: unknown key"],
    ),
    "a variable that is not set": Setup(
        lambda _, monkeypatch: monkeypatch.delenv("REHEARSAL_BASE_URL"),
        [f"{MODEL}:client_config.base_url: variable REHEARSAL_BASE_URL is not set"],
        check_code=0,
    ),
    "a variable of a folder that is not set": Setup(
        lambda project, _: project.write_task({"data": {"output_folder": "${NO_SUCH}/out"}}),
        [f"{TASK}:data.output_folder: variable NO_SUCH is not set"],
    ),
    "a prompt that reaches into objects": Setup(
        lambda project, _: project.write_prompt(
            {"prompt_template": {"prompt_text": "Judge {text.__class__} {text}"}}
        ),
        [
            f"{PROMPT}:prompt_template.prompt_text: not a placeholder: {{text.__class__}}",
            "expected {column_name} or {column.key}",
        ],
    ),
    "a prompt that indexes": Setup(
        lambda project, _: project.write_prompt(
            {"prompt_template": {"prompt_text": "Judge {text[0]}{text!r}{text:>9}"}}
        ),
        ["not a placeholder: {text[0]}, {text!r}, {text:>9}"],
    ),
    "an output folder that is a file": Setup(
        lambda project, _: project.write_task({"data": {"output_folder": TASK}}),
        [f"{TASK}:data.output_folder: a file stands there; expected a folder; found {TASK}"],
    ),
    "a journal folder below a file": Setup(
        lambda project, _: project.write_task({"data": {"journal_folder": f"{TASK}/a/b"}}),
        [f"{TASK}:data.journal_folder: a file stands there; expected a folder; found {TASK}"],
    ),
    "an output folder that is a link to nothing": Setup(
        lambda project, _: (
            (project.root / "out").symlink_to("nowhere"),
            project.write_task({"data": {"output_folder": "./out/scores"}}),
        ),
        [f"{TASK}:data.output_folder: a link to nothing stands there; expected a folder; found"],
    ),
    "two inputs with one output": Setup(
        lambda project, _: project.write_input("good.parquet", some_rows(1)),
        [
            f"{TASK}:data.input_folder: 'good.jsonl' and 'good.parquet' would both be written to "
            "'good.parquet'; rename or move one of them"
        ],
    ),
}


class TestSetUp:
    @pytest.mark.parametrize("mistake", SETUPS.values(), ids=SETUPS)
    def test_check_and_run_task_name_file_and_field_and_nothing_runs(
        self,
        project: Project,
        server: RehearsalServer,
        monkeypatch: pytest.MonkeyPatch,
        mistake: Setup,
    ) -> None:
        mistake.prepare(project, monkeypatch)
        before = sorted((project.root / "data").rglob("*"))
        for arguments, code in (("check", TASK), mistake.check_code), (("run-task", TASK), 2):
            ended = project.run(*arguments)
            assert ended.code == code, ended
            for part in mistake.told:
                assert part in ended.told
        assert server.stats()["requests"] == 0
        assert sorted((project.root / "data").rglob("*")) == before
        assert project.instance.get_runs() == []

    def test_a_folder_that_cannot_be_written_to(self, project: Project) -> None:
        folder = project.root / "locked"
        folder.mkdir(mode=0o555)
        if os.access(folder, os.W_OK):
            pytest.skip("this user may write anywhere")
        project.write_task({"data": {"output_folder": "./locked/scores"}})
        told = f"{TASK}:data.output_folder: cannot be written to; found {folder}; choose another"
        for arguments, code in (("check", TASK), 0), (("run-task", TASK), 2):
            ended = project.run(*arguments)
            assert ended.code == code, ended
            assert told in ended.told

    @pytest.mark.parametrize("home", [TASK, f"{TASK}/below", "dangling", "/dev/null/home"])
    def test_a_home_that_can_be_none(
        self, project: Project, monkeypatch: pytest.MonkeyPatch, home: str
    ) -> None:
        (project.root / "dangling").symlink_to("nowhere")
        place = str(project.root / home)
        monkeypatch.setenv("DAGSTER_HOME", place)
        ended = project.run("run-task", TASK)
        assert ended.code == 2, ended
        assert "error: environment:DAGSTER_HOME: Dagster cannot keep its runs there: " in ended.err
        assert f"found {place}; name another folder" in ended.err


def asked_of(project: Project, name: str) -> list[str]:
    """What the rows of a file asked, all of which were rated."""
    steps = project.steps()
    asking = steps.find(AskingStage)
    assert asking is not None
    found = prepared_rows(steps, stat_file(project.input_folder / name), 9)
    asks = [asking.ask(row) for row in found if isinstance(row, dict)]
    rows = project.scores(name)
    assert [row["api_status"] for row in rows] == ["success"] * len(rows)
    requests = [asked for asked in asks if isinstance(asked, ChatRequest)]
    assert [row["api_request_key"] for row in rows] == [asked.key for asked in requests]
    return [asked.messages[-1]["content"] for asked in requests]


class TestPrompts:
    def test_a_column_that_no_row_has(self, project: Project, server: RehearsalServer) -> None:
        project.write_prompt({"prompt_template": {"prompt_text": "Judge {text} in {lang}"}})
        checked = project.run("check")
        assert checked.code == 0
        assert (
            f"warning: {TASK}:data: none of the first 3 rows of good.jsonl can be scored: the row "
            "has no value in column 'lang', which the prompt asks for; found the columns id, text"
        ) in checked.out
        ended = project.run("run-task", TASK)
        assert ended.code == 1
        assert "missing_input 3. The first: the row has no value in column 'lang'" in ended.err
        rows = project.scores(GOOD)
        assert {row["api_fail_reason"] for row in rows} == {"missing_input"}
        assert all("column 'lang'" in row["api_fail_detail"] for row in rows)
        assert server.stats()["requests"] == 0

    @pytest.mark.parametrize("stage", ["raw", "preprocessed"])
    @pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
    def test_values_inside_columns_and_what_is_no_text(
        self, project: Project, suffix: str, stage: str
    ) -> None:
        """Objects, lists and truth values are JSON; a path leads into them."""
        shown = "{meta.lang}|{meta.of.1.n}|{meta}|{tags}|{ok}|{n}|{x}|{a.b}|{text}"
        project.write_prompt({"prompt_template": {"prompt_text": shown}})
        if stage == "preprocessed":
            project.write_task({"preprocess": {"enabled": True, "output_folder": "data/pre"}})
        (project.input_folder / GOOD).unlink()
        meta = {"lang": "中", "of": [{"n": 1}, {"n": 2}]}
        row = {**FINE, "meta": meta, "tags": ["a", "b"], "ok": True, "n": 7, "x": 1.5, "a.b": "c"}
        path = project.input_folder / f"x{suffix}"
        path.write_bytes(parquet([row]) if suffix == ".parquet" else lines(row))
        assert "0 errors, 0 warnings" in project.run("check").out
        assert project.run("run-task", TASK).code == 0
        as_json = '{"lang":"中","of":[{"n":1},{"n":2}]}'
        expected = f'中|2|{as_json}|["a","b"]|true|7|1.5|c|a fine text'
        assert asked_of(project, path.name) == [expected]

    def test_an_input_key_inside_a_column(self, project: Project) -> None:
        project.write_task({"data": {"input_key": "doc.body", "prompt_format_key": "text"}})
        project.write_input(GOOD, [{"id": 1, "doc": {"body": "inside"}}])
        project.write_prompt({"prompt_template": {"prompt_text": "Judge {text}"}})
        assert "0 errors, 0 warnings" in project.run("check").out
        assert project.run("run-task", TASK).code == 0
        assert asked_of(project, GOOD) == ["Judge inside"]

    def test_a_path_that_leads_nowhere(self, project: Project) -> None:
        project.write_prompt({"prompt_template": {"prompt_text": "Judge {text} {id.of.that}"}})
        assert "the row has no value in column 'id.of.that', which the prompt asks for" in (
            project.run("check").out
        )

    def test_a_column_that_some_rows_have_is_no_warning(self, project: Project) -> None:
        project.write_prompt({"prompt_template": {"prompt_text": "Judge {text} in {lang}"}})
        project.write_input(GOOD, [FINE, FINE | {"lang": "en"}])
        assert "0 errors, 0 warnings" in project.run("check").out
        project.run("run-task", TASK)
        assert [row["api_fail_reason"] for row in project.scores(GOOD)] == ["missing_input", None]

    def test_an_input_key_that_no_row_has(self, project: Project) -> None:
        project.write_task({"data": {"input_key": "content", "prompt_format_key": "text"}})
        checked = project.run("check")
        assert (
            "none of the first 3 rows of good.jsonl can be scored: input column 'content' is"
            in (checked.out)
        )
        assert "found the columns id, text; compare data.input_key and the" in checked.out

    @pytest.mark.parametrize(
        ("prompt", "have"),
        [
            ("Judge {code}", "found code; name one of those, or write {text} in the prompt"),
            ("Judge this", "found a prompt without placeholders"),
        ],
    )
    def test_a_prompt_that_does_not_send_the_text_is_a_warning(
        self, project: Project, prompt: str, have: str
    ) -> None:
        project.write_prompt({"prompt_template": {"prompt_text": prompt}})
        project.write_input(GOOD, [FINE | {"code": "x"}])
        ended = project.run("check")
        wrong = "no placeholder of the prompt, so that the column text is not sent; "
        assert f"warning: {TASK}:data.prompt_format_key: {wrong}{have}" in ended.out
        assert ended.code == 0
        assert project.run("check", "--strict").code == 1
        assert wrong in project.run("run-task", TASK).err

    @pytest.mark.parametrize("keys", [{"input_key": "body"}, {"prompt_format_key": "body"}])
    def test_either_of_the_two_keys_is_enough(self, project: Project, keys: dict[str, str]) -> None:
        project.write_task({"data": keys})
        project.write_prompt({"prompt_template": {"prompt_text": "Judge {body} and {{text}}"}})
        project.write_input(GOOD, [FINE | {"body": "x"}])
        assert "0 errors, 0 warnings" in project.run("check").out

    @pytest.mark.parametrize("name", ["empty.jsonl", "empty.parquet"])
    def test_check_says_what_it_cannot_read_or_goes_on(self, project: Project, name: str) -> None:
        (project.input_folder / name).write_bytes(b"")
        ended = project.run("check")
        assert ended.code == 0
        assert ("not a readable Parquet file" in ended.out) == name.endswith("parquet")


class TestEndpoints:
    def test_that_nobody_listens_at_fail_each_row_and_stop_a_long_run(
        self, project: Project, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A few rows: each fails by itself. Many: the run stops, and nothing is published."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        monkeypatch.setenv("REHEARSAL_BASE_URL", url)
        project.write_model({"client_config": {"max_retries": 0}})
        few = project.run("run-task", TASK)
        assert few.code == 1
        assert "3 of 3 rows failed" in few.err and "connect 3. The first: " in few.err
        assert project.statuses() == {GOOD: RED}
        project.rejected(GOOD).unlink()
        project.write_input(GOOD, some_rows(40))
        many = project.run("run-task", TASK)
        assert many.code == 1
        assert f"{url.removeprefix('http://')}: 25 records in a row failed" in many.err
        assert "connect: " in many.err and "run the task again" in many.err
        assert not project.output(GOOD).exists()
        with serve_in_thread() as back:
            monkeypatch.setenv("REHEARSAL_BASE_URL", back.base_url)
            assert project.run("run-task", TASK).code == 0
            assert back.stats()["requests"] == 40
        assert [row["api_status"] for row in project.scores(GOOD)] == ["success"] * 40

    @pytest.mark.parametrize(
        ("model", "told"),
        [
            ({"client_config": {"api_key": "${KEY}"}}, "HTTP 401"),
            ({"chat_config": {"model": "gpt-none"}}, "HTTP 404: the rehearsal server has no model"),
        ],
        ids=["wrong key", "unknown model"],
    )
    def test_a_refusal_costs_one_request_and_says_what_to_check(
        self, project: Project, monkeypatch: pytest.MonkeyPatch, model: dict[str, Any], told: str
    ) -> None:
        project.write_model(model)
        monkeypatch.setenv("KEY", "sk-wrong-secret")
        with serve_in_thread(api_key="sk-right" if told == "HTTP 401" else None) as guarded:
            monkeypatch.setenv("REHEARSAL_BASE_URL", guarded.base_url)
            for command in ("run-task", "try"):
                ended = project.run(command, TASK)
                assert ended.code == 1
                assert f"refuses every request: {told}" in ended.err
                assert "Check api_key, model and base_url in the model file" in ended.err
                assert "sk-wrong-secret" not in ended.told
            assert guarded.stats()["requests"] == 2, "one each"
        assert project.statuses() == {GOOD: RED}
        assert not project.output(GOOD).exists()


NAMES = [
    "a,comma.jsonl",
    "a space.jsonl",
    " leading and trailing .jsonl",
    "single'quote.jsonl",
    'double"quote.jsonl',
    "100%.jsonl",
    "percent%2Cencoded.jsonl",
    "a|pipe.jsonl",
    "new\nline.jsonl",
    "dots...dots.jsonl",
    "[red]markup[/].jsonl",
    "star*?.jsonl",
    "中文/数据,文件 一.jsonl",
    "émoji 🎉.jsonl",
    "back\\slash.jsonl",
    "UPPER.JSONL",
]


class TestFileNames:
    def test_all_of_them_are_rated_and_lie_where_they_should(
        self, project: Project, server: RehearsalServer
    ) -> None:
        (project.input_folder / GOOD).unlink()
        for name in NAMES:
            project.write_input(name, [{"id": name.encode(errors="replace").decode(), **FINE}])
        planned = project.run("plan", TASK)
        assert planned.code == 0 and "[red]markup[/].jsonl" in planned.out
        assert project.run("check").code == 0
        ended = project.run("run-task", TASK)
        assert ended.code == 0, ended
        assert f"{len(NAMES)} of {len(NAMES)} files scored" in ended.out
        assert project.statuses() == dict.fromkeys(NAMES, GREEN)
        for name in NAMES:
            assert decode_key(encode_key(name)) == name
            (row,) = project.scores(name)
            assert row["api_status"] == "success"
        folder = project.root / "data/rate/scores"
        outputs = [path for path in folder.rglob("*.parquet") if ".modelcall" not in path.parts]
        expected = {folder / Path(name).with_suffix(".parquet") for name in NAMES}
        assert set(outputs) == expected
        again = project.run("run-task", TASK)
        assert "nothing to do" in again.out
        assert server.stats()["requests"] == len(NAMES)

    def test_messages_name_them_and_patterns_find_them(self, project: Project) -> None:
        for name in NAMES:
            project.write_input(name, [b"{torn", FINE])
        ended = project.run("run-task", TASK)
        assert ended.code == 1
        assert ended.out.count("  rejected: ") == len(NAMES)
        for name in NAMES:
            assert f"  rejected: {shown(name)}: 1 of 2 rows failed" in ended.out
        assert ended.err.count("1 of 2 rows failed (50.00%)") == 1, "what they share, once"
        assert f"the same of {len(NAMES) - 1} more files, such as" in ended.err
        assert "0 of 1 file scored" in project.run("run-task", TASK, "--file", "a,comma.jsonl").out

    @pytest.mark.parametrize(
        ("name", "told"),
        [
            ("长" * 83 + ".jsonl", "the name is longer than 250 bytes; rename the file"),
            ("," * 90 + ".jsonl", "the name is longer than 250 bytes; rename the file"),
            ("not utf-8 \udcff.jsonl", "%FF.jsonl: the name is not UTF-8; rename the file"),
        ],
    )
    def test_a_name_that_no_output_can_have(self, project: Project, name: str, told: str) -> None:
        project.write_input(name, [FINE])
        planned = project.run("plan", TASK)
        assert planned.code == 1 and told in planned.err
        ended = project.run("run-task", TASK)
        assert ended.code == 1
        assert told in ended.err and shown(name) in ended.err
        assert project.statuses() == {GOOD: GREEN, name: None}
        assert "nothing to do" not in project.run("run-task", TASK).out


class TestOneHugeLine:
    @pytest.mark.timeout(120)
    def test_50_mb_go_through_raw_and_scores(self, project: Project) -> None:
        huge = 50 << 20
        path = project.input_folder / GOOD
        with path.open("wb") as file:
            file.write(lines(FINE))
            file.write(b'{"id": "huge", "text": "' + b"words and " * (huge // 10) + b'"}\n')
            file.write(b'{"id": "torn", "text": "' + b"x" * huge + b"\n")
            file.write(lines(FINE | {"id": "last"}))
        project.write_task({"max_failure_rate": 0.5})
        process = project.start("run-task", TASK, "--file", GOOD)
        _, status, used = os.wait4(process.pid, 0)
        assert process.stdout is not None and process.stderr is not None
        out, err = process.stdout.read(), process.stderr.read()
        process.stdout.close()
        process.stderr.close()
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0, out + err
        assert used.ru_maxrss < 2 << 20, "in KiB"
        rows = project.scores(GOOD)
        assert [row["api_fail_reason"] for row in rows] == [None, None, "bad_line", None]
        assert [len(row["text"] or "") for row in rows] == [11, huge // 10 * 10, 0, 11]
        assert len(rows[2]["api_fail_detail"]) < 11_000
        assert sum(f.stat().st_size for f in project.root.rglob("*.jsonl") if f != path) < 100_000


@pytest.mark.parametrize("name", ["x" * 300, "é" * 128, "a\0b"])
@pytest.mark.parametrize(
    "place",
    ["data.input_folder", "data.output_folder", "model.config_path", "environment.config_path"],
)
def test_a_name_that_no_file_can_have_is_told(name: str, place: str, project: Project) -> None:
    block, field = place.split(".")
    task = yaml.safe_load(project.task_file.read_text())
    task.setdefault(block, {})[field] = f"deep/{name}"
    project.task_file.write_text(yaml.safe_dump(task))
    for command in (("check",), ("plan", TASK), ("run-task", TASK)):
        ended = project.run(*command)
        told = ended.told
        assert ended.code in (1, 2) and f"{TASK}:{place}: " in told, ended
        assert "no such file" in told or "the system has no such names" in told
        assert "Traceback" not in told
