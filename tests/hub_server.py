"""A Hub on this machine: data sets of a folder `<org>/<name>/…`, as `huggingface_hub` asks for them
where HF_ENDPOINT is its address."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import orjson


class Hub:
    """`asked` are the requests; files called as in `refused` are not given."""

    def __init__(self, root: Path) -> None:
        self.root, self.asked, self.refused = root, list[str](), set[str]()
        self.url = ""

    def files(self, dataset: str) -> dict[str, bytes]:
        folder = self.root / dataset
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}

    def commit(self, dataset: str) -> str:
        return hashlib.sha1(repr(self.files(dataset)).encode()).hexdigest()

    def downloads(self) -> list[str]:
        """The files whose content was asked for."""
        return [each.split("/", 6)[-1] for each in self.asked if each.startswith("GET /datasets/")]

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        match path.strip("/").split("/"):
            case ["api", "datasets", org, name, "revision", _]:
                dataset = f"{org}/{name}"
                if files := self.files(dataset):
                    named = [{"rfilename": file} for file in files]
                    return 200, {}, self._json(dataset, siblings=named)
            case ["api", "datasets", org, name, "tree", _]:
                tree = [
                    {"type": "file", "path": path, "oid": _etag(content), "size": len(content)}
                    for path, content in self.files(f"{org}/{name}").items()
                ]
                return 200, {}, orjson.dumps(tree)
            case ["datasets", org, name, "resolve", commit, *parts]:
                content = self.files(f"{org}/{name}").get("/".join(parts))
                if content is not None and parts[-1] not in self.refused:
                    return 200, {"ETag": f'"{_etag(content)}"', "X-Repo-Commit": commit}, content
                return 403 if content is not None else 404, {}, b""
        return 404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "no such data set"}, b""

    def _json(self, dataset: str, **more: Any) -> bytes:
        return orjson.dumps({"id": dataset, "sha": self.commit(dataset), **more})


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@contextmanager
def serve_hub(root: Path) -> Iterator[Hub]:
    hub = Hub(root)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.asked.append(f"{self.command} {path}")
            status, headers, body = hub.answer(path)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield hub
        finally:
            server.shutdown()
