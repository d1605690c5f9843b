"""A scoring task file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, cast

from pydantic import AfterValidator, BeforeValidator, Field, field_validator

from modelcall_assets.config.block import Block, Count, Limit, Text, did_you_mean, mistake
from modelcall_assets.config.legacy import TASK_FIELDS, take_out
from modelcall_assets.config.paths import InputFolder, OutputFolder, was_in_object_store
from modelcall_assets.config.preprocess import Preprocess, later_script
from modelcall_assets.config.problems import errors_in, validate
from modelcall_assets.errors import Problem

TASK_TYPE = "data_scoring"
_LATER_TASK_TYPES = (
    "data_distillation",
    "generate_response",
    "batch_distillation_submit",
    "merge_distillation_results",
)


class Data(Block):
    """Where rows come from and where scores go."""

    input_folder: InputFolder
    """Folder of JSONL and Parquet files, local or s3://."""
    output_folder: OutputFolder
    """Folder of the scores."""
    input_key: Text = "text"
    """Column that holds the text to score."""
    prompt_format_key: Text = Field(default_factory=lambda block: block["input_key"])
    """Placeholder of the prompt that receives the text; default `input_key`."""
    journal_folder: OutputFolder | None = None
    """Where raw replies are kept; default `<output_folder>/.modelcall`."""


class ConfigPath(Block):
    """A reference to another config file."""

    config_path: Text
    """The file, relative to the project root."""


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class EnvFiles(Block):
    """Variables of this task only."""

    config_path: Annotated[list[Text], BeforeValidator(_as_list)] = Field(default_factory=list[str])
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


class Reuse(Block):
    """Which earlier answers may stand for a request."""

    scope: Literal["file", "project", "off"] = "file"
    """`file`: those of the same file; `project`: also of other files and tasks that say `project`;
    `off`: a published file is asked anew when it is materialised again."""
    identical_once: bool = False
    """Ask identical requests of a file once; the others get the same answer."""


class Options(Block):
    """Old fields only."""


class Logging(Block):
    """Old fields only."""


def _owner(owner: str) -> str:
    name, at, domain = owner.partition("@")
    if (name and at and "." in domain) or (owner.startswith("team:") and len(owner) > 5):
        return owner
    raise mistake("not an owner", expected="an e-mail address or team:<name>")


class ScoringTask(Block):
    """Scores every row of a folder with a model and a prompt."""

    task_name: Text
    """Name of the task, unique in the project; `{task_name}` in paths."""
    task_type: str = TASK_TYPE
    """Kind of task; this version runs `data_scoring`."""
    description: str = ""
    """Shown in the UI."""
    owners: list[Annotated[str, AfterValidator(_owner)]] = Field(default_factory=list[str])
    """Dagster owners: e-mail addresses or `team:<name>`."""
    data: Data
    """Where rows come from and where scores go."""
    preprocess: Preprocess = Preprocess()
    """Cleaning, filtering and truncation before scoring."""
    model: ConfigPath | None = None
    """The model file; required unless there is a `scorer`."""
    prompt: ConfigPath | None = None
    """The prompt file; required unless there is a `scorer`."""
    scorer: Text | None = None
    """Instead of a model: `module:name` of an object or class with `score(item) -> dict`."""
    sensor: Sensor = Sensor()
    """Launches runs for new and changed input files."""
    environment: EnvFiles = EnvFiles()
    """Variables of this task only."""
    concurrency: Concurrency = Concurrency()
    """How much runs at the same time."""
    distributed: Distributed = Distributed()
    """Sharding by file for batch schedulers."""
    debug: Debug = Debug()
    """A small trial."""
    retry: Retry = Retry()
    """What happens after a failed request or a malformed answer."""
    reuse: Reuse = Reuse()
    """Which earlier answers may stand for a request."""
    budget_usd: Annotated[float, Field(gt=0)] | None = None
    """US dollars that the task may spend over all its runs; needs the model's prices."""
    budget_tokens: Limit = None
    """Tokens that the task may use over all its runs."""
    options: Options = Options()
    """Old fields only."""
    logging: Logging = Logging()
    """Old fields only."""
    max_failure_rate: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share of failed rows above which a file's output is rejected."""

    @field_validator("task_type")
    @classmethod
    def _known_type(cls, name: str) -> str:
        if name == TASK_TYPE:
            return name
        fix = did_you_mean(name, (TASK_TYPE, *_LATER_TASK_TYPES))
        raise mistake("unknown task type", expected=TASK_TYPE, fix=fix)

    @property
    def max_files(self) -> int | None:
        """The file cap in force: debug's, else preprocess's, else none."""
        if self.debug.enabled and self.debug.max_files is not None:
            return self.debug.max_files
        return self.preprocess.num_files if self.preprocess.enabled else None

    @property
    def max_items_per_file(self) -> int | None:
        """The row cap in force."""
        return self.debug.max_items_per_file if self.debug.enabled else None


def parse_task(data: dict[str, Any], file: str) -> tuple[ScoringTask | None, list[Problem]]:
    """The task, and every problem of its file; no task if one of them is an error."""
    kind = data.get("task_type", TASK_TYPE)
    if kind in _LATER_TASK_TYPES:
        wrong = f"{kind} is not in this version, which runs {TASK_TYPE}"
        return None, [Problem(file, "task_type", wrong)]
    known, problems, is_old = take_out(data, TASK_FIELDS, file)
    task, mistakes = validate(ScoringTask, known, file)
    problems += [*mistakes, *_rater_problems(known, file)]
    if is_old:
        refused = {problem.field for problem in problems}
        problems += (p for p in _moved_paths(known, file) if p.field not in refused)
    if task is not None:
        problems += later_script(task.preprocess, file)
    return (None if errors_in(problems) else task), problems


def _rater_problems(data: dict[str, Any], file: str) -> Iterator[Problem]:
    """A task rates with a model and a prompt, or with a scorer."""
    has_scorer = data.get("scorer") is not None
    for name in ("model", "prompt"):
        given = data.get(name) is not None
        if not given and not has_scorer:
            fix = "add it, or a scorer that needs no model"
            yield Problem(file, name, "missing", f"{name}.config_path", fix=fix)
        if given and has_scorer:
            fix = f"remove {name} or scorer"
            yield Problem(file, name, "not used: the task has a scorer", fix=fix)


def _moved_paths(data: dict[str, Any], file: str) -> list[Problem]:
    """Relative paths that mean another place than they did in the old system."""
    problems: list[Problem] = []
    for block, name in (
        ("data", "input_folder"),
        ("data", "output_folder"),
        ("preprocess", "input_folder"),
        ("preprocess", "output_folder"),
    ):
        fields: Any = data.get(block)
        text = cast("dict[str, Any]", fields).get(name) if isinstance(fields, dict) else None
        if isinstance(text, str) and was_in_object_store(text):
            place = text.replace("{task_name}", str(data.get("task_name")))
            problems.append(
                Problem(
                    file,
                    f"{block}.{name}",
                    f"now means {place} below the project root; the old system read this"
                    " relative path from its object store",
                    fix=f"write ./{text} if the folder is meant, else the full s3:// path",
                    severity="warning",
                )
            )
    return problems
