"""Ceph's gateway as an S3 server for tests: a second one, which has little in common with Swift."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from s3_server import HOST, REGION, S3Server, free_ports, running

from acceptance import ceph


@contextmanager
def rgw_server(folder: Path) -> Iterator[S3Server]:
    """Everything it writes is in `folder`, which need not exist; the programs are not."""
    programs = ceph.unpacked_programs()
    folder.mkdir(parents=True, exist_ok=True)
    ports = free_ports(2)
    endpoint = f"http://{HOST}:{ports[0]}"
    command = [sys.executable, ceph.__file__, str(programs), str(folder), *map(str, ports)]
    log = folder / "log"
    server = S3Server(
        endpoint, ceph.KEY, ceph.SECRET, REGION, command, log, creates_once=True, patience=120
    )
    with running(server):
        yield server
