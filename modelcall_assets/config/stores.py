"""`configs/storage.yaml`: how stores are reached, and where relative data folders lie."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import AfterValidator, BeforeValidator, Field

from modelcall_assets.config.block import Block, Text, mistake
from modelcall_assets.config.endpoint import checked_url, without_password
from modelcall_assets.config.paths import Folder, is_uri, normal
from modelcall_assets.config.problems import errors_in, validate
from modelcall_assets.config.tos import s3_endpoint
from modelcall_assets.config.yaml_file import load_yaml
from modelcall_assets.errors import Problem, SetupError
from modelcall_assets.records.secrets import REFERENCE, is_reference, looks_secret, names_secret

STORAGE_FILE = "configs/storage.yaml"
_CLASS = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_PROTOCOL = re.compile(r"[a-z][a-z0-9+-]*")
_BUCKETS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_IN_ENV = "set the variable in .env or in the process environment"


def _secret(text: str) -> str:
    if not is_reference(text):
        raise mistake("a key in a file", expected="a reference such as ${LAB_KEY}", fix=_IN_ENV)
    return text


Secret = Annotated[Text, AfterValidator(_secret)]


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


def _usual_filesystem(block: Mapping[str, Any]) -> str:
    scheme = block["prefix"].partition("://")[0]
    return "s3" if scheme == "tos" else scheme


def checked_endpoint(text: str) -> str:
    """The URL of an S3 endpoint; of TOS its S3 side. Or a mistake."""
    return checked_url(s3_endpoint(text))


def _literal_endpoint(text: str) -> str:
    return text if REFERENCE.search(text) else without_password(checked_endpoint(text))


def _no_secrets(options: dict[str, Any]) -> dict[str, Any]:
    for name, value in _leaves(options):
        is_open = value is None or isinstance(value, bool) or is_reference(str(value))
        is_named = names_secret(name.rpartition(".")[2], of_anyone=True)
        if (is_named and not is_open) or looks_secret(str(value)):
            expected = "a reference such as ${LAKE_TOKEN}"
            raise mistake(f"a key in a file: {name}", expected=expected, fix=_IN_ENV)
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


def _nothing(value: Any) -> Any:
    return {} if value is None else value


class StoreProfile(Block):
    """How the places under a prefix are reached."""

    prefix: Annotated[Text, AfterValidator(_prefix)]
    """Start of the URIs that it is for, such as `s3://bucket/` or `lake://`; the longest wins."""
    filesystem: Annotated[Text, AfterValidator(_filesystem)] = Field(
        default_factory=_usual_filesystem
    )
    """A protocol of fsspec, or `package.module:Class` of your own; default the prefix's scheme,
    and `s3` for `tos://`."""
    endpoint: Annotated[Text, AfterValidator(_literal_endpoint)] | None = None
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
    options: Annotated[dict[str, Any], BeforeValidator(_nothing), AfterValidator(_no_secrets)] = (
        Field(default_factory=dict[str, Any])
    )
    """Passed to the file system as they are; may hold `${NAME}`, and must where it is a secret."""


FLUSH_SECONDS = 5.0
S3_FIELDS = (
    *("endpoint", "region", "access_key", "secret_key", "session_token"),
    *("addressing", "max_attempts"),
)


class StorageFile(Block):
    """The shape of the file."""

    stores: Annotated[dict[Text, StoreProfile], BeforeValidator(_nothing)] = Field(
        default_factory=dict[str, StoreProfile]
    )
    """Profiles by a name of your own, which messages call them by."""
    data_root: Folder | None = None
    """Folder or URI where the relative data folders of tasks lie; default the project root."""
    journal_flush_seconds: Annotated[float, Field(gt=0)] = FLUSH_SECONDS
    """How often new replies are brought to a journal that is in a store: what a machine that is
    lost takes with it at most."""


@dataclass(frozen=True)
class Storage:
    """The file of a project, however broken it is."""

    stores: Mapping[str, StoreProfile] = field(default_factory=dict[str, StoreProfile])
    data_root: str | None = None
    """As written."""
    problems: tuple[Problem, ...] = ()
    """Why no store can be reached."""
    root_is_known: bool = True
    """Whether the file could be understood as far as `data_root`."""
    journal_flush_seconds: float = FLUSH_SECONDS

    def profile_of(self, place: str) -> tuple[str, StoreProfile] | None:
        """The profile with the longest prefix that fits a resolved URI, under its name."""
        fits = [(n, s) for n, s in self.stores.items() if f"{place}/".startswith(s.prefix)]
        return max(fits, key=lambda each: len(each[1].prefix), default=None)


def parse_storage(data: dict[str, Any], file: str) -> tuple[StorageFile | None, list[Problem]]:
    """The file, and every problem of it; none if one of them is an error."""
    parsed, problems = validate(StorageFile, data, file)
    if parsed is not None:
        seen: dict[str, str] = {}
        for name, profile in parsed.stores.items():
            problems += _profile_problems(profile, f"stores.{name}", file)
            first = seen.setdefault(profile.prefix, name)
            if first != name:
                wrong, fix = f"the prefix of stores.{first} too", "remove one of them"
                problems.append(Problem(file, f"stores.{name}.prefix", wrong, fix=fix))
    return None if errors_in(problems) else parsed, problems


def load_storage(root: Path) -> Storage:
    """The project's file; without one there are no profiles, and relative is below the root."""
    path = root / STORAGE_FILE
    if not path.exists():
        return Storage()
    try:
        data = load_yaml(path, STORAGE_FILE)
    except SetupError as error:
        return Storage(problems=error.problems, root_is_known=False)
    parsed, problems = parse_storage(data, STORAGE_FILE)
    if parsed is not None:
        flush = parsed.journal_flush_seconds
        return Storage(parsed.stores, parsed.data_root, journal_flush_seconds=flush)
    only_stores = all(problem.field.partition(".")[0] == "stores" for problem in problems)
    root_text = data.get("data_root") if only_stores else None
    return Storage({}, root_text, tuple(problems), only_stores)


def _profile_problems(profile: StoreProfile, place: str, file: str) -> Iterator[Problem]:
    """Fields that do not go together."""
    if profile.filesystem != "s3":
        for name in (name for name in S3_FIELDS if name in profile.model_fields_set):
            wrong = f"only for `filesystem: s3`, and this is {profile.filesystem}"
            fix = "write it below options, as that file system calls it"
            yield Problem(file, f"{place}.{name}", wrong, fix=fix)
        return
    for name, other in (
        ("access_key", "secret_key"),
        ("secret_key", "access_key"),
        ("session_token", "access_key"),
    ):
        if getattr(profile, name) and not getattr(profile, other):
            fix = f"add `{other}:`"
            yield Problem(file, f"{place}.{other}", f"missing: there is {name}", fix=fix)
