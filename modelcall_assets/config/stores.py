"""`configs/storage.yaml`, and what reaches the stores of a task: profiles, else variables."""

import ipaddress
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, cast
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field

from modelcall_assets.config.block import (
    OR_EMPTY,
    Block,
    Content,
    Parsed,
    Text,
    errors_in,
    load_yaml,
    mistake,
    must,
    validate,
)
from modelcall_assets.config.endpoint import IN_ENV, checked_url, literal
from modelcall_assets.config.places import Check, Environment, Expander, Folder, is_uri, normal
from modelcall_assets.errors import Problem, SetupError
from modelcall_assets.records import StoreOptions
from modelcall_assets.records.secrets import (
    REFERENCE,
    in_url,
    is_reference,
    looks_secret,
    names_secret,
)

STORAGE_FILE = "configs/storage.yaml"
FLUSH_SECONDS = 5.0
_CLASS = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_PROTOCOL = re.compile(r"[a-z][a-z0-9+-]*")
_BUCKETS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_TOS_HOST = re.compile(
    r"(?P<scheme>https?://)?(?:[a-z0-9-]+\.)?tos-(?P<s3>s3-)?(?P<region>[a-z0-9-]+)"
    r"\.(?P<domain>i?(?:volces|bytepluses)\.com)/?",
    re.I,
)
"""TOS, the object store of Volcengine and BytePlus, talks S3 at an endpoint of its own, which takes
buckets in the host name only."""


Secret = Annotated[
    Text, must(is_reference, "a key in a file", "a reference such as ${LAB_KEY}", IN_ENV)
]


def _prefix(text: str) -> str:
    """With a slash at its end, so that no bucket fits whose name only starts the same."""
    if not is_uri(text) or REFERENCE.search(text):
        raise mistake("not the start of URIs", expected="text such as s3://bucket/ or lake://")
    if _BUCKETS.fullmatch(text):
        return text.lower()
    place = normal(text)
    if not is_uri(place):
        raise mistake("a folder of this machine", fix="remove the profile: it needs none")
    return f"{place.rstrip('/')}/"


def _filesystem(name: str) -> str:
    if _CLASS.fullmatch(name) or _PROTOCOL.fullmatch(name):
        return name
    module, dot, last = name.rpartition(".")
    fix = f"write {module}:{last}" if dot and ":" not in name else ""
    expected = "a protocol of fsspec such as s3 or gs, or package.module:Class"
    raise mistake("no file system's name", expected=expected, fix=fix)


def _usual(block: Mapping[str, Any]) -> str:
    scheme = block["prefix"].partition("://")[0]
    return "s3" if scheme == "tos" else scheme


def _checked_endpoint(text: str) -> str:
    """The URL of an S3 endpoint; of TOS, with or without scheme and bucket, its S3 side."""
    if host := _TOS_HOST.fullmatch(text):
        scheme = (host["s3"] and host["scheme"]) or "https://"
        text = f"{scheme}tos-s3-{host['region']}.{host['domain']}".lower()
    return checked_url(text)


def _no_secrets(options: dict[str, Any]) -> dict[str, Any]:
    for name, value in _leaves(options):
        is_open = value is None or isinstance(value, bool) or is_reference(str(value))
        is_named = names_secret(name.rpartition(".")[2], of_anyone=True)
        if (is_named and not is_open) or looks_secret(str(value)):
            expected = "a reference such as ${LAKE_TOKEN}"
            raise mistake(f"a key in a file: {name}", expected=expected, fix=IN_ENV)
    return options


def _leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """What an option holds, however deep; a list's items have the name of the list."""
    if isinstance(value, dict):
        for name, inner in cast("dict[str, Any]", value).items():
            yield from _leaves(inner, f"{place}.{name}".removeprefix("."))
    elif isinstance(value, list):
        for inner in cast("list[Any]", value):
            yield from _leaves(inner, place)
    else:
        yield place, value


class StoreProfile(Block):
    """How the places under a prefix are reached."""

    prefix: Annotated[Text, AfterValidator(_prefix)]
    """Start of the URIs that it is for, such as `s3://bucket/` or `lake://`; the longest wins."""
    filesystem: Annotated[Text, AfterValidator(_filesystem)] = Field(default_factory=_usual)
    """A protocol of fsspec, or `package.module:Class` of your own; default the prefix's scheme,
    and `s3` for `tos://`."""
    endpoint: Annotated[Text, literal(_checked_endpoint)] | None = None
    """URL of an S3-compatible store; default `AWS_ENDPOINT_URL_S3` or `AWS_ENDPOINT_URL`, else
    Amazon's."""
    region: Text | None = None
    """Default `AWS_REGION` or `AWS_DEFAULT_REGION`."""
    access_key: Secret | None = None
    """`${NAME}`; default `AWS_ACCESS_KEY_ID`, else what the machine offers."""
    secret_key: Secret | None = None
    """`${NAME}`; goes with `access_key`."""
    session_token: Secret | None = None
    """`${NAME}`, or `${NAME:-}` where there may be none; for temporary keys."""
    addressing: Literal["path", "virtual", "auto"] = "auto"
    """Whether the bucket stands in the URL's path or in its host name; `auto` is `path` at an
    endpoint of your own, `virtual` at Amazon's and TOS."""
    max_attempts: Annotated[int, Field(ge=1, le=100)] = 8
    """Times that a request to the store is sent at most, with growing pauses."""
    options: Annotated[dict[str, Any], OR_EMPTY, AfterValidator(_no_secrets)] = Field(default={})
    """Passed to the file system as they are; may hold `${NAME}`, and must where it is a secret."""


