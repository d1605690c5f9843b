"""What the partitions of a task's first stage are: files of a folder, groups of them, splits of
data sets, or what a stage of another task leaves."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

from modelcall_assets.config.datasets import output_name
from modelcall_assets.errors import InputError, Problem, SetupError
from modelcall_assets.records import decode_key, encode_key, stem_of
from modelcall_assets.records.outcome import Failure, Row
from modelcall_assets.stages.report import last_line
from modelcall_assets.storage.datasets import Split, dataset_path, find_split, find_splits
from modelcall_assets.storage.listing import (
    FileInfo,
    find_file,
    list_files,
    list_page,
    matches,
    stat_file,
)
from modelcall_assets.storage.places import Place
from modelcall_assets.transforms.preprocessor import Grouping

if TYPE_CHECKING:
    from modelcall_assets.stages import Stage
    from modelcall_assets.stages.task import Task

Page = tuple[list[FileInfo], str]
"""A part of a listing, and the path where the next one begins: empty at the end."""


@dataclass(frozen=True)
class Inputs(ABC):
    """A partition of several files is one here."""

    task: Task

    @abstractmethod
    def listed(self) -> list[FileInfo]:
        """In order. SetupError when two would have one output, InputError when the folder is
        missing."""

    def files(self) -> list[FileInfo]:
        """As `listed`, after the task's own cap."""
        return self.listed()[: self.most]

    def page(self, after: str, most: int | None) -> Page:
        """Those listed behind a path, about `most` at a time where the store can list so; all of
        them where it cannot."""
        return self.listed(), ""

    @abstractmethod
    def members(self, key: str) -> Sequence[FileInfo]:
        """The files of a partition as they are now; InputError when they are gone."""

    def made(self, key: str) -> Sequence[Row | Failure] | None:
        """The rows of a partition where they are made, and not read from files."""
        return None

    def versions(self, keys: Sequence[str]) -> dict[str, str]:
        """Of partitions as they are now, without those that are gone."""
        wanted = set(keys)
        if not wanted:
            return {}
        versions = {encode_key(file.key_path): file.version for file in self.files()}
        return {key: version for key, version in versions.items() if key in wanted}

    def all_keys(self) -> set[str]:
        """Of everything that is there, whatever the task takes of it."""
        return {encode_key(file.key_path) for file in self.listed()}

    def keys(self) -> list[str]:
        """Of `files`."""
        return [encode_key(file.key_path) for file in self.files()]

    @property
    def most(self) -> int | None:
        """The task's cap on files."""
        return self.task.spec.task.max_files

    def shared(self, first: str, second: str, output: str) -> Problem:
        """Two inputs that would have one output."""
        wrong = f"'{first}' and '{second}' would both be written to '{output}'"
        spec, fix = self.task.spec, "rename or move one of them"
        return Problem(spec.file_name, spec.task.input_field, wrong, fix=fix)

    def refuse_shared(self, files: Sequence[FileInfo], suffix: str) -> None:
        """SetupError when two of them would have one output."""
        by_output: dict[str, str] = {}
        problems: list[Problem] = []
        for file in files:
            folder, slash, name = file.key_path.rpartition("/")
            output = f"{folder}{slash}{stem_of(name)}{suffix}"
            first = by_output.setdefault(output, file.key_path)
            if first != file.key_path:
                problems.append(self.shared(first, file.key_path, output))
        if problems:
            raise SetupError(problems)


@dataclass(frozen=True)
class FolderInputs(Inputs):
    """Each data file of a folder whose path fits `pattern`. `suffix` is that of their outputs, None
    where they have none of their own."""

    suffix: str | None = ".parquet"
    pattern: str = "*"

    def listed(self) -> list[FileInfo]:
        return self.page("", None)[0]

    def page(self, after: str, most: int | None) -> Page:
        folder, own = self.task.layout.input_folder, self.task.own_folders
        files, last = list_page(folder, self.pattern, own, after, most)
        if self.suffix is not None:
            self.refuse_shared(files, self.suffix)
        return files, last

    def members(self, key: str) -> Sequence[FileInfo]:
        return [replace(stat_file(self.task.layout.input_place(key)), key_path=key)]

    def versions(self, keys: Sequence[str]) -> dict[str, str]:
        """Each is looked at by itself: they may be a few of many."""
        found = {key: find_file(self.task.layout.input_place(key)) for key in keys}
        return {key: file.version for key, file in found.items() if file is not None}

    def all_keys(self) -> set[str]:
        return {encode_key(file.key_path) for file in list_page(self.task.layout.input_folder)[0]}


class OneInput(FolderInputs):
    """The one file that the task names."""

    def listed(self) -> list[FileInfo]:
        return [stat_file(self.task.layout.input_folder)]

    page = Inputs.page
    all_keys = Inputs.all_keys


def data_files(task: Task, suffix: str | None = ".parquet", pattern: str = "*") -> FolderInputs:
    """Of the task's input folder, or its one input file."""
    kind = OneInput if task.spec.has_one_input else FolderInputs
    return kind(task, suffix, pattern)


