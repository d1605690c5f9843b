"""An S3 server in processes of its own, which a test can kill and start again."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

HOST = "127.0.0.1"
REGION = "us-east-1"
CONFIG: dict[str, Any] = {
    "signature_version": "s3v4",
    "s3": {"addressing_style": "path"},
    "request_checksum_calculation": "when_required",
    "response_checksum_validation": "when_required",
}
"""botocore's settings for stores that are not Amazon's; s3fs takes them as `config_kwargs`."""


@dataclass
class S3Server:
    endpoint: str
    key: str
    secret: str
    region: str
    command: Sequence[str] = field(repr=False)
    """Serves until its input ends."""
    log: Path = field(repr=False)
    creates_once: bool = False
    """Whether one of many `If-None-Match: *` at the same time wins, however long they take. If not,
    they are only refused once an object is there."""
    patience: float = field(default=60, repr=False)
    """Seconds until it must answer."""
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def start(self) -> None:
        """The first time, or after `kill` on the same ports with the same data."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + self.patience
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"no server; {self.log}:\n{self.log.read_text()}")
            time.sleep(0.05)

    def kill(self) -> None:
        """SIGKILL for all its processes, and none is left then; nothing when none is there."""
        if self._process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()  # their output ends when the last one does
        self._process = None

    @property
    def storage_options(self) -> dict[str, Any]:
        """What s3fs takes."""
        return {
            "key": self.key,
            "secret": self.secret,
            "endpoint_url": self.endpoint,
            "client_kwargs": {"region_name": self.region},
            "config_kwargs": CONFIG,
        }

    def client(self, **changes: Any) -> Any:
        """A botocore client that does not try again; `changes` are options of its session."""
        from botocore.config import Config

        options = {
            "endpoint_url": self.endpoint,
            "aws_access_key_id": self.key,
            "aws_secret_access_key": self.secret,
            "region_name": self.region,
            "config": Config(**CONFIG, retries={"total_max_attempts": 1}, max_pool_connections=32),
        }
        return _session().create_client("s3", **{**options, **changes})

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection(self.endpoint.removeprefix("http://"), timeout=5)
        try:
            connection.request("GET", "/")
            return connection.getresponse().status < 500
        except OSError:
            return False
        finally:
            connection.close()


@cache
def _session() -> Any:
    """Of botocore: it reads the description of S3 once."""
    from botocore.session import Session

    return Session()


@contextmanager
def running(server: S3Server) -> Iterator[S3Server]:
    try:
        server.start()
        yield server
    finally:
        server.kill()


def free_ports(count: int) -> list[int]:
    with ExitStack() as open_ones:
        sockets = [open_ones.enter_context(socket.create_server((HOST, 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in sockets]
