"""What is in the user's columns steers nothing, and each keeps its name unless it clashes."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping
from datetime import date
from decimal import Decimal
from itertools import permutations
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from project import CHATML, CHATS, GENERATE, PREPROCESS, A, Project, Row

from modelcall_assets.errors import InputError, StoreError
from modelcall_assets.records.outcome import moved_names
from modelcall_assets.stages.export import Form, export_files
from modelcall_assets.stages.pieces import ERROR_COLUMN
from modelcall_assets.stages.report import Tally
from modelcall_assets.stages.responses import OWN_COLUMNS
from modelcall_assets.stages.score_table import API_FIELDS
from modelcall_assets.stages.selection import Selection
from modelcall_assets.stages.source import published_files
from modelcall_assets.storage.columns import rows_of
from modelcall_assets.storage.files import NewFile
from modelcall_assets.storage.formats import parse_line
from modelcall_assets.storage.parquet import ParquetSink
from modelcall_assets.storage.rows import columns_of
from modelcall_assets.storage.values import SchemaInference, loads
from modelcall_assets.transforms import encode

SCORER = """
class Rated:
    fields = {"score": {"type": "integer"}}
    def score(self, item):
        return {"score": 5}
"""
"""A scorer without a model: every row that it sees has the score 5."""
MARKERS = (
    '{"reason": "bad_line", "detail": "d", "raw": "r"}',
    '{"reason": "timeout", "detail": "d"}',
    "no JSON",
    "",
    None,
)
TRAPS = (
    *(name for name, _ in API_FIELDS),
    *OWN_COLUMNS,
    *("score", "text_language", "content_truncate_8k", "source", "sample", "error", "status"),
    *("reason", "request_key", "raw_data", "raw", "format", "_id", "__index_level_0__", "detail"),
    *(
        "modelcall.json",
        "x",
        "",
        "a.b",
        "Score",
        "SCORE",
        "input_",
        "é",
        "e\u0301",
        " score",
        "\u2028",
    ),
)


@pytest.fixture
def project(bare: Project) -> Project:
    return bare


@pytest.fixture
def rated(project: Project) -> Project:
    """Rated by a scorer of its own."""
    (project.root / "plain_rules.py").write_text(SCORER)
    project.write_task({"model": None, "prompt": None, "scorer": "plain_rules:Rated"})
    return project


def preprocessing(project: Project, **options: Any) -> None:
    project.write_task(
        {
            "model": None,
            "prompt": None,
            "scorer": "plain_rules:Rated",
            "preprocess": {**PREPROCESS, **options},
            "max_failure_rate": 1,
        }
    )


names = st.lists(st.sampled_from(["a", "input_a", "input_input_a", "b", "input_b", "", "A"]))


class TestNewNames:
    @given(names, names)
    def test_are_free_and_do_not_hang_on_the_order(
        self, theirs: list[str], ours: list[str]
    ) -> None:
        moved = moved_names(theirs, ours)
        assert moved.keys() == {*theirs} & {*ours}
        kept = {*theirs} - moved.keys()
        assert len({*moved.values()}) == len(moved)
        assert not {*moved.values()} & (kept | {*ours} | {*theirs})
        assert moved == moved_names([*reversed(theirs)], {*ours})


class TestClashingColumns:
    FORMATS = ("jsonl", "parquet", "arrow")

    def test_are_the_same_whatever_the_order_and_format(self, rated: Project) -> None:
        mine = {"score": "mine", "input_score": "other", "text": "t", "input_input_x": "x"}
        files = []
        for number, order in enumerate(permutations(mine)):
            name = f"{number}.{self.FORMATS[number % 3]}"
            rated.write_input(name, [{key: mine[key] for key in order}] * 2)
            files.append(name)
        assert rated.materialize().failed == []
        expected = {**mine, "score": 5, "input_input_score": "mine"}
        for name in files:
            assert rated.manifest(name).moved == {"score": "input_input_score"}
            for row in rated.scores(name):
                assert {key: row[key] for key in expected} == expected

    @pytest.mark.parametrize("preprocess", [False, True])
    def test_of_later_rows_count_for_the_first_ones_too(
        self, rated: Project, preprocess: bool
    ) -> None:
        rows = [{"text": "a", "score": 1}, {"text": "b", "input_score": 2}, {"text": "c"}]
        rated.write_input(A, rows)
        if preprocess:
            preprocessing(rated)
        assert rated.materialize().failed == []
        read = [(row["input_input_score"], row["input_score"]) for row in rated.scores(A)]
        assert read == [(1, None), (None, 2), (None, None)]


class TestTraps:
    """Columns that are called like something of ours."""

    @pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
    @pytest.mark.parametrize("preprocess", [False, True])
    def test_steer_nothing_and_are_all_there(
        self, rated: Project, name: str, preprocess: bool
    ) -> None:
        order = [*dict.fromkeys([*TRAPS, ERROR_COLUMN])]
        random.Random(7).shuffle(order)
        rows: list[Row] = [
            {"id": f"r{n}", "text": "some text", **{key: f"{key}#{n}" for key in order}}
            for n in range(len(MARKERS))
        ]
        for row, marker in zip(rows, MARKERS, strict=True):
            row[ERROR_COLUMN] = marker
            row["api_status"] = "error"
        rated.write_input(name, rows)
        if preprocess:
            preprocessing(rated)
        assert rated.materialize().failed == []
        found = rated.scores(name)
        assert [row["api_record_id"] for row in found] == [row["id"] for row in rows]
        assert {(row["api_status"], row["score"]) for row in found} == {("success", 5)}
        key_of = dict(rated.manifest(name).moved)
        if preprocess:
            before = rated.manifest(name, "preprocessed").moved
            assert {ERROR_COLUMN, "source", "content_truncate_8k"} <= before.keys()
            key_of |= {old: key_of.get(new, new) for old, new in before.items()}
        for row, out in zip(rows, found, strict=True):
            assert {key: out[key_of.get(key, key)] for key in row} == row
        ours = {"score", *(name for name, _ in API_FIELDS)}
        changed = {ERROR_COLUMN, "source", "content_truncate_8k"} if preprocess else set()
        assert key_of.keys() == (ours & {*order}) | changed, "the others keep their names"


FAILING = """
class Own:
    def process_item(self, item):
        if item["text"] == "bad":
            raise ValueError("no")
        return {**item, "content_truncate_8k": "the user's", "preprocess_error": item.get("n")}
