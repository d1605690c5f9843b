"""Copies of what a stage has published, in the form that others want."""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence, Set
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import datetime
from heapq import heappush, heappushpop
from pathlib import PurePosixPath
from typing import Literal

import pyarrow as pa

from modelcall_assets.errors import InputError, Problem, SetupError, did_you_mean
from modelcall_assets.records.outcome import BadLine, Row, bad_line, moved_names, short
from modelcall_assets.stages.responses import FAILED_BEFORE
from modelcall_assets.stages.source import Published
from modelcall_assets.storage.files import NewFile, delete, publish, write_lines
from modelcall_assets.storage.parquet import ParquetSink
from modelcall_assets.storage.places import Place
from modelcall_assets.storage.rows import Batch
from modelcall_assets.storage.values import SchemaInference
from modelcall_assets.transforms import Where, encode, value_at
from modelcall_assets.transforms.transcript import dialogue_pieces, turns_of

Keep = Literal["successes", "failures", "all"]
TRAIN, VALIDATION = "train", "validation"
_WHOLE = 1 << 64
MOST_STRATA = 1000


@dataclass(frozen=True, slots=True)
class Selection:
    """Which rows are exported."""

    keep: Keep = "successes"
    where: Where | None = None
    only: Set[tuple[str, int]] | None = None
    """Names of files and indices of rows."""

    def takes(self, file: Published, index: int, item: Row | BadLine) -> bool:
        if self.only is not None and (file.name, index) not in self.only:
            return False
        if self.keep != "all" and (file.failure_of(item) is None) != (self.keep == "successes"):
            return False
        return self.where is None or self.where(item)


@dataclass(frozen=True, slots=True)
class Form:
    """How the files look. With `old_names` failed rows have a file of their own, `_error`."""

    format: Literal["jsonl", "parquet"] = "jsonl"
    old_names: bool = False
    validation_share: float = 0.0
    seed: int = 42

    def targets(self, stem: PurePosixPath) -> Iterator[tuple[str, bool, PurePosixPath]]:
        """Part, whether it is for failed rows only, and path, of all that can come of a file."""
        for part in (TRAIN, VALIDATION) if self.validation_share else ("",):
            for is_error in (False, True) if self.old_names else (False,):
                name = f"{stem.name}{'_error' if is_error else ''}.{self.format}"
                yield part, is_error, part / stem.with_name(name)

    def part_of(self, record: str) -> str:
        """A record with the same id is always in the same part."""
        if not self.validation_share:
            return ""
        hashed = hashlib.sha256(f"{self.seed}:{record}".encode("utf-8", "surrogatepass")).digest()
        share = int.from_bytes(hashed[:8], "big") / _WHOLE
        return VALIDATION if share < self.validation_share else TRAIN


def export_file(file: Published, folder: Place, selection: Selection, form: Form) -> dict[str, int]:
    """Publish the selected rows of a file below `folder`, in order; gives the number of rows by
    relative path. A file of failed rows exists only when there are any."""
    file.check()
    schema = _schema(file, selection) if form.format == "parquet" else None
    written = dict[str, int]()
    with ExitStack() as stack:
        sinks: dict[tuple[str, bool], _Sink] = {}
        for part, is_error, path in form.targets(file.stem):
            new = stack.enter_context(NewFile(folder / path))
            parquet = None
            if schema is not None:
                parquet = stack.enter_context(ParquetSink(new, file.stage.name, schema))
            sinks[part, is_error] = _Sink(path, new, parquet, is_error)
        for batch in file.batches(schema):
            for key, offsets in _routed(file, batch, selection, form).items():
                sinks[key].write(file, batch, offsets)
        for sink in sinks.values():
            if sink.rows or not sink.is_of_failures:
                if sink.parquet is not None:
                    sink.parquet.close()
                sink.file.commit()
                written[sink.path.as_posix()] = sink.rows
            else:
                delete(folder / sink.path)
    return written


def export_dialogues(
    files: Sequence[Published], path: Place, selection: Selection, when: datetime
) -> int:
    """Publish the conversations of all files as one dialogue log; gives their number. InputError
    when there is none."""
    count = 0

    def conversations() -> Iterator[Row]:
        nonlocal count
        for file in files:
            file.check()
            for index, item in file.items():
                if (
                    selection.takes(file, index, item)
                    and not isinstance(item, BadLine)
                    and turns_of(item)
                ):
                    count += 1
                    yield item

    with publish(path) as log:
        write_lines(log, (piece.encode() for piece in dialogue_pieces(conversations(), when)))
        if not count:
            raise InputError("no selected row has messages: there is no dialogue to write")
    return count


