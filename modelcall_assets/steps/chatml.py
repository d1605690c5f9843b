"""chatml: the rows of a split as `{messages, format[, raw_data]}` JSON lines, order kept.

A row that cannot be converted stays in its place, with an `error` and no messages.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from modelcall_assets.records.outcome import Failure, Reason
from modelcall_assets.records.record import BadLine, Row
from modelcall_assets.steps.preprocess import bad_line
from modelcall_assets.storage.files import FileInfo, publish
from modelcall_assets.storage.rows import read_rows, sample_row
from modelcall_assets.transforms.chatml import ChatmlOptions, encode, failed_row, to_chatml
from modelcall_assets.transforms.universal import Dropped

SAMPLE_ROWS = 3
LISTED_FAILURES = 20
DETAIL_CHARS = 300
WRITE_BYTES = 1 << 20
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


def convert_split(
    files: Sequence[FileInfo], options: ChatmlOptions, output: Path, limit: int | None = None
) -> ChatmlReport:
    """Publish the first `limit` rows of `files`, one after another, at `output`. InputError when a
    file cannot be read; then nothing is published."""
    work = _Work(options)
    with publish(output) as temporary, Path(temporary).open("wb", WRITE_BYTES) as out:
        for file, index, item in islice(_items(files), limit):
            out.write(work.line(file, index, item))
    return ChatmlReport(
        rows_in=work.rows_out + work.dropped.total(),
        rows_out=work.rows_out,
        dropped=dict(work.dropped),
        failed=work.failed.total(),
        failed_by_reason=dict(work.failed),
        first_failures=tuple(work.first_failures),
        turns=dict(sorted(work.turns.items())),
        data_version=f"sha256:{work.content.hexdigest()}",
        sample=work.sample,
    )


def _items(files: Sequence[FileInfo]) -> Iterator[tuple[FileInfo, int, Row | BadLine]]:
    for file in files:
        for index, item in enumerate(read_rows(file.uri)):
            yield file, index, item


@dataclass
class _Work:
    """Converts rows and counts what became of them."""

    options: ChatmlOptions
    rows_out: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    first_failures: list[ListedFailure] = field(default_factory=list)
    turns: Counter[int] = field(default_factory=Counter)
    sample: list[Row] = field(default_factory=list)
    content: Any = field(default_factory=hashlib.sha256)

    def line(self, file: FileInfo, index: int, item: Row | BadLine) -> bytes:
        """The output line; nothing when the row is dropped."""
        made = self._made(item)
        if isinstance(made, Dropped):
            self.dropped[made.rule] += 1
            return b""
        line = made if isinstance(made, bytes) else self._failed(made, file, index, item)
        self.rows_out += 1
        self.content.update(line)
        return line

    def _made(self, item: Row | BadLine) -> bytes | Dropped | Failure:
        if isinstance(item, BadLine):
            return bad_line(item)
        made = to_chatml(item, self.options)
        if not isinstance(made, dict):
            return made
        try:
            line = encode(made)
        except UNWRITABLE as error:
            return Failure(Reason.CHATML_ERROR, f"cannot be written as JSON: {error}")
        self.turns[len(made["messages"])] += 1
        if len(self.sample) < SAMPLE_ROWS:
            self.sample.append(sample_row(made))
        return line

    def _failed(self, failure: Failure, file: FileInfo, index: int, item: Row | BadLine) -> bytes:
        self.failed[failure.reason] += 1
        if len(self.first_failures) < LISTED_FAILURES:
            detail = failure.detail[:DETAIL_CHARS]
            self.first_failures.append(ListedFailure(file.key_path, index, failure.reason, detail))
        if self.options.keep_raw_data and not isinstance(item, BadLine):
            try:
                return encode(failed_row(failure, item))
            except UNWRITABLE:
                pass
        return encode(failed_row(failure))
