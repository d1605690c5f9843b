"""A task file: one that scores, or hands over to `distillation` for one that distils."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from pydantic import Field, field_validator

from modelcall_assets.config.block import Block, Text, did_you_mean, mistake
from modelcall_assets.config.distillation import (
    DISTILLATION_TYPES,
    DistillationTask,
    parse_distillation,
)
from modelcall_assets.config.legacy import TASK_FIELDS, take_out
from modelcall_assets.config.paths import Folder, was_in_object_store
from modelcall_assets.config.preprocess import Preprocess, unused_fields
from modelcall_assets.config.problems import errors_in, validate
from modelcall_assets.config.reading import Encoding, OnBadLine, OnEmptyFile
from modelcall_assets.config.stores import STORAGE_FILE
from modelcall_assets.config.task_file import ConfigPath, TaskFile
from modelcall_assets.errors import Problem

TASK_TYPE = "data_scoring"
_COMMANDS = {
    "batch_distillation_submit": "`modelcall split`, then one generate_response task for the parts",
    "merge_distillation_results": "`modelcall join`",
}
"""Task types of the old system that are no assets, and what to use instead."""


class Data(Block):
    """Where rows come from and where scores go."""

    input_folder: Folder
    """Folder of JSONL, Parquet and Arrow files: a path, or the URI of a store such as s3://."""
    output_folder: Folder
    """Folder of the scores."""
    input_key: Text = "text"
    """Column that holds the text to score."""
    prompt_format_key: Text = Field(default_factory=lambda block: block["input_key"])
    """Placeholder of the prompt that receives the text; default `input_key`."""
    journal_folder: Folder | None = None
    """Where raw replies are kept; default `<output_folder>/.modelcall`."""
    on_bad_line: OnBadLine = "keep"
    """A line that is no JSON object: `keep` makes it a failed row in its place, `fail` stops the
    file, naming the line."""
    on_empty_file: OnEmptyFile = "fail"
    """A file without a line: `fail` takes it for a failed upload, `accept` gives it an empty
    output. A Parquet file without rows is always accepted."""
    encoding: Encoding = "utf-8"
    """Of the lines of input files; any that Python knows. What a stage leaves is always UTF-8."""


class ScoringTask(TaskFile):
    """Scores every row of a folder with a model and a prompt."""

    task_type: str = TASK_TYPE
    """Kind of task; this one is `data_scoring`."""
    data: Data
    """Where rows come from and where scores go."""
    preprocess: Preprocess = Preprocess()
    """Cleaning, filtering and truncation before scoring."""
    model: ConfigPath | None = None
    """The model file; required unless there is a `scorer`."""
    prompt: ConfigPath | None = None
    """The prompt file; required unless there is a `scorer`."""
    scorer: Text | None = None
    """Instead of a model: `module:name` of an object or class with `score(item) -> dict`."""

    @field_validator("task_type")
    @classmethod
    def _known_type(cls, name: str) -> str:
        if name == TASK_TYPE:
            return name
        fix = did_you_mean(name, (TASK_TYPE, *DISTILLATION_TYPES))
        expected = f"one of {', '.join((TASK_TYPE, *DISTILLATION_TYPES))}"
        raise mistake("unknown task type", expected=expected, fix=fix)

    @property
    def rated(self) -> Data:
        """Which column is rated, and its placeholder in the prompt."""
        return self.data

    @property
    def reads(self) -> Data:
        """What says how the lines of its input are read."""
        return self.data

    @property
    def input_field(self) -> str:
        """Where the file says what the task reads."""
        return "data.input_folder"

    @property
    def max_files(self) -> int | None:
        """The file cap in force: debug's, else preprocess's, else none."""
        if self.debug.enabled and self.debug.max_files is not None:
            return self.debug.max_files
        return self.preprocess.num_files if self.preprocess.enabled else None


def parse_task(
    data: dict[str, Any], file: str, *, has_data_root: bool = False
) -> tuple[ScoringTask | DistillationTask | None, list[Problem]]:
    """The task, and every problem of its file; no task if one of them is an error. The project has
    a data root or not; the task may have its own."""
    kind = data.get("task_type", TASK_TYPE)
    if kind in DISTILLATION_TYPES:
        return parse_distillation(data, file)
    if isinstance(kind, str) and kind in _COMMANDS:
        return None, [
            Problem(file, "task_type", f"{kind} is no task here", fix=f"use {_COMMANDS[kind]}")
        ]
    known, problems, is_old = take_out(data, TASK_FIELDS, file)
    task, mistakes = validate(ScoringTask, known, file)
    problems += [*mistakes, *_rater_problems(known, file)]
    if is_old and not has_data_root and known.get("data_root") is None:
        refused = {problem.field for problem in problems}
        problems += (p for p in _moved_paths(known, file) if p.field not in refused)
    if task is not None:
        problems += unused_fields(task.preprocess, file)
    return (None if errors_in(problems) else task), problems


def _rater_problems(data: dict[str, Any], file: str) -> Iterator[Problem]:
    """A task rates with a model and a prompt, or with a scorer."""
    has_scorer = data.get("scorer") is not None
    for name in ("model", "prompt"):
        given = data.get(name) is not None
        if not given and not has_scorer:
            fix = "add it, or a scorer that needs no model"
            yield Problem(file, name, "missing", f"{name}.config_path", fix=fix)
        if given and has_scorer:
            fix = f"remove {name} or scorer"
            yield Problem(file, name, "not used: the task has a scorer", fix=fix)


def _moved_paths(data: dict[str, Any], file: str) -> list[Problem]:
    """Relative paths that mean another place than they did in the old system."""
    problems: list[Problem] = []
    for block, name in (
        ("data", "input_folder"),
        ("data", "output_folder"),
        ("preprocess", "input_folder"),
        ("preprocess", "output_folder"),
    ):
        fields: Any = data.get(block)
        text = cast("dict[str, Any]", fields).get(name) if isinstance(fields, dict) else None
        if isinstance(text, str) and was_in_object_store(text):
            place = text.replace("{task_name}", str(data.get("task_name")))
            problems.append(
                Problem(
                    file,
                    f"{block}.{name}",
                    f"now means {place} below the project root; the old system read this"
                    " relative path from its object store",
                    fix=f"write ./{text} if that is meant, else the full tos:// path, or name the"
                    f" place of all such folders as data_root in {STORAGE_FILE}",
                    severity="warning",
                )
            )
    return problems
