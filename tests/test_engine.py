"""The engine against real endpoints: bounded, retried by class, stopped in time."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import ANY

import pytest
from endpoint import Endpoint, WithoutNetwork, completion, http, in_turn, payload, refusal, serving

from modelcall_assets.errors import EndpointDown, EndpointRefused, RunStopped
from modelcall_assets.llm import OVERLOADS_BORNE, UNANSWERED_LIMIT, Engine
from modelcall_assets.llm.channel import Channel
from modelcall_assets.llm.classify import Exchange, GaveUp, Patience, Reply
from modelcall_assets.llm.transport import SPARE, DirectTransport
from modelcall_assets.records.outcome import Failure, Reason
from modelcall_assets.rehearsal import Faults, RehearsalServer, serve_in_thread

KEY = "sk-very-secret-0123456789"
GOOD = json.dumps(completion(content="x")).encode()


def record(number: int = 0, **more: Any) -> bytes:
    return payload(f"record {number}", **more)


QUICK = Patience(base_s=0.01)
"""Waits that no server asked for are not what is tested here."""


def engine_at(
    base_url: str, *, timeout_s: float = 30, api_key: str | None = KEY, **options: Any
) -> Engine:
    return engine_over(DirectTransport("host:1/v1", base_url, api_key, timeout_s), **options)


def engine_over(
    transport: Any,
    *,
    max_in_flight: int = 8,
    max_retries: int = 5,
    patience: Patience = QUICK,
) -> Engine:
    channel = Channel(transport, max_in_flight)
    return Engine(
        [channel], max_in_flight=max_in_flight, max_retries=max_retries, patience=patience
    )


async def all_of(asking: Sequence[Awaitable[Any]]) -> list[Any]:
    """Results and exceptions; asyncio's own are not to be seen."""
    results = await asyncio.gather(*asking, return_exceptions=True)
    for result in results:
        assert isinstance(result, Exchange | GaveUp | RunStopped), result
    return results


async def ask_many(engine: Engine, count: int, **more: Any) -> list[Any]:
    return await all_of([engine.ask(record(number, **more)) for number in range(count)])


def ask_at(
    base_url: str, count: int = 1, more: Mapping[str, Any] | None = None, **options: Any
) -> list[Any]:
    async def run() -> list[Any]:
        async with engine_at(base_url, **options) as engine:
            results = await ask_many(engine, count, **(more or {}))
            assert engine.in_flight == 0
            return results

    return asyncio.run(run())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


def ask_script(*replies: bytes, count: int = 1, **options: Any) -> tuple[list[Any], Endpoint]:
    async def run() -> tuple[list[Any], Endpoint]:
        async with (
            serving(in_turn(*replies)) as endpoint,
            engine_at(endpoint.url, **options) as engine,
        ):
            return await ask_many(engine, count), endpoint

    return asyncio.run(run())


# What comes back


def test_an_answer_comes_back_as_it_was_sent() -> None:
    (result,), script = ask_script(http(200, GOOD))
    assert isinstance(result, Exchange)
    assert (result.reply.status, result.reply.body, result.reply.fault) == (200, GOOD, None)
    assert (result.attempts, result.endpoint) == (1, "host:1/v1")
    assert result.latency_ms >= 0
    assert script.bodies == [record()]


def test_a_request_is_a_chat_completion_with_the_key() -> None:
    _, script = ask_script(http(200, GOOD))
    head = script.asked[0].head.decode()
    assert head.startswith("POST /v1/chat/completions HTTP/1.1\r\n")
    assert f"Authorization: Bearer {KEY}\r\n" in head
    assert "Content-Type: application/json\r\n" in head


def test_without_a_key_none_is_sent() -> None:
    _, script = ask_script(http(200, GOOD), api_key=None)
    assert b"authorization" not in script.asked[0].head.lower()


