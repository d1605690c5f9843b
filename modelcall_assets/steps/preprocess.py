"""preprocessed: an input file, or a group of them, as clean and truncated rows in Parquet.

Order is kept. A line or row that cannot be processed stays in its place: it has the columns of the
input, `id` and `preprocess_error`; all else is null. `preprocess_error` is JSON, {"reason",
"detail", "raw"}, and null in good rows.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import orjson
import pyarrow as pa

from modelcall_assets.config.spec import PREPROCESSED
from modelcall_assets.errors import RunStopped
from modelcall_assets.records.outcome import Failure, Reason
from modelcall_assets.records.record import BadLine, Row
from modelcall_assets.steps.made import ERROR_COLUMN, Made
from modelcall_assets.steps.piece_work import PieceWork, ShippingWork
from modelcall_assets.steps.progress import Tally
from modelcall_assets.steps.recipe import Recipe
from modelcall_assets.steps.row_spool import RowSpool
from modelcall_assets.steps.score_report import one_line
from modelcall_assets.steps.source import Source
from modelcall_assets.steps.workers import map_in_order
from modelcall_assets.storage.files import NewFile
from modelcall_assets.storage.parquet import ParquetSink
from modelcall_assets.transforms.universal import REQUIRED

SAMPLE_ROWS = 3
LISTED_PROBLEMS = 20


class SeenBefore(Protocol):
    """Which texts the task's files have already."""

    def rules(self, texts: list[tuple[bytes, bytes | None]]) -> list[str | None]: ...
    def finish(self) -> None: ...


@dataclass
class PreprocessReport:
    """`rows_in` = `rows_out` + all `dropped`, by rule. `removed`: what was scrubbed out of texts,
    by kind. `problems`: of packs, the first ones."""

    rows_in: int = 0
    rows_out: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    """Rows that hold an error, by reason."""
    first_failure: str = ""
    removed: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    problem_rows: int = 0
    warnings: list[str] = field(default_factory=list)
    sample: list[Row] = field(default_factory=list)
    schema: pa.Schema = field(default_factory=lambda: pa.schema([]))
    moved: dict[str, str] = field(default_factory=dict)
    """Input columns that are called like ours → their names in the output."""
    data_version: str = ""

    @property
    def rows(self) -> int:
        return self.rows_out

    @property
    def failed(self) -> int:
        return self.failures.total()

    @property
    def failure_rate(self) -> float:
        return self.failed / self.rows_out if self.rows_out else float(bool(self.emptied))

    @property
    def emptied(self) -> str:
        """A filter may well leave nothing; columns that no row has are a mistake."""
        if self.rows_out or not any(rule.startswith(REQUIRED) for rule in self.dropped):
            return ""
        return f"{dropped_all(self.dropped)}; compare required_fields with the columns of the file"

    def failures_by_reason(self) -> dict[str, int]:
        return dict(self.failures.most_common())


def preprocess(
    source: Source,
    recipe: Recipe,
    out: NewFile,
    *,
    seen: SeenBefore | None = None,
    processes: int = 1,
    tally: Tally | None = None,
) -> PreprocessReport:
    """Write the rows of `source` to `out`.

    InputError when it cannot be read, InputChanged when it no longer fits its schema, WorkerDied
    when one of the processes was killed, RunStopped when `tally` was told to stop.
    """
    work = PieceWork(recipe, source.schema, source.reading)
    report, content = PreprocessReport(), hashlib.sha256()
    with _made(source, recipe, work, processes) as made:
        counted = _counted(made, tally or Tally())
        kept = (_kept(each.received(), seen, report, content) for each in counted)
        if work.schema is None:
            report.schema, report.moved = _write_spooled(kept, work.added, out)
        else:
            report.schema, report.moved = work.schema, work.moved
            with ParquetSink(out, PREPROCESSED, work.schema) as sink:
                for each in kept:
                    sink.write(pa.RecordBatch.from_arrays(each.columns, schema=work.schema))
    if seen is not None:
        seen.finish()
    report.data_version = f"sha256:{content.hexdigest()}"
    return report


@contextmanager
def _made(
    source: Source, recipe: Recipe, work: PieceWork, processes: int
) -> Iterator[Iterator[Made]]:
    if processes == 1:
        yield map(work, source.pieces())
        return
    with TemporaryDirectory(prefix="modelcall-") as folder:
        arguments = (recipe, source.schema, source.reading, Path(folder))
        pieces = source.pieces()
        with closing(map_in_order(work, ShippingWork, arguments, pieces, processes)) as made:
            yield made


def _counted(made: Iterator[Made], tally: Tally) -> Iterator[Made]:
    for each in made:
        if tally.is_stopped:
            raise RunStopped("interrupted; nothing is published, the file begins anew")
        tally.failed += each.failed
        tally.ok += each.rows_in - each.failed
        yield each


def _kept(each: Made, seen: SeenBefore | None, report: PreprocessReport, content: Any) -> Made:
    """A piece without the rows that were seen before, counted."""
    report.rows_in += each.rows_in
    report.dropped += each.dropped
    if seen is not None:
        rules = iter(seen.rules([text for text in each.texts if text is not None]))
        by_row = [None if text is None else next(rules) for text in each.texts]
        report.dropped.update(rule for rule in by_row if rule is not None)
        each = each.only([at for at, rule in enumerate(by_row) if rule is None])
    for at, error in each.failures.items():
        reason, detail = (orjson.loads(error)[name] for name in ("reason", "detail"))
        report.failures[reason] += 1
        told = f"{one_line(detail)} (row {report.rows_out + at + 1})"
        report.first_failure = report.first_failure or told
    report.rows_out += len(each)
    report.removed += each.removed
    report.problem_rows += len(each.problems)
    report.problems += each.problems[: LISTED_PROBLEMS - len(report.problems)]
    report.sample += [row for _, row in each.sample][: SAMPLE_ROWS - len(report.sample)]
    content.update(b"".join(each.digests))
    return each


def _write_spooled(
    pieces: Iterator[Made], added: pa.Schema, out: NewFile
) -> tuple[pa.Schema, dict[str, str]]:
    """Where the columns are known only when all rows are."""
    with RowSpool(added) as spool:
        for each in pieces:
            spool.add(each.lines)
        schema = spool.schema()
        with ParquetSink(out, PREPROCESSED, schema) as sink:
            for batch in spool.batches(schema):
                sink.write(batch)
    return schema, spool.moved


def failure_before(row: Row | BadLine) -> Failure | None:
    """Why a preprocessed row cannot be worked on, when preprocessing said so."""
    error = None if isinstance(row, BadLine) else row[ERROR_COLUMN]
    if error is None:
        return None
    carried = orjson.loads(error)
    if carried["reason"] == Reason.BAD_LINE:
        return bad_line(BadLine(carried["detail"], carried["raw"]))
    return Failure(Reason(carried["reason"]), carried["detail"])


def dropped_all(dropped: Mapping[str, int]) -> str:
    """What to say when no row is left."""
    rules = ", ".join(f"{rule} {count:,}" for rule, count in dropped.items())
    return f"all {sum(dropped.values()):,} rows were dropped: {rules}"


def bad_line(line: BadLine) -> Failure:
    """What becomes of a line that is no row; its text is kept."""
    return Failure(Reason.BAD_LINE, f"{line.detail}; the line reads: {line.raw}")
