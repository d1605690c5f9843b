"""Several processes at one home, started and killed at any moment."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.definitions.partitions.context import partition_loading_context
from dagster._core.storage.partition_status_cache import AssetStatusCacheValue
from jobs import IN_FLIGHT, Jobs
from project import DAGSTER_YAML, TASK, A, B, Project, some_rows, until

from modelcall_assets.defs.instance import (
    GREEN,
    add_partitions,
    asset_key,
    open_instance,
    partitions_of,
    register,
)
from modelcall_assets.defs.ledger import Entry, Teller
from modelcall_assets.defs.runs import end_dead_runs
from modelcall_assets.rehearsal import Faults, RehearsalServer

pytestmark = pytest.mark.slow

RAW = dg.AssetKey(["rate", "raw"])
RUNS, INDEX, TICKS = "history/runs.db", "history/runs/index.db", "schedules/schedules.db"
ROWS = 40
OPEN = """
import sys
from pathlib import Path
from modelcall_assets.defs.instance import open_instance
print("ready", flush=True)
sys.stdin.readline()
with open_instance(Path("/nowhere")) as instance:
    instance.add_dynamic_partitions("names", [sys.argv[1]])
"""


def opener(home: Path, name: str) -> subprocess.Popen[str]:
    """A process that has everything imported and waits for a line to open the home."""
    process = subprocess.Popen(
        [sys.executable, "-c", OPEN, name],
        env={"DAGSTER_HOME": str(home)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


def query(path: Path, sql: str) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(path)) as connection, connection:
        return connection.execute(sql).fetchall()


def shape(home: Path) -> dict[str, object]:
    """What a home's databases are, but for what is in them."""
    tables = "SELECT type, name, sql FROM sqlite_master ORDER BY name"
    made: dict[str, object] = {}
    for name in (RUNS, INDEX, TICKS):
        made[name] = query(home / name, tables)
        made[f"{name} stamp"] = query(home / name, "SELECT version_num FROM alembic_version")
        marks = "SELECT name FROM secondary_indexes WHERE migration_completed NOTNULL ORDER BY name"
        made[f"{name} marks"] = query(home / name, marks)
    return made


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """The shape of the home that Dagster makes when it is left alone."""
    home = tmp_path_factory.mktemp("sound")
    (home / "dagster.yaml").write_text(DAGSTER_YAML)
    with dg.DagsterInstance.from_config(str(home)) as instance:
        instance.get_dynamic_partitions("none")
    return shape(home)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


class TestANewHome:
    def test_is_made_by_one_process_while_the_others_wait(
        self, home: Path, sound: dict[str, object]
    ) -> None:
        processes = [opener(home, str(number)) for number in range(4)]
        for process in processes:
            go(process)
        for process in processes:
            _, err = process.communicate(timeout=60)
            assert process.returncode == 0, err
        assert shape(home) == sound
        with open_instance(home) as instance:
            assert sorted(instance.get_dynamic_partitions("names")) == ["0", "1", "2", "3"]

    def test_survives_kills_at_any_moment(self, home: Path, sound: dict[str, object]) -> None:
        random_ = random.Random(12)
        for _ in range(4):
            killed = opener(home, "killed")
            go(killed)
            with suppress(subprocess.TimeoutExpired):
                killed.wait(random_.uniform(0.0, 0.6))
            killed.kill()
            killed.communicate()
        with open_instance(home) as instance:
            instance.add_dynamic_partitions("names", ["mine"])
        assert shape(home) == sound


def nothing_in(home: Path) -> None:
    shutil.rmtree(home / "history")


def empty_files(home: Path) -> None:
    for name in (RUNS, INDEX, TICKS):
        (home / name).write_bytes(b"")


def without_partitions(home: Path) -> None:
    query(home / INDEX, "DROP TABLE dynamic_partitions")
    query(home / INDEX, "DROP TABLE alembic_version")
    query(home / INDEX, "DELETE FROM secondary_indexes")


def stamped_twice(home: Path) -> None:
    for name in (RUNS, INDEX, TICKS):
        query(home / name, "INSERT INTO alembic_version VALUES ('5771160a95ad')")


