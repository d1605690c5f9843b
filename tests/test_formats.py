"""storage/formats, columns and jsonl: what a file is, in which encoding, and where it ends."""

from __future__ import annotations

import datetime as dt
import errno
import gzip
import hashlib
import io
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import orjson
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from modelcall_assets.errors import InputChanged, InputError
from modelcall_assets.records import DATA_SUFFIXES, StoreOptions, is_data_file, stem_of
from modelcall_assets.records.outcome import BadLine
from modelcall_assets.stages.raw import RawReport, read_raw
from modelcall_assets.storage.files import file_digest, publish
from modelcall_assets.storage.formats import OURS, Format, Reading, format_of
from modelcall_assets.storage.listing import stat_file
from modelcall_assets.storage.parquet import ParquetSink, check_writable
from modelcall_assets.storage.places import Place, Stores
from modelcall_assets.storage.rows import count_rows, read_batches, read_rows

ROWS = [{"id": f"row {n}", "text": f"text {n} 中文", "n": n} for n in range(300)]
CONTENT = b"".join(orjson.dumps(row) + b"\n" for row in ROWS)
TABLE = pa.Table.from_pylist(ROWS)


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as out:
        out.write(content)
    return sink.getvalue().to_pybytes()


def as_parquet(path: Path, table: pa.Table = TABLE) -> None:
    pq.write_table(table, path)


def as_stream(path: Path, table: pa.Table = TABLE, chunk: int = 70) -> None:
    with pa.ipc.new_stream(path, table.schema) as out:
        out.write_table(table, max_chunksize=chunk)


def as_ipc_file(path: Path, table: pa.Table = TABLE, chunk: int = 70) -> None:
    with pa.ipc.new_file(path, table.schema) as out:
        out.write_table(table, max_chunksize=chunk)


def as_lines(path: Path) -> None:
    path.write_bytes(CONTENT)


def as_gzip(path: Path) -> None:
    path.write_bytes(gzip.compress(CONTENT[:5000]) + gzip.compress(CONTENT[5000:]))


def as_zstd(path: Path) -> None:
    skippable = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"note"
    path.write_bytes(skippable + zstd(CONTENT[:5000]) + skippable + zstd(CONTENT[5000:]))


WRITERS: dict[Format, list[Callable[[Path], None]]] = {
    Format.LINES: [as_lines],
    Format.GZIP: [as_gzip],
    Format.ZSTD: [as_zstd],
    Format.PARQUET: [as_parquet],
    Format.ARROW: [as_stream, as_ipc_file, lambda path: feather.write_feather(TABLE, str(path))],
}
CASES = [
    pytest.param(kind, write, id=f"{kind} {number}")
    for kind, writers in WRITERS.items()
    for number, write in enumerate(writers)
]


def items_of(place: Place, reading: Reading = OURS, **options: Any) -> list[Any]:
    schema = read_raw(stat_file(place), reading=reading).schema
    batches = read_batches(place, schema=schema, reading=reading, **options)
    return [item for batch in batches for item in batch.items]


class TestNames:
    def test_of_every_format_are_known(self) -> None:
        assert len(DATA_SUFFIXES) == 18
        for name in ("A.JSONL.GZ", "b.ndjson", "x/c.json.zst", "d.feather", "e.Parquet", "f.arrow"):
            assert is_data_file(name)
        for name in ("a.csv", "jsonl", "a.gz", "a.jsonl.bz2", "dataset_info.json", "x/state.json"):
            assert not is_data_file(name)

    @pytest.mark.parametrize(
        ("name", "stem"),
        [("a.b.JSONL.gz", "a.b"), ("a.json", "a"), ("a.gz", "a.gz"), ("a.parquet", "a")],
    )
    def test_have_a_stem_without_format_and_compression(self, name: str, stem: str) -> None:
        assert stem_of(name) == stem


