"""Python objects of the user's own, named in config files as `module:name`; scorers among them,
and what they return as a file can hold it: plain JSON values, and a type per key."""

import hashlib
import importlib
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from inspect import Parameter, signature
from pathlib import Path
from traceback import FrameSummary, StackSummary, TracebackException, extract_tb
from types import ModuleType
from typing import Any, Protocol, cast

from modelcall_assets.errors import Problem, SetupError, did_you_mean
from modelcall_assets.records.outcome import (
    INT64,
    Failure,
    Outcome,
    Reason,
    Row,
    RowFailed,
    Success,
)

RAISED = (Exception, SystemExit)
"""What user code may do to itself and to nobody else."""
MOST_LEVELS = 100
_METHOD = "score(item) -> dict"
_EXACT = range(-(2**53), 2**53 + 1)
_KINDS = {"integer": int, "number": (int, float), "boolean": bool, "string": str}

_LIBRARIES = (
    "<frozen",
    f"{Path(__file__).parents[1]}/",
    *map(sysconfig.get_path, ("stdlib", "platstdlib", "purelib", "platlib")),
)
"""How the files of code begin that is not the user's."""
_SHOWN_FRAMES = 5
_NAMED, _OTHERS = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY), Parameter.VAR_KEYWORD

Fields = Mapping[str, Mapping[str, Any]]
_digests: dict[ModuleType, str] = {}
"""Of each module's source as it was imported, whatever was written to the file since."""


def load_object(path: str, root: Path, method: str, file: str, field: str) -> Any:
    """The object at `module:name`, which must have a method such as `score(item) -> dict`. Modules
    are looked up in the project root too. SetupError names the `file` and its `field`."""
    name, colon, attribute = path.partition(":")
    if not (name and colon and attribute):
        expected = "module:name, such as my_pkg.rules:Mine"
        raise _wrong(file, field, f"'{path}' names no object", expected)
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    try:
        module = importlib.import_module(name)
        if module not in _digests:
            source = module.__file__
            content = Path(source).read_bytes() if source else b""
            _digests[module] = hashlib.sha256(content).hexdigest()[:16]
    except RAISED as error:
        raise _wrong(file, field, f"import {name} raised {_shown(error)}") from error
    found: Any = getattr(module, attribute, None)
    if found is None:
        raise _wrong(file, field, f"{name} has nothing called {attribute}")
    if not callable(getattr(found, method.partition("(")[0], None)):
        raise _wrong(file, field, f"{path} has no method {method}")
    return found


def create(
    path: str, root: Path, method: str, file: str, field: str, its: str = "", /, **options: Any
) -> Any:
    """What `load_object` finds, or one of the class that it is. Its options are at the field `its`,
    if it can have some: a ValueError of the constructor is what is wrong with them."""
    found = load_object(path, root, method, file, field)
    if not isinstance(found, type):
        if options:
            expected = "a class, which is called with them"
            raise _wrong(file, field, f"{path} takes no options", expected)
        return found
    try:
        return found(**options)
    except RAISED as error:
        unfit = list[Problem]()
        if its and isinstance(error, ValueError):
            unfit = [Problem(file, its, str(error))]
        elif its and isinstance(error, TypeError):
            unfit = [*_unfit(found, options, file, its)]
        raised = Problem(file, field, f"{path}() raised {_shown(error)}")
        raise SetupError(unfit or [raised]) from error


def _unfit(made: type, options: Mapping[str, Any], file: str, its: str) -> Iterator[Problem]:
    """Options that the constructor does not know, and those that it wants and that are not given.
    What it takes as `**others` is for that of the class it inherits from."""
    kinds = [vars(kind) for kind in made.__mro__[:-1] if "__init__" in vars(kind)]
    taken, is_open = dict[str, Parameter](), bool(kinds)
    for each in kinds:
        own = [*signature(each["__init__"]).parameters.values()][1:]
        taken = {**taken, **{one.name: one for one in own if one.kind in _NAMED}, **taken}
        if not (is_open := any(one.kind is _OTHERS for one in own)):
            break
    for name in () if is_open else options.keys() - taken:
        others = taken.keys() - options
        expected = f"one of {', '.join(each for each in taken if each in others)}" if others else ""
        fix = did_you_mean(name, others) or "leave it out"
        yield Problem(file, f"{its}.{name}", "unknown", expected, fix=fix)
    for name, parameter in taken.items():
        if parameter.default is Parameter.empty and name not in options:
            yield Problem(file, f"{its}.{name}", "missing")


