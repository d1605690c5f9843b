"""Pieces of a file, worked on here and in other processes, and the rows that they become.

An item is a record of the input and a row what becomes of it. A piece is some items in succession;
a recipe (`stages.recipe`) says how a row is made of each.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryDirectory, gettempdir
from types import ModuleType
from typing import IO, Any, NamedTuple

import orjson
import pyarrow as pa

from modelcall_assets.errors import StoreError, WorkerDied
from modelcall_assets.records.outcome import BadLine, Row, moved_names
from modelcall_assets.stages.report import SAMPLE_ROWS
from modelcall_assets.storage.formats import text_array
from modelcall_assets.storage.places import explained
from modelcall_assets.storage.rows import Batch, columns_of, sample_row
from modelcall_assets.storage.values import SchemaInference, dumps, loads
from modelcall_assets.transforms.preprocessor import Copied, Kind

ERROR_COLUMN = "preprocess_error"
PROBLEM_COLUMN = "pack_problem"

_TYPES = {"string": pa.string(), "int": pa.int64(), "float": pa.float64(), "bool": pa.bool_()}

_READABLE_BYTES = 40_000
_LONG_CHARS = 1000
"""Values from here on are looked at once, whatever columns they are in."""
_BATCH_ROWS = 1000
_AHEAD = 2
"""Pieces that wait for each process."""


Told = tuple[bytes, bytes | None] | None
"""What tells a text from others: its digest, and the signature for near duplicates where they are
sought; None where no duplicates are."""


class NewRow(NamedTuple):
    """A row that was not dropped."""

    row: Row
    clashing: Row
    """The user's values under names of ours, while it is not known what they will be called."""
    removed: Mapping[str, int]
    """What was scrubbed from its text, by kind."""
    told: Told
    digest: bytes
    """Of its content."""

    @classmethod
    def of(cls, row: Row, clashing: Row, removed: Mapping[str, int], told: Told) -> NewRow:
        """ValueError or TypeError when a value cannot be written."""
        content = {**row, "": clashing} if clashing else row
        return cls(row, clashing, removed, told, _digest(content))

    def line(self) -> bytes:
        return dumps([self.row, self.clashing], orjson.OPT_APPEND_NEWLINE)


@dataclass
class PieceRows:
    """The rows of a piece that were not dropped, and what was counted. They are `columns` where
    those are known, else `lines` of JSON. `failures` and `sample` are by the rows' indexes."""

    rows_in: int
    columns: Sequence[pa.Array] = ()
    lines: Sequence[bytes] = ()
    digests: list[bytes] = field(default_factory=list[bytes])
    texts: list[Told] = field(default_factory=list)
    failures: dict[int, str] = field(default_factory=dict[int, str])
    dropped: Counter[str] = field(default_factory=Counter[str])
    removed: Counter[str] = field(default_factory=Counter[str])
    problems: list[str] = field(default_factory=list[str])
    sample: dict[int, Row] = field(default_factory=dict[int, Row])
    file: tuple[Path, Sequence[int]] | None = None
    """Where the columns are when they come from another process: a file with each distinct one
    once, and which of them they are."""

    def __len__(self) -> int:
        return len(self.digests)

    def add(self, new: NewRow) -> None:
        index, row = len(self), new.row
        self.digests.append(new.digest)
        self.texts.append(new.told)
        self.removed.update(new.removed)
        if (error := row.get(ERROR_COLUMN)) is not None:
            self.failures[index] = error
        elif len(self.sample) < SAMPLE_ROWS:
            self.sample[index] = sample_row(readable(row))
        if problem := row.get(PROBLEM_COLUMN):
            self.problems.append(f"{row.get('xml_file_path')}: {problem}")

    def only(self, indexes: Sequence[int]) -> PieceRows:
        """Without the other rows."""
        if len(indexes) == len(self):
            return self
        failures = enumerate(self.failures.get(index) for index in indexes)
        return replace(
            self,
            columns=[column.take(pa.array(indexes, pa.int64())) for column in self.columns],
            lines=[self.lines[index] for index in indexes] if self.lines else (),
            digests=[self.digests[index] for index in indexes],
            texts=[self.texts[index] for index in indexes],
            failures={index: error for index, error in failures if error is not None},
            sample={index: row for index, row in self.sample.items() if index in {*indexes}},
        )

    def sent(self, folder: Path) -> PieceRows:
        """With its columns in a file of `folder`. StoreError when that cannot be written."""
        if not self.columns:
            return self
        distinct = {id(column): column for column in self.columns}
        indexes = {identity: index for index, identity in enumerate(distinct)}
        names = [str(index) for index in indexes.values()]
        batch = pa.RecordBatch.from_arrays([*distinct.values()], names=names)
        with (
            explained(folder, StoreError),
            NamedTemporaryFile(suffix=".arrow", dir=folder, delete=False) as file,
            pa.ipc.new_stream(file, batch.schema) as stream,
        ):
            stream.write_batch(batch)
        order = tuple(indexes[id(column)] for column in self.columns)
        return replace(self, columns=(), file=(Path(file.name), order))

    def received(self) -> PieceRows:
        """What was sent, here; once: the file goes."""
        if self.file is None:
            return self
        path, order = self.file
        with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
            batch = stream.read_next_batch()
        path.unlink()
        return replace(self, columns=[batch.column(index) for index in order], file=None)


def schema_of(read: pa.Schema, origins: Mapping[str, Copied | Kind]) -> pa.Schema:
    """Of rows that are made of items with the columns that were `read`."""
    return pa.schema(
        [
            read.field(origin.source).with_name(name)
            if isinstance(origin, Copied)
            else pa.field(name, _TYPES[origin])
            for name, origin in origins.items()
        ]
    )


