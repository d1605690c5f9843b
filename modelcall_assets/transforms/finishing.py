"""What every preprocessed row gets, whatever made it: clean of secrets, an id, a truncated text."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from modelcall_assets.records.outcome import Dropped, Row
from modelcall_assets.transforms.languages import text_language
from modelcall_assets.transforms.near_duplicates import signature
from modelcall_assets.transforms.preprocessor import Kind, as_text
from modelcall_assets.transforms.tokens import DEFAULT_ENCODING, tokenizer

LANGUAGE_COLUMN = "text_language"


class Scrubber(Protocol):
    """Takes out of a text what should not be in it, such as names and secrets."""

    def scrub(self, text: str) -> tuple[str, Mapping[str, int]]:
        """The text without it, and how many of what kind were taken out."""
        ...


class Finished(NamedTuple):
    """A row as it is published."""

    row: Row
    removed: Mapping[str, int]
    """By kind."""
    digest: bytes | None
    """Of the text, where duplicates are looked for."""
    signature: bytes | None
    """Where near ones are."""


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
        text, removed = self._scrubbed(row.get("text"))
        row = {**row, "text": text} if removed else row
        row["id"] = as_text(row.get("id")) or identity
        if self.languages is not None:
            language = text_language(_as_str(text)) if text else None
            if self.languages and language not in self.languages:
                return Dropped(f"language_id: {language or 'none'}")
            row[LANGUAGE_COLUMN] = language
        row[truncated_column(self.max_tokens)] = self._truncated(text) if text else None
        if not text or not (self.exact or self.near):
            return Finished(row, removed, None, None)
        content = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
        digest = hashlib.blake2b(content, digest_size=16).digest()
        return Finished(row, removed, digest, signature(_as_str(text)) if self.near else None)

    def columns(self) -> dict[str, Kind]:
        """What it adds, in order."""
        language: dict[str, Kind] = {} if self.languages is None else {LANGUAGE_COLUMN: "string"}
        return {"id": "string", **language, truncated_column(self.max_tokens): "string"}

    def _scrubbed(self, text: Any) -> tuple[Any, dict[str, int]]:
        removed: dict[str, int] = {}
        if not text or not self.scrubbers:
            return text, removed
        text = _as_str(text)
        for scrubber in self.scrubbers:
            text, counts = scrubber.scrub(text)
            for kind, count in counts.items():
                removed[kind] = removed.get(kind, 0) + count
        return text, removed

    def _truncated(self, text: str | bytes) -> str:
        tokens = tokenizer(self.encoding)
        if isinstance(text, bytes):
            return tokens.truncate_utf8(text, self.max_tokens)
        return tokens.truncate(text, self.max_tokens)


def truncated_column(max_tokens: int) -> str:
    """32768 → `content_truncate_32k`."""
    return f"content_truncate_{max_tokens // 1024}k"


def _as_str(text: str | bytes) -> str:
    return text.decode() if isinstance(text, bytes) else text
