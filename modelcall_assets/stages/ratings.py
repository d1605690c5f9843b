"""Ratings in scores files, read by column: which column is one, and which rows are of one item."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from modelcall_assets.config import did_you_mean
from modelcall_assets.errors import InputError, Problem, SetupError
from modelcall_assets.records import stem_of
from modelcall_assets.records.outcome import BadLine, Row
from modelcall_assets.stages.source import Published
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

SAMPLE = "sample"
_COMPUTE = import_module("pyarrow.compute")  # whose functions are made when it is imported


class Ratings(NamedTuple):
    """One of the two results: scores files by their paths without suffixes. `figure` is the column
    that is compared unless another is named; None where nobody knows which are ratings and which
    the input's."""

    files: Mapping[str, Place]
    figure: str | None


def published_ratings(files: Sequence[Published]) -> Ratings:
    """Of what a stage has published. InputError when a file has no columns, or is not as it was
    published."""
    for file in files:
        if not file.is_table:
            raise InputError(f"{file.place}: no scores file; choose the asset with --stage")
        file.check()
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


class Items(NamedTuple):
    """The rows of a file, and columns by the options that name them. No two `keys` are equal; ids
    are where it `repeats` one, as several samples do."""

    ids: pa.ChunkedArray
    keys: pa.ChunkedArray
    columns: Mapping[str, pa.ChunkedArray]
    repeats: bool


def figures_of(place: Place, inputs: Collection[str | None] = ()) -> list[str]:
    """Columns of booleans and numbers that may be ratings, the first declared first."""
    schema = _columns(place, {GIVEN_ID: ""})
    names = schema.names[: schema.names.index(GIVEN_ID)]
    return [name for name in names if name not in inputs and is_figure(schema.field(name).type)]


def is_figure(kind: pa.DataType) -> bool:
    return pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind)


def _columns(place: Place, wanted: Mapping[str, str]) -> pa.Schema:
    """SetupError when a column is not there that an option names."""
    schema = read_schema(place)
    for name, option in wanted.items():
        if name not in schema.names:
            told = f"{place} has no such column"
            fix, expected = did_you_mean(name, schema.names), ", ".join(schema.names)
            raise SetupError([Problem(option or str(place), name, told, expected, fix=fix)])
    return schema


def read_items(place: Place | None, named: Mapping[str, str]) -> Items:
    """SetupError when a column is not there, or has no plain values."""
    if place is None:
        empty = pa.chunked_array([], pa.string())
        return Items(empty, empty, dict.fromkeys(named, pa.chunked_array([], pa.bool_())), False)
    schema = _columns(
        place, {GIVEN_ID: ""} | {name: f"--{option}" for option, name in named.items()}
    )
    for option, name in named.items():
        if pa.types.is_nested(kind := schema.field(name).type):
            wrong = Problem(f"--{option}", name, f"is {kind} in {place}", "texts or numbers")
            raise SetupError([wrong])
    has_samples = SAMPLE in schema.names and pa.types.is_integer(schema.field(SAMPLE).type)
    wanted = GIVEN_ID, *named.values(), *([SAMPLE] if has_samples else [])
    names = [*dict.fromkeys(wanted)]
    batches = [batch.select(names) for batch in read_columns(place, names)]
    table = pa.Table.from_batches(batches, pa.schema([schema.field(name) for name in names]))
    keys = ids = table[GIVEN_ID].cast(pa.string())
    if has_samples:  # the first one's key is that of a row without a number
        samples = table[SAMPLE].cast(pa.string()).fill_null("0")
        numbered = _COMPUTE.binary_join_element_wise(ids, samples, "\0")
        keys = _COMPUTE.if_else(_COMPUTE.equal(samples, "0"), ids, numbered)
    repeats = _distinct(ids) < len(ids)
    if repeats and _distinct(keys) < len(keys):
        keys = _numbered(keys)
    return Items(ids, keys, {option: table[name] for option, name in named.items()}, repeats)


def numbers(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Of booleans and numbers; null where one is not finite."""
    values = column.cast(pa.float64(), safe=False)
    return _COMPUTE.if_else(_COMPUTE.is_finite(values), values, None)


def texts(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return column.cast(pa.string()).fill_null("null")


def _distinct(column: pa.ChunkedArray) -> int:
    return _COMPUTE.count_distinct(column).as_py()


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
