"""Distilling tasks in a real Dagster instance: data sets to conversations, answers and ratings."""

from __future__ import annotations

import asyncio
import gzip
import math
import subprocess
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from datetime import date
from pathlib import Path
from typing import Any

import dagster as dg
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from dagster._core.definitions.data_version import StaleStatus
from endpoint import (
    Endpoint,
    Request,
    Script,
    completion,
    http,
    in_thread,
    refusal,
    said,
    serving,
)
from project import (
    ALL,
    CHATML,
    CHATS,
    CONVERSATIONS,
    FRESH,
    GENERATE,
    GREEN,
    INS,
    JUDGE,
    MERGE,
    ONLY_INS,
    QUIET,
    RED,
    STALE,
    Project,
    Row,
    asked,
    chat,
    instruction,
    looked_at_by,
    read_rows,
    stable,
    turn,
)

from modelcall_assets.config.catalog import load_catalog
from modelcall_assets.defs.instance import range_tags, register
from modelcall_assets.defs.runs import RunSummary, TaskRunner
from modelcall_assets.errors import SetupError
from modelcall_assets.rehearsal import Faults, RehearsalServer, serve_in_thread
from modelcall_assets.stages import Run
from modelcall_assets.stages.report import Report, Tally, Watcher

STAGES = ("raw", "chatml", "merged", "responses", "scores")


@pytest.fixture
def project(distilling: Project) -> Project:
    return distilling


@pytest.fixture
def chain(project: Project) -> Project:
    """Two data sets, the group of both and the group of one, answered and rated."""
    project.write_chain()
    project.write_dataset("Chats", [chat(number) for number in range(3)])
    project.write_dataset("Ins", [instruction(number) for number in range(4)])
    return project


def answer_all(project: Project) -> list[Row]:
    """The responses to `CONVERSATIONS`, however many failed."""
    project.materialize()
    return project.responses()


def materialized(chain: Project) -> Counter[tuple[str, str]]:
    """How often each stage of each partition was."""
    return Counter(
        (stage, record.partition_key or "")
        for stage in STAGES
        for record in chain.instance.fetch_materializations(
            dg.AssetRecordsFilter(chain.asset_key(stage)), limit=100
        ).records
    )


def evaluations(project: Project, stage: str) -> list[dg.AssetCheckEvaluation]:
    storage, key = (
        project.instance.event_log_storage,
        dg.AssetCheckKey(project.asset_key(stage), "complete"),
    )
    records = storage.get_asset_check_execution_history(key, 100)
    found = (record.evaluation for record in records)
    return [each for each in found if isinstance(each, dg.AssetCheckEvaluation)]


def staleness(chain: Project) -> dict[str, list[StaleStatus]]:
    return {stage: [*chain.staleness(stage).values()] for stage in STAGES}


Answered = Callable[[Script], Endpoint]


@pytest.fixture
def answered_by(project: Project, monkeypatch: pytest.MonkeyPatch) -> Iterator[Answered]:
    """Puts a scripted endpoint in the rehearsal server's place."""
    with ExitStack() as stack:

        def serve(script: Script) -> Endpoint:
            endpoint = stack.enter_context(in_thread(serving(script)))
            monkeypatch.setenv("REHEARSAL_BASE_URL", endpoint.url)
            return endpoint

        yield serve


def echo(request: Request) -> bytes:
    """Says its question; what is to be judged is a 3."""
    question = request.question
    is_judging = isinstance(question, str) and question.startswith("Judge this text:")
    return said(content='{"score": 3}' if is_judging else f"re: {question}")


def judged(responses: Sequence[str]) -> list[str]:
    return [f"Judge this text:\n{response}\n" for response in responses]


class TestChain:
    def test_every_asset_is_green_and_every_row_in_its_place(
        self, chain: Project, answered_by: Answered
    ) -> None:
        endpoint = answered_by(echo)
        summary = chain.materialize()
        assert summary == RunSummary(ran=dict.fromkeys(STAGES, 2))
        for stage in STAGES:
            keys = (CHATS, INS) if stage in ("raw", "chatml") else (ALL, ONLY_INS)
            assert chain.statuses(stage) == dict.fromkeys(keys, GREEN)
        questions = endpoint.questions()

        chats, instructions = chain.rows(CHATS, "chatml"), chain.rows(INS, "chatml")
        assert [row["raw_data"] for row in chats] == [chat(number) for number in range(3)]
        assert chats[1]["format"] == "chatml"
        assert chats[1]["messages"] == [
            turn("system", "Be brief."),
            turn("user", "Look it up."),
            turn("assistant", "Looking."),
            turn("tool", "found 1"),
            turn("user", "chat 1?"),
            turn("assistant", "old answer 1"),
        ]
        assert [row["messages"] for row in instructions] == [
            [turn("user", text), turn("assistant", f"old answer {number}")]
            for number, text in enumerate(["do 0", "do 1\n\nwith x", "do 2", "do 3\n\nwith x"])
        ]
        assert chain.rows(ALL, "merged") == [*chats, *instructions]
        assert chain.rows(ONLY_INS, "merged") == instructions

        for group in (ALL, ONLY_INS):
            merged, rows, rated = (
                chain.rows(group, "merged"),
                chain.responses(group),
                chain.scores(group),
            )
            assert [row["messages"] for row in rows] == [row["messages"] for row in merged]
            assert [row["response"] for row in rows] == [
                f"re: {row['messages'][-2]['content']}" for row in merged
            ]
            assert [row["final_messages"] for row in rows] == [
                [*row["messages"][:-1], turn("assistant", row["response"])] for row in rows
            ]
            assert {row["api_status"] for row in rows} == {"success"}
            assert [row["response"] for row in rated] == [row["response"] for row in rows]
            assert {row["score"] for row in rated} == {3}
        answers = [row["response"] for group in (ALL, ONLY_INS) for row in chain.responses(group)]
        assert Counter(questions) == Counter(
            [answer.removeprefix("re: ") for answer in answers] + judged(answers)
        )

    def test_run_again_there_is_nothing_to_do_and_no_request(
        self, chain: Project, server: RehearsalServer
    ) -> None:
        first = chain.run("run-task", chain.task_file)
        assert first.code == 0, first
        assert server.stats()["requests"] == 2 * (7 + 4), "an answer and a rating for each row"
        before = materialized(chain)
        assert set(before.values()) == {1}
        assert chain.materialize().ran == dict.fromkeys(STAGES, 0)
        again = chain.run("run-task", chain.task_file)
        assert again.code == 0, again
        assert "nothing to do" in again.out
        assert server.stats()["requests"] == 22
        assert materialized(chain) == before

    def test_what_the_graph_looks_like(self, chain: Project) -> None:
        graph = chain.definitions().resolve_asset_graph()
        shown = {}
        for key in sorted(graph.materializable_asset_keys):
            node = graph.get(key)
            assert node.code_version
            shown[key.to_user_string()] = {
                "deps": [parent.to_user_string() for parent in node.parent_keys],
                "mappings": [
                    type(graph.get_partition_mapping(key, parent)).__name__
                    for parent in node.parent_keys
                ],
                "partitions": node.partitions_def and node.partitions_def.name,
                "pools": sorted(node.pools or ()),
                "checks": sorted(check.name for check in node.check_keys),
            }
        same = ["IdentityPartitionMapping"]
        assert shown == {
            "chain/raw": {
                "deps": [],
                "mappings": [],
                "partitions": "chain/files",
                "pools": [],
                "checks": ["complete"],
            },
            "chain/chatml": {
                "deps": ["chain/raw"],
                "mappings": same,
                "partitions": "chain/files",
                "pools": [],
                "checks": ["complete"],
            },
            "chain/merged": {
                "deps": ["chain/chatml"],
                "mappings": ["AllPartitionMapping"],
                "partitions": "chain/groups",
                "pools": [],
                "checks": ["complete"],
            },
            "chain/responses": {
                "deps": ["chain/merged"],
                "mappings": same,
                "partitions": "chain/groups",
                "pools": ["chain"],
                "checks": ["complete"],
            },
            "chain/scores": {
                "deps": ["chain/responses"],
                "mappings": same,
                "partitions": "chain/groups",
                "pools": ["chain"],
                "checks": ["complete"],
            },
            "chain/summary": {
                "deps": ["chain/scores"],
                "mappings": ["AllPartitionMapping"],
                "partitions": None,
                "pools": [],
                "checks": ["complete"],
            },
        }

    def test_without_merging_each_split_is_answered(
        self, chain: Project, server: RehearsalServer
    ) -> None:
        chain.write_steps(chatml_conversion=CHATML, generate_response=GENERATE)
        summary = chain.materialize()
        assert summary == RunSummary(ran=dict.fromkeys(("raw", "chatml", "responses"), 2))
        for name in (CHATS, INS):
            assert [row["messages"] for row in chain.responses(name)] == [
                row["messages"] for row in chain.rows(name, "chatml")
            ]
        assert server.stats()["requests"] == 7

    def test_a_row_that_could_not_be_converted_fails_in_its_place_and_is_not_asked(
        self, chain: Project, answered_by: Answered
    ) -> None:
        chain.write_chain(max_failure_rate=0.5)
        wrong = {"id": "c1", "conversations": "no list"}
        chain.write_dataset("Chats", [chat(0), wrong, {"id": "dropped"}, chat(2)])
        endpoint = answered_by(echo)
        assert chain.materialize().failed == []
        rows, rated = chain.responses(ALL), chain.scores(ALL)
        assert [row["raw_data"] for row in rows[:3]] == [chat(0), wrong, chat(2)]
        assert [row["api_fail_reason"] for row in rows] == [None, "chatml_error", *[None] * 5]
        assert "conversations: expected a list, have text" in rows[1]["api_fail_detail"]
        assert (rows[1]["response"], rows[1]["final_messages"]) == (None, None)
        assert [row["api_fail_reason"] for row in rated] == [None, "chatml_error", *[None] * 5]
        assert len(endpoint.questions()) == 2 * (6 + 4)
        assert chain.materialize().ran == dict.fromkeys(STAGES, 0)


class TestChange:
    def test_of_a_row_pays_for_its_conversation_in_its_groups_only(
        self, chain: Project, answered_by: Answered
    ) -> None:
        endpoint = answered_by(echo)
        chain.materialize()
        before = materialized(chain)
        untouched = chain.responses(ONLY_INS)
        endpoint.questions()

        chain.write_dataset("Chats", [chat(0), chat(1, "another?"), chat(2)])
        summary = chain.materialize()
        assert summary == RunSummary(ran=dict.fromkeys(STAGES, 1))
        ran_again = [("raw", CHATS), ("chatml", CHATS)]
        ran_again += [(stage, ALL) for stage in ("merged", "responses", "scores")]
        assert materialized(chain) - before == Counter(ran_again)
        assert endpoint.questions() == ["another?", *judged(["re: another?"])]
        rows = chain.responses(ALL)
        assert [row["messages"][4]["content"] for row in rows[:3]] == [
            "chat 0?",
            "another?",
            "chat 2?",
        ]
        assert [row["api_status"] for row in rows] == ["success"] * 7
        assert chain.responses(ONLY_INS) == untouched
        assert chain.materialize().ran == dict.fromkeys(STAGES, 0)

    def test_of_a_shared_member_reaches_both_groups(
        self, chain: Project, answered_by: Answered
    ) -> None:
        endpoint = answered_by(echo)
        chain.materialize()
        endpoint.questions()
        rows = [instruction(number) for number in range(4)]
        chain.write_dataset("Ins", [instruction(9, "new"), *rows[:1], *rows[2:]])
        assert chain.materialize().ran == {
            "raw": 1,
            "chatml": 1,
            "merged": 2,
            "responses": 2,
            "scores": 2,
        }
        asked = "new 9\n\nwith x"
        assert Counter(endpoint.questions()) == Counter([asked, *judged([f"re: {asked}"])] * 2)

    def test_is_stale_where_it_shapes_rows_and_ends_at_a_merge_with_the_same_content(
        self, chain: Project, answered_by: Answered
    ) -> None:
        all_fresh = {stage: [FRESH, FRESH] for stage in STAGES}
        endpoint = answered_by(echo)
        chain.materialize()
        chain.write_model(
            {"prices": {"usd_per_million_input_tokens": 1}, "client_config": {"timeout": 19}}
        )
        chain.write_chain(max_failure_rate=0.9, concurrency={"max_concurrent_requests": 7})
        assert staleness(chain) == all_fresh, "prices and limits shape no row"
        assert chain.materialize().ran == dict.fromkeys(STAGES, 0)

        chain.write_dataset("Chats", [chat(0), chat(1, "another?"), chat(2)])
        chain.materialize()
        endpoint.questions()
        before = materialized(chain)
        may_read_any_file = {"merged": [FRESH, STALE]}
        assert staleness(chain) == all_fresh | may_read_any_file

        job = chain.definitions().resolve_implicit_global_asset_job_def()
        merging = job.execute_in_process(
            instance=chain.instance,
            asset_selection=[chain.asset_key("merged")],
            partition_key=ONLY_INS,
            run_config=QUIET,
        )
        assert merging.success
        assert materialized(chain) - before == Counter([("merged", ONLY_INS)])
        assert staleness(chain) == all_fresh
        assert chain.materialize().ran == dict.fromkeys(STAGES, 0)
        assert endpoint.questions() == []


