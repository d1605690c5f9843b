"""Data places, as written and as resolved in the environment of one task: folders on this machine
and URIs of stores.

Nothing is written to `os.environ`, so what one task loads no other task sees.
"""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Self

from dotenv import dotenv_values
from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

from modelcall_assets.config.block import Text, mistake, problem_of
from modelcall_assets.config.legacy import PLACEHOLDERS
from modelcall_assets.errors import Problem, SetupError
from modelcall_assets.records.secrets import REFERENCE, has_password

Check = Callable[[str], str]
"""Passes a text on, perhaps in its simplest spelling; or a mistake."""
MOST_NAME = 255
"""Bytes of a file's or folder's name, in every file system of today."""
_PLACEHOLDER = re.compile(r"(?<!\$)\{([^}]*)\}")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*")
_ONE_SLASH = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/(?!/)(.*)", re.S)


class MissingVariable(KeyError):
    """`${NAME}` names a variable that no file and no process sets."""

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(name)


class Environment(dict[str, str]):
    """Variables, which nobody changes; the repr shows names, never values."""

    @classmethod
    def for_task(cls, root: Path, env_files: Sequence[Path] = ()) -> Self:
        """Task env files (the last wins) > process environment > `<root>/.env`."""
        project = root / ".env"
        values = (read_env_file(project) if project.is_file() else {}) | dict(os.environ)
        for path in env_files:
            values |= read_env_file(path)
        return cls(values)

    def expand(self, text: str) -> str:
        """Replaces `${NAME}` and `${NAME:-default}`; all other text stays as it is."""
        return REFERENCE.sub(self._value, text)

    def _value(self, match: re.Match[str]) -> str:
        name, has_default, default = match[1].partition(":-")
        if has_default:
            return self.get(name) or default
        if name not in self:
            raise MissingVariable(name)
        return self[name]

    def __repr__(self) -> str:
        return f"Environment({sorted(self)})"


def read_env_file(path: Path) -> dict[str, str]:
    """`KEY=VALUE` lines, with optional `export`, quotes and comments; values are not expanded."""
    try:
        values = dotenv_values(path, interpolate=False, encoding="utf-8")
        return {name: value for name, value in values.items() if value is not None}
    except UnicodeDecodeError:
        wrong = "not UTF-8"
    except OSError as error:
        wrong = f"cannot be read: {error.strerror}"
    raise SetupError([Problem(path.as_posix(), "", wrong)])


@dataclass
class Expander:
    """Replaces references in fields of one file; what is wrong goes to `problems`."""

    env: Environment
    file: str
    problems: list[Problem] = field(default_factory=list[Problem], kw_only=True)

    def text(self, place: str, text: str | None, check: Check = str) -> str | None:
        """The text with its references replaced, if it passes."""
        if text is None:
            return None
        try:
            if value := self.env.expand(text):
                return check(value)
            self.unready(place, f"{text} is empty", f"{text} has a value")
        except MissingVariable as error:
            self.unready(place, f"variable {error.name} is not set", f"{text} has a value")
        except PydanticCustomError as error:
            self.problems.append(problem_of(error, self.file, place, text))
        return None

    def unready(self, place: str, wrong: str, needed: str, more: str = "") -> None:
        """The file is right, but the environment lacks what it refers to."""
        where = "in .env, in the task's env file or in the process"
        fix = f"the task cannot run until {needed} {where}{more}"
        self.problems.append(Problem(self.file, place, wrong, fix=fix, unready=True))


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
