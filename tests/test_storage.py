"""storage/ and steps/raw: what goes in comes out, and what is broken says so."""

from __future__ import annotations

import datetime as dt
from decimal import Decimal
from pathlib import Path
from typing import Any

import fsspec
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelcall_assets.errors import InputChanged, InputError
from modelcall_assets.records.outcome import BadLine
from modelcall_assets.stages.raw import read_raw
from modelcall_assets.storage.columns import read_columns, read_schema
from modelcall_assets.storage.files import file_digest, publish, write_bytes
from modelcall_assets.storage.listing import list_page, stat_file
from modelcall_assets.storage.parquet import ParquetSink
from modelcall_assets.storage.places import Stores
from modelcall_assets.storage.publishing import (
    InputFingerprint,
    Manifest,
    read_manifest,
    write_manifest,
)
from modelcall_assets.storage.rows import own_id, read_batches, record_id, sample_row
from modelcall_assets.storage.values import (
    SchemaInference,
    is_json_text,
    readable_schema,
    schema_from_json,
    schema_to_json,
)

ODD_NAMES = [
    "a,b.jsonl",
    "a b.parquet",
    "数据.jsonl",
    "line\nbreak.jsonl",
    "UPPER.JSONL",
    "a::b.jsonl",
]

integers = st.integers(-(2**63), 2**64 - 1)
scalars = st.none() | st.booleans() | integers | st.floats(allow_nan=False) | st.text(max_size=5)
values = st.recursive(
    scalars.filter(lambda value: value not in (float("inf"), float("-inf"))),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3)
    ),
    max_leaves=6,
)
rows = st.lists(
    st.dictionaries(st.sampled_from(["id", "a", "b", ""]), values, max_size=4), max_size=8
)


PLACES = Stores()


def write_lines(path: Path, *lines: bytes) -> Path:
    path.write_bytes(b"".join(lines))
    return path


def items_of(path: Path, schema: pa.Schema | None = None, **options: Any) -> list[Any]:
    schema = schema or read_raw(stat_file(path)).schema
    return [item for batch in read_batches(path, schema=schema, **options) for item in batch.items]


def infer(*batches: list[dict[str, Any]]) -> pa.Schema:
    inference = SchemaInference()
    for batch in batches:
        inference.add(batch)
    return inference.schema()


