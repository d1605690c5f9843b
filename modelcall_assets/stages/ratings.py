"""Ratings in scores files: which column is one, and several results side by side, joined by file,
record id and sample."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from modelcall_assets.errors import InputError, Problem, SetupError, did_you_mean
from modelcall_assets.records import stem_of
from modelcall_assets.records.outcome import BadLine, Row
from modelcall_assets.stages.source import SAMPLE, Published
from modelcall_assets.storage.columns import (
    MOST_ROWS,
    open_columns,
    read_columns,
    read_schema,
    rows_of,
)
from modelcall_assets.storage.formats import Format
from modelcall_assets.storage.listing import list_files
from modelcall_assets.storage.places import Place
from modelcall_assets.storage.rows import GIVEN_ID
from modelcall_assets.storage.values import schema_from_json

MOST_TOLD = 10
FILE, ID = "file", "id"
IDENTITY = FILE, ID, SAMPLE
"""Of an item: its file without the suffix, its record, and `0` where its samples have no number."""
_COMPUTE = import_module("pyarrow.compute")  # whose functions are made when it is imported


class Ratings(NamedTuple):
    """A result: scores files by their paths without suffixes, and the column that is compared; None
    where nobody knows which are ratings and which the input's."""

    files: Mapping[str, Place]
    figure: str | None

    def kinds(
        self, column: str, at: tuple[str, str], fits: Callable[[pa.DataType], bool] | None = None
    ) -> set[pa.DataType]:
        """Of the column, in the files that have it. SetupError, `at` a file and field, when it is
        not named, none has it, or one whose values do not fit: nested ones never do."""
        if not column:
            expected = ", ".join(figures_of(next(iter(self.files.values()))))
            raise SetupError([Problem(*at, "which column is compared?", expected)])
        schemas = {place: _schema(place) for place in self.files.values()}
        found = {
            p: schema.field(column).type for p, schema in schemas.items() if column in schema.names
        }
        for place, kind in found.items():
            if pa.types.is_nested(kind) or not (fits is None or fits(kind)):
                expected = ", ".join(figures_of(place)) if fits else "texts or numbers"
                raise SetupError([Problem(*at, f"is {kind} in {place}", expected)])
        if not found:
            place, schema = next(iter(schemas.items()))
            names = [n for n in _own(schema) if not pa.types.is_nested(schema.field(n).type)]
            expected = ", ".join(names[:MOST_TOLD]) + (", …" if names[MOST_TOLD:] else "")
            wrong, fix = f"{place} has no such column", did_you_mean(column, names)
            raise SetupError([Problem(*at, wrong, expected, fix=fix)])
        return {*found.values()}


def published_ratings(files: Sequence[Published]) -> Ratings:
    """Of what a stage has published. InputError when a file has no columns."""
    if wrong := next((file for file in files if not file.is_table), None):
        raise InputError(f"{wrong.place}: no scores file; choose the asset with --stage")
    figures = rated_columns(files[0])
    places = {file.stem.as_posix(): file.place for file in files}
    return Ratings(places, figures[0] if figures else None)


def rated_columns(file: Published) -> list[str]:
    """Figures in a scores file that are not the input's; none where nobody knows the input's."""
    before = file.stage.upstream
    made = None if before is None else before.accepted(file.key)
    recorded = None if made is None else made.detail.get("schema")
    if not recorded:
        return []
    theirs = schema_from_json(recorded).names
    return figures_of(file.place, {file.manifest.moved.get(name, name) for name in theirs})


def copied_ratings(path: Path) -> Ratings:
    """Of a scores file, or of a folder of them. InputError when there are none."""
    found: dict[str, Place] = {stem_of(path.name): path}
    if not path.is_file():
        files = (file for file in list_files(path) if file.key_path.endswith(".parquet"))
        found = {stem_of(file.key_path): file.place for file in files}
    if not found:
        raise InputError(f"{path}: no scores files; expected *.parquet as a task leaves them")
    figures = figures_of(next(iter(found.values())))
    return Ratings(found, figures[0] if len(figures) == 1 else None)


def figures_of(place: Place, inputs: Collection[str | None] = ()) -> list[str]:
    """Columns of booleans and numbers that may be ratings, the first declared first."""
    schema, given = _schema(place), {SAMPLE, *inputs}
    names = (name for name in _own(schema) if name not in given)
    return [name for name in names if is_figure(schema.field(name).type)]


def is_figure(kind: pa.DataType) -> bool:
    return pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind)


