"""The graph in a real Dagster instance, against a real endpoint: versions, endings, checks."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import dagster as dg
import orjson
import pyarrow.parquet as pq
import pytest
from project import (
    DAGSTER_YAML,
    FRESH,
    GENERATE,
    GREEN,
    NAMES,
    PREPROCESS,
    QUIET,
    RED,
    STALE,
    TASK,
    A,
    B,
    C,
    Project,
    looked_at_by,
    read_rows,
    some_rows,
    write_rows,
)

from modelcall_assets.defs.assets import interruptible
from modelcall_assets.defs.instance import FORGOTTEN_AT_ONCE, register
from modelcall_assets.defs.runs import PROCESS_TAG, TaskRunner
from modelcall_assets.rehearsal import NO_FAULTS, Faults, RehearsalServer, serve_in_thread

POOL = "rate"


def materialize(
    project: Project,
    keys: Sequence[str] = NAMES,
    stages: Sequence[str] = ("raw", "scores"),
    *,
    fresh: bool = False,
    instance: dg.DagsterInstance | None = None,
) -> dg.ExecuteInProcessResult:
    """What the UI would run for neighbouring keys: one run of all stages for one key, else one run
    per stage. Gives the last run."""
    instance = instance or project.instance
    register(instance, project.steps())
    job = project.definitions().resolve_implicit_global_asset_job_def()
    ops = {"rate__scores": {"config": {"fresh": True}}} if fresh else {}
    if len(keys) == 1:
        return job.execute_in_process(
            instance=instance,
            asset_selection=[project.asset_key(stage) for stage in stages],
            partition_key=keys[0],
            run_config={**QUIET, "ops": ops},
            raise_on_error=False,
        )
    for stage in stages:
        result = job.execute_in_process(
            instance=instance,
            asset_selection=[project.asset_key(stage)],
            tags={
                "dagster/asset_partition_range_start": keys[0],
                "dagster/asset_partition_range_end": keys[-1],
            },
            run_config={**QUIET, "ops": ops if stage == "scores" else {}},
            raise_on_error=False,
        )
    return result


def succeed(*arguments: Any, **options: Any) -> dg.ExecuteInProcessResult:
    """`materialize`, with the reason when it fails."""
    result = materialize(*arguments, **options)
    failures = [e for e in result.all_events if e.event_type == dg.DagsterEventType.STEP_FAILURE]
    assert result.success, "\n".join(str(e.step_failure_data.error) for e in failures)
    return result


def failure(result: dg.ExecuteInProcessResult) -> str:
    """What the UI shows of the failed step."""
    assert not result.success
    (event,) = [e for e in result.all_events if e.event_type == dg.DagsterEventType.STEP_FAILURE]
    data = event.step_failure_data.user_failure_data
    assert data is not None and data.description is not None, event.step_failure_data.error
    return data.description


def version_tags(
    project: Project, stage: str, key: str, instance: dg.DagsterInstance | None = None
) -> dict[str, str]:
    """Tags of the latest materialisation that decide about staleness."""
    instance = instance or project.instance
    filters = dg.AssetRecordsFilter(project.asset_key(stage), asset_partitions=[key])
    (record,) = instance.fetch_materializations(filters, limit=1).records
    materialization = record.asset_materialization
    assert materialization is not None
    return {
        name: value
        for name, value in (materialization.tags or {}).items()
        if name.split("/")[1] != "input_event_pointer" or value.isdigit()
    }


def check_results(project: Project, stage: str) -> dict[str, dict[str, bool]]:
    """Per partition: what its check has looked at, and whether that was as it should be."""
    found: dict[str, dict[str, bool]] = {key: {} for key in NAMES}
    check = dg.AssetCheckKey(project.asset_key(stage), "complete")
    storage = project.instance.event_log_storage
    for record in storage.get_asset_check_execution_history(check, 100):
        evaluation = record.evaluation
        if evaluation is not None and found.get(evaluation.partition or "") == {}:
            looked_at = looked_at_by(evaluation)
            assert evaluation.passed is all(looked_at.values())
            found[evaluation.partition or ""] = looked_at
    return found


ALL_FINE = {"conservation": True, "failed rows": True, "unique ids": True}


class TestGraph:
    def test_what_a_project_of_two_tasks_looks_like(self, project: Project) -> None:
        project.write_task({"task_name": "other", "preprocess": PREPROCESS}, file="other")
        repository = project.definitions().get_repository_def()
        graph = repository.asset_graph
        shown = {}
        for key in sorted(graph.materializable_asset_keys):
            node = graph.get(key)
            assert node.code_version, key
            shown[key.to_user_string()] = {
                "deps": sorted(parent.to_user_string() for parent in node.parent_keys),
                "group": node.group_name,
                "kinds": sorted(node.kinds),
                "owners": list(node.owners),
                "checks": sorted(check.name for check in node.check_keys),
                "partitions": node.partitions_def and node.partitions_def.name,
                "pools": sorted(node.pools or ()),
            }
        rate = {"group": "rate", "owners": ["team:tests"], "partitions": "rate/files"}
        other = {"group": "other", "owners": ["team:tests"], "partitions": "other/files"}
        raw = {"deps": [], "kinds": ["file"], "checks": ["complete"]}
        scored = {
            "kinds": ["openai", "parquet"],
            "checks": ["complete"],
            "pools": ["other"],
        }
        whole = {"kinds": ["python"], "checks": ["complete"], "partitions": None, "pools": []}
        assert shown == {
            "other/raw": other | raw | {"pools": []},
            "other/preprocessed": other
            | {
                "deps": ["other/raw"],
                "kinds": ["parquet", "python"],
                "checks": ["complete"],
                "pools": [],
            },
            "other/scores": other | scored | {"deps": ["other/preprocessed"]},
            "other/summary": other | whole | {"deps": ["other/scores"]},
            "rate/raw": rate | raw | {"pools": []},
            "rate/scores": rate | scored | {"deps": ["rate/raw"], "pools": [POOL]},
            "rate/summary": rate | whole | {"deps": ["rate/scores"]},
        }

    def test_a_tasks_runs_at_a_time_are_what_it_says(self, project: Project) -> None:
        project.write_task({"concurrency": {"max_concurrent_files": 3}})
        for slots in (3, 5):
            project.write_task({"concurrency": {"max_concurrent_files": slots}})
            sensor = project.definitions().resolve_sensor_def("housekeeping")
            context = dg.build_sensor_context(instance=project.instance)
            assert f"pool rate: {slots} slots" in str(sensor(context))
            assert "nothing to do" in str(sensor(context))
            (pool,) = project.instance.event_log_storage.get_pool_limits()
            assert (pool.name, pool.limit) == (POOL, slots)

    def test_housekeeping_makes_every_input_file_a_partition_that_is_missing(
        self, project: Project
    ) -> None:
        other = Project(project.root, task="other", inputs="data/other")
        away = {"data": {"input_folder": "data/away", "output_folder": "data/scores_of_away"}}
        project.write_task({"task_name": "away", **away}, file="away")
        of_other = {"input_folder": "data/other", "output_folder": "data/scores_of_other"}
        own: dict[str, Any] = {"task_name": "other", "data": of_other}
        capped = {"debug": {"enabled": True, "max_files": 2}}
        project.write_task({**own, **capped}, file="other")
        for name in NAMES:
            other.write_input(name, some_rows(1))

        def told() -> str:
            gone = write_rows(project.root / "data/away/x.jsonl", some_rows(1))
            sensor = project.definitions().resolve_sensor_def("housekeeping")
            shutil.rmtree(gone.parent)
            return str(sensor(dg.build_sensor_context(instance=project.instance)))

        first = told()
        assert "rate: 3 new files, 0 gone" in first and "other: 2 new files" in first
        assert "data/away: not found" in first
        assert project.statuses("raw") == project.statuses() == dict.fromkeys(NAMES)
        assert project.instance.get_runs_count() == 0
        project.write_task(own, file="other")
        assert "other: 1 new files, 0 gone" in told()
        project.materialize([A])
        for name in (A, B):
            (project.input_folder / name).unlink()
        project.write_input("new.jsonl", some_rows(1))
        assert "rate: 1 new files, 1 gone" in told()
        known = project.instance.get_dynamic_partitions("rate/files")
        assert sorted(known) == sorted([A, C, "new.jsonl"]), "what has a result stays"
        assert "new files" not in told()
        shutil.rmtree(project.input_folder)
        assert "gone" not in told(), "a folder that is away takes nothing along"

    def test_files_that_went_are_forgotten_some_at_a_time(self, project: Project) -> None:
        folder = project.input_folder / "many"
        folder.mkdir()
        for number in range(FORGOTTEN_AT_ONCE + 20):
            (folder / f"{number}.jsonl").write_bytes(b"{}")
        register(project.instance, project.steps())
        shutil.rmtree(folder)
        gone = [register(project.instance, project.steps()).gone for _ in range(3)]
        assert gone == [FORGOTTEN_AT_ONCE, 20, 0]

    def test_register_leaves_out_what_is_broken_and_goes_on(self, project: Project) -> None:
        (project.root / "configs/tasks/a.yaml").write_text("task_name: [")
        twice = {"input_folder": "data/twice", "output_folder": "data/scores_of_twice"}
        project.write_task({"task_name": "both", "data": twice}, file="both")
        twins = Project(project.root, task="both", inputs="data/twice")
        for name in ("x.jsonl", "x.parquet"):
            twins.write_input(name, some_rows(1))
        ended = project.run("register")
        assert ended.code == 0 and re.search(r"│ rate │ +3 │ +3 │ +0 │", ended.out)
        assert "configs/tasks/a.yaml: left out" in ended.err
        assert "both: " in ended.err and "would both be written" in ended.err

    def test_register_shows_the_files_where_no_daemon_runs(self, project: Project) -> None:
        row = {"task": "rate", "files": 3, "new": 3, "gone": 0}
        assert project.listed("register") == [row]
        assert project.statuses() == dict.fromkeys(NAMES)
        assert project.listed("register", TASK) == [{**row, "new": 0}]
        shutil.rmtree(project.input_folder)
        ended = project.run("register", TASK)
        assert ended.code == 1 and "not found" in ended.err

    def test_a_broken_task_file_is_a_stub_and_all_others_load(self, project: Project) -> None:
        project.write_task({"data": {"input_foldr": "x"}, "task_name": "oops"}, file="oops")
        project.write_task({"data": {"output_folder": "data/elsewhere"}}, file="same_name")
        (project.root / "configs/tasks/torn.yaml").write_text("task_name: [unclosed")
        defs = project.definitions()
        dg.Definitions.validate_loadable(defs)
        specs = {spec.key.to_user_string(): spec for spec in defs.resolve_all_asset_specs()}
        broken = [key for key in specs if key.startswith("broken_configs/")]
        assert {"rate/raw", "rate/scores", "rate/summary"} == set(specs) - set(broken)
        assert len(broken) == 3
        oops = specs["broken_configs/oops"].description or ""
        assert "configs/tasks/oops.yaml" in oops
        assert "data.input_foldr" in oops and "input_folder" in oops
        assert "broken_configs/torn" in specs
        (twin,) = set(broken) - {"broken_configs/oops", "broken_configs/torn"}
        description = specs[twin].description or ""
        assert twin.startswith("broken_configs/rate")
        assert "task_name" in description and "configs/tasks/rate.yaml" in description

    def test_a_task_waits_for_an_input_that_was_never_there(self, project: Project) -> None:
        generate = {**GENERATE, "input_path": "data/away", "output_path": "data/answers"}
        project.write_yaml(
            "tasks/first",
            {"task_name": "first", "task_type": "data_distillation", "generate_response": generate},
        )
        again = {**generate, "input_path": "data/answers", "output_path": "data/more"}
        project.write_yaml(
            "tasks/reads_it",
            {"task_name": "reads_it", "task_type": "data_distillation", "generate_response": again},
        )

        def loaded() -> tuple[set[str], dict[str, str]]:
            """The tasks that are in the graph, and what others wait for."""
            defs = project.definitions()
            dg.Definitions.validate_loadable(defs)
            specs = list(defs.resolve_all_asset_specs())
            waits = [spec for spec in specs if spec.group_name == "configs_that_wait"]
            told = {spec.key.path[-1]: spec.description or "" for spec in waits}
            return {spec.key.path[0] for spec in specs} - {"configs_that_wait"}, told

        tasks, waits = loaded()
        assert tasks == {"rate"} and set(waits) == {"first", "reads_it"}
        absent = "first.yaml:generate_response.input_path: no such folder yet"
        assert all(absent in told and "reload definitions" in told for told in waits.values())
        (project.root / "data/away").mkdir()
        assert "an empty folder" in loaded()[1]["first"]
        write_rows(project.root / "data/away/x.jsonl", some_rows(1))
        assert loaded() == ({"rate", "first", "reads_it"}, {})
        project.materialize()
        shutil.rmtree(project.input_folder)
        assert loaded() == ({"rate", "first", "reads_it"}, {}), "it has results"

    def test_an_empty_folder_that_is_watched_is_in_the_graph(self, project: Project) -> None:
        shutil.rmtree(project.input_folder)
        project.input_folder.mkdir()
        project.write_task({"sensor": {"enabled": True}})
        keys = {spec.key.path[0] for spec in project.definitions().resolve_all_asset_specs()}
        assert keys == {"rate"}

    @pytest.mark.parametrize("name", ["code-quality", "代码质量"])
    def test_a_name_that_dagster_refuses_is_mapped_and_shown_as_written(
        self, project: Project, name: str
    ) -> None:
        project.write_task({"task_name": name})
        defs = project.definitions()
        dg.Definitions.validate_loadable(defs)
        specs = list(defs.resolve_all_asset_specs())
        assert {spec.key.path[1] for spec in specs} == {"raw", "scores", "summary"}
        for spec in specs:
            assert re.fullmatch("[A-Za-z0-9_]+", spec.key.path[0])
            assert name in (spec.description or "")
            assert spec.metadata["task"] == name

    def test_dagster_loads_the_project_of_the_current_folder(self, project: Project) -> None:
        code = (
            "import dagster as dg; from modelcall_assets.definitions import defs;"
            "dg.Definitions.validate_loadable(defs);"
            "print(*sorted(s.key.to_user_string() for s in defs.resolve_all_asset_specs()))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=project.root,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.split() == ["rate/raw", "rate/scores", "rate/summary"]


class TestRunsAndVersions:
    def test_a_one_file_run_takes_a_file_through_all_assets(self, project: Project) -> None:
        project.write_task({"preprocess": PREPROCESS})
        stages = ("raw", "preprocessed", "scores")
        succeed(project, [B], stages)
        for stage in stages:
            assert project.statuses(stage) == {A: None, B: GREEN, C: None}
            assert {"dagster/code_version", "dagster/data_version"} <= set(
                version_tags(project, stage, B)
            )
        assert "dagster/input_data_version/rate/preprocessed" in version_tags(project, "scores", B)
        for stage in ("raw", "preprocessed"):
            assert check_results(project, stage)[B] == ALL_FINE
        assert check_results(project, "scores") == {
            A: {},
            B: ALL_FINE,
            C: {},
        }
        assert [row["id"] for row in project.scores(B)] == [f"second-{n}" for n in range(4)]

    def test_a_several_files_run_logs_one_materialisation_per_file(self, project: Project) -> None:
        result = materialize(project)
        assert result.success
        filters = dg.AssetRecordsFilter(project.asset_key("scores"))
        records = project.instance.fetch_materializations(filters, limit=100).records
        assert sorted(record.partition_key or "" for record in records) == sorted(NAMES)
        assert project.statuses() == dict.fromkeys(NAMES, GREEN)
        versions = {version_tags(project, "scores", key)["dagster/data_version"] for key in NAMES}
        assert len(versions) == 3, "each file has a version of its own"
        assert check_results(project, "scores") == dict.fromkeys(NAMES, ALL_FINE)

    def test_both_kinds_of_run_leave_the_same_versions_and_provenance(
        self, project: Project, tmp_path: Path
    ) -> None:
        """So that Dagster's staleness, checked below, does not depend on how a file was run."""
        project.write_task({"preprocess": PREPROCESS})
        stages = ("raw", "preprocessed", "scores")
        (tmp_path / "other").mkdir()
        (tmp_path / "other/dagster.yaml").write_text(DAGSTER_YAML)
        with dg.DagsterInstance.from_config(str(tmp_path / "other")) as other:
            succeed(project, NAMES, stages)
            for key in NAMES:
                succeed(project, [key], stages, instance=other)
            for stage in stages:
                for key in NAMES:
                    several = version_tags(project, stage, key)
                    single = version_tags(project, stage, key, other)
                    assert set(several) == set(single)
                    pointers = {name for name in single if "/input_event_pointer/" in name}
                    assert bool(pointers) == (stage != "raw")
                    for name in set(single) - pointers:
                        assert several[name] == single[name], (stage, key, name)

    @pytest.mark.parametrize("mode", ["one file per run", "several files per run"])
    def test_dagster_calls_stale_what_changed_and_nothing_else(
        self, project: Project, mode: str
    ) -> None:
        groups = [[key] for key in NAMES] if mode == "one file per run" else [NAMES]

        def everything() -> None:
            for keys in groups:
                succeed(project, keys)

        everything()
        fresh = dict.fromkeys(NAMES, FRESH)
        assert project.staleness("raw") == fresh
        assert project.staleness() == fresh

        project.write_model(
            {
                "prices": {"usd_per_million_input_tokens": 3},
                "client_config": {"timeout": 33, "max_retries": 7},
            }
        )
        project.write_task({"concurrency": {"max_concurrent_requests": 9}, "max_failure_rate": 0.5})
        assert project.staleness() == fresh, "prices and limits shape no row"

        project.write_input(C, some_rows(5, "third"))
        succeed(project, [C], ["raw"])
        assert project.staleness() == fresh | {C: STALE}
        succeed(project, [C], ["scores"])
        assert project.staleness() == fresh

        for changes in ({"encoding": "gbk"}, {"on_bad_line": "fail"}):
            project.write_task({"data": changes})
            stale = dict.fromkeys(NAMES, STALE)
            assert project.staleness() == project.staleness("raw") == stale
        project.write_task({"data": {"encoding": "utf-8", "on_bad_line": "keep"}})
        assert project.staleness() == project.staleness("raw") == fresh

        prompt = {"prompt_template": {"prompt_text": "Judge this text again:\n{text}\n"}}
        project.write_prompt(prompt)
        assert project.staleness() == dict.fromkeys(NAMES, STALE)
        assert project.staleness("raw") == fresh, "raw knows no prompt"
        everything()
        assert project.staleness() == fresh

    @pytest.mark.parametrize("groups", [[[A], [B], [C]], [NAMES]])
    def test_run_task_finds_nothing_to_do_after_runs_from_the_ui(
        self, project: Project, groups: Sequence[Sequence[str]]
    ) -> None:
        for keys in groups:
            succeed(project, keys)
        summary = TaskRunner(project.steps(), project.instance).run(NAMES)
        assert summary.ran == {"raw": 0, "scores": 0}

    def test_a_raw_materialisation_reported_by_hand_does_not_break_scores(
        self, project: Project
    ) -> None:
        succeed(project, NAMES, ["raw"])
        project.instance.report_runless_asset_event(
            dg.AssetMaterialization(project.asset_key("raw"), partition=B)
        )
        succeed(project, NAMES, ["scores"])
        assert project.statuses() == dict.fromkeys(NAMES, GREEN)
        assert project.staleness() == dict.fromkeys(NAMES, FRESH)

    def test_a_rerun_that_changes_nothing_keeps_the_data_version(self, project: Project) -> None:
        materialize(project, [A])
        before = version_tags(project, "scores", A)["dagster/data_version"]
        materialize(project, [A], fresh=True)
        assert version_tags(project, "scores", A)["dagster/data_version"] == before