def test_every_record_is_answered_once(server: RehearsalServer) -> None:
    results = ask_at(server.base_url, 300, max_in_flight=32)
    assert all(isinstance(result, Exchange) for result in results)
    stats = server.stats()
    assert stats["requests"] == stats["answered"] == stats["distinct"] == 300
    assert stats["connections"] <= 2 * 32 + SPARE  # some rest while others are used


@pytest.mark.parametrize("faults", [Faults(rate_drop=0.3), Faults(rate_500=0.3), Faults()])
@pytest.mark.parametrize("key", [KEY, "wrong"])
def test_what_is_counted_is_what_the_server_saw(faults: Faults, key: str) -> None:
    sent: list[int] = []

    async def run(url: str) -> None:
        async with engine_at(url, max_in_flight=8, api_key=key) as engine:
            await all_of([engine.ask(record(number), sent=sent.append) for number in range(60)])
            assert engine.requests == sum(sent)

    with serve_in_thread(faults, api_key=KEY) as server:
        asyncio.run(run(server.base_url))
        assert sum(sent) == server.stats()["requests"] > 0


@pytest.mark.parametrize("limit", [1, 7, 40])
def test_no_more_in_flight_than_allowed_and_no_fewer(limit: int) -> None:
    with serve_in_thread(Faults(latency_ms=20)) as server:
        ask_at(server.base_url, 6 * limit, max_in_flight=limit)
        assert server.stats()["max_in_flight"] == limit


# Retries


@pytest.mark.parametrize("fault", ["rate_429", "rate_500", "rate_drop", "rate_junk"])
def test_passing_trouble_costs_no_record(fault: str) -> None:
    with serve_in_thread(Faults(**{fault: 0.4}, retry_after_s=0.05)) as server:
        results = ask_at(server.base_url, 100, max_in_flight=32, max_retries=30)
        assert all(isinstance(result, Exchange) for result in results)
        assert max(result.attempts for result in results) > 1
        stats = server.stats()
        attempts = sum(result.attempts for result in results)
        # A kept connection that is dropped at once may have been closed before the request came.
        assert (
            attempts <= stats["requests"] if fault == "rate_drop" else attempts == stats["requests"]
        )
        assert stats["early_retries"] == stats["repeated_ok"] == 0


FINAL = [
    ("rate_500", Reason.SERVER_ERROR, "500"),
    ("rate_drop", Reason.DROPPED, "closed the connection"),
    ("rate_junk", Reason.BAD_REPLY, "<html>"),
    ("rate_hang", Reason.TIMEOUT, "0.1 s"),
]


@pytest.mark.parametrize(("fault", "reason", "said"), FINAL)
def test_lasting_trouble_is_given_up_after_the_retries(
    fault: str, reason: Reason, said: str
) -> None:
    with serve_in_thread(Faults(**{fault: 1})) as server:
        timeout_s = 0.1 if fault == "rate_hang" else 30
        (result,) = ask_at(server.base_url, max_retries=2, timeout_s=timeout_s)
        assert result == GaveUp(ANY, 3, "host:1/v1")
        assert result.failure.reason is reason
        assert said in result.failure.detail
        assert server.stats()["requests"] == 3


@pytest.mark.parametrize(
    "reply",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nfoo",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 3\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
        b"what is this\r\n\r\n",
        b"",
    ],
    ids=range(6),
)
def test_a_reply_that_is_no_http_is_a_dropped_one(reply: bytes) -> None:
    (result,), script = ask_script(reply, max_retries=1)
    assert isinstance(result, GaveUp)
    assert result.failure.reason is Reason.DROPPED
    assert len(script.asked) == 2


def test_a_half_body_is_asked_again() -> None:
    half = http(200, GOOD)[:-5]
    (result,), script = ask_script(half, half, http(200, GOOD))
    assert isinstance(result, Exchange)
    assert (result.reply.body, result.attempts) == (GOOD, 3)
    assert script.bodies == [record()] * 3


