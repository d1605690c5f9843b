"""The tasks of a project. A broken file breaks its own task only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from os.path import normpath
from pathlib import Path
from typing import Any, TypeVar, cast

from modelcall_assets.config.block import nearest
from modelcall_assets.config.datasets import parse_datasets
from modelcall_assets.config.datasets import selected as selected_datasets
from modelcall_assets.config.distillation import (
    DISTILLATION_TYPES,
    GENERATE,
    DistillationTask,
    as_written,
)
from modelcall_assets.config.environment import Environment
from modelcall_assets.config.folders import placed
from modelcall_assets.config.merge_groups import parse_merge_groups
from modelcall_assets.config.merge_groups import selected as selected_groups
from modelcall_assets.config.model import ModelConfig, parse_model
from modelcall_assets.config.naming import digest, legal_key
from modelcall_assets.config.paths import is_file, is_folder, parent_of, shown_place
from modelcall_assets.config.problems import errors_in, shown_path, stops_run
from modelcall_assets.config.prompt import parse_prompt
from modelcall_assets.config.spec import (
    CHATML,
    Link,
    TaskSpec,
    budget_problems,
    unsent_text,
)
from modelcall_assets.config.stores import load_storage
from modelcall_assets.config.task import ScoringTask, parse_task
from modelcall_assets.config.yaml_file import load_yaml
from modelcall_assets.errors import Problem, SetupError

T = TypeVar("T")
Parse = Callable[[dict[str, Any], str], tuple[T | None, list[Problem]]]

SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True, slots=True)
class BrokenTask:
    """A task file that cannot be run, and why."""

    path: Path
    file_name: str
    key: str
    problems: tuple[Problem, ...]


@dataclass(frozen=True, slots=True)
class Catalog:
    """Every task file of a project, usable or not."""

    tasks: tuple[TaskSpec, ...]
    broken: tuple[BrokenTask, ...]


def is_root(folder: Path) -> bool:
    """Whether the folder looks like a project."""
    return (folder / "workspace.yaml").is_file() or (folder / "configs").is_dir()


def find_root(start: Path) -> Path:
    """The nearest folder from `start` upwards that holds workspace.yaml or configs/."""
    start = start.resolve()
    return next((folder for folder in (start, *start.parents) if is_root(folder)), start)


def load_task(path: Path, root: Path) -> TaskSpec:
    """The task with the files it names. SetupError tells every problem of all of them."""
    path, root = path.resolve(), root.resolve()
    file = shown_path(path, root)
    data, storage = load_yaml(path, file), load_storage(root)
    task, problems = parse_task(data, file, has_data_root=storage.data_root is not None)
    env = _environment(data, file, root, problems)
    references = _References(data, file, root, problems)
    named = references.of_distillation() if _is_distillation(data) else references.of_scoring()
    if task is None or errors_in(problems):
        raise SetupError(problems)
    models = [model for model in (named.get("model"), named.get("generator")) if model is not None]
    if (prompt := named.get("prompt")) is not None:
        place = "data" if isinstance(task, ScoringTask) else "scores"
        problems += unsent_text(task.rated, prompt, place, file)
    problems += budget_problems(task, models, file)
    if isinstance(task, DistillationTask):
        named = {**named, **_selected(task, named, file, problems)}
    spec = TaskSpec(
        path=path,
        root=root,
        name=task.task_name,
        key=legal_key(task.task_name),
        task=task,
        env=env,
        warnings=tuple(problems),
        file_name=file,
        files=references.files,
        **named,
    )
    spec, misplaced = placed(spec, storage)
    problems += misplaced
    problems = [as_written(problem, data) for problem in problems]
    if stops_run(problems):
        raise SetupError(problems)
    return replace(spec, warnings=tuple(problems))


def _is_distillation(data: dict[str, Any]) -> bool:
    return data.get("task_type") in DISTILLATION_TYPES


def _selected(
    task: DistillationTask, named: dict[str, Any], file: str, problems: list[Problem]
) -> dict[str, Any]:
    """The data sets and groups that the task wants of those in the files."""
    found: dict[str, Any] = {}
    if task.chatml_conversion is not None:
        wanted = task.chatml_conversion.selected_datasets
        found["datasets"], more = selected_datasets(
            named["datasets"], wanted, file, "chatml_conversion.selected_datasets"
        )
        problems += more
    if task.jsonl_merge is not None:
        found["groups"], more = selected_groups(
            named["groups"], task.jsonl_merge.merge_groups, file, "jsonl_merge.merge_groups"
        )
        problems += more
    return found


def load_model(path: Path, root: Path) -> ModelConfig:
    """A model file by itself. SetupError tells every problem of it."""
    file = shown_path(path.resolve(), root.resolve())
    model, problems = parse_model(load_yaml(path, file), file)
    if model is None or errors_in(problems):
        raise SetupError(problems)
    return model


def load_catalog(root: Path) -> Catalog:
    """All of configs/tasks, in the order of the paths; folders named templates are left out."""
    root = root.resolve()
    tasks: list[TaskSpec] = []
    failed: list[tuple[Path, Sequence[Problem]]] = []
    for path in task_files(root):
        try:
            spec = load_task(path, root)
        except SetupError as error:
            failed.append((path, error.problems))
            continue
        if clashes := list(_clashes(spec, tasks)):
            failed.append((path, clashes))
        else:
            tasks.append(spec)
    tasks = _linked(tasks)
    taken = {spec.key for spec in tasks}
    return Catalog(tuple(tasks), tuple(_broken(path, root, why, taken) for path, why in failed))


def load_linked(path: Path, root: Path) -> TaskSpec:
    """One task as the project has it: with links to the tasks whose output it reads."""
    known = {task.path: task for task in load_catalog(root).tasks}
    return known.get(path.resolve()) or load_task(path, root)


def _linked(tasks: Sequence[TaskSpec]) -> list[TaskSpec]:
    """Tasks whose first step reads what another one leaves; those of a circle stay unlinked."""
    by_key = {spec.key: spec for spec in tasks}
    distilling = [spec for spec in tasks if isinstance(spec.task, DistillationTask)]
    leaves = {
        spec.folder(stage): (spec.key, stage) for spec in distilling for stage in spec.stages[1:]
    }
    sources = {
        spec.key: leaves[_input_place(spec)]
        for spec in distilling
        if CHATML not in spec.stages and _input_place(spec) in leaves
    }

    def comes_back(key: str) -> bool:
        at, seen = key, set[str]()
        while at in sources and at not in seen:
            seen.add(at)
            at = sources[at][0]
        return at == key and at in seen

    circular = {key for key in sources if comes_back(key)}

    def linked(spec: TaskSpec) -> TaskSpec:
        if spec.key not in sources or spec.key in circular:
            return spec
        source, stage = sources[spec.key]
        return replace(spec, link=Link(linked(by_key[source]), stage))

    return [linked(spec) for spec in tasks]


def _input_place(spec: TaskSpec) -> str:
    """The folder that the first step reads, or the one of its file."""
    return parent_of(spec.input_folder) if spec.has_one_input else spec.input_folder


def task_files(root: Path) -> list[Path]:
    """The files of configs/tasks that are tasks, not templates."""
    folder = root / "configs" / "tasks"
    files = (path for path in folder.rglob("*") if path.suffix in SUFFIXES and path.is_file())
    return sorted(path for path in files if "templates" not in path.relative_to(folder).parts[:-1])


@dataclass
class _References:
    """The files that a task names, parsed; their problems are added to the task's."""

    data: dict[str, Any]
    file: str
    root: Path
    problems: list[Problem]
    files: dict[str, str] = field(default_factory=dict[str, str])

    def of_scoring(self) -> dict[str, Any]:
        return {
            "model": self._parsed("model", "model.config_path", parse_model),
            "prompt": self._parsed("prompt", "prompt.config_path", parse_prompt),
        }

    def of_distillation(self) -> dict[str, Any]:
        """As the file is with a block per step; in an old file's one block the same."""
        found: dict[str, Any] = {
            "model": self._parsed("model", "scores.model.config_path", parse_model),
            "prompt": self._parsed("prompt", "scores.prompt.config_path", parse_prompt),
        }
        for name, step, key, parse in (
            ("generator", GENERATE, "response_config_path", parse_model),
            ("generator", GENERATE, "model_config", parse_model),
            ("datasets", "chatml_conversion", "dataset_config_path", parse_datasets),
            ("groups", "jsonl_merge", "merge_config_path", parse_merge_groups),
        ):
            for place in (f"{step}.{key}", f"distillation.{key}"):
                if found.get(name) is None and _at(self.data, place):
                    found[name] = self._parsed(name, place, parse)
        return {name: value for name, value in found.items() if value is not None}

    def _parsed(self, name: str, place: str, parse: Parse[T]) -> T | None:
        text = _at(self.data, place)
        if not text:
            return None
        path = self.root / text
        is_there = is_file(path)
        path = path.resolve() if is_there else Path(normpath(path))
        self.files[name] = shown = shown_path(path, self.root)
        if not is_there:
            siblings = [p.name for p in path.parent.glob("*")] if is_folder(path.parent) else []
            close = nearest(path.name, siblings)
            fix = f"did you mean {(Path(text).parent / close).as_posix()}?" if close else ""
            self.problems.append(Problem(self.file, place, "no such file", have=text, fix=fix))
            return None
        try:
            parsed, found = parse(load_yaml(path, shown), shown)
        except SetupError as error:
            parsed, found = None, error.problems
        self.problems += found
        return parsed


