"""From what a server says to the published row: nothing raises, nothing is falsified."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import orjson
import pyarrow.parquet as pq
import pytest
from endpoint import WithoutNetwork, completion
from hypothesis import given, settings
from hypothesis import strategies as st
from project import A, Project

from modelcall_assets.journal import Journal
from modelcall_assets.journal.lines import Address, Entry
from modelcall_assets.llm import Engine
from modelcall_assets.llm.channel import Channel
from modelcall_assets.llm.classify import Reply
from modelcall_assets.stages.report import Report

Says = Callable[[int], Any]
"""The completion of the row with this number."""


class Numbered(WithoutNetwork):
    """Answers in the order of the rows' numbers."""

    def __init__(self, says: Callable[[int], Reply]) -> None:
        self.says = says
        self.asked: list[int] = []

    async def send(self, payload: bytes) -> Reply:
        text: str = orjson.loads(payload)["messages"][-1]["content"]
        self.asked.append(int(text.rpartition("row ")[2].split()[0]))
        return self.says(self.asked[-1])


def score(project: Project, says: Callable[[int], Reply]) -> tuple[Report, list[int]]:
    endpoint = Numbered(says)
    engine = Engine([Channel(endpoint, 8)], max_in_flight=8, max_retries=0)
    return project.score(A, engine), endpoint.asked


def rows(count: int) -> list[dict[str, Any]]:
    return [{"id": f"r{n}", "text": f"row {n} "} for n in range(count)]


def ready(project: Project, count: int, keys: dict[str, Any] | None = None) -> None:
    """A task of so many rows whose answers have these keys."""
    config = {"json_keys": list(keys or {"score": {}}), "json_schema": {"properties": keys or {}}}
    prompt = {
        "prompt_template": {"prompt_text": "Rate {text}"},
        "output_config": {"require_json": True, **config},
    }
    path = project.write_prompt()
    path.write_text(json.dumps(prompt))
    project.write_task({"max_failure_rate": 1, "retry": {"max_repair_turns": 0}})
    project.write_input(A, rows(count))


def whole(content: Any, **more: Any) -> dict[str, Any]:
    return {**completion(content=content), **more}


def reply(completion: Any) -> Reply:
    return Reply(200, {}, json.dumps(completion).encode())


# Usage and other fields


@pytest.mark.parametrize("odd", [2**53 + 1, 2**63, 2**64, 10**40, -5, 1.5, True, "7", [1]])
def test_a_count_that_is_none_is_unknown_and_the_file_is_published(
    project: Project, odd: Any
) -> None:
    ready(project, 3)
    usage = {"prompt_tokens": odd, "completion_tokens": 1}
    report, _ = score(project, lambda n: reply(whole('{"score": 1}', usage=usage)))
    assert report.ok == 3
    row = project.scores(A)[0]
    assert row["api_prompt_tokens"] is row["api_completion_tokens"] is row["api_cost_usd"] is None
    again, asked = score(project, lambda n: reply({}))
    assert (again.ok, asked) == (3, []), "what is journalled is no trouble later"


def test_the_largest_counts_of_many_rows_are_published(project: Project) -> None:
    project.write_model({"prices": {"usd_per_million_input_tokens": 1}})
    ready(project, 1030)
    usage = {"prompt_tokens": 10_000_000, "completion_tokens": 10_000_000}
    report, _ = score(project, lambda n: reply(whole('{"score": 1}', usage=usage)))
    assert report.ok == 1030
    assert report.numbers["prompt_tokens"] == 1030 * 10_000_000
    assert project.scores(A)[0]["api_prompt_tokens"] == 10_000_000


