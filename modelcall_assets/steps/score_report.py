"""What was published for one file, in numbers."""

from __future__ import annotations

import math
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from modelcall_assets.llm.answer import Usage
from modelcall_assets.records.record import Row, short

Prices = tuple[float | None, float | None]
"""US dollars per million input and output tokens."""

HISTOGRAM_VALUES = 50
"""A field with more distinct numbers than this has no histogram."""
SHOWN_CHARS = 200


@dataclass
class ScoreReport:
    """`requests` were sent in this run; `replayed` rows were answered from the journal."""

    rows: int = 0
    ok: int = 0
    failures: Counter[str] = field(default_factory=Counter[str])
    first_failure: str = ""
    """Why the first of them failed, and which row it is."""
    usage: Usage = field(default_factory=Usage)
    cost_usd: float | None = 0.0
    requests: int = 0
    replayed: int = 0
    damaged: dict[str, int] = field(default_factory=dict[str, int])
    """Lines of the journal that are, by segment."""
    warnings: list[str] = field(default_factory=list[str])
    """What the call phase met that nobody asked for."""
    latencies_ms: array[int] = field(default_factory=lambda: array("I"))
    histograms: defaultdict[str, Counter[float]] = field(
        default_factory=lambda: defaultdict(Counter)
    )
    sample: list[Row] = field(default_factory=list[Row])
    data_version: str = ""
    schema: pa.Schema = field(default_factory=lambda: pa.schema([]))
    """Of the published file, as declared."""
    moved: dict[str, str] = field(default_factory=dict[str, str])
    """Input columns that are called like ours → their names in that file."""

    @property
    def failed(self) -> int:
        return self.rows - self.ok

    @property
    def failure_rate(self) -> float:
        return self.failed / self.rows if self.rows else 0.0

    @property
    def emptied(self) -> str:
        """Each row of the source is in the result."""
        return ""

    def count(self, row: Mapping[str, Any], keys: Iterable[str]) -> None:
        self.rows += 1
        if row["api_status"] != "success":
            self.failures[row["api_fail_reason"]] += 1
            self.first_failure = self.first_failure or (
                f"{one_line(row['api_fail_detail'])} (record {short(row['api_record_id'])})"
            )
            return
        self.ok += 1
        if (latency := row.get("api_latency_ms")) is not None:
            self.latencies_ms.append(latency)
        for key in keys:
            value = row.get(key)
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if math.isfinite(value):
                self.histograms[key][value] += 1

    def add_usage(self, usage: Usage, cost: float | None) -> None:
        """What one row used, and what that cost; None is unknown."""
        self.usage += usage
        self.cost_usd = None if cost is None or self.cost_usd is None else self.cost_usd + cost

    def latency_ms(self, share: float) -> int | None:
        """The latency below which `share` of the answers came (0.5 = the median)."""
        ordered = sorted(self.latencies_ms)
        return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else None

    def failures_by_reason(self) -> dict[str, int]:
        return dict(self.failures.most_common())


def one_line(detail: str) -> str:
    """The start of a detail, or the end of a traceback, where the error is."""
    if detail.startswith("Traceback"):
        return " ".join(detail.strip().splitlines()[-1].split())[:SHOWN_CHARS]
    return " ".join(detail.split())[:SHOWN_CHARS]
