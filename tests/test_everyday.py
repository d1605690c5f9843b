"""What one asks every day: which tasks, how far, why red; and an end to what goes on."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import dagster as dg
import orjson
import pytest
from dagster._core.execution.backfill import BulkActionStatus, PartitionBackfill
from dev import Dev
from project import QUIET, RED, A, B, C, Project, Row, some_rows, until

from modelcall_assets.defs.instance import TASK_TAG, lock_path, register
from modelcall_assets.defs.logs import JOB_TAG
from modelcall_assets.defs.runs import PROCESS_TAG
from modelcall_assets.rehearsal import Faults, RehearsalServer

ROOT = Path(__file__).parent.parent
NAMES = ("rate", "configs/tasks/rate.yaml")


def rows(project: Project, *command: str) -> list[Row]:
    ended = project.run(*command, "--json")
    assert ended.code == 0, ended
    return [orjson.loads(line) for line in ended.out.splitlines()]


class TestATask:
    @pytest.mark.parametrize("name", NAMES)
    def test_is_its_file_or_its_name(self, project: Project, name: str) -> None:
        ended = project.run("plan", name)
        assert ended.code == 0 and "12" in ended.out, ended
        assert project.run("register", name).code == 0

    def test_is_called_as_its_file_too(self, project: Project) -> None:
        project.task_file.rename(project.task_file.with_name("other name.yaml"))
        assert project.run("plan", "other name").code == project.run("plan", "rate").code == 0
        project.write_input("rate", [])
        (project.root / "rate").mkdir()  # a folder is no task
        assert project.run("plan", "rate").code == 0

    def test_of_several_of_one_name_is_the_one_that_the_catalog_has(self, project: Project) -> None:
        text, folder = project.task_file.read_text(), project.task_file.parent
        project.task_file.with_name("same.yaml").write_text(text)  # broken: the name is taken
        assert project.run("plan", "rate").code == 0
        for name in ("one", "two"):
            (folder / name).mkdir()
            (folder / name / "rates.yaml").write_text(text.replace("rate", name))
        ended = project.run("plan", "rates")
        assert ended.code == 2 and "no task of that name" in ended.err

    def test_that_is_unknown_is_told_with_what_was_meant(self, project: Project) -> None:
        for command in ("run-task", "export", "adopt", "report", "compare", "stop", "status"):
            ended = project.run(command, "raet", *["raet"] * (command == "compare"))
            assert ended.code == 2, ended
            assert "did you mean rate? `modelcall tasks` lists them" in ended.err

    def test_is_completed_by_the_shell_whatever_its_files_are(self, project: Project) -> None:
        project.task_file.with_name("torn.yaml").write_text("task_name: [")
        project.task_file.with_name("more.yaml").write_text("task_name: rather")

        def completed(words: str) -> set[str]:
            environment = {"COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)}
            environment |= {"_MODELCALL_COMPLETE": "bash_complete"}
            job = project.start(env={**os.environ, **environment})
            out, err = job.communicate(timeout=60)
            assert err == "", err
            return {*out.splitlines()}

        assert completed("modelcall plan ra") == {"plain,rate", "plain,rather"}
        assert completed("modelcall stop tor") == {"plain,torn"}
        assert completed("modelcall plan configs/") == {"file,configs/"}
        assert completed("modelcall sta") == {"plain,status"}
        shutil.rmtree(project.root / "configs")
        (project.root / "workspace.yaml").unlink()
        assert completed("modelcall plan ra") == {"file,ra"}


class TestTasks:
    def test_lists_them_with_what_is_done(self, project: Project, server: RehearsalServer) -> None:
        project.task_file.with_name("torn.yaml").write_text("task_name: [")
        new, torn = rows(project, "tasks")
        expected = {"task": "rate", "file": "rate.yaml", "it": "rates"}
        assert new == {**expected, "files": 0, "done": 0, "failed": 0, "state": "never run"}
        assert (torn["task"], torn["files"]) == ("torn", None) and "broken" in torn["state"]
        assert project.run("run-task", "rate", "--file", A).code == 0
        made, _ = rows(project, "status")
        assert (made["files"], made["done"], made["failed"]) == (3, 1, 0)
        assert made["state"].startswith("well 20")
        assert "together" in project.run("status").out

    def test_of_nothing_is_nothing(self, project: Project) -> None:
        project.task_file.unlink()
        assert rows(project, "tasks") == rows(project, "status") == []
        assert "`modelcall create-task NAME` makes one" in project.run("tasks").err


class TestStatus:
    def test_tells_what_the_next_run_would_do(self, project: Project) -> None:
        raw, scores = rows(project, "status", "rate")
        assert (raw["step"], raw["files"], raw["missing"], raw["done"]) == ("raw", 3, 3, 0)
        assert project.run("run-task", "rate").code == 0
        raw, scores = rows(project, "status", "rate")
        assert (scores["done"], scores["rows"], scores["ok"]) == (3, 12, 12)
        assert "next:" not in project.run("status", "rate").out
        project.write_prompt({"prompt_template": {"system_text": "Otherwise."}})
        project.write_input(A, some_rows(5))
        raw, scores = rows(project, "status", "rate")
        assert (raw["out_of_date"], scores["out_of_date"]) == (1, 3)
        shown = project.run("status", "rate").out
        assert "next: modelcall run-task rate" in shown and "retry" not in shown
        assert project.run("run-task", "rate").code == 0
        raw, scores = rows(project, "status", "rate")
        assert (raw["done"], scores["done"], scores["rows"]) == (3, 3, 13)

    def test_what_follows_a_changed_input_is_out_of_date_too(self, project: Project) -> None:
        assert project.run("run-task", "rate").code == 0
        project.write_input(A, some_rows(5))
        raw, scores = rows(project, "status", "rate")
        assert (raw["out_of_date"], scores["out_of_date"], scores["done"]) == (1, 1, 2)

    def test_says_why_a_file_failed(self, project: Project) -> None:
        (project.input_folder / B).write_bytes(b"no Parquet")
        project.write_input(C, [*some_rows(4), b"{torn"])
        assert project.run("run-task", "rate").code == 1
        raw, scores = rows(project, "status", "rate")
        assert (raw["failed"], scores["missing"], scores["failed"]) == (1, 1, 1)
        assert (scores["rows"], scores["failed_rows"]) == (9, 1), "what was rejected, too"
        shown = project.run("status", "rate").out
        assert f"{B}: raw failed: " in shown
        assert f"{C}: scores failed: 1 of 5 rows failed (20.00%)" in shown
        for command in ("run-task", "failures", "retry"):
            assert f"next: modelcall {command} rate" in shown


class TestStop:
    def test_ends_a_run_of_another_terminal_and_nothing_is_lost(
        self, project: Project, server: RehearsalServer
    ) -> None:
        project.write_input(A, some_rows(40))
        server.set_faults(Faults(latency_ms=200))
        with project.start("run-task", "rate") as job:
            until(lambda: server.stats()["answered"] >= 8)
            ended = project.run("stop", "r*")
            assert ended.code == 0 and "rate: " in ended.out and "stopped" in ended.out, ended
            _, err = job.communicate(timeout=60)
        assert job.returncode == 130 and "every reply received is kept" in err, err
        (run,) = project.instance.get_runs()
        assert run.status == dg.DagsterRunStatus.CANCELED
        assert RED not in project.statuses().values()
        stats = server.stats()
        assert stats["abandoned"] == 0 and stats["requests"] < 48
        server.set_faults(Faults())
        again = project.run("run-task", "rate")
        assert (again.code, server.stats()["requests"]) == (0, 48), again
        assert server.stats()["repeated_ok"] == 0
        assert rows(project, "tasks")[0]["state"].startswith("well")

    def test_by_several_at_once_waits_for_replies_as_well(
        self, project: Project, server: RehearsalServer
    ) -> None:
        """In a process that has SIGINT ignored, as what a script begins with `&` has."""
        project.write_input(A, some_rows(40))
        server.set_faults(Faults(latency_ms=3_000))
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            job = project.start("run-task", "rate")
        finally:
            signal.signal(signal.SIGINT, before)
        with job:
            lock = lock_path(project.instance, "")
            until(lambda: any(lock.glob("*")))
            stops = [project.start("stop", "rate") for _ in range(3)]
            told = [each.communicate(timeout=60)[0] for each in stops]
            _, err = job.communicate(timeout=60)
        assert job.returncode == 130, err
        assert any("stopped" in each for each in told)
        assert all(each.count("rate: ") <= 1 for each in told), "a run and its process are one"
        stats = server.stats()
        assert stats["abandoned"] == 0 and stats["requests"] < 48
        logged = project.run("logs", "rate").out
        assert "Stack Trace" not in logged and not any(lock.glob("*"))

    def test_says_when_there_is_nothing(self, project: Project) -> None:
        for which in ("rate", "--all", "ra*"):
            ended = project.run("stop", which)
            assert (ended.code, ended.out) == (0, "nothing to stop\n"), ended
        assert project.run("stop").code == project.run("stop", "rate", "--all").code == 2

    def test_does_not_wait_for_a_run_that_was_killed(
        self, project: Project, server: RehearsalServer
    ) -> None:
        server.set_faults(Faults(latency_ms=100_000))
        ended = project.signalled(lambda: server.stats()["in_flight"], "run-task", "rate")
        assert ended.code == -signal.SIGKILL
        assert project.run("stop", "rate").out == "nothing to stop\n"

    def test_leaves_another_machine_alone_and_says_which(self, project: Project) -> None:
        tags = {PROCESS_TAG: "far/away", TASK_TAG: "rate"}
        project.instance.create_run_for_job(
            dg.job(name="any")(lambda: None), tags=tags, status=dg.DagsterRunStatus.STARTED
        )
        ended = project.run("stop", "rate")
        assert ended.code == 1 and "goes on at far: stop it there" in ended.out, ended
        (run,) = project.instance.get_runs()
        assert run.status == dg.DagsterRunStatus.STARTED


@pytest.fixture
def dev(project: Project, server: RehearsalServer) -> Iterator[Dev]:
    shutil.copy(ROOT / "workspace.yaml", project.root)
    shutil.copy(ROOT / "dagster_home/dagster.yaml", project.root / "dagster_home")
    running = Dev(project.root, server.base_url)
    running.start()
    yield running
    running.kill()


class TestDetached:
    @pytest.mark.slow
    def test_a_run_of_the_daemon_is_seen_and_stopped_as_any_other(
        self, project: Project, server: RehearsalServer, dev: Dev
    ) -> None:
        project.write_input(A, some_rows(400))
        server.set_faults(Faults(latency_ms=200))

        ended = project.run("run-task", "rate", "--detach", "--file", A)
        assert ended.code == 0 and "modelcall stop rate" in ended.out, ended
        assert "no daemon" not in ended.out
        until(lambda: server.stats()["answered"] >= 8)

        (run,) = project.instance.get_runs()
        assert run.run_id in ended.out and run.job_name == "run_rate"
        assert rows(project, "tasks")[0]["state"] == "running"
        (seen,) = rows(project, "monitor", "rate", "--once")
        assert (seen["run_id"], seen["stage"], seen["rows"]) == (run.run_id, "scores", 400)
        until(lambda: rows(project, "status", "rate")[1]["running"] == 1)
        ended = project.run("stop", "rate")
        assert "stopped" in ended.out, ended
        (run,) = project.instance.get_runs()
        assert run.status == dg.DagsterRunStatus.CANCELED
        server.set_faults(Faults())
        assert project.run("run-task", "rate", "--detach").code == 0
        until(lambda: project.instance.get_runs()[0].is_success, every=0.25)
        (raw, scores) = rows(project, "status", "rate")
        assert (raw["done"], scores["done"], scores["ok"]) == (3, 3, 408)
        stats = server.stats()
        assert (stats["requests"], stats["repeated_ok"], stats["abandoned"]) == (408, 0, 0)
        logged = project.instance.all_logs(project.instance.get_runs()[0].run_id)
        assert any(entry.message.startswith("scores: ") for entry in logged)

    def test_without_a_daemon_it_is_queued(self, project: Project, server: RehearsalServer) -> None:
        ended = project.run("run-task", "rate", "--detach", "--job-index", "1", "--world-size", "3")
        assert ended.code == 0 and "no daemon runs" in ended.out, ended
        (run,) = project.instance.get_runs()
        assert run.status == dg.DagsterRunStatus.QUEUED and run.tags[JOB_TAG] == "1/3"
        assert rows(project, "tasks")[0]["state"] == "queued"
        assert "stopped" in project.run("stop", "rate").out
        (run,) = project.instance.get_runs()
        assert run.status == dg.DagsterRunStatus.CANCELED and server.stats()["requests"] == 0
        ended = project.run("run-task", "rate", "--detach", "--file", "absent/*")
        assert ended.code == 2 and "--file" in ended.err, ended

    def test_the_job_takes_its_share_by_the_rule_of_the_command(
        self, project: Project, server: RehearsalServer
    ) -> None:
        job = project.definitions().resolve_job_def("run_rate")

        def made(tags: Mapping[str, str] | None = None, **config: Any) -> list[int]:
            chosen = QUIET | {"ops": {"rate_all_stages": {"config": config}}}
            ran = job.execute_in_process(chosen, project.instance, tags=tags)
            assert ran.success
            return [row["done"] for row in rows(project, "status", "rate")]

        assert made({JOB_TAG: "0/3"}) == [1, 1]
        assert made(pattern="*.jsonl") == [2, 2]
        assert made() == [3, 3] and server.stats()["requests"] == 12
        assert made(options={"scores": {"fresh": True}}) == [3, 3]
        assert server.stats()["requests"] == 24


def test_what_is_queued_is_cancelled(project: Project) -> None:
    graph, keys = project.definitions().resolve_asset_graph(), [A, B, C]
    register(project.instance, project.steps())
    selection, now = [project.asset_key("raw"), project.asset_key("scores")], time.time()
    backfill = PartitionBackfill.from_asset_partitions(
        "few", graph, keys, selection, now, {}, project.instance, False, None, None, None
    )
    project.instance.add_backfill(backfill)
    job, tags = dg.job(name="any")(lambda: None), {TASK_TAG: "rate"}
    project.instance.create_run_for_job(job, tags=tags)
    assert rows(project, "tasks")[0]["state"] == "queued"
    ended = project.run("stop", "rate")
    assert ended.code == 0 and "rate: backfill few: stopped" in ended.out, ended
    assert project.instance.get_runs()[0].status == dg.DagsterRunStatus.CANCELED
    few = project.instance.get_backfill("few")
    assert few is not None and few.status == BulkActionStatus.CANCELING
    assert project.run("stop", "rate").out == "nothing to stop\n"
