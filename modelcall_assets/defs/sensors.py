"""Sensors of a task: new and changed input files become runs, and complete groups do.

It needs no memory of its own. What is there is compared with what the instance holds, and a version
that was tried once, well or not, is known by the run key of its run. The cursor only says where the
next page of a long listing begins, and has a digest of each page that left nothing to do: losing it
costs one full comparison.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any, Self

import dagster as dg
import orjson
from dagster._core.storage.partition_status_cache import AssetPartitionStatus
from dagster._core.storage.tags import RUN_KEY_TAG

from modelcall_assets.defs.instance import (
    GREEN,
    IN_PROGRESS,
    add_partitions,
    asset_key,
    partitions_of,
)
from modelcall_assets.errors import ModelcallError
from modelcall_assets.records.data_files import decode_key, encode_key
from modelcall_assets.stages.stage import Stage
from modelcall_assets.stages.task import Task
from modelcall_assets.storage.files import write_bytes
from modelcall_assets.storage.publishing import read_manifest

TASK_TAG = "modelcall/task"
LOOKED_UP_AT_ONCE = 200
PAGE_FILES = 20_000
"""Listed in one tick; a store takes a second or so for them."""


def task_sensors(task: Task) -> Iterator[dg.SensorDefinition]:
    """One for input files, one for what follows other assets."""
    if task.linked is None:
        yield files_sensor(task)
    if task.linked is not None or any(stage.gathers for stage in task.stages):
        yield followers_sensor(task)


def files_sensor(task: Task, page_files: int = PAGE_FILES) -> dg.SensorDefinition:
    """Watches the task's input folder; a new or changed file runs through all its stages."""
    first, most = task.stages[0], task.spec.task.sensor.max_runs_per_tick
    stages = [stage for stage in task.stages if stage.keys == first.keys]

    @_sensor(task, "files", f"runs new and changed files of {task.spec.input_folder}", stages)
    def look(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
        cursor = Cursor.parse(context.cursor)
        try:
            page = Page.of(task, cursor.after, page_files)
        except ModelcallError as error:
            return dg.SkipReason(str(error))
        if cursor.settled.get(page.after) == page.digest:
            context.update_cursor(cursor.next(page, is_settled=True).text())
            return dg.SkipReason(f"no new or changed file among {len(page.versions)}")
        seen = Comparison(context.instance, first, page)
        due = list(islice(seen.not_tried(), most + 1))
        busy = any(map(seen.is_in_progress, page.versions))
        nothing = f"nothing to launch for {len(page.versions)} files for now"
        seen.remember()
        add_partitions(context.instance, first.keys.name, list(page.versions))
        return dg.SensorResult(
            run_requests=_requests(task, due[:most]),
            asset_events=list(seen.flags()),
            cursor=cursor.next(page, is_settled=len(due) <= most and not busy).text(),
            skip_reason=None if due else nothing,
        )

    return look


def followers_sensor(task: Task) -> dg.SensorDefinition:
    """Watches what the task's groups, or its first stage, read of other assets: what is complete
    and has changed runs through the stages after it."""
    spec = task.spec
    stages = [stage for stage in task.stages if stage.keys.of_groups] or list(task.stages)
    first = stages[0]

    @_sensor(task, "followers", f"runs {first.name} when what it reads is complete", stages)
    def look(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
        try:
            states = {key: first.to_follow(key) for key in first.keys.now()}
        except ModelcallError as error:
            return dg.SkipReason(str(error))
        add_partitions(context.instance, first.keys.name, list(states))
        changed = (
            (key, f"{spec.key}/{key}@{states[key]}") for key in states if states[key] is not None
        )
        most = spec.task.sensor.max_runs_per_tick
        due = list(islice(not_tried(context.instance, changed), most))
        return dg.SensorResult(
            run_requests=_requests(task, due),
            skip_reason=None if due else f"nothing complete and new among {len(states)}",
        )

    return look


def not_tried(
    instance: dg.DagsterInstance, changed: Iterator[tuple[str, str]]
) -> Iterator[tuple[str, str]]:
    """Of pairs of key and run key those that no run has had yet."""
    while batch := dict(islice(changed, LOOKED_UP_AT_ONCE)):
        filters = dg.RunsFilter(tags={RUN_KEY_TAG: list(batch.values())})
        tried = {run.tags[RUN_KEY_TAG] for run in instance.get_runs(filters)}
        yield from ((key, run_key) for key, run_key in batch.items() if run_key not in tried)


def _sensor(
    task: Task, name: str, does: str, stages: Iterable[Stage]
) -> Callable[..., dg.SensorDefinition]:
    settings, status = task.spec.task.sensor, dg.DefaultSensorStatus
    return dg.sensor(
        name=f"{task.spec.key}_{name}",
        description=f"**{task.spec.name}**: {does}",
        target=dg.AssetSelection.assets(*map(asset_key, stages)),
        minimum_interval_seconds=settings.interval_seconds,
        default_status=status.RUNNING if settings.enabled else status.STOPPED,
    )


def _requests(task: Task, due: Iterable[tuple[str, str]]) -> list[dg.RunRequest]:
    tags = {TASK_TAG: task.spec.key}
    return [dg.RunRequest(run_key, partition_key=key, tags=tags) for key, run_key in due]


@dataclass(frozen=True)
class Page:
    """A part of the listing: version by key of what lies behind the path `after`, up to `last`,
    which is empty for the end."""

    after: str
    last: str
    versions: dict[str, str]

    @classmethod
    def of(cls, task: Task, after: str, most: int) -> Self:
        is_capped = task.spec.task.max_files is not None
        files, last = (task.inputs.files(), "") if is_capped else task.inputs.page(after, most)
        return cls(after, last, {encode_key(file.key_path): file.version for file in files})

    @property
    def digest(self) -> str:
        return hashlib.sha256(repr(self.versions).encode()).hexdigest()

    def covers(self, key: str) -> bool:
        """Whether a file of this key would be in this part."""
        path = decode_key(key)
        return path != self.after and (self.has(path) or path == self.last)

    def has(self, start: str) -> bool:
        """Whether a page that begins behind this path would begin in this part."""
        first, path, last = (
            text.encode("utf-8", "surrogateescape") for text in (self.after, start, self.last)
        )
        return first <= path and (not last or path < last)


@dataclass(frozen=True)
class Cursor:
    """Where the next page begins, and the digests of the settled ones, by where they begin."""

    after: str = ""
    settled: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str | None) -> Self:
        """A new one when there is none, or one of an older version or damaged."""
        with suppress(ValueError, TypeError):
            cursor = cls(**json.loads(text or "{}"))
            if isinstance(cursor.after, str) and isinstance(cursor.settled, dict):
                return cursor
        return cls()

    def text(self) -> str:
        return json.dumps(asdict(self)) if self.after or self.settled else ""

    def next(self, page: Page, *, is_settled: bool) -> "Cursor":
        settled = {start: self.settled[start] for start in self.settled if not page.has(start)}
        if is_settled:
            settled[page.after] = page.digest
        return Cursor(page.last, settled)


@dataclass(frozen=True)
class Comparison:
    """A page of the listing beside what the instance holds of the task."""

    instance: dg.DagsterInstance
    stage: Stage
    """The first, which reads the files."""
    page: Page
    unchanged: dict[str, list[str | int]] = field(default_factory=dict)
    """Of the keys that were looked at, as in `settled`."""

    @cached_property
    def settled(self) -> dict[str, Any]:
        """Inputs that are known to be what `raw` was made of: by key the version, and the event
        that materialised it. A file on this machine that can be lost: then the manifests are read
        again, one by one."""
        with suppress(FileNotFoundError, orjson.JSONDecodeError):
            known = orjson.loads(self.stage.layout.settled_path.read_bytes())
            return known if isinstance(known, dict) else {}
        return {}

    def remember(self) -> None:
        """What was found unchanged, so that its manifest need not be read again."""
        if self.unchanged:
            known = orjson.dumps(self.settled | self.unchanged)
            write_bytes(self.stage.layout.settled_path, known)

    @cached_property
    def known(self) -> Sequence[str]:
        return self.instance.get_dynamic_partitions(self.stage.keys.name)

    @cached_property
    def statuses(self) -> dict[str, AssetPartitionStatus | None]:
        files, asset = partitions_of(self.stage.keys), asset_key(self.stage)
        return dict(self.instance.get_status_by_partition(asset, self.known, files) or {})

    @cached_property
    def made(self) -> Mapping[str, int]:
        """The event of each key's latest result, also when a later run failed."""
        return self._latest(dg.DagsterEventType.ASSET_MATERIALIZATION)

    def not_tried(self) -> Iterator[tuple[str, str]]:
        """Keys whose version has had no run yet, with the run key that says so from then on."""
        made = self.made  # before the statuses: a run may end in between
        # The version and what it follows, so that a file may return to an old version.
        changed = (
            (key, f"{self.stage.spec.key}/{key}@{version}/after/{made.get(key, 0)}")
            for key, version in self.page.versions.items()
            if self._has_changed(key)
        )
        return not_tried(self.instance, changed)

    def flags(self) -> Iterator[dg.AssetObservation]:
        """A deleted input keeps its partition when it has results, and says once what happened."""
        flagged = self._latest(dg.DagsterEventType.ASSET_OBSERVATION)
        for key in self._deleted():
            if self.made.get(key, 0) > flagged.get(key, 0):
                yield dg.AssetObservation(
                    asset_key(self.stage),
                    description="the input file is gone; its results are kept",
                    partition=key,
                )

    def _deleted(self) -> Iterable[str]:
        """Unknown under a cap on files, which leaves out some that are there."""
        if self.stage.spec.task.max_files is not None:
            return ()
        absent = (key for key in self.known if key not in self.page.versions)
        return (key for key in absent if self.page.covers(key))

    def _latest(self, kind: dg.DagsterEventType) -> Mapping[str, int]:
        events = self.instance.event_log_storage
        return events.get_latest_storage_id_by_partition(asset_key(self.stage), kind)

    def is_in_progress(self, key: str) -> bool:
        return self.statuses.get(key) == IN_PROGRESS

    def _has_changed(self, key: str) -> bool:
        if self.is_in_progress(key):
            return False
        if self.statuses.get(key) != GREEN:
            return True
        settled = [self.page.versions[key], self.made.get(key, 0)]
        if self.settled.get(key) == settled:
            return False
        manifest = read_manifest(self.stage.manifest_path(key))
        if manifest is None or manifest.input.version != self.page.versions[key]:
            return True
        self.unchanged[key] = settled
        return False
