"""Records with `messages` as something to read: their turns, Markdown, and the dialogue log."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from typing import Any, Literal, NamedTuple, cast

import orjson

from modelcall_assets.records.outcome import Row

CONVERSATION_COLUMNS = ("messages", "final_messages", "response")
REASONING_COLUMNS = ("reasoning", "reasoning_content", "api_reasoning")
_THINKING = re.compile(r"\s*<think>(.*?)(?:</think>\s*|\Z)", re.DOTALL)
_PLAIN = re.compile(r"[\w-]+")
MOST_VALUES = 60
"""Of a record that are shown."""
_SHORT, _ONE_LINE = 60, 160
"""Characters of a text, and of a list or object, that are shown in one line."""
_URL = 200
"""Characters of an image's address, which may be its content, that are shown."""
_MOST_CELL = 160
"""Characters of a table's cell that are shown."""
_MARKS = re.compile(r"([\\`*_\[\]<>|~&])")
_UNFENCED = frozenset("\r\0")
"""What no fence leaves as it is."""


class Part(NamedTuple):
    """Of a message. `title` is the function that is called, or the type of what is no text."""

    kind: Literal["text", "reasoning", "call", "other"]
    text: str
    title: str = ""


@dataclass(frozen=True, slots=True)
class Turn:
    role: str
    parts: tuple[Part, ...]

    @property
    def said(self) -> str:
        """Its text, without reasoning, calls and attachments."""
        return "".join(part.text for part in self.parts if part.kind == "text").strip()


def turns_of(record: Row) -> list[Turn]:
    """`final_messages`, else `messages` and the `response`; none when the record has neither."""
    final = messages_in(record.get("final_messages"))
    turns = [_turn(message) for message in final or messages_in(record.get("messages"))]
    response = record.get("response")
    if turns and not final and isinstance(response, str) and response:
        turns.append(Turn("assistant", tuple(_text_parts(response))))
    reasoning = _first_text(record, REASONING_COLUMNS)
    last = turns[-1] if turns else Turn("", ())
    if reasoning and last.role == "assistant" and all(p.kind != "reasoning" for p in last.parts):
        turns[-1] = Turn("assistant", (Part("reasoning", reasoning), *last.parts))
    return turns


def markdown(record: Row) -> str:
    """Each value as it is: texts of several lines, and long ones, in a fence, all else as JSON in
    code. What a parser of Markdown finds in them is the value, or one of the values in it."""
    blocks: list[str] = []
    for path, value in islice(_leaves("", record), MOST_VALUES):
        is_text = isinstance(value, str) and ("\n" in value or len(value) > _SHORT)
        if is_text and _UNFENCED.isdisjoint(value):
            fence = "`" * max(3, _ticks_in(value) + 1)
            blocks.append(f"{_code(path)}\n\n{fence}text\n{value}\n{fence}")
        else:
            blocks.append(f"{_code(path)}: {_code(_json(value))}")
    return "\n\n".join(blocks)


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """No character means anything in it; long cells are cut."""
    names = list(rows[0])
    cells = ([_cell(row.get(name)) for name in names] for row in rows)
    lines = [map(_cell, names), ["---"] * len(names), *cells]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    text = value if isinstance(value, str) else orjson.dumps(value, default=str).decode()
    text = " ".join(text.split())
    return _MARKS.sub(r"\\\1", text if len(text) <= _MOST_CELL else text[:_MOST_CELL] + "…")


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The values in a value, down to what is short; with their paths."""
    if not value or not isinstance(value, dict | list) or (path and len(_json(value)) <= _ONE_LINE):
        yield path, value
    elif isinstance(value, list):
        for at, each in enumerate(cast("list[Any]", value)):
            yield from _leaves(f"{path}[{at}]", each)
    else:
        for name, each in cast("dict[str, Any]", value).items():
            step = name if _PLAIN.fullmatch(name) else f"[{_json(name)}]"
            yield from _leaves(f"{path}.{step}" if path and step == name else f"{path}{step}", each)


def _json(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text.encode("utf-8", "replace").decode()


def _code(text: str) -> str:
    """A code span, of one line."""
    ticks = "`" * (_ticks_in(text) + 1)
    pad = " " if text[:1] in ("`", " ") or text[-1:] in ("`", " ") else ""
    return f"{ticks}{pad}{text}{pad}{ticks}"


def _ticks_in(text: str) -> int:
    return max((len(ticks) for ticks in re.findall(r"`+", text)), default=0)


def dialogue_pieces(conversations: Iterable[Row], when: datetime) -> Iterator[str]:
    """The records' user and assistant texts as one Markdown page, question by question."""
    yield f"# Chat Dialogue Log\n\n## 对话时间\n\n{when:%Y-%m-%d %H:%M:%S}\n\n---\n\n## 对话内容\n"
    number = 0
    for record in conversations:
        for question, answer in _exchanges(turns_of(record)):
            number += 1
            rule = "\n---\n" if number > 1 else ""
            lines = [f"用户：{question}  \n"] if question else []
            lines += [f"助手：{answer}\n"] if answer else []
            yield f"{rule}\n### 问题 {number}\n\n{''.join(lines)}"


