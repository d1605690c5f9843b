"""The tasks of a project. A broken file breaks its own task only."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from modelcall_assets.config import Content, Parse, Parsed, at, errors_in
from modelcall_assets.config.datasets import (
    parse_datasets,
    parse_merge_groups,
    selected_datasets,
    selected_groups,
)
from modelcall_assets.config.distillation import (
    DistillationTask,
    JudgeStep,
    as_written,
    parse_distillation,
    with_steps,
)
from modelcall_assets.config.files import Environment, load_yaml, with_lines, written_name
from modelcall_assets.config.model import ModelConfig, parse_model
from modelcall_assets.config.places import is_file, load_storage, shown_path, shown_place
from modelcall_assets.config.prompt import PromptConfig, parse_prompt
from modelcall_assets.config.spec import Link, TaskSpec, output_folders, placed
from modelcall_assets.config.task import DISTILLATION_TYPES, TASK_TYPE, ScoringTask, parse_scoring
from modelcall_assets.errors import Problem, SetupError, nearest

SUFFIXES = (".yaml", ".yml")
Files = tuple[tuple[str, str, Parse], ...]
"""What a task names: the attribute of its spec, and the field of its file."""
_SCORING_FILES: Files = (
    ("model", "model.config_path", parse_model),
    ("prompt", "prompt.config_path", parse_prompt),
)
_DISTILLATION_FILES: Files = (
    ("model", "scores.model.config_path", parse_model),
    ("prompt", "scores.prompt.config_path", parse_prompt),
    ("generator", "generate_response.response_config_path", parse_model),
    ("datasets", "chatml_conversion.dataset_config_path", parse_datasets),
    ("groups", "jsonl_merge.merge_config_path", parse_merge_groups),
)
SUBMITS, JOINS = "batch_distillation_submit", "merge_distillation_results"


@dataclass(frozen=True, slots=True)
class BrokenTask:
    path: Path
    file_name: str
    key: str
    problems: tuple[Problem, ...]


@dataclass(frozen=True, slots=True)
class Catalog:
    tasks: tuple[TaskSpec, ...]
    broken: tuple[BrokenTask, ...]

    def task(self, path: Path) -> TaskSpec | None:
        """Of a file; None for one that is no task of the project. SetupError when it is broken."""
        for each in self.broken:
            if each.path == path:
                raise SetupError(each.problems)
        return next((each for each in self.tasks if each.path == path), None)


def is_root(folder: Path) -> bool:
    return (folder / "workspace.yaml").is_file() or (folder / "configs").is_dir()


def find_root(start: Path) -> Path:
    """The nearest folder from `start` upwards that holds workspace.yaml or configs/. SetupError
    when there is none."""
    start = start.resolve()
    if (found := next(filter(is_root, (start, *start.parents)), None)) is None:
        needs, fix = "workspace.yaml or configs/, here or above", "`modelcall init` makes one"
        raise SetupError([Problem(str(start), "", "no project", needs, fix=fix)])
    return found


def legal_key(name: str) -> str:
    """The name as an asset key part: letters, digits and underscores, at most 100.

    Hyphens, dots and spaces become underscores. Names that lose more than that get a digest,
    so that two Chinese names stay apart.
    """
    key = re.sub(r"[-. ]", "_", name)
    if re.fullmatch(r"[A-Za-z0-9_]{1,100}", key):
        return key
    return f"{re.sub(r'[^A-Za-z0-9_]', '_', key)[:93]}_{_digest(name)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:6]


def parse_task(
    data: Content, file: str, has_data_root: bool = False
) -> Parsed[ScoringTask | DistillationTask]:
    """The task of a file of either kind. The project has a data root or not; the task may have its
    own."""
    kind = data.get("task_type", TASK_TYPE)
    if kind in DISTILLATION_TYPES:
        return parse_distillation(data, file)
    if kind in (SUBMITS, JOINS):
        fix = "`modelcall migrate` makes tasks of it, or says which commands to use"
        return None, [Problem(file, "task_type", f"{kind} is no task here", fix=fix)]
    return parse_scoring(data, file, has_data_root)


def load_task(path: Path, root: Path) -> TaskSpec:
    """The task with the files it names. SetupError tells every problem of all of them."""
    path, root = path.resolve(), root.resolve()
    file = shown_path(path, root)
    data, storage = load_yaml(path, file), load_storage(root)
    has_data_root = storage.file.data_root is not None
    task, problems = parse_task(data, file, has_data_root)
    env = _environment(data, file, root, problems)
    named, files = _named_files(data, file, root, problems)
    if task is None or errors_in(problems):
        raise SetupError([*with_lines(problems, root)])
    if "prompt" in named:
        problems += _unfit_prompt(task, named["prompt"], file)
    models = [named[name] for name in ("model", "generator") if name in named]
    problems += _unkept_budget(task, models, file)
    if isinstance(task, DistillationTask):
        problems += _select(task, named, file)
    spec = TaskSpec(
        path=path,
        root=root,
        name=task.task_name,
        key=legal_key(task.task_name),
        task=task,
        env=env,
        file_name=file,
        files=files,
        **named,
    )
    spec, misplaced = placed(spec, storage)
    written = (as_written(problem, data) for problem in (*problems, *misplaced))
    problems = [*with_lines(written, root)]
    if any(problem.severity == "error" for problem in problems):
        raise SetupError(problems)
    return replace(spec, warnings=tuple(problems))


def _environment(data: Content, file: str, root: Path, problems: list[Problem]) -> Environment:
    named = at(data, "environment.config_path")
    texts = cast("list[Any]", named) if isinstance(named, list) else [named]
    places = [("environment.config_path", text) for text in texts]
    places.append(("environment.tos_config_path", at(data, "environment.tos_config_path")))
    paths: list[Path] = []
    for place, text in places:
        if not isinstance(text, str) or not text:
            continue
        if is_file(root / text):
            paths.append(root / text)
        else:
            problems.append(Problem(file, place, "no such file", have=text))
    try:
        return Environment.for_task(root, paths)
    except SetupError as error:
        problems += [replace(p, file=shown_path(Path(p.file), root)) for p in error.problems]
        return Environment({})


def _named_files(
    data: Content, file: str, root: Path, problems: list[Problem]
) -> tuple[dict[str, Any], dict[str, str]]:
    """The files that a task names: parsed, and relative to the root. What is wrong with them is
    added to the problems."""
    found: dict[str, Any] = {}
    files: dict[str, str] = {}
    is_distillation = data.get("task_type") in DISTILLATION_TYPES
    known = with_steps(data, file)[0] if is_distillation else data
    for name, field, parse in _DISTILLATION_FILES if is_distillation else _SCORING_FILES:
        text = at(known, field)
        if not isinstance(text, str) or not text:
            continue
        is_there = is_file(root / text)
        path = (root / text).resolve() if is_there else Path(os.path.normpath(root / text))
        files[name] = shown = shown_path(path, root)
        if not is_there:
            is_in_folder = os.path.isdir(path.parent)  # noqa: PTH112
            siblings = path.parent.glob("*") if is_in_folder else ()
            close = nearest(path.name, [sibling.name for sibling in siblings])
            fix = f"did you mean {(Path(text).parent / close).as_posix()}?" if close else ""
            wrong = Problem(file, field, "no such file", have=text, fix=fix)
            problems.append(as_written(wrong, data))
            continue
        try:
            parsed, wrong = parse(load_yaml(path, shown), shown)
        except SetupError as error:
            parsed, wrong = None, error.problems
        problems += wrong
        if parsed is not None:
            found[name] = parsed
    return found, files


def _unfit_prompt(
    task: ScoringTask | DistillationTask, prompt: PromptConfig, file: str
) -> Iterator[Problem]:
    """A prompt that names neither of the two columns that hold the text to rate, and one without
    the score that is expected."""
    rated, sent = task.rated, prompt.placeholders
    columns = {name.partition(".")[0] for name in sent} | sent
    if columns.isdisjoint((rated.prompt_format_key, rated.input_key)):
        wrong = f"no placeholder of the prompt, so that the column {rated.input_key} is not sent"
        have = ", ".join(sorted(sent)) or "a prompt without placeholders"
        fix = f"name one of those, or write {{{rated.prompt_format_key}}} in the prompt"
        place = f"{'data' if isinstance(task, ScoringTask) else 'scores'}.prompt_format_key"
        yield Problem(file, place, wrong, have=have, fix=fix, severity="warning")
    if isinstance(rated, JudgeStep) and rated.expected and not prompt.output_config.score_digits:
        expected = "`score: {type: integer, minimum: …, maximum: …}` within 0 to 9 in json_schema"
        yield Problem(file, "scores.expected", "the prompt's score is not one digit", expected)


def _unkept_budget(
    task: ScoringTask | DistillationTask, models: Sequence[ModelConfig], file: str
) -> Iterator[Problem]:
    for name in ("budget_usd", "budget_tokens"):
        if getattr(task, name) is not None and not models:
            yield Problem(file, name, "not used: the task asks no model", fix=f"remove {name}")
    for model in models if task.budget_usd is not None else ():
        if None in model.token_prices[:2]:
            wrong = "the model file has no prices to count with"
            yield Problem(file, "budget_usd", wrong, fix="set prices there, or use budget_tokens")


def _select(task: DistillationTask, named: dict[str, Any], file: str) -> Iterator[Problem]:
    """Leaves the data sets and groups that the task wants of those in the files."""
    if (chatml := task.chatml_conversion) is not None:
        names, field = chatml.selected_datasets, "chatml_conversion.selected_datasets"
        named["datasets"], wrong = selected_datasets(named["datasets"], names, file, field)
        yield from wrong
    if (merge := task.jsonl_merge) is not None:
        names, field = merge.merge_groups, "jsonl_merge.merge_groups"
        named["groups"], wrong = selected_groups(named["groups"], names, file, field)
        yield from wrong


def load_model(path: Path, root: Path) -> ModelConfig:
    """A model file by itself. SetupError tells every problem of it."""
    file = shown_path(path.resolve(), root.resolve())
    model, problems = parse_model(load_yaml(path, file), file)
    if model is None:
        raise SetupError([*with_lines(problems, root)])
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
    tasks = _linked(tasks)
    taken = {spec.key for spec in tasks}
    return Catalog(tuple(tasks), tuple(_broken(path, root, why, taken) for path, why in failed))


def load_linked(path: Path, root: Path) -> TaskSpec:
    """One task as the project has it: with links to the tasks whose output it reads."""
    return load_catalog(root).task(path.resolve()) or load_task(path, root)


def task_files(root: Path) -> list[Path]:
    folder = root / "configs" / "tasks"
    files = (path for path in folder.rglob("*") if path.suffix in SUFFIXES and path.is_file())
    return sorted(path for path in files if "templates" not in path.relative_to(folder).parts[:-1])


def named_tasks(root: Path) -> dict[str, Path]:
    """The files of a project's tasks, broken ones too, by both their names. What several files are
    called names none; of those with one `task_name` it is the first, as in the catalog."""
    files = task_files(root)
    called = Counter(file.stem for file in files)
    by_file = {file.stem: file for file in files if called[file.stem] == 1}
    return by_file | {written_name(file): file for file in reversed(files)}


def _linked(tasks: Sequence[TaskSpec]) -> list[TaskSpec]:
    """Tasks whose first step reads what another one leaves; those of a circle stay unlinked."""
    by_key = {spec.key: spec for spec in tasks}
    distilling = [(spec, spec.task) for spec in tasks if isinstance(spec.task, DistillationTask)]
    leaves = {
        spec.folder(stage): (spec.key, stage)
        for spec, task in distilling
        for stage in task.stage_folders
    }
    reading = {
        spec.key: _input_place(spec) for spec, task in distilling if not task.makes_conversations
    }
    sources = {key: leaves[place] for key, place in reading.items() if place in leaves}

    def comes_back(key: str) -> bool:
        at, seen = key, set[str]()
        while at in sources and at not in seen:
            seen.add(at)
            at = sources[at][0]
        return at == key and at in seen

    def linked(spec: TaskSpec) -> TaskSpec:
        if spec.key not in sources or comes_back(spec.key):
            return spec
        source, stage = sources[spec.key]
        return replace(spec, link=Link(linked(by_key[source]), stage))

    return [linked(spec) for spec in tasks]


def _input_place(spec: TaskSpec) -> str:
    folder = spec.input_folder
    return (folder.rpartition("/")[0] or "/") if spec.has_one_input else folder


def _clashes(spec: TaskSpec, tasks: Sequence[TaskSpec]) -> Iterator[Problem]:
    """What a task may not share with an earlier one."""
    for first in tasks:
        if first.key == spec.key:
            wrong = f"{spec.name} is the name of the task in {first.file_name}"
            if first.name != spec.name:
                wrong = f"{spec.name} and {first.name} ({first.file_name}) are both {spec.key}"
            yield Problem(spec.file_name, "task_name", wrong, fix="choose another name")
        for place, folder in output_folders(spec).items():
            if folder in first.folders:
                wrong = f"{first.file_name} writes to the same folder"
                have = shown_place(folder, spec.root)
                fix = "give each task its own"
                yield Problem(spec.file_name, place, wrong, have=have, fix=fix)


def _broken(path: Path, root: Path, problems: Sequence[Problem], taken: set[str]) -> BrokenTask:
    """Keeps the key that the task would have, unless another task has it."""
    file = shown_path(path, root)
    key = legal_key(written_name(path))
    if key in taken:
        key = f"{key[:90]}_{_digest(file)}"
    taken.add(key)
    return BrokenTask(path, file, key, tuple(with_lines(problems, root)))
