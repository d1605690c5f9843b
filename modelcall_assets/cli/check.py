"""`modelcall check`: everything wrong with the set-up, before anything runs."""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import click

from modelcall_assets.cli.plan import first_rows
from modelcall_assets.cli.terminal import echo
from modelcall_assets.config.block import Content, Parse, did_you_mean, load_yaml
from modelcall_assets.config.catalog import (
    SUFFIXES,
    Catalog,
    find_root,
    is_root,
    load_catalog,
    load_task,
    with_lines,
)
from modelcall_assets.config.datasets import are_datasets, parse_datasets, parse_merge_groups
from modelcall_assets.config.distillation import as_written
from modelcall_assets.config.model import parse_model
from modelcall_assets.config.places import shown_path
from modelcall_assets.config.prompt import parse_prompt
from modelcall_assets.config.spec import TaskSpec, relative_places
from modelcall_assets.config.stores import STORAGE_FILE, parse_storage
from modelcall_assets.errors import InputError, Problem, SetupError
from modelcall_assets.records import is_data_file
from modelcall_assets.records.outcome import BadLine, Dropped, Failure, Row
from modelcall_assets.stages.asking import AskingStage
from modelcall_assets.stages.preprocessed import Preprocessed
from modelcall_assets.stages.task import Task
from modelcall_assets.storage.listing import FileInfo
from modelcall_assets.storage.rows import read_rows

_PARSERS: Mapping[str, Parse] = {
    "model": parse_model,
    "prompt": parse_prompt,
    "datasets": parse_datasets,
    "groups": parse_merge_groups,
    "storage": parse_storage,
}


@click.command()
@click.argument("paths", nargs=-1, type=click.Path(path_type=Path))
@click.option("--strict", is_flag=True, help="Warnings fail too.")
def check(paths: tuple[Path, ...], strict: bool) -> None:
    """Check task files and those that they name: PATHS, or all of the project's configs/.

    Prints every problem as file:field, with its line, and exits with 1 when there is an error. What
    is right but cannot run here yet, such as a task whose key is not set, is a warning.

    \b
      modelcall check
      modelcall check configs/tasks/my_task.yaml
    """
    files, problems = _files(paths or (find_root(Path.cwd()) / "configs",))
    catalog_of = cache(load_catalog)
    for path in files:
        for problem in with_lines(_problems_of(path, catalog_of), _root_of(path)):
            # A file can be right where its task cannot run: without the keys, for example.
            problems.append(replace(problem, severity="warning") if problem.unready else problem)
        for place, where in _moved(path, catalog_of):
            echo(f"{shown_path(path, _root_of(path))}:{place}: is {where}")
    unique = sorted(dict.fromkeys(problems), key=lambda problem: problem.file)
    for problem in unique:
        echo(f"{problem.severity}: {problem}")
    errors = sum(problem.severity == "error" for problem in unique)
    warnings = len(unique) - errors
    echo(f"{len(files)} files checked: {errors} errors, {warnings} warnings")
    if errors or (strict and warnings):
        sys.exit(1)


def _files(paths: Iterable[Path]) -> tuple[list[Path], list[Problem]]:
    """The config files below the paths, and the paths that hold none."""
    files: list[Path] = []
    problems: list[Problem] = []
    for path in paths:
        found = [path] if path.is_file() else sorted(filter(_is_config, path.rglob("*")))
        files += (file.resolve() for file in found)
        if not found:
            wrong = "no config file in this folder" if path.exists() else "no such file or folder"
            problems.append(Problem(path.as_posix(), "", wrong))
    return list(dict.fromkeys(files)), problems


def _is_config(path: Path) -> bool:
    is_json_model = path.suffix == ".json" and "models" in path.parts
    return path.is_file() and (path.suffix in SUFFIXES or is_json_model)


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
    if kind in _PARSERS:
        return _PARSERS[kind](data, file)[1]
    return (as_written(each, data) for each in _task_problems(path, root, catalog_of(root)))


def _moved(path: Path, catalog_of: Callable[[Path], Catalog]) -> Iterable[tuple[str, str]]:
    """The relative data folders of a task that do not lie below the project root."""
    root = _root_of(path)
    if not path.is_relative_to(root / "configs" / "tasks"):
        return
    for spec in (spec for spec in catalog_of(root).tasks if spec.path == path):
        yield from relative_places(spec).items()


