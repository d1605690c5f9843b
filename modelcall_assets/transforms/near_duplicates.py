"""How alike two texts are, estimated from a few bytes of each: MinHash over shingles of words."""

from __future__ import annotations

import importlib
import struct
import unicodedata
from collections.abc import Iterable
from functools import lru_cache
from hashlib import blake2b
from operator import eq
from typing import Any

PERMUTATIONS = 128
_SEED = 42
_SHINGLE_WORDS = 5
_SHINGLES_VERSION = 1
"""To be raised when other words or shingles are made of a text."""
_PACKED = struct.Struct(f"<{PERMUTATIONS}I")
_KEY_BYTES = 8
_MISSED_WEIGHT = 0.9
"""A pair whose bands never meet is lost, one that meets needlessly is compared in full."""
_STEPS = 100
_UNSPACED = {
    *("CJK", "HIRAGANA", "KATAKANA", "HALFWIDTH", "BOPOMOFO", "HANGUL"),
    *("THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN"),
}
"""Scripts in which each character counts as a word, as Unicode begins their names."""


class NearDuplicatesError(ValueError):
    """The package that near duplicates are found with is not installed."""


def algorithm() -> str:
    """Signatures made by different ones must not be compared."""
    return f"{_SHINGLES_VERSION}.{_minhash().ALGORITHM_VERSION}"


def signature(text: str) -> bytes | None:
    """128 little-endian u32; None for a text without any word."""
    words = text.lower().translate(_SPACED).encode().split()
    if not words:
        return None
    sketch = _minhash()(PERMUTATIONS, _SEED)
    sketch.update(_shingles(words))
    return _PACKED.pack(*sketch.digest())


def similarity(one: bytes, other: bytes) -> float:
    """The estimated share of shingles that two texts have in common, from their signatures."""
    return sum(map(eq, memoryview(one).cast("I"), memoryview(other).cast("I"))) / PERMUTATIONS


def bands(signature: bytes, threshold: float) -> list[bytes]:
    """Keys of which texts at least as similar as `threshold` most likely share one."""
    count, rows = _bands_and_rows(threshold)
    width = rows * (_PACKED.size // PERMUTATIONS)
    parts = (signature[band * width : (band + 1) * width] for band in range(count))
    return [
        blake2b(part, digest_size=_KEY_BYTES, salt=band.to_bytes(2, "little")).digest()
        for band, part in enumerate(parts)
    ]


class _Spaced(dict[int, str]):
    """For `str.translate`: spaces between words, and for what is part of none."""

    def __missing__(self, code: int) -> str:
        self[code] = self._shown(chr(code))
        return self[code]

    @staticmethod
    def _shown(char: str) -> str:
        if char != "_" and unicodedata.category(char)[0] not in "LMN":
            return " "
        script = unicodedata.name(char, "").partition(" ")[0]
        return f" {char} " if script in _UNSPACED else char


_SPACED = _Spaced()


def _shingles(words: list[bytes]) -> Iterable[bytes]:
    if len(words) < _SHINGLE_WORDS:
        return [b" ".join(words)]
    return map(b" ".join, zip(*(words[start:] for start in range(_SHINGLE_WORDS)), strict=False))


@lru_cache(maxsize=1)
def _minhash() -> Any:
    try:
        return importlib.import_module("rensa").RMinHash
    except ImportError as error:
        raise NearDuplicatesError(
            f"near duplicates need rensa: pip install 'modelcall-assets[near-dedup]' ({error})"
        ) from error


@lru_cache(maxsize=16)
def _bands_and_rows(threshold: float) -> tuple[int, int]:
    """With the least weighted error over all similarities."""
    counts = range(1, PERMUTATIONS + 1)
    shapes = ((count, rows) for count in counts for rows in range(1, PERMUTATIONS // count + 1))
    return min(shapes, key=lambda shape: _error(threshold, *shape))


def _error(threshold: float, count: int, rows: int) -> float:
    def met(low: float, high: float) -> float:
        step = (high - low) / _STEPS
        return step * sum(
            1 - (1 - (low + (at + 0.5) * step) ** rows) ** count for at in range(_STEPS)
        )

    missed = (1 - threshold) - met(threshold, 1)
    return (1 - _MISSED_WEIGHT) * met(0, threshold) + _MISSED_WEIGHT * missed
