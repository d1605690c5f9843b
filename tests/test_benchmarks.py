"""What the benchmarks write; acceptance/, which runs them, finds what it imports."""

import re
from importlib import import_module
from pathlib import Path

import pytest

from benchmarks import report

ROOT = Path(__file__).parent.parent


PARTS = {
    f"{folder}.{path.stem}"
    for folder in ("benchmarks", "acceptance")
    for path in (ROOT / folder).glob("*.py")
} - {"benchmarks.old_preprocess"}
"""That one needs what the old system did."""


@pytest.mark.parametrize("module", sorted(PARTS))
def test_every_part_finds_what_it_imports(module: str) -> None:
    import_module(module)


def results() -> dict:
    client = dict.fromkeys(
        ("cpu_s_per_1k", "wall_s_per_1k", "cpu_of_engine", "efficiency", "rss_mb", "before_s",
         "before_cpu_s", "after_s", "after_cpu_s", "rows", "max_in_flight"), 0.5,
    )  # fmt: skip
    clients = {name: {**client, "cpu_s_per_1k": n / 9} for n, name in enumerate(report.NAMES)}
    part = {"command": "c", "date": "d", "machine": "m"}
    scenario = {"in_flight": 8, "latency_ms": 5, "clients": clients}
    return {"compare": {**part, "results": [scenario]}}


def test_the_page_is_renewed_between_its_marks(tmp_path):
    page = tmp_path / "page.md"
    marked = "<!-- begin compare -->\nold\n<!-- end compare -->\nprose\n"
    page.write_text(marked + marked.replace("compare", "dagster"))
    report.write(page, results())
    once = page.read_text()
    assert "old" not in once
    assert once.count("prose") == 2
    report.write(page, results())
    assert page.read_text() == once
    plot = page.with_suffix(".svg").read_text()
    assert all(name.replace("`", "") in plot for name in report.NAMES.values())
    page.write_text("no place")
    with pytest.raises(RuntimeError, match="compare"):
        report.write(page, results())


def test_the_page_has_a_place_for_every_block():
    marks = re.findall(r"<!-- begin (\w+) -->\n", (ROOT / "docs/performance.md").read_text())
    assert sorted(marks) == sorted([*report.TABLES, "margin"])
