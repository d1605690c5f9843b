"""The environment of one task: its own env files, the process, then the project's `.env`.

Nothing is written to `os.environ`, so what one task loads no other task sees.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from dotenv import dotenv_values

from modelcall_assets.errors import Problem, SetupError
from modelcall_assets.records.secrets import REFERENCE


class MissingVariable(KeyError):
    """`${NAME}` names a variable that no file and no process sets."""

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(name)


class Environment(Mapping[str, str]):
    """Read-only variables; its repr shows names, never values."""

    def __init__(self, values: Mapping[str, str]) -> None:
        self._values = dict(values)

    @classmethod
    def for_task(cls, root: Path, env_files: Sequence[Path] = ()) -> Environment:
        """Task env files (the last wins) > process environment > `<root>/.env`."""
        project = root / ".env"
        values = read_env_file(project) if project.is_file() else {}
        values |= os.environ
        for path in env_files:
            values |= read_env_file(path)
        return cls(values)

    def expand(self, text: str) -> str:
        """Replaces `${NAME}` and `${NAME:-default}`; all other text stays as it is."""
        return REFERENCE.sub(self._value, text)

    def _value(self, match: re.Match[str]) -> str:
        name, has_default, default = match[1].partition(":-")
        if has_default:
            return self._values.get(name) or default
        if name not in self._values:
            raise MissingVariable(name)
        return self._values[name]

    def __getitem__(self, name: str) -> str:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"Environment({sorted(self._values)})"


def read_env_file(path: Path) -> dict[str, str]:
    """`KEY=VALUE` lines, with optional `export`, quotes and comments; values are not expanded."""
    if not path.is_file():
        raise SetupError([Problem(path.as_posix(), "", "no such env file")])
    try:
        values = dotenv_values(path, interpolate=False, encoding="utf-8")
    except UnicodeDecodeError:
        raise SetupError([Problem(path.as_posix(), "", "not UTF-8")]) from None
    except OSError as error:
        raise SetupError(
            [Problem(path.as_posix(), "", f"cannot be read: {error.strerror}")]
        ) from None
    return {name: value for name, value in values.items() if value is not None}
