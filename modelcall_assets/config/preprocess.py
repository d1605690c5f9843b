"""The `preprocess` block of a scoring task."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, cast

from pydantic import AfterValidator, Discriminator, Field, Tag

from modelcall_assets.config.block import Block, Count, Limit, Text, did_you_mean, mistake
from modelcall_assets.config.paths import Folder
from modelcall_assets.errors import Problem

_LATER_SCRIPTS = ("github_raw_code", "repo_xml", "triplet_filter")


class Combine(Block):
    """Several columns joined into one text; empty ones are left out."""

    type: Literal["combine"]
    fields: Annotated[list[str], Field(min_length=1)]
    """Source columns, in order."""
    separator: str = " "
    """Text between two values."""


class Constant(Block):
    """The same value in every row."""

    type: Literal["constant"]
    value: Any
    """The value."""


def _kind(source: Any) -> Any:
    if isinstance(source, dict):
        return cast("dict[str, Any]", source).get("type", "")
    return getattr(source, "type", "column")


FieldSource = Annotated[
    Annotated[str, Tag("column")]
    | Annotated[Combine, Tag("combine")]
    | Annotated[Constant, Tag("constant")],
    Discriminator(
        _kind,
        custom_error_type="mistake",
        custom_error_message="{wrong}",
        custom_error_context={
            "wrong": "unknown source",
            "expected": "a column name, {type: combine, fields: […]} or {type: constant, value: …}",
            "fix": "",
        },
    ),
]


class Filters(Block):
    """Rows that do not meet all of these are dropped."""

    min_text_length: Annotated[int, Field(ge=0)] = 0
    """Shortest `text` to keep, in characters."""
    max_text_length: Limit = None
    """Longest `text` to keep, in characters."""
    required_fields: list[str] = Field(default_factory=list[str])
    """Columns that must be present and not empty."""
    blacklist_patterns: list[str] = Field(default_factory=list[str])
    """Drops a row whose `text` holds one of these, upper or lower case; not regular expressions."""


class TextCleaning(Block):
    """What is done to `text`."""

    remove_extra_whitespace: bool = False
    """Every run of white space becomes one space; the ends are trimmed."""
    remove_characters: list[str] = Field(default_factory=list[str])
    """Characters to delete."""


class ComputedField(Block):
    """A column counted from another one."""

    type: Literal["text_length", "token_count"]
    """Characters or tokens."""
    source_field: str = "text"
    """The column that is counted."""


class Transformations(Block):
    """What is done to a row that passed the filters."""

    text_cleaning: TextCleaning = TextCleaning()
    """Changes `text`."""
    computed_fields: dict[str, ComputedField] = Field(default_factory=dict[str, ComputedField])
    """New columns, counted after cleaning."""


def _known_script(name: str) -> str:
    if name == "universal" or name in _LATER_SCRIPTS:
        return name
    names = ("universal", *_LATER_SCRIPTS)
    raise mistake("unknown script type", expected="universal", fix=did_you_mean(name, names))


class Preprocess(Block):
    """Cleaning, filtering and truncation before scoring."""

    enabled: bool = False
    """Score the preprocessed rows instead of the input's."""
    script_type: Annotated[str, AfterValidator(_known_script)] = "universal"
    """Which preprocessor; this version has `universal`."""
    input_folder: Folder | None = None
    """Raw input; default `data.input_folder`."""
    output_folder: Folder | None = None
    """Default: the raw input's folder + `_preprocessed`."""
    max_tokens: Count = 32768
    """Longer texts are truncated to this many tokens."""
    num_files: Limit = None
    """Takes only the first files."""
    source_name: Text = "unknown"
    """Value of the column `source`."""
    file_pattern: Text = "*"
    """Takes only inputs whose relative path matches this glob."""
    field_mapping: dict[str, FieldSource] = Field(default_factory=dict[str, FieldSource])
    """Target column → source column, `{type: combine, …}` or `{type: constant, …}`."""
    filters: Filters = Filters()
    """Rows to drop."""
    transformations: Transformations = Transformations()
    """Changes to the rows that are kept."""


def later_script(preprocess: Preprocess, file: str) -> Iterator[Problem]:
    """A preprocessor that a task may name already, but that no run may replace by another one."""
    name = preprocess.script_type
    if preprocess.enabled and name in _LATER_SCRIPTS:
        wrong = f"'{name}' is not in this version; the task is checked but cannot run"
        fix = "what runs today is `script_type: universal`, or `enabled: false`"
        yield Problem(file, "preprocess.script_type", wrong, fix=fix, unready=True)
