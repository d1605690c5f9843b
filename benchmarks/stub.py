"""The endpoint of every benchmark: our rehearsal server, in a process of its own."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from dataclasses import asdict
from types import TracebackType
from typing import Any, Self
from urllib.request import ProxyHandler, build_opener

import orjson

from benchmarks.measure import STUB_CORE, cpu_s, start
from modelcall_assets.rehearsal import Faults, RehearsalServer, new_event_loop
from modelcall_assets.rehearsal.replies import answer

_open = build_opener(ProxyHandler({})).open


class Stub:
    """Runs while the block does. It looks at the texts only if `rates`, which costs it more than
    half of its speed."""

    def __init__(self, *, rates: bool = False) -> None:
        self._rates = rates

    def __enter__(self) -> Self:
        command = [sys.executable, "-m", "benchmarks.stub", *(["rates"] if self._rates else [])]
        self._process = start(
            command, STUB_CORE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        self.base_url = self._process.stdout.readline().strip()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.communicate()

    def behave(self, **faults: Any) -> None:
        """No faults but these, and all counters at 0."""
        self._call("faults", json.dumps(asdict(Faults(**faults))).encode())
        self.reset()

    def reset(self) -> None:
        self._call("stats/reset", b"")

    def stats(self) -> dict[str, Any]:
        return self._call("stats")

    def cpu_s(self) -> float:
        """What it has used so far."""
        return cpu_s(self._process.pid)

    def _call(self, path: str, data: bytes | None = None) -> dict[str, Any]:
        with _open(f"{self.base_url.removesuffix('/v1')}/{path}", data, timeout=60) as response:
            return json.loads(response.read())


class FirstAnswer:
    """Answers as the first request with the same instructions was answered: to measure speed."""

    def __init__(self) -> None:
        self._found: dict[bytes, dict[str, Any] | str] = {}

    def __call__(self, body: dict[str, Any], seed: bytes) -> dict[str, Any] | str:
        systems = [m.get("content") for m in body["messages"] if m["role"] == "system"]
        instructions = orjson.dumps([systems, body.get("response_format")])
        if instructions not in self._found:
            self._found[instructions] = answer(body, seed)
        return self._found[instructions]


async def _serve(rates: bool) -> None:
    server = RehearsalServer()
    if not rates:
        server.answer = FirstAnswer()
    await server.start()
    print(server.base_url, flush=True)  # noqa: T201
    await asyncio.to_thread(sys.stdin.read)
    await server.stop()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(_serve("rates" in sys.argv))
