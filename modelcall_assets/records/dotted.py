"""Python objects of the user's own, named in config files as `module:name`."""

from __future__ import annotations

import hashlib
import importlib
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

RAISED = (Exception, SystemExit)
"""What user code may do to itself and to nobody else."""
_digests: dict[ModuleType, str] = {}
"""Of each module's source as it was imported, whatever was written to the file since."""


class DottedError(ValueError):
    """The object cannot be had; `expected` says what would do, where that is known."""

    def __init__(self, wrong: str, expected: str = "") -> None:
        super().__init__(wrong)
        self.wrong, self.expected = wrong, expected


def load_object(path: str, root: Path, method: str) -> Any:
    """The object at `module:name`, which must have a method such as `score(item) -> dict`. Modules
    are looked up in the project root too. DottedError."""
    name, colon, attribute = path.partition(":")
    if not (name and colon and attribute):
        raise DottedError(f"'{path}' names no object", "module:name, such as my_pkg.rules:Mine")
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    try:
        module = importlib.import_module(name)
        if module not in _digests:
            source = module.__file__
            content = Path(source).read_bytes() if source else b""
            _digests[module] = hashlib.sha256(content).hexdigest()[:16]
    except RAISED as error:
        raise DottedError(f"import {name} raised {_shown(error)}") from error
    found: Any = getattr(module, attribute, None)
    if found is None:
        raise DottedError(f"{name} has nothing called {attribute}")
    if not callable(getattr(found, method.partition("(")[0], None)):
        raise DottedError(f"{path} has no method {method}")
    return found


def create(found: Any, path: str, **options: Any) -> Any:
    """The object itself, or one of the class that it is. DottedError."""
    if not isinstance(found, type):
        if options:
            raise DottedError(f"{path} takes no options", "a class, which is called with them")
        return found
    try:
        return found(**options)
    except RAISED as error:
        raise DottedError(f"{path}() raised {_shown(error)}") from error


def source_digest(path: str) -> str:
    """Digest of the module's source, once it is loaded: other code makes other rows."""
    return _digests[sys.modules[path.partition(":")[0]]]


def _shown(error: BaseException) -> str:
    """`NameError: name 'x' is not defined (my_pkg/rules.py, line 3)`."""
    not_users = ("<frozen", __file__, importlib.__file__)
    frames = traceback.extract_tb(error.__traceback__)
    users = [frame for frame in frames if not frame.filename.startswith(not_users)]
    where = f" ({users[-1].filename}, line {users[-1].lineno})" if users else ""
    return f"{type(error).__name__}: {error}{where}"