class TestListing:
    def test_odd_names_are_found_in_order_and_can_be_read(self, tmp_path: Path) -> None:
        for name in [*ODD_NAMES, "sub/deep/c.jsonl"]:
            write_bytes(tmp_path / name, b"{}\n")
        found = list_page(tmp_path)[0]
        assert [info.key_path for info in found] == sorted([*ODD_NAMES, "sub/deep/c.jsonl"])
        assert {file_digest(info.place) for info in found} == {file_digest(found[0].place)}

    def test_hidden_excluded_and_foreign_files_are_skipped(self, tmp_path: Path) -> None:
        for name in [
            "a.jsonl",
            ".b.jsonl",
            ".git/c.jsonl",
            "out/d.parquet",
            "output/e.jsonl",
            "f.txt",
        ]:
            write_bytes(tmp_path / name, b"")
        found = list_page(tmp_path, exclude=[tmp_path / "out"])[0]
        assert [info.key_path for info in found] == ["a.jsonl", "output/e.jsonl"]

    def test_pattern_matches_the_path_or_the_name(self, tmp_path: Path) -> None:
        for name in ["x/a.jsonl", "y/a.jsonl", "y/b.parquet"]:
            write_bytes(tmp_path / name, b"")
        assert [f.key_path for f in list_page(tmp_path, "y/*")[0]] == ["y/a.jsonl", "y/b.parquet"]
        assert [f.key_path for f in list_page(tmp_path, "*.parquet")[0]] == ["y/b.parquet"]

    def test_follows_links_to_files_only(self, tmp_path: Path) -> None:
        root = tmp_path / "root"
        write_bytes(tmp_path / "elsewhere.jsonl", b"{}")
        root.mkdir()
        (root / "link.jsonl").symlink_to(tmp_path / "elsewhere.jsonl")
        (root / "loop").symlink_to(root)
        (root / "dangling.jsonl").symlink_to(tmp_path / "nothing")
        assert [info.key_path for info in list_page(root)[0]] == ["link.jsonl"]

    def test_missing_root_is_explained(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="nowhere: not found; correct the path"):
            list_page(tmp_path / "nowhere")
        with pytest.raises(InputError, match="memory://nowhere: not found"):
            list_page(PLACES.place("memory://nowhere"))
        with pytest.raises(InputError, match=r"nosuch.*no file system 'nosuch'.*install"):
            list_page(PLACES.place("nosuch://bucket/x"))

    def test_version_follows_the_content(self, tmp_path: Path) -> None:
        path = write_lines(tmp_path / "a.jsonl", b"{}")
        before = stat_file(path)
        path.write_bytes(b'{"a": 1}')
        assert stat_file(path).version != before.version

    def test_remote_files_read_like_local_ones(self, tmp_path: Path) -> None:
        content = b'{"id": 1, "a": "x"}\n\nbroken\n'
        fs = fsspec.filesystem("memory")
        fs.pipe("/bucket/in/sub/a,b.jsonl", content)
        fs.pipe("/bucket/in/out/c.jsonl", content)
        fs.pipe("/bucket/in/.hidden/d.jsonl", content)
        with fs.open("/bucket/in/e.parquet", "wb") as file:
            pq.write_table(pa.table({"id": ["1"]}), file)
        found = list_page(
            PLACES.place("memory://bucket/in"), exclude=[PLACES.place("memory://bucket/in/out")]
        )[0]
        assert [info.key_path for info in found] == ["e.parquet", "sub/a,b.jsonl"]
        assert stat_file(found[1].place).version == found[1].version
        remote = read_raw(found[1])
        local = read_raw(stat_file(write_lines(tmp_path / "a.jsonl", content)))
        assert (remote.digest, remote.rows, remote.schema) == (
            local.digest,
            local.rows,
            local.schema,
        )
        assert read_raw(found[0]).rows == 1


class TestPublish:
    def test_a_crash_leaves_the_old_file_and_no_litter(self, tmp_path: Path) -> None:
        target = tmp_path / "out" / "a.json"
        write_bytes(target, b"old")
        with pytest.raises(RuntimeError), publish(target) as file:
            file.write(b"half")
            assert target.read_bytes() == b"old"
            raise RuntimeError
        assert [path.name for path in target.parent.iterdir()] == ["a.json"]
        assert target.read_bytes() == b"old"

    def test_a_temporary_is_invisible_to_listings(self, tmp_path: Path) -> None:
        with publish(tmp_path / "a.jsonl") as file:
            file.write(b"{}")
            assert list_page(tmp_path)[0] == []
        assert [info.key_path for info in list_page(tmp_path)[0]] == ["a.jsonl"]

    def test_the_mode_is_that_of_any_new_file(self, tmp_path: Path) -> None:
        write_bytes(tmp_path / "a", b"")
        (tmp_path / "b").write_bytes(b"")
        assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode

    def test_parquet_sink_publishes_all_or_nothing(self, tmp_path: Path) -> None:
        path = tmp_path / "a.parquet"
        batch = pa.record_batch({"a": [1, 2]})
        with (
            pytest.raises(RuntimeError),
            publish(path) as file,
            ParquetSink(file, "scores", batch.schema) as sink,
        ):
            sink.write(batch)
            raise RuntimeError
        assert list(tmp_path.iterdir()) == []
        with (
            publish(path) as file,
            ParquetSink(file, "scores", batch.schema, {"modelcall.x": "y"}) as sink,
        ):
            sink.write(batch)
            sink.write(batch)
        (column,) = [batch["a"] for batch in read_columns(path, ["a"])]
        assert column.to_pylist() == [1, 2, 1, 2]
        metadata = pq.read_metadata(path).metadata
        assert metadata[b"modelcall.x"] == b"y"
        assert metadata[b"modelcall.stage"] == b"scores"
        assert metadata[b"modelcall.schema_version"] == b"1"
        assert pq.read_metadata(path).num_row_groups == 1

    def test_a_sink_without_rows_is_a_readable_file(self, tmp_path: Path) -> None:
        with publish(tmp_path / "a.parquet") as file:
            ParquetSink(file, "scores", pa.schema([("a", pa.int64())])).close()
        assert read_schema(tmp_path / "a.parquet") == pa.schema([("a", pa.int64())])