class TestEndings:
    def test_a_file_over_max_failure_rate_is_red_and_its_neighbours_green(
        self, project: Project, server: RehearsalServer
    ) -> None:
        succeed(project, NAMES)
        project.write_input(B, some_rows(16, "new"))
        succeed(project, [B], ["raw"])
        server.set_faults(Faults(rate_400=0.5))
        result = materialize(project, NAMES, ["scores"])
        assert project.statuses() == {A: GREEN, B: RED, C: GREEN}

        assert [row["id"] for row in project.scores(B)] == [f"second-{n}" for n in range(4)]
        rows = read_rows(project.rejected(B))
        failed = [row for row in rows if row["api_status"] == "error"]
        assert 0 < len(failed) < 16
        assert [row["id"] for row in rows] == [f"new-{n}" for n in range(16)]
        assert {row["api_fail_reason"] for row in failed} == {"bad_request"}
        assert all(row["score"] is None for row in failed)
        message = failure(result)
        assert f"{B}: {len(failed)} of 16 rows failed" in message
        assert A not in message and C not in message
        filters = dg.AssetRecordsFilter(project.asset_key("scores"), asset_partitions=[B])
        (observed,) = project.instance.fetch_observations(filters, limit=5).records
        assert observed.asset_observation is not None
        numbers = observed.asset_observation.metadata
        assert numbers["failed"].value == len(failed)
        assert numbers["dagster/row_count"].value == 16
        assert numbers["output"].value == str(project.rejected(B))
        aside, stands = project.manifest(B, rejected=True), project.manifest(B)
        assert (aside.accepted, aside.failures) == (False, {"bad_request": len(failed)})
        assert (stands.accepted, stands.rows) == (True, 4)
        assert check_results(project, "scores")[B]["failed rows"] is False

        server.set_faults(NO_FAULTS)
        sent = server.stats()["requests"]
        succeed(project, [B], ["scores"])
        assert server.stats()["requests"] - sent == len(failed)
        assert project.statuses() == dict.fromkeys(NAMES, GREEN)
        assert [row["api_status"] for row in project.scores(B)] == ["success"] * 16
        assert not project.rejected(B).exists()

    @pytest.mark.parametrize("damage", ["gone", "damaged"])
    def test_a_rejected_result_that_is_no_more_sound_is_made_again(
        self, damage: str, project: Project, server: RehearsalServer
    ) -> None:
        """Only for failed rows is something asked again."""
        project.write_input(A, some_rows(16))
        server.set_faults(Faults(rate_400=0.5))
        materialize(project, [A])
        rejected = project.rejected(A)
        failed = sum(row["api_status"] == "error" for row in read_rows(rejected))
        assert 0 < failed < 16
        if damage == "gone":
            rejected.unlink()
        else:
            rejected.write_bytes(rejected.read_bytes()[:-9])
        project.write_task({"max_failure_rate": 1})
        server.set_faults(NO_FAULTS)
        sent = server.stats()["requests"]
        succeed(project, [A], ["scores"])
        assert server.stats()["requests"] - sent == failed
        assert [row["api_status"] for row in project.scores(A)] == ["success"] * 16

    def test_the_same_file_in_a_run_of_its_own_is_red_with_its_numbers(
        self, project: Project, server: RehearsalServer
    ) -> None:
        server.set_faults(Faults(rate_400=1))
        result = materialize(project, [A])
        assert "4 of 4 rows failed (100.00%), more than max_failure_rate 5.00%" in failure(result)
        assert project.statuses()[A] == RED
        filters = dg.AssetRecordsFilter(project.asset_key("scores"), asset_partitions=[A])
        assert len(project.instance.fetch_observations(filters, limit=5).records) == 1
        assert check_results(project, "scores")[A]["failed rows"] is False

    def test_failures_of_a_green_file_are_tried_again_and_successes_are_not(
        self, project: Project, server: RehearsalServer
    ) -> None:
        project.write_task({"max_failure_rate": 0.9})
        project.write_input(A, some_rows(12))
        server.set_faults(Faults(rate_400=0.3))
        succeed(project, [A])
        failed = sum(row["api_status"] == "error" for row in project.scores(A))
        assert failed
        assert check_results(project, "scores")[A]["failed rows"] is False, "a warning"
        before = version_tags(project, "scores", A)["dagster/data_version"]
        server.set_faults(NO_FAULTS)
        sent = server.stats()
        succeed(project, [A], ["scores"])
        assert server.stats()["requests"] - sent["requests"] == failed
        assert server.stats()["repeated_ok"] == 0
        assert all(row["api_status"] == "success" for row in project.scores(A))
        assert version_tags(project, "scores", A)["dagster/data_version"] != before

    def test_an_input_that_changed_since_raw_is_red_and_nothing_is_published(
        self, project: Project, server: RehearsalServer
    ) -> None:
        succeed(project, [A], ["raw"])
        project.write_input(A, [*some_rows(4, "first"), {"id": "late", "text": "a late row"}])
        message = failure(materialize(project, [A], ["scores"]))
        assert "a.jsonl changed since it was looked at" in message
        assert "kept" in message
        assert project.statuses()[A] == RED
        assert not project.output(A).exists()
        assert server.stats()["requests"] == 0, "it was noticed before"
        succeed(project, [A])
        assert len(project.scores(A)) == 5
        assert server.stats()["repeated_ok"] == 0

    @pytest.mark.parametrize("keys", [[A], NAMES])
    def test_scores_without_raw_say_what_to_do(
        self, project: Project, server: RehearsalServer, keys: Sequence[str]
    ) -> None:
        message = failure(materialize(project, keys, ["scores"]))
        for key in keys:
            assert f"rate/raw: '{key}' has no accepted output" in message
            assert project.statuses()[key] == RED
        assert "make raw of it first" in message
        assert server.stats()["requests"] == 0

    def test_a_file_that_cannot_be_published_leaves_its_neighbours_alone(
        self, project: Project
    ) -> None:
        project.output(B).mkdir(parents=True)
        message = failure(materialize(project))
        assert message.startswith(f"{B}: ") and str(project.output(B)) in message
        assert project.statuses() == {A: GREEN, B: RED, C: GREEN}

    def test_a_wrong_key_costs_one_request_and_is_never_shown(
        self, project: Project, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("REHEARSAL_KEY", "sk-wrong-secret")
        project.write_model({"client_config": {"api_key": "${REHEARSAL_KEY}"}})
        with serve_in_thread(api_key="sk-right") as guarded:
            monkeypatch.setenv("REHEARSAL_BASE_URL", guarded.base_url)
            result = materialize(project)
            assert guarded.stats()["requests"] == 1
        message = failure(result)
        assert "the same of 2 more files, such as" in message
        assert "Check api_key, model and base_url in the model file" in message
        assert project.statuses() == dict.fromkeys(NAMES, RED)
        logs = project.instance.all_logs(result.run_id)
        assert not any("sk-wrong-secret" in str(entry) for entry in logs)

    def test_a_broken_endpoint_reference_is_red_and_names_the_field(
        self, project: Project, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("REHEARSAL_BASE_URL")
        message = failure(materialize(project, [A]))
        assert "configs/models/rehearsal.yaml:client_config.base_url" in message
        assert "REHEARSAL_BASE_URL is not set" in message


class TestRows:
    def test_lines_and_rows_that_cannot_be_scored_keep_their_place_and_say_why(
        self, project: Project, server: RehearsalServer
    ) -> None:
        project.write_task({"max_failure_rate": 1})
        project.write_input(
            A,
            [
                {"id": "one", "text": "a fine text"},
                b'{"id": "torn", "text": "cut he',
                {"id": "no text column"},
                {"id": "empty", "text": ""},
                b"",
                {"id": "twin", "text": "the first of two"},
                {"id": "null", "text": None},
                b'["not", "an object"]',
                {"id": "twin", "text": "the second of two"},
            ],
        )
        succeed(project, [A])
        rows = project.scores(A)
        assert [(row["id"], row["api_status"], row["api_fail_reason"]) for row in rows] == [
            ("one", "success", None),
            (None, "error", "bad_line"),
            ("no text column", "error", "missing_input"),
            ("empty", "error", "missing_input"),
            ("twin", "success", None),
            ("null", "error", "missing_input"),
            (None, "error", "bad_line"),
            ("twin", "success", None),
        ]
        assert '{"id": "torn", "text": "cut he' in rows[1]["api_fail_detail"]
        assert "line 2" in rows[1]["api_fail_detail"]
        assert "'text' is empty" in rows[3]["api_fail_detail"]
        assert all(row["score"] is None for row in rows if row["api_status"] == "error")
        assert len({row["api_record_id"] for row in rows}) == 7, "only the twins share an id"
        assert [row["text"] for row in rows if row["id"] == "twin"] == [
            "the first of two",
            "the second of two",
        ]
        assert server.stats()["requests"] == 3
        for stage in ("raw", "scores"):
            found = {"conservation": True, "failed rows": False, "unique ids": False}
            assert check_results(project, stage)[A] == found
        check = dg.AssetCheckKey(project.asset_key("scores"), "complete")
        history = project.instance.event_log_storage.get_asset_check_execution_history(check, 1)
        assert history[0].evaluation is not None
        assert history[0].evaluation.severity == dg.AssetCheckSeverity.WARN

    def test_equal_rows_are_asked_one_by_one_and_stay_separate(
        self, project: Project, server: RehearsalServer
    ) -> None:
        project.write_input(A, [{"id": n, "text": "the same"} for n in range(3)])
        succeed(project, [A])
        assert [row["id"] for row in project.scores(A)] == [0, 1, 2]
        assert server.stats()["requests"] == 3
        succeed(project, [A], ["scores"])
        assert server.stats()["requests"] == 3, "each has its own reply in the journal"

    def test_the_order_of_rows_is_that_of_the_input(
        self, project: Project, server: RehearsalServer
    ) -> None:
        rows = some_rows(60)
        project.write_input(A, rows)
        server.set_faults(Faults(latency_ms=15, latency_sigma=1.5))
        succeed(project, [A])
        assert [row["text"] for row in project.scores(A)] == [row["text"] for row in rows]
        answered = [row["api_answered_at"] for row in project.scores(A)]
        assert answered != sorted(answered), "they were not answered in that order"

    def test_columns_types_and_metadata_of_the_output(self, project: Project) -> None:
        rows = [{**row, "score": 0.25, "stars": n} for n, row in enumerate(some_rows(4))]
        project.write_input(A, rows)
        succeed(project, [A])
        schema = pq.read_schema(project.output(A))
        assert {field.name: str(field.type) for field in schema} == {
            "id": "string",
            "text": "string",
            "input_score": "double",
            "stars": "int64",
            "score": "int64",
            "quality_tags": "list<element: string>",
            "recommended_use_case": "string",
            "api_record_id": "string",
            "api_status": "string",
            "api_fail_reason": "string",
            "api_fail_detail": "string",
            "api_return": "string",
            "api_reasoning": "string",
            "api_finish_reason": "string",
            "api_request_key": "string",
            "api_model": "string",
            "api_prompt": "string",
            "api_turns": "int32",
            "api_prompt_tokens": "int64",
            "api_completion_tokens": "int64",
            "api_cost_usd": "double",
            "api_attempts": "int32",
            "api_endpoint": "string",
            "api_latency_ms": "int64",
            "api_request_id": "string",
            "api_answered_at": "string",
        }
        assert schema.names[:4] == ["id", "text", "input_score", "stars"]
        volatile = (schema.metadata or {})[b"modelcall.volatile_columns"].decode().split(",")
        assert volatile == [
            "api_attempts",
            "api_endpoint",
            "api_latency_ms",
            "api_request_id",
            "api_answered_at",
        ]
        for row in project.scores(A):
            assert row["input_score"] == 0.25
            answer = orjson.loads(row["api_return"])
            assert {name: answer[name] for name in ("score", "quality_tags")} == {
                name: row[name] for name in ("score", "quality_tags")
            }
            assert row["api_model"] == "rehearsal-rater-1"
            assert row["api_prompt"].startswith("quality@")
            assert row["api_cost_usd"] is None, "an unknown price is no price of 0"

    def test_columns_that_are_kept_say_whose_they_are(self, project: Project) -> None:
        project.write_input(A, [{**row, "score": 0.25} for row in some_rows(4)])
        project.write_task({"preprocess": {**PREPROCESS, "filters": {"min_text_length": 1}}})
        assert project.materialize([A, B]).failed == []

        def came(stage: str, name: str) -> dict[str, list[tuple[str, str]]]:
            filters = dg.AssetRecordsFilter(project.asset_key(stage), asset_partitions=[name])
            (record,) = project.instance.fetch_materializations(filters, limit=1).records
            assert record.asset_materialization is not None
            lineage = record.asset_materialization.metadata["dagster/column_lineage"].value
            assert isinstance(lineage, dg.TableColumnLineage)
            return {
                name: [(dep.asset_key.path[-1], dep.column_name) for dep in deps]
                for name, deps in lineage.deps_by_column.items()
            }

        for name in (A, B):
            assert came("preprocessed", name)["text"] == [("raw", "text")]
            assert came("scores", name)["text"] == [("preprocessed", "text")]
        assert came("scores", A)["input_score"] == [("preprocessed", "score")]
        assert "score" not in came("scores", A)


class TestReuse:
    def test_a_change_of_ranges_asks_only_what_no_longer_passes(
        self, project: Project, server: RehearsalServer
    ) -> None:
        no_repair: Mapping[str, Any] = {
            "max_failure_rate": 1,
            "retry": {"enable_format_validation_retry": False},
        }
        project.write_task(no_repair)
        project.write_input(A, some_rows(9))
        succeed(project, [A])
        scores = [row["score"] for row in project.scores(A)]
        low, high = min(scores), max(scores)
        assert low < high
        sent = server.stats()["requests"]
        assert sent == 9

        def with_maximum(maximum: int) -> None:
            schema = {"properties": {"score": {"maximum": maximum}}}
            project.write_prompt({"output_config": {"json_schema": schema}})
            succeed(project, [A], ["scores"])

        with_maximum(high + 2)
        assert server.stats()["requests"] == sent, "every answer still passes"
        assert [row["score"] for row in project.scores(A)] == scores
        with_maximum(high - 1)
        too_high = scores.count(high)
        assert server.stats()["requests"] == sent + too_high
        assert server.stats()["repeated_ok"] == too_high
        assert [row["api_fail_reason"] for row in project.scores(A)] == [
            "wrong_value" if score == high else None for score in scores
        ]

    def test_fresh_asks_everything_again_and_later_runs_reuse_that(
        self, project: Project, server: RehearsalServer
    ) -> None:
        succeed(project, [A])
        first = [row["api_answered_at"] for row in project.scores(A)]
        succeed(project, [A], fresh=True)
        assert server.stats()["requests"] == 8
        second = [row["api_answered_at"] for row in project.scores(A)]
        assert not set(first) & set(second)
        succeed(project, [A], ["scores"])
        assert server.stats()["requests"] == 8
        assert [row["api_answered_at"] for row in project.scores(A)] == second

    def test_malformed_answers_are_mended_and_the_turns_counted(
        self, project: Project, server: RehearsalServer
    ) -> None:
        server.set_faults(Faults(rate_malformed=1))
        succeed(project, [A])
        rows = project.scores(A)
        assert {row["api_status"] for row in rows} == {"success"}
        assert {row["api_turns"] for row in rows} == {2}
        assert all(1 <= row["score"] <= 5 for row in rows)


class TestInterruption:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_the_first_signal_waits_for_what_is_in_flight_and_a_second_does_not(
        self, number: signal.Signals
    ) -> None:
        before = signal.getsignal(number)
        reached: list[str] = []

        async def run(*, in_flight_ends: bool) -> None:
            stopped = asyncio.Event()
            async with interruptible(stopped.set):
                os.kill(os.getpid(), number)
                await stopped.wait()
                reached.append("stopped sending")
                if not in_flight_ends:
                    os.kill(os.getpid(), number)
                    await asyncio.Event().wait()
                reached.append("drained")

        loop = asyncio.new_event_loop()
        for ends in (True, False):
            with pytest.raises(KeyboardInterrupt):
                loop.run_until_complete(run(in_flight_ends=ends))
            assert signal.getsignal(number) == before
        loop.close()
        assert reached == ["stopped sending", "drained", "stopped sending"]

    def test_an_interrupted_file_is_red_and_not_published(
        self, project: Project, server: RehearsalServer
    ) -> None:
        project.write_input(A, some_rows(40))
        server.set_faults(Faults(latency_ms=100))
        project.signalled(
            lambda: server.stats()["answered"] >= 4,
            *("run-task", TASK, "--file", A),
            number=signal.SIGTERM,
        )
        assert project.statuses() == {A: RED, B: None, C: None}
        assert not project.output(A).exists()
        assert claimed(project) == []


class TestDeadRuns:
    def test_a_killed_run_is_ended_and_its_pool_slot_freed_by_the_next(
        self, project: Project, server: RehearsalServer
    ) -> None:
        for name in NAMES:
            project.write_input(name, some_rows(20, name))
        server.set_faults(Faults(latency_ms=150))
        project.signalled(lambda: server.stats()["answered"] >= 4, "run-task", TASK)
        (dead,) = project.instance.get_runs(dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED]))
        assert claimed(project) == [dead.run_id]

        server.set_faults(NO_FAULTS)
        summary = project.materialize()
        assert (summary.failed, summary.busy) == ([], [])
        ended = project.instance.get_run_by_id(dead.run_id)
        assert ended is not None and ended.status == dg.DagsterRunStatus.FAILURE
        assert claimed(project) == []
        assert project.statuses() == dict.fromkeys(NAMES, GREEN)
        assert server.stats()["requests"] <= 60 + 4, "only calls in flight are paid again"
        assert server.stats()["repeated_ok"] <= 4

    def test_a_run_killed_before_it_started_keeps_no_file_busy(self, project: Project) -> None:
        register(project.instance, project.steps())
        job = project.definitions().resolve_implicit_global_asset_job_def()
        run = project.instance.create_run_for_job(
            job.get_subset(asset_selection={project.asset_key("raw")}),
            tags={PROCESS_TAG: "gone", "dagster/partition": A},
            asset_selection={project.asset_key("raw")},
        )
        summary = project.materialize()
        assert (summary.failed, summary.busy) == ([], [])
        ended = project.instance.get_run_by_id(run.run_id)
        assert ended is not None and ended.status == dg.DagsterRunStatus.FAILURE

    def test_a_rerun_from_the_ui_of_such_a_run_is_not_taken_for_dead(
        self, project: Project
    ) -> None:
        """Dagster copies the tags of the first run; the process of the second is another."""
        assert project.materialize().failed == []
        parent = project.instance.get_runs(limit=1)[0]
        again = project.instance.create_run_for_job(
            project.definitions()
            .resolve_implicit_global_asset_job_def()
            .get_subset(asset_selection={project.asset_key("scores")}),
            tags=parent.tags,
            parent_run_id=parent.run_id,
            root_run_id=parent.run_id,
            status=dg.DagsterRunStatus.STARTED,
        )
        project.materialize()
        alive = project.instance.get_run_by_id(again.run_id)
        assert alive is not None and alive.status == dg.DagsterRunStatus.STARTED


def claimed(project: Project) -> list[str]:
    """Runs that hold a slot of the task's pool."""
    info = project.instance.event_log_storage.get_concurrency_info(POOL)
    return [slot.run_id for slot in info.claimed_slots]
