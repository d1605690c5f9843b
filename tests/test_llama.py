"""Answers and ratings from llama.cpp's own server, which this project did not write.

Its model is tiny and random: what it says is noise, but how it says it is a real server's.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import tiny_model
from project import CONVERSATIONS, JUDGE, Project, asked

from modelcall_assets.defs.runs import RunSummary

pytest.importorskip(
    "xllamacpp", reason="llama.cpp's server is not installed: pip install -e '.[llama]'"
)

KEY = "sk-tiny"
LETTERS: dict[str, Any] = {"extra_body": {"grammar": "root ::= [a-z ]{8,24}"}}
"""Keeps the noise short, so that it ends by itself."""
SCORES = {
    "score": {"type": "integer", "minimum": 1, "maximum": 5},
    "quality_tags": {"type": "array", "items": {"enum": ["terse", "noisy"]}, "maxItems": 3},
    "recommended_use_case": {"enum": ["training", "nothing"]},
}
QUESTIONS = ["Why?", "¿Qué es 雪?", "Once more: " + "why? " * 20]


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a server in a process of its own, which ends with its input."""
    folder = tmp_path_factory.mktemp("llama")
    command = [sys.executable, tiny_model.__file__, str(folder / "tiny.gguf"), KEY]
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        ) as server,
    ):
        assert server.stdout is not None
        address = server.stdout.readline().strip()
        assert address, (folder / "log").read_text()
        yield f"{address}/v1"


@pytest.fixture
def project(distilling: Project, llama: str, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A task that answers `QUESTIONS`, one after another."""
    monkeypatch.setenv("REHEARSAL_BASE_URL", llama)
    monkeypatch.setenv("LLAMA_KEY", KEY)
    distilling.write_generation()
    distilling.write_input(CONVERSATIONS, [asked(question) for question in QUESTIONS])
    return distilling


def write_model(project: Project, file: str = "rehearsal", **chat: Any) -> None:
    # llama.cpp ends the connection after a streamed answer, unannounced. The direct transport asks
    # on another one then; with the SDK's the next request is lost, and a retry mends that
    transport = chat.pop("transport", "direct")
    retries = 0 if transport == "direct" else 10
    client = {"api_key": "${LLAMA_KEY}", "max_retries": retries, "transport": transport}
    guided = chat.pop("guided", False)
    changes = {"client_config": client, "chat_config": {"temperature": 1, "seed": 1, **chat}}
    project.write_model({**changes, "supports_json_schema": guided}, file)


def said(row: dict[str, Any]) -> tuple[str, str | None, str | None]:
    return row["api_status"], row["finish_reason"], row["api_fail_reason"]


@pytest.mark.parametrize(
    ("transport", "stream"), [("direct", False), ("direct", True), ("sdk", True)]
)
def test_every_conversation_is_answered_with_its_usage(
    project: Project, transport: str, stream: bool
) -> None:
    write_model(project, transport=transport, stream=stream, **LETTERS)
    assert project.materialize() == RunSummary(ran={"raw": 1, "responses": 1})
    rows = project.responses()
    assert [said(row) for row in rows] == [("success", "stop", None)] * len(QUESTIONS)
    overhead = set()
    for row, question in zip(rows, QUESTIONS, strict=True):
        assert re.fullmatch("[a-z ]{8,24}", row["response"])
        assert row["final_messages"][-1] == {"role": "assistant", "content": row["response"]}
        # a token is a byte, and the last one ends the answer
        assert row["usage"]["completion_tokens"] == len(row["response"]) + 1
        overhead.add(row["usage"]["prompt_tokens"] - len(question.encode()))
    assert len(overhead) == 1, "the template's own tokens"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_what_is_cut_or_too_long_fails_in_its_place(project: Project, stream: bool) -> None:
    project.write_generation(max_failure_rate=1)
    write_model(project, stream=stream, max_tokens=12)
    too_long = asked("x" * 2 * tiny_model.CONTEXT)
    project.write_input(CONVERSATIONS, [asked("Short?"), too_long, asked("And this?")])
    project.materialize()
    cut, long, cut_too = project.responses()
    for row in (cut, cut_too):
        assert said(row) == ("error", "length", "truncated")
        assert row["usage"]["completion_tokens"] == 12
        assert row["response"], "what there was of it"
        assert row["final_messages"] is None
    # llama.cpp has a code of its own for this
    assert said(long) == ("error", None, "context_length")
    assert "exceeds the available context size" in long["api_fail_detail"]
    assert long["usage"] is None


@pytest.mark.parametrize("guided", [True, False], ids=["guided", "on its own"])
def test_guided_json_makes_ratings_of_noise(project: Project, guided: bool) -> None:
    judge = {**JUDGE, "model": {"config_path": "configs/models/judge.yaml"}}
    project.write_generation(scores=judge, max_failure_rate=1)
    schema = {"properties": SCORES}
    project.write_prompt(
        {"output_config": {"json_schema": schema, "json_key_must_exists": [*SCORES]}}
    )
    write_model(project, **LETTERS)
    write_model(project, "judge", guided=guided, max_tokens=400)
    summary = project.materialize()
    assert summary == RunSummary(ran={"raw": 1, "responses": 1, "scores": 1})
    rated = project.scores(CONVERSATIONS)
    assert [row["response"] for row in rated] == [row["response"] for row in project.responses()]
    if not guided:
        assert {row["api_status"] for row in rated} == {"error"}
        return
    for row in rated:
        assert row["api_status"] == "success", row["api_fail_detail"]
        assert row["score"] in range(1, 6)
        assert {*row["quality_tags"]} <= {"terse", "noisy"}
        assert row["recommended_use_case"] in ("training", "nothing")


def test_a_wrong_key_is_refused(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(project, **LETTERS)
    monkeypatch.setenv("LLAMA_KEY", "sk-wrong")
    (message,) = project.materialize().failed
    assert "refuses every request" in message and "Invalid API Key" in message
    assert "sk-wrong" not in message
    assert not (project.root / "data/responses" / CONVERSATIONS).exists()
