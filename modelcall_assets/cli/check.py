"""`modelcall check`: everything wrong with the set-up, before anything runs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Literal

import click

from modelcall_assets.config.catalog import (
    SUFFIXES,
    Catalog,
    find_root,
    is_root,
    load_catalog,
    load_task,
)
from modelcall_assets.config.model import parse_model
from modelcall_assets.config.problems import shown_path
from modelcall_assets.config.prompt import parse_prompt
from modelcall_assets.config.spec import TaskSpec
from modelcall_assets.config.yaml_file import load_yaml
from modelcall_assets.errors import InputError, Problem, SetupError
from modelcall_assets.records.outcome import Failure
from modelcall_assets.records.record import Row
from modelcall_assets.steps.preview import first_rows
from modelcall_assets.steps.task_steps import TaskSteps
from modelcall_assets.transforms.universal import Dropped

Kind = Literal["task", "model", "prompt"]
ROWS_LOOKED_AT = 20


@click.command()
@click.argument("paths", nargs=-1, type=click.Path(path_type=Path))
@click.option("--strict", is_flag=True, help="Warnings fail too.")
def check(paths: tuple[Path, ...], strict: bool) -> None:
    """Check task, model and prompt files: PATHS, or all of the project's configs/.

    Prints every problem as file:field, and exits with 1 when there is an error. What is right but
    cannot run here yet, such as a task whose key is not set, is a warning.

    \b
      modelcall check
      modelcall check configs/tasks/my_task.yaml
    """
    named = paths or (find_root(Path.cwd()) / "configs",)
    files, problems = _files(named)
    catalog_of = cache(load_catalog)
    for path in files:
        problems += map(_told, _problems_of(path, catalog_of))
    unique = sorted(dict.fromkeys(problems), key=lambda problem: problem.file)
    for problem in unique:
        click.echo(f"{problem.severity}: {problem}")
    errors = sum(problem.severity == "error" for problem in unique)
    warnings = len(unique) - errors
    click.echo(f"{len(files)} files checked: {errors} errors, {warnings} warnings")
    if errors or (strict and warnings):
        sys.exit(1)


def _files(paths: Iterable[Path]) -> tuple[list[Path], list[Problem]]:
    """The config files below the paths, and the paths that hold none."""
    files: list[Path] = []
    problems: list[Problem] = []
    for path in paths:
        found = [path] if path.is_file() else sorted(filter(_is_config, path.rglob("*")))
        files += (file.resolve() for file in found)
        if not path.exists():
            problems.append(Problem(path.as_posix(), "", "no such file or folder"))
        elif not found:
            problems.append(Problem(path.as_posix(), "", "no config file in this folder"))
    return list(dict.fromkeys(files)), problems


def _is_config(path: Path) -> bool:
    is_json_model = path.suffix == ".json" and "models" in path.parts
    return path.is_file() and (path.suffix in SUFFIXES or is_json_model)


def _told(problem: Problem) -> Problem:
    """A file can be right where its task cannot run: without the keys, for example."""
    return replace(problem, severity="warning") if problem.unready else problem


def _root_of(path: Path) -> Path:
    own = find_root(path.parent)
    return own if is_root(own) else find_root(Path.cwd())


def _problems_of(path: Path, catalog_of: Callable[[Path], Catalog]) -> Iterable[Problem]:
    root = _root_of(path)
    file = shown_path(path, root)
    try:
        data = load_yaml(path, file)
    except SetupError as error:
        return error.problems
    kind = _kind(path, root, data)
    if kind == "model":
        return parse_model(data, file)[1]
    if kind == "prompt":
        return parse_prompt(data, file)[1]
    return _task_problems(path, root, catalog_of(root))


def _kind(path: Path, root: Path, data: Iterable[str]) -> Kind:
    """By the folder, else by what only one kind of file has."""
    if path.is_relative_to(root / "configs" / "models"):
        return "model"
    if path.is_relative_to(root / "configs" / "prompts"):
        return "prompt"
    if path.is_relative_to(root / "configs" / "tasks"):
        return "task"
    if {"client_config", "chat_config", "model_name"}.intersection(data):
        return "model"
    return "prompt" if "prompt_template" in data else "task"


def _task_problems(path: Path, root: Path, catalog: Catalog) -> Iterable[Problem]:
    """Problems of a task as the project sees it; a template or a stray file stands alone."""
    for broken in catalog.broken:
        if broken.path == path:
            return broken.problems
    spec = next((spec for spec in catalog.tasks if spec.path == path), None)
    try:
        spec = spec or load_task(path, root)
    except SetupError as error:
        return error.problems
    return [*spec.warnings, *_readiness(spec)]


def _readiness(spec: TaskSpec) -> Iterator[Problem]:
    """What is missing before the task can run."""
    steps = TaskSteps(spec)
    try:
        steps.check_rater()
    except SetupError as error:
        yield from error.problems
    folder = Path(spec.input_folder)
    if "://" in spec.input_folder:
        return
    if folder.is_dir():
        yield from _input_problems(steps)
        return
    wrong, have = "no such folder yet: nothing to do", shown_path(folder, spec.root)
    yield Problem(spec.file_name, "data.input_folder", wrong, have=have, severity="warning")


def _input_problems(steps: TaskSteps) -> Iterator[Problem]:
    """Two inputs with one output; and columns that the first rows there are do not have."""
    file_name = steps.spec.file_name
    try:
        for file in steps.inputs():
            rows = first_rows(steps, file, ROWS_LOOKED_AT)
            if kept := [row for row in rows if not isinstance(row, Dropped)]:
                yield from _unratable(steps, file.key_path, kept)
                return
    except SetupError as error:
        yield from error.problems
    except InputError as error:
        yield Problem(file_name, "data.input_folder", str(error), severity="warning")


def _unratable(steps: TaskSteps, file: str, rows: Sequence[Row | Failure]) -> Iterator[Problem]:
    """When no row can be asked, something common to all is wrong: a column's name, for example."""
    look = steps.score_stage.ask if steps.rule_stage is None else lambda row: row
    asked = [row if isinstance(row, Failure) else look(row) for row in rows]
    failures = [each.detail for each in asked if isinstance(each, Failure)]
    if len(failures) < len(asked):
        return
    wrong = f"none of the first {len(asked)} rows of {file} can be rated: {failures[0][:200]}"
    columns = dict.fromkeys(name for row in rows if not isinstance(row, Failure) for name in row)
    have = f"the columns {', '.join(columns)}" if columns else ""
    fix = "compare data.input_key and the placeholders of the prompt with them" if columns else ""
    yield Problem(steps.spec.file_name, "data", wrong, have=have, fix=fix, severity="warning")
