"""Whatever bytes an input file holds: an error that names it, or every row in its place."""

from __future__ import annotations

import gzip
import io
import json
import re
from collections.abc import Callable
from contextlib import ExitStack
from decimal import Decimal
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modelcall_assets.config.preprocess import Preprocess
from modelcall_assets.errors import InputError
from modelcall_assets.records.outcome import BadLine, Number
from modelcall_assets.stages.chatml import convert_split
from modelcall_assets.stages.merged import INVALID, invalid_file_of, merge_group
from modelcall_assets.stages.pieces import ERROR_COLUMN
from modelcall_assets.stages.preprocessed import preprocess
from modelcall_assets.stages.raw import read_raw
from modelcall_assets.stages.recipe import Recipe
from modelcall_assets.stages.source import Part, Source
from modelcall_assets.storage.columns import read_schema
from modelcall_assets.storage.files import publish
from modelcall_assets.storage.formats import Reading
from modelcall_assets.storage.listing import stat_file
from modelcall_assets.storage.rows import read_batches
from modelcall_assets.transforms.chatml import ChatmlOptions

pytestmark = pytest.mark.slow

MANY = settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
PROMPTS = ChatmlOptions("prompt_text_only", {"prompt_text": "text"})
KEEP = Reading()


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as out:
        out.write(content)
    return sink.getvalue().to_pybytes()


def skippable(content: bytes) -> bytes:
    return b"\x5b\x2a\x4d\x18" + len(content).to_bytes(4, "little") + content


def through_all(path: Path, reading: Reading = KEEP) -> list[Any]:
    """What `read_batches` makes of the file, after every step has agreed with it. InputError when
    the file cannot be read."""
    raw = read_raw(stat_file(path), reading=reading)
    batches = list(read_batches(path, schema=raw.schema, rows=3, reading=reading))
    items: list[Any] = []
    for batch in batches:
        assert batch.start == len(items)
        items += batch.items
        columns = batch.to_arrow(raw.schema)
        assert (columns.num_rows, columns.schema) == (len(batch.items), raw.schema)
    bad = [item for item in items if isinstance(item, BadLine)]
    assert raw.rows == len(items)
    assert raw.formats[0].has_columns or raw.failed == len(bad)
    source = Source((Part(path.name, path, raw.digest),), raw.schema, raw.rows, reading=reading)
    folder = path.with_name("out")
    preprocessed(source, folder / "pre.parquet", items)
    too_deep = sum("nested deeper" in item.detail for item in bad)
    converted(path, reading, folder / "chatml.jsonl", len(items), len(bad) - too_deep)
    merged(path, reading, folder / "merged.jsonl", len(items), len(bad) - too_deep)
    source.verify()
    return items


def preprocessed(source: Source, output: Path, items: list[Any]) -> None:
    with publish(output) as out:
        report = preprocess(source, Recipe(Preprocess(), output.parent, "task.yaml"), out)
    made = [
        row for batch in read_batches(output, schema=read_schema(output)) for row in batch.items
    ]
    assert (report.rows_in, report.rows, len(made)) == (len(items),) * 3
    for item, row in zip(items, made, strict=True):
        assert is_bad_line(row) == isinstance(item, BadLine)
    pq.read_table(output).validate(full=True)


def is_bad_line(row: dict[str, Any] | BadLine) -> bool:
    """What is bad in a file of columns, such as a timezone that nobody knows, may stay so."""
    if isinstance(row, BadLine):
        return True
    return bool(row[ERROR_COLUMN]) and orjson.loads(row[ERROR_COLUMN])["reason"] == "bad_line"


def converted(path: Path, reading: Reading, output: Path, rows: int, bad: int) -> None:
    with publish(output) as out:
        report = convert_split([stat_file(path)], PROMPTS, out, reading=reading)
    lines = [json.loads(line) for line in output.read_bytes().splitlines()]
    assert (report.rows_in, len(lines)) == (rows, report.rows)
    assert report.rows_in == report.rows + sum(report.dropped.values())
    assert report.failures.get("bad_line", 0) == bad


def merged(path: Path, reading: Reading, output: Path, rows: int, bad: int) -> None:
    with ExitStack() as stack:
        out = stack.enter_context(publish(output))
        report = merge_group(
            {path.name: path},
            out,
            lambda: stack.enter_context(publish(invalid_file_of(output))),
            reading=reading,
        )
    lines = output.read_bytes().split(b"\n")[:-1]
    assert (report.rows, report.dropped[INVALID], len(lines)) == (rows - bad, bad, rows - bad)
    assert all(type(json.loads(line)) is dict for line in lines)


MARK = b"\xef\xbb\xbf"


TOO_LARGE = re.compile(rb"[0-9]{301,}|[0-9][eE][0-9]{3,}")
"""Numbers that no double holds."""


