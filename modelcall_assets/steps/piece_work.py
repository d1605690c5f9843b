"""What a process does with a piece of a file: parse, preprocess and finish its rows."""

from __future__ import annotations

import hashlib
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import pyarrow as pa

from modelcall_assets.records.dotted import RAISED
from modelcall_assets.records.outcome import Dropped, Reason
from modelcall_assets.records.record import BadLine, Row
from modelcall_assets.steps.recipe import Recipe
from modelcall_assets.steps.shipping import Shipped
from modelcall_assets.storage.formats import Reading
from modelcall_assets.storage.jsonl import clip
from modelcall_assets.storage.pieces import Chunk, Piece, text_array
from modelcall_assets.storage.rows import record_id, sample_row
from modelcall_assets.transforms.finishing import Finished
from modelcall_assets.transforms.preprocessor import Copied, Declared, Kind

ERROR_COLUMN = "preprocess_error"
PROBLEM_COLUMN = "pack_problem"
SAMPLE_ROWS = 3
READABLE_BYTES = 40_000
LONG_CHARS = 1000
"""Values from here on are looked at once, whatever columns they are in."""
_EXPECTED = (TypeError, ValueError, KeyError)
"""What a preprocessor of ours raises for a row that it cannot work on."""
_FITS = {"string": {str, bytes}, "int": {int}, "float": {float, int}, "bool": {bool}}
"""What may be in a column that the user has declared."""
_TYPES = {"string": pa.string(), "int": pa.int64(), "float": pa.float64(), "bool": pa.bool_()}


@dataclass(frozen=True, slots=True)
class Made:
    """The rows of a piece that were not dropped: as columns where those are known, else as lines of
    JSON; of each the digest, and what tells its text from others where that is asked."""

    rows_in: int
    columns: Sequence[pa.Array]
    lines: Sequence[bytes]
    digests: Sequence[bytes]
    texts: Sequence[tuple[bytes, bytes | None] | None]
    failures: frozenset[int]
    """Which of the rows hold an error."""
    dropped: Counter[str] = field(default_factory=Counter)
    removed: Counter[str] = field(default_factory=Counter)
    problems: Sequence[str] = ()
    sample: Sequence[tuple[int, Row]] = ()
    """With their places among the rows."""
    shipped: Shipped | None = None
    """Where the columns are when they come from another process."""

    def __len__(self) -> int:
        return len(self.digests)

    @property
    def failed(self) -> int:
        return len(self.failures)

    def received(self) -> Made:
        """What was shipped, here."""
        if self.shipped is None:
            return self
        return replace(self, columns=self.shipped.received(), shipped=None)

    def only(self, places: Sequence[int]) -> Made:
        """Without the other rows."""
        if len(places) == len(self):
            return self
        kept = set(places)
        return replace(
            self,
            columns=[column.take(pa.array(places, pa.int64())) for column in self.columns],
            lines=[self.lines[at] for at in places] if self.lines else (),
            digests=[self.digests[at] for at in places],
            texts=[self.texts[at] for at in places],
            failures=frozenset(at for at, old in enumerate(places) if old in self.failures),
            sample=[each for each in self.sample if each[0] in kept],
        )


