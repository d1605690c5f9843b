"""Scorers of the user's own: `scorer: my_pkg.rules:MyScorer` in a task file."""

from __future__ import annotations

import hashlib
import importlib
import sys
import traceback
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

from modelcall_assets.errors import Problem, SetupError
from modelcall_assets.records.outcome import Failure, Outcome, Reason, Success
from modelcall_assets.records.record import Row


@runtime_checkable
class Scorer(Protocol):
    """`score` rates one row; its keys become columns. Whatever it raises fails that row only."""

    def score(self, item: Row) -> dict[str, Any]: ...


def load_scorer(path: str, root: Path, file: str) -> Scorer:
    """The object at `module:name`, made without arguments when it is a class.

    Modules are looked up in the project root too. SetupError names the task `file`.
    """
    found = _import(path, root, file)
    if isinstance(found, type):
        try:
            found = found()
        except Exception as error:
            raise _wrong(file, f"{path}() raised {type(error).__name__}: {error}") from error
    if not isinstance(found, Scorer):
        raise _wrong(file, f"{path} has no method score(item) -> dict")
    return found


def source_digest(path: str, root: Path, file: str) -> str:
    """Digest of the module's source, so that an edited scorer makes its scores out of date."""
    _import(path, root, file)
    source = sys.modules[path.partition(":")[0]].__file__
    return hashlib.sha256(Path(source).read_bytes() if source else b"").hexdigest()[:16]


def grade(scorer: Scorer, row: Row) -> Outcome:
    """The scorer's values; an exception becomes a Failure with its traceback."""
    try:
        values: object = scorer.score(dict(row))
    except Exception:  # noqa: BLE001 - user code may raise anything; it costs this row only
        return Failure(Reason.SCORER_ERROR, traceback.format_exc(limit=-5))
    if not isinstance(values, dict):
        kind = type(values).__name__
        return Failure(Reason.SCORER_ERROR, f"score() returned {kind}; expected a dict")
    return Success({str(key): value for key, value in cast("dict[Any, Any]", values).items()})


def _import(path: str, root: Path, file: str) -> object:
    module, colon, name = path.partition(":")
    if not (module and colon and name):
        raise _wrong(file, f"'{path}' names no object", "module:name, such as my_pkg.rules:Mine")
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    try:
        return getattr(importlib.import_module(module), name)
    except AttributeError as error:
        raise _wrong(file, f"{module} has nothing called {name}") from error
    except Exception as error:
        raise _wrong(file, f"import {module} raised {type(error).__name__}: {error}") from error


def _wrong(file: str, wrong: str, expected: str = "") -> SetupError:
    return SetupError([Problem(file, "scorer", wrong, expected)])
