"""The JSON object that a model's text holds, and what of it is thinking. In time linear in it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, cast

import orjson

_TAG = r"(?:think|thinking|thought|reasoning)\s*>"
_CLOSE = re.compile(rf"</{_TAG}", re.IGNORECASE)
_MARK = re.compile(rf"</{_TAG}|<{_TAG}|[{{\[][{{\[\s]*+", re.IGNORECASE)
"""A tag, or brackets that open."""
_KEY = re.compile(r"""["'“‘}]|//|/\*|#|[\w$.-]+\s*:""")
_ITEM = re.compile(r"""["'\d\]-]|true|false|null""")
"""What follows the bracket of an object or array, well-formed or not; else it is one of prose."""
_NAME = re.compile(r"""["']\s*:\s*\Z""")
_STRING = r'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)'
_TOKEN = re.compile(rf"{_STRING}|[{{}}\[\]]", re.DOTALL)
_TRAILING_COMMA = re.compile(rf"({_STRING})|,(?=\s*+[}}\]])", re.DOTALL)
_QUOTE_OR_BRACKET = re.compile(r"""["{}\[\]]|(?<!\w)'|'(?!\w)""")
_DOUBLED = re.compile(r"\{\s*(\{.*\})\s*\}", re.DOTALL)
_decode = json.JSONDecoder(strict=False).decode


def strip_thinking(text: str) -> str:
    """The text after the model's thinking; a missing tag at either end is tolerated, and one that
    a JSON object talks about is none."""
    return read(text)[0]


def last_object(text: str) -> dict[str, Any] | None:
    """The object that `read` finds."""
    return read(text)[1]


def read(text: str) -> tuple[str, dict[str, Any] | None]:
    """The text without thinking, and the last complete JSON object of it that is in no other.

    Mended are commas before a closing bracket and raw control characters in strings. None when it
    is not certain which object is meant: several in one array, or one that may lie inside a broken
    one.
    """
    whole = _object(text)
    return (text.strip(), whole) if whole is not None else _Reader(text).read()


class _Reader:
    """One pass over a text that is not just an object."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._found: dict[str, Any] | None = None
        self._begin = self._at = 0
        self._broken_until: int | None = None
        """Where the last broken object ends, as far as its quotes can be trusted."""

    def read(self) -> tuple[str, dict[str, Any] | None]:
        text, end = self._text, len(self._text)
        while (mark := _MARK.search(text, self._at)) is not None:
            start, self._at = mark.span()
            if text[start] != "<":
                if not self._take(start):
                    self._found = None
                    break
            elif text[start + 1] == "/":
                self._begin_after(self._at)
            elif (close := _CLOSE.search(text, self._at)) is not None:
                self._at = close.start()
            else:
                end = start
                break
        return text[self._begin : end].strip(), self._found

    def _begin_after(self, tag_end: int) -> None:
        self._begin = self._at = tag_end
        self._found = self._broken_until = None

    def _take(self, start: int) -> bool:
        """Look at what opens at `start`; False when all that follows may lie inside it."""
        text = self._text
        of_object = text[start : self._at].rstrip().endswith("{")
        if not (_KEY if of_object else _ITEM).match(text, self._at):
            return True
        end = _end(text, start)
        if end is None:
            closings = [tag.end() for tag in _CLOSE.finditer(text, start)]
            if closings:  # it was a thought
                self._begin_after(closings[-1])
                self._broken_until = self._at
            return bool(closings)
        piece, self._at = text[start:end], end
        value = _value(piece)
        objects = list(_objects(value))
        if objects:
            return self._choose(objects, start, end)
        if value is None and ('"' in piece or "'" in piece):
            self._found, self._broken_until = None, end
        return True

    def _choose(self, objects: list[object], start: int, end: int) -> bool:
        """Those of a complete value, unless it may be part of something broken."""
        before, behind = self._text[max(0, start - 1) : start], self._text[end : end + 1]
        if _NAME.search(self._text, max(0, start - 100), start):
            return False  # the value of a key
        if behind in ('"', "'") and before != behind:
            return False  # it ends in the middle of a text
        if self._broken_until is not None:
            if _QUOTE_OR_BRACKET.search(self._text, self._broken_until, start):
                return False  # as its quotes may be what is broken
            self._broken_until = None
        self._found = _object(json.dumps(objects[0])) if len(objects) == 1 else None
        return True


def _object(text: str) -> dict[str, Any] | None:
    """The object that `text` is. None for what no output can hold: NaN, a lone surrogate, nesting
    too deep for a writer that puts it two levels down."""
    try:
        value: object = orjson.loads(text)
        orjson.dumps([[value]])
    except (orjson.JSONDecodeError, orjson.JSONEncodeError):
        return None
    return cast("dict[str, Any]", value) if isinstance(value, dict) else None


def _objects(value: object) -> Iterator[object]:
    """Those of a value that are in no other, as the arrays have them."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield cast("object", value)
        elif isinstance(value, list):
            waiting += cast("list[object]", value)


def _value(piece: str) -> object:
    """None when it takes more than leaving out commas before a closing bracket and escaping control
    characters. Doubled braces, as templates have them, are one pair."""
    for text in (piece, _TRAILING_COMMA.sub(lambda found: found[1] or "", piece)):
        with suppress(ValueError, RecursionError):
            return _decode(text)
    if doubled := _DOUBLED.fullmatch(piece):
        return _value(f"[{doubled[1]}]")
    return None


def _end(text: str, start: int) -> int | None:
    """Where the bracket at `start` is closed; None when it is not."""
    opened: list[str] = []
    for token in _TOKEN.finditer(text, start):
        bracket = token[0]
        if bracket in "{[":
            opened.append("}" if bracket == "{" else "]")
        elif bracket in "}]":
            if opened.pop() != bracket:
                return None
            if not opened:
                return token.end()
    return None
