"""transforms/chatml and steps/chatml: six styles, nothing lost, nothing that JSON cannot hold."""

from __future__ import annotations

import datetime as dt
import gzip
import re
import tracemalloc
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from project import read_rows, write_rows

from modelcall_assets.config.datasets import MAPPING_KEYS
from modelcall_assets.errors import InputError
from modelcall_assets.records.outcome import Dropped, Failure, Reason
from modelcall_assets.stages.chatml import convert_split
from modelcall_assets.stages.raw import read_split
from modelcall_assets.storage.files import file_digest, publish
from modelcall_assets.storage.formats import OURS, Reading
from modelcall_assets.storage.listing import stat_file
from modelcall_assets.transforms import encode, json_safe
from modelcall_assets.transforms.chatml import ChatmlOptions, to_chatml

COLUMNS = {
    "prompt_response": {"prompt": "p", "response": "r"},
    "instruction_input": {"prompt": "instruction", "input": "input", "response": "output"},
    "sharegpt": {"conversations": "conversations"},
    "messages": {"messages": "messages"},
    "input_output_messages": {"input": "input", "output": "output"},
    "prompt_text_only": {"prompt_text": "t"},
}
DEEP = b"[" * 600 + b"]" * 600
HELLO: list[dict[str, Any]] = [{"role": "user", "content": "hi"}]
ANSWERED: list[dict[str, Any]] = [*HELLO, {"role": "assistant", "content": "ho"}]


def options(style: str, **changes: Any) -> ChatmlOptions:
    return ChatmlOptions(style, COLUMNS[style], **changes)


def convert(style: str, row: dict[str, Any], **changes: Any) -> Any:
    return to_chatml(row, options(style, **changes))


def messages_of(style: str, row: dict[str, Any], **changes: Any) -> Any:
    made = convert(style, row, **changes)
    return made["messages"] if isinstance(made, dict) else made


def user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def failure(detail: str) -> Failure:
    return Failure(Reason.CHATML_ERROR, detail)


KNOWN = "expected system, developer, user, assistant, tool, function"


def conversation(*turns: tuple[str, Any]) -> dict[str, Any]:
    return {"conversations": [{"from": speaker, "value": value} for speaker, value in turns]}


def test_every_style_of_the_config_is_there() -> None:
    assert {style: tuple(columns) for style, columns in COLUMNS.items()} == MAPPING_KEYS
    for style in MAPPING_KEYS:
        options(style)
    with pytest.raises(ValueError, match="format_style: expected one of"):
        ChatmlOptions("alpaca", {})


