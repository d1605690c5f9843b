"""Processes that share the pieces of a file, when there is enough for them to do."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from tempfile import mkstemp
from typing import Any, TypeVar

import pyarrow as pa

from modelcall_assets.errors import StoreError, WorkerDied
from modelcall_assets.storage.places import explained

P = TypeVar("P")
R = TypeVar("R")
Work = Callable[[P], R]

AHEAD = 2
"""Pieces that wait for each process."""


def map_in_order(
    work: Work[P, R],
    make: Callable[..., Work[P, R]],
    arguments: Sequence[Any],
    pieces: Iterator[P],
    processes: int,
) -> Generator[R]:
    """`make(*arguments)` of every piece, in order. It is made once in each process; all of it can
    be pickled. What it raises is raised here. WorkerDied when a process was killed.

    The first piece is `work` of this process: a file that has no second one needs no other.
    """
    for first in pieces:
        yield work(first)
        break
    pool = ProcessPoolExecutor(processes, get_context("spawn"), _start, (make, arguments))
    waiting: deque[Future[R]] = deque()
    try:
        for piece in pieces:
            waiting.append(pool.submit(_work, piece))
            if len(waiting) > AHEAD * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise WorkerDied(
            f"one of {processes} processes of `preprocess.num_proc` was killed, or ran out of "
            "memory, before it was done; nothing is published: try fewer processes"
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


_worker: Work[Any, Any] | None = None
"""In a process of the pool."""


def _start(make: Callable[..., Work[Any, Any]], arguments: Sequence[Any]) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to decide
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker = make(*arguments)


def _work(piece: Any) -> Any:
    assert _worker is not None
    return _worker(piece)


def _end_with_parent() -> None:
    """A parent that is killed cannot end its processes, and they would wait for ever."""
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


@dataclass(frozen=True, slots=True)
class Shipped:
    """A file with each distinct column once, and which of them the columns are, in order."""

    path: Path
    columns: tuple[int, ...]

    @classmethod
    def of(cls, columns: Sequence[pa.Array], folder: Path) -> Shipped:
        """StoreError when the file cannot be written."""
        distinct = {id(column): column for column in columns}
        places = {identity: at for at, identity in enumerate(distinct)}
        names = [str(at) for at in range(len(distinct))]
        batch = pa.RecordBatch.from_arrays([*distinct.values()], names=names)
        with explained(folder, StoreError):
            handle, name = mkstemp(".arrow", dir=folder)
            with os.fdopen(handle, "wb") as file, pa.ipc.new_stream(file, batch.schema) as stream:
                stream.write_batch(batch)
        return cls(Path(name), tuple(places[id(column)] for column in columns))

    def received(self) -> list[pa.Array]:
        """The columns; once. The file goes with them."""
        with pa.memory_map(str(self.path)) as file, pa.ipc.open_stream(file) as stream:
            batch = stream.read_next_batch()
        self.path.unlink()
        return [batch.column(at) for at in self.columns]