class TestManifest:
    manifest = Manifest(
        stage="raw",
        accepted=True,
        data_version="v",
        rows=3,
        ok=2,
        failed=1,
        failures={"bad_line": 1},
        input=InputFingerprint(uri="a.jsonl", digest="sha256:0", size=1, version="1-1"),
        schema=[("a", "int64")],
        detail={"x": [1]},
    )

    def test_is_read_as_it_was_written(self, tmp_path: Path) -> None:
        write_manifest(tmp_path / "m.json", self.manifest)
        assert read_manifest(tmp_path / "m.json") == self.manifest
        assert "schema" in orjson.loads((tmp_path / "m.json").read_bytes())

    @pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"format": 1}', b"\xff\xfe"])
    def test_damaged_or_absent_means_not_complete(self, tmp_path: Path, content: bytes) -> None:
        assert read_manifest(tmp_path / "m.json") is None
        (tmp_path / "m.json").write_bytes(content)
        assert read_manifest(tmp_path / "m.json") is None

    def test_fields_of_a_later_version_are_ignored(self, tmp_path: Path) -> None:
        content = self.manifest.model_dump(by_alias=True) | {"format": 2, "later": True}
        write_bytes(tmp_path / "m.json", orjson.dumps(content))
        assert read_manifest(tmp_path / "m.json") == self.manifest.model_copy(update={"format": 2})


class TestSchema:
    @pytest.mark.parametrize(
        ("first", "second", "expected"),
        [
            ([1], [2.5], "double"),
            ([1, 2.5], [], "double"),
            ([None], [None], "string"),
            ([None], [1], "int64"),
            ([{}], [{"a": 1}], "struct<a: int64>"),
            ([{"a": 1}], [{"b": "x"}], "struct<a: int64, b: string>"),
            ([[]], [[None]], "list<item: string>"),
            ([1], ["x"], "json"),
            ([1, "x"], [], "json"),
            ([True], [1], "json"),
            ([0.5, True], [], "json"),
            ([{}], [{}], "json"),
            ([[{}]], [], "json"),
            ([{"a": 1}], [{"a": "x"}], "json"),
            ([{"a": 1}], [3], "json"),
            ([[1]], [{"a": 1}], "json"),
            ([2**63], [], "json"),
            ([2**53 + 1], [0.5], "json"),
            ([0.5], [2**53 + 1], "json"),
            ([{f"k{n}": n} for n in range(600)], [], "json"),
        ],
    )
    def test_has_the_type_that_all_batches_share(
        self, first: list[Any], second: list[Any], expected: str
    ) -> None:
        schema = infer([{"x": value} for value in first], [{"x": value} for value in second])
        assert readable_schema(schema) == [("x", expected)]

    def test_columns_keep_the_order_they_are_first_seen_in(self) -> None:
        assert infer([{"b": 1}, {"a": 1}], [{"c": 1, "a": 2}]).names == ["b", "a", "c"]

    @given(rows)
    def test_round_trip_through_the_manifest(self, batch: list[dict[str, Any]]) -> None:
        schema = infer(batch)
        assert schema_from_json(schema_to_json(schema)).equals(schema, check_metadata=True)


