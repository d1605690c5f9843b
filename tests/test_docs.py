"""The documentation says what is true: commands exist, examples run, links lead somewhere."""

import re
import shlex
import shutil
import subprocess

import pytest
import yaml
from click.testing import CliRunner
from pages import ROOT, blocks, write_examples

from modelcall_assets.cli.main import modelcall
from modelcall_assets.config.catalog import load_catalog, load_task
from modelcall_assets.records.outcome import Reason
from modelcall_assets.stages.responses import OWN_COLUMNS
from modelcall_assets.stages.score_table import API_FIELDS, VOLATILE_COLUMNS

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TRACKED = subprocess.run(
    ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
).stdout.splitlines()


def commands() -> list[str]:
    lines = [
        line for page in PAGES for block in blocks(page, "console") for line in block.splitlines()
    ]
    return [line.split("#")[0].strip() for line in lines]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    found = re.findall(r"\]\(([^)#]+)\)|src(?:set)?=\"(.+?)\"", page.read_text())
    local = [target for each in found for target in each if target and "://" not in target]
    assert [target for target in local if not (page.parent / target).exists()] == []


def test_make_targets_exist():
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = {
        target for page in PAGES for target in re.findall(r"`?make ([a-z]+)\b", page.read_text())
    }
    assert {"demo", "test", "ui"} <= named <= set(targets)


@pytest.mark.parametrize("command", [line for line in commands() if line.startswith("modelcall")])
def test_commands_are_understood(command):
    """Every command and option that the pages show is one that the command line has."""
    for part in command.split(" -- "):
        name, *arguments = shlex.split(part)[1:]
        result = CliRunner().invoke(modelcall, [name, "--help"])
        assert result.exit_code == 0
        options = [argument for argument in arguments if argument.startswith("--")]
        assert [option for option in options if option not in result.output] == []


def test_the_readme_task_is_valid(tmp_path):
    (tmp_path / "configs").mkdir()
    for folder in ("models", "prompts"):
        (tmp_path / "configs" / folder).symlink_to(ROOT / "configs" / folder)
    task = tmp_path / "configs/tasks/my_corpus.yaml"
    task.parent.mkdir()
    task.write_text(blocks(ROOT / "README.md", "yaml")[0])
    assert yaml.safe_load(task.read_text())["task_name"] == "my_corpus"
    assert load_task(task, tmp_path).warnings == ()


def test_the_examples_of_distillation_are_valid(tmp_path):
    for folder in ("models", "prompts", "distillation"):
        shutil.copytree(ROOT / "configs" / folder, tmp_path / "configs" / folder)
    write_examples(ROOT / "docs/distillation.md", tmp_path)
    catalog = load_catalog(tmp_path)
    assert not catalog.broken
    found = {spec.name: spec for spec in catalog.tasks}
    assert set(found) == {"my_answers", "my_conversations", "my_merge", "my_talks"}
    assert [spec.warnings for spec in found.values()] == [()] * 4
    assert found["my_merge"].link.spec.name == "my_conversations"


def test_every_column_of_the_answers_is_documented():
    page = (ROOT / "docs/distillation.md").read_text()
    assert [name for name in OWN_COLUMNS if f"`{name}`" not in page] == []
    named = set(re.findall(r"`(api_\w+)`", page))
    assert named <= set(OWN_COLUMNS)


def test_every_column_and_reason_is_documented():
    page = (ROOT / "docs/scores.md").read_text()
    assert [name for name, _ in API_FIELDS if f"`{name}`" not in page] == []
    assert [reason for reason in Reason if f"`{reason}`" not in page] == []
    rows = [line for line in page.splitlines() if "volatile |" in line]
    documented = {name for row in rows for name in re.findall(r"`(api_\w+)`", row)}
    assert documented == set(VOLATILE_COLUMNS)


def test_the_lock_names_no_host_and_hashes_everything():
    lock = (ROOT / "requirements.lock").read_text()
    assert "://" not in lock
    pins = re.findall(r"^[a-z0-9].*==.*$", lock, re.MULTILINE)
    assert len(pins) > 80
    assert all(pin.endswith("\\") for pin in pins)


@pytest.mark.skipif(not TRACKED, reason="not a git checkout")
def test_nothing_committed_names_a_registry_or_a_machine():
    hosts = re.compile(
        "|".join(("py" + r"pi\.org", "python" + "hosted", "npm" + r"js\.", "/wo" + "rk/"))
    )
    texts = {
        name: (ROOT / name).read_text(errors="replace")
        for name in TRACKED
        if (ROOT / name).is_file() and not name.endswith(".png")
    }
    assert [name for name, text in texts.items() if hosts.search(text)] == []
    assert not any(name.endswith("uv.lock") for name in texts)
