"""JSON values and the Arrow types that hold them. Numbers keep their digits, also those that 64
bits do not hold. A schema is inferred while rows stream past, and kept in manifests as text.

A column that no Parquet type holds without loss (conflicting types, `{}`, numbers too wide, very
many keys) becomes JSON text: a string field marked with `JSON_TEXT`.
"""

import base64
import json
import re
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal, InvalidOperation
from itertools import chain
from typing import Any, NoReturn

import orjson
import pyarrow as pa

from modelcall_assets.records.outcome import Number, Numbered, Row, text_of_bytes

JSON_TEXT = {b"modelcall.json": b"1"}
BATCH_ROWS = 1000
BATCH_BYTES = 16 << 20
"""Looked at once to infer a schema."""
MOST_NODES, MOST_LEVELS = 500, 50
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
_UNITS = {"s": 0, "ms": -3, "us": -6, "ns": -9}


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
    try:
        exact = Decimal(text)
    except InvalidOperation:  # an exponent of 19 digits, as digests may look to have
        return False
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


class SchemaInference:
    """Add every row once, then ask for the schema; the order of columns is first seen first."""

    def __init__(self) -> None:
        self._types: dict[str, pa.DataType | None] = {}
        """None: JSON text."""
        self._wide: set[str] = set()
        """Columns with integers that a double cannot hold."""
        self._waiting: list[Row] = []
        self._waiting_bytes = 0

    def add(self, rows: Sequence[Row]) -> None:
        for name in dict.fromkeys(chain.from_iterable(rows)):
            known = self._types.setdefault(name, pa.null())
            if known is not None:
                self._types[name] = self._widen(name, known, [row.get(name) for row in rows])
        for row in rows:
            if isinstance(row, Numbered):
                self._types.update((name, None) for name in row if holds_number(row[name]))

    def __len__(self) -> int:
        return len(self._types)

    def take(self, row: Row, size: int) -> None:
        """Add one row, of about `size` bytes, once there are enough to look at."""
        self._waiting.append(row)
        self._waiting_bytes += size
        if len(self._waiting) >= BATCH_ROWS or self._waiting_bytes >= BATCH_BYTES:
            self._look()

    def add_types(self, schema: pa.Schema) -> None:
        self._look()
        for field in schema:
            known = self._types.setdefault(field.name, pa.null())
            if known is not None:
                try:
                    known = None if is_json_text(field) else _unify(known, field.type)
                except pa.ArrowException:
                    known = None
                self._types[field.name] = known

    def schema(self) -> pa.Schema:
        self._look()
        return pa.schema([_field(name, kind) for name, kind in self._types.items()])

    def _look(self) -> None:
        self.add(self._waiting)
        self._waiting.clear()
        self._waiting_bytes = 0

    def _widen(self, name: str, known: pa.DataType, values: list[Any]) -> pa.DataType | None:
        """The type that holds the column so far and `values`; None when only JSON text does."""
        try:
            found = pa.infer_type(values)
            are_mixed = pa.types.is_floating(found) and bool in set(map(type, values))
            if _nodes(found) > MOST_NODES or are_mixed:  # Arrow would make [0.5, true] [0.5, 1.0]
                return None
            array = pa.array(values, type=found)
            if has(found, pa.types.is_integer) and not _fits_double(array):
                self._wide.add(name)
            unified = _unify(known, found)
        except (pa.ArrowException, OverflowError):
            return None
        wide_double = name in self._wide and has(unified, pa.types.is_floating)
        return None if wide_double or _nodes(unified) > MOST_NODES else unified


def is_json_text(field: pa.Field) -> bool:
    return bool(field.metadata and field.metadata.get(b"modelcall.json"))


def readable_schema(schema: pa.Schema) -> list[tuple[str, str]]:
    """Column names and types for people; JSON text shows as `json`."""
    return [(field.name, "json" if is_json_text(field) else str(field.type)) for field in schema]


def schema_to_json(schema: pa.Schema) -> str:
    """A JSON-safe text that `schema_from_json` turns back into an equal schema."""
    return base64.b64encode(schema.serialize().to_pybytes()).decode()


def schema_from_json(text: str) -> pa.Schema:
    return pa.ipc.read_schema(pa.py_buffer(base64.b64decode(text)))