class TestStyles:
    def test_turns_are_what_the_reference_example_says(self) -> None:
        row = conversation(
            ("system", "s"), ("human", "h"), ("gpt", ""), ("tool", "t"), ("gpt", "g")
        )
        assert messages_of("sharegpt", row) == [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "h"},
            {"role": "tool", "content": "t"},
            {"role": "assistant", "content": "g"},
        ]
        assert messages_of("sharegpt", row, other_roles="drop") == [
            {"role": "user", "content": "h"},
            {"role": "assistant", "content": "g"},
        ]

    @pytest.mark.parametrize(
        ("instruction", "more", "output", "expected"),
        [
            (" do ", " x ", "r", "do \n\n x"),
            (" do ", "", "r", " do "),
            (" do ", None, "r", " do "),
            ("do", "x", None, Dropped("missing_response")),
            ("", " x ", "r", " x "),
            (None, "x", "r", "x"),
            ("", "", "r", Dropped("missing_prompt")),
            (None, 5, "r", failure("input: expected text, have a number")),
        ],
    )
    def test_instruction_and_input_are_one_question(
        self, instruction: str, more: str | None, output: str | None, expected: Any
    ) -> None:
        made = messages_of(
            "instruction_input", {"instruction": instruction, "input": more, "output": output}
        )
        if isinstance(expected, str):
            expected = [*user(expected), {"role": "assistant", "content": output}]
        assert made == expected

    @pytest.mark.parametrize(
        ("style", "row", "expected"),
        [
            ("prompt_response", {"p": "hi", "r": "ho"}, ANSWERED),
            ("messages", {"messages": ANSWERED}, ANSWERED),
            ("input_output_messages", {"input": HELLO, "output": "ho"}, ANSWERED),
            ("prompt_text_only", {"t": "hi"}, HELLO),
            ("sharegpt", conversation(("Human", "hi"), ("chatgpt", "ho")), ANSWERED),
            ("sharegpt", conversation(("user", "hi"), ("bing", "ho")), ANSWERED),
            ("sharegpt", conversation(("user", "hi"), ("model", "ho")), ANSWERED),
            ("sharegpt", conversation(("User ", "hi"), ("ASSISTANT", "ho")), ANSWERED),
            ("sharegpt", conversation(("HUMAN", "hi"), ("Function-Call", "ho")), ANSWERED),
            (
                "messages",
                {"messages": [{"role": "User", "content": "hi"}, {"role": "GPT", "content": "ho"}]},
                ANSWERED,
            ),
            ("sharegpt", conversation(("Tool Response", "x")), [{"role": "tool", "content": "x"}]),
            ("sharegpt", conversation(("observation", "x")), [{"role": "tool", "content": "x"}]),
        ],
    )
    def test_what_becomes_of_a_row(self, style: str, row: dict[str, Any], expected: Any) -> None:
        assert messages_of(style, row) == expected
        assert convert(style, row) == {"messages": expected, "format": "chatml", "raw_data": row}
        assert "raw_data" not in convert(style, row, keep_raw_data=False)

    @pytest.mark.parametrize(
        ("style", "row", "rule"),
        [
            ("prompt_response", {"p": "", "r": "ho"}, "missing_prompt"),
            ("prompt_response", {"p": "hi"}, "missing_response"),
            ("sharegpt", {}, "missing_conversations"),
            ("sharegpt", conversation(("human", ""), ("gpt", None)), "no_turn_left"),
            ("messages", {"messages": []}, "missing_messages"),
            ("input_output_messages", {"input": None, "output": "x"}, "missing_input"),
            ("input_output_messages", {"input": HELLO, "output": ""}, "missing_output"),
            ("prompt_text_only", {"t": None}, "missing_prompt_text"),
        ],
    )
    def test_a_row_without_question_or_answer_is_dropped_by_rule(
        self, style: str, row: dict[str, Any], rule: str
    ) -> None:
        assert convert(style, row) == Dropped(rule)

    def test_nothing_is_left_when_other_roles_are_dropped(self) -> None:
        row = conversation(("system", "s"))
        assert convert("sharegpt", row, other_roles="drop") == Dropped("no_turn_left")

    @pytest.mark.parametrize(
        ("style", "row", "detail"),
        [
            ("prompt_response", {"p": 5, "r": "ho"}, "p: expected text, have a number"),
            ("prompt_response", {"p": "hi", "r": ["x"]}, "r: expected text, have a list"),
            ("input_output_messages", {"input": "hi", "output": "ho"},
             "input: expected a list, have text"),
            ("sharegpt", {"conversations": "x"}, "conversations: expected a list, have text"),
            ("sharegpt", {"conversations": ["x"]},
             "conversations[0]: expected an object with `from` and `value`, have text"),
            ("sharegpt", {"conversations": [{"from": "human"}]},
             "conversations[0]: expected an object with `from` and `value`, have 'from'"),
            ("sharegpt", {"conversations": [{"role": "user", "content": "x"}]},
             "conversations[0]: expected an object with `from` and `value`, "
             "have 'role', 'content'"),
            ("sharegpt", {"conversations": [{}]},
             "conversations[0]: expected an object with `from` and `value`, have no keys"),
            ("sharegpt", conversation(("human", "h"), (5, "g")),  # type: ignore[arg-type]
             "conversations[1].from: expected text, have a number"),
            ("sharegpt", conversation(("human", {"a": 1})),
             "conversations[0].value: expected text or a list of parts, have an object"),
            ("messages", {"messages": {"role": "user"}},
             "messages: expected a list, have an object"),
            ("messages", {"messages": [None]}, "messages[0]: expected an object, have null"),
            ("messages", {"messages": [{"content": "x"}]},
             "messages[0].role: expected text, have nothing"),
            ("messages", {"messages": [*HELLO, {"role": "user"}]},
             "messages[1].content: expected text or a list of parts, have null"),
            ("messages", {"messages": [{"role": "user", "content": ["x"]}]},
             "messages[0].content[0]: expected a part, an object with a `type`"),
        ],
    )  # fmt: skip
    def test_a_failure_says_where_in_the_row(
        self, style: str, row: dict[str, Any], detail: str
    ) -> None:
        assert convert(style, row) == failure(detail)

    @pytest.mark.parametrize("style", ["sharegpt", "messages"])
    def test_a_role_that_no_endpoint_knows(self, style: str) -> None:
        row = conversation(("human", "hi"), ("narrator", "x"))
        row["messages"] = [*HELLO, {"role": "narrator", "content": "x"}]
        where = "conversations[1].from" if style == "sharegpt" else "messages[1].role"
        wrong = f"{where}: 'narrator' is not a known role; {KNOWN}"
        assert convert(style, row) == failure(wrong)
        assert messages_of(style, row, other_roles="drop") == HELLO

    def test_columns_beside_a_conversation(self) -> None:
        tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
        row = {**conversation(("human", "hi"), ("gpt", "ho")), "system": "be brief", "tools": tools}
        begun = [{"role": "system", "content": "be brief"}, *ANSWERED]
        made = convert("sharegpt", row, system_prompt="another")
        assert isinstance(made, dict) and (made["messages"], made["tools"]) == (begun, tools)
        as_text = convert("sharegpt", {**row, "tools": orjson.dumps(tools).decode()})
        assert isinstance(as_text, dict) and as_text["tools"] == tools
        digits = '[{"most": 123456789012345678901234567890, "pi": 3.14159265358979323846}]'
        kept = convert("sharegpt", {**row, "tools": digits})
        assert isinstance(kept, dict) and digits.replace(" ", "") in encode(kept).decode()
        as_words = convert("messages", {"messages": HELLO, "tools": "a calculator"})
        assert isinstance(as_words, dict) and as_words["tools"] == "a calculator"
        for nothing in (None, "", []):
            bare = convert("sharegpt", {**row, "system": None, "tools": nothing})
            assert isinstance(bare, dict) and set(bare) == {"messages", "format", "raw_data"}
            assert bare["messages"] == ANSWERED
        assert convert("sharegpt", {**row, "system": 7}) == failure(
            "system: expected text, have a number"
        )

    def test_alpaca_with_system_and_history(self) -> None:
        row = {
            "instruction": "hi",
            "output": "ho",
            "system": "be brief",
            "history": [["one", "1"], ["two", "2"]],
        }
        said = [("system", "be brief"), ("user", "one"), ("assistant", "1"), ("user", "two")]
        said += [("assistant", "2"), ("user", "hi"), ("assistant", "ho")]
        expected = [{"role": role, "content": content} for role, content in said]
        assert messages_of("instruction_input", row, validation="strict") == expected
        for wrong, what in ((["one"], "a list"), ("one", "text"), ([1, 2], "a list")):
            detail = f"history[0]: expected a list of question and answer, have {what}"
            assert convert("instruction_input", {**row, "history": [wrong]}) == failure(detail)
        assert convert("instruction_input", {**row, "history": "x"}) == failure(
            "history: expected a list, have text"
        )

    def test_calls_and_parts_are_kept(self) -> None:
        turns = [
            {"role": "user", "content": [{"type": "text", "text": "hi"}], "name": "Ann"},
            {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "x": None}]},
            {"role": "tool", "content": "4", "tool_call_id": "1"},
        ]
        assert messages_of("messages", {"messages": turns}) == turns

    @pytest.mark.parametrize("value", ["", None, "let me see"])
    @pytest.mark.parametrize(
        "calls", [{"tool_calls": [{"id": "1"}]}, {"function_call": {"name": "f"}}]
    )
    def test_turns_of_sharegpt_that_call_tools_stay(
        self, value: str | None, calls: dict[str, Any]
    ) -> None:
        row = conversation(("human", "2 + 2?"), ("gpt", ""), ("tool", "4"), ("gpt", "it is 4"))
        row["conversations"][1] = {"from": "gpt", "value": value, **calls}
        row["conversations"][2]["tool_call_id"] = "1"
        made = convert("sharegpt", row, validation="strict")
        assert isinstance(made, dict), made
        assert made["messages"][1:3] == [
            {"role": "assistant", "content": value, **calls},
            {"role": "tool", "content": "4", "tool_call_id": "1"},
        ]

    def test_null_fields_of_a_columnar_file_are_left_out(self) -> None:
        part = {"type": "text", "text": "hi", "image_url": None}
        row = {"messages": [{"role": "user", "content": [part], "tool_calls": None}]}
        assert messages_of("messages", row) == [
            {"role": "user", "content": [{"type": "text", "text": "hi"}]}
        ]


