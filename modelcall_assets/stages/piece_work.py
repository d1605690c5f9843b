"""What a process does with a piece of a file: parse, preprocess and finish its rows."""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa

from modelcall_assets.records.dotted import RAISED
from modelcall_assets.records.outcome import BadLine, Dropped, Reason, Row, moved_names
from modelcall_assets.stages.made import ERROR_COLUMN, Kept, Made, Rows, line_of, readable
from modelcall_assets.stages.recipe import Recipe
from modelcall_assets.stages.workers import Shipped
from modelcall_assets.storage.formats import Reading, text_array
from modelcall_assets.storage.jsonl import clip
from modelcall_assets.storage.rows import Batch, record_id
from modelcall_assets.transforms.finishing import Finished
from modelcall_assets.transforms.preprocessor import Copied, Declared, Kind

_EXPECTED = (TypeError, ValueError, KeyError)
"""What a preprocessor of ours raises for a row that it cannot work on."""
_FITS = {"string": {str}, "int": {int}, "float": {float, int}, "bool": {bool}}
"""What may be in a column that the user has declared."""
_INT64 = range(-(2**63), 2**63)
_TYPES = {"string": pa.string(), "int": pa.int64(), "float": pa.float64(), "bool": pa.bool_()}


class PieceWork:
    """`schema` is that of the rows it makes, None where only the rows tell; `added` are the columns
    that all have. `moved`: columns that are called like ours → their names in the rows."""

    def __init__(self, recipe: Recipe, input_schema: pa.Schema, reading: Reading) -> None:
        self._input, self._reading = input_schema, reading
        self._preprocessor, self._finishing = recipe.preprocessor(), recipe.finishing()
        self._runs_users = recipe.config.is_own or bool(recipe.config.scrub)
        self._raised = RAISED if self._runs_users else _EXPECTED
        self._reads_bytes = getattr(self._preprocessor, "reads_bytes", False)
        self._added: Mapping[str, Kind] = {**self._finishing.columns(), ERROR_COLUMN: "string"}
        self.added = self._schema(self._added)
        self._ours = self._added.keys() - {"id"}
        self.moved: dict[str, str] = {}
        self._origins = self._columns()
        self.schema = None if self._origins is None else self._schema(self._origins)

    def __call__(self, named: tuple[str, Batch]) -> Made:
        """Of the name of a file, which enters the ids of rows that have none, and a piece of it."""
        name, batch = named
        rows = Rows()
        for place, item in enumerate(batch.items):
            identity = record_id(item, batch.start + place, name)
            rows.add(place, self._made(item, identity))
        return Made(
            rows_in=batch.rows,
            columns=[] if self._origins is None else self._columns_of(batch, rows, self._origins),
            lines=[*map(line_of, rows.rows, rows.clashing)] if self._origins is None else (),
            digests=rows.digests,
            texts=rows.texts,
            failures=rows.failures,
            dropped=rows.dropped,
            removed=rows.removed,
            problems=rows.problems,
            sample=rows.sample,
        )

    def made(self, item: Row, identity: str) -> Row | Dropped:
        """One row, as it will be published; with an error in it when it cannot be made."""
        made = self._made(item, identity)
        return made if isinstance(made, Dropped) else made.finished.row

    def _made(self, item: Row | BadLine, identity: str) -> Kept | Dropped:
        if isinstance(item, BadLine):
            return self._failed({}, identity, Reason.BAD_LINE, item.detail, item.raw)
        try:
            row = self._preprocessor.process_item(self._item(item))
            if row is None:
                return Dropped("process_item")
            if isinstance(row, Dropped):
                return row
            self._check(row)
            finished = self._finishing.finish({**row, ERROR_COLUMN: None}, identity)
            if isinstance(finished, Dropped):
                return finished
            return self._kept(finished, row, item)
        except self._raised as error:
            is_plain = not self._runs_users or isinstance(error, _NotARow)
            told = f"{type(error).__name__}: {error}"
            detail = told if is_plain else traceback.format_exc(limit=-5).strip()
            return self._failed(item, identity, Reason.PREPROCESS_ERROR, detail, clip(_raw(item)))

    def _kept(self, finished: Finished, row: Row, item: Row) -> Kept:
        """With what `row`, or the `item` that it was made of, has under names of ours."""
        if self._origins is None:
            return Kept.of(finished, {name: row[name] for name in self._ours if name in row})
        for old, new in self.moved.items():
            given = row if old in self._ours else item
            if old in given:
                finished.row[new] = given[old]
        return Kept.of(finished, {})

    def _failed(self, item: Row, identity: str, reason: Reason, detail: str, raw: str) -> Kept:
        """A row with all that the input has of it."""
        text: dict[str, Copied | Kind] = {"text": "string"} if "text" in item else {}
        origins = (text if self._origins is None else self._origins).items()
        row = {name: _given(item, name, origin) for name, origin in origins}
        if self._origins is None:
            row = {**item, **row}
        error = orjson.dumps({"reason": reason, "detail": detail, "raw": raw}).decode()
        ours = {**dict.fromkeys(self._ours & row.keys()), "id": identity, ERROR_COLUMN: error}
        return self._kept(Finished({**row, **ours}, {}, None, None), item, item)

    def _check(self, row: Any) -> None:
        """TypeError when it is no row, or not of the types that were declared."""
        if not isinstance(row, dict) or not all(isinstance(name, str) for name in row):
            raise _NotARow(f"process_item returned {type(row).__name__}; expected a dict, or None")
        if self._runs_users and self._origins is not None:
            _check_types(row, self._origins)

    def _item(self, item: Row) -> Row:
        text = item.get("text")
        if isinstance(text, bytes) and not self._reads_bytes:
            return {**item, "text": text.decode()}
        return dict(item)

    def _columns(self) -> dict[str, Copied | Kind] | None:
        if not isinstance(self._preprocessor, Declared):
            return None
        names = self._input.names
        made: Mapping[str, Copied | Kind] = self._preprocessor.columns(names)
        theirs: Sequence[str] = getattr(self._preprocessor, "own_columns", ())
        self.moved = {
            old: new
            for old, new in moved_names([*made, *names], [*self._ours, *theirs]).items()
            if (old in made if old in self._ours else old in names)
        }
        kept: dict[str, Copied | Kind] = {
            new: made[old] if old in self._ours else Copied(old) for old, new in self.moved.items()
        }
        return {**made, **kept, **self._added}

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
        self, batch: Batch, rows: Rows, origins: Mapping[str, Copied | Kind]
    ) -> list[pa.Array]:
        """Copied columns stay Arrow, the others come from the new rows. Texts that are the same
        objects in several columns are one array."""
        positions = pa.array(rows.places, pa.int64())
        copies = any(isinstance(origin, Copied) for origin in origins.values())
        source = batch.to_arrow(self._input) if copies else None
        columns: list[pa.Array] = []
        texts: dict[tuple[int, ...], pa.Array] = {}
        for name, origin in origins.items():
            if isinstance(origin, Copied):
                assert source is not None
                column = source.column(origin.source).take(positions)
                values = [_value(batch.items[old], origin.source) for old in rows.places]
            else:
                values = [row.get(name) for row in rows.rows]
                shared = texts.get(tuple(map(id, values))) if origin == "string" else None
                column = _array(values, _TYPES[origin]) if shared is None else shared
            if column.type == pa.string() and not rows.failures:
                texts.setdefault(tuple(map(id, values)), column)
            columns.append(column)
        return columns


