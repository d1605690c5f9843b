"""A data set as others load it, made of the good rows of a stage: Parquet shards of each split, and
a card, which is written last."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, count

import pyarrow as pa

from modelcall_assets.errors import InputError, Problem, SetupError
from modelcall_assets.stages.report import Distribution
from modelcall_assets.stages.score_table import VOLATILE_COLUMNS
from modelcall_assets.stages.selection import (
    TRAIN,
    Selection,
    Split,
    chosen_batches,
    chosen_rows,
    columns_of,
    joined_schema,
)
from modelcall_assets.stages.source import Published
from modelcall_assets.storage.files import delete, publish, read_bytes, write_bytes
from modelcall_assets.storage.listing import list_files
from modelcall_assets.storage.parquet import ParquetSink
from modelcall_assets.storage.places import Place

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
OWN = re.compile(r"data/(train|validation)-\d{5,}\.parquet")
SHARD = re.compile(r"data/(train|validation)-[^/]*\.parquet")
"""What the card's patterns take, also of others."""
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
    """What a data set consists of, by split, and how its scores are spread."""

    schema: pa.Schema
    splits: dict[str, Sequence[Shard]]
    scores: Mapping[str, Distribution]

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
        schema = pa.schema([each for each in joined if not _LEFT_OUT.fullmatch(each.name)])
        rated = (name for file in self.files for name in file.manifest.detail.get("histograms", ()))
        scores = {name: Distribution() for name in rated if name in schema.names}
        made = Shards(schema, {}, scores)
        if next(chosen_rows(self.files, self.selection), None) is None:
            raise InputError("no row is selected: there is nothing to publish")
        if folder is not None:
            write_bytes(folder / CARD, UNFINISHED.encode())
        for part in self.split.parts:
            if shards := [*self._shards(part, made, folder)]:
                made.splits[part or TRAIN] = shards
        return made

    def _shards(self, part: str, made: Shards, folder: Place | None) -> Iterator[Shard]:
        """Those of one split, which takes all files once."""
        batches = self._columns(part, made.schema)
        for number in count():
            if (first := next(batches, None)) is None:
                return
            name, rows, size = f"data/{part or TRAIN}-{number:05d}.parquet", 0, 0
            place = None if folder is None else folder / name
            with _writing(place, self.files[0].stage.name, made.schema) as write:
                for batch in chain([first], batches):
                    write(batch)
                    made.count(batch)
                    rows, size = rows + batch.num_rows, size + batch.nbytes
                    if size >= self.shard_bytes:
                        break
            yield Shard(name, rows, size)

    def _columns(self, part: str, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        for batch, rows in chosen_batches(self.files, self.selection, self.split):
            if some := [each for each in rows if each.part == part]:
                yield columns_of(batch, some, schema)


@contextmanager
def _writing(
    place: Place | None, stage: str, schema: pa.Schema
) -> Iterator[Callable[[pa.RecordBatch], None]]:
    """Where there is no place, for nothing."""
    if place is None:
        yield lambda batch: None
        return
    with publish(place) as file, ParquetSink(file, stage, schema) as sink:
        yield sink.write


def check_free(folder: Place, *, force: bool) -> None:
    """SetupError when somebody's card or shards are there; or ours, complete, without `force`."""
    try:
        card = read_bytes(folder / CARD).decode("utf-8", "replace")
    except FileNotFoundError:
        card = None
    shards = _shards_in(folder)
    is_ours = MARK in (card or "")
    foreign = [name for name in shards if not (is_ours and OWN.fullmatch(name))]
    foreign += [] if card is None or is_ours else [CARD]
    if foreign:
        wrong = f"{foreign[-1]} is there already, and not from `modelcall publish`"
        raise SetupError(
            [Problem(str(folder), "", wrong, fix="choose another folder, or move it away")]
        )
    if card and card != UNFINISHED and not force:
        fix = "choose another folder, or add --force to replace what was published there"
        raise SetupError([Problem(str(folder), "", f"{CARD} is there already", fix=fix)])


def finish(folder: Place, made: Shards, card: str) -> None:
    """Of an earlier data set no shard stays."""
    new = {shard.name for shard in made.all}
    for name, place in _shards_in(folder).items():
        if name not in new:
            delete(place)
    write_bytes(folder / CARD, card.encode())


def _shards_in(folder: Place) -> dict[str, Place]:
    files = list_files(folder / "data", may_be_absent=True)
    named = {f"data/{file.key_path}": file.place for file in files}
    return {name: place for name, place in named.items() if SHARD.fullmatch(name)}
