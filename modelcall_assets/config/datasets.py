"""A dataset config: which data sets become ChatML, and which of their columns say what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, cast

from pydantic import AfterValidator, Field

from modelcall_assets.config.block import Block, Text, did_you_mean, mistake
from modelcall_assets.config.problems import errors_in, shown_value, validate
from modelcall_assets.errors import Problem
from modelcall_assets.records.data_files import stem_of

MAPPING_KEYS: Mapping[str, tuple[str, ...]] = {
    "prompt_response": ("prompt", "response"),
    "instruction_input": ("prompt", "input", "response"),
    "sharegpt": ("conversations",),
    "messages": ("messages",),
    "input_output_messages": ("input", "output"),
    "prompt_text_only": ("prompt_text",),
}
"""What `column_mapping` must say for each `format_style`."""


def _each_once(names: list[str | None]) -> list[str | None]:
    if not names:
        raise mistake("empty", expected="names, or null for the default configuration")
    if len(set(names)) < len(names):
        raise mistake("names a configuration twice")
    return names


class DatasetConfig(Block):
    """One data set: a Hugging Face folder or a JSONL file."""

    configs: Annotated[list[Text | None], AfterValidator(_each_once)] = Field(
        default_factory=lambda: [None]
    )
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


def parse_datasets(
    data: dict[str, Any], file: str
) -> tuple[Mapping[str, DatasetConfig] | None, list[Problem]]:
    """Every data set by its key, in the file's order, and every problem of the file; no data sets
    if one of them is an error."""
    datasets: dict[str, DatasetConfig] = {}
    problems = [] if data else [Problem(file, "", "names no data set")]
    for key, block in data.items():
        dataset, found = _parse_one(key, block, file)
        problems += found
        if dataset is not None:
            datasets[key] = dataset
    return None if errors_in(problems) else datasets, problems


def are_datasets(data: Mapping[str, Any]) -> bool:
    """Whether a file whose kind is unknown looks like a dataset config."""
    blocks = [cast("dict[str, Any]", block) for block in data.values() if isinstance(block, dict)]
    return 0 < len(blocks) == len(data) and all("format_style" in block for block in blocks)


def selected(
    datasets: Mapping[str, DatasetConfig],
    names: Sequence[str],
    file: str,
    field: str = "distillation.selected_datasets",
) -> tuple[Mapping[str, DatasetConfig], list[Problem]]:
    """What `field` of the task `file` names; everything when it names nothing. An unknown name is a
    warning, an error when no name is known."""
    if not names:
        return datasets, []
    kept = {key: dataset for key, dataset in datasets.items() if key in names}
    problems = [
        Problem(
            file,
            f"{field}[{place}]",
            "not in the dataset config",
            have=shown_value(name, "selected_datasets"),
            fix=did_you_mean(name, datasets),
            severity="warning" if kept else "error",
        )
        for place, name in enumerate(names)
        if name not in datasets
    ]
    return kept, problems


def output_name(dataset_key: str, config: str | None, split: str, with_system: bool) -> str:
    """`org/name`, `en`, `train` → `name/org_name-en-train.jsonl`."""
    folder = stem_of(dataset_key.rpartition("/")[2])
    parts = [dataset_key, config, split, "with_system" if with_system else None]
    name = "-".join(part.replace("/", "_") for part in parts if part is not None)
    return f"{folder}/{name}.jsonl"


def _parse_one(key: str, block: Any, file: str) -> tuple[DatasetConfig | None, list[Problem]]:
    if any(part in ("", ".", "..") for part in key.split("/")):
        return None, [Problem(file, key, "not a data set's name", "`org/name` or a file name")]
    if not isinstance(block, dict):
        return None, [Problem(file, key, "wrong type", "a mapping", shown_value(block, key))]
    dataset, problems = validate(DatasetConfig, cast("dict[str, Any]", block), file)
    placed = [replace(problem, field=f"{key}.{problem.field}") for problem in problems]
    if dataset is not None:
        placed += _mapping_problems(dataset, f"{key}.column_mapping", file)
    return dataset, placed


def _mapping_problems(dataset: DatasetConfig, field: str, file: str) -> list[Problem]:
    style, mapping = dataset.format_style, dataset.column_mapping
    keys = MAPPING_KEYS[style]
    missing = [
        Problem(
            file, f"{field}.{key}", "missing", fix=f"add `{key}:`, the column ({style} needs it)"
        )
        for key in keys
        if key not in mapping
    ]
    unknown = [
        Problem(
            file,
            f"{field}.{name}",
            "unknown key",
            expected="" if did_you_mean(name, keys) else f"one of {', '.join(keys)}",
            fix=did_you_mean(name, keys),
        )
        for name in mapping
        if name not in keys
    ]
    return [*missing, *unknown]