class StorageFile(Block):
    """`configs/storage.yaml`, which a project may do without. What a profile for S3 leaves out is
    taken from variables, for `tos://` from `TOS_…` in place of `AWS_…`. [storage.md](storage.md)
    has examples.
    """

    stores: Annotated[dict[Text, StoreProfile], OR_EMPTY] = Field(default={})
    """Profiles by a name of your own, which messages call them by."""
    data_root: Folder | None = None
    """Folder or URI where the relative data folders of tasks lie; default the project root."""
    journal_flush_seconds: Annotated[float, Field(gt=0)] = FLUSH_SECONDS
    """How often new replies are brought to a journal that is in a store: what a machine that is
    lost takes with it at most."""


@dataclass(frozen=True)
class Storage:
    file: StorageFile
    problems: tuple[Problem, ...] = ()
    """Why no store can be reached."""
    root_is_known: bool = True
    """Whether the file could be understood as far as `data_root`."""


def parse_storage(data: Content, file: str) -> Parsed[StorageFile]:
    parsed, problems = validate(StorageFile, data, file)
    seen: dict[str, str] = {}
    for name, profile in parsed.stores.items() if parsed else ():
        problems += _profile_problems(profile, f"stores.{name}", file)
        if (first := seen.setdefault(profile.prefix, name)) != name:
            wrong, fix = f"the prefix of stores.{first} too", "remove one of them"
            problems.append(Problem(file, f"stores.{name}.prefix", wrong, fix=fix))
    return None if errors_in(problems) else parsed, problems


def _profile_problems(profile: StoreProfile, place: str, file: str) -> Iterator[Problem]:
    if profile.filesystem != "s3":
        for name in StoreProfile.model_fields:
            if name in profile.model_fields_set - {"prefix", "filesystem", "options"}:
                wrong = f"only for `filesystem: s3`, and this is {profile.filesystem}"
                fix = "write it below options, as that file system calls it"
                yield Problem(file, f"{place}.{name}", wrong, fix=fix)
        return
    needs = {"access_key": "secret_key", "secret_key": "access_key", "session_token": "access_key"}
    for name, other in needs.items():
        if getattr(profile, name) and not getattr(profile, other):
            wrong, fix = f"missing: there is {name}", f"add `{other}:`"
            yield Problem(file, f"{place}.{other}", wrong, fix=fix)


def load_storage(root: Path) -> Storage:
    """The project's file; without one there are no profiles, and relative is below the root."""
    if not (root / STORAGE_FILE).exists():
        return Storage(StorageFile())
    try:
        data = load_yaml(root / STORAGE_FILE, STORAGE_FILE)
    except SetupError as error:
        return Storage(StorageFile(), error.problems, root_is_known=False)
    parsed, problems = parse_storage(data, STORAGE_FILE)
    if parsed is not None:
        return Storage(parsed)
    only_stores = all(problem.field.partition(".")[0] == "stores" for problem in problems)
    data_root = data.get("data_root") if only_stores else None
    return Storage(StorageFile(data_root=data_root), tuple(problems), only_stores)


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
        fits = [(n, p) for n, p in storage.file.stores.items() if f"{place}/".startswith(p.prefix)]
        usual = "", StoreProfile(prefix=f"{place.partition('://')[0]}://")
        name, profile = max(fits, key=lambda each: len(each[1].prefix), default=usual)
        prefix, filesystem = profile.prefix, profile.filesystem
        if prefix in found:
            continue
        where = (STORAGE_FILE, f"stores.{name}") if name else (file, place_field)
        resolver = _Resolver(env, *where)
        options = resolver.expanded(profile.options, f"{resolver.block}.options")
        if filesystem == "s3":
            options = _joined(resolver.s3(profile), options)
        label, secrets = name or f"no profile in {STORAGE_FILE}", tuple(resolver.secrets)
        found[prefix] = StoreOptions(label, prefix, filesystem, options, secrets)
        problems += resolver.problems
    return tuple(sorted(found.values(), key=lambda each: -len(each.prefix))), problems


