"""The project alive: `modelcall ui` as a user starts it, its sensors, its backfills, its death.

One daemon serves the whole file, with a task and an endpoint for each scenario. Dagster looks after
backfills every 30 s only, so that those are launched first and looked at last.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster._core.storage.dagster_run import NOT_FINISHED_STATUSES
from dagster._core.storage.partition_status_cache import AssetPartitionStatus
from dev import POLL_S, Dev
from project import FRESH, GREEN, NAMES, PREPROCESS, RED, A, B, C, Project, some_rows, until

from modelcall_assets.defs.instance import TASK_TAG, partitions_of, register
from modelcall_assets.defs.sensors import followers_sensor
from modelcall_assets.records import encode_key
from modelcall_assets.rehearsal import NO_FAULTS, Faults, RehearsalServer, serve_in_thread
from modelcall_assets.stages.report import Tally

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[1]
STAGES = ("raw", "scores")
UNREADABLE = b"no Parquet"

Statuses = dict[str, AssetPartitionStatus | None]


# --- the project ------------------------------------------------------------------------------


@dataclass
class Task(Project):
    """A task of the living project, its own endpoint, and what the instance says of it."""

    server: RehearsalServer = field(kw_only=True)
    instance: dg.DagsterInstance = field(kw_only=True)

    def partitions(self) -> list[str]:
        name = partitions_of(self.steps().stages[-1].keys).name
        return list(self.instance.get_dynamic_partitions(name or ""))

    def state(self, stage: str = "scores", keys: Sequence[str] | None = None) -> Statuses:
        """By key, as Dagster has it."""
        wanted, files = keys or self.partitions(), partitions_of(self.steps().stage(stage).keys)
        found = self.instance.get_status_by_partition(self.asset_key(stage), wanted, files) or {}
        return {key: found.get(key) for key in wanted}

    def is_green(self, *keys: str, stage: str = "scores") -> bool:
        return set(self.state(stage, keys).values()) == {GREEN}

    def wait(self, what: Callable[[], object], seconds: float = 90) -> None:
        """With the state of everything when it does not come true."""
        try:
            until(what, seconds, POLL_S)
        except AssertionError:
            stages = {stage.name: self.state(stage.name) for stage in self.steps().stages}
            runs = [(run.status.value, run.tags) for run in self.instance.get_runs()]
            shown = [f"{stages}", *map(str, runs), str(self.server.stats())]
            raise AssertionError("it never happened:\n" + "\n".join(shown)) from None

    def runs_of(self, key: str) -> list[dg.DagsterRun]:
        """Of the sensor, latest first."""
        tags = {"dagster/partition": key, TASK_TAG: self.task}
        return list(self.instance.get_runs(dg.RunsFilter(tags=tags)))

    def made(self, stage: str) -> dict[str, list[tuple[int, str]]]:
        """Event and data version of each materialisation of each partition, the latest first."""
        found: dict[str, list[tuple[int, str]]] = {}
        filters = dg.AssetRecordsFilter(self.asset_key(stage))
        for record in self.instance.fetch_materializations(filters, limit=100).records:
            assert record.asset_materialization is not None and record.partition_key is not None
            version = (record.asset_materialization.tags or {})["dagster/data_version"]
            found.setdefault(record.partition_key, []).append((record.storage_id, version))
        return found

    def failure(self, run_id: str) -> str:
        """What the UI shows of the failed step."""
        logs = self.instance.all_logs(run_id, of_type=dg.DagsterEventType.STEP_FAILURE)
        found = [entry.dagster_event.step_failure_data for entry in logs if entry.dagster_event]
        return "\n".join(
            (data.user_failure_data.description or "") if data.user_failure_data else str(data)
            for data in found
        )


@dataclass
class Step(Task):
    """A task of one step, which reads what that of another leaves."""

    def write_step(self, step: str, **fields: str) -> None:
        self.write_steps(distillation={"step": step, **fields}, sensor=WATCHING["sensor"])

    def write_file(self, name: str, content: Mapping[str, Any]) -> str:
        """Of data sets or merge groups; gives its path in the project."""
        path = self.write_yaml(f"distillation/{name}", content)
        return path.relative_to(self.root).as_posix()


@dataclass
class Living:
    """What the tests of this file share."""

    dev: Dev
    tasks: dict[str, Task]


ODD = (
    "comma, space & 'quotes\".jsonl",
    "100%|pipe.jsonl",
    "new\nline.jsonl",
    "数据/中文 a...b.jsonl",
    "%2C looks encoded.jsonl",
)
WATCHING = {"sensor": {"enabled": True, "interval_seconds": 1}, "concurrency": {"files_per_run": 1}}
RANGED = [f"r{number}.parquet" for number in range(7)]
SEVERAL = [f"{number:02}.parquet" for number in range(20)]
BROKEN = [SEVERAL[5], SEVERAL[14]]
FEW = ["a.jsonl", "b.jsonl", "c.jsonl", "d.jsonl"]
VICTIMS = [f"v{number}.jsonl" for number in range(6)]
CHAIN = {"converts": "chatml", "merges": "merged", "answers": "responses"}
"""A task for each step, and its last stage."""
TALKS = ("one.jsonl", "two.jsonl")
"""Data sets, and the merge groups of one each."""


@pytest.fixture(scope="module")
def living(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Living]:
    root = tmp_path_factory.mktemp("living") / "project"
    (root / "dagster_home").mkdir(parents=True)
    shutil.copy(REPOSITORY / "workspace.yaml", root)
    shutil.copy(REPOSITORY / "dagster_home/dagster.yaml", root / "dagster_home")
    with ExitStack() as stack:
        instance = stack.enter_context(dg.DagsterInstance.from_config(str(root / "dagster_home")))
        tasks = {
            name: kind(
                root,
                name,
                f"data/{name}/in",
                server=stack.enter_context(serve_in_thread()),
                instance=instance,
            )
            for kind, names in (
                (Task, ("watched", "ranged", "capped", "aged", "several", "few", "victim")),
                (Step, CHAIN),
            )
            for name in names
        }
        for name, task in tasks.items():
            own = "${REHEARSAL_BASE_URL}" if name == "watched" else task.server.base_url
            task.write_model({"client_config": {"base_url": own}}, file=name)
            task.write_prompt(file=name)
        _write_tasks(tasks)
        _write_chain(tasks)
        dev = Dev(root, tasks["watched"].server.base_url)
        stack.callback(lambda: dev.process and dev.stop())
        dev.start()
        yield Living(dev, tasks)
        dev.stop()
        assert dev.processes() == []


def own_files(task: Task, changes: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "model": {"config_path": f"configs/models/{task.task}.yaml"},
        "prompt": {"config_path": f"configs/prompts/{task.task}.yaml"},
        **changes,
    }


def _write_tasks(tasks: Mapping[str, Task]) -> None:
    changes: dict[str, dict[str, Any]] = {
        "watched": WATCHING,
        "ranged": {**WATCHING, "preprocess": PREPROCESS, "concurrency": {"files_per_run": 3}},
        "capped": {**WATCHING, "sensor": {**WATCHING["sensor"], "max_runs_per_tick": 2}},
        "aged": {**WATCHING, "preprocess": PREPROCESS},
        "several": {"concurrency": {"files_per_run": 10}},
        "few": {"concurrency": {"files_per_run": 1}},
        "victim": {"concurrency": {"files_per_run": 3}},
    }
    for name, change in changes.items():
        tasks[name].write_task(own_files(tasks[name], change))
    watched = tasks["watched"]
    for name in ("plain.jsonl", *ODD):
        watched.write_input(name, some_rows(3, name))
    (watched.input_folder / "broken.parquet").write_bytes(UNREADABLE)
    for name in RANGED:
        tasks["ranged"].write_input(name, some_rows(3, name))
    (tasks["ranged"].input_folder / RANGED[1]).write_bytes(UNREADABLE)
    for number in range(5):
        tasks["capped"].write_input(f"{number}.jsonl", some_rows(2, str(number)))
    tasks["aged"].write_input("a.jsonl", some_rows(3))
    for name in SEVERAL:
        tasks["several"].write_input(name, some_rows(6, name))
    for name in BROKEN:
        (tasks["several"].input_folder / name).write_bytes(UNREADABLE)
    for name in FEW:
        tasks["few"].write_input(name, some_rows(3, name))
    for name in VICTIMS:
        tasks["victim"].write_input(name, some_rows(40, name))


def talk(name: str) -> list[dict[str, str]]:
    """The rows of a data set."""
    return [{"text": f"{name}, question {number}?"} for number in range(3)]


def _write_chain(tasks: Mapping[str, Task]) -> None:
    converts, merges, answers = (tasks[name] for name in CHAIN)
    assert isinstance(converts, Step) and isinstance(merges, Step) and isinstance(answers, Step)
    style = {"format_style": "prompt_text_only", "column_mapping": {"prompt_text": "text"}}
    converts.write_step(
        "chatml_conversion",
        dataset_config_path=converts.write_file("sets", dict.fromkeys(TALKS, style)),
        input_dir=converts.inputs,
        output_dir="data/conversations",
    )
    groups = [
        {"name": name, "output_file": name, "input_files": [f"{Path(name).stem}/*.jsonl"]}
        for name in TALKS
    ]
    merges.write_step(
        "jsonl_merge",
        merge_config_path=merges.write_file("groups", {"merge_groups": groups}),
        base_input_dir="data/conversations",
        base_output_dir="data/joined",
    )
    answers.write_step(
        "generate_response",
        response_config_path="configs/models/answers.yaml",
        input_path="data/joined",
        output_path="data/answers",
    )
    for name in TALKS:
        converts.write_input(name, talk(name))


# --- backfills in the background ---------------------------------------------------------------


@dataclass
class Sampler:
    """Looks at a task again and again while a backfill runs: is its status true at each moment?"""

    task: Task
    home: Path
    half_done: list[str] = field(default_factory=list)
    """Runs that were seen with some of their files green and some not, while they ran."""
    early: list[str] = field(default_factory=list)
    """Files that were green before they were published."""
    looks: int = 0
    _end: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        assert self._thread is not None
        self._end.set()
        self._thread.join(timeout=30)

    def _work(self) -> None:
        with dg.DagsterInstance.from_config(str(self.home)) as instance:
            task = replace(self.task, instance=instance)
            while not self._end.wait(POLL_S):
                self._look(task)

    def _look(self, task: Task) -> None:
        self.looks += 1
        started = dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED])
        runs = [run for run in task.instance.get_runs(started) if _scores(run, task)]
        statuses = task.state()
        green = {key for key, status in statuses.items() if status == GREEN}
        self.early += [key for key in green if not task.output(key).exists()]
        still = {run.run_id for run in task.instance.get_runs(started)}
        for run in runs:
            keys = _keys(run, list(statuses))
            if run.run_id in still and set(keys) & green and set(keys) - green:
                self.half_done.append(run.run_id)


def _scores(run: dg.DagsterRun, task: Task) -> bool:
    return task.asset_key("scores") in (run.asset_selection or ())


def _keys(run: dg.DagsterRun, keys: Sequence[str]) -> list[str]:
    """The partitions of a run, in the order of `keys`."""
    one = run.tags.get("dagster/partition")
    start = run.tags.get("dagster/asset_partition_range_start", one)
    end = run.tags.get("dagster/asset_partition_range_end", one)
    if start is None or end is None:
        return []
    return list(keys[keys.index(start) : keys.index(end) + 1])


@dataclass
class Backfills:
    several: str
    few: str
    sampler: Sampler
    several_ended: tuple[Statuses, Statuses, dict[str, Any], dict[str, list[str]]] | None = None
    """Status of raw and scores, what the endpoint saw, and the check of raw."""


@pytest.fixture(scope="module")
def backfills(living: Living) -> Iterator[Backfills]:
    """Launched before the first test, looked at by the last ones."""
    several, few = living.tasks["several"], living.tasks["few"]
    several.server.set_faults(Faults(latency_ms=200))
    assert few.materialize(FEW[:2]).failed == []
    missing = [key for key, status in few.state().items() if status is None]
    assert missing == FEW[2:]
    sampler = Sampler(several, living.dev.home)
    made = Backfills(
        living.dev.backfill("several", STAGES, register(several.instance, several.steps()).keys),
        living.dev.backfill("few", STAGES, missing),
        sampler,
    )
    sampler.start()
    yield made
    sampler.stop()


@pytest.fixture(scope="module")
def launched(living: Living, backfills: Backfills) -> dict[str, str]:
    """Two more, when the first have ended: of the files that failed, now mended, and of a task that
    will be killed meanwhile and is slow until then."""
    several, victim = living.tasks["several"], living.tasks["victim"]
    several.wait(lambda: living.dev.backfill_status(backfills.several).startswith("COMPLETED"))
    backfills.sampler.stop()
    checked = living.dev.checked("several", "raw")
    ended = several.state("raw"), several.state(), several.server.stats(), checked
    backfills.several_ended = ended
    for name in BROKEN:
        several.write_input(name, some_rows(6, name))
    several.server.reset()
    victim.server.set_faults(Faults(latency_ms=2500))
    failed = [key for key, status in several.state("raw").items() if status == RED]
    keys = register(victim.instance, victim.steps()).keys
    return {
        "several": living.dev.backfill("several", STAGES, failed),
        "victim": living.dev.backfill("victim", STAGES, keys),
    }


# --- the tests ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("backfills")
class TestSensor:
    def test_files_are_scored_whatever_their_names(self, living: Living) -> None:
        watched = living.tasks["watched"]
        names = {encode_key(name): name for name in ("plain.jsonl", *ODD)}
        watched.wait(lambda: watched.is_green(*names))
        for key, name in names.items():
            assert watched.is_green(key, stage="raw")
            assert len(watched.runs_of(key)) == 1
            assert [row["id"] for row in watched.scores(name)] == [f"{name}-{n}" for n in range(3)]
        folder = watched.root / "data/watched/scores"
        found = {path.relative_to(folder).as_posix() for path in folder.rglob("[!.]*.parquet")}
        assert found == {name.removesuffix(".jsonl") + ".parquet" for name in names.values()}
        assert watched.server.stats()["repeated_ok"] == 0
        for stage in STAGES:
            assert set(living.dev.checked("watched", stage)["succeeded"]) >= set(names)

    def test_no_more_than_max_runs_per_tick_and_all_in_the_end(self, living: Living) -> None:
        capped = living.tasks["capped"]
        keys = [f"{number}.jsonl" for number in range(5)]
        capped.wait(lambda: capped.is_green(*keys))
        launched = [len(tick["runIds"]) for tick in living.dev.ticks("capped")]
        assert max(launched) == 2 and sum(launched) == 5
        assert [len(capped.runs_of(key)) for key in keys] == [1] * 5
        capped.wait(lambda: "no new or changed file" in living.dev.reason("capped"))

    def test_runs_of_several_files_are_of_one_stage_and_of_what_is_due(
        self, living: Living
    ) -> None:
        ranged, broken = living.tasks["ranged"], RANGED[1]
        good = [key for key in RANGED if key != broken]
        ranged.wait(lambda: ranged.is_green(*good))
        ranged.wait(lambda: "no new or changed file" in living.dev.reason("ranged"))
        assert ranged.state("raw") == dict.fromkeys(good, GREEN) | {broken: RED}
        for stage in ("preprocessed", "scores"):
            assert ranged.state(stage) == dict.fromkeys(good, GREEN) | {broken: None}
            assert living.dev.checked("ranged", stage) == {"succeeded": good}
        assert self._launched(ranged, "raw") == [RANGED[:3], RANGED[3:6], RANGED[6:]]
        for stage in ("preprocessed", "scores"):
            assert sorted(chain(*self._launched(ranged, stage))) == good, "each once"
        stats = ranged.server.stats()
        assert (stats["requests"], stats["distinct"]) == (18, 18)

        ranged.write_input(broken, some_rows(3, broken))
        ranged.write_input("late.parquet", some_rows(3, "late"))
        changed = some_rows(5, RANGED[2])
        ranged.write_input(RANGED[2], changed)
        every = [*RANGED, "late.parquet"]
        ranged.wait(lambda: ranged.is_green(*every) and len(ranged.scores(RANGED[2])) == 5)
        ranged.wait(lambda: "no new or changed file" in living.dev.reason("ranged"))
        assert ranged.staleness() == dict.fromkeys(every, FRESH)
        for stage, before in (("raw", RANGED), ("preprocessed", good), ("scores", good)):
            launched = sorted(chain(*self._launched(ranged, stage)))
            assert launched == sorted([*before, broken, "late.parquet", RANGED[2]]), stage
        assert ranged.server.stats()["requests"] == 18 + 3 + 3 + 2

    def test_a_dropped_file_is_scored_and_a_changed_one_pays_its_new_rows(
        self, living: Living
    ) -> None:
        watched = living.tasks["watched"]
        watched.write_input("deep/dropped.jsonl", some_rows(4, "dropped"))
        watched.wait(lambda: watched.is_green("deep/dropped.jsonl"))
        sent = watched.server.stats()
        rows = [*some_rows(4, "dropped"), *some_rows(2, "late")]
        watched.write_input("deep/dropped.jsonl", rows)
        watched.wait(lambda: len(watched.scores("deep/dropped.jsonl")) == 6)
        watched.wait(lambda: watched.is_green("deep/dropped.jsonl"))
        assert [row["id"] for row in watched.scores("deep/dropped.jsonl")] == [
            row["id"] for row in rows
        ]
        assert watched.server.stats()["requests"] - sent["requests"] == 2
        assert watched.server.stats()["repeated_ok"] == sent["repeated_ok"]
        assert len(watched.runs_of("deep/dropped.jsonl")) == 2

    def test_a_broken_file_is_red_with_its_reason_and_tried_again_only_when_it_changed(
        self, living: Living
    ) -> None:
        watched = living.tasks["watched"]
        watched.wait(lambda: watched.state("raw", ["broken.parquet"]) == {"broken.parquet": RED})
        (run,) = watched.runs_of("broken.parquet")
        reason = watched.failure(run.run_id)
        assert "broken.parquet: not a readable Parquet file" in reason
        watched.write_input("once_green.parquet", some_rows(2, "green"))
        watched.wait(lambda: watched.is_green("once_green.parquet"))
        # Green first, then broken: not the same to the sensor as broken from the start.
        (watched.input_folder / "once_green.parquet").write_bytes(UNREADABLE)
        keys = ["broken.parquet", "once_green.parquet"]
        watched.wait(lambda: set(watched.state("raw", keys).values()) == {RED})
        self._look_again(living)
        assert [len(watched.runs_of(key)) for key in keys] == [1, 2]
        assert living.dev.checked("watched", "raw")["failed"] == keys

        for key in keys:
            watched.write_input(key, some_rows(2, f"mended {key}"))
        watched.wait(lambda: watched.is_green(*keys) and watched.is_green(*keys, stage="raw"))
        assert [len(watched.runs_of(key)) for key in keys] == [2, 3]
        assert {*living.dev.checked("watched", "raw")} == {"succeeded"}
        assert watched.scores("broken.parquet")[0]["id"] == "mended broken.parquet-0"

    def test_a_lost_cursor_launches_nothing_twice(self, living: Living) -> None:
        watched = living.tasks["watched"]
        watched.wait(lambda: "no new or changed file" in living.dev.reason("watched"))
        before = len(self._runs(watched))
        self._look_again(living)
        watched.wait(lambda: "no new or changed file" in living.dev.reason("watched"))
        assert len(self._runs(watched)) == before

    @pytest.mark.usefixtures("launched")
    def test_a_deleted_input_keeps_its_results_and_says_so_once(self, living: Living) -> None:
        watched = living.tasks["watched"]
        watched.write_input("kept.jsonl", some_rows(2, "kept"))
        (watched.input_folder / "never.parquet").write_bytes(UNREADABLE)
        watched.wait(lambda: watched.is_green("kept.jsonl"))
        watched.wait(lambda: watched.state("raw", ["never.parquet"]) == {"never.parquet": RED})
        for name in ("kept.jsonl", "never.parquet"):
            (watched.input_folder / name).unlink()
        watched.wait(lambda: "never.parquet" not in watched.partitions())
        watched.wait(lambda: self._observations(watched, "kept.jsonl"))
        self._look_again(living)
        assert self._observations(watched, "kept.jsonl") == [
            "the input file is gone; its results are kept"
        ]
        assert "kept.jsonl" in watched.partitions() and watched.is_green("kept.jsonl")
        assert len(watched.scores("kept.jsonl")) == 2

    def test_a_folder_that_is_away_is_a_skipped_tick_that_names_it(self, living: Living) -> None:
        watched = living.tasks["watched"]
        folder = watched.input_folder
        before, keys = len(self._runs(watched)), watched.partitions()
        folder.rename(folder.with_name("away"))
        watched.wait(lambda: str(folder) in living.dev.reason("watched"))
        (tick,) = living.dev.ticks("watched", 1)
        assert tick["status"] == "SKIPPED" and tick["error"] is None
        assert "not found" in tick["skipReason"]
        assert watched.partitions() == keys
        folder.with_name("away").rename(folder)
        watched.wait(lambda: "no new or changed file" in living.dev.reason("watched"))
        assert len(self._runs(watched)) == before
        watched.write_input("after.jsonl", some_rows(1, "after"))
        watched.wait(lambda: watched.is_green("after.jsonl"))

    @staticmethod
    def _look_again(living: Living) -> None:
        """A full comparison by the sensor, which remembers nothing."""
        watched, dev = living.tasks["watched"], living.dev
        last = int(dev.ticks("watched", 1)[0]["tickId"])

        def compared() -> bool:
            dev.lose_cursor("watched")  # a tick that is under way may write it again
            reasons = [
                tick["skipReason"] or ""
                for tick in dev.ticks("watched", 5)
                if int(tick["tickId"]) > last and tick["status"] != "STARTED"
            ]
            return any("no new or changed file" not in reason for reason in reasons)

        watched.wait(compared)

    @classmethod
    def _launched(cls, task: Task, stage: str) -> list[list[str]]:
        """The keys of each of its runs, which are of no other stage."""
        asset = {task.asset_key(stage)}
        runs = [run for run in cls._runs(task) if run.asset_selection == asset]
        return sorted(_keys(run, task.partitions()) for run in runs)

    @staticmethod
    def _runs(task: Task) -> Sequence[dg.DagsterRun]:
        return task.instance.get_runs(dg.RunsFilter(tags={TASK_TAG: task.task}))

    @staticmethod
    def _observations(task: Task, key: str) -> list[str | None]:
        filters = dg.AssetRecordsFilter(task.asset_key("raw"), asset_partitions=[key])
        records = task.instance.fetch_observations(filters, limit=20).records
        found = [record.asset_observation for record in records]
        return [observation.description for observation in found if observation is not None]


@pytest.mark.usefixtures("backfills")
class TestStaleness:
    """`tests/test_assets.py` has the cases; this is what the asset page shows of them."""

    FRESH: Mapping[str, str] = {"raw": "FRESH", "preprocessed": "FRESH", "scores": "FRESH"}

    def test_the_ui_calls_stale_what_changed_and_nothing_else(self, living: Living) -> None:
        aged, dev = living.tasks["aged"], living.dev
        aged.wait(lambda: aged.is_green("a.jsonl"))
        assert self._statuses(living) == self.FRESH
        base = own_files(aged, {**WATCHING, "preprocess": PREPROCESS})
        endpoint = {"client_config": {"base_url": aged.server.base_url}}

        aged.write_model(endpoint | {"prices": {"usd_per_million_input_tokens": 3}}, file="aged")
        limits = {"max_concurrent_requests": 9, "files_per_run": 1}
        aged.write_task(base | {"concurrency": limits})
        dev.reload()
        assert self._statuses(living) == self.FRESH, "prices and limits shape no row"

        aged.write_model(endpoint | {"chat_config": {"temperature": 0.7}}, file="aged")
        dev.reload()
        assert self._statuses(living) == {**self.FRESH, "scores": "STALE"}
        assert dev.staleness("aged", "a.jsonl")["scores"][1] == ["has a new code version"]

        aged.write_model(endpoint, file="aged")
        aged.write_prompt({"prompt_template": {"prompt_text": "Again:\n{text}\n"}}, file="aged")
        dev.reload()
        assert self._statuses(living) == {**self.FRESH, "scores": "STALE"}

        aged.write_prompt(file="aged")
        aged.write_task(base | {"preprocess": {**PREPROCESS, "max_tokens": 4096}})
        dev.reload()
        stale = self._statuses(living)
        assert (stale["raw"], stale["preprocessed"]) == ("FRESH", "STALE")

        aged.write_task(base)
        dev.reload()
        assert self._statuses(living) == self.FRESH, "as it was"

    def test_a_changed_input_is_stale_until_the_sensor_has_run_it(self, living: Living) -> None:
        aged, dev = living.tasks["aged"], living.dev
        aged.wait(lambda: aged.is_green("a.jsonl"))
        aged.server.set_faults(Faults(latency_ms=1500))
        aged.write_input("a.jsonl", some_rows(12, "changed"))
        seen: list[str] = []

        def fresh_again() -> bool:
            seen.append(dev.staleness("aged", "a.jsonl")["scores"][0])
            return "STALE" in seen and seen[-1] == "FRESH"

        aged.wait(fresh_again)
        assert self._statuses(living) == self.FRESH
        assert len(aged.scores("a.jsonl")) == 12

    @staticmethod
    def _statuses(living: Living) -> dict[str, str]:
        found = living.dev.staleness("aged", "a.jsonl")
        return {stage: status for stage, (status, _) in found.items()}


class TestFollowers:
    def test_a_changed_row_runs_its_own_chain_and_is_all_that_is_paid_for(
        self, living: Living
    ) -> None:
        converts, answers = living.tasks["converts"], living.tasks["answers"]
        answers.wait(lambda: answers.is_green(*TALKS, stage="responses"))
        self._wait_until_still(living)
        before = self._made(living)
        assert {len(events) for made in before.values() for events in made.values()} == {1}
        assert answers.server.stats()["requests"] == 2 * 3

        rows = talk("one.jsonl")
        rows[1] = {"text": "another?"}
        converts.write_input("one.jsonl", rows)
        asked = [row["text"] for row in rows]
        answers.wait(lambda: self._questions(answers, "one.jsonl") == asked)
        answers.wait(lambda: len(answers.made("responses")["one.jsonl"]) == 2)
        self._wait_until_still(living)
        after = self._made(living)
        for stage in ("raw", *CHAIN.values()):
            (changed, untouched) = sorted(after[stage])
            assert [len(after[stage][key]) for key in (changed, untouched)] == [2, 1], stage
            assert after[stage][untouched] == before[stage][untouched]
            new, old = after[stage][changed]
            assert [old] == before[stage][changed] and new[1] != old[1]
        stats = answers.server.stats()
        assert (stats["requests"], stats["distinct"]) == (7, 7)
        texts = [row["text"] for row in talk("two.jsonl")]
        assert self._questions(answers, "two.jsonl") == texts
        launched = [run.tags["dagster/sensor_name"] for run in answers.runs_of("one.jsonl")]
        assert launched == ["answers_followers"] * 2

    @staticmethod
    def _made(living: Living) -> dict[str, dict[str, list[tuple[int, str]]]]:
        made = {stage: living.tasks[name].made(stage) for name, stage in CHAIN.items()}
        return {"raw": living.tasks["converts"].made("raw"), **made}

    @staticmethod
    def _questions(answers: Task, name: str) -> list[str]:
        return [row["messages"][-1]["content"] for row in answers.responses(name)]

    @staticmethod
    def _wait_until_still(living: Living) -> None:
        """No run is left, and each sensor has looked since and found nothing to launch."""
        dev, answers = living.dev, living.tasks["answers"]
        sensors = {"converts": "files", "merges": "followers", "answers": "followers"}
        tags = {TASK_TAG: list(sensors)}
        unfinished = dg.RunsFilter(tags=tags, statuses=list(NOT_FINISHED_STATUSES))

        def is_still() -> bool:
            if answers.instance.get_runs(unfinished):
                return False
            last = {task: dev.ticks(task, 1, sensor)[0] for task, sensor in sensors.items()}
            answers.wait(lambda: all(map(has_looked, last.items())))
            return not answers.instance.get_runs(unfinished)

        def has_looked(last: tuple[str, dict[str, Any]]) -> bool:
            task, tick = last
            (latest, *_) = dev.ticks(task, 1, sensors[task])
            return int(latest["tickId"]) > int(tick["tickId"]) and latest["status"] == "SKIPPED"

        answers.wait(is_still)


@pytest.mark.usefixtures("launched")
class TestBackfill:
    def test_several_files_a_run_of_which_two_are_broken(
        self, living: Living, backfills: Backfills
    ) -> None:
        several = living.tasks["several"]
        assert backfills.several_ended is not None
        raw, scores, stats, checked = backfills.several_ended
        good = [key for key in SEVERAL if key not in BROKEN]
        assert raw == dict.fromkeys(good, GREEN) | dict.fromkeys(BROKEN, RED)
        assert scores == dict.fromkeys(good, GREEN) | dict.fromkeys(BROKEN)
        runs = several.instance.get_runs(
            dg.RunsFilter(tags={"dagster/backfill": backfills.several})
        )
        scored = [key for run in runs if _scores(run, several) for key in _keys(run, SEVERAL)]
        assert sorted(scored) == good, "the 18, each once"
        reasons = "\n".join(several.failure(run.run_id) for run in runs)
        for key in BROKEN:
            assert f"{key}: not a readable Parquet file" in reasons
        assert (stats["requests"], stats["distinct"]) == (18 * 6, 18 * 6)
        assert checked == {"succeeded": good, "failed": BROKEN}
        sampler = backfills.sampler
        assert sampler.half_done, f"no run was seen half done in {sampler.looks} looks"
        assert sampler.early == []

    def test_one_file_a_run_of_what_is_missing(self, living: Living, backfills: Backfills) -> None:
        few = living.tasks["few"]
        few.wait(lambda: living.dev.backfill_status(backfills.few) == "COMPLETED_SUCCESS")
        assert few.state() == dict.fromkeys(FEW, GREEN)
        assert living.dev.checked("few") == {"succeeded": FEW}, "also those that run-task has made"
        tags = {"dagster/backfill": backfills.few}
        runs = few.instance.get_runs(dg.RunsFilter(tags=tags))
        assert sorted(_keys(run, FEW) for run in runs) == [[key] for key in FEW[2:]]
        assert few.server.stats()["requests"] == 4 * 3
        assert few.server.stats()["repeated_ok"] == 0


class TestRepairAndDeath:
    def test_a_backfill_of_the_mended_files_touches_only_these(
        self, living: Living, launched: dict[str, str]
    ) -> None:
        several = living.tasks["several"]
        several.wait(lambda: several.is_green(*SEVERAL))
        assert several.is_green(*SEVERAL, stage="raw")
        stats = several.server.stats()
        assert (stats["requests"], stats["distinct"]) == (2 * 6, 2 * 6)
        tags = {"dagster/backfill": launched["several"]}
        for run in several.instance.get_runs(dg.RunsFilter(tags=tags)):
            assert set(_keys(run, SEVERAL)) <= set(BROKEN)
        for stage in STAGES:
            assert living.dev.checked("several", stage) == {"succeeded": SEVERAL}

    def test_killed_in_the_middle_and_started_again_it_ends_once(
        self, living: Living, launched: dict[str, str]
    ) -> None:
        victim, dev = living.tasks["victim"], living.dev

        def in_state(status: AssetPartitionStatus) -> list[str]:
            return [key for key, found in victim.state().items() if found == status]

        victim.wait(lambda: victim.server.stats()["answered"])
        victim.server.set_faults(Faults(latency_ms=250))
        victim.wait(lambda: victim.server.stats()["answered"] >= 100 and in_state(GREEN))
        dev.kill()
        assert dev.processes() == []
        until(lambda: victim.server.stats()["in_flight"] == 0)
        at_death, done = victim.server.stats(), in_state(GREEN)
        assert 0 < len(done) < len(VICTIMS) and at_death["answered"] < 240
        running = dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED])
        dead = [run.run_id for run in victim.instance.get_runs(running)]
        assert dead, "nobody was left to say how they ended"

        victim.server.set_faults(NO_FAULTS)
        dev.start()
        same = dg.RunsFilter(run_ids=dead, statuses=running.statuses)
        victim.wait(lambda: not victim.instance.get_runs(same))
        for run in victim.instance.get_runs(dg.RunsFilter(run_ids=dead)):
            assert run.status == dg.DagsterRunStatus.FAILURE
        pools = victim.instance.event_log_storage
        for pool in pools.get_concurrency_keys():
            held = {slot.run_id for slot in pools.get_concurrency_info(pool).claimed_slots}
            assert not held & set(dead)
        # A run that waited in the queue when all was killed is taken up again.
        victim.wait(lambda: not in_state(AssetPartitionStatus.IN_PROGRESS))
        failed = in_state(RED)
        assert failed and sorted([*failed, *in_state(GREEN)]) == VICTIMS
        assert set(done) <= set(in_state(GREEN))
        again = dev.backfill("victim", ["scores"], failed)
        victim.wait(lambda: victim.is_green(*VICTIMS))
        victim.wait(lambda: dev.backfill_status(again) == "COMPLETED_SUCCESS")
        assert dev.backfill_status(launched["victim"]) == "COMPLETED_FAILED"
        for name in VICTIMS:
            assert [row["id"] for row in victim.scores(name)] == [f"{name}-{n}" for n in range(40)]
        stats = victim.server.stats()
        assert stats["distinct"] == 240
        assert at_death["abandoned"] + stats["repeated_ok"] <= 4, "what was in flight"
        assert stats["requests"] == 240 + at_death["abandoned"] + stats["repeated_ok"]
        assert {key: len(self._materializations(victim, key)) for key in VICTIMS} == dict.fromkeys(
            VICTIMS, 1
        )

    @staticmethod
    def _materializations(task: Task, key: str) -> Sequence[Any]:
        filters = dg.AssetRecordsFilter(task.asset_key("scores"), asset_partitions=[key])
        return task.instance.fetch_materializations(filters, limit=10).records


class TestOneLook:
    """The sensor's function by itself."""

    def test_what_is_left_over_by_the_cap_waits_for_the_next_look(self, project: Project) -> None:
        one = {"concurrency": {"files_per_run": 1}}
        project.write_task({"sensor": {"max_runs_per_tick": 2}, **one})
        result = project.look()[0]
        assert [request.partition_key for request in result.run_requests or ()] == [
            "a.jsonl",
            "deep/b.parquet",
        ]
        assert (
            len(project.instance.get_dynamic_partitions("rate/files")) == 3 and result.cursor == ""
        )
        project.write_task({"sensor": {"max_runs_per_tick": 3}, **one})
        result = project.look()[0]
        assert len(result.run_requests or ()) == 3 and result.cursor

    def test_a_range_is_of_neighbours_that_are_due(self, project: Project) -> None:
        assert project.launched()[0] == [({"raw"}, [A, B, C])]
        project.write_task({"concurrency": {"files_per_run": 2}})
        assert project.launched()[0] == [({"raw"}, [A, B]), ({"raw"}, [C])]
        project.materialize([B])
        assert project.launched()[0] == [({"raw"}, [A]), ({"raw"}, [C])]
        project.write_task({"sensor": {"max_runs_per_tick": 1}})
        launched, cursor = project.launched()
        assert (launched, cursor) == ([({"raw"}, [A])], ""), "the rest waits for the next look"

    def test_what_a_range_has_tried_is_known_whatever_files_per_run_is(
        self, project: Project
    ) -> None:
        (project.input_folder / B).write_bytes(UNREADABLE)
        result, _ = project.look()
        assert isinstance(result, dg.SensorResult) and result.run_requests
        (request,) = result.run_requests
        job = project.definitions().resolve_implicit_global_asset_job_def()
        job.execute_in_process(
            instance=project.instance,
            asset_selection=[*(request.asset_selection or ())],
            tags={**request.tags, "dagster/run_key": request.run_key or ""},
            raise_on_error=False,
        )
        assert project.launched()[0] == [({"scores"}, [A]), ({"scores"}, [C])]
        one = {"concurrency": {"files_per_run": 1}}
        project.write_task(one)
        assert project.launched()[0] == [], "the broken one neither"
        project.write_input(B, some_rows(1))
        assert project.launched()[0] == [({"raw", "scores"}, [B])]

    def test_what_people_have_made_is_not_followed(self, project: Project) -> None:
        project.look()
        job = project.definitions().resolve_implicit_global_asset_job_def()
        job.execute_in_process(
            instance=project.instance, asset_selection=[project.asset_key("raw")], partition_key=A
        )
        assert project.launched()[0] == [({"raw"}, [B, C])]

    def test_files_beyond_a_cap_are_not_taken_for_deleted(self, project: Project) -> None:
        project.materialize(NAMES[:2])
        project.write_task({"debug": {"enabled": True, "max_files": 1}})
        result = project.look()[0]
        assert not result.dynamic_partitions_requests and not result.asset_events

    def test_a_group_is_launched_when_all_its_members_are_there_and_have_changed(
        self, project: Project, server: RehearsalServer
    ) -> None:
        merges = Step(project.root, "merges", server=server, instance=project.instance)
        members = {"all": ["a.jsonl", "deep/er/c.jsonl"], "one": ["a.jsonl"]}
        groups = [
            {"name": name, "output_file": f"{name}.jsonl", "input_files": files}
            for name, files in members.items()
        ]
        merges.write_step(
            "jsonl_merge",
            merge_config_path=merges.write_file("groups", {"merge_groups": groups}),
            base_input_dir="data/in",
            base_output_dir="data/joined",
        )
        steps = merges.steps()

        def launched() -> list[str | None]:
            result = followers_sensor(steps)(dg.build_sensor_context(instance=project.instance))
            assert isinstance(result, dg.SensorResult)
            return [request.partition_key for request in result.run_requests or ()]

        assert launched() == []
        steps.stage("raw").make("a.jsonl", Tally())
        assert launched() == ["one.jsonl"]
        steps.stage("raw").make("deep/er/c.jsonl", Tally())
        assert launched() == ["all.jsonl", "one.jsonl"]
        for key in ("all.jsonl", "one.jsonl"):
            steps.stage("merged").make(key, Tally())
        assert launched() == []
        project.write_input("deep/er/c.jsonl", some_rows(1, "new"))
        steps.stage("raw").make("deep/er/c.jsonl", Tally())
        assert launched() == ["all.jsonl"]