class PieceWork:
    """`schema` is that of the rows it makes, None where only the rows tell; `added` are the columns
    that all have."""

    def __init__(self, recipe: Recipe, input_schema: pa.Schema, reading: Reading) -> None:
        self._input, self._reading = input_schema, reading
        self._preprocessor, self._finishing = recipe.preprocessor(), recipe.finishing()
        self._runs_users = recipe.config.is_own or bool(recipe.config.scrub)
        self._raised = RAISED if self._runs_users else _EXPECTED
        self._reads_bytes = getattr(self._preprocessor, "reads_bytes", False)
        self.added = self._schema({**self._finishing.columns(), ERROR_COLUMN: "string"})
        self._origins = self._columns()
        self.schema = None if self._origins is None else self._schema(self._origins)

    def __call__(self, named: tuple[str, Piece]) -> Made:
        """Of the name of a file, which enters the ids of rows that have none, and a piece of it."""
        name, piece = named
        chunk = piece.chunk(self._input, self._reading)
        rows = _Rows()
        for place, item in enumerate(chunk.items):
            identity = record_id(item, chunk.start + place, name)
            rows.add(place, self._made(item, identity))
        return Made(
            rows_in=len(chunk.items),
            columns=[] if self._origins is None else self._columns_of(chunk, rows, self._origins),
            lines=[*map(_line, rows.rows)] if self._origins is None else (),
            digests=rows.digests,
            texts=rows.texts,
            failures=frozenset(rows.failures),
            dropped=rows.dropped,
            removed=rows.removed,
            problems=rows.problems,
            sample=rows.sample,
        )

    def made(self, item: Row, identity: str) -> Row | Dropped:
        """One row, as it will be published; with an error in it when it cannot be made."""
        made = self._made(item, identity)
        return made if isinstance(made, Dropped) else made.finished.row

    def _made(self, item: Row | BadLine, identity: str) -> _Kept | Dropped:
        if isinstance(item, BadLine):
            return _failed(identity, Reason.BAD_LINE, item.detail, item.raw)
        try:
            row = self._preprocessor.process_item(self._item(item))
            if row is None:
                return Dropped("process_item")
            if isinstance(row, Dropped):
                return row
            finished = self._finishing.finish(self._checked(row), identity)
            if isinstance(finished, Dropped):
                return finished
            return _Kept(finished, _digest(finished.row))
        except self._raised as error:
            is_plain = not self._runs_users or isinstance(error, _NotARow)
            told = f"{type(error).__name__}: {error}"
            detail = told if is_plain else traceback.format_exc(limit=-5).strip()
            return _failed(identity, Reason.PREPROCESS_ERROR, detail, clip(_raw(item)))

    def _checked(self, row: Any) -> Row:
        """TypeError when it is no row, or not of the types that were declared."""
        if not isinstance(row, dict) or not all(isinstance(name, str) for name in row):
            raise _NotARow(f"process_item returned {type(row).__name__}; expected a dict, or None")
        for name, origin in (self._origins or {}).items() if self._runs_users else ():
            value = row.get(name)
            if isinstance(origin, str) and value is not None and type(value) not in _FITS[origin]:
                raise _NotARow(f"{name}: declared as {origin}, but it is {type(value).__name__}")
        return {**row, ERROR_COLUMN: None}

    def _item(self, item: Row) -> Row:
        text = item.get("text")
        if isinstance(text, bytes) and not self._reads_bytes:
            return {**item, "text": text.decode()}
        return dict(item)

    def _columns(self) -> dict[str, Copied | Kind] | None:
        if not isinstance(self._preprocessor, Declared):
            return None
        own: Mapping[str, Copied | Kind] = self._preprocessor.columns(self._input.names)
        return {**own, **self._finishing.columns(), ERROR_COLUMN: "string"}

    def _schema(self, origins: Mapping[str, Copied | Kind]) -> pa.Schema:
        return pa.schema(
            [
                self._input.field(origin.source).with_name(name)
                if isinstance(origin, Copied)
                else pa.field(name, _TYPES[origin])
                for name, origin in origins.items()
            ]
        )

    def _columns_of(
        self, chunk: Chunk, rows: _Rows, origins: Mapping[str, Copied | Kind]
    ) -> list[pa.Array]:
        """Copied columns stay Arrow, the others come from the new rows. Texts that are the same
        objects in several columns are one array."""
        places = [None if at in rows.failures else old for at, old in enumerate(rows.places)]
        positions = pa.array(places, pa.int64())
        copies = any(isinstance(origin, Copied) for origin in origins.values())
        source = chunk.to_arrow() if copies else None
        columns: list[pa.Array] = []
        texts: dict[tuple[int, ...], pa.Array] = {}
        for name, origin in origins.items():
            values = [row.get(name) for row in rows.rows]
            same = tuple(map(id, values))
            if isinstance(origin, Copied):
                assert source is not None
                column = source.column(origin.source).take(positions)
            elif origin == "string" and same in texts:
                column = texts[same]
            else:
                column = _array(values, _TYPES[origin])
            if column.type == pa.string():
                texts.setdefault(same, column)
            columns.append(column)
        return columns


