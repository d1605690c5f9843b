"""What a right task still lacks before it can run: keys, folders, columns, members of a group."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from modelcall_assets.config.block import did_you_mean
from modelcall_assets.config.datasets import DatasetConfig
from modelcall_assets.config.paths import shown_place
from modelcall_assets.config.spec import CHATML, MERGED, RAW, TaskSpec
from modelcall_assets.errors import InputError, Problem, SetupError
from modelcall_assets.records.data_files import is_data_file
from modelcall_assets.records.keys import decode_key
from modelcall_assets.records.outcome import Dropped, Failure
from modelcall_assets.records.record import BadLine, Row
from modelcall_assets.steps.distillation_steps import DistillationSteps, steps_of
from modelcall_assets.steps.merged import members_of
from modelcall_assets.steps.preview import first_rows
from modelcall_assets.steps.replay import Asked
from modelcall_assets.steps.task_steps import FILES, TaskSteps
from modelcall_assets.storage.datasets import Split, dataset_path, find_splits
from modelcall_assets.storage.listing import FileInfo
from modelcall_assets.storage.rows import read_rows
from modelcall_assets.transforms.chatml import ChatmlOptions, to_chatml

ROWS_LOOKED_AT = 20


def readiness(spec: TaskSpec) -> Iterator[Problem]:
    """Told as warnings: the file itself is right."""
    steps = steps_of(spec)
    try:
        steps.check_ready()
    except SetupError as error:
        yield from error.problems
    place = steps.layout.folder(RAW)
    if not isinstance(place, Path):
        return  # a store that is not there would hold everything up: `plan` asks it
    if RAW in steps.stages and not (place.is_file() if spec.has_one_input else place.is_dir()):
        what = "file" if spec.has_one_input else "folder"
        wrong, have = f"no such {what} yet: nothing to do", shown_place(str(place), spec.root)
        yield _warning(steps, steps.input_field, wrong, have=have)
    elif isinstance(steps, DistillationSteps) and CHATML in steps.stages:
        yield from _dataset_problems(steps)
    elif isinstance(steps, DistillationSteps) and MERGED in steps.stages:
        yield from _member_problems(steps)
    elif RAW in steps.stages:
        yield from _row_problems(steps)


def _warning(steps: TaskSteps, field: str, wrong: str, *, have: str = "", fix: str = "") -> Problem:
    return Problem(steps.spec.file_name, field, wrong, have=have, fix=fix, severity="warning")


def _row_problems(steps: TaskSteps) -> Iterator[Problem]:
    """Two inputs with one output; and columns that the first rows there are do not have."""
    try:
        for file in steps.inputs.files():
            yield from _absent_columns(steps, file)
            rows = first_rows(steps, file, ROWS_LOOKED_AT)
            if kept := [row for row in rows if not isinstance(row, Dropped)]:
                yield from _unanswerable(steps, file.key_path, kept)
                return
    except SetupError as error:
        yield from error.problems
    except InputError as error:
        yield _warning(steps, steps.input_field, str(error))


def _absent_columns(steps: TaskSteps, file: FileInfo) -> Iterator[Problem]:
    """Columns that preprocessing names and that the first rows do not have."""
    if steps.recipe is None or not is_data_file(file.place.name):
        return
    items = islice(read_rows(file.place, steps.reading), ROWS_LOOKED_AT)
    rows = [item for item in items if not isinstance(item, BadLine)]
    names = dict.fromkeys(name for row in rows for name in row)
    for place, column in steps.recipe.absent(names).items() if rows else ():
        wrong = f"no column {column} in the first {len(rows)} rows of {file.key_path}"
        fix = did_you_mean(column, names)
        yield _warning(steps, f"preprocess.{place}", wrong, have=_columns(rows), fix=fix)


def _unanswerable(steps: TaskSteps, file: str, rows: Sequence[Row | Failure]) -> Iterator[Problem]:
    """When no row can be asked, something common to all is wrong: a column's name, for example."""
    field, what, look = "data", "rated", _look(steps)
    fix = "compare data.input_key and the placeholders of the prompt with them"
    if isinstance(steps, DistillationSteps):
        field, what = steps.input_field, "answered"
        fix = "conversations are a list of turns in the column messages; chatml_conversion makes it"
    asked = [row if isinstance(row, Failure) else look(row) for row in rows]
    failures = [each.detail for each in asked if isinstance(each, Failure)]
    if len(failures) < len(asked):
        return
    wrong = f"none of the first {len(asked)} rows of {file} can be {what}: {failures[0][:200]}"
    have = _columns([row for row in rows if not isinstance(row, Failure)])
    yield _warning(steps, field, wrong, have=have, fix=fix if have else "")


