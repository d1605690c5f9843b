"""Both transports at a server that does what it should not: every row has its own answer, or a
failure with a reason."""

from __future__ import annotations

import asyncio
import json
import tracemalloc
from collections.abc import Iterable

import pytest

from modelcall_assets.llm import http, sdk_transport
from modelcall_assets.llm.classify import Answered, BadRecord, Refused, TryAgain, classify
from modelcall_assets.llm.sdk_transport import SdkTransport
from modelcall_assets.llm.transport import DirectTransport, Reply
from tests.hostile_server import BEHAVIOURS, OWN, TO_NOBODY, hostile

TRANSPORTS = (DirectTransport, SdkTransport)
ROWS, WORKERS = 12, 3
LIMIT_MIB = 1
BUFFERS = 16 << 20
"""What the sockets of two sides and a loop in between may hold."""


def outcome(row: str, reply: Reply) -> str:
    match classify(reply):
        case Answered(completion):
            content = completion["choices"][0]["message"]["content"]
            return OWN if content == row else f"the answer of {content}"
        case TryAgain(failure) | BadRecord(failure):
            return failure.reason.value
        case Refused():
            return "refused"


def payload(row: str) -> bytes:
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": row}]}).encode()


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
    name: str, kind: type[DirectTransport | SdkTransport], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rows in four meet it, so that some meet what it left behind."""
    behaviour, allowed = BEHAVIOURS[name]
    may_take_long = "timeout" in allowed
    if name in TO_NOBODY:  # this server shares our processor, and may be late
        monkeypatch.setattr(http, "REST_S", 0.2)
        monkeypatch.setattr(sdk_transport, "REST_S", 0.2)
    rows = [f"{'bad' if number % 4 in (1, 2) else 'good'} {number}" for number in range(ROWS)]

    async def run() -> None:
        timeout_s = 0.3 if may_take_long else 20.0
        async with (
            hostile(behaviour) as server,
            kind("n", server.url, timeout_s=timeout_s, max_reply_mib=LIMIT_MIB) as transport,
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
