"""Both transports against real servers: one outcome for every kind of reply."""

from __future__ import annotations

import asyncio
import gzip
import json
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import orjson
import pytest
from endpoint import (
    HANG,
    TRANSPORTS,
    Endpoint,
    Request,
    Script,
    completion,
    delta,
    events,
    http,
    listening,
    payload,
    refusal,
    serving,
)
from hypothesis import given
from hypothesis import strategies as st

from modelcall_assets.errors import SetupError
from modelcall_assets.llm.body import StreamedAnswer
from modelcall_assets.llm.classify import (
    Refused,
    Reply,
    TryAgain,
    classify,
    limit_reset,
    retry_after,
)
from modelcall_assets.llm.completion import Answer, Ending
from modelcall_assets.llm.sdk_transport import SdkTransport
from modelcall_assets.llm.transport import SPARE, DirectTransport
from modelcall_assets.records.outcome import Failure, Reason
from modelcall_assets.rehearsal import Faults, serve_in_thread

KEY = "sk-very-secret-0123456789"
GOOD = json.dumps(completion(content="x")).encode()


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for scheme in ("http", "https", "all", "no"):
        monkeypatch.delenv(f"{scheme}_proxy", raising=False)
        monkeypatch.delenv(f"{scheme}_proxy".upper(), raising=False)


# One request through both


async def by_each(base_url: str, body: bytes | None = None, **options: Any) -> list[Reply]:
    options = {"api_key": KEY, "timeout_s": 30.0} | options
    replies: list[Reply] = []
    for kind in TRANSPORTS:
        async with kind("host:1/v1", base_url, **options) as transport:
            replies.append(await transport.send(payload() if body is None else body))
    return replies


async def through_both(base_url: str, body: bytes | None = None, **options: Any) -> Reply:
    """The reply, after both transports gave the same."""
    direct, sdk = await by_each(base_url, body, **options)
    verdict, other_verdict = classify(direct), classify(sdk)
    assert (direct.status, direct.fault) == (sdk.status, sdk.fault)
    assert type(verdict) is type(other_verdict)
    if direct.fault is None:  # the words for a fault are the client's own
        assert parsed(direct.body) == parsed(sdk.body)
        assert verdict == other_verdict
    assert (retry_after(direct.headers), limit_reset(direct.headers)) == (
        retry_after(sdk.headers),
        limit_reset(sdk.headers),
    )
    return direct


def parsed(body: bytes) -> Any:
    """JSON, if it is some."""
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        return body


def reply_to(answer: Script | bytes, **options: Any) -> Reply:
    async def run() -> Reply:
        async with serving(answer) as server:
            return await through_both(server.url, **options)

    return asyncio.run(run())


def message_of(reply: Reply) -> dict[str, Any]:
    assert isinstance(classify(reply), Answer), reply
    return json.loads(reply.body)["choices"][0]["message"]


def reason_of(reply: Reply) -> Reason:
    verdict = classify(reply)
    assert isinstance(verdict, TryAgain | Failure), reply
    return (verdict.failure if isinstance(verdict, TryAgain) else verdict).reason


# Replies in one piece


def test_an_answer_comes_back_as_it_was_sent() -> None:
    reply = reply_to(http(200, GOOD))
    assert (reply.status, reply.body, reply.fault) == (200, GOOD, None)


def test_the_rehearsal_endpoint_answers_both() -> None:
    with serve_in_thread(api_key=KEY) as server:
        replies = asyncio.run(by_each(server.base_url))
        asked = payload(stream=True, stream_options={"include_usage": True})
        replies += asyncio.run(by_each(server.base_url, asked))
        assert server.stats()["answered"] == 4
    first, *others = (orjson.loads(reply.body) | {"created": 0} for reply in replies)
    assert others == [first] * 3


@pytest.mark.slow
@pytest.mark.parametrize("kind", TRANSPORTS)
def test_a_session_has_no_limit_of_its_own_and_keeps_its_connections(
    kind: type[DirectTransport | SdkTransport],
) -> None:
    async def run(url: str) -> None:
        async with kind("n", url) as transport:
            for _ in range(4):
                sent = [transport.send(payload(user=str(number))) for number in range(150)]
                assert {reply.status for reply in await asyncio.gather(*sent)} == {200}

    with serve_in_thread(Faults(latency_ms=500)) as server:
        asyncio.run(run(server.base_url))
        stats = server.stats()
        assert stats["max_in_flight"] > 100  # what HTTP clients allow unless told otherwise
        assert stats["connections"] <= 2 * 150 + SPARE  # some rest while others are used


