"""`modelcall ui` as a user starts it, and what its page asks and is told."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import orjson
from project import until

COMMAND = (sys.executable, "-m", "modelcall", "ui")
LOCATION = {"repositoryName": "__repository__", "repositoryLocationName": "modelcall"}
POLL_S = 0.25


@dataclass
class Dev:
    """`modelcall ui` in a project's folder. Its processes are known by their DAGSTER_HOME, which is
    of this test alone."""

    root: Path
    base_url: str
    process: subprocess.Popen[bytes] | None = None
    port: int = 0

    @property
    def home(self) -> Path:
        return self.root / "dagster_home"

    @property
    def log_file(self) -> Path:
        return self.root / "ui.log"

    def start(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                [*COMMAND, "--port", str(self.port)],
                cwd=self.root,
                env={
                    **os.environ,
                    "DAGSTER_HOME": str(self.home),
                    "REHEARSAL_BASE_URL": self.base_url,
                },
                stdout=log,
                stderr=log,
                start_new_session=True,
                # A terminal's own, where the tests run under nohup too.
                preexec_fn=partial(signal.signal, signal.SIGHUP, signal.SIG_DFL),
            )
        until(self._serves, 90, POLL_S)

    def _serves(self) -> bool:
        assert self.process is not None and self.process.poll() is None, self.log()
        with suppress(OSError, http.client.HTTPException):
            entries = self.ask("{workspaceOrError {... on Workspace {locationEntries {name}}}}")
            return entries["workspaceOrError"] == {"locationEntries": [{"name": "modelcall"}]}
        return False

    def log(self) -> str:
        return self.log_file.read_text(errors="replace")[-8000:]

    def processes(self) -> list[int]:
        """All of it that lives, run workers included."""
        mark = f"DAGSTER_HOME={self.home}\0".encode()
        found: list[int] = []
        for folder in Path("/proc").iterdir():
            with suppress(OSError):
                if folder.name.isdigit() and mark in (folder / "environ").read_bytes():
                    found.append(int(folder.name))
        return found

    def named(self, word: str) -> list[int]:
        """Those whose command has that word."""
        found: list[int] = []
        for number in self.processes():
            with suppress(OSError):
                words = Path(f"/proc/{number}/cmdline").read_bytes().split(b"\0")
                found += [number] if word.encode() in words else []
        return found

    def stop(self) -> None:
        """SIGTERM, as Ctrl-C would; whatever is left after a while is killed."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=40)
        self.kill()

    def kill(self) -> None:
        """SIGKILL to the whole tree, before any of it can notice."""
        assert self.process is not None
        while alive := self.processes():
            for number in alive:
                with suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=1)
        assert self.process.wait(timeout=5) is not None

    def ask(self, query: str, **variables: Any) -> dict[str, Any]:
        """GraphQL, the UI's own way in."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            body = orjson.dumps({"query": query, "variables": variables})
            connection.request("POST", "/graphql", body, {"Content-Type": "application/json"})
            answer = orjson.loads(connection.getresponse().read())
        finally:
            connection.close()
        assert "errors" not in answer, answer
        return answer["data"]

    def backfill(self, task: str, stages: Sequence[str], keys: Sequence[str]) -> str:
        """What the button in the UI launches; gives its id."""
        answer = self.ask(
            "mutation ($it: LaunchBackfillParams!) {launchPartitionBackfill(backfillParams: $it) {"
            " __typename ... on LaunchBackfillSuccess {backfillId}"
            " ... on PythonError {message}}}",
            it={
                "assetSelection": [{"path": [task, stage]} for stage in stages],
                "partitionNames": list(keys),
            },
        )["launchPartitionBackfill"]
        assert answer["__typename"] == "LaunchBackfillSuccess", answer
        return answer["backfillId"]

    def backfill_status(self, backfill: str) -> str:
        query = "query ($id: String!) {partitionBackfillOrError(backfillId: $id) {"
        query += " ... on PartitionBackfill {status}}}"
        return self.ask(query, id=backfill)["partitionBackfillOrError"]["status"]

    def checked(self, task: str, stage: str = "scores") -> dict[str, list[str]]:
        """Status of the stage's check, as its page shows it → partitions."""
        names = ("succeeded", "failed", "inProgress", "skipped", "executionFailed")
        query = "query ($it: AssetKeyInput!) {assetNodeOrError(assetKey: $it) {... on AssetNode {"
        query += " assetChecksOrError {... on AssetChecks {checks {partitionStatuses {"
        query += " ... on AssetCheckDefaultPartitionStatuses {"
        query += " ".join(f"{name}Partitions" for name in names) + "}" * 8
        node = self.ask(query, it={"path": [task, stage]})["assetNodeOrError"]
        ((check,),) = (node["assetChecksOrError"]["checks"],)
        keys = {name: sorted(check["partitionStatuses"][f"{name}Partitions"]) for name in names}
        return {name: keys[name] for name in names if keys[name]}

    def ticks(self, task: str, limit: int = 50, sensor: str = "files") -> list[dict[str, Any]]:
        """Of the task's sensor, the latest first."""
        query = "query ($of: SensorSelector!, $limit: Int!) {sensorOrError(sensorSelector: $of) {"
        query += " ... on Sensor {sensorState {ticks(limit: $limit) {"
        query += "tickId status skipReason runIds timestamp error {message}}}}}}"
        of = {**LOCATION, "sensorName": f"{task}_{sensor}"}
        return self.ask(query, of=of, limit=limit)["sensorOrError"]["sensorState"]["ticks"]

    def reason(self, task: str) -> str:
        """Why the latest tick of the task's sensor launched nothing."""
        return self.ticks(task, 1)[0]["skipReason"] or ""

    def lose_cursor(self, task: str) -> None:
        query = "mutation ($of: SensorSelector!, $to: String) {"
        query += "setSensorCursor(sensorSelector: $of, cursor: $to) {__typename}}"
        sensor = {**LOCATION, "sensorName": f"{task}_files"}
        answer = self.ask(query, of=sensor, to="")
        assert answer["setSensorCursor"]["__typename"] == "Sensor", answer

    def reload(self) -> None:
        query = 'mutation {reloadRepositoryLocation(repositoryLocationName: "modelcall") {'
        query += "__typename ... on WorkspaceLocationEntry {loadStatus locationOrLoadError {"
        query += "__typename ... on PythonError {message}}}}}"
        answer = self.ask(query)["reloadRepositoryLocation"]
        entry = answer.get("locationOrLoadError") or {}
        assert entry.get("__typename") == "RepositoryLocation", answer

    def staleness(self, task: str, key: str) -> dict[str, tuple[str, list[str]]]:
        """Status and causes per stage, as the asset page asks for them."""
        paths = [
            node["assetKey"]["path"]
            for node in self.ask("{assetNodes {assetKey {path} isPartitioned}}")["assetNodes"]
            if node["isPartitioned"] and node["assetKey"]["path"][0] == task
        ]
        query = "query ($key: String!, $of: [AssetKeyInput!]) {assetNodes(assetKeys: $of) {assetKey"
        query += " {path} staleStatus(partition: $key) staleCauses(partition: $key) {reason}}}"
        nodes = self.ask(query, key=key, of=[{"path": path} for path in paths])["assetNodes"]
        return {
            node["assetKey"]["path"][1]: (
                node["staleStatus"],
                [cause["reason"] for cause in node["staleCauses"]],
            )
            for node in nodes
        }
