"""Prompt templates: `{column}` and `{column.key}` are replaced, `{{`, `}}` are literal braces."""

from __future__ import annotations

from dataclasses import dataclass
from string import Formatter
from typing import Any

import orjson

from modelcall_assets.records.outcome import Row
from modelcall_assets.transforms.chatml import json_safe
from modelcall_assets.transforms.where import value_at


class MissingColumn(Exception):
    """The row has no usable value for a placeholder."""

    def __init__(self, column: str, value: object) -> None:
        self.column = column
        what = "no value" if value is None else "bytes that are no text"
        super().__init__(f"the row has {what} in column '{column}', which the prompt asks for")


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
        """What it looks up; of a path both what it begins with and, should a column be called
        that, the whole."""
        names = {name for _, name in self.parts if name is not None}
        return names | {name.partition(".")[0] for name in names}

    def render(self, values: Row) -> str:
        """Texts as they are, numbers as Python writes them, all else as JSON. Raises MissingColumn
        for a placeholder that is absent, null or bytes in `values`."""
        pieces: list[str] = []
        for literal, name in self.parts:
            pieces.append(literal)
            if name is not None:
                value = values.get(name)
                value = value_at(values, name) if value is None else value
                if value is None or isinstance(value, bytes):
                    raise MissingColumn(name, value)
                pieces.append(value if isinstance(value, str) else _shown(value))
        return "".join(pieces)


def _shown(value: Any) -> str:
    if isinstance(value, bool | dict | list):
        return orjson.dumps(json_safe(value)).decode()
    return str(value)
