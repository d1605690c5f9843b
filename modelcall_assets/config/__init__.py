"""A block of a config file as a strict model: the kinds of its values, the old fields that it may
have, and every mistake with its field.
"""

import codecs
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, cast, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from modelcall_assets.errors import Problem, did_you_mean
from modelcall_assets.records.secrets import looks_secret, names_secret


@dataclass(frozen=True, slots=True)
class OldField:
    """One field of the old system; `instead` says why, or what to write. Of a step's field, `path`
    begins with the step, and the old files have it in the block `distillation`."""

    treatment: Literal["honoured", "changed", "warning", "refused"]
    """`honoured` and `changed` ones work, the latter mean something else; `warning` and `refused`
    ones do not."""
    path: str
    instead: str
    harmless: Sequence[object] = ()
    """Values that ask for what happens anyway: accepted in silence."""
    keeps: bool = False
    """Whether a harmless value stays, because it has an effect here too."""

    def stays(self, value: object) -> bool:
        return self.works or (self.keeps and value in self.harmless)

    @property
    def works(self) -> bool:
        return self.treatment in ("honoured", "changed")


class Block(BaseModel):
    """A mapping in a config file: known keys only, exact types, read only."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )
    old_fields: ClassVar[tuple[OldField, ...]] = ()
    """What a file that is such a block may have besides."""

    @model_validator(mode="before")
    @classmethod
    def _nothing_under_the_key(cls, value: Any) -> Any:
        return {} if value is None else value


B = TypeVar("B", bound=Block)
T = TypeVar("T")
Content = dict[str, Any]
Parsed = tuple[T | None, list[Problem]]
"""What a file holds, none if one of its problems is an error; and all of these."""
Parse = Callable[[Content, str], Parsed[Any]]
"""Of a file's content, and what messages call the file."""
_MINUS_ONE = BeforeValidator(lambda v: None if type(v) is int and v == -1 else v)
Limit = Annotated[Annotated[int, Field(gt=0)] | None, _MINUS_ONE]
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


def must(
    holds: Callable[[Any], bool], wrong: str, expected: str = "", fix: str = ""
) -> AfterValidator:
    """Values of which something does not hold are this mistake."""

    def checked(value: Any) -> Any:
        if not holds(value):
            raise mistake(wrong, expected=expected, fix=fix)
        return value

    return AfterValidator(checked)


_ENCODINGS = (
    *("utf-8", "utf-8-sig", "utf-16", "utf-32", "gb18030", "gbk", "big5", "shift_jis", "euc_kr"),
    *("latin-1", "cp1252"),
)


def _codec(name: str) -> str:
    """The name as Python spells it."""
    try:
        "".encode(name)  # unlike a lookup it refuses codecs that are not of text, such as hex
        return codecs.lookup(name).name
    except (LookupError, ValueError):
        expected = f"one that Python knows, such as {', '.join(_ENCODINGS)}"
        fix = did_you_mean(name, _ENCODINGS)
        raise mistake("unknown encoding", expected=expected, fix=fix) from None


_ON_BAD_LINE = """A line that is no JSON object: `keep` makes it a failed row in its place, `fail`
stops the file, naming the line."""
_ON_EMPTY_FILE = """A file without a line: `fail` takes it for a failed upload, `accept` gives it an
empty output. A Parquet file without rows is always accepted."""
_ENCODING = """Of the lines of input files; any that Python knows. What a stage leaves is always
UTF-8."""
OnBadLine = Annotated[Literal["keep", "fail"], Field(description=_ON_BAD_LINE)]
OnEmptyFile = Annotated[Literal["accept", "fail"], Field(description=_ON_EMPTY_FILE)]
Encoding = Annotated[Text, AfterValidator(_codec), Field(description=_ENCODING)]


def validate(model: type[B], data: Content, file: str) -> Parsed[B]:
    """Old fields that do nothing are left out."""
    known, old = take_out(data, model.old_fields)
    problems = [*without_effect(old, file)]
    try:
        return model.model_validate(known), problems
    except ValidationError as error:
        details = error.errors(include_url=False)
        kept = (item for item in details if item["type"] != "default_factory_not_called")
        return None, [*problems, *(_problem(model, item, known, file) for item in kept)]


def problem_of(error: PydanticCustomError, file: str, field: str, value: Any) -> Problem:
    context = cast("dict[str, str]", error.context)
    have = shown_value(value, field)
    return Problem(file, field, context["wrong"], context["expected"], have, context["fix"])


def at(data: Any, place: str) -> Any:
    """The value at a dotted place of a file, else nothing."""
    for name in place.split("."):
        data = cast("Content", data).get(name) if isinstance(data, dict) else None
    return data


def block_at(data: Content, place: str) -> Content:
    """The mapping at a dotted place of a file; an empty one if there is none."""
    value = at(data, place)
    return cast("Content", value) if isinstance(value, dict) else {}


def errors_in(problems: Sequence[Problem]) -> bool:
    """Whether one of the problems is a mistake in a file."""
    return any(problem.severity == "error" and not problem.unready for problem in problems)


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
    **{"string": "text", "int": "an integer", "float": "a number", "bool": "true or false"},
    **{"list": "a list", "dict": "a mapping", "model": "a mapping"},
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
        paths = (old.path.rpartition(".") for old in model.old_fields)
        old_names = {own for parent, _, own in paths if parent == field.rpartition(".")[0]}
        fix = did_you_mean(name, {*fields, *old_names})
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


def _field(loc: Sequence[int | str], data: Any) -> str:
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


def _block_at(kind: Any, loc: Sequence[int | str]) -> type[Block] | None:
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
    return next((each.tag for each in get_args(arm) if isinstance(each, Tag)), None)


Found = list[tuple[OldField, Any]]


def take_out(data: dict[str, Any], old_fields: Iterable[OldField]) -> tuple[dict[str, Any], Found]:
    """The data without those of the fields that do nothing here; and all that it had of them."""
    data = {key: {**value} if isinstance(value, dict) else value for key, value in data.items()}
    found: Found = []
    for old in old_fields:
        parent, _, name = old.path.rpartition(".")
        inner = data.get(parent) if parent else data
        block = cast("dict[str, Any]", inner) if isinstance(inner, dict) else {}
        if name in block:
            found.append((old, block[name]))
            if not old.stays(block[name]):
                del block[name]
    return data, found


def is_old(data: Content, old_fields: Iterable[OldField]) -> bool:
    """Whether a file has what shows it to be of the old system: ours have none without effect."""
    _, found = take_out(data, old_fields)
    return any(not old.works and not (old.stays(v) and v is None) for old, v in found)


def without_effect(found: Found, file: str) -> Iterator[Problem]:
    for old, value in found:
        if old.works or value in old.harmless:
            continue
        is_refused = old.treatment == "refused"
        wrong = "not supported here" if is_refused else "has no effect"
        severity = "error" if is_refused else "warning"
        yield Problem(file, old.path, wrong, fix=old.instead, severity=severity)
