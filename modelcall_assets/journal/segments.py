"""The files of a journal: one segment per run, one JSON object per line, torn tails skipped.

Line kinds: a header (`format`, `run`, `fresh`), a reply (`k` …), a seal (`sealed`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import orjson

FORMAT = 1
_SUFFIX = ".jsonl"


class SegmentWriter:
    """Appends lines; each is in the operating system's hands when `append` returns."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.name = path.name
        self._fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND, 0o644)
        self._size = 0
        self._synced = 0

    def append(self, line: dict[str, Any]) -> int:
        """The offset of the line. Raises OSError when the disk does not take it."""
        data = orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]
        offset, self._size = self._size, self._size + len(data)
        return offset

    def sync(self) -> None:
        """Force what was appended to the disk; cheap when there is nothing new."""
        size = self._size
        if size > self._synced:
            os.fsync(self._fd)
            self._synced = size

    def close(self) -> None:
        self.sync()
        os.close(self._fd)


def segment_paths(folder: Path) -> list[Path]:
    """Oldest first: names start with a number that only grows."""
    return sorted(folder.glob(f"*{_SUFFIX}")) if folder.is_dir() else []


def next_segment_path(folder: Path, run_id: str) -> Path:
    """Two runs that ask at the same time get the same number but never the same name."""
    last = segment_paths(folder)[-1:]
    number = int(last[0].name[:6]) + 1 if last else 1
    return folder / f"{number:06d}-{run_id[:12]}{_SUFFIX}"


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Offset and content of each whole line; what a kill tore apart is passed over."""
    offset = 0
    with path.open("rb") as file:
        for line in file:
            parsed = _parsed(line)
            if parsed is not None:
                yield offset, parsed
            offset += len(line)


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        return cast("dict[str, Any]", orjson.loads(line)) if line.endswith(b"\n") else None
    except orjson.JSONDecodeError:
        return None
