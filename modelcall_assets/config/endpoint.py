"""Where requests go: what a model file may say of it as text, and one endpoint resolved."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator

from modelcall_assets.config.block import Text, mistake
from modelcall_assets.records.secrets import (
    NO_KEY,
    REFERENCE,
    has_password,
    is_reference,
    looks_secret,
    names_secret,
)

TransportName = Literal["direct", "sdk"]

MAX_REPLY_MIB = 64
"""The largest reply, unless the model file says otherwise."""
_NOT_IN_URLS = re.compile(r"[^!-~]")
_LABEL = re.compile(r"[A-Za-z0-9_-]{1,63}")
_LONGEST_HOST = 254
_HEADER_NAME = re.compile(r"[A-Za-z0-9_-]+")
_OWN_HEADERS = frozenset(
    {"connection", "content-encoding", "content-length", "content-type", "transfer-encoding"}
)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A resolved base URL with its key and limits; the repr hides what is secret."""

    base_url: str = field(repr=False)
    api_key: str | None = field(repr=False)
    name: str
    """host:port/path, safe to show; no other endpoint of the model has it."""
    timeout_s: float
    max_retries: int
    transport: TransportName = "direct"
    headers: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)
    proxy: str | None = field(default=None, repr=False)
    """None: the one of the process environment, if any."""
    ca_file: str | None = None
    """Absolute path."""
    max_reply_mib: int = MAX_REPLY_MIB
    max_in_flight: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    secrets: tuple[str, ...] = field(default=(), repr=False)
    """Of the headers that come from the environment."""
    private: tuple[str, ...] = field(default=(), repr=False)
    """Of these headers, what has neither the name nor the shape of a secret."""


def checked_url(url: str) -> str:
    """The URL without its last slash, or a mistake."""
    _check_http(url, "not a URL", "http(s)://host[:port]/path")
    if url.rstrip("/").endswith("/chat/completions"):
        raise mistake("not the base URL", fix="drop /chat/completions")
    return url.rstrip("/")


def checked_proxy(url: str) -> str:
    """The URL of an HTTP proxy, or a mistake."""
    _check_http(url, "not the URL of an HTTP proxy", "http(s)://host:port")
    return url


def checked_header(value: str) -> str:
    """The value of a header, or a mistake."""
    if not (value.isascii() and value.isprintable()):
        raise mistake("a character that no header can carry, such as a line break")
    return value


def is_header_reference(value: str) -> bool:
    """`${NAME}`, or a scheme and `${NAME}`."""
    scheme, _, key = value.rpartition(" ")
    return is_reference(key, ("", *NO_KEY)) and (not scheme or scheme.isalpha())


def holds_literal_secret(name: str, value: str) -> bool:
    """Whether a header has in the file what belongs into the environment."""
    is_named = names_secret(name, of_anyone=True) and not is_header_reference(value)
    return is_named or looks_secret(value)


def _check_http(url: str, wrong: str, expected: str) -> None:
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        valid = False
    if not valid:
        raise mistake(wrong, expected=expected)
    if _NOT_IN_URLS.search(url):
        fix = "write it percent-encoded, a space as %20, and in the name of a host as xn--…"
        raise mistake("a character that no URL can hold, such as a space or an accent", fix=fix)
    host = urlsplit(url).hostname or ""
    labels = host.removesuffix(".").split(".")
    if ":" not in host and not (len(host) <= _LONGEST_HOST and all(map(_LABEL.fullmatch, labels))):
        expected = "up to 63 letters, digits, - and _ between two dots"
        raise mistake(f"{host[:80]!r} cannot be the name of a host", expected=expected)


def without_password(url: str) -> str:
    """The URL, or a mistake where it holds a password or a key."""
    if has_password(url):
        raise mistake("a password in a file", fix="write the URL as ${NAME} and set NAME in .env")
    return url


def _literal_url(url: str) -> str:
    if not REFERENCE.search(url):
        without_password(checked_url(url))
    return url


def _literal_proxy(url: str) -> str:
    return url if REFERENCE.search(url) else without_password(checked_proxy(url))


def _key_reference(key: str) -> str:
    if key in NO_KEY or is_reference(key, ("", *NO_KEY)):
        return key
    raise mistake(
        "a key in a file",
        expected="a reference such as ${API_KEY}",
        fix="set the variable in .env or in the process environment",
    )


def _nothing(headers: Any) -> Any:
    return {} if headers is None else headers


def _headers(headers: dict[str, str]) -> dict[str, str]:
    seen = set[str]()
    for name, value in headers.items():
        if not _HEADER_NAME.fullmatch(name):
            raise mistake(f"{name!r} is no name of a header", expected="letters, digits, - and _")
        if name.lower() in _OWN_HEADERS:
            raise mistake(f"{name} cannot be set", fix="remove it")
        if name.lower() in seen:
            raise mistake(f"{name} is there twice", fix="remove one")
        seen.add(name.lower())
        if holds_literal_secret(name, value):
            raise mistake(
                f"a secret in a file: {name}",
                expected="a reference such as ${API_KEY} or Bearer ${API_KEY}",
                fix="set the variable in .env or in the process environment",
            )
        checked_header(value)
    return headers


BaseUrl = Annotated[Text, AfterValidator(_literal_url)]
KeyReference = Annotated[Text, AfterValidator(_key_reference)]
ProxyUrl = Annotated[Text, AfterValidator(_literal_proxy)]
Headers = Annotated[dict[str, Text], BeforeValidator(_nothing), AfterValidator(_headers)]


def endpoint_name(base_url: str) -> str:
    """host:port/path, without credentials and query."""
    parts = urlsplit(base_url)
    return f"{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"
