"""Names that Dagster takes."""

from __future__ import annotations

import hashlib
import re

_MAX = 100


def legal_key(name: str) -> str:
    """The name as an asset key part: letters, digits and underscores, at most 100.

    Hyphens, dots and spaces become underscores. Names that lose more than that get a digest,
    so that two Chinese names stay apart.
    """
    key = re.sub(r"[-. ]", "_", name)
    if re.fullmatch(r"[A-Za-z0-9_]+", key) and len(key) <= _MAX:
        return key
    return f"{re.sub(r'[^A-Za-z0-9_]', '_', key)[: _MAX - 7]}_{digest(name)}"


def digest(text: str) -> str:
    """Six hex digits that tell two texts apart."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:6]
