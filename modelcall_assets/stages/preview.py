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

from modelcall_assets.journal.index import Address
from modelcall_assets.records.data_files import encode_key
from modelcall_assets.records.outcome import BadLine, Dropped, Failure, Row, bad_line
from modelcall_assets.stages.asking import AskingStage
from modelcall_assets.stages.inputs import GroupedInputs
from modelcall_assets.stages.replay import Asked
from modelcall_assets.stages.source import Part, Source
from modelcall_assets.stages.task import Task
from modelcall_assets.storage.listing import FileInfo
from modelcall_assets.storage.publishing import read_manifest
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
    task: Task, file: FileInfo, rows: int, every: int = 1
) -> Iterator[Row | Failure | Dropped]:
    """Of the first `rows` rows one in `every`, as the first stage that asks or rates gets them."""
    for identity, item in islice(_first_items(task, file, rows), 0, None, every):
        yield bad_line(item) if isinstance(item, BadLine) else _prepared(task, item, file, identity)


def _prepared(task: Task, row: Row, file: FileInfo, identity: str) -> Row | Failure | Dropped:
    for stage in task.stages:
        made = row if stage.answers else stage.preview(row, file, identity)
        if stage.answers or not isinstance(made, dict):
            return made
        row = made
    return row


def _first_items(task: Task, file: FileInfo, rows: int) -> Iterator[tuple[str, Row | BadLine]]:
    """Each with the id that it gets unless it has one of its own."""
    reading = task.stages[0].reading
    if not isinstance(task.inputs, GroupedInputs):
        for index, item in enumerate(islice(read_rows(file.place, reading), rows)):
            yield record_id(item, index, file.key_path), item
        return
    members = task.inputs.members(encode_key(file.key_path))
    nothing = pa.schema([])
    source = Source(tuple(map(Part.of, members)), nothing, rows, rows, reading)
    for name, piece in source.pieces(rows):
        for place, item in enumerate(piece.chunk(nothing, reading).items):
            yield record_id(item, piece.start + place, name), item


def first_asks(task: Task, file: FileInfo, rows: int) -> Iterator[Asked | Dropped]:
    """What the first `rows` rows ask of the model."""
    asking = task.first_answering
    assert isinstance(asking, AskingStage)
    for row in first_rows(task, file, rows):
        yield row if isinstance(row, Failure | Dropped) else asking.ask(row)


def plan_file(task: Task, file: FileInfo) -> FilePlan:
    """Rows are counted (from the `raw` manifest when it is current), tokens extrapolated from some
    rows; with a journal, every row's request is looked up in it."""
    task.layout.check_name(encode_key(file.key_path))
    in_rows = _row_count(task, file)
    reach = ceil(in_rows * min(1.0, SAMPLE_BYTES / max(1, file.size)))
    sample = list(first_rows(task, file, reach, max(1, ceil(reach / SAMPLE_ROWS))))
    kept = [row for row in sample if not isinstance(row, Dropped)]
    scale = in_rows / len(sample) if sample else 0.0
    rules = Counter(row.rule for row in sample if isinstance(row, Dropped))
    dropped = {rule: round(count * scale) for rule, count in rules.items()}
    rows = round(len(kept) * scale)
    asking = task.first_answering
    if not isinstance(asking, AskingStage):
        return FilePlan(file.key_path, rows, 0, 0, dropped=dropped)
    asks = [row if isinstance(row, Failure) else asking.ask(row) for row in kept]
    tokens = ceil(sum(map(_tokens, asks)) * rows / len(kept)) if kept else 0
    failed = round(sum(isinstance(asked, Failure) for asked in asks) * scale)
    n = asking.samples
    journalled = _journalled(task, asking, file, in_rows) if looks_up(task, asking) else 0
    return FilePlan(file.key_path, rows * n, tokens * n, journalled, failed * n, dropped)


def looks_up(task: Task, asking: AskingStage) -> bool:
    """Whether the journal can be asked: it has the input's partitions, and a request to a row."""
    return asking.keys is task.stages[0].keys and asking.samples == 1


def _tokens(asked: Asked) -> int:
    if isinstance(asked, Failure):
        return 0
    return sum(_message_tokens(message.get("content")) for message in asked.messages)


def _message_tokens(content: Any) -> int:
    text = content if isinstance(content, str) else orjson.dumps(content).decode()
    return count_tokens(text) + MESSAGE_TOKENS


def _row_count(task: Task, file: FileInfo) -> int:
    """Of a file, or of all files of a split."""
    first = task.stages[0]
    manifest = (
        None if first.suffix else read_manifest(first.manifest_path(encode_key(file.key_path)))
    )
    if manifest is not None and manifest.input.version == file.version:
        return manifest.rows
    return task.count_rows(file)


def _journalled(task: Task, asking: AskingStage, file: FileInfo, rows: int) -> int:
    """Rows whose request has a reply, or the final refusal of one, in the journal."""
    folder = asking.journal_folder(encode_key(file.key_path))
    with task.layout.read_journal(str(folder)) as journal:
        if not len(journal):
            return 0
        keys = Counter(
            asked.key()
            for asked in first_asks(task, file, rows)
            if not isinstance(asked, Failure | Dropped)
        )
        return sum(
            Address(key, occurrence) in journal
            for key, count in keys.items()
            for occurrence in range(count)
        )
