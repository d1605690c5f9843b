"""`modelcall migrate`: old files become ours; nothing is lost in silence, no key leaks."""

from __future__ import annotations

import copy
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from config_files import MODEL_PATH, Configs, Data, with_fields, write
from hypothesis import given
from hypothesis import strategies as st
from project import MODEL_FILE, PROMPT_FILE, Ended, Project, read_rows, write_rows

from modelcall_assets.config.catalog import load_model, load_task, parse_task
from modelcall_assets.config.datasets import parse_datasets, parse_merge_groups
from modelcall_assets.config.files import load_yaml
from modelcall_assets.config.migrate import migrate_file
from modelcall_assets.config.model import parse_model
from modelcall_assets.config.prompt import parse_prompt

ROOT = Path(__file__).parent.parent
SHIPPED = sorted((ROOT / "configs").rglob("*.yaml"))
SECRET = "sk-Zx81hQpLw0aTtVn5sYcR3e"
PLAIN_SECRET = "correct horse"

TASK = """\
# Nightly rating of the forum dump.
task_name: forum_rating
task_type: data_scoring
description: |
  Rates forum posts.
  论坛帖子评分 🚀
data:
  stat_folder: ./stats/{task_name}
  output_folder: ./tagged/{task_name}/{timestamp}
  input_folder: /mnt/forum/posts
  input_key: content_truncate_32k
  prompt_format_key: text
preprocess:
  enabled: true
  script_type: universal
  input_folder: forum/raw
  output_folder: ./forum_clean
  max_tokens: 32768
  num_proc: 16
  seed: 42
  num_files: -1
  batch_size: 500
  languages: null
  group_by_language: true
  source_name: forum
  file_pattern: "*.jsonl"
  field_mapping:
    text: {type: combine, fields: [title, body], separator: "\\n"}
    origin.site: {type: constant, value: forum}
  filters: {min_text_length: 40, blacklist_patterns: [lorem]}
  transformations:
    text_cleaning: {remove_extra_whitespace: true}
    computed_fields: {length: {type: text_length}}
model: {config_path: configs/models/m.yaml}
prompt: {config_path: configs/prompts/p.yaml}
environment:
  config_path: env/forum.env
  tos_config_path: env/store.env
  timeout: 180
  api_provider: openai
concurrency:
  max_concurrent_files: 3
  max_concurrent_requests: 40
  chunk_size: 200
  parquet_save_interval: -1
distributed: {enabled: false, world_size: 2, num_runs: 1}
debug: {enabled: true, max_files: -1, max_items_per_file: -1}
retry: {enable_format_validation_retry: true, max_retries: 3}
options: {main_resume: true, resume: false, preprocess_resume: true, delete_existing: false}
logging: {level: INFO, batch_size: 100, progress_report_interval: 10, log_dir: logs}
"""
FLAT_TASK = """\
task_name: flat
description: A task of the first generation.
data:
  input_folder: corpus/en
  output_folder: tagged/run_{run_index}/en
  stat_folder: stats/en
  input_key: text
  prompt_format_key: text
preprocess: {enabled: true, num_files: 0}
model: {config_path: configs/models/m.yaml}
prompt: {config_path: configs/prompts/p.yaml}
concurrency: {max_concurrent_files: 1, max_concurrent_requests: 5, chunk_size: 9}
"""
CHATML_TASK = """\
task_name: chatml_opc
description: The OPC sets as conversations.
distributed: {enabled: false}
logging: {level: INFO, log_dir: logs}
task_type: data_distillation
distillation:
  step: chatml_conversion
  dataset_config_path: configs/distillation/sets.yaml
  input_dir: /mnt/sets
  output_dir: /mnt/prepared/{timestamp}
  num_processes: 100
  keep_raw_data: true
  continue_mode: true
  add_system_prompt: false
  system_prompt: Be brief.
  selected_datasets: [org/a]
"""
MERGE_TASK = """\
task_name: merge_opc
task_type: data_distillation
description: Stage 1 in one file.
distillation:
  step: jsonl_merge
  merge_config_path: configs/distillation/groups.yaml
  base_input_dir: /mnt/prepared
  base_output_dir: /mnt/merged
  chunk_size: 1000
  merge_groups: [one]
"""
GENERATE_TASK = """\
task_name: answer_opc
task_type: data_distillation
description: Answers.
distillation:
  step: generate_response
  response_config_path: configs/models/m.yaml
  input_path: /mnt/merged
  output_path: /mnt/generated
  concurrency: 20
  batch_size: 20
  flush_interval_secs: 2.0
  retry_mode: true
  resume_mode: false
"""
OTHER_GENERATE_TASK = """\
task_name: answer_again
task_type: generate_response
description: The failures once more.
distillation:
  model_config: configs/models/m.yaml
  input_path: /mnt/generated/one_error.jsonl
  output_path: /mnt/generated_again
  batch_size: 30
  flush_interval: 2.0
  retry_mode: false
  resume: true
"""
BATCH = """\
task_name: stage2
task_type: batch_distillation_submit
description: Stage 2 in pieces.
data_split: {input_file: /mnt/all.jsonl, num_chunks: 100}
batch_submit:
  output_base_dir: /mnt/generated
  name_prefix: distill
  concurrency: 40
  batch_size: 30
  siflow: {count_per_pod: 10, resource_pool: eval-cpu, priority: medium, guarantee: false}
  models:
    - {config_path: configs/models/m.yaml, alias: m}
    - {config_path: configs/models/n.yaml, alias: n}
execution: {dry_run: false, auto_split: true}
environment: {env_file: env/store.env, project_root: ., conda_env: base}
post_processing: {auto_merge: false, merge_errors: true}
logging: {level: INFO, log_dir: logs, show_progress: true}
"""
JOIN = """\
task_name: join_stage2
task_type: merge_distillation_results
description: The pieces of each model in one file.
merge: {output_base_dir: /mnt/generated, merge_errors: true, models: [{name: m}]}
"""
SETS = """\
# Two sets.
org/a: {configs: [null, en], format_style: sharegpt, column_mapping: {conversations: turns}}
b.jsonl:
  format_style: prompt_response
  column_mapping: {prompt: question, response: answer}
"""
GROUPS = """\
# One group.
merge_groups:
  - name: one
    output_file: one.jsonl
    input_files: [a/org_a-en-train.jsonl, b/b.jsonl-train.jsonl]
"""
MODEL = {
    "client_config": {
        "base_url": "https://api.deepseek.com/v1",
        "api_key": SECRET,
        "timeout": 600,
        "max_retries": 50,
    },
    "chat_config": {
        "model": "deepseek-chat",
        "temperature": 0.3,
        "stream": True,
        "timeout": 60,
        "enable_thinking": False,
        "reasoning_effort": "low",
    },
}
FIRST_MODEL = {
    "provider": "openai",
    "model_name": "gpt-4o",
    "api_key": SECRET,
    "completions_params": {"temperature": 0, "max_tokens": 900, "stream": False},
}
PROMPT = """\
prompt_template:
  system_text: You judge texts. 你好
  prompt_text: "Rate this.  \\n\\n\\tText: {text}\\nAnswer {{\\"score\\": 1}}\\n"
output_config:
  require_json: true
  json_keys: [score, corpus_type, weight, tags, summary]
  json_key_must_exists: [score, summary]
  json_default_values:
    score: 3
    corpus_type: general
    weight: 0.5
    tags: []
    summary: ""
    forgotten: 1
"""
FIELDS_A21 = """\
task_name task_type description data.input_folder data.output_folder data.stat_folder data.input_key
data.prompt_format_key preprocess.enabled preprocess.script_type preprocess.input_folder
preprocess.output_folder preprocess.max_tokens preprocess.num_proc preprocess.seed
preprocess.num_files preprocess.batch_size preprocess.languages preprocess.group_by_language
preprocess.source_name preprocess.file_pattern preprocess.filters.min_text_length
preprocess.filters.blacklist_patterns preprocess.field_mapping.text.fields
preprocess.transformations.text_cleaning.remove_extra_whitespace model.config_path
prompt.config_path environment.config_path environment.tos_config_path environment.timeout
environment.api_provider concurrency.max_concurrent_files concurrency.max_concurrent_requests
concurrency.chunk_size concurrency.parquet_save_interval distributed.enabled
distributed.world_size distributed.num_runs debug.enabled debug.max_files
debug.max_items_per_file retry.enable_format_validation_retry retry.max_retries
options.main_resume options.resume options.preprocess_resume options.delete_existing logging.level
logging.batch_size logging.progress_report_interval logging.log_dir
"""


