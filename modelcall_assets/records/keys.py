"""Partition keys: an input file's relative path, safe for Dagster and its UI, and back.

Dagster accepts any key when it is added, then cannot backfill one that holds a comma, a control
character, `...`, `|` or leading or trailing space. Those, and `%` itself, are percent-encoded.
"""

from __future__ import annotations

import re
from urllib.parse import unquote

_UNSAFE = re.compile(
    r"[%,|\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]|\.(?=\.\.)|(?<=\.)\.(?=\.)|^\s|\s$"
)


def encode_key(relative_path: str) -> str:
    """`a,b.jsonl` → `a%2Cb.jsonl`. Inverse of `decode_key` for every path."""
    return _UNSAFE.sub(lambda match: _percent(match.group()), relative_path)


def decode_key(key: str) -> str:
    """`a%2Cb.jsonl` → `a,b.jsonl`."""
    return unquote(key, errors="surrogateescape")


def _percent(char: str) -> str:
    return "".join(f"%{byte:02X}" for byte in char.encode("utf-8", "surrogateescape"))
