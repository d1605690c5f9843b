"""The preprocessor universal, and files: rules, conservation and order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from preprocessing import preprocessed, published, recipe_of, source_of
from project import write_rows

from modelcall_assets.errors import InputChanged
from modelcall_assets.records.outcome import Dropped
from modelcall_assets.stages.pieces import ERROR_COLUMN
from modelcall_assets.stages.preprocessed import preprocess
from modelcall_assets.storage.columns import read_schema
from modelcall_assets.storage.files import publish
from modelcall_assets.transforms.preprocessor import Copied, Universal


def run(row: dict[str, Any], **options: Any) -> Any:
    return Universal(**options).process_item(row)


class TestProcess:
    def test_gives_what_the_reference_example_says(self) -> None:
        given_texts = ["  a  b ", "no", "long enough text"]
        results = [
            run({"text": text}, min_text_length=3, remove_extra_whitespace=True)
            for text in given_texts
        ]
        assert [getattr(made, "rule", None) or made["text"] for made in results] == [
            "a b",
            "min_text_length",
            "long enough text",
        ]

    @pytest.mark.parametrize(
        ("row", "text"),
        [
            ({"text": None, "content": "c"}, "c"),
            ({"body": "b", "message": "m"}, "b"),
            ({"other": "o"}, ""),
            ({"text": "", "content": "c"}, ""),
        ],
    )
    def test_where_the_text_comes_from(self, row: dict[str, Any], text: str) -> None:
        assert run(row)["text"] == text

    def test_maps_columns_combinations_and_constants(self) -> None:
        mapping: dict[str, Any] = {
            "text": "story",
            "title": {"type": "combine", "fields": ["a", "b", "c"], "separator": "-"},
            "lang": {"type": "constant", "value": "zh"},
            "gone": "nowhere",
        }
        made = run({"story": "s", "a": 1, "b": None, "c": "x", "lang": "en"}, field_mapping=mapping)
        assert (made["text"], made["title"], made["lang"], made["gone"]) == ("s", "1-x", "zh", None)
        assert made["story"] == "s"

    @pytest.mark.parametrize(
        ("row", "options", "rule"),
        [
            ({"text": "abc"}, {"min_text_length": 4}, "min_text_length"),
            ({"text": None}, {"min_text_length": 1}, "min_text_length"),
            ({"text": "abc"}, {"max_text_length": 2}, "max_text_length"),
            ({"text": "a SPAM"}, {"blacklist_patterns": ["x", "Spam"]}, "blacklist_patterns: Spam"),
            ({"text": "a", "n": 0}, {"required_fields": ["text", "n"]}, "required_fields: n"),
            ({"text": "ab"}, {"remove_characters": ["ab"], "required_fields": ["text"]},
             "required_fields: text"),
        ],
    )  # fmt: skip
    def test_drops_a_row_by_the_rule_that_it_breaks(
        self, row: dict[str, Any], options: dict[str, Any], rule: str
    ) -> None:
        assert run(row, **options) == Dropped(rule)

    def test_rows_that_have_no_text_at_all_pass_the_length_rules(self) -> None:
        assert run({"n": 1}, min_text_length=5)["text"] == ""

    def test_patterns_are_not_regular_expressions(self) -> None:
        assert run({"text": "abc"}, blacklist_patterns=["a.c"])["text"] == "abc"

    def test_regular_expressions_are_an_option_of_their_own(self) -> None:
        assert run({"text": "abc"}, blacklist_regex=["a.c"]) == Dropped("blacklist_regex: a.c")
        assert run({"text": "ABC"}, blacklist_regex=["a.c"])["text"] == "ABC"
        assert run({"text": "ABC"}, blacklist_regex=["(?i)x", "(?i)a.c"]) == Dropped(
            "blacklist_regex: (?i)a.c"
        )

    @pytest.mark.parametrize("pattern", ["^(a+)+$", "(a|a)*$b", r"\w+@\w+", "(a*)*(b*)*c"])
    def test_no_regular_expression_is_slow(self, pattern: str) -> None:
        """Each of these takes Python's `re` longer than anybody waits."""
        text = "a" * 1_000_000 + "!"
        assert run({"text": text}, blacklist_regex=[pattern])["text"] == text

    def test_filters_may_look_at_the_cleaned_text(self) -> None:
        options = {"min_text_length": 3, "remove_extra_whitespace": True}
        assert run({"text": " a "}, **options)["text"] == "a"
        assert run({"text": " a "}, **options, filter_cleaned=True) == Dropped("min_text_length")

    def test_computed_fields_see_the_cleaned_text(self) -> None:
        computed = {
            "length": {"type": "text_length"},
            "tokens": {"type": "token_count", "source_field": "title"},
        }
        made = run({"text": " a  b ", "title": None}, remove_extra_whitespace=True,
                   computed_fields=computed)  # fmt: skip
        assert (made["length"], made["tokens"]) == (3, 0)

    def test_mistaken_options_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"field_mapping\.a\.type: expected combine"):
            Universal(field_mapping={"a": {"type": "combin"}})
        with pytest.raises(ValueError, match=r"computed_fields\.a\.type"):
            Universal(computed_fields={"a": {"type": "tokens"}})

    @given(st.dictionaries(st.sampled_from(["text", "id", "n", "x"]), st.text(max_size=3)))
    def test_every_column_is_declared(self, row: dict[str, Any]) -> None:
        options = Universal(
            field_mapping={"m": "n", "c": {"type": "constant", "value": [1]}},
            computed_fields={"length": {"type": "text_length"}},
        )
        declared = options.columns(list(row))
        made = options.process_item(row)
        assert isinstance(made, dict)
        assert set(declared) == set(made)
        for name, origin in declared.items():
            if isinstance(origin, Copied):
                assert made[name] == row[origin.source]