def run(*arguments: object) -> Ended:
    return Project(ROOT).run("migrate", *map(str, arguments))


def lines(ended: Ended) -> dict[str, tuple[str, str]]:
    """Field → (treatment, reason); every field once."""
    found = re.findall(r"^(honoured|changed|refused): ([^:\n]+)(?:: (.*))?$", ended.told, re.M)
    counts = Counter(name for _, name, _ in found)
    assert [name for name, count in counts.items() if count > 1] == []
    return {name: (treatment, reason) for treatment, name, reason in found}


class Migrating(Configs):
    """A project of this program beside a folder with old files."""

    def migrate(self, content: Data | str, *, name: str = "old.yaml", to: str) -> Ended:
        old = self.write(f"old/{name}", content)
        return run(old, "--output", self.root / "configs" / to)

    def text(self, name: str) -> str:
        return (self.root / "configs" / name).read_text("utf-8")

    def data(self, name: str) -> Data:
        return load_yaml(self.root / "configs" / name)


@pytest.fixture
def project(tmp_path: Path) -> Migrating:
    made = Migrating(tmp_path)
    made.write(MODEL_PATH, {**MODEL, "client_config": {"base_url": "http://h"}})
    made.write("env/forum.env", "A=1")
    made.write("env/store.env", "B=1")
    return made


# Tasks


