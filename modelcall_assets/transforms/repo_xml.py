"""The repo_xml preprocessor: a row for each packed repository, a partition for each language."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath

from modelcall_assets.errors import InputError
from modelcall_assets.records.outcome import Row
from modelcall_assets.transforms.packs import PackedFile, read_pack
from modelcall_assets.transforms.preprocessor import Copied, Kind

_TOOLS = {".xml": "repomix", ".cxml": "rendergit"}
_NAME = re.compile(r"([^_]+)_(.+)_([0-9a-fA-F]+)")
_COLUMNS: dict[str, Kind] = {
    "text": "string",
    "source": "string",
    "repo_user": "string",
    "repo_name": "string",
    "repo_full_name": "string",
    "commit_hash": "string",
    "language": "string",
    "packaging_tool": "string",
    "files_with_content": "int",
    "total_lines": "int",
    "avg_lines_per_file": "float",
    "has_readme": "bool",
    "has_license": "bool",
    "has_gitignore": "bool",
    "content_length": "int",
    "content_lines": "int",
    "avg_line_length": "float",
    "file_types": "string",
    "xml_file_path": "string",
    "file_extension": "string",
    "pack_problem": "string",
}


class RepoXml:
    """`languages`: the folders to take, all without it. Packs are Repomix XML or RenderGit cxml,
    called `<user>_<repository>_<commit>.xml` or `.cxml`."""

    reads_bytes = True

    def __init__(self, languages: Sequence[str] | None = None) -> None:
        if isinstance(languages, str):
            raise ValueError(f"languages: expected a list of folders, not {languages!r}")
        self._languages = languages

    def get_file_list(self, paths: Sequence[str]) -> dict[str, list[str]]:
        """language → its packs. InputError when one has none, or a pack is in no folder."""
        packs = sorted(path for path in paths if PurePosixPath(path).suffix.lower() in _TOOLS)
        languages: dict[str, list[str]] = {}
        for path in packs:
            language, inside, _ = path.partition("/")
            if not inside:
                raise InputError(f"{path}: in no folder; move it to the folder of its language")
            languages.setdefault(language, []).append(path)
        if not languages:
            raise InputError(
                "no packs; expected <language>/<user>_<repository>_<commit>.xml or .cxml"
            )
        return self._asked_for(languages)

    def columns(self, names: Sequence[str]) -> dict[str, Copied | Kind]:
        return {**_COLUMNS}

    def process_item(self, item: Row) -> Row:
        """`text` of the item is bytes. ValueError when it is no pack."""
        text: bytes = item["text"]
        path = PurePosixPath(item["path"])
        pack = read_pack(text)
        return {
            "text": text,
            "source": "repo_xml",
            **_repository(path.stem),
            "language": path.parts[0],
            "packaging_tool": _TOOLS[path.suffix.lower()],
            **_file_columns(pack.files),
            **_text_columns(text),
            "file_types": _file_types(file.path for file in pack.files),
            "xml_file_path": item["uri"],
            "file_extension": path.suffix.lower(),
            "pack_problem": pack.problem,
        }

    def _asked_for(self, languages: dict[str, list[str]]) -> dict[str, list[str]]:
        if not self._languages:
            return languages
        missing = sorted(set(self._languages) - set(languages))
        if missing:
            there = ", ".join(languages)
            raise InputError(f"languages: no packs for {', '.join(missing)}; there are: {there}")
        return {name: packs for name, packs in languages.items() if name in self._languages}


def _repository(stem: str) -> Row:
    """No user on GitHub has an underscore, repositories may."""
    found = _NAME.fullmatch(stem)
    user, name, commit = found.groups() if found else ("", "", "")
    return {
        "repo_user": user,
        "repo_name": name,
        "repo_full_name": f"{user}/{name}" if found else "",
        "commit_hash": commit,
    }


def _file_columns(files: Sequence[PackedFile]) -> Row:
    with_content = sum(not file.is_blank for file in files)
    lines = sum(file.lines for file in files)
    names = [file.path.lower() for file in files]
    return {
        "files_with_content": with_content,
        "total_lines": lines,
        "avg_lines_per_file": round(lines / with_content, 2) if with_content else 0.0,
        "has_readme": any("readme" in name for name in names),
        "has_license": any("license" in name for name in names),
        "has_gitignore": any(file.path == ".gitignore" for file in files),
    }


def _text_columns(text: bytes) -> Row:
    length = _characters(text)
    lines = text.count(b"\n") + 1
    return {
        "content_length": length,
        "content_lines": lines,
        "avg_line_length": round(length / lines, 2),
    }


_CONTINUATION = bytes(range(0x80, 0xC0))
_CHUNK = 1 << 14


def _characters(text: bytes) -> int:
    """In small chunks: of those above 64 KB the allocator keeps up to half the size of `text`."""
    chunks = (text[at : at + _CHUNK] for at in range(0, len(text), _CHUNK))
    return sum(len(chunk.translate(None, _CONTINUATION)) for chunk in chunks)


def _file_types(paths: Iterable[str]) -> str:
    counts = Counter(PurePosixPath(path).suffix[1:].lower() for path in paths)
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return json.dumps(dict(ordered), ensure_ascii=False)