class TestFormats:
    def test_data_sets_of_any_format_in_another_encoding(
        self, chain: Project, answered_by: Answered
    ) -> None:
        """The first step reads what others wrote; the rest what stages leave, in UTF-8."""
        endpoint = answered_by(echo)
        sets = chain.root / "data/sets/org"
        chats = [chat(n, f"问 {n}") for n in range(3)]
        encoded = [orjson.dumps(row).decode().encode("gbk") for row in chats]
        (sets / "Chats/train.jsonl").unlink()
        (sets / "Chats/train.jsonl.gz").write_bytes(gzip.compress(b"\n".join(encoded)))
        (sets / "Ins/train.jsonl").unlink()
        table = pa.Table.from_pylist([instruction(n) for n in range(4)])
        with pa.ipc.new_stream(sets / "Ins/train.arrow", table.schema) as arrow:
            arrow.write_table(table)
        chain.write_chain(encoding="gbk")
        summary = chain.materialize()
        assert summary.failed == []
        assert [row["final_messages"][-2]["content"] for row in chain.responses(ALL)][:3] == [
            "问 0",
            "问 1",
            "问 2",
        ]
        assert len(endpoint.questions()) == 2 * (7 + 4), "answered and rated"

    @pytest.mark.parametrize("name", ["talk.parquet", "talk.ndjson.zst", "talk.arrow"])
    def test_conversations_of_any_format(
        self, project: Project, answered_by: Answered, name: str
    ) -> None:
        answered_by(echo)
        rows = [asked(f"question {n}", n=n) for n in range(3)]
        place = project.input_folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        table, lines = pa.Table.from_pylist(rows), b"".join(orjson.dumps(r) + b"\n" for r in rows)
        if name.endswith("parquet"):
            pq.write_table(table, place)
        elif name.endswith("arrow"):
            with pa.ipc.new_file(place, table.schema) as arrow:
                arrow.write_table(table)
        else:
            with pa.CompressedOutputStream(place, "zstd") as out:
                out.write(lines)
        project.write_generation()
        assert project.materialize().failed == []
        assert [row["n"] for row in project.responses("talk.jsonl")] == [0, 1, 2]

    def test_a_bad_line_stops_the_step_that_wants_that(
        self, project: Project, server: RehearsalServer
    ) -> None:
        project.write_input(CONVERSATIONS, [asked("one"), b"{torn"])
        project.write_generation({"on_bad_line": "fail"})
        (message,) = project.materialize().failed
        assert "talk.jsonl: line 2, column 2: " in message
        assert server.stats()["requests"] == 0
        groups = {"name": "all", "output_file": "a.jsonl", "input_files": [CONVERSATIONS]}
        project.write_yaml("distillation/groups", {"merge_groups": [groups]})
        merge = {**MERGE, "base_input_dir": project.inputs, "on_bad_line": "fail"}
        project.write_steps(jsonl_merge=merge)
        assert any("line 2, column 2: " in each for each in project.materialize().failed)
        project.write_steps(jsonl_merge={**merge, "on_bad_line": "keep"})
        assert project.materialize().failed == []
        assert len(project.rows("a.jsonl", "merged")) == 1


class TestMembers:
    def test_a_group_that_lacks_one_is_red_and_names_it_while_others_go_on(
        self, chain: Project, server: RehearsalServer
    ) -> None:
        summary = chain.materialize([INS])
        assert summary.ran == {"raw": 1, "chatml": 1, "merged": 2, "responses": 1, "scores": 1}
        (message,) = summary.failed
        assert f"{ALL}: 1 of 2 members have no accepted" in message
        assert CHATS in message and INS not in message
        assert chain.statuses("merged") == {ALL: RED, ONLY_INS: GREEN}
        for stage in ("responses", "scores"):
            assert chain.statuses(stage) == {ALL: None, ONLY_INS: GREEN}
        assert not (chain.root / "data/merged" / ALL).exists()
        assert server.stats()["requests"] == 2 * 4

        assert chain.materialize().failed == [], "all of it, and it is mended"
        assert chain.statuses() == {ALL: GREEN, ONLY_INS: GREEN}
        assert server.stats()["requests"] == 2 * (7 + 4)

    def test_a_group_whose_member_is_gone_is_red_while_others_go_on(self, project: Project) -> None:
        for name in ("a.jsonl", "b.jsonl"):
            project.write_input(name, [{"of": name}])
        both = {"name": "both", "output_file": "both.jsonl", "input_files": ["a.jsonl", "b.jsonl"]}
        one = {"name": "one", "output_file": "one.jsonl", "input_files": ["a.jsonl"]}
        project.write_yaml("distillation/groups", {"merge_groups": [both, one]})
        project.write_steps(jsonl_merge={**MERGE, "base_input_dir": project.inputs})
        assert project.materialize().failed == []
        (project.input_folder / "b.jsonl").unlink()
        project.write_input("a.jsonl", [{"of": "another"}])
        failed = project.materialize().failed
        assert len(failed) == 1 and "b.jsonl" in failed[0], failed
        assert project.statuses("merged") == {"both.jsonl": RED, "one.jsonl": GREEN}
        assert project.rows("one.jsonl", "merged") == [{"of": "another"}]

    def test_merging_alone_keeps_valid_lines_in_order_and_counts_the_others(
        self, project: Project
    ) -> None:
        project.write_input("zh.jsonl", [b'{"a":1}', b"", b"{bad", b'{"b":2}'])
        project.write_input("en.jsonl", [b'{"a":3,"c":4}'])
        group = {"name": "qa", "output_file": "qa.jsonl", "input_files": ["zh.jsonl", "en.jsonl"]}
        lacking = {"name": "gone", "output_file": "gone.jsonl", "input_files": ["fr.jsonl"]}
        project.write_yaml("distillation/groups", {"merge_groups": [group, lacking]})
        project.write_steps(
            distillation={"step": "jsonl_merge", "base_input_dir": "data/in"} | MERGE
        )
        summary = project.materialize()
        assert project.rows("qa.jsonl", "merged") == [{"a": 1}, {"b": 2}, {"a": 3, "c": 4}]
        checks = {check.partition: check for check in evaluations(project, "merged")}
        assert [check.passed for check in checks.values()] == [False, False]
        assert "zh.jsonl, line 3" in (checks["qa.jsonl"].description or "")
        assert "fr.jsonl is not there" in (checks["gone.jsonl"].description or "")
        (message,) = summary.failed
        assert "'gone'" in message and "fr.jsonl is not there" in message
        assert not (project.root / "data/merged/gone.jsonl").exists()


def damage(path: Path, text: bytes) -> None:
    """Spoil the length of a text in a Parquet file, so that it breaks off there when it is read."""
    length = len(text).to_bytes(4, "little")
    content = path.read_bytes()
    assert content.count(length + text) == 1
    path.write_bytes(content.replace(length + text, b"\xff" * 4 + text))


class TestDataSets:
    def test_that_break_off_are_red_and_converted_whole_once_mended(
        self, chain: Project, server: RehearsalServer
    ) -> None:
        chain.write_steps(chatml_conversion=CHATML, generate_response=GENERATE)
        folder = chain.root / "data/sets/org/Ins"
        (folder / "train.jsonl").unlink()
        plain = {"compression": "none", "use_dictionary": False, "write_statistics": False}
        parts = [folder / f"train-0000{number}-of-00002.parquet" for number in range(2)]
        for part in parts:
            pq.write_table(pa.Table.from_pylist([instruction(n) for n in range(4)]), part, **plain)
        damage(parts[1], b"old answer 3")
        summary = chain.materialize()
        assert summary.ran == {"raw": 2, "chatml": 2, "responses": 1}
        (message,) = summary.failed
        assert f"{INS}: {parts[1]}: " in message and CHATS not in message
        assert chain.statuses("chatml") == {CHATS: GREEN, INS: RED}
        assert not (chain.root / "data/chatml" / INS).exists()
        assert server.stats()["requests"] == len(chain.responses(CHATS)) == 3

        pq.write_table(pa.Table.from_pylist([instruction(n) for n in range(4)]), parts[1])
        assert chain.materialize().failed == []
        assert chain.statuses("chatml") == {CHATS: GREEN, INS: GREEN}
        assert [row["raw_data"] for row in chain.responses(INS)] == [
            instruction(number) for number in range(4)
        ] * 2
        assert server.stats()["requests"] == 3 + 8


class TestSettings:
    def test_of_each_step_shape_what_it_leaves(self, chain: Project) -> None:
        member = "Chats/org_Chats-train-with_system.jsonl"
        mine = {"name": "mine", "output_file": "mine.jsonl", "input_files": [member]}
        lacking = {"name": "other", "output_file": "other.jsonl", "input_files": ["none.jsonl"]}
        mine |= {"dedup": True, "source_column": "from"}
        chain.write_yaml("distillation/groups", {"merge_groups": [lacking, mine]})
        chatml = {"selected_datasets": ["org/Chats"], "keep_raw_data": False}
        chatml |= {"add_system_prompt": True, "system_prompt": "Be kind."}
        chatml |= {"other_roles": "drop", "validation": "strict"}
        merge = MERGE | {"merge_groups": ["mine"]}
        chain.write_steps(
            chatml_conversion=CHATML | chatml, jsonl_merge=merge, max_failure_rate=0.5
        )
        open_ended = {"conversations": [{"from": "human", "value": "and now?"}]}
        chain.write_dataset("Chats", [chat(0), chat(0), open_ended])
        assert chain.materialize() == RunSummary(ran={"raw": 1, "chatml": 1, "merged": 1})
        talk, failed = chain.rows("mine.jsonl", "merged")
        assert talk == {
            "messages": [
                turn("system", "Be kind."),
                turn("user", "Look it up."),
                turn("assistant", "Looking."),
                turn("user", "chat 0?"),
                turn("assistant", "old answer 0"),
            ],
            "format": "chatml",
            "from": member,
        }
        assert "the last is user" in failed["error"]["detail"]

    @pytest.mark.parametrize(
        ("files", "rows", "expected"), [(-1, -1, [3, 4]), (1, -1, [3]), (-1, 2, [2, 2])]
    )
    def test_caps_take_the_first_and_minus_one_is_none(
        self, chain: Project, server: RehearsalServer, files: int, rows: int, expected: list[int]
    ) -> None:
        debug = {"enabled": True, "max_files": files, "max_items_per_file": rows}
        chain.write_steps(chatml_conversion=CHATML, generate_response=GENERATE, debug=debug)
        assert chain.materialize().failed == []
        found = [chain.responses(name) for name in (CHATS, INS)[: len(expected)]]
        assert [len(each) for each in found] == expected
        assert server.stats()["requests"] == sum(expected)

        for name, count in (("a.jsonl", 3), ("b.jsonl", 4)):
            chain.write_input(name, [asked(f"{name} {number}") for number in range(count)])
        chain.task = "of_a_folder"
        chain.write_generation({"output_path": "data/answers"}, debug=debug)
        assert chain.materialize().failed == []
        found = [chain.responses(f"{name}.jsonl") for name in "ab"[: len(expected)]]
        assert [len(each) for each in found] == expected
        assert server.stats()["requests"] == 2 * sum(expected)

    @pytest.mark.parametrize("is_linked", [False, True])
    def test_a_cap_takes_away_nothing_that_is_there(
        self, chain: Project, server: RehearsalServer, is_linked: bool
    ) -> None:
        """The inputs that it leaves out are no deleted ones."""
        steps: dict[str, Any] = {"chatml_conversion": CHATML, "generate_response": GENERATE}
        chain.write_steps(**steps)
        if is_linked:
            chain.write_steps(chatml_conversion=CHATML)
            assert chain.run("run-task", chain.task_file).code == 0
            chain.task = "answers"
            steps = {"generate_response": {**GENERATE, "input_path": CHATML["output_dir"]}}
            chain.write_steps(**steps)
        assert chain.run("run-task", chain.task_file).code == 0
        chain.write_steps(**steps, debug={"enabled": True, "max_files": 1})
        assert "is gone" not in chain.run("verify", chain.task_file).out
        ended = chain.run("clean", chain.task_file, "--deleted-inputs", "--yes")
        assert (ended.code, "nothing to delete" in ended.out) == (0, True), ended
        assert [len(chain.responses(name)) for name in (CHATS, INS)] == [3, 4]
        assert "nothing to do" in chain.run("run-task", chain.task_file).out

    def test_a_model_file_of_the_first_generation_names_the_model(
        self, project: Project, answered_by: Answered, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        project.write_input(CONVERSATIONS, [asked("a")])
        old = {"provider": "mine", "model_name": "old-1", "completions_params": {"top_p": 0.5}}
        project.write_yaml("models/rehearsal", old)
        project.write_generation()
        endpoint = answered_by(echo)
        monkeypatch.setenv("BASE_URL", endpoint.url)
        monkeypatch.setenv("API_KEY", "k")
        monkeypatch.setenv("MODEL_NAME", "another")
        (row,) = answer_all(project)
        (body,) = endpoint.jsons
        assert (body["model"], body["top_p"]) == ("old-1", 0.5)
        assert row["api_model"] == "old-1"


PARTS = [
    {"type": "text", "text": "what is this?"},
    {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
]
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {"id": "t1", "type": "function", "function": {"name": "add", "arguments": '{"a":1}'}}
    ],
}


