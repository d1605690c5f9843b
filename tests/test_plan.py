"""`modelcall plan`: what the next run sends, and why."""

from __future__ import annotations

import orjson
from project import (
    ALL,
    CHATS,
    INS,
    NAMES,
    ONLY_INS,
    TASK,
    A,
    B,
    C,
    Project,
    Row,
    chat,
    instruction,
    some_rows,
)

from modelcall_assets.rehearsal import Faults, RehearsalServer

PRICES = {"usd_per_million_input_tokens": 1, "usd_per_million_output_tokens": 1}


def planned(project: Project) -> list[Row]:
    ended = project.run("plan", TASK, "--json")
    assert ended.code == 0, ended
    return [orjson.loads(line) for line in ended.out.splitlines()]


def whys(plans: list[Row]) -> dict[str, str]:
    return {each["file"]: each["why"] for each in plans}


class TestWhy:
    def test_it_is_told_of_each_file_that_is_due(
        self, project: Project, server: RehearsalServer
    ) -> None:
        assert whys(planned(project)) == dict.fromkeys(NAMES, "new")
        assert project.run("run-task", TASK).code == 0
        assert planned(project) == []
        assert "files: up to date 3" in project.run("plan", TASK).out

        project.write_input(A, [*some_rows(4, "first"), *some_rows(2, "more")])
        project.write_input("d.jsonl", some_rows(1, "fourth"))
        project.output(C).unlink()
        plans = planned(project)
        assert whys(plans) == {
            A: "the input file has changed",
            "d.jsonl": "new",
            C: "gone, or elsewhere now",
        }
        assert [each["to_send"] for each in plans] == [2, 1, 0]
        requests = server.stats()["requests"]
        assert project.run("run-task", TASK).code == 0
        assert server.stats()["requests"] == requests + 3

        project.write_prompt({"prompt_template": {"prompt_text": "Rate: {text}"}})
        (why,) = {*whys(planned(project)).values()}
        assert why.startswith("scores made with prompt quality@") and ", now prompt quality@" in why
        project.write_prompt()
        project.write_model({"chat_config": {"model": "another"}})
        (why,) = {*whys(planned(project)).values()}
        assert why == "scores made with model rehearsal-rater-1, now model another"

    def test_failed_and_unfinished_files(self, project: Project, server: RehearsalServer) -> None:
        project.write_input(A, [*some_rows(4, "first"), b"{torn", {"txt": "misspelt"}])
        (project.root / project.inputs / B).unlink()
        server.set_faults(Faults(rate_400=1))
        assert project.run("run-task", TASK).code == 1
        server.set_faults(Faults())
        first, second = planned(project)
        assert whys([first, second]) == {A: "failed before", C: "failed before"}
        assert (first["rows"], first["cannot_be_asked"], first["to_send"]) == (6, 2, 4)
        told = project.run("plan", TASK).out
        absent = "about 1 row of a.jsonl cannot be asked: missing_input: input column 'text' is"
        assert absent in told and "about 1 row of a.jsonl cannot be asked: bad_line" in told
        requests = server.stats()["requests"]
        project.run("run-task", TASK)
        assert server.stats()["requests"] == requests + 8


def write_sets(project: Project) -> None:
    project.write_dataset("Chats", [chat(n) for n in range(3)])
    project.write_dataset("Ins", [instruction(n) for n in range(2)])


class TestDistillation:
    def test_generator_and_judge_are_counted_each(
        self, project: Project, server: RehearsalServer
    ) -> None:
        project.write_model({"prices": PRICES, "chat_config": {"max_tokens": 100}})
        project.write_chain()
        write_sets(project)
        plans = planned(project)
        assert [(each["file"], each["step"], each["to_send"]) for each in plans] == [
            (CHATS, "responses", 3), (CHATS, "scores", 3),
            (INS, "responses", 2), (INS, "scores", 2),
        ]  # fmt: skip
        told = project.run("plan", TASK).out
        assert "with 100 tokens per answer (responses)" in told
        assert "with 100 tokens per answer (scores)" in told
        assert project.run("run-task", TASK).code == 0
        assert planned(project) == []

        project.write_prompt({"prompt_template": {"prompt_text": "Rate: {text}"}})
        plans = planned(project)
        assert [(each["file"], each["step"], each["to_send"]) for each in plans] == [
            (ALL, "scores", 5), (ONLY_INS, "scores", 2)
        ]  # fmt: skip
        project.write_prompt()
        project.write_model({"prices": PRICES, "chat_config": {"max_tokens": 101}})
        steps = [(each["file"], each["step"], each["to_send"]) for each in planned(project)]
        assert steps == [
            (ALL, "responses", 5), (ALL, "scores", 5),
            (ONLY_INS, "responses", 2), (ONLY_INS, "scores", 2),
        ]  # fmt: skip

    def test_the_journal_of_merged_groups_is_looked_into(
        self, project: Project, server: RehearsalServer
    ) -> None:
        project.write_chain()
        write_sets(project)
        server.set_faults(Faults(rate_400=0.5))
        assert project.run("run-task", TASK).code == 1
        server.set_faults(Faults())
        plans = planned(project)
        assert [(each["file"], each["step"]) for each in plans] == [
            (ALL, "responses"), (ALL, "scores"), (ONLY_INS, "responses"), (ONLY_INS, "scores")
        ]  # fmt: skip
        assert sum(each["in_journal"] for each in plans) == server.stats()["answered"] > 0
        requests = server.stats()["requests"]
        assert project.run("run-task", TASK).code == 0
        sent = server.stats()["requests"] - requests
        assert sum(each["to_send"] for each in plans) == sent
