"""What reaches the stores that a task names: profiles, else variables of its environment."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import urlsplit

from pydantic_core import PydanticCustomError

from modelcall_assets.config import tos
from modelcall_assets.config.environment import Environment
from modelcall_assets.config.expand import Expander
from modelcall_assets.config.paths import is_uri
from modelcall_assets.config.problems import problem_of
from modelcall_assets.config.stores import (
    STORAGE_FILE,
    Storage,
    StoreProfile,
    checked_endpoint,
)
from modelcall_assets.errors import Problem
from modelcall_assets.records.data_files import StoreOptions
from modelcall_assets.records.secrets import REFERENCE, in_url, is_reference

_CONNECT_S, _READ_S = 10, 60
_NOT_AMAZON: Mapping[str, Any] = {
    "signature_version": "s3v4",
    "request_checksum_calculation": "when_required",
    "response_checksum_validation": "when_required",
}
"""Other stores than Amazon's know no newer checksums."""
_HOW = "in .env, in the task's env file or in the process"


def store_options(
    storage: Storage, env: Environment, places: Mapping[str, str], file: str
) -> tuple[tuple[StoreOptions, ...], list[Problem]]:
    """What reaches those of the resolved places that are URIs, the longest prefix first, and what
    is missing. `places` are by their fields in `file`."""
    found: dict[str, StoreOptions] = {}
    problems: list[Problem] = []
    for place_field, place in places.items():
        if not is_uri(place):
            continue
        scheme = place.partition("://")[0]
        name, profile = storage.profile_of(place) or ("", StoreProfile(prefix=f"{scheme}://"))
        if profile.prefix in found:
            continue
        source = (STORAGE_FILE, f"stores.{name}") if name else (file, place_field)
        resolver = _Resolver(env, source[0], source[1], is_profile=bool(name))
        found[profile.prefix] = StoreOptions(
            name or f"no profile in {STORAGE_FILE}",
            profile.prefix,
            profile.filesystem,
            resolver.options(profile),
            tuple(resolver.secrets),
        )
        problems += resolver.problems
    return tuple(sorted(found.values(), key=lambda each: -len(each.prefix))), problems


