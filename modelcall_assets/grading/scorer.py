"""Scorers of the user's own: `scorer: my_pkg.rules:MyScorer` in a task file."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, cast

from modelcall_assets.errors import Problem, SetupError
from modelcall_assets.grading.values import Fields, fitted, plain
from modelcall_assets.records.dotted import RAISED, DottedError, load_object, made, source_digest
from modelcall_assets.records.outcome import Failure, Outcome, Reason, Success
from modelcall_assets.records.record import Row


class Scorer(Protocol):
    """`score` rates one row; its keys become columns. Whatever it raises fails that row only.

    An attribute `fields`, where there is one, declares a JSON-schema type per key.
    """

    def score(self, item: Row) -> dict[str, Any]: ...


def load_scorer(path: str, root: Path, file: str) -> Scorer:
    """The object at `module:name`, made without arguments when it is a class.

    Modules are looked up in the project root too. SetupError names the task `file`.
    """
    found: Any = _loaded(path, root, file)
    try:
        found = made(found, path)
    except DottedError as error:
        raise _wrong(file, error.wrong) from error
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


def scorer_digest(path: str, root: Path, file: str) -> str:
    """Digest of the module's source, so that an edited scorer makes its scores out of date."""
    _loaded(path, root, file)
    return source_digest(path)


def grade(scorer: Scorer, row: Row) -> Outcome:
    """The scorer's values; an exception becomes a Failure with its traceback."""
    try:
        values: object = scorer.score(dict(row))
        if not isinstance(values, dict):
            kind = type(values).__name__
            return Failure(Reason.SCORER_ERROR, f"score() returned {kind}; expected a dict")
        rated: dict[str, Any] = plain(cast("dict[Any, Any]", values))
    except RAISED:
        return Failure(Reason.SCORER_ERROR, plain(traceback.format_exc(limit=-5)))
    if not rated:
        what = "an empty dict; expected at least one key, null where it has no value"
        return Failure(Reason.SCORER_ERROR, f"score() returned {what}")
    if taken := reserved(rated):
        return Failure(Reason.SCORER_ERROR, f"score() returned {taken}")
    try:
        return Success(fitted(rated, declared_fields(scorer) or {}))
    except ValueError as error:
        return Failure(Reason.SCORER_ERROR, f"score() returned a wrong value: {error}")


def reserved(keys: Mapping[str, Any]) -> str:
    """What is wrong with keys that would hide columns of ours."""
    taken = [key for key in keys if key.startswith("api_")]
    what = "names that start with api_ are columns of this program; choose others"
    return f"{', '.join(taken)}: {what}" if taken else ""


def _loaded(path: str, root: Path, file: str) -> Any:
    try:
        return load_object(path, root, "score(item) -> dict")
    except DottedError as error:
        raise _wrong(file, error.wrong, error.expected) from error


def _wrong(file: str, wrong: str, expected: str = "") -> SetupError:
    return SetupError([Problem(file, "scorer", wrong, expected)])
