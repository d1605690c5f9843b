"""Processes that share the pieces of a file, when there is enough for them to do."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from typing import Any, TypeVar

from modelcall_assets.errors import WorkerDied

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
