"""One task, resolved: its files, folders, environment and endpoint."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath

from pydantic_core import PydanticCustomError

from modelcall_assets.config.endpoint import Endpoint
from modelcall_assets.config.environment import Environment, MissingVariable
from modelcall_assets.config.model import ModelConfig
from modelcall_assets.config.paths import readable, resolve, writable
from modelcall_assets.config.problems import problem_of
from modelcall_assets.config.prompt import PromptConfig
from modelcall_assets.config.task import ScoringTask
from modelcall_assets.errors import Problem


@dataclass(frozen=True)
class TaskSpec:
    """A task that can run. Folders are absolute paths, or URIs as they were written."""

    path: Path
    root: Path
    name: str
    """As written."""
    key: str
    """As Dagster takes it."""
    task: ScoringTask
    model: ModelConfig | None
    prompt: PromptConfig | None
    """Both are there, or `task.scorer` is."""
    env: Environment
    warnings: tuple[Problem, ...]
    file_name: str
    """The task file, relative to the project root; the next two are the same for theirs."""
    model_file: str
    prompt_file: str

    @property
    def input_folder(self) -> str:
        """The raw input."""
        preprocess = self.task.preprocess
        own = preprocess.input_folder if preprocess.enabled else None
        return self._folder(own or self.task.data.input_folder)

    @property
    def preprocessed_folder(self) -> str:
        """Output of `preprocessed`; used only when preprocessing is enabled."""
        folder = self.task.preprocess.output_folder
        return self._folder(folder) if folder else f"{self.input_folder}_preprocessed"

    @property
    def output_folder(self) -> str:
        """The scores."""
        return self._folder(self.task.data.output_folder)

    @property
    def journal_folder(self) -> str:
        """Raw replies."""
        folder = self.task.data.journal_folder
        return self._folder(folder) if folder else f"{self.output_folder}/.modelcall"

    def endpoints(self) -> tuple[Endpoint, ...]:
        """Where requests go, one or more; SetupError names the variables that are missing."""
        assert self.model is not None
        return self.model.endpoints(
            self.env,
            self.model_file,
            root=self.root,
            timeout_s=self.task.environment.timeout,
            max_retries=self.task.retry.max_retries,
        )

    def _folder(self, text: str) -> str:
        return resolve(text, self.root, self.env, self.name)


def unsent_text(task: ScoringTask, prompt: PromptConfig, file: str) -> Iterator[Problem]:
    """A prompt that names neither of the two columns that hold the text to rate."""
    keys = dict.fromkeys((task.data.prompt_format_key, task.data.input_key))
    if prompt.placeholders.isdisjoint(keys):
        wrong = (
            f"no placeholder of the prompt, so that the column {task.data.input_key} is not sent"
        )
        have = ", ".join(sorted(prompt.placeholders)) or "a prompt without placeholders"
        fix = f"name one of those, or write {{{task.data.prompt_format_key}}} in the prompt"
        yield Problem(file, "data.prompt_format_key", wrong, have=have, fix=fix, severity="warning")


def budget_problems(task: ScoringTask, model: ModelConfig | None, file: str) -> Iterator[Problem]:
    """A budget that could not be kept."""
    limits = {"budget_usd": task.budget_usd, "budget_tokens": task.budget_tokens}
    for name, limit in limits.items():
        if limit is not None and model is None:
            yield Problem(file, name, "not used: the task has a scorer", fix=f"remove {name}")
    if model is not None and task.budget_usd is not None:
        prices = model.prices
        if None in (prices.usd_per_million_input_tokens, prices.usd_per_million_output_tokens):
            wrong = "the model file has no prices to count with"
            yield Problem(file, "budget_usd", wrong, fix="set prices there, or use budget_tokens")


def folder_problems(spec: TaskSpec) -> Iterator[Problem]:
    """Folders that are wrong once references and placeholders are replaced."""
    data, preprocess = spec.task.data, spec.task.preprocess
    uses = [
        ("data.input_folder", data.input_folder, readable),
        ("data.output_folder", data.output_folder, writable),
        ("data.journal_folder", data.journal_folder, writable),
    ]
    if preprocess.enabled:
        uses.append(("preprocess.input_folder", preprocess.input_folder, readable))
        uses.append(("preprocess.output_folder", preprocess.output_folder, writable))
    problems: list[Problem] = []
    for field, text, check in uses:
        try:
            if text:
                check(resolve(text, spec.root, spec.env, spec.name))
        except MissingVariable as error:
            wrong = f"variable {error.name} is not set"
            problems.append(Problem(spec.file_name, field, wrong, have=text or ""))
        except PydanticCustomError as error:
            problems.append(problem_of(error, spec.file_name, field, text))
    yield from problems
    if not problems:
        yield from _outputs_among_inputs(spec)


def _outputs_among_inputs(spec: TaskSpec) -> Iterator[Problem]:
    """An output below the input would be taken for new input."""
    folders = [("data.output_folder", spec.output_folder)]
    if spec.task.data.journal_folder:
        folders.append(("data.journal_folder", spec.journal_folder))
    if spec.task.preprocess.enabled:
        folder = spec.preprocessed_folder
        folders.append(("preprocess.output_folder", folder))
        if "://" in folder:
            wrong, fix = "missing: the input is in an object store", "add a local folder"
            yield Problem(spec.file_name, "preprocess.output_folder", wrong, fix=fix)
    for field, folder in folders:
        if PurePath(folder).is_relative_to(spec.input_folder):
            wrong = "the folder lies in the input folder, so outputs would become inputs"
            yield Problem(spec.file_name, field, wrong, fix="choose a folder beside it")
