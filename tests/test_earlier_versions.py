"""What an earlier version has made is as good as new: `earlier/` has projects, which were made at
`/srv/project`, with outputs, journals and Dagster home. Splits are known by where they are, so that
their `raw` is looked at again here."""

from __future__ import annotations

import tarfile
from contextlib import closing
from pathlib import Path

import pytest
from dagster._core.definitions.data_version import StaleStatus
from project import Project

from modelcall_assets.rehearsal import RehearsalServer

PROJECTS = sorted(Path(__file__).with_name("earlier").glob("*.tar.xz"))


@pytest.fixture(params=PROJECTS, ids=[path.name.removesuffix(".tar.xz") for path in PROJECTS])
def root(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    server: RehearsalServer,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    with tarfile.open(request.param) as archive:
        archive.extractall(tmp_path, filter="data")
    root = tmp_path / "project"
    for manifest in root.rglob("manifests/**/*.json"):
        manifest.write_text(manifest.read_text().replace("/srv/project", str(root)))
    monkeypatch.setenv("DAGSTER_HOME", str(root / "dagster_home"))
    monkeypatch.setenv("REHEARSAL_BASE_URL", server.base_url)
    return root


@pytest.mark.parametrize("task", ["rate", "chain"])
def test_nothing_is_stale_or_asked_again(task: str, root: Path, server: RehearsalServer) -> None:
    with closing(Project(root, task=task)) as project:
        for stage in project.steps().stages:
            fresh = project.staleness(stage.name)
            assert len(fresh) == 2 and {*fresh.values()} == {StaleStatus.FRESH}, stage.name
        ended = project.run("run-task", project.task_file)
        assert ended.code == 0, ended
        assert task == "chain" or "nothing to do: every file is up to date" in ended.out
        assert server.stats()["requests"] == 0
        assert "all is sound" in project.run("verify", project.task_file).out


def test_checks_of_old_names_are_gone(root: Path) -> None:
    with closing(Project(root)) as project:
        graph = project.definitions().resolve_asset_graph()
    assert {check.name for check in graph.asset_check_keys} == {"complete"}
