"""TOS, the object store of Volcengine and BytePlus: it talks S3 at an endpoint of its own, which
takes buckets in the host name only."""

from __future__ import annotations

import re

REGION = "cn-beijing"
"""The default one."""
_HOST = re.compile(
    r"(?P<scheme>https?://)?(?:[a-z0-9-]+\.)?tos-(?P<s3>s3-)?(?P<region>[a-z0-9-]+)"
    r"\.(?P<domain>i?(?:volces|bytepluses)\.com)/?",
    re.I,
)


def s3_endpoint(text: str) -> str:
    """The S3 endpoint of a TOS host, with or without scheme and bucket; other text as it is."""
    host = _HOST.fullmatch(text)
    if host is None:
        return text
    scheme = (host["s3"] and host["scheme"]) or "https://"
    return f"{scheme}tos-s3-{host['region']}.{host['domain']}".lower()


def region_of(endpoint: str) -> str | None:
    """The region that a TOS host names."""
    host = _HOST.fullmatch(endpoint)
    return host["region"].lower() if host else None


def endpoint_in(region: str) -> str:
    """The public S3 endpoint of a region."""
    return f"https://tos-s3-{region}.volces.com"
