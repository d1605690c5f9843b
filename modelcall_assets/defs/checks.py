"""Asset checks, one result per partition."""

import dagster as dg

from modelcall_assets.steps.audit import ScoresAudit
from modelcall_assets.steps.chatml import ChatmlReport
from modelcall_assets.steps.merged import MergeReport
from modelcall_assets.steps.preprocess import PreprocessReport
from modelcall_assets.steps.raw import RawReport
from modelcall_assets.steps.score_report import ScoreReport
from modelcall_assets.steps.task_steps import Judged

RAW_CHECKS = ("readable_lines", "unique_ids")
PREPROCESSED_CHECKS = ("conservation",)
CHATML_CHECKS = ("conservation", "convertible")
MERGED_CHECKS = ("valid_lines",)
SCORES_CHECKS = ("conservation", "unique_ids", "schema", "failure_rate")

_WARN = dg.AssetCheckSeverity.WARN
_ERROR = dg.AssetCheckSeverity.ERROR


def check_raw(report: RawReport) -> list[dg.AssetCheckResult]:
    return [
        _result(
            "readable_lines",
            report.bad_lines == 0,
            f"{report.bad_lines} of {report.rows} lines are not JSON objects"
            + (f"; the first: {report.first_bad}" if report.first_bad else ""),
            _WARN,
        ),
        _unique_ids(report.duplicate_ids, ", ".join(report.first_duplicates)),
    ]


def check_preprocessed(report: PreprocessReport, rejected: str | None) -> list[dg.AssetCheckResult]:
    dropped = sum(report.dropped.values())
    told = f"{report.rows_in} rows in, {report.rows_out} out, {dropped} dropped by rules"
    is_whole = report.rows_in == report.rows_out + dropped
    return [_result("conservation", is_whole and not rejected, rejected or told, _ERROR)]


def check_chatml(report: ChatmlReport, rejected: str | None) -> list[dg.AssetCheckResult]:
    dropped = sum(report.dropped.values())
    listed = "; ".join(f"{f.file} row {f.index}: {f.detail}" for f in report.first_failures[:3])
    return [
        _result(
            "conservation",
            report.rows_in == report.rows_out + dropped,
            f"{report.rows_in} rows in, {report.rows_out} out, {dropped} dropped by rules",
            _ERROR,
        ),
        _result(
            "convertible",
            report.failed == 0 and not report.emptied,
            rejected
            or report.emptied
            or f"{report.failed} of {report.rows_out} rows could not be converted"
            + (f": {listed}" if listed else ""),
            _ERROR if rejected else _WARN,
        ),
    ]


def check_merged(report: MergeReport, rejected: str | None) -> list[dg.AssetCheckResult]:
    what = f"{report.invalid} lines are not JSON objects"
    listed = "; ".join(report.first_invalid[:3])
    told, severity = f"{what}: {listed}" if listed else what, _ERROR if rejected else _WARN
    return [_result("valid_lines", report.invalid == 0, rejected or told, severity)]


def check_scores(
    report: ScoreReport, audit: ScoresAudit, rejected: str | None
) -> list[dg.AssetCheckResult]:
    return [
        _result(
            "conservation",
            audit.source_rows == audit.rows == audit.ok + audit.failed,
            f"{audit.source_rows} rows in, {audit.ok} succeeded, {audit.failed} failed",
            _ERROR,
        ),
        _unique_ids(audit.duplicate_ids),
        _result("schema", audit.schema_matches, "published columns against declared", _ERROR),
        _failures(report, rejected),
    ]


def _failures(report: Judged, rejected: str | None) -> dg.AssetCheckResult:
    """`rejected` is why the result was not accepted."""
    told = f"{report.failed} of {report.rows} rows failed ({report.failure_rate:.2%})"
    severity = _ERROR if rejected else _WARN
    return _result("failure_rate", report.failed == 0, rejected or told, severity)


def _unique_ids(duplicates: int, which: str = "") -> dg.AssetCheckResult:
    what = f"{duplicates} rows repeat the id of another" + (f": {which}" if which else "")
    return _result("unique_ids", duplicates == 0, what, _WARN)


def _result(
    name: str, passed: bool, description: str, severity: dg.AssetCheckSeverity
) -> dg.AssetCheckResult:
    return dg.AssetCheckResult(
        check_name=name, passed=passed, description=description, severity=severity
    )
