"""What runs tell: `modelcall logs`, and files below `logging.log_dir`."""

from __future__ import annotations

import re
from pathlib import Path

import orjson
import pytest
from project import TASK, A, B, C, Project, some_rows

from modelcall_assets.defs.instance import register
from modelcall_assets.rehearsal import Faults, RehearsalServer

LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \| (DEBUG|INFO|WARNING|ERROR) \| Job\d \| .+")


def files(project: Project) -> list[Path]:
    return sorted((project.root / "logs/rate").glob("*"))


def test_the_last_run_is_told_file_by_file(project: Project) -> None:
    assert project.run("run-task", TASK).code == 0
    ended = project.run("logs", TASK)
    assert ended.code == 0
    lines = ended.out.splitlines()
    assert all(LINE.fullmatch(line) for line in lines), lines
    for name in (A, B, C):
        told = f"| INFO | Job0 | scores: {name}: 4 rows in, 4 succeeded, 0 failed"
        assert [line for line in lines if line.endswith(told)], lines
    assert not (project.root / "logs").exists()