def _array(values: list[Any], kind: pa.DataType) -> pa.Array:
    if len(values) == 1 and isinstance(values[0], bytes):
        return text_array(values[0])
    return pa.array(values, kind)


class ShippingWork:
    """`PieceWork` in another process: its columns come through files of `folder`."""

    def __init__(
        self, recipe: Recipe, input_schema: pa.Schema, reading: Reading, folder: Path
    ) -> None:
        self._work, self._folder = PieceWork(recipe, input_schema, reading), folder

    def __call__(self, named: tuple[str, Piece]) -> Made:
        made = self._work(named)
        if not made.columns:
            return made
        return replace(made, columns=(), shipped=Shipped.of(made.columns, self._folder))


class _Kept(NamedTuple):
    finished: Finished
    digest: bytes


class _NotARow(TypeError):
    """What the user's process_item returned."""


@dataclass
class _Rows:
    """What accumulates over a piece."""

    rows: list[Row] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    """Of the kept rows among all of the piece."""
    texts: list[tuple[bytes, bytes | None] | None] = field(default_factory=list)
    failures: set[int] = field(default_factory=set)
    dropped: Counter[str] = field(default_factory=Counter)
    removed: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    sample: list[tuple[int, Row]] = field(default_factory=list)

    def add(self, place: int, made: _Kept | Dropped) -> None:
        if isinstance(made, Dropped):
            self.dropped[made.rule] += 1
            return
        finished, at = made.finished, len(self.rows)
        row, text = finished.row, (finished.digest, finished.signature)
        self.rows.append(row)
        self.digests.append(made.digest)
        self.places.append(place)
        self.texts.append(None if text[0] is None else (text[0], text[1]))
        self.removed.update(finished.removed)
        if row.get(ERROR_COLUMN) is not None:
            self.failures.add(at)
        elif len(self.sample) < SAMPLE_ROWS:
            self.sample.append((at, sample_row(_readable(row))))
        if problem := row.get(PROBLEM_COLUMN):
            self.problems.append(f"{row.get('xml_file_path')}: {problem}")


def _failed(identity: str, reason: Reason, detail: str, raw: str) -> _Kept:
    error = orjson.dumps({"reason": reason, "detail": detail, "raw": raw}).decode()
    row = {"id": identity, ERROR_COLUMN: error}
    return _Kept(Finished(row, {}, None, None), _digest(row))


def _raw(item: Row) -> str:
    """An item that failed, for people to look at."""
    return orjson.dumps(_readable(item), default=str).decode()


def _readable(row: Row) -> Row:
    """With the beginning of a text that is bytes."""
    text = row.get("text")
    if not isinstance(text, bytes):
        return row
    return {**row, "text": text[:READABLE_BYTES].decode("utf-8", "ignore")}


def _digest(row: Row) -> bytes:
    """Of the content of a row, however it was come by."""
    short, long = dict[str, Any](), dict[str | bytes, str]()
    for name, value in sorted(row.items()):
        is_long = isinstance(value, str | bytes) and len(value) > LONG_CHARS
        short[name] = {"as": long.setdefault(value, name)} if is_long else value
    content = hashlib.blake2b(digest_size=16)
    content.update(orjson.dumps(short, default=_as_json))
    for value in long:
        content.update(value if isinstance(value, bytes) else value.encode())
    return content.digest()


def _line(row: Row) -> bytes:
    return orjson.dumps(row, default=_as_json, option=orjson.OPT_APPEND_NEWLINE)


def _as_json(value: Any) -> Any:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
