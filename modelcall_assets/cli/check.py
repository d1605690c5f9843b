"""`modelcall check`: everything wrong with the set-up, before anything runs; and `migrate`, which
rewrites config files of the old system."""

import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import click
import yaml

from modelcall_assets.cli.options import EXISTING_FILE, force_option, refuse_existing
from modelcall_assets.cli.readiness import readiness
from modelcall_assets.cli.terminal import echo, echo_data
from modelcall_assets.config import Content, Parse
from modelcall_assets.config.batches import migrate_batch
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
from modelcall_assets.config.spec import relative_places
from modelcall_assets.errors import Problem, SetupError
from modelcall_assets.records.secrets import looks_secret
from modelcall_assets.stages.task import Task


@click.command()
@click.argument("paths", nargs=-1, type=click.Path(path_type=Path))
@click.option("--strict", is_flag=True, help="Warnings fail too.")
def check(paths: tuple[Path, ...], strict: bool) -> None:
    """Check task files and those that they name: PATHS, or all of the project's configs/.

    Prints every problem as file:field, with its line, and exits with 1 when there is an error. The
    first rows of the input files are looked at too. What is right but cannot run here yet, such as
    a task whose key or data is not there, is a warning; without PATHS such files are only named,
    and no environment service is asked.

    \b
      modelcall check
      modelcall check configs/tasks/my_task.yaml
    """
    files, problems = _files(paths or (find_root(Path.cwd()) / "configs",))
    catalog_of, is_all, waiting = cache(load_catalog), not paths and not strict, dict[str, None]()
    # All of them begin before one is waited for: some are in stores.
    looks = [(path, _problems_of(path, _root_of(path), catalog_of, is_all)) for path in files]
    for path, found in looks:
        root = _root_of(path)
        for problem in with_lines(found, root):
            # A file can be right where its task cannot run: without the keys, for example.
            told = replace(problem, severity="warning") if problem.unready else problem
            if problem.unready and is_all:
                waiting[path.stem] = None
            else:
                problems.append(told)
        tasks = catalog_of(root).tasks if path.is_relative_to(root / "configs" / "tasks") else ()
        for spec in (spec for spec in tasks if spec.path == path):
            for place, where in relative_places(spec).items():
                echo(f"{spec.file_name}:{place}: is {where}")
    if waiting:
        told = f"{', '.join(waiting)}; `modelcall check FILE` says for what"
        echo(f"{len(waiting)} files wait for keys, variables or data: {told}")
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
    path: Path, root: Path, catalog_of: Callable[[Path], Catalog], is_all: bool
) -> Iterable[Problem]:
    file = shown_path(path, root)
    try:
        data = load_yaml(path, file)
    except SetupError as error:
        return error.problems
    if (parse := _parser(path, root, data)) is not None:
        return parse(data, file)[1]
    found = _task_problems(path, root, catalog_of(root), is_all)
    return (as_written(each, data) for each in found)


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


def _task_problems(path: Path, root: Path, catalog: Catalog, is_all: bool) -> Iterable[Problem]:
    """Problems of a task as the project sees it; a template or a stray file stands alone."""
    try:
        spec = catalog.task(path) or load_task(path, root)
    except SetupError as error:
        return error.problems
    if is_all and "templates" in path.parts:
        return spec.warnings
    return chain(spec.warnings, readiness(Task(spec), asks_services=not is_all))


_OTHER_BREAKS = re.compile("[\x85\u2028\u2029\ufeff]")
"""YAML takes these for line breaks or drops them, unless they are escaped."""


@click.command()
@click.argument("old", type=EXISTING_FILE)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="Where to write the new file; default: standard output. Of a batch a folder.",
)
@force_option
def migrate(old: Path, output: Path | None, force: bool) -> None:
    """Rewrite OLD.yaml, a config file of the old system, for this project.

    Takes files of tasks, models, prompts, data sets and merge groups. A file that submits a batch
    becomes a task for each of its models, in a folder; one that joins results the commands for it.

    Lists what is honoured, changed and refused. Exits with 1 when something was refused: a TODO
    stands at its place in the new file. API keys are replaced by references and never shown;
    comments of the old file are not carried over.

    \b
      modelcall migrate old/my_task.yaml --output configs/tasks/my_task.yaml
    """
    content = load_yaml(old)
    batch = migrate_batch(content, old.name)
    if output and batch is None and output.suffix not in SUFFIXES:
        raise click.BadParameter("the new file is YAML: name it .yaml", param_hint="--output")
    new = batch or migrate_file(content, old.name)
    files = [(output, new)] if batch is None else []
    for name, data in new.parts.items():
        part = replace(migrate_file(data, old.name), old=content)
        files.append((output / name if output else None, part))
        new.commands.append(f"modelcall run-task {(output or Path()) / name}")
    refuse_existing((target for target, _ in files if target), force)
    for target, part in files:
        text = _text_of(part, old) if part.data is not None else ""
        if target and text:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, "utf-8")
        else:
            echo_data("---\n" * (part is not new) + text)
        for name, reason in part.of("refused").items() if part is not new else ():
            new.say("refused", name, reason)
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
    yield from (f"run: {command}" for command in new.commands)
    if new.data is None and not new.commands:
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
