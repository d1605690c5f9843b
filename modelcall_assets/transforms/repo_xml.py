"""The preprocessor `repo_xml`: a row for each packed repository, a partition for each language.

A pack is Repomix XML, its parsable style, or cxml as RenderGit writes it. Tags are looked for, XML
is not parsed: most packs are not XML, and no entity is ever expanded.
"""

import html
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

from modelcall_assets.errors import InputError
from modelcall_assets.records.outcome import Row
from modelcall_assets.transforms.preprocessor import Copied, Kind

_TOOLS = {".xml": "repomix", ".cxml": "rendergit"}
_NAME = re.compile(r"([^_]+)_(.+)_([0-9a-fA-F]+)")
"""No user on GitHub has an underscore, repositories may."""
_CONTINUATION = bytes(range(0x80, 0xC0))
_AT_ONCE = 1 << 14
_COLUMNS: dict[str, Kind] = {
    **dict.fromkeys(("text", "source", "repo_user", "repo_name", "repo_full_name"), "string"),
    **dict.fromkeys(("commit_hash", "language", "packaging_tool"), "string"),
    **dict.fromkeys(("files_with_content", "total_lines"), "int"),
    "avg_lines_per_file": "float",
    **dict.fromkeys(("has_readme", "has_license", "has_gitignore"), "bool"),
    **dict.fromkeys(("content_length", "content_lines"), "int"),
    "avg_line_length": "float",
    **dict.fromkeys(("file_types", "xml_file_path", "file_extension", "pack_problem"), "string"),
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
            expected = "<language>/<user>_<repository>_<commit>.xml or .cxml"
            raise InputError(f"no packs; expected {expected}")
        wanted = self._languages or languages
        if missing := sorted(set(wanted) - set(languages)):
            there = ", ".join(languages)
            raise InputError(f"languages: no packs for {', '.join(missing)}; there are: {there}")
        return {name: packs for name, packs in languages.items() if name in wanted}

    def columns(self, names: Sequence[str]) -> dict[str, Copied | Kind]:
        return {**_COLUMNS}

    def process_item(self, item: Row) -> Row:
        """`text` of the item is bytes. ValueError when it is no pack."""
        text: bytes = item["text"]
        path = PurePosixPath(item["path"])
        pack = read_pack(text)
        repository = _NAME.fullmatch(path.stem)
        user, name, commit = repository.groups() if repository else ("", "", "")
        with_content = sum(not file.is_blank for file in pack.files)
        total_lines = sum(file.lines for file in pack.files)
        names = [file.path.lower() for file in pack.files]
        suffixes = Counter(PurePosixPath(name).suffix[1:] for name in names)
        by_count = sorted(suffixes.items(), key=lambda item: (-item[1], item[0]))
        length, lines = _characters(text), text.count(b"\n") + 1
        return {
            "text": text,
            "source": "repo_xml",
            "repo_user": user,
            "repo_name": name,
            "repo_full_name": f"{user}/{name}" if repository else "",
            "commit_hash": commit,
            "language": path.parts[0],
            "packaging_tool": _TOOLS[path.suffix.lower()],
            "files_with_content": with_content,
            "total_lines": total_lines,
            "avg_lines_per_file": round(total_lines / with_content, 2) if with_content else 0.0,
            "has_readme": any("readme" in name for name in names),
            "has_license": any("license" in name for name in names),
            "has_gitignore": any(file.path == ".gitignore" for file in pack.files),
            "content_length": length,
            "content_lines": lines,
            "avg_line_length": round(length / lines, 2),
            "file_types": json.dumps(dict(by_count), ensure_ascii=False),
            "xml_file_path": item["uri"],
            "file_extension": path.suffix.lower(),
            "pack_problem": pack.problem,
        }


def _characters(text: bytes) -> int:
    """A little at a time: above 64 KB the allocator would keep up to half the size of `text`."""
    parts = (text[at : at + _AT_ONCE] for at in range(0, len(text), _AT_ONCE))
    return sum(len(part.translate(None, _CONTINUATION)) for part in parts)


class PackedFile(NamedTuple):
    """One file; `lines` are newlines + 1, or 0 when it is empty."""

    path: str
    lines: int
    is_blank: bool


class Pack(NamedTuple):
    files: list[PackedFile]
    problem: str | None


def read_pack(data: bytes) -> Pack:
    """In linear time and without copies. ValueError when there is no file in it."""
    for begin, tags in _blocks(data):
        pack = _Reader(data, tags).read(begin)
        if pack.files:
            return pack
    raise ValueError(
        'no files in it: neither <file path="…"> in a <files> block, as Repomix writes them,'
        " nor <document> with <source> in a <documents> block, as RenderGit does"
    )


class _Tags(NamedTuple):
    """How a format marks its files. `any` has one group of path, close and end."""

    any: re.Pattern[bytes]
    after_close: re.Pattern[bytes]
    """What stands behind a closing tag that is none of the content's."""
    after_end: re.Pattern[bytes]


_BLANKS = rb"[ \t\r\n]*+"
_EOL = rb"[ \t\r]*+(?=\n|\Z)"


def _on_own_lines(opening: bytes, closing: bytes, end: bytes, sections: bytes) -> _Tags:
    """Patterns without their `<`: `re` looks for `\\n<` 9 times as fast as for `^`."""
    return _Tags(
        re.compile(rb"\n<(?:%b|(?P<close>%b)|(?P<end>%b))%b" % (opening, closing, end, _EOL)),
        re.compile(rb"%b(?:\Z|(?<=\n)<(?:%b|(?P<end>%b))%b)" % (_BLANKS, opening, end, _EOL)),
        re.compile(rb"%b(?:\Z|(?<=\n)<(?:%b)>)" % (_BLANKS, sections)),
    )


_REPOMIX = _on_own_lines(
    rb'file path="(?P<path>[^\n]{1,4096})">',
    rb"/file>",
    rb"/files>",
    rb"git_diffs|git_logs|instruction",
)
_CXML = _on_own_lines(
    rb"document(?: [^\n>]{1,200})?>%b\n" % _EOL
    + rb"<source>(?P<path>[^\n]{1,4096})</source>%b\n<document_content>" % _EOL,
    rb"/document_content>%b\n</document>" % _EOL,
    rb"/documents>",
    rb"(?!)",
)
_PARSABLE = _Tags(
    re.compile(rb'<(?:file path="(?P<path>[^"<]{1,4096}+)">|(?P<close>/file>)|(?P<end>/files>))'),
    re.compile(rb'%b(?:\Z|<(?:file path="[^"<]{1,4096}+">|(?P<end>/files>)))' % _BLANKS),
    re.compile(rb""),
)

_PROLOG = re.compile(
    rb"(?:\xef\xbb\xbf)?(?:\s++|<\?[^>]*+>|<!DOCTYPE[^\[>]*+(?:\[[^\]]*+\]\s*+)?>)*+<repomix>"
)
_BLOCK = re.compile(rb"^(?:\xef\xbb\xbf)?<(files|documents)>" + _EOL, re.M)
_FORMATS = {b"files": _REPOMIX, b"documents": _CXML}
_FIRST_EOL = re.compile(rb"\r?\n")
_INK = re.compile(rb"\S")
_REFERENCE = re.compile(r"&(?:amp|lt|gt|quot|apos|#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6});")


def _blocks(data: bytes) -> Iterator[tuple[int, _Tags]]:
    if (prolog := _PROLOG.match(data)) and (at := data.find(b"<files>", prolog.end())) >= 0:
        yield at + len(b"<files>"), _PARSABLE
    formats = dict(_FORMATS)
    for block in _BLOCK.finditer(data):
        if tags := formats.pop(block[1], None):
            yield block.end(), tags


class _Reader:
    """What looks like a tag inside a file is content unless it can be the file's end."""

    def __init__(self, data: bytes, tags: _Tags) -> None:
        self._data, self._tags = data, tags
        self._files: list[PackedFile] = []
        self._problem: str | None = None
        self._open: str | None = None
        """The path of the file that is being read; its content begins at `_start`."""
        self._start = 0
        self._likely_end: int | None = None
        """Where it ends if no closing tag follows."""

    def read(self, begin: int) -> Pack:
        for tag in self._tags.any.finditer(self._data, begin):
            if tag.lastgroup == "close":
                self._closing(tag)
            elif self._open is not None:
                (self._doubt if tag.lastgroup == "path" else self._block_end)(tag)
            elif tag.lastgroup == "path":
                path = tag["path"].decode(errors="replace")
                self._open = _REFERENCE.sub(lambda found: html.unescape(found[0]), path)
                self._start, self._likely_end = tag.end(), None
            else:
                return Pack(self._files, self._problem)
        if self._open is None:
            return Pack(self._files, self._problem or "the block of files is not closed")
        self._problem = self._problem or f"{self._open}: not closed"
        self._close(self._likely_end or len(self._data))
        return Pack(self._files, self._problem)

    def _closing(self, tag: re.Match[bytes]) -> None:
        if self._open is None:
            self._report(tag, "closes no file")
        elif not (after := self._tags.after_close.match(self._data, tag.end())):
            self._doubt(tag)
        elif after["end"] and not self._tags.after_end.match(self._data, after.end()):
            self._block_end(tag)
        else:
            self._close(self._position(tag))

    def _block_end(self, tag: re.Match[bytes]) -> None:
        """Only likely: in the middle of a file, or before what no pack goes on with."""
        self._doubt(tag)
        if self._likely_end is None:
            self._likely_end = self._position(tag)

    def _close(self, end: int) -> None:
        """The line ends next to the tags are not content."""
        assert self._open is not None
        data, start = self._data, self._start
        if first := _FIRST_EOL.match(data, start, end):
            start = first.end()
        end -= data.endswith(b"\n", start, end)
        end -= data.endswith(b"\r", start, end)
        lines = data.count(b"\n", start, end) + 1 if start < end else 0
        is_blank = _INK.search(data, start, end) is None
        self._files.append(PackedFile(self._open, lines, is_blank))
        self._open = None

    def _doubt(self, tag: re.Match[bytes]) -> None:
        self._report(tag, f"may be a tag or content of {self._open}")

    def _report(self, tag: re.Match[bytes], what: str) -> None:
        if self._problem is None:
            at = self._position(tag)
            line = self._data.count(b"\n", 0, at) + 1
            shown = self._data[at : min(tag.end(), at + 80)].decode(errors="replace")
            self._problem = f"line {line}: {shown.splitlines()[0].rstrip()} {what}"

    def _position(self, tag: re.Match[bytes]) -> int:
        return self._data.index(b"<", tag.start())
