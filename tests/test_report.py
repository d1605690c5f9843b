"""The page of `modelcall report`: what is in it; it loads nothing and runs nothing but its own."""

from __future__ import annotations

import json
import re
import shutil
import sys
from base64 import b64encode
from collections.abc import Iterator
from hashlib import sha256
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import orjson
import pytest
from project import TASK, A, B, C, Project, some_rows

from modelcall_assets.rehearsal import Faults, serve_in_thread

EVIL = "</script><script>alert(1)</script><img src=x>\u2028"


class Page(HTMLParser):
    """Fails on what would load something."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.html, self.tags, self.text = path.read_text("utf-8"), list[str](), ""
        self._element = ""
        self.elements: dict[str, str] = {}
        self.feed(self.html)
        self.data: dict[str, Any] = orjson.loads(self.elements["script application/json"])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._element = " ".join(filter(None, [tag, dict(attrs).get("type")]))
        loads = {"src", "href", "xlink:href", "style", "onclick", "onload"}
        assert not loads & {name for name, _ in attrs}

    def handle_endtag(self, tag: str) -> None:
        self._element = ""

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._element:
            self.elements[self._element] = data

    def said(self, turns: list[dict[str, Any]]) -> list[str]:
        return [self.data["texts"][part["text"]] for turn in turns for part in turn["parts"]]


def report(project: Project, *options: str) -> Page:
    ended = project.run("report", *options)
    assert ended.code == 0, ended
    return Page(project.root / ended.out.strip().rpartition(": ")[2])


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory, empty_home: Path) -> Iterator[Project]:
    """Only to be read: 128 rows of three files, of which some failed."""
    made = Project(tmp_path_factory.mktemp("scored") / "project")
    made.write_task({"max_failure_rate": 1, "retry": {"max_repair_turns": 0}})
    made.write_model()
    made.write_prompt()
    for name, rows in (A, 4), (B, 4), (C, 120):
        made.write_input(name, some_rows(rows, name[0]))
    home = shutil.copytree(empty_home, made.root / "dagster_home")
    with serve_in_thread() as server, pytest.MonkeyPatch.context() as environment:
        environment.setenv("DAGSTER_HOME", str(home))
        environment.setenv("REHEARSAL_BASE_URL", server.base_url)
        server.set_faults(Faults(rate_400=0.1, rate_malformed=0.1, seed=2))
        assert made.run("run-task", TASK).code == 0
        yield made


class TestTask:
    def test_has_totals_plots_failures_and_commands(self, scored: Project) -> None:
        page = report(scored, TASK)
        rows = [row for name in (A, B, C) for row in scored.scores(name)]
        failed = [row for row in rows if row["api_status"] == "error"]
        reasons = {row["api_fail_reason"] for row in failed}
        assert len(reasons) > 1 and f"failed<b>{len(failed)}</b>" in page.html
        assert page.tags.count("figure") >= 4 == page.html.count("rows by score") + 3
        for reason in reasons:
            assert f"modelcall retry {TASK} --reason {reason}" in page.text
        assert "Files, the worst first" in page.text

    def test_has_each_record_with_what_was_sent_for_it(self, scored: Project) -> None:
        page = report(scored, TASK)
        rows = [row for name in (A, B, C) for row in scored.scores(name)]
        records = page.data["records"]
        assert [record["id"] for record in records] == [row["api_record_id"] for row in rows]
        assert [record["reason"] for record in records] == [row["api_fail_reason"] for row in rows]
        assert [record["values"]["score"] for record in records] == [row["score"] for row in rows]
        for record, row in zip(records, rows, strict=True):
            assert row["text"] in page.said(record["prompt"])[-1]
            assert record["values"]["api_return"] == row["api_return"]
        assert page.data["columns"] == ["score"]
        assert page.data["retry"] == {
            "command": f"modelcall retry {TASK}",
            "unique": "file",
            "file": "",
            "where": "",
        }

    def test_a_prompt_that_has_changed_since_is_not_shown_as_sent(
        self, scored: Project, tmp_path: Path
    ) -> None:
        copy = Project(shutil.copytree(scored.root, tmp_path / "copy"))
        before = scored.root / "configs/prompts/quality.yaml"
        copy.write_prompt({"prompt_template": {"prompt_text": "Now quite another: {text}"}})
        assert before.read_text() != (copy.root / "configs/prompts/quality.yaml").read_text()
        text = (copy.root / TASK).read_text().replace(str(copy.root), str(scored.root))
        (copy.root / TASK).write_text(text)
        page = report(copy, TASK, "--output", str(tmp_path / "page.html"), "--stage", "scores")
        assert page.data["records"] and not any(r["prompt"] for r in page.data["records"])

    def test_a_sample_is_the_same_every_time(self, scored: Project) -> None:
        one, two, other = (
            [each["id"] for each in report(scored, TASK, "--rows", "9", *more).data["records"]]
            for more in ((), (), ("--seed", "3"))
        )
        assert one == two != other and len(one) == 9
        good = report(scored, TASK, "--where", "score >= 4", "--rows", "5").data["records"]
        assert len(good) == 5 and all(record["values"]["score"] >= 4 for record in good)
        page = report(scored, TASK, "--where", "score >= 4")
        over_time = re.findall(r'aria-label="time: [^"]*; rows: (\d+)"', page.html)
        assert sum(map(int, over_time)) == len(page.data["records"]) < 128
        first = report(scored, TASK, "--stage", "raw", "--first", "--rows", "2")
        assert [record["row"] for record in first.data["records"]] == [1, 2]
        assert first.data["retry"] is None

    def test_replaces_a_page_but_nothing_else(self, scored: Project) -> None:
        mine = scored.root / "a.html"
        mine.write_text("<p>mine")
        refused = scored.run("report", f"data/in/{A}")
        assert refused.code == 2 and "is there already" in refused.err
        assert mine.read_text() == "<p>mine"
        mine.unlink()
        report(scored, f"data/in/{A}")
        report(scored, f"data/in/{A}")

    def test_without_the_extra_it_says_how_to_get_the_plots(
        self, scored: Project, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "vl_convert", None)
        page = report(scored, TASK)
        assert "pip install 'modelcall-assets[report]'" in page.text and "svg" not in page.tags


class TestPage:
    def test_runs_only_its_own_script_and_style(self, project: Project) -> None:
        row = {"id": EVIL, "text": EVIL, "tags": [EVIL], "messages": [{"role": EVIL}]}
        (project.root / "x.jsonl").write_text(json.dumps(row))
        page = report(project, "x.jsonl")
        assert "unsafe" not in page.html and "img" not in page.tags
        assert page.tags.count("script") == 2 and page.tags.count("style") == 1
        policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page.html)
        assert policy is not None and policy[1].startswith("default-src 'none'; ")
        for element in ("script", "style"):
            digest = b64encode(sha256(page.elements[element].encode()).digest()).decode()
            assert f"{element}-src 'sha256-{digest}'" in policy[1]
        (record,) = page.data["records"]
        assert record["values"]["text"] == record["id"] == EVIL
        assert escape(EVIL) not in page.html

    def test_shows_messages_as_turns_and_cuts_what_is_long(self, project: Project) -> None:
        chat = {"messages": [{"role": "user", "content": "<b>你好"}], "score": 3}
        lines = [{**chat, "id": n, "note": "y" * 200_000} for n in range(99)]
        project.write_input("chats.jsonl", lines)
        page = report(project, "data/in/chats.jsonl", "--first", "--rows", "2")
        records = page.data["records"]
        assert [record["id"] for record in records] == ["0", "1"]
        assert [page.said(record["turns"]) for record in records] == [["<b>你好"]] * 2
        assert "messages" not in records[0]["values"]
        assert records[0]["values"]["note"].endswith("… [100,000 more characters]")
        none = project.run("report", "data/in/chats.jsonl", "--where", "score > 3")
        assert none.code == 1 and "there is no such row" in none.err
        assert project.run("report", "workspace.yaml").code == 2

    def test_a_line_that_is_none_is_a_record_too(self, project: Project) -> None:
        (project.root / "torn.jsonl").write_bytes(b'{"id": 1}\n{torn\n')
        good, torn = report(project, "torn.jsonl").data["records"]
        assert (good["reason"], torn["reason"]) == (None, "bad_line")
        assert torn["values"]["line"] == "{torn"
