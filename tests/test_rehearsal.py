"""The rehearsal server, over real HTTP."""

from __future__ import annotations

import asyncio
import http.client
import json
import math
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from itertools import pairwise
from operator import add, mul, sub
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from project import until

from benchmarks.stub import FirstAnswer
from modelcall_assets.cli.rehearse import rehearse
from modelcall_assets.errors import SetupError
from modelcall_assets.llm.body import StreamedAnswer
from modelcall_assets.rehearsal import (
    BadHttp,
    Faults,
    RehearsalServer,
    Request,
    RequestParser,
    serve_in_thread,
)
from modelcall_assets.rehearsal.replies import score_of, signals

GOOD = '''
import math


def circle_area(radius: float) -> float:
    """The area of a circle; a negative radius is an error."""
    if radius < 0:
        raise ValueError("a radius is never negative")
    return math.pi * radius**2


# Shapes of several sides are sums of triangles. To be rated in JSON.
def polygon_area(points: list[tuple[float, float]]) -> float:
    total = 0.0
    for (x1, y1), (x2, y2) in zip(points, points[1:] + points[:1]):
        total += x1 * y2 - x2 * y1
    return abs(total) / 2
'''
JUNK = "@@##$$%%^^\n" * 60 + "JSON"


def chat(text: Any = GOOD, **more: Any) -> dict[str, Any]:
    return {"model": "rehearsal-rater-1", "messages": [{"role": "user", "content": text}], **more}


def call(
    server: RehearsalServer, method: str, path: str, body: Any = None, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)) as connection:
        connection.request(method, path, data, headers)
        with connection.getresponse() as answer:
            return answer.status, dict(answer.headers), answer.read()


def ask(server: RehearsalServer, body: Any, **headers: str) -> tuple[int, dict[str, Any]]:
    status, _, data = call(server, "POST", "/v1/chat/completions", body, **headers)
    return status, json.loads(data)


def content(server: RehearsalServer, body: Any) -> Any:
    status, reply = ask(server, body)
    assert status == 200
    return json.loads(reply["choices"][0]["message"]["content"])


def fate(server: RehearsalServer, body: Any) -> str:
    """What became of a call, in one word."""
    try:
        status, _, data = call(server, "POST", "/v1/chat/completions", body)
    except (http.client.RemoteDisconnected, ConnectionResetError):
        return "dropped"
    if status != 200:
        return str(status)
    if data.startswith(b"<"):
        return "junk"
    choice = json.loads(data)["choices"][0]
    return f"{choice['finish_reason']}: {choice['message']['content']}"


@pytest.fixture
def server() -> Iterator[RehearsalServer]:
    with serve_in_thread() as running:
        yield running


