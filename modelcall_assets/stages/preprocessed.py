"""preprocessed: an input file, or a group of them, as clean and truncated rows in Parquet.

Order is kept. A line or row that cannot be processed stays in its place: it has the columns of the
input, `id` and `preprocess_error`; all else is null. `preprocess_error` is JSON, {"reason",
"detail", "raw"}, and null in good rows.
"""

import hashlib
import os
import time
from collections import Counter
from contextlib import closing, nullcontext
from datetime import UTC, datetime
from functools import cached_property, partial
from tempfile import TemporaryFile
from typing import Any

import orjson
import pyarrow as pa

from modelcall_assets.config.preprocess import Preprocess
from modelcall_assets.config.task import ScoringTask
from modelcall_assets.errors import RunStopped
from modelcall_assets.records import decode_key
from modelcall_assets.records.outcome import BadLine, Dropped, Failure, Reason, Row, bad_line
from modelcall_assets.stages import Stage
from modelcall_assets.stages.duplicates import Duplicates
from modelcall_assets.stages.inputs import GroupedInputs, Inputs, data_files
from modelcall_assets.stages.pieces import ERROR_COLUMN, PieceRows, RowSpool, in_order
from modelcall_assets.stages.publication import Draft
from modelcall_assets.stages.recipe import Recipe, Worker
from modelcall_assets.stages.report import LISTED, Report, Tally, counted
from modelcall_assets.stages.source import Source, batches_of
from modelcall_assets.storage.files import NewFile
from modelcall_assets.storage.listing import FileInfo, stat_file
from modelcall_assets.storage.parquet import ParquetSink, as_stored
from modelcall_assets.storage.places import Place
from modelcall_assets.transforms.preprocessor import REQUIRED, Grouping


class Preprocessed(Stage):
    name = "preprocessed"
    about = "cleaned, filtered and truncated rows"
    kinds = ("python", "parquet")
    done = "preprocessed"
    error_column = ERROR_COLUMN
    shows_progress = True

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
            return GroupedInputs(self.task, preprocessor, pattern)
        return data_files(self.task, pattern=pattern)

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
        new = self._worker.row(row, identity)
        if isinstance(new, Dropped):
            return new
        return self.failure_of(new.row) or new.row

    @cached_property
    def _worker(self) -> Worker:
        return Worker(self.recipe, pa.schema([]))

    def beside(self, key: str, *, rejected: bool = False) -> list[Place]:
        """What the old system left of a file, where the task asks for it:
        `<stat_folder>/preprocess/<relative path>.json`, and `…/<partition>_combined.json` where
        that has several files."""
        folder = self.options.stat_folder
        if folder is None or rejected:
            return []
        place = self.layout.place(self.spec.resolved(folder)) / "preprocess"
        return [place / f"{decode_key(key)}{end}.json" for end in ("", "_combined")]

    def make(self, key: str, tally: Tally) -> Report:
        """SetupError when the recipe cannot be followed here, InputChanged when the input is no
        longer the same, RunStopped when `tally` was told to stop."""
        source, raw = self.source(key), self.before.need(key)
        is_group = len(source.parts) > 1 or any(part.is_document for part in source.parts)
        self.recipe.check()
        processes, began = min(self.options.num_proc, os.cpu_count() or 1), time.time()
        wanted, path = self.options.dedup, self.layout.duplicates_path

        def write(out: NewFile) -> Report:
            looks = wanted.exact or wanted.near is not None
            duplicates = Duplicates(path, key, wanted.near) if looks else nullcontext()
            with duplicates as seen:
                return preprocess(
                    source, self.recipe, out, seen=seen, processes=processes, tally=tally
                )

        with Draft(self, key) as draft:
            stat = next(iter(self.beside(key)[is_group:]), None)
            if stat is not None:
                draft.check(stat)
            report = draft.written(write)
            source.verify()
            for field, column in self.recipe.absent(source.schema.names).items():
                warning = f"no row has the column '{column}', which preprocess.{field} names"
                report.warnings.append(warning)
                tally.warnings.append(f"{decode_key(key)}: {warning}")
            if stat is not None and not draft.is_rejected:
                content = self._old_stat(key, source, report, draft.out, began)
                if is_group:
                    content |= {"language": decode_key(key), "num_xml_files": len(source.parts)}
                draft.beside(stat).write(orjson.dumps(content, option=orjson.OPT_INDENT_2))
            draft.publish(report, raw.input)
        return report

    def _old_stat(
        self, key: str, source: Source, report: Report, out: NewFile, began: float
    ) -> dict[str, Any]:
        """For programs that read what the old system left of a file. Names are spelt as they
        were."""
        ended = time.time()
        return {
            "prompt_conf": {},
            "model_conf": {},
            "rating_times": 0,
            "voting_status": False,
            "raw_file_path": str(self.layout.input_folder / decode_key(key)),
            "formatted_file_path": str(out.place),
            "taged_file_paths": [],
            "voting_file_path": "",
            "n_sample": report.rows,
            "processing_complete": True,
            "start_time": datetime.fromtimestamp(began, UTC).isoformat(),
            "end_time": datetime.fromtimestamp(ended, UTC).isoformat(),
            "processing_time_seconds": round(ended - began, 3),
            "max_tokens": self.options.max_tokens,
            "output_file_exists": True,
            "output_file_size_bytes": out.tell(),
            "input_file_size_bytes": sum(stat_file(part.place).size for part in source.parts),
        }


