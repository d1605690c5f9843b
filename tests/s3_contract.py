"""What our storage relies upon, asked of a real S3 server over real connections. Tests of each such
server take these as their own."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from threading import Barrier
from typing import Any

import pytest
import s3fs
from botocore.exceptions import ClientError, EndpointConnectionError
from s3_server import S3Server

CREATORS = 16
PART = b"p" * (5 << 20)
"""The smallest that may have another one after it."""


@pytest.fixture
def s3(s3_server: S3Server) -> Iterator[Any]:
    with closing(s3_server.client()) as client:
        yield client


def keys(s3: Any, bucket: str, prefix: str = "") -> list[str]:
    listed = s3.list_objects_v2(Bucket=bucket, Prefix=prefix)
    return [entry["Key"] for entry in listed.get("Contents", ())]


def content(s3: Any, bucket: str, key: str) -> bytes:
    return s3.get_object(Bucket=bucket, Key=key)["Body"].read()


def refusal(caught: pytest.ExceptionInfo[ClientError]) -> tuple[int, str]:
    response = caught.value.response
    return response["ResponseMetadata"]["HTTPStatusCode"], response["Error"]["Code"]


def test_objects_come_and_go(s3, bucket):
    names = ["a.jsonl", "deep/b.jsonl", "deep/er/é 雪+&=%.jsonl"]
    for name in names:
        s3.put_object(Bucket=bucket, Key=name, Body=name.encode())
    assert keys(s3, bucket) == names
    assert keys(s3, bucket, "deep/") == names[1:]
    assert [content(s3, bucket, name) for name in names] == [name.encode() for name in names]
    s3.delete_object(Bucket=bucket, Key=names[0])
    assert keys(s3, bucket) == names[1:]
    with pytest.raises(ClientError) as caught:
        content(s3, bucket, names[0])
    assert refusal(caught) == (404, "NoSuchKey")


def test_an_overwrite_is_seen_at_once(s3, bucket):
    tags = set()
    for number in range(5):
        s3.put_object(Bucket=bucket, Key="a", Body=b"%d" % number)
        assert content(s3, bucket, "a") == b"%d" % number
        tags.add(s3.list_objects_v2(Bucket=bucket)["Contents"][0]["ETag"])
    assert len(tags) == 5


def test_a_missing_bucket_is_told_from_a_missing_key(s3):
    with pytest.raises(ClientError) as caught:
        s3.get_object(Bucket="never-made", Key="a")
    assert refusal(caught) == (404, "NoSuchBucket")


def test_a_wrong_secret_is_refused(s3_server, bucket):
    with closing(s3_server.client(aws_secret_access_key="wrong")) as stranger:
        for ask in (
            lambda: stranger.list_objects_v2(Bucket=bucket),
            lambda: stranger.put_object(Bucket=bucket, Key="a", Body=b"mine"),
        ):
            with pytest.raises(ClientError) as caught:
                ask()
            assert refusal(caught) == (403, "SignatureDoesNotMatch")


def test_what_is_there_is_not_created_again(s3, bucket):
    s3.put_object(Bucket=bucket, Key="a", Body=b"first", IfNoneMatch="*")
    with pytest.raises(ClientError) as caught:
        s3.put_object(Bucket=bucket, Key="a", Body=b"second", IfNoneMatch="*")
    assert refusal(caught) == (412, "PreconditionFailed")
    assert content(s3, bucket, "a") == b"first"


def test_one_of_many_creators_wins(s3_server, s3, bucket):
    """A server such as Swift looks whether the object is there only as a creator begins: all who
    begin before the first one ends win then, and one of them keeps its content."""
    together = Barrier(CREATORS)

    def create(number: int) -> bool:
        together.wait()
        try:
            s3.put_object(Bucket=bucket, Key="a", Body=bytes([number]) * 100_000, IfNoneMatch="*")
        except ClientError as exc:
            assert exc.response["Error"]["Code"] == "PreconditionFailed"
            return False
        return True

    with ThreadPoolExecutor(CREATORS) as pool:
        winners = [number for number, won in enumerate(pool.map(create, range(CREATORS))) if won]
    assert content(s3, bucket, "a") in [bytes([number]) * 100_000 for number in winners]
    if s3_server.creates_once:
        assert len(winners) == 1


def test_a_multipart_upload_is_invisible_until_it_is_complete(s3, bucket):
    s3.put_object(Bucket=bucket, Key="old", Body=b"old")
    for key in ("old", "new"):
        upload = {"Bucket": bucket, "Key": key}
        upload["UploadId"] = s3.create_multipart_upload(**upload)["UploadId"]
        parts = []
        for number, body in enumerate((PART, b"end"), 1):
            tag = s3.upload_part(**upload, PartNumber=number, Body=body)["ETag"]
            parts.append({"PartNumber": number, "ETag": tag})
        assert keys(s3, bucket) == ["old"]
        assert key == "new" or content(s3, bucket, key) == b"old"
        s3.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts})
        assert content(s3, bucket, key) == PART + b"end"
    assert keys(s3, bucket) == ["new", "old"]


def test_data_survives_a_kill(s3_server, s3, bucket):
    s3.put_object(Bucket=bucket, Key="deep/a", Body=b"kept")
    s3_server.kill()
    try:
        with pytest.raises(EndpointConnectionError):
            content(s3, bucket, "deep/a")
    finally:
        s3_server.start()
    assert content(s3, bucket, "deep/a") == b"kept"
    assert keys(s3, bucket) == ["deep/a"]
    s3.put_object(Bucket=bucket, Key="deep/b", Body=b"new")
    assert keys(s3, bucket) == ["deep/a", "deep/b"]


def test_s3fs_reads_what_it_wrote(s3_server, bucket):
    fs = s3fs.S3FileSystem(**s3_server.storage_options)
    fs.pipe_file(f"{bucket}/deep/a", b"one")
    with fs.open(f"{bucket}/deep/b", "wb") as file:
        file.write(b"two")
    assert fs.find(bucket) == [f"{bucket}/deep/a", f"{bucket}/deep/b"]
    assert [fs.cat_file(path) for path in fs.find(bucket)] == [b"one", b"two"]
    fs.rm(f"{bucket}/deep", recursive=True)
    assert not fs.exists(f"{bucket}/deep")
