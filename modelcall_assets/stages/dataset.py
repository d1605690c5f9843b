"""A data set as others load it, made of the good rows of a stage: Parquet shards of each split, and
a card, which is written last."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain

import pyarrow as pa

from modelcall_assets.errors import InputError, Problem, SetupError
from modelcall_assets.stages.report import Distribution
from modelcall_assets.stages.score_table import VOLATILE_COLUMNS
from modelcall_assets.stages.selection import TRAIN, Selection, Split, joined_schema
from modelcall_assets.stages.source import Published
from modelcall_assets.storage.files import NewFile, delete, read_bytes, write_bytes
from modelcall_assets.storage.listing import FileInfo, list_files
from modelcall_assets.storage.parquet import ParquetSink
from modelcall_assets.storage.places import Place
from modelcall_assets.storage.rows import Batch

CARD = "README.md"
MARK = "<!-- written by `modelcall publish`; the next one replaces it -->"
"""In each card of ours."""
UNFINISHED = f"""---
configs:
- config_name: default
  data_files: data/unfinished.parquet
---
{MARK}
`modelcall publish` is writing this data set, or was stopped while it did. Run it again.
"""
"""The card until all else is there: what it names is not, so that nobody loads a part."""
SHARD = re.compile(r"data/(train|validation)-\d{5}\.parquet")
_LEFT_OUT = re.compile(
    r"(input_)*api_(status|fail_reason|fail_detail|request_key|"
    rf"{'|'.join(name.removeprefix('api_') for name in VOLATILE_COLUMNS)})"
)
"""Columns that say how this machine got an answer, or that it is one; of earlier stages too."""


@dataclass(frozen=True, slots=True)
class Shard:
    """`size` is in bytes of memory."""

    name: str
    rows: int
    size: int


@dataclass
class Shards:
    """What a data set consists of, and how its scores are spread."""

    schema: pa.Schema
    splits: dict[str, list[Shard]] = field(default_factory=dict[str, list[Shard]])
    scores: dict[str, Distribution] = field(default_factory=dict[str, Distribution])

    @property
    def all(self) -> list[Shard]:
        return [shard for shards in self.splits.values() for shard in shards]

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.all)

    def count(self, rows: pa.RecordBatch) -> None:
        for name, spread in self.scores.items():
            for value in rows.column(name).to_pylist():
                if isinstance(value, int | float) and math.isfinite(value):
                    spread.add(value)


@dataclass(frozen=True)
class Dataset:
    """The chosen rows of files of one stage; a shard has about `shard_bytes` in memory."""

    files: Sequence[Published]
    selection: Selection
    split: Split
    shard_bytes: int

    def write(self, folder: Place | None) -> Shards:
        """All shards; without a folder they are only counted. InputError, with nothing changed,
        when no row is chosen, or a file is not as it was published."""
        for file in self.files:
            file.check()
        joined = joined_schema(self.files, self.selection)
        made = Shards(pa.schema([each for each in joined if not _LEFT_OUT.fullmatch(each.name)]))
        rated = (name for file in self.files for name in file.manifest.detail.get("histograms", ()))
        made.scores = {name: Distribution() for name in rated if name in made.schema.names}
        chosen = self._chosen(made.schema)
        if (first := next(chosen, None)) is None:
            raise InputError("no row is selected: there is nothing to publish")
        if folder is not None:
            write_bytes(folder / CARD, UNFINISHED.encode())
        of_all = (folder, self.files[0].stage.name, self.shard_bytes, made)
        parts = (part or TRAIN for part in self.split.parts)
        writers = {part: _Writer(part, *of_all) for part in parts}
        with ExitStack() as opened:
            for writer in writers.values():
                opened.enter_context(writer.opened)
            for part, rows in chain([first], chosen):
                writers[part].write(rows)
            for writer in writers.values():
                writer.end()
        made.splits = dict(sorted(made.splits.items()))
        return made

    def _chosen(self, schema: pa.Schema) -> Iterator[tuple[str, pa.RecordBatch]]:
        """Some rows at a time, with their split."""
        for file in self.files:
            for batch in file.batches():
                if parted := self._parted(file, batch):
                    columns = batch.to_arrow(schema)
                    for part, offsets in parted.items():
                        yield part, columns.take(pa.array(offsets, pa.int64()))

    def _parted(self, file: Published, batch: Batch) -> dict[str, list[int]]:
        """Offsets in the batch by split."""
        parted: dict[str, list[int]] = {}
        for offset, item in enumerate(batch.items):
            index = batch.start + offset
            if self.selection.takes(file, index, item):
                record = file.identity(index, item) if self.split.share else ""
                parted.setdefault(self.split.part_of(record) or TRAIN, []).append(offset)
        return parted


@dataclass
class _Writer:
    """Writes the shards of a split, one after another. `opened` is the one at hand."""

    split: str
    folder: Place | None
    stage: str
    most: int
    made: Shards
    opened: ExitStack = field(default_factory=ExitStack)
    _out: tuple[NewFile, ParquetSink] | None = None
    _rows: int = 0
    _size: int = 0

    def write(self, rows: pa.RecordBatch) -> None:
        if self.folder is not None:
            self._out = self._out or self._begun(self.folder)
            self._out[1].write(rows)
        self.made.count(rows)
        self._rows += rows.num_rows
        self._size += rows.nbytes
        if self._size >= self.most:
            self.end()

    def end(self) -> None:
        """Of a shard, if there is one."""
        if not self._rows:
            return
        if self._out is not None:
            file, sink = self._out
            sink.close()
            file.commit()
            self.opened.close()
        self._shards.append(Shard(self._name, self._rows, self._size))
        self._rows, self._size, self._out = 0, 0, None

    @property
    def _shards(self) -> list[Shard]:
        return self.made.splits.setdefault(self.split, [])

    @property
    def _name(self) -> str:
        return f"data/{self.split}-{len(self._shards):05d}.parquet"

    def _begun(self, folder: Place) -> tuple[NewFile, ParquetSink]:
        file = self.opened.enter_context(NewFile(folder / self._name))
        return file, self.opened.enter_context(ParquetSink(file, self.stage, self.made.schema))


def check_free(folder: Place, *, force: bool) -> None:
    """SetupError when somebody's card or shards are there; or ours, complete, without `force`."""
    try:
        card = read_bytes(folder / CARD).decode("utf-8", "replace")
    except FileNotFoundError:
        card = None
    if card == UNFINISHED:
        return
    shards = [f"data/{file.key_path}" for file in _shards_in(folder)]
    if taken := ([] if card is None else [CARD]) + shards:
        wrong, fix = f"{taken[0]} is there already", "choose another folder, or "
        if MARK not in (card or ""):
            wrong, fix = f"{wrong}, and not from `modelcall publish`", f"{fix}move it away"
        elif force:
            return
        else:
            fix += "add --force to replace what was published there"
        raise SetupError([Problem(str(folder), "", wrong, fix=fix)])


def finish(folder: Place, made: Shards, card: str) -> None:
    """Of an earlier data set no shard stays."""
    new = {str(folder / shard.name) for shard in made.all}
    for file in _shards_in(folder):
        if str(file.place) not in new:
            delete(file.place)
    write_bytes(folder / CARD, card.encode())


def _shards_in(folder: Place) -> list[FileInfo]:
    listed = list_files(folder / "data", may_be_absent=True)
    return [file for file in listed if SHARD.fullmatch(f"data/{file.key_path}")]