class TestPrompts:
    def test_the_whole_conversation_is_sent_without_a_last_answer(
        self, project: Project, answered_by: Answered
    ) -> None:
        tool = {**turn("tool", "2"), "tool_call_id": "t1"}
        conversations = [
            [turn("system", "s"), turn("user", "u"), turn("assistant", "a"), turn("user", "v")],
            [turn("system", "s"), turn("user", "u"), CALL, tool, turn("assistant", "old")],
            [turn("user", PARTS), turn("assistant", "old")],
            [turn("user", "问题"), turn("assistant", "a"), turn("assistant", "b")],
            [turn("system", "only that")],
        ]
        project.write_input(CONVERSATIONS, [{"messages": turns} for turns in conversations])
        project.write_generation()
        endpoint = answered_by(lambda _: said(content="yes"))
        rows = answer_all(project)
        answers = (0, 1, 1, 2, 0)
        sent = [
            turns[: len(turns) - last] for turns, last in zip(conversations, answers, strict=True)
        ]
        assert [body["messages"] for body in endpoint.jsons] == sent
        assert {body["model"] for body in endpoint.jsons} == {"rehearsal-rater-1"}
        assert [row["final_messages"] for row in rows] == [
            [*turns, turn("assistant", "yes")] for turns in sent
        ]
        assert [row["messages"] for row in rows] == conversations

    def test_turns_of_a_columnar_file_are_sent_without_the_fields_that_others_have(
        self, project: Project, answered_by: Answered
    ) -> None:
        tool = {**turn("tool", "2"), "tool_call_id": "t1"}
        conversations = [[turn("user", "u"), CALL, tool], [turn("user", "v")]]
        parts = [[turn("user", [{"type": "text", "text": "w"}, {"type": "image", "url": "x"}])]]
        folder = project.input_folder
        for name, turns in (("a", conversations), ("b", parts)):
            pq.write_table(pa.table({"messages": turns}), folder / f"{name}.parquet")
        project.write_generation()
        endpoint = answered_by(lambda _: said(content="yes"))
        assert project.materialize().failed == []
        sent = sorted((body["messages"] for body in endpoint.jsons), key=str)
        assert sent == sorted([*conversations, *parts], key=str)
        assert [row["final_messages"] for row in project.responses("b.jsonl")] == [
            [*parts[0], turn("assistant", "yes")]
        ]

    def test_a_number_beyond_64_bits_is_sent_as_a_number(
        self, project: Project, answered_by: Answered
    ) -> None:
        path = project.input_folder / CONVERSATIONS
        path.write_text(
            '{"messages": [{"role": "user", "content": "u", "n": 123456789012345678901}]}'
        )
        project.write_generation()
        endpoint = answered_by(lambda _: said(content="yes"))
        assert [row["api_status"] for row in answer_all(project)] == ["success"]
        assert endpoint.jsons[0]["messages"][0]["n"] == 123456789012345678901.0

    def test_the_first_message_alone_is_sent_as_the_users_where_the_task_says_so(
        self, project: Project, answered_by: Answered
    ) -> None:
        conversations = [
            [turn("system", "s"), turn("user", "u"), turn("assistant", "a")],
            [turn("user", PARTS), turn("assistant", "old")],
            [turn("assistant", "hello")],
        ]
        project.write_input(CONVERSATIONS, [{"messages": turns} for turns in conversations])
        project.write_generation({"prompt_mode": "first_message"})
        endpoint = answered_by(lambda _: said(content="yes"))
        rows = answer_all(project)
        sent = [[turn("user", content)] for content in ("s", PARTS, "hello")]
        assert [body["messages"] for body in endpoint.jsons] == sent
        assert [row["final_messages"] for row in rows] == [
            [*turns, turn("assistant", "yes")] for turns in sent
        ]

    def test_a_row_that_cannot_be_sent_fails_in_its_place_and_stops_no_other(
        self, project: Project, answered_by: Answered
    ) -> None:
        wrong: dict[str, Row | bytes] = {
            "an assistant's": {"messages": [turn("assistant", "I begin")]},
            "'messages' is absent": {"text": "no conversation"},
            "'messages' is no list": {"messages": "text"},
            "no list of turns": {"messages": []},
            "list of turns": {"messages": [{"content": "of nobody"}]},
            "of turns": {"messages": [turn("user", "fine"), "text"]},
            "the line reads: {bad": b"{bad",
        }
        rows: list[Row | bytes] = []
        for number, row in enumerate(wrong.values()):
            rows += [asked(f"good {number}"), row]
        project.write_input(CONVERSATIONS, rows)
        project.write_generation(max_failure_rate=0.9)
        endpoint = answered_by(echo)
        found = answer_all(project)
        assert endpoint.questions() == [f"good {number}" for number in range(len(wrong))]
        assert len(found) == 2 * len(wrong)
        assert {row["api_status"] for row in found[::2]} == {"success"}
        assert [row["api_fail_reason"] for row in found[1::2]] == [
            *["missing_input"] * (len(wrong) - 1),
            "bad_line",
        ]
        for what, row in zip(wrong, found[1::2], strict=True):
            assert what in row["api_fail_detail"]
            assert (row["api_status"], row["response"]) == ("error", None)
        assert found[-1]["raw"] == "{bad"


THOUGHT = "<think>\nwhy\n</think>\n\n"
REPLIES: list[tuple[Row, str, str, str | None]] = [
    # message, response, response without merging, why it failed
    ({"content": "ans", "reasoning_content": "why"}, f"{THOUGHT}ans", "ans", None),
    ({"content": "ans", "reasoning": "why"}, f"{THOUGHT}ans", "ans", None),
    (
        {"content": "ans", "reasoning_content": "why", "reasoning": "x"},
        f"{THOUGHT}ans",
        "ans",
        None,
    ),
    ({"content": "ans", "reasoning_content": "  "}, "ans", "ans", None),
    ({"content": "ans"}, "ans", "ans", None),
    ({"content": f"{THOUGHT}ans"}, f"{THOUGHT}ans", f"{THOUGHT}ans", None),
    ({"content": None, "reasoning": "why"}, THOUGHT, "", "empty"),
    ({"content": "", "reasoning_content": "why"}, THOUGHT, "", "empty"),
    ({"content": ""}, "", "", "empty"),
    ({"content": None}, "", "", "empty"),
    ({"content": THOUGHT}, THOUGHT, THOUGHT, "empty"),
]


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("merged", [True, False], ids=["merged", "apart"])
def test_reasoning_is_kept_and_where_wanted_put_before_the_answer(
    project: Project, answered_by: Answered, streamed: bool, merged: bool
) -> None:
    """A reply in one piece need not say why it finished; a stream that does not may be cut off."""
    asking = {f"{n} {reason}": reply for reason in ("stop", "") for n, reply in enumerate(REPLIES)}

    def reply(request: Request) -> bytes:
        assert bool(request.json.get("stream")) == streamed
        message, finish = asking[request.question][0], request.question.partition(" ")[2] or None
        return said(finish, streamed=streamed, **message)

    answered_by(reply)
    project.write_model({"chat_config": {"stream": streamed}})
    project.write_input(CONVERSATIONS, [asked(question) for question in asking])
    project.write_generation({"merge_reasoning": merged}, max_failure_rate=1)
    rows = answer_all(project)
    for row, (question, (message, with_thought, without, failure)) in zip(
        rows, asking.items(), strict=True
    ):
        response = with_thought if merged else without
        if streamed and question.endswith(" "):
            failure = "interrupted"
        assert row["response"] == response, (question, message)
        assert row["api_fail_reason"] == failure, (question, message)
        assert row["api_status"] == ("error" if failure else "success")
        reasoning = message.get("reasoning_content") or message.get("reasoning")
        assert row["reasoning"] == reasoning, (question, message)
        assert row["finish_reason"] == (question.partition(" ")[2] or None)
        assert row["usage"] == {"prompt_tokens": 3, "completion_tokens": 2}
        last = None if failure else turn("assistant", response)
        assert (row["final_messages"] or [None])[-1] == last


def faulty(request: Request) -> bytes:
    """As the question says."""
    match request.question.split():
        case ["long", *_]:
            return said("length", content="as far as it c")
        case ["thinking", *_]:
            return said("length", content=None, reasoning="on and o")
        case ["filtered", *_]:
            return said("content_filter", content="")
        case ["refused", *_]:
            return refusal(400, "invalid_request_error")
        case ["forbidden", *_]:
            return refusal(400, "content_filter")
        case ["endless", *_]:
            return refusal(400, "context_length_exceeded")
        case _:
            return echo(request)


FAILED = {
    "long": ("truncated", "as far as it c"),
    "thinking": ("truncated", "<think>\non and o\n</think>\n\n"),
    "filtered": ("content_filter", ""),
    "refused": ("bad_request", None),
    "forbidden": ("content_filter", None),
    "endless": ("context_length", None),
}


