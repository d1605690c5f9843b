"""The engine of a task: a channel to each endpoint of its model, shared with other runs."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

from modelcall_assets.config.catalog import TaskSpec
from modelcall_assets.config.endpoint import Endpoint
from modelcall_assets.llm.channel import Channel
from modelcall_assets.llm.engine import Engine
from modelcall_assets.llm.lease import Lease
from modelcall_assets.llm.limiter import Limits
from modelcall_assets.llm.transport import DirectTransport, Transport


def engine_of(spec: TaskSpec) -> Engine:
    """To be entered; SetupError when a key or host is not set."""
    endpoints = spec.endpoints()
    most = spec.task.concurrency.max_concurrent_requests
    return Engine(
        [_channel(endpoint, most) for endpoint in endpoints],
        max_in_flight=most,
        max_retries=endpoints[0].max_retries,
    )


def _channel(endpoint: Endpoint, most: int) -> Channel:
    limits = Limits(
        endpoint.max_in_flight or most, endpoint.requests_per_minute, endpoint.tokens_per_minute
    )
    lease = Lease(_lease_folder(endpoint), limits.max_in_flight)
    return Channel(_transport(endpoint), limits, lease)


def _transport(endpoint: Endpoint) -> Transport:
    kind = DirectTransport
    if endpoint.transport == "sdk":
        from modelcall_assets.llm.sdk_transport import SdkTransport

        kind = SdkTransport
    return kind(
        endpoint.name,
        endpoint.base_url,
        endpoint.api_key,
        endpoint.timeout_s,
        endpoint.headers,
        endpoint.proxy,
        endpoint.ca_file,
    )


def _lease_folder(endpoint: Endpoint) -> Path:
    """One per user and endpoint of this machine; the name holds nothing secret."""
    digest = hashlib.sha256(f"{endpoint.name} {endpoint.base_url}".encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"modelcall-{os.getuid()}" / digest
