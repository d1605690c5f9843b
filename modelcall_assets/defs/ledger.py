"""What Dagster is told of files: a report as metadata and a check, the events that carry both, and
the ledger of a run that works on many files at once."""

import errno
import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from functools import partial
from threading import Condition
from typing import Any, NamedTuple

import dagster as dg
from dagster._core.events import (
    AssetMaterializationPlannedData,
    AssetObservationData,
    DagsterEvent,
    DagsterEventType,
    StepMaterializationData,
)
from dagster._core.instance.ref import InstanceRef

from modelcall_assets.config.spec import TaskSpec
from modelcall_assets.defs.instance import asset_key, latest_result, provenance_tags
from modelcall_assets.errors import BudgetSpent, EndpointDown, EndpointRefused
from modelcall_assets.stages import Stage
from modelcall_assets.stages.asking import AskingStage
from modelcall_assets.stages.figures import FIGURES
from modelcall_assets.stages.pieces import pool_of, uncut
from modelcall_assets.stages.report import DROPPED, Report, counted
from modelcall_assets.stages.score_table import API_ABOUT
from modelcall_assets.stages.task import Task
from modelcall_assets.transforms.transcript import markdown, markdown_table

COMPLETE = "complete"
CHECKED = (
    "Whether a file is complete: rows in = succeeded + failed + dropped, no more failed rows than "
    "max_failure_rate allows (any is a warning), ids unique. A table says what was found."
)
MANY = 100
"""So many waiting entries pay for the start of a process."""


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
    tables = {name: _table(rows) for name, rows in report.tables.items() if rows}
    shown: dict[str, Any] = {name: tables[name] for name in (FIGURES,) if name in tables}
    shown |= {
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
        shown[DROPPED] = _table(counted("rule", dict(report.dropped.most_common())))
    shown |= {name.removeprefix("api_"): made for name, made in stage.provenance.items()}
    for name, value in report.numbers.items():  # a sum of prices has noise at its end
        shown[name] = float(f"{value:.10g}") if name.endswith("_usd") else value
    shown |= tables
    for name, values in report.histograms.items():
        shown |= {f"histogram_{name}": _table(bars)} if (bars := values.bars(name)) else {}
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
    return dg.MetadataValue.md(markdown_table(rows))


class Ended(NamedTuple):
    """What came of a file: its report, or none; and why it is red, if it is. `is_told` says whether
    the partition's page is to say so."""

    report: Report | None
    why: str = ""
    error: Exception | None = None
    is_told: bool = True

    @property
    def cause(self) -> str:
        """What other files may have failed of too; of a rejected one its first row's."""
        first = self.report.failed_rows[:1] if self.report else ()
        return next((f"{row.reason}: {row.detail}" for row in first), self.why)

    @property
    def is_systemic(self) -> bool:
        """Whether other files would end in the same way."""
        of_disk = getattr(self.error.__cause__, "errno", None) if self.error else None
        is_of_all = isinstance(self.error, EndpointRefused | EndpointDown | BudgetSpent)
        return is_of_all or of_disk in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def events_of(instance: dg.DagsterInstance, stage: Stage, key: str, ended: Ended) -> Iterator[Any]:
    """What came of one file, each to be logged before the next. Of a rejected result an observation
    keeps the numbers in the UI; a materialisation would show green."""
    asset, partition, report = asset_key(stage), _partition(stage, key), ended.report
    if report is None:
        if ended.is_told:
            yield check_event(instance, stage, key, failed_check(ended.why))
        return
    metadata = metadata_of(stage, key, report, ended.why or None)
    if ended.why:
        yield dg.AssetObservation(asset, partition=partition, metadata=metadata)
    else:
        tags = provenance_tags(instance, stage, key, report.data_version)
        yield dg.AssetMaterialization(asset, partition=partition, metadata=metadata, tags=tags)
    yield check_event(instance, stage, key, check_of(report, ended.why or None))


def check_event(
    instance: dg.DagsterInstance, stage: Stage, key: str, check: dg.AssetCheckResult
) -> Any:
    """The UI takes it for current only beside the partition's latest result; one that a body yields
    loses its partition in a backfill."""
    partition = _partition(stage, key)
    return dg.AssetCheckEvaluation(
        asset_key=asset_key(stage),
        check_name=COMPLETE,
        passed=check.passed,
        severity=check.severity,
        description=check.description,
        metadata=check.metadata,
        partition=partition,
        target_materialization_data=latest_result(instance, stage, partition),
    )


def _partition(stage: Stage, key: str) -> str | None:
    return None if stage.keys.is_one else key


class Entry(NamedTuple):
    """A file that a stage has begun, or what came of it."""

    stage: str
    key: str
    ended: Ended | None


class Teller(NamedTuple):
    """Tells Dagster of files under the name of one step of a run."""

    instance: dg.DagsterInstance
    task: Task
    run_id: str
    job: str
    step: str

    def tell(self, entries: Sequence[Entry]) -> None:
        """In their order. What has ended well need not be said to have begun. What keeps one from
        being told is raised when the others are."""
        made = {entry[:2] for entry in entries if entry.ended is not None and not entry.ended.why}
        with ExitStack() as told:
            for entry in reversed(entries):
                if entry.ended is not None or entry[:2] not in made:
                    told.callback(self._tell, entry)

    def _tell(self, entry: Entry) -> None:
        stage = self.task.stage(entry.stage)
        if entry.ended is None:
            planned = AssetMaterializationPlannedData(asset_key(stage), entry.key)
            self._log(DagsterEventType.ASSET_MATERIALIZATION_PLANNED, planned, logging.DEBUG)
            return
        with uncut:  # a result without its check would stay so
            for event in events_of(self.instance, stage, entry.key, entry.ended):
                self._log(*_kind_and_data(event))

    def _log(self, kind: DagsterEventType, data: Any, level: int = logging.INFO) -> None:
        event = DagsterEvent(kind.value, self.job, step_key=self.step, event_specific_data=data)
        self.instance.report_dagster_event(event, self.run_id, level)


def _kind_and_data(event: Any) -> tuple[DagsterEventType, Any]:
    match event:
        case dg.AssetMaterialization():
            return DagsterEventType.ASSET_MATERIALIZATION, StepMaterializationData(event)
        case dg.AssetObservation():
            return DagsterEventType.ASSET_OBSERVATION, AssetObservationData(event)
        case _:
            return DagsterEventType.ASSET_CHECK_EVALUATION, event


class Ledger:
    """Tells Dagster what came of files, in their order, by a thread of its own; of many files by a
    process, because it takes as long as all else that is done for a small one."""

    def __init__(self, context: dg.OpExecutionContext, task: Task) -> None:
        step = str(context.op_handle)
        self._teller = Teller(context.instance, task, context.run_id, context.job_name, step)
        self._waiting, self._change, self._is_over = list[Entry](), Condition(), False
        self._thread = ThreadPoolExecutor(1, "ledger")
        self._told = self._thread.submit(self._tell_all)

    def begun(self, stage: Stage, key: str) -> None:
        self._add(Entry(stage.name, key, None))

    def ended(self, stage: Stage, key: str, ended: Ended) -> None:
        self._add(Entry(stage.name, key, ended._replace(error=None)))

    def close(self) -> None:
        """Waits until all is told; raises what has kept something from that."""
        with self._change:
            self._is_over = True
            self._change.notify()
        self._thread.shutdown()
        self._told.result()

    def _add(self, entry: Entry) -> None:
        with self._change:
            self._waiting.append(entry)
            self._change.notify()

    def _next(self) -> list[Entry]:
        """All that wait, or nothing at the end."""
        with self._change:
            self._change.wait_for(lambda: self._waiting or self._is_over)
            waiting, self._waiting = self._waiting, []
            return waiting

    def _tell_all(self) -> None:
        (instance, task, *of), helper = self._teller, None
        may_help = instance.is_persistent and task.spec.log_folder is None
        failed = list[BaseException]()
        with ThreadPoolExecutor(1) as here, ExitStack() as opened:
            while entries := self._next():
                if may_help and helper is None and len(entries) >= MANY:
                    start = partial(_open, instance.get_ref(), task.spec, *of)
                    helper = opened.enter_context(pool_of(1, start))
                told = None if helper is None else helper.submit(_tell, entries)
                if told is None or isinstance(told.exception(), BrokenProcessPool):
                    # Killed: what it has told may be told twice.
                    may_help, helper = may_help and told is None, None
                    told = here.submit(self._teller.tell, entries)
                if (error := told.exception()) is not None:
                    failed.append(error)
        if failed:
            raise failed[0]


_here: Teller | None = None
"""In the process of a ledger."""


def _open(ref: InstanceRef, spec: TaskSpec, run_id: str, job: str, step: str) -> None:
    global _here
    _here = Teller(dg.DagsterInstance.from_ref(ref), Task(spec), run_id, job, step)


def _tell(entries: Sequence[Entry]) -> None:
    assert _here is not None
    _here.tell(entries)
