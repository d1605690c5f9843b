"""The first minutes: a project, a task for data that is there, the page of all tasks."""

from __future__ import annotations

import os
import pty
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest
import yaml
from dev import Dev
from project import Project, lines, until, write_rows
from s3_server import S3Server

from modelcall_assets.rehearsal import RehearsalServer

ROOT = Path(__file__).parent.parent
TASK = "configs/tasks/mine.yaml"
PROMPT, MODEL = "configs/prompts/en_corpus_rating_v0.1.yaml", "configs/models/rehearsal.yaml"
TEXTS = [{"id": n, "lang": None if n else "en", "body": f"text {n} " * 9} for n in range(3)]
RATED = {"kind": "score", "input": "data/mine", "text": "body", "prompt": PROMPT, "model": MODEL}


def flags(**answers: str) -> list[str]:
    return [word for name, answer in answers.items() for word in (f"--{name}", answer)]


def without(*names: str) -> list[str]:
    return flags(**{name: answer for name, answer in RATED.items() if name not in names})


@pytest.fixture
def own(
    tmp_path: Path, empty_home: Path, server: RehearsalServer, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Project]:
    """A project as `modelcall init` makes it; nobody sits at the terminal."""
    made = Project(tmp_path / "own", task="mine", inputs="data/mine")
    made.root.mkdir()
    monkeypatch.setenv("DAGSTER_HOME", str(shutil.copytree(empty_home, tmp_path / "home")))
    monkeypatch.setenv("REHEARSAL_BASE_URL", server.base_url)
    assert made.run("init").code == 0
    with closing(made):
        yield made


class TestInit:
    def test_the_project_is_sound_and_its_task_runs_for_free(self, own: Project) -> None:
        checked = own.run("check")
        assert checked.code == 0 and "0 errors" in checked.out
        ran = own.run("run-task", "configs/tasks/rehearsal.yaml")
        assert ran.code == 0 and "10 rows, 10 succeeded" in ran.out
        assert ".env" in (own.root / ".gitignore").read_text().splitlines()
        assert (own.root / "dagster_home/dagster.yaml").is_file()

    def test_again_it_adds_what_is_missing_and_leaves_the_rest(self, own: Project) -> None:
        (own.root / "README.md").write_text("mine")
        (own.root / MODEL).unlink()
        again = own.run("init")
        assert again.code == 0 and "1 files made" in again.out
        assert "README.md is there already, and stays as it is" in again.out
        assert (own.root / "README.md").read_text() == "mine"
        assert (own.root / MODEL).read_bytes() == (ROOT / MODEL).read_bytes()

    def test_elsewhere_every_command_says_that_there_is_no_project(self, tmp_path: Path) -> None:
        nowhere = Project(tmp_path)
        for command in (["check"], ["register"], ["ui"], ["create-task", "mine"]):
            ended = nowhere.run(*command)
            assert ended.code == 2 and "no project" in ended.err, command
            assert "`modelcall init` makes one" in ended.err
        assert not any(tmp_path.iterdir())

    def test_a_place_where_none_can_be_is_told(self, own: Project, tmp_path: Path) -> None:
        inside = own.run("init", "configs/tasks")
        assert inside.code == 2 and f"in configs/ of the project {own.root}" in inside.err
        (tmp_path / "file").touch()
        above = Project(tmp_path).run("init", "file/project")
        assert above.code == 1 and "a folder above it is a file" in above.err