@pytest.mark.parametrize("status", [400, 413, 422, 451])
def test_a_bad_record_is_never_asked_again(status: int) -> None:
    (result,), script = ask_script(refusal(status, "bad"))
    assert isinstance(result, Exchange)
    assert (result.reply.status, result.attempts) == (status, 1)
    assert len(script.asked) == 1


def test_bad_records_do_not_stop_the_others() -> None:
    with serve_in_thread(Faults(rate_400=0.9)) as server:
        results = ask_at(server.base_url, 300)
        assert {result.reply.status for result in results} == {200, 400}
        stats = server.stats()
        assert (stats["requests"], stats["retried_bad_request"]) == (300, 0)


@pytest.mark.parametrize(
    ("status", "headers"),
    [
        (429, {"Retry-After": "0.3"}),
        (503, {"retry_after": "0.3"}),
        (429, {"Retry_After_Ms": "300"}),
        (429, {"X-RateLimit-Reset-Requests": "300ms", "x-ratelimit-reset-tokens": "10ms"}),
    ],
)
def test_a_wait_that_was_asked_for_is_never_cut_short(status: int, headers: dict[str, str]) -> None:
    busy = refusal(status, "busy", **headers)
    (result,), script = ask_script(busy, busy, http(200, GOOD), max_retries=2)
    assert isinstance(result, Exchange)
    first, second, third = (request.at for request in script.asked)
    assert second - first >= 0.299
    assert third - second >= 0.299


@pytest.mark.slow
def test_being_busy_uses_up_no_retries() -> None:
    busy = refusal(429, "busy", Retry_After="0.01")
    (result,), _ = ask_script(*[busy] * 20, http(200, GOOD), max_retries=0)
    assert isinstance(result, Exchange)
    assert result.attempts == 21


def test_an_endpoint_that_stays_busy_is_given_up_when_patience_ends() -> None:
    busy, short = refusal(429, "busy", Retry_After="0.05"), replace(QUICK, busy_s=0.2)
    (result,), script = ask_script(busy, max_retries=2, patience=short)
    assert isinstance(result, GaveUp)
    assert result.failure.reason is Reason.RATE_LIMITED
    assert script.asked[-1].at - script.asked[0].at >= 0.15


def test_a_wait_of_a_day_is_not_waited_for() -> None:
    (result,), script = ask_script(refusal(429, "busy", Retry_After="86400"))
    assert isinstance(result, GaveUp)
    assert result.failure.reason is Reason.RATE_LIMITED
    assert len(script.asked) == 1


def test_a_500_with_limit_headers_uses_up_retries() -> None:
    trouble = refusal(500, "x", x_ratelimit_reset_tokens="1ms")
    (result,), script = ask_script(trouble, max_retries=2)
    assert isinstance(result, GaveUp)
    assert len(script.asked) == 3


def test_a_record_that_waits_holds_no_slot() -> None:
    async def run() -> None:
        busy = refusal(429, "busy", Retry_After="600")
        async with (
            serving(in_turn(busy, http(200, GOOD))) as script,
            engine_at(script.url, max_in_flight=1) as engine,
        ):
            first = asyncio.create_task(engine.ask(record(0)))
            await until(lambda: engine.retries == 1)
            assert engine.in_flight == 0
            async with asyncio.timeout(30):
                others = await all_of([engine.ask(record(number)) for number in range(1, 6)])
            assert all(isinstance(result, Exchange) for result in others)
            assert not first.done()
            assert script.bodies == [record(number) for number in range(6)]
            engine.stop(RunStopped("enough"))
            await all_of([first])

    asyncio.run(run())


# The end of a run


REFUSALS = [
    (401, "invalid_api_key"),
    (402, "payment_required"),
    (403, "forbidden"),
    (404, "model_not_found"),
    (429, "insufficient_quota"),
    (302, "moved"),
]


