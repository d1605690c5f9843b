"""merged: nothing lost, nothing moved, and every line counted."""

from __future__ import annotations

import gzip
import hashlib
import json
import tracemalloc
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from config_files import Messages, told
from hypothesis import given, settings
from hypothesis import strategies as st

from modelcall_assets.config.datasets import MergeGroup, parse_merge_groups, selected_groups
from modelcall_assets.errors import InputError
from modelcall_assets.stages.merged import (
    BLANK,
    DUPLICATE,
    INVALID,
    MergeReport,
    invalid_file_of,
    members_of,
    merge_group,
)
from modelcall_assets.storage.files import publish
from modelcall_assets.storage.formats import Reading
from modelcall_assets.storage.listing import list_page
from modelcall_assets.storage.places import Place

FILE = "configs/merge.yaml"


def group(**fields: Any) -> MergeGroup:
    made = {"name": "qa", "output_file": "qa.jsonl", "input_files": ["zh.jsonl"], **fields}
    groups, problems = parse_merge_groups({"merge_groups": [made]}, FILE)
    assert groups is not None, problems
    return groups[0]


def merge_to(output: Path, members: Mapping[str, Place], **options: Any) -> MergeReport:
    with ExitStack() as stack:
        out = stack.enter_context(publish(output))
        return merge_group(
            members, out, lambda: stack.enter_context(publish(invalid_file_of(output))), **options
        )


def merge(folder: Path, files: Sequence[bytes], **options: Any) -> tuple[MergeReport, bytes]:
    """Members named 0.jsonl, 1.jsonl and so on."""
    members = {}
    for number, content in enumerate(files):
        path = folder / f"{number}.jsonl"
        path.write_bytes(content)
        members[path.name] = path
    report = merge_to(folder / "out/merged.jsonl", members, **options)
    return report, (folder / "out/merged.jsonl").read_bytes()


class TestGroupsFile:
    MISTAKES: Mapping[str, Any] = {
        "a way up": {"output_file": "../qa.jsonl"},
        "a root": {"output_file": "/tmp/qa.jsonl"},
        "a URI": {"output_file": "s3://b/qa.jsonl"},
        "Parquet": {"output_file": "qa.parquet"},
        "a hidden name": {"output_file": "a/.qa.jsonl"},
        "a member of a root": {"input_files": ["/data/zh.jsonl"]},
        "a member of a way up": {"input_files": ["a.jsonl", "b/../../c.jsonl"]},
        "no member": {"input_files": []},
        "input_files, nearly": {"input_file": ["a"]},
        "dedup in words": {"dedup": "yes"},
        "no name": {"name": ""},
    }

    def test_what_is_wrong_in_a_group(self, messages: Messages) -> None:
        made = {"name": "qa", "output_file": "qa.jsonl", "input_files": ["zh.jsonl"]}
        parsed = {
            name: parse_merge_groups({"merge_groups": [{**made, **fields}]}, FILE)
            for name, fields in self.MISTAKES.items()
        }
        assert [groups for groups, _ in parsed.values()] == [None] * len(self.MISTAKES)
        messages({name: told(problems) for name, (_, problems) in parsed.items()})

    def test_two_groups_cannot_share_a_name_or_an_output(self) -> None:
        one = {"name": "qa", "output_file": "qa.jsonl", "input_files": ["a.jsonl"]}
        groups, problems = parse_merge_groups(
            {"merge_groups": [one, {**one, "output_file": "./qa.jsonl"}]}, FILE
        )
        assert groups is None
        assert [problem.field for problem in problems] == [
            "merge_groups[1].name",
            "merge_groups[1].output_file",
        ]

    def test_selection_keeps_the_files_order_and_names_what_is_unknown(self) -> None:
        groups = [group(name=name) for name in ("one", "two", "three")]
        assert selected_groups(groups, [], "t.yaml", "distillation.merge_groups") == (groups, [])
        assert selected_groups(groups, ["three", "one"], "t.yaml", "distillation.merge_groups") == (
            [groups[0], groups[2]],
            [],
        )
        _, problems = selected_groups(groups, ["tow", "zzz"], "t.yaml", "distillation.merge_groups")
        told = "\n".join(map(str, problems))
        assert "t.yaml:distillation.merge_groups[0]: there is no such merge group" in told
        assert "did you mean two?" in told and "choose among one, three, two" in told


