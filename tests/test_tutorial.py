"""The tutorial, typed as it is printed, into a shell whose environment and folder are empty."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from urllib.request import urlopen

import pytest
from pages import ROOT, blocks
from project import until
from s3_server import free_ports

ENGLISH, CHINESE = (blocks(ROOT / f"docs/tutorial{of}.md", "console") for of in ("", ".zh-CN"))
UI = "modelcall ui --rehearse"
MARK = "== block =="
NOT_OURS = ("PYTHONPATH", "VIRTUAL_ENV", "DAGSTER_HOME", "REHEARSAL_BASE_URL")


def _commands(texts: list[str]) -> list[str]:
    """Without the lines of the files that they write."""
    return [re.sub(r"^\{.*\n", "", text, flags=re.MULTILINE) for text in texts]


def test_it_is_the_same_in_both_languages() -> None:
    assert _commands(ENGLISH) == _commands(CHINESE)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_its_commands_do_what_it_says(tmp_path: Path) -> None:
    wheels = _built(tmp_path)
    links = f"{os.environ.get('PIP_FIND_LINKS', '')} {wheels}".strip()
    env = {name: value for name, value in os.environ.items() if name not in NOT_OURS}
    env |= {"PIP_FIND_LINKS": links, "COLUMNS": "80", "PYTHONUTF8": "1"}
    install, *english = ENGLISH
    for language, texts in (("en", [install, *english]), ("zh", CHINESE)):
        (folder := tmp_path / language).mkdir()
        if language == "zh":  # the same environment
            (folder / ".venv").symlink_to(tmp_path / "en" / ".venv")
            texts = [texts[0].replace("python3 -m venv .venv\n", ""), *texts[1:]]
        *typed, last = texts
        assert last.rstrip().endswith(UI)
        script = f"\necho '{MARK}'\n".join([*typed, last.replace(UI, "")])
        ended = subprocess.run(
            ["bash", "-e"], input=script.encode(), cwd=folder, env=env, capture_output=True
        )
        told = ended.stdout.decode()
        assert ended.returncode == 0, told + ended.stderr.decode()
        _, rehearsed, again, written, created, looked, run, mended, shown = told.split(MARK)
        assert "10 rows, 10 succeeded" in rehearsed and "nothing to do" in again
        assert not written.strip() and "configs/tasks/notes.yaml" in created
        assert "second.jsonl" in looked and "── row 2 ──" in looked
        assert "bad_line" in run and "missing_input" in run and "n3" in run
        assert "6 rows, 6 succeeded" in mended
        project = folder / "my_project"
        assert "exported" in shown and [*project.rglob("notes*_report.html")]
        _look_at_the_ui(project, env)


def _built(folder: Path) -> Path:
    """A folder with the wheel, made by way of the sdist, far from what the checkout has built."""
    source, wheels = folder / "source", folder / "wheels"
    for name in ("modelcall_assets", "configs"):
        shutil.copytree(ROOT / name, source / name, symlinks=True)
    for file in filter(Path.is_file, ROOT.iterdir()):
        shutil.copy(file, source)
    build = "from setuptools import build_meta as b; b.build_{}({!r})"
    for what, where in (("sdist", source), ("wheel", folder / "unpacked")):
        command = [sys.executable, "-c", build.format(what, str(wheels))]
        subprocess.run(command, cwd=where, check=True, capture_output=True)
        if what == "sdist":
            (packed,) = wheels.glob("*.tar.gz")
            shutil.unpack_archive(packed, wheels, filter="data")
            packed.unlink()
            next(wheels.iterdir()).rename(folder / "unpacked")
    return wheels


def _look_at_the_ui(project: Path, env: dict[str, str]) -> None:
    (port,) = free_ports(1)
    typed = f". ../.venv/bin/activate; exec {UI} --port {port}"
    with (project / "ui.log").open("wb") as log:
        ui = subprocess.Popen(["bash", "-c", typed], cwd=project, env=env, stdout=log, stderr=log)
    try:
        address = f"http://127.0.0.1:{port}"
        until(lambda: address in (project / "ui.log").read_text(), 120, 0.25)
        with urlopen(address) as page:
            assert b"Dagster" in page.read()
    finally:
        ui.send_signal(signal.SIGINT)
        assert ui.wait(60) in (0, 130), (project / "ui.log").read_text()