@pytest.mark.parametrize(("status", "code"), REFUSALS)
def test_a_refused_endpoint_costs_one_call(status: int, code: str) -> None:
    results, script = ask_script(refusal(status, code), count=200, max_in_flight=50)
    assert len(script.asked) == 1
    for result in results:
        assert isinstance(result, EndpointRefused)
        said = str(result)
        for part in ("host:1/v1", str(status), code, "api_key", "model", "base_url", "quota"):
            assert part in said


def test_a_redirect_is_not_followed() -> None:
    results, script = ask_script(http(307, Location="/v1/elsewhere"), http(200, GOOD))
    assert isinstance(results[0], EndpointRefused)
    assert len(script.asked) == 1


def test_a_wrong_key_and_a_wrong_model_cost_one_call() -> None:
    with serve_in_thread(Faults(latency_ms=50), api_key="right") as server:
        results = ask_at(server.base_url, 100, max_in_flight=100)
        assert all(isinstance(result, EndpointRefused) for result in results)
        assert server.stats()["requests"] == 1
    with serve_in_thread() as server:
        wrong = {"model": "gpt-nothing"}
        results = ask_at(server.base_url, 100, wrong, max_in_flight=100)
        assert all(isinstance(result, EndpointRefused) for result in results)
        assert server.stats()["requests"] == 1


def test_a_slow_first_answer_does_not_hold_up_the_others() -> None:
    async def run() -> None:
        transport, soon = Held(), replace(QUICK, first_call_alone_s=0.05)
        async with engine_over(transport, max_in_flight=4, patience=soon) as engine:
            asking = [asyncio.create_task(engine.ask(record())) for _ in range(4)]
            await until(lambda: len(transport.sent) == 4)
            transport.answer.set()
            await all_of(asking)

    asyncio.run(run())


def test_an_unreachable_endpoint_stops_the_run() -> None:
    with serve_in_thread() as gone:
        url = gone.base_url
    results = ask_at(url, 500, max_in_flight=10, max_retries=1)
    given_up = [result for result in results if isinstance(result, GaveUp)]
    assert UNANSWERED_LIMIT <= len(given_up) <= UNANSWERED_LIMIT + 10
    assert {result.failure.reason for result in given_up} == {Reason.CONNECT}
    stopped = [result for result in results if isinstance(result, EndpointDown)]
    assert len(stopped) == 500 - len(given_up)
    for part in ("host:1/v1", "connect", "Connect call failed"):
        assert part in str(stopped[0])


@pytest.mark.parametrize("fault", ["rate_500", "rate_drop", "rate_400", "rate_junk"])
def test_the_same_failure_again_and_again_stops_the_run(fault: str) -> None:
    with serve_in_thread(Faults(**{fault: 1})) as server:
        results = ask_at(server.base_url, 500, max_in_flight=10, max_retries=0)
        assert sum(isinstance(result, EndpointDown) for result in results) > 400
        assert server.stats()["requests"] <= UNANSWERED_LIMIT + 10


def test_one_answer_between_keeps_the_run_going() -> None:
    bad, good = refusal(500, "x"), http(200, GOOD)
    replies = [*[bad] * (UNANSWERED_LIMIT - 1), good] * 3
    results, _ = ask_script(*replies, count=len(replies), max_in_flight=1, max_retries=0)
    assert [isinstance(result, GaveUp) for result in results].count(True) == 72
    assert [isinstance(result, Exchange) for result in results].count(True) == 3


@dataclass
class Moderated(WithoutNetwork):
    """Refuses some records at once; the others wait until `enough` of them are in flight."""

    enough: int
    forbidden: Callable[[int], bool]
    held: int = 0
    sent: int = 0
    full: asyncio.Event = field(default_factory=asyncio.Event)
    is_revoked: bool = False
    status: int = 403

    async def send(self, payload: bytes) -> Reply:
        self.sent += 1
        number = int(json.loads(payload)["messages"][0]["content"].split()[1])
        if self.is_revoked or self.forbidden(number):
            return Reply(self.status, {}, b'{"error": {"message": "not this one"}}')
        self.held += 1
        if self.held == self.enough:
            self.full.set()
        await self.full.wait()
        return Reply(200, {}, GOOD)


