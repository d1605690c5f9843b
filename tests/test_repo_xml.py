"""Repository packs: what is read out of them, and the rows and partitions of repo_xml."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from packs import checkout, lines_of, parsable_xml, rendergit_cxml, repomix_xml, tracked_texts

from modelcall_assets.errors import InputError
from modelcall_assets.transforms.preprocessor import Declared, Grouping
from modelcall_assets.transforms.repo_xml import Pack, RepoXml, read_pack

ROOT = Path(__file__).parent.parent
FILES = {
    "README.md": "# Title\n\nText.\n",
    "src/a.py": "print('ä')\nprint(2)",
    "src/empty.py": "",
    "src/blank.py": " \n\t\n",
    ".gitignore": "build\n",
}
Packer = Callable[[Mapping[str, str]], bytes]
PACKERS: list[Packer] = [repomix_xml, rendergit_cxml, parsable_xml]
RAW: list[Packer] = [repomix_xml, rendergit_cxml]


def named(packers: list[Packer]) -> Any:
    return pytest.mark.parametrize("packer", packers, ids=lambda packer: packer.__name__)


def trimmed(files: Mapping[str, str]) -> dict[str, str]:
    return {path: content.strip() for path, content in files.items()}


def lines(pack: Pack) -> dict[str, int]:
    assert len({file.path for file in pack.files}) == len(pack.files)
    return {file.path: file.lines for file in pack.files}


def expected(files: Mapping[str, str]) -> dict[str, int]:
    return {path: lines_of(content) for path, content in files.items()}


def text(*parts: str) -> bytes:
    return "\n".join(parts).encode()


def row(data: bytes, path: str = "Python/ada_engine_1a2b3c.xml") -> dict[str, Any]:
    return RepoXml().process_item({"path": path, "uri": f"file:///in/{path}", "text": data})


class TestFormats:
    @named(RAW)
    def test_of_raw_contents_are_read(self, packer: Packer) -> None:
        pack = read_pack(packer(FILES))
        assert lines(pack) == {
            "README.md": 4,
            "src/a.py": 2,
            "src/empty.py": 0,
            "src/blank.py": 3,
            ".gitignore": 2,
        }
        assert [file.path for file in pack.files if file.is_blank] == [
            "src/empty.py",
            "src/blank.py",
        ]
        assert pack.problem is None

    def test_of_parsable_contents_are_read(self) -> None:
        files = {**trimmed(FILES), "tags.xml": '<file path="x">\n</file>\n</files>\n&lt;'}
        pack = read_pack(parsable_xml(files))
        assert (lines(pack), pack.problem) == (expected(files), None)

    def test_parsable_with_a_line_for_each_tag(self) -> None:
        data = text("<repomix>", "<files>", '<file path="a">', "1", "2", "</file>", "</files>")
        assert lines(read_pack(data)) == {"a": 2}

    @pytest.mark.parametrize(
        "prolog",
        ['<?xml version="1.0" encoding="UTF-8"?>\n', "\ufeff", "\n\n", "<!DOCTYPE repomix>"],
    )
    def test_parsable_behind_a_prolog(self, prolog: str) -> None:
        assert lines(read_pack(parsable_xml({"a": "1\n2"}, prolog=prolog))) == {"a": 2}

    @named([repomix_xml, rendergit_cxml])
    def test_with_carriage_returns_are_read(self, packer: Any) -> None:
        files = {path: content.replace("\n", "\r\n") for path, content in FILES.items()}
        pack = read_pack(packer(files, newline="\r\n"))
        assert (lines(pack), pack.problem) == (expected(FILES), None)
        assert [file.is_blank for file in pack.files] == [False, False, True, True, False]

    def test_with_a_byte_order_mark_are_read(self) -> None:
        for data in (
            rendergit_cxml({"a": "1"}),
            text("<files>", '<file path="a">', "1", "</file>"),
        ):
            assert lines(read_pack(b"\xef\xbb\xbf" + data)) == {"a": 1}

    def test_only_the_first_block_counts(self) -> None:
        commit = text("<git_log_commit>", "<files>", '<file path="no">', "</file>", "</files>")
        sections = f"<git_logs>\n{commit.decode()}\n</git_log_commit>\n</git_logs>\n"
        pack = read_pack(repomix_xml(FILES, sections=sections))
        assert (lines(pack), pack.problem) == (expected(FILES), None)
        pack = read_pack(
            parsable_xml(trimmed(FILES), sections="<git_logs><files>a</files></git_logs>")
        )
        assert (lines(pack), pack.problem) == (expected(trimmed(FILES)), None)

    @pytest.mark.parametrize("section", ["git_diffs", "git_logs", "instruction"])
    def test_sections_behind_the_files(self, section: str) -> None:
        sections = f'<{section}>\n<file path="no">\n</file>\n</{section}>\n'
        pack = read_pack(repomix_xml(FILES, sections=sections))
        assert (lines(pack), pack.problem) == (expected(FILES), None)

    def test_a_header_that_names_the_other_format(self) -> None:
        data = text("<documents>", "we have", "</documents>", repomix_xml({"a": "1"}).decode())
        assert lines(read_pack(data)) == {"a": 1}

    def test_with_references_in_paths_are_read(self) -> None:
        files = {'R&D <1>/"it\'s".md': "x"}
        assert lines(read_pack(parsable_xml(files))) == expected(files)
        paths = {
            "a&amp;b": "a&b",
            "&#65;&#x42;": "AB",
            "&copy;&#xD800;": "&copy;\ufffd",
            "&&x;": "&&x;",
        }
        for written, path in paths.items():
            assert lines(read_pack(rendergit_cxml({written: "x"}))) == {path: 1}
            assert lines(read_pack(repomix_xml({written: "x"}))) == {path: 1}


class TestTagsInContents:
    """Contents are raw: they may hold packs themselves."""

    @named(RAW)
    def test_a_line_that_looks_like_a_tag(self, packer: Packer) -> None:
        for line in ('<file path="x">', "</file>", "<files>", "</files>", "</documents>"):
            files = {"a": f"1\n{line}\n3", "b": "1"}
            assert lines(read_pack(packer(files))) == expected(files), line

    @named(RAW)
    def test_a_whole_pack_of_one_file(self, packer: Packer) -> None:
        inner = packer({"inner": "1\n2"}).decode()
        for content in (inner, f"```\n{inner}\n```", f"{inner}\nand {inner}"):
            files = {"a": content, "b": "1\n2"}
            pack = read_pack(packer(files))
            assert lines(pack) == expected(files)
            assert pack.problem
            assert "may be a tag or content of a" in pack.problem

    def test_the_problem_names_the_line(self) -> None:
        data = text("<files>", '<file path="a">', '<file path="b">', "</file>", "</files>")
        assert read_pack(data).problem == 'line 3: <file path="b"> may be a tag or content of a'
        problem = read_pack(rendergit_cxml({"a": "1\n</document_content>\n</document>\n2"})).problem
        assert problem == "line 6: </document_content> may be a tag or content of a"

    @named(PACKERS)
    def test_tags_that_are_none(self, packer: Packer) -> None:
        content = 'x </file>\n</file> x\n <file path="y">\n<file>\n</files>x\n</document>\n&lol;'
        pack = read_pack(packer({"a": content, "b": "1"}))
        assert (lines(pack), pack.problem) == ({"a": 7, "b": 1}, None)


class TestMalformed:
    def test_last_file_not_closed(self) -> None:
        start = ("<files>", '<file path="a">', "1", "</file>", "", '<file path="b">', "1", "2")
        for end in ((), ("</files>",), ("</files>", "<git_logs>", "x")):
            pack = read_pack(text(*start, *end))
            assert lines(pack) == {"a": 1, "b": 2}
            assert pack.problem
            assert "b" in pack.problem

    def test_a_pack_that_is_cut_off_anywhere_has_a_problem(self) -> None:
        files = {"a": "1\n2\n3", "b": "1", "c": "1\n2"}
        for packer in PACKERS:
            data = packer(files)
            for cut in range(data.index(b"1\n2\n3"), len(data) - 12):
                pack = read_pack(data[:cut])
                assert "".join(file.path for file in pack.files) in ("a", "ab", "abc")
                assert pack.problem

    def test_a_block_that_is_not_closed_is_a_problem(self) -> None:
        pack = read_pack(text("<files>", '<file path="a">', "1", "</file>", ""))
        assert (lines(pack), pack.problem) == ({"a": 1}, "the block of files is not closed")

    def test_more_behind_the_block(self) -> None:
        pack = read_pack(repomix_xml({"a": "1", "b": "1\n2"}, sections="<new_section>\n1\n"))
        assert lines(pack) == {"a": 1, "b": 2}
        assert pack.problem
        assert "</file> may be a tag or content of b" in pack.problem

    def test_closing_tag_without_a_file(self) -> None:
        pack = read_pack(text("<files>", "</file>", '<file path="a">', "1", "</file>", "</files>"))
        assert (lines(pack), pack.problem) == ({"a": 1}, "line 2: </file> closes no file")

    @pytest.mark.parametrize(
        "data",
        [
            b"",
            b"<files>",
            b"<files>\n</files>\n",
            b"<documents>\n</documents>",
            b"<repomix></repomix>",
            b"<repomix><files></files></repomix>",
            b"# Markdown\n## File: a.py\n",
            b'<file path="a">\n1\n</file>\n',
            b'<files>\n</files>\n<x>\n<file path="a">\n1\n</file>\n',
            b"\x00\xff<files>\n",
        ],
    )
    def test_no_file_at_all(self, data: bytes) -> None:
        with pytest.raises(ValueError, match=r"neither <file path=.* nor <document>"):
            read_pack(data)


class TestNothingIsExpanded:
    def test_of_a_billion_laughs(self) -> None:
        entities = "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">\n' for n in range(1, 12))
        dtd = f'<?xml version="1.0"?>\n<!DOCTYPE lolz [\n<!ENTITY l0 "lol">\n{entities}]>\n'
        assert lines(read_pack(parsable_xml({"a": "1"}, prolog=dtd))) == {"a": 1}
        data = parsable_xml({"PATH": "1"}, prolog=dtd).replace(b"PATH", b"&l11;")
        assert lines(read_pack(data)) == {"&l11;": 1}
        assert lines(read_pack(dtd.encode() + repomix_xml({"&l11;": "&l11;"}))) == {"&l11;": 1}

    def test_of_an_external_entity(self, tmp_path: Path) -> None:
        secret = tmp_path / "secret"
        secret.write_text("1\n2\n3\n")
        dtd = f'<!DOCTYPE r [<!ENTITY x SYSTEM "{secret.as_uri()}">]>'
        data = parsable_xml({"a": "CONTENT"}, prolog=dtd).replace(b"CONTENT", b"&x;")
        assert lines(read_pack(data)) == {"a": 1}
        assert row(data)["text"] == data


class TestCheckouts:
    def check(self, files: Mapping[str, str]) -> None:
        for packer in PACKERS:
            taken = files if packer is rendergit_cxml else trimmed(files)
            data = packer(taken)
            assert lines(read_pack(data)) == expected(taken)
            made = row(data)
            assert made["total_lines"] == sum(expected(taken).values())
            assert made["files_with_content"] == sum(
                1 for content in taken.values() if content.strip()
            )
            assert made["content_length"] == len(data.decode())
            assert made["pack_problem"] is None

    def test_of_this_repository_are_read_whole(self) -> None:
        try:
            files = tracked_texts(ROOT)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("not in a clone")
        assert len(files) > 100
        self.check(files)

    def test_of_a_new_repository_are_read_whole(self, tmp_path: Path) -> None:
        files = {**FILES, "docs/日本語.md": "一\n二\n", "windows.bat": "a\r\nb\r\n"}
        assert tracked_texts(checkout(tmp_path, files)) == files
        self.check(files)


ANY_TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), max_size=20)
CLOSING = ("</file>", "</document>", "</file> \t")
OTHER_TAGS = (
    *('<file path="x">', '<file path="">', "<file>", " </file>", "</file>x", "<files>", "</files>"),
    *("<document_content>", "</document_content>", "<documents>", "</documents>", "<git_logs>"),
    *('<document index="1">\n<source>x</source>\n<document_content>', "<repomix>", "", " ", "\t"),
)
PATHS = st.text(
    st.characters(codec="utf-8", exclude_characters="\r\n;", exclude_categories=("Cc",)),
    min_size=1,
    max_size=12,
)


def contents(told_apart: bool) -> st.SearchStrategy[str]:
    """Told apart: no closing tag stands before another tag."""
    closing = st.sampled_from(CLOSING)
    pieces = ANY_TEXT | st.sampled_from(OTHER_TAGS)
    pieces |= closing.map(lambda tag: f"{tag}\n\nplain") if told_apart else closing
    together = st.lists(pieces, max_size=8).map("\n".join)
    return together | together.map(lambda content: content.replace("\n", "\r\n"))


def repositories(told_apart: bool) -> st.SearchStrategy[dict[str, str]]:
    return st.dictionaries(PATHS, contents(told_apart), min_size=1, max_size=5)


class TestLaws:
    @given(files=repositories(told_apart=True), packer=st.sampled_from(RAW))
    def test_what_is_packed_is_read(self, files: dict[str, str], packer: Packer) -> None:
        pack = read_pack(packer(files))
        assert lines(pack) == expected(files)
        assert [file.is_blank for file in pack.files] == [
            not content.encode().strip() for content in files.values()
        ]

    @given(repositories(told_apart=False))
    def test_what_is_packed_parsable_is_read(self, files: dict[str, str]) -> None:
        files = trimmed(files)
        pack = read_pack(parsable_xml(files))
        assert (lines(pack), pack.problem) == (expected(files), None)

    @given(files=repositories(told_apart=False), packer=st.sampled_from(PACKERS))
    @example(
        files={"a": '</file>\n\n</files>\n<git_logs>\n</file>\n<file path="b">'}, packer=repomix_xml
    )
    def test_whatever_is_packed_has_files(self, files: dict[str, str], packer: Packer) -> None:
        data = packer(files)
        pack = read_pack(data)
        assert pack.files
        assert 0 <= sum(file.lines for file in pack.files) <= data.count(b"\n") + 1

    @given(st.binary(max_size=200) | contents(told_apart=False).map(str.encode))
    def test_anything_is_a_pack_or_a_value_error(self, data: bytes) -> None:
        for text in (
            data,
            b"<files>\n" + data,
            b"<documents>\n" + data,
            b"<repomix><files>" + data,
        ):
            try:
                assert read_pack(text).files
            except ValueError as error:
                assert "no files in it" in str(error)


MB = 1_000_000
HOSTILE = {
    "opening": ("<files>\n", '<file path="a">\n', ""),
    "openings in one line": ("<files>\n", '<file path="a">', ""),
    "paths without an end": ("<files>\n", '<file path="', ""),
    "paths with many ends": ("<files>\n", '<file path="a"> ">  ', "x\n"),
    "closing": ("<files>\n", "</file>\n", ""),
    "closing in a file": ('<files>\n<file path="a">\n', "</file>\n", ""),
    "closing before blanks": ('<files>\n<file path="a">\n', "</file>\n\n\n \t \n", "x"),
    "one closing before blanks": ('<files>\n<file path="a">\n</file>', "\n \t", "x"),
    "ends of blocks": ('<files>\n<file path="a">\n', "</file>\n</files>\n", "x"),
    "blocks": ("", "<files>\n", ""),
    "blocks of both kinds": ("", "<files>\n</files>\n<documents>\n</documents>\n", ""),
    "no closing": ('<files>\n<file path="a">\n', "text\n", ""),
    "one line": ('<files>\n<file path="a">\n', "text", ""),
    "no block": ("", "text\n", ""),
    "blanks": ("", "\n", ""),
    "documents": ("<documents>\n", "<document>\n", ""),
    "sources": ("<documents>\n", "<document>\n<source>", ""),
    "many sources": ("<documents>\n", "<document>\n<source>a</source>\n", ""),
    "ends of sources": ("<documents>\n<document>\n<source>", "a</source>  ", "x"),
    "documents that close": (
        "<documents>\n<document>\n<source>a</source>\n<document_content>\n",
        "</document_content>\n</document>\n",
        "",
    ),
    "halves": (
        "<documents>\n<document>\n<source>a</source>\n<document_content>\n",
        "</document_content>\n",
        "",
    ),
    "prolog": ("", "<?a?>", "<repomix><files>"),
    "prolog without an end": ("", "<?", ""),
    "types": ("", "<!DOCTYPE a>", ""),
    "types without an end": ("", "<!DOCTYPE [", ""),
    "parsable openings": ("<repomix><files>", '<file path="a">', ""),
    "parsable paths": ("<repomix><files>", '<file path="', ""),
    "parsable closings": ('<repomix><files><file path="a">', "</file>", ""),
    "parsable blanks": ('<repomix><files><file path="a">', "</file>\n\n\n", "x"),
}


@pytest.mark.parametrize(("head", "repeated", "tail"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_packs_take_linear_time(head: str, repeated: str, tail: str) -> None:
    """In quadratic time 5 MB would take hours."""
    data = (head + repeated * (5 * MB // len(repeated)) + tail).encode()
    try:
        assert read_pack(data).files
    except ValueError as error:
        assert "no files in it" in str(error)


class TestRows:
    def test_have_every_column(self) -> None:
        data = repomix_xml({**FILES, "LICENSE": "free", "src/B.PY": "1"})
        made = row(data)
        assert made.pop("text") is data
        characters = len(data.decode())
        assert characters < len(data)
        assert made == {
            "source": "repo_xml",
            "repo_user": "ada",
            "repo_name": "engine",
            "repo_full_name": "ada/engine",
            "commit_hash": "1a2b3c",
            "language": "Python",
            "packaging_tool": "repomix",
            "files_with_content": 5,
            "total_lines": 13,
            "avg_lines_per_file": 2.6,
            "has_readme": True,
            "has_license": True,
            "has_gitignore": True,
            "content_length": characters,
            "content_lines": len(data.split(b"\n")),
            "avg_line_length": round(characters / len(data.split(b"\n")), 2),
            "file_types": '{"py": 4, "": 2, "md": 1}',
            "xml_file_path": "file:///in/Python/ada_engine_1a2b3c.xml",
            "file_extension": ".xml",
            "pack_problem": None,
        }

    def test_columns_are_those_of_the_rows_in_order(self) -> None:
        made = row(rendergit_cxml(FILES))
        columns = RepoXml().columns(["path", "uri", "text"])
        assert list(columns) == list(made)
        kinds = {"string": str | bytes | None, "int": int, "float": float, "bool": bool}
        for name, kind in columns.items():
            assert isinstance(kind, str)
            assert isinstance(made[name], kinds[kind]), name
            assert isinstance(made[name], bool) == (kind == "bool"), name

    def test_of_blank_files_have_no_content(self) -> None:
        made = row(repomix_xml({"a": "", "b": "\n"}))
        assert (made["files_with_content"], made["total_lines"]) == (0, 2)
        assert made["avg_lines_per_file"] == 0.0
        assert not (made["has_readme"] or made["has_license"] or made["has_gitignore"])

    def test_names_in_any_case_and_folder(self) -> None:
        made = row(repomix_xml({"docs/ReadMe.txt": "", "LICENSES/MIT": "", "a/.gitignore": ""}))
        assert (made["has_readme"], made["has_license"], made["has_gitignore"]) == (
            True,
            True,
            False,
        )

    def test_count_the_types_of_files(self) -> None:
        files: dict[str, str] = dict.fromkeys(
            ("b.md", "x/a.tar.GZ", "y.gz", "Makefile", ".env", "v1.2/x", "n.ä"), ""
        )
        made = row(rendergit_cxml(files))
        assert list(json.loads(made["file_types"]).items()) == [
            ("", 3),
            ("gz", 2),
            ("md", 1),
            ("ä", 1),
        ]

    @pytest.mark.parametrize(
        ("name", "user", "repository", "commit"),
        [
            ("ada_engine_1a2b3c.xml", "ada", "engine", "1a2b3c"),
            ("ada_my_engine__v2_1A2B.xml", "ada", "my_engine__v2", "1A2B"),
            ("ada-l_engine.js_0.xml", "ada-l", "engine.js", "0"),
            ("ada_engine_main.xml", "", "", ""),
            ("ada_1a2b3c.xml", "", "", ""),
            ("_engine_1a2b3c.xml", "", "", ""),
            ("ada__1a2b3c.xml", "", "", ""),
            ("engine.xml", "", "", ""),
        ],
    )
    def test_take_user_name_and_commit_from_the_file_name(
        self, name: str, user: str, repository: str, commit: str
    ) -> None:
        made = row(repomix_xml(FILES), f"C++/deep/{name}")
        assert (made["repo_user"], made["repo_name"]) == (user, repository)
        assert made["repo_full_name"] == (f"{user}/{repository}" if user else "")
        assert (made["commit_hash"], made["language"]) == (commit, "C++")

    def test_the_tool_is_told_by_the_suffix_and_the_format_by_the_text(self) -> None:
        made = row(repomix_xml(FILES), "Go/a_b_c.CXML")
        assert (made["packaging_tool"], made["file_extension"]) == ("rendergit", ".cxml")
        assert made["total_lines"] == row(rendergit_cxml(FILES), "Go/x.xml")["total_lines"] == 11

    def test_of_what_is_no_pack_fail(self) -> None:
        with pytest.raises(ValueError, match="no files in it"):
            row(b"<html>\n</html>\n")

    def test_tell_the_problems_of_a_pack(self) -> None:
        assert "not closed" in row(b'<files>\n<file path="a">\n1')["pack_problem"]

    def test_count_characters_and_not_bytes(self) -> None:
        content = "aä€😀\n" * 20_000
        data = repomix_xml({"a": content})
        assert row(data)["content_length"] == len(data.decode())


class TestPartitions:
    def test_a_language_is_a_partition(self) -> None:
        paths = [
            "Go/x_y_2.cxml",
            "Go/x_y_1.XML",
            "C/sub/a_b_1.xml",
            "C/notes.txt",
            "top.md",
            "C/xml",
        ]
        assert RepoXml().get_file_list(paths) == {
            "C": ["C/sub/a_b_1.xml"],
            "Go": ["Go/x_y_1.XML", "Go/x_y_2.cxml"],
        }

    def test_are_of_the_languages_that_are_asked_for(self) -> None:
        paths = ["C/a.xml", "C++/a.xml", "Go/a.xml"]
        assert RepoXml(languages=["Go", "C"]).get_file_list(paths) == {
            "C": ["C/a.xml"],
            "Go": ["Go/a.xml"],
        }

    def test_languages_without_a_folder(self) -> None:
        message = "languages: no packs for Rust, go; there are: C, Go"
        with pytest.raises(InputError, match=re.escape(message)):
            RepoXml(["go", "C", "Rust"]).get_file_list(["Go/a.xml", "C/a.xml"])

    def test_packs_in_no_folder(self) -> None:
        with pytest.raises(InputError, match=r"^a\.xml: in no folder; move it to the folder of"):
            RepoXml().get_file_list(["b.cxml", "Go/a.xml", "a.xml"])

    def test_without_packs_say_what_is_expected(self) -> None:
        with pytest.raises(InputError, match=r"no packs; expected <language>/<user>_.*\.cxml"):
            RepoXml(["Go"]).get_file_list(["Go/a.jsonl", "xml"])

    def test_one_word_is_no_list(self) -> None:
        with pytest.raises(ValueError, match="languages: expected a list"):
            RepoXml("Go")

    def test_it_is_a_preprocessor(self) -> None:
        assert isinstance(RepoXml(), Grouping)
        assert isinstance(RepoXml(), Declared)
        assert RepoXml.reads_bytes
