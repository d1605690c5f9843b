"""What a source is: conversations by their index, and how an answer to one is judged."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from copy import copy
from functools import cached_property
from typing import Any, ClassVar, Literal, Self, cast, overload

from modelcall_assets.errors import InputError
from modelcall_assets.records.outcome import Row
from modelcall_assets.sources.data import DatasetSplit, Origin, Rows, place_of, shuffled
from modelcall_assets.storage.listing import FileInfo
from modelcall_assets.storage.places import Place

Conversation = dict[str, Any]
"""`messages`, turns with role and content, and what graders need beside them. The content of an
assistant's turn may be a list of parts {type: text|python|python_output, text}."""


class Source(ABC):
    """A sequence of conversations: those of `start`, `start + step`, … before `stop`, as far as
    there are so many. Nothing is read before the first one is asked for."""

    paths: ClassVar[Collection[str]] = ()
    """Its arguments that are paths: a task's file writes them from the project root."""
    code: ClassVar[Collection[str]] = ()
    """Its arguments that are objects of the user's own, `module:name` in a task's file."""
    origins: Sequence[Origin] = ()
    """What its rows are read from."""
    is_service: ClassVar[bool] = False
    grader: str | None = None
    """In `grading.GRADERS`; None for what is only trained on."""
    baseline: float = 0.0
    """The share that a guess gets right."""
    eval_type: Literal["generative", "categorical"] | None = None

    def __init__(self, start: int = 0, stop: int | None = None, step: int = 1) -> None:
        given = {"start": (start, 0), "stop": (stop, start), "step": (step, 1)}
        for name, (value, least) in given.items():
            if type(value) is not int and (name, value) != ("stop", None):
                raise ValueError(f"{name}: expected a whole number; have {value!r}")
            if value is not None and value < least:
                raise ValueError(f"{name}: expected {least} or more; have {value}")
        self._slice = slice(start, stop, step)

    @property
    def name(self) -> str:
        """Tells these conversations from those of other sources, whatever the slice."""
        return type(self).__name__

    @abstractmethod
    def num_examples(self) -> int:
        """How many there are in all."""

    @abstractmethod
    def get_example(self, index: int) -> Conversation:
        """One of all, from 0. InputError names the row that makes none."""

    @cached_property
    def indices(self) -> range:
        """Of the conversations here among all."""
        return range(self.num_examples())[self._slice]

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, index: int, /) -> Conversation: ...
    @overload
    def __getitem__(self, index: slice, /) -> Self: ...
    def __getitem__(self, index: int | slice, /) -> Conversation | Self:
        """IndexError past either end; negative ones count from the end."""
        if not isinstance(index, slice):
            return self.get_example(self._among_all(index))
        indices = self.indices[index]
        part = copy(self)  # with what has been read by now
        part.indices = indices
        return part

    def __iter__(self) -> Iterator[Conversation]:
        return map(self.get_example, self.indices)

    def leaves(self) -> Iterator[Source]:
        """Those that several are made of; itself where it is one."""
        yield self

    def member(self, index: int) -> tuple[Source, int]:
        """The source that a conversation is of, and its index there."""
        return self, index

    def id_of(self, index: int) -> str:
        """`<name>/<index among all>`, which stays when the slice changes."""
        return f"{self.name}/{self._among_all(index)}"

    def evaluate(self, conversation: Conversation, completion: str) -> bool | float:
        """What its grader finds: whether the completion is right, for most."""
        if self.grader is None:
            raise NotImplementedError(f"{self.name} is to train on, and has no grader")
        found = self._grader.score({**conversation, "response": completion})
        return found[next(iter(self._grader.fields))]

    def files(self) -> list[FileInfo]:
        """Of its origins; InputError says how to get what is not here."""
        return [file for origin in self.origins for file in origin.files()]

    def version(self) -> str:
        """Of what its conversations are made of beside files."""
        return ""

    def fetch(self) -> list[FileInfo]:
        """As `files`, after what is not here was brought."""
        for origin in self.origins:
            origin.fetch()
        return self.files()

    @cached_property
    def _grader(self) -> Any:
        from modelcall_assets.grading import GRADERS

        return GRADERS[cast("str", self.grader)]()

    def _one_of(self, what: str, value: str | None, known: Collection[str | None]) -> None:
        if value not in known:
            there = ", ".join(map(str, known))
            raise ValueError(f"{type(self).__name__}: no {what} {value!r}; there are: {there}")

    def _among_all(self, index: int) -> int:
        try:
            return self.indices[operator.index(index)]
        except IndexError:
            raise IndexError(f"{self.name}: no row {index}, there are {len(self)}") from None


