"""chatml: the rows of a split as `{messages, format[, raw_data]}` JSON lines, order kept.

A row that cannot be converted stays in its place, with an `error` and no messages.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import orjson

from modelcall_assets.records.outcome import Dropped, Failure, Reason
from modelcall_assets.records.record import BadLine, Row
from modelcall_assets.steps.preprocess import bad_line, dropped_all
from modelcall_assets.storage.files import NewFile
from modelcall_assets.storage.formats import OURS, Reading
from modelcall_assets.storage.jsonl import write_lines
from modelcall_assets.storage.listing import FileInfo
from modelcall_assets.storage.numbers import loads
from modelcall_assets.storage.rows import read_items, sample_row
from modelcall_assets.transforms.chatml import (
    ChatmlOptions,
    encode,
    failed_row,
    to_chatml,
)

SAMPLE_ROWS = 3
LISTED_FAILURES = 20
DETAIL_CHARS = 300
UNWRITABLE = (TypeError, RecursionError)
"""What `encode` raises for a row that JSON cannot hold."""


@dataclass(frozen=True, slots=True)
class ListedFailure:
    """`index` counts the rows of `file` from 0, bad lines too, blank ones not."""

    file: str
    index: int
    reason: Reason
    detail: str


@dataclass(frozen=True, slots=True)
class ChatmlReport:
    """`rows_in` = `rows_out` + all `dropped`, by rule; `failed` of the `rows_out` hold an error.
    `turns`: messages of a good row → rows. `data_version` is the digest of the output file."""

    rows_in: int
    rows_out: int
    dropped: dict[str, int]
    failed: int
    failed_by_reason: dict[str, int]
    first_failures: tuple[ListedFailure, ...]
    turns: dict[int, int]
    data_version: str
    sample: list[Row]

    @property
    def rows(self) -> int:
        return self.rows_out

    @property
    def failure_rate(self) -> float:
        return self.failed / self.rows_out if self.rows_out else float(self.rows_in > 0)

    @property
    def emptied(self) -> str:
        if self.rows_out or not self.rows_in:
            return ""
        return f"{dropped_all(self.dropped)}; compare column_mapping with the columns of the file"

    @property
    def first_failure(self) -> str:
        first = self.first_failures[0]
        return f"{first.detail} ({first.file}, row {first.index + 1})"

    def failures_by_reason(self) -> dict[str, int]:
        return self.failed_by_reason


def convert_split(
    files: Sequence[FileInfo],
    options: ChatmlOptions,
    out: NewFile,
    *,
    limit: int | None = None,
    reading: Reading = OURS,
) -> ChatmlReport:
    """Write the first `limit` rows of `files`, one after another. InputError when a file cannot be
    read, or has a bad line and `reading` refuses those."""
    work = _Work(options)
    write_lines(out, work.lines(files, reading, limit))
    return ChatmlReport(
        rows_in=work.rows_in,
        rows_out=work.rows_in - work.dropped.total(),
        dropped=dict(work.dropped),
        failed=work.failed.total(),
        failed_by_reason=dict(work.failed),
        first_failures=tuple(work.first_failures),
        turns=dict(sorted(work.turns.items())),
        data_version=out.digest,
        sample=work.sample,
    )


@dataclass
class _Work:
    """Converts rows and counts what became of them."""

    options: ChatmlOptions
    rows_in: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    first_failures: list[ListedFailure] = field(default_factory=list)
    turns: dict[int, int] = field(default_factory=dict)
    sample: list[Row] = field(default_factory=list)

    def lines(
        self, files: Sequence[FileInfo], reading: Reading, limit: int | None
    ) -> Iterator[bytes]:
        """The output, a line for each row that is not dropped. Most conversations are texts, and
        the row is copied as it is: so numbers are read as doubles."""
        for file in files:
            first = self.rows_in
            for item, text in read_items(file.place, reading, read=orjson.loads):
                if item is None:
                    continue
                if self.rows_in == limit:
                    return
                self.rows_in += 1
                made = self._made(item, text)
                if isinstance(made, bytes):
                    yield made
                elif isinstance(made, Dropped):
                    self.dropped[made.rule] += 1
                else:
                    yield self._failed(made, file, self.rows_in - first - 1, item, text)

    def _made(self, item: Row | BadLine, text: bytes | None) -> bytes | Dropped | Failure:
        if isinstance(item, BadLine):
            return bad_line(item)
        made = to_chatml(item, self.options, text)
        if text is not None and isinstance(made, dict) and _may_hold_numbers(made):
            made = to_chatml(loads(text), self.options, text)
        if not isinstance(made, dict):
            return made
        try:
            line = encode(made)
        except UNWRITABLE as error:
            return Failure(Reason.CHATML_ERROR, f"cannot be written as JSON: {error}")
        turns = len(made["messages"])
        self.turns[turns] = self.turns.get(turns, 0) + 1
        if len(self.sample) < SAMPLE_ROWS:
            self.sample.append(sample_row(loads(line)))
        return line

    def _failed(
        self, failure: Failure, file: FileInfo, index: int, item: Row | BadLine, text: bytes | None
    ) -> bytes:
        self.failed[failure.reason] += 1
        if len(self.first_failures) < LISTED_FAILURES:
            detail = failure.detail[:DETAIL_CHARS]
            self.first_failures.append(ListedFailure(file.key_path, index, failure.reason, detail))
        if self.options.keep_raw_data and not isinstance(item, BadLine):
            try:
                return encode(failed_row(failure, item, text))
            except UNWRITABLE:
                pass
        return encode(failed_row(failure))


def _may_hold_numbers(made: Row) -> bool:
    """Whether it took more of its row than texts."""
    for turn in made["messages"]:
        if len(turn) > 2 or type(turn.get("content")) is not str:
            return True
    return "tools" in made