"""


class TestFailedInPreprocessing:
    """Rows that could not be made keep what the input has of them."""

    ROWS = (
        {"id": "1", "text": "good", "n": 1, "tags": ["a"]},
        {"id": "2", "text": 5, "n": 2, "tags": ["b"]},
        {"id": "3", "text": "bad", "n": 3, "tags": [], "late": {"x": 1.5}, "preprocess_error": "m"},
    )

    @pytest.mark.parametrize("script", ["universal", "own_failing:Own"])
    def test_have_all_columns_in_their_scores(self, rated: Project, script: str) -> None:
        (rated.root / "own_failing.py").write_text(FAILING)
        preprocessing(rated, script_type=script)
        rated.write_input(A, self.ROWS)
        rated.materialize()
        good, wrong, bad = rated.scores(A)
        assert (good["api_status"], good["score"], good["tags"]) == ("success", 5, ["a"])
        own = script != "universal"
        failed = [row["api_fail_reason"] for row in (wrong, bad)]
        assert failed == ["preprocess_error", "preprocess_error" if own else None]
        assert [wrong[name] for name in ("id", "n", "tags")] == ["2", 2, ["b"]]
        assert wrong["text"] == "5" or orjson.loads(wrong["text"]) == 5
        assert [bad[name] for name in ("id", "n", "tags", "late")] == ["3", 3, [], {"x": 1.5}]
        if own:
            assert good["input_content_truncate_8k"] == "the user's"
            values = [row["input_preprocess_error"] for row in (good, wrong, bad)]
            assert values == ["1", None, '"m"'], "JSON text, as values of several types are"
        else:
            assert bad["input_preprocess_error"] == "m"


# Numbers of any length

digits = st.from_regex(
    r"-?(0|[1-9][0-9]{0,40})(\.[0-9]{1,40})?([eE][-+]?[0-9]{1,3})?", fullmatch=True
)
nested = st.recursive(
    digits | st.sampled_from(['"text"', '"12345678901234567890.5e-400"', "null", "true", '""']),
    lambda inner: (
        st.lists(inner, max_size=4).map(lambda items: f"[{','.join(items)}]")
        | st.dictionaries(st.sampled_from("abc"), inner, max_size=3).map(
            lambda fields: (
                "{" + ",".join(f'"{name}":{value}' for name, value in fields.items()) + "}"
            )
        )
    ),
    max_leaves=8,
)
objects = st.dictionaries(st.sampled_from("xyz"), nested, min_size=1).map(
    lambda fields: "{" + ",".join(f'"{name}":{value}' for name, value in fields.items()) + "}"
)


def exactly(text: str | bytes) -> Any:
    """With every number as the decimal that was written. A double that was written with 17 digits
    may come back with fewer: it is the same number to whoever reads doubles."""

    def number(written: str) -> Decimal:
        exact = Decimal(written)
        shortest, size = repr(float(written)), len(exact.as_tuple().digits)
        same = size <= 17 and exact == Decimal(f"{float(written):.{size - 1}e}")
        return Decimal(shortest) if same else exact

    return json.loads(text, parse_int=number, parse_float=number)


class TestNumbers:
    LONG = b'{"id":"1","text":"t","n":12345678901234567890123,"f":0.1000000000000000055,"m":1e400}'
    NESTED = b'{"id":"2","text":"t","n":1,"deep":{"a":[-9223372036854775809,{"b":1e-400}]},"f":0.5}'

    @given(objects)
    @example('{"beyond 64 bits": -10000000000000000001}')
    def test_keep_their_digits_from_line_to_line(self, line: str) -> None:
        row = parse_line(line.encode(), 1)
        assert isinstance(row, dict), row
        assert exactly(encode(row)) == exactly(line)

    @given(st.lists(objects, min_size=1, max_size=4))
    def test_keep_them_through_columns(self, lines: list[str]) -> None:
        """As far as Arrow makes no difference: a field that one row lacks is null there."""
        rows = [parse_line(line.encode(), 1) for line in lines]
        inference = SchemaInference()
        inference.add([row for row in rows if isinstance(row, dict)])
        schema = inference.schema()
        back = rows_of(columns_of(rows, schema), 0)
        for line, row in zip(lines, back, strict=True):
            assert isinstance(row, dict)
            assert without_nulls(exactly(encode(row))) == without_nulls(exactly(line))

    def test_are_whole_in_the_scores(self, rated: Project) -> None:
        (rated.input_folder / A).write_bytes(self.LONG + b"\n" + self.NESTED + b"\n")
        assert rated.materialize().failed == []
        long, deep = rated.scores(A)
        assert (long["n"], long["f"], long["m"]) == (
            "12345678901234567890123",
            "0.1000000000000000055",
            "1e400",
        )
        assert (deep["n"], deep["f"], deep["m"]) == ("1", "0.5", None)
        assert deep["deep"] == '{"a":[-9223372036854775809,{"b":1e-400}]}'

    @pytest.mark.parametrize("script", ["universal", "own_passing:Own"])
    def test_are_whole_after_preprocessing(self, rated: Project, script: str) -> None:
        source = "class Own:\n    def process_item(self, item):\n        return item\n"
        (rated.root / "own_passing.py").write_text(source)
        preprocessing(rated, script_type=script)
        self.test_are_whole_in_the_scores(rated)


def without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [*map(without_nulls, value)] if isinstance(value, list) else value


def arrow(kind: pa.DataType, values: list[Any]) -> pa.Array:
    return pa.array(values, kind)


ZONED = pa.timestamp("ns", "Europe/Berlin")
READABLE: Mapping[str, tuple[pa.Array, Any]] = {
    "seconds": (arrow(pa.duration("s"), [90]), "PT90S"),
    "millis": (arrow(pa.duration("ms"), [90_500]), "PT90.5S"),
    "nanos": (arrow(pa.duration("ns"), [-1]), "-PT0.000000001S"),
    "waits": (arrow(pa.list_(pa.duration("s")), [[0, None]]), ["PT0S", None]),
    "wait": (arrow(pa.struct([("s", pa.duration("s"))]), [{"s": 1}]), {"s": "PT1S"}),
    "by_name": (arrow(pa.map_(pa.string(), pa.duration("s")), [[("a", 1)]]), [["a", "PT1S"]]),
    "counts": (arrow(pa.map_(pa.int8(), pa.string()), [[(1, "x")]]), [[1, "x"]]),
    "zoned": (arrow(ZONED, [1]), "1970-01-01 01:00:00.000000001+0100"),
    "moment": (arrow(pa.timestamp("us"), [1]), "1970-01-01 00:00:00.000001"),
    "day": (arrow(pa.date32(), [date(2026, 1, 2)]), "2026-01-02"),
    "clock": (arrow(pa.time64("us"), [1]), "00:00:00.000001"),
    "price": (arrow(pa.decimal128(38, 2), [Decimal("1.50")]), "1.50"),
    "bytes": (arrow(pa.binary(), [b"\xff\x00"]), "/wA="),
    "utf8": (arrow(pa.binary(), ["é".encode()]), "é"),
    "nan": (arrow(pa.float64(), [float("nan")]), None),
    "far": (arrow(pa.list_(pa.float32()), [[float("inf"), 0.5]]), [None, 0.5]),
    "wide": (arrow(pa.uint64(), [2**64 - 1]), 2**64 - 1),
    "named": (arrow(pa.dictionary(pa.int8(), pa.string()), ["a"]), "a"),
    "coded": (arrow(pa.duration("s"), [1]).dictionary_encode(), "PT1S"),
    "view": (arrow(pa.list_view(pa.string()), [["a"]]), ["a"]),
    "uuid": (arrow(pa.uuid(), [b"0123456789abcdef"]), "30313233-3435-3637-3839-616263646566"),
}
"""A value of each type, and what it is in JSON lines."""


def twice_named() -> pa.Array:
    return pa.StructArray.from_arrays([[1], [2]], fields=[pa.field("a", pa.int64())] * 2)


def coded(values: pa.Array) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array([0], pa.int8()), values)


INTERVAL = pa.month_day_nano_interval()
REFUSED: Mapping[str, pa.Array] = {
    "zone": arrow(pa.timestamp("us", "Mars/Base"), [1]),
    "zones": arrow(pa.list_(pa.struct([("at", pa.timestamp("us", "Mars/Base"))])), [[]]),
    "twice": twice_named(),
    "twice_inside": pa.ListArray.from_arrays([0, 1], twice_named()),
    "coded_struct": coded(pa.array([{"a": 1}])),
    "coded_list": coded(pa.array([[1]])),
    "interval": arrow(INTERVAL, [pa.MonthDayNano([1, 2, 3])]),
    "intervals": arrow(pa.list_(INTERVAL), [[]]),
    "view": arrow(pa.list_view(pa.timestamp("s")), [[1]]),
}


def write_arrow(place: Path, columns: Mapping[str, pa.Array]) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    messages = [[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]]
    given = {"id": ["1"], "text": ["a"], "messages": messages, "prompt": ["q"], "response": ["a"]}
    table = pa.table({**given, **columns})
    with pa.ipc.new_file(place, table.schema) as writer:
        writer.write_table(table)


@pytest.fixture
def chain(distilling: Project) -> Project:
    """Prompts and responses of one data set, made into conversations and answered."""
    mapping = {"prompt": "prompt", "response": "response"}
    data_set = {"format_style": "prompt_response", "column_mapping": mapping}
    distilling.write_yaml("distillation/datasets", {"org/Chats": data_set})
    distilling.write_steps(chatml_conversion=CHATML, generate_response=GENERATE)
    return distilling


class TestArrowTypes:
    @pytest.mark.parametrize("preprocess", [False, True])
    def test_keep_their_values_and_are_plain_in_exported_lines(
        self, rated: Project, tmp_path: Path, preprocess: bool
    ) -> None:
        write_arrow(
            rated.input_folder / "a.arrow", {name: given for name, (given, _) in READABLE.items()}
        )
        if preprocess:
            preprocessing(rated)
        assert rated.materialize().failed == []
        (file,) = published_files(rated.steps().stage("scores"))
        export_files({file.stem: [file]}, tmp_path, Selection(), Form())
        row = orjson.loads((tmp_path / "a.jsonl").read_bytes())
        assert (row["api_status"], row["score"]) == ("success", 5)
        assert {name: row[name] for name in READABLE} == {
            name: plain for name, (_, plain) in READABLE.items()
        }

    def test_are_the_same_in_conversations_and_their_responses(self, chain: Project) -> None:
        """Raw data keeps them beside the messages, and so do rows that are answered at once."""
        columns = {name: given for name, (given, _) in READABLE.items()}
        write_arrow(chain.root / "data/sets/org/Chats/train.arrow", columns)
        assert chain.materialize().failed == []
        plain = {name: value for name, (_, value) in READABLE.items()}
        (row,) = chain.responses(CHATS)
        assert {name: row["raw_data"][name] for name in READABLE} == plain
        write_arrow(chain.root / "data/talks/talk.arrow", columns)
        chain.task = "answers"
        chain.write_generation({"input_path": "data/talks"})
        assert chain.materialize().failed == []
        (row,) = chain.responses()
        assert {name: row[name] for name in READABLE} == plain

    @pytest.mark.parametrize("name", REFUSED)
    def test_that_no_row_could_be_read_of_are_refused_at_once(
        self, chain: Project, name: str
    ) -> None:
        said = f"column '{name}' (.*) cannot be read: .*; make it a string or leave it out"
        ratings = Project(chain.root)
        ratings.write_task()
        write_arrow(chain.input_folder / "a.arrow", {name: REFUSED[name]})
        with pytest.raises(InputError, match=said):
            ratings.steps().stage("raw").make("a.arrow", Tally())
        ratings.task_file.unlink()
        write_arrow(chain.root / "data/sets/org/Chats/train.arrow", {name: REFUSED[name]})
        (told,) = chain.materialize().failed
        assert re.search(said, told)

    @pytest.mark.parametrize("preprocess", [False, True])
    def test_that_parquet_stores_as_others_are_scored(
        self, rated: Project, preprocess: bool
    ) -> None:
        ones = [pa.date64(), pa.time32("s"), pa.timestamp("s"), pa.duration("s")]
        given = {f"x{at}": pa.array([0, None], kind) for at, kind in enumerate(ones)}
        table = pa.table({"id": ["1", "2"], "text": ["a", "b"], **given})
        with pa.ipc.new_file(rated.input_folder / "a.arrow", table.schema) as writer:
            writer.write_table(table)
        if preprocess:
            preprocessing(rated)
        assert rated.materialize().failed == []
        assert [row["api_status"] for row in rated.scores("a.arrow")] == ["success"] * 2


def test_what_fails_after_a_file_of_columns_is_whole_is_raised_as_it_is(tmp_path: Path) -> None:
    schema = pa.schema([("a", pa.int64())])
    with (
        pytest.raises(StoreError, match="the disk is full"),
        NewFile(tmp_path / "a.parquet") as file,
        ParquetSink(file, "scores", schema) as sink,
    ):
        sink.close()
        raise StoreError("the disk is full")
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("pad", range(8))
def test_what_only_looks_like_a_number_too_large_for_any_is_text(pad: int) -> None:
    text = f'{{"{"a" * (pad + 1)}":0.5,"digest":"25bc5f0e6347139893710852239d447e"}}'.encode()
    assert loads(text)["digest"] == "25bc5f0e6347139893710852239d447e"
