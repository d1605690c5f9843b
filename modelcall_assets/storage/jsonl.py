"""JSON lines: one object per line, and a BadLine in place of a line that is not one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import orjson

from modelcall_assets.records.record import BadLine, Row
from modelcall_assets.storage.files import NewFile

BLOCK_BYTES = 256 << 10
MOST_RAW_CHARS = 10_000
MOST_LEVELS = 250
"""orjson reads deeper objects than it can write back."""
_BOM = b"\xef\xbb\xbf"


def parse_line(line: bytes, number: int) -> Row | BadLine | None:
    """The object on line `number` (from 1); None for a blank line. Never raises, and gives no row
    that orjson cannot write back."""
    row = parse_deep_line(line, number)
    if line.count(b"[") + line.count(b"{") > MOST_LEVELS and not _writable(row):
        return _bad(line, f"line {number}: nested deeper than {MOST_LEVELS} levels")
    return row


def parse_deep_line(line: bytes, number: int) -> Row | BadLine | None:
    """`parse_line` for a caller that copies lines, or finds out what cannot be written back."""
    if number == 1:
        line = line.removeprefix(_BOM)
    if not line or line.isspace():
        return None
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return _bad(line, f"line {number}, column {error.colno}: {error.msg}")
    if type(row) is not dict:
        return _bad(line, f"line {number}: not an object but {_KINDS[type(row)]}")
    return row


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
    bool: "a boolean",
    type(None): "null",
}


def _bad(line: bytes, detail: str) -> BadLine:
    return BadLine(detail, clip(line.rstrip(b"\r\n").decode("utf-8", "replace")))


def _writable(row: Row | BadLine | None) -> bool:
    if not isinstance(row, dict):
        return True
    try:
        orjson.dumps(row)
    except orjson.JSONEncodeError:
        return False
    return True
