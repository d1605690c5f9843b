"""What became of the rows of a partition, while it is made and afterwards: its manifest, its
metadata and its check are functions of one object."""

from __future__ import annotations

import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

import pyarrow as pa

from modelcall_assets.records.outcome import Failure, Outcome, Row, count_of, short
from modelcall_assets.storage.publishing import InputFingerprint, Manifest
from modelcall_assets.storage.rows import sample_row
from modelcall_assets.storage.values import readable_schema, schema_to_json

if TYPE_CHECKING:
    from modelcall_assets.llm import Engine


@dataclass
class Tally:
    """Live counts of a stage over the files of a run. `replayed` rows were answered from the
    journal."""

    stage: str = ""
    rows: int = 0
    ok: int = 0
    failed: int = 0
    replayed: int = 0
    requests: int = 0
    cost_usd: float | None = 0.0
    reasons: Counter[str] = field(default_factory=Counter[str])
    began: tuple[float, int, int] = field(default_factory=lambda: (time.monotonic(), 0, 0))
    """When the rates begin, with what was called and sent by then."""
    warnings: list[str] = field(default_factory=list[str])
    """What the user has to know of the files."""
    engine: Engine | None = None
    """Of a stage that asks a model."""
    is_stopped: bool = False
    """Whether the run is to end; a task with a model stops its engine instead."""

    def stop(self) -> None:
        self.is_stopped = True

    def count(self, outcome: Outcome) -> None:
        if isinstance(outcome, Failure):
            self.failed += 1
            self.reasons[outcome.reason] += 1
        else:
            self.ok += 1

    @property
    def done(self) -> int:
        return self.ok + self.failed

    @property
    def called(self) -> int:
        return self.done - self.replayed


@dataclass(frozen=True)
class Watcher:
    """Whoever wants to see the tally after each of the `pauses`, in seconds, the last of them again
    and again, and once at the end."""

    show: Callable[[Tally], None]
    pauses: Sequence[float] = (2.0, 3.0, 5.0, 20.0, 30.0)


DROPPED = "dropped_by_rule"
"""In the detail of a manifest."""
MOST_VALUES = 500
LISTED = 10
SAMPLE_ROWS = 6
SHOWN_CHARS = 200
SHOWN_DUPLICATES = 5
_BAR = 24


class Distribution:
    """Of numbers: how many rows have each, rounded to three digits and, from 500 different ones on,
    to two; and their sum, which is exact. Those of several files are added."""

    def __init__(self, counts: Mapping[Any, int] | None = None, total: float | None = None):
        self.counts = Counter[float](counts or {})
        exact = sum(value * rows for value, rows in self.counts.items())
        self.sum = exact if total is None else total
        self._digits = 3

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Self:
        """From its `plain` form."""
        return cls(dict(plain["values"]), plain["sum"])

    @property
    def plain(self) -> dict[str, Any]:
        """As a manifest has it."""
        return {"sum": self.sum, "values": [*self.counts.items()]}

    @property
    def rows(self) -> int:
        return self.counts.total()

    def add(self, value: float) -> None:
        self.sum += value
        self.counts[_rounded(value, self._digits)] += 1
        self._coarsen()

    def join(self, other: Self) -> None:
        self.sum += other.sum
        self.counts.update(other.counts)
        self._coarsen()

    @property
    def mean(self) -> float:
        return self.sum / self.rows

    def quantile(self, share: float) -> float:
        """The value that so large a share of the rows does not exceed; half of the way to the next
        one where the share ends between them."""
        left, ordered = share * self.rows, sorted(self.counts)
        for at, value in enumerate(ordered[:-1]):
            left -= self.counts[value]
            if left <= 0:
                return value if left else (value + ordered[at + 1]) / 2
        return ordered[-1]

    def numbers(self, name: str) -> dict[str, float]:
        """What is shown of a field of that name."""
        return {f"{name}_mean": self.mean, f"{name}_median": self.quantile(0.5)}

    def bins(self, most: int = 20) -> list[tuple[str, int]]:
        """Of values or of ranges of one width, in ascending order."""
        ordered = sorted(self.counts.items())
        if len(ordered) <= most:
            return [(f"{value:g}", rows) for value, rows in ordered]
        low, width = ordered[0][0], (ordered[-1][0] - ordered[0][0]) / most
        found = [0] * most
        for value, rows in ordered:
            found[min(most - 1, int((value - low) / width))] += rows
        ends = [low + width * at for at in range(most + 1)]
        return [(f"{ends[at]:.3g} – {ends[at + 1]:.3g}", rows) for at, rows in enumerate(found)]

    def bars(self, name: str) -> list[Row]:
        """The bins as a table."""
        bins = self.bins()
        most = max((rows for _, rows in bins), default=0)
        return [{name: at, "rows": rows, "": "█" * ceil(_BAR * rows / most)} for at, rows in bins]

    def _coarsen(self) -> None:
        if len(self.counts) > MOST_VALUES:
            self._digits, values = 2, self.counts
            self.counts = Counter[float]()
            for value, rows in values.items():
                self.counts[_rounded(value, 2)] += rows


