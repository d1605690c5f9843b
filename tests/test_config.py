"""Config files: what is accepted, and what is said about each mistake."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from config_files import (
    MODEL,
    MODEL_PATH,
    PROMPT,
    Configs,
    Data,
    Messages,
    task_data,
    told,
    with_fields,
    write,
)
from config_reference import reference
from hypothesis import given
from hypothesis import strategies as st
from project import Project

from modelcall_assets.config import datasets
from modelcall_assets.config.catalog import (
    find_root,
    legal_key,
    load_catalog,
    load_model,
    load_task,
    parse_task,
)
from modelcall_assets.config.distillation import (
    GENERATE,
    OLD_STEPS,
    DistillationTask,
    as_written,
    parse_distillation,
)
from modelcall_assets.config.endpoint import Endpoint, Resolver
from modelcall_assets.config.files import Environment, MissingVariable, load_yaml, read_env_file
from modelcall_assets.config.model import ModelConfig, parse_model
from modelcall_assets.config.prompt import parse_prompt
from modelcall_assets.config.spec import TaskSpec
from modelcall_assets.errors import Problem, SetupError
from modelcall_assets.stages.asking import AskingStage
from modelcall_assets.stages.task import Task

DEMO = "configs/tasks/demo.yaml"
OLD_MODEL: Data = {"provider": "openai", "model_name": "gpt-4o", "completions_params": {}}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Configs:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    return Configs(tmp_path)


def model_problems(base: Data = MODEL, **changes: Any) -> dict[str, Problem]:
    found = parse_model(with_fields(base, changes), "m.yaml")[1]
    return {problem.field: problem for problem in found}


# YAML files


NO_YAML = {
    "a key twice": "a: 1\nb: 2\na: 3\n",
    "a key twice, once in quotes": "x:\n  a: 1\n  'a': 2\n",
    "cut off": "a: [1\n",
    "a list": "- a\n",
    "nothing": "",
    "a comment": "# only a comment\n",
    "an alias in itself": "a: &a {b: *a}\n",
    "an alias in itself, deeper": "a: &a [[*a]]\n",
    "a number for a key": "a:\n  1: x\n",
    "a truth for a key": "no: x\n",
    "a list for a key": "? [a]\n: x\n",
    "a tag of Python": "a: !!python/object:os.system x\n",
    "a tag of times": "a: !!timestamp x\n",
    "a tag of sets": "a: !!set {x}\n",
    "a long number": f"a: {'9' * 5000}\n",
    "a long number to the base of 60": f"a: 1{':59' * 2000}\n",
    "a control character": "a: \x01\n",
    "a null": "a: x\0y\n",
    "a tab": "a:\n\tb: 1\n",
    "deep brackets": "[" * 5000,
    "brackets that are closed": f"a: {'[' * 150}{']' * 150}\n",
    "deep lists": "- " * 5000,
    "much text": "a: x\n" * (1 << 20),
    "many values": f"a: [{'x,' * 110_000}]\n",
}


@pytest.mark.slow
def test_what_is_no_yaml_has_its_place(tmp_path: Path, messages: Messages) -> None:
    found = {}
    for name, text in NO_YAML.items():
        with pytest.raises(SetupError) as caught:
            load_yaml(write(tmp_path / "f.yaml", text), "f.yaml")
        found[name] = str(caught.value)
    messages(found)


def bomb(level: str) -> str:
    """Thirty lines, each with the one before it several times."""
    steps = (f"a{n + 1}: &a{n + 1} {level.format(n=n)}\n" for n in range(30))
    return "a0: &a0 {x: 1, y: 2}\n" + "".join(steps)


BOMBS = ["[*a{n}, *a{n}]", "{{x: *a{n}, y: *a{n}}}", "{{<<: [*a{n}, *a{n}, *a{n}]}}"]


@pytest.mark.parametrize("level", BOMBS)
@pytest.mark.parametrize(
    "file",
    [
        "configs/tasks/demo.yaml",
        "configs/models/m.yaml",
        "configs/prompts/p.yaml",
        "configs/storage.yaml",
    ],
)
def test_aliases_that_multiply_are_refused_in_every_file(
    project: Configs, level: str, file: str
) -> None:
    project.task()
    write(project.root / file, bomb(level))
    ended = project.check()
    assert ended.code == 1
    assert f"error: {file}:" in ended.out
    assert "more than 100,000 values, with what its aliases stand for" in ended.out


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"a: caf\xe9\n")
    with pytest.raises(SetupError, match="not UTF-8 at byte 6"):
        load_yaml(tmp_path / "latin.yaml")
    with pytest.raises(SetupError, match="cannot be read"):
        load_yaml(tmp_path / "absent.yaml")


def test_merged_mappings_are_not_duplicates(tmp_path: Path) -> None:
    text = "base: &b {a: 1}\nx: &x {<<: *b, a: 2}\ny: {<<: *x, a: 3}\n"
    assert load_yaml(write(tmp_path / "f.yaml", text))["y"] == {"a": 3}


def test_aliases_and_a_mark_at_the_beginning_are_read(tmp_path: Path) -> None:
    text = "\ufeffa: &a [1, 2]\nb: {x: *a, y: *a}\nc: !!str 5\n"
    read = load_yaml(write(tmp_path / "f.yaml", text))
    assert read == {"a": [1, 2], "b": {"x": [1, 2], "y": [1, 2]}, "c": "5"}
    assert load_yaml(write(tmp_path / "f.json", '\ufeff{"a": 1}')) == {"a": 1}


def test_json_files_are_read_and_their_mistakes_told(tmp_path: Path) -> None:
    for text in ('{"a": ' + "[" * 9000, '{"a": ' + "[" * 150 + "]" * 150 + "}"):
        with pytest.raises(SetupError, match=r"deep.json: nested deeper than 100 levels"):
            load_yaml(write(tmp_path / "deep.json", text), "deep.json")
    with pytest.raises(SetupError, match=r"n.json: not valid JSON: a number of 5,000 digits"):
        load_yaml(write(tmp_path / "n.json", f'{{"a": {"9" * 5000}}}'), "n.json")
    assert load_yaml(write(tmp_path / "f.json", '{\t"a": 1e5}')) == {"a": 1e5}
    with pytest.raises(SetupError, match=r"bad.json:1:2: not valid JSON"):
        load_yaml(write(tmp_path / "bad.json", "{a}"), "bad.json")
    with pytest.raises(SetupError, match="duplicate key 'a'"):
        load_yaml(write(tmp_path / "twice.json", '{"a": 1, "a": 2}'))


# Environment


def test_an_env_file_has_comments_exports_and_quotes(tmp_path: Path) -> None:
    text = "# c\nA=1\nexport B='two words'\nC=\"x=y\"\nD=${A}\nE=\nF\n"
    values = read_env_file(write(tmp_path / "e", text))
    assert values == {"A": "1", "B": "two words", "C": "x=y", "D": "${A}", "E": ""}


def test_later_env_files_win_over_the_process_and_that_over_the_project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / ".env", "A=project\nB=project\nC=project\n")
    monkeypatch.setenv("B", "process")
    monkeypatch.setenv("C", "process")
    files = [write(tmp_path / "1.env", "C=first\nD=first\n"), write(tmp_path / "2.env", "D=last\n")]
    env = Environment.for_task(tmp_path, files)
    assert [env[name] for name in "ABCD"] == ["project", "process", "first", "last"]
    assert "process" not in repr(env)


def test_variables_are_expanded_in_braces_only() -> None:
    env = Environment({"A": "1", "EMPTY": ""})
    assert env.expand("$A ${A} $$ ${B:-x y} ${EMPTY:-d} ${EMPTY}|") == "$A 1 $$ x y d |"
    with pytest.raises(MissingVariable) as caught:
        env.expand("${A}${GONE}")
    assert caught.value.name == "GONE"


@given(st.text().filter(lambda text: "${" not in text), st.text())
def test_expand_changes_references_only(text: str, value: str) -> None:
    assert Environment({"A": value}).expand(f"{text}${{A}}") == f"{text}{value}"
    assert Environment({}).expand(text) == text


def endpoint_of(spec: TaskSpec) -> Endpoint:
    """The first one that its scores are asked of."""
    scores = Task(spec).stage("scores")
    assert isinstance(scores, AskingStage)
    return scores.endpoints()[0]


def endpoints_of(
    model: ModelConfig, env: Environment, file: str, root: Path = Path()
) -> tuple[Endpoint, ...]:
    return Resolver(env, file, root).endpoints(model.client_config, model.client_field)


def test_env_files_never_leak(project: Configs) -> None:
    project.model(**{"client_config.api_key": "${K}"})
    before = dict(os.environ)
    for name in ("a", "b"):
        project.write(f"{name}.env", f"K=key-of-{name}\n")
        project.task("./in", f"./out/{name}", name=name, environment__config_path=f"{name}.env")
    tasks = load_catalog(project.root).tasks
    assert [endpoint_of(task).api_key for task in tasks] == ["key-of-a", "key-of-b"]
    assert dict(os.environ) == before


def test_an_env_file_that_is_missing_is_named(project: Configs) -> None:
    found = project.problems(
        environment__config_path=["gone.env"], environment__tos_config_path="x"
    )
    assert found[f"{DEMO}:environment.config_path"].have == "gone.env"
    assert found[f"{DEMO}:environment.tos_config_path"].wrong == "no such file"


# Tasks: shape


def test_the_smallest_task_has_the_defaults() -> None:
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


OLD_WITHOUT_EFFECT: Data = {
    "data.stat_folder": "stats/{timestamp}",
    "preprocess.seed": 42,
    "preprocess.batch_size": 1000,
    "preprocess.languages": ["Go"],
    "preprocess.group_by_language": True,
    "environment.api_provider": "x",
    "concurrency.chunk_size": 100,
    "concurrency.parquet_save_interval": -1,
    "options.main_resume": False,
    "options.resume": False,
    "options.preprocess_resume": False,
    "logging.progress_report_interval": 10,
}
NO_RE2 = [
    "(",
    "(?=a)b",
    "a(?!b)",
    "(?<!a)b",
    r"(a)\1",
    r"a\Z",
    r"[\u4e00-\u9fff]",
    "a++",
    "a{1001}",
]
MOVED = {"data.input_folder": "data/in", "data.output_folder": "/o/{task_name}"}
TASK_MISTAKES: dict[str, Data] = {
    "everything at once": {
        "data.input_foldr": "x",
        "data.input_key": 3,
        "data.output_folder": ...,
        "concurrency.files_per_run": 51,
        "debug.max_files": 0,
        "max_failure_rate": 1.5,
        "owners": ["me", "team:"],
        "distributed.num_runs": 3,
        "preprocess.filters": {"min_len": 3},
        "model": ...,
    },
    "wrong types": {
        "max_failure_rate": "1e-2",
        "task_name": 20240101,
        "retry.enable_format_validation_retry": "yes",
        "data": "x",
        "concurrency.max_concurrent_files": True,
    },
    "nothing under data": {"data": None},
    "task type, nearly": {"task_type": "data_scorng"},
    "task type, nearly another": {"task_type": "data_distilation"},
    "task type of a list": {"task_type": ["data_scoring"]},
    "task type that is `split`": {"task_type": "batch_distillation_submit", "whatever": 1},
    "task type that is `join`": {"task_type": "merge_distillation_results", "whatever": 1},
    "preprocessor, nearly": {"preprocess.script_type": "univrsal"},
    "fields of other preprocessors": {
        "preprocess.languages": ["C"], "preprocess.options": {"a": 1},
    },
    "tokenizer, nearly": {"preprocess.tokenizer": "o200k_bas"},
    "patterns": {"preprocess.filters": {"blacklist_regex": ["a+", *NO_RE2, "\ud800"]}},
    "patterns, together": {
        "preprocess.filters": {
            "blacklist_regex": [rf"(?i)x{n}[\p{{L}}\p{{N}}]{{20}}" for n in range(100)]
        }
    },
    "field mapping": {
        "preprocess.field_mapping": {
            "text": {"type": "combine", "fields": [1], "seperator": "-"},
            "a": {"type": "combin"},
            "b": {"fields": ["x"]},
            "c": 3,
            "d": {"type": "constant"},
        }
    },
    "what partitions have no place for": {
        "options.delete_existing": True, "distributed.num_runs": 2,
    },
    "old fields, nearly": {"logging.levl": "INFO", "data.stat_foldr": "x"},
    "log files in a store": {"logging.log_dir": "s3://bucket/logs"},
    "a folder for each time": {"data.output_folder": "./out/{timestamp}"},
    "a folder for each run": {"data.output_folder": "./out/{run_index}"},
    "a placeholder that is none": {"data.input_folder": "./in/{date}"},
    "a relative folder of an old file": {**MOVED, "data.stat_folder": "s"},
    **{field: {field: value} for field, value in OLD_WITHOUT_EFFECT.items()},
}  # fmt: skip


def test_what_is_wrong_in_a_task(messages: Messages) -> None:
    parsed = {
        name: parse_task(task_data(**fields), "t.yaml") for name, fields in TASK_MISTAKES.items()
    }
    messages({name: told(problems) for name, (_, problems) in parsed.items()})
    for name in OLD_WITHOUT_EFFECT:
        assert parsed[name][0], "a task all the same"


@pytest.mark.parametrize(
    "fields",
    [
        {"debug": None, "logging": None, "preprocess": None},
        {"owners": ["a@b.org", "team:data"]},
        *({"preprocess.enabled": True, "preprocess.script_type": name}
          for name in ("github_raw_code", "repo_xml", "triplet_filter", "my_pkg.rules:Mine")),
        {"preprocess.script_type": "repo_xml", "preprocess.languages": ["C"]},
        {"preprocess.script_type": "a:B", "preprocess.options": {"a": 1}},
        {"preprocess.tokenizer": "my/tokenizer.json"},
        {"preprocess.filters": {"blacklist_regex": [r"(?i)x[\p{L}\p{N}]{20}"]}},
        {"options.main_resume": True},
        {"options.resume": True},
        {"options.preprocess_resume": True},
        {"options.delete_existing": False},
        {"distributed.num_runs": 1},
        {"distributed.world_size": 4},
        {"distributed.enabled": True},
        MOVED,
    ],
)  # fmt: skip
def test_what_is_no_mistake_in_a_task(fields: Data) -> None:
    task, problems = parse_task(task_data(**fields), "t.yaml")
    assert task and not problems


@pytest.mark.parametrize("value", [-1, None])
def test_minus_one_and_null_are_no_limit(value: int | None) -> None:
    task, _ = parse_task(
        task_data(debug__enabled=True, debug__max_files=value, debug__max_items_per_file=value), "t"
    )
    assert task and task.max_files is None and task.max_items_per_file is None


def test_the_caps_of_debug_win_over_those_of_preprocess() -> None:
    caps: Data = {"preprocess__num_files": 7, "preprocess__enabled": True, "debug__max_files": 2}
    task, _ = parse_task(task_data(**caps), "t")
    assert task and task.max_files == 7
    task, _ = parse_task(task_data(**caps, debug__enabled=True), "t")
    assert task and task.max_files == 2


def test_format_retry_off_means_no_repair_turn() -> None:
    task, _ = parse_task(task_data(retry__enable_format_validation_retry=False), "t")
    assert task and task.retry.repair_turns == 0


# Tasks: preprocessors


def test_a_field_mapping_has_columns_combinations_and_constants() -> None:
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


# Tasks: places


def test_folders_are_made_absolute_and_simple(project: Configs) -> None:
    spec = project.load("in", "./out/../o/{task_name}/")
    assert spec.input_folder == f"{project.root}/in"
    assert spec.folder("scores") == f"{project.root}/o/demo"
    assert spec.journal_folder == f"{project.root}/o/demo/.modelcall"
    assert spec.file_name == "configs/tasks/demo.yaml"
    assert spec.files == {"model": "configs/models/m.yaml", "prompt": "configs/prompts/p.yaml"}


def test_preprocess_folders_count_when_enabled(project: Configs) -> None:
    own: Data = {"preprocess__input_folder": "./raw"}
    assert project.load(**own).input_folder == f"{project.root}/in"
    spec = project.load(**own, preprocess__enabled=True)
    assert spec.input_folder == f"{project.root}/raw"
    assert spec.folder("preprocessed") == f"{project.root}/raw_preprocessed"


def test_a_folder_of_the_environment_is_a_uri(
    project: Configs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLACE", "s3://bucket")
    assert project.load("${PLACE}/in").input_folder == "s3://bucket/in"
    found = project.problems("${GONE}/i", "${PLACE}/../o")
    assert "leads up" in found[f"{DEMO}:data.output_folder"].wrong
    assert found[f"{DEMO}:data.input_folder"].wrong == "variable GONE is not set"


@pytest.mark.parametrize("folder", ["./in", "./in/scores"])
def test_outputs_must_not_become_inputs(project: Configs, folder: str) -> None:
    problem = project.problems("./in", folder)[f"{DEMO}:data.output_folder"]
    assert "would become inputs" in problem.wrong


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
    (endpoint,) = endpoints_of(model, env, "m")
    assert (endpoint.api_key, endpoint.name) == ("k", name)
    with pytest.raises(SetupError, match=f"m.yaml:api_key: variable {variable} is not set"):
        endpoints_of(model, Environment({"BASE_URL": "http://h"}), "m.yaml")


def model_with(**changes: Any) -> ModelConfig:
    model, problems = parse_model(with_fields(MODEL, changes), "m.yaml")
    assert model and not problems, problems
    return model


def test_request_params_hold_no_transport_field() -> None:
    fields = {"chat_config.timeout": 9, "chat_config.stop": ["a"], "chat_config.custom": 1}
    model, _ = parse_model(with_fields(MODEL, fields), "m.yaml")
    assert model and model.request_params() == {"model": "m", "stop": ["a"], "custom": 1}


@pytest.mark.parametrize(
    ("chat", "sent"),
    [
        ({}, {}),
        ({"stop": ["a"], "top_k": 3}, {"stop": ["a"], "top_k": 3}),
        ({"stream": False, "stream_options": {"include_usage": True}}, {}),
        ({"stream": True}, {"stream": True, "stream_options": {"include_usage": True}}),
        ({"stream": True, "stream_options": {}}, {"stream": True}),
        (
            {"stream": True, "stream_options": {"include_usage": False}},
            {"stream": True, "stream_options": {"include_usage": False}},
        ),
    ],
)
def test_what_a_request_holds(chat: Data, sent: Data) -> None:
    model = model_with(**{f"chat_config.{name}": value for name, value in chat.items()})
    assert model.request_params() == {"model": "m", **sent}
    first, problems = parse_model(with_fields(OLD_MODEL, {"completions_params": chat}), "m")
    assert first and not problems
    assert first.request_params() == {"model": "gpt-4o", **sent}


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
        endpoints_of(model, Environment({"U": url}), "m")


def test_endpoint_hides_credentials_and_has_limits() -> None:
    changes = {"client_config.base_url": "${U}", "client_config.api_key": "${K}"}
    model, _ = parse_model(with_fields(MODEL, changes), "m")
    assert model
    env = Environment({"U": "https://me:pw@host:9/v1/?a=b", "K": "none"})
    assert "pw" not in repr(endpoints_of(model, env, "m"))
    env = Environment({"U": "https://host:9/v1/?a=b", "K": "topsecret"})
    (endpoint,) = endpoints_of(model, env, "m")
    assert endpoint.name == "host:9/v1"
    assert "topsecret" not in repr(endpoint)
    assert (endpoint.timeout_s, endpoint.max_retries) == (600, 5)
    with pytest.raises(SetupError) as caught:
        endpoints_of(model, Environment({}), "m")
    assert [problem.field for problem in caught.value.problems] == list(changes)


def test_endpoint_of_the_smallest_model() -> None:
    (endpoint,) = endpoints_of(model_with(), Environment({}), "m")
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
    (endpoint,) = endpoints_of(model, env, "m", root=tmp_path)
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
    assert next(model.client_config.each(""))[0].base_url == "http://a:1/v1"
    found = endpoints_of(model, Environment({"K": "1", "L": "2"}), "m")
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
CLIENT_MISTAKES: dict[str, Data] = {
    "transport, nearly": {"transport": "sdkk"},
    "the route": {"base_url": "http://h/v1/chat/completions"},
    "a list of headers": {"headers": ["a"]},
    "a number in a header": {"headers": {"X-Version": 1}},
    "no name of a header": {"headers": {"a b": "c"}},
    "our own header": {"headers": {"Content-Type": "text/plain"}},
    "a header twice": {"headers": {"X-A": "1", "x-a": "2"}},
    "two lines in a header": {"headers": {"X-A": "1\n2"}},
    **{
        f"a secret in {name}": {"headers": {name: "sk-abcdef"}}
        for name in ("Authorization", "api-key", "X-API-Key", "x-auth-token", "Cookie")
    },
    "a proxy of another kind": {"proxy": "socks5://host:1"},
    "a password in a proxy": {"proxy": "http://me:abcdef@host:1"},
    **{
        f"{name} {url!r}": {name: url}
        for name in ("base_url", "proxy")
        for url in (
            *("http://h/模型/v1", "http://h/a b", "http://bücher.example/v1", "http://h/\t"),
            *(f"http://{host}/v1" for host in ("a..b", ".a", f"{'a' * 64}.b", "a,b", "a..")),
        )
    },
    **{
        f"port {port}": {"base_url": f"http://h:{port}/v1"}
        for port in ("0", "65536", "-1", "x", "8 0")
    },
    "nothing in flight": {"max_in_flight": 0},
    "a limit in quotes": {"requests_per_minute": "60"},
    "a limit with a fraction": {"tokens_per_minute": 1.5},
    "no ca_file": {"ca_file": ""},
    "an endpoint without http": {"endpoints": [{"base_url": "x"}]},
    "an endpoint's own timeout": {"endpoints": [{"timeout": 3}]},
    "no base_url of an endpoint": {"base_url": None, "endpoints": [{}]},
    "no base_url": {"base_url": None},
    "an endpoint twice": {"endpoints": [{}, {"max_in_flight": 3}]},
    "no endpoint": {"endpoints": []},
}  # fmt: skip
MODEL_MISTAKES: dict[str, Data] = {
    "chat_config": {
        "chat_config.temprature": 1,
        "chat_config.n": 2,
        "chat_config.extra_body": {"messages": []},
        "chat_config.api_key": "sk-secret",
        "chat_config.top_p": 0,
        "chat_config.timeout": 9,
        "chat_config.custom": 1,
    },
    "neither generation": {"client_config": ..., "chat_config": ..., "prices": {}},
    **{
        name: {f"client_config.{field}": value for field, value in fields.items()}
        for name, fields in CLIENT_MISTAKES.items()
    },
}


def test_what_is_wrong_in_a_model(messages: Messages) -> None:
    found = {
        name: told(parse_model(with_fields(MODEL, fields), "m.yaml")[1])
        for name, fields in MODEL_MISTAKES.items()
    }
    assert "secret" not in str(found["chat_config"]) and "abcdef" not in str(found)
    messages(found)


@pytest.mark.parametrize("value", ["${K}", "Bearer ${K}", "Basic ${K}", "${K:-none}", "EMPTY"])
def test_secret_headers_are_references(value: str) -> None:
    problems = model_problems(**{"client_config.headers": {"Authorization": value}})
    assert bool(problems) == (value == "EMPTY")


IN_AN_ENVIRONMENT: dict[str, Data] = {
    "two lines in a key": {"api_key": "${LINES}"},
    "two lines in a header": {"headers": {"X-Key": "${LINES}"}},
    "an accent in a header": {"headers": {"X-Name": "${ACCENT}"}},
    "two lines in a proxy": {"proxy": "${LINES}"},
    "an accent in a URL": {"base_url": "http://${ACCENT}/v1"},
    "no such file": {"ca_file": "gone.pem"},
    "a folder": {"ca_file": "."},
    "no certificate": {"ca_file": "no.pem"},
    "a user and a key": {"base_url": "${USER_URL}", "api_key": "${KEY}"},
    "no variable of a header": {"headers": {"X-Key": "${GONE}"}},
    "no variable of a proxy": {"proxy": "${GONE}"},
    "no variable of a ca_file": {"ca_file": "${GONE}"},
}


def test_what_is_wrong_in_a_model_once_its_variables_are_known(
    tmp_path: Path, messages: Messages
) -> None:
    write(tmp_path / "no.pem", "no certificate")
    values = {"LINES": "topsecret\n", "ACCENT": "topsecrét", "KEY": "topsecret"}
    env = Environment({**values, "USER_URL": "http://me:topsecret@h/v1"})
    found = {}
    for name, fields in IN_AN_ENVIRONMENT.items():
        model = model_with(**{f"client_config.{field}": value for field, value in fields.items()})
        with pytest.raises(SetupError) as caught:
            endpoints_of(model, env, "m.yaml", root=tmp_path)
        found[name] = told(caught.value.problems)
    assert "topsecr" not in str(found)
    messages(found)


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
        endpoints_of(model, Environment({}), "m")
    assert [problem.field for problem in caught.value.problems] == [
        "client_config.endpoints[0].base_url",
        "client_config.api_key",
        "client_config.endpoints[2].api_key",
    ]
    assert all(problem.unready for problem in caught.value.problems)


def test_streaming_does_not_change_the_version_of_scores(project: Configs) -> None:
    def version() -> str:
        return Task(project.load()).stage("scores").version

    plain = version()
    for chat in ({"stream": True}, {"user": "me"}):
        fields = {f"chat_config.{name}": value for name, value in chat.items()}
        project.model(**fields)
        assert version() == plain
    project.model(**{"chat_config.seed": 1})
    assert version() != plain


def test_task_limits_meet_the_models(project: Configs) -> None:
    changes: Data = {"environment__timeout": 30, "retry__max_retries": 9}
    endpoint = endpoint_of(project.load(**changes))
    assert (endpoint.timeout_s, endpoint.max_retries) == (30, 9)
    project.model(**{"client_config.timeout": 60})
    assert endpoint_of(project.load(**changes)).timeout_s == 60


def test_a_model_file_is_loaded_or_its_mistake_told(project: Configs) -> None:
    path = project.root / MODEL_PATH
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


@pytest.mark.parametrize(
    ("fields", "prices"),
    [
        ({}, (2, 8, 2)),
        ({"prices.usd_per_million_cached_input_tokens": 0.5}, (2, 8, 0.5)),
        ({"prices.batch_discount": 0.5}, (2, 8, 2)),
        ({"prices.batch_discount": 0.5, "mode": "batch"}, (1, 4, 1)),
    ],
)
def test_prices_are_those_of_the_mode(fields: dict[str, Any], prices: tuple[float, ...]) -> None:
    known = {"prices.usd_per_million_input_tokens": 2, "prices.usd_per_million_output_tokens": 8}
    model, problems = parse_model(with_fields(MODEL, {**known, **fields}), "m")
    assert model is not None, problems
    assert model.token_prices == pytest.approx(prices)


# Prompts

OUTPUT_MISTAKES = {
    "JSON that is not required": "{json_keys: [a]}",
    "no key": "{require_json: true}",
    "must exist, nearly": "{json_keys: [score], json_key_must_exists: [scor]}",
    "a default of no key": "{json_keys: [a], json_default_values: {b: 1}}",
    "a key of ours": "{json_keys: [api_x]}",
    "a key twice": "{json_keys: [a, a]}",
    "an empty key": "{json_keys: ['']}",
    "a number for a key": "{json_keys: [a, 3]}",
}
SCHEMA_MISTAKES = {
    "a property that is no key": "{properties: {b: {}}}",
    "a required one that is no key": "{required: [b]}",
    "type, nearly": "{properties: {a: {type: intger}}}",
    "minimum, nearly": "{properties: {a: {minium: 1}}}",
    "type of items, nearly": "{properties: {a: {items: {typ: 1}}}}",
    "type of an alternative, nearly": "{properties: {a: {anyOf: [{typ: 1}]}}}",
    "a minimum in quotes": "{properties: {a: {minimum: '1'}}}",
    "a pattern": "{properties: {a: {pattern: '('}}}",
    "a date": "{properties: {a: {enum: [2024-01-01]}}}",
    "a property of 1": "{properties: {a: 1}}",
    "an array": "{type: array}",
}


def test_what_is_wrong_in_a_prompt(messages: Messages) -> None:
    json = {"require_json": True, "json_keys": ["a"]}
    bad = ["{a[0]}", "{}", "{0}", "{a!r}", "{a:>3}", "{a:{b}}", '{"score": 1}', "{a b}", "}"]
    mistakes: dict[str, Data] = {
        **{f"{{text}} {each}": {"prompt_template.prompt_text": f"{{text}} {each}"} for each in bad},
        **{name: {"output_config": yaml.safe_load(text)} for name, text in OUTPUT_MISTAKES.items()},
        **{
            f"schema: {name}": {"output_config": {**json, "json_schema": yaml.safe_load(text)}}
            for name, text in SCHEMA_MISTAKES.items()
        },
    }
    messages(
        {
            name: told(parse_prompt(with_fields(PROMPT, fields), "p.yaml")[1])
            for name, fields in mistakes.items()
        }
    )


def test_placeholders_are_names_in_single_braces() -> None:
    text = "{text} {{literal}} {内容} {my-column} {text}"
    prompt, _ = parse_prompt(with_fields(PROMPT, {"prompt_template.prompt_text": text}), "p.yaml")
    assert prompt and prompt.placeholders == {"text", "内容", "my-column"}


def test_the_types_of_fields_come_from_the_schema_and_the_defaults() -> None:
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
    assert prompt.output_config.fields == {
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
    assert prompt.output_config.optional_defaults == {
        "t": "",
        "b": True,
        "l": [],
        "d": {},
        "ln": [1],
    }
    schema = prompt.output_config.answer_schema()
    assert schema["required"] == ["score", "grade"]
    assert schema["properties"] == prompt.output_config.fields


def test_a_default_never_fills_a_required_key() -> None:
    output = {"json_key_must_exists": ["t"], "json_default_values": {"t": "x"}, "json_keys": ["t"]}
    data = with_fields(PROMPT, {"output_config": {"require_json": True, **output}})
    prompt, _ = parse_prompt(data, "p.yaml")
    assert prompt and prompt.output_config.optional_defaults == {}


def test_keys_default_to_the_schemas() -> None:
    schema = {"properties": {"b": {"type": "string"}, "a": {"type": "string"}}, "required": ["a"]}
    data = with_fields(PROMPT, {"output_config": {"require_json": True, "json_schema": schema}})
    prompt, problems = parse_prompt(data, "p.yaml")
    assert prompt and not problems
    assert list(prompt.output_config.fields) == ["b", "a"]
    assert prompt.output_config.required == ["a"]


def test_a_prompt_without_json() -> None:
    prompt, problems = parse_prompt({"prompt_template": {"prompt_text": "{text}"}}, "p.yaml")
    assert prompt and not problems and prompt.output_config.fields == {}


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


def test_the_root_is_the_nearest_folder_with_configs_or_a_workspace(tmp_path: Path) -> None:
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    write(tmp_path / "workspace.yaml", "x: 1")
    assert find_root(inner) == tmp_path
    (tmp_path / "a" / "configs").mkdir()
    assert find_root(inner) == tmp_path / "a"


@given(st.text(max_size=150))
def test_legal_key_is_legal(name: str) -> None:
    assert re.fullmatch(r"[A-Za-z0-9_]{1,100}", legal_key(name))


def test_legal_keys_tell_names_apart() -> None:
    assert legal_key("en-corpus v0.1") == "en_corpus_v0_1"
    assert re.fullmatch(r"___[0-9a-f]{6}", legal_key("评分"))
    assert legal_key("评分") != legal_key("打分")
    assert legal_key("a" * 101) != legal_key("a" * 102)


def test_the_name_is_shown_as_written(project: Configs) -> None:
    spec = project.load("./in", "./o/{task_name}", name="英文-v1")
    assert spec.name == "英文-v1" and spec.key.startswith("___v1_")
    assert spec.folder("scores").endswith("/o/英文-v1")


def test_all_three_files_are_told_at_once(project: Configs) -> None:
    project.model(**{"chat_config.model": 3})
    project.write("configs/prompts/p.yaml", "a: [")
    path = project.task(max_failure_rate=2)
    with pytest.raises(SetupError) as caught:
        load_task(path, project.root)
    assert [(problem.file, problem.field) for problem in caught.value.problems] == [
        ("configs/tasks/demo.yaml", "max_failure_rate"),
        ("configs/models/m.yaml", "chat_config.model"),
        ("configs/prompts/p.yaml", "1:5"),
    ]


def test_missing_model_file_names_its_neighbour(project: Configs) -> None:
    found = project.problems(model__config_path="configs/models/mm.yaml")
    assert found[f"{DEMO}:model.config_path"].fix == "did you mean configs/models/m.yaml?"


def test_one_broken_file_leaves_the_others(project: Configs) -> None:
    project.task(name="a")
    project.write("configs/tasks/b.yml", "task_name: b\nx: [")
    project.write("configs/tasks/sub/c.yaml", "task_name: a\n")
    project.write("configs/tasks/templates/t.yaml", "nonsense")
    catalog = load_catalog(project.root)
    assert [task.key for task in catalog.tasks] == ["a"]
    assert [broken.file_name for broken in catalog.broken] == [
        "configs/tasks/b.yml",
        "configs/tasks/sub/c.yaml",
    ]
    keys = [broken.key for broken in catalog.broken]
    assert keys[0] == "b" and re.fullmatch(r"a_[0-9a-f]{6}", keys[1])


def test_duplicate_names_break_the_later_file(project: Configs) -> None:
    project.task("./in", "./o1", file="b", name="x-1")
    project.task("./in", "./o2", file="a", name="x_1")
    catalog = load_catalog(project.root)
    assert [task.file_name for task in catalog.tasks] == ["configs/tasks/a.yaml"]
    [broken] = catalog.broken
    assert broken.file_name == "configs/tasks/b.yaml" and broken.key != "x_1"
    assert "configs/tasks/a.yaml" in broken.problems[0].wrong


def test_two_tasks_may_not_write_to_one_folder(project: Configs) -> None:
    project.task(name="a")
    project.task("./in", "out/", name="b")
    [broken] = load_catalog(project.root).broken
    assert (broken.key, broken.problems[0].field) == ("b", "data.output_folder")
    assert "configs/tasks/a.yaml" in broken.problems[0].wrong


# Distillation

STEP_BLOCKS: dict[str, Data] = {
    "chatml_conversion": {
        "dataset_config_path": "configs/distillation/sets.yaml",
        "input_dir": "sets",
        "output_dir": "prepared",
    },
    "jsonl_merge": {
        "merge_config_path": "configs/distillation/groups.yaml",
        "base_output_dir": "merged",
    },
    "generate_response": {
        "response_config_path": "configs/models/m.yaml",
        "output_path": "generated",
    },
    "scores": {
        "model": {"config_path": "configs/models/m.yaml"},
        "prompt": {"config_path": "configs/prompts/p.yaml"},
        "output_dir": "judged",
        "prompt_format_key": "text",
    },
}
INPUT_OF = {
    "chatml_conversion": "input_dir",
    "jsonl_merge": "base_input_dir",
    "generate_response": "input_path",
}
CHAIN: Data = {"task_name": "chain", "task_type": "data_distillation", **STEP_BLOCKS}
SETS: Data = {
    "org/chats": {
        "configs": [None],
        "format_style": "sharegpt",
        "column_mapping": {"conversations": "turns"},
    },
    "ins.jsonl": {
        "format_style": "instruction_input",
        "column_mapping": {"prompt": "instruction", "input": "input", "response": "output"},
    },
}
GROUPS: Data = {
    "merge_groups": [
        {"name": "all", "output_file": "all.jsonl", "input_files": ["chats/*.jsonl", "ins/*.jsonl"]}
    ]
}
OLD_GENERATE: Data = {
    "task_name": "answers",
    "task_type": "generate_response",
    "distillation": {
        "model_config": "configs/models/m.yaml",
        "input_path": "merged/all.jsonl",
        "output_path": "generated",
        "concurrency": 30,
        "batch_size": 30,
        "flush_interval": 2.0,
        "retry_mode": False,
        "resume": True,
    },
}


def single(step: str, **fields: Any) -> Data:
    """A file with one step, as the old system wrote it."""
    block = {"step": step, **STEP_BLOCKS[step], INPUT_OF[step]: "in_dir", **fields}
    return {"task_name": "single", "task_type": "data_distillation", "distillation": block}


def distilled(data: Data) -> DistillationTask:
    task, problems = parse_distillation(data, "t.yaml")
    assert task and not [each for each in problems if each.severity == "error"], problems
    return task


class DistillationProject(Configs):
    """With data sets and merge groups, and with the files of the data sets."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        write(root / "configs/distillation/sets.yaml", SETS)
        write(root / "configs/distillation/groups.yaml", GROUPS)
        turns = '[{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]'
        write(root / "sets/org/chats/train.jsonl", f'{{"turns": {turns}}}\n')
        write(root / "sets/ins.jsonl", '{"instruction": "do", "input": "x", "output": "r"}\n')

    def distill(self, data: Data = CHAIN) -> Path:
        return write(self.root / "configs/tasks/distill.yaml", data)

    def told(self, data: Data = CHAIN) -> list[str]:
        """What check says, without the count."""
        return self.check(self.distill(data)).out.splitlines()[:-1]


