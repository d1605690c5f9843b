"""Scorers of the user's own: `scorer: my_pkg.rules:MyScorer` in a task file."""

from __future__ import annotations

import hashlib
import importlib
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, cast

from modelcall_assets.errors import Problem, SetupError
from modelcall_assets.grading.values import Fields, fitted, plain
from modelcall_assets.records.outcome import Failure, Outcome, Reason, Success
from modelcall_assets.records.record import Row

_RAISED = (Exception, SystemExit)
"""What user code may do to itself and to nobody else."""
_digests: dict[ModuleType, str] = {}
"""Of each scorer module's source as it was imported, whatever was written to the file since."""


class Scorer(Protocol):
    """`score` rates one row; its keys become columns. Whatever it raises fails that row only.

    An attribute `fields`, where there is one, declares a JSON-schema type per key.
    """

    def score(self, item: Row) -> dict[str, Any]: ...


def load_scorer(path: str, root: Path, file: str) -> Scorer:
    """The object at `module:name`, made without arguments when it is a class.

    Modules are looked up in the project root too. SetupError names the task `file`.
    """
    found: Any = _import(path, root, file)
    if isinstance(found, type):
        try:
            found = found()
        except _RAISED as error:
            raise _wrong(file, f"{path}() raised {_told(error)}") from error
    fields = declared_fields(found)
    is_valid = isinstance(fields, Mapping) and all(isinstance(f, Mapping) for f in fields.values())
    if fields is not None and not is_valid:
        expected = "a mapping such as {'score': {'type': 'integer'}}"
        raise _wrong(file, f"{path}.fields declares no types", expected)
    if taken := reserved(fields or {}):
        raise _wrong(file, f"{path}.fields: {taken}")
    return found


def declared_fields(scorer: Scorer) -> Fields | None:
    """The types that the scorer declares for its keys."""
    return getattr(scorer, "fields", None)


def source_digest(path: str, root: Path, file: str) -> str:
    """Digest of the module's source, so that an edited scorer makes its scores out of date."""
    _import(path, root, file)
    return _digests[sys.modules[path.partition(":")[0]]]


def grade(scorer: Scorer, row: Row) -> Outcome:
    """The scorer's values; an exception becomes a Failure with its traceback."""
    try:
        values: object = scorer.score(dict(row))
        if not isinstance(values, dict):
            kind = type(values).__name__
            return Failure(Reason.SCORER_ERROR, f"score() returned {kind}; expected a dict")
        made: dict[str, Any] = plain(cast("dict[Any, Any]", values))
    except _RAISED:
        return Failure(Reason.SCORER_ERROR, plain(traceback.format_exc(limit=-5)))
    if taken := reserved(made):
        return Failure(Reason.SCORER_ERROR, f"score() returned {taken}")
    try:
        return Success(fitted(made, declared_fields(scorer) or {}))
    except ValueError as error:
        return Failure(Reason.SCORER_ERROR, f"score() returned a wrong value: {error}")


def reserved(keys: Mapping[str, Any]) -> str:
    """What is wrong with keys that would hide columns of ours."""
    taken = [key for key in keys if key.startswith("api_")]
    what = "names that start with api_ are columns of this program; choose others"
    return f"{', '.join(taken)}: {what}" if taken else ""


def _import(path: str, root: Path, file: str) -> object:
    name, colon, attribute = path.partition(":")
    if not (name and colon and attribute):
        raise _wrong(file, f"'{path}' names no object", "module:name, such as my_pkg.rules:Mine")
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    try:
        module = importlib.import_module(name)
        if module not in _digests:
            source = module.__file__
            content = Path(source).read_bytes() if source else b""
            _digests[module] = hashlib.sha256(content).hexdigest()[:16]
    except _RAISED as error:
        raise _wrong(file, f"import {name} raised {_told(error)}") from error
    found: object = getattr(module, attribute, None)
    if found is None:
        raise _wrong(file, f"{name} has nothing called {attribute}")
    if not callable(getattr(found, "score", None)):
        raise _wrong(file, f"{path} has no method score(item) -> dict")
    return found


def _told(error: BaseException) -> str:
    """`NameError: name 'x' is not defined (my_pkg/rules.py, line 3)`."""
    not_users = ("<frozen", __file__, importlib.__file__)
    frames = traceback.extract_tb(error.__traceback__)
    users = [frame for frame in frames if not frame.filename.startswith(not_users)]
    place = f" ({users[-1].filename}, line {users[-1].lineno})" if users else ""
    return f"{type(error).__name__}: {error}{place}"


def _wrong(file: str, wrong: str, expected: str = "") -> SetupError:
    return SetupError([Problem(file, "scorer", wrong, expected)])
