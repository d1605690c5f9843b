"""What keeps right tasks from running now: keys, packages, data, columns that no row has."""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Thread

from modelcall_assets.cli.plan import prepared_rows
from modelcall_assets.errors import InputError, Problem, SetupError, did_you_mean
from modelcall_assets.records import is_data_file
from modelcall_assets.records.outcome import Dropped, Failure, Row
from modelcall_assets.stages.asking import AskingStage
from modelcall_assets.stages.prepared import Prepared
from modelcall_assets.stages.preprocessed import Preprocessed
from modelcall_assets.stages.source import ROWS_LOOKED_AT, column_names, first_rows
from modelcall_assets.stages.task import Task
from modelcall_assets.storage.listing import FileInfo

STORES_S = 10.0


def readiness(task: Task, *, asks_services: bool) -> Iterable[Problem]:
    """A store is looked at meanwhile; what it does not say within seconds is a warning."""
    told, until = [*_of_task(task)], time.monotonic() + STORES_S
    look = Thread(target=_look, args=(task, told, asks_services), daemon=True)
    is_here = isinstance(task.layout.input_folder, Path)
    (look.run if is_here else look.start)()
    return told if is_here else _awaited(task, told, look, until)


def _awaited(task: Task, told: list[Problem], look: Thread, until: float) -> Iterator[Problem]:
    look.join(max(0, until - time.monotonic()))
    wrong = f"the store has not said all within {STORES_S:g} s; check the network and its endpoint"
    yield from [*told, task.warning(wrong)] if look.is_alive() else told


def _of_task(task: Task) -> Iterator[Problem]:
    for check_ready in (task.check_ready, *(each.check_ready for each in task.overviews)):
        try:
            check_ready()
        except SetupError as error:
            yield from error.problems
    for stage in (each for each in task.stages if isinstance(each, AskingStage)):
        if stage.samples > 1 and stage.params.get("temperature") == 0:
            wrong = f"{stage.samples} answers to a row by a model at temperature 0 are alike"
            yield task.warning(wrong, field="generate_response.samples", fix="raise it")


def _look(task: Task, told: list[Problem], asks_services: bool) -> None:
    """At the input, if it needs no environment service that may not be asked: what the stages lack;
    else two files with one output, and what the first rows of files do not have, each once."""
    prepared, own = task.find(Prepared), task.spec.file_name
    try:
        sources = () if prepared is None or asks_services else prepared.inputs.sources.values()
        if any(leaf.is_service for each in sources for leaf in each.leaves()):
            return
        lacking = [task.absent_input] if task.absent_input else []
        lacking = lacking or [problem for stage in task.stages for problem in stage.lacks()]
        # What is said of other files is more than data that is not there.
        told += (replace(each, unready=each.file == own) for each in lacking)
        if not lacking and not task.linked:
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
        where += f" and of {len(more):,} more files" * bool(more)
        yield replace(problem, wrong=problem.wrong.replace("{}", where, 1), have=have)


def _of_file(task: Task, file: FileInfo) -> Iterator[tuple[Problem, int]]:
    """What is wrong with so many first rows, for which {} stands."""
    stage, reading = task.find(Preprocessed), task.stages[0].reading
    try:
        if stage is not None and is_data_file(file.place.name):
            rows = first_rows(file.place, reading)
            names = column_names(rows)
            for place, column in stage.recipe.absent(names).items() if rows else ():
                wrong, fix = f"no column {column} in {{}}", did_you_mean(column, names)
                field, have = f"preprocess.{place}", _columns(rows)
                yield task.warning(wrong, field=field, have=have, fix=fix), len(rows)
        found = prepared_rows(task, file, ROWS_LOOKED_AT)
        kept = [row for row in found if not isinstance(row, Dropped)]
        yield from ((problem, len(kept)) for problem in _unanswerable(task, kept))
    except InputError as error:
        yield task.warning(str(error).replace(str(file.place), "{}", 1)), 0


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
