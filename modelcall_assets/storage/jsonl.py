"""JSON lines: one object per line, and a BadLine in place of a line that is not one. Numbers keep
their digits, also those that 64 bits do not hold."""

import codecs
import json
import math
import re
from collections.abc import Iterable
from decimal import Decimal
from typing import Any, NoReturn

import orjson

from modelcall_assets.records.outcome import BadLine, Number, Numbered, Row, text_of_bytes
from modelcall_assets.storage.files import NewFile
from modelcall_assets.storage.formats import MOST_LINE_BYTES

BLOCK_BYTES = 256 << 10
MOST_RAW_CHARS = 10_000
MOST_LEVELS = 250
"""orjson reads deeper objects than it can write back."""
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
_KINDS: dict[type[Any], str] = {
    **dict.fromkeys((int, float, Number), "a number"),
    **{list: "a list", str: "a string", bool: "a boolean", type(None): "null"},
}


def parse_line(
    line: bytes, number: int, encoding: str = "utf-8", *, may_be_deep: bool = False
) -> Row | BadLine:
    """The object on line `number` (from 1), which is not blank. Never raises, and gives no row that
    orjson cannot write back, unless it `may_be_deep`. `encoding` is what the line was in."""
    try:
        row = loads(line)
    except orjson.JSONDecodeError as error:
        return _bad(line, _why(line, number, encoding, error))
    if not isinstance(row, dict):
        return _bad(line, f"line {number}: not an object but {_KINDS[type(row)]}")
    is_safe = may_be_deep or {dict, list}.isdisjoint(map(type, row.values()))
    if is_safe or line.count(b"[") + line.count(b"{") <= MOST_LEVELS:
        return row
    try:
        orjson.dumps(row)
    except orjson.JSONEncodeError:
        return _bad(line, f"line {number}: nested deeper than {MOST_LEVELS} levels")
    return row


def write_lines(out: NewFile, lines: Iterable[bytes]) -> None:
    block, size = list[bytes](), 0
    for line in lines:
        block.append(line)
        size += len(line)
        if size >= BLOCK_BYTES:
            out.write(b"".join(block))
            block, size = [], 0
    out.write(b"".join(block))


def clip(text: str) -> str:
    """The first 10,000 characters, with a note of what is missing."""
    if len(text) <= MOST_RAW_CHARS:
        return text
    return f"{text[:MOST_RAW_CHARS]}… [{len(text) - MOST_RAW_CHARS} more characters]"


def loads(text: bytes) -> Any:
    """What orjson reads, but a `Number` in place of each that it would not give back. A row with
    one is `Numbered`, in a list too. JSONDecodeError."""
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        if (value := _readable(text)) is None:  # it refuses 1e400
            raise
        return value
    try:
        floats = _floats(value.values() if type(value) is dict else (value,), [])
    except RecursionError:
        return value
    return _read(text) if floats and _differs(text, floats) else value


def dumps(value: Any, option: int = 0) -> bytes:
    """JSON with numbers as they were written, bytes as text, what else it lacks as `str()`."""
    return orjson.dumps(value, default=_plain, option=option | orjson.OPT_PASSTHROUGH_SUBCLASS)


def holds_number(value: Any) -> bool:
    if isinstance(value, dict | list):
        return any(map(holds_number, value.values() if isinstance(value, dict) else value))
    return isinstance(value, Number)


def _why(line: bytes, number: int, encoding: str, error: orjson.JSONDecodeError) -> str:
    """orjson does not say where a line is no UTF-8."""
    if len(line) > MOST_LINE_BYTES:
        return f"line {number}: longer than {MOST_LINE_BYTES >> 20} MiB; its beginning is kept"
    try:
        line.decode()
    except UnicodeDecodeError as found:
        column = len(line[: found.start].decode()) + 1
        wide = number == 1 and line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        what = "UTF-16 by its first bytes, set `encoding`" if wide else f"not {encoding}"
        return f"line {number}, column {column}: {what}"
    return f"line {number}, column {error.colno}: {error.msg}"


def _bad(line: bytes, detail: str) -> BadLine:
    line = line if len(line) <= MOST_LINE_BYTES else line[:MOST_RAW_CHARS]
    return BadLine(detail, clip(line.rstrip(b"\r\n").decode("utf-8", "replace")))


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
            sign = "-" if text[:start].endswith(b"-", found.start() - 1, found.start()) else ""
            number = sign + found[0].decode()
            if len(found[0]) > _SAFE_CHARS and isinstance(_number(number), Number):
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
    """Whether it is the number that the text says, or one that others write so, with 17 digits."""
    if not math.isfinite(value):
        return False
    exact = Decimal(text)
    digits = len(exact.as_tuple().digits)
    return exact == Decimal(repr(value)) or (
        digits <= 17 and exact == Decimal(f"{value:.{digits - 1}e}")
    )


def _read(text: bytes) -> Any:
    value = json.loads(
        text.decode(), parse_int=_number, parse_float=_number, parse_constant=_no_constant
    )
    return [*map(_numbered, value)] if isinstance(value, list) else _numbered(value)


def _numbered(value: Any) -> Any:
    return Numbered(value) if isinstance(value, dict) and holds_number(value) else value


def _readable(text: bytes) -> Any:
    """What text says that orjson refuses; None when it is no JSON, or has absurdly many digits."""
    if _ABSURD.search(text):
        return None
    try:
        value = _read(text)
        orjson.dumps(value)
    except (ValueError, TypeError, RecursionError):
        return None
    return value


def _no_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")
