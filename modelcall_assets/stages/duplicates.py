"""Which texts of a task are left out as duplicates, over all its partitions.

An SQLite file knows, of each text that stays, the partition that was the first to have it. It is
that one's for good: a run is decided by what the other partitions keep and by its own rows in
order, whatever its partition kept before. So unchanged input gives the same rows again.

Signatures of one algorithm and one threshold find each other. After a change of either, the texts
of a partition take part again once it is run.
"""

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import NamedTuple, Self

from modelcall_assets.errors import InputError, StoreError
from modelcall_assets.storage.files import BUSY_S, write_ahead
from modelcall_assets.transforms.texts import algorithm, bands, similarity

EXACT = "dedup: exact"
NEAR = "dedup: near"

_LAYOUT = 1
_TABLES = (  # `run_id` is read by nobody any more
    """CREATE TABLE partitions (
        id INTEGER PRIMARY KEY, name TEXT UNIQUE NOT NULL,
        generation INTEGER NOT NULL, run_id TEXT NOT NULL
    )""",
    """CREATE TABLE texts (
        digest BLOB PRIMARY KEY, owner INTEGER NOT NULL, generation INTEGER NOT NULL,
        sketch INTEGER
    ) WITHOUT ROWID""",
    "CREATE INDEX kept ON texts (owner, generation)",
    """CREATE TABLE sketches (
        id INTEGER PRIMARY KEY, digest BLOB NOT NULL, algorithm TEXT NOT NULL,
        near REAL NOT NULL, signature BLOB NOT NULL
    )""",
    """CREATE TABLE bands (
        key BLOB, sketch INTEGER, PRIMARY KEY (key, sketch)
    ) WITHOUT ROWID""",
)
_OF_A_BAND = "SELECT * FROM (SELECT sketch FROM bands WHERE key = ? ORDER BY sketch LIMIT 100)"
"""The oldest, so that a run again meets those again. A band of thousands, as the pages of one
template have, would make a comparison take as long as it has texts."""
_CACHE_KIB = 64 * 1024
_FREED_AT_ONCE = 1000
_UNUSABLE = {sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_ERROR}


class Duplicates:
    """One run of `partition` over the index at `path`, which is made on first use.

    A text whose similarity to one that stays is estimated as `near` or more is a duplicate too.
    Raises ToolError when that cannot be told here, InputError when the file is no such index,
    StoreError when it cannot be written.
    """

    def __init__(self, path: Path, partition: str, near: float | None) -> None:
        self._path, self._partition, self._near = path, partition, near
        self._algorithm = "" if near is None else algorithm()

    def __enter__(self) -> Self:
        with _explained(self._path), ExitStack() as stack:
            self._index = stack.enter_context(closing(_opened(self._path)))
            self._run = _new_run(self._index, self._partition)
            stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._index.close()

    def rules(self, texts: Sequence[tuple[bytes, bytes | None]]) -> list[str | None]:
        """For consecutive texts, as digest and signature, the rule that leaves each out, or None:
        it is the first of its kind."""
        with _explained(self._path), _transaction(self._index):
            return [self._rule(digest, signature) for digest, signature in texts]

    def finish(self) -> None:
        """After the partition was worked through: what it held before and has no more is free."""
        with _explained(self._path):
            _free(self._index, self._run)

    def _rule(self, digest: bytes, signature: bytes | None) -> str | None:
        sketch = None
        query = "SELECT owner, generation, sketch FROM texts WHERE digest = ?"
        if (held := self._index.execute(query, (digest,)).fetchone()) is not None:
            owner, generation, sketch = held
            if owner != self._run.owner or generation == self._run.generation:
                return EXACT
            if generation > self._run.generation:
                return None  # a later run of this partition took it over
        if self._near is not None and signature is not None:
            keys = bands(signature, self._near)
            if self._has_similar(keys, signature, self._near):
                return NEAR
            sketch = self._sketch(digest, keys, signature, sketch)
        self._index.execute(
            "INSERT INTO texts VALUES (?, ?, ?, ?) ON CONFLICT (digest) DO UPDATE "
            "SET generation = excluded.generation, sketch = excluded.sketch",
            (digest, *self._run, sketch),
        )
        return None

    def _has_similar(self, keys: list[bytes], signature: bytes, near: float) -> bool:
        """Among the texts of other partitions, and those that this run has kept."""
        found = self._index.execute(
            "SELECT signature FROM sketches CROSS JOIN texts USING (digest) "
            f"WHERE id IN ({' UNION '.join([_OF_A_BAND] * len(keys))}) "
            "AND algorithm = ? AND (owner != ? OR generation = ?)",
            (*keys, self._algorithm, *self._run),
        )
        return any(similarity(signature, other) >= near for (other,) in found)

    def _sketch(
        self, digest: bytes, keys: list[bytes], signature: bytes, known: int | None
    ) -> int | None:
        """The number of the text's signature, by whose bands it is found: the `known` one if that
        is of this algorithm and threshold."""
        if known is not None:
            query = "SELECT algorithm, near FROM sketches WHERE id = ?"
            made_by = self._index.execute(query, (known,)).fetchone()
            if made_by == (self._algorithm, self._near):
                return known
            _drop_sketch(self._index, known)
        number = self._index.execute(
            "INSERT INTO sketches (digest, algorithm, near, signature) VALUES (?, ?, ?, ?)",
            (digest, self._algorithm, self._near, signature),
        ).lastrowid
        values = ((key, number) for key in keys)
        self._index.executemany("INSERT OR IGNORE INTO bands VALUES (?, ?)", values)
        return number


