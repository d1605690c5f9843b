"""A task file: what every task has, and the task that scores."""

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from modelcall_assets.config import (
    Block,
    Content,
    Count,
    Encoding,
    Limit,
    OldField,
    OnBadLine,
    OnEmptyFile,
    Parsed,
    Text,
    Texts,
    at,
    errors_in,
    is_old,
    mistake,
    must,
    validate,
)
from modelcall_assets.config.agreement import Agreement
from modelcall_assets.config.places import Folder, moved_paths
from modelcall_assets.config.preprocess import Preprocess, unused_fields
from modelcall_assets.errors import Problem, did_you_mean

TASK_TYPE = "data_scoring"
DISTILLATION_TYPES = ("data_distillation", "evaluation", "generate_response")
RESUME = "every run resumes; to ask again for everything, use `modelcall run-task --fresh`"
_PROGRESS = "progress is told after 2, 5, 10 and 30 seconds, then every 30"
_STATS = "partition status replaces the stat files; preprocess.stat_folder writes those still"
_CHUNKS = "there is no chunk barrier: max_concurrent_requests are always in flight"
_KEPT = "the journal keeps every reply on arrival"
_REPEATS = "for repeats, write one task per run, each with its own task_name and output_folder"
_FRESH = "deleting would contradict the partitions; remove it and use `modelcall run-task --fresh`"
TASK_FIELDS = (
    OldField("warning", "data.stat_folder", _STATS),
    OldField("warning", "preprocess.seed", "nothing in preprocessing is random"),
    OldField("warning", "preprocess.batch_size", "rows are streamed, not batched"),
    OldField("warning", "preprocess.group_by_language", "a partition is a language anyway"),
    OldField("warning", "environment.api_provider", "base_url in the model file decides"),
    OldField("warning", "concurrency.chunk_size", _CHUNKS),
    OldField("warning", "concurrency.parquet_save_interval", _KEPT),
    OldField("refused", "distributed.num_runs", _REPEATS, (1, None)),
    OldField("warning", "options.main_resume", RESUME, (True, None)),
    OldField("warning", "options.resume", RESUME, (True, None)),
    OldField("warning", "options.preprocess_resume", RESUME, (True, None)),
    OldField("refused", "options.delete_existing", _FRESH, (False, None)),
    OldField("warning", "logging.progress_report_interval", _PROGRESS),
    OldField("honoured", "task_type", "missing means data_scoring; a misspelt one is an error"),
    OldField("honoured", "debug.max_files", "-1 means no limit; 0 is an error"),
    OldField("honoured", "debug.max_items_per_file", "-1 means no limit; 0 is an error"),
    OldField("changed", "data.input_folder", "sub-folders are read too"),
    OldField("changed", "data.output_folder", "failed rows stay in their place"),
    OldField("changed", "data.prompt_format_key", "gets the column of data.input_key, always"),
    OldField("changed", "preprocess.max_tokens", "exact, for texts of up to 20,000 characters too"),
    OldField("changed", "distributed.world_size", "a job without --job-index takes all files"),
    OldField("changed", "retry.enable_format_validation_retry", "the model is told what was wrong"),
    OldField("changed", "retry.max_retries", "was never read; overrides the model file"),
    OldField("changed", "preprocess.num_files", "for every script type; debug.max_files wins"),
    OldField("changed", "preprocess.num_proc", "processes within one file; at most one a core"),
    OldField("changed", "preprocess.languages", "for triplet_filter too"),
    OldField("honoured", "preprocess.file_pattern", "the default is now *: JSONL and Parquet"),
)


class ConfigPath(Block):
    """A reference to another config file."""

    config_path: Text
    """The file, relative to the project root."""


class EnvFiles(Block):
    """Variables of this task only."""

    config_path: Texts = Field(default_factory=list[str])
    """Env file or files; a later one wins. No other task sees them."""
    tos_config_path: Text | None = None
    """One more env file, read last."""
    timeout: Annotated[float, Field(gt=0)] | None = None
    """Seconds a request may take when the model file does not say."""


class Concurrency(Block):
    """How much runs at the same time."""

    max_concurrent_files: Count = 2
    """Runs of this task at a time."""
    max_concurrent_requests: Count = 10
    """Requests in flight in one run."""
    files_per_run: Annotated[int, Field(ge=1, le=50)] = 1
    """Files that share one run; more than 1 pays off when they are many and small."""