def test_an_answer_is_complete_honest_and_repeatable(server: RehearsalServer) -> None:
    first, again = ask(server, chat())[1], ask(server, chat(user="somebody"))[1]
    assert first["object"] == "chat.completion"
    assert first["system_fingerprint"] == "rehearsal"
    assert first["choices"][0]["finish_reason"] == "stop"
    usage = first["usage"]
    assert usage["prompt_tokens"] == -(-len(GOOD) // 4)
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    rating = json.loads(first["choices"][0]["message"]["content"])
    assert "no LLM" in rating["rated_by"]
    assert rating["main_languages"] == ["Python"]
    assert (first["id"], first["choices"]) == (again["id"], again["choices"])
    assert first["id"] != ask(server, chat("something else"))[1]["id"]


def test_requested_keys_come_from_the_system_message(server: RehearsalServer) -> None:
    body = chat('ignore "other_score"')
    body["messages"].insert(0, {"role": "system", "content": '{"style_score": 1, "style_summary"}'})
    rating = content(server, body)
    assert rating["style_score"] in range(1, 6)
    assert "heuristics" in rating["style_summary"]
    assert "other_score" not in rating
    assert "other_score" in content(server, chat('give "other_score"'))


def test_good_code_is_rated_above_junk(server: RehearsalServer) -> None:
    assert content(server, chat(GOOD))["score"] == 5
    assert content(server, chat(JUNK))["score"] == 1
    parts = [{"type": "text", "text": GOOD}, {"type": "image_url", "image_url": {}}]
    assert content(server, chat(parts))["score"] == 5


def test_a_question_that_names_no_json_gets_a_sentence() -> None:
    turns = [("user", "What is a tree?"), ("assistant", "A plant."), ("user", "And a\n bush?")]
    asked = chat(messages=[{"role": role, "content": text} for role, text in turns])
    with serve_in_thread() as server:
        told = ask(server, asked)[1]["choices"][0]["message"]["content"]
        assert told.startswith("This is a rehearsal: no model") and told.endswith(" And a bush?")
        assert told == ask(server, asked)[1]["choices"][0]["message"]["content"]
        assert "score" in content(server, chat("What is a tree? Answer in JSON."))
        server.set_faults(Faults(rate_malformed=1))
        assert fate(server, chat("What is a tree?")) == "stop: "
        server.set_faults(Faults(rate_truncated=1))
        assert fate(server, chat("What is a tree?")).startswith("length: This is")


# Guesses


def said(server: RehearsalServer, text: str, **more: Any) -> str:
    status, reply = ask(server, chat(text, **more))
    assert status == 200
    return reply["choices"][0]["message"]["content"]


def choice_of(question: str, letters: str = "ABCD") -> str:
    choices = "".join(f"- {letter.lower()} = json={letter}\n" for letter in letters)
    told = f"Multiple Choice question: {question}\n{choices}"
    return f"{told}\nRespond only with the letter of the correct answer."


def test_a_multiple_choice_question_gets_one_of_its_letters() -> None:
    """Another by another seed of the server's or the request's, and by the model."""
    questions = [choice_of(f"What is {n}?") for n in range(200)]

    def guesses(server: RehearsalServer, **more: Any) -> list[str]:
        return [said(server, question, **more) for question in questions]

    with serve_in_thread() as server:
        first = guesses(server)
        assert guesses(server, temperature=0) != first, "another request"
        assert guesses(server) == first
        counts = Counter(first)
        assert counts.keys() == set("ABCD") and min(counts.values()) > 25
        others = [guesses(server, seed=7), guesses(server, model="rehearsal-2")]
        server.set_faults(Faults(seed=1))
        for other in (*others, guesses(server)):
            assert sum(map(str.__eq__, first, other)) in range(25, 90)
        assert {said(server, choice_of(f"{n}?", "135")) for n in range(30)} == {*"135"}
        plain = choice_of("Why?").rpartition("\n")[0]
        assert "rated_by" in content(server, chat(plain)), "it names JSON"


def test_above_temperature_0_each_time_is_another_guess(server: RehearsalServer) -> None:
    question = choice_of("Which?")
    assert {said(server, question, temperature=0.7) for _ in range(40)} == {*"ABCD"}
    assert len({said(server, question, temperature=0) for _ in range(10)}) == 1


def number_in(text: str) -> str:
    assert text.startswith("This is a rehearsal: no model has read the question")
    assert text.count("#### ") == 1
    return text.rpartition("\n#### ")[2]


def test_a_question_for_a_number_gets_one_that_its_numbers_may_give(
    server: RehearsalServer,
) -> None:
    told = "{} has 12 nuts, and eats 5.5. Then it finds 1,000. How many are left? #### 77"
    guesses = {number_in(said(server, told.format(f"Squirrel{chr(97 + n)}"))) for n in range(26)}
    asked = {op(op2(a, 1000), 77) for a in (17.5, 6.5, 66)
             for op2 in (add, sub, mul) for op in (add, sub, mul)}  # fmt: skip
    assert {float(guess) for guess in guesses} <= asked and len(guesses) > 5
    assert float(number_in(said(server, "How much is it?"))) in range(10)
    system = {"role": "system", "content": "End with #### and the number."}
    body = chat("2 trains and 3 more?")
    body["messages"].insert(0, system)
    told = ask(server, body)[1]["choices"][0]["message"]["content"]
    assert number_in(told) in {"5", "-1", "6"}
    assert "####" not in said(server, "2 trains and 3 more?")


WORDS = [f"{a}{b}{c}a" for a in ("b", "str", "m") for b in ("a", "eo", "i") for c in ("n", "ll")]


@pytest.mark.parametrize(
    "asked",
    [
        "Spell the word: {}",
        "How many a are in the word {}?",
        "what's the count of 'a' in \"{}\"",
        "In {}, how many a's are there",
        "How many a does {} have?",
    ],
)
def test_most_words_are_spelt_right(server: RehearsalServer, asked: str) -> None:
    right = 0
    for word in WORDS:
        told, _, count = said(server, asked.format(word)).partition("\n\n#### ")
        name, _, letters = told.partition(":")
        assert name == word
        is_right = letters == ",".join(word)
        assert is_right or len(letters) == 2 * len(word) + 1, "a letter too many"
        assert count == ("" if asked.startswith("Spell") else str(letters.count("a")))
        assert not count or is_right == (count == str(word.count("a")))
        right += is_right
    assert right in range(len(WORDS) // 2, len(WORDS)), "and some are not"
    assert said(server, "What does a tree in autumn look like?").startswith("This is a rehearsal")


@pytest.mark.parametrize("text", [choice_of("Why?", "ACE"), "What is a bush?", 'Give "a_score": 1'])
def test_logprobs_are_given_where_they_are_asked_for(server: RehearsalServer, text: str) -> None:
    asked = {"logprobs": True, "top_logprobs": 6}
    told = ask(server, chat(text, **asked))[1]["choices"][0]
    tokens = told["logprobs"]["content"]
    assert "".join(each["token"] for each in tokens) == told["message"]["content"]
    for each in tokens:
        tops = each["top_logprobs"]
        assert len(tops) == 6 == len({top["token"] for top in tops})
        assert tops[0]["token"] == each["token"] and tops[0]["logprob"] == each["logprob"]
        ranked = [top["logprob"] for top in tops]
        assert ranked == sorted(ranked, reverse=True)
        assert sum(map(math.exp, ranked)) < 1
        assert all(bytes(top["bytes"]).decode() == top["token"] for top in tops)
    firsts = {top["token"] for top in tokens[0]["top_logprobs"]}
    if "Multiple" in text:
        assert {*"ACE"} <= firsts
    assert ask(server, chat(text, **asked))[1]["choices"][0] == told
    assert "logprobs" not in ask(server, chat(text))[1]["choices"][0]
    (bare, *_) = ask(server, chat(text, logprobs=True))[1]["choices"][0]["logprobs"]["content"]
    assert bare["top_logprobs"] == []

    _, _, data = call(server, "POST", "/v1/chat/completions", chat(text, stream=True, **asked))
    streamed = StreamedAnswer()
    streamed.feed(data)
    (choice,) = json.loads(streamed.reply({}).body)["choices"]
    assert (choice["logprobs"], choice["message"]) == (told["logprobs"], told["message"])


@pytest.mark.parametrize("most", [21, -1, "3", 2.0, True])
def test_what_no_endpoint_gives_of_logprobs_is_refused(server: RehearsalServer, most: Any) -> None:
    assert ask(server, chat(logprobs=True, top_logprobs=most))[0] == 400
    assert ask(server, chat(top_logprobs=3))[0] == 400
    assert ask(server, chat(logprobs=False, top_logprobs=3))[0] == 400
    assert ask(server, chat(logprobs=False, top_logprobs=None))[0] == 200


@given(st.text())
def test_every_text_has_a_score(text: str) -> None:
    assert score_of(signals(text)) in range(1, 6)


def test_a_json_schema_is_filled(server: RehearsalServer) -> None:
    properties = {
        "clarity": {"type": "integer", "minimum": 1, "maximum": 3},
        "depth": {"type": ["number", "null"], "minimum": 7},
        "reason": {"type": "string"},
        "traits": {"type": "array", "items": {"type": "string"}},
        "keep": {"type": "boolean"},
        "verdict": {"enum": ["bad", "fair"]},
        "details": {"type": "object", "properties": {"x": {"anyOf": [{"type": "integer"}]}}},
    }

    def asking(properties: Any) -> dict[str, Any]:
        schema = {"type": "object", "properties": properties}
        return chat(response_format={"type": "json_schema", "json_schema": {"schema": schema}})

    rating = content(server, asking(properties))
    assert rating.pop("reason").startswith("rehearsal rating")
    assert "has_definitions" in rating.pop("traits")
    assert rating == {
        "clarity": 3,
        "depth": 7,
        "keep": True,
        "verdict": "fair",
        "details": {"x": 5},
    }
    assert ask(server, asking({"x": {"type": "integer", "minimum": "one"}}))[0] == 400
    assert server.stats()["in_flight"] == 0


def test_a_server_for_measuring_gives_each_kind_of_request_one_answer() -> None:
    system = {"role": "system", "content": 'Answer with "clarity_score".'}
    schema = {"type": "object", "properties": {"stars": {"type": "integer", "maximum": 3}}}
    asked = {"type": "json_schema", "json_schema": {"name": "stars", "schema": schema}}
    instructed = chat(JUNK)
    instructed["messages"].insert(0, system)
    with serve_in_thread() as server:
        server.answer = FirstAnswer()
        assert content(server, chat())["score"] == 5
        assert content(server, chat(JUNK))["score"] == 5
        assert content(server, instructed)["clarity_score"] == 1
        assert content(server, chat(JUNK, response_format=asked)) == {"stars": 1}
        assert content(server, chat(response_format=asked)) == {"stars": 1}
        assert server.stats()["distinct"] == 5


def test_max_tokens_cuts_the_reply(server: RehearsalServer) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        choice = ask(server, chat(**{name: 3}))[1]["choices"][0]
        assert choice["finish_reason"] == "length"
        assert len(choice["message"]["content"]) == 12
    assert ask(server, chat(max_tokens=1000))[1]["choices"][0]["finish_reason"] == "stop"


def test_what_a_real_endpoint_refuses_is_refused() -> None:
    with serve_in_thread(api_key="secret") as server:
        status, reply = ask(server, chat())
        assert (status, reply["error"]["code"]) == (401, "invalid_api_key")
        assert call(server, "GET", "/v1/models", Authorization="Bearer wrong")[0] == 401
        key = {"Authorization": "Bearer secret"}
        assert ask(server, chat(), **key)[0] == 200
        bad = (b"{", b"[]", {"model": "rehearsal"}, {**chat(), "messages": ["?"]}, {"messages": 1})
        assert [ask(server, body, **key)[0] for body in bad] == [400] * 5
        assert ask(server, chat(max_tokens="3"), **key)[0] == 400
        status, reply = ask(server, {**chat(), "model": "gpt-4"}, **key)
        assert (status, reply["error"]["code"]) == (404, "model_not_found")
        assert reply["error"].keys() == {"message", "type", "param", "code"}
        assert call(server, "GET", "/health")[0] == 200
        assert call(server, "GET", "/nowhere")[0] == 404
        assert server.stats()["statuses"] == {"200": 1, "400": 6, "401": 1, "404": 1}
        assert server.stats()["retried_bad_request"] == 0
        ask(server, b"{", **key)
        assert server.stats()["retried_bad_request"] == 1


def test_streaming_and_keep_alive_through_aiohttp(server: RehearsalServer) -> None:
    async def main() -> tuple[list[bytes], Any]:
        url = server.base_url + "/chat/completions"
        async with aiohttp.ClientSession() as session:
            streamed = chat(stream=True, stream_options={"include_usage": True})
            async with session.post(url, json=streamed) as answer:
                assert answer.content_type == "text/event-stream"
                lines = [line.strip() async for line in answer.content if line.strip()]
            async with session.post(url, json=chat(), expect100=True) as answer:
                whole = await answer.json()
            async with session.get(server.base_url + "/models") as answer:
                assert (await answer.json())["data"][0]["id"] == "rehearsal-rater-1"
        return lines, whole

    lines, whole = asyncio.run(main())
    assert lines.pop() == b"data: [DONE]"
    events = [json.loads(line.removeprefix(b"data: ")) for line in lines]
    assert events.pop()["usage"] == whole["usage"]
    choices = [event["choices"][0] for event in events]
    assert choices[0]["delta"]["role"] == "assistant"
    assert [choice["finish_reason"] for choice in choices[:-1]] == [None] * (len(choices) - 1)
    assert choices[-1]["finish_reason"] == "stop"
    text = "".join(choice["delta"].get("content", "") for choice in choices)
    assert text == whole["choices"][0]["message"]["content"]
    assert events[0]["id"] == whole["id"]
    assert server.stats()["connections"] == 1
    assert server.stats()["distinct"] == 1


def test_pipelined_requests_are_answered_in_order() -> None:
    with serve_in_thread(Faults(latency_ms=20, latency_sigma=0.5)) as server:
        bodies = [json.dumps(chat(f"text {n}")).encode() for n in range(5)]
        ids = [ask(server, body)[1]["id"] for body in bodies]
        head = b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: %d\r\n%b\r\n%b"
        last = [b""] * 4 + [b"Connection: close\r\n"]
        with socket.create_connection(("127.0.0.1", server.port), 60) as client:
            client.sendall(
                b"".join(head % (len(b), x, b) for b, x in zip(bodies, last, strict=True))
            )
            with client.makefile("rb") as stream:
                text = stream.read().decode()
    places = [text.index(each) for each in ids]
    assert places == sorted(places)


MESSAGE = (
    b"POST /a?b=c HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"4;note=x\r\nwiki\r\n5\r\npedia\r\n0\r\nTrailer: t\r\n\r\n"
    b"\r\nGET /b HTTP/1.1\r\nContent-Length: 3\r\nConnection: Close\r\n\r\nabc"
)


@given(st.lists(st.integers(0, len(MESSAGE))))
def test_requests_do_not_depend_on_where_the_bytes_are_cut(cuts: list[int]) -> None:
    parser, found = RequestParser(), []
    edges = [0, *sorted(cuts), len(MESSAGE)]
    for start, end in pairwise(edges):
        parser.feed(MESSAGE[start:end])
    for item in parser.found:
        assert isinstance(item, Request)
        found.append((item.method, item.path, item.body, item.keep_alive))
    assert found == [("POST", "/a", b"wikipedia", True), ("GET", "/b", b"abc", False)]


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nContent-Length: many\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n", 413),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nabc", 400),
        (b"GET / HTTP/1.1\r\nX: " + b"x" * 70_000, 431),
    ],
)
def test_what_is_not_http_is_refused(server: RehearsalServer, data: bytes, status: int) -> None:
    parser = RequestParser()
    parser.feed(data)
    (bad,) = parser.found
    assert isinstance(bad, BadHttp) and bad.status == status
    with socket.create_connection(("127.0.0.1", server.port), 60) as client:
        client.sendall(data)
        with client.makefile("rb") as stream:
            assert stream.read().startswith(b"HTTP/1.1 %d " % status)