def source_digest(path: str) -> str:
    """Digest of the module's source, once it is loaded: other code makes other rows."""
    return _digests[sys.modules[path.partition(":")[0]]]


class Scorer(Protocol):
    """`score` rates one row; its keys become columns. Whatever it raises fails that row only.

    An attribute `fields`, where there is one, declares a JSON-schema type per key; `concurrency`
    says how many rows may be rated at once, in threads.
    """

    def score(self, item: Row) -> dict[str, Any]: ...


def load_scorer(
    path: str, root: Path, file: str, field: str = "scorer", its: str = "", /, **options: Any
) -> Scorer:
    """Made from the options when it is a class. SetupError names the `field` of the task `file`, or
    that of the options."""
    found = create(path, root, _METHOD, file, field, its, **options)
    declared = cast("object", declared_fields(found))
    fields = cast("Mapping[str, object]", {} if declared is None else declared)
    are_types = isinstance(declared, Mapping | None)
    if not are_types or not all(isinstance(each, Mapping) for each in fields.values()):
        expected = "a mapping such as {'score': {'type': 'integer'}}"
        raise _wrong(file, field, f"{path}.fields declares no types", expected)
    if taken := _reserved(fields):
        raise _wrong(file, field, f"{path}.fields: {taken}")
    return found


def declared_fields(scorer: Scorer) -> Fields | None:
    return getattr(scorer, "fields", None)


def scorer_digest(path: str, root: Path, file: str) -> str:
    """Digest of the module's source, so that an edited scorer makes its scores out of date."""
    load_object(path, root, _METHOD, file, "scorer")
    return source_digest(path)


def grade(scorer: Scorer, row: Row) -> Outcome:
    """The scorer's values; an exception becomes a Failure with its traceback, or is one."""
    try:
        values = cast("object", scorer.score(dict(row)))
        if not isinstance(values, dict):
            return _failure(f"{type(values).__name__}; expected a dict")
        rated: dict[str, Any] = plain(cast("dict[Any, Any]", values))
    except RowFailed as error:
        return error.failure
    except RAISED as error:
        return Failure(Reason.SCORER_ERROR, plain(users_traceback(error)))
    if not rated:
        return _failure("an empty dict; expected at least one key, null where it has no value")
    if taken := _reserved(rated):
        return _failure(taken)
    try:
        return Success(fitted(rated, declared_fields(scorer) or {}))
    except ValueError as error:
        return _failure(f"a wrong value: {error}")


def users_traceback(error: BaseException) -> str:
    """With frames of the user's own code only: those of ours and of libraries have paths and line
    numbers that change when these are installed anew."""
    told = TracebackException.from_exception(error)
    waiting = [told]
    while waiting:
        each = waiting.pop()
        each.stack = StackSummary.from_list([*filter(_is_users, each.stack)][-_SHOWN_FRAMES:])
        waiting += filter(None, (each.__cause__, each.__context__, *(each.exceptions or ())))
    return "".join(told.format()).strip()


def _is_users(frame: FrameSummary) -> bool:
    """An installed module is the user's too, if a config file names it."""
    named = (module.__file__ for module in tuple(_digests))
    return not frame.filename.startswith(_LIBRARIES) or frame.filename in named


def _failure(returned: str) -> Failure:
    return Failure(Reason.SCORER_ERROR, f"score() returned {returned}")


def _reserved(keys: Mapping[str, Any]) -> str:
    taken = [key for key in keys if key.startswith("api_")]
    what = "names that start with api_ are columns of this program; choose others"
    return f"{', '.join(taken)}: {what}" if taken else ""