def forget(path: Path, partitions: Iterable[str]) -> None:
    """Of inputs that are gone: what they held is free."""
    if not path.exists():
        return
    with _explained(path), closing(_opened(path)) as index:
        for partition in partitions:
            _free(index, _new_run(index, partition))


class _Run(NamedTuple):
    """`owner` is the number of its partition, `generation` how many runs it had."""

    owner: int
    generation: int


def _opened(path: Path) -> sqlite3.Connection:
    path.parent.mkdir(parents=True, exist_ok=True)
    index = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None)
    try:
        write_ahead(index)
        index.execute(f"PRAGMA cache_size=-{_CACHE_KIB}")
        with _transaction(index):
            layout = index.execute("PRAGMA user_version").fetchone()[0]
            if layout == 0:
                for statement in _TABLES:
                    index.execute(statement)
                index.execute(f"PRAGMA user_version={_LAYOUT}")
            elif layout != _LAYOUT:
                raise _unusable(path, f"its layout is {layout}, not {_LAYOUT}")
    except BaseException:
        index.close()
        raise
    return index


def _new_run(index: sqlite3.Connection, partition: str) -> _Run:
    with _transaction(index):
        index.execute(
            "INSERT INTO partitions (name, generation, run_id) VALUES (?, 1, '') "
            "ON CONFLICT (name) DO UPDATE SET generation = generation + 1",
            (partition,),
        )
        query = "SELECT id, generation FROM partitions WHERE name = ?"
        return _Run(*index.execute(query, (partition,)).fetchone())


def _free(index: sqlite3.Connection, run: _Run) -> None:
    """All that earlier runs of the partition left, some at a time: others wait for none long."""
    freed = _FREED_AT_ONCE
    while freed == _FREED_AT_ONCE:
        with _transaction(index):
            left = index.execute(
                "SELECT digest, sketch FROM texts WHERE owner = ? AND generation < ? LIMIT ?",
                (*run, _FREED_AT_ONCE),
            ).fetchall()
            for digest, sketch in left:
                index.execute("DELETE FROM texts WHERE digest = ?", (digest,))
                if sketch is not None:
                    _drop_sketch(index, sketch)
        freed = len(left)


def _drop_sketch(index: sqlite3.Connection, number: int) -> None:
    query = "SELECT signature, near FROM sketches WHERE id = ?"
    signature, near = index.execute(query, (number,)).fetchone()
    values = ((key, number) for key in bands(signature, near))
    index.executemany("DELETE FROM bands WHERE key = ? AND sketch = ?", values)
    index.execute("DELETE FROM sketches WHERE id = ?", (number,))


@contextmanager
def _transaction(index: sqlite3.Connection) -> Iterator[None]:
    with index:
        index.execute("BEGIN IMMEDIATE")
        yield


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.DatabaseError as error:
        code: int | None = getattr(error, "sqlite_errorcode", None)
        if code is None:
            raise
        if code & 0xFF in _UNUSABLE:
            raise _unusable(path, str(error)) from error
        raise StoreError(f"{path}: the index of duplicates cannot be written: {error}") from error


def _unusable(path: Path, why: str) -> InputError:
    return InputError(
        f"{path}: cannot be used as the index of duplicates ({why}); delete it: then first come, "
        "first kept starts anew"
    )
