"""The three laws, on real processes, files and HTTP.

Conservation: rows in = succeeded + failed. Resume: kill anywhere, nothing finished is paid twice.
Order: output order = input order.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import tempfile
from collections import Counter
from pathlib import Path

import orjson
import pytest
from endpoint import WithoutNetwork, completion
from hypothesis import given, settings
from hypothesis import strategies as st
from project import TASK, Project, Row, read_rows, stable

from modelcall_assets.journal.segments import open_segment, segment_paths
from modelcall_assets.llm import Engine
from modelcall_assets.llm.channel import Channel
from modelcall_assets.llm.classify import Reply
from modelcall_assets.rehearsal import Faults, RehearsalServer
from modelcall_assets.stages import Run
from modelcall_assets.stages.report import Tally
from modelcall_assets.stages.task import Task

pytestmark = pytest.mark.slow

IN_FLIGHT = 16


def write_files(project: Project, files: int = 3, rows: int = 120, repairs: int = 2) -> None:
    """A task over JSONL and Parquet files whose texts are all different."""
    project.write_task(
        {
            "concurrency": {
                "max_concurrent_requests": IN_FLIGHT,
                "max_concurrent_files": 3,
                "files_per_run": 1,
            },
            "retry": {"max_repair_turns": repairs},
            "max_failure_rate": 1,
        }
    )
    project.write_model({"client_config": {"timeout": 30, "max_retries": 8}})
    for file in range(files):
        codes = [f"def f_{file}_{row}(x):\n    '''Doc.'''\n" for row in range(rows)]
        texts = [{"id": f"{file}-{n}", "text": code * (n % 9 + 1)} for n, code in enumerate(codes)]
        project.write_input(f"{file}.parquet" if file % 2 else f"{file}.jsonl", texts)


def scores(project: Project) -> dict[str, list[Row]]:
    return {path.name: project.scores(path.name) for path in inputs(project)}


def inputs(project: Project) -> list[Path]:
    return sorted(project.input_folder.iterdir())


def journalled_turns(project: Project) -> Counter[tuple]:
    """How often each address and turn was answered and written down, between two publishes: what
    failed may be tried again after one (a kill can come just before Dagster notes it)."""
    counts: Counter[tuple] = Counter()
    for path in inputs(project):
        published = 0
        for segment in segment_paths(project.journal(path.name)):
            for _, _, text in open_segment(segment).lines():
                line = orjson.loads(text)
                published += "sealed" in line
                if "k" in line:
                    address = line["k"], line.get("o", 0), line.get("t", 0)
                    counts[path.name, published, *address] += 1
    return counts


def assert_rows_in_place(project: Project) -> None:
    """Every input row is there once, in its place, as success or failure and nothing else."""
    for path in inputs(project):
        rows = project.scores(path.name)
        assert [row["id"] for row in rows] == [row["id"] for row in read_rows(path)]
        for row in rows:
            if row["api_status"] == "success":
                assert row["api_fail_reason"] is None
                assert 1 <= row["score"] <= 5
                assert str(row["score"]) in row["api_return"]
            else:
                assert row["api_status"] == "error"
                assert row["api_fail_reason"]
                assert row["score"] is None and row["quality_tags"] is None


def test_kill_9_at_random_moments_pays_nothing_twice(bare: Project, server: RehearsalServer):
    """The faults are permanent ones, so that a record has the same answers however often asked."""
    server.set_faults(Faults(latency_ms=25, rate_truncated=0.05, rate_filtered=0.02, rate_400=0.02))
    write_files(bare)
    assert bare.run("run-task", bare.task_file).code == 0
    undisturbed, calm = server.stats(), scores(bare)
    server.reset()
    bare.task_file.unlink()
    bare.task = "disturbed"
    write_files(bare)
    chance = random.Random(20)
    for _ in range(3):
        seen = server.stats()["requests"] + chance.randint(1, 100)
        bare.signalled(
            lambda seen=seen: server.stats()["requests"] >= seen, "run-task", bare.task_file
        )
    assert bare.run("run-task", bare.task_file).code == 0
    stats = server.stats()
    assert set(journalled_turns(bare).values()) == {1}
    assert stats["repeated_ok"] <= 3 * IN_FLIGHT
    assert stats["requests"] <= undisturbed["requests"] + 3 * IN_FLIGHT
    assert_rows_in_place(bare)
    assert {name: stable(rows) for name, rows in calm.items()} == {
        name: stable(rows) for name, rows in scores(bare).items()
    }


@pytest.mark.parametrize("repairs", [0, 2])
def test_every_kind_of_misbehaviour_ends_as_rows_with_true_reasons(
    bare: Project, server: RehearsalServer, repairs: int
):
    write_files(bare, repairs=repairs)
    server.set_faults(
        Faults(
            rate_429=0.05,
            retry_after_s=0.4,
            rate_500=0.05,
            rate_drop=0.02,
            rate_400=0.01,
            rate_malformed=0.03,
            rate_truncated=0.01,
            seed=3,
        )
    )
    assert bare.run("run-task", TASK).code == 0
    stats = server.stats()
    assert_rows_in_place(bare)
    rows = itertools.chain.from_iterable(scores(bare).values())
    reasons = Counter(row["api_fail_reason"] for row in rows if row["api_status"] == "error")
    assert stats["statuses"]["429"] and stats["statuses"]["500"] and stats["dropped"]
    assert stats["malformed"] and stats["truncated"]
    assert stats["early_retries"] == 0
    assert stats["retried_bad_request"] == 0
    assert reasons["bad_request"] == stats["statuses"]["400"] > 0
    if repairs:
        assert set(reasons) == {"bad_request"}
    else:
        assert reasons["truncated"] == stats["truncated"]
        mistakes = {"empty", "not_an_object", "missing_keys", "wrong_value"}
        assert sum(reasons[each] for each in mistakes) == stats["malformed"]
        assert set(reasons) <= mistakes | {"bad_request", "truncated"}


class Seeded(WithoutNetwork):
    """Answers by a pure function of the request and how often it came; stops dead on demand."""

    def __init__(self, seed: int, fault_rate: float, stop_after: int | None = None) -> None:
        self.seed, self.fault_rate, self.stop_after = seed, fault_rate, stop_after
        self.sent: Counter[bytes] = Counter()
        self.answered: Counter[bytes] = Counter()
        self.killed = asyncio.Event()

    async def send(self, payload: bytes) -> Reply:
        if self.stop_after is not None and sum(self.sent.values()) >= self.stop_after:
            self.killed.set()
            await asyncio.Event().wait()
        self.sent[payload] += 1
        chance = random.Random(f"{self.seed}{payload!r}{self.sent[payload]}")
        for _ in range(chance.randint(0, 3)):
            await asyncio.sleep(0)
        soon = {"retry-after": "0"}
        if chance.random() < self.fault_rate:
            return Reply(*chance.choice([(500, soon, b""), (429, soon, b"")]))
        if chance.random() < self.fault_rate / 4:
            return Reply(400, {}, b'{"error": {"message": "no", "code": "bad"}}')
        self.answered[payload] += 1
        content = chance.choice(
            ['{"score": 3}', '{"score": 4, "quality_tags": ["a"]}', "{}", "", "x"]
        )
        finish = chance.choice(["stop"] * 5 + ["length"])
        return Reply(200, {}, orjson.dumps(completion(finish, content=content)))


@settings(max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    fault_rate=st.sampled_from([0.0, 0.05, 0.3]),
    kill_points=st.lists(st.integers(0, 60), max_size=3),
    torn_bytes=st.integers(0, 40),
)
def test_laws_hold_for_random_faults_and_kill_points(seed, fault_rate, kill_points, torn_bytes):
    """A kill leaves what was written, perhaps with a torn last line; all else is forgotten."""
    with tempfile.TemporaryDirectory() as folder:
        project = Project(Path(folder))
        write_files(project, files=1, rows=40)
        project.write_model({"client_config": {"base_url": "http://127.0.0.1:1/v1"}})
        project.write_prompt()
        steps = project.steps()
        steps.stage("raw").make("0.jsonl", Tally())
        lost = 0
        answered: Counter[bytes] = Counter()
        for run, stop_after in enumerate([*kill_points, None]):
            endpoint = Seeded(seed, fault_rate, stop_after)
            report = asyncio.run(score_until_killed(steps, endpoint, f"run{run:08d}"))
            answered += endpoint.answered
            if report is not None:
                break
            lost += IN_FLIGHT + tear_last_line(project.journal("0.jsonl"), torn_bytes)
        assert report is not None
        assert report.rows == 40 == report.ok + report.failed
        assert sum(count - 1 for count in answered.values()) <= lost
        rows = project.scores("0.jsonl")
        assert [row["id"] for row in rows] == [
            row["id"] for row in read_rows(project.input_folder / "0.jsonl")
        ]
        assert [row["api_status"] for row in rows].count("success") == report.ok


async def score_until_killed(steps: Task, endpoint: Seeded, run_id: str):
    """The report, or None when the endpoint said that the process is dead by now."""
    channel = Channel(endpoint, IN_FLIGHT)
    async with Engine([channel], max_in_flight=IN_FLIGHT, max_retries=50) as engine:
        work = asyncio.ensure_future(
            steps.stage("scores").answer("0.jsonl", engine, Run(run_id, Tally()))
        )
        killed = asyncio.ensure_future(endpoint.killed.wait())
        done, pending = await asyncio.wait({work, killed}, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
    return work.result() if work in done else None


def tear_last_line(folder: Path, torn_bytes: int) -> int:
    """Cut bytes off the newest segment as a power loss could; gives how many replies that cost."""
    segments = segment_paths(folder)
    if not segments or not torn_bytes:
        return 0
    data = segments[-1].read_bytes()
    keep = max(data.rfind(b"\n", 0, len(data) - 1) + 1, len(data) - torn_bytes)
    segments[-1].write_bytes(data[:keep])
    return 1
