"""Rows as examples to learn from: lines of a training form, and of pairs of answers; the files that
tell a trainer about them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, count
from operator import itemgetter
from typing import Any, cast

import orjson
import yaml

from modelcall_assets.errors import InputError
from modelcall_assets.records.outcome import BadLine, Row
from modelcall_assets.stages.ratings import rated_columns
from modelcall_assets.stages.selection import (
    TRAIN,
    VALIDATION,
    Chosen,
    label_of,
    samples,
    scored,
)
from modelcall_assets.stages.source import Published
from modelcall_assets.storage.files import read_bytes, write_bytes
from modelcall_assets.storage.listing import exists, matches
from modelcall_assets.storage.places import Place
from modelcall_assets.transforms import encode
from modelcall_assets.transforms.training import (
    COLUMNS,
    FORMS,
    PAIR_FORMS,
    REQUESTS,
    TASKS,
    Exchange,
    LeftOut,
    Line,
    dataset_info,
    openai_batch,
    tuner,
    tuner_config,
)

DATASET_INFO, TUNER, MIXTURE = "dataset_info.json", "tuner.yaml", "mixture.json"
OWN_FILES = {TASKS: TUNER, "mixture": MIXTURE}
"""What an export writes beside the rows for their trainer."""


@dataclass(frozen=True)
class Pairs:
    """Of the samples of a record the one with the greatest score and the one with the least, where
    these differ, and by the margin at least."""

    score: str
    margin: float = 0.0


@dataclass(frozen=True)
class Examples:
    """`form` is a name of `transforms.training`; `params` are those of requests."""

    form: str
    pairs: Pairs | None = None
    params: Mapping[str, Any] = field(default_factory=dict[str, Any])
    _taken: set[str] = field(default_factory=set[str], init=False, repr=False)
    """Names of requests and tasks."""
    _rated: dict[str, Sequence[str]] = field(
        default_factory=dict[str, Sequence[str]], init=False, repr=False
    )
    """Columns of scores by files."""

    def of(
        self, chosen: Iterable[Chosen], left_out: Counter[str]
    ) -> Iterator[tuple[str, bytes, Row]]:
        """Part, line and origin of each; those that are none are counted."""
        units = ([each] for each in chosen) if self.pairs is None else samples(chosen)
        for unit in units:
            try:
                pairs = self.pairs
                line, origin = self._one(unit[0]) if pairs is None else self._pair(unit, pairs)
            except LeftOut as why:
                left_out[str(why)] += 1
            else:
                yield unit[0].part, encode(line), origin

    def _one(self, chosen: Chosen) -> tuple[Line, Row]:
        row, origin = _row(chosen), chosen.origin
        if self.form == TASKS:
            scores = {name: row.get(name) for name in self._rated_in(chosen.file)}
            task = tuner(Exchange.of(row), self._free(chosen.id), scores, origin)
            self._taken.add(task["task_id"])
            return task, origin
        if self.form == REQUESTS:
            request = openai_batch(Exchange.of(row), self._free(chosen.name), self.params)
            self._taken.add(request["custom_id"])
            return request, origin
        return FORMS[self.form](Exchange.answered(row)), origin

    def _rated_in(self, file: Published) -> Sequence[str]:
        if (label := label_of(file)) not in self._rated:
            is_rated = file.is_table and file.stage.answers
            self._rated[label] = rated_columns(file) if is_rated else ()
        return self._rated[label]

    def _free(self, name: str) -> str:
        """The name, else with the first number behind it that nobody has."""
        numbered = (f"{name}:{number}" for number in count(2))
        return next(each for each in chain([name], numbered) if each not in self._taken)

    def _pair(self, unit: Sequence[Chosen], pairs: Pairs) -> tuple[Line, Row]:
        rated = scored(unit, pairs.score)
        if len(rated) == 1:
            raise LeftOut("a single answer")
        most, best = max(rated, key=itemgetter(0))
        least, worst = min(rated, key=itemgetter(0))
        if most == least:
            raise LeftOut("a tie")
        if most - least < pairs.margin and not math.isclose(most - least, pairs.margin):
            raise LeftOut("less than the margin apart")
        better, worse = (Exchange.answered(_row(each)) for each in (best, worst))
        if better.asked != worse.asked:
            raise LeftOut("answers to different prompts")
        return PAIR_FORMS[self.form](better, worse), {**best.origin, "rejected": worst.origin}


def tell_trainer(
    examples: Examples, folder: Place, rows: Mapping[str, int], repeats: Mapping[str, int]
) -> None:
    """Write what the trainer needs beside the files of these rows by path. In a mixture a file
    counts as often as the pattern says that matches it. InputError when LLaMA-Factory's list of
    data sets cannot be read."""
    if examples.form == TASKS:
        config = tuner_config(*(str(folder / path) for path in rows))
        text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
        write_bytes(folder / TUNER, text.encode())
    elif examples.form == "mixture":
        write_bytes(folder / MIXTURE, _indented(_mixture(rows, repeats)))
    elif examples.form in COLUMNS:
        place = folder / DATASET_INFO
        known = _known(place) if exists(place) else {}
        for path in rows:
            name = path.removesuffix(".jsonl").replace(",", "_")
            while known.get(name, {}).get("file_name", path) != path:
                name += "_"
            is_of_pairs = examples.pairs is not None
            known[name] = dataset_info(examples.form, path, is_of_pairs=is_of_pairs)
        write_bytes(place, _indented(known))


def _known(place: Place) -> Row:
    try:
        known = orjson.loads(read_bytes(place))
    except orjson.JSONDecodeError:
        known = None
    if not isinstance(known, dict):
        raise InputError(f"{place}: no JSON object; mend it, or export to another folder")
    return cast("Row", known)


def _mixture(rows: Mapping[str, int], repeats: Mapping[str, int]) -> Row:
    """What is held out counts once."""
    mixed: dict[str, list[Row]] = {TRAIN: []}
    for path, number in rows.items():
        part = VALIDATION if path.startswith(f"{VALIDATION}/") else TRAIN
        own = path.removeprefix(f"{part}/")
        times = (times for pattern, times in repeats.items() if matches(own, pattern))
        repeat = next(times, 1) if part == TRAIN else 1
        mixed.setdefault(part, []).append({"file": path, "rows": number, "repeat": repeat})
    return {"seed": 42, **mixed}


def _indented(value: Row) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


def _row(chosen: Chosen) -> Row:
    if isinstance(chosen.item, BadLine):
        raise LeftOut("a line that is no row")
    return chosen.item
