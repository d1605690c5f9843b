"""Steps of a task that distils or evaluates: what each reads and writes."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from modelcall_assets.config import (
    OR_EMPTY,
    Block,
    Count,
    Encoding,
    OnBadLine,
    OnEmptyFile,
    Text,
    must,
)
from modelcall_assets.config.places import Folder
from modelcall_assets.config.task import ConfigPath


class Step(Block):
    """Something that a task does: its stage, and the fields that name what it reads and writes."""

    stage: ClassVar[str]
    input_field: ClassVar[str]
    output_field: ClassVar[str]

    @property
    def input(self) -> str | None:
        return getattr(self, self.input_field) if self.input_field else None

    @property
    def output(self) -> str:
        return getattr(self, self.output_field)


class ChatmlStep(Step):
    """Data sets as conversations: `{"messages": […], "format": "chatml"}` lines."""

    stage, input_field, output_field = "chatml", "input_dir", "output_dir"

    dataset_config_path: Text
    """YAML of the data sets: their configurations, format style and columns."""
    input_dir: Folder
    """Folder that holds a folder, or a file, per data set."""
    output_dir: Folder
    """Folder of the conversations."""
    selected_datasets: list[Text] = Field(default_factory=list[str])
    """Only these; empty means all."""
    keep_raw_data: bool = True
    """Keep the original row beside the messages, as `raw_data`."""
    add_system_prompt: bool = False
    """Begin conversations that have no system message with `system_prompt`."""
    system_prompt: Text = "You are a helpful assistant and an expert coder."
    """What they begin with."""
    other_roles: Literal["keep", "drop"] = "keep"
    """What becomes of turns that are neither the user's nor the assistant's."""
    validation: Literal["lenient", "strict"] = "lenient"
    """`strict` also wants alternating turns, the last one the assistant's."""
    on_bad_line: OnBadLine = "keep"
    on_empty_file: ClassVar[OnEmptyFile] = "accept"
    """A split may have no rows."""
    encoding: Encoding = "utf-8"


class MergeStep(Step):
    """Files of conversations, merged by group."""

    stage, input_field, output_field = "merged", "base_input_dir", "base_output_dir"

    merge_config_path: Text
    """YAML of the merge groups."""
    base_input_dir: Folder | None = None
    """Folder of the members; default the conversations of this file."""
    base_output_dir: Folder
    """Folder of the merged files."""
    merge_groups: list[Text] = Field(default_factory=list[str])
    """Only these groups; empty means all."""
    on_bad_line: Literal["keep", "fail"] = "keep"
    """A line that is no JSON object: `keep` puts it into the file of rejected rows, `fail` stops
    the file, naming the line."""
    on_empty_file: OnEmptyFile = "fail"
    encoding: Encoding = "utf-8"


class ResponsesStep(Step):
    """A model's answers to conversations."""

    stage, input_field, output_field = "responses", "input_path", "output_path"

    response_config_path: Text
    """The model file."""
    input_path: Folder | None = None
    """File or folder of conversations; default what the step before leaves."""
    output_path: Folder
    """Folder of the answers."""
    concurrency: Count = 20
    """Requests in flight in one run."""
    prompt_mode: Literal["full", "first_message"] = "full"
    """`full` sends the conversation without a last assistant turn; `first_message` sends what the
    old system sent: the first message alone, as the user's."""
    samples: Annotated[int, Field(ge=1, le=1000)] = 1
    """Answers to each conversation, a row each."""
    logprobs: Annotated[int, Field(ge=1, le=20)] | None = None
    """Ask for the log-probabilities of so many of the tokens that an answer is likeliest to begin
    with, and keep them in a column of that name; not every endpoint gives them."""
    merge_reasoning: bool = True
    """Put the model's reasoning before its answer, in `<think>` tags."""
    resume_mode: bool | None = None
    """`true` adopts answers of the old system that lie at the output's place, instead of refusing
    to replace them."""
    retry_mode: bool | None = None
    """The same."""
    on_bad_line: OnBadLine = "keep"
    on_empty_file: OnEmptyFile = "fail"
    encoding: Encoding = "utf-8"


class JudgeStep(Step):
    """A model's ratings of the answers."""

    stage, input_field, output_field = "scores", "", "output_dir"

    model: ConfigPath
    """The model file."""
    prompt: ConfigPath
    """The prompt file."""
    output_dir: Folder
    """Folder of the ratings."""
    input_key: Text = "response"
    """Column that is rated."""
    prompt_format_key: Text = Field(default_factory=lambda block: block["input_key"])
    """Placeholder of the prompt that receives it; default `input_key`."""
    expected: bool = False
    """Rate also by `expected_score`: the mean of all scores, each as likely as the model was to
    write it. Where the endpoint gives no log-probabilities the rows fail."""


SourceOptions = Annotated[
    dict[Text, Any],
    must(lambda of: isinstance(of.get("name"), str), "without a name", "`name: gsm8k`"),
]


class SourcesStep(Step):
    """Benchmarks and task sets as conversations."""

    stage, input_field, output_field = "chatml", "data_dir", "output_dir"
    on_bad_line: ClassVar[OnBadLine] = "fail"
    on_empty_file: ClassVar[OnEmptyFile] = "fail"
    encoding: ClassVar[str] = "utf-8"

    tasks: list[SourceOptions] = Field(default_factory=list[dict[str, Any]])
    """Each is a `name`, of those in [evaluation.md](evaluation.md) and [readers.md](readers.md) or
    a `module:name` of your own, and the options of that source, such as `subset`, `split` and
    `stop`."""
    task_reader: Text | dict[Text, Any] | None = None
    """In place of `tasks`: a YAML of AgentScope Tuner or AgentJet, or its block of that name."""
    data_dir: Folder = "data/benchmarks"
    """Folder with copies of the data sets, `<organisation>/<name>`; what is not there is fetched
    from the Hugging Face Hub."""
    output_dir: Folder
    """Folder of the conversations."""


class GradingStep(Step):
    """Answers compared with their references, without a model."""

    stage, input_field, output_field = "scores", "", "output_dir"

    grader: Text | None = None
    """One of those in [evaluation.md](evaluation.md), or `module:name` of your own; default that
    of each row's source."""
    options: Annotated[dict[Text, Any], OR_EMPTY] = Field(default_factory=dict[str, Any])
    """Of the grader."""
    output_dir: Folder
    """Folder of the grades."""
