"""Data places as task files and configs/storage.yaml write them: folders of this machine, URIs, and
the profiles of the stores that URIs lie in.
"""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from modelcall_assets.config import (
    OR_EMPTY,
    Block,
    Content,
    Parsed,
    Text,
    at,
    errors_in,
    mistake,
    must,
    validate,
)
from modelcall_assets.config.endpoint import IN_ENV, checked_url, literal
from modelcall_assets.config.files import Environment, MissingVariable, load_yaml
from modelcall_assets.errors import Problem, SetupError
from modelcall_assets.records.secrets import (
    REFERENCE,
    has_password,
    is_reference,
    leaves,
    looks_secret,
    names_secret,
)

STORAGE_FILE = "configs/storage.yaml"
FOLDERS = (
    *("data.input_folder", "data.output_folder"),
    *("preprocess.input_folder", "preprocess.output_folder"),
)
MOST_NAME = 255
"""Bytes of a file's or folder's name, in every file system of today."""
_PLACEHOLDER = re.compile(r"(?<!\$)\{([^}]*)\}")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*")
_ONE_SLASH = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/(?!/)(.*)", re.S)
_CLASS = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_PROTOCOL = re.compile(r"[a-z][a-z0-9+-]*")
_BUCKETS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
TOS_HOST = re.compile(
    r"(?P<scheme>https?://)?(?:[a-z0-9-]+\.)?tos-(?P<s3>s3-)?(?P<region>[a-z0-9-]+)"
    r"\.(?P<domain>i?(?:volces|bytepluses)\.com)/?",
    re.I,
)
"""TOS, the object store of Volcengine and BytePlus, talks S3 at an endpoint of its own, which takes
buckets in the host name only."""
PLACEHOLDERS = {
    "timestamp": "write a fixed folder without it; Dagster's run history keeps the times",
    "run_index": "write a fixed folder; for repeats, one task_name and output_folder per run",
}
"""Placeholders of the old paths that would give a partition a new place on every run."""


def _folder(text: str) -> str:
    """Refuses what can be no place. A text with references is looked at once they are replaced."""
    for name in _PLACEHOLDER.findall(text):
        if name in PLACEHOLDERS:
            wrong = f"{{{name}}} would give every partition a new place on each run"
            raise mistake(wrong, fix=PLACEHOLDERS[name])
        if name != "task_name":
            raise mistake(f"unknown placeholder {{{name}}}", expected="{task_name} at most")
    if not REFERENCE.search(text):
        normal(text)
    return text


Folder = Annotated[Text, AfterValidator(_folder)]


def is_uri(place: str) -> bool:
    """Whether the place lies in a store, not on this machine."""
    return "://" in place


def is_bucket(place: str) -> bool:
    """Whether a resolved place is the top of a store, such as s3://bucket."""
    return is_uri(place) and place.count("/") == 2


def is_relative(place: str) -> bool:
    """Whether it starts at `data_root`, where there is one."""
    return not is_uri(place) and not place.startswith(("/", "./")) and place != "."


def was_in_object_store(text: str) -> bool:
    """Whether the old system silently put this relative path into its object store."""
    return is_relative(text) and not text.startswith("$")


def moved_paths(data: Content, file: str) -> Iterator[Problem]:
    """Relative paths that mean another place than they did in the old system."""
    for field in FOLDERS:
        text = at(data, field)
        if isinstance(text, str) and was_in_object_store(text):
            place = text.replace("{task_name}", str(data.get("task_name")))
            wrong = f"now means {place} below the project root; the old system read this relative "
            wrong += "path from its object store"
            fix = f"write ./{text} if that is meant, else the full tos:// path, or name the place "
            fix += f"of all such folders as data_root in {STORAGE_FILE}"
            yield Problem(file, field, wrong, fix=fix, severity="warning")


def is_file(path: Path | str) -> bool:
    """Also of a name that the system does not have: `Path.is_file` raises for some of these."""
    return os.path.isfile(path)  # noqa: PTH113


def is_within(place: str, folder: str) -> bool:
    return place == folder or place.startswith(f"{folder.rstrip('/')}/")


def shown_path(path: Path, root: Path) -> str:
    """The path relative to the project when it is inside, as every message shows it."""
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()


def shown_place(place: str, root: Path) -> str:
    return place if is_uri(place) else shown_path(Path(place), root)


