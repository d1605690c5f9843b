"""Two results on the same items, compared as pairs: rows of scores files, joined by file, record id
and `sample`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from itertools import groupby
from operator import gt, itemgetter, lt
from typing import NamedTuple

import pyarrow as pa

from modelcall_assets.errors import InputError, SetupError
from modelcall_assets.records.outcome import Row, short
from modelcall_assets.stages.figures import MANY_SUBJECTS, SUBJECT
from modelcall_assets.stages.ratings import (
    FILE,
    ID,
    Ratings,
    is_figure,
    joined,
    labels_of,
    rows_at,
)
from modelcall_assets.transforms.statistics import Estimate, McNemar, mcnemar, mean, share

_COMPUTE = import_module("pyarrow.compute")  # whose functions are made when it is imported
EXAMPLES = 3
ITEM = "item"
"""What the samples of a record share."""
_BY, _CLUSTER = "by", "cluster"


class Missing(NamedTuple):
    """Of one side: rows that only it has, the first few of them, and rows that both have and that
    hold no value here."""

    rows: int
    examples: list[str]
    unrated: int

    def __str__(self) -> str:
        such = f", such as {'; '.join(self.examples)}" if self.examples else ""
        return f"{self.rows:,} rows that the other has not{such}; {self.unrated:,} without a value"


class Compared(NamedTuple):
    """Of the pairs of a group, or of `all`: the mean of each side, and b − a. So many `fell` and
    `rose` from a to b."""

    of: str
    a: Estimate
    b: Estimate
    difference: Estimate
    mcnemar: McNemar | None
    """Of right and wrong, where rows are independent."""
    fell: int
    rose: int


class Changed(NamedTuple):
    """A pair that differs; `row` is the first one's in its file, from 1."""

    file: str
    row: int
    first: Row
    second: Row


def compare(
    sides: tuple[Ratings, Ratings], figure: str | None, by: str | None, cluster: str | None
) -> Comparison:
    """Groups are the values of the first one's column `by`. Clusters are those of a column, `file`,
    or `item`; where none is named, as those of figures: of many subjects these, else items that
    have several samples. SetupError when no file has a column, InputError when no two rows belong
    together."""
    known = figure or sides[0].figure or sides[1].figure or ""
    kinds = [side.kinds(known, ("--figure", known), is_figure) for side in sides]
    more = {_BY: by, _CLUSTER: None if cluster in (FILE, ITEM) else cluster}
    more = {option: column for option, column in more.items() if column is not None}
    for option, column in more.items():
        sides[0].kinds(column, (f"--{option}", column))
    if cluster is None:
        with suppress(SetupError):  # there may be none
            sides[0].kinds(SUBJECT, ("", ""))
            more[_CLUSTER] = SUBJECT
    items = joined([side._replace(figure=known) for side in sides], more)
    has = [items[f"row {side}"].is_valid() for side in (0, 1)]
    rated = [items[str(side)].is_valid() for side in (0, 1)]
    both = _COMPUTE.and_(*has)
    missing = [
        _missing(items.filter(_COMPUTE.invert(has[1 - side])), both, rated[side]) for side in (0, 1)
    ]
    pairs = items.filter(_COMPUTE.and_(*rated))
    if not len(pairs):
        told = " and ".join(map(str, missing))
        raise InputError(
            f"no two rows with a {known} belong together: {told}; compare results on the same input"
        )
    return Comparison(sides, known, cluster, {pa.bool_()} == {*kinds[0], *kinds[1]}, missing, pairs)


def _missing(alone: pa.Table, both: pa.ChunkedArray, rated: pa.ChunkedArray) -> Missing:
    such = alone.slice(0, EXAMPLES).select([ID, FILE]).to_pylist()
    examples = [f"{short(each[ID])} of {each[FILE]}" for each in such]
    unrated = _COMPUTE.sum(_COMPUTE.and_not(both, rated)).as_py()
    return Missing(len(alone), examples, unrated or 0)