FINAL = [
    (400, "bad", Failure),
    (401, "invalid_api_key", Refused),
    (403, "forbidden", Refused),
    (404, "model_not_found", Refused),
    (413, "string_above_max_length", Failure),
    (429, "insufficient_quota", Refused),
    (429, "busy", TryAgain),
    (500, "server_error", TryAgain),
    (503, "overloaded", TryAgain),
    (529, "overloaded", TryAgain),
]


@pytest.mark.parametrize(("status", "code", "verdict"), FINAL)
def test_an_error_is_the_same_error(status: int, code: str, verdict: type) -> None:
    reply = reply_to(refusal(status, code))
    assert (reply.status, reply.fault) == (status, None)
    assert isinstance(classify(reply), verdict)
    assert orjson.loads(reply.body)["error"]["code"] == code


@pytest.mark.parametrize("kind", TRANSPORTS)
@pytest.mark.parametrize(
    "answer",
    [refusal(429, "busy"), refusal(500, "server_error"), refusal(409, "conflict"), b""],
    ids=["429", "500", "409", "dropped"],
)
def test_what_is_sent_is_sent_once(
    answer: bytes, kind: type[DirectTransport | SdkTransport]
) -> None:
    """Retries are the engine's, not the client's."""

    async def run() -> int:
        async with serving(answer) as server, kind("n", server.url, api_key=KEY) as transport:
            await transport.send(payload())
            return len(server.asked)

    assert asyncio.run(run()) == 1


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry_after": "7"}, 7),
        ({"Retry_After_Ms": "250"}, 0.25),
        ({"X_RateLimit_Reset_Requests": "20ms", "x_ratelimit_reset_tokens": "6m0s"}, 360),
    ],
)
def test_a_wait_is_read_from_headers_of_any_case(headers: dict[str, str], seconds: float) -> None:
    verdict = classify(reply_to(refusal(429, "busy", **headers)))
    assert isinstance(verdict, TryAgain)
    assert verdict.after_s == seconds


def test_a_redirect_is_not_followed() -> None:
    """Neither a user nor a query of the new address is shown: they may be secret."""
    here = "http://me:hidden@host/v2/chat/completions?key=hidden"
    for status in (301, 302, 307, 308):
        verdict = classify(reply_to(http(status, Location=here)))
        assert isinstance(verdict, Refused)
        assert verdict.detail == (
            f"HTTP {status}: it redirects to http://host/v2; set base_url to that address"
        )
    relative = classify(reply_to(http(307, b"see there", Location="/v2/chat/completions")))
    assert isinstance(relative, Refused) and ":" in relative.detail and "/v2;" in relative.detail
    nowhere = classify(reply_to(http(307, b"see there")))
    assert nowhere == Refused("HTTP 307: see there")


def test_a_page_is_no_answer() -> None:
    reply = reply_to(http(200, b"<html>gateway</html>", Content_Type="text/html"))
    assert (reply.status, reply.body) == (200, b"<html>gateway</html>")
    assert reason_of(reply) is Reason.BAD_REPLY


def test_a_body_in_gzip_and_one_of_five_megabytes() -> None:
    long = json.dumps({"choices": [{"message": {"content": "x" * 5_000_000}}]}).encode()
    for sent in (http(200, gzip.compress(long), Content_Encoding="gzip"), http(200, long)):
        assert len(message_of(reply_to(sent))["content"]) == 5_000_000


@pytest.mark.parametrize("status", [200, 401, 500])
def test_an_error_does_not_echo_a_secret(status: int) -> None:
    def echo(request: Request) -> bytes:
        lines = sorted(line for line in request.head.decode().split("\r\n") if "Bearer" in line)
        values = [line.partition(": ")[2] for line in lines]
        error = json.dumps({"error": {"message": values, "code": status}})
        return events(json.loads(error)) if status == 200 else http(status, error.encode())

    reply = reply_to(echo, headers={"X-Key": "Bearer hidden-0123456789"})
    for secret in (KEY, "hidden"):
        assert secret not in reply.body.decode()
    assert orjson.loads(reply.body)["error"]["message"] == ["Bearer ***"] * 2


# Nothing came back


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf",
        b"HTTP/1.1 500 X\r\nContent-Length: 100\r\n\r\nhalf",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nfoo",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 3\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
        b"what is this\r\n\r\n",
    ],
    ids=range(7),
)
def test_a_reply_that_is_no_http_is_a_dropped_one(sent: bytes) -> None:
    reply = reply_to(sent)
    assert (reply.status, reply.fault) == (0, Reason.DROPPED)


