"""Copies of what stages have published, in the form that others want, and a record beside them of
where each row came from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime
from io import BufferedWriter
from pathlib import PurePosixPath
from typing import Any, Literal

import orjson
import pyarrow as pa

from modelcall_assets.errors import InputError
from modelcall_assets.records.outcome import BadLine, Row, bad_line, moved_names
from modelcall_assets.stages.examples import Examples
from modelcall_assets.stages.responses import FAILED_BEFORE
from modelcall_assets.stages.selection import (
    WHOLE,
    Chosen,
    Selection,
    Split,
    chosen_batches,
    chosen_rows,
    columns_of,
    joined_schema,
)
from modelcall_assets.stages.source import Published
from modelcall_assets.storage.files import (
    LINES_BYTES,
    NewFile,
    copy,
    delete,
    publish,
    write_bytes,
    write_lines,
)
from modelcall_assets.storage.listing import exists
from modelcall_assets.storage.parquet import ParquetSink
from modelcall_assets.storage.places import Place
from modelcall_assets.transforms import encode
from modelcall_assets.transforms.transcript import dialogue_pieces, turns_of

ORIGINS = ".modelcall"
"""The folder in an export that has a line for each row, in the same order. No loader enters it."""

RECORD = "export.json"
"""In it: of the last export."""


@dataclass(frozen=True, slots=True)
class Form:
    """How the files look. With `old_names` failed rows have a file of their own, `_error`."""

    format: Literal["jsonl", "parquet"] = "jsonl"
    old_names: bool = False
    keep_retries: bool = False
    """Whether what has the old names already gets other ones, as the old system gave them."""
    split: Split = WHOLE
    examples: Examples | None = None
    """What is written in place of the rows."""

    def targets(self, stem: PurePosixPath) -> Iterator[tuple[str, bool, PurePosixPath]]:
        """Part, whether it is for failed rows only, and path, of all that can come of a file."""
        for part in self.split.parts:
            for is_error in (False, True) if self.old_names else (False,):
                name = f"{stem.name}{'_error' if is_error else ''}.{self.format}"
                yield part, is_error, part / stem.with_name(name)


@dataclass(frozen=True)
class Exported:
    """Rows by the relative path of a file, and why how many are in none."""

    written: dict[str, int] = field(default_factory=dict[str, int])
    left_out: Counter[str] = field(default_factory=Counter[str])


def export_files(
    groups: Mapping[PurePosixPath, Sequence[Published]],
    folder: Place,
    selection: Selection,
    form: Form,
) -> Exported:
    """Publish the selected rows of the files of a group as one below `folder`, in order, at a path
    without suffix. A file of failed rows exists only when there are any."""
    exported = Exported()
    for stem, files in groups.items():
        for file in files:
            file.check()
        schema = joined_schema(files, selection) if form.format == "parquet" else None
        with ExitStack() as opened:
            outputs = {
                (part, is_error): _Output(opened, folder, path, files[0].stage.name, schema)
                for part, is_error, path in form.targets(stem)
            }
            _write(files, selection, form, outputs, exported.left_out)
            for part in form.split.parts if form.keep_retries else ():
                _keep(outputs[part, False].place, outputs[part, True].place)
            for (_, is_error), output in outputs.items():
                if output.rows or not is_error:
                    output.commit()
                    exported.written[output.path.as_posix()] = output.rows
                else:
                    output.drop()
    return exported


def record_export(
    folder: Place,
    options: Mapping[str, Any],
    files: Sequence[Published],
    exported: Exported,
    when: datetime,
) -> None:
    """Write down what was exported, and how, beside the origins of the rows."""
    rows = Counter[str]()
    for file in files:
        rows[f"{file.stage.spec.name}/{file.stage.name}"] += file.manifest.rows
    record = {"time": when.isoformat(timespec="seconds"), "options": options, "rows": rows}
    record |= {"written": exported.written, "left_out": exported.left_out}
    data = orjson.dumps(record, default=str, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
    write_bytes(folder / ORIGINS / RECORD, data)


def export_dialogues(
    files: Sequence[Published], path: Place, selection: Selection, when: datetime
) -> int:
    """Publish the conversations of all files as one dialogue log; gives their number. InputError
    when there is none."""
    count = 0

    def conversations() -> Iterator[Row]:
        nonlocal count
        for chosen in chosen_rows(files, selection):
            if not isinstance(chosen.item, BadLine) and turns_of(chosen.item):
                count += 1
                yield chosen.item

    for file in files:
        file.check()
    with publish(path) as log:
        write_lines(log, (piece.encode() for piece in dialogue_pieces(conversations(), when)))
        if not count:
            raise InputError("no selected row has messages: there is no dialogue to write")
    return count


def _write(
    files: Sequence[Published],
    selection: Selection,
    form: Form,
    outputs: Mapping[tuple[str, bool], _Output],
    left_out: Counter[str],
) -> None:
    """Each row, or what it is an example of, to its target."""
    if form.examples is not None:
        chosen = chosen_rows(files, selection, form.split)
        for part, line, origin in form.examples.of(chosen, left_out):
            outputs[part, False].add(line, origin)
        return
    for batch, rows in chosen_batches(files, selection, form.split):
        routed: dict[tuple[str, bool], list[Chosen]] = {}
        for each in rows:
            is_error = form.old_names and each.file.failure_of(each.item) is not None
            routed.setdefault((each.part, is_error), []).append(each)
        for (part, is_error), some in routed.items():
            output = outputs[part, is_error]
            if output.parquet is not None:
                output.parquet.write(columns_of(batch, some, output.parquet.schema))
            for each in some:
                line = _line(each, is_error) if output.parquet is None else b""
                output.add(line, each.origin)


def _keep(good: Place, failed: Place) -> None:
    """What a retry of the old system did: where there are failed rows of an earlier export, they
    and the good rows get the first number that is free for both."""
    if not exists(failed):
        return
    stem, number = good.name.removesuffix(".jsonl"), 1
    while any(
        exists(good.parent / f"{stem}_{kind}_retry_{number}.jsonl") for kind in ("success", "error")
    ):
        number += 1
    for kind, place in (("success", good), ("error", failed)):
        if exists(place):
            copy(place, good.parent / f"{stem}_{kind}_retry_{number}.jsonl")


class _Output:
    """A new file, and beside it the origin of each of its rows. They appear with `commit`."""

    def __init__(
        self,
        opened: ExitStack,
        folder: Place,
        path: PurePosixPath,
        stage: str,
        schema: pa.Schema | None,
    ) -> None:
        self.path, self.place, self.rows = path, folder / path, 0
        origins = folder / ORIGINS / path.with_name(f"{path.name}.jsonl")
        self._files = [opened.enter_context(NewFile(place)) for place in (self.place, origins)]
        self._lines, self._origins = (
            opened.enter_context(BufferedWriter(file, LINES_BYTES)) for file in self._files
        )
        self.parquet = None
        if schema is not None:
            self.parquet = opened.enter_context(ParquetSink(self._files[0], stage, schema))

    def add(self, line: bytes, origin: Row) -> None:
        self._lines.write(line)
        self._origins.write(encode(origin))
        self.rows += 1

    def commit(self) -> None:
        if self.parquet is not None:
            self.parquet.close()
        self._lines.flush()
        self._origins.flush()
        for file in self._files:
            file.commit()

    def drop(self) -> None:
        for file in self._files:
            delete(file.place)


def _line(chosen: Chosen, is_old_failure: bool) -> bytes:
    item = chosen.item
    if isinstance(item, BadLine):
        error = {"reason": bad_line(item).reason, "detail": item.detail, "raw": item.raw}
        item = {"id": chosen.id, "error": error}
    return encode(_old_failure(chosen, item) if is_old_failure else item)


def _old_failure(chosen: Chosen, row: Row) -> Row:
    """With the keys that the old system gave to a failed row."""
    file = chosen.file
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
        "task_index": chosen.index,
    }
