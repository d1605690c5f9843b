"""Files and batches as OpenAI has them: a batch is worked through in its own time.

A line meets the faults that a chat request would meet. What is refused or fails goes to the error
file with its status; a line whose connection would close unanswered is in neither file.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from operator import itemgetter
from typing import Any

import orjson

from modelcall_assets.rehearsal.faults import Faults
from modelcall_assets.rehearsal.replies import MODEL, Refusal, fault_error
from modelcall_assets.rehearsal.tally import Ending
from modelcall_assets.rehearsal.wire import Request, response

CHAT_URL = "/v1/chat/completions"
MOST_LINES = 50_000
LINES_AT_ONCE = 200
TERMINAL = ("completed", "failed", "expired", "cancelled")
_BEFORE_AND_AFTER = 0.1
"""The share of its time that a batch is validating, and that it is finalizing."""
_FIELD_NAME = re.compile(rb'[; ]name="([^"]*)"')
_NOT_EXECUTED = {
    "batch_expired": "the completion window ended before this request was executed",
    "batch_cancelled": "the batch was cancelled before this request was executed",
    "request_timeout": "rehearsal fault: the model never answered",
}

Line = dict[str, Any]


@dataclass(eq=False)
class _Batch:
    number: int
    input: str
    window: str
    metadata: dict[str, str] | None
    lines: list[Line]
    errors: list[dict[str, Any]]
    status: str = "validating"
    at: dict[str, int] = field(default_factory=lambda: {"created_at": int(time.time())})
    counts: dict[str, int] = field(default_factory=dict)
    output: list[Line] = field(default_factory=list)
    failed: list[Line] = field(default_factory=list)
    files: dict[str, str | None] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return f"batch_rehearsal_{self.number}"

    def turn(self, status: str) -> None:
        self.status = status
        self.at[f"{status}_at"] = int(time.time())

    def shown(self) -> dict[str, Any]:
        done = {"completed": len(self.output), "failed": len(self.failed)}
        return {
            "id": self.id,
            "object": "batch",
            "endpoint": CHAT_URL,
            "errors": {"object": "list", "data": self.errors} if self.errors else None,
            "input_file_id": self.input,
            "completion_window": self.window,
            "status": self.status,
            "output_file_id": self.files.get("output"),
            "error_file_id": self.files.get("error"),
            "request_counts": {"total": len(self.lines), **done},
            "metadata": self.metadata,
            **self.at,
        }


class Batches:
    """`chat` tells how a line ends, `count` notes what /stats shows."""

    def __init__(
        self,
        chat: Callable[[bytes], Ending],
        faults: Callable[[], Faults],
        count: Callable[[str], None],
    ) -> None:
        self._chat = chat
        self._faults = faults
        self._count = count
        self._files: dict[str, bytes] = {}
        self._files_made = 0
        self._calls = 0
        self._batches: dict[str, _Batch] = {}
        self._working: set[asyncio.Task[None]] = set()

    async def stop(self) -> None:
        for task in self._working:
            task.cancel()
        await asyncio.gather(*self._working, return_exceptions=True)

    def handle(self, request: Request) -> bytes:
        """The response; no bytes where the connection is to close without one."""
        end = self._faults().batch_call(self._calls)
        self._calls += 1
        if end == "server_error":
            return fault_error(end, 0.0).http()
        answer = self._handled(request)
        return b"" if end == "lost" else answer

    def _handled(self, request: Request) -> bytes:
        match (request.method, *request.path.removeprefix("/v1/").split("/")):
            case ("POST", "files"):
                return self._upload(request)
            case ("GET", "files", name) if name in self._files:
                return _json(self._shown_file(name))
            case ("GET", "files", name, "content") if name in self._files:
                return response(200, self._files[name], b"application/octet-stream")
            case ("DELETE", "files", name) if self._files.pop(name, None) is not None:
                return _json({"id": name, "object": "file", "deleted": True})
            case ("POST", "batches"):
                return self._create(request)
            case ("GET", "batches"):
                newest_first = [batch.shown() for batch in self._batches.values()][::-1]
                return _json({"object": "list", "data": newest_first, "has_more": False})
            case ("GET", "batches", name) if name in self._batches:
                return _json(self._batches[name].shown())
            case ("POST", "batches", name, "cancel") if name in self._batches:
                return self._cancel(self._batches[name])
        return Refusal(404, f"nothing at {request.method} {request.path}").http()

    def _upload(self, request: Request) -> bytes:
        fields = dict(_form(request.headers.get(b"content-type", b""), request.body))
        if b"file" not in fields or fields.get(b"purpose") != b"batch":
            return Refusal(400, "a file and the purpose batch are needed", param="purpose").http()
        return _json(self._shown_file(self._keep(fields[b"file"])))

    def _keep(self, content: bytes) -> str:
        self._files_made += 1
        self._count("files")
        name = f"file-rehearsal-{self._files_made}"
        self._files[name] = content
        return name

    def _shown_file(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "file",
            "bytes": len(self._files[name]),
            "created_at": int(time.time()),
            "filename": f"{name}.jsonl",
            "purpose": "batch",
            "status": "processed",
        }

    def _create(self, request: Request) -> bytes:
        try:
            asked = orjson.loads(request.body)
            content = self._files[asked["input_file_id"]]
            window, metadata = asked["completion_window"], asked.get("metadata")
        except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
            wrong = "the id of an uploaded file and a completion_window are needed"
            return Refusal(400, wrong, param="input_file_id").http()
        if asked.get("endpoint") != CHAT_URL:
            return Refusal(400, f"the endpoint must be {CHAT_URL}", param="endpoint").http()
        lines = [_parsed(line) for line in content.splitlines() if line.strip()]
        batch = _Batch(
            number=len(self._batches),
            input=asked["input_file_id"],
            window=window,
            metadata=metadata,
            lines=[line for line in lines if line is not None],
            errors=list(_mistakes(lines)),
        )
        faults = self._faults()
        self._batches[batch.id] = batch
        self._count("batches")
        waiting = (each for each in self._batches.values() if each.status not in TERMINAL)
        if 0 < faults.max_batch_lines < sum(len(each.lines) for each in waiting):
            wrong = f"more than {faults.max_batch_lines} lines wait in batches"
            batch.errors = [{"code": "token_limit_exceeded", "message": wrong, "line": None}]
        task = asyncio.get_running_loop().create_task(self._work(batch, faults))
        self._working.add(task)
        task.add_done_callback(self._working.discard)
        return _json(batch.shown())

    def _cancel(self, batch: _Batch) -> bytes:
        if batch.status in TERMINAL:
            return Refusal(409, f"the batch is {batch.status} already").http()
        batch.turn("cancelling")
        return _json(batch.shown())

    async def _work(self, batch: _Batch, faults: Faults) -> None:
        end, lines = faults.batch_end(batch.number), batch.lines
        done = len(lines) if end == "completed" else int(len(lines) * faults.rate_batch_done)
        await asyncio.sleep(faults.batch_s * _BEFORE_AND_AFTER)
        if batch.errors:
            batch.turn("failed")
            return
        batch.turn("in_progress")
        answered = 0
        while answered < done:
            few = lines[answered : min(done, answered + LINES_AT_ONCE)]
            share = len(few) / done * (1 - 2 * _BEFORE_AND_AFTER)
            await asyncio.sleep(faults.batch_s * share)
            if batch.status != "in_progress":
                break
            answered += len(few)
            for line in few:
                self._answer(batch, line)
        if batch.status == "cancelling":
            end = "cancelled"
        batch.turn("finalizing")
        await asyncio.sleep(faults.batch_s * _BEFORE_AND_AFTER)
        self._finish(batch, end, lines[answered:])

    def _answer(self, batch: _Batch, line: Line) -> None:
        body = line["body"]
        if body.get("stream"):
            refusal = Refusal(400, "a batch does not stream", param="stream")
            ending = Ending("error", 400, refusal.http())
        else:
            ending = self._chat(orjson.dumps(body))
        if ending.what == "dropped":
            return
        if ending.what == "hung":
            batch.failed.append(_not_executed(line, "request_timeout"))
            return
        reply = {
            "status_code": ending.status,
            "request_id": f"req-{batch.number}-{len(batch.output) + len(batch.failed)}",
            "body": _body(ending.data.partition(b"\r\n\r\n")[2]),
        }
        told = batch.output if ending.status == 200 else batch.failed
        told.append(_told(line, reply, None))

    def _finish(self, batch: _Batch, end: str, rest: list[Line]) -> None:
        if end == "failed":
            message = "rehearsal fault: the batch failed"
            batch.errors = [{"code": "rehearsal_failure", "message": message, "line": None}]
        else:
            batch.failed += [_not_executed(line, f"batch_{end}") for line in rest]
        for name, lines in (("output", batch.output), ("error", batch.failed)):
            if lines:
                batch.files[name] = self._keep(_shuffled(lines))
        batch.turn(end)


def _form(content_type: bytes, body: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Name and content of each field of a multipart form."""
    boundary = content_type.partition(b"boundary=")[2].strip(b'"')
    for part in body.split(b"--" + boundary)[1:-1] if boundary else ():
        head, _, content = part.partition(b"\r\n\r\n")
        if name := _FIELD_NAME.search(head):
            yield name[1], content.removesuffix(b"\r\n")