class HubSource(Source):
    """A split of a data set of the Hub, in the order of nanochat: shuffled with the seed 42.
    `folder` holds copies of data sets as `<org>/<name>/…`."""

    hub: str
    """The data set."""
    subsets: ClassVar[Mapping[str | None, Collection[str]]] = {}
    """The splits of each, None where there is only one, without a name; empty where any may be."""
    paths = ("folder",)
    columns: ClassVar[Mapping[str, type]]
    """What `conversation` needs of a row."""

    def __init__(
        self, subset: str | None, split: str, folder: str | Place | None = None, **slicing: Any
    ) -> None:
        super().__init__(**slicing)
        if self.subsets:
            self._one_of("subset", subset, self.subsets)
            self._one_of("split", split, self.subsets[subset])
        place = None if folder is None else place_of(folder)
        self.data = DatasetSplit(self.hub, subset, split, place)
        self.origins = (self.data,)

    @property
    def name(self) -> str:
        return "/".join(filter(None, (super().name, self.data.subset, self.data.split)))

    @abstractmethod
    def conversation(self, row: Row) -> Conversation:
        """ValueError says what is wrong with the row."""

    def row(self, row: Row) -> Row:
        """Where the columns are, in a row of the file."""
        return row

    def num_examples(self) -> int:
        return len(self._rows)

    def get_example(self, index: int) -> Conversation:
        row, where = self._rows.row(int(self._order[index]))
        try:
            row = self.row(row)
            for name, kind in self.columns.items():
                if not isinstance(value := row.get(name), kind):
                    have = type(value).__name__ if name in row else ", ".join(row)
                    raise ValueError(f"{name}: expected {kind.__name__}; have {have}")
            return self.conversation(row)
        except ValueError as error:
            raise InputError(f"{where}: {error}") from error

    @cached_property
    def _rows(self) -> Rows:
        return Rows(self.data.ready())

    @cached_property
    def _order(self) -> Sequence[int]:
        return shuffled(len(self._rows))


def dialogue(question: str, answer: str | list[dict[str, str]], **extras: Any) -> Conversation:
    """A conversation of one question and its answer."""
    turns = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    return {"messages": [*turns], **extras}


def render_mc(question: str, letters: Sequence[str], choices: Sequence[str]) -> str:
    """Each letter stands right behind its choice and `=`: so it is the token that is asked for."""
    pairs = zip(choices, letters, strict=True)
    lines = [f"Multiple Choice question: {question}", *(f"- {text}={at}" for text, at in pairs)]
    return "\n".join([*lines, "", "Respond only with the letter of the correct answer."])


def check_turns(messages: Any) -> None:
    """ValueError when they are not the user's and the assistant's in turn, two at least."""
    if not isinstance(messages, list) or len(messages) < 2:
        have = f"{len(messages)} turns" if isinstance(messages, list) else type(messages).__name__
        raise ValueError(f"expected a list of two turns or more; have {have}")
    for number, turn in enumerate(messages, 1):
        role = "user" if number % 2 else "assistant"
        if not isinstance(turn, dict) or turn.get("role") != role:
            have = turn.get("role") if isinstance(turn, dict) else type(turn).__name__
            raise ValueError(f"turn {number}: expected the role {role}; have {have}")
        if not isinstance(turn.get("content"), str):
            raise ValueError(f"turn {number}: its content is no text")
