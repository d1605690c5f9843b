"""One task, resolved: its files, folders, environment and stores."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from pydantic_core import PydanticCustomError

from modelcall_assets.config.block import Content, Parsed, problem_of
from modelcall_assets.config.datasets import DatasetConfig, MergeGroup
from modelcall_assets.config.distillation import DistillationTask, parse_distillation
from modelcall_assets.config.model import ModelConfig
from modelcall_assets.config.places import (
    Environment,
    Expander,
    MissingVariable,
    is_bucket,
    is_relative,
    is_uri,
    is_within,
    resolve,
    shown_place,
)
from modelcall_assets.config.prompt import PromptConfig
from modelcall_assets.config.stores import FLUSH_SECONDS, STORAGE_FILE, Storage, store_options
from modelcall_assets.config.task import DISTILLATION_TYPES, TASK_TYPE, ScoringTask, parse_scoring
from modelcall_assets.errors import Problem
from modelcall_assets.records import StoreOptions, is_data_file

_COMMANDS = {
    "batch_distillation_submit": "`modelcall split`, then one generate_response task for the parts",
    "merge_distillation_results": "`modelcall join`",
}
"""Task types of the old system that are no assets, and what to use instead."""


@dataclass(frozen=True)
class Link:
    spec: "TaskSpec"
    stage: str


@dataclass(frozen=True)
class TaskSpec:
    """A task that can run. Folders are absolute paths or URIs, in their simplest spelling."""

    path: Path
    root: Path
    name: str
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
    datasets: Mapping[str, DatasetConfig] = field(default_factory=dict[str, DatasetConfig])
    """Of a chatml stage, by key."""
    groups: Sequence[MergeGroup] = ()
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
        return (*(() if self.link else ("raw",)), *self.task.stage_folders)

    @property
    def input_folder(self) -> str:
        return self.resolved(self.task.input_folder)

    @property
    def has_one_input(self) -> bool:
        folder = self.input_folder
        return is_data_file(folder) and not is_bucket(folder)

    def folder(self, stage: str) -> str:
        """Where a stage other than raw leaves its files."""
        folder = self.task.stage_folders[stage]
        return self.resolved(folder) if folder else f"{self.input_folder}_preprocessed"

    @property
    def journal_folder(self) -> str:
        """Raw replies and the state of the stages."""
        if self.task.journal_folder:
            return self.resolved(self.task.journal_folder)
        return f"{self.folder(self.task.state_stage)}/.modelcall"

    def resolved(self, text: str) -> str:
        return resolve(text, self.root, self.env, self.name, self.data_root)


def parse_task(
    data: Content, file: str, has_data_root: bool = False
) -> Parsed[ScoringTask | DistillationTask]:
    """The task of a file of either kind. The project has a data root or not; the task may have its
    own."""
    kind = data.get("task_type", TASK_TYPE)
    if kind in DISTILLATION_TYPES:
        return parse_distillation(data, file)
    if isinstance(kind, str) and kind in _COMMANDS:
        fix = f"use {_COMMANDS[kind]}"
        return None, [Problem(file, "task_type", f"{kind} is no task here", fix=fix)]
    return parse_scoring(data, file, has_data_root)


def placed(spec: TaskSpec, storage: Storage) -> tuple[TaskSpec, list[Problem]]:
    """The task with its `data_root` and `store_options`, and every problem of its places."""
    named = spec.task.inputs | spec.task.outputs
    data_root, problems = _data_root(spec, storage, bool(_relative(spec)))
    if problems:
        return spec, problems
    spec = replace(spec, data_root=data_root)
    problems = [each for place, text in named.items() for each in _unresolved(spec, place, text)]
    if problems := problems or list(_misplaced_outputs(spec)):
        return spec, problems
    places = {place: spec.resolved(text) for place, text in spec.task.inputs.items()}
    places |= _output_folders(spec) | {"": spec.journal_folder}
    if storage.problems and any(map(is_uri, places.values())):
        return spec, list(storage.problems)
    options, problems = store_options(storage, spec.env, places, spec.file_name)
    flush = storage.file.journal_flush_seconds
    return replace(spec, store_options=options, journal_flush_seconds=flush), problems


def relative_places(spec: TaskSpec) -> dict[str, str]:
    """Where relative data folders lie, by field, if that is not the project root."""
    if spec.data_root in (None, str(spec.root)):
        return {}
    return {place: spec.resolved(text) for place, text in _relative(spec).items()}


def _relative(spec: TaskSpec) -> dict[str, str]:
    """Folders as written, by field, that are neither URIs nor start with `/` or `./`."""
    found: dict[str, str] = {}
    for place, text in (spec.task.inputs | spec.task.outputs).items():
        with suppress(MissingVariable):  # a problem of the folder
            if is_relative(spec.env.expand(text)):
                found[place] = text
    return found


def _data_root(
    spec: TaskSpec, storage: Storage, is_needed: bool
) -> tuple[str | None, list[Problem]]:
    """Resolved; None is the project root. What is wrong with it concerns who needs it only."""
    own, shared = spec.task.data_root, storage.file.data_root
    if own is not None:
        problems = list(_unresolved(spec, "data_root", own))
        return None if problems else spec.resolved(own), problems
    if not is_needed or (storage.root_is_known and shared is None):
        return None, []
    if shared is None:
        return None, list(storage.problems)
    expander = Expander(spec.env, STORAGE_FILE)
    try:
        return spec.resolved(shared), []
    except MissingVariable as error:
        wrong, needed = f"variable {error.name} is not set", f"${{{error.name}}} has a value"
        expander.unready("data_root", wrong, needed)
    except PydanticCustomError as error:
        expander.problems.append(problem_of(error, STORAGE_FILE, "data_root", shared))
    return None, expander.problems


def _unresolved(spec: TaskSpec, place: str, text: str) -> Iterator[Problem]:
    try:
        spec.resolved(text)
    except MissingVariable as error:
        yield Problem(spec.file_name, place, f"variable {error.name} is not set", have=text)
    except PydanticCustomError as error:
        yield problem_of(error, spec.file_name, place, text)


def _output_folders(spec: TaskSpec) -> dict[str, str]:
    """Resolved, with that of the preprocessed rows, which may be named nowhere."""
    folders = {place: spec.resolved(text) for place, text in spec.task.outputs.items()}
    for stage, folder in spec.task.stage_folders.items():
        if folder is None:
            folders["preprocess.output_folder"] = spec.folder(stage)
    return folders


def unwritable(spec: TaskSpec) -> Iterator[Problem]:
    """Output folders of this machine that this process may not write to."""
    for place, folder in _output_folders(spec).items():
        if not is_uri(folder) and not os.access(found := _nearest(folder), os.W_OK | os.X_OK):
            wrong, have = "cannot be written to", str(found)
            fix = "choose another folder, or let this user write to it"
            yield Problem(spec.file_name, place, wrong, have=have, fix=fix, unready=True)


def _nearest(folder: str) -> Path:
    """What there is of a folder on this machine: itself or the first above it."""
    path = Path(folder)
    return next((each for each in (path, *path.parents) if os.path.lexists(each)), path)


def _misplaced_outputs(spec: TaskSpec) -> Iterator[Problem]:
    """An output below the input would be taken for new input; one beside a bucket is in another;
    and nothing can lie below a file."""
    folders = _output_folders(spec)
    if folders.keys() - spec.task.outputs.keys() and is_bucket(spec.input_folder):
        wrong, fix = "missing: the input is a whole bucket", "name a folder for it"
        yield Problem(spec.file_name, "preprocess.output_folder", wrong, fix=fix)
    for place, folder in folders.items():
        if is_within(folder, spec.input_folder):
            wrong = "the folder lies in the input folder, so outputs would become inputs"
            yield Problem(spec.file_name, place, wrong, fix="choose a folder beside it")
        elif not is_uri(folder) and not (found := _nearest(folder)).is_dir():
            wrong = "a file stands there" if found.exists() else "a link to nothing stands there"
            have, fix = shown_place(str(found), spec.root), "choose another folder, or move it away"
            yield Problem(spec.file_name, place, wrong, "a folder", have, fix)