def unstamped(home: Path) -> None:
    for name in (RUNS, INDEX, TICKS):
        query(home / name, "DELETE FROM alembic_version")


def stamped_old(home: Path) -> None:
    query(home / RUNS, "UPDATE alembic_version SET version_num = '5771160a95ad'")
    query(home / RUNS, "DELETE FROM secondary_indexes")


HALF_MADE = [nothing_in, empty_files, without_partitions, stamped_twice, unstamped, stamped_old]


class TestAHalfMadeHome:
    """As kills and collisions left them before; nothing says that somebody looked after them."""

    @pytest.mark.parametrize("harm", HALF_MADE)
    def test_is_finished(
        self, home: Path, empty_home: Path, sound: dict[str, object], harm: Callable[[Path], None]
    ) -> None:
        shutil.copytree(empty_home, home)
        (home / ".home.whole").unlink()
        harm(home)
        with open_instance(home) as instance:
            instance.add_dynamic_partitions("names", ["mine"])
            assert not instance.get_runs()
        assert shape(home) == sound

    @pytest.mark.parametrize("harm", [without_partitions, stamped_twice, unstamped, stamped_old])
    def test_keeps_what_is_in_it(
        self, home: Path, empty_home: Path, sound: dict[str, object], harm: Callable[[Path], None]
    ) -> None:
        shutil.copytree(empty_home, home)

        @dg.asset
        def one() -> None: ...

        with dg.DagsterInstance.from_config(str(home)) as instance:
            assert dg.materialize([one], instance=instance).success
        (home / ".home.whole").unlink()
        harm(home)
        with open_instance(home) as instance:
            (run,) = instance.get_runs()
            assert run.status == dg.DagsterRunStatus.SUCCESS
            assert instance.get_asset_keys() == [one.key]
            assert instance.get_latest_materialization_event(one.key) is not None
        assert shape(home) == sound

    def test_of_another_version_is_left_to_dagster(self, home: Path, empty_home: Path) -> None:
        shutil.copytree(empty_home, home)
        (home / ".home.whole").unlink()
        query(home / RUNS, "UPDATE alembic_version SET version_num = '16e3655b4d9b'")
        query(home / RUNS, "ALTER TABLE bulk_actions DROP COLUMN job_name")
        before = query(home / RUNS, "SELECT sql FROM sqlite_master ORDER BY name")
        with open_instance(home):
            pass
        assert query(home / RUNS, "SELECT sql FROM sqlite_master ORDER BY name") == before
        assert query(home / RUNS, "SELECT * FROM alembic_version") == [("16e3655b4d9b",)]


def test_what_several_see_at_once_becomes_a_partition_once(project: Project) -> None:
    definitions = [dg.DynamicPartitionsDefinition(name=f"set {number}") for number in range(20)]
    keys = [f"{number}.jsonl" for number in range(200)]

    def add(_: int) -> None:
        with dg.DagsterInstance.from_config(str(project.instance.root_directory)) as own:
            for definition in definitions:
                add_partitions(own, definition.name or "", keys)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(add, range(4)))
    for definition in definitions:
        assert sorted(project.instance.get_dynamic_partitions(definition.name or "")) == sorted(
            keys
        )


