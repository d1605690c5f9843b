"""What goes back over the wire: chat completions, streams and error objects."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import orjson

from modelcall_assets.rehearsal.heuristics import is_repair, text_of
from modelcall_assets.rehearsal.wire import event_stream, response

MODEL = "rehearsal-rater-1"
MODELS = {"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": "rehearsal"}]}
JUNK = b"<html><body><h1>Gateway</h1><p>A rehearsal fault: not JSON.</p></body></html>"
INVALID = "invalid_request_error"
FAULT_ERRORS = {
    "bad_request": (400, INVALID, "rehearsal_bad_request"),
    "rate_limited": (429, "rate_limit_error", "rate_limit_exceeded"),
    "server_error": (500, "server_error", "rehearsal_server_error"),
}


class Refusal(NamedTuple):
    status: int
    message: str
    kind: str = INVALID
    param: str | None = None
    code: str | None = None

    def http(self, headers: bytes = b"") -> bytes:
        inner = {k: getattr(self, k) for k in ("message", "param", "code")} | {"type": self.kind}
        return response(self.status, orjson.dumps({"error": inner}), more=headers)


def fault_error(what: str, retry_after_s: float) -> Refusal:
    status, kind, code = FAULT_ERRORS[what]
    hint = f"; retry after {retry_after_s:g} s" if status == 429 else ""
    return Refusal(status, f"rehearsal fault: {what}{hint}", kind, None, code)


def refuse(body: Any) -> Refusal | None:
    """The refusal a real endpoint would give this body, if any."""
    if not isinstance(body, dict):
        return Refusal(400, "the body must be one JSON object")
    messages, model = body.get("messages"), body.get("model")
    if not isinstance(messages, list) or not messages:
        return Refusal(400, "missing required parameter: messages", param="messages")
    if not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages):
        return Refusal(400, "each message must be an object with a role", param="messages")
    limit = _limit(body)
    if limit is not None and (type(limit) is not int or limit < 1):
        return Refusal(400, "max_tokens must be a whole number from 1", param="max_tokens")
    if not isinstance(model, str):
        return Refusal(400, "missing required parameter: model", param="model")
    if not model.startswith("rehearsal"):
        wrong = f"the rehearsal server has no model {model!r}; it has {MODEL}"
        return Refusal(404, wrong, param="model", code="model_not_found")
    return None


class Draft(NamedTuple):
    what: str
    content: str
    finish_reason: str


def draft(
    body: dict[str, Any],
    what: str,
    identity: bytes,
    answer: Callable[[dict[str, Any]], dict[str, Any]],
) -> Draft:
    """The reply's text. A repair turn is never malformed, so that one repair succeeds."""
    if what == "filtered":
        return Draft(what, "", "content_filter")
    if what == "malformed" and is_repair(body["messages"]):
        what = "answered"
    found = answer(body)
    text = _spoil(found, identity[0]) if what == "malformed" else orjson.dumps(found).decode()
    if what == "truncated":
        text = text[: len(text) // 2]
    if (limit := _limit(body)) and _tokens(len(text)) > limit:
        what, text = "truncated", text[: 4 * limit]
    return Draft(what, text, "length" if what == "truncated" else "stop")


def completion(body: dict[str, Any], reply: Draft, identity: bytes) -> bytes:
    """The reply as an HTTP response, streamed if the request asks for it."""
    asked = _tokens(sum(len(text_of(message)) for message in body["messages"]))
    told = _tokens(len(reply.content))
    usage = {"prompt_tokens": asked, "completion_tokens": told, "total_tokens": asked + told}
    common = {
        "id": f"chatcmpl-rehearsal-{identity.hex()}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": body["model"],
        "system_fingerprint": "rehearsal",
    }
    if body.get("stream"):
        return event_stream(_events(body, reply, common, usage))
    message = {"role": "assistant", "content": reply.content}
    choice = {"index": 0, "message": message, "finish_reason": reply.finish_reason}
    return response(200, orjson.dumps({**common, "choices": [choice], "usage": usage}))


def _events(
    body: dict[str, Any], reply: Draft, common: dict[str, Any], usage: dict[str, int]
) -> list[bytes]:
    step = -(-len(reply.content) // 4) or 1
    parts = [reply.content[at : at + step] for at in range(0, len(reply.content), step)]
    deltas = [{"role": "assistant", "content": ""}, *({"content": part} for part in parts), {}]
    reasons = [None] * (len(deltas) - 1) + [reply.finish_reason]
    choices = [
        [{"index": 0, "delta": delta, "finish_reason": reason}]
        for delta, reason in zip(deltas, reasons, strict=True)
    ]
    common["object"] = "chat.completion.chunk"
    events = [orjson.dumps({**common, "choices": choice}) for choice in choices]
    options = body.get("stream_options")
    if isinstance(options, dict) and options.get("include_usage"):
        events.append(orjson.dumps({**common, "choices": [], "usage": usage}))
    return [*events, b"[DONE]"]


def _limit(body: dict[str, Any]) -> Any:
    limit = body.get("max_completion_tokens")
    return body.get("max_tokens") if limit is None else limit


def _tokens(characters: int) -> int:
    return -(-characters // 4)


def _spoil(found: dict[str, Any], kind: int) -> str:
    """A reply that fails validation, in one of six ways."""
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