lines = st.lists(
    st.fixed_dictionaries(
        {"n": st.integers(0, 9)},
        optional={
            "text": st.none() | st.integers(0, 9) | st.text(max_size=8),
            "x": st.booleans() | st.text(),
        },
    )
    | st.sampled_from([b"{", b"[1]", b"\xff", b"  "]),
    max_size=12,
)


class TestFile:
    def test_gets_source_id_and_truncated_text(self, tmp_path: Path) -> None:
        path = write_rows(tmp_path / "in.jsonl", [{"text": "hello", "n": 1}, {"id": 7, "text": ""}])
        preprocessed(path, source_name="web", max_tokens=2048)
        first, second = published(path)
        assert len(first.pop("id")) == 32
        assert first == {
            "text": "hello",
            "n": 1,
            "source": "web",
            "content_truncate_2k": "hello",
            ERROR_COLUMN: None,
        }
        assert (second["id"], second["content_truncate_2k"]) == ("7", None)

    @pytest.mark.parametrize(
        ("fields", "made"),
        [
            ({"field_mapping": {"source": "site"}}, "a.org"),
            ({"field_mapping": {"source": "source"}}, {"page": 7}),
            ({"field_mapping": {"source": {"type": "constant", "value": 5}}}, 5),
            ({"transformations": {"computed_fields": {"source": {"type": "text_length"}}}}, 2),
        ],
    )
    def test_a_source_that_the_task_names_wins(
        self, tmp_path: Path, fields: dict[str, Any], made: Any
    ) -> None:
        path = write_rows(
            tmp_path / "in.jsonl", [{"text": "hi", "site": "a.org", "source": {"page": 7}}]
        )
        preprocessed(path, source_name="web", **fields)
        [row] = published(path)
        assert row["source"] == made and "input_source" not in row

    @given(lines)
    def test_has_every_row_in_its_order_or_a_count_of_it(
        self, tmp_path_factory: pytest.TempPathFactory, lines: list[dict[str, Any] | bytes]
    ) -> None:
        numbered = [
            line if isinstance(line, bytes) else {**line, "id": str(n)}
            for n, line in enumerate(lines)
        ]
        path = write_rows(tmp_path_factory.mktemp("in") / "in.jsonl", numbered)
        report = preprocessed(path, filters={"min_text_length": 3, "required_fields": ["n"]})
        rows = published(path)
        assert report.rows_in == sum(line != b"  " for line in lines)
        assert report.rows_in == report.rows + sum(report.dropped.values())
        assert len(rows) == report.rows
        failed = [row for row in rows if row[ERROR_COLUMN]]
        assert len(failed) == report.failed
        reasons = [orjson.loads(row[ERROR_COLUMN])["reason"] for row in failed]
        assert reasons.count("bad_line") == sum(line in (b"{", b"[1]", b"\xff") for line in lines)
        order = [int(row["id"]) for row in rows if len(row["id"]) < 32]
        assert order == sorted(order)
        again = preprocessed(path, filters={"min_text_length": 3, "required_fields": ["n"]})
        assert again.data_version == report.data_version

    def test_bad_rows_stay_in_their_place(self, tmp_path: Path) -> None:
        bad = {"text": 5, "y": "kept"}
        path = write_rows(
            tmp_path / "in.jsonl", [{"text": "a"}, b"{bad", bad, {"text": "b", "x": [1]}]
        )
        report = preprocessed(path)
        first, bad_line, bad_row, last = published(path)
        assert (report.rows_in, report.rows, report.failed) == (4, 4, 2)
        assert (first["text"], last["text"], last["x"]) == ("a", "b", [1])
        error = orjson.loads(bad_line[ERROR_COLUMN])
        assert (error["reason"], error["raw"]) == ("bad_line", "{bad")
        assert orjson.loads(bad_row[ERROR_COLUMN]) == {
            "reason": "preprocess_error",
            "detail": "TypeError: the text is not a string but of type int",
            "raw": '{"text":5,"y":"kept"}',
        }
        assert {name for name, value in bad_line.items() if value} == {"id", ERROR_COLUMN}
        kept = {name for name, value in bad_row.items() if value}
        assert kept == {"id", "text", "y", ERROR_COLUMN}
        assert (bad_row["text"], bad_row["y"]) == ("5", "kept")
        assert [row["text"] for row in report.sample] == ["a", "b"]

    def test_the_published_schema_is_the_reported_one(self, tmp_path: Path) -> None:
        path = write_rows(
            tmp_path / "in.jsonl",
            [{"id": 1, "text": "a", "x": 1, "tags": [[{"a": 1}]]}, {"id": "b", "x": "y"}],
        )
        mapping: dict[str, Any] = {
            "copy": "x",
            "pi": {"type": "constant", "value": 3.14},
            "big": {"type": "constant", "value": 2**70},
        }
        report = preprocessed(path, field_mapping=mapping)
        assert read_schema(tmp_path / "out" / "result.parquet").equals(
            report.schema, check_metadata=True
        )
        one, two = published(path)
        assert [(row["id"], row["x"], row["copy"]) for row in (one, two)] == [
            ("1", 1, 1),
            ("b", "y", "y"),
        ]
        assert (one["pi"], one["big"]) == (3.14, str(2**70))

    def test_parquet_columns_pass_through_untouched(self, tmp_path: Path) -> None:
        moment = pa.array([1_700_000_000_123_456_789, None, 5]).view(pa.timestamp("ns", "UTC"))
        schema = pa.schema(
            [
                ("content", pa.string()),
                ("at", moment.type),
                pa.field("k", pa.int32(), nullable=False),
            ]
        )
        columns = [pa.array(["abc", "x", None]), moment, pa.array([1, 2, 3], pa.int32())]
        table = pa.Table.from_arrays(columns, schema=schema)
        pq.write_table(table, tmp_path / "in.parquet")
        report = preprocessed(
            tmp_path / "in.parquet",
            filters={"min_text_length": 2},
            field_mapping={"when": "at"},
            transformations={"computed_fields": {"tokens": {"type": "token_count"}}},
        )
        out = pq.read_table(tmp_path / "out" / "result.parquet")
        assert report.dropped == {"min_text_length": 2}
        assert out.column("at").type == out.column("when").type == moment.type
        assert out.column("at").cast(pa.int64()).to_pylist() == [1_700_000_000_123_456_789]
        assert out.column("text").to_pylist() == ["abc"]
        assert out.column("tokens").to_pylist() == [1]

    def test_an_empty_file_and_a_limit(self, tmp_path: Path) -> None:
        report = preprocessed(write_rows(tmp_path / "in.jsonl", []))
        assert (report.rows_in, report.rows) == (0, 0)
        path = write_rows(tmp_path / "in.jsonl", [{"text": str(n)} for n in range(5)])
        assert preprocessed(path, limit=3).rows == 3
        assert [row["text"] for row in published(path)] == ["0", "1", "2"]

    def test_the_version_follows_the_content_not_the_config(self, tmp_path: Path) -> None:
        path = write_rows(tmp_path / "in.jsonl", [{"text": "abc"}])
        version = preprocessed(path).data_version
        cleaning = {"remove_characters": ["a"]}
        assert preprocessed(path, filters={"min_text_length": 1}).data_version == version
        assert (
            preprocessed(path, transformations={"text_cleaning": cleaning}).data_version != version
        )

    def test_a_changed_input_publishes_nothing(self, tmp_path: Path) -> None:
        path = write_rows(tmp_path / "in.jsonl", [{"n": 1}])
        source = source_of(path)
        write_rows(tmp_path / "in.jsonl", [{"n": "one"}])
        with pytest.raises(InputChanged), publish(tmp_path / "out.parquet") as out:
            preprocess(source, recipe_of(tmp_path), out)
        assert [file.name for file in tmp_path.iterdir()] == ["in.jsonl"]
