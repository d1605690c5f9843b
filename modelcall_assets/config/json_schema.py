"""Mistakes in a JSON Schema that a validator would pass over or explain badly."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import jsonschema_rs

from modelcall_assets.config.block import did_you_mean
from modelcall_assets.errors import Problem

_KEYWORDS = (
    *("type", "enum", "const", "anyOf"),
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    *("minLength", "maxLength", "pattern", "format"),
    *("items", "minItems", "maxItems", "uniqueItems"),
    *("properties", "required", "additionalProperties"),
    *("title", "description", "default", "examples"),
)
_TYPES = ("string", "number", "integer", "boolean", "array", "object", "null")


def schema_problems(schema: dict[str, Any], place: str, file: str) -> list[Problem]:
    """Every mistake in the schema of an answer object."""
    problems = list(_problems(schema, place, file))
    if schema.get("type", "object") != "object":
        problems.append(Problem(file, f"{place}.type", "an answer is an object", "object"))
    return problems or list(_compiled(schema, place, file))


def _compiled(schema: dict[str, Any], place: str, file: str) -> Iterator[Problem]:
    """What the validator itself says."""
    try:
        jsonschema_rs.validator_for(schema)
    except jsonschema_rs.ValidationError as error:
        yield Problem(file, ".".join([place, *map(str, error.instance_path)]), error.message)
    except ValueError as error:
        yield Problem(file, place, str(error), fix="write dates in quotes")


def _problems(schema: Any, place: str, file: str) -> Iterator[Problem]:
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        yield Problem(file, place, "wrong type", "a JSON Schema (a mapping)")
        return
    fields = cast("dict[str, Any]", schema)
    for name in fields:
        if name not in _KEYWORDS:
            fix = did_you_mean(str(name), _KEYWORDS)
            yield Problem(file, f"{place}.{name}", "not a keyword of JSON Schema", fix=fix)
    types: Any = fields.get("type", [])
    for name in cast("list[Any]", types) if isinstance(types, list) else [types]:
        if name not in _TYPES:
            fix = did_you_mean(str(name), _TYPES)
            expected = f"one of {', '.join(_TYPES)}"
            yield Problem(file, f"{place}.type", "unknown type", expected, str(name), fix)
    for inner, below in _inner_schemas(fields):
        yield from _problems(inner, f"{place}{below}", file)


def _inner_schemas(fields: dict[str, Any]) -> Iterator[tuple[Any, str]]:
    properties = fields.get("properties")
    if isinstance(properties, dict):
        for name, inner in cast("dict[str, Any]", properties).items():
            yield inner, f".properties.{name}"
    if "items" in fields:
        yield fields["items"], ".items"
    arms = fields.get("anyOf")
    if isinstance(arms, list):
        for index, inner in enumerate(cast("list[Any]", arms)):
            yield inner, f".anyOf[{index}]"
