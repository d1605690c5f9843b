"""The rehearsal model, and what goes back over the wire: chat completions, streams and errors.

It rates by heuristics: plausible and repeatable, and no judgement of anything. A request that names
no JSON is a conversation, and gets a guess or a sentence.

Six signals are looked for in the first 20,000 characters; the score is their number less one,
kept within 1-5. The signals that held are the `quality_tags`.
"""

import random
import re
import time
from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import Any, NamedTuple

import orjson

from modelcall_assets.rehearsal.faults import Ending
from modelcall_assets.rehearsal.guesses import letters_in, number, spelling, with_logprobs

MODEL = "rehearsal-rater-1"
MODELS = {"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": "rehearsal"}]}
JUNK = b"<html><body><h1>Gateway</h1><p>A rehearsal fault: not JSON.</p></body></html>"
INVALID = "invalid_request_error"
NO_OBJECT = "the body must be one JSON object"
FAULT_ERRORS = {
    "bad_request": (400, INVALID, "rehearsal_bad_request"),
    "rate_limited": (429, "rate_limit_error", "rate_limit_exceeded"),
    "server_error": (500, "server_error", "rehearsal_server_error"),
}

LOOK_AT = 20_000
HONEST = "rehearsal rating, made by heuristics, not by a model"
UNREAD = "This is a rehearsal: no model has read the question"
PROSE = f"{UNREAD}, which is repeated here. {{}}"
RATED_BY = "rehearsal model (heuristics, no LLM)"
USE_CASES = ("filter out", "filter out", "pre-training, with care", "pre-training", "fine-tuning")

_SYMBOLS = bytes(c for c in range(128) if not (chr(c).isalnum() or chr(c).isspace()))
_COMMENT_MARKS = ("#", "//", "/*", "*", "--", '"""', "'''")
_SENTENCE = re.compile(r"[.!?](?<=[a-z]{2}.)(?:\s|$)")  # led by the rarest, which is quicker
_DEFINED_BY = ("def", "class", "function", "func", "fn", "interface", "struct", "enum")
_DEFINITION = re.compile(rf"\b(?:{'|'.join(_DEFINED_BY)})\s+\w+")
_ASKED_KEY = re.compile(r'"([A-Za-z]\w*_(?:score|summary))"')
_NAMES_JSON = ("json", 'score"', 'summary"')
_LANGUAGES = {
    "def ": "Python", "import ": "Python", "function ": "JavaScript", "const ": "JavaScript",
    "#include": "C/C++", "public class": "Java", "package main": "Go", "fn ": "Rust",
    "SELECT ": "SQL", "#!/bin/": "Shell",
}  # fmt: skip


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


def answer(body: dict[str, Any], seed: bytes) -> dict[str, Any] | str:
    """What answers a chat request: a guess, a sentence or a JSON object, its schema filled in, else
    our own keys and every `"…_score"` and `"…_summary"` that the instructions name in double
    quotes."""
    messages = body["messages"]
    if "response_format" not in body and (said := _in_words(messages, seed)) is not None:
        return said
    users = [text_of(message) for message in messages if message.get("role") == "user"] or [""]
    text = users[0] if is_repair(messages) else users[-1]
    tags = signals(text)
    schema = body.get("response_format")
    for key in ("json_schema", "schema", "properties"):
        schema = schema.get(key) if isinstance(schema, dict) else None
    if isinstance(schema, dict):
        return {name: _fill(each, tags) for name, each in schema.items()}
    score = score_of(tags)
    text = text[:LOOK_AT]
    languages = dict.fromkeys(name for word, name in _LANGUAGES.items() if word in text)
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


def _in_words(messages: list[dict[str, Any]], seed: bytes) -> str | None:
    """None where JSON is named, unless what is wanted is a letter."""
    question, told = text_of(messages[-1]), "\n".join(map(text_of, messages)).lower()
    if letters := letters_in(question):
        return random.Random(seed).choice(letters)
    if any(each in told for each in _NAMES_JSON):
        return None
    if (spelt := spelling(question, seed)) is not None:
        return spelt
    if (guessed := number(question, told, seed)) is not None:
        return f"{UNREAD}.\n#### {guessed}"
    return PROSE.format(" ".join(question.split())[:200])


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


def response(
    status: int, body: bytes, kind: bytes = b"application/json", more: bytes = b""
) -> bytes:
    """`more`: further header lines, each ending in CRLF."""
    return (
        b"HTTP/1.1 %d %b\r\nServer: modelcall-rehearsal\r\nContent-Type: %b\r\n"
        b"Content-Length: %d\r\n%b\r\n%b"
    ) % (status, HTTPStatus(status).phrase.encode(), kind, len(body), more, body)


def json_response(value: object) -> bytes:
    return response(200, orjson.dumps(value))


class Refusal(NamedTuple):
    status: int
    message: str
    kind: str = INVALID
    param: str | None = None
    code: str | None = None

    def http(self, headers: bytes = b"") -> bytes:
        inner = {k: getattr(self, k) for k in ("message", "param", "code")} | {"type": self.kind}
        return response(self.status, orjson.dumps({"error": inner}), more=headers)

    def ending(self, identity: bytes | None = None, retry_after_s: float = 0.0) -> Ending:
        wait = b"Retry-After: %b\r\n" % f"{retry_after_s:g}".encode() if retry_after_s else b""
        return Ending("error", self.status, self.http(wait), identity, retry_after_s)


def nothing_at(method: str, path: str) -> bytes:
    return Refusal(404, f"nothing at {method} {path}").http()


def fault_error(what: str, retry_after_s: float) -> Refusal:
    status, kind, code = FAULT_ERRORS[what]
    hint = f"; retry after {retry_after_s:g} s" if status == 429 else ""
    return Refusal(status, f"rehearsal fault: {what}{hint}", kind, None, code)


