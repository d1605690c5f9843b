"""What becomes of a piece of a file: rows with their digests, and what was counted."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryFile, gettempdir
from typing import Any, Self

import orjson
import pyarrow as pa

from modelcall_assets.errors import StoreError
from modelcall_assets.records.outcome import Dropped, Number, Row, moved_names
from modelcall_assets.stages.report import SAMPLE_ROWS
from modelcall_assets.stages.workers import Shipped
from modelcall_assets.storage.jsonl import loads
from modelcall_assets.storage.parquet import SchemaInference
from modelcall_assets.storage.places import explained
from modelcall_assets.storage.rows import columns_of, sample_row
from modelcall_assets.transforms.finishing import Finished

ERROR_COLUMN = "preprocess_error"
PROBLEM_COLUMN = "pack_problem"

READABLE_BYTES = 40_000
_LINE = orjson.OPT_APPEND_NEWLINE | orjson.OPT_PASSTHROUGH_SUBCLASS
LONG_CHARS = 1000
"""Values from here on are looked at once, whatever columns they are in."""


@dataclass(frozen=True, slots=True)
class Made:
    """The rows of a piece that were not dropped: as columns where those are known, else as lines of
    JSON; of each the digest, and what tells its text from others where that is asked."""

    rows_in: int
    columns: Sequence[pa.Array]
    lines: Sequence[bytes]
    digests: Sequence[bytes]
    texts: Sequence[tuple[bytes, bytes | None] | None]
    failures: Mapping[int, str]
    """Which of the rows hold an error, and the error."""
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
            failures={
                at: self.failures[old] for at, old in enumerate(places) if old in self.failures
            },
            sample=[each for each in self.sample if each[0] in kept],
        )


@dataclass(frozen=True, slots=True)
class Kept:
    """A row that was not dropped. The digest is that of its content, however it was come by."""

    finished: Finished
    digest: bytes
    clashing: Row
    """What the row has of the user's under names of ours, where no column is theirs yet."""

    @classmethod
    def of(cls, finished: Finished, clashing: Row) -> Kept:
        """ValueError or TypeError when a value cannot be written."""
        content = {**finished.row, "": clashing} if clashing else finished.row
        return cls(finished, _digest(content), clashing)


@dataclass
class Rows:
    """What accumulates over a piece."""

    rows: list[Row] = field(default_factory=list)
    clashing: list[Row] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    """Of the kept rows among all of the piece."""
    texts: list[tuple[bytes, bytes | None] | None] = field(default_factory=list)
    failures: dict[int, str] = field(default_factory=dict)
    dropped: Counter[str] = field(default_factory=Counter)
    removed: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    sample: list[tuple[int, Row]] = field(default_factory=list)

    def add(self, place: int, made: Kept | Dropped) -> None:
        if isinstance(made, Dropped):
            self.dropped[made.rule] += 1
            return
        finished, at = made.finished, len(self.rows)
        row, text = finished.row, (finished.digest, finished.signature)
        self.rows.append(row)
        self.clashing.append(made.clashing)
        self.digests.append(made.digest)
        self.places.append(place)
        self.texts.append(None if text[0] is None else (text[0], text[1]))
        self.removed.update(finished.removed)
        if (error := row.get(ERROR_COLUMN)) is not None:
            self.failures[at] = error
        elif len(self.sample) < SAMPLE_ROWS:
            self.sample.append((at, sample_row(readable(row))))
        if problem := row.get(PROBLEM_COLUMN):
            self.problems.append(f"{row.get('xml_file_path')}: {problem}")


def readable(row: Row) -> Row:
    """With the beginning of a text that is bytes."""
    text = row.get("text")
    if not isinstance(text, bytes):
        return row
    return {**row, "text": text[:READABLE_BYTES].decode("utf-8", "ignore")}


def line_of(row: Row, clashing: Row) -> bytes:
    return orjson.dumps([row, clashing], default=_as_json, option=_LINE)


def _digest(row: Row) -> bytes:
    content, long = dict[str, Any](), dict[str, str]()
    for name, value in row.items():
        if isinstance(value, bytes):
            content[name] = hashlib.sha256(value).hexdigest()
        elif isinstance(value, str) and len(value) > LONG_CHARS:
            first = long.setdefault(value, name)
            content[name] = value if first is name else {"same as": first}
        else:
            content[name] = value
    text = orjson.dumps(content, default=_as_json, option=orjson.OPT_SORT_KEYS)
    return hashlib.blake2b(text, digest_size=16).digest()


def _as_json(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return orjson.Fragment(str(value)) if isinstance(value, Number) else str(value)


BATCH_ROWS = 1000


class RowSpool:
    """Rows as lines of JSON, each with a line end, and what it has of the user's under our names.
    Columns of `known` are there whatever the rows hold. Use as a context manager."""

    def __init__(self, known: pa.Schema) -> None:
        self._known = known
        self._file = TemporaryFile()  # noqa: SIM115  closed by `__exit__`
        self._columns, self._clashing = SchemaInference(), SchemaInference()
        self.moved: dict[str, str] = {}
        """Names of ours that rows have too → what their columns are called; known to `schema`."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, lines: Sequence[bytes]) -> None:
        """StoreError when they cannot be written."""
        for line in lines:
            row, clashing = loads(line)
            self._columns.take(row, len(line))
            if clashing:
                self._clashing.take(clashing, len(line))
        with explained(Path(gettempdir()), StoreError):
            self._file.writelines(lines)

    def schema(self) -> pa.Schema:
        self._columns.add_types(self._known)
        own, clashing = self._columns.schema(), self._clashing.schema()
        self.moved = moved_names([*own.names, *clashing.names], clashing.names)
        return pa.schema([*own, *(each.with_name(self.moved[each.name]) for each in clashing)])

    def batches(self, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        """All rows, in the order in which they came."""
        self._file.seek(0)
        start = 0
        while lines := list(islice(self._file, BATCH_ROWS)):
            yield columns_of([*map(self._row, lines)], schema, start)
            start += len(lines)

    def _row(self, line: bytes) -> Row:
        row, clashing = loads(line)
        return {**row, **{self.moved[name]: value for name, value in clashing.items()}}
