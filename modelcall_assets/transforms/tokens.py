"""Exact token budgets. The vocabularies ship with bpe-openai: nothing is downloaded.

Its low-level tokenizer is used: it takes text of any length, and the text of a special token
(`<|endoftext|>`) is plain text to it.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bpe_openai._bindings import PyTokenizer

DEFAULT_ENCODING = "o200k_base"
_CHARS_PER_TOKEN = 4


def count_tokens(text: str, encoding: str = DEFAULT_ENCODING) -> int:
    return _tokenizer(encoding).count(text)


def truncate(text: str, max_tokens: int, encoding: str = DEFAULT_ENCODING) -> str:
    """The longest run of whole tokens from the start of `text` that ends between two characters
    and, counted anew, is at most `max_tokens` tokens."""
    if max_tokens <= 0:
        return ""
    if len(text) <= max_tokens and len(text.encode()) <= max_tokens:
        return text  # a token is at least one byte
    tokenizer = _tokenizer(encoding)
    head = _over_budget(tokenizer, text, max_tokens)
    if head is None:
        return text
    tokens = tokenizer.encode(head)
    for size in range(max_tokens, 0, -1):
        try:
            prefix = tokenizer.decode(tokens[:size])
        except ValueError:  # the cut is inside a character
            continue
        if tokenizer.count(prefix) <= max_tokens:  # a cut can change how its end is split
            return prefix
    return ""


def _over_budget(tokenizer: PyTokenizer, text: str, max_tokens: int) -> str | None:
    """A prefix that exceeds the budget, so that the rest need not be tokenised; None when the
    whole text is within it."""
    size = max_tokens * _CHARS_PER_TOKEN
    while size < len(text):
        head = text[:size]
        if tokenizer.count_till_limit(head, max_tokens) is None:
            return head
        size *= 2
    return text if tokenizer.count_till_limit(text, max_tokens) is None else None


@cache
def _tokenizer(encoding: str) -> PyTokenizer:
    with warnings.catch_warnings():  # its import opens resources in a deprecated way
        warnings.simplefilter("ignore", DeprecationWarning)
        from bpe_openai._bindings import tokenizer_for_encoding

    return tokenizer_for_encoding(encoding)
