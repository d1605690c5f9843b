"""Which texts of a task are left out as duplicates, over all its partitions.

An SQLite file knows, of each text that stays, the partition that was the first to have it. It is
that one's for good: a run is decided by what the other partitions keep and by its own rows in
order, whatever its partition kept before. So unchanged input gives the same rows again.

Signatures of one algorithm and one threshold find each other. After a change of either, the texts
of a partition take part again once it is run.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import NamedTuple, Self

from modelcall_assets.errors import InputError, StoreError
from modelcall_assets.storage.files import BUSY_S, write_ahead
from modelcall_assets.transforms.near_duplicates import algorithm, bands, similarity

EXACT = "dedup: exact"
NEAR = "dedup: near"

_LAYOUT = 1
_TABLES = (
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
    Raises NearDuplicatesError when that cannot be told here, InputError when the file is no such
    index, StoreError when it cannot be written.
    """

    def __init__(self, path: Path, partition: str, run_id: str, near: float | None) -> None:
        self._path = path
        self._partition = partition
        self._run_id = run_id
        self._sketches = None if near is None else _Sketches(near)

    def __enter__(self) -> Self:
        with _explained(self._path), ExitStack() as stack:
            self._index = stack.enter_context(closing(_opened(self._path)))
            self._run = _new_run(self._index, self._partition, self._run_id)
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
        held = self._held(digest)
        sketch = None
        if held is not None:
            if held.owner != self._run.owner or held.generation == self._run.generation:
                return EXACT
            if held.generation > self._run.generation:
                return None  # a later run of this partition took it over
            sketch = held.sketch
        if self._sketches is not None and signature is not None:
            if self._sketches.has_similar(self._index, signature, self._run):
                return NEAR
            sketch = self._sketches.kept(self._index, digest, signature, sketch)
        self._keep(digest, sketch)
        return None

    def _held(self, digest: bytes) -> _Held | None:
        row = self._index.execute(
            "SELECT owner, generation, sketch FROM texts WHERE digest = ?", (digest,)
        ).fetchone()
        return None if row is None else _Held(*row)

    def _keep(self, digest: bytes, sketch: int | None) -> None:
        self._index.execute(
            "INSERT INTO texts VALUES (?, ?, ?, ?) ON CONFLICT (digest) DO UPDATE "
            "SET generation = excluded.generation, sketch = excluded.sketch",
            (digest, *self._run, sketch),
        )


def forget(path: Path, partitions: Iterable[str]) -> None:
    """Of inputs that are gone: what they held is free."""
    if not path.exists():
        return
    with _explained(path), closing(_opened(path)) as index:
        for partition in partitions:
            _free(index, _new_run(index, partition, ""))


class _Run(NamedTuple):
    """`owner` is the number of its partition, `generation` how many runs it had."""

    owner: int
    generation: int


class _Held(NamedTuple):
    owner: int
    generation: int
    sketch: int | None


class _Sketches:
    """The signatures of texts that stay, found by their bands."""

    def __init__(self, near: float) -> None:
        self._near = near
        self._algorithm = algorithm()

    def has_similar(self, index: sqlite3.Connection, signature: bytes, run: _Run) -> bool:
        """Among the texts of other partitions, and those that `run` has kept."""
        keys = bands(signature, self._near)
        found = index.execute(
            "SELECT signature FROM sketches CROSS JOIN texts USING (digest) "
            f"WHERE id IN ({' UNION '.join([_OF_A_BAND] * len(keys))}) "
            "AND algorithm = ? AND (owner != ? OR generation = ?)",
            (*keys, self._algorithm, *run),
        )
        return any(similarity(signature, other) >= self._near for (other,) in found)

    def kept(
        self, index: sqlite3.Connection, digest: bytes, signature: bytes, known: int | None
    ) -> int:
        """The number of this sketch: `known` if it is of this algorithm and threshold."""
        if known is not None:
            if self._is_current(index, known):
                return known
            _drop_sketch(index, known)
        number = index.execute(
            "INSERT INTO sketches (digest, algorithm, near, signature) VALUES (?, ?, ?, ?)",
            (digest, self._algorithm, self._near, signature),
        ).lastrowid
        assert number is not None
        index.executemany(
            "INSERT OR IGNORE INTO bands VALUES (?, ?)",
            ((key, number) for key in bands(signature, self._near)),
        )
        return number

    def _is_current(self, index: sqlite3.Connection, number: int) -> bool:
        made = index.execute(
            "SELECT algorithm, near FROM sketches WHERE id = ?", (number,)
        ).fetchone()
        return made == (self._algorithm, self._near)


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


def _new_run(index: sqlite3.Connection, partition: str, run_id: str) -> _Run:
    with _transaction(index):
        index.execute(
            "INSERT INTO partitions (name, generation, run_id) VALUES (?, 1, ?) ON CONFLICT (name) "
            "DO UPDATE SET generation = generation + 1, run_id = excluded.run_id",
            (partition, run_id),
        )
        return _Run(
            *index.execute(
                "SELECT id, generation FROM partitions WHERE name = ?", (partition,)
            ).fetchone()
        )


def _free(index: sqlite3.Connection, run: _Run) -> None:
    """All that earlier runs of the partition left, a part at a time: others wait for none long."""
    freed = _FREED_AT_ONCE
    while freed == _FREED_AT_ONCE:
        with _transaction(index):
            left = index.execute(
                "SELECT digest, sketch FROM texts WHERE owner = ? AND generation < ? LIMIT ?",
                (*run, _FREED_AT_ONCE),
            ).fetchall()
            for digest, sketch in left:
                _drop(index, digest, sketch)
        freed = len(left)


def _drop(index: sqlite3.Connection, digest: bytes, sketch: int | None) -> None:
    index.execute("DELETE FROM texts WHERE digest = ?", (digest,))
    if sketch is not None:
        _drop_sketch(index, sketch)


def _drop_sketch(index: sqlite3.Connection, number: int) -> None:
    signature, near = index.execute(
        "SELECT signature, near FROM sketches WHERE id = ?", (number,)
    ).fetchone()
    index.executemany(
        "DELETE FROM bands WHERE key = ? AND sketch = ?",
        ((key, number) for key in bands(signature, near)),
    )
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
