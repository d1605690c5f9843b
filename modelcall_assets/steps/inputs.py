"""The partitions of a task's first asset: files of a folder, or groups of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from modelcall_assets.config.spec import RAW
from modelcall_assets.errors import InputError, Problem, SetupError
from modelcall_assets.records.data_files import stem_of
from modelcall_assets.records.keys import decode_key, encode_key
from modelcall_assets.steps.layout import Layout
from modelcall_assets.steps.members import as_one, grouped
from modelcall_assets.steps.upstream import Upstream
from modelcall_assets.storage.files import (
    list_files,
    list_inputs,
    list_page,
    matches,
    stat_file,
)
from modelcall_assets.storage.listing import FileInfo
from modelcall_assets.transforms.preprocessor import Grouping

Page = tuple[list[FileInfo], str]
"""A part of a listing, and the path where the next one begins: empty at the end."""


@dataclass(frozen=True)
class Inputs(ABC):
    """`field` is where the task file names them; a partition of several files is one here."""

    layout: Layout
    field: str

    @abstractmethod
    def files(self) -> list[FileInfo]:
        """In order, after the task's own caps. SetupError when two would have one output,
        InputError when the folder is missing."""

    def page(self, after: str, most: int) -> Page:
        """`files` behind a path, without the caps, about `most` at a time where the store can list
        so; all of them where it cannot."""
        return self.files(), ""

    @abstractmethod
    def members(self, key: str) -> Sequence[FileInfo]:
        """The files of a partition as they are now; InputError when they are gone."""

    def versions(self, keys: Sequence[str]) -> dict[str, str]:
        """Of partitions as they are now, without those that are gone."""
        wanted = set(keys)
        if not wanted:
            return {}
        versions = {encode_key(file.key_path): file.version for file in self.files()}
        return {key: version for key, version in versions.items() if key in wanted}

    def all_keys(self) -> set[str]:
        """Of everything that is there, whatever the task takes of it."""
        return {encode_key(file.key_path) for file in self.files()}

    @property
    def most(self) -> int | None:
        """The task's cap on files."""
        return self.layout.spec.task.max_files

    def shared(self, first: str, second: str, output: str) -> Problem:
        """Two inputs that would have one output."""
        wrong = f"'{first}' and '{second}' would both be written to '{output}'"
        fix = "rename or move one of them"
        return Problem(self.layout.spec.file_name, self.field, wrong, fix=fix)


@dataclass(frozen=True)
class FolderInputs(Inputs):
    """Each data file of a folder whose path fits `pattern`. `suffix` is that of their outputs, None
    where they have none of their own."""

    suffix: str | None = ".parquet"
    pattern: str = "*"

    def files(self) -> list[FileInfo]:
        return self._page("", None)[0][: self.most]

    def page(self, after: str, most: int) -> Page:
        return self._page(after, most)

    def members(self, key: str) -> Sequence[FileInfo]:
        return [replace(stat_file(self.layout.input_place(key)), key_path=key)]

    def versions(self, keys: Sequence[str]) -> dict[str, str]:
        """Each is looked at by itself: they may be a few of many."""
        return {key: file.version for key in keys for file in self.members(key)}

    def all_keys(self) -> set[str]:
        return {encode_key(file.key_path) for file in list_inputs(self.layout.folder(RAW))}

    def _page(self, after: str, most: int | None) -> Page:
        folder, own = self.layout.folder(RAW), self.layout.own_folders
        files, last = list_page(folder, self.pattern, own, after, most)
        if self.suffix is not None:
            refuse_shared(self, files, self.suffix)
        return files, last


class OneInput(FolderInputs):
    """The one file that the task names."""

    def files(self) -> list[FileInfo]:
        return [stat_file(self.layout.folder(RAW))]

    def page(self, after: str, most: int) -> Page:
        return self.files(), ""

    def all_keys(self) -> set[str]:
        return {encode_key(file.key_path) for file in self.files()}


@dataclass(frozen=True)
class GroupedInputs(Inputs):
    """Files of any kind, as a preprocessor puts them together."""

    grouping: Grouping
    pattern: str = "*"

    def files(self) -> list[FileInfo]:
        files = [as_one(name, members) for name, members in self._groups(self.most).items()]
        refuse_shared(self, files, ".parquet")
        return files

    def members(self, key: str) -> Sequence[FileInfo]:
        name, groups = decode_key(key), self._groups(self.most)
        if name not in groups:
            folder = self.layout.folder(RAW)
            raise InputError(f"{folder}: there is no file for '{name}' any more")
        return groups[name]

    def all_keys(self) -> set[str]:
        return {encode_key(name) for name in self._groups(None)}

    def _groups(self, most: int | None) -> dict[str, list[FileInfo]]:
        folder = self.layout.folder(RAW)
        there = list_files(folder, self.layout.own_folders)
        files = [file for file in there if matches(file.key_path, self.pattern)]
        try:
            return grouped(self.grouping, files, most)
        except InputError as error:
            raise InputError(f"{folder}: {error}") from None


@dataclass(frozen=True)
class LinkedInputs(Inputs):
    """What a stage of another task leaves of some partitions."""

    linked: Upstream
    keys: Callable[[], list[str]]

    def files(self) -> list[FileInfo]:
        return [file for key in self.keys() for file in self.members(key)]

    def members(self, key: str) -> Sequence[FileInfo]:
        info = stat_file(self.linked.place(self.linked.need(key)))
        return [replace(info, key_path=decode_key(key))]


def refuse_shared(inputs: Inputs, files: Sequence[FileInfo], suffix: str) -> None:
    """SetupError when two of them would have one output."""
    by_output: dict[str, str] = {}
    problems: list[Problem] = []
    for file in files:
        path = Path(file.key_path)
        output = str(path.with_name(f"{stem_of(path.name)}{suffix}"))
        first = by_output.setdefault(output, file.key_path)
        if first != file.key_path:
            problems.append(inputs.shared(first, file.key_path, output))
    if problems:
        raise SetupError(problems)
