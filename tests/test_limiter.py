"""The limits of endpoints: in flight, per minute, shared with other engines, one of several."""

from __future__ import annotations

import asyncio
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import pytest
from endpoint import WithoutNetwork
from hypothesis import given, settings
from hypothesis import strategies as st
from project import until

from modelcall_assets.errors import EndpointRefused
from modelcall_assets.llm import Engine
from modelcall_assets.llm.channel import EJECT_AFTER, Channel, Lease, Window
from modelcall_assets.llm.classify import Exchange, GaveUp, Reply
from modelcall_assets.records.outcome import Reason


class QuickClock(asyncio.SelectorEventLoop):
    """A real event loop whose clock jumps to the next timer instead of waiting for it."""

    def __init__(self) -> None:
        self._skipped = 0.0
        super().__init__(_NoWait(self))

    def time(self) -> float:
        return self._skipped

    def skip(self, seconds: float) -> None:
        self._skipped += seconds


class _NoWait(selectors.DefaultSelector):  # type: ignore[valid-type,misc]
    def __init__(self, loop: QuickClock) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[Any]:
        ready = super().select(0)
        if not ready and timeout:
            self._loop.skip(timeout)
        return ready


def run_quickly(work: Callable[[], Any]) -> Any:
    with asyncio.Runner(loop_factory=QuickClock) as runner:
        return runner.run(work())


@dataclass
class Paced(WithoutNetwork):
    """Answers after `latency_s`, and notes what it saw; `verdict` may refuse."""

    name: str = "one"
    latency_s: float = 1.0
    prompt_tokens: int = 90
    completion_tokens: int = 10
    verdict: Callable[[Paced], Reply | None] = lambda _: None
    in_flight: int = 0
    most: int = 0
    times: list[float] = field(default_factory=list)

    async def send(self, payload: bytes) -> Reply:
        self.times.append(asyncio.get_running_loop().time())
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        try:
            if (refused := self.verdict(self)) is not None:
                return refused
            await asyncio.sleep(self.latency_s)
        finally:
            self.in_flight -= 1
        usage = {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens}
        body = {"choices": [{"message": {"content": "x"}}], "usage": usage}
        return Reply(200, {}, orjson.dumps(body))


def ask_all(
    channels: list[Channel],
    requests: int,
    *,
    max_in_flight: int = 1000,
    max_retries: int = 50,
    workers: int = 1000,
) -> list[Any]:
    """What `workers` got for so many requests, in a minute of the machine's time at most."""

    async def work() -> list[Any]:
        results: list[Any] = []
        numbers = iter(range(requests))

        async def worker(engine: Engine) -> None:
            for number in numbers:
                results.append(await engine.ask(b"%06d" % number))

        async with Engine(channels, max_in_flight=max_in_flight, max_retries=max_retries) as engine:
            await asyncio.gather(*(worker(engine) for _ in range(workers)))
            assert engine.in_flight == 0
        return results

    return run_quickly(work)


def most_in_a_minute(times: list[float], weight: int = 1) -> int:
    most, first = 0, 0
    for last, time in enumerate(times):
        while times[first] <= time - 60:
            first += 1
        most = max(most, (last - first + 1) * weight)
    return most


@settings(max_examples=15)
@given(
    in_flight=st.integers(1, 200),
    per_minute=st.none() | st.integers(30, 5000),
    tokens=st.none() | st.integers(2_000, 500_000),
    latency_s=st.sampled_from([0.01, 0.5, 20.0]),
)
def test_a_thousand_workers_stay_within_every_limit(
    in_flight: int, per_minute: int | None, tokens: int | None, latency_s: float
) -> None:
    endpoint = Paced(latency_s=latency_s)
    results = ask_all([Channel(endpoint, in_flight, per_minute, tokens)], 1500)
    assert len(results) == 1500 == len(endpoint.times)
    assert all(isinstance(result, Exchange) for result in results)
    assert endpoint.most <= in_flight
    if per_minute is not None:
        assert most_in_a_minute(endpoint.times) <= per_minute + 1


