"""preprocessed, from the rows of a partition to its publication."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import uuid4

from modelcall_assets.config.preprocess import Dedup
from modelcall_assets.config.spec import PREPROCESSED
from modelcall_assets.records.keys import decode_key
from modelcall_assets.steps.draft import Draft
from modelcall_assets.steps.duplicates import Duplicates
from modelcall_assets.steps.layout import Layout
from modelcall_assets.steps.old_stat import is_group, write_old_stat
from modelcall_assets.steps.preprocess import PreprocessReport, preprocess
from modelcall_assets.steps.progress import Tally
from modelcall_assets.steps.recipe import Recipe
from modelcall_assets.steps.source import Source
from modelcall_assets.storage.files import NewFile
from modelcall_assets.storage.manifest import InputFingerprint, Manifest
from modelcall_assets.storage.parquet import as_stored
from modelcall_assets.storage.schema import readable_schema, schema_to_json


def preprocess_partition(
    recipe: Recipe,
    layout: Layout,
    key: str,
    source: Source,
    raw: InputFingerprint,
    tally: Tally,
) -> PreprocessReport:
    """`raw` is what its input was when it was looked at. SetupError when the recipe cannot be
    followed here, InputChanged when the input is no longer the same, RunStopped when `tally` was
    told to stop."""
    recipe.check()
    processes = min(recipe.config.num_proc, os.cpu_count() or 1)
    began = time.time()

    def write(out: NewFile) -> PreprocessReport:
        with _seen_before(recipe.config.dedup, layout, key) as seen:
            return preprocess(source, recipe, out, seen=seen, processes=processes, tally=tally)

    with Draft(layout, PREPROCESSED, key) as draft:
        if (stat := layout.stat_path(key, is_group=is_group(source))) is not None:
            draft.check(stat)
        report = draft.written(write)
        source.verify()
        for place, name in recipe.absent(source.schema.names).items():
            told = f"no row has the column '{name}', which preprocess.{place} names"
            report.warnings.append(told)
            tally.warnings.append(f"{decode_key(key)}: {told}")
        manifest = Manifest(
            stage=PREPROCESSED,
            data_version=report.data_version,
            rows=report.rows_out,
            ok=report.rows_out - report.failed,
            failed=report.failed,
            dropped=report.dropped.total(),
            failures=report.failures_by_reason(),
            input=raw,
            schema=readable_schema(report.schema),
            moved=report.moved,
            detail={"schema": schema_to_json(as_stored(report.schema))},
        )
        if not draft.is_rejected:
            write_old_stat(recipe, layout, key, source, report, began, draft)
        draft.publish(manifest)
    return report


@contextmanager
def _seen_before(wanted: Dedup, layout: Layout, key: str) -> Iterator[Duplicates | None]:
    if not wanted.exact and wanted.near is None:
        yield None
        return
    with Duplicates(layout.duplicates_path, key, uuid4().hex, wanted.near) as seen:
        yield seen