class TestJsonl:
    def test_bad_lines_keep_their_place(self, tmp_path: Path) -> None:
        path = write_lines(
            tmp_path / "a.jsonl",
            b'\xef\xbb\xbf{"a": 1}\r\n',
            b"\r\n",
            b"{broken\r\n",
            b"  \n",
            b"[1]\n",
            b'{"a": "\xff"}\n',
            b'{"a": 2}',
        )
        good, broken, a_list, latin, last = items_of(path)
        assert (good, last) == ({"a": 1}, {"a": 2})
        assert broken.raw == "{broken"
        assert broken.detail.startswith("line 3, column 2:")
        assert a_list.detail == "line 5: not an object but a list"
        assert latin.raw == '{"a": "\ufffd"}'
        report = read_raw(stat_file(path))
        assert (report.rows, report.blank_lines, report.failed) == (5, 2, 3)
        assert report.first_bad == broken.detail

    def test_binary_and_empty_files(self, tmp_path: Path) -> None:
        assert items_of(write_lines(tmp_path / "empty.jsonl", b"")) == []
        path = write_lines(tmp_path / "binary.jsonl", bytes(range(256)) * 100)
        items = items_of(path)
        assert items and all(isinstance(item, BadLine) for item in items)
        (batch,) = read_batches(path, schema=pa.schema([]))
        assert batch.to_arrow(pa.schema([])).num_rows == len(items)

    def test_a_long_bad_line_is_clipped_and_a_deep_one_is_bad(self, tmp_path: Path) -> None:
        deep = b'{"a": ' + b"[" * 300 + b"]" * 300 + b"}\n"
        long, nested = items_of(write_lines(tmp_path / "a.jsonl", b"x" * 20_000 + b"\n", deep))
        assert long.raw == "x" * 10_000 + "… [10000 more characters]"
        assert nested.detail == "line 2: nested deeper than 250 levels"

    def test_is_read_in_batches_up_to_a_limit(self, tmp_path: Path) -> None:
        path = write_lines(tmp_path / "a.jsonl", *(b'{"a": %d}\n\n' % n for n in range(7)))
        schema = pa.schema([("a", pa.int64())])
        batches = list(read_batches(path, schema=schema, rows=3))
        assert [(batch.start, len(batch.items)) for batch in batches] == [(0, 3), (3, 3), (6, 1)]
        assert items_of(path, schema, limit=4, rows=3) == [{"a": n} for n in range(4)]
        assert items_of(path, schema, limit=0) == []

    def test_a_value_that_does_not_fit_means_the_file_changed(self, tmp_path: Path) -> None:
        path = write_lines(tmp_path / "a.jsonl", b'{"a": "x"}')
        (batch,) = read_batches(path, schema=pa.schema([("a", pa.int64())]))
        with pytest.raises(InputChanged, match="run the task again"):
            batch.to_arrow(pa.schema([("a", pa.int64())]))

    @given(rows)
    def test_every_row_survives_arrow_and_parquet(
        self, tmp_path_factory: pytest.TempPathFactory, batch: list[dict[str, Any]]
    ) -> None:
        batch = [{"n": n, **row} for n, row in enumerate(batch)]
        folder = tmp_path_factory.mktemp("rows")
        path = write_lines(folder / "a.jsonl", *(orjson.dumps(row) + b"\n" for row in batch))
        schema = read_raw(stat_file(path)).schema
        with publish(folder / "a.parquet") as file, ParquetSink(file, "scores", schema) as sink:
            for some in read_batches(path, schema=schema, rows=3):
                assert some.to_arrow(schema).schema.equals(schema, check_metadata=True)
                sink.write(some.to_arrow(schema))
        assert read_schema(folder / "a.parquet").equals(schema, check_metadata=True)
        back = items_of(folder / "a.parquet", schema)
        assert [_without_nulls(row) for row in back] == [_without_nulls(row) for row in batch]


