"""Ten jobs of one task at once on a new home, killed and started again, twenty times."""

from __future__ import annotations

import os
import random

import pytest
from jobs import Jobs
from project import Project

from modelcall_assets.rehearsal import RehearsalServer

ROUNDS = int(os.environ.get("ROUNDS", "20"))


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_all_rows_nothing_paid_twice_and_a_sound_home(
    project: Project, server: RehearsalServer, seed: int
) -> None:
    Jobs(project, server, jobs=10, rows=40).round(random.Random(seed))
