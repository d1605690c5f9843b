"""An S3 endpoint that knows nothing but a long listing, in a process of its own.

python -m benchmarks.listing_server OBJECTS
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from urllib.parse import parse_qs, urlparse

from benchmarks.measure import STUB_CORE, start

PAGE = 1000
_OBJECT = (
    "<Contents><Key>in/part/{0:08d}.jsonl</Key><LastModified>2026-01-01T00:00:00.000Z"
    "</LastModified><ETag>&quot;{0:032x}&quot;</ETag><Size>{0}</Size>"
    "<StorageClass>STANDARD</StorageClass></Contents>"
)
_LISTING = (
    '<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
    "<Name>bucket</Name><Prefix>in/</Prefix><MaxKeys>1000</MaxKeys>"
    "<IsTruncated>{more}</IsTruncated>{token}{objects}</ListBucketResult>"
)


@contextmanager
def listing_server(objects: int) -> Iterator[str]:
    """Gives its address."""
    command = [sys.executable, "-m", "benchmarks.listing_server", str(objects)]
    process = start(command, STUB_CORE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()


def main(objects: int) -> None:
    pages = {first: _page(first, objects) for first in range(0, objects, PAGE)}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            query = parse_qs(urlparse(self.path).query)
            page = pages[int(query.get("continuation-token", ["0"])[0])]
            self.send_response(200)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(page)))
            self.end_headers()
            self.wfile.write(page)

        def log_message(self, format: str, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    sys.stdout.write(f"http://127.0.0.1:{server.server_port}\n")
    sys.stdout.flush()
    server.serve_forever()


def _page(first: int, objects: int) -> bytes:
    last = min(first + PAGE, objects)
    token = "" if last == objects else f"<NextContinuationToken>{last}</NextContinuationToken>"
    listed = "".join(_OBJECT.format(number) for number in range(first, last))
    more = "true" if token else "false"
    return _LISTING.format(more=more, token=token, objects=listed).encode()


if __name__ == "__main__":
    main(int(sys.argv[1]))
