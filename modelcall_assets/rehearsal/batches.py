"""Files and batches as OpenAI has them: a batch is worked through in its own time.

A line meets the faults that a chat request would meet. What is refused or fails goes to the error
file with its status; a line whose connection would close unanswered is in neither file.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import orjson

from modelcall_assets.rehearsal import replies
from modelcall_assets.rehearsal.faults import Faults
from modelcall_assets.rehearsal.replies import Refusal, json_response, parse

if TYPE_CHECKING:
    from modelcall_assets.rehearsal import RehearsalServer, Request

CHAT_URL = "/v1/chat/completions"
MOST_LINES = 50_000
LINES_AT_ONCE = 200
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
    lines: list[Line]
    shown: Line
    output: list[Line] = field(default_factory=list)
    failed: list[Line] = field(default_factory=list)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def is_over(self) -> bool:
        return self.shown["status"] in ("completed", "failed", "expired", "cancelled")

    async def work(self, seconds: float) -> None:
        """No longer than until somebody cancels it."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self.cancelled.wait(), seconds)

    def turn(self, status: str) -> None:
        self.shown |= {"status": status, f"{status}_at": int(time.time())}

    def fail(self, mistakes: list[Line]) -> None:
        self.shown["errors"] = {"object": "list", "data": mistakes}

    def add(self, line: Line, reply: Line | None, error: str = "") -> None:
        """What became of a line: a reply, or the code of an error that says why there is none."""
        identity = blake2b(line["custom_id"].encode(), digest_size=8).hexdigest()
        is_answered = reply is not None and reply["status_code"] == 200
        self.shown["request_counts"]["completed" if is_answered else "failed"] += 1
        (self.output if is_answered else self.failed).append(
            {
                "id": f"batch_req_{identity}",
                "custom_id": line["custom_id"],
                "response": reply,
                "error": {"code": error, "message": _NOT_EXECUTED[error]} if error else None,
            }
        )