class TestLines:
    @pytest.mark.parametrize(
        "content",
        [
            b'{"n":1}\n\xef\xbb\xbf{"n":2}\n\xef\xbb\xbf\n\n \t\r\n\xef\xbb\xbf{"n":3}',
            b'{"n":1}\r{"n":2}\r\r{"n":3}\r',
            b'{"n":1}\r\n{"n":2}\n\r\n{"n":3}\r',
            b'\xef\xbb\xbf{"n":\r1}\n{"n":2}\n{"n":3}',
        ],
        ids=["marks", "carriage returns", "mixed ends", "a return in a line"],
    )
    @pytest.mark.parametrize("pack", [bytes, gzip.compress, zstd], ids=["plain", "gzip", "zstd"])
    def test_are_read_with_any_mark_and_end_of_line(
        self, tmp_path: Path, content: bytes, pack: Callable[[bytes], bytes]
    ) -> None:
        path = tmp_path / "x.jsonl"
        path.write_bytes(pack(content))
        assert items_of(path) == [{"n": 1}, {"n": 2}, {"n": 3}] == list(read_rows(path))
        assert read_raw(stat_file(path)).failed == 0

    def test_gzip_may_be_padded_with_zeros(self, tmp_path: Path) -> None:
        path = tmp_path / "x.jsonl.gz"
        half = gzip.compress(CONTENT[:5000]) + bytes(512)
        path.write_bytes(half + gzip.compress(CONTENT[5000:]) + bytes(100_000))
        assert items_of(path) == ROWS
        path.write_bytes(gzip.compress(CONTENT) + bytes(9) + b"no")
        with pytest.raises(InputError, match="after line 300, as gzip says: Not a gzipped file"):
            items_of(path)

    @pytest.mark.parametrize(
        ("magic", "named"), [(b"BZh91AY", "bzip2"), (b"\xfd7zXZ\0", "xz"), (b"PK\x03\x04", "zip")]
    )
    def test_other_compressions_are_named(self, tmp_path: Path, magic: bytes, named: str) -> None:
        path = tmp_path / "x.jsonl"
        path.write_bytes(magic + b"\0" * 20)
        with pytest.raises(InputError, match=f"x.jsonl: compressed with {named}; use gzip or zstd"):
            items_of(path)

    @pytest.mark.parametrize("pack", [bytes, gzip.compress, zstd], ids=["plain", "gzip", "zstd"])
    def test_numbers_count_every_blank_line(
        self, tmp_path: Path, pack: Callable[[bytes], bytes]
    ) -> None:
        path = tmp_path / "x.jsonl"
        blank = b"\n" * 700_000 + b" \t\n\r\n" * 50_000
        path.write_bytes(pack(b'{"n":1}\n' + blank + b"{torn\n" + blank + b"  "))
        report = read_raw(stat_file(path))
        assert (report.rows, report.failed, report.blank_lines) == (2, 1, 1_600_001)
        bad = items_of(path)[1]
        assert isinstance(bad, BadLine) and bad.detail.startswith("line 800002, column 2")

    def test_a_line_longer_than_the_limit(self, tmp_path: Path) -> None:
        """Of which no more than the limit is held."""
        path = tmp_path / "x.jsonl.gz"
        with gzip.open(path, "wb", 1) as out:
            out.write(b'{"n":1}\n{"n": "')
            for _ in range(18):
                out.write(b"x" * (16 << 20))
            out.write(b'"}\n{"n":3}\n')
        items = list(read_rows(path))
        assert items[::2] == [{"n": 1}, {"n": 3}]
        assert isinstance(items[1], BadLine)
        assert items[1].detail == "line 2: longer than 256 MiB; its beginning is kept"
        assert items[1].raw.startswith('{"n": "xxx') and len(items[1].raw) < 11_000

    def test_numbers_and_levels_beyond_what_json_readers_hold(self, tmp_path: Path) -> None:
        path = tmp_path / "x.jsonl"
        deep = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
        path.write_bytes(b'{"a":' + b"9" * 5000 + b"}\n" + deep + b"\n\0\0\0\n{}\n")
        items = items_of(path)
        assert [isinstance(item, BadLine) for item in items] == [True, True, True, False]