def test_a_dropped_connection_and_a_timeout() -> None:
    with serve_in_thread(Faults(rate_drop=1)) as server:
        reply = asyncio.run(through_both(server.base_url))
        assert reply.fault is Reason.DROPPED
    with serve_in_thread(Faults(rate_hang=1)) as server:
        reply = asyncio.run(through_both(server.base_url, timeout_s=0.2))
        assert (reply.fault, reply.body) == (Reason.TIMEOUT, b"no answer within 0.2 s")


def test_a_body_that_never_ends_is_a_timeout_unless_its_answer_is_whole() -> None:
    def reply(*chunks: Any, done: bool) -> Reply:
        sent = events(*chunks, done=done, ended=False)
        return reply_to(lambda _: [sent, HANG], timeout_s=0.2)

    half, last = delta(content="x"), delta("stop")
    assert reply(half, done=False).fault is Reason.TIMEOUT
    for more, done in (([last], False), ([last], True), ([], True)):
        assert message_of(reply(half, *more, done=done))["content"] == "x"


def test_an_address_where_nobody_listens_is_a_failed_connection() -> None:
    with serve_in_thread() as gone:
        url = gone.base_url
    assert asyncio.run(through_both(url)).fault is Reason.CONNECT


# Streams


def test_a_stream_is_one_completion() -> None:
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    sent = events(
        {"id": "", "model": "", "choices": [], "prompt_filter_results": []},
        delta(role="assistant", content=""),
        delta(content="Hel", refusal=None),
        delta(content="lo 你好"),
        delta("stop"),
        {"id": "c1", "model": "m", "choices": [], "usage": usage},
    )
    reply = reply_to(sent)
    message = {"role": "assistant", "content": "Hello 你好"}
    assert (reply.status, reply.fault) == (200, None)
    assert orjson.loads(reply.body) == {
        "id": "c1",
        "model": "m",
        "object": "chat.completion",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": usage,
    }


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_streamed_reasoning_keeps_its_name(name: str) -> None:
    sent = events(delta(**{name: "Let me "}), delta(**{name: "think"}), delta("stop", content="4"))
    message = message_of(reply_to(sent))
    assert message == {"role": "assistant", name: "Let me think", "content": "4"}


@pytest.mark.parametrize("second", [0, 1])
def test_streamed_tool_calls_are_merged_by_index(second: int) -> None:
    """Some servers say 0 for each, one after another."""

    def call(index: int, arguments: str, **more: str) -> dict[str, Any]:
        function = {"arguments": arguments} | ({"name": more.pop("name")} if more else {})
        return {"index": index, "function": function, **more}

    sent = events(
        delta(tool_calls=[call(0, "", name="look", id="a", type="function")]),
        delta(tool_calls=[call(0, '{"at"'), call(0, ": 1}")]),
        delta(tool_calls=[call(second, "{", name="stop", id="b", type="function")]),
        delta(tool_calls=[call(second, "}")] + [call(0, " ")] * second),
        delta("tool_calls"),
    )
    message = message_of(reply_to(sent))
    assert message["content"] is None
    assert [(each["id"], each["type"], each["function"]) for each in message["tool_calls"]] == [
        ("a", "function", {"name": "look", "arguments": '{"at": 1}' + " " * second}),
        ("b", "function", {"name": "stop", "arguments": "{}"}),
    ]


def test_streamed_choices_go_by_index() -> None:
    sent = events(
        delta(None, 1, content="b"), delta(None, 0, content="a"), delta("stop", 0, refusal="no"),
        delta("length", 1),
    )  # fmt: skip
    choices = orjson.loads(reply_to(sent).body)["choices"]
    assert [(each["index"], each["finish_reason"]) for each in choices] == [
        (0, "stop"),
        (1, "length"),
    ]
    assert choices[0]["message"] == {"role": "assistant", "content": "a", "refusal": "no"}


@pytest.mark.parametrize("ended", [True, False])
def test_a_stream_that_ends_too_soon_is_a_dropped_reply(ended: bool) -> None:
    reply = reply_to(events(delta(content="half of"), done=False, ended=ended))
    assert (reply.status, reply.fault) == (0, Reason.DROPPED)
    cut = reply_to(events(delta(content="x"), '{"id": "c', done=False)[:-9])
    assert cut.fault is Reason.DROPPED


def test_a_whole_answer_survives_what_follows_it() -> None:
    for chunks, done in (([delta("stop", content="x")], False), ([delta(content="x")], True)):
        reply = reply_to(events(*chunks, done=done, ended=False))
        assert message_of(reply)["content"] == "x"


