"""Which versions of a task's inputs are known to be what `raw` was made of.

A file on this machine that can be lost: then the manifests are read again, one by one.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson

from modelcall_assets.storage.files import write_bytes

Settled = tuple[str, int]
"""The version of an input, and the event that materialised it."""


class SettledInputs:
    """By partition key."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, list[str | int]] = {}
        with suppress(FileNotFoundError, orjson.JSONDecodeError):
            known: Any = orjson.loads(path.read_bytes())
            self._known = known if isinstance(known, dict) else {}

    def holds(self, key: str, settled: Settled) -> bool:
        return self._known.get(key) == [*settled]

    def add(self, found: Mapping[str, Settled]) -> None:
        if found:
            self._known |= {key: [*settled] for key, settled in found.items()}
            write_bytes(self._path, orjson.dumps(self._known))
