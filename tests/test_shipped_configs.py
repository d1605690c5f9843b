"""The files below configs/: valid, commented, and each runs."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pytest
from project import TASK, Project, Row, read_rows, some_rows, write_rows

from modelcall_assets.cli.main import modelcall
from modelcall_assets.config import Block
from modelcall_assets.config.catalog import (
    load_catalog,
    load_model,
    load_task,
    parse_task,
    task_files,
)
from modelcall_assets.config.datasets import MAPPING_KEYS, parse_datasets, parse_merge_groups
from modelcall_assets.config.distillation import DistillationTask
from modelcall_assets.config.files import load_yaml
from modelcall_assets.config.prompt import PromptConfig, parse_prompt
from modelcall_assets.config.steps import SourcesStep
from modelcall_assets.config.task import ScoringTask
from modelcall_assets.defs import project_definitions
from modelcall_assets.rehearsal import RehearsalServer
from modelcall_assets.stages.preprocessed import Preprocessed
from modelcall_assets.stages.recipe import Worker
from modelcall_assets.stages.task import Task

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"
FILES = sorted(path for path in CONFIGS.rglob("*") if path.is_file())
YAMLS = [path for path in FILES if path.suffix == ".yaml"]
TEMPLATES = CONFIGS / "tasks/templates"
TEMPLATE = TEMPLATES / "data_scoring_template.yaml"
DISTILLATION_TEMPLATE = TEMPLATES / "data_distillation_template.yaml"
STEP_TEMPLATES = {
    f"{step}_template": step for step in ("chatml_conversion", "jsonl_merge", "generate_response")
}
KEYS = ("OPENAI_API_KEY", "DEEPSEEK_API_KEY", "ANTHROPIC_API_KEY")

LINKS = {
    "chatml_conversion": None,
    "jsonl_merge": "chatml_conversion",
    "generate_response": "jsonl_merge",
    "chatml_conversion_with_system": None,
    "jsonl_merge_qa": "chatml_conversion_with_system",
    "generate_response_retry": None,
    "distillation_chain": None,
}
"""Which task a distilling one reads from."""

COLUMN_SHAPES = [
    {"prompt": "instruction", "response": "output"},
    {"prompt": "input", "response": "output"},
    {"prompt": "problem", "response": "answer"},
    {"prompt": "problem", "response": "generated_solution"},
    {"prompt": "prompt", "response": "response"},
    {"prompt": "instruction", "input": "input", "response": "output"},
    {"messages": "conversation"},
    {"messages": "messages"},
    {"conversations": "conversations"},
    {"prompt_text": "prompt_text"},
]
"""The shapes of columns that the shipped data sets show."""

INPUT_COLUMNS = {
    "demo_code_quality": {"id", "text", "path"},
    "github_code_rating": {"id", "text"},
    "en_corpus_rating": {"id", "text"},
    "distributed_rating": {"id", "text"},
    "data_scoring/github_raw_code_with_preprocess": {"content", "path"},
    "data_scoring/filter_rendergit_quality_rating": {"text", "lg"},
    "data_scoring/rendergit_quality_rating": {"id", "path", "uri", "text"},
    "data_scoring/repomix_quality_rating": {"id", "path", "uri", "text"},
}
"""What the comments of a task say of its input."""

RATINGS = {
    "code_corpus_rating_v0.3": (
        {"code_corpus_description_and_sample"},
        {"score", "quality_tags", "main_languages", "recommended_use_case"},
        {"score"},
    ),
    "en_corpus_rating_v0.1": (
        {"text"},
        {"score", "corpus_type", "main_languages", "quality_tags", "recommended_use_case"},
        {"score"},
    ),
    "repo_packaging_quality_rating_v1.0": (
        {
            *("repo_full_name", "language", "files_with_content", "total_lines"),
            *("has_readme", "has_license", "has_gitignore", "content_truncate_32k"),
        },
        REPO_KEYS := {
            *("overall_score", "completeness_coverage_score", "structural_organization_score"),
            *("code_quality_integrity_score", "documentation_quality_score"),
            *("llm_usability_score", "contextual_self_containment_score"),
            "overall_quality_summary",
        },
        REPO_KEYS,
    ),
}
"""Placeholders, keys and required keys of each prompt."""


@pytest.fixture(autouse=True)
def no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for name in KEYS:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def shipped(bare: Project, monkeypatch: pytest.MonkeyPatch) -> Project:
    """With the shipped configs, and without this checkout's `.env` and data."""
    shutil.rmtree(bare.root / "configs")
    shutil.copytree(CONFIGS, bare.root / "configs")
    monkeypatch.chdir(bare.root)
    return bare


def shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def prompt_of(name: str) -> PromptConfig:
    file = CONFIGS / f"prompts/{name}.yaml"
    prompt, problems = parse_prompt(load_yaml(file), file.name)
    assert prompt and not problems
    return prompt


def words_of(prompt: PromptConfig) -> str:
    return f"{prompt.prompt_template.system_text}\n{prompt.prompt_template.prompt_text}"


def leaves(model: type[Block], prefix: str = "") -> Iterator[str]:
    for name, info in model.model_fields.items():
        arms = get_args(info.annotation) or (info.annotation,)
        blocks = [arm for arm in arms if isinstance(arm, type) and issubclass(arm, Block)]
        if blocks and set(arms) <= {*blocks, type(None)}:
            yield from leaves(blocks[0], f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def written(data: dict[str, Any], names: set[str], prefix: str = "") -> Iterator[str]:
    for name, value in data.items():
        path = f"{prefix}{name}"
        if path in names:
            yield path
        else:
            yield from written(value, names, f"{path}.")


class TestAll:
    def test_the_whole_folder_passes(self) -> None:
        ended = Project(ROOT).run("check")
        assert ended.code == 0, ended
        assert f"{len(YAMLS)} files checked: 0 errors" in ended.out

    @pytest.mark.parametrize("path", YAMLS, ids=shown)
    def test_each_file_passes_and_is_commented(self, path: Path) -> None:
        ended = Project(ROOT).run("check", path)
        assert ended.code == 0, ended
        assert path.read_text().startswith("# ")

    @pytest.mark.parametrize("path", FILES, ids=shown)
    def test_no_secret_is_in_a_file(self, path: Path) -> None:
        text = path.read_text()
        assert not re.search(
            r"\b(sk|pat|gh[a-z]|AKIA)[-_]?[A-Za-z0-9]{16,}|Bearer |://[^/\s]*@", text
        )
        keys = re.findall(r"^ *api_key: *(\S+)", text, re.MULTILINE)
        allowed = {"EMPTY", "not-needed", *(f"${{{name}}}" for name in KEYS)}
        assert set(keys) <= allowed

    @pytest.mark.parametrize("name", ["openai", "deepseek", "dpsk-v3-0526", "anthropic"])
    def test_a_model_of_a_provider_has_no_invented_price(self, name: str) -> None:
        prices = load_model(CONFIGS / f"models/{name}.yaml", ROOT).prices
        assert prices.usd_per_million_input_tokens is prices.usd_per_million_output_tokens is None

    def test_the_page_names_every_task_and_its_links_and_commands_exist(self) -> None:
        page = (CONFIGS / "tasks/README.md").read_text()
        links = re.findall(r"\]\(([^)]+)\)", page)
        assert [link for link in links if not (CONFIGS / "tasks" / link).exists()] == []
        assert {path.name for path in task_files(ROOT)} <= {Path(link).name for link in links}
        commands = set(re.findall(r"modelcall ([a-z-]+) ", page))
        assert {"check", "plan", "rehearse", "try", "run-task"} <= commands <= {*modelcall.commands}


class TestTasks:
    def test_all_of_them_load(self) -> None:
        catalog = load_catalog(ROOT)
        assert {spec.name for spec in catalog.tasks} >= {Path(name).name for name in INPUT_COLUMNS}
        assert not catalog.broken
        project_definitions(catalog)

    def test_names_are_those_of_the_files_and_no_folder_is_shared(self) -> None:
        tasks = [parse_task(load_yaml(path), shown(path))[0] for path in task_files(ROOT)]
        named = {task.task_name: task for task in tasks if task}
        assert set(named) == {path.stem for path in task_files(ROOT)}
        used = list[str]()
        for task in named.values():
            if isinstance(task, DistillationTask):
                used += task.stage_folders.values()
                continue
            used += [task.data.input_folder, task.data.output_folder]
            used += filter(None, [task.preprocess.output_folder])
        assert len(set(used)) == len(used)
        assert all(folder.startswith("data/") for folder in used)

    @pytest.mark.parametrize("value", [None, ""], ids=["unset", "empty"])
    def test_a_missing_key_is_a_warning_of_check_and_stops_run_task(
        self, shipped: Project, value: str | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if value is not None:
            monkeypatch.setenv("OPENAI_API_KEY", value)
        task = "configs/tasks/en_corpus_rating.yaml"
        checked = shipped.run("check", task)
        assert checked.code == 0
        assert "warning: configs/models/openai.yaml:client_config.api_key: " in checked.out
        assert "cannot run until ${OPENAI_API_KEY} has a value" in checked.out
        ended = shipped.run("run-task", task)
        assert (ended.code, "OPENAI_API_KEY" in ended.err) == (2, True), ended

    @pytest.mark.parametrize("name", INPUT_COLUMNS)
    def test_the_documented_columns_fill_the_prompt(self, name: str) -> None:
        spec = load_task(CONFIGS / f"tasks/{name}.yaml", ROOT)
        columns = set(INPUT_COLUMNS[name])
        if (stage := Task(spec).find(Preprocessed)) and (recipe := stage.recipe):
            schema = pa.schema([(column, pa.string()) for column in columns])
            columns = set(Worker(recipe, schema).schema.names)
        assert spec.task.data.input_key in columns
        assert spec.prompt.placeholders <= columns | {spec.task.data.prompt_format_key}
        assert spec.task.data.prompt_format_key in spec.prompt.placeholders


class TestDistillation:
    def test_locations_that_fit_together_make_one_graph(self) -> None:
        specs = {spec.name: spec for spec in load_catalog(ROOT).tasks if spec.name in LINKS}
        assert {
            name: spec.link.spec.name if spec.link else None for name, spec in specs.items()
        } == LINKS
        stages = specs["distillation_chain"].task.stage_folders
        assert [*stages] == ["chatml", "merged", "responses", "scores"]

    @pytest.mark.parametrize("name", LINKS)
    def test_data_that_is_not_there_is_one_warning(self, shipped: Project, name: str) -> None:
        checked = shipped.run("check", f"configs/tasks/data_distillation/{name}.yaml")
        assert checked.code == 0, checked
        own = [line for line in checked.out.splitlines() if f"{name}.yaml:" in line]
        expected = 0 if LINKS[name] == "jsonl_merge" else 1
        assert len(own) == expected, checked
        assert all("yet" in line for line in own)

    def test_each_step_is_written_with_the_old_names(self) -> None:
        for name in LINKS:
            data = load_yaml(CONFIGS / f"tasks/data_distillation/{name}.yaml")
            assert ("distillation" in data) == (name != "distillation_chain")

    def test_the_data_sets_show_every_style_and_shape_of_columns(self) -> None:
        file = CONFIGS / "distillation/datasets.yaml"
        datasets, problems = parse_datasets(load_yaml(file), file.name)
        assert datasets and not problems
        assert {dataset.format_style for dataset in datasets.values()} == set(MAPPING_KEYS)
        mappings = [dataset.column_mapping for dataset in datasets.values()]
        assert [shape for shape in COLUMN_SHAPES if shape not in mappings] == []

    def test_the_merge_groups_are_those_of_the_tasks(self) -> None:
        file = CONFIGS / "distillation/merge_groups.yaml"
        groups, problems = parse_merge_groups(load_yaml(file), file.name)
        assert groups and not problems
        assert {group.name: len(group.input_files) for group in groups} == {
            "opc-sft-stage1": 3,
            "opc-sft-stage2": 4,
            "qa-train-data": 2,
        }
        assert groups[2].output_file == "qa_train_data_chatml.jsonl"
        assert [name[:5] for name in groups[2].input_files] == ["qa_zh", "qa_en"]


class TestTemplate:
    def test_it_is_no_task(self) -> None:
        assert TEMPLATE not in task_files(ROOT)
        assert not any("my_task" in spec.name for spec in load_catalog(ROOT).tasks)

    def test_it_shows_every_field_and_its_default(self) -> None:
        data = load_yaml(TEMPLATE)
        names = set(leaves(ScoringTask))
        assert set(written(data, names)) == names
        required = {
            "task_name": data["task_name"],
            "data": {name: data["data"][name] for name in ("input_folder", "output_folder")},
            "model": data["model"],
            "prompt": data["prompt"],
        }
        template, problems = parse_task(data, "template")
        smallest, _ = parse_task(required, "smallest")
        assert not problems
        assert template == smallest
        lines = [line for line in TEMPLATE.read_text().splitlines() if "REQUIRED." in line]
        assert len(lines) == 5

    def test_that_of_distillation_shows_every_field_and_its_default(self) -> None:
        """But for sources, which would stand in place of another step."""
        data = load_yaml(DISTILLATION_TEMPLATE)
        of_sources = load_yaml(TEMPLATES / "evaluation_template.yaml")["sources"]
        assert of_sources.keys() == SourcesStep.model_fields.keys()
        names = {name for name in leaves(DistillationTask) if not name.startswith("sources.")}
        assert set(written(data, names)) == names
        required = {name: data[name] for name in ("task_name", "task_type")}
        for block, fields in {
            "chatml_conversion": ("dataset_config_path", "input_dir", "output_dir"),
            "jsonl_merge": ("merge_config_path", "base_output_dir"),
            "generate_response": ("response_config_path", "output_path"),
            "scores": ("model", "prompt", "output_dir", "prompt_format_key"),
        }.items():
            required[block] = {name: data[block][name] for name in fields}
        template, problems = parse_task(data, "template")
        smallest, _ = parse_task(required, "smallest")
        assert not problems
        assert template == smallest
        lines = DISTILLATION_TEMPLATE.read_text().splitlines()
        assert len([line for line in lines if "REQUIRED." in line]) == 13

    @pytest.mark.parametrize(("name", "step"), STEP_TEMPLATES.items())
    def test_that_of_a_step_shows_its_fields_and_their_defaults(self, name: str, step: str) -> None:
        path = TEMPLATES / f"{name}.yaml"
        data = load_yaml(path)
        whole = load_yaml(DISTILLATION_TEMPLATE)[step]
        assert list(data["distillation"]) == ["step", *whole]
        marked = re.findall(r"^ +(\w+): .*# REQUIRED\.", path.read_text(), re.MULTILINE)
        required = {field: data["distillation"][field] for field in ("step", *marked)}
        template, problems = parse_task(data, "template")
        smallest, _ = parse_task({**data, "distillation": required}, "smallest")
        assert not problems
        assert template == smallest

    @pytest.mark.parametrize(
        "path",
        [TEMPLATE, DISTILLATION_TEMPLATE, *(TEMPLATES / f"{n}.yaml" for n in STEP_TEMPLATES)],
    )
    def test_a_copy_of_each_is_a_task(self, shipped: Project, path: Path) -> None:
        shutil.copy(path, shipped.root / "configs/tasks/my_task.yaml")
        files = {spec.file_name for spec in load_catalog(shipped.root).tasks}
        assert "configs/tasks/my_task.yaml" in files


class TestPrompts:
    @pytest.mark.parametrize("name", RATINGS)
    def test_placeholders_and_keys(self, name: str) -> None:
        prompt = prompt_of(name)
        placeholders, keys, required = RATINGS[name]
        assert prompt.placeholders == placeholders
        assert set(prompt.output_config.fields) == keys
        assert set(prompt.output_config.required) == required

    @pytest.mark.parametrize("name", RATINGS)
    def test_scores_are_integers_from_1_to_5_and_have_no_default(self, name: str) -> None:
        prompt = prompt_of(name)
        scores = {
            key: schema
            for key, schema in prompt.output_config.fields.items()
            if key.endswith("score")
        }
        assert scores and all(
            schema == {"type": "integer", "minimum": 1, "maximum": 5} for schema in scores.values()
        )
        assert not set(scores) & set(prompt.output_config.json_default_values)
        assert all(schema.get("type") for schema in prompt.output_config.fields.values())

    @pytest.mark.parametrize("name", [path.stem for path in CONFIGS.glob("prompts/*.yaml")])
    def test_a_prompt_asks_for_what_its_schema_declares(self, name: str) -> None:
        prompt = prompt_of(name)
        asked = prompt.prompt_template.prompt_text.format_map(
            dict.fromkeys(prompt.placeholders, "VALUE")
        )
        assert [key for key in prompt.output_config.fields if f'"{key}"' not in asked] == []
        assert "1" in words_of(prompt) and "5" in words_of(prompt)

    @pytest.mark.parametrize("name", RATINGS)
    def test_each_level_has_its_anchor(self, name: str) -> None:
        """Levels of the scale, or of each score, are described in the system message."""
        system = prompt_of(name).prompt_template.system_text or ""
        for level in (5, 4, 3, 2, 1):
            assert re.search(rf"^{level} - |[ .]{level}: ", system, re.MULTILINE), level


class TestRehearsal:
    def scored(self, project: Project, name: str, rows: list[Row]) -> list[Row]:
        """The rows of the scores file that the shipped task makes, asked of the rehearsal model."""
        project.task = name
        text = project.task_file.read_text()
        project.task_file.write_text(
            re.sub(r"configs/models/\S+", "configs/models/rehearsal.yaml", text)
        )
        write_rows(Path(project.steps().spec.input_folder) / "some.jsonl", rows)
        ended = project.run("run-task", project.task_file)
        assert ended.code == 0, ended
        output = project.root / f"data/{name.removesuffix('_rating')}_scores/some.parquet"
        return read_rows(output)

    def test_en_corpus_rating_from_end_to_end(
        self, shipped: Project, server: RehearsalServer
    ) -> None:
        rows = [
            *(
                {"id": f"text-{number}", "text": f"It is number {number}. " * 40}
                for number in "123"
            ),
            {"id": "short", "text": "Too short."},
            {"id": "filler", "text": "Lorem IPSUM dolor sit amet. " * 40},
        ]
        made = self.scored(shipped, "en_corpus_rating", rows)
        assert [row["id"] for row in made] == ["text-1", "text-2", "text-3"]
        assert server.stats()["requests"] == 3
        for row in made:
            assert row["api_status"] == "success"
            assert row["score"] in range(1, 6)
            assert row["quality_tags"] is not None
            assert row["recommended_use_case"]
            assert (row["source"], row["characters"]) == ("en_web", len(row["text"]))
            assert row["api_prompt"].startswith("en_corpus_rating_v0.1@")

    def test_github_code_rating_from_end_to_end(self, shipped: Project) -> None:
        made = self.scored(shipped, "github_code_rating", some_rows(4))
        assert [row["api_status"] for row in made] == ["success"] * 4
        assert all(row["score"] in range(1, 6) for row in made)

    def test_the_rehearsal_endpoint_answers_the_packaging_prompt(self, shipped: Project) -> None:
        name = "repo_packaging_quality_rating_v1.0"
        data = {"input_key": "content_truncate_32k"}
        prompt = {"config_path": f"configs/prompts/{name}.yaml"}
        shipped.write_task({"data": data, "prompt": prompt})
        row = dict.fromkeys(prompt_of(name).placeholders, "Unknown")
        row["content_truncate_32k"] = "def f(x):\n    '''Adds.'''\n    return x + 1\n" * 9
        shipped.write_input("some.jsonl", [{"id": "a", **row}])
        ended = shipped.run("try", TASK, "--rows", "1")
        assert ended.code == 0, ended
        parsed = ended.out.split("parsed:")[1]
        assert [
            key for key in prompt_of(name).output_config.fields if f'"{key}"' not in parsed
        ] == []

    def test_the_chain_from_end_to_end(self, shipped: Project, server: RehearsalServer) -> None:
        """Its summary is about the merge groups, and tells what failed on the way."""
        task = shipped.root / "configs/tasks/data_distillation/distillation_chain.yaml"
        text = re.sub(r"configs/models/\w+", "configs/models/rehearsal", task.read_text())
        task.write_text(text.replace("max_failure_rate: 0.02", "max_failure_rate: 0.1"))
        row = {"instruction": "Add two numbers.", "output": "def add(a, b): return a + b"}
        rows = [row, row, {"instruction": 3, "output": "x"}, *[row] * 17]
        datasets = load_yaml(shipped.root / "configs/distillation/datasets.yaml")
        for name in ("OpenCoder-LLM/opc-sft-stage1", "OpenCoder-LLM/opc-sft-stage2"):
            for config in datasets[name]["configs"]:
                folder = shipped.root / "data/distillation/datasets" / name / config
                count = len(rows) if config == "evol_instruct" else 2
                write_rows(folder / "train-00000-of-00001.jsonl", rows[:count])
        assert "distillation_chain" not in shipped.run("check", task).out
        ended = shipped.run("run-task", task)
        assert ended.code == 0, ended
        first, chatml, responses, *_, last = ended.out.splitlines()
        assert first.startswith("2 of 2 merge groups scored: 32 rows, 31 succeeded, 1 failed")
        assert chatml.startswith("  7 of 7 files converted: 32 rows, 31 succeeded, 1 failed (chat")
        assert responses.startswith("  2 of 2 merge groups answered: 32 rows, 31 succeeded")
        assert last == f"scores: {shipped.root}/data/distillation_chain/scores"
        assert server.stats()["requests"] == 62
        assert "nothing to do" in shipped.run("run-task", task).out
        (shipped.root / "data/distillation_chain/generated/opc_sft_stage2_chatml.jsonl").unlink()
        task.write_text(text)
        red = shipped.run("run-task", task)
        stage2 = "responses of opc_sft_stage2_chatml.jsonl: 1 of 26 rows failed"
        assert red.code == 1 and f"  rejected: {stage2}" in red.out
        assert "max_failure_rate 2.00%" in red.err

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("chatml_conversion_with_system", "2 of 2 files converted: 3 rows, 3 succeeded"),
            ("jsonl_merge_qa", "1 of 1 merge group merged: 2 rows, 2 succeeded, 0 failed, 1 drop"),
        ],
    )
    def test_the_steps_of_the_questions(self, shipped: Project, name: str, words: str) -> None:
        folder = shipped.root / "data/distillation/datasets"
        row = {"prompt": "q", "response": "a"}
        write_rows(folder / "qa_zh.jsonl", [row | {"prompt": "问"}])
        write_rows(folder / "qa_en.jsonl", [row, row])
        for step in dict.fromkeys(["chatml_conversion_with_system", name]):
            ended = shipped.run("run-task", f"configs/tasks/data_distillation/{step}.yaml")
            assert ended.code == 0, ended
        assert ended.out.startswith(words)
        assert "no model was asked" in ended.out
