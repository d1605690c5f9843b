"""Whole runs on a real store: killed, cut off, two at a time, and told by every command."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing
from itertools import count
from math import inf
from pathlib import Path
from typing import Any

import dagster as dg
import orjson
import pytest
from botocore.client import BaseClient
from endpoint import Request, in_thread, said, serving
from project import PREPROCESS, QUIET, WORKSPACE, A, Project, merged, some_rows, until
from s3_proxy import S3Proxy
from s3_server import S3Server

from modelcall_assets.defs.instance import open_instance, register
from modelcall_assets.defs.runs import TaskRunner
from modelcall_assets.journal.mirror import journal_files, open_journal
from modelcall_assets.journal.segments import open_segment, segment_paths
from modelcall_assets.rehearsal import Faults, RehearsalServer
from modelcall_assets.stages.task import Task
from modelcall_assets.storage.files import delete, file_digest
from modelcall_assets.storage.listing import exists, list_files
from modelcall_assets.storage.places import RemotePath
from modelcall_assets.storage.publishing import Manifest, claims, read_manifest

ROWS, IN_FLIGHT = 60, 4
LONG_S = 120
"""A busy machine may need it."""
STARTED: list[subprocess.Popen[str]] = []


@pytest.fixture
def proxy(s3_server: S3Server) -> Iterator[S3Proxy]:
    with S3Proxy(s3_server) as running:
        yield running


@pytest.fixture
def client(s3_server: S3Server) -> Iterator[BaseClient]:
    with closing(s3_server.client()) as made:
        yield made


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    """Of what a test that failed has started."""
    yield
    for process in STARTED:
        process.kill()
        process.communicate()
    STARTED.clear()


def reach(project: Project, server: S3Server, endpoint: str = "", **changes: Any) -> None:
    """All URIs of the project are in the store; it is asked twice at most."""
    (project.root / ".env").write_text(f"LAB_KEY={server.key}\nLAB_SECRET={server.secret}\n")
    lab = {
        "prefix": "s3://",
        "endpoint": endpoint or server.endpoint,
        "region": server.region,
        "access_key": "${LAB_KEY}",
        "secret_key": "${LAB_SECRET}",
        "max_attempts": 2,
    }
    content = {"stores": {"lab": lab | changes}, "journal_flush_seconds": 0.1}
    project.write_yaml("storage", content)


def one_file(project: Project, rows: int, **task: Any) -> None:
    """The input is `a.jsonl` alone."""
    shutil.rmtree(project.input_folder)
    project.write_input(A, some_rows(rows))
    own = {"concurrency": {"max_concurrent_requests": IN_FLIGHT}, "max_failure_rate": 1}
    project.write_task(merged(own, task))


def another_machine(project: Project, root: Path, home: Path) -> Project:
    """The same project with nothing in it yet but its configuration and input."""
    made = Project(root)
    shutil.copytree(project.root / "configs", root / "configs")
    shutil.copytree(project.input_folder, root / "data/in")
    shutil.copy(project.root / ".env", root / ".env")
    (root / "workspace.yaml").write_text(WORKSPACE)
    shutil.copytree(home, root / "dagster_home")
    return made


def start(project: Project) -> subprocess.Popen[str]:
    home = str(project.root / "dagster_home")
    env = {**os.environ, "COLUMNS": "200", "DAGSTER_HOME": home}
    STARTED.append(project.start("run-task", str(project.task_file), env=env))
    return STARTED[-1]


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    out, err = process.communicate(timeout=120)
    assert "Traceback" not in out + err, out + err
    return process.returncode, out + err


def published(task: Task, key: str = A, stage: str = "scores") -> Manifest:
    """A manifest that goes with its output."""
    manifest = read_manifest(task.stage(stage).manifest_path(key))
    assert manifest is not None and manifest.output is not None
    assert file_digest(task.layout.place(manifest.output)) == manifest.output_digest
    return manifest


def replies(task: Task, folder: Path, key: str = A) -> Counter[bytes]:
    """What the journal in the store has, as a machine sees it that was never there."""
    with open_journal(task.stage("scores").journal_folder(key), folder, "look", read_only=True):
        (copy,) = (folder / "journals").iterdir()
        segments = map(open_segment, segment_paths(copy))
        lines = (line for segment in segments for line in segment.lines())
        return Counter(line for _, kind, line in lines if kind >= 0)


def in_store(task: Task) -> list[str]:
    """The objects of the journal."""
    return [info.key_path for info in journal_files(task.stage("scores").journal_folder(A))]


def two_minutes_pass(task: Task) -> None:
    """Then the claims of the dead do not count."""
    assert isinstance(task.layout.claims, RemotePath)
    (claim,) = claims(task.layout.claims)
    assert claim.key_path.startswith(f"scores/{A}/")
    delete(claim.place)


class TestKills:
    @pytest.fixture
    def stored(self, project: Project, s3_server: S3Server, bucket: str) -> Project:
        reach(project, s3_server)
        one_file(project, ROWS, data={"output_folder": f"s3://{bucket}/out"})
        return project

    @pytest.mark.parametrize("is_lost", [False, True])
    def test_a_run_that_is_killed_pays_only_what_was_not_flushed(
        self, stored: Project, tmp_path: Path, is_lost: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A machine that is lost takes its scratch folder with it."""
        task, looks = stored.steps(), count()

        def kept() -> int:
            """In the store."""
            return sum(replies(task, tmp_path / f"look{next(looks)}").values())

        script = Stopping()
        with in_thread(serving(script)) as endpoint:
            monkeypatch.setenv("REHEARSAL_BASE_URL", endpoint.url)
            for _ in range(2 if is_lost else 1):
                before, script.limit = kept(), script.asked + 15
                process = start(stored)
                until(lambda before=before: kept() > before, LONG_S)
                process.send_signal(signal.SIGKILL)
                process.communicate()
                if is_lost:
                    shutil.rmtree(stored.root / ".modelcall/journals")
            flushed, asked, answered = kept(), script.asked, script.answered
            script.limit = inf
            code, output = ended(start(stored))
            assert code == 0, output
            again = script.asked - asked
        assert again == ROWS - flushed if is_lost else again <= ROWS - answered + IN_FLIGHT
        assert published(task).ok == ROWS
        assert set(replies(task, tmp_path / "last").values()) == {1}
        in_parts = [name for name in in_store(task) if "@" in name]
        assert in_parts if is_lost else not in_parts, "nobody knows that the machine is lost"
        assert not list((stored.root / ".modelcall/journals").iterdir())

    def test_a_kill_before_the_manifest_leaves_a_partition_that_nobody_takes_for_done(
        self, stored: Project, s3_server: S3Server, proxy: S3Proxy, server: RehearsalServer
    ) -> None:
        reach(stored, s3_server, proxy.endpoint)
        held = proxy.on("PUT", r"manifests/scores/", times=1, hold=True)
        process = start(stored)
        assert held.reached.wait(LONG_S)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        held.release(lose=True)
        task, paid = stored.steps(), server.stats()["requests"]
        assert paid == ROWS
        assert exists(task.stage("scores").output(A))
        assert read_manifest(task.stage("scores").manifest_path(A)) is None
        two_minutes_pass(task)
        code, said = ended(start(stored))
        assert code == 0, said
        assert server.stats()["requests"] == paid
        assert published(task).ok == ROWS

    def test_a_store_that_is_killed_in_the_middle_of_a_publication(
        self,
        stored: Project,
        s3_server: S3Server,
        proxy: S3Proxy,
        server: RehearsalServer,
        client: BaseClient,
        bucket: str,
    ) -> None:
        """And with it the journal: what is not there is on this machine."""
        reach(stored, s3_server, proxy.endpoint)
        held = proxy.on("PUT", r"out/a\.parquet", times=1, hold=True)
        process = start(stored)
        assert held.reached.wait(LONG_S)
        s3_server.kill()
        try:
            held.release()
            code, said = ended(process)
        finally:
            s3_server.start()
        assert code == 1, said
        assert f"s3://{bucket}/out/a.parquet: cannot be written (bucket {bucket}" in said
        assert "check the network, and the store's endpoint and region" in said
        assert s3_server.secret not in said
        task, paid = stored.steps(), server.stats()["requests"]
        assert not exists(task.stage("scores").output(A))
        two_minutes_pass(task)
        code, said = ended(start(stored))
        assert code == 0, said
        assert server.stats()["requests"] == paid == ROWS
        assert published(task).ok == ROWS


