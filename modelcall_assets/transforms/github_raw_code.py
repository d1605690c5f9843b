"""The preprocessor `github_raw_code`: source code, whatever the column of its text is called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from modelcall_assets.records.outcome import Row
from modelcall_assets.transforms.code_language import language_of_content, language_of_name
from modelcall_assets.transforms.preprocessor import Copied, Kind, as_text, text_of

TEXT_COLUMNS = ("text", "content", "code", "body", "description")
PATH_COLUMNS = ("path", "file_path", "filepath", "filename", "file_name", "name")


@dataclass(frozen=True, slots=True)
class GithubRawCode:
    """`by_content` looks at the text where the file's name does not tell its language;
    `source_name` is for rows that have no `source`."""

    by_content: bool = False
    source_name: str = "github_raw_code"

    def process_item(self, item: Row) -> Row:
        """KeyError when the row has no text column, TypeError when that is not a string."""
        text = text_of(item, TEXT_COLUMNS)
        if text is None:
            raise KeyError(f"none of the columns {', '.join(TEXT_COLUMNS)}")
        return {
            **item,
            "text": text,
            "source": as_text(item.get("source")) or self.source_name,
            "language": as_text(item.get("language")) or self._language(item, text),
        }

    def columns(self, names: Sequence[str]) -> dict[str, Copied | Kind]:
        copied: dict[str, Copied | Kind] = {name: Copied(name) for name in names}
        return {**copied, "text": "string", "source": "string", "language": "string"}

    def _language(self, item: Row, text: str) -> str | None:
        paths = (item.get(name) for name in PATH_COLUMNS)
        named = (language_of_name(path) for path in paths if path and isinstance(path, str))
        known = next(filter(None, named), None)
        return known or (language_of_content(text) if self.by_content else None)