class TestScoring:
    @pytest.mark.parametrize("name", ["a.jsonl", "deep/b.parquet"])
    def test_a_task_for_data_that_is_there_runs(self, own: Project, name: str) -> None:
        own.write_input(name, TEXTS)
        made = own.run("create-task", "mine", *flags(**RATED))
        assert made.code == 0, made
        assert "3 of 3" in made.out and "1 of 3" in made.out, "how filled the columns are"
        assert f"modelcall check {TASK}" in made.out and "modelcall run-task mine" in made.out
        checked = own.run("check", TASK)
        assert "0 errors, 0 warnings" in checked.out, checked
        text = own.task_file.read_text()
        assert text.count("#") > 8
        assert yaml.safe_load(text)["data"]["prompt_format_key"] == "text"
        ran = own.run("run-task", TASK)
        assert ran.code == 0 and "3 rows, 3 succeeded" in ran.out, ran

    @pytest.mark.parametrize("absent", ["kind", "text", "prompt", "model"])
    def test_without_a_terminal_what_is_likely_is_taken_and_told(
        self, own: Project, absent: str
    ) -> None:
        own.write_input("a.jsonl", TEXTS)
        made = own.run("create-task", "mine", *without(absent))
        assert made.code == 0 and f"{absent}: {RATED[absent]}\n" in made.out
        assert own.run("check", TASK).code == 0

    def test_the_place_of_the_data_is_never_guessed(self, own: Project) -> None:
        own.write_input("a.jsonl", TEXTS)
        ended = own.run("create-task", "mine", *without("input"))
        assert ended.code == 2 and "--input: missing" in ended.err
        assert not own.task_file.exists()

    def test_on_a_terminal_it_asks_and_return_takes_what_is_likely(self, own: Project) -> None:
        own.write_input("a.jsonl", TEXTS)
        main, side = pty.openpty()
        with own.start("create-task", "mine", stdin=side) as asked:
            os.write(main, b"distill\nscore\n\n\n\n\n")
            told, wrong = asked.communicate(timeout=60)
        assert asked.returncode == 0, (told, wrong)
        assert "'distill' is not one of" in told + wrong, "it asks again"
        assert yaml.safe_load(own.task_file.read_text())["data"]["input_key"] == "body"

    def test_the_old_templates(self, own: Project) -> None:
        own.write_input("a.jsonl", TEXTS)
        for name, jobs in (("basic", 1), ("distributed", 2)):
            output = own.root / f"configs/tasks/{name}.yaml"
            arguments = [*without("kind"), "--template", name, "--output", output]
            assert own.run("create_task", name, *arguments).code == 0
            assert yaml.safe_load(output.read_text())["distributed"] == {"world_size": jobs}

    def test_what_is_there_is_not_overwritten(self, own: Project) -> None:
        own.write_input("a.jsonl", TEXTS)
        own.task_file.write_text("mine")
        refused = own.run("create-task", "mine", *flags(**RATED))
        assert refused.code == 2 and "is there already" in refused.err
        assert own.task_file.read_text() == "mine"
        assert own.run("create-task", "mine", *flags(**RATED), "--force").code == 0
        other = own.run("create-task", "rehearsal", *flags(**RATED), "--output", "other.yaml")
        assert other.code == 2 and "configs/tasks/rehearsal.yaml has it" in other.err
        bad = own.run("create-task", "../mine", *flags(**RATED))
        assert bad.code == 2 and "not a name" in bad.err

    @pytest.mark.parametrize(
        ("given", "wrong"),
        [
            ({"model": "configs/models/none.yaml"}, "none.yaml: cannot be read"),
            ({"prompt": MODEL}, "prompt_template: missing"),
            ({"template": "basic", "kind": "distil"}, "a task of --kind distil has none"),
            ({"kind": "evaluate"}, "a task of --kind evaluate has none"),
        ],
    )
    def test_what_cannot_be_leaves_no_file(
        self, own: Project, given: dict[str, str], wrong: str
    ) -> None:
        own.write_input("a.jsonl", TEXTS)
        ended = own.run("create-task", "mine", *flags(**{**RATED, **given}))
        assert ended.code == 2 and wrong in ended.err, ended
        assert not own.task_file.exists()

    def test_names_that_files_or_other_tasks_cannot_share(self, own: Project) -> None:
        own.write_input("a.jsonl", TEXTS)
        for name, code in (("文" * 61, 0), ("文" * 62, 2), ("a.b", 0), ("a-b", 2)):
            assert own.run("create-task", name, *flags(**RATED)).code == code, name

    def test_odd_columns(self, own: Project) -> None:
        odd = "a: #b\n\x1b[1m'"
        own.write_input("a.jsonl", [{odd: "text " * 9, "n": 1.5}, {odd: None, "n": [1]}])
        made = own.run("create-task", "mine", *without("text"), "--text", odd)
        assert made.code == 0 and "a number or a list" in made.out and "\x1b" not in made.out
        assert own.run("run-task", TASK).code == 1, "one row has no text"
        assert own.steps().spec.task.rated.input_key == odd  # type: ignore[union-attr]

    def test_the_outputs_lie_beside_an_input_that_is_all_of_data(self, own: Project) -> None:
        answers = RATED | {"input": "data", "text": "text"}
        made = own.run("create-task", "mine", *flags(**answers))
        assert made.code == 0, made
        assert own.steps().spec.folder("scores") == str(own.root / "output/mine_scores")

    @pytest.mark.parametrize(
        ("rows", "input", "code", "told"),
        [
            ([], "data/mine", 1, "data/mine: no rows; put JSONL, Parquet or Arrow files there"),
            (None, "data/none", 1, "data/none: not found; correct the path or put the data there"),
            ([b"{torn"], "data/mine", 1, "a.jsonl: line 1, column"),
            (TEXTS, "data/mine/a.jsonl", 2, "--input: a file; expected the folder that it is in"),
            (TEXTS, "s3:/x", 2, "one slash after s3:"),
            (TEXTS, "${NO_SUCH}/x", 2, "variable NO_SUCH is not set"),
        ],
    )
    def test_data_that_cannot_be_used(
        self, own: Project, rows: list[object] | None, input: str, code: int, told: str
    ) -> None:
        own.input_folder.mkdir()
        if rows:
            own.write_input("a.jsonl", rows)  # type: ignore[arg-type]
        ended = own.run("create-task", "mine", *without("input"), "--input", input)
        assert ended.code == code and told in ended.err, ended
        assert not own.task_file.exists()

    def test_a_column_that_no_row_has(self, own: Project) -> None:
        own.write_input("a.jsonl", TEXTS)
        ended = own.run("create-task", "mine", *without("text"), "--text", "bodi")
        assert ended.code == 2 and "--text: unknown" in ended.err
        assert "did you mean body?" in ended.err