STORM = Faults(
    rate_429=0.1, rate_500=0.1, rate_drop=0.1, rate_junk=0.1, rate_malformed=0.1,
    rate_400=0.1, rate_truncated=0.1, rate_filtered=0.1, retry_after_s=0, seed=7,
)  # fmt: skip


def test_the_same_seed_gives_the_same_faults_in_any_order() -> None:
    texts = [f"text {n}" for n in range(60)]

    def fates(faults: Faults, order: list[str]) -> tuple[dict[str, list[str]], dict[str, Any]]:
        with serve_in_thread(faults) as server:
            found: dict[str, list[str]] = {text: [] for text in texts}
            for text in order * 3:
                found[text].append(fate(server, chat(text)))
            return found, server.stats()

    one, stats = fates(STORM, texts)
    other, again = fates(STORM, texts[::-1])
    assert one == other
    assert stats["statuses"] == again["statuses"]
    different, _ = fates(STORM.changed({"seed": 8}), texts)
    assert one != different

    refused = [text for text, seen in one.items() if "400" in seen]
    assert refused
    assert all(one[text] == ["400"] * 3 for text in refused)
    ends = [{word.split(":")[0] for word in seen} for seen in one.values()]
    assert all(len({"length", "content_filter", "stop"} & end) <= 1 for end in ends)
    assert any("500" in end and "stop" in end for end in ends)
    assert all(stats[name] for name in ("dropped", "junk", "malformed", "truncated", "filtered"))
    assert stats["requests"] == 180 == sum(stats["statuses"].values()) + stats["dropped"]
    assert stats["retried_bad_request"] == 2 * len(refused)