def read_as(schema: pa.Schema) -> pa.Schema:
    """Columns and types as they are read: nullable, views as plain strings, dictionaries of strings
    only, and of the metadata only the JSON text mark."""
    fields: list[pa.Field] = []
    for field in schema:
        mark = JSON_TEXT if is_json_text(field) else None
        fields.append(pa.field(field.name, map_leaves(field.type, _type_read), metadata=mark))
    return pa.schema(fields)


def plain_type(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_temporal(kind) or pa.types.is_decimal(kind):
        return pa.string()
    is_run = pa.types.is_run_end_encoded(kind) and pa.types.is_temporal(kind.value_type)
    return plain_type(kind.value_type) if is_run or pa.types.is_dictionary(kind) else kind


def with_units(value: Any, kind: pa.DataType) -> Any:
    """The digits of durations, at every depth, as ISO 8601 has them: `PT90.5S`."""
    if value is None:
        return None
    if pa.types.is_duration(kind):
        seconds = Decimal(value).scaleb(_UNITS[kind.unit]).normalize()
        return f"{'-' if seconds < 0 else ''}PT{abs(seconds):f}S"
    if pa.types.is_struct(kind):
        return {field.name: with_units(value[field.name], field.type) for field in kind}
    if pa.types.is_map(kind):
        types = (kind.key_type, kind.item_type)
        return [tuple(map(with_units, pair, types)) for pair in value]
    return [with_units(each, kind.value_type) for each in value] if kind.num_fields else value


def holds_bytes(kind: pa.DataType) -> bool:
    types = pa.types
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind)


def _type_read(kind: pa.DataType) -> pa.DataType:
    """Arrow cannot gather rows of view types, and Parquet has dictionaries of strings only."""
    if pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_binary_view(kind):
        return pa.binary()
    if not pa.types.is_dictionary(kind) or pa.types.is_nested(kind.value_type):
        return kind
    value = _type_read(kind.value_type)
    if type_of_bytes(value) == value and not holds_bytes(value):
        return value
    return pa.dictionary(kind.index_type, value, kind.ordered)


def type_of_bytes(kind: pa.DataType) -> pa.DataType:
    """Of the same layout, without the demand that it be UTF-8."""
    if pa.types.is_string(kind):
        return pa.binary()
    return pa.large_binary() if pa.types.is_large_string(kind) else kind


def map_leaves(kind: pa.DataType, change: Callable[[pa.DataType], pa.DataType]) -> pa.DataType:
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(map_leaves(field.type, change)) for field in kind])
    if pa.types.is_map(kind):
        return pa.map_(map_leaves(kind.key_type, change), map_leaves(kind.item_type, change))
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(map_leaves(kind.value_type, change), kind.list_size)
    if pa.types.is_list(kind):
        return pa.list_(map_leaves(kind.value_type, change))
    if pa.types.is_large_list(kind):
        return pa.large_list(map_leaves(kind.value_type, change))
    return change(kind)


def _unify(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    if one.equals(other):
        return one
    schemas = [pa.schema([("x", kind)]) for kind in (one, other)]
    return pa.unify_schemas(schemas, promote_options="permissive").field(0).type


def _field(name: str, kind: pa.DataType | None) -> pa.Field:
    if kind is None or has(kind, lambda part: pa.types.is_struct(part) and not part.num_fields):
        return pa.field(name, pa.string(), metadata=JSON_TEXT)
    return pa.field(name, map_leaves(kind, lambda leaf: pa.string() if leaf == pa.null() else leaf))


def _fits_double(array: pa.Array) -> bool:
    double = pa.float64()
    target = map_leaves(array.type, lambda leaf: double if pa.types.is_integer(leaf) else leaf)
    try:
        array.cast(target)
    except pa.ArrowInvalid:
        return False
    return True


def has(kind: pa.DataType, test: Callable[[pa.DataType], bool]) -> bool:
    """Whether `test` is true of the type or of one in it."""
    return test(kind) or any(has(kind.field(i).type, test) for i in range(kind.num_fields))


def _nodes(kind: pa.DataType, levels: int = MOST_LEVELS) -> int:
    if levels == 0:
        return MOST_NODES + 1
    return 1 + sum(_nodes(kind.field(i).type, levels - 1) for i in range(kind.num_fields))
