"""A prompt file: what the model is asked, and what its answer must be."""

import hashlib
import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import PurePath
from string import Formatter
from typing import Annotated, Any, cast

import jsonschema_rs
from pydantic import AfterValidator, Field

from modelcall_assets.config import (
    Block,
    Content,
    Parsed,
    Text,
    block_at,
    errors_in,
    mistake,
    validate,
)
from modelcall_assets.errors import Problem, did_you_mean

_KEYWORDS = (
    *("type", "enum", "const", "anyOf"),
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    *("minLength", "maxLength", "pattern", "format"),
    *("items", "minItems", "maxItems", "uniqueItems"),
    *("properties", "required", "additionalProperties"),
    *("title", "description", "default", "examples"),
)
_TYPES = ("string", "number", "integer", "boolean", "array", "object", "null")


def placeholders_of(text: str) -> frozenset[str]:
    """The names in `{name}`; doubled braces are literal. Anything else is a mistake."""
    try:
        fields = [parts[1:] for parts in Formatter().parse(text) if parts[1] is not None]
    except ValueError as error:
        raise mistake(f"braces do not match: {error}", fix="write {{ and }} for braces") from None
    if wrong := [_source(*field) for field in fields if not _is_plain(*field)]:
        raise mistake(
            f"not a placeholder: {', '.join(wrong)}",
            expected="{column_name} or {column.key}",
            fix="name a column, or write {{ and }} for braces",
        )
    return frozenset(name for name, _, _ in fields if name)


def _is_plain(name: str | None, spec: str | None, conversion: str | None) -> bool:
    """A column, or a path into one of objects and lists: `meta.lang`, `turns.0.text`."""
    first, *inner = (name or "").replace("-", "_").split(".")
    plain = first.isidentifier() and all(part.isidentifier() or part.isdigit() for part in inner)
    reaches = any(part.startswith("__") for part in inner)
    return not spec and not conversion and plain and not reaches


def _source(name: str | None, spec: str | None, conversion: str | None) -> str:
    text = f"{name}{f'!{conversion}' if conversion else ''}{f':{spec}' if spec else ''}"
    text = " ".join(text.split())
    return f"{{{text if len(text) <= 40 else text[:37] + '...'}}}"


def _template(text: str) -> str:
    placeholders_of(text)
    return text


class PromptTemplate(Block):
    """The messages of a request."""

    system_text: str | None = None
    """System message, sent as it is; braces mean nothing in it."""
    prompt_text: Annotated[Text, AfterValidator(_template)]
    """User message; `{name}` stands for a column, `{name.key}` and `{name.0}` for what an object or
    list in it holds, `{{` and `}}` for braces. Objects, lists, true and false are written as JSON;
    a row in which one is null or absent is not sent."""


class OutputConfig(Block):
    """The JSON object that the model must answer with."""

    require_json: bool = False
    """Whether the answer is a JSON object; else it is kept as text."""
    json_keys: list[Text] = Field(default_factory=list[str])
    """Keys that become columns; default: the properties of `json_schema`."""
    json_key_must_exists: list[str] = Field(default_factory=list[str])
    """Keys without which an answer is a failure."""
    json_default_values: dict[str, Any] = Field(default_factory=dict[str, Any])
    """Values for keys that may be missing; a number never stands in for a rating."""
    json_schema: dict[str, Any] = Field(default_factory=dict[str, Any])
    """JSON Schema of the object: types, ranges and enums of its `properties`, `required`."""

    @property
    def keys(self) -> list[str]:
        return self.json_keys or list(self.properties)

    @property
    def required(self) -> list[str]:
        """Keys that must be there, by either of the two ways to say so."""
        named = {*self.json_key_must_exists, *self.json_schema.get("required", [])}
        return [key for key in self.keys if key in named]

    @property
    def fields(self) -> dict[str, dict[str, Any]]:
        """The JSON Schema of each key; an empty one means any value."""
        usual = {"score": {"type": "number"}}
        return {
            key: self.properties[key]
            if key in self.properties
            else _schema_of(self.json_default_values.get(key)) or usual.get(key, {})
            for key in self.keys
        }

    @property
    def optional_defaults(self) -> dict[str, Any]:
        """Defaults that may fill a gap: of keys that may be missing, and never a number."""
        return {
            key: value
            for key, value in self.json_default_values.items()
            if key not in self.required and not is_number(value)
        }

    def answer_schema(self) -> dict[str, Any]:
        own = {"type": "object", "properties": self.fields, "required": self.required}
        return self.json_schema | own

    @property
    def score_digits(self) -> list[int]:
        """What `score` may be, if that is always a digit."""
        score = self.properties.get("score", {})
        least, most = score.get("minimum", -1), score.get("maximum", 10)
        is_digit = score.get("type") == "integer" and least >= 0 and most <= 9
        return [digit for digit in range(10) if is_digit and least <= digit <= most]

    @property
    def properties(self) -> dict[str, dict[str, Any]]:
        return self.json_schema.get("properties", {})


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_TYPE_OF: dict[type, str] = {
    **{bool: "boolean", int: "number", float: "number"},
    **{str: "string", dict: "object", list: "array"},
}


