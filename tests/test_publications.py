"""Publications of a partition, on a disk and in a real store: one at a time, and all of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from project import NAMES, TASK, A, Project, some_rows, until
from s3_proxy import S3Proxy
from s3_server import S3Server

from modelcall_assets.errors import PlaceTaken, PublishedMeanwhile
from modelcall_assets.rehearsal import RehearsalServer
from modelcall_assets.stages.publication import Draft
from modelcall_assets.stages.report import Report
from modelcall_assets.stages.upkeep import LEFT_OVER, Verification, left_over
from modelcall_assets.storage.files import NewFile, delete, publish, read_bytes, write_bytes
from modelcall_assets.storage.publishing import InputFingerprint, claimed, read_manifest


def test_on_a_disk_one_holds_a_claim_at_a_time(tmp_path: Path) -> None:
    inside, most, done = 0, 0, 0
    lock = threading.Lock()

    def work(_: int) -> None:
        nonlocal inside, most, done
        with claimed(tmp_path / ".claim"):
            with lock:
                inside += 1
                most = max(most, inside)
            time.sleep(0.01)
            with lock:
                inside -= 1
                done += 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(16)))
    assert (most, done) == (1, 16)


HOLDER = """
import sys
from pathlib import Path
from modelcall_assets.storage.publishing import claimed
with claimed(Path(sys.argv[1]), "a"):
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_who_has_waited_for_a_file_that_is_deleted_goes_on_at_the_new_one(tmp_path: Path) -> None:
    place, inside, both = tmp_path / "claims", list[str](), threading.Event()

    def waits() -> None:
        with claimed(place, "a"):
            inside.append("second")
            if len(inside) > 1:
                both.set()

    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", HOLDER, str(place)]
    with subprocess.Popen(command, **pipes) as first, ThreadPoolExecutor(1) as pool:
        assert first.stdout is not None and first.stdout.readline() == "held\n"
        inode = f":{place.stat().st_ino} "
        second = pool.submit(waits)
        locks = Path("/proc/locks")
        until(lambda: any("->" in x and inode in x for x in locks.read_text().splitlines()))
        place.unlink()
        with claimed(place, "a"):
            inside.append("third")
            first.communicate("\n")
            assert not both.wait(0.2)
            inside.remove("third")
        second.result()
    assert inside == ["second"]


def content(version: str) -> tuple[Report, InputFingerprint]:
    made_of = InputFingerprint(uri="x", digest="d", size=1, version="v")
    return Report(rows_in=1, rows=1, data_version=version), made_of


class TestPublications:
    @pytest.fixture(params=["disk", pytest.param("store", marks=pytest.mark.slow)])
    def place(self, request: pytest.FixtureRequest, bare: Project) -> Project:
        if request.param == "store":
            server = request.getfixturevalue("s3_server")
            bare.write_task_in_store(server, request.getfixturevalue("bucket"))
        return bare

    def test_the_first_stands_and_the_second_says_so(self, place: Project) -> None:
        stage = place.steps().stage("scores")
        with Draft(stage, "a.jsonl") as first, Draft(stage, "a.jsonl") as two:
            first.out.write(b"first")
            two.out.write(b"second")
            first.publish(*content("1"))
            with pytest.raises(PublishedMeanwhile, match="rate/scores: another run has published"):
                two.publish(*content("2"))
        published = read_manifest(stage.manifest_path("a.jsonl"))
        assert published is not None and published.data_version == "1"
        output = stage.output("a.jsonl")
        assert read_bytes(output) == b"first"
        with publish(output.with_name("same")) as same:
            same.write(b"first")
            assert published.output_digest == same.digest

    def test_the_same_content_is_no_quarrel(self, place: Project) -> None:
        stage = place.steps().stage("scores")
        with Draft(stage, "a.jsonl") as first, Draft(stage, "a.jsonl") as two:
            for draft in (first, two):
                draft.out.write(b"same")
                draft.publish(*content("1"))
        assert read_bytes(stage.output("a.jsonl")) == b"same"

    @pytest.mark.parametrize("damage", [None, b"", b'{"format": 1, "sta', bytes(400)])
    def test_what_is_ours_is_known_without_its_manifest(
        self, damage: bytes | None, place: Project
    ) -> None:
        stage = place.steps().stage("scores")
        described = stage.manifest_path("a.jsonl")
        for version in ("1", "2"):
            with Draft(stage, "a.jsonl") as draft:
                draft.out.write(version.encode())
                draft.publish(*content(version))
            delete(described) if damage is None else write_bytes(described, damage)
        write_bytes(stage.output("a.jsonl"), b"somebody's")
        with pytest.raises(PlaceTaken, match="was not written by this task"):
            Draft(stage, "a.jsonl")


