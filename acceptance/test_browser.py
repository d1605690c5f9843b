"""A task's life as its user sees it: Dagster's UI in a browser, on `modelcall ui`.

The tests are one story, in this order. Where `PICTURES` says, they leave those of docs/ui.md."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import sqrt
from pathlib import Path

import pytest
from dev import Dev
from endpoint import Request, in_thread, refusal, said, serving
from pages import ROOT
from playwright.sync_api import Browser, Locator, Page, expect
from project import PREPROCESS, Project, read_rows

from modelcall_assets.defs.instance import open_instance

ROWS, SCORES = 40, (1, 2, 3, 3, 4, 4, 4, 5)
RED, GREEN, DROPPED = "forum.jsonl", "news.jsonl", "letters.jsonl"
FILES = ("encyclopedia.jsonl", RED, GREEN, "recipes.jsonl", "reviews.jsonl", "travel.jsonl")
SCREEN = {"width": 1400, "height": 900}
HIGH = {"width": 1400, "height": 2400}
PATIENCE_MS, LOOK_MS = 90_000, 10_000
"""Dagster looks after backfills every 30 s, and a summary is made once a minute."""


@dataclass
class Model:
    """Rates texts by their checksums, if it does not filter them."""

    filters: str = "forum"

    def __call__(self, request: Request) -> bytes:
        if self.filters and self.filters in request.question:
            return refusal(400, "content_filter")
        score = SCORES[zlib.crc32(request.question.encode()) % len(SCORES)]
        answer = {"score": score, "quality_tags": ["clear"], "recommended_use_case": "training"}
        return said(content=json.dumps(answer))


def write_articles(task: Project, name: str) -> None:
    kind, more = name.removesuffix(".jsonl"), " It says what it has to say, and then it ends."
    texts = (f"Article {number} of the {kind}.{more * (number % 7)}" for number in range(ROWS))
    task.write_input(name, [{"id": f"{kind}-{n}", "text": text} for n, text in enumerate(texts)])


@dataclass
class Story:
    task: Project
    model: Model
    dev: Dev
    page: Page
    pictures: Path

    def open(self, path: str) -> None:
        self.page.goto(f"http://127.0.0.1:{self.dev.port}/{path}")

    def open_group(self) -> None:
        self.open(f"locations/modelcall/asset-groups/{self.task.task}/lineage")

    def open_asset(self, stage: str, view: str = "overview", partition: str = "") -> None:
        self.open(f"assets/{self.task.task}/{stage}?view={view}&partition={partition}")

    def sees(self, *texts: str | re.Pattern[str]) -> None:
        """Somewhere on the page, now or later."""
        for text in texts:
            shown = self.page.get_by_text(text).filter(visible=True).first
            expect(shown).to_be_visible(timeout=PATIENCE_MS)

    def press(self, name: str | re.Pattern[str]) -> None:
        self.page.get_by_role("button", name=name).first.click()

    def told(self, name: str) -> Locator:
        """The row of metadata of that name."""
        first = self.page.locator(":scope > td:first-child").get_by_text(name, exact=True)
        return self.page.locator("tr").filter(has=first).first

    def number(self, name: str) -> float:
        return float(self.told(name).inner_text().split()[-1])

    def table(self, name: str) -> list[list[str]]:
        """Its rows, behind that of their names."""
        rows = self.told(name).locator("tr")
        rows.nth(1).wait_for()
        return [row.locator("td").all_inner_texts() for row in rows.all()[1:]]

    def reads(self, name: str, value: object) -> None:
        """Loads the page again meanwhile: it can miss a run that is quick."""
        shown = self.told(name).get_by_text(str(value), exact=True).first
        for _ in range(PATIENCE_MS // LOOK_MS):
            with suppress(AssertionError):
                return expect(shown).to_be_visible(timeout=LOOK_MS)
            self.page.reload()
        raise AssertionError(f"{name} is not {value}")

    def unfolded(self, name: str) -> str:
        """What stands behind the link that long metadata are."""
        self.told(name).get_by_text("Show Markdown").click()
        shown = self.page.get_by_role("dialog").filter(has_text=name)
        text = shown.inner_text()
        shown.get_by_role("button", name="Close").click()
        expect(shown).to_be_hidden()
        return text

    def top_of(self, name: str) -> float:
        box = self.told(name).bounding_box()
        assert box is not None
        return box["y"]

    def picture(
        self, name: str, x: float, y: float, width: float, end: float, *, is_sharp: bool = False
    ) -> None:
        """In both themes, down to `end`."""
        clip = {"x": x, "y": y, "width": width, "height": end - y}
        scale = "device" if is_sharp else "css"
        for theme, suffix in (("dark", "-dark"), ("light", "")):
            self.page.emulate_media(color_scheme=theme)
            path = self.pictures / f"{name}{suffix}.png"
            self.page.screenshot(path=path, clip=clip, scale=scale, animations="disabled")


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory, browser: Browser) -> Iterator[Story]:
    folder = tmp_path_factory.mktemp("browser")
    root, model = folder / "project", Model()
    task = Project(root, "articles", "data/articles")
    task.write_task(
        {
            "description": "Rates articles from 1 to 5.",
            "owners": ["team:data"],
            "data": {"output_folder": "data/articles_scores"},
            "preprocess": {**PREPROCESS, "output_folder": "data/articles_cleaned"},
            "concurrency": {"files_per_run": 1},
            "sensor": {"interval_seconds": 1},
        }
    )
    task.write_prompt()
    shutil.copy(ROOT / "workspace.yaml", root)
    for name in FILES:
        write_articles(task, name)
    with pytest.MonkeyPatch.context() as environment, in_thread(serving(model)) as endpoint:
        prices = {"usd_per_million_input_tokens": 2, "usd_per_million_output_tokens": 8}
        task.write_model({"client_config": {"base_url": endpoint.url}, "prices": prices})
        environment.setenv("DAGSTER_HOME", str(root / "dagster_home"))
        open_instance(root).dispose()
        dev = Dev(root, endpoint.url)
        dev.start()
        page = browser.new_page(viewport=SCREEN, device_scale_factor=2)
        yield Story(task, model, dev, page, Path(os.environ.get("PICTURES", folder)))
        dev.stop()


def test_new_files_are_missing_and_nothing_runs(story: Story) -> None:
    story.open_asset("scores", "partitions")
    story.sees(f"Missing ({len(FILES)})", *FILES)
    story.open("runs")
    story.sees("No runs")


def test_what_is_missing_is_picked_and_launched(story: Story) -> None:
    story.open_group()
    story.press(re.compile("Materialize all"))
    story.press("Missing")
    story.sees(f"{len(FILES)} partitions selected")
    story.picture("materialize", 340, 105, 720, 685)
    story.press("Launch backfill")
    story.sees("Created backfill")
    story.sees("83% filled (1 failed)")


def test_a_red_file_says_why(story: Story) -> None:
    story.open_asset("scores", "checks")
    story.page.get_by_text("Partitions", exact=True).nth(1).click()
    story.page.get_by_text(RED).filter(visible=True).first.click()
    why = f"{ROWS} of {ROWS} rows failed (100.00%), more than max_failure_rate 5.00%"
    story.sees(why)
    story.picture("why", 240, 0, 1160, 900)
    assert f"content_filter\t{ROWS}" in story.unfolded("failures_by_reason")
    first = story.unfolded("first_failures")
    assert "forum-0" in first and "server says content_filter" in first


def test_so_does_the_end_of_its_run(story: Story) -> None:
    story.open_asset("scores", "partitions", RED)
    story.press("View logs")
    story.sees("RUN_FAILURE")
    _, end = story.page.inner_text("body").split("RUN_FAILURE")
    assert f"{ROWS} of {ROWS} rows failed" in end and "File" not in end


def test_only_what_failed_is_run_again(story: Story) -> None:
    story.model.filters = ""
    story.open_asset("scores", "partitions")
    story.press(re.compile("Materialize"))
    story.press("Failed")
    story.press("Launch 1 run")
    story.sees("Launched run")
    story.open_asset("scores", "partitions", RED)
    story.sees(f"Materialized ({len(FILES)})")


def test_a_file_shows_its_numbers_and_samples(story: Story) -> None:
    story.open_asset("scores", "partitions", GREEN)
    rows = story.task.scores(GREEN)
    story.reads("ok", ROWS)
    bars = Counter(row["score"] for row in rows)
    for score, count in bars.items():
        expect(story.told("histogram_score")).to_contain_text(f"{score}{count}█")
    assert "news-" in story.unfolded("sample")
    story.page.set_viewport_size(HIGH)
    story.picture("file", 530, 154, 870, story.top_of("output"))


def test_the_summary_shows_the_task(story: Story) -> None:
    story.page.set_viewport_size(SCREEN)
    story.open_asset("summary")
    story.press("Materialize")
    story.reads("files_done", len(FILES))
    story.reads("ok", ROWS * len(FILES))
    story.open_group()
    story.sees("100% filled", "Materialized")
    story.picture("graph", 285, 425, 1065, 585, is_sharp=True)


def test_the_report_is_one_page_to_filter_sort_and_open(story: Story) -> None:
    ended = story.task.run("report", story.task.task_file, "--output", "report.html")
    assert ended.code == 0, ended
    page, wrong = story.page, list[str]()
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto((story.task.root / "report.html").as_uri())
    expect(page.locator("#count")).to_have_text("240 of 240")
    page.get_by_label("condition").fill("score < 2")
    low = sum(row["score"] < 2 for name in FILES for row in story.task.scores(name))
    expect(page.locator("#count")).to_have_text(f"{low} of 240")
    expect(page.locator("#retry")).to_contain_text(" --where 'score < 2'")
    page.get_by_label("condition").fill("score <")
    story.sees("not a condition")
    page.get_by_label("condition").fill("")
    page.get_by_role("button", name="score").click()
    page.get_by_role("button", name="score").click()
    first = page.locator("#rows tr").first
    expect(first.locator("td").last).to_have_text("5")
    first.click()
    page.get_by_text("prompt, as it was sent").click()
    story.sees(re.compile("Article [0-9]+ of the"), "quality_tags")
    first.click()
    page.get_by_label("text").fill("Article 7 of the news")
    expect(page.locator("#retry")).to_contain_text(" --ids news-7")
    page.get_by_label("text").fill("")
    page.set_viewport_size({"width": 1100, "height": 1000})
    page.evaluate("scrollTo(0, 0)")
    story.picture("report", 0, 0, 1100, 1000)
    assert wrong == []


def test_a_changed_prompt_makes_files_out_of_date(story: Story) -> None:
    story.task.write_prompt({"prompt_template": {"prompt_text": "Judge it again:\n{text}\n"}})
    story.open_group()
    story.press("Reload definitions")
    story.sees("Definitions reloaded")
    story.open_asset("scores", "partitions", GREEN)
    story.sees("Unsynced")
    story.open_asset("summary")
    story.press("Materialize")
    story.reads("files_out_of_date", len(FILES))
    expect(story.told("out_of_date")).to_contain_text(", now ")
    story.page.set_viewport_size({**HIGH, "width": 1700})
    story.picture("summary", 255, story.top_of("rows_in"), 975, story.top_of("commands"))


def test_a_dropped_file_is_scored_by_the_sensor(story: Story) -> None:
    story.open("locations/modelcall/sensors/articles_files")
    story.page.locator("label").filter(has=story.page.get_by_role("checkbox")).first.click()
    write_articles(story.task, DROPPED)
    story.open_asset("scores", "partitions", DROPPED)
    story.sees(f"Materialized ({len(FILES) + 1})")


def test_an_evaluation_shows_its_figures(story: Story) -> None:
    task, part = story.task, "ARC-ARC-Easy-test"
    task.task = "evaluate_arc"
    file = Path("configs/tasks/evaluation/evaluate_arc.yaml")
    for name in (file, "configs/models/rehearsal.yaml"):
        (task.root / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, task.root / name)
    shutil.copytree(ROOT / "demo/benchmarks", task.root / "demo/benchmarks")
    with task.start("rehearse", "--", sys.executable, "-m", "modelcall", "run-task", file) as run:
        _, told = run.communicate()
    assert run.returncode == 0, told
    right: dict[str, list[bool]] = {"all": []}
    for path in sorted((task.root / "data/evaluate_arc/grades").glob("*.parquet")):
        for row in read_rows(path):
            for group in ("all", row["task"]):
                right.setdefault(group, []).append(row["correct"])
    story.open_group()
    story.press("Reload definitions")
    story.sees("Definitions reloaded")
    story.page.set_viewport_size({**HIGH, "width": 1700})
    story.open_asset("summary")
    story.reads("items", len(right["all"]))
    figures = [story.number(f"accuracy{end}") for end in ("", "_low", "_high")]
    assert figures == pytest.approx(wilson(right["all"]))
    for row, (group, own) in zip(story.table("figures"), right.items(), strict=True):
        assert row[:2] == [group, str(len(own))]
        assert [*map(float, row[2:5])] == pytest.approx(wilson(own), abs=1e-4)
    story.picture("evaluation", 255, story.top_of("figures"), 975, story.top_of("files_done"))
    story.open_asset("scores", "partitions", f"{part}.jsonl")
    story.reads("items", 12)
    assert story.number("accuracy") == pytest.approx(wilson(right["ARC/ARC-Easy/test"])[0])
    story.page.set_viewport_size(HIGH)
    story.picture("benchmark", 530, 154, 870, story.top_of("output"))
    assert task.run("report", file, "--output", "figures.html").code == 0
    story.page.goto((task.root / "figures.html").as_uri())
    story.page.set_viewport_size({"width": 1100, "height": 1000})
    story.picture("figures", 0, 0, 1100, 610)


def wilson(right: Sequence[bool]) -> list[float]:
    """The share and its interval of 95 %."""
    n, share, z = len(right), sum(right) / len(right), 1.959964
    middle, half = share + z**2 / 2 / n, z * sqrt(share * (1 - share) / n + (z / 2 / n) ** 2)
    return [share, *((middle + side) / (1 + z**2 / n) for side in (-half, half))]