def test_a_repair_turn_is_clean_and_about_the_first_text() -> None:
    with serve_in_thread(Faults(rate_malformed=1)) as server:
        spoilt = fate(server, chat()).removeprefix("stop: ")
        body = chat()
        body["messages"] += [
            {"role": "assistant", "content": spoilt},
            {"role": "user", "content": "Not the JSON I asked for. Again, please."},
        ]
        assert content(server, body)["score"] == 5
        server.reset()
        spoilt_replies = {fate(server, chat(f"{GOOD}{n}")) for n in range(60)}
        assert len(spoilt_replies) == 6
        assert server.stats()["malformed"] == server.stats()["answered"] == 60


def test_a_hung_request_ends_with_its_connection() -> None:
    with serve_in_thread(Faults(rate_hang=1)) as server:
        body = json.dumps(chat()).encode()
        with closing(http.client.HTTPConnection("127.0.0.1", server.port)) as connection:
            connection.request("POST", "/v1/chat/completions", body)
            until(lambda: server.stats()["in_flight"] == 1)
        until(lambda: server.stats()["abandoned"] == 1)
        assert server.stats()["in_flight"] == 0


def test_stopping_closes_hung_connections() -> None:
    with serve_in_thread(Faults(rate_hang=1)) as server:
        client = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        client.request("POST", "/v1/chat/completions", json.dumps(chat()).encode())
        until(lambda: server.stats()["in_flight"] == 1)
    with closing(client), pytest.raises((http.client.RemoteDisconnected, ConnectionResetError)):
        client.getresponse()
    assert server.stats()["abandoned"] == 1  # still to be asked after the end


