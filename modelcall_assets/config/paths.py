"""Data locations: which may be named in a task, and where a relative one lies."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from modelcall_assets.config.block import Text, mistake
from modelcall_assets.config.environment import Environment
from modelcall_assets.config.legacy import PLACEHOLDERS

_PLACEHOLDER = re.compile(r"(?<!\$)\{([^}]*)\}")


def _placeholders(text: str) -> str:
    for name in _PLACEHOLDER.findall(text):
        if name in PLACEHOLDERS:
            wrong = f"{{{name}}} would give every partition a new place on each run"
            raise mistake(wrong, fix=PLACEHOLDERS[name])
        if name != "task_name":
            raise mistake(f"unknown placeholder {{{name}}}", expected="{task_name} at most")
    return text


def readable(text: str) -> str:
    """Refuses a place that input cannot be read from."""
    scheme = _scheme(text)
    if scheme not in ("", "s3"):
        raise mistake(f"{scheme}:// is not in this version", expected="a local folder or s3://")
    return text


def writable(text: str) -> str:
    """Refuses a place that output cannot be written to."""
    if _scheme(text):
        raise mistake(
            "object stores for outputs are not in this version", expected="a local folder"
        )
    return text


Folder = Annotated[Text, AfterValidator(_placeholders)]
InputFolder = Annotated[Folder, AfterValidator(readable)]
OutputFolder = Annotated[Folder, AfterValidator(writable)]


def was_in_object_store(text: str) -> bool:
    """Whether the old system silently put this relative path into its object store."""
    return not text.startswith(("/", "./", "$")) and not _scheme(text)


def resolve(text: str, root: Path, env: Environment, task_name: str) -> str:
    """The absolute path, or the URI as it is. Relative means below the project root."""
    place = env.expand(text).replace("{task_name}", task_name)
    if _scheme(place):
        return place.rstrip("/")
    return os.path.normpath(root / place)


def _scheme(text: str) -> str:
    scheme, separator, _ = text.partition("://")
    return scheme if separator else ""
