"""JSON lines: one object per line, and a BadLine in place of a line that is not one."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NoReturn

import orjson

from modelcall_assets.errors import InputError
from modelcall_assets.records.outcome import BadLine, Number, Row
from modelcall_assets.storage.files import NewFile
from modelcall_assets.storage.formats import MOST_LINE_BYTES, Reading
from modelcall_assets.storage.numbers import loads
from modelcall_assets.storage.places import Place

BLOCK_BYTES = 256 << 10
MOST_RAW_CHARS = 10_000
MOST_LEVELS = 250
"""orjson reads deeper objects than it can write back."""

Parse = Callable[[bytes, int], "Row | BadLine | None"]


def parse_line(line: bytes, number: int, encoding: str = "utf-8") -> Row | BadLine | None:
    """The object on line `number` (from 1); None for a blank line. Never raises, and gives no row
    that orjson cannot write back. `encoding` is what the line was in."""
    row = parse_deep_line(line, number, encoding)
    if _may_be_deep(row, line) and not _writable(row):
        return _bad(line, f"line {number}: nested deeper than {MOST_LEVELS} levels")
    return row


def parse_deep_line(line: bytes, number: int, encoding: str = "utf-8") -> Row | BadLine | None:
    """`parse_line` for a caller that copies lines, or finds out what cannot be written back."""
    if not line or line.isspace():
        return None
    try:
        row = loads(line)
    except orjson.JSONDecodeError as error:
        return _bad(line, _why(line, number, encoding, error))
    if not isinstance(row, dict):
        return _bad(line, f"line {number}: not an object but {_KINDS[type(row)]}")
    return row


def line_parser(
    parse: Callable[..., Row | BadLine | None], place: Place, reading: Reading
) -> Parse:
    """One of the two above for the lines of `place`: what is bad raises InputError if the task
    wants that."""
    as_told = parse if reading.encoding == "utf-8" else partial(parse, encoding=reading.encoding)
    if reading.on_bad_line == "keep":
        return as_told

    def strict(line: bytes, number: int) -> Row | None:
        item = as_told(line, number)
        if isinstance(item, BadLine):
            refuse(place, item)
        return item

    return strict


def refuse(place: Place, item: BadLine) -> NoReturn:
    """For a task that says `on_bad_line: fail`."""
    raise InputError(f"{place}: {item.detail}; correct it, or write `on_bad_line: keep`")


def write_lines(out: NewFile, lines: Iterable[bytes]) -> None:
    """Write lines in large blocks."""
    block: list[bytes] = []
    size = 0
    for line in lines:
        block.append(line)
        size += len(line)
        if size >= BLOCK_BYTES:
            out.write(b"".join(block))
            block.clear()
            size = 0
    out.write(b"".join(block))


def clip(text: str) -> str:
    """The first 10,000 characters, with a note of what is missing."""
    if len(text) <= MOST_RAW_CHARS:
        return text
    return f"{text[:MOST_RAW_CHARS]}… [{len(text) - MOST_RAW_CHARS} more characters]"


_KINDS: dict[type[Any], str] = {
    list: "a list",
    str: "a string",
    int: "a number",
    float: "a number",
    Number: "a number",
    bool: "a boolean",
    type(None): "null",
}


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


def _may_be_deep(row: Row | BadLine | None, line: bytes) -> bool:
    if not isinstance(row, dict) or {dict, list}.isdisjoint(map(type, row.values())):
        return False
    return line.count(b"[") + line.count(b"{") > MOST_LEVELS


def _writable(row: Row | BadLine | None) -> bool:
    if not isinstance(row, dict):
        return True
    try:
        orjson.dumps(row)
    except orjson.JSONEncodeError:
        return False
    return True
