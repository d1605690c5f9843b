"""The manifest of a published partition: written last, so its presence means complete."""

from __future__ import annotations

import errno
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from modelcall_assets.storage.files import read_bytes, write_bytes
from modelcall_assets.storage.places import Place, explained


class InputFingerprint(BaseModel):
    """The input that an output was made from."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    uri: str
    digest: str
    size: int
    version: str


class Manifest(BaseModel):
    """`rows == ok + failed`; rows that a filter dropped are counted apart."""

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)

    format: int = 1
    stage: str
    accepted: bool = True
    data_version: str
    rows: int
    ok: int
    failed: int
    dropped: int = 0
    failures: dict[str, int] = Field(default_factory=dict)
    """Failed rows by reason."""
    output: str | None = None
    output_digest: str | None = None
    output_version: str | None = None
    """What the file system or store said of the output when it was published."""
    beside: dict[str, str] = Field(default_factory=dict)
    """What else was published with it: place → digest."""
    published: str | None = None
    """Tells one publication from another."""
    input: InputFingerprint
    schema_: list[tuple[str, str]] = Field(default_factory=list, alias="schema")
    """Column name and type, for people; a schema to read with belongs in `detail`."""
    moved: dict[str, str] = Field(default_factory=dict)
    """Input columns that are called like ours → their names in the output."""
    detail: dict[str, Any] = Field(default_factory=dict)

    @property
    def why_rejected(self) -> str:
        if not self.rows:
            return f"all {self.dropped:,} rows were dropped"
        return f"{self.failed:,} of {self.rows:,} rows failed"


def read_manifest(place: Place) -> Manifest | None:
    """None when absent or damaged: either way the output is not known to be complete. InputError
    when it cannot be looked at."""
    try:
        return Manifest.model_validate_json(read_bytes(place))
    except (FileNotFoundError, ValidationError):
        return None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return None
        with explained(place):
            raise


def write_manifest(place: Place, manifest: Manifest) -> None:
    write_bytes(place, manifest.model_dump_json(by_alias=True, indent=2).encode())
