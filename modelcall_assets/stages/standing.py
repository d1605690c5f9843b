"""What of a result stands when its partition is made again: the rows that are not asked about, and
those that are asked anew though they have an answer."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

import orjson

from modelcall_assets.errors import InputError, Problem, SetupError
from modelcall_assets.journal import Journal
from modelcall_assets.records.outcome import Failure, Reason
from modelcall_assets.stages import Run
from modelcall_assets.stages.source import Published, Source
from modelcall_assets.storage.files import file_digest, write_bytes
from modelcall_assets.storage.listing import find_file
from modelcall_assets.storage.places import Place
from modelcall_assets.storage.publishing import Manifest, read_manifest
from modelcall_assets.storage.rows import read_rows
from modelcall_assets.transforms import Where

if TYPE_CHECKING:
    from modelcall_assets.stages.asking import AskingStage
    from modelcall_assets.stages.task import Task

MAKE_ANEW = "run-task, or a run without options, makes them anew"


@dataclass(frozen=True, slots=True)
class Unanswered:
    """A failure that left no reply: nothing asked, or no retries left."""

    failure: Failure
    key: str | None = None
    attempts: int = 0
    endpoint: str | None = None


@dataclass(frozen=True)
class Standing:
    """By index: the records whose failure stands, and those that are asked `anew` though they may
    have an answer. What else was published stands too, but other failures only if `settled`."""

    failed: Mapping[int, Unanswered] = field(default_factory=dict[int, Unanswered])
    anew: Set[int] = frozenset()
    settled: bool = True


@dataclass(frozen=True)
class Wanted:
    """Which rows of results are asked again: those for which all holds that is given."""

    ids: Collection[str] | None = None
    where: Where | None = None
    reason: str = ""

    @classmethod
    def of(cls, choice: Mapping[str, Any]) -> Self:
        """Of run options; SetupError when they say nothing."""
        reason, where = choice.get("reason", ""), None
        if reason and reason not in [*Reason]:
            expected = ", ".join(Reason)
            raise SetupError([Problem("options", "reason", "unknown", expected, reason)])
        try:
            where = Where.parse(choice["where"]) if choice.get("where") else None
        except ValueError as error:
            raise SetupError([Problem("options", "where", str(error), Where.expected)]) from None
        return cls({*choice["ids"]} if choice.get("ids") else None, where, reason)

    def __bool__(self) -> bool:
        return bool(self.ids is not None or self.where or self.reason)

    def rows(self, file: Published) -> Iterator[tuple[int, str]]:
        """Their indexes and ids. InputError when the file is not as it was published."""
        if self.reason and not file.manifest.failures.get(self.reason):
            return
        file.check()
        for index, item in file.items():
            failure, name = file.failure_of(item), file.identity(index, item)
            if (
                (not self.reason or (failure is not None and failure.reason == self.reason))
                and (self.ids is None or name in self.ids)
                and (self.where is None or self.where(item))
            ):
                yield index, name


@dataclass(frozen=True)
class Retry:
    """A retry that is under way or was killed: of which `stages`, with which run options, and by
    key the publications of the last one that it is to replace."""

    stages: Sequence[str]
    choice: Mapping[str, Any]
    files: Mapping[str, str | None]

    @classmethod
    def killed(cls, task: Task) -> Self | None:
        """The one that has not ended, of what is left to do; None when there is none, or the task
        has its stage no more. InputError when its file is damaged."""
        path = task.layout.retry_path
        try:
            found = cls(**orjson.loads(path.read_bytes()))
            stage = next((each for each in task.stages if each.name == found.stages[-1]), None)
            noted = [*found.files.items()]
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, AttributeError, IndexError):
            raise InputError(f"{path}: not what a retry notes; delete it to go on") from None
        if stage is None:
            return None
        made = ((key, stage.latest(key), published) for key, published in noted)
        left = {key: now.published for key, now, then in made if now and now.published == then}
        return replace(found, files=left) if left else None

    def begin(self, task: Task) -> None:
        task.layout.retry_path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(task.layout.retry_path, orjson.dumps(asdict(self)))

    @staticmethod
    def end(task: Task) -> None:
        task.layout.retry_path.unlink(missing_ok=True)


def standing(
    stage: AskingStage, key: str, source: Source, run: Run, journal: Journal
) -> Standing | None:
    """None when nothing does. What an earlier run was told to ask anew, and did not come to
    publish, goes on. SetupError when the options contradict each other, InputError when rows are
    chosen of a result that is out of date."""
    if run.fresh:
        if run.choice:
            fix = "leave out fresh, or else again, ids, where and reason"
            raise SetupError([Problem("options", "fresh", "asks all rows again", fix=fix)])
        return None
    choice = run.choice or journal.choice or {}
    stands, made = None, stage.latest(key, rejected=True)
    if wanted := Wanted.of(choice):
        if made is not None and _is_current(stage, made, source):
            stands = _chosen(stage, Published(stage, key, made), wanted)
        elif made is not None and run.choice:
            raise InputError(f"its {stage.name} are out of date; {MAKE_ANEW}")
    elif choice.get("again"):
        stands = Standing(settled=False)
    elif key in run.untold and (own := stage.accepted(key)) and _is_current(stage, own, source):
        stands = Standing()
    if run.choice and made is not None and journal.choice != run.choice:
        journal.choose(run.choice)
    return _acceptable(stage, key, source) if stands is None and not run.choice else stands


def _chosen(stage: AskingStage, file: Published, wanted: Wanted) -> Standing:
    """A kill between a new output and its manifest leaves none to choose from: every reply that
    the output is made of is in the journal, and nothing is asked anew."""
    try:
        anew = {index for index, _ in wanted.rows(file)}
        return Standing(_failed(file.place, but=anew), anew)
    except InputError:
        return Standing()


def out_of_date(stage: AskingStage, files: Sequence[Published], choice: Any) -> list[str]:
    """The names of those that would be made otherwise now, or whose input is gone; as far as that
    is known without reading inputs. Where no rows are chosen, input may have changed."""
    first, version, keys = stage.task.stages[0], stage.version, [file.key for file in files]
    is_chosen = "again" not in choice
    has_inputs = is_chosen and first is not stage and first.keys is stage.keys
    changed = first.outdated(keys) if has_inputs else set[str]()

    def is_old(file: Published) -> bool:
        made, before = file.manifest, stage.before.accepted(file.key)
        is_same = before is not None and stage.before.digest_of(before) == made.input.digest
        return (is_chosen and not is_same) or made.detail.get("made_by") not in (None, version)

    return [file.name for file in files if file.key in changed or is_old(file)]


def _acceptable(stage: AskingStage, key: str, source: Source) -> Standing | None:
    """The failures of a rejected result that the task accepts now, if it is still what would be
    made: nothing is asked again for it. One that is damaged or gone counts as not there."""
    made = read_manifest(stage.manifest_path(key, rejected=True))
    if made is None or made.failed > made.rows * stage.spec.task.max_failure_rate:
        return None
    if not _is_current(stage, made, source) or made.output is None:
        return None
    place = stage.result(made)
    is_sound = find_file(place) is not None and file_digest(place) == made.output_digest
    return Standing(_failed(place)) if is_sound else None


def _is_current(stage: AskingStage, made: Manifest, source: Source) -> bool:
    """Whether the rows of a result are those that would be made now."""
    return (
        made.detail.get("made_by") == stage.version
        and made.input.digest == source.parts[0].digest
        and made.rows == source.rows_read * stage.samples
    )


def _failed(output: Place, but: Set[int] = frozenset()) -> dict[int, Unanswered]:
    """Of a file of scores or responses."""
    return {
        index: Unanswered(
            Failure(Reason(row["api_fail_reason"]), row["api_fail_detail"]),
            row["api_request_key"],
            row["api_attempts"],
            row["api_endpoint"],
        )
        for index, row in enumerate(read_rows(output))
        if isinstance(row, dict) and row["api_status"] == "error" and index not in but
    }
