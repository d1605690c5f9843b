"""What becomes of the fields of the old YAML files that have no effect here, or another one.

Those without effect are taken out of a file before it is validated, so the models know only fields
that work.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from modelcall_assets.errors import Problem


@dataclass(frozen=True, slots=True)
class OldField:
    """One field of the old system; `instead` says why, or what to write. Of a step's field, `path`
    begins with the step, and the old files have it in the block `distillation`."""

    treatment: Literal["honoured", "changed", "warning", "refused"]
    """`honoured` and `changed` ones work, the latter mean something else; `warning` and `refused`
    ones do not."""
    path: str
    instead: str
    harmless: Sequence[object] = ()
    """Values that ask for what happens anyway: accepted in silence."""
    keeps: bool = False
    """Whether a harmless value stays, because it has an effect here too."""

    def stays(self, value: object) -> bool:
        return self.works or (self.keeps and value in self.harmless)

    @property
    def works(self) -> bool:
        return self.treatment in ("honoured", "changed")

    def in_old_block(self) -> tuple[str, list[str]]:
        """Of a step's field: the step, and the names of the field in the block `distillation`."""
        step, _, own = self.path.partition(".")
        return step, [own, *(alias for alias, name in STEP_ALIASES.items() if name == own)]


_RESUME = "every run resumes; to ask again for everything, use `modelcall run-task --fresh`"
_BUFFERS = "every reply is journalled as it arrives"
_LOGS = "Dagster keeps the log of every run"
_STATS = "partition status replaces the stat files; preprocess.stat_folder writes those still"
_CHUNKS = "there is no chunk barrier: max_concurrent_requests are always in flight"
_REPEATS = "for repeats, write one task per run, each with its own task_name and output_folder"
_FRESH = "deleting would contradict the partitions; remove it and use `modelcall run-task --fresh`"
_ADOPTS = "adopts old answers at the output's place; `modelcall retry` asks for what failed"
_TIMEOUT = "client_config.timeout is the limit of a request"

TASK_FIELDS = (
    OldField("warning", "data.stat_folder", _STATS),
    OldField("warning", "preprocess.seed", "nothing in preprocessing is random"),
    OldField("warning", "preprocess.batch_size", "rows are streamed, not batched"),
    OldField("warning", "preprocess.group_by_language", "a partition is a language anyway"),
    OldField("warning", "environment.api_provider", "base_url in the model file decides"),
    OldField("warning", "concurrency.chunk_size", _CHUNKS),
    OldField(
        "warning", "concurrency.parquet_save_interval", "the journal keeps every reply on arrival"
    ),
    OldField("refused", "distributed.num_runs", _REPEATS, (1, None)),
    OldField("warning", "options.main_resume", _RESUME, (True, None)),
    OldField("warning", "options.resume", _RESUME, (True, None)),
    OldField("warning", "options.preprocess_resume", _RESUME, (True, None)),
    OldField("refused", "options.delete_existing", _FRESH, (False, None)),
    OldField("warning", "logging.level", _LOGS),
    OldField("warning", "logging.batch_size", _LOGS),
    OldField("warning", "logging.progress_report_interval", _LOGS),
    OldField("warning", "logging.log_dir", _LOGS),
    OldField("honoured", "task_type", "missing means data_scoring; a misspelt one is an error"),
    OldField("honoured", "debug.max_files", "-1 means no limit; 0 is an error"),
    OldField("honoured", "debug.max_items_per_file", "-1 means no limit; 0 is an error"),
    OldField("changed", "retry.max_retries", "was never read; overrides the model file"),
    OldField("changed", "preprocess.num_files", "for every script type; debug.max_files wins"),
    OldField("changed", "preprocess.num_proc", "processes within one file; at most one a core"),
    OldField("changed", "preprocess.languages", "for triplet_filter too"),
    OldField("honoured", "preprocess.file_pattern", "the default is now *: JSONL and Parquet"),
)
MODEL_FIELDS = (
    OldField("warning", "chat_config.timeout", _TIMEOUT),
    OldField("warning", "completions_params.timeout", _TIMEOUT),
    OldField("changed", "model_name", "was ignored in favour of an environment variable"),
)
_DONE = "partition status decides what is done again"
STEP_FIELDS = (
    OldField(
        "warning", "chatml_conversion.num_processes", "files run side by side as Dagster runs"
    ),
    OldField("warning", "chatml_conversion.continue_mode", _DONE, (True,)),
    OldField("warning", "jsonl_merge.chunk_size", "rows are streamed"),
    OldField("warning", "generate_response.batch_size", _BUFFERS),
    OldField("warning", "generate_response.flush_interval_secs", _BUFFERS),
    OldField("honoured", "generate_response.retry_mode", _ADOPTS),
    OldField("warning", "generate_response.resume_mode", _RESUME, (True, None), keeps=True),
)
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

Found = list[tuple[OldField, Any]]


def take_out(data: dict[str, Any], old_fields: Iterable[OldField]) -> tuple[dict[str, Any], Found]:
    """The data without those of the fields that do nothing here; and all that it had of them."""
    data = {key: {**value} if isinstance(value, dict) else value for key, value in data.items()}
    found: Found = []
    for old in old_fields:
        parent, _, name = old.path.rpartition(".")
        inner = data.get(parent) if parent else data
        block = cast("dict[str, Any]", inner) if isinstance(inner, dict) else {}
        if name in block:
            found.append((old, block[name]))
            if not old.stays(block[name]):
                del block[name]
    return data, found


def is_old(found: Found) -> bool:
    """Whether these show that a file is of the old system: ours have none without effect."""
    return any(not old.works and not (old.stays(v) and v is None) for old, v in found)


def without_effect(found: Found, file: str) -> Iterator[Problem]:
    for old, value in found:
        if old.works or value in old.harmless:
            continue
        is_refused = old.treatment == "refused"
        wrong = "not supported here" if is_refused else "has no effect"
        severity = "error" if is_refused else "warning"
        yield Problem(file, old.path, wrong, fix=old.instead, severity=severity)


def old_names(block: str) -> set[str]:
    """Names that a block of the old files could hold beside the fields of its model."""
    paths = (old.path.rpartition(".") for old in (*TASK_FIELDS, *STEP_FIELDS, *MODEL_FIELDS))
    return {name for parent, _, name in paths if parent == block}
