"""`scores` of an evaluation: answers compared with their references by a grader."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

from modelcall_assets.config.distillation import EvaluationTask
from modelcall_assets.config.steps import GradingStep
from modelcall_assets.errors import Problem, SetupError, did_you_mean
from modelcall_assets.grading import GRADERS
from modelcall_assets.records.outcome import Failure, Reason, Row
from modelcall_assets.stages.figures import Grades
from modelcall_assets.stages.prepared import SourceInputs
from modelcall_assets.stages.report import last_line
from modelcall_assets.stages.scores import ScorerScores
from modelcall_assets.transforms.user_code import RAISED, Scorer, declared_fields, load_scorer

_FIELD = "grading.grader"


class Graded(ScorerScores):
    kinds = ("python", "parquet")
    done = "graded"
    hint = ("grading", "rows need what the grader compares answers with")
    again = "grade them all again"
    input_key = "response"  # type: ignore[override]

    @property
    def step(self) -> GradingStep:
        assert self._task.grading is not None
        return self._task.grading

    @property
    def _task(self) -> EvaluationTask:
        assert isinstance(self.spec.task, EvaluationTask)
        return self.spec.task

    @property
    def about(self) -> str:  # type: ignore[override]
        return f"grades by {self.step.grader or 'the graders of the sources'}"

    @property
    def shown(self) -> str:
        return self.step.grader or self._default

    @cached_property
    def path(self) -> str:  # type: ignore[override]
        """Of the grader's class. SetupError when there is none of that name."""
        name = self.shown
        if ":" in name:
            return name
        if name not in GRADERS:
            expected = f"one of {', '.join(GRADERS)}, or module:name of your own"
            fix = did_you_mean(name, GRADERS)
            raise self._wrong(f"no such grader: {name}", expected, fix)
        grader = GRADERS[name]
        return f"{grader.__module__}:{grader.__name__}"

    @property
    def _default(self) -> str:
        """That of the task's sources, or of each row's, where they have several."""
        names = self._defaults
        return "own" if names[1:] else names[0]

    @cached_property
    def _defaults(self) -> list[str]:
        """The graders of the sources. SetupError when one has none."""
        inputs = self.task.inputs
        graders = inputs.graders if isinstance(inputs, SourceInputs) else {None}
        if None in graders:
            expected = f"one of {', '.join(GRADERS)}, or module:name of your own"
            raise self._wrong("missing: a source does not say by what it is graded", expected)
        named = sorted(filter(None, graders))
        for name in named:
            if name not in GRADERS:
                expected = f"one of {', '.join(GRADERS)}, or name another here"
                raise self._wrong(f"the grader of a source is {name}", expected)
        return named

    @property
    def provenance(self) -> dict[str, str]:
        return {"grader": self._version}

    def own_shape(self) -> dict[str, Any]:
        return {**super().own_shape(), "options": self.step.options}

    def scorer(self) -> Scorer:
        """SetupError too when its first field is no figure."""
        spec = self.spec
        fields = _FIELD, "grading.options"
        scorer = load_scorer(self.path, spec.root, spec.file_name, *fields, **self.step.options)
        kinds = [of.get("type") for of in (declared_fields(scorer) or {}).values()]
        if not kinds or kinds[0] not in ("boolean", "integer", "number"):
            expected = "`fields` whose first is boolean or a number: the figure that is averaged"
            raise self._wrong(f"{self.path} declares no figure", expected)
        return scorer

    @cached_property
    def _wanted(self) -> Callable[[Row], object] | None:
        """Of the grader, if it says so. Those of the user need not."""
        return getattr(self.scorer(), "wanted", None)

    def unfit(self, row: Row) -> Failure | None:
        """When no answer to the row could be graded."""
        try:
            if self._wanted is not None:
                self._wanted(row)
        except ValueError as error:
            return Failure(Reason.MISSING_INPUT, str(error))
        except RAISED as error:
            return Failure(Reason.MISSING_INPUT, f"the grader's wanted() raised {last_line(error)}")
        return None

    def grades(self, scorer: Scorer) -> Grades:
        name, of = next(iter((declared_fields(scorer) or {}).items()))
        return Grades(name, of.get("type") == "boolean")

    def check_ready(self) -> None:
        """SetupError too when a grader cannot work here."""
        graders: list[Any] = [self.scorer()]
        asked = self._task.generate_response
        by_logprobs = self.step.options.get("by") == "logprobs"
        if by_logprobs and asked is not None and asked.logprobs is None:
            fix = "write `logprobs: 20` there"
            raise self._wrong("needs generate_response.logprobs", fix=fix)
        if self.step.grader is None:
            graders += [GRADERS[name]() for name in self._defaults]
        for grader in graders:
            if (check := getattr(grader, "check_ready", None)) is not None:
                check()

    def _wrong(self, wrong: str, expected: str = "", fix: str = "") -> SetupError:
        return SetupError([Problem(self.spec.file_name, _FIELD, wrong, expected, fix=fix)])
