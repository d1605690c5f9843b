"""The language of a file of code, by its name or its content, and of a text."""

from __future__ import annotations

import re
from functools import cache, lru_cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from magika import Magika

_SUFFIX = re.compile(r"(?<=[^./\\])\.[^./\\]+$")
_USUAL = {
    "a.ipynb": "Jupyter Notebook",
    "a.pl": "Perl",
    "a.r": "R",
    "a.sql": "SQL",
    "a.v": "Verilog",
}
"""Where Pygments does not know the suffix, or takes it for a rare language's."""
_NAME_CHARS = 255
"""Of a path: the column can hold anything."""
_CODE_CHARS, _TEXT_CHARS = 64_000, 4_000
"""Of a content or text: more does not tell more."""


class LanguageError(ValueError):
    """The package that tells the languages of code is not installed."""


class TextLanguageError(ValueError):
    """Nor is that for texts."""


def language_of_name(path: str) -> str | None:
    """`src/main.rs` → `Rust`, `Makefile` → `Makefile`; None when the name says nothing. Names are
    those of Pygments."""
    name = re.split(r"[/\\]", path[-_NAME_CHARS:])[-1]
    suffix = _SUFFIX.search(name)
    return (suffix and _looked_up(f"a{suffix.group().lower()}")) or _looked_up(name)


def language_of_content(text: str) -> str | None:
    """As Magika names it; None when that does not take it for code. LanguageError."""
    if not text.strip():
        return None
    found = _magika().identify_bytes(text[:_CODE_CHARS].encode("utf-8", "replace")).output
    return found.description.removesuffix(" source") if found.group == "code" else None


@lru_cache(10_000)
def _looked_up(name: str) -> str | None:
    if name in _USUAL:
        return _USUAL[name]
    from pygments.lexers import find_lexer_class_for_filename

    lexer = find_lexer_class_for_filename(name)
    return lexer.name if lexer is not None and lexer.name != "Text only" else None


@cache
def _magika() -> Magika:
    try:
        from magika import Magika
    except ImportError as error:
        raise LanguageError(
            "the package magika is not installed; pip install 'modelcall-assets[code-language]'"
        ) from error
    return Magika()


def text_language(text: str) -> str | None:
    """An ISO 639-1 code such as `en`; None for a text without a letter. TextLanguageError."""
    head = text[:_TEXT_CHARS]
    if not any(map(str.isalpha, head)):
        return None
    try:
        classify: Any = import_module("py3langid").classify
    except ImportError as error:
        raise TextLanguageError(
            "the package py3langid is not installed; pip install 'modelcall-assets[text-language]'"
        ) from error
    return str(classify(head)[0])
