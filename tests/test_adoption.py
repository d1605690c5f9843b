"""Files that we did not write are not replaced: they are adopted, or the run is refused. And what a
run has that is rejected replaces nothing."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any
from uuid import uuid4

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from project import TASK, A, Project, Row, lines, read_rows, some_rows
from s3_server import S3Server

from modelcall_assets.rehearsal import NO_FAULTS, Faults, RehearsalServer
from modelcall_assets.storage.files import read_bytes


def rated(row: Row, score: int = 1, **more: Any) -> Row:
    """As the old system left a row that it had rated; no answer of the test's server."""
    values = {"score": score, "quality_tags": ["old"], "recommended_use_case": "as it was"}
    said = f"Well: {orjson.dumps(values).decode()}"
    own = {"api_status": "success", "api_fail_reason": None, "api_return": said}
    return {**row, **values, **own, **more}


def failed(row: Row) -> Row:
    return rated(row, 3, api_status="error", api_fail_reason="timeout", api_return=None)


@pytest.fixture
def project(bare: Project) -> Project:
    return bare


def requests(server: RehearsalServer) -> int:
    return server.stats()["requests"]


def offered(project: Project, *options: str) -> tuple[int | None, ...]:
    """Good rows, those without an answer, and torn lines."""
    (row,) = project.listed("adopt", TASK, *options)
    return row["good_rows"], row["without_an_answer"], row["torn_lines"]