def _look(steps: TaskSteps) -> Callable[[Row], Asked | Row]:
    """What the first stage that asks makes of a row."""
    if isinstance(steps, DistillationSteps):
        return steps.response_stage.ask
    return steps.score_stage.ask if steps.rule_stage is None else lambda row: row


def _columns(rows: Sequence[Row]) -> str:
    names = dict.fromkeys(name for row in rows for name in row)
    return f"the columns {', '.join(names)}" if names else ""


def _dataset_problems(steps: DistillationSteps) -> Iterator[Problem]:
    """Data sets that are not there, or whose first rows are not what the dataset config says."""
    found: dict[str, list[Split]] = {}
    for name, dataset in steps.spec.datasets.items():
        path = dataset_path(steps.layout.folder(RAW), name)
        try:
            found[name] = find_splits(path, dataset.configs)
            yield from _split_problems(steps, name, found[name])
        except InputError as error:
            yield _warning(steps, steps.input_field, f"{name}: {error}")
    if len(found) == len(steps.spec.datasets):
        if MERGED in steps.stages:
            yield from _member_problems(steps)
        return
    splits = sum(map(len, found.values()))
    wrong = f"{len(found)} of {len(steps.spec.datasets)} data sets can be read: {splits} splits"
    fix = "bring the others, or name those that are there in selected_datasets"
    yield _warning(steps, steps.input_field, wrong, fix=fix)


def _split_problems(
    steps: DistillationSteps, name: str, splits: Sequence[Split]
) -> Iterator[Problem]:
    """Of the first split: columns that no row has, else rows of which none can be converted."""
    spec, file = steps.spec, splits[0].files[0]
    dataset = spec.datasets[name]
    items = islice(read_rows(file.place, steps.reading), ROWS_LOOKED_AT)
    rows = [item for item in items if not isinstance(item, BadLine)]
    absent = [key for key, column in dataset.column_mapping.items() if not _has(rows, column)]
    shown = f"the first {len(rows)} rows of {shown_place(file.uri, spec.root)}"
    shown += f" ({len(splits)} splits)" if len(splits) > 1 else ""
    for key in absent if rows else ():
        column, names = dataset.column_mapping[key], [str(name) for row in rows for name in row]
        yield Problem(
            spec.files["datasets"],
            f"{name}.column_mapping.{key}",
            f"no column {column} in {shown}",
            have=_columns(rows),
            fix=did_you_mean(column, names),
            severity="warning",
        )
    if rows and not absent and (why := _inconvertible(rows, dataset)):
        wrong = f"none of {shown} is a conversation of this style: {why}"
        place = f"{name}.format_style"
        yield Problem(spec.files["datasets"], place, wrong, severity="warning")


def _has(rows: Sequence[Row], column: str) -> bool:
    return any(column in row for row in rows)


def _inconvertible(rows: Sequence[Row], dataset: DatasetConfig) -> str:
    """Why the first row cannot be converted, when none can."""
    options = ChatmlOptions(dataset.format_style, dataset.column_mapping)
    made = [to_chatml(row, options) for row in rows]
    if any(isinstance(each, dict) for each in made):
        return ""
    first = made[0]
    return first.detail if isinstance(first, Failure) else "what it needs is empty"


def _member_problems(steps: DistillationSteps) -> Iterator[Problem]:
    """Members of the merge groups that are not there now."""
    spec = steps.spec
    folder = spec.folder(CHATML) if CHATML in steps.stages else spec.input_folder
    try:
        paths = [decode_key(key) for key in steps.keys(FILES)]
    except (InputError, SetupError) as error:
        of = f"{spec.link.spec.name} leaves nothing yet: " if spec.link is not None else ""
        yield _warning(steps, steps.input_field, f"{of}{error}")
        return
    for group in spec.groups:
        try:
            members_of(group, paths, shown_place(folder, spec.root))
        except InputError as error:
            yield _warning(steps, "jsonl_merge.merge_config_path", str(error))
