"""A project's definitions in a code location of a user's own."""

from __future__ import annotations

import runpy
import tomllib
from pathlib import Path

import dagster as dg
import pytest
import yaml
from pages import ROOT, write_examples
from project import QUIET, B, Project

from modelcall_assets.defs import definitions_of
from modelcall_assets.defs.instance import register
from modelcall_assets.errors import SetupError
from modelcall_assets.records import encode_key


@pytest.fixture(autouse=True)
def instance(project: Project) -> dg.DagsterInstance:
    """Open meanwhile: while definitions are resolved, Dagster asks the process's latest one."""
    return project.instance


@pytest.mark.filterwarnings("ignore::dagster.PreviewWarning", "ignore::dagster.BetaWarning")
def test_the_example_follows_what_it_reads(project: Project) -> None:
    project.task = "my_corpus"
    project.write_task()
    (example,) = write_examples(ROOT / "docs/python.md", project.root)
    defs = runpy.run_path(str(example))["defs"]
    dg.Definitions.validate_loadable(defs)
    register(project.instance, project.steps())
    before = dg.evaluate_automation_conditions(defs, project.instance)
    assert before.total_requested == 0
    job, raw = defs.resolve_implicit_global_asset_job_def(), project.asset_key("raw")
    made = {"partition_key": encode_key(B), "instance": project.instance, "run_config": QUIET}
    assert job.execute_in_process(asset_selection=[raw], **made).success
    after = dg.evaluate_automation_conditions(defs, project.instance, cursor=before.cursor)
    assert after.get_requested_partitions(project.asset_key("scores")) == {encode_key(B)}


def test_one_task_or_all_of_a_folder(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = project.write_yaml("tasks/broken", {"task_name": "broken"})
    monkeypatch.chdir("/")

    def groups(path: Path) -> set[str]:
        graph = definitions_of(path).resolve_asset_graph()
        return {key.path[0] for key in graph.get_all_asset_keys()}

    assert groups(project.task_file) == {"rate"}
    assert groups(project.root) == groups(project.input_folder) == {"rate", "broken_configs"}
    with pytest.raises(SetupError, match=r"broken\.yaml"):
        definitions_of(broken)
    with pytest.raises(SetupError, match="no project"):
        definitions_of(project.root.parent)


def test_dg_and_dagster_dev_load_the_same() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["dg"]["project"]
    (entry,) = yaml.safe_load((ROOT / "workspace.yaml").read_text())["load_from"]
    assert entry["python_module"] == {
        "module_name": project["code_location_target_module"],
        "location_name": project["code_location_name"],
    }
