"""`client_config`: the endpoints of a model, as written and as resolved in an environment."""

from __future__ import annotations

import ssl
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field

from modelcall_assets.config.block import Block, Limit, Text, mistake
from modelcall_assets.config.endpoint import (
    MAX_REPLY_MIB,
    BaseUrl,
    Endpoint,
    Headers,
    KeyReference,
    ProxyUrl,
    TransportName,
    checked_header,
    checked_proxy,
    checked_url,
    endpoint_name,
)
from modelcall_assets.config.expand import Expander
from modelcall_assets.config.problems import shown_value
from modelcall_assets.errors import Problem, SetupError
from modelcall_assets.records.secrets import NO_KEY, REFERENCE, in_header, is_secret_header

DEFAULT_TIMEOUT_S = 600.0


class EndpointConfig(Block):
    """One endpoint."""

    base_url: BaseUrl | None = None
    """http(s) URL without `/chat/completions`; may hold `${NAME}`. Else `endpoints` have it."""
    api_key: KeyReference | None = None
    """`${NAME}`; or `EMPTY`, `none`, `not-needed` for a server without keys."""
    headers: Headers = Field(default_factory=dict[str, str])
    """Sent with every request; may hold `${NAME}`, and must where the value is a secret."""
    proxy: ProxyUrl | None = None
    """URL of an HTTP proxy; may hold `${NAME}`. Default: the environment's (`HTTPS_PROXY`)."""
    ca_file: Text | None = None
    """PEM file of the authorities to trust in place of the system's."""
    max_in_flight: Limit = None
    """Most requests at a time at one endpoint."""
    requests_per_minute: Limit = None
    """Most requests in a minute to one endpoint."""
    tokens_per_minute: Limit = None
    """Most tokens in a minute, of prompts and answers, at one endpoint."""


def _some(endpoints: list[EndpointConfig]) -> list[EndpointConfig]:
    if not endpoints:
        raise mistake("empty", expected="one endpoint or more")
    return endpoints


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
    endpoints: Annotated[list[EndpointConfig], AfterValidator(_some)] | None = None
    """Several endpoints of one model; each takes what it leaves out from the fields above."""


@dataclass(frozen=True)
class Place:
    """An endpoint in its file, with the fields it has from `client_config`."""

    own: EndpointConfig
    shared: ClientConfig
    block: str
    """Where its own fields stand in the file, with a dot behind; the next is the same."""
    shared_block: str

    def effective(self) -> EndpointConfig:
        """With the fields it leaves out filled in."""
        given = {name: getattr(self.own, name) for name in self.own.model_fields_set}
        inherited = {name: getattr(self.shared, name) for name in EndpointConfig.model_fields}
        return EndpointConfig.model_construct(**inherited | given)

    def field(self, name: str) -> str:
        """Where the effective value of a field stands."""
        return (self.block if name in self.own.model_fields_set else self.shared_block) + name


def places(client: ClientConfig, block: str) -> list[Place]:
    """Every endpoint, in the order of the file."""
    if client.endpoints is None:
        return [Place(client, client, block, block)]
    return [
        Place(own, client, f"{block}endpoints[{number}].", block)
        for number, own in enumerate(client.endpoints)
    ]


def client_problems(client: ClientConfig, block: str, file: str) -> Iterator[Problem]:
    """Endpoints without an address, and one that is there twice."""
    found: dict[tuple[object, ...], Place] = {}
    for place in places(client, block):
        endpoint = place.effective()
        if endpoint.base_url is None:
            fix = f"add `base_url:` ({EndpointConfig.model_fields['base_url'].description})"
            yield Problem(file, f"{place.block}base_url", "missing", fix=fix)
            continue
        headers = tuple(sorted(endpoint.headers.items()))
        account = (endpoint.base_url.rstrip("/"), endpoint.api_key, headers)
        first = found.setdefault(account, place)
        if first is not place:
            wrong = f"the endpoint of {first.block.rstrip('.')} again, with the same key"
            fix = "remove one of them, or give it another key"
            yield Problem(file, place.block.rstrip("."), wrong, fix=fix)


@dataclass
class Resolver(Expander):
    """Fills in a model's endpoints; what is wrong goes to `problems`."""

    root: Path

    def endpoints(
        self, found: list[Place], timeout_s: float | None, max_retries: int | None
    ) -> tuple[Endpoint, ...]:
        """One per place; SetupError with the problems of all."""
        resolved = [self._endpoint(place, timeout_s, max_retries) for place in found]
        if self.problems:
            raise SetupError(list(dict.fromkeys(self.problems)))
        return tuple(_named(resolved))

    def _endpoint(self, place: Place, timeout_s: float | None, max_retries: int | None) -> Endpoint:
        config, client = place.effective(), place.shared
        base_url = self.text(place.field("base_url"), config.base_url, checked_url) or ""
        api_key = self.text(place.field("api_key"), config.api_key, checked_header)
        headers = {
            name: self.text(f"{place.field('headers')}.{name}", value, checked_header) or ""
            for name, value in config.headers.items()
        }
        secrets, private = list[str](), list[str]()
        for name, value in config.headers.items():
            if REFERENCE.search(value):
                is_secret = is_secret_header(name, value, headers[name])
                (secrets if is_secret else private).extend(in_header(headers[name]))
        if urlsplit(base_url).username and api_key not in (None, *NO_KEY):
            wrong = "the URL names a user, and there is an api_key too: a request takes one of them"
            self.problems.append(Problem(self.file, place.field("base_url"), wrong))
        return Endpoint(
            base_url,
            api_key,
            endpoint_name(base_url),
            client.timeout or timeout_s or DEFAULT_TIMEOUT_S,
            client.max_retries if max_retries is None else max_retries,
            client.transport,
            headers,
            self.text(place.field("proxy"), config.proxy, checked_proxy),
            self._ca_file(place.field("ca_file"), config.ca_file),
            client.max_reply_mib,
            config.max_in_flight,
            config.requests_per_minute,
            config.tokens_per_minute,
            tuple(secrets),
            tuple(private),
        )

    def _ca_file(self, place: str, text: str | None) -> str | None:
        path = self.text(place, text, str)
        if path is None:
            return None
        path = str(self.root / path)
        try:
            ssl.create_default_context(cafile=path)
        except ssl.SSLError:
            wrong = "no certificates in PEM form"
        except OSError as error:
            wrong = "no such file" if isinstance(error, FileNotFoundError) else str(error.strerror)
        else:
            return path
        have = shown_value(text, place)
        self.problems.append(Problem(self.file, place, wrong, have=have))
        return None


def _named(endpoints: list[Endpoint]) -> Iterator[Endpoint]:
    """With #2, #3 behind a name that is there already."""
    seen = Counter[str]()
    for endpoint in endpoints:
        seen[endpoint.name] += 1
        count = seen[endpoint.name]
        yield endpoint if count == 1 else replace(endpoint, name=f"{endpoint.name}#{count}")
