"""Whether all that a task has published is as it was written: outputs, manifests and journals, what
a crash has left, and what belongs to inputs that are gone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from modelcall_assets.config.spec import RAW
from modelcall_assets.errors import InputError
from modelcall_assets.records.keys import decode_key
from modelcall_assets.steps.clean import (
    ASKING,
    left_over,
    present_keys,
    recorded_keys,
    stages_by_set,
)
from modelcall_assets.steps.published import AGAIN, Published, published_keys
from modelcall_assets.steps.task_steps import TaskSteps
from modelcall_assets.storage.files import exists
from modelcall_assets.storage.manifest import Manifest, read_manifest


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it should be, and what to do about it."""

    stage: str
    name: str
    wrong: str
    fix: str


@dataclass
class Verification:
    """Looks at one task; what was counted, by stage, is known when `findings` has ended."""

    steps: TaskSteps
    outputs: Counter[str] = field(default_factory=Counter[str])
    rows: Counter[str] = field(default_factory=Counter[str])
    journal_lines: Counter[str] = field(default_factory=Counter[str])

    def findings(self) -> Iterator[Finding]:
        """Reads every byte of the outputs and journals. InputError or StoreError when a disk or
        store does not answer."""
        for which, stages in stages_by_set(self.steps).items():
            present = present_keys(self.steps, which)
            for stage in stages:
                yield from self._outputs(stage, present)
                if stage in ASKING:
                    yield from self._journals(stage)
            for key in sorted(recorded_keys(self.steps.layout, stages) - present):
                what = "its input is gone or was renamed; what was made of it is kept"
                fix = "`modelcall clean --deleted-inputs` deletes it, if it is gone for good"
                yield Finding("", decode_key(key), what, fix)
        for garbage in left_over(self.steps):
            yield Finding("", garbage.name, garbage.why, "`modelcall clean` deletes it")

    def _outputs(self, stage: str, present: set[str]) -> Iterator[Finding]:
        layout, made = self.steps.layout, {*published_keys(self.steps.layout, stage)}
        for key in sorted(made):
            manifest = read_manifest(layout.manifest_path(stage, key))
            if manifest is None:
                what = f"its manifest is damaged: {layout.manifest_path(stage, key)}"
                fix = "delete the manifest and run the task again; the journal has the replies"
                yield Finding(stage, decode_key(key), what, fix)
                continue
            self.outputs[stage] += 1
            self.rows[stage] += manifest.rows
            if stage != RAW:
                yield from self._output(key, manifest)
        for key in sorted(present - made) if stage != RAW else ():
            place = layout.output_path(stage, key)
            if exists(place):
                what = f"no manifest describes {place}: a kill came before it, or it is not ours"
                fix = "move it elsewhere if you want to keep it, and run the task again"
                yield Finding(stage, decode_key(key), what, fix)

    def _output(self, key: str, manifest: Manifest) -> Iterator[Finding]:
        file = Published(key, manifest, self.steps.layout.place)
        if not exists(file.place):
            what, fix = f"{file.place} is gone", "run the task again: its rows cost nothing"
            yield Finding(manifest.stage, file.name, what, fix)
            return
        try:
            file.check()
        except InputError as error:
            yield Finding(manifest.stage, file.name, str(error).removesuffix(f"; {AGAIN}"), AGAIN)

    def _journals(self, stage: str) -> Iterator[Finding]:
        layout = self.steps.layout
        for key in sorted(recorded_keys(layout, [stage])):
            name = decode_key(key)
            try:
                with layout.journal_at(str(layout.journal_folder(stage, key))) as journal:
                    lines, damaged = journal.verify()
            except InputError as error:
                yield Finding(stage, name, str(error), "see there")
                continue
            self.journal_lines[stage] += lines
            for segment, count in damaged.items():
                yield Finding(
                    stage,
                    name,
                    f"{count:,} damaged lines in its journal: {layout.journal_folder(stage, key)}/"
                    f"{segment}",
                    "bring the segment back from a copy; else they count as if they had never come:"
                    " replies that are needed are asked for again, and the next publication of the "
                    "file leaves the damaged ones out",
                )