def test_early_retries_are_counted_by_the_retry_after_given() -> None:
    with serve_in_thread(Faults(rate_429=1, retry_after_s=3600)) as server:
        status, headers, _ = call(server, "POST", "/v1/chat/completions", chat())
        assert (status, headers["Retry-After"]) == (429, "3600")
        assert server.stats()["early_retries"] == 0
        server.set_faults(Faults())
        assert ask(server, chat())[0] == 200
        assert server.stats()["early_retries"] == 1
        server.set_faults(Faults(rate_429=1, retry_after_s=0.001))
        assert ask(server, chat("patient"))[0] == 429
        time.sleep(0.002)  # what was asked for
        assert ask(server, chat("patient"))[0] == 429
        assert server.stats()["early_retries"] == 1


def test_too_many_in_flight_are_told_to_wait() -> None:
    with serve_in_thread(Faults(rate_hang=1, max_in_flight=2)) as server:

        async def main() -> None:
            url = server.base_url + "/chat/completions"
            async with aiohttp.ClientSession() as session:
                hung = [asyncio.create_task(session.post(url, json=chat(f"{n}"))) for n in "ab"]
                await asyncio.to_thread(until, lambda: server.stats()["in_flight"] == 2)
                async with session.post(url, json=chat("c")) as answer:
                    assert answer.status == 429
                for task in hung:
                    task.cancel()
                await asyncio.gather(*hung, return_exceptions=True)

        asyncio.run(main())
        until(lambda: server.stats()["in_flight"] == 0)
        stats = server.stats()
        assert stats["max_in_flight"] == 3
        assert stats["requests"] == sum(stats["statuses"].values()) + stats["abandoned"]


