"""What is told of each row that is answered or rated: status and provenance, and the totals."""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from modelcall_assets.journal.journal import Entry
from modelcall_assets.llm.answer import Usage
from modelcall_assets.llm.dialogue import Finished
from modelcall_assets.records.outcome import Failure, Outcome, short
from modelcall_assets.stages.replay import Unanswered
from modelcall_assets.stages.report import Report
from modelcall_assets.stages.seen import Seen

VOLATILE_COLUMNS = (
    "api_attempts",
    "api_endpoint",
    "api_latency_ms",
    "api_request_id",
    "api_answered_at",
)
"""What may differ between two undisturbed runs that got the same answers."""

API_FIELDS: tuple[tuple[str, pa.DataType], ...] = (
    ("api_record_id", pa.string()),
    ("api_status", pa.string()),
    ("api_fail_reason", pa.string()),
    ("api_fail_detail", pa.string()),
    ("api_return", pa.string()),
    ("api_reasoning", pa.string()),
    ("api_finish_reason", pa.string()),
    ("api_request_key", pa.string()),
    ("api_model", pa.string()),
    ("api_prompt", pa.string()),
    ("api_turns", pa.int32()),
    ("api_prompt_tokens", pa.int64()),
    ("api_completion_tokens", pa.int64()),
    ("api_cost_usd", pa.float64()),
    ("api_attempts", pa.int32()),
    ("api_endpoint", pa.string()),
    ("api_latency_ms", pa.int64()),
    ("api_request_id", pa.string()),
    ("api_answered_at", pa.string()),
)
ApiRow = dict[str, Any]

ADOPTED = "adopted"
"""The endpoint of an answer that was taken over: see `stages/adopt.py`."""
UNKNOWN_OF_ADOPTED = dict.fromkeys(
    ("api_finish_reason", "api_model", "api_prompt", "api_answered_at", "api_latency_ms")
)


def answered_row(finished: Finished, entries: Sequence[Entry], prices: tuple[Any, Any]) -> ApiRow:
    """Status, values and provenance of a record that has a reply. One that was taken over from
    another request has no attempts and cost nothing."""
    answer, last = finished.answer, entries[-1]
    known = finished.usage if finished.usage.known and answer else None
    attempts = sum(entry.attempts for entry in entries)
    cost = finished.usage.cost(*prices) if attempts else 0.0
    return {
        **outcome_row(finished.outcome),
        "api_return": answer.text if answer else last.body.decode("utf-8", "replace"),
        "api_reasoning": answer.reasoning if answer else None,
        "tool_calls": answer.tool_calls if answer else None,
        "api_finish_reason": answer.finish_reason if answer else None,
        "api_request_key": last.address.key,
        "api_turns": len(entries),
        "api_prompt_tokens": known.prompt_tokens if known else None,
        "api_completion_tokens": known.completion_tokens if known else None,
        "api_cost_usd": cost,
        "api_attempts": attempts,
        "api_endpoint": last.endpoint,
        "api_latency_ms": sum(entry.latency_ms for entry in entries),
        "api_request_id": answer.request_id if answer else None,
        "api_answered_at": last.answered_at,
    }


def unanswered_row(unanswered: Unanswered) -> ApiRow:
    """Status and reason of a record without a reply that counts."""
    return {
        **outcome_row(unanswered.failure),
        "api_request_key": unanswered.key,
        "api_turns": 0,
        "api_attempts": unanswered.attempts,
        "api_endpoint": unanswered.endpoint,
    }


def outcome_row(outcome: Outcome) -> ApiRow:
    """Status, reason and values."""
    if isinstance(outcome, Failure):
        return {
            "api_status": "error",
            "api_fail_reason": str(outcome.reason),
            "api_fail_detail": outcome.detail,
        }
    return {"api_status": "success", **outcome.values}


HISTOGRAM_VALUES = 50
"""A field with more distinct numbers than this has no histogram."""


@dataclass
class AnswerTotals:
    """Counts a report's rows as they are written."""

    report: Report = field(default_factory=Report)
    usage: Usage = field(default_factory=Usage)
    cost_usd: float | None = 0.0
    latencies_ms: array[int] = field(default_factory=lambda: array("I"))
    ids: Seen = field(default_factory=Seen)

    def count(self, row: ApiRow, usage: Usage, sample: int | None, keys: Iterable[str]) -> None:
        """`sample` tells several answers to one record apart; numbers under `keys` are shown as
        histograms."""
        report, identity = self.report, row["api_record_id"]
        report.rows += 1
        self.usage += usage
        cost: float | None = row.get("api_cost_usd", 0.0)
        if cost is None or self.cost_usd is None:
            self.cost_usd = None
        else:
            self.cost_usd += cost
        if not self.ids.is_new(identity if sample is None else f"{identity}#{sample}"):
            report.repeats(identity)
        if row["api_status"] != "success":
            record = f"record {short(identity)}"
            report.fail(record, row["api_fail_reason"], row["api_fail_detail"])
            return
        if (latency := row.get("api_latency_ms")) is not None:
            self.latencies_ms.append(latency)
        for key in keys:
            value = row.get(key)
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if math.isfinite(value):
                report.histograms.setdefault(key, Counter())[value] += 1

    def finish(self, rows_in: int) -> Report:
        """`rows_in` are those that there should be."""
        report = self.report
        report.rows_in = rows_in
        shown = report.histograms.items()
        report.histograms = {
            key: counts for key, counts in shown if len(counts) <= HISTOGRAM_VALUES
        }
        return report

    def numbers(self) -> dict[str, Any]:
        """Of a stage that asks a model."""
        ordered = sorted(self.latencies_ms)

        def latency(share: float) -> int | str:
            at = min(len(ordered) - 1, int(len(ordered) * share))
            return ordered[at] if ordered else "unknown"

        return {
            "prompt_tokens": self.usage.prompt_tokens,
            "completion_tokens": self.usage.completion_tokens,
            "cost_usd": "unknown" if self.cost_usd is None else self.cost_usd,
            "latency_ms_median": latency(0.5),
            "latency_ms_p95": latency(0.95),
        }
