"""Several processes at one home, started and killed at any moment."""

from __future__ import annotations

import random
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path

import dagster as dg
import pytest
from conftest import DAGSTER_YAML, Project
from jobs import Jobs

from modelcall_assets.defs.instance import open_instance
from modelcall_assets.defs.partitions import add_partitions
from modelcall_assets.rehearsal import RehearsalServer

RUNS, INDEX, TICKS = "history/runs.db", "history/runs/index.db", "schedules/schedules.db"
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


def test_what_several_see_at_once_becomes_a_partition_once(
    project: Project, instance: dg.DagsterInstance
) -> None:
    definitions = [dg.DynamicPartitionsDefinition(name=f"set {number}") for number in range(20)]
    keys = [f"{number}.jsonl" for number in range(200)]

    def add(_: int) -> None:
        with dg.DagsterInstance.from_config(str(instance.root_directory)) as own:
            for definition in definitions:
                add_partitions(own, definition, keys)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(add, range(4)))
    for definition in definitions:
        assert sorted(instance.get_dynamic_partitions(definition.name or "")) == sorted(keys)


def test_jobs_killed_in_their_first_seconds_and_started_again_answer_all_rows_once(
    project: Project, server: RehearsalServer
) -> None:
    """A round of `acceptance/test_many_jobs.py`, which has twenty and ten jobs each."""
    Jobs(project, server, jobs=4, rows=20).round(random.Random(4))