def parse(body: bytes) -> Any:
    """None stands for whatever is no JSON object."""
    try:
        parsed = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    return parsed if isinstance(parsed, dict) else None


def refuse(body: Any) -> Refusal | None:
    if not isinstance(body, dict):
        return Refusal(400, NO_OBJECT)
    messages, model = body.get("messages"), body.get("model")
    if not isinstance(messages, list) or not messages:
        return Refusal(400, "missing required parameter: messages", param="messages")
    if not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages):
        return Refusal(400, "each message must be an object with a role", param="messages")
    limit = _limit(body)
    if limit is not None and (type(limit) is not int or limit < 1):
        return Refusal(400, "max_tokens must be a whole number from 1", param="max_tokens")
    most = _most_likely(body)
    if type(most) is not int or not 0 <= most <= 20 or (most and body.get("logprobs") is not True):
        wrong = "top_logprobs must be a whole number from 0 to 20, beside logprobs: true"
        return Refusal(400, wrong, param="top_logprobs")
    if not isinstance(model, str):
        return Refusal(400, "missing required parameter: model", param="model")
    if not model.startswith("rehearsal"):
        wrong = f"the rehearsal server has no model {model!r}; it has {MODEL}"
        return Refusal(404, wrong, param="model", code="model_not_found")
    return None


def reply(
    body: dict[str, Any],
    what: str,
    identity: bytes,
    answer: Callable[[dict[str, Any], bytes], dict[str, Any] | str],
    seed: bytes,
) -> Ending:
    """A completion, streamed if the request asks for it. A repair turn is never malformed, so that
    one repair succeeds. What is drawn is drawn from the `seed`."""
    text, reason = "", "content_filter"
    if what != "filtered":
        if what == "malformed" and is_repair(body["messages"]):
            what = "answered"
        found = answer(body, seed)
        text = found if isinstance(found, str) else orjson.dumps(found).decode()
        if what == "malformed":  # prose is when it is empty
            text = "" if isinstance(found, str) else _spoil(found, identity[0])
        if what == "truncated":
            text = text[: len(text) // 2]
        if (limit := _limit(body)) and _tokens(len(text)) > limit:
            what, text = "truncated", text[: 4 * limit]
        reason = "length" if what == "truncated" else "stop"
    asked, told = _tokens(sum(map(len, map(text_of, body["messages"])))), _tokens(len(text))
    usage = {"prompt_tokens": asked, "completion_tokens": told, "total_tokens": asked + told}
    common = {
        "id": f"chatcmpl-rehearsal-{identity.hex()}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": body["model"],
        "system_fingerprint": "rehearsal",
    }
    tokens = None
    if body.get("logprobs"):
        letters = letters_in(text_of(body["messages"][-1]))
        tokens = with_logprobs(text, letters, _most_likely(body), seed)
    if body.get("stream"):
        common["object"] = "chat.completion.chunk"
        data = _streamed(body, text, tokens, reason, common, usage)
    else:
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": reason, **_told(tokens)}
        data = json_response({**common, "choices": [choice], "usage": usage})
    return Ending(what, 200, data, identity)


def _told(tokens: Sequence[Any] | None) -> dict[str, Any]:
    return {} if tokens is None else {"logprobs": {"content": [*tokens]}}


def _streamed(
    body: dict[str, Any],
    text: str,
    tokens: list[Any] | None,
    reason: str,
    common: dict[str, Any],
    usage: dict[str, int],
) -> bytes:
    """Server-sent events, each in a chunk of its own, so the connection stays usable."""
    pieces = text if tokens is None else [each["token"] for each in tokens]
    step = -(-len(pieces) // 4) or 1
    choices = [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]
    for at in range(0, len(pieces), step):
        delta = {"content": "".join(pieces[at : at + step])}
        said = _told(tokens and tokens[at : at + step])
        choices.append({"index": 0, "delta": delta, "finish_reason": None, **said})
    choices.append({"index": 0, "delta": {}, "finish_reason": reason})
    events = [orjson.dumps({**common, "choices": [choice]}) for choice in choices]
    options = body.get("stream_options")
    if isinstance(options, dict) and options.get("include_usage"):
        events.append(orjson.dumps({**common, "choices": [], "usage": usage}))
    framed = [b"data: %b\n\n" % event for event in (*events, b"[DONE]")]
    return (
        b"HTTP/1.1 200 OK\r\nServer: modelcall-rehearsal\r\nContent-Type: text/event-stream\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n"
        + b"".join(b"%x\r\n%b\r\n" % (len(event), event) for event in framed)
        + b"0\r\n\r\n"
    )


def _limit(body: dict[str, Any]) -> Any:
    limit = body.get("max_completion_tokens")
    return body.get("max_tokens") if limit is None else limit


def _most_likely(body: dict[str, Any]) -> Any:
    most = body.get("top_logprobs")
    return 0 if most is None else most


def _tokens(characters: int) -> int:
    return -(-characters // 4)


def _spoil(found: dict[str, Any], kind: int) -> str:
    first = next(iter(found), "score")
    number = next((key for key, value in found.items() if type(value) in (int, float)), first)
    whole = orjson.dumps(found).decode()
    kinds = (
        "The rehearsal model answers in prose here, although JSON was asked for.",
        whole[:-1],
        orjson.dumps({key: value for key, value in found.items() if key != first}).decode(),
        orjson.dumps({**found, number: {"wrong": "type"}}).decode(),
        orjson.dumps({**found, number: 999}).decode(),
        "",
    )
    return kinds[kind % len(kinds)]
