"""A proxy before an S3 server that delays, refuses, cuts and counts what a test tells it to."""

from __future__ import annotations

import http.client
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from s3_server import HOST, S3Server

_HOP = ("connection", "keep-alive", "transfer-encoding", "expect", "content-length")


class Call(NamedTuple):
    """A request as it arrived; `key` is without the bucket."""

    method: str
    key: str
    query: str
    is_conditional: bool = False
    """To be done only if there is (not) such an object."""


@dataclass
class Rule:
    """What becomes of the next `times` requests that fit. Without anything they are forwarded."""

    method: str
    key: re.Pattern[str]
    query: re.Pattern[str]
    times: int
    conditional: bool = False
    """Only requests that are to be done if there is (not) such an object."""
    refuse: tuple[int, str] | None = None
    """Status and code of an error that the store never said."""
    lose: bool = False
    """The store never hears of it; the connection closes."""
    lose_reply: bool = False
    """The store does it; the connection closes."""
    cut_reply: bool = False
    """The second half of the reply's body never comes."""
    hold: bool = False
    """It waits until `release`."""
    met: int = 0
    reached: threading.Event = field(default_factory=threading.Event)
    _released: threading.Event = field(default_factory=threading.Event)

    def release(self, *, lose: bool = False) -> None:
        """Let go what is held; `lose`: as if it had never been sent."""
        self.lose = self.lose or lose
        self._released.set()

    def fits(self, call: Call) -> bool:
        return (
            self.met < self.times
            and self.method in ("", call.method)
            and self.key.search(call.key) is not None
            and self.query.search(call.query) is not None
            and self.conditional <= call.is_conditional
        )

    def wait(self, stopped: threading.Event) -> None:
        self.reached.set()
        while self.hold and not self._released.wait(0.05) and not stopped.is_set():
            pass


class S3Proxy:
    """Knows nothing of S3 but its URLs; the host's name in a signature is the proxy's own."""

    def __init__(self, upstream: S3Server) -> None:
        self.upstream = upstream
        self.calls: list[Call] = []
        self.rules: list[Rule] = []
        self.stopped = threading.Event()
        self.lock = threading.Lock()
        self._server = _Server((HOST, 0), _Handler)
        self._server.proxy = self
        self.endpoint = f"http://{HOST}:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    def on(
        self, method: str = "", key: str = "", query: str = "", times: int = 10**9, **what: object
    ) -> Rule:
        """A rule; those of later calls come first."""
        rule = Rule(method, re.compile(key), re.compile(query), times, **what)  # pyright: ignore[reportArgumentType]
        with self.lock:
            self.rules.insert(0, rule)
        return rule

    def clear(self) -> None:
        """Forget rules and calls; what is held is let go."""
        with self.lock:
            rules, self.rules, self.calls = self.rules, [], []
        for rule in rules:
            rule.release()

    def count(self, method: str = "", key: str = "", query: str = "") -> int:
        """Requests that fit, so far."""
        rule = Rule(method, re.compile(key), re.compile(query), 1)
        with self.lock:
            return sum(rule.fits(call) for call in self.calls)

    def rule_for(self, call: Call) -> Rule | None:
        with self.lock:
            self.calls.append(call)
            rule = next((rule for rule in self.rules if rule.fits(call)), None)
            if rule is not None:
                rule.met += 1
            return rule

    def __enter__(self) -> S3Proxy:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stopped.set()
        self.clear()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    proxy: S3Proxy

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that is killed is what this is for."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _serve(self) -> None:
        proxy = self.server.proxy
        split = urlsplit(self.path)
        key = unquote(split.path).partition("/")[2].partition("/")[2]
        is_conditional = any(name in self.headers for name in ("If-Match", "If-None-Match"))
        rule = proxy.rule_for(Call(self.command, key, split.query, is_conditional))
        body = self._body()
        if rule is not None:
            rule.wait(proxy.stopped)
            if rule.lose or proxy.stopped.is_set():
                self.close_connection = True
                return
            if rule.refuse is not None:
                self._refuse(*rule.refuse)
                return
        try:
            with _connected(proxy.upstream) as upstream:
                self._forward(upstream, body, rule)
        except (OSError, http.client.HTTPException):
            self.close_connection = True

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts: list[bytes] = []
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _refuse(self, status: int, code: str) -> None:
        """`code` is told in the body, which the answer to a HEAD does not have."""
        body = (
            f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>The proxy says no.</Message>"
            "</Error>"
        ).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _forward(
        self, upstream: http.client.HTTPConnection, body: bytes, rule: Rule | None
    ) -> None:
        upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in _HOP:
                upstream.putheader(name, value)
        upstream.putheader("Content-Length", str(len(body)))
        upstream.endheaders(body)
        reply = upstream.getresponse()
        content = reply.read()
        if rule is not None and rule.lose_reply:
            self.close_connection = True
            return
        self.send_response_only(reply.status, reply.reason)
        for name, value in reply.getheaders():
            if name.lower() not in _HOP:
                self.send_header(name, value)
        length = reply.getheader("Content-Length") if self.command == "HEAD" else len(content)
        self.send_header("Content-Length", str(length or 0))
        self.end_headers()
        if rule is not None and rule.cut_reply:
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
            return
        self.wfile.write(content)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _serve


@contextmanager
def _connected(server: S3Server) -> Iterator[http.client.HTTPConnection]:
    connection = http.client.HTTPConnection(server.endpoint.removeprefix("http://"), timeout=60)
    try:
        yield connection
    finally:
        connection.close()
