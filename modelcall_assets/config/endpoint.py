"""`client_config`: the endpoints of a model, as written and as resolved in an environment."""

import os
import re
import ssl
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field

from modelcall_assets.config import OR_EMPTY, Block, Limit, Text, mistake, must, shown_value
from modelcall_assets.config.files import Check, Expander
from modelcall_assets.errors import Problem, SetupError
from modelcall_assets.records.secrets import (
    NO_KEY,
    REFERENCE,
    has_password,
    in_header,
    is_reference,
    is_secret_header,
    looks_secret,
    names_secret,
)

TransportName = Literal["direct", "sdk"]

MAX_REPLY_MIB, TIMEOUT_S = 64, 600.0
"""Of a reply and a request, unless the model file says otherwise."""
_NOT_IN_URLS = re.compile(r"[^!-~]")
_LABEL = re.compile(r"[A-Za-z0-9_-]{1,63}")
_HEADER_NAME = re.compile(r"[A-Za-z0-9_-]+")
_OWN_HEADERS = frozenset(
    {"connection", "content-encoding", "content-length", "content-type", "transfer-encoding"}
)
IN_ENV = "set the variable in .env or in the process environment"


def checked_url(url: str) -> str:
    """The URL without its last slash, or a mistake."""
    url = _http(url, "not a URL", "http(s)://host[:port]/path").rstrip("/")
    if url.endswith("/chat/completions"):
        raise mistake("not the base URL", fix="drop /chat/completions")
    return url


def _checked_proxy(url: str) -> str:
    return _http(url, "not the URL of an HTTP proxy", "http(s)://host:port")


def _http(url: str, wrong: str, expected: str) -> str:
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
    if ":" not in host and not (len(host) <= 254 and all(map(_LABEL.fullmatch, labels))):
        expected = "up to 63 letters, digits, - and _ between two dots"
        raise mistake(f"{host[:80]!r} cannot be the name of a host", expected=expected)
    return url


def literal(check: Check) -> AfterValidator:
    """Checks a URL that holds no references; then no password may stand in it."""

    def checked(url: str) -> str:
        if not REFERENCE.search(url) and has_password(check(url)):
            fix = "write the URL as ${NAME} and set NAME in .env"
            raise mistake("a password in a file", fix=fix)
        return url

    return AfterValidator(checked)


def _checked_header(value: str) -> str:
    if not (value.isascii() and value.isprintable()):
        raise mistake("a character that no header can carry, such as a line break")
    return value


def holds_literal_secret(name: str, value: str) -> bool:
    """Whether a header has in the file what belongs into the environment: it may have `${NAME}`
    there, or a scheme and `${NAME}`."""
    scheme, _, key = value.rpartition(" ")
    is_open = is_reference(key, ("", *NO_KEY)) and (not scheme or scheme.isalpha())
    return (names_secret(name, of_anyone=True) and not is_open) or looks_secret(value)


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
            expected = "a reference such as ${API_KEY} or Bearer ${API_KEY}"
            raise mistake(f"a secret in a file: {name}", expected=expected, fix=IN_ENV)
        _checked_header(value)
    return headers


BaseUrl = Annotated[Text, literal(checked_url)]
KeyReference = Annotated[
    Text,
    must(
        lambda key: key in NO_KEY or is_reference(key, ("", *NO_KEY)),
        *("a key in a file", "a reference such as ${API_KEY}", IN_ENV),
    ),
]


class EndpointConfig(Block):
    """One endpoint."""

    base_url: BaseUrl | None = None
    """http(s) URL without `/chat/completions`; may hold `${NAME}`. Else `endpoints` have it."""
    api_key: KeyReference | None = None
    """`${NAME}`; or `EMPTY`, `none`, `not-needed` for a server without keys."""
    headers: Annotated[dict[str, Text], OR_EMPTY, AfterValidator(_headers)] = Field(default={})
    """Sent with every request; may hold `${NAME}`, and must where the value is a secret."""
    proxy: Annotated[Text, literal(_checked_proxy)] | None = None
    """URL of an HTTP proxy; may hold `${NAME}`. Default: the variable HTTPS_PROXY
    (for an endpoint of http:, HTTP_PROXY), in `.env` too, but for hosts in NO_PROXY."""
    ca_file: Text | None = None
    """PEM file of the authorities to trust in place of the system's."""
    max_in_flight: Limit = None
    """Most requests at a time at one endpoint."""
    requests_per_minute: Limit = None
    """Most requests in a minute to one endpoint."""
    tokens_per_minute: Limit = None
    """Most tokens in a minute, of prompts and answers, at one endpoint."""


class ClientConfig(EndpointConfig):
    """The endpoint, or what several have in common."""

    timeout: Annotated[float, Field(gt=0)] | None = None
    """Seconds a request may take; default `environment.timeout` of the task, else 600."""
    max_retries: Annotated[int, Field(ge=0)] = 5
    """Retries after a transport failure."""
    max_reply_mib: Annotated[int, Field(ge=1)] = MAX_REPLY_MIB
    """Largest reply in MiB, as sent and decompressed; a larger one is a `bad_reply`."""
    transport: TransportName = "direct"
    """`direct` is the fast one; `sdk` sends through the openai package."""
    endpoints: (
        Annotated[list[EndpointConfig], must(bool, "empty", "one endpoint or more")] | None
    ) = None
    """Several endpoints of one model; each takes what it leaves out from the fields above."""

    def each(self, block: str) -> Iterator[tuple[EndpointConfig, str, Mapping[str, str]]]:
        """Each endpoint with what it leaves out taken from here; where it stands in the file, which
        has this config in `block`, a name with a dot behind; and where each of its fields does."""
        shared = {name: getattr(self, name) for name in EndpointConfig.model_fields}
        if self.endpoints is None:
            yield self, block, {name: block + name for name in shared}
        for number, own in enumerate(self.endpoints or ()):
            given = {name: getattr(own, name) for name in own.model_fields_set}
            place = f"{block}endpoints[{number}]."
            places = {name: (place if name in given else block) + name for name in shared}
            yield EndpointConfig.model_construct(**shared | given), place, places


