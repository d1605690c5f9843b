"""What a process does with a piece of a file: parse, preprocess and finish its rows."""

from __future__ import annotations

import hashlib
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import orjson
import pyarrow as pa

from modelcall_assets.records.dotted import RAISED
from modelcall_assets.records.outcome import Dropped, Reason
from modelcall_assets.records.record import BadLine, Row
from modelcall_assets.steps.recipe import Recipe
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
_EXPECTED = (TypeError, ValueError, KeyError)
"""What a preprocessor of ours raises for a row that it cannot work on."""
_TYPES = {"string": pa.string(), "int": pa.int64(), "float": pa.float64(), "bool": pa.bool_()}


@dataclass(frozen=True, slots=True)
class Made:
    """The rows of a piece that were not dropped: as Arrow where their columns are known, else as
    lines of JSON; of each the digest, and what tells its text from others where that is asked."""

    rows_in: int
    batch: pa.RecordBatch | None
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

    def __len__(self) -> int:
        return len(self.digests)

    @property
    def failed(self) -> int:
        return len(self.failures)

    def only(self, places: Sequence[int]) -> Made:
        """Without the other rows."""
        if len(places) == len(self):
            return self
        kept = set(places)
        return replace(
            self,
            batch=None if self.batch is None else self.batch.take(pa.array(places, pa.int64())),
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
            batch=None if self._origins is None else self._batch(chunk, rows, self._origins),
            lines=[*map(_line, rows.rows)] if self._origins is None else (),
            digests=[*map(_digest, rows.rows)],
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
        return made.row if isinstance(made, Finished) else made

    def _made(self, item: Row | BadLine, identity: str) -> Finished | Dropped:
        if isinstance(item, BadLine):
            return _failed(identity, Reason.BAD_LINE, item.detail, item.raw)
        try:
            row = self._preprocessor.process_item(self._item(item))
            if row is None:
                return Dropped("process_item")
            if isinstance(row, Dropped):
                return row
            finished = self._finishing.finish(_checked(row), identity)
        except self._raised as error:
            is_plain = not self._runs_users or isinstance(error, _NotARow)
            told = f"{type(error).__name__}: {error}"
            detail = told if is_plain else traceback.format_exc(limit=-5).strip()
            return _failed(identity, Reason.PREPROCESS_ERROR, detail, clip(_raw(item)))
        return finished

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

    def _batch(
        self, chunk: Chunk, rows: _Rows, origins: Mapping[str, Copied | Kind]
    ) -> pa.RecordBatch:
        """Copied columns stay Arrow, the others come from the new rows."""
        places = [None if at in rows.failures else old for at, old in enumerate(rows.places)]
        positions = pa.array(places, pa.int64())
        copies = any(isinstance(origin, Copied) for origin in origins.values())
        source = chunk.to_arrow() if copies else None
        columns: list[pa.Array] = []
        for name, origin in origins.items():
            if isinstance(origin, Copied):
                assert source is not None
                columns.append(source.column(origin.source).take(positions))
            else:
                columns.append(_array([row.get(name) for row in rows.rows], _TYPES[origin]))
        return pa.RecordBatch.from_arrays(columns, schema=self.schema)


def _array(values: list[Any], kind: pa.DataType) -> pa.Array:
    if len(values) == 1 and isinstance(values[0], bytes):
        return text_array(values[0])
    return pa.array(values, kind)


class _NotARow(TypeError):
    """What the user's process_item returned."""


@dataclass
class _Rows:
    """What accumulates over a piece."""

    rows: list[Row] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    """Of the kept rows among all of the piece."""
    texts: list[tuple[bytes, bytes | None] | None] = field(default_factory=list)
    failures: set[int] = field(default_factory=set)
    dropped: Counter[str] = field(default_factory=Counter)
    removed: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    sample: list[tuple[int, Row]] = field(default_factory=list)

    def add(self, place: int, made: Finished | Dropped) -> None:
        if isinstance(made, Dropped):
            self.dropped[made.rule] += 1
            return
        row, at = made.row, len(self.rows)
        self.rows.append(row)
        self.places.append(place)
        self.texts.append(None if made.digest is None else (made.digest, made.signature))
        self.removed.update(made.removed)
        if row.get(ERROR_COLUMN) is not None:
            self.failures.add(at)
        elif len(self.sample) < SAMPLE_ROWS:
            self.sample.append((at, sample_row(_readable(row))))
        if problem := row.get(PROBLEM_COLUMN):
            self.problems.append(f"{row.get('xml_file_path')}: {problem}")


def _checked(row: Any) -> Row:
    if not isinstance(row, dict) or not all(isinstance(name, str) for name in row):
        raise _NotARow(f"process_item returned {type(row).__name__}; expected a dict, or None")
    return {**row, ERROR_COLUMN: None}


def _failed(identity: str, reason: Reason, detail: str, raw: str) -> Finished:
    error = orjson.dumps({"reason": reason, "detail": detail, "raw": raw}).decode()
    return Finished({"id": identity, ERROR_COLUMN: error}, {}, None, None)


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
    if isinstance(row.get("text"), bytes):
        row = {**row, "text": hashlib.sha256(row["text"]).hexdigest()}
    content = orjson.dumps(row, default=_as_json, option=orjson.OPT_SORT_KEYS)
    return hashlib.blake2b(content, digest_size=16).digest()


def _line(row: Row) -> bytes:
    return orjson.dumps(row, default=_as_json, option=orjson.OPT_APPEND_NEWLINE)


def _as_json(value: Any) -> Any:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
