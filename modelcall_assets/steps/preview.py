"""What a task would ask, without materialising anything: for `plan` and `try`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from math import ceil
from typing import Any

import orjson
import pyarrow as pa

from modelcall_assets.config.spec import RAW, SCORES
from modelcall_assets.journal.journal import Address
from modelcall_assets.records.keys import encode_key
from modelcall_assets.records.outcome import Dropped, Failure
from modelcall_assets.records.record import BadLine, Row
from modelcall_assets.steps.inputs import GroupedInputs
from modelcall_assets.steps.preprocess import bad_line
from modelcall_assets.steps.replay import Asked
from modelcall_assets.steps.responses import ResponseStage
from modelcall_assets.steps.source import Part, Source
from modelcall_assets.steps.task_steps import TaskSteps
from modelcall_assets.storage.listing import FileInfo
from modelcall_assets.storage.manifest import read_manifest
from modelcall_assets.storage.rows import read_rows, record_id
from modelcall_assets.transforms.tokens import count_tokens

SAMPLE_ROWS = 50
SAMPLE_BYTES = 64 << 20
"""Of a file: how far the rows of a sample lie apart."""
MESSAGE_TOKENS = 4
"""What the chat format adds to each message; an estimate."""


@dataclass(frozen=True, slots=True)
class FilePlan:
    """An input file before it is scored. All but `journalled` are estimates from some rows:
    `rows` are left after preprocessing, `failed` of them cannot be asked, `dropped` are by rule."""

    key_path: str
    rows: int
    prompt_tokens: int
    journalled: int
    failed: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict[str, int])


def first_rows(
    steps: TaskSteps, file: FileInfo, rows: int, every: int = 1
) -> Iterator[Row | Failure | Dropped]:
    """Of the first `rows` rows one in `every`, as the first stage that asks or rates gets them."""
    for identity, item in islice(_first_items(steps, file, rows), 0, None, every):
        yield bad_line(item) if isinstance(item, BadLine) else steps.prepared(item, file, identity)


def _first_items(
    steps: TaskSteps, file: FileInfo, rows: int
) -> Iterator[tuple[str, Row | BadLine]]:
    """Each with the id that it gets unless it has one of its own."""
    if not isinstance(steps.inputs, GroupedInputs):
        for index, item in enumerate(islice(read_rows(file.place, steps.reading), rows)):
            yield record_id(item, index, file.key_path), item
        return
    members = steps.inputs.members(encode_key(file.key_path))
    nothing = pa.schema([])
    source = Source(tuple(map(Part.of, members)), nothing, rows, rows, steps.reading)
    for name, piece in source.pieces(rows):
        for place, item in enumerate(piece.chunk(nothing, steps.reading).items):
            yield record_id(item, piece.start + place, name), item


def first_asks(steps: TaskSteps, file: FileInfo, rows: int) -> Iterator[Asked | Dropped]:
    """What the first `rows` rows ask of the model."""
    asking = steps.first_asking
    assert asking is not None
    for row in first_rows(steps, file, rows):
        yield row if isinstance(row, Failure | Dropped) else asking.ask(row)


def plan_file(steps: TaskSteps, file: FileInfo) -> FilePlan:
    """Rows are counted (from the `raw` manifest when it is current), tokens extrapolated from some
    rows; with a journal, every row's request is looked up in it."""
    steps.layout.check_name(encode_key(file.key_path))
    in_rows = _row_count(steps, file)
    reach = ceil(in_rows * min(1.0, SAMPLE_BYTES / max(1, file.size)))
    sample = list(first_rows(steps, file, reach, max(1, ceil(reach / SAMPLE_ROWS))))
    kept = [row for row in sample if not isinstance(row, Dropped)]
    scale = in_rows / len(sample) if sample else 0.0
    rules = Counter(row.rule for row in sample if isinstance(row, Dropped))
    dropped = {rule: round(count * scale) for rule, count in rules.items()}
    rows = round(len(kept) * scale)
    asking = steps.first_asking
    if asking is None:
        return FilePlan(file.key_path, rows, 0, 0, dropped=dropped)
    asks = [row if isinstance(row, Failure) else asking.ask(row) for row in kept]
    tokens = ceil(sum(map(_tokens, asks)) * rows / len(kept)) if kept else 0
    failed = round(sum(isinstance(asked, Failure) for asked in asks) * scale)
    if isinstance(asking, ResponseStage):
        n = asking.samples
        return FilePlan(file.key_path, rows * n, tokens * n, 0, failed * n, dropped)
    journalled = _journalled(steps, file, in_rows)
    return FilePlan(file.key_path, rows, tokens, journalled, failed, dropped)


def _tokens(asked: Asked) -> int:
    if isinstance(asked, Failure):
        return 0
    return sum(_message_tokens(message.get("content")) for message in asked.messages)


def _message_tokens(content: Any) -> int:
    text = content if isinstance(content, str) else orjson.dumps(content).decode()
    return count_tokens(text) + MESSAGE_TOKENS


def _row_count(steps: TaskSteps, file: FileInfo) -> int:
    """Of a file, or of all files of a split."""
    manifest = read_manifest(steps.layout.manifest_path(RAW, encode_key(file.key_path)))
    if manifest is not None and manifest.input.version == file.version:
        return manifest.rows
    return steps.count_rows(file)


def _journalled(steps: TaskSteps, file: FileInfo, rows: int) -> int:
    """Rows whose request has a reply, or the final refusal of one, in the journal."""
    folder = steps.layout.journal_folder(SCORES, encode_key(file.key_path))
    with steps.layout.journal_at(str(folder)) as journal:
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
