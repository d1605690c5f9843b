"""The universal preprocessor: map, filter, clean, require and truncate one row.

Filters look at the text as it came, before it is cleaned.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from modelcall_assets.records.record import Row
from modelcall_assets.transforms.tokens import count_tokens, truncate

TEXT_COLUMNS = ("text", "content", "body", "description", "message")
"""The first of these that has a value is the text."""

Spec = Mapping[str, Any]
Kind = Literal["string", "int", "float", "bool"]

_INT64 = range(-(2**63), 2**63)


@dataclass(frozen=True, slots=True)
class UniversalOptions:
    """`field_mapping`: target → source column, `{type: combine, fields, separator}` or
    `{type: constant, value}`. `computed_fields`: name → `{type: text_length | token_count,
    source_field}`. Lengths are in characters. ValueError for another type."""

    field_mapping: Mapping[str, str | Spec] = field(default_factory=dict[str, str | Spec])
    min_text_length: int | None = None
    max_text_length: int | None = None
    required_fields: Sequence[str] = ()
    blacklist_patterns: Sequence[str] = ()
    """Substrings, told apart by nothing but case."""
    remove_extra_whitespace: bool = False
    remove_characters: Sequence[str] = ()
    computed_fields: Mapping[str, Spec] = field(default_factory=dict[str, Spec])
    source_name: str = "unknown"
    max_tokens: int = 32768

    def __post_init__(self) -> None:
        for target, spec in self.field_mapping.items():
            if not isinstance(spec, str) and spec.get("type") not in ("combine", "constant"):
                raise ValueError(f"field_mapping.{target}.type: expected combine or constant")
        for name, spec in self.computed_fields.items():
            if spec.get("type") not in _MEASURES:
                raise ValueError(f"computed_fields.{name}.type: expected one of {list(_MEASURES)}")


@dataclass(frozen=True, slots=True)
class Dropped:
    """The row was filtered out; `rule` is the option, with its item where it has several."""

    rule: str


@dataclass(frozen=True, slots=True)
class Copied:
    """An output column that holds the values of an input column unchanged."""

    source: str


def process(row: Row, options: UniversalOptions, record_id: str) -> Row | Dropped:
    """The new row; `record_id` becomes its `id` unless it has one. TypeError when the text is not
    a string."""
    result = {**row, **dict(_mapped(row, options.field_mapping))}
    text = _text_of(result)
    rule = None if text is None else _broken_rule(text, options)
    if rule:
        return Dropped(rule)
    result["text"] = text = _cleaned(text or "", options)
    for name, spec in options.computed_fields.items():
        result[name] = _MEASURES[spec["type"]](
            _as_text(result.get(spec.get("source_field", "text")))
        )
    for name in options.required_fields:
        if not result.get(name):
            return Dropped(f"required_fields: {name}")
    result["id"] = _as_text(result.get("id")) or record_id
    result["source"] = options.source_name
    result[truncated_column(options.max_tokens)] = (
        truncate(text, options.max_tokens) if text else None
    )
    return result


def truncated_column(max_tokens: int) -> str:
    """32768 → `content_truncate_32k`."""
    return f"content_truncate_{max_tokens // 1024}k"


def output_columns(columns: Sequence[str], options: UniversalOptions) -> dict[str, Copied | Kind]:
    """Where each output column comes from, for input `columns`; order is that of the output."""
    result: dict[str, Copied | Kind] = {name: Copied(name) for name in columns}
    for target, spec in options.field_mapping.items():
        if isinstance(spec, str):
            result[target] = Copied(spec) if spec in columns else "string"
        else:
            result[target] = _kind(_constant(spec)) if spec["type"] == "constant" else "string"
    result |= dict.fromkeys(("text", "id", "source"), "string")
    result |= dict.fromkeys(options.computed_fields, "int")
    result[truncated_column(options.max_tokens)] = "string"
    return result


_MEASURES: Mapping[str, Callable[[str], int]] = {"text_length": len, "token_count": count_tokens}


def _mapped(row: Row, mapping: Mapping[str, str | Spec]) -> Iterator[tuple[str, Any]]:
    for target, spec in mapping.items():
        if isinstance(spec, str):
            yield target, row.get(spec)
        elif spec["type"] == "constant":
            yield target, _constant(spec)
        else:
            values = [_as_text(row.get(name)) for name in spec["fields"]]
            yield target, spec.get("separator", " ").join(filter(None, values))


def _text_of(row: Row) -> str | None:
    """The text, "" when its columns are all null, None when the row has none of them."""
    present = [row[name] for name in TEXT_COLUMNS if name in row]
    text = next((value for value in present if value is not None), "")
    if not isinstance(text, str):
        raise TypeError(f"the text is not a string but of type {type(text).__name__}")
    return text if present else None


def _broken_rule(text: str, options: UniversalOptions) -> str | None:
    if options.min_text_length is not None and len(text) < options.min_text_length:
        return "min_text_length"
    if options.max_text_length is not None and len(text) > options.max_text_length:
        return "max_text_length"
    lowered = text.lower() if options.blacklist_patterns else ""
    for pattern in options.blacklist_patterns:
        if pattern.lower() in lowered:
            return f"blacklist_patterns: {pattern}"
    return None


def _cleaned(text: str, options: UniversalOptions) -> str:
    if options.remove_extra_whitespace:
        text = " ".join(text.split())
    for characters in options.remove_characters:
        text = text.replace(characters, "")
    return text


def _as_text(value: Any) -> str:
    """Bytes in hexadecimal."""
    if isinstance(value, bytes):
        return value.hex()
    return "" if value is None else str(value)


def _constant(spec: Spec) -> Any:
    """The value as one column type holds it: lists, mappings and dates become JSON text."""
    value = spec.get("value")
    plain = isinstance(value, str | float) or (isinstance(value, int) and value in _INT64)
    return value if value is None or plain else json.dumps(value, default=str)


def _kind(value: Any) -> Kind:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int"
    return "float" if isinstance(value, float) else "string"
