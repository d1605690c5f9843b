"""`mode: batch`: files of requests, over real HTTP to the rehearsal server."""

from __future__ import annotations

import asyncio
import gzip
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from http.client import HTTPConnection
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import orjson
import pytest
from endpoint import Request, Script, http, in_thread, in_turn, serving
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai.types import Batch
from project import TASK, A, Project, some_rows, until

from modelcall_assets.config.model import parse_model
from modelcall_assets.errors import (
    BatchOutstanding,
    BudgetSpent,
    EndpointDown,
    EndpointRefused,
    RunStopped,
)
from modelcall_assets.journal import Journal
from modelcall_assets.journal.lines import Address, BatchNote, Entry
from modelcall_assets.llm import UNANSWERED_LIMIT
from modelcall_assets.llm.batch import BatchClient
from modelcall_assets.llm.classify import Patience
from modelcall_assets.llm.dialogue import ChatRequest
from modelcall_assets.rehearsal import Faults, RehearsalServer, serve_in_thread
from modelcall_assets.stages import Run
from modelcall_assets.stages.batch_calls import FIRST_WITH_BUDGET
from modelcall_assets.stages.report import Report, Tally
from modelcall_assets.stages.scores import Scores

BATCH: dict[str, Any] = {"mode": "batch", "batch": {"poll_seconds": 0.02}}


def use_batches(project: Project, changes: Mapping[str, Any] | None = None) -> Project:
    project.write_model({**BATCH, **(changes or {})})
    return project