def _value(item: Row | BadLine, name: str) -> Any:
    return None if isinstance(item, BadLine) else item.get(name)


def _given(item: Row, name: str, origin: Copied | Kind) -> Any:
    """What a row that failed has for a column: the input's own value, as far as it fits."""
    if isinstance(origin, Copied):
        return item.get(origin.source)
    value = item.get(name)
    if value is None or type(value) in _FITS[origin]:
        return value if origin != "int" or value is None or value in _INT64 else None
    if origin != "string" or isinstance(value, bytes):
        return None
    return orjson.dumps(value, default=str).decode()


def _check_types(row: Row, origins: Mapping[str, Copied | Kind]) -> None:
    for name, origin in origins.items():
        value = row.get(name)
        if value is None or isinstance(origin, Copied):
            continue
        if type(value) not in _FITS[origin]:
            raise _NotARow(f"{name}: declared as {origin}, but it is {type(value).__name__}")
        if origin == "int" and value not in _INT64:
            raise _NotARow(f"{name}: {value} does not fit into 64 bits; declare it as string")


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

    def __call__(self, named: tuple[str, Batch]) -> Made:
        made = self._work(named)
        if not made.columns:
            return made
        return replace(made, columns=(), shipped=Shipped.of(made.columns, self._folder))


class _NotARow(TypeError):
    """What the user's process_item returned."""


def _raw(item: Row) -> str:
    """An item that failed, for people to look at."""
    return orjson.dumps(readable(item), default=str).decode()
