"""What commands list, for people and for programs; and with which code commands end."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from endpoint import in_thread, said, serving
from project import TASK, A, Project, ran, some_rows

from modelcall_assets.rehearsal import RehearsalServer

DEEP = "/".join(["a-folder-with-a-long-name"] * 4)
LISTING: dict[str, tuple[str, ...]] = {
    "failures": (TASK,),
    "compare": (TASK, TASK, "--by", "score"),
    "agreement": (TASK, "--figure", "score", "--figure", "api_attempts"),
    "export": (TASK, "--all", "--output", "copies", "--force"),
    "publish": (TASK, DEEP, "--dry-run"),
    "register": (),
    "verify": (TASK,),
    "clean": (TASK, "--journal-older-than", "0", "--dry-run"),
    "adopt": (TASK, "--dry-run"),
}


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory, empty_home: Path) -> Iterator[Project]:
    """Files with long paths; two bad lines; and a result of others."""
    made = Project(tmp_path_factory.mktemp("listed"))
    made.write_input(f"{DEEP}/b.jsonl", [*some_rows(2, "deep"), b"{torn"])
    with closing(made), ran(made, empty_home, 0, max_failure_rate=1.0):
        name = f"{DEEP}/theirs.jsonl"
        made.write_input(name, some_rows(1))
        made.output(name).write_bytes(made.output(A).read_bytes())
        yield made


def words(told: Any) -> Iterator[str]:
    if isinstance(told, str):
        yield from (word.strip("(),:;") for word in told.split())
    elif isinstance(told, dict | list):
        for each in told.values() if isinstance(told, dict) else told:  # type: ignore[union-attr]
            yield from words(each)


@pytest.mark.parametrize("command", LISTING)
def test_every_word_is_whole_at_80_columns_and_there_is_json(listed: Project, command: str) -> None:
    ended = listed.run(command, *LISTING[command], columns=80)
    assert ended.out and all(line.isprintable() for line in ended.out.splitlines()), ended
    rows = listed.listed(command, *LISTING[command])
    assert rows and all(rows), "an object a line, and nothing else"
    assert {*words(rows)} <= {*words(ended.out)}


class TestFailures:
    def test_name_the_line_of_the_input_and_the_sample(self, distilling: Project) -> None:
        distilling.write_input(A, [b"{torn", {"messages": [{"role": "user", "content": "x"}]}])
        with in_thread(serving(said("content_filter", content=""))) as endpoint:
            distilling.write_model({"client_config": {"base_url": endpoint.url}})
            distilling.write_generation({"samples": 2}, max_failure_rate=1.0)
            assert distilling.run("run-task", distilling.task_file).code == 0
        rows = distilling.listed("failures", distilling.task_file)
        assert [row["sample"] for row in rows if row["reason"] != "bad_line"] == [0, 1]
        assert {row["detail"][:6] for row in rows if row["reason"] == "bad_line"} == {"line 1"}
        told = distilling.run("failures", distilling.task_file).out
        assert "┃ sample ┃" in told


class TestRuns:
    def test_what_files_have_in_common_is_told_once(self, project: Project) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        project.write_model({"client_config": {"base_url": url, "max_retries": 0}})
        ended = project.run("run-task", TASK)
        assert ended.code == 1 and ended.err.count("Connect call failed") == 1
        assert "the same of 2 more files, such as" in ended.err
        assert ended.out.startswith("0 of 3 files scored: 12 rows, 0 succeeded, 12 failed")

    def test_a_dead_proxy_of_the_env_file_is_called_that(
        self, project: Project, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        with socket.create_server(("127.0.0.1", 0)) as free:
            dead = f"127.0.0.1:{free.getsockname()[1]}"
        (project.root / ".env").write_text(f"HTTP_PROXY=http://{dead}\n")
        ended = project.run("try", TASK, "--rows", "1")
        assert ended.code == 1 and f"the proxy {dead} of the environment: " in ended.out

    def test_a_retry_says_first_what_it_did(self, project: Project) -> None:
        project.write_task({"max_failure_rate": 1.0})
        with in_thread(serving(said(content="no JSON"))) as endpoint:
            project.write_model({"client_config": {"base_url": endpoint.url}})
            assert project.run("run-task", TASK, "--file", A).code == 0
        project.write_model()
        ended = project.run("retry", TASK)
        assert ended.out.startswith("retried 1 file: 0 rows without an answer, 4 before\n"), ended


CODES: dict[int, tuple[Sequence[str], dict[str, Any]]] = {
    0: (("run-task", TASK), {}),
    1: (("run-task", TASK), {"data": {"input_key": "absent"}}),
    2: (("run-task", TASK), {"data": {"input_folder": 1}}),
}


@pytest.mark.parametrize("code", CODES)
def test_exit_codes(project: Project, code: int) -> None:
    command, task = CODES[code]
    project.write_task(task)
    assert project.run(*command).code == code


def test_the_exit_code_of_a_command_that_was_stopped(
    project: Project, server: RehearsalServer
) -> None:
    server.set_faults(server.faults.changed({"latency_ms": 60_000}))
    ended = project.signalled(
        lambda: server.stats()["in_flight"], "run-task", TASK, number=signal.SIGINT
    )
    assert ended.code == 130 and "every reply received is kept" in ended.err
