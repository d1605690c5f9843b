"""Files that only distilling tasks name: which data sets become ChatML, and what is merged."""

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, cast

from pydantic import AfterValidator, Field

from modelcall_assets.config import (
    Block,
    Content,
    Parsed,
    Text,
    errors_in,
    mistake,
    must,
    shown_value,
    validate,
)
from modelcall_assets.errors import Problem, did_you_mean
from modelcall_assets.records import stem_of

MAPPING_KEYS: Mapping[str, tuple[str, ...]] = {
    "prompt_response": ("prompt", "response"),
    "instruction_input": ("prompt", "input", "response"),
    "sharegpt": ("conversations",),
    "messages": ("messages",),
    "input_output_messages": ("input", "output"),
    "prompt_text_only": ("prompt_text",),
}
"""What `column_mapping` must say for each `format_style`."""


class DatasetConfig(Block):
    """One data set: a Hugging Face folder or a JSONL file."""

    configs: Annotated[
        list[Text | None],
        must(bool, "empty", "names, or null for the default configuration"),
        must(lambda names: len({*names}) == len(names), "names a configuration twice"),
    ] = Field(default=[None])
    """Configurations to convert; null is the default one."""
    format_style: Literal[
        "prompt_response",
        "instruction_input",
        "sharegpt",
        "messages",
        "input_output_messages",
        "prompt_text_only",
    ]
    """What its rows look like."""
    column_mapping: dict[str, Text]
    """Which column holds what the style needs."""


def parse_datasets(data: Content, file: str) -> Parsed[Mapping[str, DatasetConfig]]:
    """Every data set by its key, in the file's order."""
    datasets: dict[str, DatasetConfig] = {}
    problems = [] if data else [Problem(file, "", "names no data set")]
    for key, block in data.items():
        if any(part in ("", ".", "..") for part in key.split("/")):
            wrong, expected = "not a data set's name", "`org/name` or a file name"
            problems.append(Problem(file, key, wrong, expected))
        elif not isinstance(block, dict):
            have = shown_value(block, key)
            problems.append(Problem(file, key, "wrong type", "a mapping", have))
        else:
            dataset, found = validate(DatasetConfig, cast("Content", block), file)
            problems += [replace(each, field=f"{key}.{each.field}") for each in found]
            if dataset is not None:
                datasets[key] = dataset
                problems += _mapping_problems(dataset, f"{key}.column_mapping", file)
    return None if errors_in(problems) else datasets, problems


def are_datasets(data: Mapping[str, Any]) -> bool:
    """Whether a file whose kind is unknown looks like a dataset config."""
    blocks = [cast("Content", block) for block in data.values() if isinstance(block, dict)]
    return 0 < len(blocks) == len(data) and all("format_style" in block for block in blocks)


def selected_datasets(
    datasets: Mapping[str, DatasetConfig], names: Sequence[str], file: str, field: str
) -> tuple[Mapping[str, DatasetConfig], list[Problem]]:
    """What `field` of the task `file` names; everything when it names nothing. An unknown name is a
    warning, an error when no name is known."""
    kept = {key: dataset for key, dataset in datasets.items() if key in names or not names}
    severity = "warning" if kept else "error"
    problems: list[Problem] = []
    for place, name in _unknown(names, datasets, field):
        wrong, have = "not in the dataset config", shown_value(name, "selected_datasets")
        fix = did_you_mean(name, datasets)
        problems.append(Problem(file, place, wrong, have=have, fix=fix, severity=severity))
    return kept, problems


def output_name(dataset_key: str, config: str | None, split: str, with_system: bool) -> str:
    """`org/name`, `en`, `train` → `name/org_name-en-train.jsonl`."""
    folder = stem_of(dataset_key.rpartition("/")[2])
    parts = [dataset_key, config, split, "with_system" if with_system else None]
    name = "-".join(part.replace("/", "_") for part in parts if part is not None)
    return f"{folder}/{name}.jsonl"


