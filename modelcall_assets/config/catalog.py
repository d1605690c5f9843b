"""The tasks of a project. A broken file breaks its own task only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast

from modelcall_assets.config.block import nearest
from modelcall_assets.config.environment import Environment
from modelcall_assets.config.model import ModelConfig, parse_model
from modelcall_assets.config.naming import digest, legal_key
from modelcall_assets.config.problems import errors_in, shown_path, stops_run
from modelcall_assets.config.prompt import parse_prompt
from modelcall_assets.config.spec import TaskSpec, budget_problems, folder_problems, unsent_text
from modelcall_assets.config.task import parse_task
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
    """The task with its model and prompt. SetupError tells every problem of the three files."""
    path, root = path.resolve(), root.resolve()
    file = shown_path(path, root)
    data = load_yaml(path, file)
    task, problems = parse_task(data, file)
    model_file, model = _reference(data, "model", file, root, parse_model, problems)
    prompt_file, prompt = _reference(data, "prompt", file, root, parse_prompt, problems)
    env = _environment(data, file, root, problems)
    if task is None or errors_in(problems):
        raise SetupError(problems)
    if prompt is not None:
        problems += unsent_text(task, prompt, file)
    problems += budget_problems(task, model, file)
    spec = TaskSpec(
        path=path,
        root=root,
        name=task.task_name,
        key=legal_key(task.task_name),
        task=task,
        model=model,
        prompt=prompt,
        env=env,
        warnings=tuple(problems),
        file_name=file,
        model_file=model_file,
        prompt_file=prompt_file,
    )
    problems += folder_problems(spec)
    if stops_run(problems):
        raise SetupError(problems)
    return spec


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
    taken = {spec.key for spec in tasks}
    return Catalog(tuple(tasks), tuple(_broken(path, root, why, taken) for path, why in failed))


def task_files(root: Path) -> list[Path]:
    """The files of configs/tasks that are tasks, not templates."""
    folder = root / "configs" / "tasks"
    files = (path for path in folder.rglob("*") if path.suffix in SUFFIXES and path.is_file())
    return sorted(path for path in files if "templates" not in path.relative_to(folder).parts[:-1])


def _reference(
    data: dict[str, Any],
    block: str,
    file: str,
    root: Path,
    parse: Parse[T],
    problems: list[Problem],
) -> tuple[str, T | None]:
    """The file that `<block>.config_path` names, parsed; its problems are added."""
    text = _text(data, block, "config_path")
    if not text:
        return "", None
    path = (root / text).resolve()
    shown = shown_path(path, root)
    if not path.is_file():
        siblings = [p.name for p in path.parent.glob("*")] if path.parent.is_dir() else []
        close = nearest(path.name, siblings)
        fix = f"did you mean {(Path(text).parent / close).as_posix()}?" if close else ""
        problems.append(Problem(file, f"{block}.config_path", "no such file", have=text, fix=fix))
        return shown, None
    try:
        parsed, found = parse(load_yaml(path, shown), shown)
    except SetupError as error:
        parsed, found = None, error.problems
    problems += found
    return shown, parsed


def _environment(
    data: dict[str, Any], file: str, root: Path, problems: list[Problem]
) -> Environment:
    """The task's environment; without the env files that cannot be read."""
    named = _block(data, "environment").get("config_path")
    texts: list[Any] = cast("list[Any]", named) if isinstance(named, list) else [named]
    places = [("environment.config_path", text) for text in texts]
    places.append(("environment.tos_config_path", _text(data, "environment", "tos_config_path")))
    paths: list[Path] = []
    for field, text in places:
        if not isinstance(text, str) or not text:
            continue
        if (root / text).is_file():
            paths.append(root / text)
        else:
            problems.append(Problem(file, field, "no such file", have=text))
    try:
        return Environment.for_task(root, paths)
    except SetupError as error:
        problems += [replace(p, file=shown_path(Path(p.file), root)) for p in error.problems]
        return Environment({})


def _block(data: dict[str, Any], name: str) -> dict[str, Any]:
    value = data.get(name)
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _text(data: dict[str, Any], block: str, name: str) -> str:
    value = _block(data, block).get(name)
    return value if isinstance(value, str) else ""


def _clashes(spec: TaskSpec, tasks: Sequence[TaskSpec]) -> Iterator[Problem]:
    """What a task may not share with an earlier one."""
    for first in tasks:
        if first.key == spec.key:
            wrong = f"{spec.name} is the name of the task in {first.file_name}"
            if first.name != spec.name:
                wrong = f"{spec.name} and {first.name} ({first.file_name}) are both {spec.key}"
            yield Problem(spec.file_name, "task_name", wrong, fix="choose another name")
        if first.output_folder == spec.output_folder:
            wrong = f"{first.file_name} writes to the same folder"
            have = shown_path(Path(spec.output_folder), spec.root)
            fix = "give each task its own"
            yield Problem(spec.file_name, "data.output_folder", wrong, have=have, fix=fix)


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