class Batches:
    def __init__(self, server: RehearsalServer) -> None:
        self._server = server
        self._files: dict[str, bytes] = {}
        self._files_made = self._calls = 0
        self._batches: dict[str, _Batch] = {}
        self._working: set[asyncio.Task[None]] = set()

    async def stop(self) -> None:
        for task in self._working:
            task.cancel()
        await asyncio.gather(*self._working, return_exceptions=True)

    def handle(self, request: Request) -> bytes:
        """The response; no bytes where the connection is to close without one."""
        end = self._server.faults.batch_call(self._calls)
        self._calls += 1
        if end == "server_error":
            return replies.fault_error(end, 0.0).http()
        answer = self._handled(request)
        return b"" if end == "lost" else answer

    def _handled(self, request: Request) -> bytes:
        match (request.method, *request.path.removeprefix("/v1/").split("/")):
            case ("POST", "files"):
                return self._upload(request)
            case ("GET", "files", name) if name in self._files:
                return self._show(name)
            case ("GET", "files", name, "content") if name in self._files:
                return replies.response(200, self._files[name], b"application/octet-stream")
            case ("DELETE", "files", name) if self._files.pop(name, None) is not None:
                return json_response({"id": name, "object": "file", "deleted": True})
            case ("POST", "batches"):
                return self._create(parse(request.body) or {})
            case ("GET", "batches"):
                newest_first = [batch.shown for batch in self._batches.values()][::-1]
                return json_response({"object": "list", "data": newest_first, "has_more": False})
            case ("GET", "batches", name) if name in self._batches:
                return json_response(self._batches[name].shown)
            case ("POST", "batches", name, "cancel") if batch := self._batches.get(name):
                if batch.is_over:
                    return Refusal(409, f"the batch is {batch.shown['status']} already").http()
                batch.turn("cancelling")
                batch.cancelled.set()
                return json_response(batch.shown)
        return replies.nothing_at(request.method, request.path)

    def _upload(self, request: Request) -> bytes:
        fields = dict(_form(request.headers.get(b"content-type", b""), request.body))
        if b"file" not in fields or fields.get(b"purpose") != b"batch":
            return Refusal(400, "a file and the purpose batch are needed", param="purpose").http()
        return self._show(self._keep(fields[b"file"]))

    def _keep(self, content: bytes) -> str:
        self._files_made += 1
        self._server.tally.counts["files"] += 1
        name = f"file-rehearsal-{self._files_made}"
        self._files[name] = content
        return name

    def _show(self, name: str) -> bytes:
        about = {"id": name, "object": "file", "bytes": len(self._files[name])}
        about |= {"created_at": int(time.time()), "filename": f"{name}.jsonl"}
        return json_response({**about, "purpose": "batch", "status": "processed"})

    def _create(self, asked: Line) -> bytes:
        content = self._files.get(str(asked.get("input_file_id")))
        if content is None or "completion_window" not in asked:
            wrong = "the id of an uploaded file and a completion_window are needed"
            return Refusal(400, wrong, param="input_file_id").http()
        if asked.get("endpoint") != CHAT_URL:
            return Refusal(400, f"the endpoint must be {CHAT_URL}", param="endpoint").http()
        found = [_parsed(line) for line in content.splitlines() if line.strip()]
        lines, number = [line for line in found if line is not None], len(self._batches)
        mistakes, faults = list(_mistakes(found)), self._server.faults
        waiting = sum(len(each.lines) for each in self._batches.values() if not each.is_over)
        if 0 < faults.max_batch_lines < waiting + len(lines):
            wrong = f"more than {faults.max_batch_lines} lines wait in batches"
            mistakes = [_mistake("token_limit_exceeded", wrong)]
        shown = {
            "id": f"batch_rehearsal_{number}",
            "object": "batch",
            "endpoint": CHAT_URL,
            "errors": None,
            "input_file_id": asked["input_file_id"],
            "completion_window": asked["completion_window"],
            "status": "validating",
            "created_at": int(time.time()),
            "output_file_id": None,
            "error_file_id": None,
            "request_counts": {"total": len(lines), "completed": 0, "failed": 0},
            "metadata": asked.get("metadata"),
        }
        batch = self._batches[shown["id"]] = _Batch(lines, shown)
        if mistakes:
            batch.fail(mistakes)
        self._server.tally.counts["batches"] += 1
        task = asyncio.create_task(self._work(batch, number, faults))
        self._working.add(task)
        task.add_done_callback(self._working.discard)
        return json_response(batch.shown)

    async def _work(self, batch: _Batch, number: int, faults: Faults) -> None:
        end, lines = faults.batch_end(number), batch.lines
        done = len(lines) if end == "completed" else int(len(lines) * faults.rate_batch_done)
        await batch.work(faults.batch_s * _BEFORE_AND_AFTER)
        if batch.shown["errors"]:
            batch.turn("failed")
            return
        if not batch.cancelled.is_set():
            batch.turn("in_progress")
        answered = 0
        while answered < done:
            few = lines[answered : min(done, answered + LINES_AT_ONCE)]
            await batch.work(faults.batch_s * len(few) / done * (1 - 2 * _BEFORE_AND_AFTER))
            if batch.cancelled.is_set():
                break
            answered += len(few)
            for line in few:
                self._answer(batch, number, line)
        if batch.cancelled.is_set():
            end = "cancelled"
        batch.turn("finalizing")
        await batch.work(faults.batch_s * _BEFORE_AND_AFTER)
        if end == "failed":
            batch.fail([_mistake("rehearsal_failure", "rehearsal fault: the batch failed")])
        else:
            for line in lines[answered:]:
                batch.add(line, None, f"batch_{end}")
        for name, told in (("output", batch.output), ("error", batch.failed)):
            if told:  # in an order that has nothing to do with that of the input
                ordered = sorted(told, key=itemgetter("id"))
                content = b"".join(orjson.dumps(line) + b"\n" for line in ordered)
                batch.shown[f"{name}_file_id"] = self._keep(content)
        batch.turn(end)

    def _answer(self, batch: _Batch, number: int, line: Line) -> None:
        if line["body"].get("stream"):
            ending = Refusal(400, "a batch does not stream", param="stream").ending()
        else:
            ending = self._server.batch_line(orjson.dumps(line["body"]))
        if ending.what == "hung":
            batch.add(line, None, "request_timeout")
        elif ending.what != "dropped":
            content = ending.data.partition(b"\r\n\r\n")[2]
            told = len(batch.output) + len(batch.failed)
            reply = {"status_code": ending.status, "request_id": f"req-{number}-{told}"}
            batch.add(line, {**reply, "body": parse(content) or content.decode(errors="replace")})


def _form(content_type: bytes, body: bytes) -> Iterator[tuple[bytes, bytes]]:
    boundary = content_type.partition(b"boundary=")[2].strip(b'"')
    for part in body.split(b"--" + boundary)[1:-1] if boundary else ():
        head, _, content = part.partition(b"\r\n\r\n")
        if name := _FIELD_NAME.search(head):
            yield name[1], content.removesuffix(b"\r\n")


def _parsed(line: bytes) -> Line | None:
    """None when it is no request of a batch."""
    match found := parse(line):
        case {"method": "POST", "url": "/v1/chat/completions", "custom_id": str(), "body": {}}:
            return found
    return None


def _mistake(code: str, message: str, line: int | None = None) -> Line:
    return {"code": code, "message": message, "line": line}


def _mistakes(lines: list[Line | None]) -> Iterator[Line]:
    seen = set[str]()
    if not lines or len(lines) > MOST_LINES:
        yield _mistake("invalid_file", f"{len(lines)} lines; a batch has 1 to {MOST_LINES}")
    for number, line in enumerate(lines, start=1):
        if line is None:
            yield _mistake("invalid_json_line", "not a request", number)
            continue
        if line["custom_id"] in seen:
            wrong = f"the custom_id {line['custom_id']} is there twice"
            yield _mistake("duplicate_custom_id", wrong, number)
        seen.add(line["custom_id"])
        if not str(line["body"].get("model")).startswith("rehearsal"):
            wrong = f"the rehearsal server has only the model {replies.MODEL}"
            yield _mistake("model_not_found", wrong, number)
