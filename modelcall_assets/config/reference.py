"""Prints docs/config.md: `python -m modelcall_assets.config.reference > docs/config.md`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from types import UnionType
from typing import Annotated, Any, Literal, TypeGuard, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from modelcall_assets.config.block import Block
from modelcall_assets.config.legacy import MODEL_FIELDS, PLACEHOLDERS, TASK_FIELDS, OldField
from modelcall_assets.config.model import FirstGeneration, SecondGeneration
from modelcall_assets.config.prompt import PromptFile
from modelcall_assets.config.task import ScoringTask

_INTRO = """\
# Config files

Generated from the models in `modelcall_assets/config/`. `modelcall check` validates every file
below `configs/` and names each mistake by file and field.

- An unknown key is an error. `-1` or `null` means no limit where a field is a limit.
- Relative paths start at the project root: the nearest folder that holds `workspace.yaml` or
  `configs/`.
- `${NAME}` and `${NAME:-default}` are replaced in endpoints, keys and data folders. A task's own
  env files win over the process environment, which wins over `.env` in the project root. No other
  task sees a task's env files.
- `{task_name}` is replaced in data folders.
"""
_NAMES = {str: "text", int: "integer", float: "number", bool: "true or false", type(None): "null"}


def reference() -> str:
    """The whole page."""
    parts = [
        _INTRO,
        *_section("Task", "`configs/tasks/**/*.yaml`", ScoringTask),
        *_section("Model", "`configs/models/*.yaml` or `.json`", SecondGeneration),
        *_section("Model, first generation", "Still read, with the same meaning.", FirstGeneration),
        *_section("Prompt", "`configs/prompts/*.yaml`", PromptFile),
        "## Old fields\n",
        "Fields of the old system whose effect is another one here.\n",
        _table(("field", "treatment", "why, or what to write"), _old_rows()),
    ]
    return "\n".join(parts)


def _section(title: str, place: str, model: type[Block]) -> Iterator[str]:
    yield f"## {title}\n"
    yield f"{place}\n"
    yield _table(("field", "type", "default", "meaning"), _rows(model, ""))


def _rows(model: type[Block], prefix: str) -> Iterator[tuple[str, ...]]:
    for name, info in model.model_fields.items():
        path = f"{prefix}{name}"
        if _is_block(info.annotation):
            yield from _rows(info.annotation, f"{path}.")
        else:
            kind = _type(info.annotation)
            yield f"`{path}`", kind, _default(info), info.description or ""


def _is_block(annotation: Any) -> TypeGuard[type[Block]]:
    return isinstance(annotation, type) and issubclass(annotation, Block)


def _type(annotation: Any) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(args[0])
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(_type(arm) for arm in args))
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in args)
    if origin is list:
        return f"list of {_type(args[0])}"
    if origin is dict:
        return "mapping" if args[1] is Any else f"mapping to {_type(args[1])}"
    if _is_block(annotation):
        fields = ", ".join(
            f"{n}: {_type(i.annotation)}" for n, i in annotation.model_fields.items()
        )
        return f"{{{fields}}}"
    return _NAMES.get(annotation, "any")


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    default = info.get_default(call_default_factory=True, validated_data={"input_key": None})
    return "–" if default is None else f"`{json.dumps(default)}`"


def _old_rows() -> Iterator[tuple[str, ...]]:
    for old in (*TASK_FIELDS, *MODEL_FIELDS):
        yield f"`{old.path}`", _treatment(old), old.instead
    for name, instead in PLACEHOLDERS.items():
        yield f"`{{{name}}}` in a folder", "refused", instead


def _treatment(old: OldField) -> str:
    harmless = [json.dumps(value) for value in old.harmless if value is not None]
    return f"{old.treatment}; {' or '.join(harmless)} is fine" if harmless else old.treatment


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


if __name__ == "__main__":
    sys.stdout.write(reference())
