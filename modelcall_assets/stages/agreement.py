"""How far judges agree, with each other and with labels of people: κ of each two, α of all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from itertools import combinations
from math import isfinite, nan
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
from pyarrow import csv

from modelcall_assets.errors import InputChanged, InputError, Problem, SetupError
from modelcall_assets.records.outcome import Row, short
from modelcall_assets.stages.inputs import ABSENT
from modelcall_assets.stages.ratings import (
    FILE,
    ID,
    Ratings,
    is_figure,
    joined,
    labels_of,
    published_ratings,
)
from modelcall_assets.stages.report import Report
from modelcall_assets.stages.source import SAMPLE, Published, column_names
from modelcall_assets.storage.files import open_input
from modelcall_assets.storage.listing import find_file, list_files
from modelcall_assets.storage.rows import ID_COLUMNS, own_id, read_rows
from modelcall_assets.storage.values import dumps
from modelcall_assets.transforms.statistics import Scale, alpha, kappa

if TYPE_CHECKING:
    from modelcall_assets.stages.task import Task

Label = bool | float | str
MOST_LABELS = 100
"""Different ones, of which κ is taken: it is of categories."""
LEFT_OUT = "agreement_left_out"
_COMPUTE = import_module("pyarrow.compute")  # whose functions are made when it is imported


class Pair(NamedTuple):
    """Two raters, of the items that both have labelled: the share with the same label, and Cohen's
    κ, plain and of squared distances. None: of too many labels, and of texts."""

    first: str
    second: str
    items: int
    same: float
    kappa: float | None
    quadratic: float | None

    def told(self) -> Row:
        """As a row of a table for people."""
        return dict(zip(("rater", "and", "items", "same", "κ", "quadratic κ"), self, strict=True))


class Agreement(NamedTuple):
    """Of the `items` that two raters or more have labelled; α is Krippendorff's. `unmatched` are
    labels of people for no such item."""

    items: int
    scale: Scale
    alpha: float
    pairs: Sequence[Pair]
    unmatched: Mapping[str, Sequence[str]]


class People(NamedTuple):
    """Labels by what tells their items: these parts of an item's identity."""

    parts: Sequence[str]
    labels: Mapping[tuple[str, ...], Label]


