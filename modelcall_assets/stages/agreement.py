"""How far judges agree, with each other and with labels of people: κ of each two, α of all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from pyarrow import csv

from modelcall_assets.errors import InputError, Problem, SetupError
from modelcall_assets.records.outcome import Row, short
from modelcall_assets.stages.ratings import SAMPLE, Ratings, read_items
from modelcall_assets.storage.rows import ID_COLUMNS, own_id, read_rows
from modelcall_assets.transforms.statistics import Scale, alpha, kappa

Label = bool | float | str
MOST_LABELS = 100
"""Different ones, of which κ is taken: it is of categories."""
FILE = "file"
_FIRST_SAMPLE = "0"


class Pair(NamedTuple):
    """Two raters, of the items that both have labelled: the share with the same label, and Cohen's
    κ, plain and of squared distances. None: of too many labels, and of texts."""

    first: str
    second: str
    items: int
    same: float
    kappa: float | None
    quadratic: float | None


class Agreement(NamedTuple):
    """Of the `items` that two raters or more have labelled; α is Krippendorff's."""

    items: int
    scale: Scale
    alpha: float
    pairs: Sequence[Pair]


@dataclass
class Panel:
    """Labels side by side: an item for each row of a judge, a column for each rater, None where it
    has no label. `unmatched` are labels of people for no such item. Where each judge has one file,
    names of files do not count."""

    is_one_file: bool
    raters: dict[str, list[Label | None]] = field(default_factory=dict[str, "list[Label | None]"])
    unmatched: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    _items: dict[tuple[str, str], int] = field(default_factory=dict[tuple[str, str], int])
    """By file and key."""

    def judge(self, name: str, ratings: Ratings, column: str) -> None:
        """Adds a column of scores files."""
        own: list[Label | None] = [None] * len(self._items)
        for file, place in ratings.files.items():
            items = read_items(place, {"figure": column})
            labels = map(_label, items.columns["figure"].to_pylist())
            for key, label in zip(items.keys.to_pylist(), labels, strict=True):
                at = self._items.setdefault(
                    ("" if self.is_one_file else file, key), len(self._items)
                )
                own += [None] * (at + 1 - len(own))
                own[at] = label
        self.raters[name] = own

    def people(self, name: str, path: Path, column: str) -> None:
        """Adds the labels of a file that has `id` (or `uid`) and the column; where it has `file`
        (a path without suffix) or `sample`, these must be the same too. InputError: no such column,
        or two labels for an item."""
        rows = [row for row in _rows(path) if _label(row.get(column)) is not None]
        parts = (SAMPLE,) if self.is_one_file else (FILE, SAMPLE)
        named = [part for part in parts if any(part in row for row in rows)]
        labels = dict[tuple[str, ...], Label]()
        for row in rows:
            if (record := own_id(row)) is None:
                raise InputError(f"{path}: a label without id; expected {' or '.join(ID_COLUMNS)}")
            key = (record, *(str(row.get(part)) for part in named))
            label = _label(row[column])
            if label is not None and labels.setdefault(key, label) != label:
                raise InputError(f"{path}: two labels for {short(record)}; leave one of them")
        if not labels:
            raise InputError(f"{path}: no row has a {column}; name the column of the labels")
        own, met = list[Label | None](), set[tuple[str, ...]]()
        for file, key in self._items:
            record, _, sample = key.partition("\0")
            own_parts = {FILE: file, SAMPLE: sample or _FIRST_SAMPLE}
            wanted = (record, *map(own_parts.__getitem__, named))
            met.add(wanted)
            own.append(labels.get(wanted))
        self.raters[name] = own
        self.unmatched[name] = [key[0] for key in labels if key not in met]

    def agreement(self, scale: Scale | None = None) -> Agreement:
        """On a scale of intervals where all labels are numbers, else nominal, unless told.
        SetupError when texts are to be on a scale of numbers."""
        columns = {
            name: own + [None] * (len(self._items) - len(own)) for name, own in self.raters.items()
        }
        found = {label for own in columns.values() for label in own if label is not None}
        are_numbers = not any(isinstance(label, str) for label in found)
        scale = scale or ("interval" if are_numbers else "nominal")
        if scale != "nominal" and not are_numbers:
            texts = ", ".join(sorted(short(each) for each in found if isinstance(each, str))[:3])
            raise SetupError([Problem("--scale", "", "labels are texts", "nominal", texts)])
        units = [*zip(*columns.values(), strict=True)]
        items = sum(sum(label is not None for label in unit) > 1 for unit in units)
        is_few = len(found) <= MOST_LABELS
        pairs = list[Pair]()
        for first, second in combinations(columns, 2):
            both = [
                pair
                for pair in zip(columns[first], columns[second], strict=True)
                if None not in pair
            ]
            one, other = [a for a, _ in both], [b for _, b in both]
            same = sum(a == b for a, b in both) / len(both) if both else float("nan")
            plain = kappa(one, other) if is_few else None
            squared = kappa(one, other, "quadratic") if is_few and are_numbers else None
            pairs.append(Pair(first, second, len(both), same, plain, squared))
        return Agreement(items, scale, alpha(units, scale), pairs)


def panel(
    judges: Mapping[str, tuple[Ratings, str]], people: Mapping[str, tuple[Path, str]]
) -> Panel:
    """Results with the column that is compared, and files with that of the labels."""
    found = Panel(all(len(ratings.files) == 1 for ratings, _ in judges.values()))
    for name, (ratings, column) in judges.items():
        found.judge(name, ratings, column)
    for name, (path, column) in people.items():
        found.people(name, path, column)
    return found


def _label(value: Any) -> Label | None:
    """None of what is no label: null, NaN, an empty text."""
    if value is None or value == "" or value != value:
        return None
    return value if isinstance(value, bool | int | float | str) else str(value)


def _rows(path: Path) -> Iterator[Row]:
    """Of JSON lines, Parquet, Arrow, or CSV with a line of names."""
    if path.suffix != ".csv":
        yield from (row for row in read_rows(path) if isinstance(row, dict))
        return
    as_text: dict[str, Any] = dict.fromkeys((*ID_COLUMNS, FILE, SAMPLE), pa.string())
    options = csv.ConvertOptions(column_types=as_text)
    try:
        yield from csv.read_csv(path, convert_options=options).to_pylist()
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a CSV file with a line of names: {error}") from error
