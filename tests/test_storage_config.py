"""Stores in config files: URIs, profiles, TOS, the data root, and what is said of each mistake."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import s3fs
import yaml
from config_files import Configs, Data, Messages, told
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pages import ROOT, blocks
from s3_server import S3Server

from modelcall_assets.config.catalog import load_catalog, load_task
from modelcall_assets.config.places import parse_storage
from modelcall_assets.errors import SetupError
from modelcall_assets.records import StoreOptions

CHECKSUMS = {
    "signature_version": "s3v4",
    "request_checksum_calculation": "when_required",
    "response_checksum_validation": "when_required",
}
NO_PROFILE = "no profile in configs/storage.yaml"


class Storage(Configs):
    def storage(self, content: Data | str) -> None:
        self.write("configs/storage.yaml", content)

    def profile(self, name: str = "lab", **fields: Any) -> None:
        self.storage({"stores": {name: {"prefix": "s3://lab/", **fields}}})

    def env(self, text: str) -> None:
        self.write(".env", text)

    def options(self, source: str) -> Data:
        """What reaches the store of the input."""
        (found,) = self.load(source).store_options
        return dict(found.options)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    for name in os.environ:
        if name == "REGION" or name.startswith(("AWS_", "TOS_", "LAB_", "LAKE_")):
            monkeypatch.delenv(name)
    return Storage(tmp_path)


# URIs


def test_a_task_may_lie_in_stores_altogether(project: Storage) -> None:
    spec = project.load(
        "s3://bucket/in", "gs://other/out/{task_name}", preprocess={"enabled": True}
    )
    assert spec.input_folder == "s3://bucket/in"
    assert spec.folder("preprocessed") == "s3://bucket/in_preprocessed"
    assert spec.folder("scores") == "gs://other/out/demo"
    assert spec.journal_folder == "gs://other/out/demo/.modelcall"
    assert [(each.prefix, each.filesystem) for each in spec.store_options] == [
        ("s3://", "s3"),
        ("gs://", "gs"),
    ]


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("s3://b/x/", "s3://b/x"),
        ("s3://b//x/./y///", "s3://b/x/y"),
        ("S3://Bucket/Key", "s3://Bucket/Key"),
        ("s3://b", "s3://b"),
        ("memory:///x//y", "memory:///x/y"),
        ("abfs://box@account.dfs.core.windows.net/x", "abfs://box@account.dfs.core.windows.net/x"),
        ("file:///tmp//x/", "/tmp/x"),
        ("s3://b/{task_name}/ä b", "s3://b/demo/ä b"),
    ],
)
def test_places_have_the_simplest_spelling(project: Storage, written: str, meant: str) -> None:
    assert project.load(written).input_folder == meant
    assert project.load("./in", written).folder("scores") == meant


NO_PLACES = (
    *("s3:/b/x", "file:/x", "s3://", "s3:///x", "lake://", "s3://b/x/../y", "s3://me:hunter22@b/x"),
    *("a b://x", "zip://a.zip::s3://b/a", "file://host/x"),
)


def test_what_is_no_place(project: Storage, messages: Messages) -> None:
    found = {}
    for text in NO_PLACES:
        input_, output = (
            told([*project.problems(*places).values()]) for places in ((text, "./o"), ("./i", text))
        )
        found[text] = input_
        output = output.replace("output_folder", "input_folder").replace("(line 3)", "(line 2)")
        assert output == input_
        assert "hunter22" not in input_
    messages(found)


def test_mistakes_behind_a_variable_are_found(project: Storage) -> None:
    project.env("PLACE=s3:/b\nEMPTY=\n")
    problem = project.problems("${PLACE}/in")["configs/tasks/demo.yaml:data.input_folder"]
    assert problem.fix == "write s3://b/in"
    assert "'${PLACE}/in'" in str(problem)
    problem = project.problems("${EMPTY}")["configs/tasks/demo.yaml:data.input_folder"]
    assert problem.wrong == "empty once its variables are replaced"


@pytest.mark.parametrize("target", ["s3://b/in", "s3://b/in/out", "s3://b//in/./out/"])
def test_outputs_in_a_store_must_not_become_inputs(project: Storage, target: str) -> None:
    problem = project.problems("s3://b/in", target)["configs/tasks/demo.yaml:data.output_folder"]
    assert "would become inputs" in problem.wrong
    project.load("s3://b/in", "s3://b/in_scores")


def test_a_whole_bucket_has_no_folder_beside_it(project: Storage) -> None:
    found = project.problems("s3://b", "s3://c/out", preprocess={"enabled": True})
    assert found["configs/tasks/demo.yaml:preprocess.output_folder"].fix == "name a folder for it"
    own = {"enabled": True, "output_folder": "s3://c/clean"}
    assert project.load("s3://b", "s3://c/out", preprocess=own).folder("preprocessed") == (
        "s3://c/clean"
    )


def test_tasks_in_a_store_are_linked_and_must_not_clash(project: Storage) -> None:
    project.write(
        "configs/distillation/groups.yaml",
        "merge_groups: [{name: g, output_file: g.jsonl, input_files: [a.jsonl]}]",
    )
    merge = {"merge_config_path": "configs/distillation/groups.yaml"}
    answer = {"response_config_path": "configs/models/m.yaml"}
    for name, block in {
        "merge": {
            "jsonl_merge": {
                **merge,
                "base_input_dir": "s3://b/chats",
                "base_output_dir": "s3://b//merged/",
            }
        },
        "one": {
            "generate_response": {
                **answer,
                "input_path": "s3://b/merged/g.jsonl",
                "output_path": "s3://b/one",
            }
        },
        "two": {
            "generate_response": {
                **answer,
                "input_path": "s3://b/merged",
                "output_path": "s3://b/one/",
            }
        },
    }.items():
        project.write(
            f"configs/tasks/{name}.yaml",
            {"task_name": name, "task_type": "data_distillation", **block},
        )
    catalog = load_catalog(project.root)
    one = next(spec for spec in catalog.tasks if spec.name == "one")
    assert one.has_one_input
    assert one.link and one.link.spec.name == "merge"
    ((broken,),) = (task.problems for task in catalog.broken)
    assert str(broken).startswith(
        "configs/tasks/two.yaml:generate_response.output_path: "
        "configs/tasks/one.yaml writes to the same"
    )
    assert "found s3://b/one" in str(broken)


@pytest.mark.parametrize(
    ("path", "is_file"),
    [
        ("s3://b/x/a.jsonl", True),
        ("s3://b/a.jsonl.gz", True),
        ("s3://b/a.ndjson.zst", True),
        ("./a.JSON.gz", True),
        ("s3://b/a.parquet", True),
        ("s3://b/a.parquet.gz", True),
        ("s3://b/a.gz", False),
        ("s3://bucket.json", False),
        ("s3://b/jsonl", False),
    ],
)
def test_whether_the_input_is_one_file(project: Storage, path: str, is_file: bool) -> None:
    assert project.load(path, "s3://c/out").has_one_input is is_file


# The built-in way to S3


def test_without_variables_s3_finds_its_own_keys(project: Storage) -> None:
    (found,) = project.load("s3://b/in").store_options
    assert (found.name, found.prefix, found.filesystem) == (NO_PROFILE, "s3://", "s3")
    assert set(found.options) == {"config_kwargs"}
    assert found.options["config_kwargs"]["retries"] == {
        "mode": "standard",
        "total_max_attempts": 8,
    }
    assert not CHECKSUMS.keys() & found.options["config_kwargs"].keys()


def test_variables_of_the_task_reach_s3(project: Storage) -> None:
    project.env(
        "AWS_ACCESS_KEY_ID=k\nAWS_SECRET_ACCESS_KEY=project\nAWS_DEFAULT_REGION=eu-west-1\n"
    )
    project.write("own.env", "AWS_SECRET_ACCESS_KEY=own\nAWS_ENDPOINT_URL=http://127.0.0.1:9/\n")
    own = {"environment": {"config_path": "own.env"}}
    (found,) = project.load("s3://b/in", **own).store_options
    assert (found.options["key"], found.options["secret"]) == ("k", "own")
    assert found.options["endpoint_url"] == "http://127.0.0.1:9"
    assert found.options["client_kwargs"] == {"region_name": "eu-west-1"}
    assert CHECKSUMS.items() <= found.options["config_kwargs"].items()
    assert project.options("s3://b/in")["secret"] == "project"


def test_half_a_pair_of_keys(project: Storage) -> None:
    project.env("AWS_ACCESS_KEY_ID=k\nAWS_SECRET_ACCESS_KEY=\n")
    problem = project.problems("s3://b/in")["configs/tasks/demo.yaml:data.input_folder"]
    assert problem.wrong == "variable AWS_SECRET_ACCESS_KEY is not set, which s3:// needs"
    assert problem.unready


def test_local_tasks_need_no_store(project: Storage) -> None:
    assert project.load().store_options == ()


@pytest.mark.parametrize("way", ["profile", "AWS", "TOS"])
def test_a_real_store_takes_what_is_made(
    project: Storage, s3_server: S3Server, bucket: str, way: str
) -> None:
    key, secret, place = s3_server.key, s3_server.secret, f"s3://{bucket}/in"
    if way == "TOS":
        place = f"tos://{bucket}/in"
        project.env(
            f"TOS_ACCESS_KEY={key}\nTOS_SECRET_KEY={secret}\n"
            f"TOS_ENDPOINT={s3_server.endpoint}\nREGION={s3_server.region}\n"
        )
    elif way == "AWS":
        project.env(
            f"AWS_ACCESS_KEY_ID={key}\nAWS_SECRET_ACCESS_KEY={secret}\n"
            f"AWS_ENDPOINT_URL={s3_server.endpoint}\nAWS_REGION={s3_server.region}\n"
        )
    else:
        project.env(f"LAB_KEY={key}\nLAB_SECRET={secret}\nLAB_URL={s3_server.endpoint}\n")
        keys = {"access_key": "${LAB_KEY}", "secret_key": "${LAB_SECRET}"}
        own = {"endpoint": "${LAB_URL}", "region": s3_server.region, **keys}
        project.storage({"stores": {"lab": {"prefix": "s3://", **own}}})
    fs = s3fs.S3FileSystem(**project.options(place), skip_instance_cache=True)
    fs.pipe_file(f"{bucket}/in/a.jsonl", b"{}")
    assert fs.cat_file(f"{bucket}/in/a.jsonl") == b"{}"
    client = fs.connect()
    assert client.meta.config.retries["total_max_attempts"] == 8
    assert client.meta.region_name == s3_server.region


# Profiles


def test_every_field_of_a_profile(project: Storage) -> None:
    project.env("LAB_KEY=key\nLAB_SECRET=secret\nLAB_TOKEN=token\nLAB_URL=http://host:9000/\n")
    project.profile(
        endpoint="${LAB_URL}",
        region="us-east-1",
        access_key="${LAB_KEY}",
        secret_key="${LAB_SECRET}",
        session_token="${LAB_TOKEN}",
        addressing="path",
        max_attempts=3,
    )
    (found,) = project.load("s3://lab/in").store_options
    assert (found.name, found.prefix, found.filesystem) == ("lab", "s3://lab/", "s3")
    assert found.options == {
        "key": "key",
        "secret": "secret",
        "token": "token",
        "endpoint_url": "http://host:9000",
        "client_kwargs": {"region_name": "us-east-1"},
        "config_kwargs": {
            **CHECKSUMS,
            "s3": {"addressing_style": "path"},
            "retries": {"mode": "standard", "total_max_attempts": 3},
            "connect_timeout": 10,
            "read_timeout": 60,
        },
    }


def test_the_longest_prefix_wins(project: Storage) -> None:
    prefixes = {"all": "s3://", "lab": "s3://lab", "raw": "s3://lab/raw/", "lake": "lake://"}
    stores = {name: {"prefix": prefix} for name, prefix in prefixes.items()}
    stores["lake"]["filesystem"] = "memory"
    project.storage({"stores": stores})
    for source, name in {
        "s3://lab/raw": "raw",
        "s3://lab/raw/x": "raw",
        "s3://lab/rawest": "lab",
        "s3://lab": "lab",
        "s3://laboratory/x": "all",
        "lake://x": "lake",
    }.items():
        assert [each.name for each in project.load(source).store_options] == [name]
    spec = project.load("s3://lab/raw", "s3://else/out", data__journal_folder="lake://j")
    assert [each.name for each in spec.store_options] == ["raw", "lake", "all"]


def test_a_profile_that_says_little_has_the_rest_from_variables(project: Storage) -> None:
    project.env("AWS_ACCESS_KEY_ID=k\nAWS_SECRET_ACCESS_KEY=s\nAWS_SESSION_TOKEN=t\nLAB_KEY=a\n")
    project.profile(max_attempts=2)
    assert [project.options("s3://lab/in")[name] for name in ("key", "secret", "token")] == [*"kst"]
    project.profile(access_key="${LAB_KEY}", secret_key="${LAB_KEY}", session_token="${LAB_T:-}")
    options = project.options("s3://lab/in")
    assert [options[name] for name in ("key", "secret", "token")] == ["a", "a", None]


def test_missing_variables_are_named_and_stop_the_tasks_of_the_profile_only(
    project: Storage,
) -> None:
    project.profile(endpoint="${LAB_URL}", access_key="${LAB_KEY}", secret_key="${LAB_SECRET}")
    project.env("LAB_KEY=\n")
    project.task("s3://lab/in", name="lab")
    project.task("s3://else/in", "./o1", name="elsewhere")
    project.task("./in", "./o2", name="local")
    catalog = load_catalog(project.root)
    assert {spec.name for spec in catalog.tasks} == {"elsewhere", "local"}
    (broken,) = catalog.broken
    assert [str(each).partition("; ")[0] for each in broken.problems] == [
        "configs/storage.yaml:stores.lab.endpoint: variable LAB_URL is not set",
        "configs/storage.yaml:stores.lab.access_key: ${LAB_KEY} is empty",
        "configs/storage.yaml:stores.lab.secret_key: variable LAB_SECRET is not set",
    ]
    assert all(each.unready for each in broken.problems)
    ended = project.check()
    assert ended.code == 0, ended.out
    ended = project.check("configs/tasks/lab.yaml")
    assert "warning: configs/storage.yaml:stores.lab.endpoint: variable LAB_URL" in ended.out


@pytest.mark.parametrize("name", ["access_key", "secret_key", "session_token"])
@pytest.mark.parametrize("value", ["AKIA1234567890", "${K:-AKIA1234567890}", "x${K}", 1234567890])
def test_a_literal_key_is_refused_and_never_shown(project: Storage, name: str, value: Any) -> None:
    project.profile(**{name: value})
    problem = project.problems("s3://lab/in")[f"configs/storage.yaml:stores.lab.{name}"]
    if isinstance(value, str):
        assert problem.wrong == "a key in a file"
        assert problem.expected == "a reference such as ${LAB_KEY}"
        assert ".env" in problem.fix
    assert "1234567890" not in str(problem)


PROFILE_MISTAKES: dict[str, Data] = {
    "endpoint, nearly": {"endpont": "x"},
    "secret_key, nearly": {"secret": "x"},
    "a prefix that is no URI": {"prefix": "lab"},
    "a prefix of the environment": {"prefix": "s3://${B}/"},
    "a prefix that leads up": {"prefix": "s3://b/../c"},
    "a prefix of this machine": {"prefix": "file:///data"},
    "an endpoint without http": {"endpoint": "host:9000"},
    "a password in an endpoint": {"endpoint": "http://a:b@h"},
    "addressing, nearly": {"addressing": "paht"},
    "no attempt": {"max_attempts": 0},
    "access_key alone": {"access_key": "${K}"},
    "secret_key alone": {"secret_key": "${K}"},
    "session_token alone": {"session_token": "${K}"},
    "a file system with a dot": {"filesystem": "my_pkg.lake.Lake"},
    "an endpoint of another file system": {"filesystem": "gs", "endpoint": "https://h"},
    "a region of another file system": {"prefix": "lake://", "region": "x"},
    "a token in options": {"options": {"token": "hunter22"}},
    "a key deep in options": {"options": {"a": {"api_key": 7}}},
    "a password in a list of options": {"options": {"hosts": ["http://a:hunter22@h"]}},
    "a text of options": {"options": "x"},
}


def test_what_is_wrong_in_a_profile(project: Storage, messages: Messages) -> None:
    found = {}
    for name, profile in PROFILE_MISTAKES.items():
        project.profile(**profile)
        problems = [*project.problems("s3://lab/in").values()]
        found[name] = told(problems)
        checked = project.check().out
        for problem in problems:
            assert problem.file == "configs/storage.yaml" and str(problem) in checked
    assert "hunter22" not in str(found)
    messages(found)


def test_two_profiles_of_one_prefix(project: Storage) -> None:
    project.storage({"stores": {"a": {"prefix": "s3://b"}, "b": {"prefix": "s3://b//"}}})
    problem = project.problems("s3://b/in")["configs/storage.yaml:stores.b.prefix"]
    assert problem.wrong == "the prefix of stores.a too"


def test_options_of_s3_join_what_the_fields_make(project: Storage) -> None:
    project.env("LAB_CA=/ca.pem\n")
    project.profile(
        region="r",
        options={
            "anon": True,
            "client_kwargs": {"verify": "${LAB_CA}"},
            "config_kwargs": {"read_timeout": 5, "s3": {"payload_signing_enabled": True}},
        },
    )
    options = project.options("s3://lab/in")
    assert options["anon"] is True
    assert options["client_kwargs"] == {"region_name": "r", "verify": "/ca.pem"}
    assert options["config_kwargs"]["read_timeout"] == 5
    assert options["config_kwargs"]["s3"] == {
        "addressing_style": "auto",
        "payload_signing_enabled": True,
    }


def test_a_file_system_of_ones_own(project: Storage) -> None:
    project.env("LAKE_TOKEN=hidden\n")
    lake = {
        "prefix": "lake://",
        "filesystem": "my_pkg.lake:LakeFileSystem",
        "options": {"root": "/mnt", "token": "${LAKE_TOKEN}", "n": 3, "in": [{"x": "${A:-b}c"}]},
    }
    project.storage({"stores": {"lake": lake}})
    spec = project.load("lake://corpus/", "lake://scores")
    assert spec.input_folder == "lake://corpus"
    assert spec.store_options == (
        StoreOptions(
            "lake",
            "lake://",
            "my_pkg.lake:LakeFileSystem",
            {"root": "/mnt", "token": "hidden", "n": 3, "in": [{"x": "bc"}]},
        ),
    )
    project.env("")
    problem = project.problems("lake://x")["configs/storage.yaml:stores.lake.options.token"]
    assert problem.wrong == "variable LAKE_TOKEN is not set"
    assert problem.unready


# A broken storage.yaml


@pytest.mark.parametrize(
    ("text", "message", "loads_relative"),
    [
        ("stores: {lab: {prefix: nonsense}}", "configs/storage.yaml:stores.lab.prefix: ", True),
        ("stores: []", "configs/storage.yaml:stores: wrong type", True),
        ("a: [", "configs/storage.yaml:1:", False),
        ("", "configs/storage.yaml: the file is empty", False),
        (
            "data_rot: s3://b/root",
            "configs/storage.yaml:data_rot: unknown key; did you mean",
            False,
        ),
        ("data_root: s3:/b", "configs/storage.yaml:data_root: one slash after s3:", False),
    ],
)
def test_a_broken_file_breaks_the_tasks_that_need_it(
    project: Storage, text: str, message: str, loads_relative: bool
) -> None:
    project.storage(text)
    project.task("./in", "/tmp/out", name="local")
    project.task("s3://b/in", "./o1", name="remote")
    project.task("./in", "./o2", name="journal", data__journal_folder="memory://j")
    project.task("data/in", "./o3", name="relative")
    project.task("data/in", "./o4", name="own", data_root="./")
    catalog = load_catalog(project.root)
    loaded = {"local", "own"} | ({"relative"} if loads_relative else set())
    assert {spec.name for spec in catalog.tasks} == loaded
    for task in catalog.broken:
        assert str(task.problems[0]).startswith(message)
    ended = project.check()
    assert ended.code == 1
    assert ended.out.count("error: ") == 1


def test_a_data_root_beside_broken_profiles_still_counts(project: Storage) -> None:
    project.storage({"stores": {"lab": {"prefix": 7}}, "data_root": "./lake"})
    assert project.load("data/in").input_folder == f"{project.root}/lake/data/in"
    project.storage({"stores": {"lab": {"prefix": 7}}, "data_root": "s3://b"})
    assert "configs/storage.yaml:stores.lab.prefix" in project.problems("data/in")


# The data root


@pytest.mark.parametrize(
    ("root", "written", "meant"),
    [
        ("s3://b/root/", "data/in", "s3://b/root/data/in"),
        ("s3://b/root", "data//in/", "s3://b/root/data/in"),
        ("s3://b/root", "./data/in", "{here}/data/in"),
        ("s3://b/root", "/data/in", "/data/in"),
        ("s3://b/root", "gs://c/in", "gs://c/in"),
        ("s3://b/${PART:-x}", "in", "s3://b/x/in"),
        ("s3://b/{task_name}", "in", "s3://b/demo/in"),
        ("/mnt/lake", "data/in", "/mnt/lake/data/in"),
        ("/mnt/lake", "../in", "/mnt/in"),
        ("lake", "in", "{here}/lake/in"),
        ("tos://${TOS_BUCKET}/${TOS_PREFIX:-}", "in", "tos://bucket/in"),
        ("tos:///", "in", "tos://bucket/in"),
    ],
)
def test_where_relative_folders_lie(project: Storage, root: str, written: str, meant: str) -> None:
    project.env("TOS_BUCKET=bucket\nTOS_ACCESS_KEY=k\nTOS_SECRET_KEY=s\n")
    project.storage({"data_root": root})
    expected = meant.format(here=project.root)
    assert project.load(written).input_folder == expected
    spec = project.load("./raw", written, data__journal_folder=f"{written}/journal")
    assert spec.folder("scores") == expected
    assert spec.journal_folder == f"{expected}/journal"
    assert spec.files["model"] == "configs/models/m.yaml"
    for name, stage in (("input_folder", "raw"), ("output_folder", "preprocessed")):
        spec = project.load("./raw", "./out", preprocess={"enabled": True, name: written})
        assert (spec.input_folder if stage == "raw" else spec.folder(stage)) == expected


def test_a_data_root_is_of_distilling_tasks_too(project: Storage) -> None:
    project.storage({"data_root": "s3://b"})
    task = {
        "task_name": "d",
        "task_type": "generate_response",
        "distillation": {
            "response_config_path": "configs/models/m.yaml",
            "input_path": "in/a.jsonl",
            "output_path": "out",
        },
    }
    spec = load_task(project.write("configs/tasks/d.yaml", task), project.root)
    assert spec.input_folder == "s3://b/in/a.jsonl"
    assert spec.journal_folder == "s3://b/out/.modelcall"


def test_a_task_has_its_own_data_root(project: Storage) -> None:
    project.storage({"data_root": "s3://b/root"})
    assert project.load("in", data_root="gs://c").input_folder == "gs://c/in"
    assert project.load("in", data_root="./").input_folder == f"{project.root}/in"
    assert project.load("in", data_root="./").store_options == ()
    problem = project.problems("in", data_root="${GONE}")["configs/tasks/demo.yaml:data_root"]
    assert problem.wrong == "variable GONE is not set"


def test_leading_out_of_a_data_root_is_refused(project: Storage) -> None:
    project.storage({"data_root": "s3://b/root"})
    problem = project.problems("../in")["configs/tasks/demo.yaml:data.input_folder"]
    assert problem.wrong == "leads up, which keys of a store cannot"
    assert "`./`" in problem.fix


def test_a_data_root_whose_variable_is_missing(project: Storage) -> None:
    project.storage({"data_root": "s3://${LAB_BUCKET}/x"})
    problem = project.problems("in")["configs/storage.yaml:data_root"]
    assert problem.wrong == "variable LAB_BUCKET is not set"
    assert problem.unready
    project.storage({"data_root": "tos:///x"})
    assert project.problems("in")["configs/storage.yaml:data_root"].wrong == (
        "variable TOS_BUCKET is not set"
    )
    assert project.load("./in").data_root is None


def test_check_says_where_relative_folders_lie(project: Storage) -> None:
    project.task("data/in", "./out")
    assert "is s3://" not in project.check().out
    project.storage({"data_root": "s3://b/root"})
    ended = project.check()
    assert "configs/tasks/demo.yaml:data.input_folder: is s3://b/root/data/in\n" in ended.out
    assert "data.output_folder" not in ended.out
    assert ended.code == 0


def test_relative_folders_of_old_files(project: Storage) -> None:
    old = {"options": {"resume": False}}
    (_, moved) = project.load("data/in", "./out", **old).warnings
    assert moved.field == "data.input_folder"
    assert "now means data/in below the project root" in moved.wrong
    assert "write ./data/in if that is meant" in moved.fix
    assert "data_root in configs/storage.yaml" in moved.fix
    project.storage({"data_root": "s3://b/root"})
    spec = project.load("data/in", "./out", **old)
    assert [each.field for each in spec.warnings] == ["options.resume"]
    assert spec.input_folder == "s3://b/root/data/in"
    (project.root / "configs/storage.yaml").unlink()
    assert len(project.load("data/in", "./out", data_root="./lake", **old).warnings) == 1


# TOS

KEYS = "TOS_ACCESS_KEY=key\nTOS_SECRET_KEY=secret\n"


@pytest.mark.parametrize(
    ("variables", "endpoint", "region", "addressing"),
    [
        ("", "https://tos-s3-cn-beijing.volces.com", "cn-beijing", "virtual"),
        ("REGION=cn-shanghai", "https://tos-s3-cn-shanghai.volces.com", "cn-shanghai", "virtual"),
        *(
            (
                f"TOS_ENDPOINT={text}",
                "https://tos-s3-cn-beijing.volces.com",
                "cn-beijing",
                "virtual",
            )
            for text in (
                "tos-cn-beijing.volces.com",
                "https://tos-cn-beijing.volces.com/",
                "bucket.tos-cn-beijing.volces.com",
                "https://bucket.tos-cn-beijing.volces.com",
                "tos-s3-cn-beijing.volces.com",
                "https://tos-s3-cn-beijing.volces.com",
                "bucket.tos-s3-cn-beijing.volces.com",
                "TOS-cn-beijing.volces.com",
            )
        ),
        (
            "TOS_ENDPOINT=tos-cn-beijing.ivolces.com",
            "https://tos-s3-cn-beijing.ivolces.com",
            "cn-beijing",
            "virtual",
        ),
        (
            "TOS_ENDPOINT=http://tos-s3-cn-guangzhou.ivolces.com",
            "http://tos-s3-cn-guangzhou.ivolces.com",
            "cn-guangzhou",
            "virtual",
        ),
        (
            "TOS_ENDPOINT=tos-ap-southeast-1.bytepluses.com",
            "https://tos-s3-ap-southeast-1.bytepluses.com",
            "ap-southeast-1",
            "virtual",
        ),
        ("TOS_ENDPOINT=http://127.0.0.1:99", "http://127.0.0.1:99", "cn-beijing", "path"),
        ("TOS_ENDPOINT=http://[::1]:99/", "http://[::1]:99", "cn-beijing", "path"),
        ("TOS_ENDPOINT=http://localhost:99\nREGION=r", "http://localhost:99", "r", "path"),
        ("TOS_ENDPOINT=https://tos.corp", "https://tos.corp", "cn-beijing", "virtual"),
    ],
)
def test_tos_finds_endpoint_region_and_addressing(
    project: Storage, variables: str, endpoint: str, region: str, addressing: str
) -> None:
    project.env(f"{KEYS}{variables}\n")
    (found,) = project.load("tos://bucket/in", "tos://other/out").store_options
    assert (found.name, found.prefix, found.filesystem) == (NO_PROFILE, "tos://", "s3")
    options = found.options
    assert (options["key"], options["secret"]) == ("key", "secret")
    assert options["endpoint_url"] == endpoint
    assert options["client_kwargs"] == {"region_name": region}
    assert options["config_kwargs"]["s3"] == {"addressing_style": addressing}
    assert CHECKSUMS.items() <= options["config_kwargs"].items()


@pytest.mark.parametrize(
    ("prefix", "meant"),
    [("", "tos://agi-data/x/y"), ("TOS_PREFIX=/a/b/", "tos://agi-data/a/b/x/y")],
)
def test_tos_without_a_bucket_means_the_default_one(
    project: Storage, prefix: str, meant: str
) -> None:
    project.env(f"{KEYS}TOS_BUCKET=agi-data\n{prefix}\n")
    assert project.load("tos:///x//y/").input_folder == meant


def test_tos_names_the_variables_that_it_misses(project: Storage) -> None:
    found = project.problems("tos:///x")["configs/tasks/demo.yaml:data.input_folder"]
    assert found.wrong == "variable TOS_BUCKET is not set"
    found = project.problems("./in", "tos://b/x")["configs/tasks/demo.yaml:data.output_folder"]
    wrong = "variables TOS_ACCESS_KEY and TOS_SECRET_KEY are not set, which tos:// needs"
    assert found.wrong == wrong
    assert found.fix.startswith("the task cannot run until there are values in .env")
    assert "a profile for tos:// in configs/storage.yaml" in found.fix
    assert found.unready
    project.env("TOS_ACCESS_KEY=k\n")
    found = project.problems("tos://b/x")["configs/tasks/demo.yaml:data.input_folder"]
    assert found.wrong == "variable TOS_SECRET_KEY is not set, which tos:// needs"
    project.env(f"{KEYS}TOS_ENDPOINT=nonsense\n")
    found = project.problems("tos://b/x")["configs/tasks/demo.yaml:data.input_folder"]
    assert (found.wrong, found.have) == ("not a URL", "'${TOS_ENDPOINT}'")


def test_a_profile_for_tos_wins(project: Storage) -> None:
    project.env(f"{KEYS}TOS_ENDPOINT=tos-cn-shanghai.volces.com\nLAB_KEY=mine\n")
    keys = {"access_key": "${LAB_KEY}", "secret_key": "${LAB_KEY}"}
    endpoint = "tos-cn-guangzhou.volces.com"
    project.storage({"stores": {"tos": {"prefix": "tos://b/", "endpoint": endpoint, **keys}}})
    assert project.options("tos://b/x")["key"] == "mine"
    assert project.options("tos://b/x")["client_kwargs"] == {"region_name": "cn-guangzhou"}
    assert project.options("tos://else/x")["key"] == "key"
    project.storage({"stores": {"tos": {"prefix": "tos://", "max_attempts": 2}}})
    options = project.options("tos://b/x")
    assert (options["key"], options["endpoint_url"]) == (
        "key",
        "https://tos-s3-cn-shanghai.volces.com",
    )
    assert options["config_kwargs"]["retries"]["total_max_attempts"] == 2


def test_an_s3_profile_may_name_an_endpoint_of_tos(project: Storage) -> None:
    project.profile(endpoint="tos-cn-beijing.volces.com")
    options = project.options("s3://lab/x")
    assert options["endpoint_url"] == "https://tos-s3-cn-beijing.volces.com"
    assert options["config_kwargs"]["s3"] == {"addressing_style": "virtual"}


def test_a_task_of_the_old_system_loads(project: Storage) -> None:
    project.write("configs/tos.env", f"export {KEYS.splitlines()[0]}\nTOS_SECRET_KEY='s'\n")
    spec = project.load(
        "tos://agi-data/raw/{task_name}",
        "tos://agi-data/tagged",
        environment={"tos_config_path": "configs/tos.env", "api_provider": "x"},
        options={"main_resume": True},
    )
    assert spec.input_folder == "tos://agi-data/raw/demo"
    assert [each.prefix for each in spec.store_options] == ["tos://"]
    assert all(each.severity == "warning" for each in spec.warnings)


# Secrets


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(
    secret=st.text("abcdefghijklmnopqrstuvwxyz0123456789/+", min_size=12, max_size=40).map(
        lambda text: f"Zq7{text}"
    ),
    source=st.sampled_from(["s3://lab/in", "s3://else/in", "tos://b/in", "lake://x", "data/in"]),
    breakage=st.sampled_from(
        ["", "AWS_SECRET_ACCESS_KEY", "LAB_URL", "LAB_SECRET", "TOS_SECRET_KEY"]
    ),
    endpoint=st.sampled_from(["http://h:1", "http://u:{}@h:1", "{}"]),
)
def test_no_secret_is_ever_shown(
    project: Storage, secret: str, source: str, breakage: str, endpoint: str
) -> None:
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "TOS_ACCESS_KEY")
    names += ("TOS_SECRET_KEY", "LAB_KEY", "LAB_SECRET", "LAKE_TOKEN")
    values = dict.fromkeys(names, secret) | {"LAB_URL": endpoint.format(secret)}
    values["TOS_ENDPOINT"] = values["LAB_URL"]
    values.pop(breakage, None)
    project.env("".join(f"{name}='{value}'\n" for name, value in values.items()))
    keys = {"access_key": "${LAB_KEY}", "secret_key": "${LAB_SECRET}", "endpoint": "${LAB_URL}"}
    lake = {"prefix": "lake://", "options": {"token": "${LAKE_TOKEN}", "more": ["${LAB_KEY}"]}}
    project.storage(
        {"stores": {"lab": {"prefix": "s3://lab/", **keys}, "lake": lake}, "data_root": "s3://lab/"}
    )
    try:
        spec = project.load(source, "./out")
    except SetupError as error:
        shown = [repr(error), str(error), repr(error.problems)]
    else:
        assert any(secret in str(each.options) for each in spec.store_options)
        dumps = [str(spec.task.model_dump()), str(spec.warnings), str(spec.env)]
        shown = [repr(spec), repr(spec.store_options), str(spec.store_options), *dumps]
    shown.append(project.check().out)
    assert [text for text in shown if secret in text] == []


# How lines are read


def test_bad_lines_and_encodings(project: Storage) -> None:
    data = project.load().task.rated
    assert (data.on_bad_line, data.encoding) == ("keep", "utf-8")
    data = project.load(data__on_bad_line="fail", data__encoding="GB18030").task.rated
    assert (data.on_bad_line, data.encoding) == ("fail", "gb18030")
    for name in ("utf8", "UTF-8", "U8"):
        assert project.load(data__encoding=name).task.rated.encoding == "utf-8"


@pytest.mark.parametrize(
    ("name", "fix"),
    [("gb18031", "did you mean gb18030?"), ("hex", ""), ("rot13", ""), ("a\0b", "")],
)
def test_an_unknown_encoding_names_the_nearest(project: Storage, name: str, fix: str) -> None:
    found = project.problems(data__encoding=name, data__on_bad_line="drop")
    problem = found["configs/tasks/demo.yaml:data.encoding"]
    assert problem.wrong == "unknown encoding"
    assert "utf-8, utf-8-sig, utf-16, utf-32, gb18030" in problem.expected
    assert problem.fix == fix
    assert found["configs/tasks/demo.yaml:data.on_bad_line"].expected == "keep, fail"


def test_reading_is_told_by_each_step_that_distils(project: Storage) -> None:
    step = {
        "response_config_path": "configs/models/m.yaml",
        "input_path": "./in",
        "output_path": "o",
    }
    task: Data = {"task_name": "d", "task_type": "generate_response", "distillation": step}
    step["encoding"] = "latin1"
    spec = load_task(project.write("configs/tasks/d.yaml", task), project.root)
    responses = getattr(spec.task, "generate_response", None)
    assert responses and (responses.encoding, responses.on_bad_line) == ("iso8859-1", "keep")
    step["encoding"] = "latin-one"
    with pytest.raises(SetupError, match=r"d\.yaml:distillation\.encoding: unknown encoding"):
        load_task(project.write("configs/tasks/d.yaml", task), project.root)


# The page


def test_the_examples_of_the_page_are_valid(project: Storage) -> None:
    found = blocks(ROOT / "docs/storage.md", "yaml")
    examples = [text for text in found if text.startswith("# configs/storage.yaml\n")]
    assert len(examples) == 4
    for text in examples:
        assert parse_storage(yaml.safe_load(text), "storage.yaml")[1] == []
