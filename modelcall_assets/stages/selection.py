"""Which rows of what tasks have published: chosen, split and sampled; the columns they share."""

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, replace
from heapq import heappush, heappushpop
from itertools import chain, groupby
from operator import itemgetter
from typing import Literal

import pyarrow as pa

from modelcall_assets.errors import InputError, Problem, SetupError, did_you_mean
from modelcall_assets.records.outcome import BadLine, Row, short
from modelcall_assets.stages.source import SAMPLE, Published
from modelcall_assets.storage.rows import Batch
from modelcall_assets.storage.values import SchemaInference, has
from modelcall_assets.transforms import Where, value_at
from modelcall_assets.transforms.training import LeftOut

Keep = Literal["successes", "failures", "all"]
TRAIN, VALIDATION = "train", "validation"
MOST_STRATA = 1000
_MOST_LOT = 1 << 64


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
    which has no name; or, by the names of files, `validation` and `train`, all others."""

    share: float = 0.0
    """Of `validation`."""
    seed: int = 42
    by_name: bool = False

    @property
    def parts(self) -> tuple[str, ...]:
        return (TRAIN, VALIDATION) if self.share or self.by_name else ("",)

    def part_of(self, record: str, file: Published) -> str:
        if not self.share:
            named = VALIDATION if file.stem.name == VALIDATION else TRAIN
            return named if self.by_name else ""
        return VALIDATION if _lot(f"{self.seed}:{record}") / _MOST_LOT < self.share else TRAIN


WHOLE = Split()


def named_split(files: Sequence[Published], share: float, seed: int) -> Split:
    """By the names of files where one is called validation, and no share is asked for."""
    return Split(share, seed, any(file.stem.name == VALIDATION for file in files))


@dataclass(slots=True)
class Chosen:
    """A row that was taken; `id` is its record's."""

    file: Published
    index: int
    item: Row | BadLine
    id: str
    part: str

    @property
    def sample(self) -> int | None:
        sample = self.item.get(SAMPLE) if isinstance(self.item, dict) else None
        return sample if isinstance(sample, int) else None

    @property
    def name(self) -> str:
        """Of a record's samples each has its own."""
        return self.id if self.sample is None else f"{self.id}#{self.sample}"

    @property
    def origin(self) -> Row:
        """Where it came from; `row` counts from 1."""
        task, file = self.file.stage.spec.name, self.file.name
        sample = {} if self.sample is None else {SAMPLE: self.sample}
        return {"task": task, "file": file, "row": self.index + 1, "id": self.id, **sample}


def label_of(file: Published) -> str:
    """Its name among the files of several tasks."""
    return f"{file.stage.spec.name}/{file.name}"


def chosen_batches(
    files: Sequence[Published], selection: Selection, split: Split
) -> Iterator[tuple[Batch, list[Chosen]]]:
    """Of files of any tasks, in order."""
    for file in files:
        for batch in file.batches():
            rows = list[Chosen]()
            for index, item in enumerate(batch.items, batch.start):
                if selection.takes(file, index, item):
                    record = file.identity(index, item)
                    rows.append(Chosen(file, index, item, record, split.part_of(record, file)))
            yield batch, rows


def chosen_rows(
    files: Sequence[Published], selection: Selection, split: Split = WHOLE
) -> Iterator[Chosen]:
    return chain.from_iterable(rows for _, rows in chosen_batches(files, selection, split))


def columns_of(batch: Batch, rows: Sequence[Chosen], schema: pa.Schema) -> pa.RecordBatch:
    """The chosen rows of a batch. InputError where one is a line that could not be read."""
    for each in rows:
        if isinstance(each.item, BadLine):
            name = each.file.name
            raise InputError(f"{name}: bad lines have no columns; export them as JSONL")
    offsets = pa.array([each.index - batch.start for each in rows], pa.int64())
    return batch.to_arrow(schema).take(offsets)


