"""What keeps right tasks from running now: keys, packages, data, columns that no row has."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Thread

from modelcall_assets.cli.plan import prepared_rows
from modelcall_assets.errors import InputError, Problem, SetupError, did_you_mean
from modelcall_assets.records import is_data_file
from modelcall_assets.records.outcome import Dropped, Failure, Row
from modelcall_assets.sources.environment import EnvironmentTasks
from modelcall_assets.stages.asking import AskingStage
from modelcall_assets.stages.prepared import Prepared
from modelcall_assets.stages.preprocessed import Preprocessed
from modelcall_assets.stages.source import ROWS_LOOKED_AT, column_names, first_rows
from modelcall_assets.stages.task import Task
from modelcall_assets.storage.listing import FileInfo

STORES_S = 10.0


def readiness(tasks: Sequence[Task], *, asks_services: bool) -> list[list[Problem]]:
    """Of each task. Stores are looked at side by side; what they do not say within seconds is a
    warning."""
    found, looks = [[*_of_task(task)] for task in tasks], list[Thread]()
    for task, told in zip(tasks, found, strict=True):
        looks.append(Thread(target=_look, args=(task, told, asks_services), daemon=True))
        is_here = isinstance(task.layout.input_folder, Path)
        (looks[-1].run if is_here else looks[-1].start)()
    until = time.monotonic() + STORES_S
    for task, told, look in zip(tasks, found, looks, strict=True):
        if look.ident is not None:
            look.join(max(0, until - time.monotonic()))
        if look.is_alive():
            wrong = f"not all that is in the store could be looked at within {STORES_S:g} s"
            told.append(task.warning(wrong, fix="check the network, and the store's endpoint"))
    return found


def _of_task(task: Task) -> Iterator[Problem]:
    for check_ready in (task.check_ready, *(each.check_ready for each in task.overviews)):
        try:
            check_ready()
        except SetupError as error:
            yield from error.problems
    for stage in task.stages:
        if not isinstance(stage, AskingStage) or stage.samples == 1:
            continue
        if stage.params.get("temperature") == 0:
            wrong = f"{stage.samples} answers to a row by a model at temperature 0 are alike"
            yield task.warning(wrong, field="generate_response.samples", fix="raise it")


def _look(task: Task, told: list[Problem], asks_services: bool) -> None:
    """At the input, if it needs no environment service that may not be asked: what the stages lack;
    else two files with one output, and what the first rows of files do not have, each once."""
    prepared = task.find(Prepared)
    try:
        sources = () if prepared is None or asks_services else prepared.inputs.sources.values()
        is_service = any(isinstance(e, EnvironmentTasks) for s in sources for e in s.leaves())
        lacking = [] if task.absent_input is None else [task.absent_input]
        if not lacking and not is_service:
            lacking = [problem for stage in task.stages for problem in stage.lacks()]
            own = task.spec.file_name  # what is said of other files is more than absent data
            lacking = [replace(each, unready=each.file == own) for each in lacking]
        told += lacking
        if not lacking and not is_service and not task.linked:
            told += _of_files(task, task.inputs.files())
    except SetupError as error:
        told += error.problems
    except InputError as error:
        told.append(task.warning(str(error)))


def _of_files(task: Task, files: Sequence[FileInfo]) -> Iterator[Problem]:
    found = dict[Problem, list[tuple[int, FileInfo, str]]]()
    for file in files:
        for problem, rows in _of_file(task, file):
            found.setdefault(replace(problem, have=""), []).append((rows, file, problem.have))
    for problem, ((rows, file, have), *more) in found.items():
        where = f"the first {rows} rows of " * bool(rows) + file.key_path
        if more:
            count = f"{len(more) + 1} of {len(files)} files"
            where = f"the first rows of {count}, such as {file.key_path}"
        yield replace(problem, wrong=problem.wrong.replace("{}", where, 1), have=have)


def _of_file(task: Task, file: FileInfo) -> Iterator[tuple[Problem, int]]:
    """{} stands for its first rows, so many."""
    try:
        yield from _absent_columns(task, file)
        rows = prepared_rows(task, file, ROWS_LOOKED_AT)
        kept = [row for row in rows if not isinstance(row, Dropped)]
        yield from ((problem, len(kept)) for problem in _unanswerable(task, kept))
    except InputError as error:
        yield task.warning(str(error).replace(str(file.place), "{}", 1)), 0


def _absent_columns(task: Task, file: FileInfo) -> Iterator[tuple[Problem, int]]:
    """Columns that preprocessing names and that the first rows do not have."""
    stage = task.find(Preprocessed)
    if stage is None or not is_data_file(file.place.name):
        return
    rows = first_rows(file.place, task.stages[0].reading)
    names = column_names(rows)
    for place, column in stage.recipe.absent(names).items() if rows else ():
        fix, field = did_you_mean(column, names), f"preprocess.{place}"
        wrong = f"no column {column} in {{}}"
        yield task.warning(wrong, field=field, have=_columns(rows), fix=fix), len(rows)


def _unanswerable(task: Task, rows: Sequence[Row | Failure]) -> Iterator[Problem]:
    """When no row can be asked, something common to all is wrong: a column's name, for example."""
    stage = task.first_answering
    if stage is None:
        return
    asked = [
        stage.ask(row) if isinstance(stage, AskingStage) and not isinstance(row, Failure) else row
        for row in rows
    ]
    failures = [each.detail for each in asked if isinstance(each, Failure)]
    if not rows or len(failures) < len(asked):
        return
    wrong = f"none of {{}} can be {stage.done}: {failures[0][:200]}"
    have = _columns([row for row in rows if not isinstance(row, Failure)])
    field, fix = stage.hint
    yield task.warning(wrong, field=field, have=have, fix=fix if have else "")


def _columns(rows: Sequence[Row]) -> str:
    names = column_names(rows)
    return f"the columns {', '.join(names)}" if names else ""