def _rounded(value: float, digits: int) -> float:
    is_short = isinstance(value, int) and abs(value) < 10**digits
    return value if is_short else float(f"{value:.{digits}g}")


class Example(NamedTuple):
    """`row` counts those of the partition, from 1; `where` is its record or file."""

    row: int
    where: str
    reason: str
    detail: str

    def __str__(self) -> str:
        return f"{self.detail} ({self.where}{', ' * bool(self.where)}row {self.row:,})"


class Finding(NamedTuple):
    """A row of the check's table."""

    name: str
    passed: bool
    told: str
    severity: Literal["warning", "error"] = "warning"


@dataclass
class Report:
    """`rows_in` = `rows` + all `dropped`, by rule; of the `rows`, which are in the output, those in
    `failures`, by reason, hold an error instead of a result."""

    rows_in: int = 0
    rows: int = 0
    failures: Counter[str] = field(default_factory=Counter[str])
    dropped: Counter[str] = field(default_factory=Counter[str])
    failed_rows: list[Example] = field(default_factory=list[Example])
    """The first ones."""
    examples: dict[str, Example] = field(default_factory=dict[str, Example])
    """The first of each reason."""
    duplicate_ids: int = 0
    first_duplicates: list[str] = field(default_factory=list[str])
    emptied: str = ""
    """Why no row is left, where that must be a mistake."""
    warnings: list[str] = field(default_factory=list[str])
    data_version: str = ""
    schema: pa.Schema = field(default_factory=lambda: pa.schema([]))
    moved: dict[str, str] = field(default_factory=dict[str, str])
    """Input columns that are called like ours → their names in the output."""
    sample: list[Row] = field(default_factory=list[Row])
    shows_more: bool = True
    """Whether the sample is not full yet."""
    numbers: dict[str, Any] = field(default_factory=dict[str, Any])
    """What else people want to know, by name."""
    tables: dict[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    histograms: dict[str, Distribution] = field(default_factory=dict[str, Distribution])
    detail: dict[str, Any] = field(default_factory=dict[str, Any])
    """What the manifest says to the next stage, and to the next run."""

    @property
    def failed(self) -> int:
        return self.failures.total()

    @property
    def ok(self) -> int:
        return self.rows - self.failed

    @property
    def failure_rate(self) -> float:
        return self.failed / self.rows if self.rows else float(bool(self.emptied))

    @property
    def _told(self) -> str:
        return f"{self.failed:,} of {count_of(self.rows, 'row')} failed ({self.failure_rate:.2%})"

    def fail(self, row: int, where: str, reason: str, detail: str) -> None:
        """Count a row that holds an error."""
        self.failures[reason] += 1
        if reason not in self.examples or len(self.failed_rows) < LISTED:
            failed = Example(row, where, reason, one_line(detail))
            self.examples.setdefault(reason, failed)
            self.failed_rows += [failed] if len(self.failed_rows) < LISTED else []

    def repeats(self, identity: str) -> None:
        """Count a row that has the id of another."""
        self.duplicate_ids += 1
        if len(self.first_duplicates) < SHOWN_DUPLICATES:
            self.first_duplicates.append(short(identity))

    def show(self, row: Row) -> None:
        if self.shows_more:
            self.sample.append(sample_row(row))
            self.shows_more = len(self.sample) < SAMPLE_ROWS

    def all_dropped(self, fix: str) -> str:
        """What to say when no row is left and that must be a mistake."""
        rules = ", ".join(f"{rule} {count:,}" for rule, count in self.dropped.items())
        return f"all {self.dropped.total():,} rows were dropped: {rules}; {fix}"

    def why_rejected(self, max_failure_rate: float, again: str) -> str | None:
        """When more rows failed than the task accepts; `again` is what a new run would do."""
        if self.failure_rate <= max_failure_rate:
            return None
        what = self.emptied or (
            f"{self._told}, more than max_failure_rate {max_failure_rate:.2%}: "
            f"{by_count(self.failures)}. The first: {self.failed_rows[0]}"
        )
        to = " to 1" if self.emptied else ""
        return (
            f"{what}. The result lies aside and replaces nothing; raise "
            f"max_failure_rate{to} to accept it as it is, or run the task again to {again}"
        )

    def findings(self, rejected: str | None = None) -> list[Finding]:
        """Whether the partition is complete; `rejected` says why it is not accepted."""
        dropped = self.dropped.total()
        conserved = (
            f"{count_of(self.rows_in, 'row')} in, {self.ok:,} succeeded, {self.failed:,} failed"
        )
        conserved += f", {dropped:,} dropped" if dropped else ""
        first = f"; the first: {self.failed_rows[0]}" if self.failed_rows else ""
        repeated = f"{self.duplicate_ids:,} rows repeat the id of another"
        repeated += f": {', '.join(self.first_duplicates)}" if self.first_duplicates else ""
        is_fine = not self.failed and not self.emptied
        return [
            Finding("conservation", self.rows_in == self.rows + dropped, conserved, "error"),
            Finding(
                "failed rows",
                is_fine and rejected is None,
                rejected or self.emptied or f"{self._told}{first}",
                "error" if rejected else "warning",
            ),
            Finding("unique ids", not self.duplicate_ids, repeated),
            *(Finding("warning", False, told) for told in self.warnings),
        ]

    def manifest(self, stage: str, made_of: InputFingerprint) -> Manifest:
        return Manifest(
            stage=stage,
            data_version=self.data_version,
            rows=self.rows,
            ok=self.ok,
            failed=self.failed,
            dropped=self.dropped.total(),
            failures=dict(self.failures.most_common()),
            input=made_of,
            schema=readable_schema(self.schema),
            moved=self.moved,
            detail={
                "schema": schema_to_json(self.schema),
                "numbers": {n: v for n, v in self.numbers.items() if type(v) in (int, float)},
                "examples": {
                    reason: (row.row, row.where, row.detail)
                    for reason, row in self.examples.items()
                },
                "histograms": {name: each.plain for name, each in self.histograms.items()},
                DROPPED: dict(self.dropped.most_common()),
                **self.detail,
            },
        )


def by_count(counts: Counter[str], most: int | None = None) -> str:
    """`timeout 1,203, empty 4`: the most frequent first."""
    return ", ".join(f"{name} {count:,}" for name, count in counts.most_common(most))


def counted(what: str, counts: Mapping[str, int]) -> list[Row]:
    """As a table."""
    return [{what: name, "rows": count} for name, count in counts.items()]


def last_line(error: BaseException) -> str:
    """`KeyError: 'text' (my_rules.py, line 12)`: what went wrong, and where."""
    while isinstance(error, BaseExceptionGroup):  # only says that it had some
        error = error.exceptions[0]
    told = one_line(f"{type(error).__name__}: {error}")
    frames = traceback.extract_tb(error.__traceback__)
    at = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return told + at


def one_line(detail: str) -> str:
    """The start of a detail, or the end of a traceback, where the error is."""
    told = detail.strip().splitlines()[-1] if detail.startswith("Traceback") else detail
    told = " ".join(told.split())
    return told if len(told) <= SHOWN_CHARS else f"{told[:SHOWN_CHARS]}…"
