"""Copies of what a stage has published, in the form that others want."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import PurePosixPath
from typing import Literal

import pyarrow as pa

from modelcall_assets.errors import InputError
from modelcall_assets.records.outcome import BadLine, Row, bad_line, moved_names
from modelcall_assets.stages.responses import FAILED_BEFORE
from modelcall_assets.stages.selection import Selection, Split, chosen_rows, joined_schema
from modelcall_assets.stages.source import Published
from modelcall_assets.storage.files import NewFile, delete, publish, write_lines
from modelcall_assets.storage.parquet import ParquetSink
from modelcall_assets.storage.places import Place
from modelcall_assets.storage.rows import Batch
from modelcall_assets.transforms import encode
from modelcall_assets.transforms.transcript import dialogue_pieces, turns_of


@dataclass(frozen=True, slots=True)
class Form:
    """How the files look. With `old_names` failed rows have a file of their own, `_error`."""

    format: Literal["jsonl", "parquet"] = "jsonl"
    old_names: bool = False
    split: Split = field(default_factory=Split)

    def targets(self, stem: PurePosixPath) -> Iterator[tuple[str, bool, PurePosixPath]]:
        """Part, whether it is for failed rows only, and path, of all that can come of a file."""
        for part in self.split.parts:
            for is_error in (False, True) if self.old_names else (False,):
                name = f"{stem.name}{'_error' if is_error else ''}.{self.format}"
                yield part, is_error, part / stem.with_name(name)


def export_file(file: Published, folder: Place, selection: Selection, form: Form) -> dict[str, int]:
    """Publish the selected rows of a file below `folder`, in order; gives the number of rows by
    relative path. A file of failed rows exists only when there are any."""
    file.check()
    schema = joined_schema([file], selection) if form.format == "parquet" else None
    written = dict[str, int]()
    with ExitStack() as stack:
        sinks: dict[tuple[str, bool], _Sink] = {}
        for part, is_error, path in form.targets(file.stem):
            new = stack.enter_context(NewFile(folder / path))
            parquet = None
            if schema is not None:
                parquet = stack.enter_context(ParquetSink(new, file.stage.name, schema))
            sinks[part, is_error] = _Sink(path, new, parquet, is_error)
        for batch in file.batches():
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
        for chosen in chosen_rows(files, selection, Split()):
            if not isinstance(chosen.item, BadLine) and turns_of(chosen.item):
                count += 1
                yield chosen.item

    with publish(path) as log:
        write_lines(log, (piece.encode() for piece in dialogue_pieces(conversations(), when)))
        if not count:
            raise InputError("no selected row has messages: there is no dialogue to write")
    return count


def _routed(
    file: Published, batch: Batch, selection: Selection, form: Form
) -> dict[tuple[str, bool], list[int]]:
    """Offsets in the batch by the target that they go to."""
    routed: dict[tuple[str, bool], list[int]] = {}
    for offset, item in enumerate(batch.items):
        if selection.takes(file, batch.start + offset, item):
            record = file.identity(batch.start + offset, item) if form.split.share else ""
            is_error = form.old_names and file.failure_of(item) is not None
            routed.setdefault((form.split.part_of(record), is_error), []).append(offset)
    return routed


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
