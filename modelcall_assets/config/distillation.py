"""A task file that distils: conversations from data sets, merged, answered, perhaps rated.

One file may hold one step or a chain of them. The old files' `distillation: {step: …}` block and
their `task_type: generate_response` are read as the one step that they are.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from modelcall_assets.config import (
    Content,
    OldField,
    Parsed,
    block_at,
    errors_in,
    validate,
)
from modelcall_assets.config.places import Folder
from modelcall_assets.config.steps import (
    ChatmlStep,
    GradingStep,
    JudgeStep,
    MergeStep,
    ResponsesStep,
    SourcesStep,
    Step,
)
from modelcall_assets.config.task import RESUME, TASK_FIELDS, TaskFile
from modelcall_assets.errors import Problem, did_you_mean

EVALUATION = "evaluation"
GENERATE = "generate_response"
OLD_STEPS = ("chatml_conversion", "jsonl_merge", GENERATE)
STEPS = ("sources", *OLD_STEPS)
OLD_BLOCK = "distillation"
_BUFFERS = "every reply is journalled as it arrives"
_ADOPTS = "adopts old answers at the output's place; `modelcall retry` asks for what failed"
_DONE = "partition status decides what is done again"
STEP_FIELDS = (
    OldField(
        "warning", "chatml_conversion.num_processes", "files run side by side as Dagster runs"
    ),
    OldField("warning", "chatml_conversion.continue_mode", _DONE, (True,)),
    OldField("warning", "jsonl_merge.chunk_size", "rows are streamed"),
    OldField("warning", "generate_response.batch_size", _BUFFERS),
    OldField("warning", "generate_response.flush_interval_secs", _BUFFERS),
    OldField("changed", "generate_response.retry_mode", _ADOPTS),
    OldField("changed", "generate_response.output_path", "failed rows stay in their place"),
    OldField("warning", "generate_response.resume_mode", RESUME, (True, None), keeps=True),
)
STEP_ALIASES = {
    "model_config": "response_config_path",
    "flush_interval": "flush_interval_secs",
    "resume": "resume_mode",
}
"""Names of `task_type: generate_response`, and what `step: generate_response` calls the same."""


class DistillationTask(TaskFile):
    """`configs/tasks/**/*.yaml` with `task_type: data_distillation` or `generate_response`

    Beside these it has the fields of every task: all of the table above but `data`, `preprocess`,
    `model`, `prompt` and `scorer`. The steps run in this order, with `sources` or
    `chatml_conversion` as the first. A file may hold some of them only, and files whose folders fit
    together are one graph. A file with a single step may write it as the old system did:
    `distillation: {step: chatml_conversion, …}` with the step's fields, and without `step` where
    `task_type` is `generate_response`. [distillation.md](distillation.md) has examples.
    """

    task_type: str
    """`data_distillation`."""
    old_fields = (*TASK_FIELDS, *STEP_FIELDS)
    sources: SourcesStep | None = None
    chatml_conversion: ChatmlStep | None = None
    jsonl_merge: MergeStep | None = None
    generate_response: ResponsesStep | None = None
    scores: JudgeStep | None = None
    journal_folder: Folder | None = None
    """Where raw replies are kept; default `.modelcall` in the folder of the
    responses, else of the last step."""

    @property
    def steps(self) -> dict[str, Step]:
        names = (*STEPS, "scores", "grading")
        return {name: step for name in names if (step := getattr(self, name, None)) is not None}

    @property
    def reads(self) -> SourcesStep | ChatmlStep | MergeStep | ResponsesStep:
        """The step that reads what is not of this task, and says how its lines are read."""
        made = self.sources or self.chatml_conversion
        first = made or self.jsonl_merge or self.generate_response
        assert first is not None
        return first

    @property
    def input_field(self) -> str:
        return f"{next(iter(self.steps))}.{self.reads.input_field}"

    @property
    def input_folder(self) -> str:
        """What the task reads first, as written."""
        return self.inputs[self.input_field]

    @property
    def stage_folders(self) -> dict[str, str]:
        return {step.stage: step.output for step in self.steps.values()}

    @property
    def state_folder(self) -> str:
        """That of the last step, but for a judge, which may come later."""
        steps = [*self.steps.values()]
        return (self.generate_response or steps[-1]).output

    @property
    def inputs(self) -> dict[str, str]:
        """Folders as written, by field."""
        return {f"{name}.{s.input_field}": s.input for name, s in self.steps.items() if s.input}

    @property
    def outputs(self) -> dict[str, str]:
        found = {f"{name}.{step.output_field}": step.output for name, step in self.steps.items()}
        return found | ({"journal_folder": self.journal_folder} if self.journal_folder else {})

    @property
    def rated(self) -> JudgeStep:
        assert self.scores is not None
        return self.scores

    @property
    def makes_conversations(self) -> bool:
        """Of something else, which no other task leaves."""
        return (self.sources or self.chatml_conversion) is not None

    @property
    def is_graded(self) -> bool:
        """Whether its answers are compared with references, which each conversation then has."""
        return "grading" in self.steps


class EvaluationTask(DistillationTask):
    """`configs/tasks/**/*.yaml` with `task_type: evaluation`

    Beside these it has the fields of a distilling task; `grading` takes the place of `scores`.
    [evaluation.md](evaluation.md) has examples.
    """

    task_type: str
    """`evaluation`."""
    grading: GradingStep | None = None


def parse_distillation(data: Content, file: str) -> Parsed[DistillationTask]:
    known, problems = with_steps(data, file)
    kind = EvaluationTask if data.get("task_type") == EVALUATION else DistillationTask
    task, mistakes = validate(kind, known, file)
    problems += mistakes
    if task is not None and not errors_in(problems):
        problems += _gaps(task, file)
    problems = [as_written(problem, data) for problem in problems]
    return (None if errors_in(problems) else task), problems


def as_written(problem: Problem, data: Content) -> Problem:
    """A problem of the one step of an old file, at the place where the file has it."""
    block, (step, _, name) = block_at(data, OLD_BLOCK), problem.field.partition(".")
    if not name or step != old_step(data):
        return problem
    own = (old for old, new in STEP_ALIASES.items() if new == name and old in block)
    return replace(problem, field=f"{OLD_BLOCK}.{next(own, name)}")


def old_step(data: Content) -> Any:
    """The step that the old block is, if there is one."""
    if OLD_BLOCK not in data:
        return None
    usual = GENERATE if data.get("task_type") == GENERATE else None
    return block_at(data, OLD_BLOCK).get("step", usual)


def in_old_block(old: OldField) -> tuple[str, list[str]]:
    """Of a step's field: the step, and the names of the field in the block `distillation`."""
    step, _, own = old.path.partition(".")
    return step, [own, *(alias for alias, name in STEP_ALIASES.items() if name == own)]