class TestStrict:
    @pytest.mark.parametrize(
        "roles",
        [
            ["user", "assistant"],
            ["system", "user", "assistant", "user", "assistant"],
            ["developer", "user", "assistant", "tool", "tool", "assistant"],
        ],
    )
    def test_turns_that_alternate_pass(self, roles: Sequence[str]) -> None:
        turns = [{"role": role, "content": "x"} for role in roles]
        assert messages_of("messages", {"messages": turns}, validation="strict") == turns

    @pytest.mark.parametrize(
        ("roles", "detail"),
        [
            (["assistant"], "messages[0].role: assistant at the beginning"),
            (["user", "user", "assistant"], "messages[1].role: user after user"),
            (["user", "tool", "assistant"], "messages[1].role: tool after user"),
            (["user", "assistant", "system"], "messages[2].role: system after assistant"),
            (["user", "assistant", "user"], "messages[2].role: the last is user, not assistant"),
        ],
    )
    def test_turns_that_do_not_alternate_fail(self, roles: Sequence[str], detail: str) -> None:
        row = {"messages": [{"role": role, "content": "x"} for role in roles]}
        assert convert("messages", row, validation="strict") == failure(detail)
        assert isinstance(convert("messages", row), dict)

    def test_empty_content_fails_unless_there_are_tool_calls(self) -> None:
        row = {"messages": [*HELLO, {"role": "assistant", "content": " "}]}
        assert convert("messages", row, validation="strict") == failure(
            "messages[1].content: empty"
        )
        calls = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
        turns = [*HELLO, calls]
        assert messages_of("messages", {"messages": turns}, validation="strict") == turns

    def test_a_prompt_alone_may_end_with_the_user(self) -> None:
        assert messages_of("prompt_text_only", {"t": "hi"}, validation="strict") == HELLO


