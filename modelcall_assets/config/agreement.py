"""Who else rated a task's rows: judges and people."""

from typing import Literal

from pydantic import Field

from modelcall_assets.config import Block, Text


class Labels(Block):
    """Labels of people."""

    path: Text | None = None
    """CSV, JSON lines or Parquet with `id` and the labels, relative to the project root."""
    column: Text = "label"
    """The column of the labels."""


class Agreement(Block):
    """Who else rated the task's rows; its summary tells how far they agree."""

    judges: list[Text] = Field(default_factory=list[str])
    """Task files whose scores are of the same rows, relative to the project root."""
    columns: list[Text] = Field(default_factory=list[str])
    """More columns of the task's own scores files, such as labels that came with the input."""
    labels: Labels = Labels()
    figure: Text | None = None
    """What the task and the judges rate by; default the first rating of each."""
    scale: Literal["nominal", "ordinal", "interval"] | None = None
    """Of Krippendorff's α; default `interval` for numbers, else `nominal`."""

    @property
    def is_asked(self) -> bool:
        return bool(self.judges or self.columns or self.labels.path)