@pytest.fixture
def distilling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DistillationProject:
    monkeypatch.chdir(tmp_path)
    return DistillationProject(tmp_path)


def test_a_chain_in_one_file() -> None:
    task = distilled(CHAIN)
    chatml, merge = task.chatml_conversion, task.jsonl_merge
    responses, judge = task.generate_response, task.scores
    assert chatml and merge and responses and judge
    assert (chatml.selected_datasets, chatml.keep_raw_data, chatml.add_system_prompt) == (
        [], True, False,
    )  # fmt: skip
    assert (chatml.other_roles, chatml.validation) == ("keep", "lenient")
    assert chatml.system_prompt == "You are a helpful assistant and an expert coder."
    assert (merge.base_input_dir, merge.merge_groups) == (None, [])
    assert (responses.concurrency, responses.samples, responses.prompt_mode) == (20, 1, "full")
    assert responses.merge_reasoning is True
    assert (judge.input_key, judge.prompt_format_key) == ("response", "text")


def test_the_key_of_the_judges_placeholder_is_its_column_unless_given() -> None:
    judge = {name: v for name, v in STEP_BLOCKS["scores"].items() if name != "prompt_format_key"}
    task = distilled(CHAIN | {"scores": judge})
    assert task.rated.prompt_format_key == "response"