class TestTwoRuns:
    def test_the_first_to_end_publishes_and_the_replies_of_both_are_kept(
        self,
        project: Project,
        empty_home: Path,
        tmp_path: Path,
        proxy: S3Proxy,
        s3_server: S3Server,
        bucket: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """On two machines without a disk in common: there the second is refused. All answers are
        there, and differ, before one of them can publish."""
        reach(project, s3_server, proxy.endpoint)
        one_file(project, 8, data={"output_folder": f"s3://{bucket}/out"})
        project.write_model({"client_config": {"max_in_flight": 100, "timeout": LONG_S}})
        other = another_machine(project, tmp_path / "other", empty_home)
        task = project.steps()
        assert isinstance(task.layout.claims, RemotePath)

        def waiting() -> int:
            put = {call.key for call in proxy.calls if call.method == "PUT"}
            return sum("/claims/scores/" in key for key in put)

        with in_thread(serving(Opinions(both=2 * IN_FLIGHT))) as endpoint:
            monkeypatch.setenv("REHEARSAL_BASE_URL", endpoint.url)
            with task.stage("scores").claimed(A):
                proxy.clear()
                processes = [start(project), start(other)]
                until(lambda: waiting() == 2, LONG_S)
                assert len(endpoint.asked) == 16
            results = [ended(process) for process in processes]
            assert sorted(code for code, _ in results) == [0, 1], results
            (loser,) = (said for code, said in results if code == 1)
            assert "rate/scores: another run has published 'a.jsonl' since this one" in loser
            assert "nothing is paid twice" in loser
            assert published(task).ok == 8
            found = replies(task, tmp_path / "look")
            assert (sum(found.values()), set(found.values())) == (16, {1})
            assert claims(task.layout.claims) == []
            third = another_machine(project, tmp_path / "third", empty_home)
            code, said = ended(start(third))
            assert code == 0, said
            assert published(task).ok == 8
            assert len(endpoint.asked) == 16


class Stopping:
    """Answers as many requests as it may, and keeps the others waiting."""

    def __init__(self) -> None:
        self.limit: float = 0
        self.asked = self.answered = 0

    async def __call__(self, request: Request) -> bytes:
        self.asked += 1
        number = self.asked
        while number > self.limit:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        self.answered += 1
        return said(content='{"score": 3}')


class Opinions:
    """Another answer each time that a question is asked; none before `both` were."""

    def __init__(self, both: int) -> None:
        self._often: Counter[str] = Counter()
        self._both = both

    async def __call__(self, request: Request) -> bytes:
        question = request.question
        self._often[question] += 1
        score = 1 + self._often[question]
        while self._often.total() < self._both:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        return said(content=orjson.dumps({"score": score}).decode())


EACH_TIME: Any = {
    **dict.fromkeys(("output", "output_digest", "output_version", "published", "input"), True),
    "detail": {"numbers": {"latency_ms_median", "latency_ms_p95", "rows_per_second"}},
}
"""Of a manifest."""
STAGES = ("raw", "preprocessed", "scores")
FOLDERS = ("input", "preprocessed", "output", "journal")
IN_STORE = dict.fromkeys(FOLDERS, "store")


def places(bucket: str, **where: str) -> Mapping[str, Any]:
    """Each of input, preprocessed, output and journal, in the store or on the disk."""
    at = {
        name: f"s3://{bucket}/{name}" if where[name] == "store" else f"data/{name}"
        for name in FOLDERS
    }
    return {
        "data": {
            "input_folder": at["input"],
            "output_folder": at["output"],
            "journal_folder": at["journal"],
        },
        "preprocess": {**PREPROCESS, "output_folder": at["preprocessed"]},
    }


class TestAnywhere:
    @pytest.fixture
    def stored(
        self, project: Project, s3_server: S3Server, bucket: str, client: BaseClient
    ) -> Project:
        reach(project, s3_server)
        shutil.copytree(project.input_folder, project.root / "data/input")
        for path in sorted((project.input_folder).rglob("*.*")):
            key = f"input/{path.relative_to(project.root / 'data/in')}"
            client.put_object(Bucket=bucket, Key=key, Body=path.read_bytes())
        return project

    def test_stores_and_disks_may_be_mixed(
        self, stored: Project, bucket: str, server: RehearsalServer
    ) -> None:
        """The versions and manifests are the same, but for where they are."""
        here = {"input": "store", "preprocessed": "disk", "output": "disk", "journal": "store"}
        found: list[Any] = []
        for name, each in (("there", IN_STORE), ("here", here)):
            stored.task = name
            changes = places(bucket, **each)
            data = {**changes["data"], "output_folder": changes["data"]["output_folder"] + name}
            stored.write_task({**changes, "data": data})
            with open_instance(stored.root) as instance:
                steps = stored.steps()
                assert TaskRunner(steps, instance).run(register(instance, steps).keys).failed == []
            found.append(results(steps))
        assert found[0] == found[1]
        assert server.stats()["requests"] == 24
        on_disk = {path.name for path in (stored.root / "data").iterdir()}
        assert on_disk == {"in", "input", "preprocessed", "outputhere"}

    def test_dagster_runs_it_without_our_runner_and_no_secret_is_written_down(
        self, stored: Project, s3_server: S3Server, bucket: str, server: RehearsalServer
    ) -> None:
        stored.write_task(places(bucket, **IN_STORE))
        with open_instance(stored.root) as instance:
            keys = register(instance, stored.steps()).keys
            job = stored.definitions().resolve_implicit_global_asset_job_def()
            for key in keys:
                result = job.execute_in_process(
                    instance=instance,
                    partition_key=key,
                    run_config=QUIET,
                )
                assert result.success
            asset = dg.AssetKey(["rate", "scores"])
            assert len(instance.get_materialized_partitions(asset)) == 3
            wrong = stored.root / ".env"
            wrong.write_text(wrong.read_text().replace(s3_server.secret, "a-wrong-secret-4711"))
            job = stored.definitions().resolve_implicit_global_asset_job_def()
            result = job.execute_in_process(
                instance=instance,
                partition_key=keys[0],
                run_config=QUIET,
                raise_on_error=False,
            )
            assert not result.success
        written = [p for p in (stored.root / "dagster_home").rglob("*") if p.is_file()]
        contents = b"".join(path.read_bytes() for path in written)
        assert b"SignatureDoesNotMatch" in contents or b"403: Forbidden" in contents
        for secret in (s3_server.secret, "a-wrong-secret-4711"):
            assert secret.encode() not in contents
        assert server.stats()["requests"] == 12

    def test_every_command_is_at_home_there(
        self,
        stored: Project,
        s3_server: S3Server,
        bucket: str,
        client: BaseClient,
        server: RehearsalServer,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        stored.write_task({**places(bucket, **IN_STORE), "max_failure_rate": 1})
        server.set_faults(Faults(rate_400=0.3, seed=4))
        task = str(stored.task_file)

        def told(*arguments: str) -> str:
            done = stored.run(*arguments)
            assert done.code == 0 and s3_server.secret not in done.told, done
            return done.out

        assert "0 errors" in told("check")
        plan = told("plan", task)
        assert "deep/b.parquet" in plan and "about 12 requests" in plan
        assert client.list_objects_v2(Bucket=bucket)["KeyCount"] == 3, "a plan writes nothing"
        code, run = ended(start(stored))
        assert code == 0, run
        assert "3 of 3 files scored: 12 rows" in run and f"scores: s3://{bucket}/output" in run
        failed = len(told("failures", task, "--json").splitlines())
        assert 0 < failed < 12
        assert f"{failed} of 12 rows failed: bad_request {failed}" in told("failures", task)
        assert "about 0 requests" in told("plan", task)
        told("export", task, "--output", str(tmp_path / "copy"))
        assert sorted(path.name for path in (tmp_path / "copy").rglob("*.*")) != []
        told("report", task, "--output", str(tmp_path / "page.html"))
        assert "first-0" in (tmp_path / "page.html").read_text()
        assert "nothing to delete" in told("clean", task, "--journal-older-than", "1")
        self.leave_things_behind(client, bucket)
        monkeypatch.setattr("modelcall_assets.stages.upkeep.IN_USE_S", -60.0)
        monkeypatch.setattr("modelcall_assets.stages.upkeep._DAY_S", 0.0)
        monkeypatch.setattr(
            "modelcall_assets.stages.upkeep.time.time", lambda: time.monotonic() + 1e10
        )
        cleaned = told("clean", task, "--journal-older-than", "0", "--deleted-inputs", "--yes")
        assert "deleted 7 of 7" in cleaned, cleaned
        assert client.list_multipart_uploads(Bucket=bucket).get("Uploads", []) == []
        left = {info["Key"] for info in client.list_objects_v2(Bucket=bucket)["Contents"]}
        assert not any(
            key.startswith(("journal/rate/journal", "journal/rate/claims")) for key in left
        )
        assert not any("/c." in key for key in left), left

    def leave_things_behind(self, client: BaseClient, bucket: str) -> None:
        """An input is gone; uploads and a claim are left of processes that died."""
        client.delete_object(Bucket=bucket, Key="input/deep/er/c.jsonl")
        for key in ("output/a.parquet", "output/a.parquet", "preprocessed/x.parquet"):
            client.create_multipart_upload(Bucket=bucket, Key=key)
        client.put_object(Bucket=bucket, Key="journal/rate/claims/scores/a.jsonl/0123", Body=b"x")


def results(task: Task) -> dict[str, Any]:
    """What was published: manifests without places, and rows without what differs each time."""
    found: dict[str, Any] = {}
    for stage in STAGES:
        for info in list_files(task.stage(stage).manifest_folder()):
            key = info.key_path.removesuffix(".json")
            manifest = read_manifest(task.stage(stage).manifest_path(key))
            assert manifest is not None
            kept = manifest.model_dump(exclude=EACH_TIME)
            found[f"{stage}/{key}"] = kept, manifest.input.size if stage == "raw" else None
            if manifest.output is not None:
                published(task, key, stage)
    assert len(found) == 9
    return found