class TestMembers:
    LISTING = (
        "a/zh.jsonl",
        "b/en.jsonl",
        "b/x.jsonl",
        "c/x.jsonl",
        "en.jsonl",
        "d/p.parquet",
        "x.csv",
    )

    @pytest.mark.parametrize(
        ("patterns", "expected"),
        [
            (["b/en.jsonl", "a/zh.jsonl"], ["b/en.jsonl", "a/zh.jsonl"]),
            (["zh.jsonl"], ["a/zh.jsonl"]),
            (["en.jsonl"], ["en.jsonl"]),
            (["*/x.jsonl", "en.jsonl"], ["b/x.jsonl", "c/x.jsonl", "en.jsonl"]),
            (["c/*.jsonl", "*.jsonl"], ["c/x.jsonl", *LISTING[:3], "en.jsonl"]),
            (["d/*", "en.jsonl"], ["d/p.parquet", "en.jsonl"]),
            (["*.csv", "en.jsonl"], None),
        ],
    )
    def test_are_found_by_path_pattern_or_bare_name(
        self, patterns: list[str], expected: list[str] | None
    ) -> None:
        made = group(input_files=patterns)
        if expected is None:
            with pytest.raises(InputError, match=r"\*\.csv is not there"):
                members_of(made, self.LISTING, "base")
        else:
            assert members_of(made, self.LISTING, "base") == expected

    def test_a_name_is_not_the_end_of_another(self) -> None:
        made = group(input_files=["c.jsonl"])
        assert members_of(made, ["lang/abc.jsonl", "lang/c.jsonl"], "base") == ["lang/c.jsonl"]
        with pytest.raises(InputError, match=r"c\.jsonl is not there"):
            members_of(made, ["lang/abc.jsonl", "lang/c.jsonl/x.jsonl"], "base")

    def test_all_that_are_missing_or_ambiguous_are_named(self) -> None:
        with pytest.raises(InputError) as caught:
            members_of(group(input_files=["no.jsonl", "x.jsonl", "none*"]), self.LISTING, "base")
        assert str(caught.value) == (
            "merge group 'qa': of the members under base, no.jsonl is not there; x.jsonl is in "
            "several places: b/x.jsonl, c/x.jsonl; none* is not there"
        )