@pytest.mark.parametrize("step", OLD_STEPS)
def test_the_old_block_is_the_step_that_it_names(step: str) -> None:
    task = distilled(single(step))
    new = {"task_name": "single", "task_type": "data_distillation"}
    own = {**STEP_BLOCKS[step], INPUT_OF[step]: "in_dir"}
    assert task == distilled({**new, step: own})
    assert [name for name in OLD_STEPS if getattr(task, name)] == [step]


def test_both_old_key_sets_of_generate_response_are_one_task() -> None:
    fields = dict(OLD_GENERATE["distillation"])
    for old, name in {
        "model_config": "response_config_path",
        "flush_interval": "flush_interval_secs",
        "resume": "resume_mode",
    }.items():
        fields[name] = fields.pop(old)
    other = {**OLD_GENERATE, "task_type": "data_distillation"}
    other["distillation"] = {"step": GENERATE, **fields}
    first, second = distilled(OLD_GENERATE), distilled(other)
    assert first.generate_response == second.generate_response
    assert first.generate_response and first.generate_response.concurrency == 30
    mixed = {**OLD_GENERATE, "distillation": other["distillation"]}
    assert distilled(mixed).generate_response == first.generate_response


STEP_MISTAKES: dict[str, Data] = {
    "chatml_conversion": {
        "output_dri": 1,
        "num_process": 1,
        "keep_raw_data": "yes",
        "validation": "strickt",
        "output_dir": "s3://",
        "on_bad_line": "drop",
        "num_processes": 100,
        "continue_mode": False,
    },
    "jsonl_merge": {"merge_group": 1, "merge_groups": "all", "chunk_size": 1000},
    "generate_response": {
        "concurency": 1,
        "batch_sise": 1,
        "samples": 0,
        "concurrency": "20",
        "prompt_mode": "last",
        "batch_size": 20,
        "flush_interval_secs": 2.0,
        "resume_mode": False,
    },
}
BASE: Data = {"task_name": "x", "task_type": "data_distillation"}
JUDGE, CONVERT, MERGE = (
    STEP_BLOCKS[each] for each in ("scores", "chatml_conversion", "jsonl_merge")
)
DISTILLATION_MISTAKES: dict[str, Data] = {
    **{
        f"{step} without {field}": with_fields(single(step), {f"distillation.{field}": ...})
        for step in OLD_STEPS
        for field in (*STEP_BLOCKS[step], INPUT_OF[step])
    },
    "flush_interval": single(GENERATE, flush_interval=2.0),
    "resume": single(GENERATE, resume=False),
    "a step, nearly": {**CHAIN, "jsonl_merg": {}},
    "a step that is none": {**CHAIN, "judge": {}},
    "no step": BASE,
    "no old step": {**BASE, "distillation": None},
    "an old step, nearly": {**BASE, "distillation": {"step": "jsonl_merg"}},
    "an old step of a list": {**BASE, "distillation": {"step": ["x"]}},
    "an old step without a name": {**BASE, "distillation": {"output_dir": "x"}},
    "the name of an old step alone": {**BASE, "distillation": "jsonl_merge"},
    "nothing to merge": {**BASE, "jsonl_merge": MERGE},
    "nothing to answer": {**BASE, "generate_response": STEP_BLOCKS[GENERATE]},
    "no answers to rate": {**BASE, "scores": JUDGE, "chatml_conversion": CONVERT},
    "other folders than the step before": with_fields(
        CHAIN, {"jsonl_merge.base_input_dir": "in", "generate_response.input_path": "prepared"}
    ),
    "an encoding between": with_fields(
        CHAIN, {"jsonl_merge.encoding": "gbk", "jsonl_merge.on_bad_line": "fail"}
    ),
    "a step twice": {**single("jsonl_merge"), "jsonl_merge": MERGE},
    "a field by two names": with_fields(
        OLD_GENERATE, {"distillation.response_config_path": "configs/models/m.yaml"}
    ),
    "samples that are copies": with_fields(
        CHAIN, {"reuse.identical_once": True, "generate_response.samples": 3}
    ),
}  # fmt: skip


