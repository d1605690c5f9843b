"""A run as people see and reach it while it goes on. Its process holds a lock,
`<home>/processes/<run>`; beside that lie a note of each stage at work, written about once a second,
and what people want of the run."""

import os
import socket
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson

from modelcall_assets.stages.report import Tally, by_count

EVERY_S = 1.0
Wish = Mapping[str, Any]
AS_WRITTEN: Wish = {"requests": None, "paused": False}
"""As the task's files say: so many requests in flight at most, and some are sent."""


def exchange(lock: Path, task: str, tally: Tally, taken: Wish) -> Wish:
    """Leave the note of a stage, with the wish that was taken; gives the latest one."""
    about = {"task": task, "run_id": lock.name, "pid": os.getpid(), "host": socket.gethostname()}
    about |= {"stage": tally.stage, "wish": taken}
    with suppress(OSError):  # of a disk that is full: the run need not know
        _write(note_path(lock, tally), about | figures(tally))
    return wish_of(lock)


def note_path(lock: Path, tally: Tally) -> Path:
    return lock.with_name(f"{lock.name}.{tally.stage}.json")


def notes(home: Path) -> Iterator[dict[str, Any]]:
    for path in sorted((home / "processes").glob("*.json")):
        with suppress(FileNotFoundError):
            yield orjson.loads(path.read_bytes())


def wish_of(lock: Path) -> Wish:
    """The latest."""
    with suppress(FileNotFoundError):
        return orjson.loads(lock.with_suffix(".wish").read_bytes())
    return AS_WRITTEN


def want(lock: Path, **changes: Any) -> None:
    """None changes nothing."""
    changes = {name: value for name, value in changes.items() if value is not None}
    _write(lock.with_suffix(".wish"), {**wish_of(lock), **changes})


def forget(lock: Path) -> None:
    """With all that lies beside it."""
    for path in lock.parent.glob(f"{lock.name}*"):
        path.unlink(missing_ok=True)


def _write(path: Path, content: Any) -> None:
    """Whole or not at all; a power cut may take it."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    partial.write_bytes(orjson.dumps(content, option=orjson.OPT_NON_STR_KEYS))  # enums
    partial.replace(path)


def figures(tally: Tally) -> dict[str, Any]:
    """As JSON has them; from any thread."""
    began, called, sent = tally.began
    seconds, left = max(time.monotonic() - began, 1e-3), tally.rows - tally.done
    rate = max(0.0, (tally.called - called) / seconds)
    names = "rows", "done", "ok", "failed", "reasons", "replayed"
    found = {name: getattr(tally, name) for name in names} | {"rate": rate}
    found["seconds_left"] = left / rate if rate > 0 and left > 0 else None
    if tally.engine is not None:
        sending = {"requests": tally.requests, "requests_rate": (tally.requests - sent) / seconds}
        found |= {**sending, "usd": tally.cost_usd, **tally.engine.state()}
    return found


def line(stage: str, shown: Mapping[str, Any]) -> str:
    """`scores: 1,200 of 5,000 rows, 3 failed (timeout 3), …`."""
    return f"{stage}: {shown['done']:,} of {shown['rows']:,} rows, {in_words(shown)}"


def in_words(shown: Mapping[str, Any]) -> str:
    """`3 failed (timeout 3), 64 of 64 in flight, 81 rows/s, 84 requests/s, 0.4200 USD, 47 s left`,
    and what holds it up."""
    asks, reasons = "limit" in shown, by_count(Counter(shown["reasons"]), 3)
    parts = [f"{shown['failed']:,} failed" + f" ({reasons})" * bool(reasons)]
    if asks:
        parts.append("paused" * shown["paused"])
        parts.append(f"{shown['in_flight']:,} of {shown['limit']:,} in flight")
        nobody = shown["held_up"] and not shown["in_flight"]
        parts.append("all endpoints wait: " * bool(nobody) + shown["held_up"])
    if shown["replayed"]:
        parts.append(f"{shown['replayed'] / shown['done']:.0%} from the journal")
    parts.append(f"{shown['rate']:,.0f} rows/s")
    if asks:
        parts.append(f"{shown['requests_rate']:,.0f} requests/s")
        parts.append("cost unknown" if shown["usd"] is None else f"{shown['usd']:.4f} USD")
    if shown["seconds_left"] is not None and not shown.get("paused"):
        parts.append(f"{shown['seconds_left']:.0f} s left")
    return ", ".join(filter(None, parts))