class TestFailures:
    def questions(self) -> list[str]:
        """Each kind of failure, good questions between them."""
        return [text for kind in FAILED for text in (f"good before {kind}", f"{kind} one")]

    def test_are_rows_in_their_place_with_their_reasons(
        self, project: Project, answered_by: Answered
    ) -> None:
        questions = self.questions()
        project.write_input(CONVERSATIONS, [asked(text) for text in questions])
        project.write_generation({"concurrency": 4}, max_failure_rate=0.5)
        answered_by(faulty)
        assert project.materialize().failed == []
        rows = project.responses()
        assert [row["messages"][0]["content"] for row in rows] == questions
        assert [row["response"] for row in rows[::2]] == [f"re: {text}" for text in questions[::2]]
        assert {row["api_status"] for row in rows[::2]} == {"success"}
        assert {row["api_status"] for row in rows[1::2]} == {"error"}
        assert [(row["api_fail_reason"], row["response"]) for row in rows[1::2]] == list(
            FAILED.values()
        )
        assert {row["final_messages"] and 1 for row in rows[1::2]} == {None}
        assert rows[1]["finish_reason"] == "length"
        assert "server says context_length_exceeded" in rows[-1]["api_fail_detail"]

        manifest = project.manifest(CONVERSATIONS, "responses")
        counts = (manifest.rows, manifest.ok, manifest.failed)
        assert (manifest.accepted, *counts) == (True, 12, 6, 6)
        assert manifest.failures == Counter(reason for reason, _ in FAILED.values())
        (check,) = evaluations(project, "responses")
        found = {"conservation": True, "failed rows": False, "unique ids": True}
        assert looked_at_by(check) == found

    def test_are_asked_again_and_nothing_else_is(
        self, project: Project, answered_by: Answered
    ) -> None:
        questions = self.questions()
        project.write_input(CONVERSATIONS, [asked(text) for text in questions])
        project.write_generation()
        endpoint = answered_by(faulty)
        (message,) = project.materialize().failed
        assert "6 of 12 rows failed (50.00%), more than max_failure_rate 5.00%" in message
        assert project.statuses("responses") == {CONVERSATIONS: RED}
        assert project.manifest(CONVERSATIONS, "responses") is None
        manifest = project.manifest(CONVERSATIONS, "responses", rejected=True)
        assert (manifest.accepted, manifest.rows) == (False, 12)
        assert endpoint.questions() == questions

        project.materialize()
        assert endpoint.questions() == questions[1::2]
        exported = project.run("export", project.task_file, "--all", "--output", "x")
        assert "rejected, 6 of 12 rows failed" in exported.err
        (copy,) = (project.root / "x").glob("*.jsonl")
        rows = read_rows(copy)
        assert [row["messages"][0]["content"] for row in rows] == questions
        endpoint.script = echo
        assert project.materialize().failed == []
        assert endpoint.questions() == questions[1::2]
        rows = project.responses()
        assert [row["response"] for row in rows] == [f"re: {text}" for text in questions]
        assert {row["api_status"] for row in rows} == {"success"}
        assert project.materialize().ran == {"raw": 0, "responses": 0}
        assert endpoint.questions() == []

    def test_that_are_accepted_are_asked_again_on_demand_only(
        self, project: Project, answered_by: Answered
    ) -> None:
        questions = ["good", "long one", "good too"]
        project.write_input(CONVERSATIONS, [asked(text) for text in questions])
        project.write_generation(max_failure_rate=0.4)
        endpoint = answered_by(faulty)
        assert project.materialize().failed == []
        assert project.materialize().ran == {"raw": 0, "responses": 0}
        assert endpoint.questions() == questions
        endpoint.script = echo
        retried = project.run("retry", project.task_file)
        assert retried.code == 0, retried
        assert endpoint.questions() == ["long one"]
        assert {row["api_status"] for row in project.responses()} == {"success"}

    def test_of_one_reason_are_asked_again_by_themselves(
        self, project: Project, answered_by: Answered
    ) -> None:
        questions = ["good", "long one", "filtered one", "long two"]
        project.write_input(CONVERSATIONS, [asked(text) for text in questions])
        project.write_generation(max_failure_rate=1)
        endpoint = answered_by(faulty)
        assert project.materialize().failed == []
        endpoint.questions()
        endpoint.script = echo
        retried = project.run("retry", project.task_file, "--reason", "truncated")
        assert retried.code == 0, retried
        assert endpoint.questions() == ["long one", "long two"]
        assert project.manifest(CONVERSATIONS, "responses").failures == {"content_filter": 1}

    def test_of_all_rows_are_mended_by_a_retry_and_none_is_asked_twice(
        self, project: Project, answered_by: Answered
    ) -> None:
        questions = ["long one", "filtered one", "long two"]
        project.write_input(CONVERSATIONS, [asked(text) for text in questions])
        project.write_generation()
        endpoint = answered_by(faulty)
        before = project.run("retry", project.task_file)
        assert before.code == 1 and "nothing is published by responses yet" in before.err
        assert endpoint.questions() == []
        assert project.materialize().failed
        for script, code in ((faulty, 1), (echo, 0)):
            endpoint.questions()
            endpoint.script = script
            retried = project.run("retry", project.task_file)
            assert retried.code == code, retried
            assert endpoint.questions() == questions
        assert [row["response"] for row in project.responses()] == [f"re: {q}" for q in questions]
        ended = project.run("failures", project.task_file)
        assert "0 of 3 rows failed" in ended.out

    @pytest.mark.parametrize(
        ("name", "read"),
        [
            ("talk.json", "data/in/talk.json"),
            ("talk.parquet", "data/in"),
            ("TALK.JSONL", "data/in"),
        ],
    )
    def test_stay_apart_from_answers_whatever_the_name_of_the_input(
        self, project: Project, answered_by: Answered, name: str, read: str
    ) -> None:
        path = project.write_input(name, [asked("good"), asked("long one"), asked("good too")])
        given, stem = path.read_bytes(), path.stem
        project.write_generation({"input_path": read}, max_failure_rate=1)
        endpoint = answered_by(faulty)
        assert project.materialize().ran == {"raw": 1, "responses": 1}
        assert [row["api_fail_reason"] for row in project.responses(f"{stem}.jsonl")] == [
            None,
            "truncated",
            None,
        ]
        task = str(project.task_file)
        ended = project.run("export", task, "--old-names", "--output", "data/old")
        assert ended.code == 0, ended
        files = sorted(each.name for each in (project.root / "data/old").glob("[!.]*"))
        assert files == [f"{stem}.jsonl", f"{stem}_error.jsonl"]
        assert [row["response"] for row in read_rows(project.root / "data/old" / files[0])] == [
            "re: good",
            "re: good too",
        ]
        (failed,) = read_rows(project.root / "data/old" / files[1])
        assert failed["error_type"] == "truncated"
        assert path.read_bytes() == given
        assert project.materialize().ran == {"raw": 0, "responses": 0}
        assert len(endpoint.questions()) == 3


def numbered() -> Script:
    """Never the same answer twice."""
    number = iter(range(1000))
    return lambda request: said(content=f"{request.question} {next(number)}")


def answers(project: Project) -> dict[tuple[int, int], str]:
    """By id of the row and sample."""
    return {(row["id"], row.get("sample", 0)): row["response"] for row in project.responses()}


def counted(line: bytes) -> bytes:
    """A line of a journal of two samples a row as it was in format 2."""
    content = orjson.loads(line)
    content.pop("crc")
    if "format" in content:
        content["format"] = 2
    if counted := content.pop("o", 0) * 2 + content.pop("s", 0):
        content = {"k": content.pop("k"), "o": counted, **content}
    return orjson.dumps(content) + b"\n"


class TestAskedAnew:
    """Rows that have an answer, chosen by `retry --ids` or `--where`."""

    @pytest.fixture
    def answered(self, project: Project, answered_by: Answered) -> Endpoint:
        rows = [asked(f"question {number}", id=f"r{number}") for number in range(4)]
        project.write_input(CONVERSATIONS, rows)
        project.write_generation()
        endpoint = answered_by(echo)
        assert project.materialize().failed == []
        endpoint.questions()
        return endpoint

    def again(self, request: Request) -> bytes:
        return said(content=f"again: {request.question}")

    def kill_at_the_third(self, project: Project, endpoint: Endpoint, *command: str | Path) -> None:
        """The command, at its third request; from then on all is answered."""

        def until_the_third(request: Request) -> bytes:
            return b"" if len(endpoint.asked) > 2 else self.again(request)

        endpoint.questions()
        endpoint.script = until_the_third
        project.signalled(lambda: len(endpoint.asked) > 2, *command)
        endpoint.questions()
        endpoint.script = self.again

    def write_half_failed(
        self, project: Project, endpoint: Endpoint, files: int, **limits: int
    ) -> list[str]:
        """Answered files of two rows, `<name> 0` and `<name> 1`, of which the second has failed."""
        names = [f"f{number}.jsonl" for number in range(files)]
        for name in names:
            questions = (f"chosen of {name}", f"long one of {name}")
            rows = [asked(text, id=f"{name} {n}") for n, text in enumerate(questions)]
            project.write_input(name, rows)
        project.write_generation(max_failure_rate=1, concurrency=limits)
        endpoint.script = faulty
        assert project.materialize().failed == []
        return names

    def answers(self, project: Project) -> list[str]:
        return [row["response"].partition(":")[0] for row in project.responses()]

    def test_they_alone_are_asked_and_keep_the_new_answer(
        self, project: Project, answered: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = project.responses()
        answered.script = self.again
        dry = project.run("retry", project.task_file, "--ids", "r1,r3", "--dry-run")
        assert "2 of 4 rows" in dry.out and answered.questions() == []
        ended = project.run("retry", project.task_file, "--ids", "r1,r3")
        assert ended.code == 0, ended
        assert answered.questions() == ["question 1", "question 3"]
        assert self.answers(project) == ["re", "again", "re", "again"]
        after = project.responses()
        assert [after[0], after[2]] == [before[0], before[2]]
        # A home that knows of nothing makes the file again, of what was answered.
        monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "other"))
        (tmp_path / "other").mkdir()
        project.close()
        assert project.run("run-task", project.task_file).code == 0
        assert answered.questions() == [] and project.responses() == after

    def test_an_answer_stays_where_no_new_one_comes(
        self, project: Project, answered: Endpoint
    ) -> None:
        before = project.responses()
        answered.script = said("length", content="as far as it c")
        ended = project.run("retry", project.task_file, "--where", "id = r2")
        assert ended.code == 0, ended
        assert "1 rows keep their answer" in ended.out
        assert answered.questions() == ["question 2"] and project.responses() == before

    def test_a_condition_chooses_among_the_scores_of_a_judge(
        self, project: Project, answered: Endpoint
    ) -> None:
        project.write_generation(scores=JUDGE)
        assert project.materialize().failed == []
        answered.questions()
        answered.script = said(content='{"score": 5}')
        ended = project.run("retry", project.task_file, "--where", "score < 4 and id = r1")
        assert ended.code == 0, ended
        assert answered.questions() == judged(["re: question 1"])
        assert [row["score"] for row in project.scores(CONVERSATIONS)] == [3, 5, 3, 3]
        answered.script = self.again
        ended = project.run("retry", project.task_file, "--ids", "r2", "--stage", "responses")
        assert answered.questions()[0] == "question 2"
        assert self.answers(project) == ["re", "re", "again", "re"]

    def test_what_is_out_of_date_is_refused_before_a_request(
        self, project: Project, answered: Endpoint
    ) -> None:
        before = project.responses()
        project.write_model({"chat_config": {"temperature": 0.7}})
        ended = project.run("retry", project.task_file, "--ids", "r1")
        assert ended.code == 1
        assert "responses out of date or gone; run-task, or a run without options" in ended.err
        assert answered.questions() == [] and project.responses() == before
        (failed,) = project.materialize(ids=["r1"]).failed
        assert "its responses are out of date; run-task, or a run" in failed
        assert answered.questions() == [] and project.responses() == before

    def test_a_kill_in_the_middle_pays_for_the_rest_only(
        self, project: Project, answered: Endpoint
    ) -> None:
        ids = ("--ids", "r0,r1,r2")
        self.kill_at_the_third(project, answered, "retry", project.task_file, *ids)
        assert self.answers(project) == ["re"] * 4
        ended = project.run("retry", project.task_file, "--ids", "r0,r1,r2")
        assert ended.code == 0, ended
        assert answered.questions() == ["question 2"]
        assert self.answers(project) == ["again", "again", "again", "re"]

    @pytest.mark.parametrize("scope", ["file", "off"])
    @pytest.mark.parametrize("choice", [["--ids", "r0,r1,r2"], []])
    def test_the_next_run_goes_on_with_what_was_killed(
        self, project: Project, answered: Endpoint, scope: str, choice: list[str]
    ) -> None:
        project.write_generation(reuse={"scope": scope}, max_failure_rate=1)
        if not choice:  # the rows that failed, of which there are three
            answered.script = lambda request: (
                echo(request) if request.question == "question 3" else said(content="")
            )
            assert project.materialize(fresh=True).failed == []
        self.kill_at_the_third(project, answered, "retry", project.task_file, *choice)
        ended = project.run("run-task", project.task_file)
        assert ended.code == 0, ended
        assert answered.questions() == ["question 2"]
        assert self.answers(project) == ["again", "again", "again", "re"]
        assert project.run("run-task", project.task_file).code == 0
        assert answered.questions() == []

    @pytest.mark.parametrize("next_command", ["run-task", "retry"])
    def test_files_that_a_killed_retry_had_not_begun_are_gone_on_with(
        self, project: Project, answered: Endpoint, next_command: str
    ) -> None:
        """And those that it has finished are not asked a second time."""
        names = self.write_half_failed(project, answered, 4, max_concurrent_files=1)
        retry = ("retry", project.task_file, "--ids", ",".join(f"{name} 0" for name in names))
        self.kill_at_the_third(project, answered, *retry)
        planned = project.run("plan", project.task_file)
        assert "files that was interrupted has left" in planned.out
        ended = project.run(*(retry if next_command == "retry" else ("run-task", retry[1])))
        assert ended.code == 0 and "goes on with a retry that was interrupted" in ended.err
        assert sorted(answered.questions()) == [f"chosen of {name}" for name in names[2:]]
        assert project.run("run-task", project.task_file).code == 0
        assert answered.questions() == []

    def test_what_the_launchpad_chose_is_gone_on_with_in_files_that_were_not_begun(
        self, project: Project, answered: Endpoint
    ) -> None:
        names = self.write_half_failed(project, answered, 3, files_per_run=9)
        answered.questions()
        answered.script = refusal(401, "no such key")
        ids = {"ids": [f"{name} 0" for name in names]}
        refused = (
            project.definitions()
            .resolve_implicit_global_asset_job_def()
            .execute_in_process(
                instance=project.instance,
                asset_selection=[project.asset_key("responses")],
                tags=range_tags(names),
                run_config={**QUIET, "ops": {"chain__responses": {"config": ids}}},
                raise_on_error=False,
            )
        )
        assert not refused.success
        assert {*project.statuses("responses").values()} == {GREEN, RED}
        answered.questions()
        answered.script = self.again
        assert project.run("run-task", project.task_file).code == 0
        assert sorted(answered.questions()) == [f"chosen of {name}" for name in names]

    @pytest.mark.parametrize("again", [True, False])
    def test_a_kill_between_an_output_and_its_manifest_asks_nothing_again(
        self, project: Project, answered: Endpoint, again: bool
    ) -> None:
        answered.script = self.again
        retry = ("retry", str(project.task_file), "--ids", "r0,r1")
        killed = (
            "import os, sys; from modelcall_assets.stages import publication\n"
            "publication.write_manifest = lambda *_: os._exit(9)\n"
            "from modelcall_assets.cli.main import main; main()"
        )
        command = [sys.executable, "-c", killed, *retry]
        assert subprocess.run(command, cwd=project.root, check=False).returncode == 9
        assert answered.questions() == ["question 0", "question 1"]
        other = project.run("retry", project.task_file, "--ids", "r2")
        assert other.code == 1 and "not what responses published" in other.err
        assert project.run(*(retry if again else ("run-task", project.task_file))).code == 0
        assert answered.questions() == []
        assert self.answers(project) == ["again", "again", "re", "re"]

    @pytest.mark.parametrize(
        "note", [b"", b"[1]", b"{}", b'{"stages": [], "choice": 1, "files": 2}']
    )
    def test_a_damaged_note_of_a_retry_is_named(
        self, project: Project, answered: Endpoint, note: bytes
    ) -> None:
        path = project.steps().layout.retry_path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(note)
        for command in ("plan", "run-task", "retry"):
            ended = project.run(command, project.task_file)
            assert ended.code == 1 and "not what a retry notes; delete it" in ended.err
            assert "Traceback" not in ended.err
        assert answered.questions() == []
        path.write_bytes(b'{"stages": ["gone"], "choice": {"again": true}, "files": {}}')
        assert project.run("run-task", project.task_file).code == 0

    def test_ids_are_taken_as_they_are_given(self, project: Project, answered: Endpoint) -> None:
        for given in ("", ",", " "):
            none = project.run("retry", project.task_file, "--ids", given)
            assert none.code == 0 and "no row is chosen, nothing to do" in none.out
        some = project.run("retry", project.task_file, "--ids", "r1, r9,r8", "--dry-run")
        assert "1 of 4 rows" in some.out and "no such row is chosen: r8, r9 (2 ids)" in some.err
        assert answered.questions() == []

    def test_a_wrong_choice_is_told(self, project: Project, answered: Endpoint) -> None:
        none = project.run("retry", project.task_file, "--ids", "r9")
        assert none.code == 0 and "no row is chosen, nothing to do" in none.out
        raw = project.run("retry", project.task_file, "--stage", "raw")
        assert raw.code == 2 and "raw asks nothing" in raw.err
        wrong = project.run("retry", project.task_file, "--where", "idd = r1")
        assert wrong.code == 2 and "did you mean id?" in wrong.err
        for option in ({"where": "id is r1"}, {"reason": "bad luck"}):
            (failed,) = project.materialize(**option).failed
            assert f"options:{next(iter(option))}: " in failed
        assert answered.questions() == []


