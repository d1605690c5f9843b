"""Whole runs on a real store: killed, cut off, two at a time, and told by every command."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml
from botocore.client import BaseClient
from click.testing import CliRunner
from conftest import PREPROCESS, WORKSPACE, Project, merged, some_rows, until
from s3_proxy import S3Proxy
from s3_server import S3Server

from modelcall_assets.cli.main import modelcall
from modelcall_assets.defs.instance import open_instance
from modelcall_assets.defs.partitions import add_new_files
from modelcall_assets.defs.runs import TaskRunner
from modelcall_assets.journal.home import journal_files
from modelcall_assets.journal.lines import kind_of
from modelcall_assets.journal.mirror import open_journal
from modelcall_assets.journal.segments import open_segment, segment_paths
from modelcall_assets.rehearsal import Faults, RehearsalServer
from modelcall_assets.steps.layout import Layout
from modelcall_assets.storage.claims import claimed
from modelcall_assets.storage.files import exists, file_digest, list_files
from modelcall_assets.storage.manifest import Manifest, read_manifest
from modelcall_assets.storage.places import Place, RemotePath

A = "a.jsonl"
IN_FLIGHT = 4


@pytest.fixture
def proxy(s3_server: S3Server) -> Iterator[S3Proxy]:
    with S3Proxy(s3_server) as running:
        yield running


@pytest.fixture
def client(s3_server: S3Server) -> Iterator[BaseClient]:
    with closing(s3_server.client()) as made:
        yield made


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
    (project.root / "configs/storage.yaml").write_text(yaml.safe_dump(content))


def one_file(project: Project, rows: int, **task: Any) -> None:
    """The input is `a.jsonl` alone."""
    shutil.rmtree(project.root / "data/in")
    project.write_input(A, some_rows(rows))
    own = {"concurrency": {"max_concurrent_requests": IN_FLIGHT}, "max_failure_rate": 1}
    project.write_task(merged(own, task))


def another_machine(project: Project, root: Path, home: Path) -> Project:
    """The same project with nothing in it yet but its configuration and input."""
    made = Project(root)
    shutil.copytree(project.root / "configs", root / "configs")
    shutil.copytree(project.root / "data/in", root / "data/in")
    shutil.copy(project.root / ".env", root / ".env")
    (root / "workspace.yaml").write_text(WORKSPACE)
    shutil.copytree(home, root / "dagster_home")
    return made


def start(project: Project) -> subprocess.Popen[str]:
    home = str(project.root / "dagster_home")
    return project.start(
        "run-task", str(project.task_file), env={**_environ(), "DAGSTER_HOME": home}
    )


def _environ() -> dict[str, str]:
    import os

    return {**os.environ, "COLUMNS": "200"}


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    out, err = process.communicate(timeout=120)
    assert "Traceback" not in out + err, out + err
    return process.returncode, out + err


def command(project: Project, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """In this process."""
    monkeypatch.chdir(project.root)
    monkeypatch.setenv("DAGSTER_HOME", str(project.root / "dagster_home"))
    result = CliRunner().invoke(modelcall, arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 0, result.output
    return result.output


def published(layout: Layout, key: str = A, stage: str = "scores") -> Manifest:
    """A manifest that goes with its output."""
    manifest = read_manifest(layout.manifest_path(stage, key))
    assert manifest is not None and manifest.output is not None
    assert file_digest(layout.place(manifest.output)) == manifest.output_digest
    return manifest


def replies(layout: Layout, folder: Path, key: str = A) -> Counter[bytes]:
    """What the journal in the store has, as a machine sees it that was never there."""
    with open_journal(layout.journal_folder("scores", key), folder, "look", read_only=True):
        (copy,) = (folder / "journals").iterdir()
        lines = (line for path in segment_paths(copy) for _, line in open_segment(path).lines())
        return Counter(line for line in lines if kind_of(line) >= 0)


def in_store(folder: Place) -> list[str]:
    return [info.key_path for info in journal_files(folder)]


class TestKills:
    @pytest.fixture
    def stored(self, project: Project, s3_server: S3Server, bucket: str) -> Project:
        reach(project, s3_server)
        one_file(project, 60, data={"output_folder": f"s3://{bucket}/out"})
        return project

    @pytest.mark.parametrize("is_lost", [False, True])
    def test_a_run_that_is_killed_pays_only_what_was_not_flushed(
        self, stored: Project, server: RehearsalServer, tmp_path: Path, is_lost: bool
    ) -> None:
        """Twice; a machine that is lost takes its scratch folder with it."""
        server.set_faults(Faults(latency_ms=120))
        layout = stored.steps().layout
        journal = layout.journal_folder("scores", A)
        kept = 0
        for number in range(2):
            process = start(stored)
            before = sum(replies(layout, tmp_path / f"before{number}").values())
            until(lambda before=before, number=number: self.count(layout, tmp_path) > before)
            process.send_signal(signal.SIGKILL)
            process.communicate()
            if is_lost:
                shutil.rmtree(stored.root / ".modelcall/journals")
            kept = sum(replies(layout, tmp_path / f"after{number}").values())
            assert kept > before
            assert any("@" in name for name in in_store(journal)), "it was not in parts"
        until(lambda: server.stats()["in_flight"] == 0)
        paid = server.stats()["requests"]
        server.set_faults(Faults())
        code, said = ended(start(stored))
        assert code == 0, said
        asked = server.stats()["requests"] - paid
        if is_lost:
            assert asked == 60 - kept
        else:
            assert server.stats()["requests"] <= 60 + 2 * IN_FLIGHT
        assert published(layout).ok == 60
        assert set(replies(layout, tmp_path / "last").values()) == {1}
        assert not any("@" in name for name in in_store(journal))
        assert not list((stored.root / ".modelcall/journals").iterdir())

    def count(self, layout: Layout, tmp_path: Path) -> int:
        folder = tmp_path / f"look{time.monotonic_ns()}"
        return sum(replies(layout, folder).values())

    def test_a_kill_before_the_manifest_leaves_a_partition_that_nobody_takes_for_done(
        self, stored: Project, s3_server: S3Server, proxy: S3Proxy, server: RehearsalServer
    ) -> None:
        reach(stored, s3_server, proxy.endpoint)
        held = proxy.on("PUT", r"manifests/scores/", times=1, hold=True)
        process = start(stored)
        assert held.reached.wait(60)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        held.release(lose=True)
        layout, paid = stored.steps().layout, server.stats()["requests"]
        assert paid == 60
        assert exists(layout.output_path("scores", A))
        assert read_manifest(layout.manifest_path("scores", A)) is None
        (claim,) = list_files(layout.claims_folder)  # pyright: ignore[reportArgumentType]
        assert claim.key_path.startswith(f"scores/{A}/")
        assert claim.place.store  # pyright: ignore
        delete_claim = layout.place(claim.uri)
        from modelcall_assets.storage.files import delete

        delete(delete_claim)  # as two minutes would
        code, said = ended(start(stored))
        assert code == 0, said
        assert server.stats()["requests"] == paid
        assert published(layout).ok == 60

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
        assert held.reached.wait(60)
        s3_server.kill()
        try:
            held.release()
            code, said = ended(process)
        finally:
            s3_server.start()
        assert code == 1
        assert f"s3://{bucket}/out/a.parquet: cannot be written (bucket {bucket}" in said
        assert "check the network, and the store's endpoint and region" in said
        assert s3_server.secret not in said
        layout, paid = stored.steps().layout, server.stats()["requests"]
        assert not exists(layout.output_path("scores", A))
        for name in list_files(layout.claims_folder):  # pyright: ignore[reportArgumentType]
            client.delete_object(Bucket=bucket, Key=name.uri.removeprefix(f"s3://{bucket}/"))
        code, said = ended(start(stored))
        assert code == 0, said
        assert server.stats()["requests"] == paid == 60
        assert published(layout).ok == 60


class TestTwoRuns:
    @pytest.mark.parametrize("where", ["disk", "store"])
    def test_the_first_to_end_publishes_and_the_replies_of_both_are_kept(
        self,
        project: Project,
        empty_home: Path,
        tmp_path: Path,
        server: RehearsalServer,
        where: str,
        request: pytest.FixtureRequest,
    ) -> None:
        """On two machines. Both have all their answers, which differ, before one can publish."""
        output = str(tmp_path / "shared")
        (project.root / ".env").touch()
        if where == "store":
            reach(project, request.getfixturevalue("s3_server"))
            output = f"s3://{request.getfixturevalue('bucket')}/out"
        one_file(project, 8, data={"output_folder": output}, retry={"max_repair_turns": 0})
        server.set_faults(Faults(rate_malformed=0.5, seed=2))
        other = another_machine(project, tmp_path / "other", empty_home)
        layout = project.steps().layout
        claim = layout.claim_path("scores", A)
        with claimed(claim):
            processes = [start(project), start(other)]
            until(lambda: server.stats()["requests"] == 16)
            until(lambda: waiting_for(claim) == 2)
        results = [ended(process) for process in processes]
        codes = sorted(code for code, _ in results)
        (loser,) = (said for code, said in results if code)
        assert codes == [0, 1]
        assert "rate/scores: another run has published 'a.jsonl' since this one began" in loser
        assert "nothing is paid twice" in loser
        first = published(layout)
        assert 0 < first.failed < 8
        if isinstance(claim, RemotePath):
            found = replies(layout, tmp_path / "look")
            assert sum(found.values()) == 16 and set(found.values()) == {1}
            assert list_files(layout.claims_folder, may_be_absent=True) == []
        third = another_machine(project, tmp_path / "third", empty_home)
        server.set_faults(Faults())
        code, said = ended(start(third))
        assert code == 0, said
        last = published(layout)
        assert last.ok == 8 or last.ok >= first.ok
        asked_again = server.stats()["requests"] - 16
        assert asked_again <= first.failed, "what one of them had an answer to was asked again"


def waiting_for(claim: Place) -> int:
    """Others than who holds it. In a store one that steps back is not seen for a while."""
    if isinstance(claim, RemotePath):
        seen = {info.key_path for _ in range(3) for info in list_files(claim, may_be_absent=True)}
        _SEEN.setdefault(str(claim), set()).update(seen)
        return len(_SEEN[str(claim)]) - 1
    inode = f":{claim.stat().st_ino} "
    return sum("->" in line and inode in line for line in Path("/proc/locks").open())


_SEEN: dict[str, set[str]] = {}


STAGES = ("raw", "preprocessed", "scores")


def places(bucket: str, **where: str) -> Mapping[str, Any]:
    """Each of input, preprocessed, output and journal, in the store or on the disk."""
    at = {
        name: f"s3://{bucket}/{name}" if where[name] == "store" else f"data/{name}"
        for name in ("input", "preprocessed", "output", "journal")
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
        shutil.copytree(project.root / "data/in", project.root / "data/input")
        for path in sorted((project.root / "data/in").rglob("*.*")):
            key = f"input/{path.relative_to(project.root / 'data/in')}"
            client.put_object(Bucket=bucket, Key=key, Body=path.read_bytes())
        return project

    @pytest.mark.parametrize("where", ["disk disk disk disk", "store disk disk store"])
    def test_the_results_are_those_of_all_in_the_store(
        self,
        stored: Project,
        bucket: str,
        server: RehearsalServer,
        where: str,
    ) -> None:
        """The same rows, versions and manifests, but for where they are."""
        kinds = dict(
            zip(("input", "preprocessed", "output", "journal"), where.split(), strict=True)
        )
        found: list[Any] = []
        for name, each in (("there", dict.fromkeys(kinds, "store")), ("here", kinds)):
            stored.task = name
            changes = places(bucket, **each)
            data = {**changes["data"], "output_folder": changes["data"]["output_folder"] + name}
            stored.write_task({**changes, "data": data})
            with open_instance(stored.root) as instance:
                steps = stored.steps()
                assert TaskRunner(steps, instance).run(add_new_files(instance, steps)).failed == []
            found.append(results(steps.layout))
        assert found[0] == found[1]
        assert server.stats()["requests"] == 24
        on_disk = {path.name for path in (stored.root / "data").iterdir()}
        assert on_disk == {"in", "input"} | (
            {"preprocessed", "outputhere"} | ({"journal"} if "store" not in where else set())
        )

    def test_dagster_runs_it_without_our_runner_and_no_secret_is_written_down(
        self, stored: Project, s3_server: S3Server, bucket: str, server: RehearsalServer
    ) -> None:
        stored.write_task(
            places(bucket, **dict.fromkeys(("input", "preprocessed", "output", "journal"), "store"))
        )
        with open_instance(stored.root) as instance:
            keys = add_new_files(instance, stored.steps())
            job = stored.definitions().resolve_implicit_global_asset_job_def()
            for key in keys:
                result = job.execute_in_process(
                    instance=instance,
                    partition_key=key,
                    run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
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
                run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
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
        everything = ("input", "preprocessed", "output", "journal")
        stored.write_task(
            places(bucket, **dict.fromkeys(everything, "store")) | {"max_failure_rate": 1}
        )
        server.set_faults(Faults(rate_400=0.3, seed=4))
        task = str(stored.task_file)

        def said(*arguments: str) -> str:
            text = command(stored, monkeypatch, *arguments)
            assert s3_server.secret not in text
            return text

        assert "0 errors" in said("check")
        plan = said("plan", task)
        assert "deep/b.parquet" in plan and "about 12 requests" in plan
        assert client.list_objects_v2(Bucket=bucket)["KeyCount"] == 3, "a plan writes nothing"
        run = said("run-task", task)
        assert "3 of 3 files scored: 12 rows" in run and f"scores: s3://{bucket}/output" in run
        failed = len(said("failures", task, "--json").splitlines())
        assert 0 < failed < 12
        assert f"{failed} of 12 rows failed: bad_request {failed}" in said("failures", task)
        assert "about 0 requests" in said("plan", task)
        said("export", task, "--output", str(tmp_path / "copy"))
        assert sorted(path.name for path in (tmp_path / "copy").rglob("*.*")) != []
        said("view", task, "--output", str(tmp_path / "view.html"))
        assert "first-0" in (tmp_path / "view.html").read_text()
        assert "nothing to delete" in said("clean", task, "--journal-older-than", "1")
        self.leave_things_behind(client, bucket)
        monkeypatch.setattr("modelcall_assets.steps.clean.IN_USE_S", -60.0)
        monkeypatch.setattr("modelcall_assets.steps.clean._DAY_S", 0.0)
        monkeypatch.setattr(
            "modelcall_assets.steps.clean.time.time", lambda: time.monotonic() + 1e10
        )
        cleaned = said("clean", task, "--journal-older-than", "0", "--deleted-inputs", "--yes")
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


def results(layout: Layout) -> dict[str, Any]:
    """What was published: manifests without places, and rows without what differs each time."""
    found: dict[str, Any] = {}
    for stage in STAGES:
        for info in list_files(layout.manifest_folder(stage)):
            key = info.key_path.removesuffix(".json")
            manifest = read_manifest(layout.manifest_path(stage, key))
            assert manifest is not None
            kept = manifest.model_dump(exclude={"output", "output_digest", "published", "input"})
            found[f"{stage}/{key}"] = kept, manifest.input.size if stage == "raw" else None
            if manifest.output is not None:
                published(layout, key, stage)
    assert len(found) == 9
    return found
