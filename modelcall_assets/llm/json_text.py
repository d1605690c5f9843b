"""JSON as servers write it, and the object that a model's text holds, in time linear in it."""

import json
import math
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, cast

import orjson

Json = dict[str, Any]
JsonValue = Json | list[Any] | str | float | None

BOM = b"\xef\xbb\xbf"
_SURROGATE = re.compile("[\ud800-\udfff]")

_TAG = r"(?:\w+:)?(?:think|thinking|thoughts?|reasoning|analysis|reflection)"
_FINAL = r"<\|channel\|>\s*final\b[^{}\[\]]{0,80}?<\|message\|>"
_CLOSING = rf"(?i:</{_TAG}\s*>|◁/think▷|<\|end_(?:of_thought|thinking)\|>|{_FINAL})|\[/THINK\]"
_OPENING = (
    rf"(?i:<{_TAG}(?:\s+[\w:-]+=[^<>]*)?\s*>|◁think▷|<\|(?:begin_of_thought|start_thinking)\|>"
    r"|<\|channel\|>\s*\w)|\[THINK\]"
)
_CLOSE = re.compile(_CLOSING)
_OPEN = re.compile(_OPENING)
_MARK = re.compile(rf"(?P<close>{_CLOSING})|(?P<open>{_OPENING})|[{{\[][{{\[\s]*+")
"""A tag, or brackets that open. Of the channels of Harmony only the final one is no thought."""
_KEY = re.compile(r"""["'“‘}]|//|/\*|#|[\w$.-]+\s*:""")
_ITEM = re.compile(r"""["'\d\]-]|true|false|null""")
"""What follows the bracket of an object or array, well-formed or not; else it is one of prose."""
_NAME = re.compile(r"""["']\s*:\s*\Z""")
_STRING = r'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)'
_TOKEN = re.compile(rf"{_STRING}|[{{}}\[\]]", re.DOTALL)
_TRAILING_COMMA = re.compile(rf"({_STRING})|,(?=\s*+[}}\]])", re.DOTALL)
_NAMED = re.compile(r"""["'”’]\s*:""")
_NAMED_OBJECT = re.compile(r"""\{\s*["'“‘][^"'”’{}]*["'”’]\s*:""")
_FENCED = re.compile(r"\s*(?:json)?\s*+([{\[].*)", re.DOTALL | re.IGNORECASE)
_OPENS = re.compile(r"\s*\{")
_MOST_STRAYS = 16
_SAFE_LEVELS = 200
"""Any writer takes so many."""
_QUOTE_OR_BRACKET = re.compile(r"""["{}\[\]]|(?<!\w)'|'(?!\w)""")
_DOUBLED = re.compile(r"\{\s*(\{.*\})\s*\}", re.DOTALL)
_decode = json.JSONDecoder(strict=False).decode


def parsed(body: bytes | str, *, in_pieces: bool = False) -> Any:
    """A body of JSON; None for what is none. A lone surrogate is U+FFFD, and a number that no
    double holds is null: what else is in a reply was paid for. `in_pieces`: a lone surrogate
    stays, as its other half may be in the next piece."""
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        pass
    try:
        value = json.loads(
            body, parse_float=_double, parse_int=_double, parse_constant=lambda _: None
        )
        if in_pieces:
            return value
        text = json.dumps(value, ensure_ascii=False)
        return orjson.loads(_SURROGATE.sub("\ufffd", text))
    except (ValueError, RecursionError):
        return None


def encoded(completion: object) -> bytes:
    """The body of a completion that we have put together, perhaps from halves of surrogates."""
    with suppress(orjson.JSONEncodeError):
        return orjson.dumps(completion)
    with suppress(orjson.JSONEncodeError, RecursionError):
        if (joined := parsed(json.dumps(completion))) is not None:
            return orjson.dumps(joined)
    return b"a reply that is nested too deeply"


def _double(text: str) -> float | int | None:
    value = float(text)
    if not math.isfinite(value):
        return None
    return int(text) if text.lstrip("-").isdigit() else value


def as_object(value: JsonValue) -> Json:
    """Empty for what is no JSON object."""
    return value if isinstance(value, dict) else {}


