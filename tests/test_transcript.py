"""Records with messages, to read: Markdown, the dialogue log, the HTML page."""

from __future__ import annotations

from datetime import datetime
from html.parser import HTMLParser
from typing import Any

import orjson
import pytest

from modelcall_assets.transforms.transcript import (
    Turn,
    dialogue_pieces,
    html_page,
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
        assert markdown(record) == ""

    @pytest.mark.parametrize("message", [None, "text", 3, {}, {"role": None, "content": {"a": 1}}])
    def test_odd_messages_are_shown_all_the_same(self, message: object) -> None:
        assert "?" in markdown({"messages": [message]})
        assert "<article>" in html_page("t", [("row 1", {"messages": [message]})])


class TestMarkdown:
    def test_shows_a_chat_by_roles(self) -> None:
        assert markdown(CHAT) == (
            "### system\n\nBe brief.\n\n### user\n\n1+1?\n\n### assistant\n\n"
            "> *reasoning*\n>\n> easy\n\n2"
        )

    def test_shows_tools_and_their_calls(self) -> None:
        text = markdown(TOOLS)
        assert '**calls `look_up`**\n\n```\n{\n  "city": "北京"\n}\n```' in text
        assert "### tool" in text and "> the tool says so" in text

    def test_parts_that_are_no_text(self) -> None:
        content = [
            {"type": "text", "text": "It is "},
            {"type": "python", "text": "2*3"},
            {"type": "image_url", "image_url": {"url": "https://x.test/a.png"}},
            {"type": "input_audio", "input_audio": {"data": "…"}},
        ]
        text = markdown({"messages": [{"role": "user", "content": content}]})
        assert "**python**\n\n```\n2*3\n```" in text
        assert "**image**\n\n```\nhttps://x.test/a.png\n```" in text
        assert "input_audio" in text

    def test_long_texts_are_cut_and_open_code_is_closed(self) -> None:
        code = "```python\n" + "x = 1\n" * 100 + "```"
        text = markdown({"messages": [{"role": "user", "content": code}] * 2}, most_chars=40)
        assert text.count("more characters]\n```\n\n### user") == 1
        assert text.endswith("more characters]\n```")

    def test_no_tag_but_in_code(self) -> None:
        content = "a <b> `<c>`\n```\n<d>\n```"
        text = markdown({"messages": [{"role": "user<x>", "content": content}]})
        assert text == "### user&lt;x>\n\na &lt;b> `<c>`\n```\n<d>\n```"


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


class _Page(HTMLParser):
    """Text and tags; fails on what would load something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert not {"src", "href", "onclick"} & {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


class TestPage:
    def test_shows_everything_and_loads_nothing(self) -> None:
        evil = "</script><script>alert(1)</script><img src=x>"
        scored = {
            "api_record_id": "r-1",
            "api_status": "error",
            "api_fail_reason": "timeout",
            "score": 4,
            "text": evil,
            "quality_tags": ["<b>"],
            "api_reasoning": "thought",
        }
        page = _Page(html_page(evil, [("a.jsonl, row 1", {**CHAT, "note": evil}), ("b", scored)]))
        assert page.tags.count("script") == 1 and "img" not in page.tags
        assert page.tags.count("article") == 2
        for text in ("c1", "a.jsonl, row 1", "1+1?", "easy", "r-1", "error", "timeout", "score 4"):
            assert text in page.text
        assert page.text.count(evil) == 4

    def test_reasoning_is_folded_and_columns_are_open_only_without_a_chat(self) -> None:
        page = html_page("t", [("1", {**CHAT, "x": "y"})])
        assert "<details><summary>reasoning</summary>" in page
        assert "<details><summary>columns</summary>" in page
        assert "<details open><summary>columns</summary>" in html_page("t", [("1", {"x": "y"})])

    def test_follows_the_readers_colours_and_has_a_filter(self) -> None:
        page = html_page("t", [("1", {"x": "y" * 30_000})])
        assert "prefers-color-scheme:dark" in page and 'type="search"' in page
        assert "10,000 more characters" in page