class TestMerge:
    def test_gives_what_the_worked_example_says(self, tmp_path: Path) -> None:
        """E9 of the reference, as a user lays it out."""
        zh = b'{"a":1}\n\n{bad\n{"b":2}\n'
        for name, content in {"zh.jsonl": zh, "en.jsonl": b'{"a":3,"c":4}\n'}.items():
            (tmp_path / name).write_bytes(content)
        files = {file.key_path: file.place for file in list_page(tmp_path)[0]}
        names = members_of(group(input_files=["zh.jsonl", "en.jsonl"]), files, str(tmp_path))
        output = tmp_path / "merged/qa.jsonl"
        report = merge_to(output, {name: files[name] for name in names})
        assert output.read_bytes() == b'{"a":1}\n{"b":2}\n{"a":3,"c":4}\n'
        assert (
            report.rows,
            report.dropped[BLANK],
            report.dropped[INVALID],
            report.dropped[DUPLICATE],
        ) == (3, 1, 1, 0)
        assert [(each.name, each.rows) for each in report.members] == [
            ("zh.jsonl", 2),
            ("en.jsonl", 1),
        ]
        assert report.first_invalid[0].startswith("zh.jsonl, line 3, column ")
        assert output.with_name("qa.jsonl.invalid").read_bytes() == b"{bad\n"
        assert report.sample == [{"a": 1}, {"b": 2}, {"a": 3, "c": 4}]
        digest = hashlib.sha256(output.read_bytes()).hexdigest()
        assert report.data_version == f"sha256:{digest}"
        assert [file.key_path for file in list_page(output.parent)[0]] == ["qa.jsonl"]

    def test_lines_stay_as_they_are(self, tmp_path: Path) -> None:
        first = b'\xef\xbb\xbf{ "z" : 1.50, "a": "\\u4e2d" }  \r\n{"big": 123456789012345678901234}'
        report, merged = merge(tmp_path, [first, '{"中": "文"}'.encode()])
        assert merged == (
            b'{ "z" : 1.50, "a": "\\u4e2d" }  \r\n{"big": 123456789012345678901234}\n'
            + '{"中": "文"}\n'.encode()
        )
        assert report.rows == 3
        assert not invalid_file_of(tmp_path / "out/merged.jsonl").exists()

    @pytest.mark.parametrize("line", [b"[1]", b"7", b'"x"', b"{", b'{"a": "\xff"}', b'{"a": NaN}'])
    def test_what_is_no_object_is_set_aside_as_it_is(self, tmp_path: Path, line: bytes) -> None:
        report, merged = merge(tmp_path, [b'{"a":1}\n' + line])
        assert (merged, report.rows, report.dropped[INVALID]) == (b'{"a":1}\n', 1, 1)
        assert invalid_file_of(tmp_path / "out/merged.jsonl").read_bytes() == line + b"\n"
        (tmp_path / "again").mkdir()
        merge(tmp_path / "again", [b'{"a":1}\n'])
        assert not invalid_file_of(tmp_path / "again/out/merged.jsonl").exists()

    def test_only_the_first_invalid_lines_are_listed(self, tmp_path: Path) -> None:
        report, _ = merge(tmp_path, [b"x\n" * 30])
        assert (len(report.first_invalid), report.dropped[INVALID]) == (3, 30)

    def test_the_source_column_is_last_and_an_own_one_is_renamed(self, tmp_path: Path) -> None:
        lines = b'{"b": 1.0, "n": 12345678901234567890123 }\n{}\n{"src": "own", "input_src": 7}\n'
        report, merged = merge(tmp_path, [lines], source_column="src")
        assert merged.splitlines()[:2] == [
            b'{"b": 1.0, "n": 12345678901234567890123,"src":"0.jsonl"}',
            b'{"src":"0.jsonl"}',
        ]
        last = json.loads(merged.splitlines()[2])
        assert list(last.items()) == [
            ("input_input_src", "own"),
            ("input_src", 7),
            ("src", "0.jsonl"),
        ]
        assert report.rows == 3

    def test_an_own_source_column_has_one_name_in_the_whole_group(self, tmp_path: Path) -> None:
        first = b'{"src": "own", "n": 0.1000000000000000055, "m": 1e400}\n'
        report, merged = merge(tmp_path, [first, b'{"input_src": 7}\n'], source_column="src")
        assert merged.splitlines() == [
            b'{"input_input_src":"own","n":0.1000000000000000055,"m":1e400,"src":"0.jsonl"}',
            b'{"input_src": 7,"src":"1.jsonl"}',
        ]
        assert report.moved == {"src": "input_input_src"}

    def test_dedup_keeps_the_first_of_equal_contents(self, tmp_path: Path) -> None:
        one = b'{"a":1,"b":2}\n{"b":2,"a":1}\n{"a":1.0,"b":2}\n'
        two = (
            b'{ "b": 2, "a": 1 }\n{"id":12345678901234567890123}\n{"id":12345678901234567890124}\n'
        )
        report, merged = merge(tmp_path, [one, two], dedup=True)
        assert merged == b'{"a":1,"b":2}\n{"a":1.0,"b":2}\n' + b"".join(two.splitlines(True)[1:])
        assert (report.rows, report.dropped[DUPLICATE]) == (4, 2)
        assert [each.duplicates for each in report.members] == [1, 1]
        marked, _ = merge(tmp_path, [one, one], dedup=True, source_column="src")
        assert marked.rows == 2, "the same content in two members"

    @pytest.mark.parametrize("options", [{}, {"dedup": True, "source_column": "src"}])
    def test_a_large_member_is_not_held_in_memory(
        self, tmp_path: Path, options: dict[str, Any]
    ) -> None:
        path = tmp_path / "0.jsonl"
        with path.open("wb") as file:
            file.writelines(b'{"n":%d,"text":"%b"}\n' % (n, b"x" * 10_000) for n in range(2000))
        tracemalloc.start()
        report = merge_to(tmp_path / "merged.jsonl", {"0.jsonl": path}, **options)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert report.rows == 2000
        assert peak < path.stat().st_size / 4

    def test_members_of_every_format(self, tmp_path: Path) -> None:
        latin = pa.array([b"ok", b"\xff"]).view(pa.string())
        nested = pa.StructArray.from_arrays([latin], ["a"])
        pq.write_table(pa.table({"n": nested, "png": [b"\x89", b"x"]}), tmp_path / "a.parquet")
        with pa.ipc.new_stream(tmp_path / "b.arrow", pa.schema([("a", pa.int64())])) as arrow:
            arrow.write_table(pa.table({"a": [1, 2]}), max_chunksize=1)
        (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b'\xef\xbb\xbf{"a": 1}\n\n{"a": 3}'))
        names = members_of(
            group(input_files=["*.parquet", "b.arrow", "c.jsonl.gz"]),
            [file.key_path for file in list_page(tmp_path)[0]],
            str(tmp_path),
        )
        output = tmp_path / "out/merged.jsonl"
        report = merge_to(output, {name: tmp_path / name for name in names})
        assert output.read_bytes() == (
            b'{"n":{"a":"ok"},"png":"iQ=="}\n{"a":1}\n{"a":2}\n{"a": 1}\n{"a": 3}\n'
        )
        assert (report.rows, report.dropped[BLANK], report.dropped[INVALID]) == (5, 1, 1)
        (invalid,) = invalid_file_of(output).read_text().splitlines()
        assert invalid.startswith("row 2: column 'n' (struct<a: string>) cannot be read: ")
        assert report.first_invalid == [f"a.parquet, {invalid}"]
        marked = merge_to(
            output, {name: tmp_path / name for name in names}, dedup=True, source_column="from"
        )
        assert (marked.rows, marked.dropped[DUPLICATE]) == (4, 1)
        assert b'{"a":2,"from":"b.arrow"}\n' in output.read_bytes()

    def test_of_another_encoding_is_written_in_utf8(self, tmp_path: Path) -> None:
        """What is bad is kept in UTF-8 too, and tells the bytes that have no meaning."""
        content = '{"a": "中"}\n'.encode("gbk") + b"\x81\n"
        report, merged = merge(tmp_path, [content], reading=Reading("gbk"))
        assert (merged, report.dropped[INVALID]) == ('{"a": "中"}\n'.encode(), 1)
        assert invalid_file_of(tmp_path / "out/merged.jsonl").read_bytes() == b"\xff\\x81\n"

    def test_a_bad_line_stops_a_group_that_wants_that(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"1\.jsonl: line 2, column 2: .*on_bad_line: keep"):
            merge(tmp_path, [b"{}\n", b"{}\n{bad\n"], reading=Reading(on_bad_line="fail"))
        assert list((tmp_path / "out").iterdir()) == []

    def test_a_member_that_cannot_be_read_leaves_what_was_there(self, tmp_path: Path) -> None:
        _, before = merge(tmp_path, [b'{"a":1}\n'])
        output = tmp_path / "out/merged.jsonl"
        with pytest.raises(InputError, match=r"gone\.jsonl: not found"):
            members = {"0": tmp_path / "0.jsonl", "gone": tmp_path / "gone.jsonl"}
            merge_to(output, members)
        assert output.read_bytes() == before
        assert [path.name for path in output.parent.iterdir()] == ["merged.jsonl"]