def _kind(path: Path, root: Path, data: Content) -> str:
    """`task`, or a key of `_PARSERS`: by the folder, else by what only one kind of file has."""
    if path == root / STORAGE_FILE:
        return "storage"
    for folder, kind in (("models", "model"), ("prompts", "prompt"), ("tasks", "task")):
        if path.is_relative_to(root / "configs" / folder):
            return kind
    if {"client_config", "chat_config", "model_name"}.intersection(data):
        return "model"
    if "prompt_template" in data:
        return "prompt"
    if "merge_groups" in data:
        return "groups"
    is_of_distillation = path.is_relative_to(root / "configs" / "distillation")
    return "datasets" if is_of_distillation or are_datasets(data) else "task"


def _task_problems(path: Path, root: Path, catalog: Catalog) -> Iterable[Problem]:
    """Problems of a task as the project sees it; a template or a stray file stands alone."""
    for broken in catalog.broken:
        if broken.path == path:
            return broken.problems
    try:
        found = (spec for spec in catalog.tasks if spec.path == path)
        spec = next(found, None) or load_task(path, root)
    except SetupError as error:
        return error.problems
    return [*spec.warnings, *readiness(spec)]


ROWS_LOOKED_AT = 20


def readiness(spec: TaskSpec) -> Iterator[Problem]:
    """Told as warnings: the file itself is right."""
    task = Task(spec)
    try:
        task.check_ready()
    except SetupError as error:
        yield from error.problems
    if not isinstance(task.layout.input_folder, Path):
        return  # a store that is not there would hold everything up: `plan` asks it
    if (absent := task.absent_input) is not None:
        yield absent
    elif any(stage.knows_input for stage in task.stages):
        for stage in task.stages:
            yield from stage.lacks()
    elif task.linked is None:
        yield from _row_problems(task)


def _row_problems(task: Task) -> Iterator[Problem]:
    """Two inputs with one output; and columns that the first rows there are do not have."""
    try:
        for file in task.inputs.files():
            yield from _absent_columns(task, file)
            rows = first_rows(task, file, ROWS_LOOKED_AT)
            if kept := [row for row in rows if not isinstance(row, Dropped)]:
                yield from _unanswerable(task, file.key_path, kept)
                return
    except SetupError as error:
        yield from error.problems
    except InputError as error:
        yield task.warning(str(error))


def _absent_columns(task: Task, file: FileInfo) -> Iterator[Problem]:
    """Columns that preprocessing names and that the first rows do not have."""
    stage = task.find(Preprocessed)
    if stage is None or not is_data_file(file.place.name):
        return
    items = read_rows(file.place, task.stages[0].reading, ROWS_LOOKED_AT)
    rows = [item for item in items if not isinstance(item, BadLine)]
    names = dict.fromkeys(name for row in rows for name in row)
    for place, column in stage.recipe.absent(names).items() if rows else ():
        wrong = f"no column {column} in the first {len(rows)} rows of {file.key_path}"
        fix, have = did_you_mean(column, names), _columns(rows)
        yield task.warning(wrong, field=f"preprocess.{place}", have=have, fix=fix)


def _unanswerable(task: Task, file: str, rows: Sequence[Row | Failure]) -> Iterator[Problem]:
    """When no row can be asked, something common to all is wrong: a column's name, for example."""
    stage = task.first_answering
    if stage is None:
        return
    asked = [
        stage.ask(row) if isinstance(stage, AskingStage) and not isinstance(row, Failure) else row
        for row in rows
    ]
    failures = [each.detail for each in asked if isinstance(each, Failure)]
    if len(failures) < len(asked):
        return
    wrong = f"none of the first {len(asked)} rows of {file} can be {stage.done}: "
    wrong += failures[0][:200]
    have = _columns([row for row in rows if not isinstance(row, Failure)])
    field, fix = stage.hint
    yield task.warning(wrong, field=field, have=have, fix=fix if have else "")


def _columns(rows: Sequence[Row]) -> str:
    names = dict.fromkeys(name for row in rows for name in row)
    return f"the columns {', '.join(names)}" if names else ""
