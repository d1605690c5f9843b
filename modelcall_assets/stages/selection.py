"""Which rows of what tasks have published: chosen, split and sampled; the columns they share."""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, replace
from heapq import heappush, heappushpop
from typing import Literal

import pyarrow as pa

from modelcall_assets.config import did_you_mean
from modelcall_assets.errors import InputError, Problem, SetupError
from modelcall_assets.records.outcome import BadLine, Row, short
from modelcall_assets.stages.source import Published
from modelcall_assets.storage.values import JSON_TEXT, SchemaInference, has, is_json_text
from modelcall_assets.transforms import Where, value_at

Keep = Literal["successes", "failures", "all"]
TRAIN, VALIDATION = "train", "validation"
MOST_STRATA = 1000
_WHOLE = 1 << 64


@dataclass(frozen=True, slots=True)
class Selection:
    """Which rows are taken."""

    keep: Keep = "successes"
    where: Where | None = None
    only: Set[tuple[str, int]] | None = None
    """Labels of files and indices of rows."""

    def takes(self, file: Published, index: int, item: Row | BadLine) -> bool:
        if self.only is not None and (label_of(file), index) not in self.only:
            return False
        if self.keep != "all" and (file.failure_of(item) is None) != (self.keep == "successes"):
            return False
        return self.where is None or self.where(item)


@dataclass(frozen=True, slots=True)
class Split:
    """Which part a record is in: by its id and the seed alone. Without a share there is one part,
    which has no name."""

    share: float = 0.0
    """Of `validation`."""
    seed: int = 42

    @property
    def parts(self) -> tuple[str, ...]:
        return (TRAIN, VALIDATION) if self.share else ("",)

    def part_of(self, record: str) -> str:
        if not self.share:
            return ""
        hashed = hashlib.sha256(f"{self.seed}:{record}".encode("utf-8", "surrogatepass")).digest()
        share = int.from_bytes(hashed[:8], "big") / _WHOLE
        return VALIDATION if share < self.share else TRAIN


@dataclass(slots=True)
class Chosen:
    """A row that was taken; `id` is its record's."""

    file: Published
    index: int
    item: Row | BadLine
    id: str
    part: str


def label_of(file: Published) -> str:
    """Its name among the files of several tasks."""
    return f"{file.stage.spec.name}/{file.name}"


def chosen_rows(files: Sequence[Published], selection: Selection, split: Split) -> Iterator[Chosen]:
    """Of files of any tasks, in order. InputError when one is not as it was published."""
    for file in files:
        file.check()
        for index, item in file.items():
            if selection.takes(file, index, item):
                record = file.identity(index, item)
                yield Chosen(file, index, item, record, split.part_of(record))


def joined_schema(files: Sequence[Published], selection: Selection) -> pa.Schema:
    """One for the chosen rows of all files: the recorded ones, else those of the rows. A column
    whose types nothing holds without loss is JSON text."""
    inference, recorded = SchemaInference(), list[tuple[Published, pa.Schema]]()
    for file in files:
        if (schema := file.schema) is not None:
            recorded.append((file, schema))
            continue
        for batch in file.batches():
            rows = enumerate(batch.items, batch.start)
            taken = (row for index, row in rows if selection.takes(file, index, row))
            inference.add([row for row in taken if isinstance(row, dict)])
    if len(files) == len(recorded) and all(schema.equals(recorded[0][1]) for _, schema in recorded):
        return recorded[0][1]
    for _, schema in recorded:
        inference.add_types(schema)
    joined = inference.schema()
    for name in {name for each in recorded for name in _misfits(*each, joined)}:
        inference.add_types(pa.schema([pa.field(name, pa.string(), metadata=JSON_TEXT)]))
    return inference.schema()


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
            row = -int.from_bytes(lot[:8], "big"), label_of(file), index
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
        (rank, value, label, index)
        for value, rows in strata.items()
        for rank, (_, label, index) in enumerate(sorted(rows, reverse=True))
    )
    return replace(selection, only={(label, index) for _, _, label, index in ranked[:size]})


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


def _misfits(file: Published, recorded: pa.Schema, joined: pa.Schema) -> Iterator[str]:
    """Columns of the file with a number that their joined type does not hold."""
    doubtful = {
        field.name: wide.type
        for field, wide in ((field, joined.field(field.name)) for field in recorded)
        if field.type != wide.type
        and has(field.type, pa.types.is_integer)
        and not is_json_text(wide)
    }
    for batch in file.batches() if doubtful else ():
        columns = batch.to_arrow(recorded)
        for name, kind in doubtful.items():
            try:
                columns.column(name).cast(kind)
            except pa.ArrowInvalid:
                yield name
