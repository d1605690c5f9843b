"""The fixtures of the tests; those of S3 tests take Ceph's gateway for a server."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from conftest import bare, bucket, empty_home, project, server
from s3_server import S3Server

from acceptance.rgw_server import rgw_server

__all__ = ["bare", "bucket", "empty_home", "project", "s3_server", "server"]


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A test that kills it starts it again."""
    with rgw_server(tmp_path_factory.mktemp("rgw")) as running:
        yield running
