"""A Hub on this machine: data sets of a folder `<org>/<name>/…`, as `huggingface_hub` asks for them
and commits to them where HF_ENDPOINT is its address."""

from __future__ import annotations

import hashlib
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import orjson
import yaml

Answer = tuple[int, dict[str, str], bytes]


class Hub:
    """`asked` are the requests; files called as in `refused` are not given. Who writes must have
    the `token`; `faults` are statuses that writing requests get first, by a part of their path."""

    def __init__(self, root: Path) -> None:
        self.root, self.asked, self.refused = root, list[str](), set[str]()
        self.url, self.token = "", "hf_tokenoftests0"
        self.faults, self.uploaded = dict[str, list[int]](), dict[str, bytes]()
        self.created = dict[str, Any]()
        """What was asked for when a data set was made."""

    def folder(self, dataset: str, revision: str = "main") -> Path:
        """A branch lies beside the main one, which has all commits too."""
        branch = self.root / f"{dataset}@{revision}"
        return branch if branch.is_dir() else self.root / dataset

    def files(self, dataset: str, revision: str = "main") -> dict[str, bytes]:
        folder = self.folder(dataset, revision)
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}

    def commit(self, dataset: str, revision: str = "main") -> str:
        return hashlib.sha1(repr(self.files(dataset, revision)).encode()).hexdigest()

    def downloads(self) -> list[str]:
        """The files whose content was asked for."""
        return [each.split("/", 6)[-1] for each in self.asked if each.startswith("GET /datasets/")]

    def answer(self, path: str) -> Answer:
        match path.strip("/").split("/"):
            case ["api", "datasets", org, name, *revision]:
                dataset, revision = f"{org}/{name}", revision[1:] or ["main"]
                if path.split("/")[5:6] == ["tree"]:
                    return 200, {}, orjson.dumps(self._tree(dataset, revision[0]))
                if self.folder(dataset).is_dir():
                    named = [{"rfilename": file} for file in self.files(dataset, *revision)]
                    sha = self.commit(dataset, *revision)
                    return 200, {}, orjson.dumps({"id": dataset, "sha": sha, "siblings": named})
            case ["datasets", org, name, "resolve", commit, *parts]:
                content = self.files(f"{org}/{name}").get("/".join(parts))
                if content is not None and parts[-1] not in self.refused:
                    return 200, {"ETag": f'"{_etag(content)}"', "X-Repo-Commit": commit}, content
                return 403 if content is not None else 404, {}, b""
        return 404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "no such data set"}, b""

    def _tree(self, dataset: str, revision: str) -> list[dict[str, Any]]:
        return [
            {"type": "file", "path": path, "oid": _etag(content), "size": len(content)}
            for path, content in self.files(dataset, revision).items()
        ]

    def take(self, path: str, token: str, body: bytes) -> Answer:
        """What is written. Large files go to an address that needs no token, as in the Hub's own
        store."""
        for part, statuses in self.faults.items():
            if part in path and statuses:
                return statuses.pop(0), {}, b'{"error": "a fault"}'
        parts = path.strip("/").split("/")
        if parts[0] == "lfs":
            is_whole = hashlib.sha256(body).hexdigest() == parts[1]
            self.uploaded |= {parts[1]: body} if is_whole else {}
            return 200 if is_whole else 400, {}, b""
        if token != f"Bearer {self.token}":
            return 401, {}, b'{"error": "Invalid credentials"}'
        match parts:
            case ["api", "datasets", org, name, "commit", revision]:
                return self._committed(f"{org}/{name}", revision, body)
            case _:
                status, told = self._told(parts, orjson.loads(body))
                return status, {}, orjson.dumps(told)

    def _told(self, parts: list[str], asked: Any) -> tuple[int, Any]:
        match parts:
            case ["api", "repos", "create"]:
                dataset = f"{asked['organization']}/{asked['name']}"
                status = 409 if self.folder(dataset).is_dir() else 200
                if status == 200:
                    self.created = asked
                    self.folder(dataset).mkdir(parents=True)
                return status, {"url": f"{self.url}/datasets/{dataset}"}
            case ["api", "datasets", org, name, "branch", branch]:
                (self.root / org / f"{name}@{branch}").mkdir()
                return 200, {}
            case ["api", "validate-yaml"]:
                yaml.safe_load(asked["content"].split("---")[1])
                return 200, {"errors": [], "warnings": []}
            case ["api", "datasets", _, _, "preupload", _]:
                modes = {True: "lfs", False: "regular"}
                files = (file["path"] for file in asked["files"])
                told = [
                    {"path": path, "uploadMode": modes[path.endswith(".parquet")]} for path in files
                ]
                return 200, {"files": [{**each, "shouldIgnore": False} for each in told]}
            case ["datasets", _, _, "info", "lfs", "objects", "batch"]:
                return 200, {
                    "objects": [
                        each | {"actions": {"upload": {"href": f"{self.url}/lfs/{each['oid']}"}}}
                        for each in asked["objects"]
                    ]
                }
        return 404, {"error": "no such address"}

    def _committed(self, dataset: str, revision: str, body: bytes) -> Answer:
        head, *changes = map(orjson.loads, body.splitlines())
        if head["value"]["parentCommit"] != self.commit(dataset, revision):
            return 412, {}, b'{"error": "a commit has happened since"}'
        folder = self.folder(dataset, revision)
        for change in changes:
            of = change["value"]
            path = folder / of["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            match change["key"]:
                case "file":
                    path.write_bytes(b64decode(of["content"]))
                case "lfsFile":
                    path.write_bytes(self.uploaded[of["oid"]])
                case "deletedFile":
                    path.unlink()
        commit = self.commit(dataset, revision)
        url = f"{self.url}/datasets/{dataset}/commit/{commit}"
        return 200, {}, orjson.dumps({"commitUrl": url, "commitOid": commit})


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@contextmanager
def serve_hub(root: Path) -> Iterator[Hub]:
    hub = Hub(root)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._say(*hub.answer(self._asked()))

        def do_POST(self) -> None:
            path, token = self._asked(), self.headers.get("Authorization", "")
            self._say(*hub.take(path, token, self._body()))

        do_HEAD = do_GET
        do_PUT = do_POST

        def _asked(self) -> str:
            path = unquote(urlsplit(self.path).path)
            hub.asked.append(f"{self.command} {path}")
            return path

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            found = b""
            while size := int(self.rfile.readline(), 16):
                found += self.rfile.read(size + 2)[:-2]
            self.rfile.readline()
            return found

        def _say(self, status: int, headers: dict[str, str], body: bytes) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield hub
        finally:
            server.shutdown()