@pytest.mark.parametrize("tokens_per_request", [20, 100, 2000])
def test_tokens_per_minute_hold_whatever_was_estimated(tokens_per_request: int) -> None:
    """The estimate is learnt: only requests in flight before the first answers may be over it."""
    limit = 60_000
    endpoint = Paced(latency_s=0.1, prompt_tokens=tokens_per_request, completion_tokens=0)
    ask_all([Channel(endpoint, 20, None, limit)], 400)
    settled = endpoint.times[40:]
    assert most_in_a_minute(settled, tokens_per_request) <= limit + 20 * tokens_per_request
    if len(settled) * tokens_per_request > 3 * limit:  # and it is used
        assert most_in_a_minute(settled, tokens_per_request) >= 0.8 * limit


@pytest.mark.parametrize("counted", [5_000_000, 10**9, 2**53])
def test_one_impossible_count_holds_nobody_up_for_long(counted: int) -> None:
    endpoint = Paced(latency_s=0.1)

    def lies_once(endpoint: Paced) -> None:
        endpoint.prompt_tokens = endpoint.completion_tokens = (
            counted if len(endpoint.times) == 20 else 100
        )

    endpoint.verdict = lies_once
    ask_all([Channel(endpoint, 4, None, 60_000)], 400, workers=4)
    assert endpoint.times[-1] < 180


def test_requests_per_minute_are_used_up() -> None:
    endpoint = Paced(latency_s=0.01)
    ask_all([Channel(endpoint, 100, 600)], 1800)
    assert 590 <= most_in_a_minute(endpoint.times) <= 601
    assert endpoint.times[-1] - endpoint.times[0] < 190


def test_the_engine_slows_down_to_what_the_endpoint_bears_and_speeds_up_again() -> None:
    allowed = 20

    def only_so_many(endpoint: Paced) -> Reply | None:
        return Reply(429, {}, b"") if endpoint.in_flight > allowed else None

    endpoint = Paced(latency_s=0.5, verdict=only_so_many)
    results = ask_all([Channel(endpoint, 200)], 6000, workers=400)
    assert len(results) == 6000
    assert not any(isinstance(result, GaveUp) for result in results)
    refused = len(endpoint.times) - 6000
    assert refused < 1500
    assert endpoint.times[-1] - endpoint.times[0] < 6000 / allowed * 0.5 * 1.5