def test_a_task_keeps_what_works_in_the_documented_order(project: Migrating):
    ended = project.migrate(TASK, to="tasks/forum.yaml")
    assert ended.code == 0, ended
    spec = load_task(project.root / "configs/tasks/forum.yaml", project.root)
    data = project.data("tasks/forum.yaml")
    assert list(data)[:4] == ["task_name", "task_type", "description", "data"]
    assert list(data["data"]) == ["input_folder", "output_folder", "input_key", "prompt_format_key"]
    assert data["data"]["output_folder"] == "./tagged/{task_name}"
    assert data["concurrency"] == {"max_concurrent_files": 3, "max_concurrent_requests": 40}
    assert data["debug"] == {"enabled": True, "max_files": -1, "max_items_per_file": -1}
    assert (
        data["preprocess"]["field_mapping"] == yaml.safe_load(TASK)["preprocess"]["field_mapping"]
    )
    assert "options" not in data
    assert data["logging"] == {"log_dir": "logs", "level": "INFO", "batch_size": 100}
    assert spec.task.max_files is None


def test_the_text_of_a_task_stays_readable(project: Migrating):
    project.migrate(TASK, to="tasks/forum.yaml")
    text = project.text("tasks/forum.yaml")
    assert text.startswith("# Migrated from old.yaml: ")
    assert "description: |\n  Rates forum posts.\n  论坛帖子评分 🚀\n" in text
    assert str(project.root) not in text


def test_every_field_of_a_task_is_told_once(project: Migrating):
    told = lines(project.migrate(TASK, to="tasks/forum.yaml"))
    assert [name for name in FIELDS_A21.split() if name not in told] == []
    changed = {name for name, (treatment, _) in told.items() if treatment == "changed"}
    assert {
        "data.stat_folder",
        "concurrency.chunk_size",
        "logging.progress_report_interval",
    } <= changed
    assert told["concurrency.max_concurrent_requests"] == ("honoured", "")
    others = ("data.prompt_format_key", "preprocess.max_tokens", "distributed.world_size")
    for name in ("retry.max_retries", "preprocess.num_proc", "debug.max_files", *others):
        assert told[name][0] == "changed", "it means something else than it did"
    assert "-1 means no limit" in told["debug.max_files"][1]


def test_a_relative_folder_is_kept_and_told_what_it_meant(project: Migrating):
    told = lines(project.migrate(TASK, to="tasks/forum.yaml"))
    treatment, reason = told["preprocess.input_folder"]
    assert treatment == "changed"
    assert "was tos://agi-data/forum/raw" in reason
    assert "is now forum/raw below the project root" in reason
    assert project.data("tasks/forum.yaml")["preprocess"]["input_folder"] == "forum/raw"
    assert told["preprocess.output_folder"] == ("honoured", "")


def test_a_flat_task_of_the_first_generation(project: Migrating):
    ended = project.migrate(FLAT_TASK, to="tasks/flat.yaml")
    assert ended.code == 0, ended
    data = project.data("tasks/flat.yaml")
    assert data["data"]["output_folder"] == "tagged/run/en"
    assert data["preprocess"] == {"enabled": True, "num_files": -1, "file_pattern": "*.parquet"}
    assert "{run_index} removed" in lines(ended)["data.output_folder"][1]
    load_task(project.root / "configs/tasks/flat.yaml", project.root)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("/a/{task_name}/{timestamp}", "/a/{task_name}"),
        ("./{timestamp}/b", "./b"),
        ("./x_{timestamp}_y/{run_index}", "./x__y"),
        ("s3://bucket/{timestamp}/b", "s3://bucket/b"),
        ("{timestamp}/b", "b"),
    ],
)
def test_placeholders_leave_a_path(old: str, new: str):
    data = yaml.safe_load(FLAT_TASK)
    data["data"]["input_folder"] = old
    migrated = migrate_file(data, "t.yaml").data
    assert migrated
    assert migrated["data"]["input_folder"] == new


@pytest.mark.parametrize(
    ("place", "value", "advice"),
    [
        ("distributed.num_runs", 5, "one task per run"),
        ("options.delete_existing", True, "run-task --fresh"),
        ("data.output_folder", "tos:/agi-data/out", "write tos://agi-data/out"),
        ("data.inptu_key", "text", "did you mean input_key?"),
        ("debug.max_files", 0, "more than 0"),
        ("shiny", 1, "unknown key"),
    ],
)
def test_a_refused_field_has_a_todo_at_its_place(
    project: Migrating, place: str, value: Any, advice: str
):
    data = yaml.safe_load(TASK)
    *parents, name = place.split(".")
    block = data
    for parent in parents:
        block = block[parent]
    block[name] = value
    ended = project.migrate(data, to="tasks/t.yaml")
    assert ended.code == 1
    treatment, reason = lines(ended)[place]
    assert treatment == "refused"
    assert advice in reason
    assert "look for TODO" in ended.told
    text = project.text("tasks/t.yaml").splitlines()
    row = next(i for i, line in enumerate(text) if f"# TODO {place}: " in line)
    if place.startswith("data."):
        assert text[row + 1].strip() == f"{name}: {value}"
        assert text[row].startswith("  # TODO")


def test_a_missing_field_has_its_todo_too(project: Migrating):
    data = yaml.safe_load(FLAT_TASK)
    del data["task_name"], data["data"]["output_folder"]
    assert project.migrate(data, to="tasks/t.yaml").code == 1
    text = project.text("tasks/t.yaml")
    assert re.search(r"\n# TODO data.output_folder: missing.*\ndata:\n", text)
    assert "# TODO task_name: missing" in text.splitlines()[-1]


