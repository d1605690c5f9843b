"""A task as the list of its stages, and where all of it lies that is not of one stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil
from pathlib import Path
from typing import TypeVar

from modelcall_assets.config.catalog import load_task
from modelcall_assets.config.distillation import DistillationTask, EvaluationTask
from modelcall_assets.config.places import Storage, shown_place
from modelcall_assets.config.spec import TaskSpec, store_options, unwritable
from modelcall_assets.config.task import ScoringTask
from modelcall_assets.errors import InputError, Problem, SetupError
from modelcall_assets.journal import Journal
from modelcall_assets.journal.mirror import open_journal
from modelcall_assets.records import decode_key, encode_key
from modelcall_assets.stages import Stage
from modelcall_assets.stages.chatml import Chatml
from modelcall_assets.stages.graded import Graded
from modelcall_assets.stages.inputs import Inputs, LinkedInputs, data_files
from modelcall_assets.stages.merged import Merged
from modelcall_assets.stages.prepared import Fetched, Prepared
from modelcall_assets.stages.preprocessed import Preprocessed
from modelcall_assets.stages.raw import Raw, Split
from modelcall_assets.stages.responses import Responses
from modelcall_assets.stages.scores import ScorerScores, Scores
from modelcall_assets.stages.summary import Summary
from modelcall_assets.storage.listing import matches
from modelcall_assets.storage.places import Place, Stores

MOST_NAME_BYTES = 250
"""File systems take 255; ours have a suffix more."""


@dataclass(frozen=True)
class Layout:
    spec: TaskSpec

    @cached_property
    def _stores(self) -> Stores:
        return Stores(self.spec.store_options)

    @cached_property
    def old_answers(self) -> dict[Place, tuple[float, Mapping[str, Mapping[int, Place]]]]:
        """Of folders, and when they were listed: see `stages/publication.py`."""
        return {}

    def place(self, text: str) -> Place:
        """Of an absolute path or a URI, in the stores that the task may use."""
        return self._stores.place(text)

    def elsewhere(self, text: str, named_by: str) -> Place:
        """Also in a store that no place of the task is in. SetupError when its profile lacks
        something; `named_by` says what the place is."""
        spec = self.spec
        places, file = {named_by: text}, spec.file_name
        options, problems = store_options(Storage(spec.storage), spec.env, places, file)
        if problems:
            raise SetupError(problems)
        return Stores(options).place(text)

    @cached_property
    def input_folder(self) -> Place:
        """Or the one input file."""
        return self.place(self.spec.input_folder)

    def input_place(self, key: str) -> Place:
        """Of a key in the input folder, or of the one input file."""
        folder = self.input_folder
        return folder if self.spec.has_one_input else folder / decode_key(key)

    def check_name(self, key: str) -> None:
        """InputError when no file of ours can have the name of an input file."""
        wrong = ""
        if any(len(part.encode()) > MOST_NAME_BYTES for part in key.split("/")):
            wrong = f"the name is longer than {MOST_NAME_BYTES} bytes"
        try:
            decode_key(key).encode()
        except UnicodeEncodeError:
            wrong = "the name is not UTF-8"
        if wrong:
            raise InputError(f"{self.spec.input_folder}/{key}: {wrong}; rename the file")

    def open_journal(
        self, folder: Place, run_id: str, *, fresh: bool = False, samples: int = 1
    ) -> Journal:
        """Of a partition, for a run that writes to it."""
        return open_journal(
            folder,
            self.scratch,
            run_id,
            fresh=fresh,
            samples=samples,
            flush_s=self.spec.storage.journal_flush_seconds,
        )

    def read_journal(self, folder: str) -> Journal:
        """Of any partition of the project."""
        return open_journal(self.place(folder), self.scratch, "reader", read_only=True)

    @cached_property
    def state_folder(self) -> Place:
        """Manifests, journals and what lies aside."""
        return self.place(self.spec.journal_folder) / self.spec.key

    @property
    def claims(self) -> Place:
        """What is published now: a folder in a store, a file on a disk."""
        return self.state_folder / "claims"

    @property
    def in_hand_path(self) -> Path:
        """What the runs on this machine ask for now."""
        return self.local_state / "in_hand.locks"

    @property
    def scratch(self) -> Path:
        """For what is on this machine only."""
        return self.spec.root / ".modelcall"

    @property
    def shared_answers_path(self) -> Path:
        """Where the project's tasks find each other's answers."""
        return self.scratch / "answers.sqlite"

    @property
    def settled_path(self) -> Path:
        """What the task's sensor knows of its inputs."""
        return self.scratch / self.spec.key / "settled.json"

    @property
    def retry_path(self) -> Path:
        """What the retry that is under way was told."""
        return self.scratch / self.spec.key / "retry.json"

    @property
    def duplicates_path(self) -> Path:
        """Which texts the task's files have, as far as they were preprocessed on this machine."""
        return self.scratch / self.spec.key / "duplicates.sqlite"

    @property
    def spent_path(self) -> Path:
        """What the task's runs on this machine have spent."""
        return self.local_state / "spent.json"

    @property
    def local_state(self) -> Path:
        """What the runs on this machine know together."""
        state = self.state_folder
        return state if isinstance(state, Path) else self.scratch / self.spec.key