def with_steps(data: Content, file: str) -> tuple[Content, list[Problem]]:
    """The file with a block per step in place of the old one, and what is wrong with that."""
    if OLD_BLOCK not in data:
        return data, []
    rest = {name: value for name, value in data.items() if name != OLD_BLOCK}
    step, given = old_step(data), block_at(data, OLD_BLOCK)
    if step not in OLD_STEPS:
        wrong = "missing" if step is None else f"unknown step {step}"
        expected, fix = f"one of {', '.join(OLD_STEPS)}", did_you_mean(str(step), OLD_STEPS)
        return rest, [Problem(file, f"{OLD_BLOCK}.step", wrong, expected, fix=fix)]
    problems: list[Problem] = []
    if rest.get(step) is not None:
        wrong = f"the block {OLD_BLOCK} is this step too"
        problems.append(Problem(file, step, wrong, fix="leave one of them"))
    fields: Content = {}
    for name, value in given.items():
        own = STEP_ALIASES.get(name, name) if step == GENERATE else name
        if own in fields:
            place, wrong = f"{OLD_BLOCK}.{name}", f"given twice: {own} has two names"
            problems.append(Problem(file, place, wrong, fix="leave one of them"))
        if own != "step":
            fields[own] = value
    return {**rest, step: fields}, problems


def _gaps(task: DistillationTask, file: str) -> Iterator[Problem]:
    """Steps that have nothing to read, or another input than their own, and what cannot be."""
    steps = {name: step for name, step in task.steps.items() if name in STEPS}
    responses = task.generate_response
    if not steps:
        yield Problem(file, "", "no step", f"one of {', '.join(STEPS)}")
    for first, second in (("sources", "chatml_conversion"), ("scores", "grading")):
        if first in task.steps and second in task.steps:
            fix = "leave one of them, or write two tasks"
            yield Problem(file, second, f"not beside {first}", fix=fix)
    if task.sources and bool(task.sources.tasks) == (task.sources.task_reader is not None):
        yield Problem(file, "sources", "expected either tasks or task_reader")
    if task.is_graded and responses is not None and responses.prompt_mode == "first_message":
        fix = "leave it out: the conversation without its reference is sent"
        yield Problem(file, "generate_response.prompt_mode", "not beside grading", fix=fix)
    before = ""
    for name, step in steps.items():
        place, own = f"{name}.{step.input_field}", step.input
        if own is None and not before:
            what = "the file or folder" if step is responses else "the folder"
            yield Problem(file, place, "missing", fix=f"name {what}")
        if own and before and own.rstrip("/") != before.rstrip("/"):
            wrong = f"not read: the step before leaves its files in {before}"
            yield Problem(file, place, wrong, have=own, fix="leave it out")
        before = step.output
    if responses is not None and responses.samples > 1:
        wrong = f"with {responses.samples} samples all but one would be copies"
        fix = "leave it out, or `samples: 1`"
        if task.reuse.identical_once:
            yield Problem(file, "reuse.identical_once", wrong, fix=fix)
        if task.reuse.scope == "project":
            yield Problem(file, "reuse.scope", wrong, fix=fix)
    for name, step in [*steps.items()][1:]:
        if (encoding := getattr(step, "encoding", "utf-8")) != "utf-8":
            wrong = "not read: what the step before leaves is UTF-8"
            yield Problem(file, f"{name}.encoding", wrong, have=encoding, fix="leave it out")
    if task.agreement.is_asked and not {"scores", "grading"} & task.steps.keys():
        yield Problem(file, "agreement", "not used: the task rates nothing", fix="remove it")
    for name in task.steps.keys() - steps if not responses else ():
        fix = "add generate_response, or rate a folder with task_type data_scoring"
        yield Problem(file, name, "there are no answers to rate", fix=fix)