@dataclass
class _Resolver(Expander):
    """Fills in a profile; what it leaves out is taken from variables of the environment."""

    block: str
    """Where the profile stands in its file; without one, the field that names the store."""
    secrets: list[str] = field(default_factory=list[str], kw_only=True)
    """What options take from the environment."""

    def expanded(self, value: Any, place: str) -> Any:
        """An option, with references replaced however deep they are."""
        if isinstance(value, dict):
            fields = cast("dict[str, Any]", value)
            return {name: self.expanded(v, f"{place}.{name}") for name, v in fields.items()}
        if isinstance(value, list):
            items = cast("list[Any]", value)
            return [self.expanded(v, f"{place}[{number}]") for number, v in enumerate(items)]
        if not isinstance(value, str) or not REFERENCE.search(value):
            return value
        expanded = self._optional(place, value)
        if expanded is not None:
            self.secrets += in_url(expanded) if "://" in expanded else [expanded]
        return expanded

    def s3(self, profile: StoreProfile) -> dict[str, Any]:
        """Arguments of the file system for S3; TOS always has an endpoint and a region."""
        is_tos = profile.prefix.startswith("tos://")
        endpoint = self._optional(f"{self.block}.endpoint", profile.endpoint, _checked_endpoint)
        region = self._optional(f"{self.block}.region", profile.region)
        names = ("TOS_ENDPOINT",) if is_tos else ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
        endpoint = endpoint or self._variable(*names, check=_checked_endpoint)
        names = ("REGION",) if is_tos else ("AWS_REGION", "AWS_DEFAULT_REGION")
        region = region or self._variable(*names)
        tos_host = _TOS_HOST.fullmatch(endpoint or "")
        if is_tos:
            region = region or (tos_host["region"].lower() if tos_host else "cn-beijing")
            endpoint = endpoint or f"https://tos-s3-{region}.volces.com"
        addressing = profile.addressing
        if addressing == "auto" and (is_tos or tos_host):
            # The bucket is part of the host name, which an address in numbers cannot have.
            addressing = "path" if _is_address(endpoint or "") else "virtual"
        config: dict[str, Any] = {
            "retries": {"mode": "standard", "total_max_attempts": profile.max_attempts},
            "connect_timeout": 10,
            "read_timeout": 60,
            "s3": {"addressing_style": addressing},
        }
        options: dict[str, Any] = {**self._keys(profile, is_tos), "config_kwargs": config}
        if endpoint:  # other stores than Amazon's know no newer checksums
            config["signature_version"] = "s3v4"
            config["request_checksum_calculation"] = "when_required"
            config["response_checksum_validation"] = "when_required"
            options["endpoint_url"] = endpoint
        if region:
            options["client_kwargs"] = {"region_name": region}
        return options

    def _keys(self, profile: StoreProfile, is_tos: bool) -> dict[str, str | None]:
        """Those of the profile; else those of the environment, else none."""
        if profile.options.get("anon") is True:
            return {}
        if profile.access_key:
            return {
                "key": self.text(f"{self.block}.access_key", profile.access_key),
                "secret": self.text(f"{self.block}.secret_key", profile.secret_key),
                "token": self._optional(f"{self.block}.session_token", profile.session_token),
            }
        names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
        names = ("TOS_ACCESS_KEY", "TOS_SECRET_KEY", "") if is_tos else names
        missing = [name for name in names[:2] if not self.env.get(name)]
        if len(missing) == 1 or (missing and is_tos):
            scheme = "tos://" if is_tos else "s3://"
            are, needed = "variable {} is", "there is a value"
            if len(missing) > 1:
                are, needed = "variables {} are", "there is values"
            wrong = f"{are.format(' and '.join(missing))} not set, which {scheme} needs"
            more = f", or a profile for {scheme} in {STORAGE_FILE}"
            self.unready(self.block, wrong, needed, more if self.file != STORAGE_FILE else "")
        found = zip(("key", "secret", "token"), map(self.env.get, names), strict=True)
        return {} if missing else {option: value for option, value in found if value}

    def _optional(self, place: str, text: str | None, check: Check = str) -> str | None:
        """None, too, for `${NAME:-}` without a value: the file says that there may be none."""
        if text and is_reference(text) and text.endswith(":-}") and not self.env.expand(text):
            return None
        return self.text(place, text, check)

    def _variable(self, *names: str, check: Check = str) -> str | None:
        """The value of the first one that is set."""
        name = next((name for name in names if self.env.get(name)), None)
        return self.text(self.block, f"${{{name}}}", check) if name else None


def _is_address(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    return True


def _joined(made: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """The user's options win; in a mapping of both they win by its keys."""
    both = {
        name: _joined(made[name], own[name])
        for name in made.keys() & own.keys()
        if isinstance(made[name], dict) and isinstance(own[name], dict)
    }
    return {**made, **own, **both}
