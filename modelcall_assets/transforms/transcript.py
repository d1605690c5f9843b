"""Records with `messages` as something to read: Markdown, the dialogue log, or one static HTML page
that needs nothing from elsewhere."""

import json
import re
from base64 import b64encode
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from html import escape
from itertools import islice
from typing import Any, Literal, cast

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
_UNFENCED = frozenset("\r\0")
"""What no fence leaves as it is."""
MOST_BADGES = 12
_IDS = ("id", "uid")
_SHOWN_ABOVE = {"api_record_id", "api_status", "api_fail_reason"}
_STYLE = """
:root{color-scheme:light dark;--line:#d5d8de;--soft:#f3f4f6;--dim:#667;--ok:#12743b;--bad:#b3261e}
@media(prefers-color-scheme:dark){:root{--line:#3a3d45;--soft:#23252b;--dim:#9aa;--ok:#6fd39a;
--bad:#ff8f87}}
body{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:1.5rem auto;padding:0 1rem}
input{font:inherit;width:20rem;max-width:100%;padding:.3rem .5rem}
article{border:1px solid var(--line);border-radius:.5rem;margin:1rem 0;padding:.5rem 1rem 1rem}
h2{font-size:1rem;display:inline;margin-right:.5rem;overflow-wrap:anywhere}
h3{font-size:.8rem;color:var(--dim);margin:.9rem 0 .2rem}
small,summary{color:var(--dim)}
.badge{border:1px solid var(--line);border-radius:1rem;padding:.05rem .55rem;font-size:.8rem;
margin-right:.25rem;display:inline-block}
.success{color:var(--ok)}.error{color:var(--bad)}
.text,pre,td{white-space:pre-wrap;overflow-wrap:anywhere}
pre,details>.text{background:var(--soft);border-radius:.4rem;padding:.5rem .75rem;margin:.3rem 0}
.assistant>.text{border-left:3px solid var(--line);padding-left:.75rem}
table{border-collapse:collapse;font-size:.85rem}
td,th{border-top:1px solid var(--line);padding:.2rem .6rem;text-align:left;vertical-align:top}
"""
_SCRIPT = """
const box=document.querySelector('input'),shown=document.querySelector('output');
box.oninput=()=>{const word=box.value.toLowerCase();let count=0;
for(const record of document.querySelectorAll('article')){
record.hidden=!record.textContent.toLowerCase().includes(word);count+=!record.hidden}
shown.textContent=count};
"""


_HASHES = [b64encode(sha256(text.encode()).digest()).decode() for text in (_STYLE, _SCRIPT)]
_POLICY = "default-src 'none'; style-src 'sha256-{}'; script-src 'sha256-{}'".format(*_HASHES)
"""Nothing inline but those two may run."""


@dataclass(frozen=True, slots=True)
class Part:
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
    final = _messages(record.get("final_messages"))
    turns = [_turn(message) for message in final or _messages(record.get("messages"))]
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


def html_page(
    title: str, records: Iterable[tuple[str, Row]], most_chars: int | None = 20_000
) -> str:
    """A page of records, each with where it comes from: identity, status and numbers as
    badges, messages as a conversation, reasoning folded, all other columns below."""
    articles = [_article(where, row, most_chars) for where, row in records]
    return (
        '<!doctype html><html><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{escape(title)}</h1>"
        '<p><input type="search" placeholder="show only records with this text"> '
        f"<small><output>{len(articles)}</output> of {len(articles)} records</small></p>\n"
        + "\n".join(articles)
        + f"\n<script>{_SCRIPT}</script></body></html>\n"
    )


def _clipped(text: str, most_chars: int | None) -> str:
    """The start of a long text, with a note of what is missing."""
    if most_chars is None or len(text) <= most_chars:
        return text
    return f"{text[:most_chars]}… [{len(text) - most_chars:,} more characters]"


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


def _messages(value: Any) -> list[Any]:
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
    calls = [*_messages(fields.get("tool_calls")), fields.get("function_call")]
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
        url = cast("Row", image).get("url") if isinstance(image, dict) else image
        return Part("other", _clipped(str(url), 200), "image")
    return Part("other", text if isinstance(text, str) else _readable_json(fields), kind)


def _first_text(fields: Row, names: Iterable[str]) -> str:
    texts = (fields.get(name) for name in names)
    return next((text for text in texts if isinstance(text, str) and text.strip()), "")


def _article(where: str, row: Row, most_chars: int | None) -> str:
    identity = next((row[name] for name in ("api_record_id", *_IDS) if row.get(name)), where)
    turns = turns_of(row)
    sections = (
        f'<section class="{"assistant" if turn.role == "assistant" else "other"}">'
        f"<h3>{escape(turn.role)}</h3>"
        f"{''.join(_part_html(part, most_chars) for part in turn.parts)}</section>"
        for turn in turns
    )
    return (
        f"<article><h2>{escape(str(identity))}</h2>{''.join(_badges(row))} "
        f"<small>{escape(where)}</small>{''.join(sections)}{_columns(row, turns, most_chars)}"
        "</article>"
    )


def _badges(row: Row) -> Iterator[str]:
    badge = '<span class="badge {}">{}</span>'
    status, reason = row.get("api_status"), row.get("api_fail_reason")
    if status:
        yield badge.format("success" if status == "success" else "error", escape(str(status)))
    if reason:
        yield badge.format("error", escape(str(reason)))
    names = (
        name
        for name, value in row.items()
        if isinstance(value, int | float) and not name.startswith("api_") and name not in _IDS
    )
    for name in islice(names, MOST_BADGES):
        yield badge.format("", escape(f"{name} {_readable_json(row[name])}"))


def _part_html(part: Part, most_chars: int | None) -> str:
    text = escape(_clipped(part.text, most_chars))
    if part.kind == "text":
        return f'<div class="text">{text}</div>'
    if part.kind == "reasoning":
        return _folded("reasoning", f'<div class="text">{text}</div>')
    title = f"calls {part.title}" if part.kind == "call" else part.title
    return f"<small>{escape(title)}</small><pre>{text}</pre>"


def _columns(row: Row, turns: list[Turn], most_chars: int | None) -> str:
    """Open when there is no conversation to read instead."""
    above = {*CONVERSATION_COLUMNS, *REASONING_COLUMNS} if turns else set[str]()
    cells: list[str] = []
    for name, value in row.items():
        if value is None or name in above | _SHOWN_ABOVE:
            continue
        text = value if isinstance(value, str) else _readable_json(value)
        cell = escape(_clipped(text, most_chars))
        cell = _folded("reasoning", cell) if name in REASONING_COLUMNS else cell
        cells.append(f"<tr><th>{escape(name)}</th><td>{cell}</td></tr>")
    table = f"<table>{''.join(cells)}</table>"
    return _folded("columns", table, is_open=not turns) if cells else ""


def _folded(summary: str, inner: str, is_open: bool = False) -> str:
    return f"<details{' open' if is_open else ''}><summary>{summary}</summary>{inner}</details>"
