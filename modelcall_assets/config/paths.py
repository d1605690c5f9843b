"""Data places: folders on this machine and URIs of stores, as written and as resolved."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from modelcall_assets.config.block import Text, mistake
from modelcall_assets.config.environment import Environment, MissingVariable
from modelcall_assets.config.legacy import PLACEHOLDERS
from modelcall_assets.config.problems import shown_path
from modelcall_assets.records.secrets import REFERENCE, has_password

_PLACEHOLDER = re.compile(r"(?<!\$)\{([^}]*)\}")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*")
_ONE_SLASH = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/(?!/)(.*)", re.S)


def _placeholders(text: str) -> str:
    for name in _PLACEHOLDER.findall(text):
        if name in PLACEHOLDERS:
            wrong = f"{{{name}}} would give every partition a new place on each run"
            raise mistake(wrong, fix=PLACEHOLDERS[name])
        if name != "task_name":
            raise mistake(f"unknown placeholder {{{name}}}", expected="{task_name} at most")
    return text


def _possible(text: str) -> str:
    """Refuses what can be no place. A text with references is looked at once they are replaced."""
    if not REFERENCE.search(text):
        normal(text)
    return text


MOST_NAME = 255
"""Bytes of a file's or folder's name, in every file system of today."""

Folder = Annotated[Text, AfterValidator(_placeholders), AfterValidator(_possible)]


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


def resolve(
    text: str, root: Path, env: Environment, task_name: str, data_root: str | None = None
) -> str:
    """The absolute path or the URI. What is relative lies below `data_root`, itself resolved, else
    below the project root."""
    place = env.expand(text).replace("{task_name}", task_name)
    if data_root is not None and is_relative(place):
        place = f"{data_root}/{place}"
    place = _in_a_bucket(normal(place), env)
    return place if is_uri(place) else os.path.normpath(root / place)


def is_file(path: Path | str) -> bool:
    """Also of a name that the system does not have: `Path.is_file` raises for some of these."""
    return os.path.isfile(path)  # noqa: PTH113


def is_folder(path: Path | str) -> bool:
    """The same of a folder."""
    return os.path.isdir(path)  # noqa: PTH112


def is_within(place: str, folder: str) -> bool:
    """Whether a resolved place is the folder or lies in it."""
    return place == folder or place.startswith(f"{folder.rstrip('/')}/")


def parent_of(place: str) -> str:
    """The folder of a resolved place."""
    return place.rpartition("/")[0] or "/"


def shown_place(place: str, root: Path) -> str:
    """A resolved place as messages show it."""
    return place if is_uri(place) else shown_path(Path(place), root)


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


def _in_a_bucket(place: str, env: Environment) -> str:
    """`tos:///key` means the bucket and folder of the environment."""
    if not place.startswith("tos:///"):
        return place
    bucket = env.get("TOS_BUCKET", "").strip("/")
    if not bucket:
        raise MissingVariable("TOS_BUCKET")
    key = place.removeprefix("tos:///")
    return normal(f"tos://{bucket}/{env.get('TOS_PREFIX') or ''}/{key}")
