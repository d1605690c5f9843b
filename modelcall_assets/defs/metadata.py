"""A report as Dagster shows it: metadata, and the one check."""

from collections.abc import Mapping, Sequence
from typing import Any

import dagster as dg
import orjson
import pyarrow as pa

from modelcall_assets.stages.report import Report, counted
from modelcall_assets.storage.places import Place
from modelcall_assets.transforms.transcript import markdown, turns_of

COMPLETE = "complete"
"""The check that every stage has."""
_CELL = 160
_TURN = 600
_CONVERSATIONS = 3
_BAR = 24
_ERROR, _WARN = dg.AssetCheckSeverity.ERROR, dg.AssetCheckSeverity.WARN


def metadata_of(report: Report, output: Place | None) -> dict[str, Any]:
    """`output` is where the rows are, where that is not the user's own file."""
    dropped, failures = report.dropped, report.failures
    shown: dict[str, Any] = {
        "dagster/row_count": report.rows,
        "rows_in": report.rows_in,
        "ok": report.ok,
        "failed": report.failed,
        "failure_rate": round(report.failure_rate, 6),
    }
    if len(report.schema):
        shown["dagster/column_schema"] = _columns(report.schema)
    if failures:
        shown["failures_by_reason"] = _table(counted("reason", dict(failures.most_common())))
        shown["first_failures"] = _table([each._asdict() for each in report.failed_rows])
    if dropped:
        shown["dropped"] = dropped.total()
        shown["dropped_by_rule"] = _table(counted("rule", dict(dropped.most_common())))
    shown |= report.numbers
    shown |= {name: _table(rows) for name, rows in report.tables.items()}
    for key, counts in report.histograms.items():
        shown[f"histogram_{key}"] = _histogram(key, counts)
    if report.warnings:
        shown["warnings"] = report.warnings
    if output is not None:
        shown["output"] = dg.MetadataValue.path(str(output))
    shown["sample"] = _sample(report.sample)
    return shown


def check_of(report: Report, rejected: str | None) -> dg.AssetCheckResult:
    """Whether the partition is complete: a table with a row for each thing that is looked at, the
    worst of which gives the severity. `rejected` says why the result is not accepted."""
    findings = report.findings(rejected)
    wrong = [finding for finding in findings if not finding.passed]
    is_error = any(finding.severity == "error" for finding in wrong)
    table = [
        {"": "✓" if each.passed else "✗", "looked at": each.name, "found": each.told}
        for each in findings
    ]
    return dg.AssetCheckResult(
        check_name=COMPLETE,
        passed=not wrong,
        description="; ".join(finding.told for finding in wrong) or findings[0].told,
        severity=_ERROR if is_error else _WARN,
        metadata={"findings": _table(table)},
    )


def _sample(rows: Sequence[Mapping[str, Any]]) -> dg.MarkdownMetadataValue:
    """Conversations are read, other rows compared."""
    if not rows or not turns_of(dict(rows[0])):
        return _table(rows)
    texts = [markdown(dict(row), most_chars=_TURN) for row in rows[:_CONVERSATIONS]]
    return dg.MetadataValue.md("\n\n---\n\n".join(texts))


def _columns(schema: pa.Schema) -> dg.TableSchema:
    return dg.TableSchema([dg.TableColumn(field.name, str(field.type)) for field in schema])


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