class TestSideBySide:
    """The files of a task, through its stages, in one run."""

    FILES = tuple(f"f{number}.jsonl" for number in range(6))

    def write(self, project: Project, *names: str, version: str = "") -> None:
        for name in names or self.FILES:
            project.write_input(name, [asked(f"{version}{n} of {name}") for n in range(2)])

    def test_a_judge_starts_on_the_first_answers(
        self, project: Project, answered_by: Answered
    ) -> None:
        """The last file has no answers before the judge was asked about another."""

        def after_a_judge(request: Request) -> bytes:
            is_late = self.FILES[-1] in request.question and "Judge" not in request.question
            is_first = not any("Judge" in each.question for each in endpoint.asked)
            if is_late and is_first:
                return refusal(503, "busy", Retry_After="1")
            return echo(request)

        self.write(project)
        limits = {"max_concurrent_files": 1}
        project.write_generation({"concurrency": 4}, scores=JUDGE, concurrency=limits)
        endpoint = answered_by(after_a_judge)
        assert project.materialize().failed == []
        for name in self.FILES:
            assert [row["score"] for row in project.scores(name)] == [3, 3]

    def test_a_kill_leaves_the_status_of_what_was_not_begun(
        self, project: Project, answered_by: Answered
    ) -> None:
        self.write(project)
        limits: dict[str, Any] = {"concurrency": {"max_concurrent_files": 1}}
        project.write_generation({"concurrency": 1}, retry={"max_retries": 50}, **limits)
        endpoint = answered_by(echo)
        assert project.materialize().failed == []
        endpoint.questions()
        changed = self.FILES[::2]
        self.write(project, *changed, version="new ")

        def until_the_third(_: Request) -> bytes:
            return b"" if len(endpoint.asked) > 2 else said(content="new")

        endpoint.script = until_the_third
        project.signalled(
            lambda: project.statuses("responses")[changed[1]] != GREEN and len(endpoint.asked) > 2,
            "run-task",
            project.task_file,
        )
        assert endpoint.questions()[2] == f"new 0 of {changed[1]}"
        runs = len(project.instance.get_runs())
        statuses = project.statuses("responses")
        assert {statuses[name] for name in self.FILES[1::2]} == {GREEN}
        assert statuses[changed[2]] == GREEN != statuses[changed[1]]
        endpoint.script = echo
        assert project.materialize().failed == []
        assert endpoint.questions() == [
            f"new {n} of {name}" for name in changed[1:] for n in range(2)
        ]
        assert set(project.statuses("responses").values()) == {GREEN}
        assert len(project.instance.get_runs()) == runs + 1

    def test_nothing_to_do_is_no_run(self, project: Project, answered_by: Answered) -> None:
        self.write(project)
        project.write_generation(scores=JUDGE)
        answered_by(echo)
        assert project.materialize().failed == []
        runs = len(project.instance.get_runs())
        assert set(project.materialize().ran.values()) == {0}
        assert "nothing to do" in project.run("run-task", project.task_file).out
        assert len(project.instance.get_runs()) == runs


class TestSamples:
    def test_are_rows_of_their_own_and_more_of_them_pay_the_new_ones(
        self, project: Project, answered_by: Answered
    ) -> None:
        given: Counter[str] = Counter()

        def another(request: Request) -> bytes:
            given[request.question] += 1
            return said(content=f"{request.question} answer {given[request.question]}")

        endpoint = answered_by(another)
        questions = ["a", "b"]
        project.write_input(CONVERSATIONS, [asked(text, id=text) for text in questions])
        for samples in (2, 3):
            project.write_generation({"samples": samples})
            assert project.materialize().failed == []
            rows = project.responses()
            assert [(row["id"], row["sample"]) for row in rows] == [
                (text, sample) for text in questions for sample in range(samples)
            ]
            assert [row["response"] for row in rows] == [
                f"{text} answer {sample + 1}" for text in questions for sample in range(samples)
            ]
            assert {row["api_record_id"] for row in rows} == {"a", "b"}
            assert given == dict.fromkeys(questions, samples)
        assert endpoint.questions() == [*"aabb", *"ab"]

        project.write_generation({"samples": 1})
        assert project.materialize().failed == []
        rows = project.responses()
        assert [row["response"] for row in rows] == ["a answer 1", "b answer 1"]
        assert "sample" not in rows[0]
        assert endpoint.questions() == [], "those there are will do"

    def test_stay_with_their_row_when_others_ask_the_same(
        self, project: Project, answered_by: Answered
    ) -> None:
        endpoint, texts = answered_by(numbered()), ["a", "b", "a", "a", "b"]
        project.write_input(CONVERSATIONS, [asked(text, id=n) for n, text in enumerate(texts)])
        first, most = dict[tuple[str, int], str](), 0
        for samples in (2, 3, 1, 4):
            project.write_generation({"samples": samples})
            assert project.materialize().failed == []
            got = answers(project)
            assert got.keys() == {(n, s) for n in range(len(texts)) for s in range(samples)}
            assert {each: got[each] for each in got if each in first} == {
                each: first[each] for each in first if each in got
            }
            assert all(got[row, sample].startswith(texts[row]) for row, sample in got)
            first.update(got)
            assert len(set(first.values())) == len(first), "each was paid for by itself"
            new = max(0, samples - most)
            assert Counter(endpoint.questions()) == Counter(texts * new)
            most = max(most, samples)

    @pytest.mark.parametrize("samples", [2, 3])
    def test_of_an_older_journal_are_not_paid_again(
        self, project: Project, answered_by: Answered, samples: int
    ) -> None:
        """There samples were counted as if they were rows; with others now, rows that ask the same
        can get each other's."""
        endpoint, texts = answered_by(numbered()), ["a", "b", "a"] if samples == 2 else ["a", "b"]
        project.write_input(CONVERSATIONS, [asked(text, id=n) for n, text in enumerate(texts)])
        project.write_generation({"samples": 2})
        assert project.materialize().failed == []
        first, stage = answers(project), project.steps().stage("responses")
        (segment,) = project.journal(CONVERSATIONS, "responses").glob("*.jsonl")
        segment.write_bytes(b"".join(map(counted, segment.read_bytes().splitlines())))
        for path in (stage.output, stage.manifest_path):
            Path(str(path(CONVERSATIONS))).unlink()
        endpoint.questions()

        project.write_generation({"samples": samples})
        assert project.materialize().failed == []
        got = answers(project)
        assert {each: got[each] for each in first} == first
        assert Counter(endpoint.questions()) == Counter(texts * (samples - 2))

    def test_are_not_copies_of_one_answer(self, project: Project) -> None:
        project.write_input(CONVERSATIONS, [asked("a")])
        project.write_generation({"samples": 3}, reuse={"identical_once": True})
        with pytest.raises(SetupError, match="identical_once: with 3 samples"):
            project.steps()

    def test_are_counted_by_whoever_watches(self, project: Project) -> None:
        shown: list[tuple[int, int]] = []
        watcher = Watcher(lambda tally: shown.append((tally.done, tally.rows)))
        project.write_input(CONVERSATIONS, [asked("a"), asked("b")])
        project.write_generation({"samples": 3})
        steps = project.steps()
        TaskRunner(steps, project.instance, watcher).run(register(project.instance, steps).keys)
        assert shown[-1] == (6, 6)

    def test_of_a_failed_one_only_it_is_asked_again(
        self, project: Project, answered_by: Answered
    ) -> None:
        number = iter(range(100))
        endpoint = answered_by(
            lambda asked: said("length", content="cut") if next(number) == 1 else echo(asked)
        )
        project.write_input(CONVERSATIONS, [asked("a"), asked("b")])
        project.write_generation({"samples": 3})
        (message,) = project.materialize().failed
        assert "1 of 6 rows failed" in message
        rejected = [row["api_status"] for row in project.responses()]
        assert rejected == ["success", "error", *["success"] * 4]
        assert endpoint.questions() == [*"aaabbb"]
        assert project.materialize().failed == []
        assert endpoint.questions() == ["a"]
        assert [row["sample"] for row in project.responses()] == [0, 1, 2] * 2