class TestOneFile:
    """Several processes that know nothing of each other but the file, as each has a home of its
    own."""

    @pytest.fixture(params=["live", "batch", "store"])
    def started(
        self,
        request: pytest.FixtureRequest,
        bare: Project,
        server: RehearsalServer,
        empty_home: Path,
    ) -> Callable[[str], subprocess.Popen[str]]:
        if request.param == "batch":
            bare.write_model({"mode": "batch", "batch": {"poll_seconds": 0.05}})
        limits = {"concurrency": {"max_concurrent_requests": IN_FLIGHT}}
        if request.param == "store":
            store, bucket = map(request.getfixturevalue, ("s3_server", "bucket"))
            bare.write_task_in_store(store, bucket, **limits)
        else:
            bare.write_task(limits)
        server.set_faults(Faults(latency_ms=100, batch_s=3))
        bare.write_input(A, some_rows(ROWS))

        def start(name: str) -> subprocess.Popen[str]:
            home = bare.root / f"home_{name}"
            if not home.exists():
                shutil.copytree(empty_home, home)
            return bare.start("run-task", TASK, env={**os.environ, "DAGSTER_HOME": str(home)})

        return start

    def test_is_asked_by_one_and_the_other_leaves_it_alone(
        self, started: Callable[[str], subprocess.Popen[str]], server: RehearsalServer
    ) -> None:
        server.set_faults(Faults(latency_ms=4000, batch_s=20))
        first = started("first")
        until(lambda: is_asked(server))
        out, err = (second := started("second")).communicate(timeout=120)
        assert second.returncode == 1 and "a.jsonl: another run is working on it" in err, out + err
        assert "Traceback" not in out + err
        server.set_faults(Faults())
        out, err = first.communicate(timeout=120)
        assert first.returncode == 0, out + err
        assert paid(server) == ROWS
        out, err = (again := started("second")).communicate(timeout=120)
        assert again.returncode == 0, out + err
        assert f"{ROWS} rows, {ROWS} succeeded" in out and paid(server) == ROWS

    def test_is_free_when_its_process_was_killed(
        self, started: Callable[[str], subprocess.Popen[str]], server: RehearsalServer
    ) -> None:
        first = started("first")
        until(lambda: is_asked(server))
        first.kill()
        first.communicate()
        out, err = (second := started("second")).communicate(timeout=120)
        assert second.returncode == 0, out + err
        assert f"{ROWS} rows, {ROWS} succeeded" in out
        assert paid(server) <= ROWS + IN_FLIGHT

    def test_is_asked_by_one_of_several_that_start_together(
        self, started: Callable[[str], subprocess.Popen[str]], server: RehearsalServer
    ) -> None:
        running = [started(str(number)) for number in range(3)]
        ended = [(job.communicate(timeout=120), job.returncode) for job in running]
        assert paid(server) == ROWS
        assert 0 in [code for _, code in ended], ended
        for (out, err), code in ended:
            assert code == 0 or "a.jsonl: another run is working on it" in err, out + err


def is_asked(server: RehearsalServer) -> bool:
    stats = server.stats()
    return stats["requests"] >= IN_FLIGHT or stats["batches"] > 0


def paid(server: RehearsalServer) -> int:
    """Requests, those in batches too."""
    return server.stats()["requests"]


def test_jobs_killed_in_their_first_seconds_and_started_again_answer_all_rows_once(
    project: Project, server: RehearsalServer
) -> None:
    """A round of `acceptance/test_many_jobs.py`, which has twenty and ten jobs each."""
    Jobs(project, server, jobs=4, rows=20).round(random.Random(4))


@pytest.mark.parametrize("database", ["history/runs.db", "history/runs/index.db"])
def test_a_damaged_database_is_told_and_moving_the_home_away_costs_nothing(
    project: Project, database: str
) -> None:
    home = project.root / "dagster_home"
    assert project.run("run-task", TASK).code == 0
    (home / database).write_bytes(b"no database" * 400)
    ended = project.run("run-task", TASK)
    assert ended.code == 1, ended
    assert f"{home}: a database of Dagster in it cannot be used" in ended.err
    home.rename(project.root / "away")
    again = project.run("run-task", TASK)
    assert (again.code, "0 requests sent" in again.out) == (0, True), again


def test_the_process_that_tells_dagster_of_many_files_may_be_killed(
    project: Project, server: RehearsalServer
) -> None:
    files = [f"{number:03}.jsonl" for number in range(300)]
    for name in files:
        project.write_input(name, some_rows(1, name))
    job = project.start("run-task", TASK)
    until(lambda: helpers(job.pid) or job.poll() is not None)
    for helper in helpers(job.pid):
        os.kill(helper, signal.SIGKILL)
    out, err = job.communicate(timeout=300)
    assert job.returncode == 0 and "Traceback" not in err, out + err
    with open_instance(project.root) as instance:
        for stage in project.steps().stages:
            found = instance.get_status_by_partition(
                asset_key(stage), files, partitions_of(stage.keys)
            )
            assert found is not None and {found[name] for name in files} == {GREEN}
    again = project.run("run-task", TASK)
    assert (again.code, "nothing to do" in again.out) == (0, True), again
    assert helpers(os.getpid()) == []