def ids(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [row["id"] for row in rows]


def journal_lines(project: Project) -> list[bytes]:
    segments = sorted(project.journal().glob("*.jsonl"))
    return [line for path in segments for line in path.read_bytes().splitlines()]


def stop_at_the_first_batch(
    project: Project, server: RehearsalServer, batch_s: float = 0.5
) -> None:
    """The batch has not ended by then."""
    server.set_faults(Faults(batch_s=batch_s))
    steps = project.steps()
    steps.stage("raw").make(A, Tally())

    async def work() -> None:
        async with steps.stage("scores").engine() as engine:
            scores = asyncio.ensure_future(
                steps.stage("scores").answer(A, engine, Run("stopped", Tally()))
            )
            while not any(b'"id":' in line for line in journal_lines(project)):
                await asyncio.sleep(0.002)  # no event of ours says that a line is on the disk
                assert not scores.done()
            engine.stop(RunStopped("enough"))
            await scores

    asyncio.run(work())


def answer_of(address: Address) -> Entry:
    message = {"content": '{"score": 4, "quality_tags": [], "recommended_use_case": "x"}'}
    body = orjson.dumps({"choices": [{"message": message, "finish_reason": "stop"}]})
    return Entry(address, 0, 200, body, "h/v1", 1, 0, "2026-01-01T00:00:00.000+00:00")


def seed_where(holds: Callable[[Faults], bool], **faults: Any) -> Faults:
    """Faults with the first seed that gives what the test is about."""
    tried = (Faults(seed=seed, **faults) for seed in range(10_000))
    return next(each for each in tried if holds(each))


def ends(faults: Faults, *wanted: str) -> bool:
    """Whether the server's first batches end so."""
    return tuple(map(faults.batch_end, range(len(wanted)))) == wanted


class TestAFile:
    def test_is_answered_and_published_in_input_order(
        self, project: Project, server: RehearsalServer
    ) -> None:
        rows = some_rows(40, "order")
        project.write_input(A, rows)
        live = project.score().data_version
        expected = project.scores(A)
        server.reset()
        use_batches(project)
        report = project.score(fresh=True)
        assert (
            report.rows,
            report.ok,
            report.numbers["requests_sent"],
            report.numbers["answered_from_journal"],
        ) == (40, 40, 40, 0)
        found = project.scores(A)
        assert ids(found) == ids(rows)
        assert report.data_version == live, "the same rows, however they were asked"
        for column in ("score", "api_return", "api_request_key", "api_prompt_tokens"):
            assert [row[column] for row in found] == [row[column] for row in expected]
        assert {row["api_attempts"] for row in found} == {1}
        stats = server.stats()
        assert (stats["batches"], stats["batch_lines"]) == (1, 40)
        assert stats["repeated_ok"] == 0
        again = project.score()
        assert (again.numbers["requests_sent"], again.numbers["answered_from_journal"]) == (0, 40)
        assert server.stats()["batches"] == 1

    def test_larger_than_a_batch_is_asked_in_several(
        self, project: Project, server: RehearsalServer
    ) -> None:
        use_batches(project, {"batch": {"poll_seconds": 0.02, "max_requests_per_file": 15}})
        rows = some_rows(40, "large")
        project.write_input(A, [*rows, b"no json"])
        report = project.score()
        assert (report.ok, report.failures) == (40, {"bad_line": 1})
        assert ids(project.scores(A)[:40]) == ids(rows)
        assert server.stats()["batches"] == 3

    def test_without_a_row_to_ask_makes_no_batch(
        self, project: Project, server: RehearsalServer
    ) -> None:
        use_batches(project).write_input(A, [b"no json", {"id": "x"}])
        assert project.score().failures == {"bad_line": 1, "missing_input": 1}
        assert server.stats()["batches"] == 0

    def test_leaves_no_file_at_the_provider(
        self, project: Project, server: RehearsalServer
    ) -> None:
        server.set_faults(Faults(rate_400=0.5))
        use_batches(project).write_input(A, some_rows(12, "tidy"))
        project.score()
        assert server.stats()["files"] == 3, "input, output and errors"
        with openai.OpenAI(base_url=server.base_url, api_key="none", max_retries=0) as client:
            for number in (1, 2, 3):
                with pytest.raises(openai.NotFoundError):
                    client.files.retrieve(f"file-rehearsal-{number}")

    def test_shares_its_journal_with_live_calls(
        self, project: Project, server: RehearsalServer
    ) -> None:
        project.write_input(A, some_rows(4, "both"))
        project.score()
        use_batches(project).write_input(A, some_rows(9, "both"))
        assert project.score().numbers["requests_sent"] == 5
        project.write_model()
        assert project.score().numbers["requests_sent"] == 0
        assert server.stats()["repeated_ok"] == 0

    def test_is_run_by_the_command_line(self, project: Project, server: RehearsalServer) -> None:
        use_batches(project)
        ended = project.run("run-task", TASK)
        assert (ended.code, "12 rows, 12 succeeded" in ended.out) == (0, True), ended
        assert (server.stats()["batches"], server.stats()["requests"]) == (3, 12)

    def test_is_tried_with_live_calls(self, project: Project, server: RehearsalServer) -> None:
        use_batches(project)
        assert project.run("try", TASK, "--rows", "2").code == 0
        assert (server.stats()["requests"], server.stats()["batches"]) == (2, 0)


class TestResume:
    def test_kill_9_leaves_a_batch_that_the_next_run_takes_up(
        self, project: Project, server: RehearsalServer
    ) -> None:
        server.set_faults(Faults(batch_s=2))
        use_batches(project)
        rows = some_rows(30, "killed")
        project.write_input(A, rows)
        one_file = ("run-task", TASK, "--file", A)
        project.signalled(lambda: server.stats()["batches"] == 1, *one_file)
        assert not project.output(A).exists()
        assert project.run(*one_file).code == 0
        assert server.stats()["batches"] == 1
        assert {each["ok"] for each in server.request_stats().values()} == {1}
        assert ids(project.scores(A)) == ids(rows)

    def test_a_stop_says_what_goes_on(self, project: Project, server: RehearsalServer) -> None:
        use_batches(project).write_input(A, some_rows(6, "stop"))
        with pytest.raises(
            RunStopped, match=r"^enough\. What was .* \(batch_rehearsal_0\): the next run of this"
        ):
            stop_at_the_first_batch(project, server)
        report = project.score()
        assert (report.ok, report.numbers["requests_sent"]) == (6, 6)
        assert server.stats()["batches"] == 1

    def test_a_batch_whose_id_was_not_noted_yet_is_found_by_its_token(
        self, project: Project, server: RehearsalServer
    ) -> None:
        use_batches(project).write_input(A, some_rows(6, "token"))
        with pytest.raises(RunStopped):
            stop_at_the_first_batch(project, server)
        (segment,) = project.journal().glob("*.jsonl")
        header, begun, *_ = segment.read_bytes().splitlines(keepends=True)
        assert begun.startswith(b'{"batch"') and b'"id"' not in begun
        segment.write_bytes(header + begun)  # as a kill before the second note leaves it
        assert project.score().ok == 6
        assert server.stats()["batches"] == 1

    def test_answers_journalled_before_a_kill_are_not_taken_twice(
        self, project: Project, server: RehearsalServer
    ) -> None:
        use_batches(project)
        rows = some_rows(6, "twice")
        project.write_input(A, rows)
        with pytest.raises(RunStopped):
            stop_at_the_first_batch(project, server)
        scores = project.steps().find(Scores)
        assert scores is not None
        with Journal(project.journal(), "killed") as journal:
            for row in rows[:3]:
                request = scores.ask(row)
                assert isinstance(request, ChatRequest)
                journal.append(answer_of(Address(request.key)))
        report = project.score()
        assert (report.ok, report.numbers["answered_from_journal"]) == (6, 6)
        assert [row["score"] for row in project.scores(A)[:3]] == [4, 4, 4]
        replies = [line for line in journal_lines(project) if line.startswith(b'{"k"')]
        assert len(replies) == len({orjson.loads(line)["k"] for line in replies}) == 6

    @pytest.mark.parametrize("mode", ["batch", "live"])
    def test_rows_that_a_batch_elsewhere_asks_for_are_not_paid_twice_in_silence(
        self, project: Project, server: RehearsalServer, mode: str
    ) -> None:
        use_batches(project, {"mode": mode}).write_input(A, some_rows(3, "moved"))
        with Journal(project.journal(), "elsewhere") as journal:
            journal.note(BatchNote("t", "other.example/v1", 3, 1e9, id="batch_elsewhere"))
        with pytest.raises(
            BatchOutstanding,
            match=r"3 requests \(batch_elsewhere\) was submitted to other.example/v1, .* Name that "
            r"endpoint again, .* `modelcall clean TASK --batches`",
        ):
            project.score()
        assert server.stats()["requests"] == 0
        cleaned = project.run("clean", TASK, "--batches", "--yes")
        assert f"{A}: batch_elsewhere, 3 requests at other.example/v1" in cleaned.out, cleaned
        assert project.score().ok == 3

    def test_a_task_that_has_become_live_takes_what_was_answered_and_asks_for_the_rest(
        self, project: Project, server: RehearsalServer
    ) -> None:
        rows = some_rows(6, "live")
        use_batches(project).write_input(A, rows)
        with pytest.raises(RunStopped):
            stop_at_the_first_batch(project, server, batch_s=3600)
        project.write_model()
        with pytest.raises(
            BatchOutstanding, match=r"6 requests \(batch_rehearsal_0\) .*`mode: batch` .* cancel it"
        ):
            project.score()
        assert server.stats()["requests"] == 0, "nothing was asked beside the batch"
        with openai.OpenAI(base_url=server.base_url, api_key="none", max_retries=0) as client:
            client.batches.cancel("batch_rehearsal_0")
            until(lambda: client.batches.retrieve("batch_rehearsal_0").status == "cancelled")
        report = project.score()
        assert (report.ok, server.stats()["requests"]) == (6, 6)
        assert server.stats()["repeated_ok"] == 0
        assert ids(project.scores(A)) == ids(rows)

    def test_a_task_that_has_become_live_pays_nothing_for_a_batch_that_has_ended(
        self, project: Project, server: RehearsalServer
    ) -> None:
        use_batches(project).write_input(A, some_rows(6, "ended"))
        with pytest.raises(RunStopped):
            stop_at_the_first_batch(project, server)
        with openai.OpenAI(base_url=server.base_url, api_key="none", max_retries=0) as client:
            until(lambda: client.batches.retrieve("batch_rehearsal_0").status == "completed")
        project.write_model()
        assert project.score().ok == 6
        assert server.stats()["requests"] == 6, "the batch's own"

    def test_a_batch_that_is_gone_is_asked_again(
        self, project: Project, server: RehearsalServer
    ) -> None:
        use_batches(project).write_input(A, some_rows(3, "gone"))
        with Journal(project.journal(), "before") as journal:
            name = server.base_url.removeprefix("http://")
            journal.note(BatchNote("t", name, 3, 1e9, id="batch_gone"))
            journal.note(BatchNote("u", name, 3, 1e9))
        assert project.score().ok == 3
        notes = [orjson.loads(line) for line in journal_lines(project) if b'{"batch"' in line]
        told = {note["batch"]: note.get("ended") for note in notes}
        assert (told["t"], told["u"]) == ("gone", "not submitted")


def rewriting(base_url: str, change: Callable[[list[dict[str, Any]]], list[Any]]) -> Script:
    """Passes requests on to a server; the content of files comes back as `change` makes it."""

    def passed(request: Request) -> bytes:
        kind = re.search(rb"content-type: (.*?)\r\n", request.head, re.IGNORECASE)
        with closing(HTTPConnection(urlsplit(base_url).netloc)) as there:
            method, headers = request.head.split()[0].decode(), {}
            if kind is not None:
                headers["content-type"] = kind[1].decode()
            there.request(method, request.path, request.body, headers)
            reply = there.getresponse()
            data = reply.read()
        if reply.status == 200 and request.path.endswith("/content"):
            lines = change([orjson.loads(line) for line in data.splitlines()])
            data = b"".join(
                line if isinstance(line, bytes) else orjson.dumps(line) + b"\n" for line in lines
            )
        return http(reply.status, data, Content_Type=reply.headers.get("content-type") or "")

    return lambda request: asyncio.to_thread(passed, request)


class TestAStrangeOutput:
    """Every row has the answer to its own request or a failure, whatever the file holds."""

    @pytest.mark.parametrize("left_behind", [False, True])
    def test_ids_that_were_not_asked_count_for_nothing(
        self,
        project: Project,
        server: RehearsalServer,
        monkeypatch: pytest.MonkeyPatch,
        left_behind: bool,
    ) -> None:
        def change(lines: list[dict[str, Any]]) -> list[Any]:
            if "response" not in lines[0]:
                return lines  # what was asked
            ids = [line["custom_id"] for line in lines]
            others = [each for each in of_all if each not in ids]
            before = [*others, *(f"{each[:-1]}1" for each in of_all)]
            after = [*ids, f"{'0' * 32}-0-0-0", "x", None]
            torn = orjson.dumps(lines[-1])[:50]
            return [
                *({**strange, "custom_id": each} for each in before),
                *lines,
                *({**strange, "custom_id": each} for each in after),
                torn,
            ]

        body = {"choices": [{"message": {"content": '{"score": 2}'}, "finish_reason": "stop"}]}
        strange = {"response": {"status_code": 200, "body": body}, "error": None}
        rows = some_rows(6, "strange")
        batches = {"batch": {"poll_seconds": 0.02, "max_requests_per_file": 3}}
        use_batches(project, batches).write_input(A, rows)
        project.score()
        made = project.scores(A)
        expected = [row["score"] for row in made]
        of_all = [f"{row['api_request_key']}-0-0-0" for row in made]
        assert 2 not in expected
        with in_thread(serving(rewriting(server.base_url, change))) as between:
            monkeypatch.setenv("REHEARSAL_BASE_URL", between.url)
            if left_behind:
                shutil.rmtree(project.journal())
                with pytest.raises(RunStopped):
                    stop_at_the_first_batch(project, server)
            report = project.score(fresh=not left_behind)
        assert [row["score"] for row in project.scores(A)] == expected
        assert report.ok == 6 and len(report.warnings) == 2
        for told in report.warnings:
            assert "gave 15 lines with ids that it was not asked for" in told

    def test_lines_that_are_torn_or_missing_are_asked_again_and_both_files_may_have_one(
        self, project: Project, server: RehearsalServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        looked = Counter[str]()

        def change(lines: list[dict[str, Any]]) -> list[Any]:
            if "response" not in lines[0]:
                return lines
            looked["output"] += 1
            if looked["output"] > 1:
                return lines
            again = {"response": None, "error": {"code": "batch_expired", "message": "late"}}
            last = orjson.dumps(lines[-1])
            return [*lines[2:-1], {**again, "custom_id": lines[2]["custom_id"]}, last[:-9]]

        use_batches(project).write_input(A, some_rows(8, "torn"))
        with in_thread(serving(rewriting(server.base_url, change))) as between:
            monkeypatch.setenv("REHEARSAL_BASE_URL", between.url)
            report = project.score()
        assert (report.ok, server.stats()["batch_lines"]) == (8, 8 + 3)


class TestBadEnds:
    @pytest.mark.parametrize("end", ["expired", "cancelled", "failed"])
    def test_what_was_answered_counts_and_only_the_rest_is_asked_again(
        self, project: Project, server: RehearsalServer, end: str
    ) -> None:
        rate = {f"rate_batch_{end}": 0.5}
        server.set_faults(seed_where(lambda faults: ends(faults, end, "completed"), **rate))
        use_batches(project).write_input(A, some_rows(20, "half"))
        report = project.score()
        assert (report.ok, report.numbers["requests_sent"]) == (20, 20)
        stats = server.stats()
        assert (stats["batches"], stats["batch_lines"]) == (2, 20)
        assert stats["repeated_ok"] == 0

    def test_a_batch_that_is_cancelled_by_hand_is_gone_on_with(
        self, project: Project, server: RehearsalServer
    ) -> None:
        server.set_faults(Faults(batch_s=3600))
        use_batches(project).write_input(A, some_rows(5, "hand"))
        process = project.start("run-task", TASK, "--file", A)
        with openai.OpenAI(base_url=server.base_url, api_key="none", max_retries=0) as client:
            until(lambda: server.stats()["batches"] == 1)
            server.set_faults(Faults())
            assert client.batches.cancel("batch_rehearsal_0").status == "cancelling"
            out, err = process.communicate(timeout=120)
            assert process.returncode == 0, out + err
            statuses = [batch.status for batch in client.batches.list()]
        assert sorted(statuses) == ["cancelled", "completed"]
        assert "5 rows, 5 succeeded" in out

    def test_a_refused_line_is_a_failure_at_once(
        self, project: Project, server: RehearsalServer
    ) -> None:
        server.set_faults(Faults(rate_400=0.4))
        use_batches(project).write_input(A, some_rows(20, "refused"))
        report = project.score()
        stats = server.stats()
        assert report.failures == {"bad_request": stats["statuses"]["400"]}
        assert report.failed > 2 and report.ok == 20 - report.failed
        assert (stats["batches"], stats["retried_bad_request"]) == (1, 0)

    def test_an_error_is_asked_again_until_the_retries_are_used_up(
        self, project: Project, server: RehearsalServer
    ) -> None:
        server.set_faults(Faults(rate_500=1))
        use_batches(project).write_input(A, some_rows(5, "errors"))
        report = project.score()
        assert report.failures == {"server_error": 5}
        assert server.stats()["batches"] == 3, "the model file has max_retries: 2"
        assert {row["api_attempts"] for row in project.scores(A)} == {3}
        server.set_faults(Faults())
        assert project.score().ok == 5, "the next run asks again"

    def test_a_line_in_neither_file_is_asked_again(
        self, project: Project, server: RehearsalServer
    ) -> None:
        server.set_faults(Faults(rate_drop=0.4, seed=2))
        use_batches(project, {"client_config": {"max_retries": 20}})
        project.write_input(A, some_rows(20, "missing"))
        report = project.score()
        stats = server.stats()
        assert report.ok == 20 and stats["dropped"] > 0 and stats["repeated_ok"] == 0

        server.set_faults(Faults(rate_drop=1))
        use_batches(project).write_input(A, some_rows(3, "never"))
        report = project.score()
        assert report.failures == {"dropped": 3}
        assert "has neither answer nor error" in str(report.failed_rows[0])

    def test_what_is_no_answer_is_asked_again(
        self, project: Project, server: RehearsalServer
    ) -> None:
        server.set_faults(Faults(rate_junk=0.3, rate_hang=0.2, rate_429=0.2, seed=1))
        use_batches(project, {"client_config": {"max_retries": 50}})
        project.write_input(A, some_rows(20, "junk"))
        assert project.score().ok == 20
        stats = server.stats()
        assert stats["junk"] and stats["abandoned"] and stats["statuses"]["429"]
        assert stats["repeated_ok"] == 0

    def test_nothing_but_failures_stops_the_run(
        self, project: Project, server: RehearsalServer
    ) -> None:
        server.set_faults(Faults(rate_500=1))
        use_batches(project).write_input(A, some_rows(UNANSWERED_LIMIT + 5, "down"))
        with pytest.raises(EndpointDown, match="25 records failed in batch after batch"):
            project.score()
        assert not project.output(A).exists()

    def test_batches_that_fail_as_a_whole_say_why(
        self, project: Project, server: RehearsalServer
    ) -> None:
        server.set_faults(Faults(rate_batch_failed=1, rate_batch_done=0))
        use_batches(project).write_input(A, some_rows(3, "whole"))
        report = project.score()
        assert report.failures == {"server_error": 3}
        assert "rehearsal_failure" in str(report.failed_rows[0])

    def test_a_batch_that_finds_the_queue_full_waits_for_another_to_end(
        self, project: Project, server: RehearsalServer
    ) -> None:
        server.set_faults(Faults(max_batch_lines=20, batch_s=0.1))
        few = {"poll_seconds": 0.02, "max_requests_per_file": 15}
        use_batches(project, {"batch": few, "client_config": {"max_retries": 0}})
        project.write_input(A, some_rows(60, "queue"))
        report = project.score()
        assert (report.ok, report.numbers["requests_sent"]) == (60, 60)
        assert server.stats()["batches"] > 4
        server.set_faults(Faults(max_batch_lines=2))
        project.write_input(A, some_rows(3, "too many for one"))
        report = project.score()
        assert report.failures == {"rate_limited": 3}
        assert "token_limit_exceeded" in str(report.failed_rows[0])

    def test_a_wrong_answer_is_mended_in_a_further_batch(
        self, project: Project, server: RehearsalServer
    ) -> None:
        project.write_task({"retry": {"max_repair_turns": 2}})
        server.set_faults(Faults(rate_malformed=0.5))
        use_batches(project).write_input(A, some_rows(20, "mend"))
        report = project.score()
        assert (report.rows, report.ok) == (20, 20)
        turns = Counter(row["api_turns"] for row in project.scores(A))
        assert set(turns) == {1, 2} and turns[2] == server.stats()["malformed"] > 3
        assert server.stats()["batches"] == 2
        assert project.score().numbers["requests_sent"] == 0

    def test_a_kill_between_the_turns_pays_no_turn_twice(
        self, project: Project, server: RehearsalServer
    ) -> None:
        project.write_task({"retry": {"max_repair_turns": 1}})
        server.set_faults(Faults(rate_malformed=1, batch_s=0.6))
        use_batches(project).write_input(A, some_rows(8, "turns"))
        project.signalled(lambda: server.stats()["batches"] == 2, "run-task", TASK, "--file", A)
        assert project.score().ok == 8
        assert server.stats()["batches"] == 2
        assert server.stats()["requests"] == 16


class TestTheEndpoint:
    def test_a_wrong_key_stops_the_run(
        self, project: Project, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with serve_in_thread(api_key="right") as guarded:
            monkeypatch.setenv("REHEARSAL_BASE_URL", guarded.base_url)
            monkeypatch.setenv("SOME_KEY", "sk-wrong-0123456789")
            use_batches(project, {"client_config": {"api_key": "${SOME_KEY}"}})
            with pytest.raises(EndpointRefused, match="refuses batches: HTTP 401") as refused:
                project.score()
            assert "sk-wrong" not in str(refused.value)
            monkeypatch.setenv("SOME_KEY", "right")
            assert project.score().ok == 4

    def test_an_unknown_model_stops_the_run(self, project: Project) -> None:
        use_batches(project, {"chat_config": {"model": "gpt-none"}})
        with pytest.raises(EndpointRefused, match="batch_rehearsal_0: model_not_found"):
            project.score()

    def test_one_that_is_not_there_stops_the_run(
        self, project: Project, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("REHEARSAL_BASE_URL", "http://127.0.0.1:9/v1")
        use_batches(project, {"client_config": {"max_retries": 0}})
        with pytest.raises(EndpointDown, match="no answer to a call about batches: connect"):
            project.score()

    @pytest.mark.parametrize("seed", range(6))
    def test_calls_that_fail_are_repeated_and_no_batch_is_made_twice(
        self, project: Project, server: RehearsalServer, seed: int
    ) -> None:
        server.set_faults(Faults(rate_call_500=0.2, rate_call_lost=0.3, rate_500=0.2, seed=seed))
        use_batches(project, {"client_config": {"max_retries": 50}})
        project.write_input(A, some_rows(12, "calls"))
        quick = project.steps().stage("scores").engine(Patience(base_s=0.01))
        assert project.score(A, quick).ok == 12
        assert server.stats()["repeated_ok"] == 0

    def test_one_without_batches_stops_the_run(
        self, project: Project, server: RehearsalServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("REHEARSAL_BASE_URL", f"{server.base_url}/elsewhere")
        use_batches(project)
        with pytest.raises(EndpointRefused, match="whether the endpoint has OpenAI's batches"):
            project.score()

    def test_headers_and_no_environment_go_with_every_call(
        self, project: Project, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("OPENAI_API_KEY", "sk-of-the-environment")
        monkeypatch.setenv("OWN_AUTH", "right")
        with serve_in_thread(api_key="right") as guarded:
            monkeypatch.setenv("REHEARSAL_BASE_URL", guarded.base_url)
            headers = {"Authorization": "Bearer ${OWN_AUTH}"}
            use_batches(project, {"client_config": {"headers": headers}})
            assert project.score().ok == 4


class TestReuseAndBudget:
    def test_identical_requests_are_asked_once(
        self, project: Project, server: RehearsalServer
    ) -> None:
        project.write_task({"reuse": {"identical_once": True}})
        rows = [*some_rows(3, "x"), *some_rows(3, "x"), *some_rows(4, "y"), *some_rows(3, "x")]
        use_batches(project).write_input(A, rows)
        report = project.score()
        assert (
            report.ok,
            report.numbers["requests_sent"],
            report.numbers["answered_from_journal"],
        ) == (13, 7, 6)
        attempts = [row["api_attempts"] for row in project.scores(A)]
        assert attempts == [1, 1, 1, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0]
        server.set_faults(Faults(rate_filtered=1))
        failed = project.score(fresh=True)
        assert failed.failures == {"content_filter": 13}, "a failure is not passed on"
        assert failed.numbers["requests_sent"] == 13

    def test_the_batch_is_as_large_as_the_budget_allows(
        self, project: Project, server: RehearsalServer
    ) -> None:
        project.write_task({"budget_tokens": 3000})
        use_batches(project).write_input(A, some_rows(10, "first"))
        spent = project.score().numbers
        mean = (spent["prompt_tokens"] + spent["completion_tokens"]) / 10
        project.write_input(A, some_rows(200, "second"))
        with pytest.raises(BudgetSpent, match="budget_tokens: 3,000 is spent"):
            project.score()
        assert 3000 / mean * 0.7 < server.stats()["requests"] < 3000 / mean * 1.3
        sent = server.stats()["requests"]
        project.write_task({"budget_tokens": 1_000_000})
        assert project.score().ok == 200
        assert server.stats()["requests"] == 210 and sent > 10
        assert server.stats()["repeated_ok"] == 0

    def test_until_a_cost_is_known_a_batch_is_small(
        self, project: Project, server: RehearsalServer
    ) -> None:
        project.write_task({"budget_tokens": 3000})
        use_batches(project).write_input(A, some_rows(FIRST_WITH_BUDGET + 200, "small"))
        with pytest.raises(BudgetSpent):
            project.score()
        assert server.stats()["requests"] == FIRST_WITH_BUDGET


class TestModelFile:
    def problems(self, **changes: Any) -> list[str]:
        data: dict[str, Any] = {
            "client_config": {"base_url": "http://h/v1", **changes.pop("client", {})},
            "chat_config": {"model": "m", **changes.pop("chat", {})},
            **changes,
        }
        return [str(problem) for problem in parse_model(data, "m.yaml")[1]]

    def test_batch_needs_one_endpoint_and_no_stream(self) -> None:
        assert self.problems(mode="batch") == []
        endpoints = [{"base_url": "http://a/v1"}, {"base_url": "http://b/v1"}]
        (found,) = self.problems(mode="batch", client={"endpoints": endpoints})
        assert found.startswith("m.yaml:client_config.endpoints: several endpoints")
        (found,) = self.problems(mode="batch", chat={"stream": True})
        assert found.startswith("m.yaml:chat_config.stream: a batch does not stream")

    def test_settings_without_the_mode_have_no_effect(self) -> None:
        (found,) = self.problems(batch={"poll_seconds": 5})
        assert "add `mode: batch`" in found

    def test_values_of_batch_are_checked(self) -> None:
        for batch in (
            {"poll_seconds": 0},
            {"max_requests_per_file": 50_001},
            {"completion_window": "soon"},
        ):
            assert len(self.problems(mode="batch", batch=batch)) == 1
        assert len(self.problems(mode="slow")) == 1


@pytest.mark.slow
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    faults=st.builds(
        Faults,
        rate_500=st.sampled_from([0.0, 0.2]),
        rate_drop=st.sampled_from([0.0, 0.2]),
        rate_malformed=st.sampled_from([0.0, 0.3]),
        rate_400=st.sampled_from([0.0, 0.2]),
        rate_truncated=st.sampled_from([0.0, 0.2]),
        rate_batch_expired=st.sampled_from([0.0, 0.3]),
        rate_batch_failed=st.sampled_from([0.0, 0.3]),
        rate_batch_done=st.sampled_from([0.0, 0.3, 0.9]),
        seed=st.integers(0, 1000),
    ),
    per_file=st.sampled_from([7, 50]),
    stops=st.lists(st.integers(1, 4), max_size=2),
)
def test_every_row_is_there_once_in_its_place(
    faults: Faults, per_file: int, stops: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever batches do, and when runs are stopped: after that many batches were submitted."""
    rows = some_rows(24, "law")
    with tempfile.TemporaryDirectory() as folder, serve_in_thread(faults) as server:
        monkeypatch.setenv("REHEARSAL_BASE_URL", server.base_url)
        project = Project(Path(folder))
        project.write_task({"retry": {"max_repair_turns": 1}})
        project.write_prompt()
        project.write_model(
            {
                "mode": "batch",
                "batch": {"poll_seconds": 0.01, "max_requests_per_file": per_file},
                "client_config": {"max_retries": 3},
            }
        )
        project.write_input(A, rows)
        steps = project.steps()
        steps.stage("raw").make(A, Tally())

        async def run(batches: int | None) -> Report:
            async with steps.stage("scores").engine() as engine:
                work = asyncio.ensure_future(
                    steps.stage("scores").answer(A, engine, Run(os.urandom(6).hex(), Tally()))
                )
                while not work.done():
                    await asyncio.sleep(0.001)
                    if batches is not None and server.stats()["batches"] >= batches:
                        engine.stop(RunStopped("stopped"))
                return await work

        report = None
        for batches in [*stops, None]:
            try:
                report = asyncio.run(run(batches))
                break
            except RunStopped as stopped:
                assert "stopped" in str(stopped)
        assert report is not None
        assert report.ok + report.failed == report.rows == 24
        found = project.scores(A)
        assert ids(found) == ids(rows)
        assert [row["api_status"] for row in found].count("success") == report.ok
        stats = server.stats()
        assert stats["retried_bad_request"] == 0
        assert stats["repeated_ok"] == 0, "nothing answered was paid again"


class TestTheRehearsalServer:
    """What the client cannot bring about."""

    def upload(self, client: openai.OpenAI, lines: Sequence[bytes | Mapping[str, Any]]) -> str:
        content = b"".join(
            (line if isinstance(line, bytes) else orjson.dumps(line)) + b"\n" for line in lines
        )
        return client.files.create(file=("b.jsonl", content), purpose="batch").id

    def line(self, name: str, **changes: Any) -> dict[str, Any]:
        messages = [{"role": "user", "content": name}]
        body = {"model": "rehearsal-rater-1", "messages": messages}
        url = "/v1/chat/completions"
        return {"custom_id": name, "method": "POST", "url": url, "body": body} | changes

    def ended(self, client: openai.OpenAI, file: str) -> Batch:
        batch = client.batches.create(
            completion_window="24h",
            endpoint="/v1/chat/completions",
            input_file_id=file,
            metadata={"a": "b"},
        )
        assert batch.metadata == {"a": "b"}
        last = ("completed", "failed", "expired", "cancelled")
        until(lambda: client.batches.retrieve(batch.id).status in last)
        return client.batches.retrieve(batch.id)

    @pytest.fixture
    def client(self, server: RehearsalServer) -> Iterator[openai.OpenAI]:
        with openai.OpenAI(base_url=server.base_url, api_key="none", max_retries=0) as client:
            yield client

    def test_a_batch_that_expires_tells_of_every_line(
        self, client: openai.OpenAI, server: RehearsalServer
    ) -> None:
        server.set_faults(Faults(rate_batch_expired=1))
        file = self.upload(client, [self.line(str(n)) for n in range(10)])
        batch = self.ended(client, file)
        assert batch.status == "expired" and batch.expired_at and batch.request_counts
        counts = batch.request_counts
        assert (counts.total, counts.completed, counts.failed) == (10, 5, 5)
        output, errors = (
            [orjson.loads(line) for line in client.files.content(name or "").iter_lines()]
            for name in (batch.output_file_id, batch.error_file_id)
        )
        assert {line["error"]["code"] for line in errors} == {"batch_expired"}
        names = [line["custom_id"] for line in output]
        assert sorted(names) == list("01234") and names != list("01234"), "in no order"
        assert [each.id for each in client.batches.list()] == [batch.id]

    def test_a_file_with_a_mistake_fails_as_a_whole(self, client: openai.OpenAI) -> None:
        good = self.line("good")
        for bad, code in (
            (b"no json", "invalid_json_line"),
            (self.line("good"), "duplicate_custom_id"),
            (self.line("x", url="/v1/embeddings"), "invalid_json_line"),
            (self.line("x", body={"model": "gpt-none"}), "model_not_found"),
        ):
            batch = self.ended(client, self.upload(client, [good, bad]))
            assert batch.status == "failed" and batch.errors and batch.errors.data
            assert [(each.code, each.line) for each in batch.errors.data] == [(code, 2)]
            assert batch.output_file_id is None

    def test_what_is_not_there_is_said_to_be_so(
        self, client: openai.OpenAI, server: RehearsalServer
    ) -> None:
        for call in (client.files.retrieve, client.files.content, client.batches.retrieve):
            with pytest.raises(openai.NotFoundError):
                call("nothing")
        with pytest.raises(openai.BadRequestError):
            self.ended(client, "nothing")
        with pytest.raises(openai.BadRequestError):
            client.files.create(file=b"x", purpose="assistants")
        file = self.upload(client, [self.line("a")])
        assert client.files.retrieve(file).bytes == len(orjson.dumps(self.line("a"))) + 1
        assert client.files.delete(file).deleted
        batch = self.ended(client, self.upload(client, [self.line("a", body={"stream": True})]))
        assert batch.status == "failed", "no model"
        with pytest.raises(openai.ConflictError):
            client.batches.cancel(batch.id)


def test_a_file_that_comes_broken_off_is_asked_for_again() -> None:
    cut_off = http(200, gzip.compress(b"x" * 4000)[:-20], content_encoding="gzip")

    async def run() -> bytes:
        async with serving(in_turn(cut_off, http(200, b"{}\n"))) as endpoint:
            client, file = BatchClient("n", endpoint.url, patience=Patience(base_s=0)), BytesIO()
            async with client:
                await client.download("file-1", file)
        return file.read()

    assert asyncio.run(run()) == b"{}\n"
