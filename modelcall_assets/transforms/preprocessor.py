"""What a preprocessor is, the user's (`script_type: my_pkg.rules:MyPreprocessor`) and ours: for any
rows (`universal`), for source code, and for filtered packs; and what a scrubber of the user's is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from importlib import import_module
from pathlib import PurePosixPath
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from modelcall_assets.errors import InputError
from modelcall_assets.records import DATA_SUFFIXES, stem_of
from modelcall_assets.records.outcome import INT64, Dropped, Row
from modelcall_assets.transforms.texts import DEFAULT_ENCODING, count_tokens, tool

TEXT_COLUMNS = ("text", "content", "body", "description", "message")
CODE_COLUMNS = ("text", "content", "code", "body", "description")
"""The first of these that has a value is the text."""
PATH_COLUMNS = ("path", "file_path", "filepath", "filename", "file_name", "name")
REQUIRED = "required_fields: "
"""Begins the rules that drop a row for want of a column."""
_COMPUTE = import_module("pyarrow.compute")
_SUFFIX = re.compile(r"(?<=[^./\\])\.[^./\\]+$")
_USUAL_LANGUAGES = {
    "a.ipynb": "Jupyter Notebook",
    "a.pl": "Perl",
    "a.r": "R",
    "a.sql": "SQL",
    "a.v": "Verilog",
}
"""Where Pygments does not know the suffix, or takes it for a rare language's."""
_NAME_CHARS, _CODE_CHARS = 255, 64_000
"""Of a path, whose column can hold anything, and of a text: more does not tell more."""
FACTS = {
    "repo_full_name": "Code Repository",
    "language": "Unknown",
    "files_with_content": "Multiple",
    "total_lines": "Large",
    **dict.fromkeys(("has_readme", "has_license", "has_gitignore"), "Unknown"),
}
"""What the packaging prompt asks for and these rows do not know."""
_FILE = re.compile(r"pt_data_(?P<language>.+?)(?:_part(?P<part>\d*))?", re.DOTALL)

Kind = Literal["string", "int", "float", "bool"]
Spec = Mapping[str, Any]


class Preprocessor(Protocol):
    """Makes one row of one item; `id` and the truncated column are added to it afterwards.

    An item is a row of a data file, or for any other file its `path`, `uri` and `text`. None and
    Dropped leave it out and are counted, by rule; whatever is raised fails that row only.
    """

    def process_item(self, item: Row) -> Row | Dropped | None: ...


@runtime_checkable
class Grouping(Protocol):
    """Optional: which files make a partition. Without it each data file is one."""

    def get_file_list(self, paths: Sequence[str]) -> Sequence[str] | Mapping[str, Sequence[str]]:
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


class Scrubber(Protocol):
    """Takes out of a text what should not be in it, such as names and secrets."""

    def scrub(self, text: str) -> tuple[str, Mapping[str, int]]:
        """The text without it, and how many of what kind were taken out."""
        ...


@dataclass(frozen=True, slots=True)
class Copied:
    """An output column that holds the values of an input column unchanged."""

    source: str


def _copied(names: Sequence[str]) -> dict[str, Copied | Kind]:
    return {name: Copied(name) for name in names}


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
class Universal:
    """`field_mapping`: target → source column, `{type: combine, fields, separator}` or
    `{type: constant, value}`. `computed_fields`: name → `{type: text_length | token_count,
    source_field}`. Lengths are in characters. ValueError for another type or a mistaken regular
    expression."""

    field_mapping: Mapping[str, str | Spec] = field(default_factory=dict[str, str | Spec])
    min_text_length: int | None = None
    max_text_length: int | None = None
    required_fields: Sequence[str] = ()
    blacklist_patterns: Sequence[str] = ()
    """Substrings, told apart by nothing but case."""
    blacklist_regex: Sequence[str] = ()
    """RE2's, which takes linear time for any pattern and text."""
    filter_cleaned: bool = False
    remove_extra_whitespace: bool = False
    remove_characters: Sequence[str] = ()
    computed_fields: Mapping[str, Spec] = field(default_factory=dict[str, Spec])
    source_name: str = "unknown"
    tokenizer: str = DEFAULT_ENCODING

    def __post_init__(self) -> None:
        for target, spec in self.field_mapping.items():
            if not isinstance(spec, str) and spec.get("type") not in ("combine", "constant"):
                raise ValueError(f"field_mapping.{target}.type: expected combine or constant")
        for name, spec in self.computed_fields.items():
            if spec.get("type") not in _MEASURES:
                raise ValueError(f"computed_fields.{name}.type: expected one of {list(_MEASURES)}")
        _holds("", self.blacklist_regex)

    def process_item(self, item: Row) -> Row | Dropped:
        """TypeError when the text is not a string."""
        row = item | {name: _mapped(item, spec) for name, spec in self.field_mapping.items()}
        original = text_of(row, TEXT_COLUMNS)
        text = original or ""
        if self.remove_extra_whitespace:
            text = " ".join(text.split())
        for characters in self.remove_characters:
            text = text.replace(characters, "")
        row["text"] = text
        if original is not None:
            rule = self._broken_rule(text if self.filter_cleaned else original)
            if rule is not None:
                return Dropped(rule)
        for name, spec in self.computed_fields.items():
            measured = as_text(row.get(spec.get("source_field", "text")))
            row[name] = _MEASURES[spec["type"]](measured, self.tokenizer)
        for name in self.required_fields:
            if not row.get(name):
                return Dropped(f"{REQUIRED}{name}")
        for name in self.own_columns:
            row[name] = self.source_name
        return row

    @property
    def own_columns(self) -> tuple[str, ...]:
        """`source`, unless the task says what is in it."""
        is_named = "source" in self.field_mapping or "source" in self.computed_fields
        return () if is_named else ("source",)

    def columns(self, names: Sequence[str]) -> dict[str, Copied | Kind]:
        result = _copied(names)
        for target, spec in self.field_mapping.items():
            if isinstance(spec, str):
                result[target] = Copied(spec) if spec in names else "string"
            else:
                value: object = _constant(spec) if spec["type"] == "constant" else ""
                result[target] = _KINDS.get(type(value), "string")
        result |= dict.fromkeys(("text", *self.own_columns), "string")
        result |= dict.fromkeys(self.computed_fields, "int")
        return result

    def _broken_rule(self, text: str) -> str | None:
        if self.min_text_length is not None and len(text) < self.min_text_length:
            return "min_text_length"
        if self.max_text_length is not None and len(text) > self.max_text_length:
            return "max_text_length"
        lowered = text.lower() if self.blacklist_patterns else ""
        for pattern in self.blacklist_patterns:
            if pattern.lower() in lowered:
                return f"blacklist_patterns: {pattern}"
        if _holds(text, self.blacklist_regex):
            found = next(each for each in self.blacklist_regex if _holds(text, [each]))
            return f"blacklist_regex: {found}"
        return None


