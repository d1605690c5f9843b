"""Where all of a task lies that is not of one stage."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from modelcall_assets.config.spec import TaskSpec
from modelcall_assets.errors import InputError
from modelcall_assets.journal.journal import Journal
from modelcall_assets.journal.mirror import open_journal
from modelcall_assets.records.data_files import decode_key
from modelcall_assets.storage.places import Place, Stores

MOST_NAME_BYTES = 250
"""File systems take 255; ours have a suffix more."""


@dataclass(frozen=True)
class Layout:
    spec: TaskSpec

    @cached_property
    def _stores(self) -> Stores:
        return Stores(self.spec.store_options)

    def place(self, text: str) -> Place:
        """Of an absolute path or a URI, in the stores that the task may use."""
        return self._stores.place(text)

    @property
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
            flush_s=self.spec.journal_flush_seconds,
        )

    def read_journal(self, folder: str) -> Journal:
        """Of any partition of the project."""
        return open_journal(self.place(folder), self.scratch, "reader", read_only=True)

    @cached_property
    def state_folder(self) -> Place:
        """Manifests, journals and what lies aside."""
        return self.place(self.spec.journal_folder) / self.spec.key

    @property
    def claims_folder(self) -> Place:
        return self.state_folder / "claims"

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