def test_stats_reset_and_faults_over_http(server: RehearsalServer) -> None:
    for _ in range(3):
        ask(server, chat())
    stats = json.loads(call(server, "GET", "/stats")[2])
    assert (stats["requests"], stats["answered"], stats["distinct"]) == (3, 3, 1)
    assert stats["repeated_ok"] == 2
    assert stats["first_request_at"] <= stats["last_answer_at"]
    (seen,) = json.loads(call(server, "GET", "/stats/requests")[2]).values()
    assert seen == {"attempts": 3, "ok": 3} == next(iter(server.request_stats().values()))
    assert call(server, "POST", "/stats/reset")[0] == 200
    assert server.stats()["requests"] == server.stats()["distinct"] == 0

    assert call(server, "POST", "/faults", {"rate_500": 1})[0] == 200
    assert ask(server, chat())[0] == 500
    status, _, data = call(server, "POST", "/faults", {"rate_5oo": 1})
    assert status == 400
    assert b"rate_500" in data
    assert call(server, "POST", "/faults", {"rate_500": 2})[0] == 400
    assert call(server, "POST", "/faults", b"no")[0] == 400
    assert ask(server, chat())[0] == 500


@pytest.mark.parametrize(
    "wrong",
    [
        {"rate_429": 1.5},
        {"rate_429": 0.6, "rate_500": 0.6},
        {"latency_ms": -1},
        {"latency_ms": float("nan")},
        {"rate_400": "much"},
        {"max_in_flight": 1.5},
    ],
)
def test_impossible_faults_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(SetupError, match="--" + next(iter(wrong)).replace("_", "-")):
        Faults(**wrong)