class TestSystemPrompt:
    def test_it_comes_first_and_only_once(self) -> None:
        prompt = {"role": "system", "content": "Be brief."}
        assert messages_of("prompt_text_only", {"t": "hi"}, system_prompt="Be brief.") == [
            prompt,
            *HELLO,
        ]
        own = [*HELLO, {"role": "system", "content": "own"}]
        assert messages_of("messages", {"messages": own}, system_prompt="Be brief.") == own
        dropped = {"system_prompt": "Be brief.", "other_roles": "drop"}
        assert messages_of("messages", {"messages": own}, **dropped) == [prompt, *HELLO]

    def test_the_row_stays_as_it_was(self) -> None:
        row: dict[str, Any] = {"messages": [*HELLO]}
        made = convert("messages", row, system_prompt="s")
        assert row == {"messages": HELLO} == made["raw_data"]

    @given(st.lists(st.sampled_from(["system", "human", "gpt", "tool"]), min_size=1, max_size=6))
    def test_there_is_always_one(self, speakers: list[str]) -> None:
        row = conversation(*((speaker, "x") for speaker in speakers))
        turns = messages_of("sharegpt", row, system_prompt="s")
        assert [turn["role"] for turn in turns].count("system") == max(1, speakers.count("system"))


odd = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.binary(max_size=4)
    | st.datetimes()
    | st.dates()
    | st.times()
    | st.timedeltas()
    | st.decimals(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=2) | st.integers() | st.binary(max_size=2), inner)
    ),
    max_leaves=8,
)


