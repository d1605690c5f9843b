"""A record with `messages` as something to read: Markdown, or the dialogue log."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, cast

import orjson

from modelcall_assets.records.outcome import Row

CONVERSATION_COLUMNS = ("messages", "final_messages", "response")
REASONING_COLUMNS = ("reasoning", "reasoning_content", "api_reasoning")
_THINKING = re.compile(r"\s*<think>(.*?)(?:</think>\s*|\Z)", re.DOTALL)
_CODE = re.compile(r"(```.*?```|`[^`\n]*`)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a message. `title` is the function that is called, or the type of what is no
    text."""

    kind: Literal["text", "reasoning", "call", "other"]
    text: str
    title: str = ""


@dataclass(frozen=True, slots=True)
class Turn:
    """One message."""

    role: str
    parts: tuple[Part, ...]

    @property
    def said(self) -> str:
        """Its text, without reasoning, calls and attachments."""
        return "".join(part.text for part in self.parts if part.kind == "text").strip()


def turns_of(record: Row) -> list[Turn]:
    """`final_messages`, else `messages` and the `response`; none when the record has neither."""
    final = _messages(record.get("final_messages"))
    turns = [_turn(message) for message in final or _messages(record.get("messages"))]
    response = record.get("response")
    if turns and not final and isinstance(response, str) and response:
        turns.append(Turn("assistant", tuple(_text_parts(response))))
    reasoning = _first_text(record, REASONING_COLUMNS)
    if reasoning and turns and turns[-1].role == "assistant" and not _has_reasoning(turns[-1]):
        turns[-1] = Turn("assistant", (Part("reasoning", reasoning), *turns[-1].parts))
    return turns


def markdown(record: Row, most_chars: int | None = 2000) -> str:
    """A heading for each role, reasoning as a quotation; each text is cut at `most_chars`. Empty
    for a record without messages."""
    blocks: list[str] = []
    for turn in turns_of(record):
        blocks.append(f"### {_one_line(turn.role)}")
        blocks += (_part_markdown(part, most_chars) for part in turn.parts)
    return "\n\n".join(blocks)


def dialogue_log(conversations: Iterable[Row], when: datetime) -> str:
    """The records' user and assistant texts as one Markdown page, question by question."""
    return "".join(dialogue_pieces(conversations, when))


def dialogue_pieces(conversations: Iterable[Row], when: datetime) -> Iterator[str]:
    """The same, piece by piece."""
    yield f"# Chat Dialogue Log\n\n## 对话时间\n\n{when:%Y-%m-%d %H:%M:%S}\n\n---\n\n## 对话内容\n"
    number = 0
    for record in conversations:
        for question, answer in _exchanges(turns_of(record)):
            number += 1
            rule = "\n---\n" if number > 1 else ""
            lines = [f"用户：{question}  \n"] if question else []
            lines += [f"助手：{answer}\n"] if answer else []
            yield f"{rule}\n### 问题 {number}\n\n{''.join(lines)}"


def clipped(text: str, most_chars: int | None) -> str:
    """The start of a long text, with a note of what is missing."""
    if most_chars is None or len(text) <= most_chars:
        return text
    return f"{text[:most_chars]}… [{len(text) - most_chars:,} more characters]"


def readable_json(value: Any) -> str:
    """Indented JSON; a text that is JSON counts as what it says."""
    if isinstance(value, str):
        try:
            value = orjson.loads(value)
        except orjson.JSONDecodeError:
            return value
    return orjson.dumps(value, default=str, option=orjson.OPT_INDENT_2).decode()


def _exchanges(turns: Iterable[Turn]) -> Iterator[tuple[str, str]]:
    """Each question with all that was answered; one of the two may be empty."""
    question, answers = "", list[str]()
    for turn in turns:
        if turn.role == "user" and turn.said:
            if question or answers:
                yield question, "\n\n".join(answers)
            question, answers = turn.said, []
        elif turn.role == "assistant" and turn.said:
            answers.append(turn.said)
    if question or answers:
        yield question, "\n\n".join(answers)


