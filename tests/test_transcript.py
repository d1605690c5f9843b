"""Records with messages, to read: Markdown, the dialogue log, the HTML page."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from modelcall_assets.transforms.transcript import (
    MOST_VALUES,
    Turn,
    dialogue_pieces,
    markdown,
    turns_of,
)

CHAT: dict[str, Any] = {
    "id": "c1",
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "<think>\neasy\n</think>\n\n2"},
    ],
}
TOOLS: dict[str, Any] = {
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "Weather?"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"function": {"name": "look_up", "arguments": '{"city":"北京"}'}}],
        },
        {"role": "tool", "content": "rain ``` here"},
        {"role": "assistant", "content": "It rains.", "reasoning_content": "the tool says so"},
    ]
}


def said(record: dict[str, Any]) -> list[tuple[str, str]]:
    return [(turn.role, turn.said) for turn in turns_of(record)]


def reasoning(turn: Turn) -> list[str]:
    return [part.text for part in turn.parts if part.kind == "reasoning"]


class TestTurns:
    def test_thinking_is_not_said(self) -> None:
        assert said(CHAT) == [("system", "Be brief."), ("user", "1+1?"), ("assistant", "2")]
        assert reasoning(turns_of(CHAT)[-1]) == ["easy"]

    def test_final_messages_win_and_a_response_is_a_turn(self) -> None:
        asked = {"messages": CHAT["messages"][1:2], "response": "two", "reasoning": "hm"}
        assert said(asked) == [("user", "1+1?"), ("assistant", "two")]
        assert reasoning(turns_of(asked)[-1]) == ["hm"]
        final = [*CHAT["messages"][1:2], {"role": "assistant", "content": "2!"}]
        assert said({**asked, "final_messages": final})[-1] == ("assistant", "2!")
        as_text = {"messages": orjson.dumps(final).decode()}
        assert said(as_text)[-1] == ("assistant", "2!")

    def test_cut_off_thinking_is_all_reasoning(self) -> None:
        turn = turns_of({"messages": [{"role": "assistant", "content": "<think>and so on"}]})[0]
        assert (turn.said, reasoning(turn)) == ("", ["and so on"])

    @pytest.mark.parametrize("record", [{}, {"messages": None}, {"messages": "no"}, {"text": "x"}])
    def test_a_record_without_messages_has_none(self, record: dict[str, Any]) -> None:
        assert turns_of(record) == []

    @pytest.mark.parametrize("message", [None, "text", 3, {}, {"role": None, "content": {"a": 1}}])
    def test_odd_messages_are_shown_all_the_same(self, message: object) -> None:
        assert len(turns_of({"messages": [message]})) == 1


def read_back(text: str) -> list[tuple[str, Any]]:
    """Path and value of all that a parser of Markdown finds in code spans and fences."""
    found: list[tuple[str, Any]] = []
    for token in MarkdownIt("commonmark").parse(text):
        spans = [each.content for each in token.children or () if each.type == "code_inline"]
        if len(spans) == 2:
            found.append((spans[0], json.loads(spans[1])))
        elif spans:
            found.append((spans[0], None))
        elif token.type == "fence":
            assert token.info == "text"
            found[-1] = (found[-1][0], token.content.removesuffix("\n"))
    return found


def put_together(value: Any, found: list[tuple[str, Any]]) -> Any:
    """What was found, in its order and in the shape of the value."""
    if found and found[0][1] == value and type(found[0][1]) is type(value):
        return found.pop(0)[1]
    if isinstance(value, dict):
        return {name: put_together(each, found) for name, each in value.items()}
    return [put_together(each, found) for each in value] if isinstance(value, list) else found


MARKED = st.text(alphabet="ab_*`~<>|&\\#-[]()! \n\r\t\0\u2028é") | st.text()
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | MARKED,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(MARKED, inner, max_size=4),
    max_leaves=10,
)


class TestMarkdown:
    @given(st.dictionaries(MARKED, VALUES, min_size=1, max_size=4))
    def test_what_is_read_back_is_the_value(self, record: dict[str, Any]) -> None:
        found = read_back(markdown(record))
        assert put_together(record, found) == record
        assert not found

    def test_texts_stay_as_they_are(self) -> None:
        code = "def __init__(self):\n    *args = `x`\n```py\n<b>\n```\n"
        messages = [{"role": "user", "content": code * 3}]
        text = markdown({"text": code, "score": 4, "tags": ["a", "b"], "messages": messages})
        assert f"````text\n{code}\n````" in text
        assert "`score`: `4`" in text and '`tags`: `["a", "b"]`' in text
        assert "`messages[0].content`" in text
        assert read_back(text)[0] == ("text", code)

    def test_of_many_values_the_first_are_shown(self) -> None:
        assert len(read_back(markdown({f"c{n}": n for n in range(1000)}))) == MOST_VALUES


class TestDialogueLog:
    def test_is_written_exactly_as_before(self) -> None:
        follow_up = [
            *CHAT["messages"],
            {"role": "user", "content": "and\n2+2?"},
            {"role": "assistant", "content": "4"},
        ]
        unanswered = {"messages": [{"role": "user", "content": "still there?"}]}
        records = [{"messages": follow_up}, TOOLS, {"text": "no chat"}, unanswered]
        assert "".join(dialogue_pieces(records, datetime(2026, 3, 4, 5, 6, 7))) == (
            "# Chat Dialogue Log\n"
            "\n"
            "## 对话时间\n"
            "\n"
            "2026-03-04 05:06:07\n"
            "\n"
            "---\n"
            "\n"
            "## 对话内容\n"
            "\n"
            "### 问题 1\n"
            "\n"
            "用户：1+1?  \n"
            "助手：2\n"
            "\n"
            "---\n"
            "\n"
            "### 问题 2\n"
            "\n"
            "用户：and\n2+2?  \n"
            "助手：4\n"
            "\n"
            "---\n"
            "\n"
            "### 问题 3\n"
            "\n"
            "用户：Weather?  \n"
            "助手：It rains.\n"
            "\n"
            "---\n"
            "\n"
            "### 问题 4\n"
            "\n"
            "用户：still there?  \n"
        )

    def test_answers_to_one_question_stay_together(self) -> None:
        turns = [("assistant", "Hello."), ("user", "a"), ("assistant", "b"), ("assistant", "c")]
        record = {"messages": [{"role": role, "content": text} for role, text in turns]}
        text = "".join(dialogue_pieces([record], datetime(2026, 1, 1)))
        assert "### 问题 1\n\n助手：Hello.\n\n---\n" in text
        assert text.endswith("### 问题 2\n\n用户：a  \n助手：b\n\nc\n")