def test_an_unknown_task_type_writes_nothing(project: Migrating):
    data = {"task_name": "d", "task_type": "something_else"}
    ended = project.migrate(data, to="tasks/d.yaml")
    assert ended.code == 1
    treatment, reason = lines(ended)["task_type"]
    assert treatment == "refused"
    assert "unknown task type" in reason
    assert "nothing is written" in ended.told
    assert not (project.root / "configs/tasks/d.yaml").exists()


# Batches


def test_a_batch_becomes_a_task_for_each_model(project: Migrating):
    ended = project.migrate(BATCH, to="tasks/batch")
    assert ended.code == 0, ended
    assert project.data("tasks/batch/m.yaml") == {
        "task_name": "stage2_m",
        "task_type": "data_distillation",
        "description": "Stage 2 in pieces.",
        "generate_response": {
            "response_config_path": "configs/models/m.yaml",
            "input_path": "/mnt/all.jsonl",
            "output_path": "/mnt/generated/m",
            "concurrency": 40,
        },
        "environment": {"config_path": "env/store.env"},
    }
    assert project.data("tasks/batch/n.yaml")["task_name"] == "stage2_n"
    told = lines(ended)
    assert set(told) >= {"data_split.num_chunks", "batch_submit.siflow.priority", "logging.level"}
    assert {treatment for treatment, _ in told.values()} == {"changed"}
    for name in ("m", "n"):
        assert f"{project.root}/configs/tasks/batch/{name}.yaml" in ended.out
    refused = project.migrate(BATCH, to="tasks/batch")
    assert refused.code == 2 and "is there already" in refused.err
    load_task(project.root / "configs/tasks/batch/m.yaml", project.root)


def test_a_batch_whose_pieces_are_cut_reads_these(project: Migrating):
    old = with_fields(yaml.safe_load(BATCH), {"execution__auto_split": False})
    project.migrate(old, to="tasks/batch")
    assert project.data("tasks/batch/m.yaml")["generate_response"]["input_path"] == "/mnt/all"


def test_a_batch_on_standard_output(project: Migrating):
    ended = run(project.write("old/batch.yaml", BATCH))
    assert ended.code == 0
    tasks = [each for each in yaml.safe_load_all(ended.out) if each]
    assert [each["task_name"] for each in tasks] == ["stage2_m", "stage2_n"]


def test_a_batch_without_models_and_one_with_a_mistake(project: Migrating):
    old = yaml.safe_load(BATCH)
    ended = project.migrate(with_fields(old, {"batch_submit__models": []}), to="tasks/b")
    assert ended.code == 2 and "batch_submit.models: no list of models" in ended.err
    ended = project.migrate(with_fields(old, {"batch_submit__concurrency": -1}), to="tasks/b")
    assert ended.code == 1
    assert lines(ended)["generate_response.concurrency"][0] == "refused"


def test_joining_results_becomes_commands(project: Migrating):
    ended = project.migrate(JOIN, to="tasks/join")
    assert ended.code == 0, ended
    assert "run: modelcall join /mnt/generated/m\n" in ended.out
    assert not (project.root / "configs/tasks/join").exists()


def test_a_file_of_no_kind_is_refused(project: Migrating):
    path = write(project.root / "x.yaml", {"siflow": {}})
    ended = run(path)
    assert ended.code == 2
    assert "not a task, model, prompt, data set or merge group file" in ended.told


# Distillation


def test_a_step_keeps_the_form_that_it_has(project: Migrating):
    ended = project.migrate(CHATML_TASK, to="tasks/chatml.yaml")
    assert ended.code == 0, ended
    data = project.data("tasks/chatml.yaml")
    names = ["task_name", "task_type", "description", "distillation", "distributed", "logging"]
    assert list(data) == names
    assert data["distillation"] == {
        "step": "chatml_conversion",
        "dataset_config_path": "configs/distillation/sets.yaml",
        "input_dir": "/mnt/sets",
        "output_dir": "/mnt/prepared",
        "keep_raw_data": True,
        "add_system_prompt": False,
        "system_prompt": "Be brief.",
        "selected_datasets": ["org/a"],
    }
    told = lines(ended)
    assert told["distillation.step"] == told["distillation.input_dir"] == ("honoured", "")
    assert told["distillation.num_processes"][0] == "changed"
    assert told["distillation.continue_mode"][1] == "left out: true is what happens anyway"
    assert "{timestamp} removed" in told["distillation.output_dir"][1]
    assert "object" not in ended.told, "the old system kept these folders on disk"


def test_a_merge_loses_its_chunks(project: Migrating):
    ended = project.migrate(MERGE_TASK, to="tasks/merge.yaml")
    assert ended.code == 0, ended
    assert "chunk_size" not in project.data("tasks/merge.yaml")["distillation"]
    assert lines(ended)["distillation.chunk_size"] == ("changed", "left out: rows are streamed")