@dataclass
class Panel:
    """Raters of the same items: columns of results, and labels of people, which come last. Where
    each result has one file, names of files do not count."""

    judges: dict[str, Ratings] = field(default_factory=dict[str, Ratings])
    people: dict[str, People] = field(default_factory=dict[str, People])
    has_texts: bool = False

    def judge(self, name: str, ratings: Ratings, at: tuple[str, str]) -> None:
        """Adds a column. SetupError, `at` a file and field, when there is none with labels."""
        self.has_texts |= not all(map(is_figure, ratings.kinds(ratings.figure or "", at)))
        self.judges[f"{name}: {ratings.figure}"] = ratings

    def add_people(self, name: str, path: Path, column: str) -> None:
        """Adds the labels of a file that has `id` (or `uid`) and the column; where it has `file`
        (a path without suffix) or `sample`, these must be the same too. InputError: no such column,
        or two labels for an item."""
        found = [*_rows(path)]
        rows = [row for row in found if _label(row.get(column)) is not None]
        is_one_file = all(len(ratings.files) == 1 for ratings in self.judges.values())
        parts = [SAMPLE] if is_one_file else [FILE, SAMPLE]
        parts = [part for part in parts if any(part in row for row in rows)]
        labels = dict[tuple[str, ...], Label]()
        for row in rows:
            if (record := own_id(row)) is None:
                raise InputError(f"{path}: a label without id; expected {' or '.join(ID_COLUMNS)}")
            key, label = (record, *(str(row.get(part)) for part in parts)), _label(row[column])
            if label is not None and labels.setdefault(key, label) != label:
                raise InputError(
                    f"{path}: two labels for {short(record)}; leave one, or add a column sample"
                )
        if not labels:
            have = ", ".join(column_names(found)) or "there is no row"
            raise InputError(
                f"{path}: no row has a {column}; name the column of the labels: {have}"
            )
        self.has_texts |= any(isinstance(label, str) for label in labels.values())
        self.people[name] = People([ID, *parts], labels)

    def scale(self, wanted: Scale | None, at: tuple[str, str]) -> Scale:
        """Intervals where all labels are numbers, else nominal, unless told. SetupError when texts
        are to be on a scale of numbers."""
        if self.has_texts and wanted not in (None, "nominal"):
            raise SetupError([Problem(*at, "labels are texts", "nominal", wanted or "")])
        return wanted or ("nominal" if self.has_texts else "interval")

    def agreement(self, scale: Scale) -> Agreement:
        labels, unmatched = self._labels()
        units = _counted(labels)
        several = sum(n for unit, n in units.items() if len(unit) - unit.count(None) > 1)
        is_few = len({label for unit in units for label in unit} - {None}) <= MOST_LABELS
        pairs = list[Pair]()
        for two in combinations(labels.column_names, 2):
            equal = _COMPUTE.equal(*labels.select(two).columns)  # null where one has none
            items = len(equal) - equal.null_count
            same = _COMPUTE.mean(equal).as_py() if items else nan
            both = _counted(labels.select(two).drop_null()) if is_few else None
            plain = None if both is None else kappa(both)
            squared = None if both is None or self.has_texts else kappa(both, squared=True)
            pairs.append(Pair(*two, items, same, plain, squared))
        return Agreement(several, scale, alpha(units, scale), pairs, unmatched)

    def _labels(self) -> tuple[pa.Table, dict[str, list[str]]]:
        """A column for each rater, null where it has no label; and people's for no such item."""
        items = joined([*self.judges.values()], as_text=self.has_texts)
        labels = {name: items[str(number)] for number, name in enumerate(self.judges)}
        unmatched = dict[str, list[str]]()
        for name, (parts, said) in self.people.items():
            keys = _COMPUTE.binary_join_element_wise(*(items[part] for part in parts), "\0")
            own = pa.array(["\0".join(key) for key in said])
            met = _COMPUTE.value_counts(keys.filter(_COMPUTE.is_in(keys, value_set=own)))
            if several := met.filter(_COMPUTE.greater(met.field("counts"), 1)).to_pylist():
                record = short(several[0]["values"].partition("\0")[0])
                fix = "add a column sample, or file, to the labels"
                raise InputError(f"{name}: a label is of several rows: {record}; {fix}")
            values = [_plain(label, self.has_texts) for label in said.values()]
            found = labels_of(pa.chunked_array([pa.array(values)]), self.has_texts)
            labels[name] = found.take(_COMPUTE.index_in(keys, value_set=own))
            is_met = _COMPUTE.is_in(own, value_set=_COMPUTE.unique(keys)).to_pylist()
            unmatched[name] = [key[0] for key, met in zip(said, is_met, strict=True) if not met]
        return pa.table(labels), unmatched


def _counted(labels: pa.Table) -> dict[tuple[Any, ...], int]:
    """How many items have which labels."""
    found = labels.group_by(labels.column_names).aggregate([([], "count_all")])
    *said, counts = (column.to_pylist() for column in found.columns)
    return dict(zip(zip(*said, strict=True), counts, strict=True))


def _label(value: Any) -> Label | None:
    """None of what is no label: null, NaN, an empty text."""
    if value is None or value == "" or value != value:
        return None
    return value if isinstance(value, bool | int | float | str) else str(value)


def _plain(label: Label, as_text: bool) -> float | str:
    """Labels of one type."""
    if not as_text:
        return float(label)
    return label if isinstance(label, str) else dumps(label).decode()


