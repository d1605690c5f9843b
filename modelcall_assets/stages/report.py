"""What became of the rows of a partition. Its manifest, its metadata and its check are functions of
this one object."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import pyarrow as pa

from modelcall_assets.records.outcome import Row, short
from modelcall_assets.storage.manifest import InputFingerprint, Manifest
from modelcall_assets.storage.parquet import readable_schema
from modelcall_assets.storage.rows import sample_row

LISTED = 20
SAMPLE_ROWS = 5
SHOWN_CHARS = 200
SHOWN_DUPLICATES = 5


class FailedRow(NamedTuple):
    """`where` names the row for people: its record, or its file and number."""

    where: str
    reason: str
    detail: str

    def __str__(self) -> str:
        return f"{self.detail} ({self.where})"


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
    failed_rows: list[FailedRow] = field(default_factory=list[FailedRow])
    """The first ones."""
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
    numbers: dict[str, Any] = field(default_factory=dict[str, Any])
    """What else people want to know, by name."""
    tables: dict[str, Sequence[Mapping[str, Any]]] = field(
        default_factory=dict[str, Sequence[Mapping[str, Any]]]
    )
    histograms: dict[str, Counter[Any]] = field(default_factory=dict[str, Counter[Any]])
    """Value → rows."""
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

    def fail(self, where: str, reason: str, detail: str) -> None:
        """Count a row that holds an error."""
        self.failures[reason] += 1
        if len(self.failed_rows) < LISTED:
            self.failed_rows.append(FailedRow(where, reason, one_line(detail)))

    def repeats(self, identity: str) -> None:
        """Count a row that has the id of another."""
        self.duplicate_ids += 1
        if len(self.first_duplicates) < SHOWN_DUPLICATES:
            self.first_duplicates.append(short(identity))

    @property
    def shows_more(self) -> bool:
        return len(self.sample) < SAMPLE_ROWS

    def show(self, row: Row) -> None:
        if self.shows_more:
            self.sample.append(sample_row(row))

    def all_dropped(self, fix: str) -> str:
        """What to say when no row is left and that must be a mistake."""
        rules = ", ".join(f"{rule} {count:,}" for rule, count in self.dropped.items())
        return f"all {self.dropped.total():,} rows were dropped: {rules}; {fix}"

    def why_rejected(self, max_failure_rate: float, again: str) -> str | None:
        """When more rows failed than the task accepts; `again` is what a new run would do."""
        if self.failure_rate <= max_failure_rate:
            return None
        reasons = ", ".join(f"{reason} {count}" for reason, count in self.failures.most_common())
        what = self.emptied or (
            f"{self.failed} of {self.rows} rows failed ({self.failure_rate:.2%}), more than "
            f"max_failure_rate {max_failure_rate:.2%}: {reasons}. The first: {self.failed_rows[0]}"
        )
        to = " to 1" if self.emptied else ""
        return (
            f"{what}. The result lies aside and replaces nothing; raise "
            f"max_failure_rate{to} to accept it as it is, or materialise again to {again}"
        )

    def findings(self, rejected: str | None = None) -> list[Finding]:
        """Whether the partition is complete; `rejected` says why it is not accepted."""
        dropped = self.dropped.total()
        conserved = f"{self.rows_in} rows in, {self.ok} succeeded, {self.failed} failed"
        conserved += f", {dropped} dropped" if dropped else ""
        failed = f"{self.failed} of {self.rows} rows failed ({self.failure_rate:.2%})"
        failed += f"; the first: {self.failed_rows[0]}" if self.failed_rows else ""
        repeated = f"{self.duplicate_ids} rows repeat the id of another"
        repeated += f": {', '.join(self.first_duplicates)}" if self.first_duplicates else ""
        is_fine = not self.failed and not self.emptied
        return [
            Finding("conservation", self.rows_in == self.rows + dropped, conserved, "error"),
            Finding(
                "failed rows",
                is_fine and rejected is None,
                rejected or self.emptied or failed,
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
            detail=self.detail,
        )


def counted(what: str, counts: Mapping[str, int]) -> list[Row]:
    """As a table."""
    return [{what: name, "rows": count} for name, count in counts.items()]


def one_line(detail: str) -> str:
    """The start of a detail, or the end of a traceback, where the error is."""
    if detail.startswith("Traceback"):
        return " ".join(detail.strip().splitlines()[-1].split())[:SHOWN_CHARS]
    return " ".join(detail.split())[:SHOWN_CHARS]