def samples(chosen: Iterable[Chosen]) -> Iterator[list[Chosen]]:
    """Neighbours that are answers to one record."""
    for _, rows in groupby(chosen, key=lambda each: (label_of(each.file), each.id)):
        yield [*rows]


def scored(rows: Iterable[Chosen], score: str) -> list[tuple[float, Chosen]]:
    """Those that have a finite number as their score, with it; true is 1 and false 0. LeftOut when
    there are none."""
    found = list[tuple[float, Chosen]]()
    for each in rows:
        value = value_at(each.item, score) if isinstance(each.item, dict) else None
        if isinstance(value, int | float) and math.isfinite(value):
            found.append((value, each))
    if not found:
        raise LeftOut("no score")
    return found


def best_of(
    files: Sequence[Published], selection: Selection, score: str
) -> tuple[Selection, Counter[str]]:
    """Of the samples of each record the one with the greatest score, the first of several; and how
    many records had none, or several."""
    only, told = set[tuple[str, int]](), Counter[str]()
    for rows in samples(chosen_rows(files, selection)):
        try:
            found = scored(rows, score)
        except LeftOut as why:
            told[str(why)] += 1
            continue
        most, best = max(found, key=itemgetter(0))
        told["a tie, the first taken"] += sum(value == most for value, _ in found) > 1
        only.add((label_of(best.file), best.index))
    if told and not only:
        raise InputError(f"--best {score}: no selected row has a number there")
    return replace(selection, only=only), +told


def joined_schema(files: Sequence[Published], selection: Selection) -> pa.Schema:
    """One for the chosen rows of all files: the recorded ones, else those of the rows. A column
    whose types nothing holds without loss is JSON text."""
    inference, recorded = SchemaInference(), list[tuple[Published, pa.Schema]]()
    for file in files:
        if (schema := file.schema) is not None:
            recorded.append((file, schema))
        else:
            for _, rows in chosen_batches([file], selection, WHOLE):
                inference.add([each.item for each in rows if isinstance(each.item, dict)])
    if len(files) == len(recorded) and all(schema.equals(recorded[0][1]) for _, schema in recorded):
        return recorded[0][1]
    for _, schema in recorded:
        inference.add_types(schema)
    joined = inference.schema()
    for file, schema in recorded:
        wider = [each.name for each in schema if each.type != joined.field(each.name).type]
        numbers = [name for name in wider if has(schema.field(name).type, pa.types.is_integer)]
        for batch in file.batches() if numbers else ():  # which a double may not hold
            rows = [row for row in batch.items if isinstance(row, dict)]
            inference.add([{name: row.get(name) for name in numbers} for row in rows])
    return inference.schema()


def stratified(
    files: Sequence[Published], selection: Selection, size: int, by: str | None, seed: int
) -> Selection:
    """So many of the selected rows, the same ones each time; `by` a column as many of each of its
    values, as far as it has them. InputError when no row has the column, or it has more than 1,000
    values."""
    strata = defaultdict[str, list[tuple[int, str, int]]](list)
    for each in chosen_rows(files, selection):
        if isinstance(each.item, BadLine):
            continue
        row = -_lot(f"{seed}:{each.id}:{each.item.get(SAMPLE)}"), label_of(each.file), each.index
        stratum = strata["" if by is None else str(value_at(each.item, by))]
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


def check_columns(names: Iterable[str], files: Sequence[Published], option: str) -> None:
    """SetupError when the first rows of no file have a column that the option names."""
    missing, found = set(names), set[str]()
    for file in files:
        if not missing:
            return
        first = next(file.batches(), None)
        found.update(*(row for row in (first.items if first else ()) if isinstance(row, dict)))
        missing = {name for name in missing if found.isdisjoint((name, name.partition(".")[0]))}
    if found and missing:
        fixes = {name: did_you_mean(name, found) for name in sorted(missing)}
        expected = f"one of {', '.join(map(short, sorted(found)))}"
        raise SetupError(
            [
                Problem(option, name, "no row has this column", "" if fix else expected, fix=fix)
                for name, fix in fixes.items()
            ]
        )


def _lot(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")
