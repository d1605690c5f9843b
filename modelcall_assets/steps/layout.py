"""Where everything of a task lies. Output paths are the user's; the rest is under `.modelcall`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from modelcall_assets.config.spec import CHATML, MERGED, RESPONSES, TaskSpec
from modelcall_assets.errors import InputError
from modelcall_assets.records.keys import decode_key

JSONL_STAGES = (CHATML, MERGED, RESPONSES)
MOST_NAME_BYTES = 250
"""File systems take 255; ours have a suffix more."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The paths of one task; `key` is always a partition key."""

    spec: TaskSpec

    def input_uri(self, key: str) -> str:
        """Of a key in the input folder, or of the one input file."""
        folder = self.spec.input_folder.rstrip("/")
        return folder if self.spec.has_one_input else f"{folder}/{decode_key(key)}"

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

    def output_path(self, stage: str, key: str) -> Path:
        """`<folder of the stage>/<relative path, suffix replaced>`."""
        relative = PurePosixPath(decode_key(key))
        name = relative.stem + (".jsonl" if stage in JSONL_STAGES else ".parquet")
        return Path(self.spec.folder(stage)) / relative.with_name(name)

    def manifest_path(self, stage: str, key: str) -> Path:
        return self._state_folder / "manifests" / stage / f"{key}.json"

    def journal_folder(self, stage: str, key: str) -> Path:
        return self._state_folder / "journal" / stage / key

    @property
    def spent_path(self) -> Path:
        """What the task's runs have spent."""
        return self._state_folder / "spent.json"

    @property
    def shared_answers_path(self) -> Path:
        """Where the project's tasks find each other's answers."""
        return self.spec.root / ".modelcall" / "answers.sqlite"

    @property
    def _state_folder(self) -> Path:
        return Path(self.spec.journal_folder) / self.spec.key