class Distributed(Block):
    """Sharding by file for batch schedulers."""

    enabled: bool = False
    """Kept for old files; `world_size` decides."""
    world_size: Count = 1
    """Number of jobs that share the files; `--world-size` wins."""


class Debug(Block):
    """A small trial."""

    enabled: bool = False
    """Whether the next two apply."""
    max_files: Limit = None
    """Takes only the first files."""
    max_items_per_file: Limit = None
    """Takes only the first rows of each file."""


class Retry(Block):
    """What happens after a failed request or a malformed answer."""

    enable_format_validation_retry: bool = True
    """Ask the model to repair an answer that is not what the prompt declares."""
    max_repair_turns: Annotated[int, Field(ge=0)] = 2
    """Repair turns per record."""
    max_retries: Annotated[int, Field(ge=0)] | None = None
    """Retries after a transport failure; overrides the model file."""

    @property
    def repair_turns(self) -> int:
        """Repair turns that may be paid for."""
        return self.max_repair_turns if self.enable_format_validation_retry else 0


class Sensor(Block):
    """Watches the input folder. It spends money by itself, so it is off unless asked for."""

    enabled: bool = False
    """Whether it runs as soon as the project is loaded; it can be switched in the UI too."""
    interval_seconds: Count = 30
    """Least time between two looks at the folder."""
    max_runs_per_tick: Annotated[int, Field(ge=1, le=500)] = 50
    """Runs launched at one look; what is left waits for the next."""


_LOCAL = must(lambda place: "://" not in place, "not on this machine", "a path such as logs")
_BARE_OFF = BeforeValidator(lambda scope: "off" if scope is False else scope)
"""YAML takes a bare `off` for false."""


class Reuse(Block):
    """Which earlier answers may stand for a request."""

    scope: Annotated[Literal["file", "project", "off"], _BARE_OFF] = "file"
    """`file`: those of the same file; `project`: also of other files and tasks that say `project`,
    of what they ask at this time too; `off`: a published file is asked anew when it is materialised
    again."""
    identical_once: bool = False
    """Ask identical requests of a run's files once; the others get the same answer."""


class Logging(Block):
    """What runs tell, in files."""

    log_dir: Annotated[Text, _LOCAL] | None = None
    """Folder on this machine, relative to the project root: in a folder of the
    task's below it each run writes a log, how each row ended, and its numbers. Default: none."""
    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """The least that is worth a line there."""
    batch_size: Count = 100
    """Rows whose ends are written there at once."""


class NoFields(Block):
    """Old fields only."""


def _is_owner(owner: str) -> bool:
    name, at, domain = owner.partition("@")
    return bool(name and at and "." in domain) or (owner.startswith("team:") and len(owner) > 5)


Owner = Annotated[str, must(_is_owner, "not an owner", "an e-mail address or team:<name>")]


class TaskFile(Block):
    """The fields that all kinds of tasks share."""

    task_name: Text
    """Name of the task, unique in the project; `{task_name}` in paths."""
    description: str = ""
    """Shown in the UI."""
    owners: list[Owner] = Field(default_factory=list[str])
    """Dagster owners: e-mail addresses or `team:<name>`."""
    sensor: Sensor = Sensor()
    environment: EnvFiles = EnvFiles()
    data_root: Folder | None = None
    """Where the task's relative data folders lie; default that of configs/storage.yaml, else the
    project root."""
    concurrency: Concurrency = Concurrency()
    distributed: Distributed = Distributed()
    debug: Debug = Debug()
    retry: Retry = Retry()
    reuse: Reuse = Reuse()
    agreement: Agreement = Agreement()
    budget_usd: Annotated[float, Field(gt=0)] | None = None
    """US dollars that the task may spend over all its runs; needs the model's prices."""
    budget_tokens: Limit = None
    """Tokens that the task may use over all its runs."""
    options: NoFields = NoFields()
    logging: Logging = Logging()
    max_failure_rate: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share of failed rows above which a file's output is rejected."""

    @property
    def max_files(self) -> int | None:
        """The file cap in force."""
        return self.debug.max_files if self.debug.enabled else None

    @property
    def max_items_per_file(self) -> int | None:
        """The row cap in force."""
        return self.debug.max_items_per_file if self.debug.enabled else None


# The task that scores