KILLER = """
import os, re, signal, sys

def hook(event, arguments):
    if event == "os.rename" and re.search(at, os.fspath(arguments[1])):
        os.kill(os.getpid(), signal.SIGKILL)

if at := os.environ.get("KILL_AT"):
    sys.addaudithook(hook)

class Same:
    def process_item(self, item):
        return item
"""
"""A preprocessor of the user's own that ends its process before a file gets its name."""


@pytest.mark.parametrize(
    "at",
    [
        rf"{place}/a\.{kind}"
        for place, kind in (
            ("preprocessed", "parquet"),
            ("scores", "parquet"),
            ("manifests/scores", "jsonl"),
            ("standing/scores", "jsonl"),
        )
    ],
)
@pytest.mark.parametrize("is_first", [True, False])
def test_a_kill_while_it_is_published_costs_nothing(
    bare: Project, server: RehearsalServer, at: str, is_first: bool
) -> None:
    """At the first publication, and at one that is to replace another."""
    bare.write_input(A, some_rows(4, "first"))
    (bare.root / "killer.py").write_text(KILLER)
    block = {"enabled": True, "script_type": "killer:Same", "output_folder": "data/preprocessed"}
    bare.write_task({"preprocess": block})
    if not is_first:
        assert bare.run("run-task", TASK).code == 0
        bare.write_input(A, some_rows(5, "first"))
    with bare.start("run-task", TASK, env={**os.environ, "KILL_AT": at}) as process:
        told = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, told
    paid = server.stats()["requests"]
    assert bare.run("run-task", TASK).code == 0
    if "scores" in at:
        assert paid and server.stats()["requests"] == paid
    rows = 4 if is_first else 5
    assert [row["api_status"] for row in bare.scores(A)] == ["success"] * rows
    assert [*Verification(bare.steps()).findings()] == []


class TestRuns:
    def test_a_store_that_dies_before_the_manifest_costs_nothing_twice(
        self, project: Project, s3_server: S3Server, bucket: str, server: RehearsalServer
    ) -> None:
        """What is lost is the request that says that the output is complete."""
        with S3Proxy(s3_server) as proxy:
            project.write_task_in_store(s3_server, bucket, proxy.endpoint)
            proxy.on("PUT", r"manifests/scores/a\.jsonl", refuse=(403, "AccessDenied"))
            (message,) = project.materialize().failed
            assert "manifests/scores/a.jsonl.json" in message and "AccessDenied" in message
            assert "check the access key" in message and s3_server.secret not in message
            paid = server.stats()["requests"]
            assert paid == 12
            proxy.clear()
            assert project.materialize().failed == []
            assert server.stats()["requests"] == paid
        for key in NAMES:
            made = project.manifest(key)
            assert made.rows == made.ok == 4

    def test_two_at_once_leave_one_result_and_lose_no_reply(
        self, bare: Project, s3_server: S3Server, bucket: str, server: RehearsalServer
    ) -> None:
        """The second is held up until the first has published."""
        bare.write_input(A, some_rows(6))
        bare.write_task_in_store(s3_server, bucket)
        processes = [bare.start("run-task", TASK) for _ in range(2)]
        ended = [process.communicate()[1] for process in processes]
        assert [process.returncode for process in processes].count(0) >= 1, ended
        output = bare.steps().stage("scores").output(A)
        with NewFile(bare.root / "copy") as copy:
            copy.write(read_bytes(output))
            assert copy.digest == bare.manifest(A).output_digest
        paid = server.stats()["requests"]
        assert bare.materialize().failed == [] and server.stats()["requests"] == paid

    def test_what_a_kill_leaves_is_found_and_deleted(
        self, project: Project, s3_server: S3Server, bucket: str
    ) -> None:
        project.write_task_in_store(s3_server, bucket)
        with closing(s3_server.client()) as client:
            client.create_multipart_upload(Bucket=bucket, Key="scores/a.parquet")
            steps = project.steps()
            assert list(left_over(steps)) == []
            (found,) = left_over(steps, in_use_s=-5.0)
            assert found.why == LEFT_OVER
            assert found.name.startswith(f"s3://{bucket}/scores/a.parquet (upload ")
            assert found.delete(steps)
            until(lambda: "Uploads" not in client.list_multipart_uploads(Bucket=bucket), 10)