@dataclass(frozen=True)
class GroupedInputs(Inputs):
    """Files of any kind, as a preprocessor puts them together."""

    grouping: Grouping
    pattern: str = "*"

    def listed(self) -> list[FileInfo]:
        """The cap is shared among them."""
        files = [as_one(name, members) for name, members in self._groups(self.most).items()]
        self.refuse_shared(files, ".parquet")
        return files

    files = listed

    def members(self, key: str) -> Sequence[FileInfo]:
        name, groups = decode_key(key), self._groups(self.most)
        if name not in groups:
            folder = self.task.layout.input_folder
            raise InputError(f"{folder}: there is no file for '{name}' any more")
        return groups[name]

    def all_keys(self) -> set[str]:
        return {encode_key(name) for name in self._groups(None)}

    def _groups(self, most: int | None) -> dict[str, list[FileInfo]]:
        """The files of each partition. `most` files are shared among the partitions, one at least
        of each. InputError when the grouping names a file that is not there, or no partition at
        all."""
        folder = self.task.layout.input_folder
        there = list_files(folder, self.task.own_folders)
        by_path = {file.key_path: file for file in there if matches(file.key_path, self.pattern)}
        try:
            found = self.grouping.get_file_list([*by_path])
        except Exception as error:
            what = f"get_file_list of the preprocessor failed: {last_line(error)}"
            raise InputError(f"{folder}: {what}") from error
        groups = dict(found) if isinstance(found, Mapping) else {path: [path] for path in found}
        for name, paths in groups.items():
            wrong, absent = "", [path for path in paths or () if path not in by_path]
            if not name.strip("/ ") or not paths:
                wrong = f"partition {name!r} has no name or no files"
            elif absent:
                wrong = f"{name!r} has {absent[0]!r}, which is not there"
            if wrong:
                raise InputError(f"{folder}: get_file_list: {wrong}")
        share = None if most is None else max(1, most // max(1, len(groups)))
        return {name: [by_path[path] for path in paths[:share]] for name, paths in groups.items()}


@dataclass(frozen=True)
class LinkedInputs(Inputs):
    """What a stage of another task leaves of some partitions."""

    linked: Stage

    def listed(self) -> list[FileInfo]:
        return [file for key in self.keys() for file in self.members(key)]

    def keys(self) -> list[str]:
        """Also of those that are not made yet."""
        return self._own(self.linked.keys.now())[: self.most]

    def all_keys(self) -> set[str]:
        return {*self._own(self.linked.keys.every())}

    def _own(self, keys: Iterable[str]) -> list[str]:
        """Without those that one input file leaves out."""
        spec, only = self.task.spec, self.task.layout.input_folder
        return [key for key in keys if not spec.has_one_input or self.linked.output(key) == only]

    def members(self, key: str) -> Sequence[FileInfo]:
        info = stat_file(self.linked.result(self.linked.need(key)))
        return [replace(info, key_path=decode_key(key))]


@dataclass(frozen=True, slots=True)
class SplitPlace:
    """Which split of which data set a partition is, as it was listed."""

    dataset: str
    path: Place
    config: str | None
    split: str
    files: Sequence[FileInfo] = field(compare=False)

    @property
    def is_absent(self) -> bool:
        return self.files[0].version == ABSENT


@dataclass(frozen=True)
class SplitInputs(Inputs):
    """Every split of the task's data sets, by the path of its output."""

    with_system: bool

    def listed(self) -> list[FileInfo]:
        """With a stand-in for a data set that cannot be read, whose members say why; InputError
        when none can be."""
        return [as_one(name, split.files) for name, split in self._splits().items()]

    def all_keys(self) -> set[str]:
        found = self._splits().items()
        return {encode_key(name) for name, split in found if not split.is_absent}

    def members(self, key: str) -> Sequence[FileInfo]:
        place = self.place(key)
        return find_split(place.path, place.config, place.split).files

    def place(self, key: str) -> SplitPlace:
        """InputError when it is gone."""
        if key not in self._places:
            folder = self.task.layout.input_folder
            raise InputError(f"{folder}: there is no split for '{key}' any more")
        return self._places[key]

    @cached_property
    def _places(self) -> dict[str, SplitPlace]:
        return {encode_key(name): place for name, place in self._splits().items()}

    def _splits(self) -> dict[str, SplitPlace]:
        found: dict[str, SplitPlace] = {}
        for name, dataset in self.task.spec.datasets.items():
            path = dataset_path(self.task.layout.input_folder, name)
            for split in _splits_of(path, dataset.configs):
                place = SplitPlace(name, path, split.config, split.split, split.files)
                output = output_name(name, split.config, split.split, self.with_system)
                first = found.setdefault(output, place)
                if first != place:
                    raise SetupError([self.shared(first.dataset, name, output)])
        if all(place.is_absent for place in found.values()):
            for place in found.values():
                find_splits(place.path, [place.config])
        return found


def as_one(name: str, files: Sequence[FileInfo]) -> FileInfo:
    """A partition of these files, listed as if it were one, with the place of the first."""
    size = sum(file.size for file in files)
    return FileInfo(name, files[0].place, size, version_of(files))


def version_of(files: Sequence[FileInfo]) -> str:
    """Changes whenever one of them does, or which ones there are."""
    return digest_of_versions({file.uri: file.version for file in files})


def digest_of_versions(versions: Mapping[str, str]) -> str:
    return hashlib.sha256(repr(sorted(versions.items())).encode()).hexdigest()[:32]


ABSENT = "absent"
"""The version of what is not there."""


def _splits_of(path: Place, configs: Sequence[str | None]) -> list[Split]:
    """What cannot be found is one that has the path where it was looked for."""
    try:
        return find_splits(path, configs)
    except InputError:
        if len(configs) > 1:
            return [split for config in configs for split in _splits_of(path, [config])]
        return [Split(configs[0], "train", (FileInfo(path.name, path, 0, ABSENT),))]
