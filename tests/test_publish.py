"""A task's rows as a data set that others load: in a folder, a store, and on the Hub."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hub_server import Hub, serve_hub
from project import NAMES, TASK, A, B, C, Ended, Project, Row, ran, some_rows
from s3_server import S3Server

from modelcall_assets.errors import InputError
from modelcall_assets.records import encode_key
from modelcall_assets.stages.card import size_category
from modelcall_assets.stages.report import Tally
from modelcall_assets.storage.datasets import find_splits

DATASET = "hf://datasets/org/rated"


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory, empty_home: Path) -> Iterator[Project]:
    """Only to be read. 68 good rows of three files; A has two bad lines besides."""
    made = Project(tmp_path_factory.mktemp("scored") / "project")
    with ran(made, empty_home, 0, max_failure_rate=1):
        yield made


def publish(project: Project, destination: str | Path, *options: str) -> Ended:
    ended = project.run("publish", TASK, str(destination), *options)
    assert ended.code == 0, ended
    return ended


def good_rows(project: Project) -> dict[str, Row]:
    rows = [row for name in (A, B, C) for row in project.scores(name)]
    return {row["api_record_id"]: row for row in rows if row["api_status"] == "success"}


def parquet_rows(folder: Path) -> list[Row]:
    files = sorted(folder.glob("data/*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def card_of(folder: Path) -> Any:
    from huggingface_hub import DatasetCard

    return DatasetCard((folder / "README.md").read_text())


@pytest.fixture
def loaded(tmp_path: Path) -> Callable[[Path], Any]:
    """What `datasets` makes of a folder."""
    datasets = pytest.importorskip("datasets", reason="pip install -e '.[dev]'")
    datasets.disable_progress_bars()
    cache = str(tmp_path / "cache")
    return lambda folder: datasets.load_dataset(str(folder), cache_dir=cache)


class TestFolder:
    def test_it_is_what_datasets_load(
        self, scored: Project, tmp_path: Path, loaded: Callable[[Path], Any]
    ) -> None:
        """The good rows, as they were scored, in the splits of an export."""
        publish(scored, tmp_path / "set", "--split", "0.3", "--seed", "7")
        found = loaded(tmp_path / "set")
        assert list(found) == ["train", "validation"]
        wanted = good_rows(scored)
        rows = [row for split in found.values() for row in split]
        assert len(rows) == len(wanted) == 68
        for row in rows:
            assert row == {name: wanted[row["api_record_id"]][name] for name in row}
        hidden = {"api_status", "api_fail_reason", "api_fail_detail", "api_request_key"}
        hidden |= {"api_attempts", "api_endpoint", "api_latency_ms", "api_request_id"}
        assert wanted.popitem()[1].keys() - found["train"].column_names == {
            *hidden,
            "api_answered_at",
        }
        copies = tmp_path / "copies"
        options = ("--split", "0.3", "--seed", "7", "--format", "parquet", "--output", str(copies))
        assert scored.run("export", TASK, *options).code == 0
        for part, split in found.items():
            files = copies.glob(f"{part}/**/*.parquet")
            exported = [row["id"] for file in files for row in pq.read_table(file).to_pylist()]
            assert sorted(split["id"]) == sorted(exported)

    def test_the_card_says_what_it_is(self, scored: Project, tmp_path: Path) -> None:
        where = ("--where", "score >= 2", "--license", "apache-2.0")
        publish(scored, tmp_path / "set", *where)
        card, rows = card_of(tmp_path / "set"), parquet_rows(tmp_path / "set")
        head = card.data.to_dict()
        assert head["license"] == "apache-2.0"
        assert head["size_categories"] == ["n<1K"]
        (split,) = head["dataset_info"]["splits"]
        assert (split["name"], split["num_examples"]) == ("train", len(rows))
        text = card.text
        assert f"{len(rows)} rows of the asset `scores`" in text
        assert "| failed: bad\\_line | 2 |" in text
        assert f"| not selected | {68 - len(rows)} |" in text
        for score in {row["score"] for row in rows}:
            count = sum(row["score"] == score for row in rows)
            assert f"| {score} | {count} | █" in text
        assert 'model`: `"rehearsal-rater-1"' in text
        assert "Judge this text:\n{text}" in text
        assert scored.manifest(A, "raw").input.digest.removeprefix("sha256:") in text
        assert "modelcall publish configs/tasks/rate.yaml DESTINATION --where 'score >= 2'" in text
        assert str(scored.root) not in text and str(tmp_path) not in text

    def test_no_key_is_in_it(self, scored: Project, tmp_path: Path) -> None:
        """Not even where the user has written one down."""
        own = Project(Path(shutil.copytree(scored.root, tmp_path / "project")))
        (own.root / ".env").write_text("SOME_API_KEY=abcd1234efgh5678\n")
        own.write_task({"description": "Asked with abcd1234efgh5678.", "max_failure_rate": 1})
        publish(own, tmp_path / "set")
        text = (tmp_path / "set/README.md").read_text()
        assert "Asked with" in text and "abcd1234efgh5678" not in text

    def test_large_data_sets_have_several_files(self, bare: Project, tmp_path: Path) -> None:
        rows = [{"id": f"{at}", "text": f"{at} " * 60_000} for at in range(30)]
        for at, name in enumerate(NAMES):
            bare.write_input(name, rows[10 * at : 10 * at + 10])
            bare.steps().stage("raw").make(encode_key(name), Tally())
        publish(bare, tmp_path / "set", "--stage", "raw", "--shard-mb", "1")
        names = sorted(path.name for path in (tmp_path / "set/data").iterdir())
        assert names == [f"train-{at:05d}.parquet" for at in range(3)]
        assert parquet_rows(tmp_path / "set") == rows

    def test_files_whose_types_differ_have_one_schema(
        self, bare: Project, tmp_path: Path, loaded: Callable[[Path], Any]
    ) -> None:
        texts = [row["text"] for row in some_rows(3)]
        bare.write_input(A, [{"text": text, "n": at} for at, text in enumerate(texts)])
        bare.write_input("b.jsonl", [{"text": text, "n": 0.5, "more": [1]} for text in texts])
        bare.write_input("c.jsonl", [{"text": text, "n": {"of": "c"}} for text in texts])
        assert bare.run("run-task", TASK).code == 0
        publish(bare, tmp_path / "set")
        rows = list(loaded(tmp_path / "set")["train"])
        assert [row["n"] for row in rows] == ["0", "1", "2", *["0.5"] * 3, *['{"of":"c"}'] * 3]
        assert [row["more"] for row in rows] == [None] * 3 + [[1]] * 3 + [None] * 3
        assert "| n | json |" in card_of(tmp_path / "set").text

    def test_only_what_was_published_is_replaced(self, scored: Project, tmp_path: Path) -> None:
        folder = tmp_path / "set"
        publish(scored, folder, "--split", "0.5")
        (folder / "LICENSE").write_text("mine")
        before = (folder / "README.md").read_bytes()
        refused = scored.run("publish", TASK, str(folder))
        assert refused.code == 2 and "README.md is there already" in refused.err
        nothing = scored.run("publish", TASK, str(folder), "--force", "--where", "score > 99")
        assert nothing.code == 1 and "no row is selected" in nothing.err
        assert (folder / "README.md").read_bytes() == before
        publish(scored, folder, "--force")
        assert sorted(path.name for path in folder.rglob("*.*")) == [
            "README.md",
            "train-00000.parquet",
        ]
        assert len(parquet_rows(folder)) == 68
        mine = folder / "data/train-mine.parquet"
        mine.write_bytes(b"what the card's pattern would take")
        refused = scored.run("publish", TASK, str(folder), "--force")
        assert refused.code == 2 and "data/train-mine.parquet is there already, and" in refused.err
        mine.unlink()
        (folder / "README.md").write_text("# Mine")
        refused = scored.run("publish", TASK, str(folder), "--force")
        assert refused.code == 2 and "not from `modelcall publish`" in refused.err
        (folder / "README.md").unlink()
        refused = scored.run("publish", TASK, str(folder), "--force")
        assert "data/train-00000.parquet is there already, and not from" in refused.err

    def test_the_folders_of_the_task_are_its_own(self, scored: Project) -> None:
        for folder in ("data/in/set", "data/rate/scores"):
            refused = scored.run("publish", TASK, str(scored.root / folder))
            assert refused.code == 2 and "one of the task's own" in refused.err
        for name in ("org/rated", "datasets/org/rated@v2", "datasets/../rated", "datasets/o/a b"):
            refused = scored.run("publish", TASK, f"hf://{name}", "--dry-run")
            assert refused.code == 2 and "expected hf://datasets/ORG/NAME" in refused.err

    def test_one_that_was_stopped_does_not_look_finished(
        self, scored: Project, tmp_path: Path, loaded: Callable[[Path], Any]
    ) -> None:
        """Nobody loads it, also not by its file names; the next one needs no --force."""
        folder = tmp_path / "set"
        in_the_way = folder / "data/validation-00000.parquet"
        in_the_way.mkdir(parents=True)
        stopped = scored.run("publish", TASK, str(folder), "--split", "0.3")
        assert stopped.code == 1 and "a folder where a file belongs" in stopped.err
        assert (folder / "data/train-00000.parquet").exists()
        in_the_way.rmdir()
        with pytest.raises(FileNotFoundError, match=r"unfinished\.parquet"):
            loaded(folder)
        with pytest.raises(InputError, match=r"unfinished\.parquet"):
            find_splits(folder)
        publish(scored, folder)
        assert loaded(folder)["train"].num_rows == 68


def test_a_store_takes_one_too(
    scored: Project, tmp_path: Path, s3_server: S3Server, bucket: str
) -> None:
    own = Project(Path(shutil.copytree(scored.root, tmp_path / "project")))
    (own.root / ".env").write_text(
        f"AWS_ACCESS_KEY_ID={s3_server.key}\nAWS_SECRET_ACCESS_KEY={s3_server.secret}\n"
        f"AWS_ENDPOINT_URL={s3_server.endpoint}\nAWS_REGION={s3_server.region}\n"
    )
    place = f"s3://{bucket}/sets/rated"
    publish(own, place, "--split", "0.5")
    refused = own.run("publish", TASK, place)
    assert refused.code == 2 and "README.md is there already" in refused.err
    publish(own, place, "--force")
    with closing(s3_server.client()) as client:
        keys = [each["Key"] for each in client.list_objects_v2(Bucket=bucket)["Contents"]]
        assert sorted(keys) == ["sets/rated/README.md", "sets/rated/data/train-00000.parquet"]
        (tmp_path / "set/data").mkdir(parents=True)
        for key in keys:
            content = client.get_object(Bucket=bucket, Key=key)["Body"].read()
            (tmp_path / "set" / key.partition("rated/")[2]).write_bytes(content)
    assert len(parquet_rows(tmp_path / "set")) == 68


@pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")  # its library's own
class TestHub:
    @pytest.fixture
    def hub(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
        """Its library reads some variables once in the life of a process."""
        constants = pytest.importorskip("huggingface_hub.constants")
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        with serve_hub(tmp_path / "hub") as hub:
            monkeypatch.setenv("HF_ENDPOINT", hub.url)
            monkeypatch.setenv("HF_TOKEN", hub.token)
            yield hub

    def test_it_is_one_commit(
        self, scored: Project, hub: Hub, loaded: Callable[[Path], Any]
    ) -> None:
        command = ("publish", TASK, DATASET, "--split", "0.3", "--private")
        with scored.start(*command, env={**os.environ, "HF_HUB_DISABLE_XET": "1"}) as process:
            out, err = process.communicate()
        assert process.returncode == 0, err
        assert hub.created["visibility"] == "private" and hub.created["type"] == "dataset"
        folder = hub.folder("org/rated")
        assert sorted(hub.files("org/rated")) == [
            "README.md",
            "data/train-00000.parquet",
            "data/validation-00000.parquet",
        ]
        assert sum("/commit/" in each for each in hub.asked) == 1
        assert sum(split.num_rows for split in loaded(folder).values()) == 68
        assert 'load_dataset("org/rated")' in card_of(folder).text
        assert f"/datasets/org/rated/commit/{hub.commit('org/rated')}" in out
        seen = (out + err).encode() + b"".join(hub.files("org/rated").values())
        assert hub.token.encode() not in seen

    def test_a_new_one_replaces_it_with_force(self, scored: Project, hub: Hub) -> None:
        publish(scored, DATASET, "--split", "0.3")
        (hub.folder("org/rated") / "notes.txt").write_text("mine")
        refused = scored.run("publish", TASK, DATASET)
        assert refused.code == 2 and "is there already" in refused.err
        publish(scored, DATASET, "--force")
        left = sorted(hub.files("org/rated"))
        assert left == ["README.md", "data/train-00000.parquet", "notes.txt"]

    def test_a_branch_has_its_own(self, scored: Project, hub: Hub) -> None:
        publish(scored, DATASET, "--revision", "v2")
        assert hub.files("org/rated") == {}
        assert sorted(hub.files("org/rated", "v2")) == ["README.md", "data/train-00000.parquet"]

    @pytest.mark.parametrize(
        ("where", "status", "check"),
        [
            ("lfs/objects/batch", 403, "HF_TOKEN: it may not write there"),
            ("/commit/", 409, "whether somebody else writes there"),
            ("/commit/", 412, "who has committed to it meanwhile"),
            ("/commit/", 500, "whether the Hub is well"),
        ],
    )
    def test_where_it_fails_the_last_commit_stands(
        self, scored: Project, hub: Hub, where: str, status: int, check: str
    ) -> None:
        publish(scored, DATASET, "--split", "0.3")
        before = hub.files("org/rated")
        hub.faults[where] = [status, status]
        failed = scored.run("publish", TASK, DATASET, "--force")
        assert failed.code == 1 and f"{DATASET}: not published: " in failed.err
        assert check in failed.err and hub.token not in failed.told
        assert hub.files("org/rated") == before

    def test_a_file_that_is_refused_once_is_sent_again(self, scored: Project, hub: Hub) -> None:
        hub.faults["lfs/"] = [500]
        publish(scored, DATASET)
        assert len(parquet_rows(hub.folder("org/rated"))) == 68

    def test_who_commits_meanwhile_is_not_undone(
        self, scored: Project, hub: Hub, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        taken = hub.take

        def commit_before(path: str, token: str, body: bytes) -> Any:
            if "/preupload/" in path:
                (hub.folder("org/rated") / "data.txt").write_text("theirs")
            return taken(path, token, body)

        monkeypatch.setattr(hub, "take", commit_before)
        failed = scored.run("publish", TASK, DATASET)
        assert failed.code == 1 and "who has committed to it meanwhile" in failed.err
        assert sorted(hub.files("org/rated")) == ["data.txt"]

    def test_a_token_is_needed(
        self, scored: Project, hub: Hub, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HF_TOKEN", "hf_wrongwrongwrong")
        wrong = scored.run("publish", TASK, DATASET)
        assert wrong.code == 1 and "HF_TOKEN: the Hub does not know it" in wrong.err
        assert "hf_wrong" not in wrong.told
        monkeypatch.setenv("HF_TOKEN", hub.token)
        hub.faults["repos/create"] = [403]
        forbidden = scored.run("publish", TASK, DATASET)
        assert forbidden.code == 1 and "HF_TOKEN: it may not write there" in forbidden.err
        monkeypatch.delenv("HF_TOKEN")
        absent = scored.run("publish", TASK, DATASET)
        assert absent.code == 2 and "HF_TOKEN is not set; set it in the environment" in absent.err
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        monkeypatch.setenv("HF_TOKEN", hub.token)
        without = scored.run("publish", TASK, DATASET)
        assert without.code == 2 and "pip install 'modelcall-assets[hub]'" in without.err
        assert not hub.folder("org/rated").exists()

    def test_a_dry_run_asks_nobody(
        self, scored: Project, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """And shows the card that would be written."""
        monkeypatch.delenv("HF_TOKEN")
        options = ("--split", "0.3", "--dry-run")
        told = publish(scored, DATASET, *options).out
        assert hub.asked == [] and "data/validation-00000.parquet" in told
        publish(scored, tmp_path / "set", *options)
        assert not (tmp_path / "set").exists()
        monkeypatch.setenv("HF_TOKEN", hub.token)
        publish(scored, DATASET, "--split", "0.3")
        assert hub.files("org/rated")["README.md"].decode() in told


@pytest.mark.parametrize(
    ("rows", "category"),
    [(1, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (10**9, "1B<n<10B"), (10**12, "n>1T")],
)
def test_the_hub_has_words_for_sizes(rows: int, category: str) -> None:
    assert size_category(rows) == category
