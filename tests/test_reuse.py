"""Which answers stand for others, and what a task may spend."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml
from project import NAMES, TASK, A, Project, some_rows, until

from modelcall_assets.errors import InputError, SetupError
from modelcall_assets.journal import Journal, SharedReplies
from modelcall_assets.journal.lines import Address, Entry
from modelcall_assets.journal.segments import Asking
from modelcall_assets.llm.completion import Usage
from modelcall_assets.rehearsal import Faults, RehearsalServer
from modelcall_assets.stages.asking import AskingStage
from modelcall_assets.stages.calls import Budget, read_spent
from modelcall_assets.stages.replay import Reuse
from modelcall_assets.storage.publishing import claimed

B = "b.jsonl"
PRICES = {"prices": {"usd_per_million_input_tokens": 10, "usd_per_million_output_tokens": 10}}


def paid(project: Project, name: str) -> list[int]:
    return [row["api_attempts"] for row in project.scores(name)]


REPEATED = [*some_rows(3, "x"), *some_rows(3, "x"), *some_rows(2, "y"), *some_rows(3, "x")]


class TestIdenticalRequests:
    def test_are_asked_each_unless_the_task_says_once(
        self, project: Project, server: RehearsalServer
    ) -> None:
        project.write_input(A, REPEATED)
        assert project.score(A).numbers["requests_sent"] == 11
        assert server.stats()["requests"] == 11

    def test_are_asked_once_and_all_get_the_answer(
        self, project: Project, server: RehearsalServer
    ) -> None:
        server.set_faults(Faults(latency_ms=20))
        project.write_task({"reuse": {"identical_once": True}})
        project.write_input(A, REPEATED)
        report = project.score(A)
        assert (report.rows, report.ok, report.numbers["requests_sent"]) == (11, 11, 5)
        assert server.stats()["requests"] == 5
        rows = project.scores(A)
        assert paid(project, A) == [1, 1, 1, 0, 0, 0, 1, 1, 0, 0, 0]
        for field in ("score", "api_return", "api_request_key", "api_status"):
            assert [row[field] for row in rows[:3]] == [row[field] for row in rows[8:]]
        assert report.numbers["prompt_tokens"] == sum(
            row["api_prompt_tokens"] for row in rows if row["api_attempts"]
        )
        assert project.score(A).numbers["requests_sent"] == 0, "and each has its own in the journal"

    def test_a_failure_is_not_passed_on(self, project: Project, server: RehearsalServer) -> None:
        server.set_faults(Faults(rate_truncated=1, latency_ms=10))
        project.write_task({"reuse": {"identical_once": True}, "retry": {"max_repair_turns": 0}})
        project.write_input(A, [*some_rows(1), *some_rows(1), *some_rows(1)])
        report = project.score(A)
        assert report.failures == {"truncated": 3}
        assert server.stats()["requests"] == 3


class TestScope:
    def test_file_is_the_default(self, project: Project) -> None:
        for name in (A, B):
            project.write_input(name, some_rows(4))
            assert project.score(name).numbers["requests_sent"] == 4

    def test_project_takes_answers_from_other_files_and_tasks(self, project: Project) -> None:
        project.write_task({"reuse": {"scope": "project"}})
        project.write_task(
            {
                "reuse": {"scope": "project"},
                "task_name": "other",
                "data": {"output_folder": "data/other/scores"},
            },
            file="other",
        )
        other = Project(project.root, task="other")
        project.write_input(A, some_rows(4))
        project.write_input(B, [*some_rows(6)[3:], *some_rows(2)])
        assert project.score(A).numbers["requests_sent"] == 4
        assert project.score(B).numbers["requests_sent"] == 2, (
            "rows 4 and 5; 0, 1 and 3 are in a.jsonl"
        )
        assert paid(project, B) == [0, 1, 1, 0, 0]
        assert {row["api_cost_usd"] for row in project.scores(B) if not row["api_attempts"]} == {0}
        again = other.score(B)
        assert (again.ok, again.numbers["requests_sent"]) == (5, 0)
        assert other.score(B, fresh=True).numbers["requests_sent"] == 5, (
            "fresh asks everybody again"
        )
        project.write_model({"chat_config": {"temperature": 0.5}})
        assert project.score(B).numbers["requests_sent"] == 5, "another request has another key"

    def test_answers_that_failed_elsewhere_are_asked_again(
        self, project: Project, server: RehearsalServer
    ) -> None:
        project.write_task({"reuse": {"scope": "project"}, "retry": {"max_repair_turns": 0}})
        project.write_input(A, some_rows(4))
        project.write_input(B, some_rows(4))
        server.set_faults(Faults(rate_filtered=1))
        assert project.score(A).failures == {"content_filter": 4}
        server.set_faults(Faults())
        assert project.score(B).numbers["requests_sent"] == 4

    def test_answers_that_no_longer_pass_are_asked_again(self, project: Project) -> None:
        project.write_task({"reuse": {"scope": "project"}})
        project.write_input(A, some_rows(4))
        project.write_input(B, some_rows(4))
        project.score(A)
        project.write_prompt(
            {
                "output_config": {
                    "json_schema": {"properties": {"score": {"maximum": 0, "minimum": 0}}}
                }
            }
        )
        assert project.score(B).numbers["requests_sent"] >= 4

    @pytest.mark.parametrize("written", ["off", "'off'", "Off", "no", "false"])
    def test_off_is_what_the_file_says_however_yaml_reads_it(
        self, project: Project, written: str
    ) -> None:
        with project.task_file.open("a") as file:
            file.write(f"reuse: {{scope: {written}}}\n")
        assert project.steps().spec.task.reuse.scope == "off"

    def test_off_asks_a_published_file_anew_but_goes_on_with_an_interrupted_one(
        self, project: Project
    ) -> None:
        project.write_task({"reuse": {"scope": "off"}})
        project.write_input(A, some_rows(4))
        assert project.score(A).numbers["requests_sent"] == 4
        assert project.score(A).numbers["requests_sent"] == 4
        newest = max(project.journal(A).iterdir())
        lines = newest.read_bytes().splitlines(keepends=True)
        newest.write_bytes(b"".join(lines[:-2]))  # as a kill before the last reply leaves it
        assert project.score(A).numbers["requests_sent"] == 1

    def test_a_broken_table_is_named_with_what_to_do(self, project: Project) -> None:
        project.write_task({"reuse": {"scope": "project"}})
        table = project.root / ".modelcall/answers.sqlite"
        table.parent.mkdir()
        table.write_bytes(b"this is no database, however long one looks at it" * 100)
        with pytest.raises(InputError, match=r"answers\.sqlite: .* delete it"):
            project.score(A)


class TestWhatIsAskedNow:
    """Identical requests of files side by side, and of processes."""

    @pytest.mark.parametrize("policy", [{"scope": "project"}, {"identical_once": True}])
    def test_is_waited_for_by_the_files_of_a_run(
        self, project: Project, server: RehearsalServer, policy: dict[str, Any]
    ) -> None:
        server.set_faults(Faults(latency_ms=30))
        concurrency = {
            "max_concurrent_requests": 16,
            "files_per_run": 10,
            "max_concurrent_files": 3,
        }
        project.write_task({"reuse": policy, "concurrency": concurrency})
        rows = some_rows(100)
        for name in NAMES:
            project.write_input(name, rows)
        ended = project.run("run-task", TASK)
        assert ended.code == 0, ended
        assert server.stats()["requests"] == 100
        scores = [[row["score"] for row in project.scores(name)] for name in NAMES]
        assert scores[0] == scores[1] == scores[2]
        assert sum(sum(paid(project, name)) for name in NAMES) == 100

    def test_is_asked_by_nobody_until_all_can_find_its_answer(self, tmp_path: Path) -> None:
        async def is_told() -> None:
            table, key = tmp_path / "answers.sqlite", "a" * 32

            def reuse() -> Reuse:
                shared = SharedReplies(table, lambda folder: Journal(Path(folder), "reader"))
                return Reuse(shared=shared, asking=asking, folder=str(tmp_path / "journal"))

            asking = Asking(tmp_path / "answers.asking")
            with (
                Journal(tmp_path / "journal", "one") as journal,
                closing(reuse()) as answers,
                closing(reuse()) as waits,
                closing(sqlite3.connect(table, isolation_level=None)) as busy,
            ):
                assert answers.take(key) is None
                entry = Entry(
                    Address(key), 0, 200, b"{}", "one", 1, 5, "2026-01-01T00:00:00.000+00:00"
                )
                answers.keep(Address(key), journal.append(entry))
                busy.execute("BEGIN IMMEDIATE")
                telling = asyncio.create_task(answers.tell())
                await asyncio.sleep(0)
                telling.cancel()  # the file is through
                assert not (await asyncio.wait([telling], timeout=0.2))[0]
                free = waits.take(key)
                assert free is not None
                busy.execute("COMMIT")
                with pytest.raises(asyncio.CancelledError):
                    await telling
                answers.close()
                await free
                assert waits.take(key) is None
                assert len(await waits.find(journal, key)) == 1

        asyncio.run(is_told())

    @pytest.mark.parametrize("killed", [False, True])
    def test_is_waited_for_by_another_process(
        self, project: Project, server: RehearsalServer, killed: bool
    ) -> None:
        server.set_faults(Faults(latency_ms=50))
        both = {"reuse": {"scope": "project"}, "concurrency": {"max_concurrent_requests": 8}}
        project.write_task(both)
        other = {"task_name": "other", "data": {"output_folder": "data/other/scores"}}
        project.write_task({**both, **other}, file="other")
        shutil.rmtree(project.input_folder)
        rows = some_rows(300)
        project.write_input(A, rows)
        tasks = [
            project.start("run-task", f"configs/tasks/{name}.yaml") for name in ("rate", "other")
        ]
        if killed:
            until(lambda: server.stats()["requests"] > 60)
            tasks[0].kill()
        ended = [(task.communicate(timeout=120), task.returncode) for task in tasks]
        assert killed or ended[0][1] == 0, ended
        assert ended[1][1] == 0, ended
        requests = server.stats()["requests"]
        assert requests == 300 or killed, ended
        if killed:
            again = project.run("run-task", TASK)
            assert again.code == 0, again
            assert server.stats()["requests"] <= 300 + 8 + 8 * 10, "a moment of what was answered"
        scores = [row["score"] for row in project.scores(A)]
        assert len(scores) == 300 and None not in scores


class TestBudget:
    def limited(self, project: Project, **limits: Any) -> None:
        project.write_model(PRICES)
        project.write_task({"concurrency": {"max_concurrent_requests": 2}, **limits})
        for name in NAMES:
            project.write_input(name, some_rows(40, name))

    def test_tokens_stop_the_task_over_all_its_files_and_runs(
        self, project: Project, server: RehearsalServer
    ) -> None:
        self.limited(project, budget_tokens=6000)
        first = project.run("run-task", TASK)
        assert first.code == 1
        assert f"{TASK}:budget_tokens: 6,000 is spent" in first.told
        used = server.stats()["requests"]
        assert 5 < used < 100
        second = project.run("run-task", TASK)
        assert second.code == 1
        assert server.stats()["requests"] <= used + 1, "the count is kept from run to run"
        self.limited(project, budget_tokens=1_000_000)
        third = project.run("run-task", TASK)
        assert third.code == 0, third
        assert "120 rows" in third.out
        assert server.stats()["requests"] == 120, "nothing was paid twice"

    def test_it_holds_with_many_files_side_by_side(
        self, project: Project, server: RehearsalServer
    ) -> None:
        server.set_faults(Faults(latency_ms=20))
        concurrency = {
            "max_concurrent_requests": 8,
            "max_concurrent_files": 20,
            "files_per_run": 20,
        }
        project.write_task({"budget_tokens": 6000, "concurrency": concurrency})
        for number in range(20):
            project.write_input(f"f{number}.jsonl", some_rows(10, f"f{number}"))
        ended = project.run("run-task", TASK)
        assert ended.code == 1 and "budget_tokens: 6,000 is spent" in ended.told
        (spent,) = project.root.rglob("spent.json")
        each = read_spent(spent).tokens / read_spent(spent).replies
        assert 6000 - 10 * each <= read_spent(spent).tokens <= 6000 + 10 * each

    def test_money_stops_it_before_it_is_overspent(
        self, project: Project, server: RehearsalServer
    ) -> None:
        self.limited(project, budget_usd=0.05)
        server.set_faults(Faults(latency_ms=5))
        ended = project.run("run-task", TASK)
        assert ended.code == 1
        assert f"{TASK}:budget_usd: 0.05 is spent" in ended.out + ended.err
        scores = project.steps().stage("scores")
        assert isinstance(scores, AskingStage)
        spent = scores.budget
        assert spent.spent(0) is not None or spent.spent(1) is not None
        reply = spent.total.usd / spent.total.replies
        assert spent.total.usd == pytest.approx(0.05, abs=2 * reply), "what was in flight"

    def test_what_a_file_that_ends_tells_is_counted_once(self, tmp_path: Path) -> None:
        async def told() -> None:
            path = tmp_path / "spent.json"
            budget = Budget("task.yaml", path, (1.0, 1.0), None, 1000)
            budget.pay(Usage(60, 40), 0)
            with claimed(path.with_name(".spent")):  # another run tells
                telling = asyncio.create_task(budget.sync())
                await asyncio.sleep(0)
                telling.cancel()
                assert not (await asyncio.wait([telling], timeout=0.2))[0]
            with pytest.raises(asyncio.CancelledError):
                await telling
            await budget.sync()
            assert (read_spent(path).tokens, budget.total.tokens) == (100, 100)

        asyncio.run(told())

    def test_a_budget_in_money_needs_prices(self, project: Project) -> None:
        project.write_task({"budget_usd": 1})
        with pytest.raises(SetupError, match="budget_usd: the model file has no prices"):
            project.steps()

    def test_a_task_without_a_model_has_no_budget(self, project: Project) -> None:
        project.write_task({"budget_tokens": 5, "scorer": "x:y"})
        task = yaml.safe_load(project.task_file.read_text())
        project.task_file.write_text(
            yaml.safe_dump({k: v for k, v in task.items() if k not in ("model", "prompt")})
        )
        with pytest.raises(SetupError, match="budget_tokens: not used: the task asks no model"):
            project.steps()
