"""The page of `modelcall report` in a browser: it means by a condition what the commands mean, and
the command that it shows chooses the rows that it shows."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page
from project import TASK, Project, some_rows

from modelcall_assets.rehearsal import Faults, RehearsalServer
from modelcall_assets.transforms import Where

ROWS = [
    {"id": "1", "n": 1, "text": "abc", "flag": True, "tags": ["x", 2], "deep": {"a": {"b": 3}}},
    {"id": "2", "n": 1000, "text": "1000", "flag": False, "tags": [], "row": 7, "deep": {}},
    {"id": "3", "n": None, "text": "", "status": "own", "constructor": 1, "deep": {"length": 2}},
    {"id": "4", "n": 0.5, "text": "TRUE", "toString": "own", "file": "f", "tags": {"0": "x"}},
    {"id": "5", "n": -16, "text": "0x10", "a.b": 1, "a": {"b": 2}, "__proto__": 3},
    {
        "id": "6",
        "n": 2**60 + 1,
        "text": "é",
    },
]
CONDITIONS = (
    "n = 1", "n == 1.0", "n != 1", "n < 1000", "n >= 1_000", "n = 1e3", "n < inf", "n > -inf",
    "n = null", "n != NULL", "n = 0x10", "text = 0x10", "text = 1000", "text > 1", "text < b",
    "text = ''", "text = TRUE", "flag = TRUE", "flag = false", "flag != 1", "flag = 'true'",
    "text.length = 3", "tags.length = 2", "tags.0 = x", "tags.1 = 2", "tags.00 = x", "tags.-1 = 2",
    "toString != null", "toString = own", "constructor != null", "constructor = 1", "a.b = 1",
    "deep.a.b > 2", "deep.length = 2", "deep.toString != null", "row = 7",
    "status = own", "file = f", "__proto__ = 3", "n > 0 and text = abc", "n > 0 AND flag = false",
    '"a.b" = 1', "id = 3", "n = nan", "n != nan",
    f"n > {2**60}", f"n = {2**60}", f"n = {2**60 + 1}",
)  # fmt: skip
WRONG = ("n < null", "n", "n =", "n ~ 1", "n = 1 or n = 2", "n = 1 and", "= 1")
ABSENT = ("valueOf = null", "scor < 2")


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    page, wrong = browser.new_page(), list[str]()
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    yield page
    assert wrong == []
    page.close()


def ran(project: Project, *arguments: str) -> str:
    """Standard output, by another thread: this one's event loop is the browser's."""
    with ThreadPoolExecutor(1) as thread:
        ended = thread.submit(project.run, *arguments).result()
    assert ended.code == 0, (arguments, ended)
    return ended.out


def opened(page: Page, project: Project, *arguments: str) -> None:
    told = ran(project, "report", *arguments, "--output", "page.html", "--force")
    page.goto((project.root / told.strip().rpartition(": ")[2]).as_uri())


def seen(page: Page) -> int:
    return int(page.locator("#count").inner_text().partition(" ")[0])


def test_a_condition_means_what_it_means_elsewhere(page: Page, project: Project) -> None:
    nested: object = 1
    for _ in range(150):
        nested = [nested]
    project.write_input("odd.jsonl", [*ROWS[:-1], {**ROWS[-1], "nest": nested}])
    opened(page, project, "data/in/odd.jsonl")
    for condition in CONDITIONS:
        page.get_by_label("condition").fill(condition)
        assert page.locator("#wrong").inner_text() == "", condition
        assert seen(page) == sum(map(Where.parse(condition), ROWS)), condition
    for condition in ABSENT:
        page.get_by_label("condition").fill(condition)
        assert "no record here has" in page.locator("#wrong").inner_text()
    for condition in WRONG:
        with pytest.raises(ValueError):
            Where.parse(condition)
        page.get_by_label("condition").fill(condition)
        assert page.locator("#wrong").inner_text() != "", condition


@pytest.mark.parametrize("options", [[], ["--file", "sub/*"], ["--where", "score > 2"]])
def test_the_command_chooses_what_is_seen(
    page: Page, project: Project, server: RehearsalServer, options: list[str]
) -> None:
    project.write_task({"max_failure_rate": 1, "retry": {"max_repair_turns": 0}})
    for name, rows in ("a.jsonl", 9), ("sub/a.jsonl", 9), ("[b] 'c'.jsonl", 5):
        Path(project.root, "data/in", name).parent.mkdir(parents=True, exist_ok=True)
        project.write_input(name, some_rows(rows, name[0] if name[0] != "s" else "a"))
    server.set_faults(Faults(rate_400=0.2, rate_malformed=0.2, seed=2))
    ran(project, "run-task", TASK)
    opened(page, project, TASK, *options)
    told = 0
    for kind in ("file", "outcome"):
        for value in page.get_by_label(kind, exact=True).locator("option").all():
            for text, condition in ("", ""), ("a-1", ""), ("", "score >= 3"):
                for each in ("file", "outcome"):
                    page.get_by_label(each, exact=True).select_option("", force=True)
                chosen = value.get_attribute("value")
                page.get_by_label(kind, exact=True).select_option(chosen, force=True)
                page.get_by_label("text").fill(text)
                page.get_by_label("condition").fill(condition)
                command = page.locator("#retry").inner_text()
                if command:
                    told += 1
                    out = ran(project, *shlex.split(command)[1:], "--dry-run")
                    rows = map(int, re.findall(r": (\d+) of", out))
                    assert sum(rows) == seen(page), (command, out)
                else:
                    assert seen(page) == 0 or page.locator("#note").inner_text()
    assert told > 5
