"""Prints docs/config.md from the models of the config files: `make docs`."""

from __future__ import annotations

import json
import sys
from collections.abc import Container, Iterable, Iterator
from inspect import cleandoc
from itertools import chain
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeGuard, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from modelcall_assets.config import Block, OldField
from modelcall_assets.config.datasets import MAPPING_KEYS, DatasetConfig, MergeGroup
from modelcall_assets.config.distillation import (
    STEP_FIELDS,
    DistillationTask,
    EvaluationTask,
    in_old_block,
)
from modelcall_assets.config.migrate import in_file_order
from modelcall_assets.config.model import MODEL_FIELDS, FirstGeneration, ModelConfig
from modelcall_assets.config.places import PLACEHOLDERS, StorageFile, StoreProfile
from modelcall_assets.config.prompt import PromptConfig
from modelcall_assets.config.task import TASK_FIELDS, ConfigPath, ScoringTask, TaskFile

_INTRO = """\
# Config files

Generated from the models in `modelcall_assets/config/`. `modelcall check` validates every file
below `configs/` and names each mistake by file, field and line.

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
_DATASETS = """\
`configs/distillation/*.yaml`: a mapping of data sets, by their path below `input_dir` such as
`org/name` or `chats.jsonl`."""
_GROUPS = "`configs/distillation/*.yaml`: a list under `merge_groups`."
_OLD = "Fields of the old system whose effect is another one here."
_NAMES = {str: "text", int: "integer", float: "number", bool: "true or false", NoneType: "null"}


def reference() -> str:
    """The whole page."""
    stores = _rows(StoreProfile, "stores.<name>."), _rows(StorageFile, without=("stores",))
    styles = (
        (f"`{style}`", ", ".join(f"`{k}`" for k in keys)) for style, keys in MAPPING_KEYS.items()
    )
    return "\n".join(
        (
            _INTRO,
            _section("Scoring task", "`configs/tasks/**/*.yaml`", _rows(ScoringTask)),
            _section(
                "Distilling task",
                cleandoc(DistillationTask.__doc__ or ""),
                _rows(DistillationTask, without=TaskFile.model_fields),
            ),
            _section(
                "Evaluating task",
                cleandoc(EvaluationTask.__doc__ or ""),
                _rows(EvaluationTask, without=DistillationTask.model_fields),
            ),
            _section("Data sets", _DATASETS, _rows(DatasetConfig)),
            _table(("format_style", "keys of column_mapping"), styles),
            _section("Merge groups", _GROUPS, _rows(MergeGroup)),
            _section("Model", "`configs/models/*.yaml` or `.json`", _rows(ModelConfig)),
            _section(
                "Model, first generation",
                "Still read, with the same meaning.",
                _rows(FirstGeneration),
            ),
            _section("Prompt", "`configs/prompts/*.yaml`", _rows(PromptConfig)),
            _section("Storage", cleandoc(StorageFile.__doc__ or ""), chain(*stores)),
            f"## Old fields\n\n{_OLD}\n",
            _table(("field", "treatment", "why, or what to write"), _old_rows()),
        )
    )


Row = tuple[str, ...]


def _section(title: str, text: str, rows: Iterable[Row]) -> str:
    return f"## {title}\n\n{text}\n\n{_table(('field', 'type', 'default', 'meaning'), rows)}"


def _table(head: Row, rows: Iterable[Row]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _rows(model: type[Block], prefix: str = "", without: Container[str] = ()) -> Iterator[Row]:
    for name, info in in_file_order(model).items():
        path, kind = f"{prefix}{name}", info.annotation
        arms = [arm for arm in get_args(kind) or (kind,) if arm is not NoneType]
        if name in without:
            continue
        if len(arms) == 1 and _is_block(block := arms[0]) and block is not ConfigPath:
            yield from _rows(block, f"{path}.")
        else:
            meaning = " ".join((info.description or "").split())
            yield f"`{path}`", _type(kind), _default(info), meaning


def _is_block(kind: Any) -> TypeGuard[type[Block]]:
    return isinstance(kind, type) and issubclass(kind, Block)


def _type(kind: Any) -> str:
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _type(args[0])
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(map(_type, args)))
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in args)
    if origin is list:
        return f"list of {_type(args[0])}"
    if origin is dict:
        return "mapping" if args[1] is Any else f"mapping to {_type(args[1])}"
    if _is_block(kind):
        fields = (f"{name}: {_type(i.annotation)}" for name, i in kind.model_fields.items())
        return f"{{{', '.join(fields)}}}"
    return _NAMES.get(kind, "any")


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    if info.default_factory_takes_validated_data:
        return "–"
    default = info.get_default(call_default_factory=True)
    return "–" if default is None else f"`{json.dumps(default)}`"


def _old_rows() -> Iterator[Row]:
    for old in (*TASK_FIELDS, *MODEL_FIELDS):
        yield f"`{old.path}`", _treatment(old), old.instead
    for old in STEP_FIELDS:
        step, names = in_old_block(old)
        shown = " or ".join(f"`distillation.{name}`" for name in names)
        yield f"{shown} ({step})", _treatment(old), old.instead
    yield "`distillation.model_config`", "honoured", "another name of `response_config_path`"
    for name, instead in PLACEHOLDERS.items():
        yield f"`{{{name}}}` in a folder", "refused", instead


def _treatment(old: OldField) -> str:
    harmless = [json.dumps(value) for value in old.harmless if value is not None]
    return f"{old.treatment}; {' or '.join(harmless)} is fine" if harmless else old.treatment


if __name__ == "__main__":
    sys.stdout.write(reference())