def ask_moderated(
    transport: Moderated, count: int, in_flight: int, alone_s: float = 0.25
) -> list[Any]:
    soon = replace(QUICK, first_call_alone_s=alone_s, until_one_answers_s=0.01)

    async def run() -> list[Any]:
        async with engine_over(
            transport, max_in_flight=in_flight, max_retries=0, patience=soon
        ) as engine:
            return await ask_many(engine, count)

    return asyncio.run(run())


def outcomes(results: Sequence[Any]) -> Counter[str]:
    return Counter(
        str(result.said.reason)
        if isinstance(result, Exchange) and isinstance(result.said, Failure)
        else type(result).__name__
        for result in results
    )


@pytest.mark.parametrize("status", [302, 404, 405])
def test_a_block_page_fails_only_its_record(status: int) -> None:
    transport = Moderated(1, lambda number: number % 7 == 3, status=status)
    assert outcomes(ask_moderated(transport, 70, 1)) == {"Exchange": 60, "bad_request": 10}


@pytest.mark.parametrize("in_flight", [1, 8, 300])
def test_a_403_of_some_records_fails_only_them(in_flight: int) -> None:
    """Even if dozens of them come back before the first answer does."""
    held = 257 if in_flight == 300 else 1
    transport = Moderated(held, lambda number: number % 7 == 3)
    results = ask_moderated(transport, 300, in_flight, alone_s=0.01)
    assert outcomes(results) == {"Exchange": 257, "bad_request": 43}
    for number, result in enumerate(results):
        assert isinstance(result.said, Failure) == (number % 7 == 3)


def test_many_403s_in_a_row_are_the_endpoints() -> None:
    transport = Moderated(1, lambda number: number >= 100)
    found = outcomes(ask_moderated(transport, 1000, 8))
    assert found["Exchange"] == 100
    assert 20 <= found["bad_request"] <= 25
    assert found["EndpointRefused"] == 900 - found["bad_request"]
    assert transport.sent <= 100 + 25 + 8


def test_a_key_that_is_refused_with_many_in_flight_stops_the_run() -> None:
    transport = Moderated(1, lambda _: False, is_revoked=True)
    found = outcomes(ask_moderated(transport, 500, 100, alone_s=0.0))
    assert found == {"EndpointRefused": 500}


@pytest.mark.parametrize("status", [502, 503, 504, 529])
def test_an_overload_now_and_then_loses_no_record(status: int) -> None:
    """As nginx says it: without Retry-After, two times of five."""
    nginx = http(status, b"<html>busy</html>")
    good = http(200, GOOD)
    results, script = ask_script(
        good, *[nginx, good, nginx, good, good] * 3, *[nginx] * 6, good, *[nginx, good] * 200,
        count=100, max_retries=3, max_in_flight=1,
    )  # fmt: skip
    assert outcomes(results) == {"Exchange": 100}
    assert len(script.asked) > 130


def test_an_endpoint_that_stays_overloaded_is_given_up() -> None:
    nginx = http(503, b"<html>busy</html>")
    results, script = ask_script(
        http(200, GOOD), nginx, count=2, max_retries=3, max_in_flight=1,
        patience=replace(QUICK, cap_s=0.01),
    )  # fmt: skip
    assert outcomes(results) == {"Exchange": 1, "GaveUp": 1}
    assert results[1].failure.reason is Reason.SERVER_ERROR
    assert len(script.asked) == 1 + OVERLOADS_BORNE + 4


