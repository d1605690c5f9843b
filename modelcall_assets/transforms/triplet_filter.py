"""The preprocessor `triplet_filter`: filtered packs as rows, in parts, a partition per language."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import ClassVar

from modelcall_assets.errors import InputError
from modelcall_assets.records.data_files import DATA_SUFFIXES, stem_of
from modelcall_assets.records.outcome import Row
from modelcall_assets.transforms.preprocessor import Copied, Kind

PREFIX = "pt_data_"
UNKNOWN = "Unknown"
FACTS = {
    "repo_full_name": "Code Repository",
    "language": UNKNOWN,
    "files_with_content": "Multiple",
    "total_lines": "Large",
    "has_readme": UNKNOWN,
    "has_license": UNKNOWN,
    "has_gitignore": UNKNOWN,
}
"""What the packaging prompt asks for and these rows do not know."""
_PART = re.compile(r"(?P<language>.+)_part(?P<number>\d*)")


@dataclass(frozen=True, slots=True)
class TripletFilter:
    """Takes `pt_data_<Language>[_part<NN>].jsonl`; `languages` are exact names, None all."""

    languages: Sequence[str] | None = None

    own_columns: ClassVar = tuple(FACTS)

    def get_file_list(self, paths: Sequence[str]) -> dict[str, list[str]]:
        """InputError when there is no such file, or none of a language that was asked for."""
        found: dict[str, list[tuple[int, str]]] = {}
        for path in paths:
            if (named := _language_and_part(path)) is not None:
                language, part = named
                found.setdefault(language, []).append((part, path))
        if not found:
            raise InputError(f"no file is called {PREFIX}<Language>_part<NN>.jsonl")
        if self.languages is None:
            wanted = sorted(found)
        else:
            wanted = [name for name in found if PurePosixPath(name).name in self.languages]
            there = {PurePosixPath(name).name for name in found}
            if absent := [name for name in self.languages if name not in there]:
                names = ", ".join(sorted(there))
                raise InputError(f"no parts of {', '.join(absent)}; there are: {names}")
        return {name: [path for _, path in sorted(found[name])] for name in sorted(wanted)}

    def process_item(self, item: Row) -> Row:
        """TypeError when the text is not a string."""
        text = item.get("text")
        if not isinstance(text, str | None):
            raise TypeError(f"the text is not a string but of type {type(text).__name__}")
        facts = FACTS if text else dict.fromkeys(FACTS)
        row = {**item, **facts, "text": text}
        if text and item.get("lg"):
            row["language"] = str(item["lg"])
        return row

    def columns(self, names: Sequence[str]) -> dict[str, Copied | Kind]:
        result: dict[str, Copied | Kind] = {name: Copied(name) for name in names}
        result.update(dict.fromkeys(("text", *FACTS), "string"))
        return result


def _language_and_part(path: str) -> tuple[str, int] | None:
    """The partition, which begins with the folder, and the number of a part; -1 for a file that is
    not in parts."""
    file = PurePosixPath(path)
    if not file.name.startswith(PREFIX) or not file.name.lower().endswith(DATA_SUFFIXES):
        return None
    name = stem_of(file.name).removeprefix(PREFIX)
    part = _PART.fullmatch(name)
    language = part["language"] if part else name
    number = int(part["number"] or -1) if part else -1
    return (str(file.parent / language), number) if language else None
