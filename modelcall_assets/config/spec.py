"""One task, resolved: its files, folders, environment and endpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from modelcall_assets.config.datasets import DatasetConfig
from modelcall_assets.config.distillation import DistillationTask, JudgeStep, step_folders
from modelcall_assets.config.environment import Environment
from modelcall_assets.config.merge_groups import MergeGroup
from modelcall_assets.config.model import ModelConfig
from modelcall_assets.config.paths import is_bucket, resolve
from modelcall_assets.config.prompt import PromptConfig
from modelcall_assets.config.stores import FLUSH_SECONDS
from modelcall_assets.config.task import Data, ScoringTask
from modelcall_assets.errors import Problem
from modelcall_assets.records.data_files import StoreOptions, is_data_file

RAW, PREPROCESSED, CHATML, MERGED, RESPONSES, SCORES = STAGES = (
    "raw", "preprocessed", "chatml", "merged", "responses", "scores",
)  # fmt: skip
"""Every stage there is, upstream first."""


@dataclass(frozen=True)
class Link:
    """A stage of another task, whose files a task reads."""

    spec: TaskSpec
    stage: str


@dataclass(frozen=True)
class TaskSpec:
    """A task that can run. Folders are absolute paths or URIs, in their simplest spelling."""

    path: Path
    root: Path
    name: str
    """As written."""
    key: str
    """As Dagster takes it."""
    task: ScoringTask | DistillationTask
    env: Environment
    file_name: str
    """The task file, relative to the project root."""
    warnings: tuple[Problem, ...] = ()
    model: ModelConfig | None = None
    """The one that rates; with its prompt, or there is a scorer."""
    prompt: PromptConfig | None = None
    generator: ModelConfig | None = None
    """The one that gives responses."""
    datasets: Mapping[str, DatasetConfig] = field(default_factory=dict[str, DatasetConfig])
    """Of a chatml stage, by key."""
    groups: Sequence[MergeGroup] = ()
    """Of a merged stage."""
    link: Link | None = None
    """Where the input of the first step comes from, if that is another task of the project."""
    files: Mapping[str, str] = field(default_factory=dict[str, str])
    """The files of model, prompt, generator, datasets and groups, relative to the root."""
    data_root: str | None = None
    """Where relative data folders lie; None is the root."""
    journal_flush_seconds: float = FLUSH_SECONDS
    store_options: Sequence[StoreOptions] = field(default=(), repr=False)
    """How the stores among its places are reached, the longest prefix first."""

    @cached_property
    def stages(self) -> tuple[str, ...]:
        """The task's stages, upstream first."""
        if isinstance(self.task, ScoringTask):
            return (RAW, PREPROCESSED, SCORES) if self.task.preprocess.enabled else (RAW, SCORES)
        own = tuple(step_folders(self.task))
        return own if self.link is not None else (RAW, *own)

    @property
    def input_folder(self) -> str:
        """The raw input, or the one file that it is."""
        task = self.task
        if isinstance(task, ScoringTask):
            own = task.preprocess.input_folder if task.preprocess.enabled else None
            return self.resolved(own or task.data.input_folder)
        if task.chatml_conversion is not None:
            return self.resolved(task.chatml_conversion.input_dir)
        merge, responses = task.jsonl_merge, task.generate_response
        text = merge.base_input_dir if merge is not None else responses and responses.input_path
        assert text is not None
        return self.resolved(text)

    @property
    def has_one_input(self) -> bool:
        """Whether `input_folder` is a file."""
        folder = self.input_folder
        return is_data_file(folder) and not is_bucket(folder)

    def folder(self, stage: str) -> str:
        """Where a stage other than raw leaves its files."""
        task = self.task
        if isinstance(task, DistillationTask):
            return self.resolved(step_folders(task)[stage])
        if stage == SCORES:
            return self.resolved(task.data.output_folder)
        folder = task.preprocess.output_folder
        return self.resolved(folder) if folder else f"{self.input_folder}_preprocessed"

    @property
    def journal_folder(self) -> str:
        """Raw replies and the state of the stages."""
        task = self.task
        own = task.data if isinstance(task, ScoringTask) else task
        folder = own.journal_folder
        if folder:
            return self.resolved(folder)
        last = RESPONSES if RESPONSES in self.stages else self.stages[-1]  # a judge may come later
        return f"{self.folder(last)}/.modelcall"

    def resolved(self, text: str) -> str:
        """A folder as written, made absolute."""
        return resolve(text, self.root, self.env, self.name, self.data_root)


def unsent_text(
    rated: Data | JudgeStep, prompt: PromptConfig, field: str, file: str
) -> Iterator[Problem]:
    """A prompt that names neither of the two columns that hold the text to rate."""
    keys = dict.fromkeys((rated.prompt_format_key, rated.input_key))
    columns = {name.partition(".")[0] for name in prompt.placeholders} | prompt.placeholders
    if columns.isdisjoint(keys):
        wrong = f"no placeholder of the prompt, so that the column {rated.input_key} is not sent"
        have = ", ".join(sorted(prompt.placeholders)) or "a prompt without placeholders"
        fix = f"name one of those, or write {{{rated.prompt_format_key}}} in the prompt"
        place = f"{field}.prompt_format_key"
        yield Problem(file, place, wrong, have=have, fix=fix, severity="warning")


def budget_problems(
    task: ScoringTask | DistillationTask, models: Sequence[ModelConfig], file: str
) -> Iterator[Problem]:
    """A budget that could not be kept."""
    limits = {"budget_usd": task.budget_usd, "budget_tokens": task.budget_tokens}
    for name, limit in limits.items():
        if limit is not None and not models:
            yield Problem(file, name, "not used: the task asks no model", fix=f"remove {name}")
    for model in models if task.budget_usd is not None else ():
        if None in model.prices.pair:
            wrong = "the model file has no prices to count with"
            yield Problem(file, "budget_usd", wrong, fix="set prices there, or use budget_tokens")