def test_what_cannot_be_told_of_one_file_keeps_no_other_from_it(project: Project) -> None:
    teller = Teller(project.instance, project.steps(), "0" * 8, "job", "step")
    with pytest.raises(StopIteration):
        teller.tell([Entry("raw", A, None), Entry("no such stage", A, None), Entry("raw", B, None)])
    wanted = dg.EventRecordsFilter(dg.DagsterEventType.ASSET_MATERIALIZATION_PLANNED, RAW)
    planned = project.instance.event_log_storage.get_event_records(wanted)
    assert {record.partition_key for record in planned} == {A, B}


def helpers(parent: int) -> list[int]:
    """Processes that a process started for work of its own."""
    found = list[int]()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            is_child = int(stat.read_text().rpartition(")")[2].split()[1]) == parent
            if is_child and b"spawn_main" in stat.with_name("cmdline").read_bytes():
                found.append(int(stat.parent.name))
    return found


class TestSlot:
    """Of a pool, here the only one, so that a file of the task waits for the one before it."""

    @pytest.mark.parametrize("is_claimed", [True, False])
    def test_of_a_run_that_has_ended_holds_nobody_up(
        self, project: Project, is_claimed: bool
    ) -> None:
        """Who marked the run of a killed process was killed before it had freed the slot."""
        assert project.run("run-task", TASK, "--file", A).code == 0
        ended, storage = project.instance.get_runs()[0], project.instance.event_log_storage
        if is_claimed:
            storage.claim_concurrency_slot("rate", ended.run_id, "rate__scores")
        else:
            storage.add_pending_step("rate", ended.run_id, "rate__scores", should_assign=True)
        rest = project.run("run-task", TASK)
        assert (rest.code, "3 of 3 files scored" in rest.out) == (0, True), rest

    def test_of_a_process_that_is_killed_goes_to_the_one_that_waits_for_it(
        self, project: Project, server: RehearsalServer
    ) -> None:
        server.set_faults(Faults(latency_ms=100_000))
        with project.start("run-task", TASK, "--file", A) as first:
            until(lambda: server.stats()["in_flight"])
            server.set_faults(Faults())
            with project.start("run-task", TASK, "--file", B) as second:
                storage = project.instance.event_log_storage
                until(lambda: storage.get_concurrency_info("rate").pending_step_count)
                first.kill()
                out, err = second.communicate(timeout=60)
        assert (second.returncode, "1 of 1 file scored" in out) == (0, True), out + err


class TestSeveralAtATime:
    def test_what_dagsters_cache_of_statuses_has_missed_is_there(self, project: Project) -> None:
        """As when another process wrote the cache between our event and the note that it is the
        latest: then it never looks at that event again."""
        with open_instance(project.root) as instance:
            partitions = partitions_of(project.steps().stage("raw").keys)
            register(instance, project.steps())
            instance.report_runless_asset_event(dg.AssetObservation(RAW))
            with partition_loading_context(dynamic_partitions_store=instance):
                which = partitions.get_serializable_unique_identifier()
            later = AssetStatusCacheValue(latest_storage_id=1_000_000, partitions_def_id=which)
            instance.event_log_storage.update_asset_cached_status_data(RAW, later)
        ended = project.run("run-task", TASK)
        assert (ended.code, "3 of 3 files scored" in ended.out) == (0, True), ended

    def test_a_run_that_ends_while_it_is_looked_at_is_not_dead(
        self, project: Project, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its process has ended too, and so looks like one that was killed."""
        assert project.run("run-task", TASK, "--file", "a.jsonl").code == 0
        instance = project.instance
        (ended, *_) = instance.get_runs()
        listed = ended.with_status(dg.DagsterRunStatus.STARTED)
        monkeypatch.setattr(instance, "get_runs", lambda *_, **__: [listed])
        assert end_dead_runs(instance) == []
        assert instance.get_run_by_id(ended.run_id).status == dg.DagsterRunStatus.SUCCESS