VALUES = st.dictionaries(
    st.text(max_size=3), st.one_of(st.integers(-3, 3), st.text(max_size=4), st.none()), max_size=3
)
LINES = st.one_of(
    VALUES.map(orjson.dumps),
    VALUES.map(lambda row: json.dumps(row, ensure_ascii=True, indent=None).encode() + b" "),
    st.sampled_from([b"", b"  ", b"\t", b"{", b"[]", b"null", b'{"a":\xc3}', b"x" * 9]),
)


@settings(max_examples=150)
@given(
    files=st.lists(st.tuples(st.lists(LINES, max_size=6), st.booleans()), min_size=1, max_size=3),
    dedup=st.booleans(),
)
def test_every_line_is_somewhere(
    tmp_path_factory: pytest.TempPathFactory, files: list[tuple[list[bytes], bool]], dedup: bool
) -> None:
    contents = [b"\n".join(lines) + (b"\n" if ends and lines else b"") for lines, ends in files]
    written = [line for content in contents for line in content.split(b"\n")[: _count(content)]]
    folder = tmp_path_factory.mktemp("merge")
    report, merged = merge(folder, contents, dedup=dedup)
    counted = (
        report.rows + report.dropped[BLANK] + report.dropped[INVALID] + report.dropped[DUPLICATE]
    )
    assert counted == len(written)
    rows = [line for line in written if _is_row(line)]
    expected = list(_first_of_equals(rows)) if dedup else rows
    assert merged == b"".join(line + b"\n" for line in expected)
    invalid = [line for line in written if line.strip() and not _is_row(line)]
    side = invalid_file_of(folder / "out/merged.jsonl")
    assert (side.read_bytes() if side.exists() else b"") == b"".join(
        line + b"\n" for line in invalid
    )


def _count(content: bytes) -> int:
    return content.count(b"\n") + (not content.endswith(b"\n") and content != b"")


def _is_row(line: bytes) -> bool:
    try:
        return isinstance(orjson.loads(line), dict)
    except orjson.JSONDecodeError:
        return False


def _first_of_equals(lines: list[bytes]) -> list[bytes]:
    first: dict[bytes, bytes] = {}
    for line in lines:
        first.setdefault(orjson.dumps(orjson.loads(line), option=orjson.OPT_SORT_KEYS), line)
    return list(first.values())
