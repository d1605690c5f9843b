"""A small project on disk, the endpoint that its model file names, and a Dagster instance."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from uuid import uuid4

import pytest
import yaml
from hypothesis import settings
from project import DAGSTER_YAML, WORKSPACE, A, B, C, Project, some_rows
from s3_server import S3Server
from swift_server import swift_server

from modelcall_assets.defs.instance import whole_home
from modelcall_assets.rehearsal import RehearsalServer, serve_in_thread
from modelcall_assets.storage.publishing import open_locks

pytest.register_assert_rewrite("s3_contract")
settings.register_profile("of the project", deadline=None)
settings.load_profile("of the project")
TAKES_LONG = {"empty_home", "s3_server"}
"""What runs in a Dagster instance, or starts a real store."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What waits for a daemon begins first, so that other tests fill the time."""
    items.sort(key=lambda item: item.path.name != "test_daemon.py")
    for item in items:
        if not TAKES_LONG.isdisjoint(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)


def pytest_addoption(parser: pytest.Parser) -> None:
    told = "what is told now is what tests/messages/ says from now on; with -n 0"
    parser.addoption("--write-messages", action="store_true", help=told)


@pytest.fixture(autouse=True)
def locks_closed() -> Iterator[None]:
    """A process keeps those of every project that it has opened."""
    yield
    while open_locks:
        open_locks.popitem()[1].close()


@pytest.fixture
def messages(request: pytest.FixtureRequest) -> Callable[[Mapping[str, object]], None]:
    """Takes what is told in each case of a test: it must be what the test's file in tests/messages/
    has, and gets there with `--write-messages`."""
    file = Path(__file__).with_name("messages") / f"{request.path.stem.removeprefix('test_')}.yaml"
    test = request.node.nodeid.partition("::")[2].partition("[")[0].replace("::", ".")

    def compare(told: Mapping[str, object]) -> None:
        kept = yaml.safe_load(file.read_text()) if file.exists() else {}
        if request.config.getoption("write_messages") and kept.get(test) != told:
            file.parent.mkdir(exist_ok=True)
            file.write_text(
                yaml.safe_dump({**kept, test: dict(told)}, width=10_000, allow_unicode=True)
            )
        else:
            assert told == kept.get(test)

    return compare


@pytest.fixture
def server() -> Iterator[RehearsalServer]:
    """Without faults until `set_faults`."""
    with serve_in_thread() as running:
        yield running


@pytest.fixture(scope="session")
def empty_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DAGSTER_HOME whose databases exist; copying it is quicker than making them."""
    home = tmp_path_factory.mktemp("dagster_home")
    (home / "dagster.yaml").write_text(DAGSTER_YAML)
    with whole_home(home):
        return home


@pytest.fixture
def bare(
    tmp_path: Path, empty_home: Path, server: RehearsalServer, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Project]:
    """No input file yet, to be rated by `server`; DAGSTER_HOME is its own."""
    made = Project(tmp_path / "project")
    made.write_task()
    made.write_model()
    made.write_prompt()
    (made.input_folder).mkdir(parents=True)
    (made.root / "workspace.yaml").write_text(WORKSPACE)
    home = Path(shutil.copytree(empty_home, made.root / "dagster_home"))
    monkeypatch.setenv("DAGSTER_HOME", str(home))
    monkeypatch.setenv("REHEARSAL_BASE_URL", server.base_url)
    with closing(made):
        yield made


@pytest.fixture
def project(bare: Project) -> Project:
    """Three input files of four rows in sub-folders."""
    for name, word in ((A, "first"), (B, "second"), (C, "third")):
        bare.write_input(name, some_rows(4, word))
    return bare


@pytest.fixture
def distilling(bare: Project) -> Project:
    """Without a task yet."""
    bare.task_file.unlink()
    bare.task = "chain"
    return bare


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A test that kills it starts it again."""
    pytest.importorskip("swift", reason="OpenStack Swift is not installed: pip install -e '.[dev]'")
    with swift_server(tmp_path_factory.mktemp("swift")) as running:
        yield running


@pytest.fixture
def bucket(s3_server: S3Server) -> str:
    """The name of an empty one."""
    name = f"test-{uuid4().hex}"
    with closing(s3_server.client()) as client:
        client.create_bucket(Bucket=name)
    return name
