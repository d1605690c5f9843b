"""A sensor that looks at a long listing of a store page by page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing

import dagster as dg
import pytest
from botocore.client import BaseClient
from project import Project
from s3_server import S3Server

NAMES = ["a/1.jsonl", "a/2.jsonl", "b,c.jsonl", "é.jsonl", "z.jsonl"]


@pytest.fixture
def client(project: Project, s3_server: S3Server, bucket: str) -> Iterator[BaseClient]:
    """Of the store that the task's input is in, listed by two objects a page."""
    (project.root / ".env").write_text(
        f"AWS_ACCESS_KEY_ID={s3_server.key}\nAWS_SECRET_ACCESS_KEY={s3_server.secret}\n"
        f"AWS_ENDPOINT_URL={s3_server.endpoint}\nAWS_REGION={s3_server.region}\n"
    )
    project.write_task(
        {"data": {"input_folder": f"s3://{bucket}/in"}, "concurrency": {"files_per_run": 1}}
    )
    with closing(s3_server.client()) as client:
        put(client, bucket, NAMES)
        yield client


def put(client: BaseClient, bucket: str, names: Sequence[str], text: str = "x") -> None:
    for name in names:
        client.put_object(Bucket=bucket, Key=f"in/{name}", Body=b'{"text": "%b"}' % text.encode())


@pytest.fixture
def looks(project: Project, client: BaseClient) -> Looks:
    return Looks(project)


class Looks:
    """One look of the sensor after another."""

    def __init__(self, project: Project) -> None:
        self._project, self._cursor = project, ""

    def once(self) -> dg.SensorResult | dg.SkipReason:
        result, self._cursor = self._project.look(self._cursor, page_files=2)
        if isinstance(result, dg.SensorResult):
            for request in result.dynamic_partitions_requests or ():
                keys = list(request.partition_keys)
                name = request.partitions_def_name
                for key in keys:
                    self._project.instance.delete_dynamic_partition(name, key)
        return result

    def lose_cursor(self) -> None:
        self._cursor = ""

    def round(self) -> list[list[str]]:
        """Until it begins again: the keys that each look launches."""
        launched: list[list[str]] = []
        while not launched or ('"after": ""' not in self._cursor and self._cursor):
            result = self.once()
            requests = result.run_requests or () if isinstance(result, dg.SensorResult) else ()
            launched.append([request.partition_key or "" for request in requests])
        return launched


def test_every_page_is_looked_at_in_turn(looks: Looks) -> None:
    assert looks.round() == [["a/1.jsonl", "a/2.jsonl"], ["b%2Cc.jsonl", "z.jsonl"], ["é.jsonl"]]


def test_what_is_settled_is_only_listed(
    looks: Looks, project: Project, client: BaseClient, bucket: str
) -> None:
    looks.round()
    for key in ("a/1.jsonl", "a/2.jsonl", "b%2Cc.jsonl", "z.jsonl", "é.jsonl"):
        job = project.definitions().resolve_implicit_global_asset_job_def()
        assets = [dg.AssetKey(["rate", "raw"])]
        job.execute_in_process(partition_key=key, instance=project.instance, asset_selection=assets)
    looks.lose_cursor()
    assert looks.round() == [[], [], []]
    settled = project.steps().layout.settled_path
    assert b"z.jsonl" in settled.read_bytes()
    results = [looks.once() for _ in range(3)]
    assert all(isinstance(result, dg.SkipReason) for result in results), results
    put(client, bucket, ["b,c.jsonl"], "changed")
    put(client, bucket, ["n.jsonl"])
    assert looks.round() == [[], ["b%2Cc.jsonl", "n.jsonl"], [], []]
    settled.unlink()
    looks.lose_cursor()
    client.delete_object(Bucket=bucket, Key="in/z.jsonl")
    observed = [
        event.partition
        for _ in range(6)
        if isinstance(result := looks.once(), dg.SensorResult)
        for event in result.asset_events
    ]
    assert set(observed) == {"z.jsonl"}