def test_both_key_sets_of_generate_response(project: Migrating):
    first = project.migrate(GENERATE_TASK, to="tasks/first.yaml")
    second = project.migrate(OTHER_GENERATE_TASK, to="tasks/second.yaml")
    assert (first.code, second.code) == (0, 0), (first, second)
    told = lines(first)
    assert "modelcall retry" in told["distillation.retry_mode"][1]
    assert "run-task --fresh" in told["distillation.resume_mode"][1]
    assert told["distillation.concurrency"] == ("honoured", "")
    for name in ("retry_mode", "output_path"):
        assert told[f"distillation.{name}"][0] == "changed", "it means something else than it did"
    treatment, reason = told["distillation.input_path"]
    assert treatment == "changed" and "prompt_mode: first_message" in reason
    assert project.data("tasks/second.yaml")["distillation"] == {
        "model_config": "configs/models/m.yaml",
        "input_path": "/mnt/generated/one_error.jsonl",
        "output_path": "/mnt/generated_again",
        "concurrency": 30,
        "resume": True,
        "retry_mode": False,
    }
    assert lines(second)["distillation.concurrency"][0] == "changed"
    assert lines(second)["distillation.flush_interval"][0] == "changed"
    for name in ("first", "second"):
        spec = load_task(project.root / f"configs/tasks/{name}.yaml", project.root)
        assert spec.generator
        assert {warning.file for warning in spec.warnings} == {"configs/models/m.yaml"}


def test_a_mistake_in_a_step_has_a_todo_at_its_place(project: Migrating):
    data = yaml.safe_load(OTHER_GENERATE_TASK)
    data["distillation"]["conurrency"] = 4
    del data["distillation"]["output_path"]
    ended = project.migrate(data, to="tasks/t.yaml")
    assert ended.code == 1
    text = project.text("tasks/t.yaml")
    assert re.search(r"  # TODO distillation.conurrency: .*\n  conurrency: 4", text)
    assert re.search(r"# TODO distillation.output_path: missing.*\ndistillation:", text)


@pytest.mark.parametrize(("text", "name"), [(SETS, "sets"), (GROUPS, "groups")])
def test_data_sets_and_merge_groups_are_taken_as_they_are(project: Migrating, text: str, name: str):
    ended = project.migrate(text, to=f"distillation/{name}.yaml")
    assert ended.code == 0, ended
    assert project.text(f"distillation/{name}.yaml") == text


def test_mistakes_in_data_sets_and_merge_groups_are_refused(project: Migrating):
    sets = yaml.safe_load(SETS)
    sets["org/a"]["column_mapping"] = {"conversation": "turns"}
    told = lines(project.migrate(sets, to="distillation/s.yaml"))
    assert told["org/a.column_mapping.conversation"] == (
        "refused",
        "unknown key; did you mean conversations?",
    )
    groups = yaml.safe_load(GROUPS)
    groups["merge_groups"][0]["output_file"] = "/mnt/one.jsonl"
    told = lines(project.migrate(groups, to="distillation/g.yaml"))
    assert told["merge_groups[0].output_file"][0] == "refused"


# Models


def test_a_model_loses_its_key_and_its_timeout(project: Migrating):
    ended = project.migrate(MODEL, to="models/ds.yaml")
    assert ended.code == 0, ended
    data = project.data("models/ds.yaml")
    assert data["client_config"]["api_key"] == "${DEEPSEEK_API_KEY}"
    assert data["chat_config"] == {
        "model": "deepseek-chat",
        "temperature": 0.3,
        "stream": True,
        "enable_thinking": False,
        "reasoning_effort": "low",
    }
    told = lines(ended)
    assert "in .env" in told["client_config.api_key"][1]
    assert told["chat_config.timeout"][0] == "changed"
    assert told["chat_config.stream"][0] == "honoured"
    treatment, reason = told["client_config.max_retries"]
    assert treatment == "changed" and "51 times at most" in reason
    assert "passed to the endpoint" in told["chat_config.enable_thinking"][1]
    load_model(project.root / "configs/models/ds.yaml", project.root)


def test_a_model_of_the_first_generation(project: Migrating):
    ended = project.migrate(FIRST_MODEL, name="big one.yaml", to="models/gpt.yaml")
    assert ended.code == 0, ended
    assert project.data("models/gpt.yaml") == {
        "client_config": {"base_url": "https://api.openai.com/v1", "api_key": "${OPENAI_API_KEY}"},
        "chat_config": {"model": "gpt-4o", "temperature": 0, "max_tokens": 900, "stream": False},
    }
    told = lines(ended)
    assert told["completions_params.max_tokens"] == ("changed", "now chat_config.max_tokens")
    assert {"provider", "model_name", "api_key", "completions_params.stream"} <= set(told)
    load_model(project.root / "configs/models/gpt.yaml", project.root)


def test_an_unknown_provider_reads_its_address_from_the_environment(project: Migrating):
    old = {"provider": "house", "model_name": "m", "completions_params": None}
    assert project.migrate(old, to="models/h.yaml").code == 0
    client = project.data("models/h.yaml")["client_config"]
    assert client == {"base_url": "${BASE_URL}", "api_key": "${API_KEY}"}