class TestScores:
    def write(self, project: Project, rows: Sequence[Row]) -> bytes:
        path = project.output(A)
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(list(rows)), path)
        return path.read_bytes()

    def test_of_the_old_system_are_not_replaced_and_both_ways_are_named(
        self, project: Project, server: RehearsalServer
    ) -> None:
        rows = some_rows(3)
        project.write_input(A, rows)
        old = self.write(project, [rated(rows[0])])
        ended = project.run("run-task", TASK)
        assert ended.code == 1
        assert f"{project.output('a.jsonl')}: this file was not written by this task" in ended.err
        assert f"`modelcall adopt {TASK}`" in ended.err and "another name" in ended.err
        assert project.output(A).read_bytes() == old
        assert requests(server) == 0

        project.output(A).rename(project.root / "mine.parquet")
        assert project.run("run-task", TASK).code == 0, "it was set aside by hand"
        assert requests(server) == 3

    def test_that_are_adopted_stay_and_the_others_are_asked(
        self, project: Project, server: RehearsalServer
    ) -> None:
        rows = some_rows(5)
        project.write_input(A, rows)
        changed = {**rows[4], "text": "it had another text"}
        old = self.write(
            project, [rated(changed), rated(rows[3], 5), failed(rows[1]), rated(rows[0])]
        )
        told = project.run("adopt", TASK)
        assert re.search(r"│ scores │ a\.jsonl │ +3 │ +1 │ +0 │", told.out), told
        assert f"modelcall run-task {TASK}" in told.out and requests(server) == 0
        assert project.output(A).read_bytes() == old
        ended = project.run("run-task", TASK)
        assert ended.code == 0, ended
        assert requests(server) == 3
        assert "adopted: scores of a.jsonl: 2 of 3 good rows" in ended.out
        published = project.scores(A)
        assert [row["id"] for row in published] == [row["id"] for row in rows]
        by_endpoint = [row["api_endpoint"] == "adopted" for row in published]
        assert by_endpoint == [True, False, False, True, False]
        assert (published[0]["score"], published[3]["score"]) == (1, 5)
        assert published[0]["quality_tags"] == ["old"]
        assert published[0]["api_return"] == rated(rows[0])["api_return"]
        assert {published[0][name] for name in ("api_model", "api_finish_reason")} == {None}
        assert published[0]["api_cost_usd"] == 0, "this task has paid nothing for it"
        assert Path(project.manifest(A).detail["set_aside"][0]).read_bytes() == old

        project.output(A).unlink()
        assert project.run("run-task", TASK).code == 0
        assert project.scores(A)[0]["api_return"] == published[0]["api_return"]
        assert requests(server) == 3, "an adopted answer is one of the journal's"
        assert "nothing to adopt" in project.run("adopt", TASK).out
        project.write_prompt({"prompt_template": {"prompt_text": "Judge anew: {text}"}})
        assert project.run("run-task", TASK).code == 0
        assert requests(server) == 8, "another prompt is another question"

    def test_whose_ids_the_old_system_made_up_are_found_by_their_texts(
        self, project: Project, server: RehearsalServer
    ) -> None:
        texts = [{"text": row["text"]} for row in some_rows(3)]
        project.write_input(A, texts)
        self.write(project, [rated({**texts[at], "id": str(uuid4())}, at + 1) for at in (2, 0)])
        project.run("adopt", TASK)
        assert project.run("run-task", TASK).code == 0
        assert requests(server) == 1
        assert [row["score"] for row in project.scores(A)][::2] == [1, 3]

    def test_of_another_id_are_another_rows(
        self, project: Project, server: RehearsalServer
    ) -> None:
        rows = [{"id": name, "text": "the same text"} for name in ("one", "two")]
        project.write_input(A, rows)
        self.write(project, [rated(rows[1], 4), rated({**rows[0], "id": "three"}, 5)])
        project.run("adopt", TASK)
        assert project.run("run-task", TASK).code == 0
        published = project.scores(A)
        assert [row["api_endpoint"] == "adopted" for row in published] == [False, True]
        assert published[1]["score"] == 4 and requests(server) == 1

    def test_that_do_not_fit_what_the_prompt_declares_are_asked_again(
        self, project: Project, server: RehearsalServer
    ) -> None:
        rows = some_rows(2)
        project.write_input(A, rows)
        self.write(project, [rated(rows[0], 9), rated(rows[1], 2)])
        project.run("adopt", TASK)
        assert project.run("run-task", TASK).code == 0
        assert requests(server) == 1 and project.scores(A)[1]["score"] == 2

    def test_a_default_in_place_of_what_the_model_said_is_none(
        self, project: Project, server: RehearsalServer
    ) -> None:
        rows = some_rows(4)
        project.write_input(A, rows)
        says = ['{"quality_tags": ["old"], "recommended_use_case": "as it was"}', "Sorry, I can't."]
        says.append('{"score": 5, "quality_tags": ["old"], "recommended_use_case": "as it was"}')
        old = [
            rated(row, 3, api_return=said) for row, said in zip(rows, [*says, None], strict=True)
        ]
        self.write(project, old)
        assert offered(project) == (1, 3, 0)
        assert project.run("run-task", TASK).code == 0
        published = project.scores(A)
        assert [row["api_endpoint"] == "adopted" for row in published] == [False] * 3 + [True]
        assert requests(server) == 3 and published[3]["score"] == 3

    def test_in_lines_beside_the_outputs_place_are_adopted_too(
        self, project: Project, server: RehearsalServer
    ) -> None:
        rows = some_rows(2)
        project.write_input(A, rows)
        path = project.output(A).with_suffix(".jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(orjson.dumps(rated(rows[1], 2)) + b'\n{"id": "plain-0", "te')
        refused = project.run("run-task", TASK)
        assert refused.code == 1 and f"{path}: this file was not written by" in refused.err
        assert requests(server) == 0
        assert offered(project) == (1, 0, 1)
        assert project.run("run-task", TASK).code == 0
        assert requests(server) == 1 and project.scores(A)[1]["score"] == 2

    def test_that_cannot_be_read_stay_and_the_others_are_adopted(
        self, project: Project, server: RehearsalServer
    ) -> None:
        for name in ("a", "b"):
            project.write_input(f"{name}.jsonl", some_rows(1, name))
        self.write(project, [rated(some_rows(1, "b")[0], 2)])
        project.output(A).rename(project.output("b.jsonl"))
        project.output(A).write_bytes(b"PAR1 torn")
        told = project.run("adopt", TASK)
        assert told.code == 1 and re.search(r"│ scores │ b\.jsonl │ +1 │", told.out)
        assert f"{project.output('a.jsonl')}: not a readable" in told.err
        assert "results of another system cannot" in told.err and "move it away" in told.err
        assert project.run("run-task", TASK).code == 1
        assert project.output(A).read_bytes() == b"PAR1 torn"
        assert project.scores("b.jsonl")[0]["score"] == 2 and requests(server) == 0

    def test_in_pairs_of_files_are_adopted_too_and_a_file_of_errors_is_no_answer(
        self, project: Project, server: RehearsalServer
    ) -> None:
        rows = some_rows(2)
        for name in ("a", "b"):
            project.write_input(f"{name}.jsonl", rows)
        folder = project.output(A).parent
        folder.mkdir(parents=True)
        (folder / "a_success.jsonl").write_bytes(lines(rated(rows[1], 2)))
        for name in ("a", "b"):
            (folder / f"{name}_error.jsonl").write_bytes(lines(failed(rows[0])))
        refused = project.run("run-task", TASK)
        assert refused.code == 1 and f"{folder}/a_success.jsonl: this file was not" in refused.err
        assert requests(server) == 2, "of the other file"
        assert offered(project) == (1, 0, 0)
        assert project.run("run-task", TASK).code == 0
        assert requests(server) == 3 and project.scores(A)[1]["score"] == 2

    def test_are_none_where_no_model_is_asked(self, project: Project) -> None:
        """A stage that costs nothing goes on beside them."""
        project.write_task({"model": None, "prompt": None, "scorer": "old_rater:Rater"})
        (project.root / "old_rater.py").write_text(
            "class Rater:\n    def score(self, item):\n        return {'score': 1}\n"
        )
        project.write_input(A, some_rows(2))
        path = project.output(A).with_suffix(".jsonl")
        path.parent.mkdir(parents=True)
        path.write_bytes(b"a note\n")
        ended = project.run("run-task", TASK)
        assert ended.code == 0, ended
        assert path.read_bytes() == b"a note\n"

    def test_of_ours_that_somebody_changed_are_not_replaced(
        self, project: Project, server: RehearsalServer
    ) -> None:
        project.write_input(A, some_rows(2))
        assert project.run("run-task", TASK).code == 0
        table = pq.read_table(project.output(A))
        pq.write_table(table.slice(0, 1), project.output(A))
        mine = project.output(A).read_bytes()
        ended = project.run("run-task", TASK, "--fresh")
        assert ended.code == 1 and "was changed since it was published" in ended.err
        assert project.output(A).read_bytes() == mine and requests(server) == 2
        told = project.run("plan", TASK)
        assert "refused when it is made anew: scores of a.jsonl" in told.out, told
        assert "was changed since it was published" in told.out
        (told,) = project.listed("adopt", TASK)
        assert "the replies that the task has count, not the changes" in told["becomes"]
        assert told["good_rows"] is None
        assert project.run("run-task", TASK).code == 0
        assert len(project.scores(A)) == 2 and requests(server) == 2
        (kept,) = (project.root / "data/rate/scores/.modelcall").rglob("set_aside/*/*/a.parquet")
        assert kept.read_bytes() == mine

    def test_that_were_only_touched_or_copied_are_ours(
        self, project: Project, server: RehearsalServer
    ) -> None:
        project.write_input(A, some_rows(2))
        assert project.run("run-task", TASK).code == 0
        os.utime(project.output(A), (1, 1))
        assert project.run("run-task", TASK, "--fresh").code == 0
        assert requests(server) == 4


def asked(name: str) -> Row:
    return {"id": name, "messages": [{"role": "user", "content": f"what is {name}?"}]}


def answered(row: Row, response: str) -> Row:
    """As the old system left it."""
    turn = {"role": "assistant", "content": response}
    return {**row, "response": response, "final_messages": [*row["messages"][:1], turn]}


def broken(row: Row) -> Row:
    error = {"error": "Error: {'code': 1}", "error_type": "Exception", "traceback": "Traceback"}
    return {**row, **error, "timestamp": "2025-01-02T03:04:05", "task_index": 7}


class TestResponses:
    @pytest.fixture
    def answers(self, project: Project) -> Path:
        """The folder of the answers to `data/in`, for a task of the old system's kind."""
        self.write_task(project)
        (project.input_folder).mkdir(exist_ok=True)
        folder = project.root / "data/answers"
        folder.mkdir(parents=True)
        return folder

    def write_task(self, project: Project, **fields: Any) -> None:
        distillation = {
            "step": "generate_response",
            "response_config_path": "configs/models/rehearsal.yaml",
            "input_path": "./data/in",
            "output_path": "./data/answers",
            **fields,
        }
        project.task_file.write_bytes(
            orjson.dumps(
                {
                    "task_name": "rate",
                    "task_type": "data_distillation",
                    "description": "",
                    "distillation": distillation,
                }
            )
        )

    def published(self, folder: Path, name: str = "q.jsonl") -> list[Row]:
        return read_rows(folder / name)

    @pytest.mark.parametrize("mode", ["resume_mode", "retry_mode"])
    def test_one_good_row_of_three_and_a_torn_second(
        self, project: Project, answers: Path, server: RehearsalServer, mode: str
    ) -> None:
        rows = [asked(name) for name in ("one", "two", "three")]
        project.write_input("q.jsonl", rows)
        old = lines(answered(rows[1], "<think>\nhm\n</think>\n\nold two"))
        old += orjson.dumps(answered(rows[0], "torn"))[:-9]
        (answers / "q.jsonl").write_bytes(old)
        refused = project.run("run-task", TASK)
        assert refused.code == 1 and "was not written by this task" in refused.err
        assert (answers / "q.jsonl").read_bytes() == old and requests(server) == 0

        self.write_task(project, **{mode: True})
        ended = project.run("run-task", TASK)
        assert ended.code == 0, ended
        assert requests(server) == 2
        assert "1 of 1 good row; 0 rows without an answer, 1 torn line" in ended.out
        assert "the first: q.jsonl: line 2" in ended.out
        published = self.published(answers)
        assert [row["id"] for row in published] == ["one", "two", "three"]
        kept = published[1]
        expected = answered(rows[1], "<think>\nhm\n</think>\n\nold two")
        assert {name: kept[name] for name in expected} == expected
        assert (kept["reasoning"], kept["api_endpoint"], kept["api_attempts"]) == (
            "hm",
            "adopted",
            0,
        )
        assert kept["finish_reason"] is None and kept["api_model"] is None
        assert [row["api_endpoint"] == "adopted" for row in published] == [False, True, False]
        made = project.manifest("q.jsonl", "responses")
        assert Path(made.detail["set_aside"][0]).read_bytes() == old
        assert project.run("run-task", TASK).code == 0 and requests(server) == 2

    def test_rounds_of_retries_and_the_same_failed_row_twice(
        self, project: Project, answers: Path, server: RehearsalServer
    ) -> None:
        """A retry that was killed: what had succeeded before it is under another name."""
        rows = [asked(name) for name in ("a", "b", "c", "d", "e")]
        project.write_input("q.jsonl", rows)
        names = {
            "q_success_retry_1.jsonl": lines(
                answered(rows[4], "old e"), answered(rows[0], "old a")
            ),
            "q_success_retry_12.jsonl": lines(answered(broken(rows[2]), "old c")),
            "q_error_retry_1.jsonl": lines(*map(broken, (rows[1], rows[2], rows[1]))),
            "q_error.jsonl": lines(broken(rows[1]), broken(rows[3]), broken(rows[1])),
        }
        for name, content in names.items():
            (answers / name).write_bytes(content)
        refused = project.run("run-task", TASK)
        assert refused.code == 1 and "q_success_retry_1.jsonl: this file was not" in refused.err
        assert requests(server) == 0
        self.write_task(project, retry_mode=True)
        assert project.run("run-task", TASK).code == 0
        assert requests(server) == 2
        published = self.published(answers)
        assert [row["id"] for row in published] == ["a", "b", "c", "d", "e"]
        assert [row["response"] for row in published][::2] == ["old a", "old c", "old e"]
        assert not {"error", "traceback", "task_index"} & {*published[2]}
        for name, content in names.items():
            assert (answers / name).read_bytes() == content

    @pytest.mark.parametrize("left", ["q_success.jsonl", "q_success_retry_3.jsonl"])
    def test_only_under_another_name_are_never_paid_again_in_silence(
        self, project: Project, answers: Path, server: RehearsalServer, left: str
    ) -> None:
        rows = [asked(name) for name in ("a", "b")]
        project.write_input("q.jsonl", rows)
        (answers / left).write_bytes(lines(answered(rows[1], "old b")))
        (answers / "q_error.jsonl").write_bytes(lines(broken(rows[0])))
        told = project.run("plan", TASK).out
        assert f"refused: responses of q.jsonl: {answers / left} was not written by this" in told
        assert f"see `modelcall adopt {TASK}`" in told and "as if there were nothing" in told
        refused = project.run("run-task", TASK)
        assert refused.code == 1 and f"{answers / left}: this file was not" in refused.err
        assert f"`modelcall adopt {TASK}`" in refused.err and "another name" in refused.err
        assert requests(server) == 0

        project.run("adopt", TASK)
        assert (
            f"adopted: responses of q.jsonl: {answers / left} was" in project.run("plan", TASK).out
        )
        assert project.run("run-task", TASK).code == 0
        assert requests(server) == 1 and self.published(answers)[1]["response"] == "old b"
        assert "adopted" not in (told := project.run("plan", TASK).out) and "refused" not in told

    def test_ours_to_an_input_with_such_a_name_are_no_round_of_another(
        self, project: Project, answers: Path, server: RehearsalServer
    ) -> None:
        project.write_input("q_success_retry_1.jsonl", [asked("a")])
        assert project.run("run-task", TASK).code == 0
        project.write_input("q.jsonl", [asked("b")])
        assert project.run("run-task", TASK).code == 0
        assert requests(server) == 2 and len(self.published(answers)) == 1

    def test_a_file_of_errors_as_ordinary_input(
        self, project: Project, answers: Path, server: RehearsalServer
    ) -> None:
        rows = [broken(asked(name)) for name in ("a", "b")]
        project.write_input("q_error.jsonl", rows)
        (answers / "q_error.jsonl").write_bytes(lines(answered(rows[1], "old b")))
        project.run("adopt", TASK)
        assert project.run("run-task", TASK).code == 0
        assert requests(server) == 1
        published = self.published(answers, "q_error.jsonl")
        assert published[1]["response"] == "old b" and "error" not in published[0]

    def test_ids_that_the_old_system_made_of_the_question(
        self, project: Project, answers: Path, server: RehearsalServer
    ) -> None:
        rows = [{"messages": asked(name)["messages"]} for name in ("a", "b", "a")]
        project.write_input("q.jsonl", rows)
        made_up = hashlib.md5(b"what is a?").hexdigest()
        (answers / "q.jsonl").write_bytes(
            lines({**answered(rows[0], "old a"), "uid": made_up}, answered(rows[1], "  "))
        )
        project.run("adopt", TASK)
        assert project.run("run-task", TASK).code == 0
        published = self.published(answers)
        assert [row["response"] == "old a" for row in published] == [True, False, False]
        assert published[0]["uid"] == made_up and requests(server) == 2

    def test_what_was_asked_otherwise_than_the_task_asks_is_another_question(
        self, project: Project, answers: Path, server: RehearsalServer
    ) -> None:
        """The old system sent the first message alone, as the user's."""
        pirate = [{"role": "system", "content": "You are a pirate."}, *asked("4")["messages"]]
        rows = [{"id": "pirate", "messages": pirate}, asked("plain")]
        project.write_input("q.jsonl", rows)
        turns = [{"role": "user", "content": "You are a pirate."}]
        turns.append({"role": "assistant", "content": "Arr!"})
        arr = {**answered(rows[0], "Arr!"), "final_messages": turns}
        (answers / "q.jsonl").write_bytes(lines(arr, answered(rows[1], "old plain")))
        assert offered(project) == (1, 1, 0)
        assert project.run("run-task", TASK).code == 0
        published = self.published(answers)
        assert [row["response"] for row in published][1] == "old plain"
        assert published[0]["final_messages"][:-1] == pirate and requests(server) == 1

        (answers / "q.jsonl").rename(project.root / "mine.jsonl")
        self.write_task(project, output_path="./data/first", prompt_mode="first_message")
        (project.root / "data/first").mkdir()
        (project.root / "data/first/q.jsonl").write_bytes(lines(arr))
        assert offered(project, "--dry-run") == (1, 0, 0)

    def test_columns_of_the_input_are_not_taken_for_what_the_model_said(
        self, project: Project, answers: Path, server: RehearsalServer
    ) -> None:
        rows = [
            {**asked("trace"), "reasoning": "the data set's own", "finish_reason": "length"},
            {**asked("status"), "reasoning": {"x": 1}, "api_status": "reviewed"},
        ]
        project.write_input("q.jsonl", rows)
        (answers / "q.jsonl").write_bytes(lines(*(answered(row, "old answer") for row in rows)))
        project.run("adopt", TASK)
        assert project.run("run-task", TASK).code == 0
        published = self.published(answers)
        assert [row["reasoning"] for row in published] == [None, None]
        assert published[0]["input_reasoning"] == "the data set's own"
        assert [row["api_endpoint"] for row in published] == ["adopted"] * 2
        assert requests(server) == 0

        self.write_task(project, output_path="./data/again")
        (project.root / "data/again").mkdir()
        ours = self.published(answers)
        ours[0]["reasoning"], ours[1]["api_status"] = "the model's own", "error"
        (project.root / "data/again/q.jsonl").write_bytes(lines(*ours))
        assert offered(project) == (1, 1, 0)
        assert project.run("run-task", TASK).code == 0
        again = self.published(project.root / "data/again")
        assert again[0]["reasoning"] == "the model's own" and requests(server) == 1

    def test_a_run_that_is_rejected_leaves_the_old_file_where_it_is(
        self, project: Project, answers: Path, server: RehearsalServer
    ) -> None:
        rows = [asked(name) for name in ("a", "b", "c")]
        project.write_input("q.jsonl", rows)
        old = lines(answered(rows[0], "old a"))
        (answers / "q.jsonl").write_bytes(old)
        self.write_task(project, resume_mode=True)
        server.set_faults(Faults(rate_400=1))
        assert project.run("run-task", TASK).code == 1
        assert (answers / "q.jsonl").read_bytes() == old
        server.set_faults(NO_FAULTS)
        sent = requests(server)
        assert project.run("run-task", TASK).code == 0
        assert requests(server) == sent + 2
        assert self.published(answers)[0]["response"] == "old a"


def test_what_computed_stages_would_replace_is_kept_too(
    project: Project, server: RehearsalServer
) -> None:
    project.write_task({"preprocess": {"enabled": True, "output_folder": "data/clean"}})
    project.write_input(A, some_rows(2))
    path = project.root / "data/clean/a.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(pa.table({"text": ["by the old system"]}), path)
    old = path.read_bytes()
    ended = project.run("run-task", TASK)
    assert ended.code == 1 and f"{path}: this file was not written" in ended.err
    assert path.read_bytes() == old
    told = project.run("adopt", TASK, "--dry-run", "--json").out
    assert '"stage":"preprocessed","file":"a.jsonl"' in told
    assert project.run("run-task", TASK).code == 1, "--dry-run"
    assert project.run("adopt", TASK).code == 0
    ended = project.run("run-task", TASK)
    assert ended.code == 0 and requests(server) == 2
    (kept,) = (project.root / "data").rglob("set_aside/preprocessed/*/a.parquet")
    assert kept.read_bytes() == old and str(kept) in ended.out


class TestInAStore:
    @pytest.fixture
    def left(
        self, project: Project, s3_server: S3Server, bucket: str
    ) -> Iterator[Callable[[str, bytes], object]]:
        """Puts a file beside the scores of `a.jsonl`, which has three rows."""
        project.write_task_in_store(s3_server, bucket)
        project.write_input(A, some_rows(3))
        with closing(s3_server.client()) as client:
            yield lambda name, content: client.put_object(
                Bucket=bucket, Key=f"scores/{name}", Body=content
            )

    def test_old_scores_are_refused_then_adopted(
        self,
        project: Project,
        server: RehearsalServer,
        s3_server: S3Server,
        bucket: str,
        left: Callable[[str, bytes], object],
    ) -> None:
        output = project.steps().stage("scores").output("a.jsonl")
        old = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist([rated(some_rows(3)[1], 5)]), old)
        content = old.getvalue().to_pybytes()
        left("a.parquet", content)
        ended = project.run("run-task", TASK)
        assert ended.code == 1 and f"{output}: this file was not written" in ended.err
        assert read_bytes(output) == content and requests(server) == 0
        assert project.run("adopt", TASK).code == 0
        assert project.run("run-task", TASK).code == 0
        assert requests(server) == 2
        table = pq.read_table(pa.BufferReader(read_bytes(output)))
        assert table["api_endpoint"].to_pylist().count("adopted") == 1
        assert table["score"].to_pylist()[1] == 5
        made = project.manifest(A)
        assert read_bytes(project.steps().layout.place(made.detail["set_aside"][0])) == content

        project.write_task(
            {"data": {"output_folder": f"s3://{bucket}/scores", "input_key": "no such column"}}
        )
        before = read_bytes(output)
        assert project.run("run-task", TASK).code == 1
        assert read_bytes(output) == before
        project.write_task_in_store(s3_server, bucket)
        assert project.run("run-task", TASK).code == 0
        assert read_bytes(output) == before and requests(server) == 2

    def test_pairs_and_rounds_beside_an_outputs_place_are_found_too(
        self,
        project: Project,
        server: RehearsalServer,
        bucket: str,
        left: Callable[[str, bytes], object],
    ) -> None:
        rows = some_rows(3)
        files = {
            "a_success.jsonl": rated(rows[1], 5),
            "a_success_retry_7.jsonl": rated(rows[0], 4),
            "a_success_x/a_success_retry_1.jsonl": rated(rows[2], 3),
            "b_success.jsonl": rated(rows[2], 3),
        }
        for name, row in files.items():
            left(name, lines(row))
        ended = project.run("run-task", TASK)
        assert ended.code == 1 and f"s3://{bucket}/scores/a_success.jsonl: this file" in ended.err
        assert requests(server) == 0
        assert offered(project) == (2, 0, 0)
        assert project.run("run-task", TASK).code == 0
        output = project.steps().stage("scores").output("a.jsonl")
        table = pq.read_table(pa.BufferReader(read_bytes(output)))
        assert table["score"].to_pylist()[:2] == [4, 5] and requests(server) == 1


