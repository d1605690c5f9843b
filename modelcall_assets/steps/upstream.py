"""What a stage reads of an earlier one, of its own task or of another."""

from __future__ import annotations

from typing import NamedTuple

from modelcall_assets.errors import InputError
from modelcall_assets.steps.layout import Layout
from modelcall_assets.storage.manifest import Manifest, read_manifest
from modelcall_assets.storage.places import Place


class Upstream(NamedTuple):
    """A stage whose output another one reads."""

    layout: Layout
    stage: str

    def made(self, key: str) -> Manifest | None:
        """What is accepted of a partition."""
        manifest = read_manifest(self.layout.manifest_path(self.stage, key))
        return manifest if manifest is not None and manifest.accepted else None

    def need(self, key: str) -> Manifest:
        """InputError when there is nothing."""
        manifest = self.made(key)
        if manifest is None:
            raise InputError(
                f"{self.layout.spec.key}/{self.stage}: '{key}' has no accepted output; "
                f"materialise {self.stage} of this partition first"
            )
        return manifest

    def place(self, manifest: Manifest) -> Place:
        """Where the rows of a partition are."""
        return self.layout.place(manifest.output or manifest.input.uri)


def digest_of(manifest: Manifest) -> str:
    """Of the rows that a stage left, or `raw` found."""
    if manifest.output is None:
        return manifest.input.digest
    return manifest.output_digest or manifest.detail["digest"]