def read(text: str) -> tuple[str, dict[str, Any] | None]:
    """The text after the model's thinking, and the last complete JSON object that is in no other.

    A missing tag at either end is tolerated, and one that a JSON object talks about is none.
    Mended are commas before a closing bracket and raw control characters in strings. Where the
    prose leaves it uncertain, the last of those that fill a code fence. None when it is not certain
    which object is meant: several in one array, or one that may lie inside a broken one.
    """
    whole = _object(text) if _OPENS.match(text) else None
    if whole is not None:
        return text.strip(), whole
    rest, found = _Reader(text).read()
    return rest, _fenced(rest) if found is None and "```" in rest else found


class _Reader:
    def __init__(self, text: str) -> None:
        self._text = text
        self._found: dict[str, Any] | None = None
        self._begin = self._at = 0
        self._broken_until: int | None = None
        """Where the last broken object ends, as far as its quotes can be trusted."""
        self._stray_from: int | None = None
        """Where brackets stand that only prose can have, unless a name of a key follows."""
        self._strays = 0

    def read(self) -> tuple[str, dict[str, Any] | None]:
        text, end = self._text, len(self._text)
        while (mark := _MARK.search(text, self._at)) is not None:
            start, self._at = mark.span()
            if mark.lastgroup is None:
                if not self._take(start):
                    self._found = None
                    break
            elif mark.lastgroup == "close":
                self._begin_after(self._at)
            elif (close := _CLOSE.search(text, self._at)) is not None:
                self._at = close.start()
            else:
                end = start
                break
        return text[self._begin : end].strip(), self._found

    def _begin_after(self, tag_end: int) -> None:
        self._begin = self._at = tag_end
        self._found = self._broken_until = self._stray_from = None

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
            return bool(closings) or self._is_stray(start)
        piece, self._at = text[start:end], end
        value = _value(piece)
        objects = list(_objects(value))
        if objects:
            return self._choose(objects, start, end)
        if value is None and _NAMED.search(piece):
            self._found, self._broken_until = None, end
        elif value is None and ('"' in piece or "'" in piece):
            self._stray_from = start if self._stray_from is None else self._stray_from
        return True

    def _is_stray(self, start: int) -> bool:
        """Whether the bracket that nothing closes is of prose (`[0, 1)`), not around an object."""
        text, opened = self._text, self._text[start : self._at].rstrip()
        self._strays += 1
        if "{" in opened or self._strays > _MOST_STRAYS:
            return False
        following = text.find("{", self._at)
        if following >= 0 and text[start:following].rstrip().endswith((",", "[", ":")):
            return False
        self._stray_from = start if self._stray_from is None else self._stray_from
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
        if self._stray_from is not None:
            if _NAMED.search(self._text, self._stray_from, start):
                return False
            self._stray_from = end
        self._found = _object(json.dumps(objects[0])) if len(objects) == 1 else None
        return True


def _fenced(text: str) -> dict[str, Any] | None:
    """The object that the last fence with JSON holds. None when the fence may stand in the text of
    a broken object, or one follows it."""
    text = text[max((tag.end() for tag in _CLOSE.finditer(text)), default=0) :]
    text = text[: opened.start()] if (opened := _OPEN.search(text)) else text
    parts = text.split("```")
    for at in reversed(range(1, len(parts), 2)):
        if (inside := _FENCED.fullmatch(parts[at])) is not None:
            break
    else:
        return None
    before, after = "```".join(parts[:at]), "```".join(parts[at + 1 :])
    if _NAMED_OBJECT.search(after) or ("}" in after and ("{" in before or _NAMED.search(before))):
        return None
    named = _NAMED_OBJECT.search(before)
    while named is not None:
        end = _end(before, named.start())
        if end is None:
            return None
        named = _NAMED_OBJECT.search(before, end)
    value = _value(inside[1].rstrip())
    return _object(json.dumps(value)) if isinstance(value, dict) else None


def _object(text: str) -> dict[str, Any] | None:
    """The object that `text` is. None for what no output can hold: NaN, a lone surrogate, nesting
    too deep for a writer that puts it two levels down."""
    try:
        value: object = orjson.loads(text)
        if text.count("{") + text.count("[") > _SAFE_LEVELS:
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