def _without_nulls(value: Any) -> Any:
    """Parquet does not tell an absent or empty member from a null one."""
    if isinstance(value, list):
        return [_without_nulls(inner) for inner in value]
    if isinstance(value, dict):
        members = {name: _without_nulls(inner) for name, inner in value.items()}
        return {name: inner for name, inner in members.items() if inner is not None} or None
    return value


class TestParquet:
    def test_nested_columns_and_exotic_types_become_plain(self, tmp_path: Path) -> None:
        moment = pa.array([1_700_000_000_123_456_789]).view(pa.timestamp("ns"))
        table = pa.table(
            {
                "nested": pa.array([{"tags": ["a"], "n": 1}]),
                "ns": moment,
                "in_list": pa.ListArray.from_arrays([0, 1], moment),
                "us": pa.array([dt.datetime(2026, 1, 2)]),
                "day": pa.array([dt.date(2026, 1, 2)]),
                "far": pa.array([10**17]).view(pa.timestamp("ms")),
                "took": pa.array([1_500]).view(pa.duration("ns")),
                "price": pa.array([Decimal("1.20")]),
                "word": pa.array(["x"]).dictionary_encode(),
                "view": pa.array(["x"]).cast(pa.string_view()),
                "latin": pa.array([b"caf\xe9"]).view(pa.string()),
                "bytes": pa.array([b"\xff"]),
            }
        )
        pq.write_table(table, tmp_path / "a.parquet")
        (row,) = items_of(tmp_path / "a.parquet")
        assert row["nested"] == {"tags": ["a"], "n": 1}
        assert row["ns"] == "2023-11-14 22:13:20.123456789"
        assert row["in_list"] == [row["ns"]]
        assert (row["us"][:10], row["day"]) == ("2026-01-02", "2026-01-02")
        assert (row["price"], row["word"], row["view"]) == ("1.20", "x", "x")
        assert row["latin"] == "caf\ufffd"
        orjson.dumps(sample_row(row))

    def test_the_batch_is_the_file_s_own(self, tmp_path: Path) -> None:
        not_null = pa.schema([pa.field("a", pa.int64(), nullable=False)], metadata={"k": "v"})
        table = pa.table({"a": range(2500)}, schema=not_null)
        pq.write_table(table, tmp_path / "a.parquet", row_group_size=700)
        schema = read_raw(stat_file(tmp_path / "a.parquet")).schema
        batches = list(read_batches(tmp_path / "a.parquet", schema=schema, limit=2100))
        assert [row for batch in batches for row in batch.items] == [{"a": n} for n in range(2100)]
        assert [n for batch in batches for n in batch.to_arrow(schema)["a"].to_pylist()] == list(
            range(2100)
        )
        assert [batch.start for batch in batches] == [0, 1000, 2000]

    @pytest.mark.parametrize("content", [b"", b"[1]\n", b"PAR1" + b"\0" * 50 + b"PAR1"])
    def test_what_is_not_parquet_is_explained(self, tmp_path: Path, content: bytes) -> None:
        path = write_lines(tmp_path / "a.parquet", content)
        with pytest.raises(InputError, match=r"a\.parquet: "):
            read_raw(stat_file(path))

    def test_a_truncated_file_is_explained(self, tmp_path: Path) -> None:
        pq.write_table(pa.table({"a": range(1000)}), tmp_path / "a.parquet")
        path = write_lines(tmp_path / "b.parquet", (tmp_path / "a.parquet").read_bytes()[:-100])
        with pytest.raises(InputError, match=r"b\.parquet: "):
            items_of(path, pa.schema([("a", pa.int64())]))

    def test_two_columns_of_one_name_are_refused(self, tmp_path: Path) -> None:
        table = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"])
        pq.write_table(table, tmp_path / "a.parquet")
        with pytest.raises(InputError, match="two columns are called 'a'"):
            read_raw(stat_file(tmp_path / "a.parquet"))

    def test_another_schema_means_the_file_changed(self, tmp_path: Path) -> None:
        pq.write_table(pa.table({"a": [1]}), tmp_path / "a.parquet")
        with pytest.raises(InputChanged, match="run the task again"):
            items_of(tmp_path / "a.parquet", pa.schema([("a", pa.string())]))