@pytest.mark.parametrize(
    ("event", "status", "verdict"),
    [
        ({"error": {"message": "slow down", "code": 429}}, 429, TryAgain),
        ({"error": {"message": "no", "code": "server_error"}}, 500, TryAgain),
        ({"error": {"message": "no", "code": 200}}, 500, TryAgain),
        ({"error": {"code": "insufficient_quota"}}, 500, Refused),
        ({"object": "error", "message": "too long", "code": 400}, 400, Failure),
        ({"error": "no"}, 500, TryAgain),
    ],
)
def test_an_error_in_a_stream_is_an_error(
    event: dict[str, Any], status: int, verdict: type
) -> None:
    for ended in (True, False):
        reply = reply_to(events(delta(content="half"), event, ended=ended, done=ended))
        assert (reply.status, orjson.loads(reply.body)) == (status, event)
        assert isinstance(classify(reply), verdict)


def test_a_named_error_event_is_an_error() -> None:
    sent = b'HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\nevent: error\ndata: {"a":1}'
    assert (reply_to(sent).status, reply_to(sent).body) == (500, b'{"a":1}')


@pytest.mark.parametrize("kind", ["text/event-stream", "application/json"])
def test_plain_json_where_events_are_said_to_be_is_read(kind: str) -> None:
    told = {"error": {"code": "insufficient_quota", "message": "none left"}}
    for start in (b"", b": keep-alive\n\n", b"data: " + json.dumps(HEL).encode() + b"\n\n"):
        body = start + json.dumps(told, indent=1).encode()
        reply = reply_to(http(200, body, Content_Type=kind))
        assert isinstance(classify(reply), Refused)
        reply = reply_to(http(200, body + b"\ndata: [DONE]", Content_Type="text/event-stream"))
        assert isinstance(classify(reply), Refused)
        reply = reply_to(http(200, start + GOOD, Content_Type=kind))
        assert message_of(reply)["content"] == "x"


@pytest.mark.parametrize("chunk", ["no JSON", "[1]", '{"choices": ['])
def test_an_event_that_is_no_chunk_is_a_bad_reply(chunk: str) -> None:
    reply = reply_to(events(delta(content="x"), chunk, delta("stop")))
    assert reason_of(reply) is Reason.BAD_REPLY


@pytest.mark.parametrize("chunks", [[], [{"choices": []}], [{"choices": None}], [{"choices": {}}]])
def test_a_stream_without_an_answer_is_a_bad_reply(chunks: list[Any]) -> None:
    assert reason_of(reply_to(events(*chunks))) is Reason.BAD_REPLY


def assembled(*pieces: bytes) -> Any:
    """The completion of a stream that comes in these pieces."""
    answer = StreamedAnswer()
    for piece in pieces:
        answer.feed(piece)
    finished = answer.reply({})
    assert finished.status
    return orjson.loads(finished.body)


def lines(*chunks: Any, end: bytes = b"\n") -> bytes:
    texts = [chunk if isinstance(chunk, bytes) else json.dumps(chunk).encode() for chunk in chunks]
    return b"".join(b"data: " + text + end * 2 for text in texts)


HEL, LO = delta(content="Hel"), delta("stop", content="lo")
AS_SENT = {
    "carriage returns": lines(HEL, LO, end=b"\r"),
    "both": lines(HEL, LO, end=b"\r\n"),
    "a BOM first": b"\xef\xbb\xbf" + lines(HEL, LO),
    "empty, null and pings": lines(b"", HEL, b"null", b"ping", b'"keep-alive"', b"[]", LO, b"{}"),
    "comments and events": b": hi\n\nevent: ping\n\n:\n" + lines(HEL) + b":x\n"
    + b"event: ping\ndata: now\n\nid: 3\n" + lines(LO) + b"data: [DONE] \n\n",
    "no space": lines(HEL, LO).replace(b"data: ", b"data:"),
    "message for delta": lines(HEL, LO).replace(b'"delta"', b'"message"'),
    "the whole message at last": lines(HEL, LO)
    + lines({"id": "c1", "choices": [{"index": 0, "message": {"content": "Hello"}}]}),
    "parts": lines(
        delta(content=[{"type": "text", "text": "Hel"}]), delta("stop", content=["lo"])
    ),
    "two replies": lines(HEL, LO) + lines(HEL, LO).replace(b"c1", b"c2") + lines(b"[DONE]"),
    "a finish_reason in every chunk": lines(delta("stop", content="Hel"), LO),
    "not finished, said so": lines(delta("not_finished", content="H"),
                                   delta("not_finished", content="el"), LO),
    "twice under one id": lines(HEL, LO, delta(role="assistant", content=""), HEL, LO),
    "two whole replies": lines(HEL, LO, b"[DONE]") + lines(HEL, LO, b"[DONE]"),
}  # fmt: skip