def stratified(
    files: Sequence[Published], selection: Selection, size: int, by: str | None, seed: int
) -> Selection:
    """So many of the selected rows, the same ones each time; `by` a column as many of each of its
    values, as far as it has them. InputError when no row has the column, or it has more than 1,000
    values."""
    strata = defaultdict[str, list[tuple[int, str, int]]](list)
    for file in files:
        for index, item in file.items():
            if isinstance(item, BadLine) or not selection.takes(file, index, item):
                continue
            record = f"{seed}:{file.identity(index, item)}:{item.get('sample')}"
            lot = hashlib.sha256(record.encode("utf-8", "surrogatepass")).digest()
            row = -int.from_bytes(lot[:8], "big"), file.name, index
            stratum = strata["" if by is None else str(value_at(item, by))]
            if len(stratum) < size:
                heappush(stratum, row)
            else:
                heappushpop(stratum, row)
        if len(strata) > MOST_STRATA:
            what = f"more than {MOST_STRATA:,} values; take a column with few"
            raise InputError(f"--by {by}: {what}")
    if not strata.keys() - {"None"}:
        names = files[0].column_names if files else ()
        told = did_you_mean(by or "", names) or f"choose one of {', '.join(sorted(names))}"
        raise InputError(f"--by {by}: no row has this column; {told}")
    ranked = sorted(
        (rank, value, name, index)
        for value, rows in strata.items()
        for rank, (_, name, index) in enumerate(sorted(rows, reverse=True))
    )
    return replace(selection, only={(name, index) for _, _, name, index in ranked[:size]})


def check_columns(where: Where, files: Sequence[Published]) -> None:
    """SetupError when the first rows of no file have a column that the condition names."""
    missing, names = set(where.columns), set[str]()
    for file in files:
        first = next(file.batches(), None)
        rows = [] if first is None else [row for row in first.items if isinstance(row, dict)]
        names.update(*rows)
        missing = {name for name in missing if names.isdisjoint((name, name.partition(".")[0]))}
        if not missing:
            return
    if names:
        fixes = {name: did_you_mean(name, names) for name in sorted(missing)}
        expected = f"one of {', '.join(map(short, sorted(names)))}"
        raise SetupError(
            [
                Problem("--where", name, "no row has this column", "" if fix else expected, fix=fix)
                for name, fix in fixes.items()
            ]
        )


def _routed(
    file: Published, batch: Batch, selection: Selection, form: Form
) -> dict[tuple[str, bool], list[int]]:
    """Offsets in the batch by the target that they go to."""
    routed: dict[tuple[str, bool], list[int]] = {}
    for offset, item in enumerate(batch.items):
        if selection.takes(file, batch.start + offset, item):
            record = file.identity(batch.start + offset, item) if form.validation_share else ""
            is_error = form.old_names and file.failure_of(item) is not None
            routed.setdefault((form.part_of(record), is_error), []).append(offset)
    return routed


def _schema(file: Published, selection: Selection) -> pa.Schema:
    """The recorded one, else that of the selected rows."""
    if (recorded := file.schema) is not None:
        return recorded
    inference = SchemaInference()
    for batch in file.batches():
        rows = enumerate(batch.items, batch.start)
        taken = (row for index, row in rows if selection.takes(file, index, row))
        inference.add([row for row in taken if isinstance(row, dict)])
    return inference.schema()


@dataclass(slots=True)
class _Sink:
    """One open output, at its path below the folder."""

    path: PurePosixPath
    file: NewFile
    parquet: ParquetSink | None
    is_of_failures: bool
    """As the old system wrote them."""
    rows: int = 0

    def write(self, source: Published, batch: Batch, offsets: Sequence[int]) -> None:
        self.rows += len(offsets)
        if self.parquet is not None:
            if any(isinstance(batch.items[offset], BadLine) for offset in offsets):
                raise InputError(f"{source.name}: bad lines have no columns; export them as JSONL")
            self.parquet.write(
                batch.to_arrow(self.parquet.schema).take(pa.array(offsets, pa.int64()))
            )
            return
        write_lines(self.file, self._lines(source, batch, offsets))

    def _lines(self, source: Published, batch: Batch, offsets: Sequence[int]) -> Iterator[bytes]:
        for offset in offsets:
            index, item = batch.start + offset, batch.items[offset]
            if isinstance(item, BadLine):
                error = {"reason": bad_line(item).reason, "detail": item.detail, "raw": item.raw}
                item = {"id": source.identity(index, item), "error": error}
            yield encode(_old_failure(source, index, item) if self.is_of_failures else item)


def _old_failure(file: Published, index: int, row: Row) -> Row:
    """With the keys that the old system gave to a failed row."""
    failure = file.failure_of(row)
    reason, detail = (failure.reason, failure.detail) if failure else ("", "")
    theirs = FAILED_BEFORE - {file.stage.maker.error_column}
    if not theirs.isdisjoint(row):
        moved = moved_names(file.column_names, theirs)
        row = {moved.get(name, name): value for name, value in row.items()}
    return {
        **row,
        "error": f"{reason}: {detail}",
        "error_type": reason,
        "traceback": detail if detail.startswith("Traceback") else "",
        "timestamp": row.get("api_answered_at") or "",
        "task_index": index,
    }