@dataclass
class Held(WithoutNetwork):
    """A transport that answers when it is told to."""

    answer: asyncio.Event = field(default_factory=asyncio.Event)
    sent: list[bytes] = field(default_factory=list)
    reply: Reply = field(default_factory=lambda: Reply(200, {}, GOOD))

    async def send(self, payload: bytes) -> Reply:
        self.sent.append(payload)
        await self.answer.wait()
        return self.reply


def test_calls_in_flight_finish_when_the_run_is_stopped() -> None:
    async def run() -> None:
        transport = Held()
        transport.answer.set()
        async with engine_over(transport, max_in_flight=3, max_retries=5) as engine:
            await engine.ask(record())
            transport.answer.clear()
            asking = [asyncio.create_task(engine.ask(record())) for _ in range(20)]
            await until(lambda: engine.in_flight == 3)
            reason = RunStopped("enough")
            engine.stop(reason)
            engine.stop(RunStopped("too late to matter"))
            transport.answer.set()
            results = await all_of(asking)
            assert [type(result) for result in results] == [Exchange] * 3 + [RunStopped] * 17
            assert all(result is reason for result in results[3:])
            assert len(transport.sent) == 4
            with pytest.raises(RunStopped, match="enough"):
                await engine.ask(record())

    asyncio.run(run())


def test_a_stop_ends_the_wait_for_a_retry() -> None:
    async def run() -> None:
        busy = refusal(429, "busy", Retry_After="600")
        async with serving(busy) as script, engine_at(script.url) as engine:
            asking = asyncio.create_task(engine.ask(record()))
            await until(lambda: engine.retries == 1)
            engine.stop(RunStopped("enough"))
            with pytest.raises(RunStopped, match="enough"):
                async with asyncio.timeout(30):
                    await asking
            assert len(script.asked) == 1

    asyncio.run(run())


def test_a_cancelled_ask_gives_its_slot_back() -> None:
    async def run() -> None:
        transport = Held()
        async with engine_over(transport, max_in_flight=1, max_retries=0) as engine:
            asking = asyncio.create_task(engine.ask(record()))
            await until(lambda: engine.in_flight == 1)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
            transport.answer.set()
            async with asyncio.timeout(30):
                assert isinstance(await engine.ask(record()), Exchange)
            assert engine.in_flight == 0

    asyncio.run(run())


def test_thousands_of_busy_replies_are_borne() -> None:
    """The back-off is capped before it overflows."""

    async def run() -> None:
        transport = Held(reply=Reply(429, {"retry-after": "0"}, b""))
        transport.answer.set()
        at_once = replace(QUICK, cap_s=0.0)
        async with engine_over(transport, max_in_flight=1, patience=at_once) as engine:
            asking = asyncio.create_task(engine.ask(record()))
            await until(lambda: asking.done() or engine.requests > 1500)
            transport.reply = Reply(200, {}, GOOD)
            assert isinstance(await asking, Exchange)

    asyncio.run(run())


# Secrets


def test_the_key_is_in_no_repr() -> None:
    async def run() -> None:
        url = f"http://user:{KEY}@127.0.0.1:9/v1"
        transport = DirectTransport("host:1/v1", url, KEY, 5)
        async with engine_over(transport, max_in_flight=1, max_retries=0) as engine:
            assert KEY not in repr(transport) + repr(engine) + repr(vars(engine))

    asyncio.run(run())


@pytest.mark.parametrize("status", [400, 401, 500])
def test_the_key_is_in_no_message_even_if_the_server_says_it(status: int) -> None:
    (result,), _ = ask_script(refusal(status, f"wrong key {KEY}"), max_retries=0)
    assert "wrong key" in repr(result)
    assert KEY not in repr(result)


def test_the_key_is_in_no_message_of_a_failed_connection() -> None:
    with serve_in_thread() as gone:
        url = gone.base_url
    results = ask_at(url, 100, max_retries=0)
    assert any(isinstance(result, EndpointDown) for result in results)
    assert not any(KEY in repr(result) for result in results)
