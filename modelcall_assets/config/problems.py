"""pydantic's errors, told as `Problem`s: file, field, what is wrong, what to write."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, cast, get_args, get_origin

from pydantic import Tag, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from modelcall_assets.config.block import Block, did_you_mean
from modelcall_assets.config.legacy import old_names
from modelcall_assets.errors import Problem
from modelcall_assets.records.secrets import looks_secret, names_secret

B = TypeVar("B", bound=Block)
Loc = Sequence[int | str]

_TYPES = {
    "string": "text",
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "list": "a list",
    "dict": "a mapping",
    "model": "a mapping",
}
_BOUNDS = {
    "greater_than": ("gt", "more than {:g}"),
    "greater_than_equal": ("ge", "{:g} or more"),
    "less_than": ("lt", "less than {:g}"),
    "less_than_equal": ("le", "{:g} or less"),
}


def validate(model: type[B], data: dict[str, Any], file: str) -> tuple[B | None, list[Problem]]:
    """The block, or every problem of its shape."""
    try:
        return model.model_validate(data), []
    except ValidationError as error:
        details = error.errors(include_url=False)
        kept = (item for item in details if item["type"] != "default_factory_not_called")
        return None, [_problem(model, item, data, file) for item in kept]


def problem_of(error: PydanticCustomError, file: str, field: str, value: Any) -> Problem:
    """A `mistake` raised outside of pydantic."""
    context = cast("dict[str, str]", error.context)
    have = shown_value(value, field)
    return Problem(file, field, context["wrong"], context["expected"], have, context["fix"])


def errors_in(problems: Sequence[Problem]) -> bool:
    """Whether one of the problems is a mistake in a file."""
    return any(problem.severity == "error" and not problem.unready for problem in problems)


def stops_run(problems: Sequence[Problem]) -> bool:
    """Whether one of the problems is more than a warning: a mistake, or something not there yet."""
    return any(problem.severity == "error" for problem in problems)


def shown_path(path: Path, root: Path) -> str:
    """The path relative to the project when it is inside, as every message shows it."""
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()


def shown_value(value: Any, field: str) -> str:
    """The value as a message may show it: short, and never a secret."""
    if value is None:
        return "null"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, str) and "\n" in value:
        return "a text block"
    text = repr(value) if isinstance(value, str) else str(value).lower()
    if names_secret(field.rpartition(".")[2]) or looks_secret(text):
        return "*** (not shown)"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _problem(model: type[Block], error: ErrorDetails, data: Any, file: str) -> Problem:
    loc, kind = error["loc"], error["type"]
    field = _dotted(_own_parts(loc, data))
    if kind == "extra_forbidden":
        return _unknown_key(model, loc, field, file)
    if kind == "missing":
        return Problem(file, field, "missing", fix=_how_to_add(model, loc))
    have = shown_value(error["input"], field)
    context = error.get("ctx", {})
    if kind == "mistake":
        return Problem(file, field, context["wrong"], context["expected"], have, context["fix"])
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        return Problem(file, field, "out of range", words.format(context[name]), have)
    if kind == "literal_error":
        names = re.findall(r"'([^']*)'", context["expected"])
        fix = did_you_mean(str(error["input"]), names)
        return Problem(file, field, "unknown value", ", ".join(names), have, fix)
    if kind == "string_too_short":
        return Problem(file, field, "empty", "text")
    expected = _TYPES.get(kind.partition("_")[0])
    if expected and kind.endswith("_type"):
        return Problem(file, field, "wrong type", expected, have, _retype(kind, error["input"]))
    return Problem(file, field, error["msg"], have=have)


def _unknown_key(model: type[Block], loc: Loc, field: str, file: str) -> Problem:
    parent = field.rpartition(".")[0]
    block = _block_at(model, loc[:-1])
    names = list(block.model_fields) if block else []
    fix = did_you_mean(str(loc[-1]), {*names, *old_names(parent)})
    expected = f"one of {', '.join(names)}" if names and not fix else ""
    return Problem(file, field, "unknown key", expected, fix=fix)


def _how_to_add(model: type[Block], loc: Loc) -> str:
    block = _block_at(model, loc[:-1])
    info = block.model_fields.get(str(loc[-1])) if block else None
    meaning = f" ({info.description})" if info and info.description else ""
    return f"add `{loc[-1]}:`{meaning}"


def _retype(kind: str, value: Any) -> str:
    if kind == "string_type" and not isinstance(value, dict | list):
        return "write it in quotes"
    if kind in ("int_type", "float_type") and isinstance(value, str):
        try:
            return f"write {float(value):g} without quotes"
        except ValueError:
            return ""
    return ""


def _own_parts(loc: Loc, data: Any) -> list[int | str]:
    """The location without the tags that pydantic adds for the arms of a union."""
    parts: list[int | str] = []
    for position, part in enumerate(loc):
        here = cast("Mapping[Any, Any]", data) if isinstance(data, Mapping) else None
        if here is not None and part in here:
            data = here[part]
        elif isinstance(data, list) and isinstance(part, int):
            data = cast("list[Any]", data)[part]
        elif position < len(loc) - 1 or (here is None and data is not None):
            continue
        parts.append(part)
    return parts


def _dotted(parts: Loc) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
    return text.removeprefix(".")


def _block_at(annotation: Any, loc: Loc) -> type[Block] | None:
    """The model that stands at a location below `annotation`."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _block_at(args[0], loc)
    if origin in (Union, UnionType):
        arms = [arm for arm in args if not loc or _tag(arm) in (None, loc[0])]
        found = (_block_at(arm, loc[1:] if _tag(arm) else loc) for arm in arms)
        return next((block for block in found if block), None)
    if isinstance(annotation, type) and issubclass(annotation, Block):
        if not loc:
            return annotation
        info = annotation.model_fields.get(str(loc[0]))
        return _block_at(info.annotation, loc[1:]) if info else None
    if origin in (dict, list) and loc:
        return _block_at(args[-1], loc[1:])
    return None


def _tag(arm: Any) -> str | None:
    metadata = get_args(arm)[1:] if get_origin(arm) is Annotated else ()
    return next((item.tag for item in metadata if isinstance(item, Tag)), None)
