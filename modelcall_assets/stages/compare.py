"""Two results on the same items, compared as pairs: rows of scores files, joined by file, record id
and `sample`."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import nsmallest
from importlib import import_module
from itertools import groupby
from operator import gt, lt
from typing import NamedTuple

import pyarrow as pa

from modelcall_assets.errors import InputError, Problem, SetupError
from modelcall_assets.records.outcome import Row, short
from modelcall_assets.stages.ratings import (
    Items,
    Ratings,
    figures_of,
    is_figure,
    numbers,
    read_items,
    rows_at,
    texts,
)
from modelcall_assets.transforms.statistics import (
    Estimate,
    McNemar,
    mcnemar,
    mean,
    paired_difference,
    proportion,
)

_COMPUTE = import_module("pyarrow.compute")  # whose functions are made when it is imported
EXAMPLES = 3
FILE, ITEM = "file", "item"
"""What rows may share that is no column: their file, or the record that they are samples of."""


@dataclass
class Missing:
    """Of one side: rows that only it has, the first few of them, and rows that both have and that
    hold no number here."""

    rows: int = 0
    examples: list[str] = field(default_factory=list[str])
    unrated: int = 0

    def add(self, file: str, ids: pa.ChunkedArray, unrated: int) -> None:
        """Of a file, the ids that only it has."""
        self.rows += len(ids)
        more = ids[: EXAMPLES - len(self.examples)].to_pylist()
        self.examples += [f"{short(record)} of {file}" for record in more]
        self.unrated += unrated

    def __str__(self) -> str:
        such = f", such as {'; '.join(self.examples)}" if self.examples else ""
        return f"{self.rows:,} rows that the other has not{such}; {self.unrated:,} without a number"


class Compared(NamedTuple):
    """Of the pairs of a group, or of `all`: the mean of each side, and second − first. So many
    `fell` and `rose` from the first to the second."""

    of: str
    first: Estimate
    second: Estimate
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
    """Groups are the values of the column `by`. Clusters are those of a column, `file`, or `item`;
    where none is named, items that have several samples. SetupError when a column is not there,
    InputError when no two rows belong together."""
    known = figure or sides[0].figure or sides[1].figure
    if known is None:
        expected = ", ".join(figures_of(next(iter(sides[0].files.values()))))
        raise SetupError([Problem("--figure", "", "which column is compared?", expected)])
    found = Comparison(sides, known, by, cluster)
    one, other = (side.files for side in sides)
    if len(one) == len(other) == 1:  # whatever they are called
        found.add(*one, *other)
    else:
        for name in sorted({*one, *other}):
            found.add(name, name)
    if not found.first:
        told = " and ".join(str(side) for side in found.missing)
        raise InputError(
            f"no two rows with a {known} belong together: {told}; compare results on the same input"
        )
    if cluster is None and found.has_samples:
        found.cluster = ITEM
    return found


@dataclass
class Comparison:
    """The pairs as columns of numbers, 48 bytes each: what both rated, their group and cluster, and
    where their rows are. `missing` is of either side."""

    sides: tuple[Ratings, Ratings]
    figure: str
    by: str | None
    cluster: str | None
    is_boolean: bool = True
    has_samples: bool = False
    missing: tuple[Missing, Missing] = field(default_factory=lambda: (Missing(), Missing()))
    first: array[float] = field(default_factory=lambda: array("d"))
    second: array[float] = field(default_factory=lambda: array("d"))
    _rows: tuple[array[int], array[int]] = field(default_factory=lambda: (array("q"), array("q")))
    _groups: _Codes = field(default_factory=lambda: _Codes())
    _clusters: _Codes = field(default_factory=lambda: _Codes())
    _files: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    _starts: list[int] = field(default_factory=list[int])
    """Of each two files, how many pairs come before."""

    def total(self) -> Compared:
        return self._of("all", range(len(self.first)))

    def groups(self) -> list[Compared]:
        """In the order of their names; none where no column was named."""
        members: dict[int, array[int]] = {}
        for at, code in enumerate(self._groups.codes):
            members.setdefault(code, array("q")).append(at)
        return [self._of(name, members[code]) for name, code in sorted(self._groups.names.items())]

    def changed(self, most: int) -> list[Changed]:
        """Those that differ most; of several that differ as much, the first in the order of files
        and rows."""
        pairs = enumerate(zip(self.first, self.second, strict=True))
        chosen = [
            at for _, at in nsmallest(most, ((-abs(b - a), at) for at, (a, b) in pairs if a != b))
        ]
        found = dict[int, Changed]()
        for number, own in groupby(sorted(chosen), lambda at: bisect_right(self._starts, at) - 1):
            own = [*own]
            one, other = (
                rows_at(side.files[name], {rows[at] for at in own})
                for side, name, rows in zip(
                    self.sides, self._files[number], self._rows, strict=True
                )
            )
            for at in own:
                here, there = (rows[at] for rows in self._rows)
                name = self._files[number][0]
                found[at] = Changed(name, here + 1, one[here], other[there])
        return [found[at] for at in chosen]

    def add(self, *names: str) -> None:
        """The pairs of two files; a side has no rows under a name that it has no file of."""
        share = None if self.cluster in (None, FILE, ITEM) else self.cluster
        named = {"figure": self.figure, "by": self.by, "cluster": share}
        options = {option: name for option, name in named.items() if name is not None}
        places = [side.files.get(name) for side, name in zip(self.sides, names, strict=True)]
        one, other = read = [
            read_items(places[0], options),
            read_items(places[1], {"figure": self.figure}),
        ]
        figures = [items.columns["figure"] for items in read]
        for figure, place in zip(figures, places, strict=True):
            self.is_boolean &= pa.types.is_boolean(figure.type)
            if place is not None and not is_figure(figure.type):
                told = f"is {figure.type} in {place}"
                raise SetupError(
                    [Problem("--figure", self.figure, told, ", ".join(figures_of(place)))]
                )
        at = _COMPUTE.index_in(one.keys, value_set=other.keys)
        theirs = _COMPUTE.is_in(other.keys, value_set=one.keys)
        alone = at.is_null(), _COMPUTE.invert(theirs)
        rows = _COMPUTE.indices_nonzero(at.is_valid()), at.drop_null().combine_chunks()
        values = [numbers(figure.take(own)) for figure, own in zip(figures, rows, strict=True)]
        for missing, name, items, mask, own in zip(
            self.missing, names, read, alone, values, strict=True
        ):
            missing.add(name, items.ids.filter(mask), own.null_count)
        both = _COMPUTE.and_(*(own.is_valid() for own in values))
        self._files.append((names[0], names[1]))
        self._starts.append(len(self.first))
        for kept, own in zip((self.first, self.second), values, strict=True):
            kept.extend(own.filter(both).to_pylist())
        for kept, own in zip(self._rows, rows, strict=True):
            kept.extend(own.filter(both).to_pylist())
        self._belong(one, rows[0].filter(both), names[0])

    def _belong(self, items: Items, rows: pa.Array, file: str) -> None:
        """Groups and clusters of the pairs with these rows of the first side."""
        if self.by is not None:
            self._groups.add(texts(items.columns["by"].take(rows)))
        if self.cluster == FILE:
            self._clusters.add(pa.chunked_array([pa.repeat(file, len(rows))]))
        elif self.cluster in (None, ITEM):
            ids = items.ids.take(rows) if items.repeats else None
            self.has_samples |= self._clusters.add_apart(len(rows), ids) < len(rows)
        else:
            self._clusters.add(texts(items.columns["cluster"].take(rows)))

    def _of(self, of: str, chosen: Sequence[int]) -> Compared:
        first, second = (
            array("d", map(side.__getitem__, chosen)) for side in (self.first, self.second)
        )
        clusters = [*map(self._clusters.codes.__getitem__, chosen)] if self.cluster else None
        is_plain = self.is_boolean and clusters is None
        fell, rose = sum(map(gt, first, second)), sum(map(lt, first, second))
        one, other = (
            proportion(int(sum(side)), len(side)) if is_plain else mean(side, clusters)
            for side in (first, second)
        )
        test = mcnemar(fell, rose) if is_plain else None
        return Compared(
            of, one, other, paired_difference(first, second, clusters), test, fell, rose
        )


class _Codes:
    """A number for each row, of what it belongs to."""

    def __init__(self) -> None:
        self.names: dict[str, int] = {}
        self.codes = array("q")

    def add(self, column: pa.ChunkedArray) -> None:
        encoded = column.combine_chunks().dictionary_encode()
        names = encoded.dictionary.to_pylist()
        own = [self.names.setdefault(name, len(self.names)) for name in names]
        self.codes.extend(map(own.__getitem__, encoded.indices.to_pylist()))

    def add_apart(self, rows: int, column: pa.ChunkedArray | None) -> int:
        """What no other rows belong to; without a column, each row is one. Gives how many."""
        start, own, number = len(self.codes), range(rows), rows
        if column is not None:
            encoded = column.combine_chunks().dictionary_encode()
            own, number = encoded.indices.to_pylist(), len(encoded.dictionary)
        self.codes.extend(start + code for code in own)
        return number