def _at(data: dict[str, Any], place: str) -> str:
    """The text at a dotted place of a file, else nothing."""
    *blocks, name = place.split(".")
    for block in blocks:
        data = _block(data, block)
    value = data.get(name)
    return value if isinstance(value, str) else ""


def _environment(
    data: dict[str, Any], file: str, root: Path, problems: list[Problem]
) -> Environment:
    """The task's environment; without the env files that cannot be read."""
    named = _block(data, "environment").get("config_path")
    texts: list[Any] = cast("list[Any]", named) if isinstance(named, list) else [named]
    places = [("environment.config_path", text) for text in texts]
    places.append(("environment.tos_config_path", _at(data, "environment.tos_config_path")))
    paths: list[Path] = []
    for place, text in places:
        if not isinstance(text, str) or not text:
            continue
        if is_file(root / text):
            paths.append(root / text)
        else:
            problems.append(Problem(file, place, "no such file", have=text))
    try:
        return Environment.for_task(root, paths)
    except SetupError as error:
        problems += [replace(p, file=shown_path(Path(p.file), root)) for p in error.problems]
        return Environment({})


def _block(data: dict[str, Any], name: str) -> dict[str, Any]:
    value = data.get(name)
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _clashes(spec: TaskSpec, tasks: Sequence[TaskSpec]) -> Iterator[Problem]:
    """What a task may not share with an earlier one."""
    for first in tasks:
        if first.key == spec.key:
            wrong = f"{spec.name} is the name of the task in {first.file_name}"
            if first.name != spec.name:
                wrong = f"{spec.name} and {first.name} ({first.file_name}) are both {spec.key}"
            yield Problem(spec.file_name, "task_name", wrong, fix="choose another name")
        theirs = {first.folder(stage) for stage in first.stages[1:]}
        for folder in (spec.folder(stage) for stage in spec.stages[1:]):
            if folder in theirs:
                wrong = f"{first.file_name} writes to the same folder"
                have = shown_place(folder, spec.root)
                place = "data.output_folder" if isinstance(spec.task, ScoringTask) else ""
                fix = "give each task its own"
                yield Problem(spec.file_name, place, wrong, have=have, fix=fix)


def _broken(path: Path, root: Path, problems: Sequence[Problem], taken: set[str]) -> BrokenTask:
    """Keeps the key that the task would have, unless another task has it."""
    file = shown_path(path, root)
    try:
        name = load_yaml(path).get("task_name")
    except SetupError:
        name = None
    key = legal_key(name if isinstance(name, str) and name else path.stem)
    if key in taken:
        key = f"{key[:90]}_{digest(file)}"
    taken.add(key)
    return BrokenTask(path, file, key, tuple(problems))
