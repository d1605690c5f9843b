"""What a running stage tells whoever is watching."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from modelcall_assets.records.outcome import Failure, Outcome


@dataclass
class Tally:
    """Live counts of a stage over the files of a run. `replayed` rows were answered from the
    journal."""

    stage: str = ""
    asks_model: bool = True
    rows: int = 0
    ok: int = 0
    failed: int = 0
    replayed: int = 0
    requests: int = 0
    cost_usd: float | None = 0.0
    reasons: Counter[str] = field(default_factory=Counter[str])
    started_at: float = field(default_factory=time.monotonic)
    warnings: list[str] = field(default_factory=list[str])
    """What the user has to know of the files."""
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
    def rows_per_second(self) -> float:
        """Of the rows that were called, not of those replayed."""
        elapsed = time.monotonic() - self.started_at
        return max(0, self.done - self.replayed) / elapsed if elapsed > 0 else 0.0

    @property
    def eta_s(self) -> float | None:
        rate = self.rows_per_second
        return (self.rows - self.done) / rate if rate > 0 else None

    def line(self) -> str:
        """`scores: 1,200 of 5,000 rows, 3 failed, 81 rows/s, 0.4200 USD, 47 s left`."""
        return f"{self.stage}: {self.done:,} of {self.rows:,} rows, {self.detail()}"

    def detail(self) -> str:
        parts = [f"{self.failed:,} failed", f"{self.rows_per_second:,.0f} rows/s"]
        if self.asks_model:
            parts.append("cost unknown" if self.cost_usd is None else f"{self.cost_usd:.4f} USD")
        if self.eta_s is not None and self.done < self.rows:
            parts.append(f"{self.eta_s:.0f} s left")
        return ", ".join(parts)


@dataclass(frozen=True)
class Watcher:
    """Whoever wants to see the tally every `every_s` seconds, and once at the end."""

    show: Callable[[Tally], None]
    every_s: float = 30.0