def test_what_is_wrong_in_a_distilling_task(messages: Messages) -> None:
    found = {
        name: told(parse_distillation(data, "t.yaml")[1])
        for name, data in DISTILLATION_MISTAKES.items()
    }
    for step, fields in STEP_MISTAKES.items():
        for field, value in fields.items():
            old, new = (
                told(parse_distillation(data, "t.yaml")[1])
                for data in (
                    single(step, **{field: value}),
                    with_fields(CHAIN, {f"{step}.{field}": value}),
                )
            )
            found[f"{step}.{field}: {value}"] = old
            assert isinstance(old, str)
            assert new == old.replace(f"distillation.{field}", f"{step}.{field}")
    messages(found)


@pytest.mark.parametrize(
    "data",
    [
        single("chatml_conversion", continue_mode=True),
        single(GENERATE, retry_mode=False),
        single(GENERATE, retry_mode=True),
        single(GENERATE, resume=True),
        single(GENERATE, resume_mode=True),
        with_fields(CHAIN, {"jsonl_merge.base_input_dir": "prepared/"}),
        with_fields(
            {name: value for name, value in CHAIN.items() if name != "jsonl_merge"},
            {"generate_response.input_path": "prepared"},
        ),
        with_fields(CHAIN, {"chatml_conversion.encoding": "gbk"}),
        with_fields(CHAIN, {"reuse.identical_once": True}),
        with_fields(CHAIN, {"generate_response.samples": 3}),
    ],
)
def test_what_is_no_mistake_in_a_distilling_task(data: Data) -> None:
    assert not parse_distillation(data, "t.yaml")[1]