def good(line: bytes) -> dict[str, Any] | None:
    """The law: what orjson reads as an object, and can write, were its numbers smaller. They are
    those that were written."""
    try:
        row = orjson.loads(TOO_LARGE.sub(b"1", line))
        orjson.dumps(row)
    except (orjson.JSONDecodeError, orjson.JSONEncodeError):
        return None
    if type(row) is not dict:
        return None
    return json.loads(line.decode(), parse_int=Decimal, parse_float=Decimal)


def by_law(content: bytes) -> list[dict[str, Any] | None]:
    """A mark may stand before any line; carriage returns end lines where nothing else does."""
    if b"\n" not in content and b"}\r{" in content:
        content = content.replace(b"\r", b"\n")
    lines = (line.removeprefix(MARK) for line in content.removeprefix(MARK).split(b"\n"))
    return [good(line) for line in lines if line.strip()]


def plain(items: list[Any]) -> list[dict[str, Any] | None]:
    return [None if isinstance(item, BadLine) else digits(item) for item in items]


def digits(value: Any) -> Any:
    """With each number as what was written of it."""
    if isinstance(value, dict):
        return {name: digits(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [digits(inner) for inner in value]
    if isinstance(value, bool) or not isinstance(value, int | float | Number):
        return value
    return Decimal(repr(value) if isinstance(value, float) else str(value))


def rows_or_error(path: Path, reading: Reading = KEEP) -> list[Any] | None:
    """None when the file is refused, by its name."""
    try:
        return through_all(path, reading)
    except InputError as error:
        assert str(error).startswith(f"{path}: ")
        return None


keys = st.sampled_from(["id", "text", "a", "", "\u2028", ERROR_COLUMN, "api_status"])
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=6)
    | st.sampled_from(["\u2028", "a\u2029b", "\x85", "\x00", "\r", "\ud800", "\ud83d\ude00"])
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=5,
)
rows = st.dictionaries(keys, values, max_size=4)
ODD_LINES = [
    *(b"", b"  ", b"\t\x0c", b"\r", b"{", b"}", b"[1]", b"null", b'"x"', b"\x00", b"\xff", b"{}"),
    *(b'{"a":1,"a":2}', b'{"a":1e999}', b'{"a":NaN}', b'{"a":' + b"9" * 400 + b"}", b'{"a":-0}'),
    *(b'{"text":"\\ud800"}', b'{"text":"\\ud83d\\ude00"}', b'{"text":"\\u0000"}'),
    *(b'{"a":"\x00"}', b'{"a":1}\r{"a":2}', b'\xef\xbb\xbf{"a":1}', b'{"a":"\xed\xa0\x80"}'),
    *(b'{"a":' + b"[" * deep + b"]" * deep + b"}" for deep in (60, 260, 1100)),
]
lines = (
    rows.map(lambda row: json.dumps(row, ensure_ascii=True).encode())
    | rows.map(lambda row: json.dumps(row, ensure_ascii=False).encode("utf-8", "replace"))
    | st.sampled_from(ODD_LINES)
    | st.binary(max_size=8).map(lambda line: line.replace(b"\n", b""))
)
contents = st.builds(
    lambda bom, lines, last: bom + b"".join(lines) + last,
    st.sampled_from([b"", b"", b"\xef\xbb\xbf", b"\n"]),
    st.lists(st.builds(bytes.__add__, lines, st.sampled_from([b"\n", b"\r\n"])), max_size=8),
    lines,
)
PACKED: dict[str, Callable[[bytes, int], bytes]] = {
    "a.jsonl": lambda content, _: content,
    "a.NDJSON": lambda content, _: content,
    "b.jsonl.gz": lambda content, _: gzip.compress(content, 1),
    "b.jsonl": lambda content, at: gzip.compress(content[:at]) + gzip.compress(content[at:]),
    "c.ndjson.ZST": lambda content, _: zstd(content),
    "c.jsonl": lambda content, at: zstd(content[:at]) + skippable(content) + zstd(content[at:]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def written(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    return folder / name


@MANY
@given(contents, st.sampled_from([*PACKED]), st.integers(0, 60))
def test_every_line_is_a_row_or_a_bad_line(
    folder: Path, content: bytes, name: str, at: int
) -> None:
    path = written(folder, name, PACKED[name](content, at))
    if content and not is_known(content):
        assert plain(through_all(path)) == by_law(content)


def is_known(content: bytes) -> bool:
    return content.startswith(KNOWN) or content[1:4] == b"\x2a\x4d\x18"


KNOWN = (
    *(b"PAR1", b"PARE", b"ARRO", b"FEA1", b"\xff\xff\xff\xff", b"\x28\xb5\x2f\xfd", b"\x1f\x8b"),
    *(b"BZh", b"\xfd7zXZ\0", b"PK\x03\x04", b"\x04\x22\x4d\x18"),  # refused by their names
)


@MANY
@given(contents.filter(bool), st.sampled_from(["b.jsonl.gz", "c.ndjson.ZST"]), st.data())
def test_a_compressed_file_that_is_cut_off_is_refused(
    folder: Path, content: bytes, name: str, data: st.DataObject
) -> None:
    packed = PACKED[name](content, 0)
    cut = data.draw(st.integers(1, len(packed) - 1))
    assert rows_or_error(written(folder, name, packed[:cut])) is None


NAMES = ["x.jsonl", "x.json", "x.jsonl.gz", "x.json.zst", "x.parquet", "x.arrow", "x.feather"]


@MANY
@given(
    st.sampled_from(NAMES),
    st.sampled_from([b"", b"{", *KNOWN, b"ARROW1\0\0", b"\x1f\x8b\x08\0", b"\x50\x2a\x4d\x18"]),
    st.binary(max_size=200),
)
def test_any_bytes_are_rows_or_a_named_error(
    folder: Path, name: str, magic: bytes, content: bytes
) -> None:
    rows_or_error(written(folder, name, magic + content))


def table() -> pa.Table:
    numbers = range(40)
    return pa.table(
        {
            "id": [f"row {n}" for n in numbers],
            "text": pa.array([f"some text {n % 7}" for n in numbers]).dictionary_encode(),
            "bytes": [bytes([n, 200 + n]) for n in numbers],
            "nested": [{"tags": ["a", "ü"] * (n % 3), "n": n} if n % 5 else None for n in numbers],
            "map": pa.array([[("k", n)] for n in numbers], pa.map_(pa.string(), pa.int64())),
            "at": pa.array(numbers, pa.timestamp("us", "UTC")),
        }
    )


def as_parquet(**options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table(), sink, row_group_size=15, **options)
    return sink.getvalue()


def as_arrow(new: Callable[..., Any], compression: str | None = None) -> bytes:
    sink = io.BytesIO()
    with new(sink, table().schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as out:
        out.write_table(table(), max_chunksize=15)
    return sink.getvalue()


COLUMNS = {
    "a.parquet": as_parquet(),
    "b.jsonl": as_parquet(compression="zstd", data_page_version="2.0"),
    "c.parquet": as_parquet(compression="none", use_dictionary=False),
    "d.arrow": as_arrow(pa.ipc.new_stream),
    "e.feather": as_arrow(pa.ipc.new_file, "zstd"),
    "f.jsonl": as_arrow(pa.ipc.new_file),
}


@MANY
@given(
    st.sampled_from([*COLUMNS]),
    st.lists(st.tuples(st.integers(0, 2**16), st.integers(1, 255)), max_size=3),
    st.integers(0, 400),
)
def test_columns_with_flipped_bytes_or_without_their_end(
    folder: Path, name: str, flips: list[tuple[int, int]], cut: int
) -> None:
    content = bytearray(COLUMNS[name])
    for at, change in flips:
        content[at % len(content)] ^= change
    if cut < 100:
        del content[len(content) - cut :]
    items = rows_or_error(written(folder, name, bytes(content)))
    if not flips and cut in (0, *range(100, 401)):
        assert items is not None
        assert [item["id"] for item in items] == table()["id"].to_pylist()


BAD = {
    "gbk": (b"\x81", b"\xff\xfe", b'{"a":"\x81\x20"}'),
    "shift_jis": (b"\x81", b"\xfd", b"{\xa0}"),
    "cp1252": (b"\x81", b'{"a":"\x9d"}'),
    "utf-16-le": (b"\x00\xd8", b"{\x00\x00\xdc"),
    "utf-16": (b"\x00\xd8", b"{\x00\x00\xdc"),
    "utf-32-be": (b"\x00\x11\x00\x00", b"\x00\x00\xd8\x00"),
}
TEXTS = ["{}", '{"a": "x"}', '{"text": "中文。"}', '{"a": "\u2028"}', "[1]", "", "  ", "{"]


@MANY
@given(
    st.sampled_from([*BAD]),
    st.lists(st.sampled_from(TEXTS) | st.integers(0, 2), min_size=1, max_size=8),
    st.sampled_from(["e.jsonl", "e.jsonl.gz"]),
)
def test_lines_of_any_encoding_are_rows_and_the_others_bad_lines(
    folder: Path, encoding: str, made: list[str | int], name: str
) -> None:
    """Lines of text, and by their numbers those that the encoding does not have."""
    codec = "utf-16-le" if encoding == "utf-16" else encoding
    content, expected = b"", []
    for line in made:
        if isinstance(line, int):
            content += BAD[encoding][line % len(BAD[encoding])]
            expected.append(None)
        else:
            content += (encoded := line.encode(codec, "ignore"))
            expected += by_law(encoded.decode(codec).encode())
        content += "\n".encode(codec)
    bom = b"\xff\xfe" if encoding == "utf-16" else b""
    packed = gzip.compress(bom + content) if name.endswith("gz") else bom + content
    path = written(folder, name, packed)
    assert plain(through_all(path, Reading(encoding))) == expected
