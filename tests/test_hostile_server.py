"""Both transports at a server that does what it should not: every row has its own answer, or a
failure with a reason."""

from __future__ import annotations

import asyncio
import gzip
import json
import tracemalloc
from collections.abc import Iterable, Sequence
from itertools import pairwise

import pytest
from endpoint import TRANSPORTS, payload
from hostile_server import (
    BEHAVIOURS,
    NOBODY,
    OWN,
    TO_NOBODY,
    answer_to,
    chunked,
    encoded,
    hostile,
    stream,
    whole,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st

from modelcall_assets.llm.classify import Refused, Reply, TryAgain, classify
from modelcall_assets.llm.completion import Answer
from modelcall_assets.llm.http import HttpExchange
from modelcall_assets.llm.sdk_transport import SdkTransport
from modelcall_assets.llm.transport import DirectTransport
from modelcall_assets.records.outcome import Failure

pytestmark = pytest.mark.slow

ROWS, WORKERS = 12, 3
LIMIT_MIB = 1
BUFFERS = 16 << 20
"""What the sockets of two sides and a loop in between may hold."""


def outcome(row: str, reply: Reply) -> str:
    match classify(reply):
        case Answer(text):
            return OWN if text == row else f"the answer of {text}"
        case TryAgain(Failure(reason)) | Failure(reason):
            return reason.value
        case Refused():
            return "refused"


async def ask_all(transport: DirectTransport | SdkTransport, rows: Iterable[str]) -> dict[str, str]:
    waiting, found = iter(rows), dict[str, str]()

    async def work() -> None:
        for row in waiting:
            found[row] = outcome(row, await transport.send(payload(row)))

    async with asyncio.timeout(120), asyncio.TaskGroup() as workers:
        for _ in range(WORKERS):
            workers.create_task(work())
    return found


@pytest.mark.parametrize("kind", TRANSPORTS)
@pytest.mark.parametrize("name", BEHAVIOURS)
def test_every_row_has_its_own_answer_or_a_failure(
    name: str, kind: type[DirectTransport | SdkTransport]
) -> None:
    """Two rows in four meet it, so that some meet what it left behind."""
    behaviour, allowed = BEHAVIOURS[name]
    may_take_long = "timeout" in allowed
    # This server shares our processor, and may be late.
    options = {"least_rest_s": 0.2} if name in TO_NOBODY else {}
    rows = [f"{'bad' if number % 4 in (1, 2) else 'good'} {number}" for number in range(ROWS)]

    async def run() -> None:
        timeout_s = 0.3 if may_take_long else 20.0
        async with (
            hostile(behaviour) as server,
            kind(
                "n", server.url, timeout_s=timeout_s, max_reply_mib=LIMIT_MIB, **options
            ) as transport,
        ):
            found = await ask_all(transport, rows)
            assert {found[row] for row in rows if row.startswith("bad")} <= allowed
            if not may_take_long:
                assert {found[row] for row in rows if row.startswith("good")} == {OWN}
                assert server.most_taken < BUFFERS

    if "bomb" in name or "without end" in name:
        tracemalloc.start()
    try:
        asyncio.run(run())
        assert tracemalloc.get_traced_memory()[1] < 2 * BUFFERS
    finally:
        tracemalloc.stop()


# Any bytes before and behind, cut anywhere


def framed(row: str) -> list[bytes]:
    body = answer_to(row)
    return [whole(body), chunked(body, 7), stream(row), encoded(gzip.compress(body), "gzip")]


framings = st.integers(0, len(framed("")) - 1)
starts_of_others = st.integers(0, len(whole(NOBODY)) - 1).map(lambda end: whole(NOBODY)[:end])
before = st.just(b"") | st.binary(max_size=9) | starts_of_others
behind = before | st.just(whole(NOBODY)) | st.just(whole(NOBODY) * 2) | st.just(b"\r\n")
cuts = st.lists(st.integers(0, 400), max_size=8)


def cut(data: bytes, at: Sequence[int]) -> list[bytes]:
    edges = [0, *sorted(position for position in at if position < len(data)), len(data)]
    return [data[start:end] for start, end in pairwise(edges) if start < end]


@given(framings, before, behind, cuts)
@example(0, b"", b"H", [])
def test_an_exchange_takes_its_reply_and_nothing_else(
    framing: int, junk: bytes, more: bytes, at: list[int]
) -> None:
    """The connection is kept only when nothing has come but the reply."""
    reply = framed("row")[framing]

    async def run() -> None:
        exchange, fed = HttpExchange(1 << 20), 0
        for segment in cut(junk + reply + more, at):
            fed += len(segment)
            if not exchange.feed(segment):
                break
        is_kept = exchange.may_keep
        exchange.lost(None)
        answer = await exchange.answer
        if answer.fault is not None:
            assert junk
            return
        if not junk:
            assert json.loads(answer.body)["choices"][0]["message"]["content"] == "row"
            assert is_kept == (fed == len(reply))

    asyncio.run(run())


@settings(max_examples=40)
@given(st.lists(st.tuples(framings, before, behind, cuts), min_size=3, max_size=3))
def test_no_row_is_given_what_comes_around_the_reply_of_another(
    replies: list[tuple[int, bytes, bytes, list[int]]],
) -> None:
    """Three rows over what connections are kept; the last segment and what is behind it are sent
    at once, or the test would be about who is quicker."""

    def behaviour(row: str) -> Iterable[bytes | float]:
        framing, junk, more, at = replies[int(row.removeprefix("bad "))]
        *first, last = cut(junk + framed(row)[framing], at)
        for segment in first:
            yield segment
            yield 0.0
        yield last + more

    async def run() -> None:
        async with (
            hostile(behaviour) as server,
            DirectTransport("n", server.url, timeout_s=0.1) as transport,
        ):
            for number, (_, junk, _, _) in enumerate(replies):
                found, row = "timeout", f"bad {number}"
                while found == "timeout":  # short for what never comes, but so may this machine be
                    found = outcome(row, await transport.send(payload(row)))
                    if junk:
                        break
                assert found == OWN or (junk and "answer of" not in found), found

    asyncio.run(run())


@pytest.mark.parametrize("name", ["closed when asked again", "two in three are dropped", "honest"])
@pytest.mark.parametrize("kind", TRANSPORTS)
def test_every_request_that_went_out_is_counted(
    name: str, kind: type[DirectTransport | SdkTransport]
) -> None:
    """Also what a kept connection swallowed, for which the request is sent again."""
    answered = 0

    def behaviour(row: str) -> Iterable[bytes | str]:
        nonlocal answered
        answered += 1
        if name != "honest" and answered % (2 if name.startswith("closed") else 3):
            yield "close"
        yield whole(answer_to(row))

    async def run() -> None:
        async with hostile(behaviour) as server, kind("n", server.url, timeout_s=20.0) as transport:
            sent = 0
            for number in range(9):
                reply = await transport.send(payload(f"bad {number}"))
                sent += reply.sent
                assert outcome(f"bad {number}", reply) in (OWN, "dropped")
            assert sent == len(server.asked)

    asyncio.run(run())