def test_a_problem_is_where_the_file_has_the_field() -> None:
    wrong = Problem("t.yaml", "generate_response.response_config_path", "wrong")
    assert as_written(wrong, CHAIN) == wrong
    assert as_written(wrong, OLD_GENERATE).field == "distillation.model_config"
    assert as_written(wrong, single(GENERATE)).field == "distillation.response_config_path"
    assert as_written(wrong, single("jsonl_merge")) == wrong
    for step in OLD_STEPS:
        whole = Problem("t.yaml", "max_failure_rate", "wrong")
        assert as_written(whole, single(step)) == whole


def test_a_chain_loads_with_all_its_files(distilling: DistillationProject) -> None:
    spec = load_task(distilling.distill(), distilling.root)
    assert spec.warnings == ()
    assert [*spec.task.stage_folders] == ["chatml", "merged", "responses", "scores"]
    assert spec.files == {
        "model": "configs/models/m.yaml",
        "prompt": "configs/prompts/p.yaml",
        "generator": "configs/models/m.yaml",
        "datasets": "configs/distillation/sets.yaml",
        "groups": "configs/distillation/groups.yaml",
    }
    assert set(spec.datasets) == {"org/chats", "ins.jsonl"}
    assert [group.name for group in spec.groups] == ["all"]
    assert distilling.told() == []


