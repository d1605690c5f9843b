"""A stage's report as Dagster shows it: the metadata of a result, and its check."""

import re
from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any

import dagster as dg
import orjson

from modelcall_assets.defs.instance import asset_key
from modelcall_assets.stages.asking import AskingStage
from modelcall_assets.stages.report import Report, counted
from modelcall_assets.stages.score_table import API_ABOUT
from modelcall_assets.stages.stage import Stage
from modelcall_assets.transforms.transcript import markdown

COMPLETE = "complete"
CHECKED = (
    "Whether a file is complete: rows in = succeeded + failed + dropped, no more failed rows than "
    "max_failure_rate allows (any is a warning), ids unique. A table says what was found."
)
_MOST_CELL = 160
"""Characters that are shown."""
_MARKS = re.compile(r"([\\`*_\[\]<>|~&])")
_BAR = 24


def definition_metadata(stage: Stage) -> dict[str, Any]:
    """Of the asset itself: its files, and what it asks within which limits."""
    spec = stage.spec
    files = {spec.file_name: "task", **{file: name for name, file in spec.files.items()}}
    references: list[Any] = [
        dg.LocalFileCodeReference(file_path=str(spec.root / file), label=f"{name}: {file}")
        for file, name in files.items()
    ]
    shown: dict[str, Any] = {
        "task": spec.name,
        "task_file": spec.file_name,
        "dagster/code_references": dg.CodeReferencesMetadataValue(code_references=references),
    }
    if isinstance(stage, AskingStage):
        told = stage.definition.items()
        shown |= {name: dg.MetadataValue.md(markdown(each)) for name, each in told}
    return shown


def metadata_of(
    stage: Stage, key: str, report: Report, rejected: str | None = None
) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "dagster/row_count": report.rows,
        "rows_in": report.rows_in,
        "ok": report.ok,
        "failed": report.failed,
        "failure_rate": round(report.failure_rate, 6),
    }
    if len(report.schema):
        columns = [
            dg.TableColumn(field.name, str(field.type), API_ABOUT.get(field.name))
            for field in report.schema
        ]
        shown["dagster/column_schema"] = dg.TableSchema(columns)
        shown |= _lineage(stage, key, report)
    shown |= _failures_of(report)
    if report.dropped:
        shown["dropped"] = report.dropped.total()
        shown["dropped_by_rule"] = _table(counted("rule", dict(report.dropped.most_common())))
    shown |= {name.removeprefix("api_"): made for name, made in stage.provenance.items()}
    for name, value in report.numbers.items():  # a sum of fractions has noise at its end
        shown[name] = float(f"{value:.10g}") if isinstance(value, float) else value
    shown |= {name: _table(rows) for name, rows in report.tables.items() if rows}
    for name, values in report.histograms.items():
        bins = values.bins()
        most = max((rows for _, rows in bins), default=0)
        bars = [
            {name: value, "rows": rows, "": "█" * ceil(_BAR * rows / most)} for value, rows in bins
        ]
        shown |= {f"histogram_{name}": _table(bars)} if bars else {}
    if report.warnings:
        shown["warnings"] = report.warnings
    if stage.suffix:  # else the rows are in the user's own file
        output = stage.output(key, rejected=rejected is not None)
        shown["output"] = dg.MetadataValue.path(str(output))
    if report.sample:
        shown["sample"] = dg.MetadataValue.md("\n\n---\n\n".join(map(markdown, report.sample)))
    return shown


def _lineage(stage: Stage, key: str, report: Report) -> dict[str, Any]:
    """Of columns that are those of the stage before, under their own name or as they were moved."""
    if stage.upstream is None or stage.gathers or (made := stage.before.accepted(key)) is None:
        return {}
    asset, came = asset_key(stage.upstream), {report.moved.get(n, n): n for n, _ in made.schema_}
    kept = (name for name in report.schema.names if name in came)
    deps = {name: [dg.TableColumnDep(asset, came[name])] for name in kept}
    return {"dagster/column_lineage": dg.TableColumnLineage(deps)} if deps else {}


def _failures_of(report: Report) -> dict[str, Any]:
    if not report.failures:
        return {}
    by_reason = counted("reason", dict(report.failures.most_common()))
    rows = [each._asdict() for each in report.failed_rows]
    tables = {"failures_by_reason": by_reason, "first_failures": rows}
    return {name: _table(rows) for name, rows in tables.items() if rows}


def check_of(report: Report, rejected: str | None = None) -> dg.AssetCheckResult:
    """Whether the partition is complete: a table with a row for each thing that is looked at, the
    worst of which gives the severity. `rejected` says why the result is not accepted."""
    findings = report.findings(rejected)
    wrong = [finding for finding in findings if not finding.passed]
    is_error = any(finding.severity == "error" for finding in wrong)
    table = [
        {"": "✓" if each.passed else "✗", "looked at": each.name, "found": each.told}
        for each in findings
    ]
    metadata = {"findings": _table(table), **_failures_of(report)}
    return dg.AssetCheckResult(
        check_name=COMPLETE,
        passed=not wrong,
        description="; ".join(finding.told for finding in wrong) or findings[0].told,
        severity=dg.AssetCheckSeverity.ERROR if is_error else dg.AssetCheckSeverity.WARN,
        metadata=metadata,
    )


def failed_check(why: str) -> dg.AssetCheckResult:
    """Of a partition of which nothing came."""
    return dg.AssetCheckResult(check_name=COMPLETE, passed=False, description=why)


def _table(rows: Sequence[Mapping[str, Any]]) -> dg.MarkdownMetadataValue:
    """A Markdown table, in which no character means anything; long cells are cut."""
    names = list(rows[0])
    cells = ([_cell(row.get(name)) for name in names] for row in rows)
    lines = [map(_cell, names), ["---"] * len(names), *cells]
    return dg.MetadataValue.md("\n".join(f"| {' | '.join(cells)} |" for cells in lines))


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    text = value if isinstance(value, str) else orjson.dumps(value, default=str).decode()
    text = " ".join(text.split())
    return _MARKS.sub(r"\\\1", text if len(text) <= _MOST_CELL else text[:_MOST_CELL] + "…")