def _wrong(file: str, field: str, wrong: str, expected: str = "") -> SetupError:
    return SetupError([Problem(file, field, wrong, expected)])


def plain(value: Any, level: int = 0) -> Any:
    """`value` made of what JSON has, NaN and infinity too. All else becomes text: dates, integers
    beyond 64 bits, objects of any kind; lone surrogates are written as `\\udc80`.

    ValueError for what is nested too deeply.
    """
    if level > MOST_LEVELS:
        raise ValueError(f"the value is nested deeper than {MOST_LEVELS} levels")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, int):
        return int(value) if value in INT64 else str(int(value))
    if isinstance(value, float):
        return float(value)
    if isinstance(value, Mapping):
        items = cast("Mapping[Any, Any]", value).items()
        return {_text(str(key)): plain(inner, level + 1) for key, inner in items}
    if isinstance(value, list | tuple):
        return [plain(inner, level + 1) for inner in cast("list[Any]", value)]
    if isinstance(value, set | frozenset):  # of no order, so that no run differs from the last
        return sorted((plain(inner, level + 1) for inner in cast("set[Any]", value)), key=str)
    if hasattr(value, "dtype") and hasattr(value, "tolist"):  # numpy
        return plain(value.tolist(), level + 1)
    return _text(str(value))


class SharedTypes:
    """A JSON-schema type per key of plain rows, as they come; `{}`, which is kept as JSON text, for
    values of several types and for nested ones."""

    def __init__(self) -> None:
        self._seen: dict[str, set[str]] = {}

    def note(self, row: Mapping[str, Any]) -> None:
        for key, value in row.items():
            self._seen.setdefault(key, set()).update(() if value is None else (_type_of(value),))

    def fields(self) -> dict[str, dict[str, Any]]:
        return {key: _common(types) for key, types in self._seen.items()}


def fitted(values: Mapping[str, Any], fields: Fields) -> dict[str, Any]:
    """The values, numbers as floats; ValueError names the key that is not as `fields` declares."""
    return {
        key: _fit(key, value, fields[key]) if key in fields else value
        for key, value in values.items()
    }


def _fit(key: str, value: Any, declared: Mapping[str, Any]) -> Any:
    kind = declared.get("type")
    if value is None or not isinstance(kind, str):
        return value
    if kind == "array" and isinstance(value, list):
        items: Mapping[str, Any] = declared.get("items", {})
        return [_fit(f"{key}[]", item, items) for item in cast("list[Any]", value)]
    if kind not in _KINDS and kind != "array":
        return value
    is_bool = isinstance(value, bool)
    if kind == "array" or is_bool != (kind == "boolean") or not isinstance(value, _KINDS[kind]):
        raise ValueError(f"{key} is {value!r:.200}, not of the declared type {kind}")
    return float(value) if kind == "number" else value


def _common(types: set[str]) -> dict[str, Any]:
    if types == {"strings"}:
        return {"type": "array", "items": {"type": "string"}}
    if types == {"integer", "number"}:
        return {"type": "number"}
    if types and types <= {"integer", "wide"}:
        return {"type": "integer"}
    only = next(iter(types)) if len(types) == 1 else None
    return {"type": only} if only in _KINDS else {}


def _type_of(value: Any) -> str:
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int):
        return "integer" if value in _EXACT else "wide" if value in INT64 else "other"
    if isinstance(value, float):
        return "number"
    if isinstance(value, str):
        return "string"
    is_list = isinstance(value, list)
    is_strings = is_list and all(isinstance(item, str) for item in cast("list[Any]", value))
    return "strings" if is_strings else "other"


def _text(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def _shown(error: BaseException) -> str:
    """`NameError: name 'x' is not defined (my_pkg/rules.py, line 3)`."""
    not_users = ("<frozen", __file__, importlib.__file__)
    frames = extract_tb(error.__traceback__)
    users = [frame for frame in frames if not frame.filename.startswith(not_users)]
    where = f" ({users[-1].filename}, line {users[-1].lineno})" if users else ""
    return f"{type(error).__name__}: {error}{where}"
