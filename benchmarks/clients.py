"""The programs that are compared. All do one job: rate every record of a JSONL file.

    python -m benchmarks.clients NAME ARGUMENT…

The hand-written ones are what a good engineer writes in an hour: as many workers as requests in
flight, one session, the answer parsed, one JSON line per answer. They have no retries, no journal,
no order and no checks.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
import tracemalloc
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import orjson

from benchmarks.project import KEY, MODEL, PROMPT, SYSTEM
from modelcall_assets.rehearsal import new_event_loop

URL = os.environ.get("REHEARSAL_BASE_URL", "")
Ask = Callable[[list[dict[str, str]]], Awaitable[str]]


async def engine(task: str, option: str = "") -> None:
    """This project: JSONL → journal → Parquet, through the step that its assets call."""
    from modelcall_assets.config.catalog import find_root, load_task
    from modelcall_assets.stages import Run
    from modelcall_assets.stages.report import Tally
    from modelcall_assets.stages.scores import Scores
    from modelcall_assets.stages.task import Task

    loaded, tally = Task(load_task(Path(task), find_root(Path(task).parent))), Tally()
    stage = loaded.find(Scores)
    assert stage is not None
    if option == "traced":
        tracemalloc.start()
    loaded.stage("raw").make(KEY, tally)
    async with stage.engine() as engine:
        watch = asyncio.create_task(_report(tally)) if option == "watched" else None
        await stage.answer(KEY, engine, Run(f"{os.getpid()}-{time.time_ns():x}", tally))
        if watch:
            watch.cancel()
    if option == "traced":
        _tell({"peak_bytes": tracemalloc.get_traced_memory()[1]})


async def _report(tally: Any) -> None:
    while True:
        _tell([time.monotonic(), tally.done])
        await asyncio.sleep(0.1)


async def minimal_aiohttp(source: str, target: str, in_flight: str) -> None:
    import aiohttp

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def ask(messages: list[dict[str, str]]) -> str:
            body = orjson.dumps({"model": MODEL, "temperature": 0, "messages": messages})
            headers = {"Content-Type": "application/json", "Authorization": "Bearer none"}
            async with session.post(
                f"{URL}/chat/completions", data=body, headers=headers
            ) as response:
                response.raise_for_status()
                reply = orjson.loads(await response.read())
                return reply["choices"][0]["message"]["content"]

        await _ask_all(ask, source, target, int(in_flight))


async def sdk(source: str, target: str, in_flight: str) -> None:
    import openai

    await _by_sdk(openai.AsyncOpenAI(base_url=URL, api_key="none"), source, target, in_flight)


async def sdk_aiohttp(source: str, target: str, in_flight: str) -> None:
    import openai

    http = openai.DefaultAioHttpClient()
    client = openai.AsyncOpenAI(base_url=URL, api_key="none", http_client=http)
    await _by_sdk(client, source, target, in_flight)


async def _by_sdk(client: Any, source: str, target: str, in_flight: str) -> None:
    async def ask(messages: list[dict[str, str]]) -> str:
        reply = await client.chat.completions.create(model=MODEL, messages=messages, temperature=0)
        return reply.choices[0].message.content

    async with client:
        await _ask_all(ask, source, target, int(in_flight))


async def _ask_all(ask: Ask, source: str, target: str, in_flight: int) -> None:
    with Path(source).open("rb") as lines, Path(target).open("wb") as out:  # noqa: ASYNC230

        async def work() -> None:
            for line in lines:
                record = orjson.loads(line)
                user = {"role": "user", "content": PROMPT.format(text=record["text"])}
                answer = orjson.loads(await ask([{"role": "system", "content": SYSTEM}, user]))
                out.write(orjson.dumps({"id": record["id"], **answer}) + b"\n")

        async with asyncio.TaskGroup() as workers:
            for _ in range(in_flight):
                workers.create_task(work())


async def floor(source: str, in_flight: str) -> None:
    """Bare sockets, bodies made beforehand, answers unread but for their length: how fast the stub
    can be asked."""
    with Path(source).open("rb") as lines:  # noqa: ASYNC230
        waiting = deque(_raw_request(orjson.loads(line)["text"]) for line in lines)
    host, port = urlsplit(URL).netloc.split(":")
    loop = asyncio.get_running_loop()
    connections = [_Floor(waiting) for _ in range(int(in_flight))]
    for connection in connections:
        await loop.create_connection(lambda c=connection: c, host, int(port))
    for connection in connections:
        connection.ask()
    await asyncio.gather(*(connection.done for connection in connections))


def _raw_request(text: str) -> bytes:
    messages = [{"role": "user", "content": PROMPT.format(text=text)}]
    messages.insert(0, {"role": "system", "content": SYSTEM})
    body = orjson.dumps({"model": MODEL, "temperature": 0, "messages": messages})
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: stub\r\nContent-Length: %d\r\n\r\n"
    return head % len(body) + body


class _Floor(asyncio.Protocol):
    def __init__(self, waiting: deque[bytes]) -> None:
        self._waiting, self._got = waiting, b""
        self.done = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def ask(self) -> None:
        if self._waiting:
            self._transport.write(self._waiting.popleft())
        else:
            self._transport.close()
            self.done.set_result(None)

    def data_received(self, data: bytes) -> None:
        self._got += data
        head, _, body = self._got.partition(b"\r\n\r\n")
        length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
        if length and len(body) >= int(length):
            assert head.startswith(b"HTTP/1.1 200 ")
            self._got = b""
            self.ask()


def _tell(what: object) -> None:
    sys.stdout.write(orjson.dumps(what).decode() + "\n")
    sys.stdout.flush()


CLIENTS = {f.__name__: f for f in (engine, minimal_aiohttp, sdk, sdk_aiohttp, floor)}

if __name__ == "__main__":
    name, *arguments = sys.argv[1:]
    # The engine runs on the loop that Dagster would give it, the others on the fastest there is.
    with asyncio.Runner(loop_factory=None if name == "engine" else new_event_loop) as runner:
        runner.run(CLIENTS[name](*arguments))
