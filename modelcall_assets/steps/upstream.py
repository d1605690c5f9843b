"""What a stage reads of an earlier one, of its own task or of another."""

from __future__ import annotations

from typing import NamedTuple

from modelcall_assets.errors import InputChanged, InputError
from modelcall_assets.steps.layout import Layout
from modelcall_assets.steps.raw import MEMBERS
from modelcall_assets.storage.files import file_digest, stat_file
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
        """InputError when there is nothing, InputChanged when it is not as it was left."""
        manifest = self.made(key)
        if manifest is None:
            raise InputError(
                f"{self.layout.spec.key}/{self.stage}: '{key}' has no accepted output; "
                f"materialise {self.stage} of this partition first"
            )
        self.check(manifest)
        return manifest

    def check(self, manifest: Manifest) -> None:
        """InputChanged when the file of a partition has another version than it had, and another
        content too. Those that are several files are looked at when their rows have been read."""
        place, version = self.place(manifest), manifest.output_version
        if manifest.output is None:
            if MEMBERS in manifest.detail:
                return
            version = manifest.input.version
        if stat_file(place).version != version and file_digest(place) != digest_of(manifest):
            raise changed(place)

    def place(self, manifest: Manifest) -> Place:
        """Where the rows of a partition are."""
        return self.layout.place(manifest.output or manifest.input.uri)


def digest_of(manifest: Manifest) -> str:
    """Of the rows that a stage left, or `raw` found."""
    if manifest.output is None:
        return manifest.input.digest
    return manifest.output_digest or manifest.detail["digest"]


def changed(place: Place) -> InputChanged:
    """Of a file that is not as a stage left it, or `raw` found it."""
    return InputChanged(
        f"{place} changed since its upstream asset was materialised; materialise that again, then "
        "this (if the task made the file, delete it first): replies received so far are kept"
    )
