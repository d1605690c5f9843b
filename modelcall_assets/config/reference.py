"""Prints docs/config.md: `python -m modelcall_assets.config.reference > docs/config.md`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from types import UnionType
from typing import Annotated, Any, Literal, TypeGuard, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from modelcall_assets.config.block import Block
from modelcall_assets.config.datasets import MAPPING_KEYS, DatasetConfig
from modelcall_assets.config.distillation import DistillationTask
from modelcall_assets.config.legacy import (
    MODEL_FIELDS,
    PLACEHOLDERS,
    STEP_ALIASES,
    STEP_FIELDS,
    TASK_FIELDS,
    OldField,
)
from modelcall_assets.config.merge_groups import MergeGroup
from modelcall_assets.config.model import FirstGeneration, SecondGeneration
from modelcall_assets.config.prompt import PromptFile
from modelcall_assets.config.stores import StorageFile, StoreProfile
from modelcall_assets.config.task import ScoringTask
from modelcall_assets.config.task_file import ConfigPath, TaskFile, in_file_order

_INTRO = """\
# Config files

Generated from the models in `modelcall_assets/config/`. `modelcall check` validates every file
below `configs/` and names each mistake by file and field.

- An unknown key is an error. `-1` or `null` means no limit where a field is a limit.
- Relative paths start at the project root: the nearest folder that holds `workspace.yaml` or
  `configs/`. Relative data folders start at `data_root`, where a task or `configs/storage.yaml` has
  one; `./` in front means the project root all the same.
- A data folder may be the URI of a store, such as `s3://bucket/folder`: [storage.md](storage.md).
- `${NAME}` and `${NAME:-default}` are replaced in endpoints, keys, data folders and the options of
  stores. A task's own env files win over the process environment, which wins over `.env` in the
  project root. No other task sees a task's env files.
- `{task_name}` is replaced in data folders.
"""
_DISTILLATION = """\
`configs/tasks/**/*.yaml` with `task_type: data_distillation` or `generate_response`

Beside these it has the fields of every task: all of the table above but `data`, `preprocess`,
`model`, `prompt` and `scorer`. The steps run in this order. A file may hold some of them only, and
files whose folders fit together are one graph. A file with a single step may write it as the old
system did: `distillation: {step: chatml_conversion, …}` with the step's fields, and without `step`
where `task_type` is `generate_response`. [distillation.md](distillation.md) has examples.
"""
_DATASETS = """\
`configs/distillation/*.yaml`: a mapping of data sets, by their path below `input_dir` such as
`org/name` or `chats.jsonl`.
"""
_STORAGE = """\
`configs/storage.yaml`, which a project may do without. What a profile for S3 leaves out is taken
from variables, for `tos://` from `TOS_…` in place of `AWS_…`. [storage.md](storage.md) has
examples.
"""
_GROUPS = "`configs/distillation/*.yaml`: a list under `merge_groups`.\n"
_NAMES = {str: "text", int: "integer", float: "number", bool: "true or false", type(None): "null"}


def reference() -> str:
    """The whole page."""
    parts = [
        _INTRO,
        *_section("Scoring task", "`configs/tasks/**/*.yaml`", ScoringTask),
        "## Distilling task\n",
        _DISTILLATION,
        _table(_HEAD, _own_rows(DistillationTask)),
        "## Data sets\n",
        _DATASETS,
        _table(_HEAD, _rows(DatasetConfig, "")),
        _table(("format_style", "keys of column_mapping"), _mapping_rows()),
        "## Merge groups\n",
        _GROUPS,
        _table(_HEAD, _rows(MergeGroup, "")),
        *_section("Model", "`configs/models/*.yaml` or `.json`", SecondGeneration),
        *_section("Model, first generation", "Still read, with the same meaning.", FirstGeneration),
        *_section("Prompt", "`configs/prompts/*.yaml`", PromptFile),
        "## Storage\n",
        _STORAGE,
        _table(_HEAD, (*_rows(StoreProfile, "stores.<name>."), *_storage_rows())),
        "## Old fields\n",
        "Fields of the old system whose effect is another one here.\n",
        _table(("field", "treatment", "why, or what to write"), _old_rows()),
    ]
    return "\n".join(parts)


def _section(title: str, place: str, model: type[Block]) -> Iterator[str]:
    yield f"## {title}\n"
    yield f"{place}\n"
    yield _table(_HEAD, _rows(model, ""))


_SHARED = frozenset(TaskFile.model_fields)
_HEAD = ("field", "type", "default", "meaning")


def _own_rows(model: type[TaskFile]) -> Iterator[tuple[str, ...]]:
    """Without the fields of every task."""
    return (row for row in _rows(model, "") if row[0].strip("`").split(".")[0] not in _SHARED)


def _storage_rows() -> Iterator[tuple[str, ...]]:
    """Without the profiles."""
    return (row for row in _rows(StorageFile, "") if row[0] != "`stores`")


def _mapping_rows() -> Iterator[tuple[str, ...]]:
    for style, keys in MAPPING_KEYS.items():
        yield f"`{style}`", ", ".join(f"`{key}`" for key in keys)


def _rows(model: type[Block], prefix: str) -> Iterator[tuple[str, ...]]:
    for name, info in in_file_order(model).items():
        path = f"{prefix}{name}"
        if (block := _block_of(info.annotation)) is not None:
            yield from _rows(block, f"{path}.")
        else:
            meaning = " ".join((info.description or "").split())
            yield f"`{path}`", _type(info.annotation), _default(info), meaning


def _block_of(annotation: Any) -> type[Block] | None:
    """The block that has rows of its own, also where it may be left out; not a reference."""
    arms = [arm for arm in get_args(annotation) or (annotation,) if arm is not type(None)]
    block = arms[0] if len(arms) == 1 else None
    return block if _is_block(block) and block is not ConfigPath else None


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
    if info.default_factory_takes_validated_data:
        return "–"
    default = info.get_default(call_default_factory=True)
    return "–" if default is None else f"`{json.dumps(default)}`"


def _old_rows() -> Iterator[tuple[str, ...]]:
    for old in (*TASK_FIELDS, *MODEL_FIELDS):
        yield f"`{old.path}`", _treatment(old), old.instead
    for old in STEP_FIELDS:
        step, _, name = old.path.partition(".")
        names = (name, *(alias for alias, own in STEP_ALIASES.items() if own == name))
        shown = " or ".join(f"`distillation.{each}`" for each in names)
        yield f"{shown} ({step})", _treatment(old), old.instead
    yield "`distillation.model_config`", "honoured", "another name of `response_config_path`"
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
