"""What a right task still lacks before it can run: keys, folders, columns, members of a group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from modelcall_assets.config.block import did_you_mean
from modelcall_assets.config.paths import shown_place
from modelcall_assets.config.spec import TaskSpec
from modelcall_assets.errors import InputError, Problem, SetupError
from modelcall_assets.records.data_files import is_data_file
from modelcall_assets.records.outcome import BadLine, Dropped, Failure, Row
from modelcall_assets.stages.asking import AskingStage
from modelcall_assets.stages.preprocessed import Preprocessed
from modelcall_assets.stages.preview import first_rows
from modelcall_assets.stages.task import Task
from modelcall_assets.storage.listing import FileInfo
from modelcall_assets.storage.rows import read_rows

ROWS_LOOKED_AT = 20


def readiness(spec: TaskSpec) -> Iterator[Problem]:
    """Told as warnings: the file itself is right."""
    task = Task(spec)
    try:
        task.check_ready()
    except SetupError as error:
        yield from error.problems
    place = task.layout.input_folder
    if not isinstance(place, Path):
        return  # a store that is not there would hold everything up: `plan` asks it
    reads_files = task.linked is None
    if reads_files and not (place.is_file() if spec.has_one_input else place.is_dir()):
        what = "file" if spec.has_one_input else "folder"
        wrong, have = f"no such {what} yet: nothing to do", shown_place(str(place), spec.root)
        yield task.warning(wrong, have=have)
    elif any(stage.knows_input for stage in task.stages):
        for stage in task.stages:
            yield from stage.lacks()
    elif reads_files:
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
    items = islice(read_rows(file.place, task.stages[0].reading), ROWS_LOOKED_AT)
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
    wrong = (
        f"none of the first {len(asked)} rows of {file} can be {stage.done}: {failures[0][:200]}"
    )
    have = _columns([row for row in rows if not isinstance(row, Failure)])
    field, fix = stage.hint
    yield task.warning(wrong, field=field, have=have, fix=fix if have else "")


def _columns(rows: Sequence[Row]) -> str:
    names = dict.fromkeys(name for row in rows for name in row)
    return f"the columns {', '.join(names)}" if names else ""
