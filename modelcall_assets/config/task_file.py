"""What every task file has, whatever it does."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator
from pydantic.fields import FieldInfo

from modelcall_assets.config.block import Block, Count, Limit, Text, Texts, mistake
from modelcall_assets.config.paths import Folder


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


class Reuse(Block):
    """Which earlier answers may stand for a request."""

    scope: Literal["file", "project", "off"] = "file"
    """`file`: those of the same file; `project`: also of other files and tasks that say `project`,
    of what they ask at this time too; `off`: a published file is asked anew when it is materialised
    again."""
    identical_once: bool = False
    """Ask identical requests of a run's files once; the others get the same answer."""

    @field_validator("scope", mode="before")
    @classmethod
    def _as_yaml_reads_it(cls, scope: object) -> object:
        """YAML takes a bare `off` for false."""
        return "off" if scope is False else scope


class Options(Block):
    """Old fields only."""


class Logging(Block):
    """Old fields only."""


def _owner(owner: str) -> str:
    name, at, domain = owner.partition("@")
    if (name and at and "." in domain) or (owner.startswith("team:") and len(owner) > 5):
        return owner
    raise mistake("not an owner", expected="an e-mail address or team:<name>")


class TaskFile(Block):
    """The fields that all kinds of tasks share."""

    task_name: Text
    """Name of the task, unique in the project; `{task_name}` in paths."""
    description: str = ""
    """Shown in the UI."""
    owners: list[Annotated[str, AfterValidator(_owner)]] = Field(default_factory=list[str])
    """Dagster owners: e-mail addresses or `team:<name>`."""
    sensor: Sensor = Sensor()
    """Launches runs for new and changed input files."""
    environment: EnvFiles = EnvFiles()
    """Variables of this task only."""
    data_root: Folder | None = None
    """Where the task's relative data folders lie; default that of configs/storage.yaml, else the
    project root."""
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

    @property
    def max_items_per_file(self) -> int | None:
        """The row cap in force."""
        return self.debug.max_items_per_file if self.debug.enabled else None


_FIRST = ("task_name", "task_type", "description", "owners")


def in_file_order(block: type[Block]) -> dict[str, FieldInfo]:
    """The fields as files and pages have them: of a task what it is, what it does, and then how."""
    fields = block.model_fields
    shared = TaskFile.model_fields if issubclass(block, TaskFile) else {}
    own = [name for name in fields if name not in shared and name not in _FIRST]
    first = [name for name in _FIRST if name in fields] if shared else []
    return {name: fields[name] for name in dict.fromkeys((*first, *own, *fields))}
