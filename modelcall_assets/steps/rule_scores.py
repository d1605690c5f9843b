"""`scores` by a scorer of the user's own instead of a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from modelcall_assets.grading.scorer import Scorer, grade, load_scorer, source_digest
from modelcall_assets.llm.answer import Usage
from modelcall_assets.records.outcome import Failure, Outcome, Success
from modelcall_assets.records.record import BadLine, Row
from modelcall_assets.steps.preprocess import bad_line, failure_before
from modelcall_assets.steps.progress import Tally
from modelcall_assets.steps.publish_scores import Publisher
from modelcall_assets.steps.score_report import ScoreReport
from modelcall_assets.steps.score_table import ApiRow, outcome_row
from modelcall_assets.steps.source import Source
from modelcall_assets.storage.rows import read_chunks

_TYPES: tuple[tuple[type, str], ...] = ((bool, "boolean"), (int, "integer"), (str, "string"))


@dataclass(frozen=True)
class RuleStage:
    """A scorer, where it is looked up, and the task file that names it."""

    path: str
    root: Path
    task_file: str
    input_key: str

    def version(self) -> str:
        """Changes with the scorer's name and with its module's source."""
        return f"{self.path}@{source_digest(self.path, self.root, self.task_file)}"

    def score_file(self, source: Source, output: Path, tally: Tally) -> ScoreReport:
        """Rate every row once, then publish.

        Columns have the types that the scorer declares in `fields` (JSON-schema types by key), else
        those of the values it gave for this file.
        """
        scorer = load_scorer(self.path, self.root, self.task_file)
        outcomes: list[Outcome] = []
        for chunk in read_chunks(source.uri, source.schema, source.limit):
            for item in chunk.items:
                outcomes.append(_grade(scorer, item))
                tally.count(outcomes[-1])
        declared: Mapping[str, Mapping[str, Any]] | None = getattr(scorer, "fields", None)
        fields = declared or types_of(_values(outcomes))

        def rate(index: int, item: Row | BadLine) -> tuple[ApiRow, Usage]:
            return {**_row(outcomes[index]), "api_model": self.path}, Usage()

        return Publisher(source, fields, self.input_key, rate).publish(output)


def types_of(values: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """A JSON-schema type per key; values of several types, or of none of ours, are JSON text."""
    seen: dict[str, set[str]] = {}
    for row in values:
        for key, value in row.items():
            seen.setdefault(key, set()).update(() if value is None else (_type_of(value),))
    return {key: _declared(types) for key, types in seen.items()}


def _declared(types: set[str]) -> dict[str, Any]:
    if types and types <= {"integer", "number"}:
        return {"type": "integer" if types == {"integer"} else "number"}
    if types == {"strings"}:
        return {"type": "array", "items": {"type": "string"}}
    return {"type": next(iter(types))} if len(types) == 1 and "other" not in types else {}


def _type_of(value: object) -> str:
    for kind, name in _TYPES:
        if isinstance(value, kind):
            is_too_big = name == "integer" and not -(2**63) <= value < 2**63
            return "other" if is_too_big else name
    if isinstance(value, float):
        return "number"
    is_strings = isinstance(value, list) and all(isinstance(item, str) for item in value)
    return "strings" if is_strings else "other"


def _grade(scorer: Scorer, item: Row | BadLine) -> Outcome:
    if isinstance(item, BadLine):
        return bad_line(item)
    return failure_before(item) or grade(scorer, item)


def _values(outcomes: Iterable[Outcome]) -> Iterator[dict[str, Any]]:
    return (outcome.values for outcome in outcomes if isinstance(outcome, Success))


def _row(outcome: Outcome) -> ApiRow:
    text = None if isinstance(outcome, Failure) else orjson.dumps(outcome.values, default=str)
    return {**outcome_row(outcome), "api_return": text.decode() if text else None}