def test_a_file_that_a_step_names_is_looked_for(distilling: DistillationProject) -> None:
    gone = {"dataset_config_path": "configs/distillation/set.yaml"}
    [line] = distilling.told(single("chatml_conversion", input_dir="sets", **gone))
    assert line.startswith("error: configs/tasks/distill.yaml:distillation.dataset_config_path: ")
    assert "no such file" in line and "did you mean configs/distillation/sets.yaml?" in line
    changes = {
        "jsonl_merge.merge_config_path": "configs/distillation/group.yaml",
        "generate_response.response_config_path": "configs/models/n.yaml",
        "scores.prompt.config_path": "configs/prompts/q.yaml",
    }
    told = "\n".join(distilling.told(with_fields(CHAIN, changes)))
    for place in changes:
        assert f"error: configs/tasks/distill.yaml:{place}: no such file" in told


def test_an_unknown_name_is_at_the_field_that_the_caller_says() -> None:
    sets, _ = datasets.parse_datasets(SETS, "s.yaml")
    groups, _ = datasets.parse_merge_groups(GROUPS, "g.yaml")
    assert sets and groups
    _, [problem] = datasets.selected_datasets(sets, ["org/chat"], "t.yaml", "here.selected")
    assert (problem.field, problem.fix) == ("here.selected[0]", "did you mean org/chats?")
    _, [problem] = datasets.selected_groups(groups, ["all", "al"], "t.yaml", "here.groups")
    assert (problem.field, problem.fix) == ("here.groups[1]", "did you mean all?")


