"""What a preprocessor is: ours, and the user's, `script_type: my_pkg.rules:MyPreprocessor`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from modelcall_assets.records.outcome import Dropped, Row

Kind = Literal["string", "int", "float", "bool"]
"""What a column holds."""

FileList = Sequence[str] | Mapping[str, Sequence[str]]


class Preprocessor(Protocol):
    """Makes one row of one item; `id` and the truncated column are added to it afterwards.

    An item is a row of a data file, or for any other file its `path`, `uri` and `text`. None and
    Dropped leave it out and are counted, by rule; whatever is raised fails that row only.
    """

    def process_item(self, item: Row) -> Row | Dropped | None: ...


@runtime_checkable
class Grouping(Protocol):
    """Optional: which files make a partition. Without it each data file is one."""

    def get_file_list(self, paths: Sequence[str]) -> FileList:
        """Of all files below the input folder, as sorted relative paths: those to take, each a
        partition, or the names of partitions with the files of each, in reading order."""
        ...


@runtime_checkable
class Declared(Protocol):
    """Optional: what its rows hold. Without it the types are found out from the rows, which takes
    longer. `own_columns`, where there are any, are made of nothing: columns of the input that are
    called so are kept under other names."""

    def columns(self, names: Sequence[str]) -> Mapping[str, Copied | Kind]:
        """Where each column of the output comes from, in order; `names` are those of the input."""
        ...


@dataclass(frozen=True, slots=True)
class Copied:
    """An output column that holds the values of an input column unchanged."""

    source: str


def text_of(row: Row, names: Sequence[str]) -> str | None:
    """The first of these columns that is not null: "" when all are, None when the row has none of
    them. TypeError when it is not a string."""
    present = [row[name] for name in names if name in row]
    text = next((value for value in present if value is not None), "")
    if not isinstance(text, str):
        raise TypeError(f"the text is not a string but of type {type(text).__name__}")
    return text if present else None


def as_text(value: Any) -> str:
    """Bytes in hexadecimal, nothing for null."""
    if isinstance(value, bytes):
        return value.hex()
    return "" if value is None else str(value)
