"""Rows as examples to learn from: lines of a training form, and of pairs of answers; the files that
tell a trainer about them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
    LeftOut,
    Line,
    Origin,
    dataset_info,
    openai_batch,
    tuner_config,
)

DATASET_INFO, TUNER, MIXTURE = "dataset_info.json", "tuner.yaml", "mixture.json"
OWN_FILES = {"tuner": TUNER, "mixture": MIXTURE}
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
    _ids: Counter[str] = field(default_factory=Counter[str], init=False, repr=False)
    _scores: dict[str, Sequence[str]] = field(
        default_factory=dict[str, Sequence[str]], init=False, repr=False
    )

    def of(
        self, chosen: Iterable[Chosen], left_out: Counter[str]
    ) -> Iterator[tuple[str, bytes, Origin]]:
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

    def _one(self, chosen: Chosen) -> tuple[Line, Origin]:
        row, origin = _row(chosen), chosen.origin
        if self.form == "tuner":
            origin = replace(origin, scores=self._rated(chosen.file))
        if self.form != REQUESTS:
            return FORMS[self.form](row, origin), origin
        request = openai_batch(row, origin, self.params)
        self._ids[name := request["custom_id"]] += 1
        if (times := self._ids[name]) > 1:
            request["custom_id"] = f"{name}:{times}"
        return request, origin

    def _rated(self, file: Published) -> Sequence[str]:
        if (known := self._scores.get(label := label_of(file))) is None:
            is_rated = file.is_table and file.stage.answers
            known = self._scores[label] = rated_columns(file) if is_rated else ()
        return known

    def _pair(self, unit: Sequence[Chosen], pairs: Pairs) -> tuple[Line, Origin]:
        rated = scored(unit, pairs.score)
        if len(rated) == 1:
            raise LeftOut("a single answer")
        (most, better), (least, worse) = max(rated, key=_score), min(rated, key=_score)
        if most == least:
            raise LeftOut("a tie")
        if most - least < pairs.margin:
            raise LeftOut("less than the margin apart")
        line = PAIR_FORMS[self.form](_row(better), _row(worse))
        return line, replace(better.origin, rejected=worse.origin)


def tell_trainer(
    examples: Examples, folder: Place, rows: Mapping[str, int], repeats: Mapping[str, int]
) -> None:
    """Write what the trainer needs beside the files of these rows by path. In a mixture a file
    counts as often as the pattern says that matches it. InputError when LLaMA-Factory's list of
    data sets cannot be read."""
    if examples.form == "tuner":
        training, *held_out = (str(folder / path) for path in rows)
        config = tuner_config(training, held_out[0] if held_out else None)
        text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
        write_bytes(folder / TUNER, text.encode())
    elif examples.form == "mixture":
        write_bytes(folder / MIXTURE, _indented(_mixture(rows, repeats)))
    elif examples.form in COLUMNS:
        place, is_of_pairs = folder / DATASET_INFO, examples.pairs is not None
        known = _known(place) if exists(place) else {}
        for path in rows:
            name = path.removesuffix(".jsonl").replace(",", "_")
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
    for path, count in rows.items():
        part = VALIDATION if path.startswith(f"{VALIDATION}/") else TRAIN
        times = (number for pattern, number in repeats.items() if matches(path, pattern))
        repeat = next(times, 1) if part == TRAIN else 1
        mixed.setdefault(part, []).append({"file": path, "rows": count, "repeat": repeat})
    return {"seed": 42, **mixed}


def _indented(value: Row) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


def _row(chosen: Chosen) -> Row:
    if isinstance(chosen.item, BadLine):
        raise LeftOut("a line that is no row")
    return chosen.item


def _score(rated: tuple[float, Chosen]) -> float:
    return rated[0]
