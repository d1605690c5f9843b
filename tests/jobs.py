"""`modelcall run-task` as several jobs of one task, killed and started again."""

from __future__ import annotations

import random
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from project import Project, some_rows, until

from modelcall_assets.defs.instance import open_instance
from modelcall_assets.rehearsal import Faults, RehearsalServer

IN_FLIGHT = 4
KILLED_WITHIN_S = 3.0


@dataclass
class Jobs:
    """Each of `jobs` has a file of `rows`."""

    project: Project
    server: RehearsalServer
    jobs: int
    rows: int

    def round(self, random_: random.Random) -> None:
        """On a new home, with nothing answered yet: each is killed within three seconds from when
        the first of them opens the home, and started again."""
        home = self._new()
        running = self._start()
        until(lambda: (home / "history").exists())
        begun = time.monotonic()
        waiting = random_.sample(running, len(running))
        for moment in sorted(random_.uniform(0, KILLED_WITHIN_S) for _ in running):
            time.sleep(max(0.0, begun + moment - time.monotonic()))
            waiting.pop().kill()
        killed = [job.communicate() for job in running]
        assert not any("Traceback" in text for pair in killed for text in pair), killed
        ended = [(job, *job.communicate(timeout=300)) for job in self._start()]
        assert all(job.returncode == 0 for job, *_ in ended), [texts for _, *texts in ended]
        self._check()

    def _new(self) -> Path:
        root = self.project.root
        home = root / "dagster_home"
        for folder in (home, root / self.project.inputs, root / "data/rate"):
            shutil.rmtree(folder, ignore_errors=True)
        self.project.write_task({"concurrency": {"max_concurrent_requests": IN_FLIGHT}})
        for number in range(self.jobs):
            name = f"{number:02}.jsonl"
            self.project.write_input(name, some_rows(self.rows, f"file {number}"))
        self.server.reset()
        self.server.set_faults(Faults(latency_ms=20))
        return home

    def _start(self) -> list[subprocess.Popen[str]]:
        size, task = str(self.jobs), str(self.project.task_file)
        share = ("--world-size", size, "--job-index")
        return [
            self.project.start("run-task", task, *share, str(number)) for number in range(self.jobs)
        ]

    def _check(self) -> None:
        stats = self.server.stats()
        rows = self.jobs * self.rows
        again = stats["requests"] - rows
        assert 0 <= again <= self.jobs * IN_FLIGHT, "only what was in flight at a kill"
        for number in range(self.jobs):
            made = self.project.scores(f"{number:02}.jsonl")
            assert [row["id"] for row in made] == [f"file {number}-{n}" for n in range(self.rows)]
            assert {row["api_status"] for row in made} == {"success"}
        with open_instance(self.project.root) as instance:
            files = instance.get_dynamic_partitions("rate/files")
            assert len(files) == self.jobs
            assert not [run for run in instance.get_runs() if not run.is_finished]