class TestRawData:
    @given(st.dictionaries(st.text(max_size=3), odd, max_size=4))
    def test_json_at_every_depth(self, row: dict[str, Any]) -> None:
        made = convert("prompt_text_only", {**row, "t": "hi"})
        written = orjson.loads(encode(made))
        assert written["messages"] == HELLO
        assert written["raw_data"].keys() == {*row, "t"}
        orjson.dumps(json_safe(row))

    def test_what_becomes_of_values(self) -> None:
        odd_values = {
            "text": "ünï".encode(),
            "bytes": b"\xff\x00",
            "day": dt.date(2026, 1, 2),
            "price": Decimal("1.10"),
            "nan": float("nan"),
            "pair": (1, [{2: b"x"}]),
            "wide": 2**70,
        }
        assert orjson.loads(encode({"raw_data": odd_values}))["raw_data"] == {
            "text": "ünï",
            "bytes": "/wA=",
            "day": "2026-01-02",
            "price": "1.10",
            "nan": None,
            "pair": [1, [{"2": "x"}]],
            "wide": str(2**70),
        }


def convert_files(
    paths: Sequence[Path], style: str, limit: int | None = None, **changes: Any
) -> tuple[list[dict[str, Any]]]:
    output = paths[0].with_name("out") / "result.jsonl"
    files = [stat_file(path) for path in paths]
    with publish(output) as out:
        report = convert_split(files, options(style, **changes), out, limit=limit)
    assert report.data_version == file_digest(output)
    return report, read_rows(output)


turns = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "from": st.sampled_from(["system", "human", "gpt", "tool", "x"]) | st.none(),
            "value": st.none() | st.text(max_size=3) | st.integers(0, 9),
        },
    )
    | st.none(),
    max_size=4,
)
samples = st.lists(
    st.dictionaries(st.just("conversations"), st.none() | st.text(max_size=2) | turns)
    | st.sampled_from([b"{", b"[1]", b"\xff", b"  ", b'{"conversations":"\\ud83d"}']),
    max_size=10,
)


