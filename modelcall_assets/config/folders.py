"""A task's places, once references and placeholders are replaced: what is wrong with them, and how
the stores among them are reached."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from pydantic_core import PydanticCustomError

from modelcall_assets.config.distillation import DistillationTask
from modelcall_assets.config.environment import MissingVariable
from modelcall_assets.config.expand import Expander
from modelcall_assets.config.paths import is_bucket, is_relative, is_uri, is_within, shown_place
from modelcall_assets.config.problems import problem_of
from modelcall_assets.config.spec import PREPROCESSED, TaskSpec
from modelcall_assets.config.store_options import store_options
from modelcall_assets.config.stores import STORAGE_FILE, Storage
from modelcall_assets.config.task import ScoringTask
from modelcall_assets.errors import Problem


def placed(spec: TaskSpec, storage: Storage) -> tuple[TaskSpec, list[Problem]]:
    """The task with its `data_root` and `store_options`, and every problem of its places."""
    inputs, outputs = _named_folders(spec.task)
    named = inputs | outputs
    data_root, problems = _data_root(spec, storage, bool(_relative(spec, named)))
    if problems:
        return spec, problems
    spec = replace(spec, data_root=data_root)
    if problems := [each for place in named.items() for each in _place_problems(spec, *place)]:
        return spec, problems
    if problems := list(_misplaced_outputs(spec, outputs)):
        return spec, problems
    places = {place: spec.resolved(text) for place, text in named.items()}
    places |= {"": spec.journal_folder} | _preprocessed(spec)
    if storage.problems and any(map(is_uri, places.values())):
        return spec, list(storage.problems)
    options, problems = store_options(storage, spec.env, places, spec.file_name)
    flush = storage.journal_flush_seconds
    return replace(spec, store_options=options, journal_flush_seconds=flush), problems


def relative_places(spec: TaskSpec) -> dict[str, str]:
    """Where relative data folders lie, by field, if that is not the project root."""
    if spec.data_root in (None, str(spec.root)):
        return {}
    inputs, outputs = _named_folders(spec.task)
    relative = _relative(spec, inputs | outputs)
    return {place: spec.resolved(text) for place, text in relative.items()}


def _relative(spec: TaskSpec, named: Mapping[str, str]) -> dict[str, str]:
    """Folders as written, by field, that are neither URIs nor start with `/` or `./`."""
    found: dict[str, str] = {}
    for place, text in named.items():
        try:
            if is_relative(spec.env.expand(text)):
                found[place] = text
        except MissingVariable:
            continue  # a problem of the folder
    return found


def _data_root(
    spec: TaskSpec, storage: Storage, is_needed: bool
) -> tuple[str | None, list[Problem]]:
    """Resolved; None is the project root. What is wrong with it concerns who needs it only."""
    own = spec.task.data_root
    if own is not None:
        problems = list(_place_problems(spec, "data_root", own))
        return None if problems else spec.resolved(own), problems
    if not is_needed:
        return None, []
    if not storage.root_is_known:
        return None, list(storage.problems)
    if storage.data_root is None:
        return None, []
    expander = Expander(spec.env, STORAGE_FILE)
    try:
        return spec.resolved(storage.data_root), []
    except MissingVariable as error:
        wrong = f"variable {error.name} is not set"
        expander.unready("data_root", wrong, f"${{{error.name}}}")
    except PydanticCustomError as error:
        expander.problems.append(problem_of(error, STORAGE_FILE, "data_root", storage.data_root))
    return None, expander.problems


def _place_problems(spec: TaskSpec, place: str, text: str) -> Iterator[Problem]:
    """A folder that cannot be resolved."""
    try:
        spec.resolved(text)
    except MissingVariable as error:
        wrong = f"variable {error.name} is not set"
        yield Problem(spec.file_name, place, wrong, have=text)
    except PydanticCustomError as error:
        yield problem_of(error, spec.file_name, place, text)


def _named_folders(
    task: ScoringTask | DistillationTask,
) -> tuple[dict[str, str], dict[str, str]]:
    """Input and output folders as written, by field."""
    if isinstance(task, DistillationTask):
        chatml, merge, responses = task.chatml_conversion, task.jsonl_merge, task.generate_response
        inputs = {
            "chatml_conversion.input_dir": chatml and chatml.input_dir,
            "jsonl_merge.base_input_dir": merge and merge.base_input_dir,
            "generate_response.input_path": responses and responses.input_path,
        }
        outputs = {
            "chatml_conversion.output_dir": chatml and chatml.output_dir,
            "jsonl_merge.base_output_dir": merge and merge.base_output_dir,
            "generate_response.output_path": responses and responses.output_path,
            "scores.output_dir": task.scores and task.scores.output_dir,
            "journal_folder": task.journal_folder,
        }
    else:
        data, preprocess = task.data, task.preprocess
        used = preprocess.enabled
        inputs = {
            "data.input_folder": data.input_folder,
            "preprocess.input_folder": preprocess.input_folder if used else None,
        }
        outputs = {
            "data.output_folder": data.output_folder,
            "data.journal_folder": data.journal_folder,
            "preprocess.output_folder": preprocess.output_folder if used else None,
            "preprocess.stat_folder": preprocess.stat_folder if used else None,
        }
    return (
        {place: text for place, text in inputs.items() if text},
        {place: text for place, text in outputs.items() if text},
    )


def _preprocessed(spec: TaskSpec) -> dict[str, str]:
    """The folder of the preprocessed rows, which has a default."""
    if PREPROCESSED not in spec.stages:
        return {}
    return {"preprocess.output_folder": spec.folder(PREPROCESSED)}


def _output_folders(spec: TaskSpec, outputs: Mapping[str, str]) -> dict[str, str]:
    """Resolved, with those that are named nowhere."""
    return {place: spec.resolved(text) for place, text in outputs.items()} | _preprocessed(spec)


def unwritable(spec: TaskSpec) -> Iterator[Problem]:
    """Output folders of this machine that this process may not write to."""
    _, outputs = _named_folders(spec.task)
    for place, folder in _output_folders(spec, outputs).items():
        if not is_uri(folder) and not os.access(found := _nearest(folder), os.W_OK | os.X_OK):
            wrong, have = "cannot be written to", str(found)
            fix = "choose another folder, or let this user write to it"
            yield Problem(spec.file_name, place, wrong, have=have, fix=fix, unready=True)


def _nearest(folder: str) -> Path:
    """What there is of a folder on this machine: itself or the first above it."""
    path = Path(folder)
    return next((each for each in (path, *path.parents) if os.path.lexists(each)), path)


def _misplaced_outputs(spec: TaskSpec, outputs: Mapping[str, str]) -> Iterator[Problem]:
    """An output below the input would be taken for new input; one beside a bucket is in another;
    and nothing can lie below a file."""
    folders = _output_folders(spec, outputs)
    by_default = folders.keys() - outputs.keys()
    if by_default and is_bucket(spec.input_folder):
        wrong, fix = "missing: the input is a whole bucket", "name a folder for it"
        yield Problem(spec.file_name, "preprocess.output_folder", wrong, fix=fix)
    for place, folder in folders.items():
        if is_within(folder, spec.input_folder):
            wrong = "the folder lies in the input folder, so outputs would become inputs"
            yield Problem(spec.file_name, place, wrong, fix="choose a folder beside it")
        elif not is_uri(folder) and not (found := _nearest(folder)).is_dir():
            wrong = "a file stands there" if found.exists() else "a link to nothing stands there"
            have, fix = shown_place(str(found), spec.root), "choose another folder, or move it away"
            yield Problem(spec.file_name, place, wrong, "a folder", have, fix)
