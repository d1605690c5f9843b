"""The steps of one scoring task, each from partition key to report; assets and CLI call these."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import pyarrow as pa

from modelcall_assets.config.spec import PREPROCESSED, RAW, RESPONSES, SCORES, TaskSpec
from modelcall_assets.config.task import ScoringTask
from modelcall_assets.errors import InputError, Problem, SetupError
from modelcall_assets.journal.shared import SharedReplies
from modelcall_assets.llm.engine import Engine
from modelcall_assets.records.data_files import stem_of
from modelcall_assets.records.keys import decode_key, encode_key
from modelcall_assets.records.outcome import Dropped, Failure
from modelcall_assets.records.record import BadLine, Row
from modelcall_assets.steps.audit import ScoresAudit, audit_scores
from modelcall_assets.steps.budget import Budget
from modelcall_assets.steps.draft import Draft
from modelcall_assets.steps.duplicates import Duplicates
from modelcall_assets.steps.engine import engine_of
from modelcall_assets.steps.layout import Layout
from modelcall_assets.steps.members import as_one, grouped, version_of
from modelcall_assets.steps.old_stat import write_old_stat
from modelcall_assets.steps.piece_work import PieceWork
from modelcall_assets.steps.preprocess import PreprocessReport, failure_before, preprocess
from modelcall_assets.steps.progress import Tally
from modelcall_assets.steps.raw import RawReport, read_raw
from modelcall_assets.steps.recipe import Recipe
from modelcall_assets.steps.responses import ResponseStage
from modelcall_assets.steps.reuse import Reuse
from modelcall_assets.steps.rule_scores import RuleStage
from modelcall_assets.steps.score_report import Prices, ScoreReport
from modelcall_assets.steps.scores import ScoreStage, Scoring
from modelcall_assets.steps.source import Part, Source
from modelcall_assets.storage.files import (
    list_files,
    list_inputs,
    list_page,
    matches,
    stat_file,
)
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
from modelcall_assets.storage.rows import read_rows, record_id
from modelcall_assets.storage.schema import readable_schema, schema_from_json, schema_to_json
from modelcall_assets.transforms.preprocessor import Grouping

FILES, GROUPS = "files", "groups"
"""The sets of partition keys that a task may have."""
WARNINGS, MEMBERS = "warnings", "members"
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
        if self.recipe is None:
            return row
        made = PieceWork(self.recipe, pa.schema([]), self.reading).made(row, identity)
        return made if isinstance(made, Dropped) else (failure_before(made) or made)

    def check_ready(self) -> None:
        """SetupError when the endpoint has no key or address, the scorer cannot be made, or rows
        cannot be preprocessed."""
        if self.recipe is not None:
            self.recipe.check()
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
        """The input files in order, after the task's own caps; a partition of several is one here.

        Raises SetupError when two of them would have one output, InputError when the folder is
        missing.
        """
        if self.grouping is not None:
            return self._grouped_inputs()
        return self.input_page("", None)[0][: self.spec.task.max_files]

    def input_page(self, after: str, most: int | None) -> tuple[list[FileInfo], str]:
        """`inputs` behind a path, without the caps, about `most` at a time where the store can list
        so; and the path where the next page begins, empty at the end."""
        if self.grouping is not None:
            return self._grouped_inputs(), ""
        folder, own = self.layout.folder(RAW), self.layout.own_folders
        files, last = list_page(folder, self._pattern, own, after, most)
        self._refuse_shared_outputs(files)
        return files, last

    def all_keys(self) -> set[str]:
        """Of everything in the input folder, whatever the task takes of it."""
        if self.grouping is not None:
            return {encode_key(name) for name in self._groups(None)}
        return {encode_key(file.key_path) for file in list_inputs(self.layout.folder(RAW))}

    def members(self, key: str) -> list[FileInfo]:
        """The files of a partition; InputError when they are gone."""
        name = decode_key(key)
        if self.grouping is None:
            return [replace(stat_file(self.layout.input_place(key)), key_path=key)]
        groups = self._groups(self.spec.task.max_files)
        if name not in groups:
            raise InputError(f"{self.spec.input_folder}: there is no file for '{name}' any more")
        return groups[name]

    @cached_property
    def recipe(self) -> Recipe | None:
        """How rows are preprocessed, if they are."""
        task = self.spec.task
        if not isinstance(task, ScoringTask) or not task.preprocess.enabled:
            return None
        return Recipe(task.preprocess, self.spec.root, self.spec.file_name)

    @cached_property
    def grouping(self) -> Grouping | None:
        """What makes partitions of several files; SetupError when the user's cannot be had."""
        preprocessor = self.recipe and self.recipe.preprocessor()
        return preprocessor if isinstance(preprocessor, Grouping) else None

    @property
    def _pattern(self) -> str:
        return self.recipe.config.file_pattern if self.recipe else "*"

    def _groups(self, most: int | None) -> dict[str, list[FileInfo]]:
        assert self.grouping is not None
        folder = self.layout.folder(RAW)
        own = [f"{place}/" for place in self.layout.own_folders]
        files = [
            file
            for file in list_files(folder)
            if matches(file.key_path, self._pattern) and not file.uri.startswith((*own,))
        ]
        try:
            return grouped(self.grouping, files, most)
        except InputError as error:
            raise InputError(f"{folder}: {error}") from None

    def _grouped_inputs(self) -> list[FileInfo]:
        groups = self._groups(self.spec.task.max_files)
        files = [as_one(name, members) for name, members in groups.items()]
        self._refuse_shared_outputs(files)
        return files

    def first_items(self, file: FileInfo, rows: int) -> Iterator[tuple[str, Row | BadLine]]:
        """The first rows of an input file, each with the id that it gets without one of its own."""
        if self.grouping is None:
            items = islice(read_rows(file.place, self.reading), rows)
            for index, item in enumerate(items):
                yield record_id(item, index, file.key_path), item
            return
        members = self.members(encode_key(file.key_path))
        parts = tuple(Part.of(member) for member in members)
        for name, piece in Source(parts, pa.schema([]), rows, rows, self.reading).pieces(rows):
            for place, item in enumerate(piece.chunk(pa.schema([]), self.reading).items):
                yield record_id(item, piece.start + place, name), item

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
        files = self.members(key)
        report = read_raw(*files, limit=self.row_limit, reading=self.reading)
        place = files[0].place
        if not report.rows and not any(kind.has_columns for kind in report.formats):
            raise InputError(f"{place}: there is no line in this file; fill it or take it away")
        if Format.ARROW in report.formats and isinstance(self.spec.task, ScoringTask):
            check_writable(place, report.schema)
        is_file = self.grouping is None
        whole = files[0] if is_file else as_one(decode_key(key), files)
        manifest = Manifest(
            stage=RAW,
            accepted=True,
            data_version=report.data_version,
            rows=report.rows,
            ok=report.rows - report.bad_lines,
            failed=report.bad_lines,
            input=InputFingerprint(
                uri=str(place) if len(files) == 1 else f"{self.spec.input_folder}/{whole.key_path}",
                digest=report.digest,
                size=whole.size,
                version=whole.version,
            ),
            schema=readable_schema(report.schema),
            detail={
                "schema": schema_to_json(report.schema),
                "format": ", ".join(report.formats),
                WARNINGS: report.warnings(),
                **({} if is_file else {MEMBERS: list(report.members)}),
            },
        )
        write_manifest(self.layout.manifest_path(RAW, key), manifest)
        return report

    def count_rows(self, file: FileInfo) -> int:
        """Of an input file that raw has not looked at."""
        files = self.members(encode_key(file.key_path)) if self.grouping else [file]
        return read_raw(*files, limit=self.row_limit, reading=self.reading).rows

    def input_version(self, key: str) -> str:
        """Of an input file as it is now; InputError when it is gone."""
        files = self.members(key)
        return files[0].version if self.grouping is None else version_of(files)

    def members_changed(self, key: str) -> bool:
        """Whether a group was made of other content than its members have now."""
        raise NotImplementedError("only a task that merges has groups")

    def preprocessed(self, key: str) -> PreprocessReport:
        """Preprocess an input file."""
        assert self.recipe is not None
        self.recipe.check()
        raw, source = Upstream(self, RAW), self.source(PREPROCESSED, key)
        processes = min(self.recipe.config.num_proc, os.cpu_count() or 1)
        began = time.time()
        with Draft(self.layout, PREPROCESSED, key) as draft, self._seen_before(key) as seen:
            report = preprocess(source, self.recipe, draft.out, seen=seen, processes=processes)
            source.verify()
            manifest = Manifest(
                stage=PREPROCESSED,
                accepted=True,
                data_version=report.data_version,
                rows=report.rows_out,
                ok=report.rows_out - report.failed,
                failed=report.failed,
                dropped=report.dropped.total(),
                input=raw.need(key).input,
                schema=readable_schema(report.schema),
                detail={"schema": schema_to_json(report.schema)},
            )
            draft.publish(manifest)
        write_old_stat(self.recipe, self.layout, key, source, report, began)
        return report

    @contextmanager
    def _seen_before(self, key: str) -> Iterator[Duplicates | None]:
        assert self.recipe is not None
        wanted = self.recipe.config.dedup
        if not wanted.exact and wanted.near is None:
            yield None
            return
        with Duplicates(self.layout.duplicates_path, key, uuid4().hex, wanted.near) as seen:
            yield seen

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
            parts=self._parts(upstream, key, manifest),
            schema=schema_from_json(manifest.detail["schema"]),
            rows=manifest.rows,
            limit=self._row_limit_after(upstream),
            reading=self.reading_after(upstream),
        )

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
