"""How a task's stages ask a model: over their journal, within the budget, to a publication."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import Any
from weakref import finalize

from modelcall_assets.errors import InHand, InputError, StoreError
from modelcall_assets.journal.asking import Asking
from modelcall_assets.journal.journal import Journal
from modelcall_assets.journal.shared import SharedReplies
from modelcall_assets.llm.engine import Engine
from modelcall_assets.records.keys import decode_key
from modelcall_assets.steps.adopt import Adoption, adopt
from modelcall_assets.steps.budget import Budget
from modelcall_assets.steps.draft import Draft
from modelcall_assets.steps.layout import Layout
from modelcall_assets.steps.progress import Tally
from modelcall_assets.steps.replay import Standing, standing_in
from modelcall_assets.steps.responses import ResponseStage
from modelcall_assets.steps.reuse import Reuse
from modelcall_assets.steps.score_report import Prices, ScoreReport
from modelcall_assets.steps.scores import ScoreStage, Scoring
from modelcall_assets.steps.source import Source
from modelcall_assets.steps.standing import old_files
from modelcall_assets.storage.claims import Hold
from modelcall_assets.storage.files import file_digest
from modelcall_assets.storage.manifest import Manifest, read_manifest
from modelcall_assets.storage.schema import readable_schema
from modelcall_assets.storage.trouble import explained, is_absent


@dataclass(frozen=True)
class Answering:
    """Of one task, whose budget all its stages and files share."""

    layout: Layout
    _budgets: dict[Prices, Budget] = field(default_factory=dict)
    _asking: dict[Path, Asking] = field(default_factory=dict)
    _of_runs: dict[str, Path] = field(default_factory=dict)

    async def answer(
        self,
        name: str,
        stage: ScoreStage | ResponseStage,
        key: str,
        source: Source,
        engine: Engine,
        tally: Tally,
        run_id: str,
        *,
        detail: Any,
        fresh: bool = False,
        again: bool = False,
    ) -> ScoreReport:
        """Every row of a file; `fresh` asks also where the journal has an answer, `again` also for
        the failures of a rejected result that the task accepts now. `detail` makes of a report what
        the manifest says to the next stage. InHand when another run asks for it now."""
        folder = self.layout.journal_folder(name, key)
        opened = partial(self.layout.journal, name, key, run_id, fresh=fresh, samples=stage.samples)
        with (
            await asyncio.to_thread(self._in_hand, name, key),
            await asyncio.to_thread(Draft, self.layout, name, key) as draft,
            await asyncio.to_thread(opened) as journal,
            closing(self._reuse(stage, str(folder), run_id, fresh=fresh)) as reuse,
        ):
            stands = None
            if not (fresh or again):
                stands = await asyncio.to_thread(self._acceptable, name, stage, key, source)
            reuse.published |= stands is not None
            adoption = None
            if draft.adopts and not fresh:
                adoption = await asyncio.to_thread(
                    self._adopt, draft, name, key, stage, source, journal
                )
            scoring = Scoring(stage, source, journal, reuse, self.budget_of(stage.prices), stands)
            report = await scoring.run(draft, engine, tally)
            if damaged := journal.damaged:
                report.damaged = damaged
                tally.warnings.append(f"{decode_key(key)}: {_told(damaged)}")
            tally.warnings += [f"{decode_key(key)}: {told}" for told in report.warnings]
            made_by = {"made_by": stage.version(), **detail(report)}
            if adoption is not None:
                made_by["adopted"] = asdict(adoption)
            await asyncio.to_thread(self.publish, name, draft, source, report, made_by)
            await asyncio.to_thread(journal.seal, report.data_version)
        return report

    def _in_hand(self, name: str, key: str) -> Hold:
        path = self.layout.in_hand_path(name, key)
        with explained(path, StoreError):
            try:
                return Hold(path)
            except BlockingIOError:
                raise InHand(f"{decode_key(key)}: another run is working on it") from None

    def _adopt(
        self,
        draft: Draft,
        name: str,
        key: str,
        stage: ScoreStage | ResponseStage,
        source: Source,
        journal: Journal,
    ) -> Adoption | None:
        at_place = [] if draft.stranger is None else [draft.stranger.place]
        files = [*at_place, *old_files(self.layout, name, key)]
        return adopt(stage, source, journal, files) if files else None

    def _acceptable(
        self, name: str, stage: ScoreStage | ResponseStage, key: str, source: Source
    ) -> Standing | None:
        """The failures of a rejected result that the task accepts now, if it is still what would be
        made: nothing is asked again for it. One that is damaged or gone counts as not there."""
        made = read_manifest(self.layout.manifest_path(name, key, rejected=True))
        if (
            made is None
            or made.failed > made.rows * self.layout.spec.task.max_failure_rate
            or made.detail.get("made_by") != stage.version()
            or made.input.digest != source.parts[0].digest
            or made.rows != source.rows_read * stage.samples
            or made.output is None
        ):
            return None
        place = self.layout.place(made.output)
        try:
            is_sound = file_digest(place) == made.output_digest
        except InputError as error:
            if is_absent(error):
                return None
            raise
        return standing_in(place) if is_sound else None

    def publish(
        self, stage: str, draft: Draft, source: Source, report: ScoreReport, detail: dict[str, Any]
    ) -> None:
        """What was answered, or rated."""
        manifest = Manifest(
            stage=stage,
            data_version=report.data_version,
            rows=report.rows,
            ok=report.ok,
            failed=report.failed,
            failures=report.failures_by_reason(),
            input=source.fingerprint(),
            schema=readable_schema(report.schema),
            moved=report.moved,
            detail=detail,
        )
        draft.publish(manifest)

    def budget_of(self, prices: Prices) -> Budget:
        """The task's, of all its runs and stages, at a model's prices."""
        spec = self.layout.spec
        if prices not in self._budgets:
            self._budgets[prices] = Budget(
                spec.file_name,
                self.layout.spent_path,
                prices,
                spec.task.budget_usd,
                spec.task.budget_tokens,
            )
        return self._budgets[prices]

    def _reuse(
        self, stage: ScoreStage | ResponseStage, folder: str, run_id: str, *, fresh: bool
    ) -> Reuse:
        """The project has a table of answers, or else the run, whose files run side by side.
        Several samples of one request are to differ: they are never waited for."""
        policy, table = self.layout.spec.task.reuse, None
        if policy.scope == "project" and not fresh:
            table = self.layout.shared_answers_path
        elif policy.identical_once:
            if run_id not in self._of_runs:
                self._of_runs[run_id] = Path(mkdtemp(prefix="modelcall-"))
                finalize(self, rmtree, self._of_runs[run_id], ignore_errors=True)
            table = self._of_runs[run_id] / "answers.sqlite"
        if table is None:
            return Reuse(policy.scope != "off")
        if table not in self._asking:
            self._asking[table] = Asking(table.with_suffix(".asking"))
        shared = SharedReplies(table, self.layout.journal_at)
        asking = self._asking[table] if stage.samples == 1 else None
        return Reuse(policy.scope != "off", shared, asking, folder)


def _told(damaged: Mapping[str, int]) -> str:
    lines = ", ".join(f"{count:,} in {name}" for name, count in damaged.items())
    return (
        f"damaged lines in its journal: {lines}; the replies in them were asked for again where "
        "rows need them, all others are kept"
    )
