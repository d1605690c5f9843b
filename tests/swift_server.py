"""OpenStack Swift with its S3 interface: proxy, account, container and object server at once.

    python tests/swift_server.py FOLDER PORT PORT PORT PORT     # serves until its input ends

They share one process, and keep what they store as files with extended attributes in FOLDER.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from configparser import ConfigParser
from contextlib import contextmanager
from pathlib import Path

from s3_server import HOST, REGION, S3Server, free_ports, running

USER, SECRET = "test:tester", "a-secret-of-the-tests"
KINDS = ("proxy", "account", "container", "object")
DEVICE = "disk"
FILTERS = ("catch_errors", "gatekeeper", "listing_formats", "s3api", "tempauth")
FILTERS += ("copy", "slo", "symlink")
FILTER_OPTIONS = {
    "s3api": {"location": REGION},
    "tempauth": {f"user_{USER.replace(':', '_')}": f"{SECRET} .admin"},
}
SECONDS = {"conn_timeout": "30", "node_timeout": "60", "container_update_timeout": "30"}
"""For a busy machine. What a container is told later than this, it lists too late."""


@contextmanager
def swift_server(folder: Path) -> Iterator[S3Server]:
    """Everything it writes is in `folder`, which need not exist."""
    _check_attributes(folder)
    ports = free_ports(len(KINDS))
    endpoint = f"http://{HOST}:{ports[0]}"
    command = [sys.executable, "-W", "ignore", __file__, str(folder), *map(str, ports)]
    server = S3Server(endpoint, USER, SECRET, REGION, command, folder / "log")
    with running(server):
        yield server


def _check_attributes(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    try:
        os.setxattr(folder, "user.swift.test", b"")
    except OSError as exc:
        raise RuntimeError(
            f"{folder}: Swift needs a file system with extended attributes; "
            "pytest --basetemp=FOLDER takes another one"
        ) from exc


def serve(folder: Path, ports: Mapping[str, int]) -> None:
    from eventlet import hubs
    from swift.common.utils import get_hub, monkey_patch

    hubs.use_hub(get_hub())
    monkey_patch()
    (folder / DEVICE).mkdir(exist_ok=True)
    _write_conf(folder / "swift.conf", {"swift-hash": {"swift_hash_path_suffix": "tests"}})
    for kind in KINDS[1:]:
        _write_ring(folder, kind, ports[kind])
    for kind in KINDS:
        path = folder / f"{kind}.conf"
        _write_conf(path, _server_conf(folder, kind, ports[kind]))
        _serve_one(path, f"{kind}-server")
    hubs.trampoline(sys.stdin, read=True)
    os._exit(0)


def _serve_one(conf_path: Path, name: str) -> None:
    """What `swift.common.wsgi.run_server` does, but for a hub that others use too."""
    import eventlet.wsgi
    from swift.common import wsgi
    from swift.common.utils.logs import NullLogger

    app, conf, _, _ = wsgi.init_request_processor(str(conf_path), name, verbose=True)
    eventlet.spawn(
        eventlet.wsgi.server,
        wsgi.get_socket(conf),
        app,
        NullLogger(),
        protocol=wsgi.SwiftHttpProtocol,
        capitalize_response_headers=False,
    )


def _server_conf(folder: Path, kind: str, port: int) -> dict[str, dict[str, str]]:
    filters = FILTERS if kind == "proxy" else ()
    options = {"account_autocreate": "true"} if kind == "proxy" else {}
    return {
        "DEFAULT": {
            "bind_ip": HOST,
            "bind_port": str(port),
            "workers": "0",
            "swift_dir": str(folder),
            "devices": str(folder),
            "mount_check": "false",
            "disable_fallocate": "true",
            "log_address": str(folder / "no-syslog"),
            "log_level": "WARNING",
            **SECONDS,
        },
        "pipeline:main": {"pipeline": " ".join([*filters, f"{kind}-server"])},
        f"app:{kind}-server": {"use": f"egg:swift#{kind}", **options},
        **{
            f"filter:{name}": {"use": f"egg:swift#{name}", **FILTER_OPTIONS.get(name, {})}
            for name in filters
        },
    }


def _write_conf(path: Path, sections: Mapping[str, Mapping[str, str]]) -> None:
    parser = ConfigParser(interpolation=None)
    parser.read_dict(sections)
    with path.open("w") as file:
        parser.write(file)


def _write_ring(folder: Path, kind: str, port: int) -> None:
    from swift.common.ring import RingBuilder

    builder = RingBuilder(part_power=1, replicas=1, min_part_hours=0)
    place = {"region": 1, "zone": 1, "ip": HOST, "port": port, "device": DEVICE}
    builder.add_dev({**place, "weight": 1})
    builder.rebalance(seed="0")
    builder.get_ring().save(str(folder / f"{kind}.ring.gz"))


if __name__ == "__main__":
    serve(Path(sys.argv[1]), dict(zip(KINDS, map(int, sys.argv[2:]), strict=True)))