def joined(
    raters: Sequence[Ratings], more: Mapping[str, str] | None = None, *, as_text: bool = False
) -> pa.Table:
    """A row for each item that one of them has, in the order of files and rows. Columns: what
    identifies it; what rater 0, 1, … says (`0`, `1`, …), a number or a text, null where it says
    nothing, in which row of its file (`row 0`, …); and `more` columns of the first one's files, by
    the names that they get here, as texts. Where each has one file, names of files do not count.
    What a file has no column for is null."""
    names = [[*rater.files] for rater in raters]
    if any(own[1:] for own in names):
        names = [sorted({*chain.from_iterable(names)})] * len(raters)
    named, parts = more or {}, list[pa.Table]()
    for files in zip(*names, strict=True):
        read = [_read(*each, named, as_text) for each in zip(raters, files, strict=True)]
        keys = _COMPUTE.unique(pa.chunked_array([table["key"].combine_chunks() for table in read]))
        rows = [_COMPUTE.index_in(keys, value_set=table["key"]) for table in read]
        taken = [t.drop_columns("key").take(own) for t, own in zip(read, rows, strict=True)]
        columns = {name: _COMPUTE.coalesce(*(own[name] for own in taken)) for name in IDENTITY}
        columns |= {name: taken[0][name] for name in named}
        for number, own in enumerate(rows):
            columns |= {str(number): taken[number]["figure"], f"row {number}": own}
        parts.append(pa.table(columns))
    return pa.concat_tables(parts)


def _read(rater: Ratings, file: str, more: Mapping[str, str], as_text: bool) -> pa.Table:
    """Items with their `key`, of which no two are equal; none where the file is not there."""
    place, figure = rater.files.get(file), rater.figure or ""
    schema = pa.schema({GIVEN_ID: pa.string()}) if place is None else _schema(place)
    has_samples = SAMPLE in schema.names and pa.types.is_integer(schema.field(SAMPLE).type)
    wanted = {GIVEN_ID, figure, *more.values(), *([SAMPLE] if has_samples else [])}
    there = pa.schema([field for field in schema if field.name in wanted])
    batches = () if place is None else read_columns(place, there.names)
    table = pa.Table.from_batches((batch.select(there.names) for batch in batches), there)
    table = table.combine_chunks()
    keys = ids = table[GIVEN_ID].cast(pa.string())
    samples = pa.chunked_array([pa.repeat("0", len(table))])
    if has_samples:  # the first one's key is that of a row without a number
        samples = table[SAMPLE].cast(pa.string()).fill_null("0")
        numbered = _COMPUTE.binary_join_element_wise(ids, samples, "\0")
        keys = _COMPUTE.if_else(_COMPUTE.equal(samples, "0"), ids, numbered)
    if _COMPUTE.count_distinct(keys).as_py() < len(keys):
        keys = _numbered(keys)
    for name in {figure, *more.values()} - {*there.names}:
        table = table.append_column(name, pa.nulls(len(table)))
    found = {"key": keys, FILE: pa.repeat(file, len(table)), ID: ids, SAMPLE: samples}
    found["figure"] = labels_of(table[figure], as_text)
    texts = {n: table[column].cast(pa.string()) for n, column in more.items()}
    return pa.table({**found, **texts})


def labels_of(column: pa.ChunkedArray, as_text: bool) -> pa.ChunkedArray:
    """Null where a text is empty or a number is not finite; 1 and 0 of booleans."""
    if as_text:
        texts = column.cast(pa.string())
        return _COMPUTE.if_else(_COMPUTE.equal(texts, ""), None, texts)
    values = _COMPUTE.add(column.cast(pa.float64(), safe=False), 0.0)  # -0 is 0
    return _COMPUTE.if_else(_COMPUTE.is_finite(values), values, None)


def _own(schema: pa.Schema) -> list[str]:
    """Columns that do not say how a row was answered."""
    names = schema.names[: schema.names.index(GIVEN_ID)]
    return [name for name in names if not name.removeprefix("input_").startswith("api_")]


def _schema(place: Place) -> pa.Schema:
    """Of a scores file; InputError when it is none."""
    if GIVEN_ID not in (schema := read_schema(place)).names:
        raise InputError(f"{place}: no scores file: it has no column {GIVEN_ID}")
    return schema


def _numbered(keys: pa.ChunkedArray) -> pa.ChunkedArray:
    """With a number behind each but the first of those that repeat."""
    seen, texts = Counter[str](), list[str]()
    for key in keys.to_pylist():
        texts.append(f"{key}\0\0{seen[key]}" if seen[key] else key)
        seen[key] += 1
    return pa.chunked_array([pa.array(texts, pa.string())])


def rows_at(place: Place, indices: Collection[int]) -> dict[int, Row]:
    found, start = dict[int, Row](), 0
    with open_columns(place, Format.PARQUET) as columns:
        for batch in columns.batches(MOST_ROWS, None):
            here = sorted(at for at in indices if start <= at < start + batch.num_rows)
            rows = rows_of(batch.take(pa.array([at - start for at in here], pa.int64())), start)
            for at, row in zip(here, rows, strict=True):
                found[at] = {} if isinstance(row, BadLine) else row
            start += batch.num_rows
    return found