class TestContent:
    @pytest.mark.parametrize(
        "name", ["x.jsonl", "x.json.gz", "x.ndjson.zst", "x.parquet", "x.arrow"]
    )
    @pytest.mark.parametrize(("kind", "write"), CASES)
    def test_it_counts_whatever_the_name_says(
        self, tmp_path: Path, kind: Format, write: Callable[[Path], None], name: str
    ) -> None:
        path = tmp_path / name
        write(path)
        report = read_raw(stat_file(path))
        assert (report.formats, report.rows, report.digest) == ((kind,), 300, file_digest(path))
        assert report.sample == ROWS[:6]
        assert items_of(path) == ROWS == list(read_rows(path))
        assert items_of(path, limit=99, rows=50) == ROWS[:99]
        assert read_raw(stat_file(path), limit=99).rows == 99
        assert read_raw(stat_file(path), limit=99).digest == file_digest(path)

    @pytest.mark.parametrize(("kind", "write"), CASES)
    def test_tells_the_format_in_a_store_too(
        self, tmp_path: Path, kind: Format, write: Callable[[Path], None]
    ) -> None:
        write(tmp_path / "x")
        fsspec.filesystem("memory").pipe("/formats/x.jsonl", (tmp_path / "x").read_bytes())
        place = Stores().place("memory://formats/x.jsonl")
        assert format_of(place) is kind
        assert items_of(place) == ROWS
        assert read_raw(stat_file(place)).digest == file_digest(tmp_path / "x")

    @pytest.mark.parametrize(
        ("name", "content", "kind"),
        [
            ("a.jsonl", b"", Format.LINES),
            ("a.jsonl.gz", b"", Format.GZIP),
            ("a.parquet", b"", Format.PARQUET),
            ("a.feather", b"?", Format.ARROW),
            ("a.parquet", b" \r\n {", Format.LINES),
            ("a.arrow", b"\xff\xfe{\0", Format.LINES),
            ("a.json.gz", b"\xef\xbb\xbf{}", Format.LINES),
            ("a.jsonl", b"\x1f", Format.LINES),
        ],
    )
    def test_where_it_says_nothing_the_name_does(
        self, tmp_path: Path, name: str, content: bytes, kind: Format
    ) -> None:
        (tmp_path / name).write_bytes(content)
        assert format_of(tmp_path / name) is kind

    @pytest.mark.parametrize("pack", [gzip.compress, zstd])
    def test_what_is_compressed_once_too_often_is_refused(
        self, tmp_path: Path, pack: Callable[[bytes], bytes]
    ) -> None:
        for write in (as_parquet, as_stream):
            write(tmp_path / "x")
            (tmp_path / "x.parquet.gz").write_bytes(pack((tmp_path / "x").read_bytes()))
            with pytest.raises(InputError, match=r"x\.parquet\.gz: a file of .* decompress it: "):
                items_of(tmp_path / "x.parquet.gz")
        (tmp_path / "x.jsonl.gz").write_bytes(pack(gzip.compress(CONTENT)))
        with pytest.raises(InputError, match=r"x\.jsonl\.gz: compressed twice"):
            items_of(tmp_path / "x.jsonl.gz")

    def test_feather_1_and_arrays_are_refused(self, tmp_path: Path) -> None:
        (tmp_path / "a.feather").write_bytes(b"FEA1 and more")
        with pytest.raises(InputError, match="Feather version 1; write it as version 2"):
            items_of(tmp_path / "a.feather")
        for name, pack in (("a.json", bytes), ("a.json.gz", gzip.compress), ("A.JSON.ZST", zstd)):
            (tmp_path / name).write_bytes(pack(b'\xef\xbb\xbf \n[{"a": 1}]'))
            with pytest.raises(InputError, match="one JSON array; write it as one object per line"):
                items_of(tmp_path / name)
        (tmp_path / "a.jsonl").write_bytes(b'[{"a": 1}]')
        assert isinstance(items_of(tmp_path / "a.jsonl")[0], BadLine)


