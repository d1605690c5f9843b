"""What of a result stands when its partition is made again: the rows that are not asked about, and
those that are asked anew though they have an answer."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from modelcall_assets.errors import InputError, Problem, SetupError
from modelcall_assets.records.data_files import decode_key
from modelcall_assets.records.outcome import Failure, Reason
from modelcall_assets.stages.published import Published, failure_of, identity
from modelcall_assets.stages.report import Run
from modelcall_assets.stages.source import Source
from modelcall_assets.storage.files import file_digest
from modelcall_assets.storage.places import Place, is_absent
from modelcall_assets.storage.publishing import Manifest, read_manifest
from modelcall_assets.storage.rows import read_rows
from modelcall_assets.transforms.values import Where

if TYPE_CHECKING:
    from modelcall_assets.stages.asking import AskingStage


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
    have an answer. What else was published stands too."""

    failed: Mapping[int, Unanswered]
    anew: Set[int] = frozenset()


@dataclass(frozen=True)
class Wanted:
    """Which rows of results are asked again: those for which all holds that is given."""

    ids: Collection[str] = ()
    where: Where | None = None
    reason: str = ""

    @classmethod
    def of(cls, run: Run) -> Self:
        """SetupError when its options say nothing."""
        if run.reason and run.reason not in [*Reason]:
            expected = ", ".join(Reason)
            raise SetupError([Problem("options", "reason", "unknown", expected, run.reason)])
        try:
            where = Where.parse(run.where) if run.where else None
        except ValueError as error:
            expected = "'column op value', joined by 'and'"
            raise SetupError([Problem("options", "where", str(error), expected)]) from None
        return cls({*run.ids}, where, run.reason)

    def __bool__(self) -> bool:
        return bool(self.ids or self.where or self.reason)

    def count(self, file: Published) -> int:
        """How many rows of a file; of no choice those that failed."""
        return sum(1 for _ in self.rows(file)) if self else file.manifest.failed

    def rows(self, file: Published) -> Iterator[int]:
        """Their indexes. InputError when the file is not as it was published."""
        if self.reason and not file.manifest.failures.get(self.reason):
            return
        file.check()
        for index, item in file.items():
            failure = failure_of(file, item)
            if (
                (not self.reason or (failure is not None and failure.reason == self.reason))
                and (not self.ids or identity(file, index, item) in self.ids)
                and (not self.where or (isinstance(item, dict) and self.where(item)))
            ):
                yield index


def standing(stage: AskingStage, key: str, source: Source, run: Run) -> Standing | None:
    """None when nothing does: failed rows are asked again. InputError when rows are chosen of a
    result that is out of date."""
    if wanted := Wanted.of(run):
        made = stage.latest(key, rejected=True)
        if made is None:
            return None
        if not _is_current(stage, made, source):
            fix = "run the task, which makes it anew, or leave out ids, where and reason"
            raise InputError(f"{decode_key(key)}: its {stage.name} are out of date; {fix}")
        anew = {*wanted.rows(Published(stage, key, made))}
        return Standing(_failed(stage.result(made), but=anew), anew)
    return None if run.fresh or run.again else _acceptable(stage, key, source)


def _acceptable(stage: AskingStage, key: str, source: Source) -> Standing | None:
    """The failures of a rejected result that the task accepts now, if it is still what would be
    made: nothing is asked again for it. One that is damaged or gone counts as not there."""
    made = read_manifest(stage.manifest_path(key, rejected=True))
    if made is None or made.failed > made.rows * stage.spec.task.max_failure_rate:
        return None
    if not _is_current(stage, made, source) or made.output is None:
        return None
    try:
        is_sound = file_digest(stage.result(made)) == made.output_digest
    except InputError as error:
        if is_absent(error):
            return None
        raise
    return Standing(_failed(stage.result(made))) if is_sound else None


def _is_current(stage: AskingStage, made: Manifest, source: Source) -> bool:
    """Whether the rows of a result are those that would be made now."""
    return (
        made.detail.get("made_by") == stage.version()
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
