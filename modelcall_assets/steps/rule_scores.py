"""`scores` by a scorer of the user's own instead of a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import orjson

from modelcall_assets.config.spec import PREPROCESSED
from modelcall_assets.errors import RunStopped
from modelcall_assets.grading.scorer import (
    Scorer,
    declared_fields,
    grade,
    load_scorer,
    scorer_digest,
)
from modelcall_assets.grading.values import SharedTypes
from modelcall_assets.llm.answer import Usage
from modelcall_assets.records.outcome import Failure, Outcome, Success
from modelcall_assets.records.record import BadLine, Row
from modelcall_assets.steps.draft import Draft
from modelcall_assets.steps.preprocess import bad_line, failure_before
from modelcall_assets.steps.progress import Tally
from modelcall_assets.steps.publish_scores import Publisher
from modelcall_assets.steps.score_report import ScoreReport
from modelcall_assets.steps.score_table import ApiRow, outcome_row
from modelcall_assets.steps.source import Source


@dataclass(frozen=True)
class RuleStage:
    """A scorer, where it is looked up, and the task file that names it."""

    path: str
    root: Path
    task_file: str
    input_key: str

    def version(self) -> str:
        """Changes with the scorer's name and with its module's source."""
        return f"{self.path}@{scorer_digest(self.path, self.root, self.task_file)}"

    def scorer(self) -> Scorer:
        """A new one where the task names a class. SetupError when it cannot be made."""
        return load_scorer(self.path, self.root, self.task_file)

    def score_file(self, source: Source, draft: Draft, tally: Tally) -> ScoreReport:
        """Rate every row once, then write them.

        Columns have the types that the scorer declares in `fields` (JSON-schema types by key), else
        those of the values it gave for this file. RunStopped when the tally is stopped.
        """
        scorer = self.scorer()
        outcomes: list[Outcome] = []
        types = SharedTypes()
        for chunk in source.chunks():
            for item in chunk.items:
                if tally.is_stopped:
                    raise RunStopped("interrupted; this file is rated from its first row again")
                failed = failure_before(item) if source.stage == PREPROCESSED else None
                outcomes.append(failed or rate(scorer, item))
                tally.count(outcomes[-1])
                if isinstance(outcome := outcomes[-1], Success):
                    types.note(outcome.values)
        fields = declared_fields(scorer) or types.fields()

        def api_row(index: int, item: Row | BadLine) -> tuple[ApiRow, Usage]:
            return {**_row(outcomes[index]), "api_model": self.path}, Usage()

        return draft.written(
            lambda out: Publisher(source, fields, self.input_key, api_row).write(out)
        )


def rate(scorer: Scorer, item: Row | BadLine) -> Outcome:
    """A line that is no row is not shown to the scorer."""
    return bad_line(item) if isinstance(item, BadLine) else grade(scorer, item)


def _row(outcome: Outcome) -> ApiRow:
    text = None if isinstance(outcome, Failure) else orjson.dumps(outcome.values).decode()
    return {**outcome_row(outcome), "api_return": text}
