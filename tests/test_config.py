"""Config files: what is accepted, and what is said about each mistake."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from modelcall_assets.cli.check import check
from modelcall_assets.config.catalog import TaskSpec, find_root, load_catalog, load_model, load_task
from modelcall_assets.config.endpoint import Endpoint
from modelcall_assets.config.environment import Environment, MissingVariable, read_env_file
from modelcall_assets.config.model import ModelConfig, parse_model
from modelcall_assets.config.naming import legal_key
from modelcall_assets.config.prompt import parse_prompt
from modelcall_assets.config.reference import reference
from modelcall_assets.config.task import parse_task
from modelcall_assets.config.yaml_file import load_yaml
from modelcall_assets.errors import Problem, SetupError
from modelcall_assets.steps.scores import ScoreStage

Data = dict[str, Any]

MODEL: Data = {
    "client_config": {"base_url": "http://localhost:8000/v1", "api_key": "EMPTY"},
    "chat_config": {"model": "m"},
}
OLD_MODEL: Data = {"provider": "openai", "model_name": "gpt-4o", "completions_params": {}}
PROMPT: Data = {
    "prompt_template": {"prompt_text": "Rate {text}"},
    "output_config": {"require_json": True, "json_keys": ["score"]},
}


def task_data(**changes: Any) -> Data:
    data: Data = {
        "task_name": "demo",
        "data": {"input_folder": "./in", "output_folder": "./out"},
        "model": {"config_path": "configs/models/m.yaml"},
        "prompt": {"config_path": "configs/prompts/p.yaml"},
    }
    return with_fields(data, changes)


def with_fields(data: Data, changes: Data) -> Data:
    """A copy in which each dotted field has its new value."""
    copy: Data = yaml.safe_load(yaml.safe_dump(data))
    for field, value in changes.items():
        *blocks, name = field.replace("__", ".").split(".")
        block = copy
        for part in blocks:
            block = block.setdefault(part, {})
        block[name] = value
    return copy


def write(path: Path, content: Data | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str) else yaml.safe_dump(content, allow_unicode=True)
    path.write_text(text, "utf-8")
    return path


class Project:
    """A project on disk with one model and one prompt."""

    def __init__(self, root: Path) -> None:
        self.root = root
        write(root / "configs/models/m.yaml", MODEL)
        write(root / "configs/prompts/p.yaml", PROMPT)
        (root / "in").mkdir()

    def task(self, file: str = "demo.yaml", **changes: Any) -> Path:
        return write(self.root / "configs/tasks" / file, task_data(**changes))

    def load(self, **changes: Any) -> TaskSpec:
        return load_task(self.task(**changes), self.root)

    def problems(self, **changes: Any) -> dict[str, Problem]:
        with pytest.raises(SetupError) as caught:
            self.load(**changes)
        return {problem.field: problem for problem in caught.value.problems}

    def check(self, *arguments: str | Path) -> Result:
        paths = arguments or (self.root / "configs",)
        return CliRunner().invoke(check, [str(argument) for argument in paths])


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.chdir(tmp_path)
    return Project(tmp_path)


def task_problems(**changes: Any) -> dict[str, Problem]:
    return {problem.field: problem for problem in parse_task(task_data(**changes), "t.yaml")[1]}


def model_problems(base: Data = MODEL, **changes: Any) -> dict[str, Problem]:
    found = parse_model(with_fields(base, changes), "m.yaml")[1]
    return {problem.field: problem for problem in found}


def prompt_problems(**changes: Any) -> dict[str, Problem]:
    found = parse_prompt(with_fields(PROMPT, changes), "p.yaml")[1]
    return {problem.field: problem for problem in found}


# YAML files


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", ":3:1: not valid YAML: duplicate key 'a'"),
        ("x:\n  a: 1\n  'a': 2\n", ":3:3: not valid YAML: duplicate key 'a'"),
        ("a: [1\n", ":2:1: not valid YAML"),
        ("- a\n", "not a mapping"),
        ("", "the file is empty"),
        ("# only a comment\n", "the file is empty"),
        ("a: &a {b: *a}\n", "Circular reference"),
        ("a:\n  1: x\n", ":2:3: not valid YAML: write the key '1' in quotes"),
        ("no: x\n", "write the key 'no' in quotes"),
        ("? [a]\n: x\n", "in quotes"),
        ("a: !!python/object:os.system x\n", "could not determine a constructor"),
        ("a: \x01\n", "not valid YAML"),
        ("[" * 5000, "nested too deeply"),
    ],
)
def test_a_yaml_mistake_has_its_place(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SetupError) as caught:
        load_yaml(write(tmp_path / "f.yaml", text), "f.yaml")
    assert str(caught.value).startswith("f.yaml")
    assert message in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"a: caf\xe9\n")
    with pytest.raises(SetupError, match="not UTF-8 at byte 6"):
        load_yaml(tmp_path / "latin.yaml")
    with pytest.raises(SetupError, match="cannot be read"):
        load_yaml(tmp_path / "absent.yaml")


def test_merged_mappings_are_not_duplicates(tmp_path: Path) -> None:
    text = "base: &b {a: 1}\nx: &x {<<: *b, a: 2}\ny: {<<: *x, a: 3}\n"
    assert load_yaml(write(tmp_path / "f.yaml", text))["y"] == {"a": 3}


def test_json_files(tmp_path: Path) -> None:
    assert load_yaml(write(tmp_path / "f.json", '{\t"a": 1e5}')) == {"a": 1e5}
    with pytest.raises(SetupError, match=r"bad.json:1:2: not valid JSON"):
        load_yaml(write(tmp_path / "bad.json", "{a}"), "bad.json")
    with pytest.raises(SetupError, match="duplicate key 'a'"):
        load_yaml(write(tmp_path / "twice.json", '{"a": 1, "a": 2}'))


# Environment


def test_env_file_format(tmp_path: Path) -> None:
    text = "# c\nA=1\nexport B='two words'\nC=\"x=y\"\nD=${A}\nE=\nF\n"
    values = read_env_file(write(tmp_path / "e", text))
    assert values == {"A": "1", "B": "two words", "C": "x=y", "D": "${A}", "E": ""}


def test_precedence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / ".env", "A=project\nB=project\nC=project\n")
    monkeypatch.setenv("B", "process")
    monkeypatch.setenv("C", "process")
    files = [write(tmp_path / "1.env", "C=first\nD=first\n"), write(tmp_path / "2.env", "D=last\n")]
    env = Environment.for_task(tmp_path, files)
    assert [env[name] for name in "ABCD"] == ["project", "process", "first", "last"]
    assert "process" not in repr(env)


def test_expand() -> None:
    env = Environment({"A": "1", "EMPTY": ""})
    assert env.expand("$A ${A} $$ ${B:-x y} ${EMPTY:-d} ${EMPTY}|") == "$A 1 $$ x y d |"
    with pytest.raises(MissingVariable) as caught:
        env.expand("${A}${GONE}")
    assert caught.value.name == "GONE"


@given(st.text().filter(lambda text: "${" not in text), st.text())
def test_expand_changes_references_only(text: str, value: str) -> None:
    assert Environment({"A": value}).expand(f"{text}${{A}}") == f"{text}{value}"
    assert Environment({}).expand(text) == text


def test_env_files_never_leak(project: Project) -> None:
    write(
        project.root / "configs/models/m.yaml",
        with_fields(MODEL, {"client_config.api_key": "${K}"}),
    )
    before = dict(os.environ)
    for name in ("a", "b"):
        write(project.root / f"{name}.env", f"K=key-of-{name}\n")
        project.task(
            f"{name}.yaml",
            task_name=name,
            data__output_folder=f"./out/{name}",
            environment__config_path=f"{name}.env",
        )
    tasks = load_catalog(project.root).tasks
    assert [task.endpoints()[0].api_key for task in tasks] == ["key-of-a", "key-of-b"]
    assert dict(os.environ) == before


def test_missing_env_file(project: Project) -> None:
    found = project.problems(
        environment__config_path=["gone.env"], environment__tos_config_path="x"
    )
    assert found["environment.config_path"].have == "gone.env"
    assert found["environment.tos_config_path"].wrong == "no such file"


# Tasks: shape


def test_smallest_task() -> None:
    task, problems = parse_task(task_data(), "t.yaml")
    assert task and not problems
    assert (task.task_type, task.data.input_key, task.max_failure_rate) == (
        "data_scoring",
        "text",
        0.05,
    )
    assert (task.concurrency.max_concurrent_files, task.concurrency.files_per_run) == (2, 1)
    assert (task.retry.repair_turns, task.max_files, task.max_items_per_file) == (2, None, None)


def test_prompt_format_key_is_the_input_key_unless_given() -> None:
    task, _ = parse_task(task_data(data__input_key="body"), "t.yaml")
    assert task and task.data.prompt_format_key == "body"
    task, _ = parse_task(
        task_data(data__input_key="body", data__prompt_format_key="code"), "t.yaml"
    )
    assert task and task.data.prompt_format_key == "code"


def test_every_problem_of_a_file_is_told() -> None:
    data = task_data(
        data__input_foldr="x",
        data__input_key=3,
        concurrency__files_per_run=51,
        debug__max_files=0,
        max_failure_rate=1.5,
        owners=["me"],
        distributed__num_runs=3,
        preprocess__filters={"min_len": 3},
    )
    del data["model"], data["data"]["output_folder"]
    found = {problem.field: problem for problem in parse_task(data, "t.yaml")[1]}
    assert set(found) == {
        "data.input_foldr",
        "data.input_key",
        "data.output_folder",
        "concurrency.files_per_run",
        "debug.max_files",
        "max_failure_rate",
        "owners[0]",
        "distributed.num_runs",
        "preprocess.filters.min_len",
        "model",
    }
    assert all(problem.file == "t.yaml" for problem in found.values())
    assert found["data.input_foldr"].fix == "did you mean input_folder?"
    assert found["data.input_key"].expected == "text"
    assert found["data.input_key"].have == "3"
    assert found["data.output_folder"].fix.startswith("add `output_folder:`")
    assert found["preprocess.filters.min_len"].wrong == "unknown key"


def test_wrong_types_say_what_to_write() -> None:
    found = task_problems(
        max_failure_rate="1e-2",
        task_name=20240101,
        retry__enable_format_validation_retry="yes",
        data="x",
        concurrency__max_concurrent_files=True,
    )
    assert found["max_failure_rate"].fix == "write 0.01 without quotes"
    assert found["task_name"].fix == "write it in quotes"
    assert found["retry.enable_format_validation_retry"].expected == "true or false"
    assert found["data"].expected == "a mapping"
    assert found["concurrency.max_concurrent_files"].have == "true"


def test_a_block_with_nothing_under_it_is_its_defaults() -> None:
    task, problems = parse_task(task_data(debug=None, logging=None, preprocess=None), "t.yaml")
    assert task and not problems
    assert "data.input_folder" in task_problems(data=None)


@pytest.mark.parametrize("value", [-1, None])
def test_no_limit(value: int | None) -> None:
    task, _ = parse_task(
        task_data(debug__enabled=True, debug__max_files=value, debug__max_items_per_file=value), "t"
    )
    assert task and task.max_files is None and task.max_items_per_file is None


def test_file_caps() -> None:
    caps: Data = {"preprocess__num_files": 7, "preprocess__enabled": True, "debug__max_files": 2}
    task, _ = parse_task(task_data(**caps), "t")
    assert task and task.max_files == 7
    task, _ = parse_task(task_data(**caps, debug__enabled=True), "t")
    assert task and task.max_files == 2


def test_format_retry_off_means_no_repair_turn() -> None:
    task, _ = parse_task(task_data(retry__enable_format_validation_retry=False), "t")
    assert task and task.retry.repair_turns == 0


def test_owners() -> None:
    assert not task_problems(owners=["a@b.org", "team:data"])
    assert task_problems(owners=["team:"])["owners[0]"].expected


# Tasks: types and preprocessors


def test_task_types() -> None:
    found = task_problems(task_type="generate_response", whatever=1)
    assert list(found) == ["task_type"]
    assert "not in this version, which runs data_scoring" in found["task_type"].wrong
    assert task_problems(task_type="data_scorng")["task_type"].fix == "did you mean data_scoring?"


def test_script_types() -> None:
    assert not task_problems(preprocess__script_type="repo_xml")
    found = task_problems(preprocess__script_type="repo_xml", preprocess__enabled=True)
    assert "'repo_xml' is not in this version" in found["preprocess.script_type"].wrong
    assert found["preprocess.script_type"].unready
    found = task_problems(preprocess__script_type="univrsal")
    assert found["preprocess.script_type"].fix == "did you mean universal?"


def test_a_preprocessor_of_a_later_version_is_checked_but_never_run(project: Project) -> None:
    later: Data = {"preprocess__script_type": "repo_xml", "preprocess__enabled": True}
    path = project.task(**later)
    result = project.check(path)
    assert result.exit_code == 0
    assert "warning: configs/tasks/demo.yaml:preprocess.script_type: 'repo_xml' is not in" in (
        result.output
    )
    assert project.check("--strict", path).exit_code == 1
    with pytest.raises(SetupError, match="'repo_xml' is not in this version"):
        load_task(path, project.root)
    catalog = load_catalog(project.root)
    assert not catalog.tasks and catalog.broken[0].key == "demo"
    found = project.problems(**later, data__output_folder="./in")
    assert {"preprocess.script_type", "data.output_folder"} == set(found)
    assert "error: " in project.check(path).output


def test_field_mapping() -> None:
    mapping = {
        "text": {"type": "combine", "fields": ["a", "b"]},
        "lang": {"type": "constant", "value": None},
        "x": "y",
    }
    task, problems = parse_task(task_data(preprocess__field_mapping=mapping), "t")
    assert task and not problems
    assert task.preprocess.field_mapping["x"] == "y"
    assert task.preprocess.field_mapping["text"].model_dump()["separator"] == " "
    assert task.model_dump(mode="json")["preprocess"]["field_mapping"]["x"] == "y"


def test_field_mapping_mistakes_name_the_users_field() -> None:
    mapping = {
        "text": {"type": "combine", "fields": [1], "seperator": "-"},
        "a": {"type": "combin"},
        "b": {"fields": ["x"]},
        "c": 3,
        "d": {"type": "constant"},
    }
    found = task_problems(preprocess__field_mapping=mapping)
    prefix = "preprocess.field_mapping"
    assert set(found) == {
        f"{prefix}.text.fields[0]",
        f"{prefix}.text.seperator",
        f"{prefix}.a",
        f"{prefix}.b",
        f"{prefix}.c",
        f"{prefix}.d.value",
    }
    assert found[f"{prefix}.text.seperator"].fix == "did you mean separator?"
    assert "type: combine" in found[f"{prefix}.a"].expected


# Tasks: old fields

OLD_WITHOUT_EFFECT = [
    ("data.stat_folder", "stats/{timestamp}"),
    ("preprocess.num_proc", 32),
    ("preprocess.seed", 42),
    ("preprocess.batch_size", 1000),
    ("preprocess.languages", ["Go"]),
    ("preprocess.group_by_language", True),
    ("environment.api_provider", "x"),
    ("concurrency.chunk_size", 100),
    ("concurrency.parquet_save_interval", -1),
    ("options.main_resume", False),
    ("options.resume", False),
    ("options.preprocess_resume", False),
    ("logging.level", "INFO"),
    ("logging.batch_size", 100),
    ("logging.progress_report_interval", 10),
    ("logging.log_dir", "logs"),
]


@pytest.mark.parametrize(("field", "value"), OLD_WITHOUT_EFFECT)
def test_old_field_without_effect_is_one_warning(field: str, value: Any) -> None:
    task, problems = parse_task(task_data(**{field: value}), "t")
    assert task
    assert [(problem.field, problem.severity) for problem in problems] == [(field, "warning")]
    assert problems[0].fix


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("options.main_resume", True),
        ("options.resume", True),
        ("options.preprocess_resume", True),
        ("options.delete_existing", False),
        ("distributed.num_runs", 1),
        ("distributed.world_size", 4),
        ("distributed.enabled", True),
    ],
)
def test_harmless_old_values_are_silent(field: str, value: Any) -> None:
    assert not task_problems(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"), [("options.delete_existing", True), ("distributed.num_runs", 2)]
)
def test_old_fields_that_contradict_partitions_are_refused(field: str, value: Any) -> None:
    assert task_problems(**{field: value})[field].severity == "error"


def test_a_misspelt_old_field_is_unknown() -> None:
    found = task_problems(logging__levl="INFO", data__stat_foldr="x")
    assert found["logging.levl"].fix == "did you mean level?"
    assert found["data.stat_foldr"].fix == "did you mean stat_folder?"


@pytest.mark.parametrize("name", ["timestamp", "run_index"])
def test_placeholders_that_move_the_output_are_refused(name: str) -> None:
    problem = task_problems(data__output_folder=f"./out/{{{name}}}")["data.output_folder"]
    assert problem.severity == "error"
    assert "fixed folder" in problem.fix


def test_unknown_placeholder_in_a_folder() -> None:
    assert "{date}" in task_problems(data__input_folder="./in/{date}")["data.input_folder"].wrong


def test_relative_paths_of_old_files_are_explained() -> None:
    moved = {"data__input_folder": "data/in", "data__output_folder": "/o/{task_name}"}
    assert not task_problems(**moved)
    found = task_problems(**moved, data__stat_folder="s")
    problem = found["data.input_folder"]
    assert problem.severity == "warning"
    assert "data/in below the project root" in problem.wrong
    assert "data.output_folder" not in found


# Tasks: places


def test_folders(project: Project) -> None:
    spec = project.load(data__input_folder="in", data__output_folder="./out/../o/{task_name}/")
    assert spec.input_folder == f"{project.root}/in"
    assert spec.preprocessed_folder == f"{project.root}/in_preprocessed"
    assert spec.output_folder == f"{project.root}/o/demo"
    assert spec.journal_folder == f"{project.root}/o/demo/.modelcall"
    assert spec.file_name == "configs/tasks/demo.yaml"
    assert (spec.model_file, spec.prompt_file) == (
        "configs/models/m.yaml",
        "configs/prompts/p.yaml",
    )


def test_preprocess_folders_count_when_enabled(project: Project) -> None:
    own: Data = {"preprocess__input_folder": "./raw"}
    assert project.load(**own).input_folder == f"{project.root}/in"
    spec = project.load(**own, preprocess__enabled=True)
    assert spec.input_folder == f"{project.root}/raw"
    assert spec.preprocessed_folder == f"{project.root}/raw_preprocessed"


def test_object_stores(project: Project) -> None:
    assert project.load(data__input_folder="s3://bucket/in").input_folder == "s3://bucket/in"
    assert "tos://" in task_problems(data__input_folder="tos://b/in")["data.input_folder"].wrong
    for name in ("output_folder", "journal_folder"):
        found = task_problems(**{f"data.{name}": "s3://b/out"})[f"data.{name}"]
        assert found.wrong == "object stores for outputs are not in this version"
    found = project.problems(data__input_folder="s3://b/in", preprocess__enabled=True)
    assert found["preprocess.output_folder"].fix == "add a local folder"


def test_variables_in_folders(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLACE", "s3://bucket")
    assert project.load(data__input_folder="${PLACE}/in").input_folder == "s3://bucket/in"
    found = project.problems(data__output_folder="${PLACE}/o", data__input_folder="${GONE}/i")
    assert found["data.output_folder"].expected == "a local folder"
    assert found["data.input_folder"].wrong == "variable GONE is not set"


@pytest.mark.parametrize("folder", ["./in", "./in/scores"])
def test_outputs_must_not_become_inputs(project: Project, folder: str) -> None:
    assert (
        "would become inputs"
        in project.problems(data__output_folder=folder)["data.output_folder"].wrong
    )


# Models


def test_both_generations_are_one_model() -> None:
    params = {"temperature": 0.5, "max_tokens": -1, "extra_body": {"top_k": 3}}
    second, problems = parse_model(
        with_fields(MODEL, {f"chat_config.{name}": value for name, value in params.items()}), "m"
    )
    assert second and not problems
    assert second.request_params() == {"model": "m", "temperature": 0.5, "top_k": 3}
    first, problems = parse_model(with_fields(OLD_MODEL, {"completions_params": params}), "m")
    assert first and not problems
    assert first.request_params() == {"model": "gpt-4o", "temperature": 0.5, "top_k": 3}


@pytest.mark.parametrize(
    ("provider", "variable", "name"),
    [
        ("openai", "OPENAI_API_KEY", "api.openai.com/v1"),
        ("deepseek", "DEEPSEEK_API_KEY", "api.deepseek.com/v1"),
        ("anthropic", "ANTHROPIC_API_KEY", "api.anthropic.com/v1"),
        ("mine", "API_KEY", "host:1/v1"),
    ],
)
def test_first_generation_endpoints(provider: str, variable: str, name: str) -> None:
    model, _ = parse_model(with_fields(OLD_MODEL, {"provider": provider}), "m")
    assert model
    env = Environment({variable: "k", "BASE_URL": "http://host:1/v1/"})
    (endpoint,) = model.endpoints(env, "m")
    assert (endpoint.api_key, endpoint.name) == ("k", name)
    with pytest.raises(SetupError, match=f"m.yaml:api_key: variable {variable} is not set"):
        model.endpoints(Environment({"BASE_URL": "http://h"}), "m.yaml")


def model_with(**changes: Any) -> ModelConfig:
    model, problems = parse_model(with_fields(MODEL, changes), "m.yaml")
    assert model and not problems, problems
    return model


def test_request_params_hold_no_transport_field() -> None:
    chat: Data = {"timeout": 9, "stop": ["a"], "custom": 1}
    model, problems = parse_model(
        with_fields(MODEL, {f"chat_config.{name}": value for name, value in chat.items()}), "m"
    )
    assert model and model.request_params() == {"model": "m", "stop": ["a"], "custom": 1}
    assert {problem.field for problem in problems} == {"chat_config.timeout", "chat_config.custom"}
    assert all(problem.severity == "warning" for problem in problems)


@pytest.mark.parametrize(
    ("chat", "sent"),
    [
        ({}, {}),
        ({"stream": False, "stream_options": {"include_usage": True}}, {}),
        ({"stream": True}, {"stream": True, "stream_options": {"include_usage": True}}),
        ({"stream": True, "stream_options": {}}, {"stream": True}),
        (
            {"stream": True, "stream_options": {"include_usage": False}},
            {"stream": True, "stream_options": {"include_usage": False}},
        ),
    ],
)
def test_streaming(chat: Data, sent: Data) -> None:
    model = model_with(**{f"chat_config.{name}": value for name, value in chat.items()})
    assert model.request_params() == {"model": "m", **sent}
    first, problems = parse_model(with_fields(OLD_MODEL, {"completions_params": chat}), "m")
    assert first and not problems
    assert first.request_params() == {"model": "gpt-4o", **sent}


def test_chat_config_mistakes() -> None:
    found = model_problems(
        **{
            "chat_config.temprature": 1,
            "chat_config.n": 2,
            "chat_config.extra_body": {"messages": []},
            "chat_config.api_key": "sk-secret",
            "chat_config.top_p": 0,
        }
    )
    assert found["chat_config.temprature"].fix == "did you mean temperature?"
    assert found["chat_config.n"].severity == "error"
    assert found["chat_config.api_key"].fix == "move it to client_config"
    assert found["chat_config.top_p"].expected == "more than 0"
    assert "messages" in found["chat_config.extra_body"].wrong
    assert "secret" not in "".join(map(str, found.values()))


def test_top_k_is_not_a_misspelt_top_p() -> None:
    assert not model_problems(**{"chat_config.top_k": 3})


@pytest.mark.parametrize(
    "key", ["sk-abcdef123", "${KEY:-sk-abcdef123}", "Bearer ${KEY}", "sk-abcdef123${KEY}"]
)
def test_a_literal_key_is_refused_and_never_shown(key: str) -> None:
    problem = model_problems(**{"client_config.api_key": key})["client_config.api_key"]
    assert "${API_KEY}" in problem.expected
    assert "abcdef" not in str(problem)


@pytest.mark.parametrize("key", ["EMPTY", "none", "not-needed", "${KEY}", "${KEY:-EMPTY}"])
def test_key_references_and_placeholders(key: str) -> None:
    assert not model_problems(**{"client_config.api_key": key})


def test_secrets_of_the_wrong_type_or_place_are_not_shown() -> None:
    found = model_problems(**{"client_config": "sk-abcdef", "api_key": 12345})
    assert "abcdef" not in "".join(map(str, found.values()))
    assert "12345" not in "".join(map(str, found.values()))
    url = "https://user:abcdef@host/v1"
    found = model_problems(**{"client_config.base_url": url})
    assert "abcdef" not in str(found["client_config.base_url"])


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "https://", "http://h:x/v1", ""])
def test_base_url_must_be_http(url: str) -> None:
    assert model_problems(**{"client_config.base_url": url})["client_config.base_url"]
    model, _ = parse_model(with_fields(MODEL, {"client_config.base_url": "${U}"}), "m")
    assert model
    with pytest.raises(SetupError, match=r"m:client_config\.base_url"):
        model.endpoints(Environment({"U": url}), "m")


def test_base_url_without_the_route() -> None:
    found = model_problems(**{"client_config.base_url": "http://h/v1/chat/completions"})
    assert "drop /chat/completions" in found["client_config.base_url"].fix


def test_endpoint_hides_credentials_and_has_limits() -> None:
    changes = {"client_config.base_url": "${U}", "client_config.api_key": "${K}"}
    model, _ = parse_model(with_fields(MODEL, changes), "m")
    assert model
    env = Environment({"U": "https://me:pw@host:9/v1/?a=b", "K": "none"})
    assert "pw" not in repr(model.endpoints(env, "m"))
    env = Environment({"U": "https://host:9/v1/?a=b", "K": "topsecret"})
    (endpoint,) = model.endpoints(env, "m")
    assert endpoint.name == "host:9/v1"
    assert "topsecret" not in repr(endpoint)
    assert (endpoint.timeout_s, endpoint.max_retries) == (600, 5)
    with pytest.raises(SetupError) as caught:
        model.endpoints(Environment({}), "m")
    assert [problem.field for problem in caught.value.problems] == list(changes)


def test_endpoint_of_the_smallest_model() -> None:
    (endpoint,) = model_with().endpoints(Environment({}), "m")
    assert endpoint == Endpoint(
        base_url="http://localhost:8000/v1",
        api_key="EMPTY",
        name="localhost:8000/v1",
        timeout_s=600,
        max_retries=5,
        transport="direct",
        headers={},
        proxy=None,
        ca_file=None,
        max_in_flight=None,
        requests_per_minute=None,
        tokens_per_minute=None,
    )


def test_endpoint_with_everything(tmp_path: Path) -> None:
    write(tmp_path / "ca.pem", CERTIFICATE)
    model = model_with(
        client_config__transport="sdk",
        client_config__headers={"X-Team": "t-${TEAM}", "X-API-Key": "${K}"},
        client_config__proxy="http://${PROXY}",
        client_config__ca_file="ca.pem",
        client_config__max_in_flight=3,
        client_config__requests_per_minute=-1,
        client_config__tokens_per_minute=500,
    )
    env = Environment({"TEAM": "rating", "K": "topsecret", "PROXY": "me:pw@proxy:3128"})
    (endpoint,) = model.endpoints(env, "m", root=tmp_path)
    assert endpoint.transport == "sdk"
    assert endpoint.headers == {"X-Team": "t-rating", "X-API-Key": "topsecret"}
    assert endpoint.proxy == "http://me:pw@proxy:3128"
    assert endpoint.ca_file == str(tmp_path / "ca.pem")
    limits = (endpoint.max_in_flight, endpoint.requests_per_minute, endpoint.tokens_per_minute)
    assert limits == (3, None, 500)
    for secret in ("topsecret", "pw"):
        assert secret not in repr(endpoint)


def test_endpoints_inherit_what_they_leave_out() -> None:
    model, problems = parse_model(
        {
            "client_config": {
                "api_key": "${K}",
                "headers": {"X-A": "shared"},
                "max_in_flight": 8,
                "timeout": 7,
                "endpoints": [
                    {"base_url": "http://a:1/v1"},
                    {"base_url": "http://b:1/v1", "api_key": "none", "max_in_flight": -1},
                    {"base_url": "http://a:1/v1/", "api_key": "${L}", "headers": None},
                ],
            },
            "chat_config": {"model": "m"},
        },
        "m",
    )
    assert model and not problems
    assert model.base_url == "http://a:1/v1"
    found = model.endpoints(Environment({"K": "1", "L": "2"}), "m")
    assert [(each.name, each.api_key, each.max_in_flight, each.headers) for each in found] == [
        ("a:1/v1", "1", 8, {"X-A": "shared"}),
        ("b:1/v1", "none", None, {"X-A": "shared"}),
        ("a:1/v1#2", "2", 8, {}),
    ]
    assert {each.timeout_s for each in found} == {7}


CERTIFICATE = """\
-----BEGIN CERTIFICATE-----
MIIBdTCCARugAwIBAgIUGYjPr8esps+FxzRC1/7KWRiE29AwCgYIKoZIzj0EAwIw
DzENMAsGA1UEAwwEdGVzdDAgFw0yNjExMjEwNDI3MDFaGA8yMTI2MTAyODA0Mjcw
MVowDzENMAsGA1UEAwwEdGVzdDBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABC9z
aO//wPeki4VGa0tR6V3v//NcXDI/CAQKCQrqH8upV2STlcZVoI0PEMzt5vIINaaz
g3sWIDPqtQObNbTflCijUzBRMB0GA1UdDgQWBBTn7y8hj79jCTS4Itn/cCvomUoJ
eDAfBgNVHSMEGDAWgBTn7y8hj79jCTS4Itn/cCvomUoJeDAPBgNVHRMBAf8EBTAD
AQH/MAoGCCqGSM49BAMCA0gAMEUCICkwc14oIIleJSiovWqkskZOtsibeWcYgDaU
29J/PSUtAiEA/ZVVQZs6LtTPLPw5jDvFW/DUDIDxaVxp7LazrW8re5s=
-----END CERTIFICATE-----
"""
REFERENCE = "expected a reference such as ${API_KEY}"
SET_IT = "set the variable in .env or in the process environment"
CLIENT_MISTAKES: list[tuple[Data, str]] = [
    (
        {"transport": "sdkk"},
        "transport: unknown value; expected direct, sdk; have 'sdkk'; did you mean sdk?",
    ),
    ({"headers": ["a"]}, "headers: wrong type; expected a mapping; have a list"),
    (
        {"headers": {"X-Version": 1}},
        "headers.X-Version: wrong type; expected text; have 1; write it in quotes",
    ),
    (
        {"headers": {"a b": "c"}},
        "headers: 'a b' is no name of a header; expected letters, digits, - and _; have a mapping",
    ),
    (
        {"headers": {"Content-Type": "text/plain"}},
        "headers: Content-Type cannot be set; have a mapping; remove it",
    ),
    (
        {"headers": {"X-A": "1", "x-a": "2"}},
        "headers: x-a is there twice; have a mapping; remove one",
    ),
    (
        {"headers": {"X-A": "1\n2"}},
        "headers: a character that no header can carry, such as a line break; have a mapping",
    ),
    *(
        (
            {"headers": {name: "sk-abcdef"}},
            f"headers: a secret in a file: {name}; {REFERENCE} or Bearer ${{API_KEY}}; "
            f"have a mapping; {SET_IT}",
        )
        for name in ("Authorization", "api-key", "X-API-Key", "x-auth-token", "Cookie")
    ),
    (
        {"proxy": "socks5://host:1"},
        "proxy: not the URL of an HTTP proxy; expected http(s)://host:port; "
        "have 'socks5://host:1'",
    ),
    (
        {"proxy": "http://me:abcdef@host:1"},
        "proxy: a password in a file; have *** (not shown); "
        "write the URL as ${NAME} and set NAME in .env",
    ),
    ({"max_in_flight": 0}, "max_in_flight: out of range; expected more than 0; have 0"),
    (
        {"requests_per_minute": "60"},
        "requests_per_minute: wrong type; expected an integer; have '60'; "
        "write 60 without quotes",
    ),
    (
        {"tokens_per_minute": 1.5},
        "tokens_per_minute: wrong type; expected an integer; have 1.5",
    ),
    ({"ca_file": ""}, "ca_file: empty; expected text"),
    ({"endpoints": [{"base_url": "x"}]}, "endpoints[0].base_url: not a URL; expected "
     "http(s)://host[:port]/path; have 'x'"),
    (
        {"endpoints": [{"timeout": 3}]},
        "endpoints[0].timeout: unknown key; expected one of base_url, api_key, headers, proxy, "
        "ca_file, max_in_flight, requests_per_minute, tokens_per_minute",
    ),
    (
        {"base_url": None, "endpoints": [{}]},
        "endpoints[0].base_url: missing; add `base_url:` "
        "(http(s) URL without `/chat/completions`; may hold `${NAME}`. "
        "Else `endpoints` have it.)",
    ),
    (
        {"base_url": None},
        "base_url: missing; add `base_url:` "
        "(http(s) URL without `/chat/completions`; may hold `${NAME}`. "
        "Else `endpoints` have it.)",
    ),
    (
        {"endpoints": [{}, {"max_in_flight": 3}]},
        "endpoints[1]: the endpoint of client_config.endpoints[0] again, with the same key; "
        "remove one of them, or give it another key",
    ),
    ({"endpoints": []}, "endpoints: empty; expected one endpoint or more; have a list"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), CLIENT_MISTAKES)
def test_client_config_mistakes(changes: Data, message: str) -> None:
    fields = {f"client_config.{name}": value for name, value in changes.items()}
    [problem] = parse_model(with_fields(MODEL, fields), "m.yaml")[1]
    assert str(problem) == f"m.yaml:client_config.{message}"


@pytest.mark.parametrize("value", ["${K}", "Bearer ${K}", "Basic ${K}", "${K:-none}", "EMPTY"])
def test_secret_headers_are_references(value: str) -> None:
    problems = model_problems(**{"client_config.headers": {"Authorization": value}})
    assert bool(problems) == (value == "EMPTY")


RESOLVED_MISTAKES: list[tuple[Data, str]] = [
    (
        {"api_key": "${LINES}"},
        "api_key: a character that no header can carry, such as a line break; have *** (not shown)",
    ),
    (
        {"headers": {"X-Key": "${LINES}"}},
        "headers.X-Key: a character that no header can carry, such as a line break; "
        "have '${LINES}'",
    ),
    (
        {"headers": {"X-Name": "${ACCENT}"}},
        "headers.X-Name: a character that no header can carry, such as a line break; "
        "have '${ACCENT}'",
    ),
    (
        {"proxy": "${LINES}"},
        "proxy: not the URL of an HTTP proxy; expected http(s)://host:port; have '${LINES}'",
    ),
    ({"ca_file": "gone.pem"}, "ca_file: no such file; have 'gone.pem'"),
    ({"ca_file": "."}, "ca_file: Is a directory; have '.'"),
    ({"ca_file": "no.pem"}, "ca_file: no certificates in PEM form; have 'no.pem'"),
    (
        {"base_url": "${USER_URL}", "api_key": "${KEY}"},
        "base_url: the URL names a user, and there is an api_key too: a request takes one of them",
    ),
    *(
        (
            {name: value},
            f"{place}: variable GONE is not set; the task cannot run until ${{GONE}} has a value "
            "in .env, in the task's env file or in the process",
        )
        for name, value, place in (
            ("headers", {"X-Key": "${GONE}"}, "headers.X-Key"),
            ("proxy", "${GONE}", "proxy"),
            ("ca_file", "${GONE}", "ca_file"),
        )
    ),
]


@pytest.mark.parametrize(("changes", "message"), RESOLVED_MISTAKES)
def test_mistakes_in_an_environment(tmp_path: Path, changes: Data, message: str) -> None:
    write(tmp_path / "no.pem", "no certificate")
    env = Environment(
        {
            "LINES": "topsecret\n",
            "ACCENT": "topsecrét",
            "KEY": "topsecret",
            "USER_URL": "http://me:topsecret@h/v1",
        }
    )
    model = model_with(**{f"client_config.{name}": value for name, value in changes.items()})
    with pytest.raises(SetupError) as caught:
        model.endpoints(env, "m.yaml", root=tmp_path)
    assert str(caught.value) == f"m.yaml:client_config.{message}"


def test_the_problems_of_all_endpoints_are_told_once() -> None:
    model = model_with(
        client_config__api_key="${K}",
        client_config__endpoints=[
            {"base_url": "${A}"},
            {"base_url": "http://b/v1"},
            {"base_url": "http://c/v1", "api_key": "${C}"},
        ],
    )
    with pytest.raises(SetupError) as caught:
        model.endpoints(Environment({}), "m")
    assert [problem.field for problem in caught.value.problems] == [
        "client_config.endpoints[0].base_url",
        "client_config.api_key",
        "client_config.endpoints[2].api_key",
    ]
    assert all(problem.unready for problem in caught.value.problems)


def test_streaming_does_not_change_the_version_of_scores(project: Project) -> None:
    def version() -> str:
        return ScoreStage.of(project.load()).version()

    plain = version()
    for chat in ({"stream": True}, {"user": "me"}):
        fields = {f"chat_config.{name}": value for name, value in chat.items()}
        write(project.root / "configs/models/m.yaml", with_fields(MODEL, fields))
        assert version() == plain
    write(project.root / "configs/models/m.yaml", with_fields(MODEL, {"chat_config.seed": 1}))
    assert version() != plain


def test_task_limits_meet_the_models(project: Project) -> None:
    changes: Data = {"environment__timeout": 30, "retry__max_retries": 9}
    endpoint = project.load(**changes).endpoints()[0]
    assert (endpoint.timeout_s, endpoint.max_retries) == (30, 9)
    write(project.root / "configs/models/m.yaml", with_fields(MODEL, {"client_config.timeout": 60}))
    assert project.load(**changes).endpoints()[0].timeout_s == 60


def test_neither_generation() -> None:
    [problem] = parse_model({"prices": {}}, "m")[1]
    assert "client_config and chat_config" in problem.expected


def test_load_model(project: Project) -> None:
    path = project.root / "configs/models/m.yaml"
    assert load_model(path, project.root).chat_config.model == "m"
    write(path, with_fields(MODEL, {"chat_config.n": 2}))
    with pytest.raises(SetupError, match=r"configs/models/m.yaml:chat_config\.n"):
        load_model(path, project.root)


def test_prices_and_revision() -> None:
    model, problems = parse_model(
        with_fields(OLD_MODEL, {"prices.usd_per_million_input_tokens": 1, "revision": "r2"}), "m"
    )
    assert model and not problems
    assert model.prices.usd_per_million_input_tokens == 1
    assert model.prices.usd_per_million_output_tokens is None
    assert (model.revision, model.supports_json_schema) == ("r2", False)


# Prompts


@pytest.mark.parametrize(
    "bad", ["{a.b}", "{a[0]}", "{}", "{0}", "{a!r}", "{a:>3}", "{a:{b}}", '{"score": 1}', "{a b}"]
)
def test_placeholders_are_plain_names(bad: str) -> None:
    found = prompt_problems(**{"prompt_template.prompt_text": f"Rate {{text}} {bad}"})
    problem = found["prompt_template.prompt_text"]
    assert bad in problem.wrong
    assert "{{" in problem.fix


def test_unmatched_brace() -> None:
    found = prompt_problems(**{"prompt_template.prompt_text": "Rate {text} }"})
    assert "braces do not match" in found["prompt_template.prompt_text"].wrong


def test_placeholders() -> None:
    text = "{text} {{literal}} {内容} {my-column} {text}"
    prompt, _ = parse_prompt(with_fields(PROMPT, {"prompt_template.prompt_text": text}), "p.yaml")
    assert prompt and prompt.placeholders == {"text", "内容", "my-column"}


def test_field_types() -> None:
    defaults = {"n": 3, "t": "", "b": True, "l": [], "d": {}, "ln": [1]}
    output = {
        "require_json": True,
        "json_keys": ["score", "grade", "any", *defaults],
        "json_key_must_exists": ["score"],
        "json_default_values": defaults,
        "json_schema": {
            "properties": {"grade": {"type": "integer", "minimum": 1, "maximum": 5}},
            "required": ["grade"],
        },
    }
    prompt, problems = parse_prompt(with_fields(PROMPT, {"output_config": output}), "p.yaml")
    assert prompt
    assert prompt.fields == {
        "score": {"type": "number"},
        "grade": {"type": "integer", "minimum": 1, "maximum": 5},
        "any": {},
        "n": {"type": "number"},
        "t": {"type": "string"},
        "b": {"type": "boolean"},
        "l": {"type": "array", "items": {"type": "string"}},
        "d": {"type": "object"},
        "ln": {"type": "array"},
    }
    assert [problem.field for problem in problems] == ["output_config.json_keys[2]"]
    assert prompt.optional_defaults == {"t": "", "b": True, "l": [], "d": {}, "ln": [1]}
    schema = prompt.answer_schema()
    assert schema["required"] == ["score", "grade"]
    assert schema["properties"] == prompt.fields


def test_a_default_never_fills_a_required_key() -> None:
    output = {"json_key_must_exists": ["t"], "json_default_values": {"t": "x"}, "json_keys": ["t"]}
    data = with_fields(PROMPT, {"output_config": {"require_json": True, **output}})
    prompt, _ = parse_prompt(data, "p.yaml")
    assert prompt and prompt.optional_defaults == {}


def test_keys_default_to_the_schemas() -> None:
    schema = {"properties": {"b": {"type": "string"}, "a": {"type": "string"}}, "required": ["a"]}
    data = with_fields(PROMPT, {"output_config": {"require_json": True, "json_schema": schema}})
    prompt, problems = parse_prompt(data, "p.yaml")
    assert prompt and not problems
    assert list(prompt.fields) == ["b", "a"]
    assert prompt.output_config.required == ["a"]


@pytest.mark.parametrize(
    ("output", "field", "text"),
    [
        ("{json_keys: [a]}", "require_json", "write require_json: true"),
        ("{require_json: true}", "require_json", "no key is declared"),
        ("{json_keys: [score], json_key_must_exists: [scor]}", "json_key_must_exists[0]", "score?"),
        ("{json_keys: [a], json_default_values: {b: 1}}", "json_default_values.b", "not a key"),
        ("{json_keys: [api_x]}", "json_keys", "api_"),
        ("{json_keys: [a, a]}", "json_keys[1]", "twice"),
        ("{json_keys: ['']}", "json_keys[0]", "empty"),
        ("{json_keys: [a, 3]}", "json_keys[1]", "expected text"),
    ],
)
def test_output_config_mistakes(output: str, field: str, text: str) -> None:
    problem = prompt_problems(**{"output_config": yaml.safe_load(output)})[f"output_config.{field}"]
    assert text in str(problem)
    assert problem.severity == "error"


@pytest.mark.parametrize(
    ("schema", "field", "text"),
    [
        ("{properties: {b: {}}}", ".properties.b", "b is not a key"),
        ("{required: [b]}", ".required[0]", "b is not a key"),
        ("{properties: {a: {type: intger}}}", ".properties.a.type", "did you mean integer?"),
        ("{properties: {a: {minium: 1}}}", ".properties.a.minium", "did you mean minimum?"),
        ("{properties: {a: {items: {typ: 1}}}}", ".properties.a.items.typ", "did you mean type?"),
        ("{properties: {a: {anyOf: [{typ: 1}]}}}", ".properties.a.anyOf[0].typ", "type?"),
        ("{properties: {a: {minimum: '1'}}}", ".properties.a.minimum", "number"),
        ("{properties: {a: {pattern: '('}}}", ".properties.a.pattern", "regex"),
        ("{properties: {a: {enum: [2024-01-01]}}}", "", "write dates in quotes"),
        ("{properties: {a: 1}}", ".properties.a", "a JSON Schema"),
        ("{type: array}", ".type", "an answer is an object"),
    ],
)
def test_json_schema_mistakes(schema: str, field: str, text: str) -> None:
    output = {"require_json": True, "json_keys": ["a"], "json_schema": yaml.safe_load(schema)}
    problem = prompt_problems(output_config=output)[f"output_config.json_schema{field}"]
    assert text in str(problem)
    assert problem.severity == "error"


def test_a_prompt_without_json() -> None:
    prompt, problems = parse_prompt({"prompt_template": {"prompt_text": "{text}"}}, "p.yaml")
    assert prompt and not problems and prompt.fields == {}


def test_prompt_version_follows_the_content(tmp_path: Path) -> None:
    def version(text: str) -> str:
        prompt, _ = parse_prompt(load_yaml(write(tmp_path / "p.yaml", text)), "x/rate_v0.1.yaml")
        assert prompt
        return prompt.version

    first = version("prompt_template: {prompt_text: 'Rate {text}'}\n")
    assert re.fullmatch(r"rate_v0\.1@[0-9a-f]{8}", first)
    assert version("# c\nprompt_template:\n  prompt_text: Rate {text}\n") == first
    assert version("prompt_template: {prompt_text: 'Rate this {text}'}\n") != first


# Catalog


def test_root(tmp_path: Path) -> None:
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    write(tmp_path / "workspace.yaml", "x: 1")
    assert find_root(inner) == tmp_path
    (tmp_path / "a" / "configs").mkdir()
    assert find_root(inner) == tmp_path / "a"


@given(st.text(max_size=150))
def test_legal_key_is_legal(name: str) -> None:
    assert re.fullmatch(r"[A-Za-z0-9_]{1,100}", legal_key(name))


def test_legal_keys() -> None:
    assert legal_key("en-corpus v0.1") == "en_corpus_v0_1"
    assert re.fullmatch(r"___[0-9a-f]{6}", legal_key("评分"))
    assert legal_key("评分") != legal_key("打分")
    assert legal_key("a" * 101) != legal_key("a" * 102)


def test_the_name_is_shown_as_written(project: Project) -> None:
    spec = project.load(task_name="英文-v1", data__output_folder="./o/{task_name}")
    assert spec.name == "英文-v1" and spec.key.startswith("___v1_")
    assert spec.output_folder.endswith("/o/英文-v1")


def test_all_three_files_are_told_at_once(project: Project) -> None:
    write(project.root / "configs/models/m.yaml", with_fields(MODEL, {"chat_config.model": 3}))
    write(project.root / "configs/prompts/p.yaml", "a: [")
    path = project.task(max_failure_rate=2)
    with pytest.raises(SetupError) as caught:
        load_task(path, project.root)
    assert [(problem.file, problem.field) for problem in caught.value.problems] == [
        ("configs/tasks/demo.yaml", "max_failure_rate"),
        ("configs/models/m.yaml", "chat_config.model"),
        ("configs/prompts/p.yaml", "1:5"),
    ]


def test_missing_model_file_names_its_neighbour(project: Project) -> None:
    found = project.problems(model__config_path="configs/models/mm.yaml")
    assert found["model.config_path"].fix == "did you mean configs/models/m.yaml?"


def test_one_broken_file_leaves_the_others(project: Project) -> None:
    project.task("a.yaml", task_name="a")
    write(project.root / "configs/tasks/b.yml", "task_name: b\nx: [")
    write(project.root / "configs/tasks/sub/c.yaml", "task_name: a\n")
    write(project.root / "configs/tasks/templates/t.yaml", "nonsense")
    catalog = load_catalog(project.root)
    assert [task.key for task in catalog.tasks] == ["a"]
    assert [broken.file_name for broken in catalog.broken] == [
        "configs/tasks/b.yml",
        "configs/tasks/sub/c.yaml",
    ]
    keys = [broken.key for broken in catalog.broken]
    assert keys[0] == "b" and re.fullmatch(r"a_[0-9a-f]{6}", keys[1])


def test_duplicate_names_break_the_later_file(project: Project) -> None:
    project.task("b.yaml", task_name="x-1", data__output_folder="./o1")
    project.task("a.yaml", task_name="x_1", data__output_folder="./o2")
    catalog = load_catalog(project.root)
    assert [task.file_name for task in catalog.tasks] == ["configs/tasks/a.yaml"]
    [broken] = catalog.broken
    assert broken.file_name == "configs/tasks/b.yaml" and broken.key != "x_1"
    assert "configs/tasks/a.yaml" in broken.problems[0].wrong


def test_two_tasks_may_not_write_to_one_folder(project: Project) -> None:
    project.task("a.yaml", task_name="a")
    project.task("b.yaml", task_name="b", data__output_folder="out/")
    [broken] = load_catalog(project.root).broken
    assert (broken.key, broken.problems[0].field) == ("b", "data.output_folder")
    assert "configs/tasks/a.yaml" in broken.problems[0].wrong


# modelcall check


def test_check_passes(project: Project) -> None:
    project.task()
    result = project.check()
    assert result.exit_code == 0
    assert result.output == "3 files checked: 0 errors, 0 warnings\n"


def test_check_without_arguments_takes_the_project(project: Project) -> None:
    project.task(nonsense=1)
    result = CliRunner().invoke(check, [])
    assert result.exit_code == 1
    assert "error: configs/tasks/demo.yaml:nonsense: unknown key" in result.output
    assert result.output.splitlines()[-1] == "3 files checked: 1 errors, 0 warnings"


def test_check_tells_each_problem_once(project: Project) -> None:
    write(project.root / "configs/models/m.yaml", with_fields(MODEL, {"chat_config.n": 2}))
    project.task("a.yaml", task_name="a", data__output_folder="./a")
    project.task("b.yaml", task_name="b", data__output_folder="./b")
    result = project.check()
    assert result.output.count("chat_config.n") == 1
    assert result.exit_code == 1


def test_check_strict(project: Project) -> None:
    path = project.task(logging__level="INFO")
    assert project.check(path).exit_code == 0
    assert "warning: configs/tasks/demo.yaml:logging.level" in project.check(path).output
    assert project.check("--strict", path).exit_code == 1


def test_check_finds_what_is_not_ready(project: Project) -> None:
    write(
        project.root / "configs/models/m.yaml",
        with_fields(MODEL, {"client_config.api_key": "${K}"}),
    )
    result = project.check(project.task(data__input_folder="./later"))
    assert (
        "warning: configs/models/m.yaml:client_config.api_key: variable K is not set; "
        "the task cannot run until ${K} has a value" in result.output
    )
    assert "warning: configs/tasks/demo.yaml:data.input_folder: no such folder yet" in result.output
    assert result.exit_code == 0


def test_check_refuses_a_variable_that_holds_no_url(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("U", "localhost:8000")
    write(
        project.root / "configs/models/m.yaml",
        with_fields(MODEL, {"client_config.base_url": "${U}"}),
    )
    result = project.check(project.task())
    assert "error: configs/models/m.yaml:client_config.base_url: not a URL" in result.output
    assert result.exit_code == 1


def test_check_reads_templates_but_they_are_no_tasks(project: Project) -> None:
    project.task("templates/t.yaml", task_name="demo", bogus=1)
    project.task()
    assert "configs/tasks/templates/t.yaml:bogus" in project.check().output
    assert len(load_catalog(project.root).tasks) == 1


def test_check_tells_clashes_between_tasks(project: Project) -> None:
    project.task("a.yaml")
    result = project.check(project.task("b.yaml"))
    assert "demo is the name of the task in configs/tasks/a.yaml" in result.output


def test_check_tells_files_apart_by_content(project: Project) -> None:
    model = write(project.root / "x/model.yaml", with_fields(MODEL, {"chat_config.n": 2}))
    prompt = write(project.root / "x/prompt.yaml", {"prompt_template": {}})
    output = project.check(model, prompt).output
    assert "x/model.yaml:chat_config.n" in output
    assert "x/prompt.yaml:prompt_template.prompt_text: missing" in output


def test_check_refuses_paths_that_hold_nothing(project: Project) -> None:
    (project.root / "empty").mkdir()
    result = project.check("gone.yaml", "empty")
    assert "error: gone.yaml: no such file or folder" in result.output
    assert "error: empty: no config file in this folder" in result.output
    assert result.exit_code == 1


def test_the_reference_page_is_up_to_date() -> None:
    page = Path(__file__).parent.parent / "docs" / "config.md"
    assert page.read_text("utf-8") == reference()