@pytest.mark.parametrize("sent", AS_SENT.values(), ids=AS_SENT.keys())
def test_streams_as_servers_send_them(sent: bytes) -> None:
    for pieces in ([sent], [sent[at : at + 1] for at in range(len(sent))]):
        (choice,) = assembled(*pieces)["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("Hello", "stop")


def test_thoughts_and_calls_in_other_shapes_are_kept_in_a_stream() -> None:
    thinking = {"type": "thinking", "thinking": [{"type": "text", "text": "why"}]}
    sent = lines(
        delta(content=[thinking]),
        delta(function_call={"name": "look", "arguments": "{"}),
        delta("function_call", function_call={"arguments": "}"}),
    )
    message = assembled(sent)["choices"][0]["message"]
    assert message["reasoning_content"] == "why"
    assert message["tool_calls"][0]["function"] == {"name": "look", "arguments": "{}"}


def test_logprobs_of_a_stream_are_those_of_all_its_tokens() -> None:
    tokens = [{"token": text, "logprob": -0.5, "top_logprobs": []} for text in ("a", " b", "c")]
    first, last, bare = delta(content="a"), delta(content=" bc"), delta("stop")
    first["choices"][0]["logprobs"] = {"content": tokens[:1], "refusal": None}
    last["choices"][0]["logprobs"] = {"content": tokens[1:]}
    bare["choices"][0]["logprobs"] = None
    (choice,) = assembled(lines(delta(role="assistant"), first, last, bare))["choices"]
    assert choice["logprobs"] == {"content": tokens}
    (choice,) = assembled(lines(delta(content="a"), bare))["choices"]
    assert "logprobs" not in choice


def test_a_stream_has_to_say_that_it_is_whole() -> None:
    """An empty finish_reason is none, and `[DONE]` without one leaves it open."""
    empty = {"id": "c", "choices": [{"index": 0, "delta": {"content": "x"}, "finish_reason": ""}]}
    cut = StreamedAnswer()
    cut.feed(lines(empty, empty))
    assert not cut.reply({}).status
    answer = Answer.of(assembled(lines(empty, b"[DONE]")))
    assert (answer.text, answer.finish_reason, answer.ending) == ("x", None, Ending.UNKNOWN)


def test_what_comes_behind_a_finish_reason_is_more_of_the_answer() -> None:
    reopened = lines(delta("stop", content="a"), delta("stop", content="a"), delta(content="b"))
    (choice,) = assembled(reopened, b"data: [DONE]")["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("aab", None)
    cut = StreamedAnswer()
    cut.feed(reopened)
    assert not cut.reply({}).status


def test_a_letter_may_be_cut_between_two_chunks() -> None:
    halves = [delta(content="a\ud83d"), delta("stop", content="\ude00b\ud83d")]
    assert assembled(lines(*halves))["choices"][0]["message"]["content"] == "a\U0001f600b\ufffd"


@pytest.mark.parametrize("reason", ["length", "MAX_TOKENS", "content_filter", "refusal"])
def test_a_stop_behind_an_answer_that_was_cut_off_makes_it_not_whole(reason: str) -> None:
    sent = lines(delta(content="hal"), delta(reason), delta("stop"), b"[DONE]")
    assert assembled(sent)["choices"][0]["finish_reason"] == reason


STREAM = (
    b': comment\r\nretry: 3\r\n\r\ndata: {"id":"c", "choices":[{"index":0,\r\ndata:"delta":'
    b'{"content":"\xe4\xbd\xa0\\n"}}]}\r\n\r\ndata:{"choices":[{"index":0,"delta":{"content":"z"},'
    b'"finish_reason":"stop"}]}\n\nevent: ping\ndata: {"type": "ping"}\n\ndata: [DONE]'
)


@given(st.lists(st.integers(0, len(STREAM))))
def test_a_stream_may_be_cut_into_pieces_anywhere(cuts: Sequence[int]) -> None:
    answer = StreamedAnswer()
    edges = [0, *sorted(cuts), len(STREAM)]
    for start, end in pairwise(edges):
        answer.feed(STREAM[start:end])
    finished = answer.reply({})
    assert finished.status
    message = {"role": "assistant", "content": "你\nz"}
    assert orjson.loads(finished.body) == {
        "id": "c",
        "object": "chat.completion",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
    }


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(
                ["choices", "delta", "index", "tool_calls", "function", "usage", "error", "content"]
            ),
            inner,
            max_size=4,
        )
    ),
)


