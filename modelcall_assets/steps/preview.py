"""What a task would ask, without materialising anything: for `plan` and `try`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

import pyarrow as pa

from modelcall_assets.journal.journal import Address, Journal
from modelcall_assets.records.keys import encode_key
from modelcall_assets.records.outcome import Failure, Reason
from modelcall_assets.records.record import BadLine, Row
from modelcall_assets.steps.calls import Asked
from modelcall_assets.steps.preprocess import PROCESS_ERRORS, bad_line
from modelcall_assets.steps.raw import read_raw
from modelcall_assets.steps.task_steps import PREPROCESSED, RAW, SCORES, TaskSteps
from modelcall_assets.storage.files import FileInfo
from modelcall_assets.storage.manifest import read_manifest
from modelcall_assets.storage.parquet import read_schema
from modelcall_assets.storage.rows import is_parquet, read_chunks, record_id
from modelcall_assets.transforms.tokens import count_tokens
from modelcall_assets.transforms.universal import Dropped, process

SAMPLE_ROWS = 50
MESSAGE_TOKENS = 4
"""What the chat format adds to each message; an estimate."""


@dataclass(frozen=True, slots=True)
class FilePlan:
    """An input file before it is scored. `prompt_tokens` is an estimate from its first rows."""

    key_path: str
    rows: int
    prompt_tokens: int
    journalled: int


def first_rows(steps: TaskSteps, file: FileInfo, rows: int) -> Iterator[Row | Failure | Dropped]:
    """The first `rows` rows, after preprocessing where the task has it."""
    schema = read_schema(file.uri) if is_parquet(file.uri) else pa.schema([])
    for chunk in read_chunks(file.uri, schema, rows):
        for offset, item in enumerate(chunk.items):
            if isinstance(item, BadLine):
                yield bad_line(item)
            else:
                index = chunk.start + offset
                yield _prepared(steps, item, record_id(item, index, file.key_path))


def first_asks(steps: TaskSteps, file: FileInfo, rows: int) -> Iterator[Asked | Dropped]:
    """What the first `rows` rows ask of the model."""
    for row in first_rows(steps, file, rows):
        yield row if isinstance(row, Failure | Dropped) else steps.score_stage.ask(row)


def plan_file(steps: TaskSteps, file: FileInfo) -> FilePlan:
    """Rows are counted (from the `raw` manifest when it is current), tokens extrapolated from the
    first rows; with a journal, every row's request is looked up in it."""
    steps.layout.check_name(encode_key(file.key_path))
    sample = list(first_rows(steps, file, SAMPLE_ROWS))
    kept = [row for row in sample if not isinstance(row, Dropped)]
    in_rows = _row_count(steps, file)
    rows = in_rows if len(kept) == len(sample) else round(in_rows * len(kept) / len(sample))
    if steps.rule_stage is not None:
        return FilePlan(file.key_path, rows, prompt_tokens=0, journalled=0)
    asks = [row if isinstance(row, Failure) else steps.score_stage.ask(row) for row in kept]
    return FilePlan(
        file.key_path,
        rows,
        prompt_tokens=ceil(sum(map(_tokens, asks)) * rows / len(kept)) if kept else 0,
        journalled=_journalled(steps, file, in_rows),
    )


def _prepared(steps: TaskSteps, row: Row, identity: str) -> Row | Failure | Dropped:
    if PREPROCESSED not in steps.stages:
        return row
    try:
        return process(row, steps.universal_options, identity)
    except PROCESS_ERRORS as error:
        return Failure(Reason.PREPROCESS_ERROR, f"{type(error).__name__}: {error}")


def _tokens(asked: Asked) -> int:
    if isinstance(asked, Failure):
        return 0
    return sum(count_tokens(message["content"]) + MESSAGE_TOKENS for message in asked.messages)


def _row_count(steps: TaskSteps, file: FileInfo) -> int:
    manifest = read_manifest(steps.layout.manifest_path(RAW, encode_key(file.key_path)))
    if manifest is not None and manifest.input.version == file.version:
        return manifest.rows
    return read_raw(file, steps.row_limit).rows


def _journalled(steps: TaskSteps, file: FileInfo, rows: int) -> int:
    """Rows whose request has a reply, or the final refusal of one, in the journal."""
    folder = steps.layout.journal_folder(SCORES, encode_key(file.key_path))
    with Journal(folder, "plan") as journal:
        if not len(journal):
            return 0
        keys = Counter(
            asked.key()
            for asked in first_asks(steps, file, rows)
            if not isinstance(asked, Failure | Dropped)
        )
        return sum(
            Address(key, occurrence) in journal
            for key, count in keys.items()
            for occurrence in range(count)
        )