def _clusters(named: str | None, pairs: pa.Table) -> tuple[str | None, pa.ChunkedArray | None]:
    """By what rows are alike, and of which cluster each is; None of independent rows."""
    if named == FILE:
        return FILE, pairs[FILE]
    if named not in (None, ITEM):
        return named, pairs[_CLUSTER].fill_null("null")
    items = _COMPUTE.binary_join_element_wise(pairs[FILE], pairs[ID], "\0")
    if named is None and _CLUSTER in pairs.column_names:
        subjects = labels_of(pairs[_CLUSTER], as_text=True)
        if _COMPUTE.count_distinct(subjects).as_py() >= MANY_SUBJECTS:
            return SUBJECT, _COMPUTE.coalesce(subjects, items)
    has_samples = _COMPUTE.count_distinct(items).as_py() < len(items)
    return (ITEM, items) if has_samples else (None, None)


@dataclass(frozen=True)
class Comparison:
    """`pairs` has a row for each two that both rated: the columns `0` and `1`, their group `by` and
    their `cluster`, where there are any, and where they are. `missing` is of either side."""

    sides: tuple[Ratings, Ratings]
    figure: str
    named: str | None
    """What clusters are asked for."""
    is_boolean: bool
    missing: Sequence[Missing]
    pairs: pa.Table

    @property
    def cluster(self) -> str | None:
        """Of all pairs; a group of fewer subjects may have others."""
        return _clusters(self.named, self.pairs)[0]

    def total(self) -> Compared:
        return self._of("all", self.pairs)

    def groups(self) -> Iterator[Compared]:
        """In the order of their names; none where no column was named."""
        if _BY not in self.pairs.column_names:
            return
        groups = self.pairs[_BY].fill_null("null")
        ordered = self.pairs.drop_columns(_BY).append_column(_BY, groups).sort_by(_BY)
        start = 0
        for group in _COMPUTE.value_counts(ordered[_BY]).to_pylist():
            yield self._of(group["values"], ordered.slice(start, group["counts"]))
            start += group["counts"]

    def changed(self, most: int) -> list[Changed]:
        """Those that differ most; of several that differ as much, the first in the order of files
        and rows."""
        apart = _COMPUTE.abs(_COMPUTE.subtract(self.pairs["1"], self.pairs["0"]))
        order = _COMPUTE.sort_indices(apart, sort_keys=[("", "descending")])
        chosen = self.pairs.take(order[:most]).filter(_COMPUTE.greater(apart.take(order[:most]), 0))
        wanted = chosen.select([FILE, "row 0", "row 1"]).to_pylist()
        rows = dict[tuple[int, str, int], Row]()
        for file, of_file in groupby(sorted(wanted, key=itemgetter(FILE)), itemgetter(FILE)):
            indices = [*of_file]
            for side, ratings in enumerate(self.sides):
                place = ratings.files.get(file) or next(iter(ratings.files.values()))
                found = rows_at(place, {each[f"row {side}"] for each in indices})
                rows |= {(side, file, at): row for at, row in found.items()}
        return [
            Changed(
                each[FILE],
                each["row 0"] + 1,
                *(rows[side, each[FILE], each[f"row {side}"]] for side in (0, 1)),
            )
            for each in wanted
        ]

    def _of(self, of: str, pairs: pa.Table) -> Compared:
        first, second = pairs["0"].to_pylist(), pairs["1"].to_pylist()
        _, found = _clusters(self.named, pairs)
        clusters = found and found.combine_chunks().dictionary_encode().indices.to_pylist()
        apart = _COMPUTE.subtract(pairs["1"], pairs["0"]).to_pylist()
        fell, rose = sum(map(gt, first, second)), sum(map(lt, first, second))
        of_side = share if self.is_boolean else mean
        one, other = (of_side(side, clusters) for side in (first, second))
        difference = mean(apart, clusters)
        if self.is_boolean:
            difference = difference.within(-1, 1)
        test = mcnemar(fell, rose) if self.is_boolean and clusters is None else None
        return Compared(of, one, other, difference, test, fell, rose)
