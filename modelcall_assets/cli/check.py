"""`modelcall check`: everything wrong with the set-up, before anything runs; and `migrate`, which
rewrites config files of the old system."""

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import click
import yaml

from modelcall_assets.cli.options import EXISTING_FILE, NEW_FILE, force_option, refuse_existing
from modelcall_assets.cli.plan import prepared_rows
from modelcall_assets.cli.terminal import echo, echo_data
from modelcall_assets.config import Content, Parse
from modelcall_assets.config.catalog import (
    SUFFIXES,
    Catalog,
    find_root,
    is_root,
    load_catalog,
    load_task,
)
from modelcall_assets.config.datasets import are_datasets, parse_datasets, parse_merge_groups
from modelcall_assets.config.distillation import as_written
from modelcall_assets.config.files import load_yaml, mark_of, with_lines
from modelcall_assets.config.migrate import TREATMENTS, Migration, migrate_file
from modelcall_assets.config.model import parse_model
from modelcall_assets.config.places import STORAGE_FILE, parse_storage, shown_path
from modelcall_assets.config.prompt import parse_prompt
from modelcall_assets.config.spec import TaskSpec, relative_places
from modelcall_assets.errors import InputError, Problem, SetupError, did_you_mean
from modelcall_assets.records import is_data_file
from modelcall_assets.records.outcome import Dropped, Failure, Row
from modelcall_assets.records.secrets import looks_secret
from modelcall_assets.stages.asking import AskingStage
from modelcall_assets.stages.prepared import SourceInputs
from modelcall_assets.stages.preprocessed import Preprocessed
from modelcall_assets.stages.source import ROWS_LOOKED_AT, column_names, first_rows
from modelcall_assets.stages.task import Task
from modelcall_assets.storage.listing import FileInfo


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
        root = _root_of(path)
        for problem in with_lines(_problems_of(path, root, catalog_of), root):
            # A file can be right where its task cannot run: without the keys, for example.
            problems.append(replace(problem, severity="warning") if problem.unready else problem)
        tasks = catalog_of(root).tasks if path.is_relative_to(root / "configs" / "tasks") else ()
        for spec in (spec for spec in tasks if spec.path == path):
            for place, where in relative_places(spec).items():
                echo(f"{spec.file_name}:{place}: is {where}")
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
    return next(filter(is_root, path.parents), None) or find_root(Path.cwd())


def _problems_of(
    path: Path, root: Path, catalog_of: Callable[[Path], Catalog]
) -> Iterable[Problem]:
    file = shown_path(path, root)
    try:
        data = load_yaml(path, file)
    except SetupError as error:
        return error.problems
    if (parse := _parser(path, root, data)) is not None:
        return parse(data, file)[1]
    return (as_written(each, data) for each in _task_problems(path, root, catalog_of(root)))


def _parser(path: Path, root: Path, data: Content) -> Parse | None:
    """Of that kind of file, by its folder, else by what only one kind has; None for a task."""
    if path == root / STORAGE_FILE:
        return parse_storage
    for folder, parse in ("models", parse_model), ("prompts", parse_prompt), ("tasks", None):
        if path.is_relative_to(root / "configs" / folder):
            return parse
    if {"client_config", "chat_config", "model_name"}.intersection(data):
        return parse_model
    if "prompt_template" in data:
        return parse_prompt
    if "merge_groups" in data:
        return parse_merge_groups
    is_of_distillation = path.is_relative_to(root / "configs" / "distillation")
    return parse_datasets if is_of_distillation or are_datasets(data) else None


def _task_problems(path: Path, root: Path, catalog: Catalog) -> Iterable[Problem]:
    """Problems of a task as the project sees it; a template or a stray file stands alone."""
    try:
        spec = catalog.task(path) or load_task(path, root)
    except SetupError as error:
        return error.problems
    return [*spec.warnings, *_readiness(spec)]


def _readiness(spec: TaskSpec) -> Iterator[Problem]:
    """Told as warnings: the file itself is right."""
    task = Task(spec)
    for check_ready in (task.check_ready, *(each.check_ready for each in task.overviews)):
        try:
            check_ready()
        except SetupError as error:
            yield from error.problems
    if not isinstance(task.layout.input_folder, Path):
        return  # a store that is not there would hold everything up: `plan` asks it
    if (absent := task.absent_input) is not None:
        yield absent
    else:
        yield from _input_problems(task)