class TestRaw:
    lines = tuple(
        orjson.dumps({"id": identity, "text": "x" * 1000, "n": n}) + b"\n"
        for n, identity in enumerate(["a", "b", "a", None, "", "b", 7, "7"])
    )

    def test_tells_rows_duplicates_and_types_of_lines(self, tmp_path: Path) -> None:
        info = stat_file(write_lines(tmp_path / "a.jsonl", *self.lines))
        report = read_raw(info)
        assert report.digest == report.data_version == file_digest(info.place)
        assert (report.rows, report.duplicate_ids) == (8, 3)
        assert report.first_duplicates == ["a", "b", "7"]
        assert readable_schema(report.schema) == [
            ("id", "json"),
            ("text", "string"),
            ("n", "int64"),
        ]
        assert report.sample[0]["text"] == "x" * 300 + "…"
        assert len(report.sample) == 6

    def test_a_limit_is_part_of_the_version_not_of_the_digest(self, tmp_path: Path) -> None:
        info = stat_file(write_lines(tmp_path / "a.jsonl", *self.lines))
        report = read_raw(info, limit=2)
        assert (report.rows, report.duplicate_ids) == (2, 0)
        assert report.digest == file_digest(info.place)
        assert report.data_version == f"{report.digest}|limit=2"

    def test_tells_rows_duplicates_and_types_of_columns(self, tmp_path: Path) -> None:
        table = pa.table({"id": [None, "b", "b"], "uid": [1, 2, 3], "text": ["x"] * 3})
        pq.write_table(table, tmp_path / "a.parquet")
        info = stat_file(tmp_path / "a.parquet")
        report = read_raw(info)
        assert (report.rows, report.first_duplicates) == (3, ["b"])
        assert report.digest == file_digest(info.place)
        assert report.sample == table.to_pylist()
        assert read_raw(info, limit=2).rows == 2

    def test_a_parquet_file_without_ids(self, tmp_path: Path) -> None:
        pq.write_table(pa.table({"text": ["x"] * 7}), tmp_path / "a.parquet", row_group_size=3)
        info = stat_file(tmp_path / "a.parquet")
        assert (read_raw(info).rows, read_raw(info, limit=5).rows) == (7, 5)
        assert read_raw(info, limit=5).sample == [{"text": "x"}] * 5
        assert read_raw(info, limit=2).sample == [{"text": "x"}] * 2


class TestRecordId:
    def test_given_ids_are_kept(self) -> None:
        assert own_id({"id": 0, "uid": "u"}) == "0"
        assert record_id({"id": "", "uid": "u"}, 5, "a") == "u"

    def test_made_ids_depend_on_row_place_and_file_only(self) -> None:
        one = record_id({"a": 1, "b": 2}, 0, "f")
        assert one == record_id({"b": 2, "a": 1}, 0, "f")
        bad = BadLine("detail", "raw")
        ids = {one, record_id({"a": 1}, 0, "f"), record_id(bad, 0, "f"), record_id(bad, 1, "f")}
        others = {record_id({"a": 1, "b": 2}, 1, "f"), record_id({"a": 1, "b": 2}, 0, "g")}
        assert len(ids | others) == 6
        assert len(one) == 32


def test_json_text_is_marked_by_its_metadata() -> None:
    assert is_json_text(infer([{"x": 1}, {"x": "a"}]).field("x"))
    assert not is_json_text(pa.field("x", pa.string()))