class Data(Block):
    """Where rows come from and where scores go."""

    input_folder: Folder
    """Folder of JSONL, Parquet and Arrow files: a path, or the URI of a store such as s3://."""
    output_folder: Folder
    """Folder of the scores; of a task that only preprocesses, of its rows."""
    input_key: Text = "text"
    """Column that holds the text to score."""
    prompt_format_key: Text = Field(default_factory=lambda block: block["input_key"])
    """Placeholder of the prompt that receives the text; default `input_key`."""
    journal_folder: Folder | None = None
    """Where raw replies are kept; default `<output_folder>/.modelcall`."""
    on_bad_line: OnBadLine = "keep"
    on_empty_file: OnEmptyFile = "fail"
    encoding: Encoding = "utf-8"


def _scoring(task_type: str) -> str:
    if task_type == TASK_TYPE:
        return task_type
    known = TASK_TYPE, *DISTILLATION_TYPES
    expected, fix = f"one of {', '.join(known)}", did_you_mean(task_type, known)
    raise mistake("unknown task type", expected=expected, fix=fix)


class ScoringTask(TaskFile):
    """Scores every row of a folder with a model and a prompt, or only preprocesses them."""

    task_type: Annotated[str, AfterValidator(_scoring)] = TASK_TYPE
    """Kind of task; this one is `data_scoring`."""
    data: Data
    """Where rows come from and where scores go."""
    preprocess: Preprocess = Preprocess()
    model: ConfigPath | None = None
    """The model file; required unless there is a `scorer`, or the task only preprocesses."""
    prompt: ConfigPath | None = None
    """The prompt file; goes with `model`."""
    scorer: Text | None = None
    """Instead of a model: `module:name` of an object or class with `score(item) -> dict`."""

    old_fields = TASK_FIELDS
    input_field: ClassVar[str] = "data.input_folder"

    @property
    def reads(self) -> Data:
        return self.data

    rated = reads

    @property
    def _preprocess(self) -> Preprocess:
        """What is in force of it."""
        return self.preprocess if self.preprocess.enabled else Preprocess()

    @property
    def rates(self) -> bool:
        """Else it only preprocesses."""
        return (self.model or self.prompt or self.scorer) is not None

    @property
    def stage_folders(self) -> dict[str, str | None]:
        first = {"preprocessed": self.preprocess.output_folder} if self.preprocess.enabled else {}
        if not self.rates:
            return {name: folder or self.data.output_folder for name, folder in first.items()}
        return {**first, "scores": self.data.output_folder}

    @property
    def state_folder(self) -> str:
        return self.data.output_folder

    @property
    def input_folder(self) -> str:
        return self._preprocess.input_folder or self.data.input_folder

    @property
    def journal_folder(self) -> str | None:
        return self.data.journal_folder

    @property
    def inputs(self) -> dict[str, str]:
        """Folders as written, by field."""
        own = self._preprocess.input_folder
        folders = {"data.input_folder": self.data.input_folder}
        return {**folders, "preprocess.input_folder": own} if own else folders

    @property
    def outputs(self) -> dict[str, str]:
        folders = {
            "data.output_folder": self.data.output_folder,
            "data.journal_folder": self.data.journal_folder,
            "preprocess.output_folder": self._preprocess.output_folder,
            "preprocess.stat_folder": self._preprocess.stat_folder,
        }
        return {field: folder for field, folder in folders.items() if folder}

    @property
    def max_files(self) -> int | None:
        """The file cap in force: debug's, else preprocess's, else none."""
        return super().max_files or self._preprocess.num_files


def parse_scoring(data: Content, file: str, has_data_root: bool) -> Parsed[ScoringTask]:
    task, problems = validate(ScoringTask, data, file)
    problems += _rater_problems(data, file)
    if is_old(data, TASK_FIELDS) and not has_data_root and data.get("data_root") is None:
        refused = {problem.field for problem in problems}
        problems += (p for p in moved_paths(data, file) if p.field not in refused)
    if task is not None:
        problems += unused_fields(task.preprocess, file)
    return (None if errors_in(problems) else task), problems


def _rater_problems(data: Content, file: str) -> Iterator[Problem]:
    """A task rates with a model and a prompt, or with a scorer, or only preprocesses."""
    has_scorer = data.get("scorer") is not None
    if at(data, "preprocess.enabled") is True and not {"model", "prompt"} & data.keys():
        return
    for name in ("model", "prompt"):
        if (given := data.get(name) is not None) and has_scorer:
            fix = f"remove {name} or scorer"
            yield Problem(file, name, "not used: the task has a scorer", fix=fix)
        elif not given and not has_scorer:
            fix = "add it, or a scorer that needs no model"
            yield Problem(file, name, "missing", f"{name}.config_path", fix=fix)
