"""What a task has published, for people and other programs: export, failures, retry; and the
pieces of a file, cut and joined."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar

import orjson
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from project import TASK, A, B, C, Ended, Project, Row, ran, read_rows, some_rows

from modelcall_assets.cli.main import modelcall
from modelcall_assets.rehearsal import NO_FAULTS, Faults, RehearsalServer
from modelcall_assets.stages.export import ORIGINS, Form, export_dialogues, export_files
from modelcall_assets.stages.selection import Selection
from modelcall_assets.stages.source import FailedRow, Published, failed_rows
from modelcall_assets.storage.publishing import Manifest
from modelcall_assets.transforms import Where

NAMES = ("a", "deep/b", "deep/er/c")


def export(project: Project, folder: Path, *options: str) -> Ended:
    ended = project.run("export", TASK, "--output", str(folder), *options)
    assert ended.code == 0, ended
    return ended


def exported(folder: Path) -> dict[str, list[dict[str, Any]]]:
    names = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    return {name.as_posix(): read_rows(folder / name) for name in names if name.parts[0] != ORIGINS}


def ids(rows: Sequence[dict[str, Any]]) -> list[str]:
    return [row["api_record_id"] for row in rows]


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory, empty_home: Path) -> Iterator[Project]:
    """Only to be read. 68 rows; A has two bad lines besides, and is red for them."""
    made = Project(tmp_path_factory.mktemp("scored") / "project")
    with ran(made, empty_home, 1):
        yield made


class TestExport:
    def test_successes_as_jsonl_in_order(self, scored: Project, tmp_path: Path) -> None:
        ended = export(scored, tmp_path)
        assert "warning: a.jsonl: rejected, 2 of 6 rows failed" in ended.err
        assert re.search(r"of 70 rows\s+│\s+68", ended.out), ended.out
        files = exported(tmp_path)
        assert list(files) == [f"{name}.jsonl" for name in NAMES]
        assert ids(files["a.jsonl"]) == [f"first-{number}" for number in range(4)]
        assert files["deep/b.jsonl"] == scored.scores(B)

    def test_parquet_keeps_the_columns(self, scored: Project, tmp_path: Path) -> None:
        export(scored, tmp_path, "--format", "parquet", "--all", "--file", "a.jsonl")
        table = pq.read_table(tmp_path / "a.parquet")
        assert table.equals(pq.read_table(scored.rejected(A)).cast(table.schema))
        export(scored, tmp_path, "--format", "parquet", "--failures", "--force")
        assert [len(rows) for rows in exported(tmp_path).values()] == [2, 0, 0]

    def test_where_filters_and_a_wrong_column_is_named(
        self, scored: Project, tmp_path: Path
    ) -> None:
        export(scored, tmp_path, "--where", "score >= 4 and id != third-3")
        kept = [row for rows in exported(tmp_path).values() for row in rows]
        rows = [*read_rows(scored.rejected(A)), *scored.scores(B), *scored.scores(C)]
        good = [row for row in rows if row["score"] is not None and row["score"] >= 4]
        assert ids(kept) == [name for name in ids(good) if name != "third-3"]
        assert 0 < len(kept) < 68
        wrong = scored.run("export", TASK, "--where", "scor >= 4")
        assert wrong.code == 2 and "--where:scor: no row has this column" in wrong.err
        assert "did you mean score?" in wrong.err
        broken = scored.run("export", TASK, "--where", "score >= 4 or 1")
        assert broken.code == 2 and "not a condition from 'or 1' on" in broken.err

    def test_a_split_is_the_same_every_time(self, scored: Project, tmp_path: Path) -> None:
        one, two, three = (tmp_path / name for name in ("one", "two", "three"))
        export(scored, one, "--file", C, "--split", "0.2")
        train, held_out = exported(one).values()
        assert sorted(ids(train + held_out)) == sorted(ids(scored.scores(C)))
        assert 4 <= len(held_out) <= 25
        export(scored, two, "--split", "0.2", "--format", "parquet")
        assert ids(exported(two)["validation/deep/er/c.parquet"]) == ids(held_out)
        export(scored, three, "--file", C, "--split", "0.2", "--seed", "7")
        assert ids(exported(three)["validation/deep/er/c.jsonl"]) != ids(held_out)

    def test_a_sample_has_as_many_rows_of_each_value(self, scored: Project, tmp_path: Path) -> None:
        def sampled(name: str, *options: str) -> list[Row]:
            export(scored, tmp_path / name, "--sample", *options)
            return [row for rows in exported(tmp_path / name).values() for row in rows]

        every = Counter(row["score"] for row in (*scored.scores(B), *scored.scores(C)))
        every.update(r["score"] for r in read_rows(scored.rejected(A)) if r["score"] is not None)
        taken = sampled("one", "10", "--by", "score")
        counts = Counter(row["score"] for row in taken)
        assert counts.total() == 10 and set(counts) == set(every)
        most = max(counts.values())
        assert all(n == every[value] or n >= most - 1 for value, n in counts.items())
        more = sampled("more", "20", "--by", "score")
        assert {*ids(taken)} < {*ids(more)}, "a larger one has them too"
        assert ids(sampled("other", "10", "--by", "score", "--seed", "7")) != ids(taken)
        assert len(sampled("any", "5")) == 5 and len(sampled("all", "1000")) == 68
        wrong = scored.run("export", TASK, "--sample", "3", "--by", "scor")
        assert wrong.code == 1 and "no row has this column; did you mean score?" in wrong.err
        alone = scored.run("export", TASK, "--by", "score")
        assert alone.code == 2 and "add --sample N" in alone.err

    def test_takes_the_old_names(self, scored: Project, tmp_path: Path) -> None:
        mended = tmp_path / "deep/b_error.jsonl"
        mended.parent.mkdir()
        mended.write_text("{}\n")
        export(scored, tmp_path, "--old_names", "--force")
        files = exported(tmp_path)
        assert list(files) == ["a.jsonl", "a_error.jsonl", "deep/b.jsonl", "deep/er/c.jsonl"]
        first, second = files["a_error.jsonl"]
        assert first["error"].startswith("bad_line: line 5, column ")
        assert (first["error_type"], first["traceback"], first["timestamp"]) == ("bad_line", "", "")
        assert [first["task_index"], second["task_index"]] == [4, 5]

    def test_takes_any_asset(self, scored: Project, tmp_path: Path) -> None:
        export(scored, tmp_path, "--stage", "raw", "--all")
        rows = exported(tmp_path)["a.jsonl"]
        assert rows[:4] == some_rows(4, "first")
        assert rows[4]["error"]["reason"] == "bad_line" and rows[4]["error"]["raw"] == "{torn"
        export(scored, tmp_path, "--stage", "raw", "--format", "parquet")
        assert exported(tmp_path)["a.parquet"] == some_rows(4, "first")
        wrong = scored.run("export", TASK, "--stage", "score")
        assert wrong.code == 2 and "did you mean scores?" in wrong.err

    def test_what_cannot_be_is_told(self, project: Project) -> None:
        nothing = project.run("export", TASK)
        assert nothing.code == 1 and "nothing is published by scores yet" in nothing.err
        assert project.run("run-task", TASK, "--file", A).code == 0
        own = project.run("export", TASK, "--output", "data/rate/scores/deep")
        assert own.code == 2 and "one of the task's own" in own.err
        no_chat = project.run("export", TASK, "--dialogue-log")
        assert no_chat.code == 1 and "no selected row has messages" in no_chat.err
        assert not list(project.root.glob("codex_dialogue/*"))
        mixed = project.run("export", TASK, "--old-names", "--format", "parquet")
        assert mixed.code == 2 and "the old files are JSONL" in mixed.err
        by_default = project.run("export", TASK)
        assert by_default.code == 0
        assert list(exported(project.root / "data/rate/scores_export/scores")) == ["a.jsonl"]

    def test_writes_a_log_of_dialogues(self, project: Project) -> None:
        chat = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "您好"}]
        rows = [{**row, "messages": chat} for row in some_rows(2)]
        project.write_input("chats.jsonl", [*rows, *some_rows(1, "no chat")])
        assert project.run("run-task", TASK, "--file", "chats.jsonl").code == 0
        ended = project.run("export", TASK, "--dialogue-log")
        assert ended.code == 0 and "2 conversations: " in ended.out, ended
        (log,) = (project.root / "codex_dialogue").iterdir()
        assert re.fullmatch(r"codex_\d{8}_\d{6}\.md", log.name)
        stamp = time.strptime(log.name, "codex_%Y%m%d_%H%M%S.md")
        told = time.strftime("%Y-%m-%d %H:%M:%S", stamp)
        text = log.read_text("utf-8")
        assert text.startswith(f"# Chat Dialogue Log\n\n## 对话时间\n\n{told}\n\n---\n")
        assert text.endswith("### 问题 2\n\n用户：你好  \n助手：您好\n")


class TestFailuresAndRetry:
    def test_failed_rows_are_listed_and_counted(self, scored: Project) -> None:
        ended = scored.run("failures", TASK)
        assert ended.code == 0
        assert "2 of 70 rows failed: bad_line 2" in ended.out
        assert "torn" in ended.out and "a.jsonl" in ended.out
        lines = scored.run("failures", TASK, "--json", "--reason", "bad_line", "--limit", "1")
        row = orjson.loads(lines.out)
        assert (row["file"], row["reason"], row["attempts"]) == (A, "bad_line", 0)
        assert row["record_id"] == read_rows(scored.rejected(A))[4]["api_record_id"]
        assert "0 of 64 rows failed" in scored.run("failures", TASK, "--file", "deep/*").out
        wrong = scored.run("failures", TASK, "--reason", "time_out")
        assert wrong.code == 2 and "did you mean timeout?" in wrong.err

    def test_failures_of_raw_are_listed_too(self, scored: Project) -> None:
        ended = scored.run("failures", TASK, "--stage", "raw", "--json")
        rows = [orjson.loads(line) for line in ended.out.splitlines()]
        assert [row["reason"] for row in rows] == ["bad_line", "bad_line"]
        assert [row["record_id"] for row in rows] == [
            row["api_record_id"] for row in read_rows(scored.rejected(A))[4:]
        ]

    def test_retry_asks_again_for_failed_rows_only(
        self, project: Project, server: RehearsalServer
    ) -> None:
        """Green files with failures inside, which run-task leaves alone."""
        project.write_task({"max_failure_rate": 1, "retry": {"max_repair_turns": 0}})
        server.set_faults(Faults(rate_malformed=0.5, seed=3))
        assert project.run("run-task", TASK).code == 0
        failed = sum(row["api_status"] == "error" for n in (A, B, C) for row in project.scores(n))
        assert 0 < failed < 12
        server.set_faults(NO_FAULTS)
        asked = server.stats()["requests"]
        assert "nothing to do" in project.run("run-task", TASK).out
        dry = project.run("retry", TASK, "--dry-run")
        assert "of 4 rows" in dry.out and server.stats()["requests"] == asked
        none = project.run("retry", TASK, "--reason", "timeout")
        assert none.code == 0 and "no row failed for timeout, nothing to do" in none.out
        ended = project.run("retry", TASK)
        assert ended.code == 0, ended
        assert server.stats()["requests"] == asked + failed
        assert "succeeded, 0 failed" in ended.out
        assert "no row failed, nothing to do" in project.run("retry", TASK).out


class TestRowsOfLaterStages:
    """What distilling tasks publish, written by hand."""

    CHAT: ClassVar = [{"role": "user", "content": "q"}]

    def published(self, folder: Path, lines: Sequence[object], **fields: Any) -> Published:
        path = folder / "answers.jsonl"
        path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in lines))
        manifest = {
            "stage": "responses",
            "accepted": True,
            "data_version": "1",
            "rows": len(lines),
            "ok": len(lines) - 1,
            "failed": 1,
            "output": str(path),
            "input": {"uri": str(path), "digest": "", "size": 0, "version": ""},
        }
        made = Manifest.model_validate({**manifest, **fields})
        chain = Project(folder / "project", task="chain")
        chain.write_model()
        chain.write_prompt()
        chain.write_chain()
        return Published(chain.steps().stage(made.stage), "set/answers.jsonl", made)

    def test_are_responses_with_their_failures(self, tmp_path: Path) -> None:
        good = {"api_record_id": "1", "api_status": "success", "messages": self.CHAT}
        good = {**good, "response": "<think>\nhm\n</think>\n\nyes", "api_answered_at": "then"}
        bad = {**good, "api_record_id": "2", "api_status": "error", "response": None}
        bad = {
            **bad,
            "api_fail_reason": "timeout",
            "api_fail_detail": "no reply",
            "api_attempts": 3,
        }
        file = self.published(tmp_path, [bad, good])
        told = FailedRow("set/answers.jsonl", "2", "timeout", "no reply", 3, None)
        assert list(failed_rows(file)) == [told]
        made = export_files(
            {file.stem: [file]}, tmp_path / "old", Selection("all"), Form(old_names=True)
        )
        assert made.written == {"set/answers.jsonl": 1, "set/answers_error.jsonl": 1}
        (failed,) = exported(tmp_path / "old")["set/answers_error.jsonl"]
        old = {"error": "timeout: no reply", "error_type": "timeout", "traceback": ""}
        assert failed == {**bad, **old, "timestamp": "then", "task_index": 0}
        export_files({file.stem: [file]}, tmp_path / "new", Selection(), Form("parquet"))
        assert exported(tmp_path / "new")["set/answers.parquet"][0]["response"] == good["response"]
        log = tmp_path / "log.md"
        assert export_dialogues([file], log, Selection(), datetime(2026, 1, 1)) == 1
        assert log.read_text("utf-8").endswith("用户：q  \n助手：yes\n")

    def test_have_their_failure_in_an_error_object(self, tmp_path: Path) -> None:
        error = {"reason": "chatml_error", "detail": "no turns"}
        rows = [{"messages": self.CHAT}, {"messages": [], "error": error, "uid": "u"}]
        file = self.published(tmp_path, rows, stage="chatml")
        assert list(failed_rows(file)) == [
            FailedRow("set/answers.jsonl", "u", "chatml_error", "no turns")
        ]

    def test_of_the_files_of_a_split_are_exported_in_one(self, tmp_path: Path) -> None:
        rows = [{"n": number} for number in range(3)]
        members = [{"uri": str(tmp_path / "answers.jsonl"), "digest": "", "size": 0}] * 2
        made = {"stage": "raw", "output": None, "detail": {"members": members}}
        file = self.published(tmp_path, rows, rows=5, **made)
        for form in (Form("jsonl"), Form("parquet")):
            export_files({file.stem: [file]}, tmp_path / "out", Selection(), form)
        assert [*exported(tmp_path / "out").values()] == [(rows * 2)[:5]] * 2


class TestSplitAndJoin:
    @pytest.mark.parametrize(
        ("lines", "chunks", "sizes"), [(5, 4, [2, 2, 1]), (6, 3, [2, 2, 2]), (2, 9, [1, 1])]
    )
    def test_pieces_by_the_ceil_rule(
        self, project: Project, lines: int, chunks: int, sizes: list[int]
    ) -> None:
        content = b"".join(b'{"n": %d }\n' % number for number in range(lines))[:-1]
        (project.root / "big.jsonl").write_bytes(content)
        ended = project.run("split", "big.jsonl", "--chunks", str(chunks))
        assert ended.code == 0, ended
        assert f"{lines} lines in {len(sizes)} files" in ended.out
        assert (f"({chunks} were asked for)" in ended.out) == (len(sizes) < chunks)
        pieces = sorted((project.root / "big").iterdir())
        names = [f"big_split_{number:04}.jsonl" for number in range(1, len(sizes) + 1)]
        assert [path.name for path in pieces] == names
        assert [len(path.read_bytes().splitlines()) for path in pieces] == sizes
        assert b"".join(path.read_bytes() for path in pieces) == content
        if len(sizes) > 1:
            fewer = project.run("split", "big.jsonl", "--chunks", "1")
            assert fewer.code == 2 and "pieces of an earlier split" in fewer.err

    def test_join_puts_results_and_errors_together(self, project: Project) -> None:
        model = project.root / "results/my_model"
        files = {
            "q_split_0002/q_split_0002.jsonl": b'{"n":2}\n{"n":3}\n',
            "q_split_0001/q_split_0001.jsonl": b'{"n":1}',
            "q_split_0001/q_split_0001_error.jsonl": b'{"n":0}\n',
            "q_split_0001/q_split_0001_error_retry_1.jsonl": b"no\n",
            "q_split_0001/q_split_0001_success_retry_1.jsonl": b"no\n",
            "other/x.jsonl": b"no\n",
            "stray.jsonl": b"no\n",
        }
        for name, content in files.items():
            path = model / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        ended = project.run("join", "results/my_model")
        assert ended.code == 0, ended
        assert "3 of 4 rows succeeded (75.00%)" in ended.out
        merged = project.root / "results/my_model_merged.jsonl"
        assert merged.read_bytes() == b'{"n":1}\n{"n":2}\n{"n":3}\n'
        errors = project.root / "results/my_model_merged_error.jsonl"
        assert errors.read_bytes() == b'{"n":0}\n'
        flat = project.run("join", "results/my_model/other", "--output", "flat.jsonl")
        assert flat.code == 0 and (project.root / "flat.jsonl").read_bytes() == b"no\n"
        onto = project.run("join", "results/my_model/other", "--output", f"{model}/other/x.jsonl")
        assert onto.code == 2
        (model / "q_split_0002/dangling.jsonl").symlink_to("nowhere")
        broken = project.run("join", "results/my_model", "--force")
        assert broken.code == 1 and "dangling.jsonl: not found" in broken.err


@pytest.mark.parametrize(
    ("arguments", "taken"),
    [
        (("export", TASK, "--output", "{}"), "deep/b.jsonl"),
        (("export", TASK, "--old-names", "--output", "{}"), "deep/b_error.jsonl"),
        (("report", TASK, "--output", "{}/page.html"), "page.html"),
        (
            ("split", "data/in/deep/er/c.jsonl", "--chunks", "2", "--output", "{}"),
            "c_split_0002.jsonl",
        ),
        (("join", "data/in/deep/er", "--output", "{}/all.jsonl"), "all_error.jsonl"),
    ],
)
def test_a_file_that_is_there_is_replaced_by_force_only(
    arguments: tuple[str, ...], taken: str, scored: Project, tmp_path: Path
) -> None:
    mine = tmp_path / taken
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    command = [each.format(tmp_path) for each in arguments]
    refused = scored.run(*command)
    assert (refused.code, mine.read_text()) == (2, "mine")
    assert f"{mine} is there already; choose another place, or add --force" in refused.err
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [mine]
    assert scored.run(*command, "--force").code == 0
    assert not mine.exists() or mine.read_text() != "mine"


ROW = {"score": 4, "s": "4", "ok": True, "none": None, "raw": {"lang": "py"}, "my col": 1.5}


@pytest.mark.parametrize(
    ("condition", "holds"),
    [
        ("score >= 4", True),
        ("score>4", False),
        ("score = 4.0 AND s = 4", True),
        ("s > 3", False),
        ("s >= '4'", True),
        ("ok = true", True),
        ("ok != 1", True),
        ("none = null", True),
        ("none != 3", False),
        ("score != null", True),
        ("gone = null and score < 5", True),
        ("raw.lang = py", True),
        ("raw.lang.x = null", True),
        ('"my col" = 1.5', True),
        ('s = "a and b"', False),
        ("raw != 1", True),
    ],
)
def test_a_condition_compares_as_it_reads(condition: str, holds: bool) -> None:
    assert Where.parse(condition)(ROW) is holds


@pytest.mark.parametrize(
    "condition", ["", "score", "score >=", "score => 4", "a = 1 b = 2", "a = 1 and", "a > null"]
)
def test_what_is_no_condition(condition: str) -> None:
    with pytest.raises(ValueError, match=r"not a condition from|null can only"):
        Where.parse(condition)


@pytest.mark.parametrize("command", ["export", "failures", "retry", "report", "split", "join"])
def test_help_has_an_example(command: str) -> None:
    ended = CliRunner().invoke(modelcall, [command, "--help"])
    assert re.search(rf"^ .*modelcall {command}\b", ended.output, re.MULTILINE), ended.output