class TestDamage:
    @pytest.mark.parametrize("pack", [gzip.compress, zstd])
    def test_a_compressed_file_that_is_cut_off_is_an_error_wherever_it_is(
        self, tmp_path: Path, pack: Callable[[bytes], bytes]
    ) -> None:
        """The second member too, as an upload in pieces may leave it."""
        first, second = pack(CONTENT[:5000]), pack(CONTENT[5000:])
        whole, path = first + second, tmp_path / "x.jsonl.gz"
        for cut in {*range(1, 30), *range(30, len(whole), 97), len(whole) - 1} - {len(first)}:
            path.write_bytes(whole[:cut])
            with pytest.raises(InputError, match=r"x\.jsonl\.gz: damaged or cut off after line "):
                list(read_rows(path))
        path.write_bytes(first)
        assert len(list(read_rows(path))) == CONTENT[:5000].count(b"\n") + 1

    def test_it_says_how_far_it_could_be_read(self, tmp_path: Path) -> None:
        content = b"".join(b'{"n": %d}\n' % n for n in range(10_000))
        path = tmp_path / "x.jsonl.gz"
        path.write_bytes(gzip.compress(content) + b"\x1f\x8b\x08")
        with pytest.raises(
            InputError, match="after line 10,000, as gzip says: Compressed file ended"
        ):
            list(read_rows(path))
        path.write_bytes(gzip.compress(content) + b"something else")
        with pytest.raises(InputError, match="after line 10,000, as gzip says: Not a gzip"):
            list(read_rows(path))

    def test_a_flipped_byte_is_an_error(self, tmp_path: Path) -> None:
        packed = bytearray(gzip.compress(CONTENT))
        packed[len(packed) // 2] ^= 1
        (tmp_path / "x.jsonl").write_bytes(packed)
        with pytest.raises(InputError, match=r"x\.jsonl: damaged or cut off after line \d"):
            read_raw(stat_file(tmp_path / "x.jsonl"))

    def test_a_parquet_column_that_ends_early(self, tmp_path: Path) -> None:
        """Arrow would end the file there without an error."""
        table = pa.table({"text": ["x"] * 40, "n": range(40)})
        pq.write_table(table, tmp_path / "a.parquet", row_group_size=15)
        damaged = bytearray((tmp_path / "a.parquet").read_bytes())
        for at in range(len(damaged) - 8):
            damaged[at] ^= 59
            (tmp_path / "b.parquet").write_bytes(damaged)
            damaged[at] ^= 59
            try:
                rows = items_of(tmp_path / "b.parquet", rows=3)
            except InputError as error:
                if "rows are missing" in str(error):
                    return
            else:
                assert len(rows) == 40
        pytest.fail("no byte makes a column end early")

    def test_an_arrow_file_with_wrong_offsets(self, tmp_path: Path) -> None:
        """Reading on would read whatever lies in memory."""
        as_stream(tmp_path / "a.arrow", pa.table({"text": ["one", "two", "three"]}))
        content = (tmp_path / "a.arrow").read_bytes()
        offsets = b"".join(n.to_bytes(4, "little") for n in (0, 3, 6, 11))
        assert content.count(offsets) == 1
        wrong = offsets[:8] + (1 << 30).to_bytes(4, "little") + offsets[12:]
        (tmp_path / "a.arrow").write_bytes(content.replace(offsets, wrong))
        with pytest.raises(InputError, match=r"a\.arrow: not a readable Arrow file"):
            items_of(tmp_path / "a.arrow")


class Failing(MemoryFileSystem):
    """A store that does not answer after the first 5,000 bytes of a file."""

    cachable = False

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        file = super()._open(path, mode, **options)
        read = file.read

        def some(size: int = -1) -> bytes:
            if file.tell() >= 5000:
                raise OSError(errno.EIO, "the line is dead")
            return read(min(size, 5000))

        def into(buffer: Any) -> int:
            data = some(len(buffer))
            buffer[: len(data)] = data
            return len(data)

        file.read, file.readinto = some, into
        return file


class TestStore:
    @pytest.mark.parametrize("pack", [bytes, gzip.compress, zstd])
    def test_a_failure_of_the_store_is_told_as_that(self, pack: Callable[[bytes], bytes]) -> None:
        content = b"".join(
            b'{"n": "%b"}\n' % hashlib.sha512(b"%d" % n).digest().hex().encode() for n in range(999)
        )
        fsspec.filesystem("memory").pipe("/failing/x.jsonl", pack(content))
        stores = Stores([StoreOptions("test", "fail://", "test_formats:Failing", {})])
        with pytest.raises(
            InputError, match=r"fail://failing/x\.jsonl: cannot be read.*the line is"
        ):
            list(read_rows(stores.place("fail://failing/x.jsonl")))


def report_of(path: Path, reading: Reading) -> RawReport:
    return read_raw(stat_file(path), reading=reading)


class TestEncodings:
    @pytest.mark.parametrize(
        ("encoding", "bom"),
        [
            ("gbk", b""),
            ("gb18030", b""),
            ("utf-16", b""),
            ("utf-16-le", b"\xff\xfe"),
            ("utf-16-be", b"\xfe\xff"),
            ("utf-32", b""),
            ("utf-8", b"\xef\xbb\xbf"),
            ("utf-8-sig", b""),
            ("utf-7", b""),
            ("cp037", b""),
        ],
    )
    @pytest.mark.parametrize("pack", [bytes, gzip.compress])
    def test_lines_are_read_as_utf_8(
        self, tmp_path: Path, encoding: str, bom: bytes, pack: Callable[[bytes], bytes]
    ) -> None:
        text = "cafe" if encoding == "cp037" else "中文。" * 30_000
        content = "".join(f'{{"n": {n}, "text": "{text}"}}\n' for n in range(3))
        path = tmp_path / "x.jsonl"
        path.write_bytes(pack(bom + content.encode(encoding)))
        reading = Reading(encoding)
        assert items_of(path, reading) == [{"n": n, "text": text} for n in range(3)]
        report = report_of(path, reading)
        assert (report.digest, report.failed) == (file_digest(path), 0)

    def test_bytes_that_the_encoding_does_not_have_are_a_bad_line(self, tmp_path: Path) -> None:
        lines = ['{"a": "中"}'.encode("gbk"), b'{"a": "\x81\x20"}', b'{"a": "ok"}', b"\x81"]
        (tmp_path / "x.jsonl").write_bytes(b"\n".join(lines))
        first, bad, last, cut = items_of(tmp_path / "x.jsonl", Reading("gbk"))
        assert (first, last) == ({"a": "中"}, {"a": "ok"})
        assert bad == BadLine("line 2, column 8: not gbk", '{"a": "\ufffd\\x81 "}')
        assert cut == BadLine("line 4, column 1: not gbk", "\ufffd\\x81")
        report = report_of(tmp_path / "x.jsonl", Reading("gbk"))
        assert (report.rows, report.failed, report.first_bad) == (4, 2, bad.detail)

    def test_half_a_character_at_the_end_of_utf_16(self, tmp_path: Path) -> None:
        (tmp_path / "x.jsonl").write_bytes('{"a": 1}\n{"b": 2}'.encode("utf-16") + b"\0")
        first, bad = items_of(tmp_path / "x.jsonl", Reading("utf-16"))
        assert first == {"a": 1}
        assert bad == BadLine("line 2, column 9: not utf-16", '{"b": 2}\ufffd\\x00')

    def test_utf_16_without_a_word_of_it_gets_a_hint(self, tmp_path: Path) -> None:
        (tmp_path / "x.jsonl").write_bytes('{"a": 1}\n'.encode("utf-16"))
        report = report_of(tmp_path / "x.jsonl", OURS)
        assert report.first_bad == "line 1, column 1: UTF-16 by its first bytes, set `encoding`"

    def test_a_codec_that_cannot_go_on_after_an_error(self, tmp_path: Path) -> None:
        (tmp_path / "x.jsonl").write_bytes(CONTENT)
        with pytest.raises(InputError, match=r"x\.jsonl: cannot be read as punycode: "):
            report_of(tmp_path / "x.jsonl", Reading("punycode"))


class TestOnBadLine:
    STRICT = Reading(on_bad_line="fail")

    @pytest.mark.parametrize("bad", [b"{broken", b"[1]", b'{"a": "\xff"}', b"{" * 300])
    @pytest.mark.parametrize("pack", [bytes, zstd])
    def test_fail_names_file_line_and_reason(
        self, tmp_path: Path, bad: bytes, pack: Callable[[bytes], bytes]
    ) -> None:
        path = tmp_path / "x.jsonl"
        path.write_bytes(pack(b'{"a": 1}\n\n' + bad + b"\n{}\n"))
        kept = items_of(path)
        assert [isinstance(item, BadLine) for item in kept] == [False, True, False]
        told = r"x\.jsonl: line 3.*: .*; correct it, or write `on_bad_line: keep`"
        with pytest.raises(InputError, match=told):
            report_of(path, self.STRICT)
        with pytest.raises(InputError, match=told):
            list(read_rows(path, self.STRICT))
        with pytest.raises(InputError, match=told):
            [batch.items for batch in read_batches(path, reading=self.STRICT)]
        path.write_bytes(pack(b'{"a": 1}\n\n'))
        assert items_of(path, self.STRICT) == [{"a": 1}]

    def test_a_cell_that_cannot_be_read(self, tmp_path: Path) -> None:
        texts = pa.array([b"one", b"\xff", b"three"]).view(pa.string())
        nested = pa.StructArray.from_arrays([texts], ["a"])
        as_parquet(tmp_path / "x.parquet", pa.table({"id": ["1", "2", "3"], "nested": nested}))
        first, bad, last = items_of(tmp_path / "x.parquet")
        assert [row["nested"]["a"] for row in (first, last)] == ["one", "three"]
        assert bad.detail.startswith("row 2: column 'nested' (struct<a: string>) cannot be read: ")
        schema = read_raw(stat_file(tmp_path / "x.parquet")).schema
        (batch,) = read_batches(tmp_path / "x.parquet", schema=schema)
        assert batch.to_arrow(schema)["id"].to_pylist() == ["1", None, "3"]
        with pytest.raises(InputError, match=r"x\.parquet: row 2: column 'nested'"):
            [batch.items for batch in read_batches(tmp_path / "x.parquet", self.STRICT)]


class TestColumns:
    def test_dictionaries_may_differ_from_batch_to_batch(self, tmp_path: Path) -> None:
        batches = [
            pa.record_batch({"word": pa.array(words).dictionary_encode()})
            for words in (["a", "b", None], ["c", "b"])
        ]
        with pa.ipc.new_stream(tmp_path / "x.arrow", batches[0].schema) as out:
            for batch in batches:
                out.write_batch(batch)
        words = ["a", "b", None, "c", "b"]
        assert [row["word"] for row in items_of(tmp_path / "x.arrow")] == words
        schema = read_raw(stat_file(tmp_path / "x.arrow")).schema
        with publish(tmp_path / "y.parquet") as file, ParquetSink(file, "scores", schema) as sink:
            for batch in read_batches(tmp_path / "x.arrow", schema=schema):
                sink.write(batch.to_arrow(schema))
        assert pq.read_table(tmp_path / "y.parquet")["word"].to_pylist() == words

    @pytest.mark.parametrize("write", [as_parquet, as_stream, as_ipc_file])
    def test_nested_binary_and_map_columns(
        self, tmp_path: Path, write: Callable[[Path, pa.Table], None]
    ) -> None:
        table = pa.table(
            {
                "png": [b"\x89PNG", b"text", None],
                "fixed": pa.array([b"\xff\x00", b"ab", None], pa.binary(2)),
                "map": pa.array(
                    [[("k", [1])], [], None], pa.map_(pa.string(), pa.list_(pa.int8()))
                ),
                "deep": [[{"a": [{"b": b"\xff"}]}], [], None],
                "numbers": pa.array([7, None, 7]).dictionary_encode(),
                "day": [dt.date(2026, 1, 2), None, None],
            }
        )
        write(tmp_path / "x.bin.parquet", table)
        first, second, third = items_of(tmp_path / "x.bin.parquet")
        assert first == {
            "png": b"\x89PNG",
            "fixed": b"\xff\x00",
            "map": [("k", [1])],
            "deep": [{"a": [{"b": b"\xff"}]}],
            "numbers": 7,
            "day": "2026-01-02",
        }
        assert (second["png"], second["fixed"], second["map"]) == ("text", "ab", [])
        assert set(third.values()) == {None, 7}

    def test_text_that_is_not_utf_8_gets_replacement_characters(self, tmp_path: Path) -> None:
        """In the rows and in what is written of them, which no reader would take otherwise."""
        for kind in (pa.string(), pa.large_string()):
            latin = pa.array([b"caf\xe9", None, b"ok"], pa.binary()).cast(
                pa.large_binary() if kind == pa.large_string() else pa.binary()
            )
            as_parquet(tmp_path / "x.parquet", pa.table({"a": latin.view(kind)}))
            schema = read_raw(stat_file(tmp_path / "x.parquet")).schema
            (batch,) = read_batches(tmp_path / "x.parquet", schema=schema)
            assert [row["a"] for row in batch.items] == ["caf\ufffd", None, "ok"]
            batch.to_arrow(schema).validate(full=True)
            assert batch.to_arrow(schema)["a"].to_pylist() == ["caf\ufffd", None, "ok"]

    @pytest.mark.parametrize(
        "kind", [pa.month_day_nano_interval(), pa.struct([]), pa.list_(pa.struct([]))]
    )
    def test_a_type_that_parquet_does_not_have(self, kind: pa.DataType) -> None:
        schema = pa.schema([("fine", pa.int64()), ("odd", kind)])
        with pytest.raises(InputError, match=r"x\.arrow: column 'odd' .*make it a string"):
            check_writable(Path("x.arrow"), schema)
        check_writable(Path("x.arrow"), pa.schema([("fine", pa.list_view(pa.int8()))]))

    def test_a_value_that_parquet_does_not_have(self, tmp_path: Path) -> None:
        far = pa.record_batch({"at": pa.array([2**62]).view(pa.timestamp("s"))})
        with (
            pytest.raises(InputError, match=r"out\.parquet: a column of these rows cannot be"),
            publish(tmp_path / "out.parquet") as file,
            ParquetSink(file, "scores", far.schema) as sink,
        ):
            sink.write(far)
        assert not (tmp_path / "out.parquet").exists()

    def test_arrow_batches_that_are_empty(self, tmp_path: Path) -> None:
        with pa.ipc.new_stream(tmp_path / "x.arrow", TABLE.schema) as out:
            for part in (TABLE[:0], TABLE[:2], TABLE[:0], TABLE[2:4]):
                out.write_table(part) if len(part) else out.write_batch(
                    pa.RecordBatch.from_pylist([], TABLE.schema)
                )
        assert items_of(tmp_path / "x.arrow") == ROWS[:4]
        as_stream(tmp_path / "y.arrow", TABLE[:0])
        assert (items_of(tmp_path / "y.arrow"), read_raw(stat_file(tmp_path / "y.arrow")).rows) == (
            [],
            0,
        )

    def test_another_schema_means_the_file_changed(self, tmp_path: Path) -> None:
        as_stream(tmp_path / "x.arrow")
        with pytest.raises(InputChanged, match="run the task again"):
            list(read_batches(tmp_path / "x.arrow", schema=pa.schema([("id", pa.int64())])))


def peak_of(place: Place) -> int:
    """Memory of Python's while all rows are read; what Arrow reads through a file counts too."""
    tracemalloc.start()
    rows = sum(1 for _ in read_rows(place))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert rows == 8000
    return peak


class TestMemory:
    TABLE = pa.table({"text": [hashlib.sha512(b"%d" % n).hexdigest() * 50 for n in range(8000)]})

    @pytest.mark.parametrize("rows", [500, 8000])
    def test_of_a_parquet_file_on_a_disk(self, tmp_path: Path, rows: int) -> None:
        """However large its row groups are."""
        pq.write_table(
            self.TABLE,
            tmp_path / "x",
            row_group_size=rows,
            compression="none",
            use_dictionary=False,
        )
        assert peak_of(tmp_path / "x") < (tmp_path / "x").stat().st_size / 2 > 20 << 20

    def test_of_a_parquet_file_in_a_store(self) -> None:
        """Fetched a row group at a time."""
        content = io.BytesIO()
        pq.write_table(self.TABLE, content, 500, compression="none", use_dictionary=False)
        fsspec.filesystem("memory").pipe("/memory/x.parquet", content.getvalue())
        peak = peak_of(Stores().place("memory://memory/x.parquet"))
        assert peak < len(content.getvalue()) / 2 > 20 << 20

    @pytest.mark.parametrize("codec", ["gzip", "zstd"])
    def test_of_a_compressed_file(self, tmp_path: Path, codec: str) -> None:
        with pa.CompressedOutputStream(tmp_path / "x.jsonl", codec) as out:
            for text in self.TABLE["text"]:
                out.write(b'{"text": "%b"}\n' % text.as_py().encode())
        assert peak_of(tmp_path / "x.jsonl") < 4 << 20


def test_too_many_keys_are_refused_early(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"".join(b'{"k%d": 1}\n' % n for n in range(12_000)))
    with pytest.raises(InputError, match=r"more than 10,000 different keys up to line 1[01],"):
        read_raw(stat_file(path))


class TestLimit:
    @pytest.mark.parametrize("size", [1 << 10, 1 << 20])
    def test_what_lies_behind_it_may_be_damaged(self, tmp_path: Path, size: int) -> None:
        rows = [{"n": n, "text": f"{n * 7919 % 1009}" * 40} for n in range(4000)]
        whole = gzip.compress(b"".join(orjson.dumps(row) + b"\n" for row in rows))
        path = tmp_path / "cut.jsonl.gz"
        path.write_bytes(whole[:-20])
        batches = [*read_batches(path, limit=5, rows=2, size=size)]
        assert [batch.rows for batch in batches][:2] == [2, 2][: len(batches)]
        assert [item for batch in batches for item in batch.items] == rows[:5]
        assert read_raw(stat_file(path), limit=5).rows == 5

    def test_a_deep_row_is_counted_where_bad_lines_are_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "deep.jsonl"
        path.write_bytes(b'{"x":' + b"[" * 300 + b"]" * 300 + b"}\n")
        strict = Reading(on_bad_line="fail")
        assert count_rows(path, strict) == len([*read_rows(path, strict)]) == 1
        with pytest.raises(InputError, match="nested deeper"):
            read_raw(stat_file(path), reading=strict)