@dataclass
class _Resolver(Expander):
    """Fills in a profile; what it leaves out is taken from variables of the environment."""

    block: str
    """Where the profile stands in its file; without one, the field that names the store."""
    is_profile: bool
    secrets: list[str] = field(default_factory=list[str], kw_only=True)
    """What options take from the environment."""

    def options(self, profile: StoreProfile) -> dict[str, Any]:
        """Arguments for the file system."""
        own = self._expanded(profile.options, f"{self.block}.options")
        return _joined(self._s3(profile), own) if profile.filesystem == "s3" else own

    def _expanded(self, value: Any, place: str) -> Any:
        """An option, with references replaced however deep they are."""
        if isinstance(value, dict):
            fields = cast("dict[str, Any]", value)
            return {name: self._expanded(v, f"{place}.{name}") for name, v in fields.items()}
        if isinstance(value, list):
            items = cast("list[Any]", value)
            return [self._expanded(v, f"{place}[{number}]") for number, v in enumerate(items)]
        if not isinstance(value, str) or not REFERENCE.search(value):
            return value
        expanded = self._optional(place, value, str)
        if expanded is not None:
            self.secrets += in_url(expanded) if "://" in expanded else [expanded]
        return expanded

    def _optional(self, place: str, text: str | None, check: Callable[[str], str]) -> str | None:
        """None, too, for `${NAME:-}` without a value: the file says that there may be none."""
        if text and is_reference(text) and text.endswith(":-}") and not self.env.expand(text):
            return None
        return self.text(place, text, check)

    def _s3(self, profile: StoreProfile) -> dict[str, Any]:
        is_tos = profile.prefix.startswith("tos://")
        endpoint, region = self._place(
            is_tos,
            self._optional(f"{self.block}.endpoint", profile.endpoint, checked_endpoint),
            self._optional(f"{self.block}.region", profile.region, str),
        )
        config: dict[str, Any] = {
            "retries": {"mode": "standard", "total_max_attempts": profile.max_attempts},
            "connect_timeout": _CONNECT_S,
            "read_timeout": _READ_S,
            "s3": {"addressing_style": _addressing(profile.addressing, is_tos, endpoint)},
            **(_NOT_AMAZON if endpoint else {}),
        }
        options: dict[str, Any] = {**self._keys(profile, is_tos), "config_kwargs": config}
        if endpoint:
            options["endpoint_url"] = endpoint
        if region:
            options["client_kwargs"] = {"region_name": region}
        return options

    def _place(
        self, is_tos: bool, endpoint: str | None, region: str | None
    ) -> tuple[str | None, str | None]:
        """Endpoint and region; TOS always has both."""
        if not is_tos:
            endpoint = endpoint or self._endpoint("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
            return endpoint, region or self._variable("AWS_REGION", "AWS_DEFAULT_REGION")
        endpoint = endpoint or self._endpoint("TOS_ENDPOINT")
        named = tos.region_of(endpoint) if endpoint else None
        region = region or self._variable("REGION") or named or tos.REGION
        return endpoint or tos.endpoint_in(region), region

    def _keys(self, profile: StoreProfile, is_tos: bool) -> dict[str, str | None]:
        """Those of the profile; else those of the environment, else none."""
        if profile.options.get("anon") is True:
            return {}
        if profile.access_key:
            token = f"{self.block}.session_token"
            return {
                "key": self.text(f"{self.block}.access_key", profile.access_key, str),
                "secret": self.text(f"{self.block}.secret_key", profile.secret_key, str),
                "token": self._optional(token, profile.session_token, str),
            }
        names = _TOS_KEYS if is_tos else _AWS_KEYS
        keys = {option: value for option, name in names.items() if (value := self.env.get(name))}
        missing = [names[option] for option in ("key", "secret") if option not in keys]
        if len(missing) == 1 or (missing and is_tos):
            self._missing(missing, "tos://" if is_tos else "s3://")
        return {} if missing else {**keys}

    def _missing(self, names: list[str], scheme: str) -> None:
        are = "variables {} are" if len(names) > 1 else "variable {} is"
        wrong = f"{are.format(' and '.join(names))} not set, which {scheme} needs"
        have = "a value" if len(names) == 1 else "values"
        fix = f"the task cannot run until there is {have} {_HOW}"
        if not self.is_profile:
            fix += f", or a profile for {scheme} in {STORAGE_FILE}"
        self.problems.append(Problem(self.file, self.block, wrong, fix=fix, unready=True))

    def _variable(self, *names: str) -> str | None:
        """The value of the first one that is set."""
        return next(self._set(names), (None, None))[1]

    def _endpoint(self, *names: str) -> str | None:
        name, value = next(self._set(names), (None, None))
        if name is None or value is None:
            return None
        try:
            return checked_endpoint(value)
        except PydanticCustomError as error:
            self.problems.append(problem_of(error, self.file, self.block, f"${{{name}}}"))
            return None

    def _set(self, names: tuple[str, ...]) -> Iterator[tuple[str, str]]:
        return ((name, value) for name in names if (value := self.env.get(name)))


_AWS_KEYS = {
    "key": "AWS_ACCESS_KEY_ID",
    "secret": "AWS_SECRET_ACCESS_KEY",
    "token": "AWS_SESSION_TOKEN",
}
_TOS_KEYS = {"key": "TOS_ACCESS_KEY", "secret": "TOS_SECRET_KEY"}


def _addressing(wanted: str, is_tos: bool, endpoint: str | None) -> str:
    """At TOS the bucket is part of the host name, which an address in numbers cannot have."""
    if wanted != "auto" or not (is_tos or tos.region_of(endpoint or "")):
        return wanted
    host = urlsplit(endpoint or "").hostname or ""
    return "path" if host == "localhost" or _is_address(host) else "virtual"


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _joined(made: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """The user's options win; in a mapping of both they win by its keys."""
    both = {
        name: _joined(made[name], own[name])
        for name in made.keys() & own.keys()
        if isinstance(made[name], dict) and isinstance(own[name], dict)
    }
    return {**made, **own, **both}