def test_stray_busy_replies_hardly_slow_it_down() -> None:
    def now_and_then(endpoint: Paced) -> Reply | None:
        return Reply(429, {"retry-after": "3"}, b"") if len(endpoint.times) % 20 == 0 else None

    endpoint = Paced(latency_s=0.05, verdict=now_and_then)
    results = ask_all([Channel(endpoint, 256)], 50_000, workers=2000)
    assert not any(isinstance(result, GaveUp) for result in results)
    most = endpoint.times[: len(endpoint.times) * 95 // 100]  # the rest waits, as it was asked to
    assert most[-1] - most[0] < 1.5 * 50_000 / 256 * 0.05


def test_a_window_recovers_from_the_bottom_in_less_than_a_minute() -> None:
    window, now = Window(1024), 0.0
    for _ in range(200):
        window.failed(now := now + 1, 0, busy=True, after_s=0)
    assert window.cap == 1
    for _ in range(60):
        window.answered(now := now + 1, 1, 1.0)
    assert window.cap == 1024


# Several endpoints


def test_the_least_loaded_endpoint_is_asked_and_noted() -> None:
    slow, quick = Paced("slow", latency_s=10), Paced("quick", latency_s=1)
    results = ask_all([Channel(slow, 10), Channel(quick, 10)], 400, workers=20)
    by_name = {name: sum(r.endpoint == name for r in results) for name in ("slow", "quick")}
    assert by_name["slow"] == len(slow.times) and by_name["quick"] == len(quick.times)
    assert by_name["quick"] > 5 * by_name["slow"] > 0
    assert slow.most == quick.most == 10


def test_an_endpoint_that_fails_is_left_out_probed_and_taken_back() -> None:
    down_until = 100.0

    def is_down(_: Paced) -> Reply | None:
        now = asyncio.get_running_loop().time()
        return Reply(0, {}, b"no", Reason.CONNECT) if now < down_until else None

    ill, well = Paced("ill", verdict=is_down), Paced("well")
    results = ask_all([Channel(ill, 10), Channel(well, 10)], 4000, workers=20)
    assert not any(isinstance(result, GaveUp) for result in results)
    while_down = [time for time in ill.times if time < down_until]
    assert len(while_down) < 10 + EJECT_AFTER + 12, "a probe now and then"
    after = [time for time in ill.times if time >= down_until]
    assert after and after[0] < down_until + 65
    assert len(after) > 500, "it takes its half again"


def test_an_endpoint_that_refuses_is_left_out_for_good() -> None:
    refusing = Paced("refusing", verdict=lambda _: Reply(401, {}, b"no such key"))
    well = Paced("well")
    results = ask_all([Channel(refusing, 10), Channel(well, 10)], 300, workers=20)
    assert {result.endpoint for result in results} == {"well"}
    assert len(refusing.times) <= 10


def test_the_run_stops_when_every_endpoint_refuses() -> None:
    both = [Paced(name, verdict=lambda _: Reply(401, {}, b"bad key")) for name in ("one", "two")]
    with pytest.raises(EndpointRefused, match=r"one refuses .*bad key.*two refuses .*bad key"):
        ask_all([Channel(endpoint, 10) for endpoint in both], 300, workers=20)
    assert sum(len(endpoint.times) for endpoint in both) <= 20


def test_a_wait_that_one_endpoint_asks_for_is_spent_at_another() -> None:
    busy = Paced("busy", verdict=lambda e: Reply(429, {"retry-after": "30"}, b""))
    well = Paced("well")
    results = ask_all([Channel(busy, 5), Channel(well, 5)], 100, workers=10)
    assert {result.endpoint for result in results} == {"well"}
    assert well.times[-1] < 40


def test_who_may_go_does_not_wait_behind_one_that_may_not() -> None:
    """The only endpoint left has asked one record to stay away for a minute; the others go on."""

    def verdict(endpoint: Paced) -> Reply | None:
        return Reply(429, {"retry-after": "60"}, b"") if len(endpoint.times) == 2 else None

    async def work() -> list[str]:
        ended: list[str] = []
        one = Paced("one", verdict=verdict)
        other = Paced("other", verdict=lambda _: Reply(401, {}, b"no such key"))
        channels = [Channel(one, 9, requests_per_minute=61), Channel(other, 1)]

        async def ask(engine: Engine, name: str) -> None:
            await engine.ask(name.encode())
            ended.append(name)

        async with Engine(channels, max_in_flight=9, max_retries=5) as engine:
            await ask(engine, "first")
            await asyncio.sleep(5)
            async with asyncio.TaskGroup() as group:
                group.create_task(ask(engine, "held"))
                await asyncio.sleep(5)
                for number in range(3):
                    group.create_task(ask(engine, f"free {number}"))
        return ended

    assert run_quickly(work) == ["first", "free 0", "free 1", "free 2", "held"]


# Shared with other engines of this machine


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "leases"


def test_the_shares_of_an_endpoint_never_add_up_to_more_than_it_allows(folder: Path) -> None:
    with Lease(folder, 10) as first:
        assert first.refresh(0).claim == 10
        with Lease(folder, 10) as second:
            assert second.refresh(0).claim == 0, "all of it is in flight elsewhere"
            assert first.refresh(8).claim == 8
            assert second.refresh(0).claim == 2
            assert first.refresh(5).claim == 5
            assert second.refresh(2).claim == 5
            with Lease(folder, 10) as third:
                shares = [lease.refresh(0).target for lease in (first, second, third)]
                assert sorted(shares) == [3, 3, 4]
        assert first.refresh(5).claim == 10


@settings(max_examples=50)
@given(st.data())
def test_claims_stay_within_the_limit_in_any_order_of_events(data: st.DataObject) -> None:
    import tempfile

    limit = data.draw(st.integers(1, 20))
    with tempfile.TemporaryDirectory() as name:
        claims: dict[Lease, int] = {}
        for _ in range(data.draw(st.integers(1, 40))):
            event = data.draw(st.sampled_from(["join", "leave", "look", "look"]))
            if event == "join" and len(claims) < 6:
                claims[Lease(Path(name), limit).__enter__()] = 0
            elif claims:
                lease = data.draw(st.sampled_from(list(claims)))
                if event == "leave":
                    lease.__exit__(None, None, None)
                    del claims[lease]
                else:
                    in_flight = data.draw(st.integers(0, claims[lease]))
                    is_idle = not in_flight and data.draw(st.booleans())
                    claims[lease] = lease.refresh(in_flight, is_idle=is_idle).claim
            assert sum(claims.values()) <= limit
        for _ in range(3):
            claims = {lease: lease.refresh(0).claim for lease in claims}
        assert sum(claims.values()) == (limit if claims else 0), "nothing is left unused"
        for lease in claims:
            lease.__exit__(None, None, None)


def test_an_idle_engine_leaves_its_share_until_it_is_asked(folder: Path) -> None:
    with Lease(folder, 10) as busy, Lease(folder, 10) as idle:
        assert idle.refresh(0, is_idle=True).claim == 0
        assert busy.refresh(0).claim == 10
        assert idle.refresh(0).claim == 0 and busy.refresh(3).claim == 5
        assert idle.refresh(0).claim == 5


HOLDER = """
import sys, time
from pathlib import Path
from modelcall_assets.llm.channel import Lease
lease = Lease(Path(sys.argv[1]), 10).__enter__()
print(lease.refresh(0).claim, flush=True)
sys.stdin.read()
"""


def test_the_share_of_a_killed_engine_goes_to_the_others(folder: Path) -> None:
    other = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "10\n"
        with Lease(folder, 10) as lease:
            assert lease.refresh(0).claim == 0
            os.kill(other.pid, signal.SIGKILL)
            other.wait()
            until(lambda: lease.refresh(0).claim == 10, seconds=10)
    finally:
        other.kill()
        other.communicate()
    assert [path.name for path in folder.iterdir()] == ["lock"]


def test_two_engines_share_one_endpoint_and_the_survivor_gets_all_of_it(folder: Path) -> None:
    endpoint = Paced(latency_s=0.1)
    seen: dict[str, list[tuple[float, int]]] = {"first": [], "second": []}

    async def run(name: str, requests: int, start_s: float) -> None:
        await asyncio.sleep(start_s)
        numbers = iter(range(requests))
        channel = Channel(endpoint, 10, lease=Lease(folder, 10))
        async with Engine([channel], max_in_flight=10, max_retries=0) as engine:

            async def worker() -> None:
                for _ in numbers:
                    assert isinstance(await engine.ask(b"x"), Exchange)
                    now = asyncio.get_running_loop().time()
                    seen[name].append((now, channel.share))

            await asyncio.gather(*(worker() for _ in range(10)))

    async def both() -> None:
        await asyncio.gather(run("first", 3000, 0), run("second", 500, 5))

    run_quickly(both)
    assert endpoint.most == 10
    assert {share for _, share in seen["second"]} == {5}
    end_of_second = seen["second"][-1][0]
    during = [share for time, share in seen["first"] if 8 < time < end_of_second]
    assert during and set(during) == {5}
    assert seen["first"][-1][1] == 10