def _messages(value: Any) -> list[Any]:
    """A list of messages, also as the JSON text that a Parquet column may hold."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = orjson.loads(value)
        except orjson.JSONDecodeError:
            return []
    return cast("list[Any]", value) if isinstance(value, list) else []


def _turn(message: Any) -> Turn:
    if not isinstance(message, dict):
        return Turn("?", (Part("other", readable_json(message), "not a message"),))
    fields = cast("Row", message)
    role = fields.get("role")
    parts = list(_content_parts(fields.get("content")))
    reasoning = _first_text(fields, REASONING_COLUMNS)
    if reasoning and not any(part.kind == "reasoning" for part in parts):
        parts.insert(0, Part("reasoning", reasoning))
    calls = [*_messages(fields.get("tool_calls")), fields.get("function_call")]
    parts += (_call(cast("Row", call)) for call in calls if isinstance(call, dict))
    return Turn(role if isinstance(role, str) and role else "?", tuple(parts))


def _content_parts(content: Any) -> Iterator[Part]:
    if isinstance(content, str):
        yield from _text_parts(content)
    elif isinstance(content, list):
        for part in cast("list[Any]", content):
            yield (
                _typed_part(cast("Row", part))
                if isinstance(part, dict)
                else Part("text", str(part))
            )
    elif content is not None:
        yield Part("other", readable_json(content), "content")


def _text_parts(text: str) -> Iterator[Part]:
    if thinking := _THINKING.match(text):
        if thinking[1].strip():
            yield Part("reasoning", thinking[1].strip())
        text = text[thinking.end() :]
    if text:
        yield Part("text", text)


def _typed_part(part: Row) -> Part:
    """One item of a content that is a list."""
    kind, text = str(part.get("type", "part")), part.get("text")
    if kind == "text" and isinstance(text, str):
        return Part("text", text)
    if kind in ("reasoning", "thinking"):
        return Part("reasoning", str(text or part.get(kind, "")))
    image = part.get("image_url")
    if image is not None:
        url = cast("Row", image).get("url") if isinstance(image, dict) else image
        return Part("other", clipped(str(url), 200), "image")
    return Part("other", text if isinstance(text, str) else readable_json(part), kind)


def _call(call: Row) -> Part:
    function = cast("Row", call.get("function") or call)
    return Part("call", readable_json(function.get("arguments")), str(function.get("name", "?")))


def _has_reasoning(turn: Turn) -> bool:
    return any(part.kind == "reasoning" for part in turn.parts)


def _first_text(fields: Row, names: Iterable[str]) -> str:
    texts = (fields.get(name) for name in names)
    return next((text for text in texts if isinstance(text, str) and text.strip()), "")


def _part_markdown(part: Part, most_chars: int | None) -> str:
    text = clipped(part.text, most_chars)
    if part.kind == "text":
        return _shown_as_written(text)
    if part.kind == "reasoning":
        lines = ("*reasoning*", "", *_shown_as_written(text.strip()).splitlines())
        return "\n".join(f"> {line}".rstrip() for line in lines)
    title = f"calls `{_one_line(part.title)}`" if part.kind == "call" else _one_line(part.title)
    longest = max((len(ticks) for ticks in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"**{title}**\n\n{fence}\n{text}\n{fence}"


def _shown_as_written(text: str) -> str:
    """Markdown of the author's own, in which no `<` starts a tag and no code block stays open."""
    pieces = _CODE.split(text)
    pieces[::2] = (piece.replace("<", "&lt;") for piece in pieces[::2])
    is_open = sum(line.lstrip().startswith("```") for line in text.splitlines()) % 2
    return "".join(pieces) + ("\n```" if is_open else "")


def _one_line(text: str) -> str:
    return clipped(" ".join(text.split()).replace("<", "&lt;"), 80)
