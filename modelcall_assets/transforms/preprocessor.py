"""What a preprocessor is: the user's, `script_type: my_pkg.rules:MyPreprocessor`, and of ours those
for source code and for filtered packs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from modelcall_assets.errors import InputError
from modelcall_assets.records.data_files import DATA_SUFFIXES, stem_of
from modelcall_assets.records.outcome import Dropped, Row
from modelcall_assets.transforms.languages import language_of_content, language_of_name

TEXT_COLUMNS = ("text", "content", "code", "body", "description")
PATH_COLUMNS = ("path", "file_path", "filepath", "filename", "file_name", "name")
PREFIX = "pt_data_"
FACTS = {
    "repo_full_name": "Code Repository",
    "language": "Unknown",
    "files_with_content": "Multiple",
    "total_lines": "Large",
    "has_readme": "Unknown",
    "has_license": "Unknown",
    "has_gitignore": "Unknown",
}
"""What the packaging prompt asks for and these rows do not know."""
_PART = re.compile(r"(?P<language>.+)_part(?P<number>\d*)")

Kind = Literal["string", "int", "float", "bool"]
"""What a column holds."""

FileList = Sequence[str] | Mapping[str, Sequence[str]]


class Preprocessor(Protocol):
    """Makes one row of one item; `id` and the truncated column are added to it afterwards.

    An item is a row of a data file, or for any other file its `path`, `uri` and `text`. None and
    Dropped leave it out and are counted, by rule; whatever is raised fails that row only.
    """

    def process_item(self, item: Row) -> Row | Dropped | None: ...


@runtime_checkable
class Grouping(Protocol):
    """Optional: which files make a partition. Without it each data file is one."""

    def get_file_list(self, paths: Sequence[str]) -> FileList:
        """Of all files below the input folder, as sorted relative paths: those to take, each a
        partition, or the names of partitions with the files of each, in reading order."""
        ...


@runtime_checkable
class Declared(Protocol):
    """Optional: what its rows hold. Without it the types are found out from the rows, which takes
    longer. `own_columns`, where there are any, are made of nothing: columns of the input that are
    called so are kept under other names."""

    def columns(self, names: Sequence[str]) -> Mapping[str, Copied | Kind]:
        """Where each column of the output comes from, in order; `names` are those of the input."""
        ...


@dataclass(frozen=True, slots=True)
class Copied:
    """An output column that holds the values of an input column unchanged."""

    source: str


def text_of(row: Row, names: Sequence[str]) -> str | None:
    """The first of these columns that is not null: "" when all are, None when the row has none of
    them. TypeError when it is not a string."""
    present = [row[name] for name in names if name in row]
    text = next((value for value in present if value is not None), "")
    if not isinstance(text, str):
        raise TypeError(f"the text is not a string but of type {type(text).__name__}")
    return text if present else None


def as_text(value: Any) -> str:
    """Bytes in hexadecimal, nothing for null."""
    if isinstance(value, bytes):
        return value.hex()
    return "" if value is None else str(value)


@dataclass(frozen=True, slots=True)
class GithubRawCode:
    """`by_content` looks at the text where the file's name does not tell its language;
    `source_name` is for rows that have no `source`."""

    by_content: bool = False
    source_name: str = "github_raw_code"

    def process_item(self, item: Row) -> Row:
        """KeyError when the row has no text column, TypeError when that is not a string."""
        text = text_of(item, TEXT_COLUMNS)
        if text is None:
            raise KeyError(f"none of the columns {', '.join(TEXT_COLUMNS)}")
        return {
            **item,
            "text": text,
            "source": as_text(item.get("source")) or self.source_name,
            "language": as_text(item.get("language")) or self._language(item, text),
        }

    def columns(self, names: Sequence[str]) -> dict[str, Copied | Kind]:
        copied: dict[str, Copied | Kind] = {name: Copied(name) for name in names}
        return {**copied, "text": "string", "source": "string", "language": "string"}

    def _language(self, item: Row, text: str) -> str | None:
        paths = (item.get(name) for name in PATH_COLUMNS)
        named = (language_of_name(path) for path in paths if path and isinstance(path, str))
        known = next(filter(None, named), None)
        return known or (language_of_content(text) if self.by_content else None)


@dataclass(frozen=True, slots=True)
class TripletFilter:
    """Takes `pt_data_<Language>[_part<NN>].jsonl`; `languages` are exact names, None all."""

    languages: Sequence[str] | None = None

    own_columns: ClassVar = tuple(FACTS)

    def get_file_list(self, paths: Sequence[str]) -> dict[str, list[str]]:
        """InputError when there is no such file, or none of a language that was asked for."""
        found: dict[str, list[tuple[int, str]]] = {}
        for path in paths:
            if (named := _language_and_part(path)) is not None:
                language, part = named
                found.setdefault(language, []).append((part, path))
        if not found:
            raise InputError(f"no file is called {PREFIX}<Language>_part<NN>.jsonl")
        there = {PurePosixPath(name).name for name in found}
        wanted = there if self.languages is None else self.languages
        if absent := [name for name in wanted if name not in there]:
            names = ", ".join(sorted(there))
            raise InputError(f"no parts of {', '.join(absent)}; there are: {names}")
        return {
            name: [path for _, path in sorted(found[name])]
            for name in sorted(found)
            if PurePosixPath(name).name in wanted
        }

    def process_item(self, item: Row) -> Row:
        """TypeError when the text is not a string."""
        text = item.get("text")
        if not isinstance(text, str | None):
            raise TypeError(f"the text is not a string but of type {type(text).__name__}")
        row = {**item, **(FACTS if text else dict.fromkeys(FACTS)), "text": text}
        if text and item.get("lg"):
            row["language"] = str(item["lg"])
        return row

    def columns(self, names: Sequence[str]) -> dict[str, Copied | Kind]:
        copied: dict[str, Copied | Kind] = {name: Copied(name) for name in names}
        return {**copied, **dict.fromkeys(("text", *FACTS), "string")}


def _language_and_part(path: str) -> tuple[str, int] | None:
    """The partition, which begins with the folder, and the number of a part; -1 for a file that is
    not in parts."""
    file = PurePosixPath(path)
    if not file.name.startswith(PREFIX) or not file.name.lower().endswith(DATA_SUFFIXES):
        return None
    name = stem_of(file.name).removeprefix(PREFIX)
    part = _PART.fullmatch(name)
    language = part["language"] if part else name
    number = int(part["number"] or -1) if part else -1
    return (str(file.parent / language), number) if language else None
