"""A stage of a task: what it reads, where it leaves what, and what it makes of a partition. All in
which one differs from the others is in its own file."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Iterable,
    Iterator,
    Sequence,
    Set,
)
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, ClassVar

from modelcall_assets.errors import InputError, Problem
from modelcall_assets.records import decode_key, stem_of
from modelcall_assets.records.outcome import BadLine, Dropped, Failure, Reason, Row
from modelcall_assets.stages.report import Report, Tally
from modelcall_assets.stages.source import Part, Source, changed
from modelcall_assets.storage.columns import read_schema
from modelcall_assets.storage.files import file_digest, in_thread
from modelcall_assets.storage.formats import OURS, Reading
from modelcall_assets.storage.listing import FileInfo, exists, list_files, stat_file
from modelcall_assets.storage.places import Place
from modelcall_assets.storage.publishing import Check, Manifest, claimed, read_manifest
from modelcall_assets.storage.values import schema_from_json

if TYPE_CHECKING:
    from modelcall_assets.stages.task import Keys, Task


@dataclass
class Run:
    """What a run of a stage is given. `fresh` asks also where the journal has an answer, `again`
    also for failures that the task accepts now; of `ids`, `where` and `reason` those that are given
    choose rows of the latest result, which alone are asked again."""

    id: str
    tally: Tally
    fresh: bool = False
    again: bool = False
    ids: Sequence[str] = ()
    where: str = ""
    reason: str = ""
    untold: Set[str] = frozenset()
    """Partitions whose result a run has published that was killed before it could say so."""

    @property
    def choice(self) -> dict[str, Any]:
        """What it asks anew though there is a result."""
        given = {"again": self.again, "ids": [*self.ids], "where": self.where}
        return {name: value for name, value in {**given, "reason": self.reason}.items() if value}

    stop: Callable[[], None] = lambda: None
    """Ends it soon, with everything kept; what an open stage sets, and so with `tune`."""
    tune: Callable[[int | None, bool], None] = lambda requests, paused: None
    """So many requests in flight from now on, if given; none is sent while it is paused."""


Work = Callable[[str], Awaitable[Report]]
"""From a partition key to what became of its rows, published."""


class Stage(ABC):
    """Of one task. `upstream` is the stage whose rows it reads, of this task or another; None for
    one that reads the task's input."""

    name: ClassVar[str]
    about: str
    """One line for people."""
    kinds: ClassVar[tuple[str, ...]] = ("python",)
    suffix: ClassVar[str] = ".parquet"
    """Of its outputs."""
    done: ClassVar[str] = ""
    """What a file is when it is through; empty for a stage that people need not hear of."""
    has_rows: ClassVar[bool] = True
    """Whether what it leaves, or reads where it leaves nothing, is rows to be shown."""
    error_column: ClassVar[str | None] = None
    """Where its output says why a row holds no result, if that is a column of its own."""
    asks: ClassVar[bool] = False
    """Whether it asks a model."""
    answers: ClassVar[bool] = False
    """Whether it answers or rates each row, so that rows can be asked again and it may have a
    journal."""
    is_capped: ClassVar[bool] = False
    """Whether the next stage takes all rows: the input was capped, of which a row made several."""
    gathers: ClassVar[bool] = False
    """Whether a partition reads several of the upstream stage."""
    hint: ClassVar[tuple[str, str]] = ("", "")
    """Where, and what, to look for when it can answer none of the first rows."""
    shows_progress: ClassVar[bool] = False
    again: ClassVar[str] = "make it anew"
    """What another run does where too many rows failed; empty where no number is too many."""

    def __init__(self, task: Task, upstream: Stage | None, keys: Keys) -> None:
        self.task, self.upstream, self.keys = task, upstream, keys
        self.layout, self.spec = task.layout, task.spec

    @property
    def before(self) -> Stage:
        """The stage whose rows it reads, where it reads those of one."""
        assert self.upstream is not None
        return self.upstream

    @property
    def folder(self) -> Place:
        """Where it leaves its files."""
        return self.layout.place(self.spec.folder(self.name))

    @abstractmethod
    def own_shape(self) -> dict[str, Any]:
        """What of the task's files shapes its rows, but for how its input is read."""

    def make(self, key: str, tally: Tally) -> Report:
        """Publish a partition; for a stage that computes."""
        raise NotImplementedError

    @asynccontextmanager
    async def open(self, run: Run) -> AsyncIterator[Work]:
        """What the partitions of a run share. SetupError when the task cannot run here."""
        run.stop = run.tally.stop

        async def work(key: str) -> Report:
            return await in_thread(self.make, key, run.tally)

        yield work

    def check_ready(self) -> None:  # noqa: B027
        """SetupError when it cannot run here."""

    def lacks(self) -> Iterator[Problem]:
        """What keeps a right task from getting anywhere now, as warnings."""
        return iter(())

    def shape(self) -> dict[str, Any]:
        """What `code_version` is a hash of."""
        reading = self.reading if self.upstream is None else self.upstream.reading
        own = self.own_shape()
        return own if reading == OURS else {**own, "reading": asdict(reading)}

    @property
    def provenance(self) -> dict[str, str]:
        """Columns that say what its rows are made by."""
        return {}

    @cached_property
    def code_version(self) -> str:
        """Of what shapes its rows."""
        shape = json.dumps(self.shape(), sort_keys=True, default=str)
        return hashlib.sha256(shape.encode()).hexdigest()[:12]

    def why_rejected(self, report: Report) -> str | None:
        """When more rows failed than the task accepts."""
        most = self.spec.task.max_failure_rate
        return report.why_rejected(most, self.again) if self.again else None

    @property
    def maker(self) -> Stage:
        """The stage that has made its rows: merging makes none."""
        return self

    @property
    def reading(self) -> Reading:
        """How lines of what it leaves are read."""
        return OURS

    @property
    def columns_read(self) -> Collection[str] | None:
        """What of its input it looks at; None for all."""
        return None

    def failure_of(self, row: Row | BadLine) -> Failure | None:
        """Why a row that it has left holds no result."""
        if not self.answers or isinstance(row, BadLine) or row.get("api_status") != "error":
            return None
        return Failure(Reason(row["api_fail_reason"]), row["api_fail_detail"])

    def preview(self, row: Row, file: FileInfo, identity: str) -> Row | Failure | Dropped:
        """What it would make of a row of the input, for people to see before anything runs."""
        return row

    def rows_to_work(self, keys: Iterable[str]) -> int:
        """Rows of those partitions whose upstream is there."""
        most = self._limit
        found = (made.rows for key in keys if (made := self.before.accepted(key)))
        return sum(rows if most is None else min(rows, most) for rows in found)

    def source(self, key: str) -> Source:
        """The rows that it reads. InputError when they are not there yet."""
        upstream = self.before
        manifest = upstream.need(key)
        is_table, recorded = upstream.suffix == ".parquet", manifest.detail.get("schema")
        own = schema_from_json(recorded) if recorded else read_schema(upstream.result(manifest))
        return Source(
            parts=upstream.parts(key, manifest),
            schema=own,
            rows=manifest.rows,
            limit=self._limit,
            reading=upstream.reading,
            names=self.columns_read if is_table else None,
            maker=upstream.maker,
        )

    @property
    def _limit(self) -> int | None:
        """The rows of a partition that it takes."""
        return None if self.before.is_capped else self.task.row_limit

    def parts(self, key: str, manifest: Manifest) -> tuple[Part, ...]:
        """The files of a partition that it has left."""
        return (Part(key, self.result(manifest), self.digest_of(manifest)),)

    # What there is of a partition

    def accepted(self, key: str) -> Manifest | None:
        manifest = read_manifest(self.manifest_path(key))
        return manifest if manifest is not None and manifest.accepted else None

    def latest(self, key: str, *, rejected: bool = True) -> Manifest | None:
        """The rejected result, which came after an accepted one, or else that; without `rejected`
        the accepted one or else the rejected one."""
        wanted, other = (self.manifest_path(key, rejected=is_) for is_ in (rejected, not rejected))
        return read_manifest(wanted) or read_manifest(other)

    def need(self, key: str) -> Manifest:
        """InputError when nothing is accepted, InputChanged when it is not as it was left."""
        manifest = self.accepted(key)
        if manifest is None:
            raise InputError(
                f"{self.spec.key}/{self.name}: '{key}' has no accepted output; "
                f"make {self.name} of it first"
            )
        self.check(manifest)
        return manifest

    def check(self, manifest: Manifest) -> None:
        """InputChanged when the file of a partition has another version than it had, and another
        content too."""
        place, then = self.result(manifest), manifest.output_version or manifest.input.version
        if stat_file(place).version != then and file_digest(place) != self.digest_of(manifest):
            raise changed(place)

    def result(self, manifest: Manifest) -> Place:
        """Where the rows of a partition are: in its input, if the stage writes none."""
        return self.layout.place(manifest.output or manifest.input.uri)

    def digest_of(self, manifest: Manifest) -> str:
        return manifest.output_digest or manifest.detail.get("digest") or manifest.input.digest

    def outdated(self, keys: Sequence[str]) -> set[str]:
        """Of materialised partitions those that are gone, or that the task looks for elsewhere
        now."""
        found = set[str]()
        for key in keys:
            manifest, output = read_manifest(self.manifest_path(key)), self.output(key)
            if manifest is None or manifest.output != str(output) or not exists(output):
                found.add(key)
        return found

    def members_changed(self, key: str) -> bool:
        """Whether it was made of other partitions than it would be now; of a stage that gathers."""
        return False

    def to_follow(self, key: str) -> str | None:
        """Digest of the input that a partition would be made of now; None while that is not there,
        or when the partition was made of it."""
        made, own = self.before.accepted(key), read_manifest(self.manifest_path(key))
        if made is None:
            return None
        digest = self.before.digest_of(made)
        return None if own is not None and own.input.digest == digest else digest

    def published_keys(self, *, rejected: bool = False) -> Iterator[str]:
        """The keys of the partitions that have a manifest."""
        for file in list_files(self.manifest_folder(rejected=rejected), may_be_absent=True):
            if file.key_path.endswith(".json"):
                yield file.key_path.removesuffix(".json")

    # Where it is. Output paths are the user's; the rest is under `.modelcall`.

    def output(self, key: str, *, rejected: bool = False) -> Place:
        """`<folder>/<relative path, suffix replaced>`; what is rejected lies aside."""
        relative = PurePosixPath(decode_key(key))
        name = f"{stem_of(relative.name)}{self.suffix}"
        folder = self.rejected_folder if rejected else self.folder
        return folder / relative.with_name(name)

    def beside(self, key: str, *, rejected: bool = False) -> list[Place]:
        """All that it may publish with an output."""
        return []

    def manifest_path(self, key: str, *, rejected: bool = False) -> Place:
        return self.manifest_folder(rejected=rejected) / f"{key}.json"

    def manifest_folder(self, *, rejected: bool = False) -> Place:
        name = "rejected_manifests" if rejected else "manifests"
        return self.layout.state_folder / name / self.name

    def note_path(self, key: str) -> Place:
        """Of what is known of the file at an output's place beside its manifest."""
        return self.layout.state_folder / "standing" / self.name / f"{key}.json"

    @property
    def rejected_folder(self) -> Place:
        return self.layout.state_folder / "rejected" / self.name

    def aside(self, key: str) -> list[Place]:
        """All that there may be of a rejected result."""
        own = self.manifest_path(key, rejected=True), self.output(key, rejected=True)
        return [*own, *self.beside(key, rejected=True)]

    @property
    def set_aside_folder(self) -> Place:
        """Files that were at places of ours: `<end of the digest>/<name>`."""
        return self.layout.state_folder / "set_aside" / self.name

    def claimed(self, key: str) -> AbstractContextManager[Check]:
        """While the partition is published."""
        return claimed(self.layout.claims, f"{self.name}/{key}")

    def journal_folder(self, key: str) -> Place:
        return self.layout.state_folder / "journal" / self.name / key

    @property
    def adopts(self) -> bool:
        """Whether the task's file says that it goes on with results that others have left where
        its outputs belong."""
        return False