@dataclass(frozen=True, eq=False)
class Keys:
    """A set of partition keys that stages share."""

    name: str
    """Unique in the project."""
    task: Task
    """The one whose set that is."""
    now: Callable[[], list[str]]
    """The keys as the inputs are now."""
    every: Callable[[], set[str]]
    """Also those that the task's caps leave out."""
    of_groups: bool = False
    """Of merge groups; else of input files, or of what preprocessing puts together."""
    is_one: bool = False
    """One for all of the task: for a stage without partitions."""

    @property
    def what(self) -> str:
        """Of one."""
        return "merge group" if self.of_groups else "file"


OVERVIEWS: tuple[type[Stage], ...] = (Summary,)
ALL = "all"
"""The key of what has no partitions."""
S = TypeVar("S", bound=Stage)


@dataclass(frozen=True, eq=False)
class Task:
    """`stages` are upstream first. SetupError when one cannot be made, as that of a preprocessor
    that cannot be imported."""

    spec: TaskSpec

    @cached_property
    def layout(self) -> Layout:
        return Layout(self.spec)

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        task, keys = self.spec.task, self._file_keys
        if isinstance(task, ScoringTask):
            kinds: list[type[Stage]] = [Raw]
            kinds += [Preprocessed] if task.preprocess.enabled else []
            kinds += [Scores if task.scorer is None else ScorerScores] if task.rates else []
        else:
            if task.sources:
                kinds = [Fetched, Prepared]
            else:
                kinds = [] if self.linked else [Split if task.chatml_conversion else Raw]
                kinds += [Chatml] if task.chatml_conversion else []
            kinds += [Merged] if task.jsonl_merge else []
            kinds += [Responses] if task.generate_response else []
            kinds += [Scores] if task.scores else []
            kinds += [Graded] if isinstance(task, EvaluationTask) and task.grading else []
        stages: list[Stage] = []
        for kind in kinds:
            keys = self._group_keys if kind.gathers else keys
            stages.append(kind(self, stages[-1] if stages else self.linked, keys))
        return tuple(stages)

    @cached_property
    def overviews(self) -> tuple[Stage, ...]:
        """What is made of all partitions of the last stage together; it has none itself."""
        keys = Keys(f"{self.spec.key}/all", self, lambda: [ALL], lambda: {ALL}, is_one=True)
        return tuple(kind(self, self.stages[-1], keys) for kind in OVERVIEWS)

    def stage(self, name: str) -> Stage:
        return next(stage for stage in self.stages if stage.name == name)

    def find(self, kind: type[S]) -> S | None:
        """The stage of a kind, if the task has one."""
        return next((stage for stage in self.stages if isinstance(stage, kind)), None)

    def other(self, file: str) -> Task:
        """That of another file of the project. SetupError when it cannot be read."""
        return Task(load_task(self.spec.root / file, self.spec.root))

    def stages_by_keys(self) -> list[tuple[Keys, list[Stage]]]:
        """The stages that share a set of keys, set by set."""
        found: dict[str, tuple[Keys, list[Stage]]] = {}
        for stage in self.stages:
            found.setdefault(stage.keys.name, (stage.keys, []))[1].append(stage)
        return [*found.values()]

    def warning(self, wrong: str, *, field: str = "", have: str = "", fix: str = "") -> Problem:
        """Of the task's file, of its input unless another field is named."""
        place, file = field or self.spec.task.input_field, self.spec.file_name
        return Problem(file, place, wrong, have=have, fix=fix, severity="warning")

    @property
    def first_answering(self) -> Stage | None:
        """The first stage that answers or rates rows."""
        return next((stage for stage in self.stages if stage.answers), None)

    @cached_property
    def linked(self) -> Stage | None:
        """The stage of another task that the first one reads."""
        link = self.spec.link
        return None if link is None else Task(link.spec).stage(link.stage)

    @cached_property
    def inputs(self) -> Inputs:
        """What the first stage reads. SetupError when the user's preprocessor cannot be had."""
        if self.linked is not None:
            return LinkedInputs(self, self.linked)
        if isinstance(self.spec.task, DistillationTask):
            if (prepared := self.find(Prepared)) is not None:
                return prepared.inputs
            if (chatml := self.find(Chatml)) is not None:
                return chatml.splits
            return data_files(self, None if self.find(Merged) else ".jsonl")
        preprocessed = self.find(Preprocessed)
        return data_files(self) if preprocessed is None else preprocessed.inputs

    @property
    def absent_input(self) -> Problem | None:
        """That the task's own input on this machine, where it has one that nobody fetches, is not
        there. An empty folder that is watched is."""
        spec, place, wrong = self.spec, self.layout.input_folder, ""
        if self.linked is not None or self.find(Prepared) or not isinstance(place, Path):
            return None
        with suppress(PermissionError):  # then there is something
            if not (place.is_file() if spec.has_one_input else place.is_dir()):
                wrong = f"no such {'file' if spec.has_one_input else 'folder'} yet"
            elif place.is_dir() and not spec.task.sensor.enabled and not any(place.iterdir()):
                wrong = "an empty folder"
        absent = self.warning(f"{wrong}: {shown_place(str(place), spec.root)}")
        return replace(absent, unready=True) if wrong else None

    @property
    def row_limit(self) -> int | None:
        """Cap on the rows of each file, for debugging."""
        return self.spec.task.max_items_per_file

    @property
    def own_folders(self) -> list[Place]:
        """All that is written to."""
        own = (stage.folder for stage in self.stages if not isinstance(stage, Raw))
        return [self.layout.state_folder.parent, *own]

    @property
    def report_place(self) -> Place:
        """Of the page for people, unless they choose another."""
        return self.layout.place(f"{self.stages[-1].folder}_report.html")

    def check_ready(self) -> None:
        """SetupError when a folder cannot be written to, or a stage cannot run here."""
        if problems := [*unwritable(self.spec)]:
            raise SetupError(problems)
        for stage in self.stages:
            stage.check_ready()

    @cached_property
    def _file_keys(self) -> Keys:
        own = Keys(
            f"{self.spec.key}/files",
            self,
            lambda: self.inputs.keys(),
            lambda: self.inputs.all_keys(),
        )
        if self.linked is None:
            return own
        theirs = self.linked.keys
        return replace(own, name=theirs.name, task=theirs.task, of_groups=theirs.of_groups)

    @cached_property
    def _group_keys(self) -> Keys:
        keys = [encode_key(group.output_file) for group in self.spec.groups]
        name = f"{self.spec.key}/groups"
        return Keys(name, self, lambda: [*keys], lambda: {*keys}, of_groups=True)


def share_of(keys: Sequence[str], pattern: str | None, job: int, jobs: int) -> list[str]:
    """Of all files a job's, by the rule ceil(files / jobs) each, that match."""
    share = ceil(len(keys) / jobs)
    own = keys[job * share : (job + 1) * share]
    return [key for key in own if pattern is None or matches(decode_key(key), pattern)]
