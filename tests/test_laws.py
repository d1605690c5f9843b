"""The three laws, on real processes, files and HTTP.

Conservation: rows in = succeeded + failed. Resume: kill anywhere, nothing finished is paid twice.
Order: output order = input order.
"""

import asyncio
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelcall_assets.config.catalog import load_task
from modelcall_assets.journal.segments import open_segment, segment_paths
from modelcall_assets.llm.channel import Channel
from modelcall_assets.llm.engine import Engine
from modelcall_assets.llm.limiter import Limits
from modelcall_assets.llm.transport import Reply
from modelcall_assets.rehearsal import Faults, serve_in_thread
from modelcall_assets.stages.answer_columns import VOLATILE_COLUMNS
from modelcall_assets.stages.progress import Tally
from modelcall_assets.stages.stage import Run
from modelcall_assets.stages.task import Task

IN_FLIGHT = 16
DEADLINE_S = 120

TASK = """
task_name: laws
data: {input_folder: in, output_folder: out}
model: {config_path: configs/models/rehearsal.yaml}
prompt: {config_path: configs/prompts/rating.yaml}
concurrency: {max_concurrent_requests: 16, max_concurrent_files: 3}
retry: {max_repair_turns: REPAIRS}
max_failure_rate: 1
"""
MODEL = """
client_config: {base_url: "${REHEARSAL_BASE_URL}", api_key: not-needed, timeout: 30, max_retries: 8}
chat_config: {model: rehearsal-rater-1, temperature: 0}
"""
PROMPT = """
prompt_template: {prompt_text: "Rate this: {text}"}
output_config:
  require_json: true
  json_keys: [score, quality_tags]
  json_schema:
    properties:
      score: {type: integer, minimum: 1, maximum: 5}
      quality_tags: {type: array, items: {type: string}}
    required: [score]
"""


def make_project(root: Path, files: int = 3, rows: int = 120, repairs: int = 2) -> Path:
    """A task over JSONL and Parquet files whose texts are all different. Gives the task file."""
    for name, text in {
        "configs/tasks/laws.yaml": TASK.replace("REPAIRS", str(repairs)),
        "configs/models/rehearsal.yaml": MODEL,
        "configs/prompts/rating.yaml": PROMPT,
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "in").mkdir()
    for file in range(files):
        data = [
            {
                "id": f"{file}-{row}",
                "text": f"def f_{file}_{row}(x):\n    '''Doc.'''\n" * (row % 9 + 1),
            }
            for row in range(rows)
        ]
        if file % 2:
            pq.write_table(pa.Table.from_pylist(data), root / "in" / f"{file}.parquet")
        else:
            lines = b"".join(orjson.dumps(row) + b"\n" for row in data)
            (root / "in" / f"{file}.jsonl").write_bytes(lines)
    return root / "configs/tasks/laws.yaml"


