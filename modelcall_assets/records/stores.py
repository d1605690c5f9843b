"""How object stores and other file systems are reached: config reads it, storage uses it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """How the places under a prefix are reached. `filesystem` is a protocol of fsspec's, or
    `package.module:Class` of the user's; `options` are its arguments, and may hold secrets."""

    name: str
    prefix: str
    filesystem: str
    options: Mapping[str, Any] = field(repr=False)
    secrets: tuple[str, ...] = field(default=(), repr=False, compare=False)
    """Besides those that the options show by their names."""
