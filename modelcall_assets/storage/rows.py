"""The rows of input files one by one, their ids, and how they are shown."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from itertools import repeat
from typing import Any

import orjson
import pyarrow as pa

from modelcall_assets.records.outcome import BadLine, Row
from modelcall_assets.storage.columns import MOST_ROWS, open_columns, rows_of
from modelcall_assets.storage.formats import OURS, Reading, format_of, numbered, open_lines
from modelcall_assets.storage.jsonl import line_parser, parse_deep_line, refuse
from modelcall_assets.storage.numbers import loads
from modelcall_assets.storage.places import Place

GIVEN_ID = "api_record_id"
ID_COLUMNS = ("id", "uid")
SHOWN_LEVELS = 20


def read_rows(
    place: Place, reading: Reading = OURS, chunk_rows: int = 1000
) -> Iterator[Row | BadLine]:
    """Stream the rows of a file of any format, in order, blank lines left out. A row may be nested
    deeper than orjson writes. InputError when the file
    cannot be read, or has a bad line and `reading` refuses those."""
    items = read_items(place, reading, chunk_rows)
    return (item for item, _ in items if item is not None)


def read_items(
    place: Place,
    reading: Reading = OURS,
    chunk_rows: int = 1000,
    read: Callable[[bytes], Any] = loads,
) -> Iterator[tuple[Row | BadLine | None, bytes | None]]:
    """`read_rows`, each with its line where the file is of lines; None for blank ones, which come
    as `numbered` gives them. `read` may be `orjson.loads`, for a caller that copies the lines."""
    format_ = format_of(place)
    if format_.has_columns:
        start = 0
        with open_columns(place, format_) as columns:
            for batch in columns.batches(chunk_rows, None):
                yield from zip(plain_rows(batch, start, place, reading), repeat(None))
                start += batch.num_rows
        return
    with open_lines(place, format_, reading) as file:
        parse = line_parser(parse_deep_line, place, reading)
        for number, line in numbered(file):
            try:
                row = read(line)
            except orjson.JSONDecodeError:
                row = None
            yield row if isinstance(row, dict) else parse(line, number), line


def count_rows(place: Place, reading: Reading) -> int:
    """Bad lines too. Nothing is parsed that need not be. InputError as `read_rows` has it."""
    format_ = format_of(place)
    if format_.has_columns:
        with open_columns(place, format_) as columns:
            return sum(batch.num_rows for batch in columns.batches(MOST_ROWS, ()))
    if reading.on_bad_line == "fail":
        return sum(1 for _ in read_rows(place, reading))
    with open_lines(place, format_, reading) as lines:
        return sum(not line.isspace() for _, line in numbered(lines))


def record_id(item: Row | BadLine, index: int, source: str, *, is_result: bool = False) -> str:
    """The row's own `id`, else `uid`, else a hash of the row, its file and its place in it; what is
    a result of ours has its id already."""
    if isinstance(item, BadLine):
        return _hashed(b"", index, source)
    own = (item.get(GIVEN_ID) if is_result else None) or own_id(item)
    if own is not None:
        return own
    return _hashed(orjson.dumps(item, default=str, option=orjson.OPT_SORT_KEYS), index, source)


def own_id(row: Row) -> str | None:
    """`id` or `uid` as text, bytes in hexadecimal; None when the row has neither."""
    for name in ID_COLUMNS:
        value = row.get(name)
        if value is not None and value != "":
            return value.hex() if isinstance(value, bytes) else str(value)
    return None


def sample_row(row: Row) -> Row:
    """A copy fit for showing: JSON values only, strings of 300 characters, lists of 10 items, of
    what is nested the first 20 levels."""
    return {name: _shown(value, SHOWN_LEVELS) for name, value in row.items()}


def plain_rows(
    batch: pa.RecordBatch, start: int, place: Place, reading: Reading
) -> list[Row | BadLine]:
    """What `rows_of` gives; InputError for a bad one if `reading` refuses those."""
    items = rows_of(batch, start)
    if reading.on_bad_line == "fail":
        for item in items:
            if isinstance(item, BadLine):
                refuse(place, item)
    return items


def _hashed(content: bytes, index: int, source: str) -> str:
    place = f"{source}#{index}".encode("utf-8", "surrogateescape")
    return hashlib.sha256(content + place).hexdigest()[:32]


def _shown(value: Any, levels: int) -> Any:
    if isinstance(value, str):
        return value if len(value) <= 300 else f"{value[:300]}…"
    if isinstance(value, dict | list | tuple) and not levels:
        return "…"
    if isinstance(value, dict):
        return {str(name): _shown(inner, levels - 1) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        more = [f"… {len(value) - 10} more"] if len(value) > 10 else []
        return [_shown(inner, levels - 1) for inner in value[:10]] + more
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    return value if value is None or isinstance(value, bool | int | float) else str(value)