def _parsed(line: bytes) -> Line | None:
    """None when it is no request of a batch."""
    try:
        parsed = orjson.loads(line)
        is_chat = parsed["method"] == "POST" and parsed["url"] == CHAT_URL
        is_whole = isinstance(parsed["custom_id"], str) and isinstance(parsed["body"], dict)
    except (orjson.JSONDecodeError, LookupError, TypeError):
        return None
    return parsed if is_chat and is_whole else None


def _mistakes(lines: list[Line | None]) -> Iterator[dict[str, Any]]:
    """Why the batch as a whole is refused."""
    seen = set[str]()
    if not lines or len(lines) > MOST_LINES:
        wrong = f"{len(lines)} lines; a batch has 1 to {MOST_LINES}"
        yield {"code": "invalid_file", "message": wrong, "line": None}
    for number, line in enumerate(lines, start=1):
        if line is None:
            yield {"code": "invalid_json_line", "message": "not a request", "line": number}
            continue
        if line["custom_id"] in seen:
            wrong = f"the custom_id {line['custom_id']} is there twice"
            yield {"code": "duplicate_custom_id", "message": wrong, "line": number}
        seen.add(line["custom_id"])
        if not str(line["body"].get("model")).startswith("rehearsal"):
            wrong = f"the rehearsal server has only the model {MODEL}"
            yield {"code": "model_not_found", "message": wrong, "line": number}


def _told(line: Line, reply: Line | None, error: Line | None) -> Line:
    identity = blake2b(line["custom_id"].encode(), digest_size=8).hexdigest()
    return {
        "id": f"batch_req_{identity}",
        "custom_id": line["custom_id"],
        "response": reply,
        "error": error,
    }


def _not_executed(line: Line, code: str) -> Line:
    return _told(line, None, {"code": code, "message": _NOT_EXECUTED[code]})


def _body(data: bytes) -> Any:
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        return data.decode(errors="replace")


def _shuffled(lines: list[Line]) -> bytes:
    """In an order that has nothing to do with that of the input."""
    return b"".join(orjson.dumps(line) + b"\n" for line in sorted(lines, key=itemgetter("id")))


def _json(value: object) -> bytes:
    return response(200, orjson.dumps(value))
