"""Sensors of a task: new and changed input files become runs, and complete groups do.

It needs no memory of its own. What is there is compared with what the instance holds, and a version
that was tried once, well or not, is known by the run key of its run. The cursor only says where the
next page of a long listing begins, and has a digest of each page that left nothing to do: losing it
costs one full comparison.

A run of several files is of one stage, because what comes of them differs; the next stage is
launched at a later look, for those that were made.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import islice, pairwise
from typing import Any, Self

import dagster as dg
import orjson
from dagster._core.storage.partition_status_cache import AssetPartitionStatus
from dagster._core.storage.tags import PRIORITY_TAG, RUN_KEY_TAG

from modelcall_assets.defs.instance import (
    GREEN,
    IN_PROGRESS,
    TASK_TAG,
    add_partitions,
    asset_key,
    latest_events,
    neighbours,
    range_tags,
    statuses_of,
)
from modelcall_assets.errors import ModelcallError
from modelcall_assets.records import decode_key, encode_key
from modelcall_assets.stages import Stage
from modelcall_assets.stages.task import Task
from modelcall_assets.storage.files import write_bytes
from modelcall_assets.storage.publishing import read_manifest

PLANNED_AT_ONCE = 500
"""Files of the ranges of one look; Dagster takes 6 ms to note that a run will make one."""
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
        add_partitions(context.instance, first.keys.name, list(page.versions))
        seen = Comparison(context.instance, first, page)
        launches = Launches(context.instance, stages, page.versions)
        # Looked at first: what ends in between may leave something to launch.
        keys = [*page.versions]
        between = (statuses_of(context.instance, stage, keys) for stage in stages[1:-1])
        is_busy = any(IN_PROGRESS in each.values() for each in (seen.statuses, *between))
        due = list(islice(launches.requests(seen.changed()), most + 1))
        has_more = len(due) > (most if launches.most_files == 1 else 0)
        nothing = f"nothing to launch for {len(page.versions)} files for now"
        seen.remember()
        return dg.SensorResult(
            run_requests=due[:most],
            asset_events=list(seen.flags()),
            cursor=cursor.next(page, is_settled=not (has_more or is_busy)).text(),
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
        versions = {key: state for key, state in states.items() if state is not None}
        changed = Launches(context.instance, stages, versions).requests((k, "") for k in versions)
        due = list(islice(changed, spec.task.sensor.max_runs_per_tick))
        return dg.SensorResult(
            run_requests=due,
            skip_reason=None if due else f"nothing complete and new among {len(states)}",
        )

    return look


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


@dataclass(frozen=True)
class Launches:
    """The runs that a sensor asks for: each of one file and all the stages, or of neighbouring
    files and one stage."""

    instance: dg.DagsterInstance
    stages: Sequence[Stage]
    """Those that share the keys of the first."""
    versions: Mapping[str, str]
    """By key, as the inputs are now."""

    @cached_property
    def most_files(self) -> int:
        """Of a run; one of what is made of another asset and goes through several stages."""
        first = self.stages[0]
        is_one = first.gathers or (first.upstream is not None and len(self.stages) > 1)
        return 1 if is_one else first.spec.task.concurrency.files_per_run

    def requests(self, changed: Iterable[tuple[str, str]]) -> Iterator[dg.RunRequest]:
        """For keys, each with what its version follows, so that a file may return to an old one.
        What has begun is ended first."""
        due = ((key, after) for key, after in changed if not self._is_tried(key, after))
        if self.most_files == 1:
            for key, after in due:
                yield self._request(self.stages, [key], self._run_key(key, after))
            return
        left = PLANNED_AT_ONCE
        for before, stage in reversed([*pairwise(self.stages)]):
            made = [*islice(self._made(before, stage), left)]
            left -= len(made)
            for keys in neighbours(self.instance, stage, made, self.most_files):
                yield self._request([stage], keys)
        marks = {key: self._mark(key, after) for key, after in islice(due, left)}
        first = self.stages[0]
        for keys in neighbours(self.instance, first, marks, self.most_files):
            run_key = f"{first.spec.key}/{','.join(marks[key] for key in keys)}"
            yield self._request([first], keys, run_key)

    def _request(
        self, stages: Iterable[Stage], keys: Sequence[str], run_key: str | None = None
    ) -> dg.RunRequest:
        tags = {TASK_TAG: self.stages[0].spec.key, PRIORITY_TAG: "-1"}  # people's runs go first
        assets, only = [*map(asset_key, stages)], keys[0] if len(keys) == 1 else None
        return dg.RunRequest(
            run_key, asset_selection=assets, partition_key=only, tags=tags | range_tags(keys)
        )

    def _made(self, before: Stage, stage: Stage) -> Iterator[str]:
        """Keys whose version we have launched, and whose latest run of the stage before was well
        and came after the latest of this one."""
        events, planned = dg.DagsterEventType, dg.DagsterEventType.ASSET_MATERIALIZATION_PLANNED
        made = latest_events(self.instance, before, events.ASSET_MATERIALIZATION)
        begun = [latest_events(self.instance, each, planned) for each in (before, stage)]
        ours = {mark.partition("-")[0] for mark in self._tried}
        for key in self.versions:
            is_new = made.get(key, 0) > max(each.get(key, 0) for each in begun)
            if is_new and self._mark(key).partition("-")[0] in ours:
                yield key

    def _is_tried(self, key: str, after: str) -> bool:
        return not {self._run_key(key, after), self._mark(key, after)}.isdisjoint(self._tried)

    @cached_property
    def _tried(self) -> set[str]:
        """The task's run keys, and the marks of files in them."""
        start = f"{self.stages[0].spec.key}/"
        found = dict(self.instance.get_run_tags([RUN_KEY_TAG], value_prefix=start))
        run_keys = found.get(RUN_KEY_TAG, set())
        return run_keys.union(*(run_key.removeprefix(start).split(",") for run_key in run_keys))

    def _run_key(self, key: str, after: str) -> str:
        version = f"{self.stages[0].spec.key}/{key}@{self.versions[key]}"
        return f"{version}/after/{after}" if after else version

    def _mark(self, key: str, after: str = "") -> str:
        """In the run key of several files: short, because databases index it."""
        version = hashlib.sha256(self._run_key(key, "").encode()).hexdigest()[:16]
        return f"{version}-{after}"


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
        assert self.made is not None  # read before: a run may end in between
        return statuses_of(self.instance, self.stage, [*self.page.versions])

    @cached_property
    def made(self) -> Mapping[str, int]:
        """The event of each key's latest result, also when a later run failed."""
        kind = dg.DagsterEventType.ASSET_MATERIALIZATION
        return latest_events(self.instance, self.stage, kind)

    def changed(self) -> Iterator[tuple[str, str]]:
        """Keys whose file is not what was made, with the result that it follows."""
        changed = filter(self._has_changed, self.page.versions)
        return ((key, str(self.made.get(key, 0))) for key in changed)

    def flags(self) -> Iterator[dg.AssetObservation]:
        """A deleted input keeps its partition when it has results, and says once what happened."""
        kind = dg.DagsterEventType.ASSET_OBSERVATION
        flagged = latest_events(self.instance, self.stage, kind)
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

    def _has_changed(self, key: str) -> bool:
        if (status := self.statuses[key]) != GREEN:
            return status != IN_PROGRESS
        settled = [self.page.versions[key], self.made.get(key, 0)]
        if self.settled.get(key) == settled:
            return False
        manifest = read_manifest(self.stage.manifest_path(key))
        if manifest is None or manifest.input.version != self.page.versions[key]:
            return True
        self.unchanged[key] = settled
        return False