def _schema_of(value: Any) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": _TYPE_OF[type(value)]} if type(value) in _TYPE_OF else {}
    if type(value) is list and all(isinstance(item, str) for item in cast("list[Any]", value)):
        schema["items"] = {"type": "string"}
    return schema


class PromptConfig(Block):
    """A prompt file."""

    prompt_template: PromptTemplate
    """The messages of a request."""
    output_config: OutputConfig = OutputConfig()
    _name: str = ""
    """Of the file, without its suffix."""

    def call(self, name: str) -> None:
        self._name = name

    @cached_property
    def version(self) -> str:
        """`<name>@<digest>`: changes when the content does, not when its layout does."""
        content = [self.prompt_template.model_dump(), self.output_config.model_dump()]
        text = json.dumps(content, sort_keys=True, ensure_ascii=False, default=str)
        return f"{self._name}@{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    @property
    def placeholders(self) -> frozenset[str]:
        return placeholders_of(self.prompt_template.prompt_text)


def parse_prompt(data: Content, file: str) -> Parsed[PromptConfig]:
    prompt, problems = validate(PromptConfig, data, file)
    if prompt is None:
        return None, problems
    output = prompt.output_config
    problems += _schema_problems(output.json_schema, file) or _output_problems(output, file)
    prompt.call(PurePath(file).stem)
    return None if errors_in(problems) else prompt, problems


def _output_problems(output: OutputConfig, file: str) -> Iterator[Problem]:
    """Mistakes that lie between the fields of `output_config`."""
    place, keys, named = "output_config.require_json", output.keys, output.json_keys
    if keys and not output.require_json:
        yield Problem(file, place, "false, but keys are declared", fix="write require_json: true")
    if output.require_json and not keys:
        fix = "list the keys in output_config.json_keys or json_schema.properties"
        yield Problem(file, place, "true, but no key is declared", fix=fix)
    place = "output_config.json_keys"
    for index, key in enumerate(named):
        if key in named[:index]:
            yield Problem(file, f"{place}[{index}]", f"{key} is there twice", fix="remove one")
    for key in (key for key in keys if key.startswith("api_")):
        wrong = f"{key}: names that start with api_ are columns of this program"
        yield Problem(file, place, wrong, fix="choose another name")
    for name, given in (
        ("json_key_must_exists", output.json_key_must_exists),
        ("json_default_values", output.json_default_values),
        ("json_schema.properties", output.properties),
        ("json_schema.required", output.json_schema.get("required", [])),
    ):
        for index, key in enumerate(given):
            if key not in keys:
                item = f"[{index}]" if isinstance(given, list) else f".{key}"
                fix = did_you_mean(key, keys) or "add it to output_config.json_keys"
                yield Problem(file, f"output_config.{name}{item}", f"{key} is not a key", fix=fix)
    for key in keys:
        if not output.fields[key] and key not in output.properties:
            field, wrong = f"{place}[{keys.index(key)}]", f"{key} has no type"
            fix = f"declare it in output_config.json_schema.properties.{key}"
            yield Problem(file, field, wrong, fix=fix, severity="warning")


def _schema_problems(schema: dict[str, Any], file: str) -> list[Problem]:
    """Mistakes in the schema of an answer object, also those that the validator itself would pass
    over or explain badly."""
    place = "output_config.json_schema"
    problems = list(_keyword_problems(schema, place, file))
    if schema.get("type", "object") != "object":
        problems.append(Problem(file, f"{place}.type", "an answer is an object", "object"))
    try:
        if not problems:
            jsonschema_rs.validator_for(schema)
    except jsonschema_rs.ValidationError as error:
        where = ".".join([place, *map(str, error.instance_path)])
        problems.append(Problem(file, where, error.message))
    except ValueError as error:
        problems.append(Problem(file, place, str(error), fix="write dates in quotes"))
    return problems


def _keyword_problems(schema: Any, place: str, file: str) -> Iterator[Problem]:
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
            expected, fix = f"one of {', '.join(_TYPES)}", did_you_mean(str(name), _TYPES)
            yield Problem(file, f"{place}.type", "unknown type", expected, str(name), fix)
    arms = fields.get("anyOf")
    below = {f"properties.{name}": inner for name, inner in block_at(fields, "properties").items()}
    below |= {"items": fields["items"]} if "items" in fields else {}
    if isinstance(arms, list):
        below |= {f"anyOf[{n}]": arm for n, arm in enumerate(cast("list[Any]", arms))}
    for name, inner in below.items():
        yield from _keyword_problems(inner, f"{place}.{name}", file)
