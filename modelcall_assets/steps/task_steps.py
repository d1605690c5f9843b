"""The steps of one scoring task, each from partition key to report; assets and CLI call these."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import Any, Protocol

import pyarrow as pa

from modelcall_assets.config.folders import unwritable
from modelcall_assets.config.spec import PREPROCESSED, RAW, RESPONSES, SCORES, TaskSpec
from modelcall_assets.config.task import ScoringTask
from modelcall_assets.errors import InputError, SetupError
from modelcall_assets.llm.engine import Engine
from modelcall_assets.llm.patience import PATIENCE, Patience
from modelcall_assets.records.data_files import is_data_file
from modelcall_assets.records.keys import decode_key, encode_key
from modelcall_assets.records.outcome import Dropped, Failure
from modelcall_assets.records.record import Row
from modelcall_assets.steps.answering import Answering
from modelcall_assets.steps.audit import ScoresAudit, audit_scores
from modelcall_assets.steps.draft import Draft
from modelcall_assets.steps.engine import engine_of
from modelcall_assets.steps.inputs import FolderInputs, GroupedInputs, Inputs
from modelcall_assets.steps.layout import Layout
from modelcall_assets.steps.members import version_of
from modelcall_assets.steps.piece_work import PieceWork
from modelcall_assets.steps.preprocess import PreprocessReport, failure_before
from modelcall_assets.steps.preprocessed import preprocess_partition
from modelcall_assets.steps.progress import Tally
from modelcall_assets.steps.raw import MEMBERS, RawReport, raw_manifest, read_raw
from modelcall_assets.steps.recipe import Recipe
from modelcall_assets.steps.responses import ResponseStage
from modelcall_assets.steps.rule_scores import RuleStage
from modelcall_assets.steps.score_report import ScoreReport
from modelcall_assets.steps.scores import ScoreStage
from modelcall_assets.steps.source import Part, Source
from modelcall_assets.steps.upstream import Upstream, digest_of
from modelcall_assets.storage.formats import OURS, Format, Reading
from modelcall_assets.storage.listing import FileInfo
from modelcall_assets.storage.manifest import (
    InputFingerprint,
    Manifest,
    write_manifest,
)
from modelcall_assets.storage.parquet import check_writable
from modelcall_assets.storage.places import Place
from modelcall_assets.storage.rows import GIVEN_ID, ID_COLUMNS, count_rows
from modelcall_assets.storage.schema import schema_from_json
from modelcall_assets.transforms.preprocessor import Grouping

FILES, GROUPS = "files", "groups"
"""The sets of partition keys that a task may have."""


class Judged(Protocol):
    """What is asked of a report before it is accepted."""

    @property
    def rows(self) -> int: ...
    @property
    def failed(self) -> int: ...
    @property
    def failure_rate(self) -> float: ...
    @property
    def first_failure(self) -> str: ...
    @property
    def emptied(self) -> str:
        """Why no row is left, where that must be a mistake."""
        ...

    def failures_by_reason(self) -> dict[str, int]: ...


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

    def asking(self, stage: str) -> ScoreStage | ResponseStage | None:
        """A stage that asks a model; None for one that does not."""
        return self.score_stage if self.spec.asks(stage) else None

    def prepared(self, row: Row, file: FileInfo, identity: str) -> Row | Failure | Dropped:
        """A row of an input file as the first stage that asks, or rates, gets it."""
        if self._row_work is None:
            return row
        made = self._row_work.made(row, identity)
        return made if isinstance(made, Dropped) else (failure_before(made) or made)

    @cached_property
    def _row_work(self) -> PieceWork | None:
        return self.recipe and PieceWork(self.recipe, pa.schema([]), self.reading)

    def check_ready(self) -> None:
        """SetupError when a folder cannot be written to, the endpoint has no key or address, the
        scorer cannot be made, or rows cannot be preprocessed."""
        if problems := [*unwritable(self.spec)]:
            raise SetupError(problems)
        if self.recipe is not None:
            self.recipe.check()
        if self.rule_stage is not None:
            self.rule_stage.scorer()
        for stage in filter(self.spec.asks, self.stages):
            self.spec.endpoints(stage)

    @property
    def stages(self) -> tuple[str, ...]:
        """The task's stages, upstream first."""
        return self.spec.stages

    def upstream_of(self, stage: str) -> Upstream | None:
        """What a stage reads, of this task or another; None for input files."""
        position = self.stages.index(stage)
        return Upstream(self.layout, self.stages[position - 1]) if position else None

    @cached_property
    def inputs(self) -> Inputs:
        """What the first stage reads. SetupError when the user's preprocessor cannot be had."""
        pattern = self.recipe.config.file_pattern if self.recipe else "*"
        preprocessor = self.recipe and self.recipe.preprocessor()
        if isinstance(preprocessor, Grouping):
            return GroupedInputs(self.layout, self.input_field, preprocessor, pattern)
        return FolderInputs(self.layout, self.input_field, pattern=pattern)

    @cached_property
    def recipe(self) -> Recipe | None:
        """How rows are preprocessed, if they are."""
        task = self.spec.task
        if not isinstance(task, ScoringTask) or not task.preprocess.enabled:
            return None
        return Recipe(task.preprocess, self.spec.root, self.spec.file_name)

    def partitions(self, stage: str) -> str:
        """The set of keys that a stage has."""
        return FILES

    def partitions_owner(self, stage: str) -> TaskSteps:
        """The task whose set of keys that is."""
        return self

    def keys(self, partitions: str) -> list[str]:
        """The keys of a set, as the inputs are now."""
        return [encode_key(file.key_path) for file in self.inputs.files()]

    def raw(self, key: str) -> RawReport:
        """Fingerprint, schema and first mistakes of an input file.

        InputError when it cannot be read or is text without a line, as a failed upload leaves it,
        unless the task accepts those; a file of columns without rows is taken at its word.
        """
        self.layout.check_name(key)
        files = self.inputs.members(key)
        is_group = isinstance(self.inputs, GroupedInputs)
        report = read_raw(*files, limit=self.row_limit, reading=self.reading, is_group=is_group)
        place = files[0].place
        is_empty = not report.rows and not any(kind.has_columns for kind in report.formats)
        if is_empty and self.reading.on_empty_file == "fail":
            wrong = "there is no line in this file; fill it or take it away"
            raise InputError(f"{place}: {wrong}, or write `on_empty_file: accept`")
        if Format.ARROW in report.formats and isinstance(self.spec.task, ScoringTask):
            check_writable(place, report.schema)
        manifest = raw_manifest(report, self._fingerprint(key, files, report), is_group=is_group)
        write_manifest(self.layout.manifest_path(RAW, key), manifest)
        return report

    def _fingerprint(
        self, key: str, files: Sequence[FileInfo], report: RawReport
    ) -> InputFingerprint:
        folder = self.spec.input_folder
        return InputFingerprint(
            uri=files[0].uri if len(files) == 1 else f"{folder}/{decode_key(key)}",
            digest=report.digest,
            size=sum(file.size for file in files),
            version=files[0].version
            if isinstance(self.inputs, FolderInputs)
            else version_of(files),
        )

    def count_rows(self, file: FileInfo) -> int:
        """Of an input file that raw has not looked at."""
        files = self.inputs.members(encode_key(file.key_path))
        rows = sum(
            count_rows(each.place, self.reading) if is_data_file(each.place.name) else 1
            for each in files
        )
        return rows if self.row_limit is None else min(rows, self.row_limit)

    def members_changed(self, key: str) -> bool:
        """Whether a group was made of other content than its members have now."""
        raise NotImplementedError("only a task that merges has groups")

    def preprocessed(self, key: str, tally: Tally | None = None) -> PreprocessReport:
        """Preprocess an input file."""
        assert self.recipe is not None
        source, raw = self.source(PREPROCESSED, key), Upstream(self.layout, RAW).need(key)
        tally = tally or Tally(PREPROCESSED, asks_model=False)
        return preprocess_partition(self.recipe, self.layout, key, source, raw.input, tally)

    async def scores(
        self, key: str, engine: Engine, tally: Tally, run_id: str, **how: bool
    ) -> ScoreReport:
        """Rate every row of a file; `how` as of `Answering.answer`. What `max_failure_rate` rejects
        lies aside."""
        return await self._answer(SCORES, self.score_stage, key, engine, tally, run_id, how)

    async def _answer(
        self,
        name: str,
        stage: ScoreStage | ResponseStage,
        key: str,
        engine: Engine,
        tally: Tally,
        run_id: str,
        how: Mapping[str, bool],
    ) -> ScoreReport:
        return await self.answering.answer(
            name,
            stage,
            key,
            self.source(name, key),
            engine,
            tally,
            run_id,
            detail=partial(self.detail_of, name),
            **how,
        )

    @cached_property
    def answering(self) -> Answering:
        """How the stages that ask a model do so."""
        return Answering(self.layout)

    def rule_scores(self, key: str, tally: Tally) -> ScoreReport:
        """The same by the task's own scorer."""
        assert self.rule_stage is not None
        source = self.source(SCORES, key)
        with Draft(self.layout, SCORES, key) as draft:
            report = self.rule_stage.score_file(source, draft, tally)
            self.answering.publish(SCORES, draft, source, report, {})
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
        source, output = self.source(stage, key), self.result_path(stage, key, report)
        has_samples = source.stage == RESPONSES
        return audit_scores(output, source.rows_read, report.schema, has_samples=has_samples)

    def result_path(self, stage: str, key: str, report: Judged) -> Place:
        """Where the rows of a report are: at the output's place, or aside."""
        return self.layout.output_path(stage, key, rejected=self._is_rejected(report))

    def rejection(self, report: Judged, stage: str = SCORES) -> str | None:
        """Why the file is red, when more rows failed than the task accepts."""
        if not self._is_rejected(report):
            return None
        reasons = ", ".join(
            f"{reason} {count}" for reason, count in report.failures_by_reason().items()
        )
        again = "make it anew"
        if stage in (RESPONSES, SCORES):
            asks = self.spec.asks(stage)
            again = "call only the failed ones" if asks else "rate them all again"
        what = report.emptied or (
            f"{report.failed} of {report.rows} rows failed ({report.failure_rate:.2%}), more than "
            f"max_failure_rate {self.spec.task.max_failure_rate:.2%}: {reasons}. "
            f"The first: {report.first_failure}"
        )
        to = " to 1" if report.emptied else ""
        return (
            f"{what}. The result lies aside and replaces nothing; raise "
            f"max_failure_rate{to} to accept it as it is, or materialise again to {again}"
        )

    def _is_rejected(self, report: Judged) -> bool:
        return report.failure_rate > self.spec.task.max_failure_rate

    def engine(self, stage: str = SCORES, patience: Patience = PATIENCE) -> Engine:
        """Requests to a stage's model, to be entered; SetupError when a key or host is not set."""
        return engine_of(self.spec, stage, patience)

    def source(self, stage: str, key: str) -> Source:
        """The rows that `stage` reads. InputError when they are not there yet."""
        upstream = self.upstream_of(stage)
        assert upstream is not None
        manifest = upstream.need(key)
        return Source(
            parts=self._parts(upstream, key, manifest),
            schema=schema_from_json(manifest.detail["schema"]),
            rows=manifest.rows,
            limit=self._row_limit_after(upstream),
            reading=self.reading_after(upstream),
            names=self._columns_read(stage, upstream),
            stage=self.maker_of(upstream),
        )

    def maker_of(self, upstream: Upstream) -> str:
        """The stage whose rows those are."""
        return upstream.stage

    def _columns_read(self, stage: str, upstream: Upstream) -> set[str] | None:
        """What of its rows a stage looks at: preprocessed ones may have very long texts."""
        if stage != SCORES or upstream.stage != PREPROCESSED or self.rule_stage is not None:
            return None
        return {*self.score_stage.columns, *ID_COLUMNS, GIVEN_ID}

    def _parts(self, upstream: Upstream, key: str, manifest: Manifest) -> tuple[Part, ...]:
        members = manifest.detail.get(MEMBERS) if upstream.stage == RAW else None
        if members is None:
            return (Part(key, upstream.place(manifest), digest_of(manifest)),)
        place = self.layout.place
        return tuple(
            Part(each["name"], place(each["uri"]), each["digest"], each["size"], each["whole"])
            for each in members
        )

    @property
    def reading(self) -> Reading:
        """How lines of the task's input files are read."""
        assert isinstance(self.spec.task, ScoringTask)
        data = self.spec.task.data
        return Reading(data.encoding, data.on_bad_line, data.on_empty_file)

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
            assert self.recipe is not None
            return self.recipe.version()
        return {"score": (self.rule_stage or self.score_stage).version()}

    @property
    def row_limit(self) -> int | None:
        """Cap on the rows of each file, for debugging."""
        return self.spec.task.max_items_per_file

    def _row_limit_after(self, upstream: Upstream) -> int | None:
        """Responses may be several to a row; their number was capped before."""
        return None if upstream.stage == RESPONSES else self.row_limit

    def detail_of(self, stage: str, report: ScoreReport) -> dict[str, Any]:
        """What the next stage has to know of this one's output."""
        return {}

    @property
    def input_field(self) -> str:
        """Where the task file says what its first stage reads."""
        return "data.input_folder"