def test_secrets_in_headers_and_proxies_become_references(project: Migrating):
    headers = {"X-Team": "ours", "Cookie": "abcdef", "Authorization": "Bearer ${TOKEN}"}
    client = {**MODEL["client_config"], "headers": headers, "proxy": "http://me:abcdef@p:1"}
    ended = project.migrate(MODEL | {"client_config": client}, to="models/ds.yaml")
    assert ended.code == 0, ended
    assert "abcdef" not in ended.told
    data = project.data("models/ds.yaml")["client_config"]
    assert data["headers"] == headers | {"Cookie": "${DEEPSEEK_COOKIE}"}
    assert data["proxy"] == "${DEEPSEEK_PROXY}"
    load_model(project.root / "configs/models/ds.yaml", project.root)


def test_json_becomes_yaml(project: Migrating):
    ended = project.migrate(MODEL, name="old.json", to="models/ds.yaml")
    assert ended.code == 0
    ours = {**MODEL, "client_config": {"base_url": "http://h/v1", "api_key": "EMPTY"}}
    del ours["chat_config"]
    ours["chat_config"] = {"model": "m"}
    ended = project.migrate(ours, name="ours.json", to="models/ours.yaml")
    assert "nothing to change" in ended.told
    assert "client_config:\n" in project.text("models/ours.yaml")


@pytest.mark.parametrize("key", ["EMPTY", "not-needed", "${MY_KEY}"])
def test_what_is_no_secret_stays(project: Migrating, key: str):
    old = copy.deepcopy(MODEL)
    old["client_config"]["api_key"] = key
    project.migrate(old, to="models/m2.yaml")
    assert project.data("models/m2.yaml")["client_config"]["api_key"] == key


@pytest.mark.parametrize(
    ("changes", "variable", "exit_code"),
    [
        ({"client_config": {"base_url": "https://api.anthropic.com/v1"}}, "ANTHROPIC_API_KEY", 0),
        ({"client_config": {"base_url": "http://gpu-7:8000/v1"}}, "MODEL_3_B_API_KEY", 0),
        (
            {"client_config": {"base_url": f"http://me:{PLAIN_SECRET}@h/v1"}},
            "MODEL_3_B_BASE_URL",
            0,
        ),
        ({"client_config": {"api_key": "${K:-" + SECRET + "}"}}, "DEEPSEEK_API_KEY", 0),
        ({"client_config": {"api_key": 271828182845}}, "DEEPSEEK_API_KEY", 0),
        ({"client_config": {"api_keys": [PLAIN_SECRET]}}, "DEEPSEEK_API_KEYS", 1),
        ({"client_config": {"api_keys": {"a": PLAIN_SECRET}}}, "DEEPSEEK_A", 1),
        ({"client_config": {"base_url": "http://u:a/correct-horse@h:1"}}, "MODEL_3_B_BASE_URL", 0),
        ({"chat_config": {"api_key": PLAIN_SECRET}}, "MODEL_3_B_API_KEY", 1),
        ({"chat_config": {"extra_headers": {"X-Api-Key": PLAIN_SECRET}}}, "X_API_KEY", 1),
        ({"chat_config": {"extra_body": {"who": f"Bearer {SECRET}"}}}, "MODEL_3_B_WHO", 1),
        ({"chat_config": {"stop": [SECRET]}}, "MODEL_3_B_STOP", 1),
    ],
)
def test_a_secret_is_nowhere(
    project: Migrating, changes: dict[str, Data], variable: str, exit_code: int
):
    old = copy.deepcopy(MODEL)
    for block, fields in changes.items():
        old[block] |= fields
    ended = project.migrate(old, name="3-b.yaml", to="models/m3.yaml")
    assert ended.code == exit_code, ended
    text = project.text("models/m3.yaml")
    for shown in (ended.told, text):
        assert not re.search(rf"{SECRET}|correct.horse|271828182845", shown)
    assert f"{variable}}}" in text


def test_a_secret_in_a_task_or_in_a_comment_is_nowhere(project: Migrating):
    task = yaml.safe_load(FLAT_TASK)
    task["data"]["input_folder"] = f"s3://me:{PLAIN_SECRET}@bucket/{{timestamp}}"
    task["environment"] = {"api_key": PLAIN_SECRET}
    ended = project.migrate(task, to="tasks/t.yaml")
    assert PLAIN_SECRET not in ended.told + project.text("tasks/t.yaml")
    ours = f"# api_key: {SECRET}\n" + project.text("models/m.yaml").replace("50", "3")
    ended = project.migrate(ours, to="models/m4.yaml")
    assert SECRET not in ended.told + project.text("models/m4.yaml")


# Prompts


