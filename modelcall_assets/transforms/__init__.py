"""Pure functions on rows and text; know neither files nor models. Here, values of a row's columns:
looked up by paths, compared, put into prompts, made JSON's.

A path is `raw_data.language` or `turns.0.text`. A condition is `score >= 4 and language = python`
with = == != < <= > >= and a number, `true`, `false`, `null`, or a text, in quotes where it holds
spaces. A row without a value in the column meets `= null` and no other comparison. A template has
`{column}` and `{column.key}`; `{{` and `}}` are literal braces.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import date, time
from string import Formatter
from typing import Any, ClassVar, cast

import orjson

from modelcall_assets.records.outcome import BadLine, Number, Row, text_of_bytes

_LINE = orjson.OPT_APPEND_NEWLINE | orjson.OPT_PASSTHROUGH_SUBCLASS

_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_COMPARISON = re.compile(
    r"""\s*(?P<column>"[^"]+"|[^\s=!<>"']+)\s*(?P<operator>==|!=|<=|>=|=|<|>)\s*"""
    r"""(?P<value>"[^"]*"|'[^']*'|[^\s"'=!<>]+)\s*"""
)
_AND = re.compile(r"and\b", re.IGNORECASE)
_WORDS = {"true": True, "false": False, "null": None}


@dataclass(frozen=True, slots=True)
class _Comparison:
    column: str
    operator: str
    text: str
    value: Any
    """What the text means: a number, true, false, null, or itself."""

    @classmethod
    def of(cls, column: str, operator: str, value: str) -> _Comparison:
        """As they are written. ValueError when null is compared with another sign."""
        is_quoted = value[0] in "\"'"
        text = value[1:-1] if is_quoted else value
        meaning = text if is_quoted else _meaning(text)
        if meaning is None and operator not in ("=", "==", "!="):
            raise ValueError(f"null can only be compared with = and !=, not with {operator}")
        return cls(column.strip('"'), operator, text, meaning)

    def holds(self, row: Row) -> bool:
        have, compare = value_at(row, self.column), _OPERATORS[self.operator]
        if have is None:
            return self.value is None and compare is operator.eq
        if self.value is None:
            return compare is operator.ne
        if isinstance(have, str):
            is_order = compare not in (operator.eq, operator.ne)
            return not (is_order and not isinstance(self.value, str)) and compare(have, self.text)
        if _kind(have) != _kind(self.value):
            return compare is operator.ne
        return compare(have, self.value)


@dataclass(frozen=True, slots=True)
class Where:
    """All of its comparisons must hold."""

    expected: ClassVar[str] = "'column op value', joined by 'and'"
    """What to say where a text is none."""
    comparisons: tuple[_Comparison, ...]

    @classmethod
    def parse(cls, text: str) -> Where:
        """ValueError says where the text stops being a condition."""
        comparisons: list[_Comparison] = []
        at = 0
        while found := _COMPARISON.match(text, at):
            comparisons.append(_Comparison.of(**found.groupdict()))
            at = found.end()
            if at == len(text):
                return cls(tuple(comparisons))
            if (word := _AND.match(text, at)) is None:
                break
            at = word.end()
        raise ValueError(f"not a condition from '{text[at:]}' on")

    def __call__(self, row: Row | BadLine) -> bool:
        """True of no bad line."""
        return not isinstance(row, BadLine) and all(each.holds(row) for each in self.comparisons)

    @property
    def columns(self) -> frozenset[str]:
        return frozenset(comparison.column for comparison in self.comparisons)


class MissingColumn(Exception):
    """The row has no usable value for a placeholder."""


@dataclass(frozen=True, slots=True)
class Template:
    """A compiled template: literal text and column names in turn.

    Only columns and what objects and lists in them hold are looked up, never attributes, so a
    prompt file cannot reach into Python objects. `config.prompt` refuses such templates.
    """

    parts: tuple[tuple[str, str | None], ...]

    @classmethod
    def compile(cls, text: str) -> Template:
        return cls(tuple((literal, name) for literal, name, _, _ in Formatter().parse(text)))

    @property
    def columns(self) -> set[str]:
        """What it looks up; of a path its beginning and the whole, which may be a column."""
        names = {name for _, name in self.parts if name is not None}
        return names | {name.partition(".")[0] for name in names}

    def render(self, values: Row) -> str:
        """Texts as they are, numbers as Python writes them, all else as JSON. Raises MissingColumn
        for a placeholder that is absent, null or bytes in `values`."""
        pieces: list[str] = []
        for literal, name in self.parts:
            pieces.append(literal)
            if name is not None:
                value = value_at(values, name)
                if value is None or isinstance(value, bytes):
                    what = "no value" if value is None else "bytes that are no text"
                    column = f"column '{name}', which the prompt asks for"
                    raise MissingColumn(f"the row has {what} in {column}")
                is_json = isinstance(value, bool | dict | list)
                pieces.append(orjson.dumps(json_safe(value)).decode() if is_json else str(value))
        return "".join(pieces)


def value_at(row: Row, column: str) -> Any:
    """The value of the column, else what the path leads to."""
    if column in row:
        return row[column]
    value: Any = row
    for name in column.split("."):
        if isinstance(value, list) and name.isdecimal():
            items = cast("list[Any]", value)
            value = items[int(name)] if len(name) < 10 and int(name) < len(items) else None
        else:
            value = cast("Row", value).get(name) if isinstance(value, dict) else None
    return value


def encode(row: Row | list[Any]) -> bytes:
    """The row as a line of JSON; what JSON has no word for is written as `json_safe` says.
    TypeError or RecursionError when it is nested too deeply or holds half a surrogate pair."""
    try:
        return orjson.dumps(row, option=_LINE)
    except orjson.JSONEncodeError:
        return orjson.dumps(json_safe(row), option=_LINE)


def json_safe(value: Any) -> Any:
    """The value with JSON's types only, at every depth: bytes as the UTF-8 text that they are, else
    as base64; dates in ISO format; tuples and sets as lists; what is no finite number as null; keys
    and all else as `str()`."""
    if isinstance(value, Number):
        return orjson.Fragment(str(value))
    if isinstance(value, str):
        return str(value)
    if value is None or isinstance(value, bool | orjson.Fragment):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, int):
        return value if -(2**63) <= value < 2**64 else str(value)
    if isinstance(value, Mapping):
        mapping = cast("Mapping[Any, Any]", value)
        return {str(name): json_safe(inner) for name, inner in mapping.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [json_safe(inner) for inner in cast("list[Any]", value)]
    if isinstance(value, bytes | bytearray):
        return text_of_bytes(bytes(value))
    return value.isoformat() if isinstance(value, date | time) else str(value)


def _meaning(word: str) -> Any:
    if word.lower() in _WORDS:
        return _WORDS[word.lower()]
    for kind in (int, float):
        with suppress(ValueError):
            return kind(word)
    return word


def _kind(value: Any) -> str:
    """Integers and floats are of one kind, truth values of another."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "number"
    return type(cast("object", value)).__name__
