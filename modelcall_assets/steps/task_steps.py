"""The steps of one scoring task, each from partition key to report; assets and CLI call these."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

from modelcall_assets.config.spec import PREPROCESSED, RAW, RESPONSES, SCORES, TaskSpec
from modelcall_assets.config.task import ScoringTask
from modelcall_assets.errors import InputError, Problem, SetupError
from modelcall_assets.journal.shared import SharedReplies
from modelcall_assets.llm.engine import Engine
from modelcall_assets.records.data_files import stem_of
from modelcall_assets.records.keys import encode_key
from modelcall_assets.records.outcome import Failure, Reason
from modelcall_assets.records.record import Row
from modelcall_assets.steps.audit import ScoresAudit, audit_scores
from modelcall_assets.steps.budget import Budget
from modelcall_assets.steps.draft import Draft
from modelcall_assets.steps.engine import engine_of
from modelcall_assets.steps.layout import Layout
from modelcall_assets.steps.preprocess import (
    PROCESS_ERRORS,
    PreprocessReport,
    options_of,
    preprocess_file,
)
from modelcall_assets.steps.progress import Tally
from modelcall_assets.steps.raw import RawReport, read_raw
from modelcall_assets.steps.responses import ResponseStage
from modelcall_assets.steps.reuse import Reuse
from modelcall_assets.steps.rule_scores import RuleStage
from modelcall_assets.steps.score_report import Prices, ScoreReport
from modelcall_assets.steps.scores import ScoreStage, Scoring
from modelcall_assets.steps.source import Source
from modelcall_assets.storage.files import list_page, stat_file
from modelcall_assets.storage.formats import OURS, Format, Reading
from modelcall_assets.storage.listing import FileInfo
from modelcall_assets.storage.manifest import (
    InputFingerprint,
    Manifest,
    read_manifest,
    write_manifest,
)
from modelcall_assets.storage.parquet import check_writable
from modelcall_assets.storage.places import Place
from modelcall_assets.storage.schema import readable_schema, schema_from_json, schema_to_json
from modelcall_assets.transforms.universal import Dropped, UniversalOptions, process

FILES, GROUPS = "files", "groups"
"""The sets of partition keys that a task may have."""
WARNINGS = "warnings"
"""In the detail of a `raw` manifest."""


class Upstream(NamedTuple):
    """A stage whose output another one reads."""

    steps: TaskSteps
    stage: str

    def made(self, key: str) -> Manifest | None:
        """What is accepted of a partition."""
        manifest = read_manifest(self.steps.layout.manifest_path(self.stage, key))
        return manifest if manifest is not None and manifest.accepted else None

    def need(self, key: str) -> Manifest:
        """InputError when there is nothing."""
        manifest = self.made(key)
        if manifest is None:
            raise InputError(
                f"{self.steps.spec.key}/{self.stage}: '{key}' has no accepted output; "
                f"materialise {self.stage} of this partition first"
            )
        return manifest

    def place(self, manifest: Manifest) -> Place:
        """Where the rows of a partition are."""
        return self.steps.layout.place(manifest.output or manifest.input.uri)


@dataclass(frozen=True)
class TaskSteps:
    """`key` is always a partition key: an input file's encoded relative path."""

    spec: TaskSpec

    @cached_property
    def layout(self) -> Layout:
        return Layout(self.spec)

    @cached_property
    def score_stage(self) -> ScoreStage:
        """How a model rates; not of a task with a scorer."""
        return ScoreStage.of(self.spec)

    @cached_property
    def rule_stage(self) -> RuleStage | None:
        """How the task's own scorer rates, if it has one."""
        spec = self.spec
        if not isinstance(spec.task, ScoringTask) or spec.task.scorer is None:
            return None
        return RuleStage(spec.task.scorer, spec.root, spec.file_name, spec.task.data.input_key)

    @property
    def first_asking(self) -> ScoreStage | ResponseStage | None:
        """The first stage that asks a model, if any does."""
        return self.score_stage if self.rule_stage is None else None

    def prepared(self, row: Row, file: FileInfo, identity: str) -> Row | Failure | Dropped:
        """A row of an input file as the first stage that asks, or rates, gets it."""
        if PREPROCESSED not in self.stages:
            return row
        try:
            return process(row, self.universal_options, identity)
        except PROCESS_ERRORS as error:
            return Failure(Reason.PREPROCESS_ERROR, f"{type(error).__name__}: {error}")

    def check_rater(self) -> None:
        """SetupError when the endpoint has no key or address, or the scorer cannot be made."""
        if self.rule_stage is not None:
            self.rule_stage.scorer()
        else:
            self.spec.endpoints()

    @property
    def stages(self) -> tuple[str, ...]:
        """The task's stages, upstream first."""
        return self.spec.stages

    def upstream_of(self, stage: str) -> Upstream | None:
        """What a stage reads, of this task or another; None for input files."""
        position = self.stages.index(stage)
        return Upstream(self, self.stages[position - 1]) if position else None

    def inputs(self) -> list[FileInfo]:
        """The input files in order, after the task's own caps.

        Raises SetupError when two of them would have one output, InputError when the folder is
        missing.
        """
        return self.input_page("", None)[0][: self.spec.task.max_files]

    def input_page(self, after: str, most: int | None) -> tuple[list[FileInfo], str]:
        """`inputs` behind a path, without the caps, about `most` at a time where the store can list
        so; and the path where the next page begins, empty at the end."""
        task, layout = self.spec.task, self.layout
        preprocess = task.preprocess if isinstance(task, ScoringTask) else None
        pattern = preprocess.file_pattern if preprocess and preprocess.enabled else "*"
        files, last = list_page(layout.folder(RAW), pattern, layout.own_folders, after, most)
        self._refuse_shared_outputs(files)
        return files, last

    def partitions(self, stage: str) -> str:
        """The set of keys that a stage has."""
        return FILES

    def partitions_owner(self, stage: str) -> TaskSteps:
        """The task whose set of keys that is."""
        return self

    def keys(self, partitions: str) -> list[str]:
        """The keys of a set, as the inputs are now."""
        return [encode_key(file.key_path) for file in self.inputs()]

    def raw(self, key: str) -> RawReport:
        """Fingerprint, schema and first mistakes of an input file.

        InputError when it cannot be read or is text without a line, as a failed upload leaves it; a
        file of columns without rows is taken at its word.
        """
        self.layout.check_name(key)
        place = self.layout.input_place(key)
        report = read_raw(stat_file(place), self.row_limit, self.reading)
        if not report.rows and not report.format.has_columns:
            raise InputError(f"{place}: there is no line in this file; fill it or take it away")
        if report.format is Format.ARROW and isinstance(self.spec.task, ScoringTask):
            check_writable(place, report.schema)
        manifest = Manifest(
            stage=RAW,
            accepted=True,
            data_version=report.data_version,
            rows=report.rows,
            ok=report.rows - report.bad_lines,
            failed=report.bad_lines,
            input=InputFingerprint(
                uri=str(place),
                digest=report.digest,
                size=report.info.size,
                version=report.info.version,
            ),
            schema=readable_schema(report.schema),
            detail={
                "schema": schema_to_json(report.schema),
                "format": report.format,
                WARNINGS: report.warnings(),
            },
        )
        write_manifest(self.layout.manifest_path(RAW, key), manifest)
        return report

    def count_rows(self, file: FileInfo) -> int:
        """Of an input file that raw has not looked at."""
        return read_raw(file, self.row_limit, self.reading).rows

    def input_version(self, key: str) -> str:
        """Of an input file as it is now; InputError when it is gone."""
        return stat_file(self.layout.input_place(key)).version

    def members_changed(self, key: str) -> bool:
        """Whether a group was made of other content than its members have now."""
        raise NotImplementedError("only a task that merges has groups")

    def preprocessed(self, key: str) -> PreprocessReport:
        """Clean, filter and truncate an input file."""
        source = self.source(PREPROCESSED, key)
        with Draft(self.layout, PREPROCESSED, key) as draft:
            report = preprocess_file(source, self.universal_options, draft.out)
            source.verify()
            manifest = Manifest(
                stage=PREPROCESSED,
                accepted=True,
                data_version=report.data_version,
                rows=report.rows_out,
                ok=report.rows_out - report.failed,
                failed=report.failed,
                dropped=sum(report.dropped.values()),
                input=source.fingerprint(),
                schema=readable_schema(report.schema),
                detail={"schema": schema_to_json(report.schema)},
            )
            draft.publish(manifest)
        return report

    async def scores(
        self, key: str, engine: Engine, tally: Tally, run_id: str, *, fresh: bool = False
    ) -> ScoreReport:
        """Rate every row of a file. Publishes also what `max_failure_rate` then rejects."""
        return await self._answered(SCORES, self.score_stage, key, engine, tally, run_id, fresh)

    async def _answered(
        self,
        name: str,
        stage: ScoreStage | ResponseStage,
        key: str,
        engine: Engine,
        tally: Tally,
        run_id: str,
        fresh: bool,
    ) -> ScoreReport:
        source = self.source(name, key)
        folder = self.layout.journal_folder(name, key)
        opened = partial(self.layout.journal, name, key, run_id, fresh=fresh)
        with (
            Draft(self.layout, name, key) as draft,
            await asyncio.to_thread(opened) as journal,
            self._reuse(fresh=fresh) as reuse,
        ):
            scoring = Scoring(stage, source, journal, reuse, self.budget_of(stage.prices))
            report = await scoring.run(draft, engine, tally)
            await asyncio.to_thread(self._publish_answers, name, draft, source, report)
            await asyncio.to_thread(journal.seal, report.data_version)
            if reuse.shared is not None:
                reuse.shared.add(str(folder), scoring.answered)
        return report

    def budget_of(self, prices: Prices) -> Budget:
        """The task's, of all its runs and stages, at a model's prices."""
        task = self.spec.task
        if prices not in self._budgets:
            self._budgets[prices] = Budget(
                self.spec.file_name,
                self.layout.spent_path,
                prices,
                task.budget_usd,
                task.budget_tokens,
            )
        return self._budgets[prices]

    @cached_property
    def _budgets(self) -> dict[Prices, Budget]:
        return {}

    @contextmanager
    def _reuse(self, *, fresh: bool) -> Iterator[Reuse]:
        policy = self.spec.task.reuse
        shared = None
        if policy.scope == "project" and not fresh:
            shared = SharedReplies(self.layout.shared_answers_path, self.layout.journal_at)
        try:
            yield Reuse(policy.scope != "off", policy.identical_once, shared)
        finally:
            if shared is not None:
                shared.close()

    def rule_scores(self, key: str, tally: Tally) -> ScoreReport:
        """The same by the task's own scorer."""
        assert self.rule_stage is not None
        source = self.source(SCORES, key)
        with Draft(self.layout, SCORES, key) as draft:
            report = self.rule_stage.score_file(source, draft, tally)
            self._publish_answers(SCORES, draft, source, report)
        return report

    def rows_to_ask(self, stage: str, keys: Iterable[str]) -> int:
        """Rows of those files whose upstream asset is there."""
        upstream = self.upstream_of(stage)
        assert upstream is not None
        found = (made.rows for key in keys if (made := upstream.made(key)))
        most = self._row_limit_after(upstream)
        return sum(rows if most is None else min(rows, most) for rows in found)

    def audit(self, stage: str, key: str, report: ScoreReport) -> ScoresAudit:
        """What lies in the published file, beside what should."""
        source = self.source(stage, key)
        return audit_scores(self.layout.output_path(stage, key), source.rows_read, report.schema)

    def rejection(self, report: ScoreReport) -> str | None:
        """Why the file is red, when more rows failed than the task accepts."""
        most = self.spec.task.max_failure_rate
        if report.failure_rate <= most:
            return None
        reasons = ", ".join(
            f"{reason} {count}" for reason, count in report.failures_by_reason().items()
        )
        what = "call only the failed ones" if self.rule_stage is None else "rate them all again"
        return (
            f"{report.failed} of {report.rows} rows failed ({report.failure_rate:.2%}), more than "
            f"max_failure_rate {most:.2%}: {reasons}. The first: {report.first_failure}. "
            f"All rows are published with `accepted: false`; materialise again to {what}"
        )

    def engine(self, stage: str = SCORES) -> Engine:
        """Requests to a stage's model, to be entered; SetupError when a key or host is not set."""
        return engine_of(self.spec, stage)

    def source(self, stage: str, key: str) -> Source:
        """The rows that `stage` reads. InputError when they are not there yet."""
        upstream = self.upstream_of(stage)
        assert upstream is not None
        manifest = upstream.need(key)
        return Source(
            name=key,
            place=upstream.place(manifest),
            digest=digest_of(manifest),
            schema=schema_from_json(manifest.detail["schema"]),
            rows=manifest.rows,
            limit=self._row_limit_after(upstream),
            reading=self.reading_after(upstream),
        )

    @cached_property
    def universal_options(self) -> UniversalOptions:
        assert isinstance(self.spec.task, ScoringTask)
        return options_of(self.spec.task.preprocess)

    @property
    def reading(self) -> Reading:
        """How lines of the task's input files are read."""
        assert isinstance(self.spec.task, ScoringTask)
        data = self.spec.task.data
        return Reading(data.encoding, data.on_bad_line)

    def reading_after(self, upstream: Upstream) -> Reading:
        """The same of what a stage leaves; that of `raw` are the input files."""
        return self.reading if upstream.stage == RAW else OURS

    def shape(self, stage: str) -> dict[str, Any]:
        """What of the task's files shapes the rows of `stage`; its code version is a hash of it."""
        upstream = self.upstream_of(stage)
        reading = self.reading if upstream is None else self.reading_after(upstream)
        own = self._own_shape(stage)
        return own if reading == OURS else {**own, "reading": asdict(reading)}

    def _own_shape(self, stage: str) -> dict[str, Any]:
        if stage == RAW:
            return {"limit": self.row_limit}
        if stage == PREPROCESSED:
            return asdict(self.universal_options)
        return {"score": (self.rule_stage or self.score_stage).version()}

    @property
    def row_limit(self) -> int | None:
        """Cap on the rows of each file, for debugging."""
        return self.spec.task.max_items_per_file

    def _row_limit_after(self, upstream: Upstream) -> int | None:
        """Responses may be several to a row; their number was capped before."""
        return None if upstream.stage == RESPONSES else self.row_limit

    def _publish_answers(
        self, stage: str, draft: Draft, source: Source, report: ScoreReport
    ) -> None:
        manifest = Manifest(
            stage=stage,
            accepted=report.failure_rate <= self.spec.task.max_failure_rate,
            data_version=report.data_version,
            rows=report.rows,
            ok=report.ok,
            failed=report.failed,
            failures=report.failures_by_reason(),
            input=source.fingerprint(),
            schema=readable_schema(report.schema),
            detail=self.detail_of(stage, report),
        )
        draft.publish(manifest)

    def detail_of(self, stage: str, report: ScoreReport) -> dict[str, Any]:
        """What the next stage has to know of this one's output."""
        return {}

    def _refuse_shared_outputs(self, files: list[FileInfo]) -> None:
        by_output: dict[str, str] = {}
        problems: list[Problem] = []
        for file in files:
            path = Path(file.key_path)
            output = str(path.with_name(f"{stem_of(path.name)}{self._output_suffix}"))
            first = by_output.setdefault(output, file.key_path)
            if first != file.key_path:
                problems.append(self._shared(first, file.key_path, output))
        if problems:
            raise SetupError(problems)

    def _shared(self, first: str, second: str, output: str) -> Problem:
        wrong = f"'{first}' and '{second}' would both be written to '{output}'"
        fix = "rename or move one of them"
        return Problem(self.spec.file_name, self.input_field, wrong, fix=fix)

    @property
    def input_field(self) -> str:
        """Where the task file says what its first stage reads."""
        return "data.input_folder"

    @property
    def _output_suffix(self) -> str:
        return ".parquet"


def digest_of(manifest: Manifest) -> str:
    """Of the rows that a stage left, or `raw` found."""
    if manifest.output is None:
        return manifest.input.digest
    return manifest.output_digest or manifest.detail["digest"]