def client_problems(client: ClientConfig, block: str, file: str) -> Iterator[Problem]:
    found: dict[tuple[object, ...], str] = {}
    for config, place, _ in client.each(block):
        if config.base_url is None:
            fix = f"add `base_url:` ({EndpointConfig.model_fields['base_url'].description})"
            yield Problem(file, f"{place}base_url", "missing", fix=fix)
            continue
        headers = tuple(sorted(config.headers.items()))
        first = found.setdefault((config.base_url.rstrip("/"), config.api_key, headers), place)
        if first != place:
            wrong = f"the endpoint of {first.rstrip('.')} again, with the same key"
            fix = "remove one of them, or give it another key"
            yield Problem(file, place.rstrip("."), wrong, fix=fix)


@dataclass
class Address:
    """How requests reach an endpoint; the repr hides what is secret."""

    name: str
    """host:port/path, safe to show; no other endpoint of the model has it."""
    base_url: str = field(repr=False)
    api_key: str | None = field(default=None, repr=False)
    timeout_s: float = TIMEOUT_S
    headers: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)
    """A header here wins over one of our own, whatever the case of its name."""
    proxy: str | None = field(default=None, repr=False)
    """None: the one that `env` names, if any."""
    ca_file: str | None = None
    """Absolute path."""
    secrets: tuple[str, ...] = field(default=(), repr=False)
    """Of the headers that come from the environment."""
    max_reply_mib: int = MAX_REPLY_MIB
    private: tuple[str, ...] = field(default=(), repr=False)
    """Of these headers, what has neither the name nor the shape of a secret: an answer may hold it,
    but nothing else."""
    env: Mapping[str, str] = field(default_factory=lambda: os.environ, repr=False, compare=False)


@dataclass
class Endpoint(Address):
    """A resolved endpoint, with what is to be minded there."""

    max_retries: int = 5
    transport: TransportName = "direct"
    max_in_flight: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None


@dataclass
class Resolver(Expander):
    """Fills in a model's endpoints; the file's timeout wins, and `max_retries` over the file's."""

    root: Path = Path()
    """Where a relative `ca_file` starts."""
    timeout_s: float | None = None
    max_retries: int | None = None

    def endpoints(self, client: ClientConfig, block: str) -> tuple[Endpoint, ...]:
        """With #2, #3 behind a name that is there already; SetupError with the problems of all."""
        found: list[Endpoint] = []
        seen = Counter[str]()
        for config, _, places in client.each(block):
            found.append(endpoint := self._endpoint(client, config, places))
            seen[endpoint.name] += 1
            if (count := seen[endpoint.name]) > 1:
                endpoint.name += f"#{count}"
        if self.problems:
            raise SetupError(list(dict.fromkeys(self.problems)))
        return tuple(found)

    def _endpoint(
        self, client: ClientConfig, config: EndpointConfig, places: Mapping[str, str]
    ) -> Endpoint:
        base_url = self.text(places["base_url"], config.base_url, checked_url) or ""
        api_key = self.text(places["api_key"], config.api_key, _checked_header)
        headers = {
            name: self.text(f"{places['headers']}.{name}", value, _checked_header) or ""
            for name, value in config.headers.items()
        }
        secrets, private = list[str](), list[str]()
        for name, value in config.headers.items():
            if REFERENCE.search(value):
                is_secret = is_secret_header(name, value, headers[name])
                (secrets if is_secret else private).extend(in_header(headers[name]))
        url = urlsplit(base_url)
        if url.username and api_key not in (None, *NO_KEY):
            wrong = "the URL names a user, and there is an api_key too: a request takes one of them"
            self.problems.append(Problem(self.file, places["base_url"], wrong))
        return Endpoint(
            f"{url.netloc.rpartition('@')[2]}{url.path.rstrip('/')}",
            base_url,
            api_key,
            client.timeout or self.timeout_s or TIMEOUT_S,
            headers,
            self.text(places["proxy"], config.proxy, _checked_proxy),
            self._ca_file(places["ca_file"], config.ca_file),
            tuple(secrets),
            client.max_reply_mib,
            tuple(private),
            self.env,
            client.max_retries if self.max_retries is None else self.max_retries,
            client.transport,
            config.max_in_flight,
            config.requests_per_minute,
            config.tokens_per_minute,
        )

    def _ca_file(self, place: str, written: str | None) -> str | None:
        text = self.text(place, written)
        if text is None:
            return None
        path = str(self.root / text)
        try:
            ssl.create_default_context(cafile=path)
            return path
        except ssl.SSLError:
            wrong = "no certificates in PEM form"
        except FileNotFoundError:
            wrong = "no such file"
        except OSError as error:
            wrong = str(error.strerror)
        self.problems.append(Problem(self.file, place, wrong, have=shown_value(written, place)))
        return None