_MEASURES: Mapping[str, Callable[[str, str], int]] = {
    "text_length": lambda text, _: len(text),
    "token_count": count_tokens,
}
_KINDS: Mapping[type, Kind] = {bool: "bool", int: "int", float: "float"}


def _holds(text: str, patterns: Sequence[str]) -> bool:
    """Whether the text matches one of these; a call costs some 40 µs, however many there are."""
    if not patterns:
        return False
    any_of = "|".join(f"(?:{pattern})" for pattern in patterns)
    return _COMPUTE.match_substring_regex(text, any_of).as_py()


def _mapped(row: Row, spec: str | Spec) -> Any:
    if isinstance(spec, str):
        return row.get(spec)
    if spec["type"] == "constant":
        return _constant(spec)
    values = (as_text(row.get(name)) for name in spec["fields"])
    return spec.get("separator", " ").join(filter(None, values))


def _constant(spec: Spec) -> Any:
    """The value as one column type holds it: lists, mappings and dates become JSON text."""
    value = spec.get("value")
    plain = isinstance(value, str | float) or (isinstance(value, int) and value in INT64)
    return value if value is None or plain else json.dumps(value, default=str)


@dataclass(frozen=True, slots=True)
class GithubRawCode:
    """`by_content` looks at the text where the file's name does not tell its language;
    `source_name` is for rows that have no `source`."""

    by_content: bool = False
    source_name: str = "github_raw_code"

    def process_item(self, item: Row) -> Row:
        """KeyError when the row has no text column, TypeError when that is not a string."""
        text = text_of(item, CODE_COLUMNS)
        if text is None:
            raise KeyError(f"none of the columns {', '.join(CODE_COLUMNS)}")
        return {
            **item,
            "text": text,
            "source": as_text(item.get("source")) or self.source_name,
            "language": as_text(item.get("language")) or self._language(item, text),
        }

    def columns(self, names: Sequence[str]) -> dict[str, Copied | Kind]:
        return {**_copied(names), "text": "string", "source": "string", "language": "string"}

    def _language(self, item: Row, text: str) -> str | None:
        """As Pygments names that of the first path that tells it, else as Magika does."""
        for path in map(item.get, PATH_COLUMNS):
            if path and isinstance(path, str):
                name = re.split(r"[/\\]", path[-_NAME_CHARS:])[-1]
                suffix = _SUFFIX.search(name)
                known = suffix and _language_of_name(f"a{suffix.group().lower()}")
                if known := known or _language_of_name(name):
                    return known
        if not self.by_content or not text.strip():
            return None
        found = _magika().identify_bytes(text[:_CODE_CHARS].encode("utf-8", "replace")).output
        return found.description.removesuffix(" source") if found.group == "code" else None


@lru_cache(10_000)
def _language_of_name(name: str) -> str | None:
    if name in _USUAL_LANGUAGES:
        return _USUAL_LANGUAGES[name]
    from pygments.lexers import find_lexer_class_for_filename

    lexer = find_lexer_class_for_filename(name)
    return lexer.name if lexer is not None and lexer.name != "Text only" else None


@cache
def _magika() -> Any:
    return tool("magika").Magika()


@dataclass(frozen=True, slots=True)
class TripletFilter:
    """Takes `pt_data_<Language>[_part<NN>].jsonl`; `languages` are exact names, None all."""

    languages: Sequence[str] | None = None

    own_columns: ClassVar = tuple(FACTS)

    def get_file_list(self, paths: Sequence[str]) -> dict[str, list[str]]:
        """Partitions are named by the folder and the language. InputError when there is no such
        file, or none of a language that was asked for."""
        found: dict[str, list[tuple[int, str]]] = {}
        for path in paths:
            file = PurePosixPath(path)
            named = _FILE.fullmatch(stem_of(file.name))
            if named is not None and file.name.lower().endswith(DATA_SUFFIXES):
                partition, number = str(file.parent / named["language"]), int(named["part"] or -1)
                found.setdefault(partition, []).append((number, path))
        if not found:
            raise InputError("no file is called pt_data_<Language>_part<NN>.jsonl")
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
        return {**_copied(names), **dict.fromkeys(("text", *FACTS), "string")}
