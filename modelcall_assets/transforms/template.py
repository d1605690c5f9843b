"""Prompt templates: `{column}` is replaced, `{{` and `}}` are literal braces, nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from string import Formatter
from typing import Any


class MissingColumn(Exception):
    """The row has no usable value for a placeholder."""

    def __init__(self, column: str, value: object) -> None:
        self.column = column
        what = "no value" if value is None else "bytes that are no text"
        super().__init__(f"the row has {what} in column '{column}', which the prompt asks for")


@dataclass(frozen=True, slots=True)
class Template:
    """A compiled template: literal text and column names in turn.

    Only plain column names are looked up, never attributes or items of a value, so a prompt file
    cannot reach into Python objects. `config.prompt` refuses such templates with a message.
    """

    parts: tuple[tuple[str, str | None], ...]

    @classmethod
    def compile(cls, text: str) -> Template:
        return cls(tuple((literal, name) for literal, name, _, _ in Formatter().parse(text)))

    @property
    def columns(self) -> set[str]:
        """What it looks up."""
        return {name for _, name in self.parts if name is not None}

    def render(self, values: Mapping[str, Any]) -> str:
        """Raises MissingColumn for a placeholder that is absent, null or bytes in `values`."""
        pieces: list[str] = []
        for literal, name in self.parts:
            pieces.append(literal)
            if name is not None:
                value = values.get(name)
                if value is None or isinstance(value, bytes):
                    raise MissingColumn(name, value)
                pieces.append(value if isinstance(value, str) else str(value))
        return "".join(pieces)