def test_a_prompt_gets_types_and_loses_numeric_defaults(project: Migrating):
    ended = project.migrate(PROMPT, to="prompts/r.yaml")
    assert ended.code == 0, ended
    data = project.data("prompts/r.yaml")
    assert data["prompt_template"] == yaml.safe_load(PROMPT)["prompt_template"]
    output = data["output_config"]
    assert output["json_schema"]["properties"] == {
        "score": {"type": "integer"},
        "corpus_type": {"type": "string"},
        "weight": {"type": "number"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "summary": {"type": "string"},
    }
    assert output["json_default_values"] == {"corpus_type": "general", "tags": []}
    told = lines(ended)
    for key in ("score", "weight"):
        reason = told[f"output_config.json_default_values.{key}"][1]
        assert reason == "left out: a default never becomes a score"
    assert "required" in told["output_config.json_default_values.summary"][1]
    assert "not in json_keys" in told["output_config.json_default_values.forgotten"][1]
    text = project.text("prompts/r.yaml")
    assert re.search(r"# add the scale: minimum and maximum\n +score:\n", text)
    assert "prompt_text: |\n    Rate this.  \n\n    \tText: {text}\n" in text
    assert "你好" in text
    parsed, problems = parse_prompt(data, "r.yaml")
    assert parsed
    assert problems == []


def test_a_prompt_that_declares_keys_of_no_json_is_refused(project: Migrating):
    ended = project.migrate(PROMPT.replace("true", "false"), to="prompts/r.yaml")
    assert ended.code == 1
    assert "# TODO output_config.require_json: " in project.text("prompts/r.yaml")


@given(st.text(st.characters(codec="utf-8"), min_size=1))
def test_any_text_survives(tmp_path_factory: pytest.TempPathFactory, words: str):
    folder = tmp_path_factory.mktemp("texts")
    text = words.replace("{", "").replace("}", "") + "."
    template = {"system_text": text, "prompt_text": f" {text}\n \n"}
    old = {"prompt_template": template, "output_config": {"json_default_values": {"x": 1}}}
    path = folder / "p.json"
    path.write_text(json.dumps(old), "utf-8")
    assert run(path, "--output", folder / "new.yaml").code == 0
    assert load_yaml(folder / "new.yaml")["prompt_template"] == template


# The command


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_a_file_of_ours_stays_as_it_is(path: Path):
    ended = run(path)
    assert ended.code == 0, ended
    assert "nothing to change" in ended.told
    assert ended.out == path.read_text("utf-8")


DISTILLING = [CHATML_TASK, MERGE_TASK, GENERATE_TASK, OTHER_GENERATE_TASK]


@pytest.mark.parametrize("old", [TASK, FLAT_TASK, MODEL, FIRST_MODEL, PROMPT, *DISTILLING])
def test_migrating_twice_changes_nothing_more(project: Migrating, old: Data | str):
    project.migrate(old, to="tasks/once.yaml")
    once = project.text("tasks/once.yaml")
    again = project.migrate(once, name="once.yaml", to="tasks/twice.yaml")
    assert "nothing to change" in again.told
    assert project.text("tasks/twice.yaml") == once


def test_an_existing_file_is_overwritten_by_force_only(project: Migrating):
    old = project.write("old.yaml", FLAT_TASK)
    new = project.write("new.yaml", "mine: 1\n")
    refused = run(old, "--output", new)
    assert (refused.code, "add --force to replace" in refused.err) == (2, True), refused
    assert new.read_text() == "mine: 1\n"
    assert run(old, "--output", new, "--force").code == 0
    assert "task_name: flat" in new.read_text()
    assert run(old, "--output", project.root / "new.json").code == 2


def test_the_file_and_the_list_are_apart(project: Migrating):
    ended = run(project.write("old/m.yaml", MODEL))
    assert ended.code == 0
    model, _ = parse_model(yaml.safe_load(ended.out), "m.yaml")
    assert model
    assert "changed: client_config.api_key: " in ended.told
    assert SECRET not in ended.told


# What becomes of them runs


def migrated(project: Project, old: str | Data, to: str = "tasks/old.yaml") -> Path:
    """The new file, or the folder of a batch's; `ROOT` in a text is the project's folder."""
    path = write(project.root / "old.yaml", old)
    path.write_text(path.read_text().replace("ROOT", str(project.root)))
    ended = project.run("migrate", path, "--output", f"configs/{to}")
    assert ended.code == 0, ended
    return project.root / "configs" / to


SCORING = with_fields(
    yaml.safe_load(TASK),
    {
        "data__input_folder": "ROOT/none",
        "data__output_folder": "ROOT/tagged/{timestamp}",
        "preprocess__input_folder": "ROOT/data/in",
        "preprocess__output_folder": "ROOT/clean",
        "preprocess__filters__min_text_length": 3,
        "preprocess__field_mapping__text": "text",
        "data__input_key": "content_truncate_32k",
        "model__config_path": MODEL_FILE,
        "prompt__config_path": PROMPT_FILE,
        "environment": ...,
    },
)
CHATS = [{"messages": [{"role": "user", "content": f"Question {n}?"}]} for n in range(3)]


def test_an_old_scoring_task_runs(bare: Project):
    bare.write_input("a.jsonl", [{"text": "A text of some length.", "title": "t", "body": "b"}])
    task = migrated(bare, SCORING)
    assert bare.run("run-task", task).code == 0
    (row,) = read_rows(bare.root / "tagged/a.parquet")
    assert row["api_status"] == "success"


def test_old_conversion_merge_and_generation_run(distilling: Project):
    distilling.write_chain()
    distilling.task_file.unlink()
    said = [{"from": "human", "value": "h"}, {"from": "gpt", "value": "g"}]
    distilling.write_dataset("Chats", [{"conversations": said}])
    distilling.write_dataset("Ins", [{"instruction": "i", "input": "", "output": "o"}])
    convert = {
        "distillation.input_dir": "ROOT/data/sets",
        "distillation.output_dir": "ROOT/chatml/{timestamp}",
        "distillation.dataset_config_path": "configs/distillation/datasets.yaml",
        "distillation.selected_datasets": ...,
    }
    merge = {
        "distillation.merge_config_path": "configs/distillation/groups.yaml",
        "distillation.base_input_dir": "ROOT/chatml",
        "distillation.base_output_dir": "ROOT/merged",
        "distillation.merge_groups": ...,
    }
    generate = {
        "distillation.response_config_path": MODEL_FILE,
        "distillation.input_path": "ROOT/merged",
        "distillation.output_path": "ROOT/generated",
    }
    steps = ((CHATML_TASK, convert), (MERGE_TASK, merge), (GENERATE_TASK, generate))
    for old, changes in steps:
        data = with_fields(yaml.safe_load(old), changes)
        task = migrated(distilling, data, f"tasks/{data['task_name']}.yaml")
        ended = distilling.run("run-task", task)
        assert ended.code == 0, ended
    rows = read_rows(distilling.root / "generated/all.jsonl")
    assert len(rows) == 2 and all(row["response"] for row in rows)


def test_the_other_generation_runs(bare: Project):
    write_rows(bare.root / "chats_error.jsonl", CHATS)
    changes = {
        "distillation.model_config": MODEL_FILE,
        "distillation.input_path": "ROOT/chats_error.jsonl",
        "distillation.output_path": "ROOT/again",
    }
    task = migrated(bare, with_fields(yaml.safe_load(OTHER_GENERATE_TASK), changes))
    assert bare.run("run-task", task).code == 0
    assert len(read_rows(bare.root / "again/chats_error.jsonl")) == 3


@pytest.mark.parametrize("is_cut", [False, True])
def test_an_old_batch_runs_and_its_results_are_joined(bare: Project, is_cut: bool):
    write_rows(bare.root / "all.jsonl", CHATS)
    assert bare.run("split", "all.jsonl", "--chunks", "2").code == 0
    changes = {
        "data_split.input_file": "ROOT/all.jsonl",
        "execution.auto_split": not is_cut,
        "batch_submit.output_base_dir": "ROOT/generated",
        "batch_submit.models": [{"config_path": MODEL_FILE, "alias": "m"}],
        "environment": ...,
    }
    folder = migrated(bare, with_fields(yaml.safe_load(BATCH), changes), "tasks/batch")
    assert bare.run("run-task", folder / "rehearsal.yaml").code == 0
    where = {"merge.output_base_dir": str(bare.root / "generated")}
    where["merge.models"] = [{"name": "rehearsal"}]
    joining = write(bare.root / "join.yaml", with_fields(yaml.safe_load(JOIN), where))
    (command,) = re.findall("^run: modelcall (.*)$", bare.run("migrate", joining).told, re.M)
    assert bare.run(*command.split()).code == 0
    assert len(read_rows(bare.root / "generated/rehearsal_merged.jsonl")) == 3


# Whatever the old files hold

VALUES = st.none() | st.booleans() | st.integers(-2, 60) | st.sampled_from(["", "a/{timestamp}"])
PARSERS = [
    (yaml.safe_load(TASK), parse_task),
    (yaml.safe_load(FLAT_TASK), parse_task),
    (MODEL, parse_model),
    (FIRST_MODEL, parse_model),
    (yaml.safe_load(PROMPT), parse_prompt),
    *((yaml.safe_load(text), parse_task) for text in DISTILLING),
    (yaml.safe_load(SETS), parse_datasets),
    (yaml.safe_load(GROUPS), parse_merge_groups),
]


@st.composite
def parts(draw: st.DrawFn, data: Data) -> Data:
    """Some of the fields, a few of them with another value."""
    result: Data = {}
    for name, value in data.items():
        fate = draw(st.integers(0, 9))
        if isinstance(value, dict) and fate:
            result[name] = draw(parts(value))
        elif fate == 1:
            result[name] = draw(VALUES)
        elif fate > 2:
            result[name] = value
    return result


@pytest.mark.parametrize(("old", "parse"), PARSERS)
@given(data=st.data())
@pytest.mark.slow
def test_any_part_of_an_old_file_validates_or_is_refused(
    tmp_path_factory: pytest.TempPathFactory, old: Data, parse: Any, data: st.DataObject
):
    folder = tmp_path_factory.mktemp("parts")
    ended = run(write(folder / "old.yaml", data.draw(parts(old))))
    if ended.code == 2:
        assert re.search(r"not a task, model, prompt, data|a mapping", ended.told)
        return
    assert SECRET not in ended.told
    if ended.code:
        assert "\nrefused: " in f"\n{ended.told}"
    if not ended.out:
        assert lines(ended).keys() == {"task_type"}
        return
    new = write(folder / "new.yaml", ended.out)
    valid = parse(load_yaml(new), "new.yaml")[0] is not None
    assert valid or ended.code == 1
    if ended.code == 0:
        again = run(new)
        assert again.out == ended.out
        assert "nothing to change" in again.told