def start_run(root: Path, base_url: str) -> subprocess.Popen[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("DAGSTER")}
    return subprocess.Popen(
        [sys.executable, "-m", "modelcall", "run-task", "configs/tasks/laws.yaml"],
        cwd=root,
        env={**env, "REHEARSAL_BASE_URL": base_url},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish_run(root: Path, base_url: str) -> str:
    process = start_run(root, base_url)
    output, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, output
    return output


def ids_in(path: Path) -> list[str]:
    if path.suffix == ".parquet":
        return pq.read_table(path, columns=["id"]).column("id").to_pylist()
    return [orjson.loads(line)["id"] for line in path.read_bytes().splitlines()]


def outputs(root: Path) -> dict[str, pa.Table]:
    return {path.stem: pq.read_table(path) for path in sorted((root / "out").glob("*.parquet"))}


def stable(table: pa.Table) -> list[dict]:
    return table.drop_columns(list(VOLATILE_COLUMNS)).to_pylist()


def journalled_turns(root: Path) -> Counter[tuple]:
    """How often each address and turn was answered and written down, between two publishes: what
    failed may be tried again after one (a kill can come just before Dagster notes it)."""
    counts: Counter[tuple] = Counter()
    for folder in (root / "out/.modelcall/laws/journal/scores").iterdir():
        published = 0
        for segment in segment_paths(folder):
            for _, _, text in open_segment(segment).lines():
                line = orjson.loads(text)
                published += "sealed" in line
                if "k" in line:
                    address = line["k"], line.get("o", 0), line.get("t", 0)
                    counts[folder.name, published, *address] += 1
    return counts


def assert_rows_in_place(root: Path) -> None:
    """Every input row is there once, in its place, as success or failure and nothing else."""
    tables = outputs(root)
    for path in sorted((root / "in").iterdir()):
        table = tables[path.stem]
        assert table.column("id").to_pylist() == ids_in(path)
        for row in table.to_pylist():
            if row["api_status"] == "success":
                assert row["api_fail_reason"] is None
                assert 1 <= row["score"] <= 5
                assert str(row["score"]) in row["api_return"]
            else:
                assert row["api_status"] == "error"
                assert row["api_fail_reason"]
                assert row["score"] is None and row["quality_tags"] is None


def test_kill_9_at_random_moments_pays_nothing_twice(tmp_path):
    """The faults are permanent ones, so that a record has the same answers however often asked."""
    faults = Faults(latency_ms=25, rate_truncated=0.05, rate_filtered=0.02, rate_400=0.02)
    calm, disturbed = tmp_path / "calm", tmp_path / "disturbed"
    make_project(calm)
    make_project(disturbed)
    with serve_in_thread(faults) as server:
        finish_run(calm, server.base_url)
        undisturbed = server.stats()
        server.reset()
        kills, chance = 0, random.Random(20)
        while kills < 3:
            process = start_run(disturbed, server.base_url)
            seen = server.stats()["requests"] + chance.randint(1, 100)
            deadline = time.monotonic() + DEADLINE_S
            while process.poll() is None and server.stats()["requests"] < seen:
                assert time.monotonic() < deadline
                time.sleep(0.002)
            if process.poll() is not None:
                break
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += 1
        finish_run(disturbed, server.base_url)
        stats = server.stats()
    assert kills == 3
    assert set(journalled_turns(disturbed).values()) == {1}
    assert stats["repeated_ok"] <= kills * IN_FLIGHT
    assert stats["requests"] <= undisturbed["requests"] + kills * IN_FLIGHT
    assert_rows_in_place(disturbed)
    before, after = outputs(calm), outputs(disturbed)
    assert {name: stable(table) for name, table in before.items()} == {
        name: stable(table) for name, table in after.items()
    }


@pytest.mark.parametrize("repairs", [0, 2])
def test_every_kind_of_misbehaviour_ends_as_rows_with_true_reasons(tmp_path, repairs):
    make_project(tmp_path, repairs=repairs)
    faults = Faults(
        rate_429=0.05,
        retry_after_s=0.4,
        rate_500=0.05,
        rate_drop=0.02,
        rate_400=0.01,
        rate_malformed=0.03,
        rate_truncated=0.01,
        seed=3,
    )
    with serve_in_thread(faults) as server:
        finish_run(tmp_path, server.base_url)
        stats = server.stats()
    assert_rows_in_place(tmp_path)
    reasons = Counter(
        row["api_fail_reason"]
        for table in outputs(tmp_path).values()
        for row in table.to_pylist()
        if row["api_status"] == "error"
    )
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


class ScriptedEndpoint:
    """Answers by a pure function of the request and how often it came; stops dead on demand."""

    name = "scripted"

    def __init__(self, seed: int, fault_rate: float, stop_after: int | None = None) -> None:
        self.seed, self.fault_rate, self.stop_after = seed, fault_rate, stop_after
        self.sent: Counter[bytes] = Counter()
        self.answered: Counter[bytes] = Counter()
        self.killed = asyncio.Event()

    async def __aenter__(self):
        return self

    async def __aexit__(self, *error):
        return None

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
        choice = {
            "message": {"content": content},
            "finish_reason": chance.choice(["stop"] * 5 + ["length"]),
        }
        return Reply(200, {}, orjson.dumps({"choices": [choice]}))


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    fault_rate=st.sampled_from([0.0, 0.05, 0.3]),
    kill_points=st.lists(st.integers(0, 60), max_size=3),
    torn_bytes=st.integers(0, 40),
)
def test_laws_hold_for_random_faults_and_kill_points(seed, fault_rate, kill_points, torn_bytes):
    """A kill leaves what was written, perhaps with a torn last line; all else is forgotten."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        steps = Task(load_task(make_project(root, files=1, rows=40), root))
        steps.stage("raw").make("0.jsonl", Tally())
        lost = 0
        answered: Counter[bytes] = Counter()
        for run, stop_after in enumerate([*kill_points, None]):
            endpoint = ScriptedEndpoint(seed, fault_rate, stop_after)
            report = asyncio.run(score_until_killed(steps, endpoint, f"run{run:08d}"))
            answered += endpoint.answered
            if report is not None:
                break
            lost += IN_FLIGHT + tear_last_line(root, torn_bytes)
        assert report is not None
        assert report.rows == 40 == report.ok + report.failed
        assert sum(count - 1 for count in answered.values()) <= lost
        table = outputs(root)["0"]
        assert table.column("id").to_pylist() == ids_in(root / "in/0.jsonl")
        assert table.column("api_status").to_pylist().count("success") == report.ok


async def score_until_killed(steps: Task, endpoint: ScriptedEndpoint, run_id: str):
    """The report, or None when the endpoint said that the process is dead by now."""
    channel = Channel(endpoint, Limits(IN_FLIGHT))
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


def tear_last_line(root: Path, torn_bytes: int) -> int:
    """Cut bytes off the newest segment as a power loss could; gives how many replies that cost."""
    folder = root / "out/.modelcall/laws/journal/scores/0.jsonl"
    segments = segment_paths(folder)
    if not segments or not torn_bytes:
        return 0
    data = segments[-1].read_bytes()
    keep = max(data.rfind(b"\n", 0, len(data) - 1) + 1, len(data) - torn_bytes)
    segments[-1].write_bytes(data[:keep])
    return 1
