"""`task_reader` of AgentScope Tuner and AgentJet, as they have it in their YAML: what each of its
splits is as a source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from modelcall_assets.config import Block, Text, at, block_at, validate
from modelcall_assets.config.files import load_yaml
from modelcall_assets.errors import Problem, SetupError, did_you_mean

ROOTS, READER = ("ajet", "astuner"), "task_reader"
TRAINING, VALIDATION = "training", "validation"
Options = dict[str, Any]
"""Of a source, as a task file names it."""


class _File(Block):
    file_path: Text | None


class _Files(Block):
    training: _File
    validation: _File | None = None

    def sources(self) -> Iterator[Options]:
        for name, file in ((TRAINING, self.training), (VALIDATION, self.validation)):
            if file is not None and file.file_path is not None:
                yield {"name": "TaskFile", "as": name, "filepath": file.file_path}


class _Splits(Block):
    training_split: Text | None = "train"
    validation_split: Text | None = None

    @property
    def splits(self) -> dict[str, str]:
        """Those of the data set, by what they are for."""
        found = {TRAINING: self.training_split, VALIDATION: self.validation_split}
        return {name: split for name, split in found.items() if split is not None}


class _Dataset(_Splits):
    dataset_path: Text
    dataset_name: Text | None = None
    """The subset."""

    def sources(self) -> Iterator[Options]:
        own = {"name": "TaskDataset", "path": self.dataset_path, "subset": self.dataset_name}
        for name, split in self.splits.items():
            yield {**own, "split": split, "as": name}


class _Environment(_Splits):
    env_type: Text
    env_url: Text
    env_action_preference: Text | None = None
    """Passed along in the old system, and read by nobody."""

    def sources(self) -> Iterator[Options]:
        own = {"name": "EnvironmentTasks", "env_type": self.env_type, "url": self.env_url}
        for split in dict.fromkeys(self.splits.values()):
            yield {**own, "split": split, "as": f"{self.env_type}-{split}"}


class _Dummies(Block):
    loader: Text | None = None

    def sources(self) -> Iterator[Options]:
        for name in (TRAINING, VALIDATION):
            yield {"name": "Dummies", "as": name, "loader": self.loader}


class _Later(Block):
    """What AgentScope's own data sets are since."""

    path: Text
    name: Text | None = None
    split: Text = "train"

    def sources(self) -> Iterator[Options]:
        yield {"name": "TaskDataset", "path": self.path, "subset": self.name, "split": self.split}


Reader = _Files | _Dataset | _Environment | _Dummies | _Later
READERS: Mapping[str, type[Reader]] = {
    "jsonl_dataset_file": _Files,
    "dataset_file": _Files,
    "huggingface_dat_repo": _Dataset,
    "env_service": _Environment,
    "random_dummy": _Dummies,
}


def read_tuner(path: Path, shown: str) -> tuple[Mapping[str, Any], str]:
    """The block `task_reader` of a Tuner's YAML, and its place there. SetupError names the file as
    `shown`."""
    content = load_yaml(path, shown)
    for root in ROOTS:
        if isinstance(found := at(content, f"{root}.{READER}"), dict):
            return found, f"{root}.{READER}"
    expected = " or ".join(f"{root}.{READER}" for root in ROOTS)
    raise SetupError([Problem(shown, "", "no task reader", expected)])


def sources_of(reader: Mapping[str, Any], file: str, field: str) -> list[Options]:
    """The sources of a block `task_reader`, which is the `field` of the `file`: SetupError says
    what is wrong there."""
    kind, block, place = _Later, reader, field
    if "path" not in reader:
        name = str(reader.get("type") or "")
        if name not in READERS:
            told = f"no reader {name!r}" if name else "missing"
            expected, fix = f"one of {', '.join(READERS)}", did_you_mean(name, READERS)
            raise SetupError([Problem(file, f"{field}.type", told, expected, fix=fix)])
        kind = READERS[name]
        written = next((each for each in READERS if READERS[each] is kind and each in reader), name)
        block, place = block_at({**reader}, written), f"{field}.{written}"
    if "${" in repr(block):
        told = "a `${…}`, which is read as it is written"
        raise SetupError([Problem(file, place, told, fix="write what it stands for")])
    parsed, problems = validate(kind, {**block}, file)
    if parsed is None:
        raise SetupError([replace(each, field=f"{place}.{each.field}") for each in problems])
    if not (found := [*parsed.sources()]):
        raise SetupError([Problem(file, place, "neither training nor validation is named")])
    return found