def resolve(
    text: str, root: Path, env: Environment, task_name: str, data_root: str | None = None
) -> str:
    """The absolute path or the URI. What is relative lies below `data_root`, itself resolved, else
    below the project root; `tos:///key` in the bucket and folder of the environment."""
    place = env.expand(text).replace("{task_name}", task_name)
    if data_root is not None and is_relative(place):
        place = f"{data_root}/{place}"
    place = normal(place)
    if place.startswith("tos:///"):
        bucket = env.get("TOS_BUCKET", "").strip("/")
        if not bucket:
            raise MissingVariable("TOS_BUCKET")
        key = place.removeprefix("tos:///")
        place = normal(f"tos://{bucket}/{env.get('TOS_PREFIX') or ''}/{key}")
    return place if is_uri(place) else os.path.normpath(root / place)


def normal(place: str) -> str:
    """A URI in its simplest spelling, a path as it is; or a mistake."""
    if not place:
        raise mistake("empty once its variables are replaced", expected="a folder or a URI")
    names = [] if is_uri(place) else place.encode("utf-8", "surrogatepass").split(b"/")
    if "\0" in place or any(len(name) > MOST_NAME for name in names):
        expected = f"names of at most {MOST_NAME} bytes without NUL characters"
        raise mistake("the system has no such names", expected=expected)
    if typo := _ONE_SLASH.fullmatch(place):
        scheme, rest = typo.groups()
        fix = f"write /{rest}" if scheme == "file" else f"write {scheme}://{rest}"
        raise mistake(f"one slash after {scheme}:", fix=fix)
    return _normal_uri(place) if is_uri(place) else place


def _normal_uri(uri: str) -> str:
    scheme, _, rest = uri.partition("://")
    if not _SCHEME.fullmatch(scheme):
        raise mistake("neither a path nor a URI", expected="a URI such as s3://bucket/folder")
    if "://" in rest:
        raise mistake("a URI in a URI", expected="one such as s3://bucket/folder")
    if has_password(uri):
        fix = "name the keys in configs/storage.yaml as ${NAME}"
        raise mistake("a password in a file", fix=fix)
    scheme, parts = scheme.lower(), [part for part in rest.split("/") if part not in ("", ".")]
    if ".." in parts:
        fix = "write the URI without `..`; a folder on this machine starts with `./` or `/`"
        raise mistake("leads up, which keys of a store cannot", fix=fix)
    starts_at_top = rest.startswith("/") or not parts
    if scheme == "file":
        if not starts_at_top:
            raise mistake("a file of another machine", fix=f"write /{rest}")
        return f"/{'/'.join(parts)}"
    if scheme != "tos" and (not parts or (scheme == "s3" and starts_at_top)):
        what = "bucket" if scheme == "s3" else "folder"
        raise mistake(f"names no {what}", expected=f"{scheme}://bucket/folder")
    return f"{scheme}://{'/' if starts_at_top else ''}{'/'.join(parts)}"


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


def checked_endpoint(text: str) -> str:
    """The URL of an S3 endpoint; of TOS, with or without scheme and bucket, its S3 side."""
    if host := TOS_HOST.fullmatch(text):
        scheme = (host["s3"] and host["scheme"]) or "https://"
        text = f"{scheme}tos-s3-{host['region']}.{host['domain']}".lower()
    return checked_url(text)


def _no_secrets(options: dict[str, Any]) -> dict[str, Any]:
    for names, value in leaves(options):
        is_open = value is None or isinstance(value, bool) or is_reference(str(value))
        is_named = names_secret(names[-1], of_anyone=True)
        if (is_named and not is_open) or looks_secret(str(value)):
            expected = "a reference such as ${LAKE_TOKEN}"
            raise mistake(f"a key in a file: {'.'.join(names)}", expected=expected, fix=IN_ENV)
    return options


class StoreProfile(Block):
    """How the places under a prefix are reached."""

    prefix: Annotated[Text, AfterValidator(_prefix)]
    """Start of the URIs that it is for, such as `s3://bucket/` or `lake://`; the longest wins."""
    filesystem: Annotated[Text, AfterValidator(_filesystem)] = Field(default_factory=_usual)
    """A protocol of fsspec, or `package.module:Class` of your own; default the prefix's scheme,
    and `s3` for `tos://`."""
    endpoint: Annotated[Text, literal(checked_endpoint)] | None = None
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
    journal_flush_seconds: Annotated[float, Field(gt=0)] = 5.0
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
