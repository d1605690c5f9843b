"""What is told of a text: its tokens, its language, how alike it is to another.

Token budgets are exact, for the encodings of `bpe_openai`, whose vocabularies ship with it, and for
any Hugging Face `tokenizer.json`; the text of a special token (`<|endoftext|>`) is plain text. How
alike two texts are is estimated from a few bytes of each: MinHash over shingles of words.
"""

import hashlib
import re
import struct
import unicodedata
from abc import ABC, abstractmethod
from codecs import utf_8_decode
from collections.abc import Iterable, Sequence
from functools import cache, lru_cache
from importlib import import_module
from importlib.machinery import PathFinder
from importlib.util import find_spec, module_from_spec
from operator import eq
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bpe_openai._bindings import PyTokenizer

DEFAULT_ENCODING = "o200k_base"
ENCODINGS = (DEFAULT_ENCODING, "cl100k_base")
"""Not voyage3_base: it normalises, so that its tokens do not spell the text."""

_CHUNK = 2048
"""Characters."""
_REACH = 1000
"""Characters after a chunk in which a boundary is looked for."""
_MARGIN = 64
"""Tokens beyond the budget that a head needs: its end changes how the little before is split."""
_BOUNDARY = re.compile(
    r"\S(?= )"
    r"|\n(?=[^\s/])"
    r"|[A-Za-z](?=[0-9])"
    r"|[0-9A-Za-zぁ-ゖァ-ヺ一-龥](?=[!-&(-/:-@\[-`{-~、。，：；！？])"
)
"""Each match ends where the patterns of ENCODINGS split any text, whatever comes before and after:
the tokens of the two sides are the tokens of the whole. An apostrophe is no such place (`it's`)."""

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


EXTRAS = {
    "tokenizers": "tokenizers",
    "py3langid": "text-language",
    "magika": "code-language",
    "rensa": "near-dedup",
}
"""Optional packages → the extra that installs each."""


class ToolError(ValueError):
    """A tokenizer or package that is not here; the message says what to do."""


def tool(package: str) -> Any:
    """One of EXTRAS; ToolError."""
    try:
        return import_module(package)
    except ImportError as error:
        install = f"pip install 'modelcall-assets[{EXTRAS[package]}]'"
        raise ToolError(f"the package {package} cannot be imported ({error}); {install}") from error


class Tokenizer(ABC):
    """Results depend on nothing but the arguments and the vocabulary."""

    @abstractmethod
    def count(self, text: str) -> int: ...

    def truncate(self, text: str, max_tokens: int) -> str:
        """The longest run of whole tokens from the start of `text` that ends between two characters
        and, counted anew, is at most `max_tokens` tokens."""
        return (self._cut(text, max_tokens, whole=True) or "") if max_tokens > 0 else ""

    def truncate_utf8(self, data: bytes, max_tokens: int) -> str:
        """`truncate(data.decode(), max_tokens)`. No more is decoded than it takes."""
        size = 8 * max(max_tokens, 0) + 4 * (_CHUNK + _REACH)
        while size < len(data):
            head, _ = utf_8_decode(data[:size], "strict", False)
            cut = self._cut(head, max_tokens, whole=False) if max_tokens > 0 else ""
            if cut is not None:
                return cut
            size *= 4
        return self.truncate(data.decode(), max_tokens)

    @abstractmethod
    def _cut(self, text: str, max_tokens: int, *, whole: bool) -> str | None:
        """Unless `whole`, `text` is the start of a longer one: None when it is too little."""


@cache
def tokenizer(name: str = DEFAULT_ENCODING) -> Tokenizer:
    """`name` is one of ENCODINGS or a `tokenizer.json`, read once per process. ToolError."""
    if name in ENCODINGS:
        return BpeTokenizer(name)
    if name.endswith(".json"):
        return HuggingFaceTokenizer(name)
    known = ", ".join(ENCODINGS)
    raise ToolError(f"unknown tokenizer {name!r}: expected {known} or a path that ends in .json")


def count_tokens(text: str, encoding: str = DEFAULT_ENCODING) -> int:
    return tokenizer(encoding).count(text)