class TestRejected:
    def test_a_broken_input_key_leaves_what_was_published(
        self, project: Project, server: RehearsalServer
    ) -> None:
        project.write_input(A, some_rows(3))
        project.write_input("b.jsonl", some_rows(3, "other"))
        assert project.run("run-task", TASK).code == 0
        before = {name: project.output(name).read_bytes() for name in (A, "b.jsonl")}
        project.write_task({"data": {"input_key": "body"}})
        ended = project.run("run-task", TASK)
        assert ended.code == 1
        assert "rejected: a.jsonl: 3 of 3 rows failed" in ended.out
        assert "The result lies aside and replaces nothing" in ended.err
        assert {name: project.output(name).read_bytes() for name in before} == before
        assert "rejected, 3 of 3 rows failed" in project.run("failures", TASK).err
        assert "3 of 3 records" in project.run("report", TASK, "--file", "a.jsonl").out
        project.run("export", TASK, "--all", "--rejected", "--output", "aside")
        aside = (project.root / "aside/a.jsonl").read_bytes().splitlines()
        assert {orjson.loads(line)["api_fail_reason"] for line in aside} == {"missing_input"}
        accepted = project.run("export", TASK, "--output", "stands")
        assert "rejected" not in accepted.err
        assert len((project.root / "stands/a.jsonl").read_bytes().splitlines()) == 3

        project.write_task({})
        ended = project.run("run-task", TASK)
        assert ended.code == 0 and requests(server) == 6
        assert {name: project.output(name).read_bytes() for name in before} == before
        assert "nothing to do" in project.run("run-task", TASK).out
        assert not project.rejected(A).exists()

    @pytest.mark.parametrize("fault", [{"rate_400": 0.5}, {"rate_500": 0.6}])
    def test_raising_the_limit_accepts_it_at_no_cost(
        self, project: Project, server: RehearsalServer, fault: dict[str, float]
    ) -> None:
        project.write_model({"client_config": {"max_retries": 0}})
        project.write_input(A, some_rows(12))
        server.set_faults(Faults(**fault))
        assert project.run("run-task", TASK).code == 1
        aside = read_rows(project.rejected(A))
        bad = sum(row["api_status"] == "error" for row in aside)
        assert 0 < bad < 12 and not project.output(A).exists()
        sent = requests(server)
        project.write_task({"max_failure_rate": 0.99})
        ended = project.run("run-task", TASK)
        assert ended.code == 0, ended
        assert requests(server) == sent
        assert project.scores(A) == aside
        assert "nothing to do" in project.run("run-task", TASK).out
        server.set_faults(NO_FAULTS)
        assert project.run("retry", TASK).code == 0
        assert requests(server) == sent + bad
        assert {row["api_status"] for row in project.scores(A)} == {"success"}

    def test_a_retry_repairs_only_what_failed(
        self, project: Project, server: RehearsalServer
    ) -> None:
        project.write_input(A, some_rows(12))
        server.set_faults(Faults(rate_400=0.5))
        assert project.run("run-task", TASK).code == 1
        rows = read_rows(project.rejected(A))
        bad = sum(row["api_status"] == "error" for row in rows)
        server.set_faults(NO_FAULTS)
        sent = requests(server)
        assert project.run("retry", TASK).code == 0
        assert requests(server) == sent + bad
        assert not project.rejected(A).exists()

    def test_preprocessing_that_fails_replaces_no_clean_rows(
        self, project: Project, server: RehearsalServer
    ) -> None:
        block = {"enabled": True, "output_folder": "data/clean"}
        project.write_task({"preprocess": block})
        project.write_input(A, some_rows(4))
        assert project.run("run-task", TASK).code == 0
        clean = (project.root / "data/clean/a.parquet").read_bytes()
        project.write_input(A, [*some_rows(4), b"{torn"])
        ended = project.run("run-task", TASK)
        assert ended.code == 1 and "1 of 5 rows failed (20.00%)" in ended.err
        assert "bad_line 1. The first: " in ended.err and "run the task again to make" in ended.err
        assert (project.root / "data/clean/a.parquet").read_bytes() == clean
        shown = project.run("failures", TASK, "--stage", "preprocessed")
        assert "1 of 5 rows failed: bad_line 1" in shown.out
        project.write_task({"preprocess": block, "max_failure_rate": 0.5})
        assert project.run("run-task", TASK).code == 0 and requests(server) == 4