@pytest.mark.parametrize(
    ("step", "field"), [("chatml_conversion", "selected_datasets"), ("jsonl_merge", "merge_groups")]
)
def test_an_unknown_name_is_where_the_file_has_the_list(
    distilling: DistillationProject, step: str, field: str
) -> None:
    told = "\n".join(distilling.told(with_fields(CHAIN, {f"{step}.{field}": ["alll"]})))
    assert f"error: configs/tasks/distill.yaml:{step}.{field}[0]: " in told
    told = "\n".join(distilling.told(single(step, **{field: ["alll"]})))
    assert f"error: configs/tasks/distill.yaml:distillation.{field}[0]: " in told


def test_problems_of_named_files_are_told_with_their_own_names(
    distilling: DistillationProject,
) -> None:
    style = {"format_style": "sharegtp", "column_mapping": {}}
    distilling.write("configs/distillation/sets.yaml", {"a/b": style})
    distilling.write("configs/distillation/groups.yaml", {"merge_groups": [{"name": "x"}]})
    distilling.model(**{"chat_config.n": 2})
    told = "\n".join(distilling.told())
    assert "error: configs/distillation/sets.yaml:a/b.format_style: unknown value" in told
    assert "error: configs/distillation/groups.yaml:merge_groups[0].output_file: missing" in told
    assert told.count("error: configs/models/m.yaml:chat_config.n") == 1


# modelcall check


def test_check_counts_the_files_that_are_right(project: Configs) -> None:
    project.task()
    (project.root / "in" / "a.jsonl").touch()
    ended = project.check()
    assert ended.code == 0
    assert ended.out == "3 files checked: 0 errors, 0 warnings\n"


def test_check_without_arguments_takes_the_project(project: Configs) -> None:
    project.task(nonsense=1)
    ended = project.check()
    assert ended.code == 1
    assert "error: configs/tasks/demo.yaml:nonsense: unknown key" in ended.out
    assert ended.out.splitlines()[-1] == "3 files checked: 1 errors, 0 warnings"


WITH_MISTAKES = """\
task_name: demo
data: {output_folder: ./out,
  input_foldr: ./in}
"retry":
  max_retries: no

# a comment
concurrency: &many
  files_per_run: 0
stores: [{prefix: s3://a}, {prefix: 4}]
environment: *many
"""


def test_problems_name_the_line_of_their_field_or_of_what_is_there(project: Configs) -> None:
    path = project.write("configs/tasks/demo.yaml", f"\ufeff{WITH_MISTAKES}")
    told = project.check(path).out.splitlines()
    field_and_line = dict(
        re.findall(r"demo\.yaml:(.*?): .*?(?: \(line (\d+)\))?$", line)[0] for line in told[:-1]
    )
    assert field_and_line == {
        "data.input_foldr": "3",
        "data.input_folder": "2",
        "retry.max_retries": "5",
        "concurrency.files_per_run": "9",
        "stores": "10",
        "environment.files_per_run": "9",
        "model": "",
        "prompt": "",
    }
    assert "(line 3)" in Project(project.root).run("run-task", path).err


def test_of_names_with_dots_the_longest_is_meant(project: Configs) -> None:
    sets = "alpaca: {format_style: sharegpt}\n\nalpaca.v2:\n  format_style: nonsense\n"
    path = project.write("configs/distillation/sets.yaml", sets)
    told = project.check(path).out
    assert "sets.yaml:alpaca.v2.format_style: unknown value" in told
    assert re.search(r"alpaca\.v2\.format_style: .*\(line 4\)", told), told


def test_lines_are_those_of_the_tasks_own_project(project: Configs, tmp_path: Path) -> None:
    path = project.write("configs/tasks/demo.yaml", WITH_MISTAKES)
    other = Configs(tmp_path / "other")
    other.write("configs/tasks/demo.yaml", "\n" * 30 + WITH_MISTAKES)
    ended = Project(other.root).run("run-task", path)
    assert "data.input_foldr: unknown key; did you mean input_folder? (line 3)" in ended.err


def test_check_tells_each_problem_once(project: Configs) -> None:
    project.model(**{"chat_config.n": 2})
    project.task("./in", "./a", name="a")
    project.task("./in", "./b", name="b")
    ended = project.check()
    assert ended.out.count("chat_config.n") == 1
    assert ended.code == 1


def test_check_strict_takes_warnings_for_errors(project: Configs) -> None:
    path = project.task(logging__progress_report_interval=10)
    assert project.check(path).code == 0
    assert (
        "warning: configs/tasks/demo.yaml:logging.progress_report_interval"
        in project.check(path).out
    )
    assert project.check("--strict", path).code == 1


def test_check_finds_what_is_not_ready(project: Configs) -> None:
    project.model(**{"client_config.api_key": "${K}"})
    ended = project.check(project.task("./later"))
    assert (
        "warning: configs/models/m.yaml:client_config.api_key: variable K is not set; "
        "the task cannot run until ${K} has a value" in ended.out
    )
    assert "warning: configs/tasks/demo.yaml:data.input_folder: no such folder yet" in ended.out
    assert ended.code == 0


