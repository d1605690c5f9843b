"""What every preprocessed row gets, whatever made it: clean of secrets, an id, a truncated text,
its language, and what tells it from duplicates.

How alike two texts are is estimated from a few bytes of each: MinHash over shingles of words.
"""

import hashlib
import struct
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import import_module
from operator import eq
from typing import Any, NamedTuple, Protocol

from modelcall_assets.records.outcome import Dropped, Row
from modelcall_assets.transforms.preprocessor import Kind, as_text
from modelcall_assets.transforms.tokens import DEFAULT_ENCODING, tokenizer

LANGUAGE_COLUMN = "text_language"
_LANGUAGE_CHARS = 4_000
"""More of a text does not tell more."""

PERMUTATIONS = 128
_SEED = 42
_SHINGLE_WORDS = 5
_SHINGLES_VERSION = 1
"""To be raised when other words or shingles are made of a text."""
_PACKED = struct.Struct(f"<{PERMUTATIONS}I")
_MISSED_WEIGHT = 0.9
"""A pair whose bands never meet is lost, one that meets needlessly is compared in full."""
_STEPS = 100
_UNSPACED = {
    *("CJK", "HIRAGANA", "KATAKANA", "HALFWIDTH", "BOPOMOFO", "HANGUL"),
    *("THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN"),
}
"""Scripts in which each character counts as a word, as Unicode begins their names."""


class Scrubber(Protocol):
    """Takes out of a text what should not be in it, such as names and secrets."""

    def scrub(self, text: str) -> tuple[str, Mapping[str, int]]:
        """The text without it, and how many of what kind were taken out."""
        ...


class Finished(NamedTuple):
    row: Row
    removed: Mapping[str, int]
    """By kind."""
    text: tuple[bytes, bytes | None] | None
    """The digest of its text, and the signature for near duplicates; None where none are sought."""


@dataclass(frozen=True, slots=True)
class Finishing:
    """`languages`: None does not look, an empty list keeps all."""

    max_tokens: int
    encoding: str = DEFAULT_ENCODING
    scrubbers: Sequence[Scrubber] = ()
    languages: Sequence[str] | None = None
    exact: bool = False
    near: bool = False

    def finish(self, row: Row, identity: str) -> Finished | Dropped:
        """`identity` becomes the row's `id` unless it has one."""
        text: Any = row.get("text")
        removed: dict[str, int] = {}
        for scrubber in self.scrubbers if text else ():
            text, counts = scrubber.scrub(_as_str(text))
            for kind, count in counts.items():
                removed[kind] = removed.get(kind, 0) + count
        row = {**row, "text": text} if removed else row
        row["id"] = as_text(row.get("id")) or identity
        if self.languages is not None:
            language = text_language(_as_str(text)) if text else None
            if self.languages and language not in self.languages:
                return Dropped(f"language_id: {language or 'none'}")
            row[LANGUAGE_COLUMN] = language
        truncated = None
        if text:
            tokens = tokenizer(self.encoding)
            cut: Any = tokens.truncate_utf8 if isinstance(text, bytes) else tokens.truncate
            truncated = cut(text, self.max_tokens)
        row[truncated_column(self.max_tokens)] = truncated
        if not text or not (self.exact or self.near):
            return Finished(row, removed, None)
        content = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
        digest = hashlib.blake2b(content, digest_size=16).digest()
        return Finished(row, removed, (digest, signature(_as_str(text)) if self.near else None))

    def columns(self) -> dict[str, Kind]:
        language: dict[str, Kind] = {} if self.languages is None else {LANGUAGE_COLUMN: "string"}
        return {"id": "string", **language, truncated_column(self.max_tokens): "string"}


def truncated_column(max_tokens: int) -> str:
    """32768 → `content_truncate_32k`."""
    return f"content_truncate_{max_tokens // 1024}k"


def _as_str(text: str | bytes) -> str:
    return text.decode() if isinstance(text, bytes) else text


class TextLanguageError(ValueError):
    """The package that tells the languages of texts is not installed."""


def text_language(text: str) -> str | None:
    """An ISO 639-1 code such as `en`; None for a text without a letter. TextLanguageError."""
    head = text[:_LANGUAGE_CHARS]
    if not any(map(str.isalpha, head)):
        return None
    try:
        classify: Any = import_module("py3langid").classify
    except ImportError as error:
        raise TextLanguageError(
            "the package py3langid is not installed; pip install 'modelcall-assets[text-language]'"
        ) from error
    return str(classify(head)[0])


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
    return sum(map(eq, memoryview(one).cast("I"), memoryview(other).cast("I"))) / PERMUTATIONS


def bands(signature: bytes, threshold: float) -> list[bytes]:
    """Keys of which texts at least as similar as `threshold` most likely share one."""
    count, rows = _bands_and_rows(threshold)
    width = rows * (_PACKED.size // PERMUTATIONS)
    keys: list[bytes] = []
    for band in range(count):
        part, salt = signature[band * width : (band + 1) * width], band.to_bytes(2, "little")
        keys.append(hashlib.blake2b(part, digest_size=8, salt=salt).digest())
    return keys


class _Spaced(dict[int, str]):
    """For `str.translate`: spaces between words, and for what is part of none."""

    def __missing__(self, code: int) -> str:
        char = spaced = chr(code)
        if char != "_" and unicodedata.category(char)[0] not in "LMN":
            spaced = " "
        elif unicodedata.name(char, "").partition(" ")[0] in _UNSPACED:
            spaced = f" {char} "
        self[code] = spaced
        return spaced


_SPACED = _Spaced()


def _shingles(words: list[bytes]) -> Iterable[bytes]:
    if len(words) < _SHINGLE_WORDS:
        return [b" ".join(words)]
    return map(b" ".join, zip(*(words[start:] for start in range(_SHINGLE_WORDS)), strict=False))


@cache
def _minhash() -> Any:
    try:
        return import_module("rensa").RMinHash
    except ImportError as error:
        raise NearDuplicatesError(
            f"near duplicates need rensa: pip install 'modelcall-assets[near-dedup]' ({error})"
        ) from error


@lru_cache(maxsize=16)
def _bands_and_rows(threshold: float) -> tuple[int, int]:
    """With the least weighted error over all similarities."""

    def error(shape: tuple[int, int]) -> float:
        missed = (1 - threshold) - met(shape, threshold, 1)
        return (1 - _MISSED_WEIGHT) * met(shape, 0, threshold) + _MISSED_WEIGHT * missed

    def met(shape: tuple[int, int], low: float, high: float) -> float:
        (count, rows), step = shape, (high - low) / _STEPS
        return step * sum(
            1 - (1 - (low + (at + 0.5) * step) ** rows) ** count for at in range(_STEPS)
        )

    counts = range(1, PERMUTATIONS + 1)
    return min(
        ((count, rows) for count in counts for rows in range(1, PERMUTATIONS // count + 1)),
        key=error,
    )