class BpeTokenizer(Tokenizer):
    """One of ENCODINGS. A text is counted in chunks of about `chunk` characters that end at a
    boundary, and only the chunk that exceeds the budget is encoded. Where there is none it must do
    so by a margin: then the tokens within the budget are those of the whole text."""

    def __init__(self, encoding: str, chunk: int = _CHUNK) -> None:
        self._bpe: PyTokenizer = _bindings().tokenizer_for_encoding(encoding)
        self._chunk = chunk

    def count(self, text: str) -> int:
        return self._bpe.count(text)

    def _cut(self, text: str, max_tokens: int, *, whole: bool) -> str | None:
        if whole and len(text) <= max_tokens and len(text.encode()) <= max_tokens:
            return text  # a token is at least one byte
        start, left, size = 0, max_tokens, self._chunk
        while whole or start + size + _REACH < len(text):
            end, margin = len(text), 0
            if start + size + _REACH < end:
                boundary = _BOUNDARY.search(text, start + size, start + size + _REACH)
                end, margin = (boundary.end(), 0) if boundary else (start + size, _MARGIN)
            chunk = text[start:end]
            count = self._bpe.count_till_limit(chunk, left + margin)
            if count is None:
                return text[: start + self._length_within(chunk, left)]
            if end == len(text):
                return text
            if margin:
                size *= 2
            else:
                start, left, size = end, left - count, self._chunk
        return None

    def _length_within(self, text: str, max_tokens: int) -> int:
        """The length of the prefix of `text`, which exceeds the budget, that is within it."""
        tokens = self._bpe.encode(text)
        for size in range(max_tokens, 0, -1):
            try:
                prefix = self._bpe.decode(tokens[:size])
            except ValueError:  # the cut is inside a character
                continue
            if self._bpe.count(prefix) <= max_tokens:  # a cut can change how its end is split
                return len(prefix)
        return 0


@cache
def _bindings() -> Any:
    """The part of bpe_openai that is needed: to import the package is to load three vocabularies
    into Python, which takes 0.4 s and 60 MB in every process."""
    package = find_spec("bpe_openai")
    assert package is not None and package.submodule_search_locations is not None
    spec = PathFinder.find_spec("_bindings", [*package.submodule_search_locations])
    assert spec is not None and spec.loader is not None
    bindings = module_from_spec(spec)
    spec.loader.exec_module(bindings)
    return bindings


class HuggingFaceTokenizer(Tokenizer):
    def __init__(self, path: str) -> None:
        tokenizers = tool("tokenizers")
        try:
            read: Any = tokenizers.Tokenizer.from_file(path)
        except Exception as error:  # the package raises no narrower type
            raise ToolError(
                f"{path}: cannot be read ({error}); expected a Hugging Face tokenizer.json"
            ) from error
        read.encode_special_tokens = True
        read.no_padding()
        read.no_truncation()
        if getattr(read.model, "dropout", None):
            read.model.dropout = None
        self._tokenizer = read

    def count(self, text: str) -> int:
        return len(self._offsets(text))

    def _cut(self, text: str, max_tokens: int, *, whole: bool) -> str | None:
        size = _CHUNK
        while whole or size < len(text):
            head = text[:size]
            offsets = self._offsets(head)
            if len(offsets) > max_tokens + (_MARGIN if size < len(text) else 0):
                return self._within(head, offsets, max_tokens)
            if size >= len(text):
                return text
            tokens_wanted = 1.1 * (max_tokens + _MARGIN)
            size = _CHUNK + int(size * tokens_wanted / max(len(offsets), 1))
        return None

    def _within(self, text: str, offsets: Sequence[tuple[int, int]], max_tokens: int) -> str:
        for size in range(max_tokens, 0, -1):
            end = offsets[size - 1][1]
            inside_a_character = offsets[size][0] < end
            if not inside_a_character and self.count(text[:end]) <= max_tokens:
                return text[:end]
        return ""

    def _offsets(self, text: str) -> Sequence[tuple[int, int]]:
        return self._tokenizer.encode(text, add_special_tokens=False).offsets


def text_language(text: str) -> str | None:
    """An ISO 639-1 code such as `en`; None for a text without a letter. ToolError."""
    head = text[:_LANGUAGE_CHARS]
    if not any(map(str.isalpha, head)):
        return None
    return str(tool("py3langid").classify(head)[0])


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


def _minhash() -> Any:
    return tool("rensa").RMinHash


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
