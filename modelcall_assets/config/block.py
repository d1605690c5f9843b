"""A config file as a strict model: YAML or JSON, and every mistake with its line or field."""

import difflib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, cast, get_args, get_origin

import yaml
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

from modelcall_assets.config.legacy import old_names
from modelcall_assets.errors import Problem, SetupError
from modelcall_assets.records.secrets import looks_secret, names_secret

MOST_BYTES = 4 << 20
MOST_VALUES = 100_000
"""In a file, with what its aliases stand for."""
MOST_LEVELS = 100
_MOST_DIGITS = 100
_DEEPER = f"nested deeper than {MOST_LEVELS} levels"
_TAGS = (None, "!", *(f"tag:yaml.org,2002:{name}" for name in ("str", "seq", "map")))
_KEY_TAGS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")


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


def nearest(name: str, names: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The one of `names` that `name` was probably meant to be."""
    close = difflib.get_close_matches(name, sorted(names), n=1, cutoff=cutoff)
    return close[0] if close else None


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """`did you mean x?`, or nothing when no name is close."""
    close = nearest(name, names)
    return f"did you mean {close}?" if close else ""


def validate(model: type[B], data: Content, file: str) -> Parsed[B]:
    try:
        return model.model_validate(data), []
    except ValidationError as error:
        details = error.errors(include_url=False)
        kept = (item for item in details if item["type"] != "default_factory_not_called")
        return None, [_problem(model, item, data, file) for item in kept]


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


def load_yaml(path: Path, shown: str | None = None) -> Content:
    """The mapping in the file. Messages call the file `shown`. SetupError for what is no such
    file, and for one beyond the limits above: a few lines of YAML can mean a billion values."""
    is_json = path.suffix == ".json"
    invalid = f"not valid {'JSON' if is_json else 'YAML'}"

    def refused(wrong: str, place: str = "", expected: str = "", fix: str = "") -> SetupError:
        problem = Problem(shown or path.as_posix(), place, wrong[:300], expected, fix=fix)
        return SetupError([problem])

    try:
        with path.open("rb") as opened:
            content = opened.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise refused(f"larger than {MOST_BYTES >> 20} MiB", fix="is it a data file?")
        text = content.decode("utf-8-sig")
        data: Any = yaml.load(text, _Loader) if not is_json else None
        if is_json and text.strip():
            data = json.loads(text, object_pairs_hook=_unique, parse_int=_integer)
    except UnicodeDecodeError as error:
        raise refused(f"not UTF-8 at byte {error.start}", fix="save it as UTF-8") from None
    except OSError as error:
        raise refused(f"cannot be read: {error.strerror or error}") from None
    except RecursionError:
        raise refused(_DEEPER) from None
    except json.JSONDecodeError as error:
        raise refused(f"{invalid}: {error.msg}", f"{error.lineno}:{error.colno}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise refused(f"{invalid}: {error.problem}", place) from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise refused(f"{invalid}: {str(error).splitlines()[0]}") from None
    if _is_deep(data, MOST_LEVELS):
        raise refused(_DEEPER)
    if data is None:
        raise refused("the file is empty")
    if not isinstance(data, dict):
        raise refused("not a mapping", expected="`key: value` lines at the top level")
    return cast("Content", data)


class _Loader(yaml.SafeLoader):
    """The safe loader, except that keys are text and stand only once in a mapping, that no tag
    changes what a value is, and that aliases stand for no more than `MOST_VALUES`."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._values: dict[yaml.Node, int] = {}
        """Of each node that is complete, those in it and itself."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = cast("Any", self.peek_event())  # pyright: ignore[reportUnknownMemberType]
        is_alias, mark = type(event) is yaml.AliasEvent, event.start_mark
        if not is_alias and event.tag not in _TAGS:
            raise _marked(f"the tag {event.tag!r} has no meaning here", mark)
        node = super().compose_node(parent, index)
        if is_alias and node not in self._values:
            raise _marked(f"*{event.anchor} stands in what it stands for", mark)
        if node is not None and node not in self._values:
            if node.tag == "tag:yaml.org,2002:int" and len(node.value) > _MOST_DIGITS:
                raise _marked(f"a number of {len(node.value):,} digits", mark)
            self._values[node] = count = 1 + sum(map(self._values.__getitem__, _inner(node)))
            if count > MOST_VALUES:
                many = f"more than {MOST_VALUES:,} values, with what its aliases stand for"
                raise _marked(many, mark)
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else "[…]"
            if key.tag not in _KEY_TAGS:
                raise _marked(f"write the key {name!r} in quotes", key.start_mark)
            if name in seen:
                raise _marked(f"duplicate key {name!r}", key.start_mark)
            seen.add(name)
        return node


def _marked(wrong: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(None, None, wrong, mark)


def _inner(node: yaml.Node) -> Iterable[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return (part for pair in node.value for part in pair)
    return node.value if isinstance(node, yaml.SequenceNode) else ()


def _is_deep(value: Any, levels: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    held = cast("dict[str, Any] | list[Any]", value)
    inner = held.values() if isinstance(held, dict) else held
    return not levels or any(_is_deep(each, levels - 1) for each in inner)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"duplicate key {next(key for key in keys if keys.count(key) > 1)!r}")
    return result


def _integer(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"a number of {len(digits):,} digits")
    return int(digits)