def _mapping_problems(dataset: DatasetConfig, field: str, file: str) -> Iterator[Problem]:
    style, mapping = dataset.format_style, dataset.column_mapping
    keys = MAPPING_KEYS[style]
    for key in (key for key in keys if key not in mapping):
        fix = f"add `{key}:`, the column ({style} needs it)"
        yield Problem(file, f"{field}.{key}", "missing", fix=fix)
    for name in (name for name in mapping if name not in keys):
        fix = did_you_mean(name, keys)
        expected = "" if fix else f"one of {', '.join(keys)}"
        yield Problem(file, f"{field}.{name}", "unknown key", expected, fix=fix)


# Merge groups


def _inside(text: str) -> str:
    """The relative path in its simplest spelling."""
    path = PurePosixPath(text)
    if path.is_absolute() or "://" in text:
        raise mistake("an absolute path", expected="one relative to the task's folder")
    if ".." in path.parts:
        raise mistake("the path leads out of the task's folder", fix="write it without ..")
    return path.as_posix()


def _output(text: str) -> str:
    path = PurePosixPath(_inside(text))
    if path.suffix != ".jsonl":
        raise mistake("merged files are JSONL", expected="a name that ends in .jsonl")
    if any(part.startswith(".") for part in path.parts):
        raise mistake("a hidden name", fix="write it without the dot in front")
    return path.as_posix()


class MergeGroup(Block):
    """One merged file and its members."""

    name: Text
    """What a task selects the group by."""
    output_file: Annotated[Text, AfterValidator(_output)]
    """The merged file, relative to the output folder; also the group's partition key."""
    input_files: Annotated[list[Annotated[Text, AfterValidator(_inside)]], Field(min_length=1)]
    """Members in order, relative to the input folder: paths, glob patterns, or bare names of files
    in sub-folders."""
    source_column: Text | None = None
    """Column to add to each row, with the path of the member that it comes from."""
    dedup: bool = False
    """Keep the first of several rows with the same content."""


class MergeGroupsFile(Block):
    """The shape of a merge groups file."""

    merge_groups: Annotated[list[MergeGroup], Field(min_length=1)]
    """Groups; each is one merged file."""


def parse_merge_groups(data: Content, file: str) -> Parsed[Sequence[MergeGroup]]:
    parsed, problems = validate(MergeGroupsFile, data, file)
    if parsed is None:
        return None, problems
    for field in ("name", "output_file"):
        first: dict[str, int] = {}
        for position, group in enumerate(parsed.merge_groups):
            value: str = getattr(group, field)
            if (earlier := first.setdefault(value, position)) != position:
                place, wrong = f"merge_groups[{position}]", f"merge_groups[{earlier}] has the same"
                fix = "give each group its own"
                problems.append(Problem(file, f"{place}.{field}", wrong, have=repr(value), fix=fix))
    return None if errors_in(problems) else parsed.merge_groups, problems


def selected_groups(
    groups: Sequence[MergeGroup], names: Sequence[str], file: str, field: str
) -> tuple[list[MergeGroup], list[Problem]]:
    """The groups of those names in the order of their own file, all of them for no names; `field`
    of the task `file` gives the names, and is told about unknown ones."""
    known = {group.name for group in groups}
    problems: list[Problem] = []
    for place, name in _unknown(names, known, field):
        fix = did_you_mean(name, known) or f"choose among {', '.join(sorted(known))}"
        wrong = "there is no such merge group"
        problems.append(Problem(file, place, wrong, have=repr(name), fix=fix))
    return [group for group in groups if not names or group.name in names], problems


def _unknown(names: Sequence[str], known: Container[str], field: str) -> Iterator[tuple[str, str]]:
    """Each with its place in the field."""
    return ((f"{field}[{n}]", name) for n, name in enumerate(names) if name not in known)