def _rows(path: Path) -> Iterator[Row]:
    """Of JSON lines, Parquet, Arrow, or CSV with a line of names."""
    if path.suffix != ".csv":
        yield from (row for row in read_rows(path) if isinstance(row, dict))
        return
    as_text: dict[str, Any] = dict.fromkeys((*ID_COLUMNS, FILE, SAMPLE), pa.string())
    options = csv.ConvertOptions(column_types=as_text)
    try:
        with open_input(path) as file:
            yield from csv.read_csv(file, convert_options=options).to_pylist()
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a CSV file with a line of names: {error}") from error


# Of a task, as its block `agreement` says


def panel_of(task: Task) -> tuple[Panel, list[Problem]]:
    """The raters; and why some are left out: a warning is of what is not there yet."""
    asked, file = task.spec.task.agreement, task.spec.file_name
    found, problems, ratings = Panel(), list[Problem](), cache(_ratings)
    if not asked.is_asked:
        return found, problems
    wanted = [("figure", "", asked.figure)]
    wanted += [(f"columns[{n}]", "", column) for n, column in enumerate(asked.columns)]
    wanted += [(f"judges[{n}]", judge, asked.figure) for n, judge in enumerate(asked.judges)]
    for name, judge, column in wanted:
        at = file, f"agreement.{name}"
        try:
            of = task.other(judge) if judge else task
            own = ratings(of)
            found.judge(of.spec.name, own._replace(figure=column or own.figure), at)
        except SetupError as error:
            problems += (p if p.file == file else Problem(*at, str(p)) for p in error.problems)
        except (InputError, InputChanged) as error:
            problems.append(Problem(*at, str(error), severity="warning"))
    if path := asked.labels.path:
        try:
            found.add_people(path, task.spec.root / path, asked.labels.column)
        except InputError as error:
            problems.append(Problem(file, "agreement.labels", str(error)))
    try:
        found.scale(asked.scale, (file, "agreement.scale"))
    except SetupError as error:
        problems += error.problems
    return found, problems


def _ratings(task: Task) -> Ratings:
    """Of what is accepted. InputError while that is nothing, InputChanged when it is not as it was
    published."""
    stage = task.stages[-1]
    found = ((key, stage.accepted(key)) for key in stage.published_keys())
    files = [Published(stage, key, made) for key, made in found if made is not None]
    if not files:
        raise InputError(f"{task.spec.name}: nothing is accepted of {stage.name} yet; run the task")
    for each in files:
        stage.check(each.manifest)
    return published_ratings(files)


def versions_of(task: Task) -> dict[str, str]:
    """Of what else than the task's own results the agreement follows from."""
    if not (asked := task.spec.task.agreement).is_asked:
        return {}
    found = {"agreement": asked.model_dump_json()}
    for judge in asked.judges:
        with suppress(SetupError, InputError):
            folder = task.other(judge).stages[-1].manifest_folder()
            for made in list_files(folder, may_be_absent=True):
                found[f"{judge}: {made.key_path}"] = made.version
    if path := asked.labels.path:
        info = find_file(task.spec.root / path)
        found["labels"] = ABSENT if info is None else info.version
    return found


def tell_agreement(task: Task, report: Report) -> None:
    """Who cannot be had is told, and is no failure."""
    if not (asked := task.spec.task.agreement).is_asked:
        return
    (found, problems), told = panel_of(task), None
    try:
        if found.judges:
            told = found.agreement(found.scale(asked.scale, ("", "")))
    except SetupError:
        pass  # one of the problems
    except InputError as error:
        problems.append(Problem("", "agreement", str(error)))
    left_out = [{"rater": p.field, "why": p.wrong} for p in problems]
    if told is not None:
        report.tables["agreement"] = [pair.told() for pair in told.pairs]
        report.numbers["agreement_items"] = told.items
        if isfinite(told.alpha):
            report.numbers["agreement_alpha"] = told.alpha
        left_out += [
            {"rater": name, "why": f"{len(ids):,} labels of no such row, such as {ids[0]}"}
            for name, ids in told.unmatched.items()
            if ids
        ]
    report.tables[LEFT_OUT] = report.detail[LEFT_OUT] = left_out
