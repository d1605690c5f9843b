"""An environment service as AgentScope Tuner asks it: counts what is open, and fails as it is told.
As a program, `environment_server.py PORT FILE LATE`, it keeps what is open in the file."""

from __future__ import annotations

import socket
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any, NamedTuple

import orjson

Fields = dict[str, Any]
Splits = dict[str, list[Any]]
GYM: Splits = {"train": ["sum-1", "sum-2", "sum-3"], "dev": ["sum-4"]}


class Fault(NamedTuple):
    """What becomes of a call: a `status` with headers, another `body`, no reply but a `closes`, or
    a reply `late` by seconds. `done` is done for all that."""

    status: int = 200
    body: bytes | None = None
    headers: Fields = {}  # noqa: RUF012
    closes: bool = False
    late: float = 0.0
    done: bool = False


def first_state(task: str) -> Any:
    """Of a task `one-…` a message, of all others several."""
    asked = {"role": "user", "content": f"What is the sum of {task}?"}
    return asked if task.startswith("one") else [{"role": "system", "content": "Add."}, asked]


def reward_of(said: Sequence[str]) -> float:
    """Of all steps together, so that one that is done twice shows."""
    return sum(float(len(text) % 3) for text in said) / 2


class EnvironmentServer:
    """`splits` are those of the environment `gym`; `states` of tasks replace their first ones.
    `faults` are taken one by one, by endpoint."""

    def __init__(
        self, splits: dict[str, list[Any]] | None = None, file: Path | None = None
    ) -> None:
        self.splits, self.states = splits or GYM, dict[str, Any]()
        self.calls = list[tuple[str, Fields]]()
        self.faults = defaultdict[str, list[Fault]](list)
        self.made = list[str]()
        self.open = dict[str, list[str]]()
        """By the id of an instance, what was said there."""
        self.most_open, self.busy = 0, 0
        self._file, self._lock, self._sockets = file, Lock(), set[socket.socket]()
        if file is not None and file.exists():
            self.open = orjson.loads(file.read_bytes())
        self.port, self.late = 0, 0.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def counts(self) -> Counter[str]:
        return Counter(endpoint for endpoint, _ in self.calls)

    def start(self, port: int = 0) -> None:
        """On the port that it had."""
        served = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                served.answer(self)

            def log_message(self, *_: object) -> None:
                """Nothing."""

        class Server(ThreadingHTTPServer):
            allow_reuse_address = True
            request_queue_size = 128

            def handle_error(self, *_: object) -> None:
                """A client has gone away."""

        self._http = Server(("127.0.0.1", port or self.port), Handler)
        self.port, self._is_up = self._http.server_port, True
        Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def kill(self, *, forgets: bool = False) -> None:
        """No call is answered any more, and nobody listens."""
        self._is_up = False
        self._http.shutdown()
        self._http.socket.close()
        with self._lock:
            if forgets:
                self.open.clear()
            for each in self._sockets:
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        size = int(request.headers["Content-Length"])
        fields, endpoint = orjson.loads(request.rfile.read(size)), request.path.strip("/")
        with self._lock:
            self.busy += 1
            self.calls.append((endpoint, fields))
            self._sockets.add(request.connection)
            left = self.faults[endpoint]
            fault = left.pop(0) if left else None
        try:
            self._answer(request, endpoint, fields, fault or Fault(done=True))
        finally:
            with self._lock:
                self.busy -= 1
                self._sockets.discard(request.connection)

    def _answer(
        self, request: BaseHTTPRequestHandler, endpoint: str, fields: Fields, fault: Fault
    ) -> None:
        time.sleep(fault.late or self.late)
        status, reply = fault.status, b"{}"
        with self._lock:
            if fault.done and self._is_up:
                done_status, done = self._done(endpoint, fields)
                status, reply = max(status, done_status), orjson.dumps(done)
                if self._file is not None:
                    self._file.write_bytes(orjson.dumps(self.open))
        if fault.closes or not self._is_up:
            request.close_connection = True
            return
        reply = reply if fault.body is None else fault.body
        request.send_response(status)
        for name, value in {**fault.headers, "Content-Length": str(len(reply))}.items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(reply)

    def _done(self, endpoint: str, fields: Fields) -> tuple[int, Fields]:
        instance = fields["instance_id"]
        match endpoint:
            case "get_env_profile":
                ids = self.splits.get(fields["params"]["split"], [])
                return 200, {"success": True, "data": ids if fields["env_type"] == "gym" else []}
            case "create":
                self.made.append(instance)
                self.open[instance] = []
                self.most_open = max(self.most_open, len(self.open))
                state = self.states.get(fields["task_id"], first_state(fields["task_id"]))
                return 200, {"success": True, "data": self._seen(instance, state)}
            case "release":
                return 200, {"success": self.open.pop(instance, None) is not None, "data": None}
            case _ if instance not in self.open:
                trace = f"Traceback (most recent call last):\nValueError: no instance {instance}"
                return 500, {"detail": trace}
            case "step":
                self.open[instance].append(fields["messages"]["content"])
                state = [{"role": "user", "content": "well said"}]
                return 200, {"success": True, "data": self._seen(instance, state)}
            case "evaluate":
                return 200, {"success": True, "data": reward_of(self.open[instance])}
            case _:
                return 404, {"detail": "Not Found"}

    def _seen(self, instance: str, state: Any) -> Fields:
        info = {"instance_id": instance, "task_id": ""}
        return {"state": state, "reward": 0, "is_terminated": False, "info": info}


@contextmanager
def environment(splits: Splits | None = None) -> Iterator[EnvironmentServer]:
    server = EnvironmentServer(splits)
    server.start()
    try:
        yield server
    finally:
        server.kill()


if __name__ == "__main__":
    program = EnvironmentServer({"train": [f"sum-{n}" for n in range(40)]}, Path(sys.argv[2]))
    program.late = float(sys.argv[3])
    program.start(int(sys.argv[1]))
    time.sleep(3600)
