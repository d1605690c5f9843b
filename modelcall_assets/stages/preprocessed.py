"""preprocessed: an input file, or a group of them, as clean and truncated rows in Parquet.

Order is kept. A line or row that cannot be processed stays in its place: it has the columns of the
input, `id` and `preprocess_error`; all else is null. `preprocess_error` is JSON, {"reason",
"detail", "raw"}, and null in good rows.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol
from uuid import uuid4

import orjson
import pyarrow as pa

from modelcall_assets.config.preprocess import Preprocess
from modelcall_assets.config.task import ScoringTask
from modelcall_assets.errors import RunStopped
from modelcall_assets.records.data_files import decode_key
from modelcall_assets.records.outcome import BadLine, Dropped, Failure, Reason, Row, bad_line
from modelcall_assets.stages.duplicates import Duplicates
from modelcall_assets.stages.inputs import FolderInputs, GroupedInputs, Inputs
from modelcall_assets.stages.made import ERROR_COLUMN, Made, RowSpool
from modelcall_assets.stages.old_stat import is_group, write_old_stat
from modelcall_assets.stages.piece_work import PieceWork, ShippingWork
from modelcall_assets.stages.publication import Draft
from modelcall_assets.stages.recipe import Recipe
from modelcall_assets.stages.report import LISTED, Report, Tally, counted
from modelcall_assets.stages.source import Source
from modelcall_assets.stages.stage import Stage
from modelcall_assets.stages.workers import map_in_order
from modelcall_assets.storage.columns import as_stored
from modelcall_assets.storage.files import NewFile
from modelcall_assets.storage.listing import FileInfo
from modelcall_assets.storage.parquet import ParquetSink, schema_to_json
from modelcall_assets.storage.places import Place
from modelcall_assets.transforms.preprocessor import Grouping
from modelcall_assets.transforms.universal import REQUIRED


class Preprocessed(Stage):
    name = "preprocessed"
    kinds = ("python", "parquet")
    error_column = ERROR_COLUMN
    shows_progress = True

    @property
    def about(self) -> str:
        return "cleaned, filtered and truncated rows"

    @property
    def folder(self) -> Place:
        return self.layout.place(self.spec.folder(self.name))

    @property
    def options(self) -> Preprocess:
        assert isinstance(self.spec.task, ScoringTask)
        return self.spec.task.preprocess

    @cached_property
    def recipe(self) -> Recipe:
        return Recipe(self.options, self.spec.root, self.spec.file_name)

    @cached_property
    def inputs(self) -> Inputs:
        """The files that the preprocessor wants, or puts together. SetupError when the user's
        cannot be had."""
        preprocessor, pattern = self.recipe.preprocessor(), self.options.file_pattern
        if isinstance(preprocessor, Grouping):
            return GroupedInputs(self.task, self.task.input_field, preprocessor, pattern)
        return FolderInputs(self.task, self.task.input_field, pattern=pattern)

    def own_shape(self) -> dict[str, Any]:
        return self.recipe.version()

    def check_ready(self) -> None:
        self.recipe.check()

    def failure_of(self, row: Row | BadLine) -> Failure | None:
        error = None if isinstance(row, BadLine) else row[ERROR_COLUMN]
        if error is None:
            return None
        carried = orjson.loads(error)
        if carried["reason"] == Reason.BAD_LINE:
            return bad_line(BadLine(carried["detail"], carried["raw"]))
        return Failure(Reason(carried["reason"]), carried["detail"])

    def preview(self, row: Row, file: FileInfo, identity: str) -> Row | Failure | Dropped:
        made = self._row_work.made(row, identity)
        return made if isinstance(made, Dropped) else (self.failure_of(made) or made)

    @cached_property
    def _row_work(self) -> PieceWork:
        assert self.upstream is not None
        return PieceWork(self.recipe, pa.schema([]), self.upstream.reading)

    def stat_path(self, key: str, *, is_group: bool) -> Place | None:
        """Of what the old system left of a file, where the task asks for it."""
        folder = self.options.stat_folder
        if folder is None:
            return None
        file = f"{decode_key(key)}_combined.json" if is_group else f"{decode_key(key)}.json"
        return self.layout.place(self.spec.resolved(folder)) / "preprocess" / file

    def beside(self, key: str, *, rejected: bool = False) -> list[Place]:
        kinds = () if rejected else (False, True)
        stats = (self.stat_path(key, is_group=is_group) for is_group in kinds)
        return [place for place in stats if place is not None]

    def make(self, key: str, tally: Tally) -> Report:
        """SetupError when the recipe cannot be followed here, InputChanged when the input is no
        longer the same, RunStopped when `tally` was told to stop."""
        assert self.upstream is not None
        source, raw = self.source(key), self.upstream.need(key)
        self.recipe.check()
        processes, began = min(self.options.num_proc, os.cpu_count() or 1), time.time()

        def write(out: NewFile) -> Report:
            with self._seen_before(key) as seen:
                return preprocess(
                    source, self.recipe, out, seen=seen, processes=processes, tally=tally
                )

        with Draft(self, key) as draft:
            stat = self.stat_path(key, is_group=is_group(source))
            if stat is not None:
                draft.check(stat)
            report = draft.written(write)
            source.verify()
            for place, name in self.recipe.absent(source.schema.names).items():
                told = f"no row has the column '{name}', which preprocess.{place} names"
                report.warnings.append(told)
                tally.warnings.append(f"{decode_key(key)}: {told}")
            if stat is not None and not draft.is_rejected:
                write_old_stat(stat, self, key, source, report, began, draft)
            draft.publish(report, raw.input)
        return report

    @contextmanager
    def _seen_before(self, key: str) -> Iterator[Duplicates | None]:
        wanted = self.options.dedup
        if not wanted.exact and wanted.near is None:
            yield None
            return
        path = self.layout.duplicates_path
        with Duplicates(path, key, uuid4().hex, wanted.near) as seen:
            yield seen


class SeenBefore(Protocol):
    """Which texts the task's files have already."""

    def rules(self, texts: list[tuple[bytes, bytes | None]]) -> list[str | None]: ...
    def finish(self) -> None: ...


