"""JSON whose numbers keep their digits, also those that 64 bits do not hold."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from decimal import Decimal
from typing import Any, NoReturn

import orjson

from modelcall_assets.records.outcome import Number, Numbered, text_of_bytes

_AS_0 = bytes.maketrans(b"123456789.", b"0" * 10)
_DIGITS = b"0123456789."
_NUMBER = re.compile(rb"[0-9.]+(?:[eE][-+]?[0-9]+)?")
_TINY_NUMBER = re.compile(rb"[0-9][eE]-[0-9]{3}")
_ABSURD = re.compile(rb"[0-9]{1001}")
_SAFE_CHARS = 15
"""A double holds every decimal number of so many digits."""
_TINY = 1e-300
_STEP = 8
_EXACT = range(-(2**63), 2**64)


def loads(text: bytes) -> Any:
    """What orjson reads, but a `Number` in place of each that it would not give back. A row with
    one is `Numbered`, in a list too. JSONDecodeError."""
    value = loads_doubles(text)
    try:
        floats = _floats(value.values() if type(value) is dict else (value,), [])
    except RecursionError:
        return value
    return _read(text) if floats and _differs(text, floats) else value


def loads_doubles(text: bytes) -> Any:
    """What orjson reads, with numbers as doubles if need be; for a caller that copies the text."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        if (value := _readable(text)) is None:  # it refuses 1e400
            raise
        return value


def dumps(value: Any, option: int = 0) -> bytes:
    """With numbers as they were written; bytes as text, what else JSON has no word for as
    `str()`."""
    return orjson.dumps(value, default=_plain, option=option | orjson.OPT_PASSTHROUGH_SUBCLASS)


def holds_number(value: Any) -> bool:
    """Whether a `Number` is in it."""
    if isinstance(value, dict | list):
        return any(map(holds_number, value.values() if isinstance(value, dict) else value))
    return isinstance(value, Number)


def _plain(value: Any) -> Any:
    if isinstance(value, Number):
        return orjson.Fragment(str(value))
    if isinstance(value, bytes):
        return text_of_bytes(value)
    return dict(value) if isinstance(value, dict) else str(value)


def _floats(values: Iterable[Any], found: list[float]) -> list[float]:
    """Whatever orjson cannot hold it makes a float of."""
    for value in values:
        kind = type(value)
        if kind is str:
            continue
        if kind is float:
            found.append(value)
        elif kind is dict:
            _floats(value.values(), found)
        elif kind is list:
            _floats(value, found)
    return found


def _differs(text: bytes, floats: list[float]) -> bool:
    """Whether a number of the text may not be what was read. Sixteen digits in a row are found by
    looking at every eighth character."""
    if min(map(abs, floats)) < _TINY and _TINY_NUMBER.search(text):
        return True
    sampled = text[::_STEP].translate(_AS_0)
    at = sampled.find(b"00")
    while at >= 0:
        start = at * _STEP
        before = text[max(0, start - _STEP) : start]
        found = _NUMBER.match(text, start - len(before) + len(before.rstrip(_DIGITS)))
        if found is not None:
            if len(found[0]) > _SAFE_CHARS and isinstance(_number(found[0].decode()), Number):
                return True
            at = max(at, -(-found.end() // _STEP) - 1)
        at = sampled.find(b"00", at + 1)
    return False


def _number(text: str) -> int | float | Number:
    if text.lstrip("-").isdigit():
        short = len(text) <= 20 and int(text) in _EXACT
        return int(text) if short else Number(text)
    try:
        value = float(text)
    except ValueError:  # dots or a date
        return 0
    return value if repr(value) == text or _holds(value, text) else Number(text)


def _holds(value: float, text: str) -> bool:
    """Whether it is the number of that text, or one that others write so: with 17 digits."""
    if not math.isfinite(value):
        return False
    exact = Decimal(text)
    digits = len(exact.as_tuple().digits)
    return exact == Decimal(repr(value)) or (
        digits <= 17 and exact == Decimal(f"{value:.{digits - 1}e}")
    )


def _read(text: bytes) -> Any:
    value = json.loads(
        text.decode(), parse_int=_number, parse_float=_number, parse_constant=_refuse
    )
    return [*map(_marked, value)] if isinstance(value, list) else _marked(value)


def _marked(value: Any) -> Any:
    return Numbered(value) if isinstance(value, dict) and holds_number(value) else value


def _readable(text: bytes) -> Any:
    """The same of what orjson refuses; None when it was right to, or of absurdly many digits."""
    if _ABSURD.search(text):
        return None
    try:
        value = _read(text)
        orjson.dumps(value)
    except (ValueError, TypeError, RecursionError):
        return None
    return value


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")
