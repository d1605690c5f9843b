"""The package as others install it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from modelcall_assets.rehearsal import RehearsalServer

ROOT = Path(__file__).parent.parent


def test_a_wheel_by_way_of_the_sdist_is_all_one_needs(
    tmp_path: Path, server: RehearsalServer
) -> None:
    """Installed into an empty environment, far from the repository."""
    here = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment = {**here, "REHEARSAL_BASE_URL": server.base_url, "PIP_NO_INPUT": "1"}

    def run(*command: str | Path, cwd: Path = tmp_path) -> str:
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    source = tmp_path / "source"
    for name in ("modelcall_assets", "configs"):
        shutil.copytree(ROOT / name, source / name, symlinks=True)
    for file in filter(Path.is_file, ROOT.iterdir()):
        shutil.copy(file, source)
    build = "from setuptools import build_meta as b; b.build_{}({!r})"
    run(sys.executable, "-c", build.format("sdist", str(tmp_path)), cwd=source)
    (packed,) = tmp_path.glob("*.tar.gz")
    shutil.unpack_archive(packed, tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    run(sys.executable, "-c", build.format("wheel", str(tmp_path)), cwd=unpacked)
    (wheel,) = tmp_path.glob("*.whl")
    run(sys.executable, "-m", "venv", "venv")
    lock = (ROOT / "requirements.lock").read_text()
    pins = re.findall(r"^([a-z0-9._-]+)(?:\[.*?\])?(==[^ ;]+)", lock, re.MULTILINE)
    (tmp_path / "pins.txt").write_text("".join(f"{name}{pin}\n" for name, pin in pins))
    run("venv/bin/python", "-m", "pip", "install", "-q", "-c", "pins.txt", wheel)
    modelcall = tmp_path / "venv/bin/modelcall"
    run(modelcall, "init", "own")
    ran = run(modelcall, "run-task", "configs/tasks/rehearsal.yaml", cwd=tmp_path / "own")
    assert "10 rows, 10 succeeded" in ran
