"""Where requests go: base URL and key, checked as text and resolved in an environment."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator

from modelcall_assets.config.block import Text, mistake

_NO_KEY = ("EMPTY", "none", "not-needed")
_KEY = re.compile(rf"\$\{{[A-Za-z_]\w*(:-({'|'.join(_NO_KEY)})?)?\}}")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A resolved base URL with its key; the repr hides what is secret."""

    base_url: str = field(repr=False)
    api_key: str | None = field(repr=False)
    name: str
    """host:port/path, safe to show."""
    timeout_s: float
    max_retries: int


def checked_url(url: str) -> str:
    """The URL without its last slash, or a mistake."""
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and parts.hostname and (parts.port or True)
    except ValueError:
        valid = False
    if not valid:
        raise mistake("not a URL", expected="http(s)://host[:port]/path")
    if url.rstrip("/").endswith("/chat/completions"):
        raise mistake("not the base URL", fix="drop /chat/completions")
    return url.rstrip("/")


def _literal_url(url: str) -> str:
    if "${" in url:
        return url
    if urlsplit(checked_url(url)).password:
        raise mistake("a password in a file", fix="write the URL as ${NAME} and set NAME in .env")
    return url


def _key_reference(key: str) -> str:
    if key in _NO_KEY or _KEY.fullmatch(key):
        return key
    raise mistake(
        "a key in a file",
        expected="a reference such as ${API_KEY}",
        fix="set the variable in .env or in the process environment",
    )


BaseUrl = Annotated[Text, AfterValidator(_literal_url)]
KeyReference = Annotated[Text, AfterValidator(_key_reference)]


def endpoint_name(base_url: str) -> str:
    """host:port/path, without credentials and query."""
    parts = urlsplit(base_url)
    return f"{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"
