"""The engine of a task: a channel to each endpoint of its model, shared with other runs."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelcall_assets.config.endpoint import Address, Endpoint
from modelcall_assets.config.model import BatchConfig, ModelConfig
from modelcall_assets.llm.channel import Channel, Lease, Limits
from modelcall_assets.llm.classify import Patience
from modelcall_assets.llm.engine import Engine
from modelcall_assets.llm.transport import DirectTransport, HttpTransport

if TYPE_CHECKING:
    from modelcall_assets.llm.batch import BatchClient


def engine_of(
    endpoints: Sequence[Endpoint], model: ModelConfig, most: int, patience: Patience
) -> Engine:
    """To be entered; `most` requests are in flight."""
    by_batches = model.mode == "batch"

    def collector(name: str) -> BatchClient | None:
        named = (endpoint for endpoint in endpoints if endpoint.name == name)
        return next((_batches(endpoint, model.batch) for endpoint in named), None)

    return Engine(
        [_channel(endpoint, most, leased=not by_batches) for endpoint in endpoints],
        max_in_flight=most,
        max_retries=endpoints[0].max_retries,
        patience=patience,
        batches=_batches(endpoints[0], model.batch) if by_batches else None,
        collector=collector,
    )


def _channel(endpoint: Endpoint, most: int, *, leased: bool) -> Channel:
    limits = Limits(
        endpoint.max_in_flight or most, endpoint.requests_per_minute, endpoint.tokens_per_minute
    )
    lease = Lease(_lease_folder(endpoint), limits.max_in_flight) if leased else None
    return Channel(_transport(endpoint), limits, lease)


def _transport(endpoint: Endpoint) -> HttpTransport:
    kind = DirectTransport
    if endpoint.transport == "sdk":
        from modelcall_assets.llm.sdk_transport import SdkTransport

        kind = SdkTransport
    return kind(**_where(endpoint))


def _batches(endpoint: Endpoint, config: BatchConfig) -> BatchClient:
    from modelcall_assets.llm.batch import BatchClient

    return BatchClient(
        **_where(endpoint),
        completion_window=config.completion_window,
        most_requests=config.max_requests_per_file,
        poll_s=config.poll_seconds,
        max_retries=endpoint.max_retries,
    )


def _where(endpoint: Endpoint) -> dict[str, Any]:
    """What a transport is made from."""
    return {each.name: getattr(endpoint, each.name) for each in fields(Address)}


def _lease_folder(endpoint: Endpoint) -> Path:
    """One per user and endpoint of this machine; the name holds nothing secret."""
    digest = hashlib.sha256(f"{endpoint.name} {endpoint.base_url}".encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"modelcall-{os.getuid()}" / digest
