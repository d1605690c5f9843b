"""The preprocessing of a file, without a project."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from modelcall_assets.config.preprocess import Preprocess
from modelcall_assets.stages.preprocessed import preprocess
from modelcall_assets.stages.raw import read_raw
from modelcall_assets.stages.recipe import Recipe
from modelcall_assets.stages.report import Report
from modelcall_assets.stages.source import Part, Source
from modelcall_assets.storage.columns import read_schema
from modelcall_assets.storage.files import publish
from modelcall_assets.storage.listing import stat_file
from modelcall_assets.storage.rows import read_batches


def preprocessed(path: Path, limit: int | None = None, processes: int = 1, **fields: Any) -> Report:
    """With the fields of a `preprocess` block."""
    source, recipe = source_of(path, limit), recipe_of(path.parent, **fields)
    with publish(path.with_name("out") / "result.parquet") as out:
        return preprocess(source, recipe, out, processes=processes)


def recipe_of(root: Path, **fields: Any) -> Recipe:
    return Recipe(Preprocess.model_validate({"enabled": True, **fields}), root, "task.yaml")


def source_of(path: Path, limit: int | None = None) -> Source:
    raw = read_raw(stat_file(path), limit=limit)
    return Source((Part(path.name, path, raw.digest),), raw.schema, raw.rows, limit)


def published(path: Path) -> list[Any]:
    output = path.with_name("out") / "result.parquet"
    return [
        item for batch in read_batches(output, schema=read_schema(output)) for item in batch.items
    ]