def preprocess(
    source: Source,
    recipe: Recipe,
    out: NewFile,
    *,
    seen: Duplicates | None = None,
    processes: int = 1,
    tally: Tally | None = None,
) -> Report:
    """Write the rows of `source` to `out`, but for those whose texts were `seen`.

    InputError when it cannot be read, InputChanged when it no longer fits its schema, WorkerDied
    when one of the processes was killed, RunStopped when `tally` was told to stop.
    """
    make = partial(Worker, recipe, source.schema)
    worker, total = make(), _Total(seen, tally or Tally())
    report, read = total.report, batches_of(source.parts, source.reading, source.limit)
    with closing(in_order(worker, make, read, processes)) as pieces:
        kept = map(total.kept, pieces)
        if worker.schema is None:
            with TemporaryFile() as file:
                spool = RowSpool(file, worker.added)
                for rows in kept:
                    spool.add(rows.lines)
                report.schema = spool.schema()
                report.moved = spool.moved
                with ParquetSink(out, Preprocessed.name, report.schema) as sink:
                    for batch in spool.batches(report.schema):
                        sink.write(batch)
        else:
            report.schema, report.moved = worker.schema, worker.moved
            with ParquetSink(out, Preprocessed.name, worker.schema) as sink:
                for rows in kept:
                    sink.write(pa.RecordBatch.from_arrays(rows.columns, schema=worker.schema))
    if seen is not None:
        seen.finish()
    total.finish()
    return report


class _Total:
    """What became of the pieces together."""

    def __init__(self, seen: Duplicates | None, tally: Tally) -> None:
        self.report = Report()
        self._seen, self._tally, self._content = seen, tally, hashlib.sha256()
        self._removed, self._problems = Counter[str](), list[str]()
        self._problem_rows = 0

    def kept(self, rows: PieceRows) -> PieceRows:
        """Without the rows that were seen before. RunStopped."""
        if self._tally.is_stopped:
            raise RunStopped("interrupted; nothing is published, the file begins anew")
        self._tally.failed += len(rows.failures)
        self._tally.ok += rows.rows_in - len(rows.failures)
        report = self.report
        report.rows_in += rows.rows_in
        report.dropped += rows.dropped
        if self._seen is not None:
            rules = iter(self._seen.rules([text for text in rows.texts if text is not None]))
            by_row = [None if text is None else next(rules) for text in rows.texts]
            report.dropped.update(rule for rule in by_row if rule is not None)
            rows = rows.only([index for index, rule in enumerate(by_row) if rule is None])
        for index, error in rows.failures.items():
            reason, detail = (orjson.loads(error)[name] for name in ("reason", "detail"))
            report.fail(report.rows + index + 1, "", reason, detail)
        report.rows += len(rows)
        for row in rows.sample.values():
            report.show(row)
        self._removed += rows.removed
        self._problem_rows += len(rows.problems)
        self._problems += rows.problems[: LISTED - len(self._problems)]
        self._content.update(b"".join(rows.digests))
        return rows

    def finish(self) -> None:
        report = self.report
        report.data_version = f"sha256:{self._content.hexdigest()}"
        report.schema = as_stored(report.schema)
        if not report.rows and any(rule.startswith(REQUIRED) for rule in report.dropped):
            # A filter may well leave nothing; columns that no row has are a mistake.
            fix = "compare required_fields with the columns of the file"
            report.emptied = report.all_dropped(fix)
        if self._removed:
            report.tables["removed_by_kind"] = counted("kind", self._removed)
        if self._problem_rows:
            report.numbers["rows_with_problems"] = self._problem_rows
            report.tables["problems"] = [{"problem": problem} for problem in self._problems]