DISTILLED = flags(kind="distil", input="data/mine", model=MODEL)
TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
SHAREGPT = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]


class TestOtherKinds:
    @pytest.mark.parametrize(
        ("name", "style", "row"),
        [
            ("a.jsonl", "messages", {"id": 1, "messages": TALK}),
            ("a.parquet", "messages", {"id": 1, "messages": TALK}),
            ("a.parquet", "sharegpt", {"conversations": SHAREGPT}),
            ("a.jsonl", "prompt_response", {"question": "hi?", "answer": "ho"}),
            ("a.jsonl", "instruction_input", {"instruction": "do", "input": "", "output": "done"}),
            ("a.jsonl", "prompt_response", {"instruction": "do", "output": "done"}),
        ],
    )
    def test_conversations_are_answered(
        self, own: Project, name: str, style: str, row: dict[str, object]
    ) -> None:
        own.write_input(name, [row, row])
        made = own.run("create-task", "mine", *DISTILLED)
        assert made.code == 0, made
        sets = yaml.safe_load((own.root / "configs/distillation/mine.yaml").read_text())
        assert sets["mine"]["format_style"] == style
        assert "0 errors, 0 warnings" in own.run("check", TASK).out
        ran = own.run("run-task", TASK)
        assert ran.code == 0 and "2 rows, 2 succeeded" in ran.out, ran

    def test_a_single_file_and_a_column_of_questions(self, own: Project) -> None:
        write_rows(own.root / "data/mine.jsonl", [{"frage": "Warum?"}])
        arguments = flags(kind="distil", input="data/mine.jsonl", model=MODEL)
        unknown = own.run("create-task", "mine", *arguments)
        assert unknown.code == 2 and "neither conversations nor questions" in unknown.err
        assert own.run("create-task", "mine", *arguments, "--text", "frage").code == 0
        assert "1 row, 1 succeeded" in own.run("run-task", TASK).out

    def test_an_evaluation_runs(self, own: Project) -> None:
        made = own.run("create-task", "mine", *flags(kind="evaluate", model=MODEL))
        assert made.code == 0, made
        assert "0 errors, 0 warnings" in own.run("check", TASK).out
        ran = own.run("run-task", TASK)
        assert ran.code == 0 and "100 rows, 100 succeeded" in ran.out, ran


def test_data_in_a_store(own: Project, s3_server: S3Server, bucket: str) -> None:
    (own.root / ".env").write_text(
        f"AWS_ACCESS_KEY_ID={s3_server.key}\nAWS_SECRET_ACCESS_KEY={s3_server.secret}\n"
        f"AWS_ENDPOINT_URL={s3_server.endpoint}\nAWS_REGION={s3_server.region}\n"
    )
    with closing(s3_server.client()) as client:
        client.put_object(Bucket=bucket, Key="texts/a.jsonl", Body=lines(*TEXTS))
    arguments = [*without("input"), "--input", f"s3://{bucket}/texts"]
    made = own.run("create-task", "mine", *arguments)
    assert made.code == 0 and "1 files" in made.out, made
    assert "3 rows, 3 succeeded" in own.run("run-task", TASK).out


@pytest.fixture
def dev(own: Project) -> Iterator[Dev]:
    running = Dev(own.root, os.environ["REHEARSAL_BASE_URL"])
    running.start()
    yield running
    running.kill()


@pytest.mark.slow
class TestUi:
    def test_it_survives_the_death_of_its_code_server_and_ends_wholly(self, dev: Dev) -> None:
        assert dev.process is not None
        taken = Project(dev.root).run("ui", "--port", str(dev.port))
        assert taken.code == 2 and "--port: taken" in taken.err
        (server,) = dev.named("code-server")
        os.kill(server, signal.SIGKILL)
        until(lambda: dev.named("code-server") not in ([], [server]), 60, 0.25)
        until(lambda: succeeds(dev.reload), 60, 0.5)
        assert (
            "the server of tasks has ended with -9, and is started again"
            in dev.log_file.read_text()
        )
        dev.process.send_signal(signal.SIGTERM)
        assert dev.process.wait(60) == 0
        assert dev.processes() == []

    @pytest.mark.skipif(sys.platform != "linux", reason="asks Linux to end them")
    def test_nothing_is_left_of_one_that_is_killed(self, dev: Dev) -> None:
        assert dev.process is not None
        dev.process.kill()
        until(lambda: not dev.processes(), 60, 0.25)

    def test_closing_its_terminal_ends_it(self, dev: Dev) -> None:
        assert dev.process is not None
        dev.process.send_signal(signal.SIGHUP)
        assert dev.process.wait(60) == 0
        assert dev.processes() == []


def succeeds(what: Callable[[], object]) -> bool:
    with suppress(AssertionError, OSError):
        what()
        return True
    return False
