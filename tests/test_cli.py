"""The command line as a user meets it, in the project's folder."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from project import NAMES, TASK, A, C, Project, some_rows

from modelcall_assets.defs.instance import open_instance
from modelcall_assets.errors import SetupError
from modelcall_assets.rehearsal import NO_FAULTS, Faults, RehearsalServer, serve_in_thread
from modelcall_assets.stages.standing import Retry


def published(project: Project) -> list[str]:
    folder = project.root / "data/rate/scores"
    return sorted(
        path.relative_to(folder).with_suffix("").as_posix()
        for path in folder.rglob("*.parquet")
        if ".modelcall" not in path.parts
    )


class TestRunTask:
    def test_scores_every_file_then_has_nothing_to_do(
        self, project: Project, server: RehearsalServer
    ) -> None:
        first = project.run("run-task", TASK)
        assert first.code == 0, first
        assert "3 of 3 files scored: 12 rows, 12 succeeded, 0 failed" in first.out
        assert "12 requests sent" in first.out
        assert f"scores: {project.root}/data/rate/scores" in first.out
        assert published(project) == ["a", "deep/b", "deep/er/c"]
        assert [row["api_status"] for name in NAMES for row in project.scores(name)] == [
            "success"
        ] * 12

        second = project.run("run-task", TASK)
        assert second.code == 0
        assert "nothing to do: every file is up to date, no request was sent" in second.out
        assert "3 of 3 files scored: 12 rows" in second.out
        assert server.stats()["requests"] == 12

        project.write_input(C, some_rows(6, "third"))
        project.output(A).unlink()
        third = project.run("run-task", TASK)
        assert third.code == 0
        assert "14 rows, 14 succeeded" in third.out
        assert "2 requests sent" in third.out, "the new rows; the lost file is in the journal"
        assert server.stats()["requests"] == 14
        assert len(project.scores(A)) == 4

    def test_works_when_who_starts_it_has_closed_its_streams(
        self, project: Project, server: RehearsalServer
    ) -> None:
        command = f"exec {sys.executable} -m modelcall run-task {TASK} >&- 2>&-"
        done = subprocess.run(["sh", "-c", command], cwd=project.root, check=False)
        assert (done.returncode, published(project)) == (0, ["a", "deep/b", "deep/er/c"])

    def test_file_takes_what_matches_and_fresh_asks_again(
        self, project: Project, server: RehearsalServer
    ) -> None:
        one = project.run("run-task", TASK, "--file", "deep/*.parquet")
        assert one.code == 0
        assert "1 of 1 file scored: 4 rows" in one.out
        assert published(project) == ["deep/b"]
        again = project.run("run-task", TASK, "--file", "b.parquet", "--fresh")
        assert "4 requests sent" in again.out and "0 rows answered from the journal" in again.out
        assert server.stats()["requests"] == 8
        assert server.stats()["repeated_ok"] == 4
        none = project.run("run-task", TASK, "--file", "*.csv")
        assert none.code == 2
        assert "Error: --file" in none.err and "matches '*.csv'" in none.err

    def test_jobs_share_the_files_by_the_ceil_rule_in_either_spelling(
        self, project: Project
    ) -> None:
        for name in ("d.jsonl", "e.jsonl"):
            project.write_input(name, some_rows(1, name))
        spellings = [
            ["run-task", TASK, "--job-index", "0", "--world-size", "4"],
            ["run_task", TASK, "--job_index", "1", "--world_size", "4"],
            ["run_task", TASK, "--job-index", "2", "--world_size", "4"],
            ["run-task", TASK, "--job_index", "3", "--world-size", "4"],
        ]
        shares = []
        for arguments in spellings:
            before = set(published(project))
            ended = project.run(*arguments)
            assert ended.code == 0, ended
            shares.append(sorted(set(published(project)) - before))
        assert shares == [["a", "d"], ["deep/b", "deep/er/c"], ["e"], []]
        assert "no input files to work on" in ended.out
        wrong = project.run("run-task", TASK, "--job-index", "4", "--world-size", "4")
        assert wrong.code == 2 and "expected 0 to 3" in wrong.err
        unsaid = project.run("run-task", TASK, "--world-size", "4")
        assert unsaid.code == 2 and "--job-index: missing: which of the 4 jobs" in unsaid.err

    def test_jobs_without_an_index_and_with_nothing_in_their_share(
        self, project: Project, server: RehearsalServer
    ) -> None:
        project.write_task({"distributed": {"enabled": True, "world_size": 3}})
        second = project.run("run-task", TASK, "--file", "a.jsonl", "--job-index", "1")
        assert second.code == 0 and "no input files to work on" in second.out
        assert server.stats()["requests"] == 0
        nowhere = project.run("run-task", TASK, "--file", "*.csv", "--job-index", "1")
        assert nowhere.code == 2 and "matches '*.csv'" in nowhere.err
        first = project.run("run-task", TASK, "--job-index", "0")
        assert "1 of 1 file scored" in first.out and published(project) == ["a"]
        everything = project.run("run-task", TASK)
        assert everything.code == 0 and "3 of 3 files scored" in everything.out
        assert "world_size is 3, but without --job-index this job takes all" in everything.err

    def test_a_red_file_means_exit_code_1_and_a_message(self, project: Project) -> None:
        project.write_input(A, [*some_rows(4, "first"), b"{torn", b"{torn too"])
        ended = project.run("run-task", TASK)
        assert ended.code == 1
        assert f"{A}: 2 of 6 rows failed (33.33%), more than max_failure_rate 5.00%" in ended.err
        assert f"rejected: {A}: 2 of 6 rows failed" in ended.out
        assert ended.out.startswith("2 of 3 files scored")
        assert "14 rows, 12 succeeded, 2 failed (bad_line 2)" in ended.out
        assert published(project) == ["deep/b", "deep/er/c"]

    def test_a_wrong_key_costs_one_request(
        self, project: Project, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        project.write_model({"client_config": {"api_key": "${REHEARSAL_KEY}"}})
        monkeypatch.setenv("REHEARSAL_KEY", "sk-wrong-secret")
        with serve_in_thread(api_key="sk-right") as guarded:
            monkeypatch.setenv("REHEARSAL_BASE_URL", guarded.base_url)
            ended = project.run("run-task", TASK)
            assert guarded.stats()["requests"] == 1
        assert ended.code == 1
        assert "1 request sent" in ended.out
        assert "refuses every request" in ended.err and "Check api_key" in ended.err
        assert "sk-wrong-secret" not in ended.told
        assert published(project) == []

    def test_a_wrong_key_costs_one_request_when_files_are_scattered_too(
        self, project: Project, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The second of three files is done, so that the others need two runs."""
        assert project.run("run-task", TASK).code == 0
        for name in (A, C):
            project.write_input(name, some_rows(3, "changed"))
        project.write_model({"client_config": {"api_key": "${REHEARSAL_KEY}"}})
        monkeypatch.setenv("REHEARSAL_KEY", "sk-wrong")
        with serve_in_thread(api_key="sk-right") as guarded:
            monkeypatch.setenv("REHEARSAL_BASE_URL", guarded.base_url)
            assert project.run("run-task", TASK).code == 1
            assert guarded.stats()["requests"] == 1

    def test_a_missing_variable_is_named_before_anything_runs(
        self, project: Project, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("REHEARSAL_BASE_URL")
        ended = project.run("run-task", TASK)
        assert ended.code == 2
        assert "configs/models/rehearsal.yaml:client_config.base_url" in ended.err
        assert "variable REHEARSAL_BASE_URL is not set" in ended.err
        assert project.instance.get_runs() == []

    def test_a_mistake_in_the_task_file_is_named_by_field(self, project: Project) -> None:
        project.write_task({"max_failure_rat": 0.2})
        ended = project.run("run-task", TASK)
        assert ended.code == 2
        assert f"{TASK}:max_failure_rat: " in ended.err and "max_failure_rate" in ended.err

    def test_two_inputs_with_one_output_are_both_named(self, project: Project) -> None:
        project.write_input("a.parquet", some_rows(1))
        with pytest.raises(SetupError) as caught:
            project.steps().inputs.files()
        assert "'a.jsonl' and 'a.parquet' would both be written to 'a.parquet'" in str(caught.value)
        ended = project.run("run-task", TASK)
        assert ended.code == 2
        assert "a.jsonl" in ended.err and "a.parquet" in ended.err
        assert published(project) == []

    def test_an_input_folder_that_is_not_there_is_named(self, project: Project) -> None:
        project.write_task({"data": {"input_folder": "data/nowhere"}})
        ended = project.run("run-task", TASK)
        assert ended.code != 0
        assert "data/nowhere" in ended.err


class TestInterruption:
    def test_what_was_answered_before_is_not_paid_again(
        self, project: Project, server: RehearsalServer
    ) -> None:
        for name in NAMES:
            project.write_input(name, some_rows(30, name))
        server.set_faults(Faults(latency_ms=100))
        ended = project.signalled(
            lambda: server.stats()["answered"] >= 10, "run-task", TASK, number=signal.SIGINT
        )
        assert ended.code != 0 and "Traceback" not in ended.told, ended
        assert "interrupted: every reply received is kept" in ended.err
        assert 10 <= server.stats()["answered"] < 90
        assert published(project) == []

        server.set_faults(NO_FAULTS)
        ended = project.run("run-task", TASK)
        assert ended.code == 0, ended
        assert "90 rows, 90 succeeded" in ended.out
        assert server.stats()["repeated_ok"] <= 4, "more than what was in flight is paid again"
        assert server.stats()["requests"] <= 90 + 4

    def test_a_retry_whose_input_is_gone_meanwhile_is_gone_on_with_elsewhere(
        self, project: Project, server: RehearsalServer
    ) -> None:
        names = "a.jsonl", "gone.jsonl"
        for name in names:
            project.write_input(name, some_rows(2, name))
        assert project.run("run-task", TASK).code == 0
        task = project.steps()
        latest = {name: task.stage("scores").latest(name) for name in names}
        files = {name: made.published for name, made in latest.items() if made}
        Retry(["scores"], {"where": "score >= 0"}, files).begin(task)  # as a kill leaves it
        (project.root / project.inputs / "gone.jsonl").unlink()
        ended = project.run("retry", TASK, "--where", "score > 0", "--file", "gone.jsonl")
        assert ended.code == 1 and "gone.jsonl: scores out of date or gone" in ended.err
        asked = server.stats()["requests"]
        Retry(["scores"], {"where": "score >= 0"}, files).begin(task)
        ended = project.run("run-task", TASK)
        assert ended.code == 0 and "goes on with a retry" in ended.err, ended
        assert server.stats()["requests"] == asked + 2


class TestProgress:
    def test_elsewhere_than_on_a_terminal_it_is_a_line(self, project: Project) -> None:
        project.write_model({"prices": {"usd_per_million_input_tokens": 1}})
        ended = project.run("run-task", TASK)
        line = r"^scores: 12 of 12 rows, 0 failed, 0 of 4 in flight, [\d,]+ rows/s, "
        line += r"[\d,]+ requests/s, cost unknown$"
        assert re.search(line, ended.err, re.MULTILINE), ended.err
        assert "━" not in ended.err and "\x1b" not in ended.told

    def test_it_is_one_line_however_long(self, project: Project, server: RehearsalServer) -> None:
        server.set_faults(Faults(rate_400=0.5, rate_filtered=0.4))
        project.write_task({"max_failure_rate": 1})
        ended = project.run("run-task", TASK)
        (line,) = (line for line in ended.err.splitlines() if line.startswith("scores: 12 of 12"))
        assert len(line) > 80 and line.endswith("cost unknown")

    def test_what_is_waited_for_is_told_within_seconds(
        self, project: Project, server: RehearsalServer
    ) -> None:
        server.set_faults(Faults(rate_429=1))
        process = project.start("run-task", TASK)
        assert process.stderr is not None
        try:
            told = next(line for line in process.stderr if "0 of 12 rows" in str(line))
        finally:
            process.kill()
            process.communicate()
        assert re.search(r"all endpoints wait: \d+ wait after 429 rate_limited from", str(told))

    def test_on_a_terminal_it_is_a_bar(self, project: Project, server: RehearsalServer) -> None:
        server.set_faults(Faults(latency_ms=200))
        screen, terminal = pty.openpty()
        environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120"}
        process = project.start("run-task", TASK, stderr=terminal, env=environment)
        os.close(terminal)
        shown = _read_to_the_end(screen)
        assert process.wait(timeout=60) == 0
        process.communicate()
        assert "━" in shown
        assert "12/12" in shown
        assert "rows/s" in shown
        assert re.search(r"\b[1-9]\d*/12", shown)


def _read_to_the_end(descriptor: int) -> str:
    chunks = []
    while True:
        try:
            chunk = os.read(descriptor, 65536)
        except OSError:  # Linux: the other side has closed
            chunk = b""
        if not chunk:
            os.close(descriptor)
            return b"".join(chunks).decode("utf-8", "replace")
        chunks.append(chunk)


class TestPlan:
    def test_shows_rows_tokens_cost_and_what_the_journal_holds(
        self, project: Project, server: RehearsalServer
    ) -> None:
        unknown = project.run("plan", TASK)
        assert unknown.code == 0
        assert re.search(r"a\.jsonl\s+│ new │\s+4 │\s+4 │\s+[1-9]\d+ │", unknown.out), unknown
        assert re.search(r"3 files\s+│\s+│\s+12 │\s+12 │\s+[\d,]+ │", unknown.out)
        assert "to send: about 12 requests" in unknown.out
        assert "cost: unknown; give `prices` in the model file" in unknown.out
        assert server.stats()["requests"] == 0
        assert published(project) == []

        project.write_model(
            {"prices": {"usd_per_million_input_tokens": 0, "usd_per_million_output_tokens": 1000}}
        )
        priced = project.run("plan", TASK, "--answer-tokens", "50")
        assert "cost: about 0.6000 USD with 50 tokens per answer" in priced.out

        assert project.run("run-task", TASK, "--file", A).code == 0
        later = project.run("plan", TASK, "--answer_tokens", "50")
        assert "files: new 2, up to date 1" in later.out
        assert "to send: about 8 requests" in later.out
        assert "cost: about 0.4000 USD" in later.out


class TestTry:
    def test_shows_prompt_reply_and_result_and_leaves_nothing_behind(
        self, project: Project, server: RehearsalServer
    ) -> None:
        before = sorted(project.root.rglob("*"))
        ended = project.run("try", TASK, "--rows", "2")
        assert ended.code == 0
        assert "You judge texts and answer with one JSON object." in ended.out
        assert "Judge this text:\nfirst 0 and no more" in ended.out
        assert ended.out.count("── row ") == 2 and "2 of 2 rows succeeded" in ended.out
        assert '"rated_by":' in ended.out, "the raw reply"
        parsed = ended.out.split("parsed:")[1]
        assert re.match(r'\s*\{\s*"score": [1-5],', parsed)
        assert server.stats()["requests"] == 2
        assert sorted(project.root.rglob("*")) == before
        by_name = project.run("try", TASK, "--rows", "1", "--file", "b.parquet")
        assert by_name.code == 0 and "1 of 1 rows succeeded" in by_name.out

    def test_shows_why_a_row_fails(self, project: Project, server: RehearsalServer) -> None:
        project.write_input(A, [{"id": 1, "txt": "the column is misspelt"}])
        ended = project.run("try", TASK, "--rows", "1")
        assert "error: missing_input: input column 'text' is absent" in ended.out
        assert (ended.code, "0 of 1 rows succeeded" in ended.out) == (1, True)
        project.write_input(A, [{"id": 1, "txt": "misspelt"}, {"id": 2, "text": "fine"}])
        some = project.run("try", TASK, "--rows", "2")
        assert (some.code, "1 of 2 rows succeeded" in some.out) == (0, True)
        project.write_input(A, [{"id": 1, "txt": "the column is misspelt"}])
        assert server.stats()["requests"] == 1

    def test_a_wrong_key_is_told_without_a_traceback(
        self, project: Project, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        project.write_model({"client_config": {"api_key": "${REHEARSAL_KEY}"}})
        monkeypatch.setenv("REHEARSAL_KEY", "sk-wrong-secret")
        with serve_in_thread(api_key="sk-right") as guarded:
            monkeypatch.setenv("REHEARSAL_BASE_URL", guarded.base_url)
            ended = project.run("try", TASK)
            assert guarded.stats()["requests"] == 1
        assert ended.code != 0
        assert "refuses every request" in ended.err
        assert "sk-wrong-secret" not in ended.told


class TestHelpAndCheck:
    @pytest.mark.parametrize("command", ["run-task", "plan", "try", "check", "rehearse"])
    def test_the_help_of_every_command_has_an_example(self, project: Project, command: str) -> None:
        ended = project.run(command, "--help")
        assert ended.code == 0
        assert re.search(rf"^ .*modelcall {command}\b", ended.out, re.MULTILINE), ended.out

    def test_the_main_help_shows_the_first_steps(self, project: Project) -> None:
        ended = project.run("--help")
        for command in ("check", "plan", "try", "rehearse", "run-task"):
            assert f"modelcall {command} " in ended.out

    def test_check_passes_this_project_and_fails_a_mistake(self, project: Project) -> None:
        good = project.run("check")
        assert (good.code, "0 errors" in good.out) == (0, True), good
        project.write_task({"max_failure_rate": 2})
        bad = project.run("check")
        assert bad.code == 1
        assert f"{TASK}:max_failure_rate" in bad.out

    @pytest.mark.parametrize("arguments", [["run-task"], ["run-task", "none.yaml"], ["nonsense"]])
    def test_wrong_usage_says_how(self, project: Project, arguments: Sequence[str]) -> None:
        ended = project.run(*arguments)
        assert ended.code == 2
        assert "Usage:" in ended.err and "Error:" in ended.err


def test_a_new_home_gets_the_shipped_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DAGSTER_HOME", "")
    with open_instance(tmp_path) as instance:
        assert not instance.telemetry_enabled
        assert not instance.nux_enabled
        assert instance.global_op_concurrency_default_limit == 1
    assert (tmp_path / "dagster_home/dagster.yaml").is_file()