def preprocess(
    source: Source,
    recipe: Recipe,
    out: NewFile,
    *,
    seen: SeenBefore | None = None,
    processes: int = 1,
    tally: Tally | None = None,
) -> Report:
    """Write the rows of `source` to `out`.

    InputError when it cannot be read, InputChanged when it no longer fits its schema, WorkerDied
    when one of the processes was killed, RunStopped when `tally` was told to stop.
    """
    work = PieceWork(recipe, source.schema, source.reading)
    total = _Total(seen)
    report = total.report
    with _made(source, recipe, work, processes) as made:
        kept = (total.kept(each.received()) for each in _counted(made, tally or Tally()))
        if work.schema is None:
            report.schema, report.moved = _write_spooled(kept, work.added, out)
        else:
            report.schema, report.moved = work.schema, work.moved
            with ParquetSink(out, Preprocessed.name, work.schema) as sink:
                for each in kept:
                    sink.write(pa.RecordBatch.from_arrays(each.columns, schema=work.schema))
    if seen is not None:
        seen.finish()
    total.finish()
    return report


@contextmanager
def _made(
    source: Source, recipe: Recipe, work: PieceWork, processes: int
) -> Iterator[Iterator[Made]]:
    if processes == 1:
        yield map(work, source.batches())
        return
    with TemporaryDirectory(prefix="modelcall-") as folder:
        arguments = (recipe, source.schema, source.reading, Path(folder))
        pieces = source.batches()
        with closing(map_in_order(work, ShippingWork, arguments, pieces, processes)) as made:
            yield made


def _counted(made: Iterator[Made], tally: Tally) -> Iterator[Made]:
    for each in made:
        if tally.is_stopped:
            raise RunStopped("interrupted; nothing is published, the file begins anew")
        tally.failed += each.failed
        tally.ok += each.rows_in - each.failed
        yield each


class _Total:
    """What became of the pieces together."""

    def __init__(self, seen: SeenBefore | None) -> None:
        self.report = Report()
        self._seen, self._content = seen, hashlib.sha256()
        self._removed, self._problems = Counter[str](), list[str]()
        self._problem_rows = 0

    def kept(self, each: Made) -> Made:
        """A piece without the rows that were seen before."""
        report = self.report
        report.rows_in += each.rows_in
        report.dropped += each.dropped
        if self._seen is not None:
            rules = iter(self._seen.rules([text for text in each.texts if text is not None]))
            by_row = [None if text is None else next(rules) for text in each.texts]
            report.dropped.update(rule for rule in by_row if rule is not None)
            each = each.only([at for at, rule in enumerate(by_row) if rule is None])
        for at, error in each.failures.items():
            reason, detail = (orjson.loads(error)[name] for name in ("reason", "detail"))
            report.fail(f"row {report.rows + at + 1}", reason, detail)
        report.rows += len(each)
        for _, row in each.sample:
            report.show(row)
        self._removed += each.removed
        self._problem_rows += len(each.problems)
        self._problems += each.problems[: LISTED - len(self._problems)]
        self._content.update(b"".join(each.digests))
        return each

    def finish(self) -> None:
        report = self.report
        report.data_version = f"sha256:{self._content.hexdigest()}"
        report.detail = {"schema": schema_to_json(as_stored(report.schema))}
        if not report.rows and any(rule.startswith(REQUIRED) for rule in report.dropped):
            # A filter may well leave nothing; columns that no row has are a mistake.
            fix = "compare required_fields with the columns of the file"
            report.emptied = report.all_dropped(fix)
        if self._removed:
            report.tables["removed_by_kind"] = counted("kind", self._removed)
        if self._problem_rows:
            report.numbers["rows_with_problems"] = self._problem_rows
            report.tables["problems"] = [{"problem": problem} for problem in self._problems]


def _write_spooled(
    pieces: Iterator[Made], added: pa.Schema, out: NewFile
) -> tuple[pa.Schema, dict[str, str]]:
    """Where the columns are known only when all rows are."""
    with RowSpool(added) as spool:
        for each in pieces:
            spool.add(each.lines)
        schema = spool.schema()
        with ParquetSink(out, Preprocessed.name, schema) as sink:
            for batch in spool.batches(schema):
                sink.write(batch)
    return schema, spool.moved
