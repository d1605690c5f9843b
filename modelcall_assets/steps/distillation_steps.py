"""The steps of one distilling task: data sets to conversations, merged, answered, rated."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from functools import cached_property, partial
from typing import Any

import pyarrow as pa

from modelcall_assets.config.distillation import ChatmlStep, DistillationTask
from modelcall_assets.config.merge_groups import MergeGroup
from modelcall_assets.config.spec import CHATML, MERGED, RAW, RESPONSES, TaskSpec
from modelcall_assets.errors import InputError
from modelcall_assets.llm.engine import Engine
from modelcall_assets.records.keys import decode_key, encode_key
from modelcall_assets.records.outcome import Dropped, Failure
from modelcall_assets.records.record import Row
from modelcall_assets.steps.audit import ScoresAudit, audit_lines
from modelcall_assets.steps.chatml import ChatmlReport, convert_split
from modelcall_assets.steps.draft import Draft
from modelcall_assets.steps.inputs import FolderInputs, Inputs, LinkedInputs, OneInput
from modelcall_assets.steps.layout import Layout, invalid_file_of
from modelcall_assets.steps.members import digest_of_versions, version_of
from modelcall_assets.steps.merged import MergeReport, members_of, merge_group
from modelcall_assets.steps.progress import Tally
from modelcall_assets.steps.responses import ResponseStage
from modelcall_assets.steps.score_report import ScoreReport
from modelcall_assets.steps.scores import ScoreStage
from modelcall_assets.steps.split import SplitReport, look_at_split
from modelcall_assets.steps.split_inputs import SplitInputs
from modelcall_assets.steps.task_steps import FILES, GROUPS, TaskSteps
from modelcall_assets.steps.upstream import Upstream, changed, digest_of
from modelcall_assets.storage.formats import OURS, Reading
from modelcall_assets.storage.listing import FileInfo
from modelcall_assets.storage.manifest import (
    MAKER,
    InputFingerprint,
    Manifest,
    read_manifest,
    write_manifest,
)
from modelcall_assets.storage.schema import schema_to_json
from modelcall_assets.transforms.chatml import ChatmlOptions, to_chatml

_INPUT_FIELDS = {
    CHATML: "chatml_conversion.input_dir",
    MERGED: "jsonl_merge.base_input_dir",
    RESPONSES: "generate_response.input_path",
}
"""What the first step reads."""
_LINES = {"schema": schema_to_json(pa.schema([]))}
"""In the detail of a JSONL output that is read as lines."""


class DistillationSteps(TaskSteps):
    """`key` of a file is a split's or an input file's path; of a group, its merged file's."""

    @property
    def task(self) -> DistillationTask:
        assert isinstance(self.spec.task, DistillationTask)
        return self.spec.task

    @cached_property
    def linked(self) -> Upstream | None:
        """The stage of another task that the first one reads."""
        link = self.spec.link
        return Upstream(Layout(link.spec), link.stage) if link is not None else None

    @cached_property
    def _linked_steps(self) -> DistillationSteps:
        assert self.spec.link is not None
        return DistillationSteps(self.spec.link.spec)

    def upstream_of(self, stage: str) -> Upstream | None:
        return super().upstream_of(stage) or self.linked

    def partitions(self, stage: str) -> str:
        if self._has_own_groups(stage):
            return GROUPS
        return self._linked_steps.partitions(self.linked.stage) if self.linked else FILES

    def partitions_owner(self, stage: str) -> TaskSteps:
        if self.linked is None or self._has_own_groups(stage):
            return self
        return self._linked_steps.partitions_owner(self.linked.stage)

    def keys(self, partitions: str) -> list[str]:
        if MERGED in self.stages and partitions == GROUPS:
            return list(self.groups)
        if self.linked is None:
            return super().keys(partitions)
        keys = self._linked_steps.keys(partitions)
        if not self.spec.has_one_input:
            return keys[: self.task.max_files]
        only = self.layout.folder(RAW)
        theirs, stage = self.linked
        return [key for key in keys if theirs.output_path(stage, key) == only]

    def _has_own_groups(self, stage: str) -> bool:
        return MERGED in self.stages and stage not in (RAW, CHATML)

    @cached_property
    def groups(self) -> Mapping[str, MergeGroup]:
        """By partition key."""
        return {encode_key(group.output_file): group for group in self.spec.groups}

    @cached_property
    def inputs(self) -> Inputs:
        """The splits of the data sets, else the files of the first step's input."""
        if self.linked is not None:
            keys = partial(self.keys, self.partitions(self.stages[0]))
            return LinkedInputs(self.layout, self.input_field, self.linked, keys)
        if self.task.chatml_conversion is not None:
            return self.splits
        kind = OneInput if self.spec.has_one_input else FolderInputs
        suffix = None if MERGED in self.stages else ".jsonl"
        return kind(self.layout, self.input_field, suffix)

    @cached_property
    def splits(self) -> SplitInputs:
        """Those of a task that converts data sets."""
        datasets, with_system = self.spec.datasets, self._chatml_step.add_system_prompt
        return SplitInputs(self.layout, self.input_field, datasets, with_system)

    @property
    def input_field(self) -> str:
        return _INPUT_FIELDS[next(stage for stage in self.stages if stage != RAW)]

    def raw_split(self, key: str) -> SplitReport:
        """Fingerprint of a split and the files that make it."""
        files = self.splits.members(key)
        report = look_at_split(files, self.reading)
        manifest = Manifest(
            stage=RAW,
            accepted=True,
            data_version=report.data_version,
            rows=report.rows,
            ok=report.rows,
            failed=0,
            input=InputFingerprint(
                uri=str(self.splits.place(key).path),
                digest=report.data_version,
                size=report.size,
                version=version_of(files),
            ),
            detail={"members": list(report.members), "schema": schema_to_json(pa.schema([]))},
        )
        write_manifest(self.layout.manifest_path(RAW, key), manifest)
        return report

    def members_changed(self, key: str) -> bool:
        return self._merged_from(key) != _versions(self._members(key))

    def _merged_from(self, key: str) -> dict[str, str] | None:
        """The members' versions that a group was made of; None before it was."""
        made = read_manifest(self.layout.manifest_path(MERGED, key))
        return made.detail["members"] if made is not None else None

    def state_to_follow(self, key: str) -> str | None:
        """Digest of what a group, or a file of a linked task, would be made of. None while that is
        not complete, or when it is made of just that."""
        first = MERGED if MERGED in self.stages else self.stages[0]
        if first == MERGED:
            members = self._members(key)
            versions = _versions(members)
            is_complete = len(versions) == len(members)
            return (
                digest_of_versions(versions)
                if is_complete and versions != self._merged_from(key)
                else None
            )
        made = self._upstream(first).made(key)
        own = read_manifest(self.layout.manifest_path(first, key))
        if made is None or (own is not None and own.input.digest == digest_of(made)):
            return None
        return digest_of(made)

    def chatml(self, key: str) -> ChatmlReport:
        """Conversations of a split. InputChanged when it is not what raw recorded."""
        made = self._upstream(CHATML).need(key)
        files, place = self.splits.members(key), self.splits.place(key)
        options = self._chatml_options(place.dataset)
        with Draft(self.layout, CHATML, key) as draft:
            report = draft.written(
                partial(convert_split, files, options, limit=self.row_limit, reading=self.reading)
            )
            if version_of(self.splits.members(key)) != made.input.version:
                raise changed(place.path)
            manifest = Manifest(
                stage=CHATML,
                data_version=report.data_version,
                rows=report.rows_out,
                ok=report.rows_out - report.failed,
                failed=report.failed,
                dropped=sum(report.dropped.values()),
                failures=report.failed_by_reason,
                input=made.input,
                detail=dict(_LINES),
            )
            draft.publish(manifest)
        return report

    def merged(self, key: str) -> MergeReport:
        """The members of a group as one file. InputError names the members that are not there."""
        group, upstream = self.groups[key], self._upstream(MERGED)
        manifests = self._members(key)
        missing = [name for name, made in manifests.items() if made is None]
        if missing:
            raise InputError(
                f"{key}: {len(missing)} of {len(manifests)} members have no accepted "
                f"{upstream.stage}: {', '.join(missing)}; materialise {upstream.stage} of these "
                "first"
            )
        made = {name: manifest for name, manifest in manifests.items() if manifest is not None}
        for each in made.values():
            upstream.check(each)
        places = {name: upstream.place(each) for name, each in made.items()}
        versions = _versions(manifests)
        with Draft(self.layout, MERGED, key) as draft:
            report = draft.written(
                lambda out: merge_group(
                    places,
                    out,
                    lambda: draft.beside(invalid_file_of(out.place)),
                    reading=self.reading_after(upstream),
                    source_column=group.source_column,
                    dedup=group.dedup,
                )
            )
            manifest = Manifest(
                stage=MERGED,
                data_version=report.data_version,
                rows=report.rows,
                ok=report.rows,
                failed=0,
                dropped=report.blank + report.invalid + report.duplicates,
                input=InputFingerprint(
                    uri=self._member_folder, digest=digest_of_versions(versions), size=0, version=""
                ),
                moved=report.moved,
                detail={**_LINES, "members": versions, MAKER: self.maker_of(upstream)},
            )
            draft.publish(manifest)
        return report

    async def responses(
        self, key: str, engine: Engine, tally: Tally, run_id: str, **how: bool
    ) -> ScoreReport:
        """Answer every conversation; `how` as of `Answering.answer`. What `max_failure_rate`
        rejects lies aside."""
        stage = self.response_stage
        return await self._answer(RESPONSES, stage, key, engine, tally, run_id, how)

    @property
    def first_asking(self) -> ResponseStage | None:
        return self.response_stage if RESPONSES in self.stages else None

    def asking(self, stage: str) -> ScoreStage | ResponseStage | None:
        return self.response_stage if stage == RESPONSES else super().asking(stage)

    def prepared(self, row: Row, file: FileInfo, identity: str) -> Row | Failure | Dropped:
        if self.task.chatml_conversion is None:
            return row
        return to_chatml(
            row, self._chatml_options(self.splits.place(encode_key(file.key_path)).dataset)
        )

    @cached_property
    def response_stage(self) -> ResponseStage:
        return ResponseStage.of(self.spec)

    @property
    def reading(self) -> Reading:
        if self.linked is not None:
            return OURS
        first = self.task.first_step
        on_empty = "accept" if isinstance(first, ChatmlStep) else first.on_empty_file
        return Reading(first.encoding, first.on_bad_line, on_empty)

    def _own_shape(self, stage: str) -> dict[str, Any]:
        match stage:
            case "raw":
                return {"limit": self.row_limit}
            case "chatml":
                options = {name: asdict(self._chatml_options(name)) for name in self.spec.datasets}
                return {"chatml": options, "limit": self.row_limit}
            case "merged":
                return {"groups": [group.model_dump() for group in self.spec.groups]}
            case "responses":
                limit = {} if self.row_limit is None else {"limit": self.row_limit}
                return {"responses": self.response_stage.version(), **limit}
            case _:
                return super()._own_shape(stage)

    def maker_of(self, upstream: Upstream) -> str:
        if upstream.stage != MERGED:
            return upstream.stage
        steps = self if MERGED in self.stages else self._linked_steps
        merged_from = steps.upstream_of(MERGED)
        return RAW if merged_from is None else steps.maker_of(merged_from)

    def detail_of(self, stage: str, report: ScoreReport) -> dict[str, Any]:
        if stage != RESPONSES:
            return super().detail_of(stage, report)
        return {"schema": schema_to_json(report.schema)}

    def rows_to_ask(self, stage: str, keys: Iterable[str]) -> int:
        rows = super().rows_to_ask(stage, keys)
        return rows * self.response_stage.samples if stage == RESPONSES else rows

    def audit(self, stage: str, key: str, report: ScoreReport) -> ScoresAudit:
        if stage != RESPONSES:
            return super().audit(stage, key, report)
        rows = self.source(stage, key).rows_read * self.response_stage.samples
        return audit_lines(self.result_path(stage, key, report), rows)

    def _upstream(self, stage: str) -> Upstream:
        upstream = self.upstream_of(stage)
        assert upstream is not None
        return upstream

    def _members(self, key: str) -> dict[str, Manifest | None]:
        """What there is of each member of a group, in order; None where that is not accepted."""
        upstream = self._upstream(MERGED)
        steps = self if self.linked is None else self._linked_steps
        paths = [decode_key(member) for member in steps.keys(FILES)]
        names = members_of(self.groups[key], paths, self._member_folder)
        return {name: upstream.made(encode_key(name)) for name in names}

    @property
    def _member_folder(self) -> str:
        return self.spec.folder(CHATML) if CHATML in self.stages else self.spec.input_folder

    def _chatml_options(self, dataset: str) -> ChatmlOptions:
        step, config = self._chatml_step, self.spec.datasets[dataset]
        return ChatmlOptions(
            format_style=config.format_style,
            column_mapping=config.column_mapping,
            keep_raw_data=step.keep_raw_data,
            system_prompt=step.system_prompt if step.add_system_prompt else None,
            other_roles=step.other_roles,
            validation=step.validation,
        )

    @property
    def _chatml_step(self) -> ChatmlStep:
        assert self.task.chatml_conversion is not None
        return self.task.chatml_conversion


def steps_of(spec: TaskSpec) -> TaskSteps:
    """The steps of a task of any kind."""
    is_distillation = isinstance(spec.task, DistillationTask)
    return DistillationSteps(spec) if is_distillation else TaskSteps(spec)


def _versions(members: Mapping[str, Manifest | None]) -> dict[str, str]:
    """Of the members that there are."""
    return {name: each.data_version for name, each in members.items() if each is not None}