odd_values = st.recursive(
    st.none() | st.booleans() | st.text(max_size=6) | st.floats()
    | st.sampled_from([0, -1, 7, 2**31, 2**53 + 1, 2**63, 2**64, 10**30, "\ud800", "\0", "stop"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["type", "text", "thinking", "code", "message", "error", "function", "x"]),
        inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
FIELDS = [
    ("id",), ("model",), ("usage",), ("usage", "prompt_tokens"), ("usage", "completion_tokens"),
    ("choices",), ("choices", 0), ("choices", 0, "finish_reason"), ("choices", 0, "message"),
    ("choices", 0, "index"), ("choices", 0, "error"), ("error",), ("object",), ("code",), ("type",),
    *(("choices", 0, "message", name) for name in (
        "content", "role", "refusal", "reasoning", "reasoning_content", "tool_calls",
        "function_call")),
]  # fmt: skip
ANSWER_KEYS = {
    "score": {"type": "integer", "maximum": 2**90},
    "share": {"type": "number"},
    "shares": {"type": "array", "items": {"type": "number"}},
    "counts": {"type": "array", "items": {"type": "integer"}},
    "any": {},
    "maybe": {"type": ["string", "null"]},
}


def changed(completion: dict[str, Any], path: Sequence[Any], value: Any) -> dict[str, Any]:
    place: Any = completion
    for step in path[:-1]:
        place = place.setdefault(step, {}) if isinstance(place, dict) else place[step]
    place[path[-1]] = value
    return completion


changes = st.lists(st.tuples(st.sampled_from(FIELDS), odd_values), min_size=1, max_size=2)


@settings(max_examples=12)
@given(
    st.lists(changes, min_size=20, max_size=40),
    st.lists(st.dictionaries(st.sampled_from([*ANSWER_KEYS]), odd_values), min_size=5, max_size=20),
)
def test_any_value_in_any_field_ends_as_a_published_row(
    odd: list[list[tuple[Sequence[Any], Any]]], answers: list[dict[str, Any]]
) -> None:
    completions: list[Any] = [whole(json.dumps(answer)) for answer in answers]
    for paths in odd:
        completion = whole('{"score": 1}', usage={"prompt_tokens": 1, "completion_tokens": 1})
        try:
            for path, value in paths:
                completion = changed(completion, path, value)
        except (TypeError, LookupError, AttributeError):  # the first change took its place away
            continue
        completions.append(completion)
    with tempfile.TemporaryDirectory() as folder:
        project = Project(Path(folder))
        project.write_model({"client_config": {"base_url": "http://127.0.0.1:1/v1"}})
        ready(project, len(completions), ANSWER_KEYS)
        report, _ = score(project, lambda n: reply(completions[n]))
        assert report.rows == len(completions) == report.ok + report.failed
        table = pq.read_table(project.output(A))
        assert table.column("id").to_pylist() == [f"r{n}" for n in range(len(completions))]
        for row, completion in zip(table.to_pylist(), completions, strict=True):
            if row["api_status"] == "success" and row["score"] is not None:
                content = completion["choices"][0]["message"]["content"]
                said = re.findall(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?", json.dumps(content))
                assert float(row["score"]) in set(map(float, said))


# Types of keys that have none


@pytest.mark.parametrize(
    ("values", "kind", "stored"),
    [
        (["r0", "r1"], "string", ["r0", "r1"]),
        ([1, 2], "int64", [1, 2]),
        ([1, 2.5], "double", [1.0, 2.5]),
        ([True, False], "bool", [True, False]),
        (["a", None], "string", ["a", None]),
        ([2**60 + 1, 3], "int64", [2**60 + 1, 3]),
        (["a", 1], "string", ['"a"', "1"]),
        ([True, 1], "string", ["true", "1"]),
        ([["a"], ["b"]], "string", ['["a"]', '["b"]']),
        ([{"a": 1}, None], "string", ['{"a":1}', None]),
        ([2**64 - 1, 1], "string", [str(2**64 - 1), "1"]),
        ([2**60 + 1, 0.5], "string", [str(2**60 + 1), "0.5"]),
        ([None, None], "string", [None, None]),
    ],
)
def test_a_key_without_a_type_has_the_one_that_its_values_share(
    project: Project, values: list[Any], kind: str, stored: list[Any]
) -> None:
    keys = {"label": {}, "note": {"enum": [*values]}}
    ready(project, len(values) + 1, keys)

    def says(n: int) -> Reply:
        same = dict.fromkeys(keys, values[n]) if n < len(values) else None
        return reply(whole(json.dumps(same) if same else "no"))

    first, _ = score(project, says)
    for column in keys:
        table = pq.read_table(project.output(A))
        assert str(table.schema.field(column).type) == kind
        assert table.column(column).to_pylist() == [*stored, None]
    again, _ = score(project, says)
    assert again.data_version == first.data_version
    assert pq.read_schema(project.output(A)) == table.schema, "a replay gives the same types"


def test_a_file_whose_rows_all_fail_is_published(project: Project) -> None:
    ready(project, 2)
    report, _ = score(project, lambda n: reply(whole("no")))
    assert (report.ok, report.failed) == (0, 2)
    assert [row["score"] for row in project.scores(A)] == [None, None]


# Replies journalled by the version before


def test_a_journalled_reply_that_counted_once_is_asked_again(project: Project) -> None:
    """The dialogue up to it stands, as a first turn that was mended by it or as nothing."""
    ready(project, 3)
    score(project, lambda n: reply(whole('{"score": 1}')))
    keys = [row["api_request_key"] for row in project.scores(A)]
    folder = project.journal()
    shutil.rmtree(folder)
    aborted = whole('{"score": 1}')
    aborted["choices"][0]["finish_reason"] = "abort"
    with Journal(folder, "an older run") as journal:
        for key, completion in zip(
            keys, [whole('{"score": 2}'), aborted, {"error": "no"}], strict=True
        ):
            body = json.dumps(completion).encode()
            journal.append(Entry(Address(key, 0), 0, 200, body, "here", 1, 5, "2026-01-01"))
    report, asked = score(project, lambda n: reply(whole('{"score": 3}')))
    assert (report.ok, sorted(asked)) == (3, [1, 2])
    assert [row["score"] for row in project.scores(A)] == [2, 3, 3]
