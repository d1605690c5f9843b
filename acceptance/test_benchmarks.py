"""The benchmarks run and count right; how fast anything is, is not looked at."""

import json
import subprocess
import sys
from pathlib import Path

from benchmarks import report
from benchmarks.conversion import BARE, PROGRAMS
from benchmarks.speed import ASSET, ENGINE, LOOPS

ROOT = Path(__file__).parent.parent


def run(part: str, results: Path) -> tuple[dict, str]:
    command = [sys.executable, "-m", "benchmarks", part, "--quick", "--results", str(results)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(results.read_text())[part]["results"], done.stdout


def test_every_client_does_the_job(tmp_path):
    ((scenario), *_), printed = run("compare", tmp_path / "results.json")
    assert set(scenario["clients"]) == {ENGINE, ASSET, *LOOPS}
    for name, found in scenario["clients"].items():
        assert f"| {report.NAMES[name]} | {found['rows']} |" in printed
        assert 1 < found["max_in_flight"] <= scenario["in_flight"], "a busy machine has fewer"
        assert 0 < found["efficiency"] <= 1


def test_bad_days_leave_complete_files(tmp_path):
    found, _ = run("robustness", tmp_path / "results.json")
    assert found["busy"]["rows"] == "100 of 100 rows, 100 answered, in input order"
    assert found["busy"]["early_retries"] == 0
    assert found["refused"]["rows"].startswith("100 of 100 rows,")
    assert found["refused"]["retried_bad_request"] == 0
    assert found["killed"]["rows"] == "600 of 600 rows, 600 answered, in input order"
    assert set(found["shared"]) == {"ended", "killed"}


def test_conversations_are_converted_and_merged(tmp_path):
    found, printed = run("conversion", tmp_path / "results.json")
    assert list(found["programs"]) == list(PROGRAMS) == list(report.CONVERSIONS)
    assert found["rows"] * 1500 < 2**20 < found["rows"] * 3000
    assert found["programs"][BARE]["of_bare"] == 1
    for name, program in found["programs"].items():
        assert f"| {report.CONVERSIONS[name]} | {program['per_cpu_s']:,.0f} |" in printed
        assert all(peak > 5 for peak in program["rss_mb"])


def test_files_are_read_and_listings_too(tmp_path):
    found, printed = run("storage", tmp_path / "results.json")
    assert list(found["programs"]) == list(report.STORAGE)
    assert found["programs"]["bare"]["of_bare"] == 1
    for name, program in found["programs"].items():
        assert f"| {report.STORAGE[name]} | {program['rows_per_s']:,.0f} |" in printed
        assert all(5 < peak < found["bound_mb"] for peak in program["rss_mb"])
    assert [took["rows"] for took in found["listings"].values()] == [1500, 3000]


def test_texts_are_cut_and_no_row_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("OLD_PYTHON", str(tmp_path / "nowhere"))
    found, printed = run("preprocess", tmp_path / "results.json")
    assert list(found["corpora"]) == ["code", "Chinese"]
    for kind, corpus in found["corpora"].items():
        assert f"| 6 MB of {kind}, {corpus['rows']:,} records | MB per CPU s |" in printed
        assert list(corpus["programs"]) == list(report.PREPROCESS)
        assert corpus["programs"].pop("old") is None
        assert corpus["programs"]["tokenizer"]["of_tokenizer"] == 1
        assert corpus["programs"]["stage"]["of_one_process"] == 1
        for name, program in corpus["programs"].items():
            label = report.PREPROCESS[name].format(processes=found["processes"])
            assert f"| {label} | {program['mb_per_cpu_s']:.1f} |" in printed
            assert program["rss_mb"] > 5
            assert (program["child_mb"] > 5) == (name == "stage_shared" and found["processes"] > 1)
    assert printed.count(f"| {report.NOT_INSTALLED} | not installed |") == 2


def test_many_files_are_all_made_and_told(tmp_path):
    found, printed = run("files", tmp_path / "results.json")
    seen = found["this commit"]
    assert seen["killed"]["statuses"] == [{"MATERIALIZED": 20}] * 2
    assert 0 <= seen["killed"]["more_per_kill"] <= 256
    assert seen["failures"]["requests"] > 0
    assert 0 < seen["started"]["dagster_s"] < seen["started"]["again_s"]
    assert "| 20 files × 5 rows: first request |" in printed


def test_very_many_files_are_listed_and_a_few_are_made(tmp_path):
    found, printed = run("large", tmp_path / "results.json")
    assert found["files"] == 200
    assert all(used["rss_mb"] > 5 and used["cpu_s"] > 0 for used in found["commands"].values())
    assert "| 200 files of one task | wall |" in printed
