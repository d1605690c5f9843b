"""Fields of the old YAML files that have no effect here, or contradict partitions.

They are taken out of a file before it is validated, so the models know only fields that work.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

from modelcall_assets.errors import Problem


@dataclass(frozen=True, slots=True)
class OldField:
    """One field of the old system; `instead` says why, or what to write. A `changed` one works, but
    means something else."""

    path: str
    treatment: Literal["honoured", "changed", "warning", "refused"]
    instead: str
    harmless: tuple[object, ...] = ()
    """Values that ask for what happens anyway: accepted in silence."""
    keeps: bool = False
    """Whether a harmless value stays, because it has an effect here too."""

    def stays(self, value: object) -> bool:
        return self.keeps and value in self.harmless

    def in_old_block(self) -> tuple[str, list[str]]:
        """Of a step's field: the step, and the names of the field in the block `distillation`."""
        step, _, own = self.path.partition(".")
        return step, [own, *(alias for alias, name in STEP_ALIASES.items() if name == own)]


_RESUME = "every run resumes; to ask again for everything, use `modelcall run-task --fresh`"
_BUFFERS = "every reply is journalled as it arrives"
_LOGS = "Dagster keeps the log of every run"

TASK_FIELDS = (
    OldField(
        "data.stat_folder",
        "warning",
        "partition status replaces the stat files; preprocess.stat_folder writes those still",
    ),
    OldField("preprocess.seed", "warning", "nothing in preprocessing is random"),
    OldField("preprocess.batch_size", "warning", "rows are streamed, not batched"),
    OldField("preprocess.group_by_language", "warning", "a partition is a language anyway"),
    OldField("environment.api_provider", "warning", "base_url in the model file decides"),
    OldField(
        "concurrency.chunk_size",
        "warning",
        "there is no chunk barrier: max_concurrent_requests are always in flight",
    ),
    OldField(
        "concurrency.parquet_save_interval", "warning", "the journal keeps every reply on arrival"
    ),
    OldField(
        "distributed.num_runs",
        "refused",
        "for repeats, write one task per run, each with its own task_name and output_folder",
        harmless=(1, None),
    ),
    OldField("options.main_resume", "warning", _RESUME, harmless=(True, None)),
    OldField("options.resume", "warning", _RESUME, harmless=(True, None)),
    OldField("options.preprocess_resume", "warning", _RESUME, harmless=(True, None)),
    OldField(
        "options.delete_existing",
        "refused",
        "deleting would contradict the partitions; remove it and use `modelcall run-task --fresh`",
        harmless=(False, None),
    ),
    OldField("logging.level", "warning", _LOGS),
    OldField("logging.batch_size", "warning", _LOGS),
    OldField("logging.progress_report_interval", "warning", _LOGS),
    OldField("logging.log_dir", "warning", _LOGS),
    OldField("task_type", "honoured", "missing means data_scoring; a misspelt one is an error"),
    OldField("debug.max_files", "honoured", "-1 means no limit; 0 is an error"),
    OldField("debug.max_items_per_file", "honoured", "-1 means no limit; 0 is an error"),
    OldField("retry.max_retries", "changed", "was never read; overrides the model file"),
    OldField("preprocess.num_files", "changed", "for every script type; debug.max_files wins"),
    OldField("preprocess.num_proc", "changed", "processes within one file; at most one a core"),
    OldField("preprocess.languages", "changed", "for triplet_filter too"),
    OldField("preprocess.file_pattern", "honoured", "the default is now *: JSONL and Parquet"),
)

MODEL_FIELDS = (
    *(
        OldField(f"{block}.timeout", "warning", "client_config.timeout is the limit of a request")
        for block in ("chat_config", "completions_params")
    ),
    OldField("model_name", "changed", "was ignored in favour of an environment variable"),
)

STEP_FIELDS = (
    OldField(
        "chatml_conversion.num_processes", "warning", "files run side by side as Dagster runs"
    ),
    OldField(
        "chatml_conversion.continue_mode",
        "warning",
        "partition status decides what is done again",
        harmless=(True,),
    ),
    OldField("jsonl_merge.chunk_size", "warning", "rows are streamed"),
    OldField("generate_response.batch_size", "warning", _BUFFERS),
    OldField("generate_response.flush_interval_secs", "warning", _BUFFERS),
    OldField(
        "generate_response.retry_mode",
        "honoured",
        "adopts old answers at the output's place; `modelcall retry` asks for what failed",
    ),
    OldField(
        "generate_response.resume_mode", "warning", _RESUME, harmless=(True, None), keeps=True
    ),
)
"""Of the steps of a distilling task; the old files have them in the block `distillation`."""

STEP_ALIASES = {
    "model_config": "response_config_path",
    "flush_interval": "flush_interval_secs",
    "resume": "resume_mode",
}
"""Names of `task_type: generate_response`, and what `step: generate_response` calls the same."""

PLACEHOLDERS = {
    "timestamp": "write a fixed folder without it; Dagster's run history keeps the times",
    "run_index": "write a fixed folder; for repeats, one task_name and output_folder per run",
}
"""Placeholders of the old paths that would give a partition a new place on every run."""


def old_fields_in(
    data: dict[str, Any], old_fields: Iterable[OldField]
) -> Iterator[tuple[OldField, dict[str, Any], str]]:
    """Those of the fields that the data has, each with its block and its name there."""
    for old in old_fields:
        parent, _, name = old.path.rpartition(".")
        block: Any = data.get(parent) if parent else data
        if isinstance(block, dict) and name in block:
            yield old, cast("dict[str, Any]", block), name


def take_out(
    data: dict[str, Any], old_fields: Iterable[OldField], file: str
) -> tuple[dict[str, Any], list[Problem], bool]:
    """The data without its old fields, what to tell the user, and whether there were any."""
    data = {key: {**value} if isinstance(value, dict) else value for key, value in data.items()}
    problems: list[Problem] = []
    found = False
    for old, block, name in old_fields_in(data, old_fields):
        if old.treatment in ("honoured", "changed"):
            continue
        value, stays = block[name], old.stays(block[name])
        found |= not stays or value is not None
        if value not in old.harmless and old.treatment == "refused":
            problems.append(Problem(file, old.path, "not supported here", fix=old.instead))
        elif value not in old.harmless:
            wrong, fix = "has no effect", old.instead
            problems.append(Problem(file, old.path, wrong, fix=fix, severity="warning"))
        if not stays:
            del block[name]
    return data, problems, found


def old_names(block: str) -> set[str]:
    """Names that a block of the old files could hold beside the fields of its model."""
    paths = (old.path.rpartition(".") for old in (*TASK_FIELDS, *STEP_FIELDS, *MODEL_FIELDS))
    return {name for parent, _, name in paths if parent == block}
