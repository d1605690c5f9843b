"""The preprocessor `universal`: map, filter, clean and require.

Filters look at the text as it came unless they are told to look at the cleaned one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from modelcall_assets.records.outcome import Dropped, Row
from modelcall_assets.transforms.preprocessor import Copied, Kind, as_text, text_of
from modelcall_assets.transforms.tokens import DEFAULT_ENCODING, count_tokens

TEXT_COLUMNS = ("text", "content", "body", "description", "message")
"""The first of these that has a value is the text."""
REQUIRED = "required_fields: "
"""Begins the rules that drop a row for want of a column."""

Spec = Mapping[str, Any]

_COMPUTE = import_module("pyarrow.compute")
_KINDS: Mapping[type, Kind] = {bool: "bool", int: "int", float: "float"}
_INT64 = range(-(2**63), 2**63)


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
        row = {**item, **dict(_mapped(item, self.field_mapping))}
        original = text_of(row, TEXT_COLUMNS)
        row["text"] = text = self._cleaned(original or "")
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
        """Where each output column comes from, for input columns `names`."""
        result: dict[str, Copied | Kind] = {name: Copied(name) for name in names}
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

    def _cleaned(self, text: str) -> str:
        if self.remove_extra_whitespace:
            text = " ".join(text.split())
        for characters in self.remove_characters:
            text = text.replace(characters, "")
        return text


_MEASURES: Mapping[str, Callable[[str, str], int]] = {
    "text_length": lambda text, _: len(text),
    "token_count": count_tokens,
}


def _holds(text: str, patterns: Sequence[str]) -> bool:
    """Whether the text matches one of these; a call costs some 40 µs, however many there are."""
    if not patterns:
        return False
    any_of = "|".join(f"(?:{pattern})" for pattern in patterns)
    return _COMPUTE.match_substring_regex(text, any_of).as_py()


def _mapped(row: Row, mapping: Mapping[str, str | Spec]) -> Iterator[tuple[str, Any]]:
    for target, spec in mapping.items():
        if isinstance(spec, str):
            yield target, row.get(spec)
        elif spec["type"] == "constant":
            yield target, _constant(spec)
        else:
            values = [as_text(row.get(name)) for name in spec["fields"]]
            yield target, spec.get("separator", " ").join(filter(None, values))


def _constant(spec: Spec) -> Any:
    """The value as one column type holds it: lists, mappings and dates become JSON text."""
    value = spec.get("value")
    plain = isinstance(value, str | float) or (isinstance(value, int) and value in _INT64)
    return value if value is None or plain else json.dumps(value, default=str)
