"""The natural language of a text, by the package py3langid."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HEAD_CHARS = 4_000
"""Of a text: more does not tell more."""


class TextLanguageError(ValueError):
    """Languages cannot be told: the package for it is missing."""


def text_language(text: str) -> str | None:
    """An ISO 639-1 code such as `en`; None for a text without a letter. TextLanguageError."""
    head = text[:_HEAD_CHARS]
    if not any(map(str.isalpha, head)):
        return None
    try:
        classify: Any = import_module("py3langid").classify
    except ImportError as error:
        raise TextLanguageError(
            "the package py3langid is not installed; pip install 'modelcall-assets[text-language]'"
        ) from error
    return str(classify(head)[0])