def _input_problems(task: Task) -> Iterator[Problem]:
    """What the stages lack; else, of the task's own input, two files with one output, and columns
    that the first rows there are do not have."""
    try:
        lacking = [problem for stage in task.stages for problem in stage.lacks()]
        yield from lacking
        for file in () if lacking or task.linked else task.inputs.files():
            yield from _absent_columns(task, file)
            rows = prepared_rows(task, file, ROWS_LOOKED_AT)
            if kept := [row for row in rows if not isinstance(row, Dropped)]:
                yield from _unanswerable(task, file.key_path, kept)
                if not isinstance(task.inputs, SourceInputs):  # files are alike, sources are not
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
    rows = first_rows(file.place, task.stages[0].reading)
    names = column_names(rows)
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
    names = column_names(rows)
    return f"the columns {', '.join(names)}" if names else ""


_OTHER_BREAKS = re.compile("[\x85\u2028\u2029\ufeff]")
"""YAML takes these for line breaks or drops them, unless they are escaped."""


@click.command()
@click.argument("old", type=EXISTING_FILE)
@click.option(
    "--output", type=NEW_FILE, help="Where to write the new file; default: standard output."
)
@force_option
def migrate(old: Path, output: Path | None, force: bool) -> None:
    """Rewrite OLD.yaml, a config file of the old system, for this project.

    Takes files of tasks, models, prompts, data sets and merge groups.

    Lists what is honoured, changed and refused. Exits with 1 when something was refused: a TODO
    stands at its place in the new file. API keys are replaced by references and never shown;
    comments of the old file are not carried over.

    \b
      modelcall migrate old/my_task.yaml --output configs/tasks/my_task.yaml
    """
    if output and output.suffix not in SUFFIXES:
        raise click.BadParameter("the new file is YAML: name it .yaml", param_hint="--output")
    refuse_existing([output] if output else [], force)
    new = migrate_file(load_yaml(old), old.name)
    if new.data is not None:
        text = _text_of(new, old)
        if output:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(text, "utf-8")
        else:
            echo_data(text)
    for line in _treated(new):
        echo(line, err=output is None)
    if new.of("refused"):
        sys.exit(1)


def _treated(new: Migration) -> Iterable[str]:
    """The list, the refused fields last."""
    for treatment in TREATMENTS:
        for name, reason in new.of(treatment).items():
            yield f"{treatment}: {name}" + (f": {reason}" if reason else "")
    yield ", ".join(f"{len(new.of(treatment))} {treatment}" for treatment in TREATMENTS)
    if new.data is None:
        yield "nothing is written"
    elif new.of("refused"):
        yield "look for TODO in the new file, then run `modelcall check` on it"
    elif new.data == new.old:
        yield "nothing to change: it is a file of this project already"


def _text_of(new: Migration, old: Path) -> str:
    """The file as it was when nothing changes, comments included; else written anew."""
    same = new.data == new.old and not new.of("refused") and old.suffix in SUFFIXES
    if same and not looks_secret(text := old.read_text("utf-8")):
        return text
    body = yaml.dump(new.data, Dumper=_Dumper, allow_unicode=True, sort_keys=False, width=10**9)
    spaced = re.sub(r"\n(?=\w+:\n)", "\n\n", body)
    if yaml.safe_load(spaced) == new.data:  # an empty line can belong to the text before it
        body = spaced
    todo = {name: f"TODO {name}: {reason}" for name, reason in new.of("refused").items()}
    name = " ".join(old.name.split())
    head = f"# Migrated from {name}: `modelcall migrate` of that file tells what changed.\n"
    return head + _with_comments(body, new.hints | todo)


def _with_comments(text: str, comments: dict[str, str]) -> str:
    """Each comment above its field, or above the nearest block that is there; else at the end."""
    root, lines = yaml.compose(text, yaml.SafeLoader), text.splitlines(keepends=True)
    places: list[tuple[int, int, str]] = []
    for name, comment in comments.items():
        mark = mark_of(root, name.partition("[")[0])
        places.append((mark.line, mark.column, comment) if mark else (len(lines), 0, comment))
    for row, column, comment in sorted(places, reverse=True):
        lines.insert(row, f"{' ' * column}# {' '.join(comment.split())}\n")
    return "".join(lines)


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as blocks, tabs and spaces at the end of lines included; a value that
    stands twice is written twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def analyze_scalar(self, scalar: str) -> Any:
        """A text can stand as it is also with tabs, and with spaces at the end of lines."""
        analysis = super().analyze_scalar(scalar)
        lines = scalar.replace("\t", "").split("\n")
        analysis.allow_block = analysis.allow_block or all(map(str.isprintable, lines))
        return analysis

    def represent_text(self, text: str) -> yaml.ScalarNode:
        style = '"' if _OTHER_BREAKS.search(text) else "|" if "\n" in text else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _Dumper.represent_text)
