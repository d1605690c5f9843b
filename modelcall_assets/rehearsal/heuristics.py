"""Ratings by heuristics: plausible and repeatable, and no judgement of anything.

Six signals are looked for in the first 20,000 characters; the score is their number less one,
kept within 1-5. The signals that held are the `quality_tags`.
"""

from __future__ import annotations

import re
from typing import Any

import orjson

LOOK_AT = 20_000
HONEST = "rehearsal rating, made by heuristics, not by a model"
RATED_BY = "rehearsal model (heuristics, no LLM)"
USE_CASES = ("filter out", "filter out", "pre-training, with care", "pre-training", "fine-tuning")

_SYMBOLS = bytes(c for c in range(128) if not (chr(c).isalnum() or chr(c).isspace()))
_COMMENT_MARKS = ("#", "//", "/*", "*", "--", '"""', "'''")
_SENTENCE = re.compile(r"[.!?](?<=[a-z]{2}.)(?:\s|$)")  # led by the rarest, which is quicker
_DEFINED_BY = ("def", "class", "function", "func", "fn", "interface", "struct", "enum")
_DEFINITION = re.compile(rf"\b(?:{'|'.join(_DEFINED_BY)})\s+\w+")
_ASKED_KEY = re.compile(r'"([A-Za-z]\w*_(?:score|summary))"')
_LANGUAGES = (
    ("def ", "Python"),
    ("import ", "Python"),
    ("function ", "JavaScript"),
    ("const ", "JavaScript"),
    ("#include", "C/C++"),
    ("public class", "Java"),
    ("package main", "Go"),
    ("fn ", "Rust"),
    ("SELECT ", "SQL"),
    ("#!/bin/", "Shell"),
)


def signals(text: str) -> list[str]:
    text = text[:LOOK_AT]
    raw = text.encode("utf-8", "replace")
    lines = [line for line in map(str.strip, text.splitlines()) if line]
    count = len(lines)
    symbols = 1 - len(raw.translate(None, _SYMBOLS)) / (len(raw) or 1)
    comments = sum(line.startswith(_COMMENT_MARKS) for line in lines)
    may_define = any(word in text for word in _DEFINED_BY)
    explained = comments >= 0.05 * count or len(_SENTENCE.findall(text)) >= 2
    found = {
        "long_enough": len(text) >= 300,
        "has_explanations": count >= 3 and explained,
        "has_definitions": may_define and _DEFINITION.search(text) is not None,
        "readable_lines": count >= 3 and 10 <= len(text) / count <= 120,
        "little_repetition": count >= 3 and len(set(lines)) >= 0.7 * count,
        "mostly_words": symbols <= 0.3 and len(raw) > 0,
    }
    return [name for name, holds in found.items() if holds]


def score_of(tags: list[str]) -> int:
    return max(1, min(5, len(tags) - 1))


def text_of(message: dict[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, list):
        parts = (part.get("text") for part in content if isinstance(part, dict))
        return "\n".join(part for part in parts if isinstance(part, str))
    return content if isinstance(content, str) else ""


def is_repair(messages: list[dict[str, Any]]) -> bool:
    """A user's turn after an assistant's: the client asks again about the same text."""
    return len(messages) > 1 and messages[-2].get("role") == "assistant"


def answer(body: dict[str, Any]) -> dict[str, Any]:
    """The JSON object that answers a chat request: its JSON schema filled in, else our own keys
    and every `"…_score"` and `"…_summary"` that the instructions name in double quotes."""
    messages = body["messages"]
    users = [text_of(message) for message in messages if message.get("role") == "user"] or [""]
    text = users[0] if is_repair(messages) else users[-1]
    tags = signals(text)
    if (properties := _schema_properties(body.get("response_format"))) is not None:
        return {name: _fill(schema, tags) for name, schema in properties.items()}
    score = score_of(tags)
    text = text[:LOOK_AT]
    languages = dict.fromkeys(name for word, name in _LANGUAGES if word in text)
    asked = [text_of(m)[:LOOK_AT] for m in messages if m.get("role") == "system"] or [text[:4000]]
    extra = _ASKED_KEY.findall("\n".join(asked))
    return {
        "score": score,
        **{name: score if name.endswith("_score") else HONEST for name in extra},
        "quality_tags": tags,
        "main_languages": list(languages) or ["natural language"],
        "recommended_use_case": USE_CASES[score - 1],
        "rated_by": RATED_BY,
    }


class FirstAnswer:
    """Answers as the first request with the same instructions was answered: to measure speed."""

    def __init__(self) -> None:
        self._found: dict[bytes, dict[str, Any]] = {}

    def __call__(self, body: dict[str, Any]) -> dict[str, Any]:
        systems = [m.get("content") for m in body["messages"] if m["role"] == "system"]
        instructions = orjson.dumps([systems, body.get("response_format")])
        if instructions not in self._found:
            self._found[instructions] = answer(body)
        return self._found[instructions]


def _schema_properties(response_format: object) -> dict[str, Any] | None:
    found = response_format
    for key in ("json_schema", "schema", "properties"):
        found = found.get(key) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else None


def _fill(schema: object, tags: list[str]) -> Any:
    """A value the schema allows, for the everyday schemas of ratings."""
    if not isinstance(schema, dict):
        return HONEST
    score, kind = score_of(tags), schema.get("type")
    if choices := schema.get("enum"):
        return choices[min(score, len(choices)) - 1]
    if alternatives := schema.get("anyOf"):
        return _fill(alternatives[0], tags)
    match kind[0] if isinstance(kind, list) else kind:
        case "integer" | "number":
            return max(schema.get("minimum", 1), min(schema.get("maximum", 5), score))
        case "boolean":
            return score >= 3
        case "array":
            items = schema.get("items", {"type": "string"})
            return tags if items == {"type": "string"} else [_fill(items, tags)]
        case "object":
            return {name: _fill(sub, tags) for name, sub in schema.get("properties", {}).items()}
        case "null":
            return None
    return HONEST
