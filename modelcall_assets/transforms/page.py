"""Records as one static HTML page that needs nothing from elsewhere."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Iterator
from hashlib import sha256
from html import escape
from typing import Any

from modelcall_assets.records.outcome import Row
from modelcall_assets.transforms.transcript import (
    CONVERSATION_COLUMNS,
    REASONING_COLUMNS,
    Part,
    Turn,
    clipped,
    readable_json,
    turns_of,
)

MOST_BADGES = 12
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


def _allowed(text: str) -> str:
    """The one inline text of its kind that may run."""
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"


_POLICY = f"default-src 'none'; style-src {_allowed(_STYLE)}; script-src {_allowed(_SCRIPT)}"


def html_page(
    title: str, records: Iterable[tuple[str, Row]], most_chars: int | None = 20_000
) -> str:
    """A page of records, each with the place that it comes from: identity, status and numbers as
    badges, messages as a conversation, reasoning folded, all other columns below."""
    articles = [_article(place, row, most_chars) for place, row in records]
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


def _article(place: str, row: Row, most_chars: int | None) -> str:
    identity = next((row[name] for name in ("api_record_id", "id", "uid") if row.get(name)), place)
    turns = turns_of(row)
    conversation = "".join(_turn(turn, most_chars) for turn in turns)
    return (
        f"<article><h2>{escape(str(identity))}</h2>{''.join(_badges(row))} "
        f"<small>{escape(place)}</small>{conversation}{_columns(row, turns, most_chars)}</article>"
    )


def _badges(row: Row) -> Iterator[str]:
    status, reason = row.get("api_status"), row.get("api_fail_reason")
    if status:
        yield _badge(str(status), "success" if status == "success" else "error")
    if reason:
        yield _badge(str(reason), "error")
    numbers = {name: value for name, value in row.items() if isinstance(value, int | float)}
    named = (name for name in numbers if not name.startswith("api_") and name not in ("id", "uid"))
    for name, _ in zip(named, range(MOST_BADGES), strict=False):
        yield _badge(f"{name} {readable_json(row[name])}")


def _badge(text: str, kind: str = "") -> str:
    return f'<span class="badge {kind}">{escape(text)}</span>'


def _turn(turn: Turn, most_chars: int | None) -> str:
    kind = "assistant" if turn.role == "assistant" else "other"
    parts = "".join(_part(part, most_chars) for part in turn.parts)
    return f'<section class="{kind}"><h3>{escape(turn.role)}</h3>{parts}</section>'


def _part(part: Part, most_chars: int | None) -> str:
    text = escape(clipped(part.text, most_chars))
    if part.kind == "text":
        return f'<div class="text">{text}</div>'
    if part.kind == "reasoning":
        return _folded("reasoning", f'<div class="text">{text}</div>')
    title = f"calls {part.title}" if part.kind == "call" else part.title
    return f"<small>{escape(title)}</small><pre>{text}</pre>"


def _columns(row: Row, turns: list[Turn], most_chars: int | None) -> str:
    """Open when there is no conversation to read instead."""
    above = {*CONVERSATION_COLUMNS, *REASONING_COLUMNS} if turns else set[str]()
    cells = "".join(
        f"<tr><th>{escape(name)}</th><td>{_cell(name, value, most_chars)}</td></tr>"
        for name, value in row.items()
        if value is not None and name not in above | _SHOWN_ABOVE
    )
    return _folded("columns", f"<table>{cells}</table>", is_open=not turns) if cells else ""


def _cell(name: str, value: Any, most_chars: int | None) -> str:
    text = value if isinstance(value, str) else readable_json(value)
    shown = escape(clipped(text, most_chars))
    return _folded("reasoning", shown) if name in REASONING_COLUMNS else shown


def _folded(summary: str, inner: str, is_open: bool = False) -> str:
    return f"<details{' open' if is_open else ''}><summary>{summary}</summary>{inner}</details>"
