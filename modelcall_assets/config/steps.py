"""Steps of a task file: what each reads and writes; those that evaluate."""

from typing import Annotated, Any, ClassVar

from pydantic import Field

from modelcall_assets.config import OR_EMPTY, Block, OnBadLine, OnEmptyFile, Text, must
from modelcall_assets.config.places import Folder


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


SourceOptions = Annotated[
    dict[Text, Any],
    must(lambda of: isinstance(of.get("name"), str), "without a name", "`name: gsm8k`"),
]


class SourcesStep(Step):
    """Benchmarks and task sets as conversations, each with its reference answer."""

    stage, input_field, output_field = "chatml", "data_dir", "output_dir"

    tasks: Annotated[list[SourceOptions], Field(min_length=1)]
    """Each is a `name`, of those in [evaluation.md](evaluation.md) or a `module:name` of your own,
    and the options of that source, such as `subset`, `split` and `stop`."""
    data_dir: Folder = "data/benchmarks"
    """Folder with copies of the data sets, `<organisation>/<name>`; what is not there is fetched
    from the Hugging Face Hub."""
    output_dir: Folder
    """Folder of the conversations."""

    @property
    def on_bad_line(self) -> OnBadLine:
        return "fail"

    @property
    def on_empty_file(self) -> OnEmptyFile:
        return "fail"

    @property
    def encoding(self) -> str:
        return "utf-8"


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