def arrays(
    batch: Batch,
    schema: pa.Schema,
    rows: Mapping[int, Row],
    origins: Mapping[str, Copied | Kind],
    *,
    share: bool,
) -> list[pa.Array]:
    """The columns of `rows`, by the indexes of their items in the batch. Copied ones stay Arrow. To
    `share`: texts that are the same objects in several columns are one array."""
    indexes = pa.array([*rows], pa.int64())
    copies = any(isinstance(origin, Copied) for origin in origins.values())
    source = batch.to_arrow(schema) if copies else None
    columns: list[pa.Array] = []
    texts: dict[tuple[int, ...], pa.Array] = {}
    for name, origin in origins.items():
        if isinstance(origin, Copied):
            assert source is not None
            column = source.column(origin.source).take(indexes)
            items = (batch.items[index] for index in rows)
            values = [
                None if isinstance(each, BadLine) else each.get(origin.source) for each in items
            ]
        else:
            values = [row.get(name) for row in rows.values()]
            column = texts.get(tuple(map(id, values))) if origin == "string" else None
            if column is None and len(values) == 1 and isinstance(values[0], bytes):
                column = text_array(values[0])
            elif column is None:
                column = pa.array(values, _TYPES[origin])
        if share and column.type == pa.string():
            texts.setdefault(tuple(map(id, values)), column)
        columns.append(column)
    return columns


def readable(row: Row) -> Row:
    """With the beginning of a text that is bytes."""
    text = row.get("text")
    if not isinstance(text, bytes):
        return row
    return {**row, "text": text[:_READABLE_BYTES].decode("utf-8", "ignore")}


def _digest(row: Row) -> bytes:
    """ValueError or TypeError when a value cannot be written."""
    content, long = dict[str, Any](), dict[str, str]()
    for name, value in row.items():
        if isinstance(value, bytes):
            content[name] = hashlib.sha256(value).hexdigest()
        elif isinstance(value, str) and len(value) > _LONG_CHARS:
            first = long.setdefault(value, name)
            content[name] = value if first is name else {"same as": first}
        else:
            content[name] = value
    text = orjson.dumps(content, default=_as_text, option=orjson.OPT_SORT_KEYS)
    return hashlib.blake2b(text, digest_size=16).digest()


def _as_text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


class RowSpool:
    """Rows whose columns are known only when all are there: lines of JSON in `file`, each with what
    the row has of the user's under our names. Columns of `known` are there whatever they hold."""

    def __init__(self, file: IO[bytes], known: pa.Schema) -> None:
        self._file, self._known = file, known
        self._columns, self._clashing = SchemaInference(), SchemaInference()
        self.moved: dict[str, str] = {}
        """Names of ours that rows have too → what their columns are called; known to `schema`."""

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
        while lines := list(islice(self._file, _BATCH_ROWS)):
            rows = [
                {**row, **{self.moved[name]: value for name, value in clashing.items()}}
                for row, clashing in map(loads, lines)
            ]
            yield columns_of(rows, schema, start)
            start += len(rows)


NamedPiece = tuple[str, Batch]
"""The name of a file, which enters the ids of rows that have none, and a piece of it."""
Work = Callable[[NamedPiece], PieceRows]


def in_order(
    work: Work, make: Callable[[], Work], pieces: Iterator[NamedPiece], processes: int
) -> Generator[PieceRows]:
    """The rows of every piece, in order. The first piece is for `work`: a file that has no second
    one needs no other process. In each of those, `make`, which can be pickled, gives one more. What
    they raise is raised here. WorkerDied when a process was killed."""
    yield from map(work, pieces if processes == 1 else islice(pieces, 1))
    if processes == 1:
        return
    with TemporaryDirectory(prefix="modelcall-") as folder:
        pool = pool_of(processes, partial(_open, make, Path(folder)))
        waiting: deque[Future[PieceRows]] = deque()
        try:
            for piece in pieces:
                waiting.append(pool.submit(_work, piece))
                if len(waiting) > _AHEAD * processes:
                    yield waiting.popleft().result().received()
            while waiting:
                yield waiting.popleft().result().received()
        except BrokenProcessPool as error:
            raise WorkerDied(
                f"one of {processes} processes of `preprocess.num_proc` was killed, or ran out of "
                "memory, before it was done; nothing is published: try fewer processes"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


_here: tuple[Work, Path] | None = None
"""In a process of the pool: what it does, and the folder for the columns."""


def _open(make: Callable[[], Work], folder: Path) -> None:
    global _here
    _here = make(), folder


def _work(piece: NamedPiece) -> PieceRows:
    assert _here is not None
    work, folder = _here
    return work(piece).sent(folder)


uncut = threading.Lock()
"""Held in such a process by what the end of its parent is not to cut off."""


def pool_of(processes: int, start: Callable[[], object]) -> ProcessPoolExecutor:
    """Processes that end with this one, and leave it to decide on signals. Each calls `start`,
    which can be pickled, first; none runs the user's script again, which need not expect that."""
    pool = ProcessPoolExecutor(processes, get_context("spawn"), _start, (start,))
    script, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
    try:
        pool.submit(int)  # starts them
    finally:
        sys.modules["__main__"] = script
    return pool


def _start(start: Callable[[], object]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    start()


def _end_with_parent() -> None:
    """A parent that is killed cannot end its processes, and they would wait for ever."""
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    with uncut:
        os._exit(1)
