"""An HTTP endpoint that does exactly what a test wants, what it says, and who asks it."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import ssl
import struct
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing, contextmanager
from dataclasses import dataclass, field
from itertools import chain, repeat
from typing import Any, NamedTuple, Self, TypeVar

import orjson

from modelcall_assets.llm.sdk_transport import SdkTransport
from modelcall_assets.llm.transport import DirectTransport

T = TypeVar("T")

TRANSPORTS = (DirectTransport, SdkTransport)
CLOSE, RESET, HALF_CLOSE, HANG = "close", "reset", "half close", "hang"
Step = bytes | float | str
"""Bytes to send, seconds to wait, or one of the words above."""


# What it is asked


class Request(NamedTuple):
    head: bytes
    body: bytes
    at: float

    @property
    def path(self) -> str:
        return self.head.split(b" ", 2)[1].decode()

    @property
    def json(self) -> Any:
        return orjson.loads(self.body)

    @property
    def question(self) -> Any:
        """The last turn of a conversation."""
        return self.json["messages"][-1]["content"]


def payload(text: str = "rate this", **more: Any) -> bytes:
    messages = [{"role": "user", "content": text}]
    return json.dumps({"model": "rehearsal-rater-1", "messages": messages} | more).encode()


# What it says


def http(status: int, body: bytes = b"{}", **headers: str) -> bytes:
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    head = f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\nConnection: close\r\n{lines}\r\n"
    return head.encode() + body


def refusal(status: int, code: str, **headers: str) -> bytes:
    body = {"error": {"code": code, "message": f"server says {code}"}}
    return http(status, json.dumps(body).encode(), Content_Type="application/json", **headers)


def completion(finish: str | None = "stop", /, **message: Any) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": finish}
    return {"id": "x", "choices": [choice]}


def delta(finish: str | None = None, index: int = 0, /, **fields: Any) -> dict[str, Any]:
    choice = {"index": index, "delta": fields, "finish_reason": finish}
    return {"id": "c1", "model": "m", "object": "chat.completion.chunk", "choices": [choice]}


def events(*chunks: Any, done: bool = True, ended: bool = True) -> bytes:
    """A stream in HTTP chunks; not `ended` breaks off in the middle of the body."""
    texts = [chunk if isinstance(chunk, str) else json.dumps(chunk) for chunk in chunks]
    framed = [f"data: {text}\n\n".encode() for text in texts + ["[DONE]"] * done]
    head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
    body = b"".join(b"%x\r\n%b\r\n" % (len(event), event) for event in framed)
    return head.encode() + b"Transfer-Encoding: chunked\r\n\r\n" + body + b"0\r\n\r\n" * ended


def said(finish: str | None = "stop", /, *, streamed: bool = False, **message: Any) -> bytes:
    """A completion and what it cost, whole or as a stream, every text of it in two deltas."""
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    if not streamed:
        whole = {**completion(finish, **message), "usage": usage}
        return http(200, json.dumps(whole).encode(), Content_Type="application/json")
    chunks = [delta(role="assistant")]
    for name, text in message.items():
        middle = len(text or "") // 2
        halves = [None] if text is None else [text[:middle], text[middle:]]
        chunks += [delta(**{name: half}) for half in halves]
    return events(*chunks, delta(finish), {"id": "c1", "choices": [], "usage": usage})


# Who says it

Script = Callable[[Request], bytes | Iterable[Step] | Awaitable[bytes]]


def in_turn(*replies: bytes) -> Script:
    """The n-th request gets the n-th reply, the last one for ever after."""
    left = chain(replies, repeat(replies[-1]))
    return lambda _: next(left)


@dataclass
class Endpoint:
    """Answers each request as the script says, and remembers it."""

    script: Script | bytes
    keeps: bool = False
    """The connection stays open after an answer, if no step ends it."""
    url: str = ""
    asked: list[Request] = field(default_factory=list)
    most_taken: int = 0
    """Bytes that a client took for one request."""
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def heads(self) -> list[bytes]:
        return [request.head for request in self.asked]

    @property
    def bodies(self) -> list[bytes]:
        return [request.body for request in self.asked]

    @property
    def jsons(self) -> list[Any]:
        return [request.json for request in self.asked]

    def questions(self) -> list[Any]:
        """Since the last look."""
        found = [request.question for request in self.asked]
        self.asked.clear()
        return found

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        with closing(writer):
            try:
                while await self._answer(reader, writer) and self.keeps:
                    pass
            except (ConnectionError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
                return
            finally:
                self._tasks.discard(task)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Whether the connection can go on."""
        request = await _read(reader)
        self.asked.append(request)
        answer = self.script if isinstance(self.script, bytes) else self.script(request)
        if isinstance(answer, Awaitable):
            answer = await answer
        taken = 0
        for step in [answer] if isinstance(answer, bytes) else answer:
            match step:
                case bytes():
                    writer.write(step)
                    await writer.drain()
                    taken += len(step)
                    self.most_taken = max(self.most_taken, taken)
                case float():
                    await asyncio.sleep(step)
                case "half close":
                    writer.write_eof()
                case "hang":
                    await reader.read()
                    return False
                case "reset":
                    _reset(writer)
                    return False
                case _:
                    return False
        return True

    async def end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def _read(reader: asyncio.StreamReader) -> Request:
    head = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"content-length: *(\d+)", head.lower())
    if length is None and b"chunked" in head.lower():
        body = await reader.readuntil(b"\r\n0\r\n\r\n")
    else:
        body = await reader.readexactly(int(length[1]) if length else 0)
    return Request(head, body, time.monotonic())


def _reset(writer: asyncio.StreamWriter) -> None:
    connection: socket.socket = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


@asynccontextmanager
async def listening(
    serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
    tls: ssl.SSLContext | None = None,
) -> AsyncIterator[int]:
    """The port."""
    async with await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls) as listener:
        yield listener.sockets[0].getsockname()[1]


@asynccontextmanager
async def serving(
    script: Script | bytes, *, keeps: bool = False, tls: ssl.SSLContext | None = None
) -> AsyncIterator[Endpoint]:
    endpoint = Endpoint(script, keeps)
    async with listening(endpoint.serve, tls) as port:
        endpoint.url = f"http{'s' if tls else ''}://localhost:{port}/v1"
        yield endpoint
        await endpoint.end()


@contextmanager
def in_thread(served: AbstractAsyncContextManager[T]) -> Iterator[T]:
    """In a loop of a thread of its own, while the block runs."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield asyncio.run_coroutine_threadsafe(served.__aenter__(), loop).result()
    finally:
        asyncio.run_coroutine_threadsafe(served.__aexit__(None, None, None), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


class WithoutNetwork:
    """What a transport is besides its `send`."""

    name = "host:1/v1"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        return None