def _readable_json(value: Any) -> str:
    """Indented JSON; a text that is JSON counts as what it says."""
    try:
        value = orjson.loads(value) if isinstance(value, str) else value
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


def messages_in(value: Any) -> list[Any]:
    """A list of messages, also as the JSON text that a Parquet column may hold."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with suppress(orjson.JSONDecodeError):
            value = orjson.loads(value)
    return cast("list[Any]", value) if isinstance(value, list) else []


def _turn(message: Any) -> Turn:
    if not isinstance(message, dict):
        return Turn("?", (Part("other", _readable_json(message), "not a message"),))
    fields = cast("Row", message)
    role = fields.get("role")
    parts = list(_content_parts(fields.get("content")))
    reasoning = _first_text(fields, REASONING_COLUMNS)
    if reasoning and not any(part.kind == "reasoning" for part in parts):
        parts.insert(0, Part("reasoning", reasoning))
    calls = [*messages_in(fields.get("tool_calls")), fields.get("function_call")]
    for call in (cast("Row", call) for call in calls if isinstance(call, dict)):
        function = cast("Row", call.get("function") or call)
        text, name = _readable_json(function.get("arguments")), str(function.get("name", "?"))
        parts.append(Part("call", text, name))
    return Turn(role if isinstance(role, str) and role else "?", tuple(parts))


def _content_parts(content: Any) -> Iterator[Part]:
    if isinstance(content, str):
        yield from _text_parts(content)
    elif isinstance(content, list):
        yield from map(_item_part, cast("list[Any]", content))
    elif content is not None:
        yield Part("other", _readable_json(content), "content")


def _text_parts(text: str) -> Iterator[Part]:
    if thinking := _THINKING.match(text):
        if thinking[1].strip():
            yield Part("reasoning", thinking[1].strip())
        text = text[thinking.end() :]
    if text:
        yield Part("text", text)


def _item_part(item: Any) -> Part:
    if not isinstance(item, dict):
        return Part("text", str(item))
    fields = cast("Row", item)
    kind, text = str(fields.get("type", "part")), fields.get("text")
    if kind == "text" and isinstance(text, str):
        return Part("text", text)
    if kind in ("reasoning", "thinking"):
        return Part("reasoning", str(text or fields.get(kind, "")))
    image = fields.get("image_url")
    if image is not None:
        url = str(cast("Row", image).get("url") if isinstance(image, dict) else image)
        missing = len(url) - _URL
        shown = f"{url[:_URL]}… [{missing:,} more characters]" if missing > 0 else url
        return Part("other", shown, "image")
    return Part("other", text if isinstance(text, str) else _readable_json(fields), kind)


def _first_text(fields: Row, names: Iterable[str]) -> str:
    texts = (fields.get(name) for name in names)
    return next((text for text in texts if isinstance(text, str) and text.strip()), "")