def test_check_refuses_a_variable_that_holds_no_url(
    project: Configs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("U", "localhost:8000")
    project.model(**{"client_config.base_url": "${U}"})
    ended = project.check(project.task())
    assert "error: configs/models/m.yaml:client_config.base_url: not a URL" in ended.out
    assert ended.code == 1


def test_check_reads_templates_but_they_are_no_tasks(project: Configs) -> None:
    project.task(file="templates/t", bogus=1)
    project.task()
    assert "configs/tasks/templates/t.yaml:bogus" in project.check().out
    assert len(load_catalog(project.root).tasks) == 1


def test_check_tells_clashes_between_tasks(project: Configs) -> None:
    project.task(file="a")
    ended = project.check(project.task(file="b"))
    assert "demo is the name of the task in configs/tasks/a.yaml" in ended.out


def test_check_tells_files_apart_by_content(project: Configs) -> None:
    model = project.write("x/model.yaml", with_fields(MODEL, {"chat_config.n": 2}))
    prompt = project.write("x/prompt.yaml", {"prompt_template": {}})
    output = project.check(model, prompt).out
    assert "x/model.yaml:chat_config.n" in output
    assert "x/prompt.yaml:prompt_template.prompt_text: missing" in output


def test_check_refuses_paths_that_hold_nothing(project: Configs) -> None:
    (project.root / "empty").mkdir()
    ended = project.check("gone.yaml", "empty")
    assert "error: gone.yaml: no such file or folder" in ended.out
    assert "error: empty: no config file in this folder" in ended.out
    assert ended.code == 1


def test_check_reads_data_sets_and_merge_groups(distilling: DistillationProject) -> None:
    assert distilling.check().out == "4 files checked: 0 errors, 0 warnings\n"
    distilling.write("configs/distillation/sets.yaml", {"a/b": {"configs": []}})
    distilling.write("configs/distillation/groups.yaml", {"merge_groups": []})
    output = distilling.check().out
    assert "error: configs/distillation/sets.yaml:a/b.format_style: missing" in output
    assert "error: configs/distillation/groups.yaml:merge_groups" in output
    sets = distilling.write("x/sets.yaml", with_fields(SETS, {"org/chats.configs": 1}))
    groups = distilling.write("x/groups.yaml", {"merge_groups": 3})
    output = distilling.check(sets, groups).out
    assert "error: x/sets.yaml:org/chats.configs: wrong type" in output
    assert "error: x/groups.yaml:merge_groups: wrong type" in output


def test_check_finds_a_missing_input_of_each_step(distilling: DistillationProject) -> None:
    for step, field in INPUT_OF.items():
        [line] = distilling.told(single(step))
        assert f"tasks/distill.yaml:distillation.{field}: no such folder yet" in line
    one = single(GENERATE, input_path="merged/all.jsonl")
    assert "no such file yet" in distilling.told(one)[0]
    [line] = distilling.told(with_fields(CHAIN, {"chatml_conversion.input_dir": "gone"}))
    assert "tasks/distill.yaml:chatml_conversion.input_dir: no such folder yet" in line


def test_check_looks_for_each_data_set(distilling: DistillationProject) -> None:
    (distilling.root / "sets/ins.jsonl").unlink()
    first, second = distilling.told()
    place = "warning: configs/tasks/distill.yaml:chatml_conversion.input_dir: "
    assert first.startswith(f"{place}ins.jsonl: ")
    assert second.startswith(f"{place}1 of 2 data sets can be read: 1 splits")
    assert distilling.told(single("chatml_conversion", input_dir="sets"))[0].startswith(
        "warning: configs/tasks/distill.yaml:distillation.input_dir: ins.jsonl: "
    )


def test_check_looks_for_the_columns_of_a_data_set(distilling: DistillationProject) -> None:
    rows = '{"instructions": "do", "output": "r"}\n{"instructions": "so", "output": "s"}\n'
    distilling.write("sets/ins.jsonl", rows)
    place = "warning: configs/distillation/sets.yaml:ins.jsonl.column_mapping"
    first, second = sorted(distilling.told())
    assert first.startswith(f"{place}.input: no column input in the first 2 rows of sets/ins.jsonl")
    assert second.startswith(f"{place}.prompt: no column instruction in ")
    assert second.endswith(
        "found the columns instructions, output; did you mean instructions? (line 4)"
    )


def test_check_tries_to_convert_the_first_rows(distilling: DistillationProject) -> None:
    distilling.write("sets/org/chats/train.jsonl", '{"turns": ["hello"]}\n{bad\n')
    [line] = distilling.told()
    assert line.startswith("warning: configs/distillation/sets.yaml:org/chats.format_style: none")
    assert "turns[0]: expected an object with `from` and `value`" in line


def test_check_names_members_that_are_missing(distilling: DistillationProject) -> None:
    files = ["chats/*.jsonl", "gone.jsonl"]
    group = {"name": "all", "output_file": "all.jsonl", "input_files": files}
    distilling.write("configs/distillation/groups.yaml", {"merge_groups": [group]})
    [line] = distilling.told()
    assert "tasks/distill.yaml:jsonl_merge.merge_config_path: merge group 'all'" in line
    assert "of the members under prepared, gone.jsonl is not there" in line
    (distilling.root / "in_dir/chats").mkdir(parents=True)
    distilling.write("in_dir/chats/x.jsonl", "{}\n")
    [line] = distilling.told(single("jsonl_merge"))
    assert "tasks/distill.yaml:distillation.merge_config_path: merge group 'all'" in line


def test_check_of_a_task_that_reads_anothers_output(distilling: DistillationProject) -> None:
    first = {**single("chatml_conversion", input_dir="sets"), "task_name": "first"}
    distilling.write("configs/tasks/first.yaml", first)
    merge = single("jsonl_merge", base_input_dir="prepared")
    assert distilling.told(merge) == []
    (distilling.root / "sets/ins.jsonl").unlink()
    (distilling.root / "sets/org/chats/train.jsonl").unlink()
    [line] = distilling.told(merge)
    assert "distillation.base_input_dir: first leaves nothing yet: " in line


def test_check_asks_for_conversations_to_answer(distilling: DistillationProject) -> None:
    distilling.write("in_dir/a.jsonl", '{"messages": [{"role": "user", "content": "q"}]}\n')
    assert distilling.told(single(GENERATE)) == []
    distilling.write("in_dir/a.jsonl", '{"text": "q"}\n')
    [line] = distilling.told(single(GENERATE))
    assert "distillation.input_path: none of the first 1 rows of a.jsonl can be answered" in line
    assert "column 'messages' is absent; found the columns text; conversations are a list" in line


def test_words_of_the_reference_page_are_what_yaml_reads() -> None:
    """It reads some bare words as something else. That `reuse.scope` takes them, `test_reuse` has
    in `test_off_is_what_the_file_says_however_yaml_reads_it`."""
    rows = [line.split("|") for line in reference().splitlines() if line.startswith("| `")]
    words = [(row[1].strip(" `"), word) for row in rows for word in re.findall("`(.+?)`", row[2])]
    assert len(words) > 30
    assert [each for each in words if yaml.safe_load(each[1]) != each[1]] == [
        ("reuse.scope", "off")
    ]


def test_the_reference_page_is_up_to_date() -> None:
    page = Path(__file__).parent.parent / "docs" / "config.md"
    assert page.read_text("utf-8") == reference()
