"""What a stage writes of a partition, and how it becomes what everybody sees."""

from __future__ import annotations

from contextlib import ExitStack
from functools import cached_property
from types import TracebackType
from typing import Self
from uuid import uuid4

from modelcall_assets.errors import PublishedMeanwhile
from modelcall_assets.steps.layout import Layout
from modelcall_assets.storage.claims import claimed
from modelcall_assets.storage.files import NewFile
from modelcall_assets.storage.manifest import Manifest, read_manifest, write_manifest
from modelcall_assets.storage.places import Place


class Draft:
    """The new output of a partition, from the beginning of a stage to its publication. Of several
    runs that work on one partition the first to end publishes. Use as a context manager: what is
    not published is gone at the end."""

    def __init__(self, layout: Layout, stage: str, key: str) -> None:
        self._layout, self._stage, self._key = layout, stage, key
        self._manifest = layout.manifest_path(stage, key)
        self._before = read_manifest(self._manifest)
        self._files: list[NewFile] = []
        self._open = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.__exit__(kind, error, trace)

    @cached_property
    def out(self) -> NewFile:
        """The output file, made when it is first asked for."""
        return self.beside(self._layout.output_path(self._stage, self._key))

    def beside(self, place: Place) -> NewFile:
        """One more file, published before those that were made before it."""
        self._files.append(self._open.enter_context(NewFile(place)))
        return self._files[-1]

    def publish(self, manifest: Manifest) -> None:
        """The files first, then the manifest, which says that they are complete.

        When another run has published the same content since this draft was begun, that stands.
        PublishedMeanwhile when the content differs.
        """
        claim = self._layout.claim_path(self._stage, self._key)
        with claimed(claim) as check_claim:
            now = read_manifest(self._manifest)
            if now is not None and _publication(now) != _publication(self._before):
                if now.data_version == manifest.data_version:
                    return
                raise PublishedMeanwhile(
                    f"{self._layout.spec.key}/{self._stage}: another run has published "
                    f"'{self._key}' since this one began, and its result stands; the replies of "
                    "both are kept: materialise it again to have all of them, nothing is paid twice"
                )
            check_claim()
            for file in reversed(self._files):
                file.commit()
            check_claim()
            own = {
                "output": str(self.out.place),
                "output_digest": self.out.digest,
                "published": uuid4().hex,
            }
            write_manifest(self._manifest, manifest.model_copy(update=own))


def _publication(manifest: Manifest | None) -> tuple[str | None, str] | None:
    return None if manifest is None else (manifest.published, manifest.data_version)
