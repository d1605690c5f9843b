"""What every config model is made of: the strict base class, limits, and mistakes that explain."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, cast, get_args, get_origin

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from modelcall_assets.config.legacy import old_names
from modelcall_assets.errors import Problem
from modelcall_assets.records.secrets import looks_secret, names_secret


class Block(BaseModel):
    """A mapping in a config file: known keys only, exact types, read only."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def _nothing_under_the_key(cls, value: Any) -> Any:
        return {} if value is None else value


B = TypeVar("B", bound=Block)
T = TypeVar("T")
Content = dict[str, Any]
"""Of a file, as YAML has it."""
Parsed = tuple[T | None, list[Problem]]
"""What a file holds, none if one of its problems is an error; and all of these."""
Loc = Sequence[int | str]


def _no_limit(value: Any) -> Any:
    return None if type(value) is int and value == -1 else value


Limit = Annotated[Annotated[int, Field(gt=0)] | None, BeforeValidator(_no_limit)]
"""A count; -1 and null mean no limit."""
Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]
Texts = Annotated[list[Text], BeforeValidator(lambda v: [v] if isinstance(v, str) else v)]
"""Several; one may stand by itself."""
OR_EMPTY = BeforeValidator(lambda value: {} if value is None else value)
"""A mapping of the user's names may have nothing under its key, as blocks may."""


def mistake(wrong: str, *, expected: str = "", fix: str = "") -> PydanticCustomError:
    """What a validator raises; the parts become those of a `Problem`."""
    context: dict[str, Any] = {"wrong": wrong, "expected": expected, "fix": fix}
    return PydanticCustomError("mistake", "{wrong}", context)


def nearest(name: str, names: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The one of `names` that `name` was probably meant to be."""
    close = difflib.get_close_matches(name, sorted(names), n=1, cutoff=cutoff)
    return close[0] if close else None


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """`did you mean x?`, or nothing when no name is close."""
    close = nearest(name, names)
    return f"did you mean {close}?" if close else ""


# Problems


def validate(model: type[B], data: Content, file: str) -> Parsed[B]:
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


def _problem(model: type[Block], error: ErrorDetails, data: Any, file: str) -> Problem:
    """What pydantic says, in our words."""
    loc, kind, context = error["loc"], error["type"], error.get("ctx", {})
    field = _field(loc, data)
    if kind in ("extra_forbidden", "missing"):
        block, name = _block_at(model, loc[:-1]), str(loc[-1])
        fields = block.model_fields if block else {}
        if kind == "missing":
            meaning = fields[name].description if name in fields else None
            fix = f"add `{name}:` ({meaning})" if meaning else f"add `{name}:`"
            return Problem(file, field, "missing", fix=fix)
        fix = did_you_mean(name, {*fields, *old_names(field.rpartition(".")[0])})
        expected = f"one of {', '.join(fields)}" if fields and not fix else ""
        return Problem(file, field, "unknown key", expected, fix=fix)
    have = shown_value(error["input"], field)
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


def _retype(kind: str, value: Any) -> str:
    if kind == "string_type" and not isinstance(value, dict | list):
        return "write it in quotes"
    if kind in ("int_type", "float_type") and isinstance(value, str):
        with suppress(ValueError):
            return f"write {float(value):g} without quotes"
    return ""


def _field(loc: Loc, data: Any) -> str:
    """The location with dots, without the tags that pydantic adds for the arms of a union."""
    parts = ""
    for position, part in enumerate(loc):
        here = cast("Mapping[Any, Any]", data) if isinstance(data, Mapping) else None
        if here is not None and part in here:
            data = here[part]
        elif isinstance(data, list) and isinstance(part, int):
            data = cast("list[Any]", data)[part]
        elif position < len(loc) - 1 or (here is None and data is not None):
            continue
        parts += f"[{part}]" if isinstance(part, int) else f".{part}"
    return parts.removeprefix(".")


def _block_at(kind: Any, loc: Loc) -> type[Block] | None:
    """The model that stands at a location below an annotation."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _block_at(args[0], loc)
    if origin in (Union, UnionType):
        arms = [arm for arm in args if not loc or _tag(arm) in (None, loc[0])]
        found = (_block_at(arm, loc[1:] if _tag(arm) else loc) for arm in arms)
        return next((block for block in found if block), None)
    if isinstance(kind, type) and issubclass(kind, Block):
        if not loc:
            return kind
        info = kind.model_fields.get(str(loc[0]))
        return _block_at(info.annotation, loc[1:]) if info else None
    return _block_at(args[-1], loc[1:]) if origin in (dict, list) and loc else None


def _tag(arm: Any) -> str | None:
    metadata = get_args(arm)[1:] if get_origin(arm) is Annotated else ()
    return next((item.tag for item in metadata if isinstance(item, Tag)), None)