class TestRecords:
    def test_with_one_id_or_one_system_prompt_are_all_answered(
        self, project: Project, answered_by: Answered
    ) -> None:
        system = turn("system", "The same for all.")

        def row(text: str, **more: Any) -> Row:
            return {"messages": [system, turn("user", text), turn("assistant", "old")], **more}

        given = [row("a"), row("b"), row("c", id="x"), row("d", id="x"), row("e", uid="x")]
        given += [row("same"), row("same"), row("same", id="y")]
        project.write_input(CONVERSATIONS, given)
        project.write_generation()
        endpoint = answered_by(echo)
        assert project.materialize().failed == []
        texts = [*"abcde", *["same"] * 3]
        assert endpoint.questions() == texts
        rows = project.responses()
        assert [row["response"] for row in rows] == [f"re: {text}" for text in texts]
        ids = [row["api_record_id"] for row in rows]
        assert ids[2:5] == ["x"] * 3 and ids[7] == "y"
        assert len(set(ids)) == 6
        (check,) = evaluations(project, "responses")
        assert not looked_at_by(check)["unique ids"]

    def test_half_of_them_done_the_other_half_is_asked(
        self, project: Project, answered_by: Answered
    ) -> None:
        """The old system took rows with one system prompt for one row, and left the rest out."""
        system = turn("system", "The same for all.")
        rows = [{"messages": [system, turn("user", f"q{number}")]} for number in range(4)]
        project.write_generation()
        endpoint = answered_by(echo)
        for upto in (1, 4):
            project.write_input(CONVERSATIONS, rows[:upto])
            assert project.materialize().failed == []
        assert endpoint.questions() == [f"q{number}" for number in range(4)]
        assert [row["messages"] for row in project.responses()] == [row["messages"] for row in rows]

    def test_are_in_the_order_of_the_input_and_a_slow_one_holds_up_no_other(
        self, project: Project, answered_by: Answered
    ) -> None:
        questions = ["slow", *(f"q{number}" for number in range(30))]
        project.write_input(CONVERSATIONS, [asked(text) for text in questions])
        project.write_model({"client_config": {"timeout": 10, "max_retries": 0}})
        project.write_generation({"concurrency": 2})
        all_asked = asyncio.Event()

        async def reply(request: Request) -> bytes:
            if len(endpoint.asked) == len(questions):
                all_asked.set()
            if request.question == "slow":
                await all_asked.wait()
            return echo(request)

        endpoint = answered_by(reply)
        rows = answer_all(project)
        assert [row["response"] for row in rows] == [f"re: {text}" for text in questions]
        assert sorted(endpoint.questions()) == sorted(questions)

    def test_are_not_all_in_memory(self, project: Project) -> None:
        """About 32 MiB of a file are."""
        row = orjson.dumps(asked("a long conversation " * 10_000, n=10_000)) + b"\n"
        path = project.write_input(CONVERSATIONS, [])
        with path.open("wb") as file:
            file.writelines(row.replace(b"10000", b"%d" % number) for number in range(400))
        project.write_generation({"concurrency": 2})
        steps = project.steps()

        async def answer() -> Report:
            async with steps.stage("responses").engine() as engine:
                return await steps.stage("responses").answer(
                    CONVERSATIONS, engine, Run("run", Tally())
                )

        steps.stage("raw").make(CONVERSATIONS, Tally())
        tracemalloc.start()
        report = asyncio.run(answer())
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert (report.rows, report.ok) == (400, 400)
        assert peak < 0.75 * path.stat().st_size


