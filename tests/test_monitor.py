"""Runs as other processes see them and change them while they go on."""

from __future__ import annotations

import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import orjson
import pytest
from project import TASK, A, B, C, Project, Row, some_rows, until

from modelcall_assets.rehearsal import NO_FAULTS, Faults, RehearsalServer

ROWS = 600
SLOW = Faults(latency_ms=150)


@pytest.fixture
def long(project: Project, server: RehearsalServer) -> Project:
    """One file, too much to be answered while a test looks."""
    for name in (A, B):
        (project.input_folder / name).unlink()
    project.write_input(C, some_rows(ROWS))
    server.set_faults(SLOW)
    return project


@contextmanager
def running(project: Project) -> Iterator[subprocess.Popen[str]]:
    """`run-task` in a process of its own, as soon as its stage that asks is seen."""
    with project.start("run-task", TASK) as process:
        try:
            until(lambda: [row for row in seen(project) if "limit" in row])
            yield process
        finally:
            process.kill()


def seen(project: Project) -> list[Row]:
    """What `monitor` says now."""
    ended = project.run("monitor", TASK, "--once", "--json")
    assert ended.code == 0, ended
    return [orjson.loads(line) for line in ended.out.splitlines()]


def stage_of(project: Project) -> Row:
    (row,) = seen(project)
    return row


def finish(project: Project, server: RehearsalServer, process: subprocess.Popen[str]) -> list[Row]:
    """The rows, once the rest is answered quickly."""
    server.set_faults(NO_FAULTS)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return project.scores(C)


def tuned(project: Project, *options: str) -> str:
    ended = project.run("tune", TASK, *options)
    assert ended.code == 0, ended
    return ended.out


def in_flight(server: RehearsalServer) -> Any:
    return server.stats()["in_flight"]


def all_wait(row: Row) -> bool:
    return row["held_up"] and not row["in_flight"]


class TestTune:
    def test_fewer_and_more_in_flight_while_it_goes_on(
        self, long: Project, server: RehearsalServer
    ) -> None:
        with running(long) as process:
            until(lambda: in_flight(server) == 4)
            assert " of 1 in flight" in tuned(long, "--requests", "1")
            until(lambda: in_flight(server) <= 1)
            server.reset()
            until(lambda: server.stats()["answered"] >= 4)
            assert server.stats()["max_in_flight"] == 1
            assert " of 12 in flight" in tuned(long, "--requests", "12")
            until(lambda: in_flight(server) == 12)
            rows = finish(long, server, process)
            assert server.stats()["max_in_flight"] == 12
        assert len(rows) == ROWS
        assert {(row["api_status"], row["api_attempts"]) for row in rows} == {("success", 1)}

    def test_a_paused_run_sends_nothing_and_loses_nothing(
        self, long: Project, server: RehearsalServer
    ) -> None:
        with running(long) as process:
            assert "paused" in tuned(long, "--pause")
            until(lambda: in_flight(server) == 0)
            sent = server.stats()["requests"]
            done = stage_of(long)["done"]
            for _ in range(3):
                row = stage_of(long)
                assert (row["paused"], row["in_flight"], row["done"]) == (True, 0, done)
            assert server.stats()["requests"] == sent < ROWS
            assert " of 8 in flight" in tuned(long, "--requests", "8")
            assert server.stats()["requests"] == sent, "it is still paused"
            assert "paused" not in tuned(long, "--resume")
            assert len(finish(long, server, process)) == ROWS
        assert server.stats()["requests"] == server.stats()["distinct"] == ROWS
        told = [log.message for log in long.instance.all_logs(row["run_id"])]
        tunings = [each.partition("of")[2] for each in told if each.startswith("tuned: scores: ")]
        assert ["paused" in each for each in tunings] == [True, True, False]

    def test_it_lasts_as_long_as_the_run_which_is_interrupted_as_any(
        self, long: Project, server: RehearsalServer
    ) -> None:
        with running(long) as process:
            tuned(long, "--pause", "--requests", "1")
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
            assert process.returncode == 130 and "every reply received is kept" in err
        with running(long):
            row = stage_of(long)
        assert (row["limit"], row["paused"]) == (4, False)

    def test_the_endpoints_own_limit_stays(self, long: Project) -> None:
        long.write_model({"client_config": {"max_in_flight": 2}})
        with running(long):
            told = tuned(long, "--requests", "50")
        assert " of 2 in flight" in told
        assert "max_in_flight in the model file allows 2 requests at most" in told

    def test_nothing_to_tune(self, project: Project) -> None:
        ended = project.run("tune", TASK, "--pause")
        assert (ended.code, ended.out) == (1, "")
        assert "rate: no run of it asks a model now" in ended.err
        assert project.run("tune", TASK).code == 2


class TestMonitor:
    def test_says_what_a_run_elsewhere_is_about(self, long: Project) -> None:
        with running(long) as process:
            until(lambda: stage_of(long)["done"] > 4)
            row = stage_of(long)
            (line,) = long.run("monitor", "--once").out.splitlines()
        assert (row["task"], row["stage"], row["state"]) == ("rate", "scores", "running")
        assert (row["pid"], row["rows"], row["limit"]) == (process.pid, ROWS, 4)
        assert row["ok"] == row["done"] and row["requests"] >= row["done"]
        assert line.startswith("rate scores: ") and f" of {ROWS} rows, 0 failed, " in line

    def test_ends_with_the_run_and_says_how(self, long: Project, server: RehearsalServer) -> None:
        with running(long) as process, long.start("monitor", TASK) as monitor:
            assert monitor.stderr is not None
            told = monitor.stderr.readline()
            finish(long, server, process)
            out, _ = monitor.communicate(timeout=60)
        assert told.startswith("rate scores: ")
        assert (monitor.returncode, out) == (0, "rate: done\n")

    def test_a_run_with_failed_rows_is_seen_and_tuned(
        self, long: Project, server: RehearsalServer
    ) -> None:
        long.write_task({"max_failure_rate": 1.0})
        long.write_input(C, [b"{torn", *some_rows(ROWS)])
        with running(long) as process:
            until(lambda: stage_of(long)["failed"])
            assert stage_of(long)["reasons"] == {"bad_line": 1}
            for option, paused in (("--pause", True), ("--resume", False)):
                assert long.run("tune", TASK, option).code == 0
                assert stage_of(long)["paused"] is paused
            assert len(finish(long, server, process)) == ROWS + 1

    def test_a_killed_run_is_not_waited_for(self, long: Project) -> None:
        with running(long) as process:
            process.kill()
            process.communicate()
            ended = long.run("monitor", TASK)
        assert ended == (0, "", "nothing runs\n")

    def test_says_what_all_wait_for(self, long: Project, server: RehearsalServer) -> None:
        server.set_faults(Faults(rate_429=1, retry_after_s=30))
        with running(long):
            until(lambda: all_wait(stage_of(long)))
            told = long.run("monitor", "--once").out
        waits = (
            r"0 of 4 in flight, all endpoints wait: \d+ wait after 429 rate_limited from .+, next"
        )
        assert re.search(waits, told)