@given(st.lists(values.map(lambda value: json.dumps(value).encode()) | st.binary()))
def test_any_stream_has_an_outcome(chunks: Sequence[bytes]) -> None:
    answer = StreamedAnswer()
    for chunk in chunks:
        answer.feed(b"data: " + chunk + b"\n\n")
    assert classify(answer.reply({}))


# What is sent


def test_the_request_is_the_same_by_both() -> None:
    async def run() -> Endpoint:
        async with serving(http(200, GOOD)) as server:
            url = f"{server.url}/?api-version=1"
            await through_both(url, headers={"X-Team": "rating", "user-agent": "mine"})
            return server

    server = asyncio.run(run())
    assert server.bodies == [payload()] * 2
    for head in server.heads:
        lines = head.decode().lower().split("\r\n")
        assert lines[0] == "post /v1/chat/completions?api-version=1 http/1.1"
        for line in ("x-team: rating", "user-agent: mine", "content-type: application/json"):
            assert lines.count(line) == 1
        assert lines.count(f"authorization: bearer {KEY}") == 1


@pytest.mark.parametrize("headers", [{}, {"authorization": "Basic abc"}])
def test_no_key_but_the_given_one_is_sent(
    headers: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_ADMIN_KEY"):
        monkeypatch.setenv(name, "of-somebody-else")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1")

    async def run() -> list[bytes]:
        async with serving(http(200, GOOD)) as server:
            await through_both(server.url, api_key=None, headers=headers)
            return server.heads

    for head in asyncio.run(run()):
        assert b"of-somebody-else" not in head
        sent = [line for line in head.lower().split(b"\r\n") if line.startswith(b"authorization")]
        assert sent == ([b"authorization: basic abc"] if headers else [])


def test_a_user_in_the_url_is_sent_as_a_header() -> None:
    async def run() -> list[bytes]:
        async with serving(http(200, GOOD)) as server:
            url = server.url.replace("//", "//me:p%40w@")
            await through_both(url)
            return server.heads

    for head in asyncio.run(run()):
        assert head.lower().count(b"authorization: ") == 1
        assert b"uthorization: Basic bWU6cEB3\r\n" in head


def test_the_repr_holds_no_secret() -> None:
    for kind in TRANSPORTS:
        made = kind("n", "http://me:pw@h/v1", KEY, 1, {"X-Key": "hidden"}, "http://me:pw@p:1")
        assert (
            repr(made) == f"{kind.__name__}(name='n', timeout_s=1, ca_file=None, max_reply_mib=64)"
        )


# TLS


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an authority's ca.pem, and server.pem that it signed for localhost."""
    folder = tmp_path_factory.mktemp("tls")
    openssl = shutil.which("openssl")
    assert openssl is not None, "these tests make certificates with the openssl program"

    def run(*arguments: str) -> None:
        subprocess.run([openssl, *arguments], cwd=folder, check=True, capture_output=True)

    new_key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    run("req", "-x509", *new_key, "-keyout", "ca.key", "-out", "ca.pem", "-days", "2",
        "-subj", "/CN=test authority", "-addext", "keyUsage=critical,keyCertSign")  # fmt: skip
    run("req", *new_key, "-keyout", "server.key", "-out", "server.csr", "-subj", "/CN=localhost")
    (folder / "names").write_text("subjectAltName=DNS:localhost\nauthorityKeyIdentifier=keyid\n")
    run("x509", "-req", "-in", "server.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-days", "2",
        "-CAcreateserial", "-extfile", "names", "-out", "server.pem")  # fmt: skip
    return folder


def server_tls(authority: Path) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(authority / "server.pem", authority / "server.key")
    return context


def test_a_server_with_a_certificate_of_the_given_authority(authority: Path) -> None:
    async def run() -> Reply:
        answer = http(200, GOOD)
        async with serving(answer, tls=server_tls(authority)) as server:
            return await through_both(server.url, ca_file=str(authority / "ca.pem"))

    assert message_of(asyncio.run(run()))["content"] == "x"


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_a_certificate_that_cannot_be_verified_is_refused(authority: Path, host: str) -> None:
    """Of an authority nobody named, or for another host."""
    ca_file = None if host == "localhost" else str(authority / "ca.pem")

    async def run() -> tuple[Reply, Endpoint]:
        async with serving(http(200), tls=server_tls(authority)) as server:
            url = server.url.replace("localhost", host)
            return await through_both(url, ca_file=ca_file), server

    reply, server = asyncio.run(run())
    assert reply.fault is Reason.CONNECT
    assert b"verify failed" in reply.body and b"ca_file in the model file" in reply.body
    assert not server.heads


# Proxies


@dataclass
class Proxy:
    """Forwards requests in absolute form, and tunnels of CONNECT; refuses whom it does not know."""

    authorization: bytes = b""
    targets: list[str] = field(default_factory=list)
    url: str = ""
    opened: bytes = b"HTTP/1.1 200 OK\r\n\r\n"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with closing(writer):
            head = await reader.readuntil(b"\r\n\r\n")
            method, target, _ = head.decode().split(" ", 2)
            self.targets.append(f"{method} {target}")
            if self.authorization not in head:
                writer.write(http(407))
                return
            place = urlsplit(f"//{target}" if method == "CONNECT" else target)
            there, back = await asyncio.open_connection(place.hostname, place.port)
            if method == "CONNECT":
                writer.write(self.opened)
            else:
                back.write(head)
            await asyncio.gather(pump(reader, back), pump(there, writer))


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with closing(writer):
        while data := await reader.read(65536):
            writer.write(data)


@asynccontextmanager
async def proxy(
    authorization: bytes = b"", opened: bytes = b"HTTP/1.1 200 OK\r\n\r\n"
) -> AsyncIterator[Proxy]:
    made = Proxy(authorization, opened=opened)
    async with listening(made.serve) as port:
        made.url = f"http://127.0.0.1:{port}"
        yield made


async def through_proxy(
    authority: Path, *, tls: bool, options: Callable[[Proxy, Endpoint], dict[str, Any]]
) -> tuple[Reply, Proxy, Endpoint]:
    answer = http(200, GOOD)
    context = server_tls(authority) if tls else None
    async with serving(answer, tls=context) as server, proxy() as made:
        ca_file = str(authority / "ca.pem") if tls else None
        reply = await through_both(server.url, ca_file=ca_file, **options(made, server))
        return reply, made, server


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("by", ["option", "environment"])
def test_requests_go_through_the_proxy(
    authority: Path, tls: bool, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def options(made: Proxy, server: Endpoint) -> dict[str, Any]:
        if by == "option":
            monkeypatch.setenv("NO_PROXY", "localhost")  # for the environment's proxies only
            return {"proxy": made.url}
        name = "HTTPS_PROXY" if tls else "HTTP_PROXY"
        monkeypatch.setenv(name, made.url.removeprefix("http://"))
        return {}

    reply, made, server = asyncio.run(through_proxy(authority, tls=tls, options=options))
    assert message_of(reply)["content"] == "x"
    host = urlsplit(server.url).netloc
    target = f"CONNECT {host}" if tls else f"POST {server.url}/chat/completions"
    assert made.targets == [target] * 2
    assert len(server.heads) == 2


@pytest.mark.parametrize("hosts", ["localhost", "*", "example.com,localhost", "localhost:{}"])
def test_no_proxy_names_hosts_that_are_asked_directly(
    authority: Path, hosts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def options(made: Proxy, server: Endpoint) -> dict[str, Any]:
        monkeypatch.setenv("http_proxy", made.url)
        monkeypatch.setenv("no_proxy", hosts.format(urlsplit(server.url).port))
        monkeypatch.setenv("all_proxy", made.url)  # read by neither
        return {}

    reply, made, server = asyncio.run(through_proxy(authority, tls=False, options=options))
    assert reply.status == 200
    assert not made.targets and len(server.heads) == 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning:openai._vendor")  # said to the SDK
@pytest.mark.parametrize("known", [True, False])
def test_a_proxy_may_want_a_password(authority: Path, known: bool) -> None:
    async def run() -> Reply:
        answer, context = http(200, GOOD), server_tls(authority)
        async with serving(answer, tls=context) as server, proxy(b"Basic bWU6cHc=") as made:
            user = "me:pw" if known else "me:wrong"
            url = made.url.replace("//", f"//{user}@")
            return await through_both(server.url, ca_file=str(authority / "ca.pem"), proxy=url)

    reply = asyncio.run(run())
    assert reply.fault is (None if known else Reason.CONNECT)
    assert b"wrong" not in reply.body


def test_a_proxy_of_another_kind_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "socks5://localhost:1080")

    async def enter(kind: type[DirectTransport | SdkTransport]) -> None:
        async with kind("n", "https://host/v1"):
            pass

    for kind in TRANSPORTS:
        with pytest.raises(SetupError, match="environment:https_proxy: not an HTTP proxy"):
            asyncio.run(enter(kind))


@pytest.mark.parametrize("tls", [False, True])
def test_a_proxy_that_is_not_there_is_named(authority: Path, tls: bool) -> None:
    with serve_in_thread() as gone:
        dead = urlsplit(gone.base_url).netloc

    async def run() -> list[Reply]:
        async with serving(http(200), tls=server_tls(authority) if tls else None) as server:
            ca_file = str(authority / "ca.pem")
            return await by_each(server.url, ca_file=ca_file, proxy=f"http://{dead}")

    for reply in asyncio.run(run()):
        assert (reply.fault, reply.sent) == (Reason.CONNECT, 0)
        assert f"the proxy {dead}".encode() in reply.body


FORGED = gzip.compress(GOOD.replace(b'"x"', b'"forged"'))
FORGED_HEAD = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(
    FORGED
)
CONNECT_ANSWERS = {
    "a body": [FORGED_HEAD + FORGED],
    "a body, later": [FORGED_HEAD, FORGED],
    "half a body": [FORGED_HEAD + FORGED[:20]],
    "a byte": [b"HTTP/1.1 200 OK\r\n\r\nH"],
    "a reply more": [b"HTTP/1.1 200 OK\r\n\r\n" + FORGED_HEAD + FORGED],
    "chunks": [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"],
    "no HTTP": [b"what is this\r\n\r\n"],
    "nothing": [],
    "half a head": [b"HTTP/1.1 200 OK\r\nX: "],
    "a head without end": [b"HTTP/1.1 200 OK\r\nX: " + b"x" * 200_000],
    "502 with a body": [b"HTTP/1.1 502 X\r\nContent-Length: 4\r\n\r\nsoon"],
    "302": [b"HTTP/1.1 302 X\r\nLocation: https://elsewhere/\r\n\r\n"],
}  # fmt: skip


@pytest.mark.parametrize("name", CONNECT_ANSWERS)
def test_nothing_that_a_proxy_says_is_a_reply(authority: Path, name: str) -> None:
    """It says so before the handshake with the server, and closes."""

    async def run() -> list[Reply]:
        async with serving(lambda _: CONNECT_ANSWERS[name]) as endpoint:
            proxy = endpoint.url.removesuffix("/v1").replace("localhost", "127.0.0.1")
            url, ca_file = "https://localhost:1/v1", str(authority / "ca.pem")
            return await by_each(url, timeout_s=5.0, proxy=proxy, ca_file=ca_file)

    direct, sdk = asyncio.run(run())
    assert (direct.fault, direct.sent) == (Reason.CONNECT, 0)
    assert direct.body.startswith(b"the proxy 127.0.0.1:")
    assert sdk.fault is not None and b"forged" not in sdk.body


@pytest.mark.parametrize("answer", [http(200, GOOD), b""])
def test_headers_of_a_tunnel_are_not_those_of_a_reply(authority: Path, answer: bytes) -> None:
    """A proxy tunnels honestly behind a head that announces a body; perhaps the server hangs up."""
    announced = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 99\r\n\r\n"

    async def run() -> list[Reply]:
        context = server_tls(authority)
        async with serving(answer, tls=context) as server, proxy(opened=announced) as made:
            ca_file = str(authority / "ca.pem")
            return await by_each(server.url, ca_file=ca_file, proxy=made.url)

    for reply in asyncio.run(run()):
        if answer:
            assert message_of(reply)["content"] == "x"
        else:
            assert (reply.status, reply.fault) == (0, Reason.DROPPED)


# Where nothing can be sent


@pytest.mark.parametrize("host", ["a..b", "a" * 64, f"{'a' * 64}.b", "a b", "xn--", "a,b"])
def test_a_host_that_cannot_be_one_is_a_failure(host: str) -> None:
    for reply in asyncio.run(by_each(f"http://{host}:9/v1", timeout_s=5.0)):
        assert (reply.status, reply.fault, reply.sent) == (0, Reason.CONNECT, 0)


def test_a_path_of_any_letters_is_sent_percent_encoded() -> None:
    async def run() -> list[bytes]:
        async with serving(http(200, GOOD)) as server:
            await through_both(f"{server.url}/模 型%20")
            return server.heads

    path = b"POST /v1/%E6%A8%A1%20%E5%9E%8B%20/chat/completions HTTP/1.1"
    assert [head.partition(b"\r\n")[0] for head in asyncio.run(run())] == [path] * 2
