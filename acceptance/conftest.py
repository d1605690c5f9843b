"""The fixtures of the tests; those of S3 tests take Ceph's gateway for a server."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
from conftest import bare, bucket, empty_home, project, server
from playwright.sync_api import Browser, sync_playwright
from s3_server import S3Server

from acceptance.rgw_server import rgw_server

__all__ = ["bare", "browser", "bucket", "empty_home", "project", "s3_server", "server"]
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    if (chromium := shutil.which("chromium") or shutil.which("chromium-browser")) is None:
        pytest.skip("there is no chromium on the PATH")
    with (
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=chromium, args=FLAGS.split()) as browser,
    ):
        yield browser


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A test that kills it starts it again."""
    with rgw_server(tmp_path_factory.mktemp("rgw")) as running:
        yield running
