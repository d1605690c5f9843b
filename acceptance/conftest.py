"""The fixtures that S3 tests take, with Ceph's gateway for a server."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from conftest import bucket
from s3_server import S3Server

from acceptance.rgw_server import rgw_server

__all__ = ["bucket", "s3_server"]


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A test that kills it starts it again."""
    with rgw_server(tmp_path_factory.mktemp("rgw")) as running:
        yield running
