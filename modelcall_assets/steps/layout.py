"""Where everything of a task lies. Output paths are the user's; the rest is under `.modelcall`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

from modelcall_assets.config.spec import CHATML, MERGED, PREPROCESSED, RAW, RESPONSES, TaskSpec
from modelcall_assets.config.task import ScoringTask
from modelcall_assets.errors import InputError
from modelcall_assets.journal.journal import Journal
from modelcall_assets.journal.mirror import open_journal
from modelcall_assets.records.data_files import stem_of
from modelcall_assets.records.keys import decode_key
from modelcall_assets.storage.places import Place, Stores

JSONL_STAGES = (CHATML, MERGED, RESPONSES)
MOST_NAME_BYTES = 250
"""File systems take 255; ours have a suffix more."""


@dataclass(frozen=True)
class Layout:
    """The places of one task; `key` is always a partition key."""

    spec: TaskSpec

    @cached_property
    def _stores(self) -> Stores:
        return Stores(self.spec.store_options)

    def place(self, text: str) -> Place:
        """Of an absolute path or a URI, in the stores that the task may use."""
        return self._stores.place(text)

    def folder(self, stage: str) -> Place:
        """Where a stage leaves its files; of `raw`, where they come from."""
        return self.place(self.spec.input_folder if stage == RAW else self.spec.folder(stage))

    @property
    def own_folders(self) -> list[Place]:
        """All that is written to."""
        return [self._state_folder.parent, *map(self.folder, self.spec.stages[1:])]

    def input_place(self, key: str) -> Place:
        """Of a key in the input folder, or of the one input file."""
        folder = self.folder(RAW)
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

    def output_path(self, stage: str, key: str, *, rejected: bool = False) -> Place:
        """`<folder of the stage>/<relative path, suffix replaced>`; what is rejected lies aside."""
        relative = PurePosixPath(decode_key(key))
        name = stem_of(relative.name) + (".jsonl" if stage in JSONL_STAGES else ".parquet")
        folder = self.rejected_folder(stage) if rejected else self.folder(stage)
        return folder / relative.with_name(name)

    def stat_path(self, key: str, *, is_group: bool) -> Place | None:
        """Of what the old system left of a preprocessed file, where the task asks for it."""
        task = self.spec.task
        folder = task.preprocess.stat_folder if isinstance(task, ScoringTask) else None
        if folder is None:
            return None
        file = f"{decode_key(key)}_combined.json" if is_group else f"{decode_key(key)}.json"
        return self.place(self.spec.resolved(folder)) / "preprocess" / file

    def beside_paths(self, stage: str, key: str, *, rejected: bool = False) -> list[Place]:
        """Of all that a stage may publish with its output."""
        if stage == MERGED:
            return [invalid_file_of(self.output_path(stage, key, rejected=rejected))]
        kinds = (False, True) if stage == PREPROCESSED and not rejected else ()
        stats = (self.stat_path(key, is_group=is_group) for is_group in kinds)
        return [place for place in stats if place is not None]

    def manifest_path(self, stage: str, key: str, *, rejected: bool = False) -> Place:
        return self.manifest_folder(stage, rejected=rejected) / f"{key}.json"

    def manifest_folder(self, stage: str, *, rejected: bool = False) -> Place:
        name = "rejected_manifests" if rejected else "manifests"
        return self._state_folder / name / stage

    def standing_path(self, stage: str, key: str) -> Place:
        """Of what is known of the file at an output's place beside its manifest."""
        return self._state_folder / "standing" / stage / f"{key}.json"

    def rejected_folder(self, stage: str) -> Place:
        return self._state_folder / "rejected" / stage

    def set_aside_folder(self, stage: str) -> Place:
        return self._state_folder / "set_aside" / stage

    def set_aside_path(self, stage: str, name: str, digest: str) -> Place:
        """Where a file that was at a place of ours is kept, by its name and digest."""
        return self.set_aside_folder(stage) / digest[-12:] / name

    def claim_path(self, stage: str, key: str) -> Place:
        """Held while the partition is published; on a disk one lock serves the whole task."""
        if isinstance(self._state_folder, Path):
            return self._state_folder / "manifests" / ".claim"
        return self.claims_folder / stage / key

    @property
    def claims_folder(self) -> Place:
        return self._state_folder / "claims"

    def journal_folder(self, stage: str, key: str) -> Place:
        return self._state_folder / "journal" / stage / key

    def journal(
        self, stage: str, key: str, run_id: str, *, fresh: bool = False, samples: int = 1
    ) -> Journal:
        """Of a partition, open for a run."""
        return open_journal(
            self.journal_folder(stage, key),
            self.scratch,
            run_id,
            fresh=fresh,
            samples=samples,
            flush_s=self.spec.journal_flush_seconds,
        )

    def journal_at(self, folder: str) -> Journal:
        """Of any partition of the project, for reading."""
        return open_journal(self.place(folder), self.scratch, "reader", read_only=True)

    @property
    def spent_path(self) -> Path:
        """What the task's runs on this machine have spent."""
        return self._local_state / "spent.json"

    def in_hand_path(self, stage: str, key: str) -> Path:
        """Held by the run that asks a model for a partition."""
        return self._local_state / "in_hand" / stage / f"{key}.lock"

    @property
    def settled_path(self) -> Path:
        """What the task's sensor knows of its inputs."""
        return self.scratch / self.spec.key / "settled.json"

    @property
    def duplicates_path(self) -> Path:
        """Which texts the task's files have, as far as they were preprocessed on this machine."""
        return self.scratch / self.spec.key / "duplicates.sqlite"

    @property
    def scratch(self) -> Path:
        """For what is on this machine only."""
        return self.spec.root / ".modelcall"

    @property
    def shared_answers_path(self) -> Path:
        """Where the project's tasks find each other's answers."""
        return self.scratch / "answers.sqlite"

    @property
    def _local_state(self) -> Path:
        """What the runs on this machine know together."""
        state = self._state_folder
        return state if isinstance(state, Path) else self.scratch / self.spec.key

    @property
    def _state_folder(self) -> Place:
        return self.place(self.spec.journal_folder) / self.spec.key


def invalid_file_of(output: Place) -> Place:
    """Of the lines that a merged file cannot hold; no listing of data files takes it for one."""
    return output.with_name(f"{output.name}.invalid")
