"""One HTML page that needs nothing from elsewhere: facts, plots, tables and records."""

import math
import re
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from html import escape
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import orjson

from modelcall_assets.records.outcome import Row
from modelcall_assets.transforms.transcript import (
    CONVERSATION_COLUMNS,
    REASONING_COLUMNS,
    Turn,
    turns_of,
)

GENERATOR = '<meta name="generator" content="modelcall">'
"""In each page."""
_CHARS = 4_000_000
"""Of one text of every record together."""
_MOST_COLUMNS = 12
_MOST_DEPTH = 50
_MOST_LINES = 100
_OURS = re.compile(r"(input_)*api_")
"""Columns that say how a row was answered, of earlier stages too."""
_PAGE, _STYLE, _SCRIPT = (
    Path(__file__).with_name(f"page.{kind}").read_text() for kind in ("html", "css", "js")
)
_HASHES = [b64encode(sha256(text.encode()).digest()).decode() for text in (_STYLE, _SCRIPT)]
_POLICY = (
    "default-src 'none'; style-src 'sha256-{}'; script-src 'sha256-{}'; base-uri 'none'; "
    "form-action 'none'"
).format(*_HASHES)
"""Nothing inline but those two may run."""


class Record(NamedTuple):
    """`row` counts from 1; `prompt` is what was sent for it. The `reason` that it is shown for is a
    failure's, unless it `is_good`."""

    file: str
    row: int
    id: str
    reason: str | None
    values: Row
    prompt: Sequence[Turn] = ()
    is_good: bool = False


def page(title: str, sections: Iterable[str], records: str) -> str:
    """`records` is what `records_json` gives."""
    fixed = {"policy": _POLICY, "generator": GENERATOR, "style": _STYLE, "script": _SCRIPT}
    own = {"title": escape(title), "sections": "\n".join(sections), "records": records}
    return Template(_PAGE).substitute(fixed, **own)


def records_json(records: Sequence[Record], seen: int, retry: Mapping[str, str] | None) -> str:
    """For a script element; the records were taken from `seen` ones. `retry` has the `command` that
    asks rows again, if one does, and which `file` and `where` it is limited to. Each text is there
    once, the start of one that is too long."""
    texts: dict[str, int] = {}
    most = max(300, min(100_000, _CHARS // max(1, len(records))))

    def parts_of(turns: Sequence[Turn]) -> list[Row]:
        return [
            {
                "role": turn.role,
                "parts": [
                    {**part._asdict(), "text": texts.setdefault(_cut(part.text, most), len(texts))}
                    for part in turn.parts
                ],
            }
            for turn in turns
        ]

    rows: list[Row] = []
    numbers: dict[str, int] = {}
    messages = set[str]()
    for each in records:
        turns = turns_of(each.values)
        hidden = {*CONVERSATION_COLUMNS, *REASONING_COLUMNS} & {*each.values} if turns else ()
        messages.update(hidden)
        values = {n: _cut(v, most) for n, v in each.values.items() if n not in hidden}
        for name, value in values.items():
            if type(value) in (bool, int, float) and not _OURS.match(name):
                numbers[name] = numbers.get(name, 0) + 1
        found = {"turns": parts_of(turns), "prompt": parts_of(each.prompt), "values": values}
        rows.append({**each._asdict(), "status": values.get("api_status"), **found})
    common = sorted(numbers, key=lambda name: -numbers[name])[:_MOST_COLUMNS]
    data = {"texts": [*texts], "columns": common, "messages": sorted(messages)}
    data |= {"seen": seen, "retry": retry, "records": rows}
    as_text = orjson.dumps(_plain(data), default=str, option=orjson.OPT_NON_STR_KEYS).decode()
    return as_text.replace("<", "\\u003c")


def cards(facts: Mapping[str, Any]) -> str:
    inner = (f"<div>{escape(name)}<b>{_told(value)}</b></div>" for name, value in facts.items())
    return f'<div class="cards">{"".join(inner)}</div>'


def table(title: str, rows: Sequence[Mapping[str, Any]], code: Sequence[str] = ()) -> str:
    """Nothing of no rows; `code` are columns of commands."""
    if not rows:
        return ""
    names = list(rows[0])
    are_numbers = {n for n in names if any(type(row.get(n)) in (int, float) for row in rows)}
    kinds = {name: ' class="number"' if name in are_numbers else "" for name in names}
    heads = "".join(f"<th{kinds[name]}>{escape(name)}</th>" for name in names)

    def cell(name: str, value: Any) -> str:
        told = f"<code>{_told(value)}</code>" if name in code and value else _told(value)
        return f"<td{kinds[name]}>{told}</td>"

    lines = ("".join(cell(name, row.get(name)) for name in names) for row in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return (
        f'<h2>{escape(title)}</h2><div class="scroll"><table><thead><tr>{heads}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def plots(figures: Mapping[str, Mapping[str, Any]]) -> str:
    """Vega-Lite specifications by title, drawn; without the extra that draws, how to get it."""
    if not figures:
        return ""
    try:
        from vl_convert import vegalite_to_svg
    except ImportError:
        how = "pip install 'modelcall-assets[report]'"
        return f'<p class="note">Plots are drawn with <code>{escape(how)}</code>.</p>'
    drawn = (
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f"{vegalite_to_svg({**_LOOK, **figure})}</figure>"
        for title, figure in figures.items()
    )
    return f'<div class="plots">{"".join(drawn)}</div>'


def intervals(title: str, points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A plot of a `value` between `low` and `high` in a line of its own for what it is `of`, of the
    first ones where they are many, and none of a single one."""
    if not points[1:]:
        return {}
    points = points[:_MOST_LINES]
    of = {"field": "of", "type": "nominal", "sort": None}
    ends = {"x": {"field": "low", "type": "quantitative"}, "x2": {"field": "high"}, "y": of}
    value = {"x": {"field": "value", "type": "quantitative"}, "y": of}
    layers = [
        {"mark": "rule", "encoding": ends},
        {"mark": {"type": "point", "filled": True}, "encoding": value},
    ]
    return {title: {"data": {"values": [*points]}, "layer": layers, "height": 18 * len(points)}}


_LOOK = {
    "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
    "width": 320,
    "height": 150,
    "background": None,
    "config": {
        "axis": {"title": None, "labelAngle": 0, "labelOverlap": True},
        "axisX": {"labelLimit": 90},
        "rule": {"color": "#4c78a8"},
        "view": {"stroke": None},
    },
}


def _told(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return escape(f"{value:,.4g}" if isinstance(value, float) else str(value))


def _cut(value: Any, most: int) -> Any:
    if not isinstance(value, str) or len(value) <= most:
        return value
    return f"{value[:most]}… [{len(value) - most:,} more characters]"


def _plain(value: Any, depth: int = 0) -> Any:
    """What a page can hold: halves of characters are replaced, and what is nested too deeply is
    left out."""
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-8", "replace").decode()
    if isinstance(value, float) and not math.isfinite(value):
        return orjson.Fragment("1e999" if value > 0 else "-1e999") if value == value else "nan"
    if isinstance(value, int) and not isinstance(value, bool):
        return orjson.Fragment(str(value))
    if isinstance(value, dict | list | tuple) and depth > _MOST_DEPTH:
        return f"… [nested more than {_MOST_DEPTH} levels deep]"
    if isinstance(value, dict):
        return {_plain(name): _plain(each, depth + 1) for name, each in value.items()}
    return [_plain(each, depth + 1) for each in value] if isinstance(value, list | tuple) else value
