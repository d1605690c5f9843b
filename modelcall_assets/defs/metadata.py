"""Reports as Dagster metadata: what people look at in the UI."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import dagster as dg
import orjson
import pyarrow as pa

from modelcall_assets.steps.chatml import ChatmlReport
from modelcall_assets.steps.merged import MergeReport
from modelcall_assets.steps.preprocess import PreprocessReport
from modelcall_assets.steps.raw import RawReport
from modelcall_assets.steps.score_report import HISTOGRAM_VALUES, ScoreReport
from modelcall_assets.steps.split import SplitReport
from modelcall_assets.storage.places import Place
from modelcall_assets.transforms.transcript import markdown

_CELL = 160
_TURN = 600
_CONVERSATIONS = 3
_BAR = 24
_MEMBERS = 50


def raw_metadata(report: RawReport) -> dict[str, Any]:
    return {
        "dagster/row_count": report.rows,
        "dagster/column_schema": _columns(report.schema),
        "format": ", ".join(report.formats),
        "bytes": sum(member["size"] for member in report.members),
        "bad_lines": report.bad_lines,
        "first_bad_line": report.first_bad or "none",
        "duplicate_ids": report.duplicate_ids,
        "sample": _table(report.sample),
        **(_members(report.members) if len(report.members) > 1 else {}),
    }


def preprocessed_metadata(report: PreprocessReport, output: Place) -> dict[str, Any]:
    return {
        "dagster/row_count": report.rows_out,
        "dagster/column_schema": _columns(report.schema),
        "rows_in": report.rows_in,
        "dropped": sum(report.dropped.values()),
        "dropped_by_rule": _counts("rule", report.dropped),
        "failed": report.failed,
        **({"removed_by_kind": _counts("kind", report.removed)} if report.removed else {}),
        **_problems(report),
        **({"warnings": report.warnings} if report.warnings else {}),
        "output": dg.MetadataValue.path(str(output)),
        "sample": _table(report.sample),
    }


def _problems(report: PreprocessReport) -> dict[str, Any]:
    if not report.problem_rows:
        return {}
    shown = "\n".join(f"- {problem}" for problem in report.problems)
    return {"rows_with_problems": report.problem_rows, "problems": dg.MetadataValue.md(shown)}


def split_metadata(report: SplitReport) -> dict[str, Any]:
    return {
        "dagster/row_count": report.rows,
        "bytes": report.size,
        **_members(report.members),
    }


def _members(members: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The first ones: a partition may have very many."""
    shown = [
        {"file": each.get("name") or each["uri"], "rows": each["rows"], "bytes": each["size"]}
        for each in members[:_MEMBERS]
    ]
    return {"files": len(members), "members": _table(shown)}


def chatml_metadata(report: ChatmlReport, output: Place) -> dict[str, Any]:
    failures = [asdict(failure) for failure in report.first_failures]
    return {
        "dagster/row_count": report.rows_out,
        "rows_in": report.rows_in,
        "dropped_by_rule": _counts("rule", report.dropped),
        "failed": report.failed,
        "first_failures": _table(failures) if failures else dg.MetadataValue.md("none"),
        "messages_per_row": _histogram("messages", report.turns),
        "output": dg.MetadataValue.path(str(output)),
        "sample": _transcripts(report.sample),
    }


def merged_metadata(report: MergeReport, output: Place) -> dict[str, Any]:
    return {
        "dagster/row_count": report.rows,
        "blank_lines": report.blank,
        "invalid_lines": report.invalid,
        "duplicates": report.duplicates,
        "members": _table([asdict(member) for member in report.members]),
        "output": dg.MetadataValue.path(str(output)),
        "sample": _transcripts(report.sample),
    }


def scores_metadata(report: ScoreReport, output: Place) -> dict[str, Any]:
    histograms = {
        f"histogram_{key}": _histogram(key, counts)
        for key, counts in report.histograms.items()
        if len(counts) <= HISTOGRAM_VALUES
    }
    return {
        "dagster/row_count": report.rows,
        "ok": report.ok,
        "failed": report.failed,
        "failure_rate": round(report.failure_rate, 6),
        "failures_by_reason": _counts("reason", report.failures_by_reason()),
        "requests_sent": report.requests,
        "answered_from_journal": report.replayed,
        "prompt_tokens": report.usage.prompt_tokens,
        "completion_tokens": report.usage.completion_tokens,
        "cost_usd": "unknown" if report.cost_usd is None else report.cost_usd,
        "latency_ms_median": _or_unknown(report.latency_ms(0.5)),
        "latency_ms_p95": _or_unknown(report.latency_ms(0.95)),
        **({"damaged_journal_lines": report.damaged} if report.damaged else {}),
        "output": dg.MetadataValue.path(str(output)),
        **({"warnings": report.warnings} if report.warnings else {}),
        **histograms,
        "sample": _shown(report.sample),
    }


def _shown(sample: Sequence[Mapping[str, Any]]) -> dg.MarkdownMetadataValue:
    """Conversations are read, ratings compared."""
    return _transcripts(sample) if sample and "final_messages" in sample[0] else _table(sample)


def _transcripts(sample: Sequence[Mapping[str, Any]]) -> dg.MarkdownMetadataValue:
    texts = [markdown(dict(row), most_chars=_TURN) for row in sample[:_CONVERSATIONS]]
    return dg.MetadataValue.md("\n\n---\n\n".join(texts) or "no rows")


def _or_unknown(value: int | None) -> int | str:
    return "unknown" if value is None else value


def _columns(schema: pa.Schema) -> dg.TableSchema:
    return dg.TableSchema([dg.TableColumn(field.name, str(field.type)) for field in schema])


def _counts(what: str, counts: Mapping[str, int]) -> dg.MarkdownMetadataValue:
    rows = [{what: name, "rows": count} for name, count in counts.items()]
    return _table(rows) if rows else dg.MetadataValue.md("none")


def _histogram(key: str, counts: Mapping[Any, int]) -> dg.MarkdownMetadataValue:
    most = max(counts.values(), default=0)
    rows = [
        {key: value, "rows": count, "": "█" * max(1, round(_BAR * count / most))}
        for value, count in sorted(counts.items())
    ]
    return _table(rows)


def _table(rows: Sequence[Mapping[str, Any]]) -> dg.MarkdownMetadataValue:
    """A Markdown table; long cells are cut, line breaks and bars made harmless."""
    if not rows:
        return dg.MetadataValue.md("no rows")
    names = list(rows[0])
    lines = [
        names,
        ["---"] * len(names),
        *([_cell(row.get(name)) for name in names] for row in rows),
    ]
    return dg.MetadataValue.md("\n".join(f"| {' | '.join(cells)} |" for cells in lines))


def _cell(value: Any) -> str:
    if value is None:
        return ""
    text = value if isinstance(value, str) else orjson.dumps(value, default=str).decode()
    text = " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
    return text if len(text) <= _CELL else text[:_CELL] + "…"