class TestSplit:
    @given(samples, st.integers(0, 10), st.sampled_from(["strict", "lenient"]))
    def test_every_line_is_there_once_in_its_order(
        self,
        tmp_path_factory: pytest.TempPathFactory,
        samples: list[dict[str, Any] | bytes],
        cut: int,
        validation: str,
    ) -> None:
        folder = tmp_path_factory.mktemp("in")
        numbered = [
            line if isinstance(line, bytes) else {"n": n, **line} for n, line in enumerate(samples)
        ]
        paths = [
            write_rows(folder / "a.jsonl", numbered[:cut]),
            write_rows(folder / "b.jsonl", numbered[cut:]),
        ]
        report, rows = convert_files(paths, "sharegpt", validation=validation)
        assert report.rows_in == sum(line != b"  " for line in samples)
        assert report.rows_in == report.rows + sum(report.dropped.values())
        assert len(rows) == report.rows
        failed = [row for row in rows if "error" in row]
        assert len(failed) == report.failed == report.failures.total()
        assert [(item.reason, item.detail) for item in report.failed_rows] == [
            (row["error"]["reason"], row["error"]["detail"]) for row in failed
        ]
        assert all(row["messages"] == [] for row in failed)
        assert report.histograms["messages"].rows == report.rows - report.failed
        order = [row["raw_data"]["n"] for row in rows if "raw_data" in row]
        assert order == sorted(order)
        bad_lines = sum(isinstance(line, bytes) and line != b"  " for line in samples)
        assert report.failures.get("bad_line", 0) == bad_lines

    def test_failures_stay_in_their_place(self, tmp_path: Path) -> None:
        good = conversation(("human", "h"), ("gpt", "g"))
        broken = {"conversations": "x"}
        first = write_rows(tmp_path / "a.jsonl", [good, b"", b"{bad", broken])
        second = write_rows(tmp_path / "b.jsonl", [conversation(), good])
        report, rows = convert_files([first, second], "sharegpt")
        assert (report.rows_in, report.rows, report.failed) == (5, 4, 2)
        assert report.dropped == {"missing_conversations": 1}
        assert report.failures == {"bad_line": 1, "chatml_error": 1}
        assert report.histograms["messages"].counts == {2: 2}
        assert [(item.where, item.row) for item in report.failed_rows] == [
            ("a.jsonl", 2),
            ("a.jsonl", 3),
        ]
        assert report.sample == [rows[0], rows[3]]
        assert "the line reads: {bad" in rows[1]["error"]["detail"]
        assert rows[2] == {
            "messages": [],
            "format": "chatml",
            "error": {
                "reason": "chatml_error",
                "detail": "conversations: expected a list, have text",
            },
            "raw_data": broken,
        }
        without, rows = convert_files([first, second], "sharegpt", keep_raw_data=False)
        assert [row.keys() & {"raw_data"} for row in rows] == [set()] * 4
        assert without.data_version != report.data_version

    def test_messages_that_cannot_be_written_are_a_failure(self, tmp_path: Path) -> None:
        deep = b'{"m": [{"role": "user", "content": [{"type": "x", "y": ' + DEEP + b"}]}]}"
        path = write_rows(tmp_path / "a.jsonl", [{"m": user("one")}, deep, {"m": user("three")}])
        for keep in (True, False):
            chosen = ChatmlOptions("messages", {"messages": "m"}, keep_raw_data=keep)
            with publish(tmp_path / "out.jsonl") as out:
                report = convert_split([stat_file(path)], chosen, out)
            lines = (tmp_path / "out.jsonl").read_bytes().splitlines()
            assert [b'"messages":[]' in line for line in lines] == [False, True, False]
            assert [b"raw_data" in line for line in lines] == [keep] * 3
            assert report.failed_rows[0].detail.startswith("cannot be written as JSON")

    def test_raw_data_of_a_line_is_as_it_was(self, tmp_path: Path) -> None:
        """Numbers of any size, and what is nested deeper than any row of ours."""
        big = b'{"t": "hi", "n": 123456789012345678901234567890, "x": 0.10000000000000000000001}'
        deep = b'{"t": "hi", "deep": ' + DEEP + b"}"
        path = write_rows(tmp_path / "a.jsonl", [big, deep])
        with publish(tmp_path / "out.jsonl") as out:
            report = convert_split([stat_file(path)], options("prompt_text_only"), out)
        lines = (tmp_path / "out.jsonl").read_bytes().splitlines()
        assert [line.partition(b'"raw_data":')[2] for line in lines] == [big + b"}", deep + b"}"]
        assert report.failed == 0

    @pytest.mark.parametrize(
        ("style", "column", "turn"),
        [
            ("messages", "messages", '{"role": "user", "content": "hi", "n": N}'),
            ("input_output_messages", "input", '{"role": "user", "content": "hi", "n": N}'),
            ("sharegpt", "conversations", '{"from": "gpt", "value": "", "tool_calls": [{"n": N}]}'),
            ("sharegpt", "conversations", '{"from": "human", "value": [{"type": "x", "n": N}]}'),
        ],
    )
    def test_numbers_in_turns_keep_their_digits(
        self, tmp_path: Path, style: str, column: str, turn: str
    ) -> None:
        digits = ["123456789012345678901", "-0.10000000000000000000001", "1e400", "7"]
        rows = [f'{{"output": "ho", "{column}": [{turn.replace("N", each)}]}}' for each in digits]
        path = write_rows(tmp_path / "a.jsonl", [row.encode() for row in rows])
        with publish(tmp_path / "out.jsonl") as out:
            convert_split([stat_file(path)], options(style, keep_raw_data=False), out)
        assert re.findall(r'"n":([^}]*)', (tmp_path / "out.jsonl").read_text()) == digits

    def test_raw_data_of_the_first_line_has_no_mark(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_bytes(b'\xef\xbb\xbf{"t": "hi"}\n')
        report, rows = convert_files([path], "prompt_text_only")
        assert (report.failed, rows[0]["raw_data"]) == (0, {"t": "hi"})

    def test_files_of_a_split_may_differ_in_format_and_schema(self, tmp_path: Path) -> None:
        pq.write_table(pa.table({"t": ["one"], "n": [1]}), tmp_path / "a.parquet")
        pq.write_table(pa.table({"n": ["x"], "t": ["two"]}), tmp_path / "b.parquet")
        pq.write_table(pa.table({"n": [b"\xff"]}), tmp_path / "c.parquet")
        (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(b'{"t": "four", "n": [4]}'))
        report, rows = convert_files(sorted(tmp_path.iterdir()), "prompt_text_only")
        assert [row["messages"] for row in rows] == [user(t) for t in ("one", "two", "four")]
        assert [row["raw_data"]["n"] for row in rows] == [1, "x", [4]]
        assert report.dropped == {"missing_prompt_text": 1}

    def test_lines_of_another_encoding_are_written_in_utf8(self, tmp_path: Path) -> None:
        """`raw_data` is the line as it was, in UTF-8."""
        path = tmp_path / "a.jsonl"
        path.write_bytes('{"t": "中", "n": 1.50}\n'.encode("gbk") + b'{"t": "\x81"}\n')
        with publish(tmp_path / "out.jsonl") as out:
            report = convert_split(
                [stat_file(path)], options("prompt_text_only"), out, reading=Reading("gbk")
            )
        first, second = (tmp_path / "out.jsonl").read_bytes().splitlines()
        assert first.endswith('"raw_data":{"t": "中", "n": 1.50}}'.encode())
        assert orjson.loads(second)["error"]["detail"].startswith("line 2, column 8: not gbk; ")
        assert report.failures == {"bad_line": 1}

    def test_a_bad_line_stops_a_split_that_wants_that(self, tmp_path: Path) -> None:
        path = write_rows(tmp_path / "a.jsonl", [{"t": "hi"}, b"{bad"])
        strict = Reading(on_bad_line="fail")
        with pytest.raises(InputError, match=r"a\.jsonl: line 2, column 2: .*on_bad_line: keep"):
            read_split([stat_file(path)], strict)
        with (
            pytest.raises(InputError, match=r"a\.jsonl: line 2, column 2: "),
            publish(tmp_path / "out.jsonl") as out,
        ):
            convert_split([stat_file(path)], options("prompt_text_only"), out, reading=strict)
        assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]

    def test_rows_of_a_split_of_any_format(self, tmp_path: Path) -> None:
        pq.write_table(pa.table({"t": ["one"] * 3}), tmp_path / "a.parquet")
        with pa.ipc.new_file(tmp_path / "b.arrow", pa.schema([("t", pa.string())])) as arrow:
            arrow.write_table(pa.table({"t": ["one"] * 4}), max_chunksize=3)
        (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf\n{}\n \n{bad"))
        files = [stat_file(path) for path in sorted(tmp_path.iterdir())]
        for reading in (OURS, Reading(on_bad_line="fail")):
            report = read_split(files[:2], reading)
            assert [member["rows"] for member in report.members] == [3, 4]
        report = read_split(files, OURS)
        assert [member["rows"] for member in report.members] == [3, 4, 2]
        assert [member["digest"] for member in report.members] == [
            file_digest(file.place) for file in files
        ]

    def test_half_a_surrogate_pair(self) -> None:
        made = convert("prompt_text_only", {"t": "\ud83d"})
        with pytest.raises(TypeError, match="surrogates not allowed"):
            encode(made)

    def test_a_cell_that_cannot_be_read_is_one_failure(self, tmp_path: Path) -> None:
        """Arrow does not check text for UTF-8."""
        texts = pa.array([b"one", b"\xff", b"three"]).view(pa.string())
        turns = pa.StructArray.from_arrays([pa.array(["human"] * 3), texts], ["from", "value"])
        lists = pa.ListArray.from_arrays(pa.array([0, 1, 2, 3], pa.int32()), turns)
        path = tmp_path / "a.parquet"
        pq.write_table(pa.table({"conversations": lists}), path)
        report, rows = convert_files([path], "sharegpt")
        assert [row["messages"] for row in rows] == [user("one"), [], user("three")]
        assert "column 'conversations'" in report.failed_rows[0].detail

    def test_bytes_in_a_parquet_file(self, tmp_path: Path) -> None:
        path = tmp_path / "a.parquet"
        row = {"t": "hi", "image": {"bytes": b"\x89PNG", "path": None}}
        pq.write_table(pa.Table.from_pylist([row]), path)
        _, rows = convert_files([path], "prompt_text_only")
        assert rows[0]["raw_data"] == {"t": "hi", "image": {"bytes": "iVBORw==", "path": None}}

    def test_a_limit_and_an_empty_split(self, tmp_path: Path) -> None:
        path = write_rows(tmp_path / "a.jsonl", [{"t": str(n)} for n in range(5)])
        report, rows = convert_files([path], "prompt_text_only", limit=3)
        assert (report.rows_in, [row["raw_data"]["t"] for row in rows]) == (3, ["0", "1", "2"])
        report, rows = convert_files([write_rows(path, [])], "prompt_text_only")
        assert (report.rows_in, rows) == (0, [])

    def test_a_large_file_is_not_held_in_memory(self, tmp_path: Path) -> None:
        path = write_rows(tmp_path / "a.jsonl", [{"t": "x" * 10_000}] * 2000)
        tracemalloc.start()
        with publish(tmp_path / "out.jsonl") as out:
            report = convert_split([stat_file(path)], options("prompt_text_only"), out)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert report.rows == 2000
        assert peak < path.stat().st_size / 4

    def test_only_so_many_failures_are_listed(self, tmp_path: Path) -> None:
        path = write_rows(tmp_path / "a.jsonl", [{"t": [1]}] * 50)
        report, _ = convert_files([path], "prompt_text_only")
        assert (report.failed, len(report.failed_rows)) == (50, 10)

    def test_a_damaged_file_publishes_nothing(self, tmp_path: Path) -> None:
        good = write_rows(tmp_path / "a.jsonl", [{"t": "hi"}])
        (tmp_path / "b.parquet").write_bytes(b"PAR1 and no more")
        with pytest.raises(InputError, match=r"b\.parquet: not a readable Parquet file"):
            convert_files([good, tmp_path / "b.parquet"], "prompt_text_only")
        assert list((tmp_path / "out").iterdir()) == []
