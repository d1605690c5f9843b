"""`score >= 4 and language = python`: a condition on the columns of a row.

The operators are = == != < <= > >=. A value is a number, `true`, `false`, `null`, or a text, in
quotes where it holds spaces. A row without a value in the column meets `= null` and no other
comparison.
`raw_data.language` looks into a column of objects.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from modelcall_assets.records.outcome import Row

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

    comparisons: tuple[_Comparison, ...]

    @classmethod
    def parse(cls, text: str) -> Where:
        """ValueError says where the text stops being a condition."""
        comparisons: list[_Comparison] = []
        at = 0
        while found := _COMPARISON.match(text, at):
            comparisons.append(_comparison(found))
            at = found.end()
            if at == len(text):
                return cls(tuple(comparisons))
            if (word := _AND.match(text, at)) is None:
                break
            at = word.end()
        raise ValueError(f"not a condition from '{text[at:]}' on")

    def __call__(self, row: Row) -> bool:
        return all(comparison.holds(row) for comparison in self.comparisons)

    @property
    def columns(self) -> frozenset[str]:
        """The columns that it looks at."""
        return frozenset(comparison.column for comparison in self.comparisons)


def has_column(names: frozenset[str], column: str) -> bool:
    """Whether rows with these columns can have a value for it."""
    return column in names or column.partition(".")[0] in names


def _comparison(found: re.Match[str]) -> _Comparison:
    written, sign = found["value"], found["operator"]
    is_quoted = written[0] in "\"'"
    text = written[1:-1] if is_quoted else written
    value = text if is_quoted else _meaning(text)
    if value is None and sign not in ("=", "==", "!="):
        raise ValueError(f"null can only be compared with = and !=, not with {sign}")
    return _Comparison(found["column"].strip('"'), sign, text, value)


def _meaning(word: str) -> Any:
    if word.lower() in _WORDS:
        return _WORDS[word.lower()]
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return word


def value_at(row: Row, column: str) -> Any:
    """That of the column, else what the path leads to: `raw_data.language`, `turns.0.text`."""
    if column in row:
        return row[column]
    value: Any = row
    for name in column.split("."):
        if isinstance(value, list) and name.isdigit():
            items = cast("list[Any]", value)
            value = items[int(name)] if len(name) < 10 and int(name) < len(items) else None
        else:
            value = cast("Row", value).get(name) if isinstance(value, dict) else None
    return value


def _kind(value: Any) -> str:
    """Integers and floats are of one kind, truth values of another."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "number"
    return type(cast("object", value)).__name__
