"""`scores` by a scorer of the user's own instead of a model."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import orjson

from modelcall_assets.config.task import ScoringTask
from modelcall_assets.errors import RunStopped
from modelcall_assets.llm.completion import Usage
from modelcall_assets.records.outcome import BadLine, Failure, Outcome, Row, Success, bad_line
from modelcall_assets.stages.publication import Draft
from modelcall_assets.stages.report import Report, Tally
from modelcall_assets.stages.score_table import ApiRow, outcome_row, write_scores
from modelcall_assets.stages.stage import Stage
from modelcall_assets.storage.places import Place
from modelcall_assets.transforms.user_code import (
    Scorer,
    SharedTypes,
    declared_fields,
    grade,
    load_scorer,
    scorer_digest,
)


class ScorerScores(Stage):
    name = "scores"
    kinds = ("python", "parquet")
    done = "scored"
    hint = ("data", "compare data.input_key and the placeholders of the prompt with them")
    answers = True
    shows_progress = True
    again = "rate them all again"

    @property
    def about(self) -> str:
        return f"ratings by {self.path}"

    @property
    def folder(self) -> Place:
        return self.layout.place(self.spec.folder(self.name))

    @property
    def path(self) -> str:
        """The scorer's, as the task file has it."""
        assert isinstance(self.spec.task, ScoringTask) and self.spec.task.scorer is not None
        return self.spec.task.scorer

    @cached_property
    def _version(self) -> str:
        digest = scorer_digest(self.path, self.spec.root, self.spec.file_name)
        return f"{self.path}@{digest}"

    def own_shape(self) -> dict[str, Any]:
        """Changes with the scorer's name and with its module's source."""
        return {"score": self._version}

    def scorer(self) -> Scorer:
        """A new one where the task names a class. SetupError when it cannot be made."""
        return load_scorer(self.path, self.spec.root, self.spec.file_name)

    def check_ready(self) -> None:
        self.scorer()

    def make(self, key: str, tally: Tally) -> Report:
        """Rate every row once, then write them.

        Columns have the types that the scorer declares in `fields` (JSON-schema types by key), else
        those of the values it gave for this file. RunStopped when the tally is stopped.
        """
        source, scorer = self.source(key), self.scorer()
        assert source.maker is not None
        with Draft(self, key) as draft:
            outcomes: list[Outcome] = []
            types = SharedTypes()
            for batch in source.of_one_file():
                for item in batch.items:
                    if tally.is_stopped:
                        raise RunStopped("interrupted; this file is rated from its first row again")
                    outcomes.append(source.maker.failure_of(item) or rate(scorer, item))
                    tally.count(outcomes[-1])
                    if isinstance(outcome := outcomes[-1], Success):
                        types.note(outcome.values)
            fields = declared_fields(scorer) or types.fields()
            input_key = self.spec.task.rated.input_key

            def api_row(index: int, item: Row | BadLine) -> tuple[ApiRow, Usage]:
                return {**_row(outcomes[index]), "api_model": self.path}, Usage()

            report = draft.written(
                lambda out: write_scores(source, fields, input_key, api_row, out).report
            )
            draft.publish(report, source.fingerprint())
        return report


def rate(scorer: Scorer, item: Row | BadLine) -> Outcome:
    """A line that is no row is not shown to the scorer."""
    return bad_line(item) if isinstance(item, BadLine) else grade(scorer, item)


def _row(outcome: Outcome) -> ApiRow:
    text = None if isinstance(outcome, Failure) else orjson.dumps(outcome.values).decode()
    return {**outcome_row(outcome), "api_return": text}
