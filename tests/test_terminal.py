"""What others write steers no terminal, and runs in no page."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import orjson
import pytest
from endpoint import http, in_thread, said, serving
from project import TASK, Project

import modelcall_assets.cli

EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202egnp\u2066\rerror: gone\x00\x08"
STEERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


@pytest.mark.parametrize(
    "answer",
    [
        said(content=EVIL),
        http(400, orjson.dumps({"error": {"message": EVIL}})),
        http(401, orjson.dumps({"error": {"message": EVIL}})),
        http(500, EVIL.encode()),
        EVIL.encode(),
    ],
    ids=["answer", "error", "refusal", "text", "no HTTP"],
)
def test_no_command_lets_the_text_of_others_steer(answer: bytes, bare: Project) -> None:
    name = "a\x1b[31m\u202e.jsonl"
    bare.write_input(name, [{"id": EVIL, "text": EVIL}, {"id": 1, EVIL: "x"}, b'{"' + b"\xc2\x9b"])
    bare.write_task({"max_failure_rate": 1.0, EVIL: 1}, file=f"odd{EVIL[:8]}")
    told = ""
    with in_thread(serving(answer)) as endpoint:
        client = {"base_url": endpoint.url, "max_retries": 0}
        bare.write_model({"client_config": client})
        bare.write_task({"max_failure_rate": 1.0})
        for command in (
            *(["check"], ["plan", TASK], ["try", TASK, "--file", "a*"], ["run-task", TASK]),
            *(["failures", TASK], ["failures", TASK, "--file", EVIL], ["clean", TASK, "--dry-run"]),
            *(["export", TASK, "--where", EVIL], ["run-task", EVIL], ["run-task", TASK, EVIL]),
        ):
            ended = bare.run(*(each.replace("\0", "") for each in command))
            assert not STEERS.search(ended.told), (command, ended)
            told += ended.told
    assert r"\x1b[31m\u202e" in told and r"\x1b]0;owned\x07" in told


def test_json_for_programs_stays_as_it_is(bare: Project) -> None:
    bare.write_input("good.jsonl", [{"id": EVIL, "txt": "misspelt"}])
    bare.write_task({"max_failure_rate": 1.0})
    assert bare.run("run-task", TASK).code == 0
    (line,) = bare.run("failures", TASK, "--json").out.splitlines()
    assert orjson.loads(line)["record_id"] == EVIL


def test_every_command_speaks_through_one_module() -> None:
    for path in Path(modelcall_assets.cli.__path__[0]).glob("*.py"):
        if path.name == "terminal.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("print", "click.echo", "click.secho", "Text"), path.name