def cli(*args: str, **more: Any) -> subprocess.Popen[str]:
    code = "from modelcall_assets.cli.rehearse import rehearse; rehearse()"
    command = [sys.executable, "-c", code, *args]
    root = Path(__file__).parents[1]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=root, text=True, **pipes, **more)


CHILD = """
import json, os, sys, urllib.request
url = os.environ["REHEARSAL_BASE_URL"] + "/chat/completions"
body = {"model": "rehearsal-rater-1", "messages": [{"role": "user", "content": "x"}]}
print(urllib.request.urlopen(url, json.dumps(body).encode()).read().decode())
sys.exit(3)
"""


def test_cli_serves_while_a_command_runs() -> None:
    with cli("--latency-ms", "1", "--", sys.executable, "-c", CHILD) as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 3
    assert json.loads(out)["system_fingerprint"] == "rehearsal"
    assert err.strip() == "rehearsal: 1 requests (1 distinct), 1 answered, at most 1 in flight"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_cli_forwards_signals_to_the_command(number: signal.Signals) -> None:
    waiting = "import time; print('up', flush=True); time.sleep(600)"
    with cli("--", sys.executable, "-c", waiting, start_new_session=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        process.send_signal(number)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert "0 requests" in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_cli_serves_until_interrupted(number: signal.Signals) -> None:
    with cli("--port", "0", start_new_session=True) as process:
        assert process.stdout is not None
        assert "http://127.0.0.1:" in process.stdout.readline()
        assert "curl" in process.stdout.readline()
        process.send_signal(number)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "0 requests" in err


def test_mistakes_in_its_options_are_named(server: RehearsalServer) -> None:
    for args, place in (
        (["--port", str(server.port)], "--port"),
        (["--", "no-such-program-anywhere"], "COMMAND"),
        (["--rate-400", "2", "--", "true"], "--rate-400"),
    ):
        ended = CliRunner().invoke(rehearse, args)
        assert ended.exit_code and place in str(ended.exception) + ended.output
    help_text = CliRunner().invoke(rehearse, ["--help"]).output
    assert all("--" + name.replace("_", "-") in help_text for name in Faults.__slots__)
    assert "REHEARSAL_BASE_URL" in help_text
