"""Tasks as AgentScope Tuner and AgentJet read them: a query, or first messages, to be answered.
From lines of JSON, from a data set, or from code of the user's own."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from modelcall_assets.errors import InputError
from modelcall_assets.records.outcome import Failure, Row
from modelcall_assets.sources.base import Conversation, Source
from modelcall_assets.sources.data import (
    DatasetSplit,
    FolderSplit,
    OneFile,
    Rows,
    package,
    place_of,
    shuffled,
)
from modelcall_assets.storage.formats import Reading
from modelcall_assets.storage.places import Place
from modelcall_assets.storage.rows import record_id
from modelcall_assets.transforms.chatml import ChatmlOptions, to_chatml

NO_ENVIRONMENT = "no_env"
DUMMIES = 1000
_LENIENT = Reading(on_bad_line="keep")
_MESSAGES = ChatmlOptions("messages", {"messages": "init_messages"}, keep_raw_data=False)


@dataclass(frozen=True)
class Task:
    """`init_messages` are sent, else the `main_query` as the user's. `metadata` is for those who
    judge the answer."""

    main_query: str = ""
    init_messages: Sequence[Mapping[str, Any]] = ()
    task_id: str = ""
    env_type: str = NO_ENVIRONMENT
    metadata: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @classmethod
    def of(cls, row: Row) -> Task:
        """Numbers are read as texts, and null as what is missing; missing `metadata` is the whole
        row. ValueError names the field that is wrong."""
        given = {name: row[name] for name in _FIELDS if row.get(name) is not None}
        for name in _TEXTS & given.keys():
            value = given[name]
            if isinstance(value, bool) or not isinstance(value, str | int | float):
                raise ValueError(f"{name}: expected a text; have {type(value).__name__}")
            given[name] = str(value)
        if not isinstance(given.setdefault("metadata", row), Mapping):
            have = type(given["metadata"]).__name__
            raise ValueError(f"metadata: expected an object; have {have}")
        return cls(**given)

    def conversation(self) -> Conversation:
        """ValueError says which message is wrong, or that there is nothing to send."""
        messages: Any = [{"role": "user", "content": self.main_query}] if self.main_query else None
        if self.init_messages:
            found = to_chatml({"init_messages": self.init_messages}, _MESSAGES)
            if isinstance(found, Failure):
                raise ValueError(found.detail)
            messages = found["messages"] if isinstance(found, dict) else None
        if not messages:
            raise ValueError("neither main_query nor init_messages: there is nothing to send")
        return {"messages": messages, **vars(self)}


_FIELDS = tuple(Task.__dataclass_fields__)
_TEXTS = {"main_query", "task_id", "env_type"}


class Tasks(Source):
    """Tasks by their index. `shuffle` is the seed of another order than that of their files."""

    def __init__(self, shuffle: int | None = None, **slicing: Any) -> None:
        super().__init__(**slicing)
        self._seed = shuffle

    @abstractmethod
    def task(self, index: int) -> tuple[Task, str]:
        """One of all, in the order of the files, and its place for people. ValueError or InputError
        when it is none."""

    def get_example(self, index: int) -> Conversation:
        at = index if self._seed is None else int(self._order[index])
        task, where = self.task(at)
        try:
            conversation = task.conversation()
        except ValueError as error:
            raise InputError(f"{where}: {error}") from error
        own = task.task_id or record_id(vars(task), at, self.name)
        return {"id": own, **conversation}

    @cached_property
    def _order(self) -> Sequence[int]:
        assert self._seed is not None
        return shuffled(self.num_examples(), self._seed)


class _Files(Tasks):
    """Each row of some files is one."""

    def num_examples(self) -> int:
        return len(self._rows)

    def task(self, index: int) -> tuple[Task, str]:
        row, where = self._rows.row(index)
        try:
            return self.of_row(row, index), where
        except ValueError as error:
            raise InputError(f"{where}: {error}") from error

    def of_row(self, row: Row, index: int) -> Task:
        return Task.of(row)

    @cached_property
    def _rows(self) -> Rows:
        """InputError when there are none."""
        (origin,) = self.origins
        rows = Rows(files := origin.ready(), _LENIENT)
        if not len(rows):
            raise InputError(f"{files[0].place}: there is no task in it")
        return rows


class TaskFile(_Files):
    """JSON lines, or a Parquet or Arrow file, with the columns of a `Task`."""

    paths = ("filepath",)

    def __init__(self, filepath: str | Place, **options: Any) -> None:
        super().__init__(**options)
        self.origins = (OneFile(filepath, "expected a task in each line"),)


class TaskDataset(_Files):
    """A split of a data set, `<org>/<name>` or a folder (`./data/mine`), whose column `query` is
    what is asked. The whole row is the metadata."""

    paths = ("folder",)

    def __init__(
        self,
        path: str,
        subset: str | None = None,
        split: str = "train",
        query: str = "question",
        folder: str | Place | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        place = None if folder is None else place_of(folder)
        if path.startswith((".", "/")) or "://" in path:
            self.origins = (FolderSplit(place_of(path), subset, split),)
        else:
            self.origins = (DatasetSplit(path, subset, split, place),)
        self._query = query

    def of_row(self, row: Row, index: int) -> Task:
        if not isinstance(row.get(self._query), str):
            raise ValueError(f"no text in the column {self._query}; there are {', '.join(row)}")
        return Task(row[self._query], task_id=str(index), metadata=row)


class Dummies(Tasks):
    """The numbers from 0 to 999 in the order of `numpy.random.seed(42)`. `loader` is called with
    each and makes the task of it: a mapping with the fields of a `Task`, or its query."""

    code = ("loader",)

    def __init__(self, loader: Callable[[int], Any] | None = None, **options: Any) -> None:
        super().__init__(**options)
        self._loader = loader

    def num_examples(self) -> int:
        return DUMMIES

    def task(self, index: int) -> tuple[Task, str]:
        number = int(self._numbers[index])
        made: Any = f"[dummy task @ {number}]" if self._loader is None else self._loader(number)
        where = f"{self.name}, task {number}"
        row = {"main_query": made} if isinstance(made, str) else made
        if not isinstance(row, Mapping):
            have = type(row).__name__
            raise InputError(f"{where}: the loader gave {have}; expected a text or a mapping")
        plain = {"task_id": str(number), "metadata": {"random_number": number}}
        return Task.of({**plain, **row}), where

    @cached_property
    def _numbers(self) -> Sequence[int]:
        return package("numpy").random.RandomState(42).permutation(DUMMIES)