class TestKeys:
    def test_are_sent_and_nowhere_else(
        self, project: Project, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        project.write_input(CONVERSATIONS, [asked("a"), asked("b")])
        project.write_model({"client_config": {"api_key": "${REHEARSAL_KEY}"}})
        project.write_generation()
        with serve_in_thread(api_key="sk-right-secret") as guarded:
            monkeypatch.setenv("REHEARSAL_BASE_URL", guarded.base_url)
            for key, code, requests in (("wrong", 1, 1), ("right", 0, 3)):
                monkeypatch.setenv("REHEARSAL_KEY", f"sk-{key}-secret")
                ended = project.run("run-task", project.task_file)
                assert ended.code == code, ended
                assert ("refuses every request" in ended.err) == (key == "wrong")
                assert "-secret" not in ended.told
                assert guarded.stats()["requests"] == requests
        files = [path for path in project.root.rglob("*") if path.is_file()]
        assert [path for path in files if b"-secret" in path.read_bytes()] == []
        assert len(project.responses()) == 2


class TestJobs:
    def test_share_a_folder_and_leave_each_others_files_alone(
        self, project: Project, server: RehearsalServer
    ) -> None:
        names = [f"{number}.jsonl" for number in range(3)]
        for name in names:
            project.write_input(name, [asked(f"{name} {number}") for number in range(2)])
        project.write_generation()
        seen: list[dict[str, bytes]] = []
        for job in ("0", "1"):
            options = ("--job-index", job, "--world-size", "2")
            ended = project.run("run-task", project.task_file, *options)
            assert ended.code == 0, ended
            folder = project.root / "data/responses"
            found = (path for path in folder.rglob("*.json*") if path.is_file())
            files = [path for path in found if "summary" not in path.parts]
            seen.append({path.relative_to(folder).as_posix(): path.read_bytes() for path in files})
        first, both = seen
        assert sorted({*names} & {*first}) == names[:2]
        assert {name: both[name] for name in first} == first
        assert [len(project.responses(name)) for name in names] == [2] * 3
        assert server.stats()["requests"] == 6


class TestJournal:
    def test_whose_last_line_is_torn_costs_that_answer_only(
        self, project: Project, answered_by: Answered
    ) -> None:
        project.write_input(CONVERSATIONS, [asked(text) for text in "abc"])
        project.write_generation()
        endpoint = answered_by(echo)
        answer_all(project)
        endpoint.questions()
        (segment,) = project.journal(CONVERSATIONS, "responses").glob("*.jsonl")
        *lines, last, sealed = segment.read_bytes().splitlines(keepends=True)
        assert b"sealed" in sealed and b"re: c" in last
        segment.write_bytes(b"".join(lines) + last[: len(last) // 2])
        (project.root / "data/responses" / CONVERSATIONS).unlink()
        for expected in (["c"], []):
            rows = answer_all(project)
            assert [row["response"] for row in rows] == ["re: a", "re: b", "re: c"]
            assert endpoint.questions() == expected

    def test_that_takes_nothing_ends_the_run_and_costs_what_was_in_flight(
        self, project: Project, server: RehearsalServer
    ) -> None:
        project.write_input(CONVERSATIONS, [asked(f"q{number}") for number in range(20)])
        project.write_generation({"concurrency": 2})
        in_the_way = project.journal(CONVERSATIONS, "responses")
        in_the_way.parent.mkdir(parents=True)
        in_the_way.write_text("no folder")
        assert len(project.materialize().failed) == 1
        assert server.stats()["requests"] <= 2
        assert not (project.root / "data/responses" / CONVERSATIONS).exists()
        in_the_way.unlink()
        server.reset()
        assert {row["api_status"] for row in answer_all(project)} == {"success"}
        assert server.stats()["requests"] == 20


MISTAKES: dict[str, tuple[str, Row, str, int]] = {
    # what the task lacks: its step, that step's fields, what is told, exit code
    "a member of a group": ("jsonl_merge", {}, "fr.jsonl is not there", 1),
    "the group": ("jsonl_merge", {"merge_groups": ["gone"]}, "merge_groups[0]: ", 2),
    "the groups file": ("jsonl_merge", {"merge_config_path": "g.yaml"}, "no such file", 2),
    "the folder": ("jsonl_merge", {"base_input_dir": "data/gone"}, "data/gone: not found", 1),
    "the step": ("jsonl_mrge", {}, "unknown step jsonl_mrge; expected", 2),
    "the data set": ("chatml_conversion", {}, "data/sets/org/Chats: not found", 1),
    "the model": ("generate_response", {"response_config_path": "m.yaml"}, "no such file", 2),
    "the file": ("generate_response", {"input_path": "data/gone.jsonl"}, "gone.jsonl: not", 1),
    "its own output": ("generate_response", {"input_path": "data/twice"}, "both be written", 2),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_what_a_step_lacks_is_named_and_ends_with_an_exit_code(
    project: Project, server: RehearsalServer, mistake: tuple[str, Row, str, int]
) -> None:
    step, fields, told, code = mistake
    project.write_chain()
    group = {"name": "qa", "output_file": "qa.jsonl", "input_files": ["en.jsonl", "fr.jsonl"]}
    project.write_yaml("distillation/groups", {"merge_groups": [group]})
    project.write_input("en.jsonl", [asked("a")])
    project.inputs = "data/twice"
    for name in ("a.jsonl", "a.parquet"):
        project.write_input(name, [asked("a")])
    merge = {**MERGE, "base_input_dir": "data/in"}
    generate = {**GENERATE, "input_path": "data/in"}
    steps = {"chatml_conversion": CHATML, "generate_response": generate}
    project.write_steps(distillation={"step": step, **steps.get(step, merge), **fields})
    before = sorted((project.root / "data").rglob("*.*"))
    ended = project.run("run-task", project.task_file)
    assert ended.code == code, ended
    assert told in ended.err
    left = [path for path in (project.root / "data").rglob("*.jsonl") if path.name != "all.jsonl"]
    assert sorted(left) == [path for path in before if path.suffix == ".jsonl"]
    assert server.stats()["requests"] == 0


IN_FLIGHT = 8


class TestKill:
    def test_in_the_middle_of_responses_repeats_no_answered_call_beyond_those_in_flight(
        self, project: Project, server: RehearsalServer
    ) -> None:
        rows = [asked(f"question {number}", id=f"r{number}") for number in range(80)]
        project.write_input(CONVERSATIONS, rows)
        project.write_generation({"concurrency": IN_FLIGHT})
        server.set_faults(Faults(latency_ms=5, rate_hang=0.15))  # so that it cannot come to its end
        project.signalled(lambda: server.stats()["answered"] >= 16, "run-task", project.task_file)
        assert not (project.root / "data/responses" / CONVERSATIONS).exists()
        assert project.manifest(CONVERSATIONS, "responses") is None
        answered = server.stats()["answered"]
        server.set_faults(Faults())
        assert project.materialize().failed == []
        stats = server.stats()
        assert stats["repeated_ok"] <= IN_FLIGHT
        assert stats["distinct"] == 80 and answered < 80
        assert stats["requests"] <= 80 + IN_FLIGHT
        found = project.responses()
        assert [row["id"] for row in found] == [row["id"] for row in rows]
        assert {row["api_status"] for row in found} == {"success"}

    def test_in_the_middle_of_a_retry_leaves_what_was_published_and_pays_for_the_rest_only(
        self, project: Project, server: RehearsalServer
    ) -> None:
        rows = [asked(f"question {number}", id=f"r{number}") for number in range(40)]
        project.write_input(CONVERSATIONS, rows)
        project.write_generation({"concurrency": IN_FLIGHT})
        server.set_faults(Faults(rate_truncated=1))
        assert project.materialize().failed
        published = project.result(CONVERSATIONS, "responses").read_bytes()
        server.reset()
        server.set_faults(Faults(latency_ms=5, rate_hang=0.15))
        project.signalled(lambda: server.stats()["answered"] >= 10, "retry", project.task_file)
        assert project.result(CONVERSATIONS, "responses").read_bytes() == published
        server.set_faults(Faults())
        ended = project.run("retry", project.task_file)
        assert ended.code == 0, ended
        stats = server.stats()
        assert stats["distinct"] == 40
        assert stats["repeated_ok"] <= IN_FLIGHT
        assert stats["requests"] <= 40 + IN_FLIGHT
        found = project.responses()
        assert [row["id"] for row in found] == [row["id"] for row in rows]
        assert {row["api_status"] for row in found} == {"success"}


OLD_BLOCKS = {
    "description": "As the old system had it.",
    "distributed": {"enabled": False, "world_size": 1},
    "debug": {"enabled": False, "max_files": -1, "max_items_per_file": -1},
    "logging": {"level": "INFO", "batch_size": 100},
}
OLD_FILES = {
    "data_distillation": {
        "step": "generate_response",
        "response_config_path": "configs/models/rehearsal.yaml",
        "input_path": "./data/in",
        "output_path": "./data/responses",
        "concurrency": 20,
        "batch_size": 20,
        "flush_interval_secs": 2.0,
        "retry_mode": False,
        "resume_mode": True,
    },
    "generate_response": {
        "model_config": "configs/models/rehearsal.yaml",
        "input_path": f"./data/in/{CONVERSATIONS}",
        "output_path": "./data/responses",
        "concurrency": 30,
        "batch_size": 30,
        "flush_interval": 2.0,
        "retry_mode": False,
        "resume": True,
    },
}


class TestOldFiles:
    def test_of_both_key_sets_give_the_same_rows(self, project: Project) -> None:
        rows = [asked(f"question {number}", uid=f"u{number}", note=number) for number in range(5)]
        project.write_input(CONVERSATIONS, rows)
        found: list[list[Row]] = []
        project.write_generation()
        found.append(answer_all(project))
        for kind, distillation in OLD_FILES.items():
            project.task_file.unlink()
            project.task = f"old_{kind}"
            project.write_steps(kind, distillation=distillation, **OLD_BLOCKS)
            (project.root / "data/responses" / CONVERSATIONS).unlink()
            assert project.materialize() == RunSummary(ran={"raw": 1, "responses": 1})
            found.append(project.responses())
        assert stable(found[0]) == stable(found[1]) == stable(found[2])
        assert [row["uid"] for row in found[0]] == [row["uid"] for row in rows]
        assert {row["api_status"] for row in found[0]} == {"success"}

    def test_an_old_error_file_is_input_and_leaves_no_trace_of_its_failures(
        self, project: Project, answered_by: Answered
    ) -> None:
        name = "talk_error_retry_1.jsonl"
        failure = {
            "error": "{'type': 'APIError', 'message': 'RetryError[<Future …>]'}",
            "error_type": "Exception",
            "traceback": "Traceback (most recent call last): …",
            "timestamp": "2025-01-02T03:04:05",
        }
        rows = [asked(f"q{n}", uid=f"u{n}", task_index=n, lang="en", **failure) for n in range(3)]
        mine = asked("mine", error="a column of mine", task_index=7, timestamp="2025")
        project.write_input(name, [*rows, mine])
        project.write_steps(
            "generate_response",
            distillation={
                **OLD_FILES["generate_response"],
                "input_path": f"data/in/{name}",
                "retry_mode": True,
            },
        )
        endpoint = answered_by(echo)
        assert project.materialize().failed == []
        assert sorted(endpoint.questions()) == ["mine", "q0", "q1", "q2"]
        found = project.responses(name)
        assert [row["response"] for row in found] == ["re: q0", "re: q1", "re: q2", "re: mine"]
        assert [row["uid"] for row in found[:3]] == ["u0", "u1", "u2"]
        for row in found[:3]:
            assert row["lang"] == "en"
            assert not {*failure, "task_index"} & set(row)
        assert {name: found[3].get(name) for name in ("error", "task_index", "timestamp")} == {
            "error": "a column of mine",
            "task_index": 7,
            "timestamp": "2025",
        }


COLUMNS = [
    "response",
    "final_messages",
    "reasoning",
    "finish_reason",
    "usage",
    "api_record_id",
    "api_status",
    "api_fail_reason",
    "api_fail_detail",
    "api_request_key",
    "api_model",
    "api_prompt",
    "api_turns",
    "api_prompt_tokens",
    "api_completion_tokens",
    "api_cost_usd",
    "api_attempts",
    "api_endpoint",
    "api_latency_ms",
    "api_request_id",
    "api_answered_at",
]


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_tool_calls_are_kept_and_a_refusal_is_told(
    project: Project, answered_by: Answered, streamed: bool
) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    replies: dict[str, bytes] = {
        "plain": said(content="yes", streamed=streamed),
        "no": said(content=None, refusal="I won't", streamed=streamed),
        "odd": said("whatever", content="half", streamed=streamed),
    }
    replies["call"] = said("tool_calls", content=None, tool_calls=[call])
    answered_by(lambda request: replies[request.question])
    project.write_input(CONVERSATIONS, [asked(question) for question in replies])
    project.write_generation(max_failure_rate=1)
    plain, no, odd, called = answer_all(project)
    assert "tool_calls" not in plain
    assert (no["api_fail_reason"], no["response"]) == ("refused", "I won't")
    assert "I won't" in no["api_fail_detail"]
    assert (odd["api_fail_reason"], odd["response"], odd["final_messages"]) == (
        "interrupted",
        "half",
        None,
    )
    assert called["api_status"] == "success"
    assert orjson.loads(called["tool_calls"]) == [call]
    assert called["final_messages"][-1] == {**turn("assistant", ""), "tool_calls": [call]}


def likely(token: str, **others: float) -> Script:
    """Begins with the token, which is one of the likely ones."""
    tops = [{"token": each, "logprob": logprob} for each, logprob in others.items()]
    told = completion(content=f"{token} it is")
    told["choices"][0]["logprobs"] = {"content": [{"token": token, "top_logprobs": tops}]}
    return lambda _: http(200, orjson.dumps(told))


class TestLogprobs:
    @pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
    def test_of_the_first_token_are_a_column_live_and_in_replay(
        self, project: Project, server: RehearsalServer, streamed: bool
    ) -> None:
        questions = [asked(f"What is {n}?") for n in range(3)]
        project.write_input(CONVERSATIONS, questions)
        project.write_model({"chat_config": {"stream": streamed}})
        project.write_generation({"logprobs": 4})
        found = [row["logprobs"] for row in answer_all(project)]
        assert [len(each) for each in found] == [4, 4, 4]
        assert [max(each, key=each.get) for each in found] == ["This"] * 3
        assert all(sum(map(math.exp, each.values())) < 1 for each in found)
        paid = server.stats()["requests"]
        project.write_generation({"logprobs": 4, "merge_reasoning": False})
        assert project.materialize().ran["responses"] == 1
        assert [row["logprobs"] for row in project.responses()] == found
        assert server.stats()["requests"] == paid

    def test_are_asked_for_only_where_they_are_wanted(
        self, project: Project, answered_by: Answered
    ) -> None:
        endpoint = answered_by(likely("B", B=-0.25, A=-1.5))
        project.write_input(CONVERSATIONS, [asked("a", logprobs="mine")])
        for wanted in (None, 2, 20, 2):
            project.write_generation({"logprobs": wanted})
            (row,) = answer_all(project)
            assert row.get("logprobs") == (wanted and {"B": -0.25, "A": -1.5})
            assert row["input_logprobs"] == "mine"
        sent = [(body.get("logprobs"), body.get("top_logprobs")) for body in endpoint.jsons]
        assert sent == [(None, None), (True, 2), (True, 20)], "another number is another question"

    def test_that_the_endpoint_does_not_give_are_null(
        self, project: Project, answered_by: Answered
    ) -> None:
        answered_by(lambda request: said(content="x") if request.question == "a" else http(500))
        project.write_input(CONVERSATIONS, [asked("a"), asked("b")])
        project.write_model({"client_config": {"max_retries": 0}})
        project.write_generation({"logprobs": 1}, max_failure_rate=1)
        assert [row["logprobs"] for row in answer_all(project)] == [None, None]

    def test_are_part_of_the_content(self, project: Project, answered_by: Answered) -> None:
        """The answer is the same, but a grader may look at them."""
        project.write_input(CONVERSATIONS, [asked("a")])
        project.write_generation({"logprobs": 2})
        versions = list[str]()
        for others in ({"B": -0.25}, {"B": -0.25, "A": -3.0}, {"B": -0.25}):
            answered_by(likely("B", **others))
            project.materialize(fresh=True)
            versions.append(project.manifest(CONVERSATIONS, "responses").data_version)
        assert versions[0] == versions[2] != versions[1]

    @pytest.mark.parametrize("wrong", [0, 21, "5", True])
    def test_are_of_1_to_20_tokens(self, project: Project, wrong: Any) -> None:
        project.write_generation({"logprobs": wrong})
        with pytest.raises(SetupError, match=r"chain\.yaml:generate_response\.logprobs: "):
            project.steps()


class TestColumns:
    def test_are_the_inputs_and_then_ours(self, project: Project, answered_by: Answered) -> None:
        given = [asked("a", id="r1", lang="en"), {"lang": "fr", "messages": 3}]
        project.write_input(CONVERSATIONS, given)
        project.write_model(
            {"prices": {"usd_per_million_input_tokens": 10, "usd_per_million_output_tokens": 100}}
        )
        project.write_generation(max_failure_rate=0.5)
        endpoint = answered_by(lambda _: said(content="yes", reasoning="why"))
        good, bad = answer_all(project)
        assert list(good) == ["messages", "id", "lang", *COLUMNS]
        assert list(bad) == ["lang", "messages", *COLUMNS]
        known = {
            "response": f"{THOUGHT}yes",
            "final_messages": [turn("user", "a"), turn("assistant", f"{THOUGHT}yes")],
            "reasoning": "why",
            "finish_reason": "stop",
            "usage": {"prompt_tokens": 3, "completion_tokens": 2},
            "api_record_id": "r1",
            "api_status": "success",
            "api_fail_reason": None,
            "api_fail_detail": None,
            "api_model": "rehearsal-rater-1",
            "api_prompt": None,
            "api_turns": 1,
            "api_prompt_tokens": 3,
            "api_completion_tokens": 2,
            "api_cost_usd": pytest.approx(3e-5 + 2e-4),
            "api_attempts": 1,
            "api_endpoint": endpoint.url.removeprefix("http://"),
            "api_request_id": "x",
        }
        assert {name: good[name] for name in known} == known
        assert len(good["api_request_key"]) == 32 and good["api_answered_at"]
        told = {name for name in COLUMNS if bad[name] is not None}
        assert told - {"api_cost_usd", "api_turns", "api_attempts"} == {
            "api_record_id",
            "api_status",
            "api_fail_reason",
            "api_fail_detail",
            "api_model",
        }

    def test_of_the_input_that_are_named_like_ours_are_kept_under_another_name(
        self, project: Project, answered_by: Answered
    ) -> None:
        theirs = {
            "response": "their answer",
            "reasoning": ["their", "reasons"],
            "usage": 5,
            "sample": {"their": "sample"},
            "api_status": "theirs",
            "input_response": "an older answer",
        }
        project.write_input(CONVERSATIONS, [asked("a", **theirs), asked("b")])
        project.write_generation()
        answered_by(echo)
        assert project.materialize().failed == []
        first, second = project.responses()
        assert (first["response"], second["response"]) == ("re: a", "re: b")
        assert (first["api_status"], first["reasoning"]) == ("success", None)
        assert first["input_reasoning"] == ["their", "reasons"]
        assert (first["input_usage"], first["input_api_status"]) == (5, "theirs")
        assert first["input_sample"] == {"their": "sample"}
        assert first["input_response"] == "an older answer"
        assert first["input_input_response"] == "their answer"
        assert not any(name.startswith("input_") for name in second)

    def test_of_the_input_steer_nothing_and_keep_name_and_digits(
        self, project: Project, answered_by: Answered
    ) -> None:
        error = {"reason": "timeout", "detail": "the user's own"}
        first = asked("a", error=error, api_record_id="theirs", usage=7, id="1")
        long = b'"n":12345678901234567890123,"raw_data":{"f":[0.1000000000000000055,1e400]}'
        later = orjson.dumps(asked("b", input_usage=8, id="2"))[:-1] + b"," + long + b"}"
        project.write_input(CONVERSATIONS, [first, later])
        project.write_generation()
        answered_by(echo)
        assert project.materialize().failed == []
        line, second = (project.root / "data/responses" / CONVERSATIONS).read_bytes().splitlines()
        row = orjson.loads(line)
        assert (row["response"], row["error"], row["api_record_id"]) == ("re: a", error, "1")
        assert (row["input_input_usage"], row["input_api_record_id"]) == (7, "theirs")
        assert long in second and b'"input_usage":8' in second
        moved = {"usage": "input_input_usage", "api_record_id": "input_api_record_id"}
        assert project.manifest(CONVERSATIONS, "responses").moved == moved

    def test_survive_being_the_input_of_the_next_task(
        self, project: Project, answered_by: Answered
    ) -> None:
        project.write_input(CONVERSATIONS, [asked("a", response="first")])
        project.write_generation()
        answered_by(echo)
        project.materialize()
        project.task = "second"
        project.write_generation({"input_path": "data/responses", "output_path": "data/second"})
        assert project.materialize().failed == []
        (row,) = project.responses()
        assert row["response"] == "re: a"
        assert {"first", "re: a"} <= {v for v in row.values() if isinstance(v, str)}

    def test_of_a_parquet_file_are_as_those_of_lines(
        self, project: Project, answered_by: Answered
    ) -> None:
        given = [
            asked("a", id="r1", day=date(2025, 1, 2), blob=b"some bytes"),
            {"messages": [turn("user", "b"), turn("assistant", "old")], "id": "r2"},
        ]
        project.write_input("talk.parquet", given)
        project.write_input("unsendable.parquet", [{"messages": [turn("user", b"\xff")]}])
        project.write_generation(max_failure_rate=1)
        endpoint = answered_by(echo)
        assert project.materialize().failed == []
        assert [body["messages"] for body in endpoint.jsons] == [
            [turn("user", "a")],
            [turn("user", "b")],
        ]
        first, second = project.responses()
        assert (first["response"], second["response"]) == ("re: a", "re: b")
        assert (first["id"], first["day"]) == ("r1", "2025-01-02")
        assert first["blob"] == "some bytes"
        (unsendable,) = project.responses("unsendable.jsonl")
        assert unsendable["api_fail_reason"] == "missing_input"
        assert "cannot be written as JSON" in unsendable["api_fail_detail"]


class TestJudge:
    def test_rates_responses_and_carries_the_reasons_of_failed_ones(
        self, project: Project, answered_by: Answered
    ) -> None:
        questions = ["good one", "long one", "refused one", "good too", "filtered one"]
        rows = [{**asked(question, id=question), "text": "not this"} for question in questions]
        project.write_input(CONVERSATIONS, [*rows, {"id": "none"}])
        project.write_model({"chat_config": {"model": "judge-1"}}, file="judge")
        project.write_generation(
            scores={**JUDGE, "model": {"config_path": "configs/models/judge.yaml"}},
            max_failure_rate=0.7,
            concurrency={"max_concurrent_requests": 1},
        )
        endpoint = answered_by(faulty)
        assert project.materialize().failed == []
        asked_judge = [body for body in endpoint.jsons if body["model"] == "judge-1"]
        assert len(endpoint.asked) == 5 + 2
        assert [body["messages"][-1]["content"] for body in asked_judge] == judged(
            ["re: good one", "re: good too"]
        )
        rows = project.scores(CONVERSATIONS)
        assert [row["id"] for row in rows] == [*questions, "none"]
        assert [row["score"] for row in rows] == [3, None, None, 3, None, None]
        reasons = [None, "truncated", "bad_request", None, "content_filter", "missing_input"]
        assert [row["api_fail_reason"] for row in rows] == reasons
        assert [row["api_fail_reason"] for row in project.responses()] == reasons
        details = [row["api_fail_detail"] for row in project.responses()]
        assert [row["api_fail_detail"] for row in rows] == details
        assert [row["response"] for row in rows] == [row["response"] for row in project.responses()]
        assert {row["api_model"] for row in rows} == {"judge-1"}

    def test_expects_a_score_by_the_probabilities_of_its_digits(
        self, project: Project, server: RehearsalServer
    ) -> None:
        rows = [asked(f"{text} " * 9, id=text) for text in ("red", "green", "blue")]
        project.write_input(CONVERSATIONS, rows)
        project.write_generation(scores={**JUDGE, "expected": True})
        assert project.materialize().failed == []
        rated = project.scores(CONVERSATIONS)
        assert all(1 < row["expected_score"] < 5 for row in rated)
        assert len({row["expected_score"] for row in rated}) == 3
        assert {row["score"] for row in rated} <= {*range(1, 6)}
        assert "expected_score" not in orjson.loads(rated[0]["api_return"])
        paid = server.stats()["requests"]
        assert paid == 2 * len(rows)
        project.write_generation(scores=JUDGE)
        assert project.materialize().failed == []
        assert "expected_score" not in project.scores(CONVERSATIONS)[0]
        assert server.stats()["requests"] == paid + len(rows), "that was another question"

    def test_expects_no_score_of_an_endpoint_without_log_probabilities(
        self, project: Project, answered_by: Answered
    ) -> None:
        endpoint = answered_by(echo)
        project.write_input(CONVERSATIONS, [asked("a")])
        project.write_generation(scores={**JUDGE, "expected": True})
        (message,) = project.materialize().failed
        assert "expected_score: the endpoint gave no log-probabilities" in message
        assert [body.get("top_logprobs") for body in endpoint.jsons] == [None, 20]

    @pytest.mark.parametrize(
        "score", [{}, {"type": "number", "maximum": 5}, {"type": "integer", "minimum": 1}]
    )
    def test_expects_a_score_of_one_digit(self, project: Project, score: Row) -> None:
        wide = {"type": "integer", "minimum": 1, "maximum": 10}
        for declared in (score, wide):
            path = project.write_prompt()
            prompt = yaml.safe_load(path.read_text())
            prompt["output_config"]["json_schema"]["properties"]["score"] = declared
            path.write_text(yaml.safe_dump(prompt))
            project.write_generation(scores={**JUDGE, "expected": True})
            with pytest.raises(
                SetupError, match=r"scores\.expected: the prompt's score is not one"
            ):
                project.steps()

    def test_may_be_added_to_answers_that_are_there(
        self, project: Project, server: RehearsalServer
    ) -> None:
        project.write_input(CONVERSATIONS, [asked("a", id="a"), asked("b", id="b")])
        project.write_generation()
        project.materialize()
        project.write_generation(scores=JUDGE, journal_folder="data/responses/.modelcall")
        summary = project.materialize()
        assert summary == RunSummary(ran={"raw": 0, "responses": 0, "scores": 1})
        rows = project.scores(CONVERSATIONS)
        assert [row["id"] for row in rows] == ["a", "b"]
        assert [row["response"] for row in rows] == [row["response"] for row in project.responses()]
        assert server.stats()["requests"] == 2 + 2

    def test_added_without_more_pays_no_answer_again(
        self, project: Project, server: RehearsalServer
    ) -> None:
        project.write_input(CONVERSATIONS, [asked("a", id="a"), asked("b", id="b")])
        project.write_generation()
        project.materialize()
        project.write_generation(scores=JUDGE)
        assert project.materialize().failed == []
        assert server.stats()["requests"] == 2 + 2

    def test_rates_every_sample(self, project: Project, server: RehearsalServer) -> None:
        project.write_input(CONVERSATIONS, [asked("a", id="a"), asked("b", id="b")])
        project.write_generation({"samples": 3}, scores=JUDGE)
        assert project.materialize().failed == []
        rows = project.scores(CONVERSATIONS)
        assert [(row["id"], row["sample"]) for row in rows] == [
            (text, sample) for text in "ab" for sample in range(3)
        ]
        assert all(1 <= row["score"] <= 5 for row in rows)
        assert server.stats()["requests"] == 12

    def test_waits_for_responses_that_were_accepted(
        self, project: Project, answered_by: Answered
    ) -> None:
        project.write_input(CONVERSATIONS, [asked("long one"), asked("good")])
        project.write_generation(scores=JUDGE)
        endpoint = answered_by(faulty)
        summary = project.materialize()
        assert (summary.ran["responses"], summary.ran["scores"]) == (1, 0)
        assert endpoint.questions() == ["long one", "good"]
        endpoint.script = echo
        assert project.materialize().failed == []
        assert endpoint.questions()[0] == "long one"
        assert [row["score"] for row in project.scores(CONVERSATIONS)] == [3, 3]


def test_tasks_that_read_each_other_load_unlinked_and_others_keep_their_links(
    project: Project,
) -> None:
    def generation(task: str, reads: str) -> dict[str, Any]:
        step = {
            "response_config_path": "configs/models/rehearsal.yaml",
            "input_path": f"data/{reads}",
            "output_path": f"data/{task}",
        }
        return {"task_name": task, "task_type": "data_distillation", "generate_response": step}

    folder = project.root / "configs/tasks"
    for task, reads in (("one", "two"), ("two", "one"), ("third", "one")):
        (folder / f"{task}.yaml").write_text(yaml.safe_dump(generation(task, reads)))
    catalog = load_catalog(project.root)
    links = {spec.key: spec.link and spec.link.spec.key for spec in catalog.tasks}
    assert {task: links[task] for task in ("one", "two", "third")} == {
        "one": None,
        "two": None,
        "third": "one",
    }
    dg.Definitions.validate_loadable(project.definitions())


@pytest.mark.parametrize("reads", [{"input_path": "data/one/a.jsonl"}, {}, {"max_files": 1}])
def test_a_task_takes_back_no_partition_of_the_one_that_it_reads(
    project: Project, reads: dict[str, Any]
) -> None:
    names = ["a.jsonl", "b.jsonl", "c.jsonl"]
    for name in names:
        project.write_input(name, [asked(name)])
    one = {**GENERATE, "input_path": "data/in", "output_path": "data/one"}
    two = {**GENERATE, "input_path": reads.get("input_path", "data/one"), "output_path": "data/two"}
    cap = {"debug": {"enabled": True, "max_files": 1}} if "max_files" in reads else {}
    kind = {"task_type": "data_distillation"}
    project.write_yaml("tasks/chain", {"task_name": "chain", **kind, "generate_response": one})
    project.write_yaml("tasks/two", {"task_name": "two", **kind, "generate_response": two, **cap})
    project.materialize()
    (project.input_folder / "b.jsonl").unlink()
    reading = Project(project.root, task="two").steps()
    assert reading.linked is not None
    for _ in range(2):
        assert register(project.instance, reading).gone == 0
    known = project.instance.get_dynamic_partitions(reading.stages[0].keys.name)
    assert sorted(known) == names


def test_a_merge_whose_folder_is_empty_fails_and_names_what_it_lacks(project: Project) -> None:
    group = {"name": "qa", "output_file": "qa.jsonl", "input_files": ["fr.jsonl"]}
    project.write_yaml("distillation/groups", {"merge_groups": [group]})
    (project.input_folder).mkdir(parents=True, exist_ok=True)
    project.write_steps(distillation={"step": "jsonl_merge", "base_input_dir": "data/in"} | MERGE)
    ended = project.run("run-task", project.task_file)
    assert ended.code == 1, ended
    assert "fr.jsonl is not there" in ended.err


def test_a_journal_that_takes_nothing_says_why(project: Project) -> None:
    project.write_input(CONVERSATIONS, [asked("a")])
    project.write_generation()
    in_the_way = project.journal(CONVERSATIONS, "responses")
    in_the_way.parent.mkdir(parents=True)
    in_the_way.write_text("no folder")
    (message,) = project.materialize().failed
    assert str(in_the_way) in message and "unhandled errors in a TaskGroup" not in message


def test_two_data_sets_with_one_output_are_both_named(project: Project) -> None:
    style = {"format_style": "prompt_text_only", "column_mapping": {"prompt_text": "t"}}
    project.write_yaml("distillation/datasets", {"a/b/x": style, "a_b/x": style})
    for name in ("a/b/x", "a_b/x"):
        path = project.root / "data/sets" / name / "train.jsonl"
        path.parent.mkdir(parents=True)
        path.write_bytes(orjson.dumps({"t": f"from {name}"}) + b"\n")
    project.write_steps(chatml_conversion=CHATML)
    ended = project.run("run-task", project.task_file)
    assert ended.code == 2, ended
    assert "a/b/x" in ended.err and "a_b/x" in ended.err


def test_caps_hold_for_what_another_task_leaves(project: Project, server: RehearsalServer) -> None:
    project.write_input(CONVERSATIONS, [asked(f"q{n}") for n in range(5)])
    groups = [
        {"name": n, "output_file": f"{n}.jsonl", "input_files": [CONVERSATIONS]} for n in "ab"
    ]
    project.write_yaml("distillation/groups", {"merge_groups": groups})
    project.task = "merges"
    project.write_steps(distillation={"step": "jsonl_merge", "base_input_dir": "data/in"} | MERGE)
    assert project.materialize().failed == []
    project.task = "answers"
    debug = {"enabled": True, "max_files": 1, "max_items_per_file": 2}
    project.write_generation({"input_path": "data/merged"}, debug=debug)
    assert project.materialize().failed == []
    assert server.stats()["requests"] == 2


def test_jobs_do_not_share_a_task_that_merges(chain: Project, server: RehearsalServer) -> None:
    chain.write_steps(chatml_conversion=CHATML, jsonl_merge=MERGE, generate_response=GENERATE)
    ended = chain.run("run-task", chain.task_file, "--world-size", "2")
    assert ended.code == 2 and "--world-size: a task that merges cannot be shared" in ended.err
    changes = {"distributed": {"enabled": True, "world_size": 2}}
    steps = {"chatml_conversion": CHATML, "jsonl_merge": MERGE, "generate_response": GENERATE}
    chain.write_steps(**steps, **changes)
    assert chain.run("run-task", chain.task_file).code == 0
    assert server.stats()["requests"] == 11


def test_an_input_file_of_another_kind_is_refused(project: Project) -> None:
    project.write_input("talk.txt", [asked("a")])
    project.write_generation({"input_path": "data/in/talk.txt"})
    ended = project.run("run-task", project.task_file)
    assert ended.code == 1
    assert "talk.txt: a file and no folder; one of rows ends in .jsonl" in ended.err
