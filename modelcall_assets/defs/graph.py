"""What Dagster keeps of a stage: key, partitions, versions; a report as metadata and check.

Versions and provenance make the UI say "unsynced", and only that. Dagster sets provenance on
results that a body yields, not on logged materialisations; these tags are the ones it would set.
`tests/test_assets.py` checks both ways against the installed release.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import dagster as dg
import orjson
from sqlalchemy.exc import IntegrityError

from modelcall_assets.stages.report import Report, counted
from modelcall_assets.stages.stage import Keys, Stage
from modelcall_assets.stages.task import Task
from modelcall_assets.storage.places import Place
from modelcall_assets.transforms.transcript import markdown, turns_of

COMPLETE = "complete"
"""The check that every stage has."""
_CODE, _DATA = "dagster/code_version", "dagster/data_version"
_CELL = 160
_TURN = 600
_CONVERSATIONS = 3
_BAR = 24


def partitions_of(keys: Keys) -> dg.DynamicPartitionsDefinition:
    return dg.DynamicPartitionsDefinition(name=keys.name)


def add_new_keys(instance: dg.DagsterInstance, task: Task) -> list[str]:
    """Make every input file, and every merge group, a partition; gives the keys that the first
    stage has, in order."""
    now = {keys.name: keys.now() for keys, _ in task.stages_by_keys()}
    for name, keys in now.items():
        add_partitions(instance, name, keys)
    return now[task.stages[0].keys.name]


def add_partitions(instance: dg.DagsterInstance, name: str, keys: Sequence[str]) -> None:
    """Those that are not there yet. Dagster looks and then adds, so that another process may have
    added some in between."""
    while True:
        known = set(instance.get_dynamic_partitions(name))
        new = [key for key in keys if key not in known]
        try:
            if new:
                instance.add_dynamic_partitions(name, new)
        except IntegrityError:
            continue
        return


def asset_key(stage: Stage) -> dg.AssetKey:
    return dg.AssetKey([stage.spec.key, stage.name])


def code_version(stage: Stage) -> str:
    """Digest of what of the task's files shapes the rows."""
    shape = json.dumps(stage.shape(), sort_keys=True, default=str)
    return hashlib.sha256(shape.encode()).hexdigest()[:12]


def provenance_tags(
    instance: dg.DagsterInstance, stage: Stage, key: str, data_version: str
) -> dict[str, str]:
    """Tags of a materialisation that is logged instead of yielded."""
    tags = {_CODE: code_version(stage), _DATA: data_version}
    tags[f"{_DATA}_is_user_provided"] = "true"
    if stage.upstream is None:
        return tags
    asset = asset_key(stage.upstream)
    if (record := instance.get_latest_data_version_record(asset, partition_key=key)) is not None:
        name = asset.to_user_string()
        tags[f"dagster/input_data_version/{name}"] = _as_input(record.event_log_entry.tags)
        tags[f"dagster/input_event_pointer/{name}"] = str(record.storage_id)
    return tags


def is_stale(instance: dg.DagsterInstance, stage: Stage, key: str) -> bool:
    """Whether a materialised partition was made by other code or from other upstream content."""
    made = _latest_tags(instance, stage, key)
    if made.get(_CODE) != code_version(stage):
        return True
    if stage.upstream is None or stage.gathers:
        return stage.members_changed(key)
    used = made.get(f"dagster/input_data_version/{asset_key(stage.upstream).to_user_string()}")
    return used != _as_input(_latest_tags(instance, stage.upstream, key))


def _as_input(tags: Mapping[str, str] | None) -> str:
    """The upstream version as Dagster notes it: a digest over those of the partitions read, here
    one, or none when somebody only reported the materialisation."""
    return hashlib.sha256((tags or {}).get(_DATA, "").encode()).hexdigest()


def _latest_tags(instance: dg.DagsterInstance, stage: Stage, key: str) -> Mapping[str, str]:
    record = instance.get_latest_data_version_record(asset_key(stage), partition_key=key)
    return (record.event_log_entry.tags or {}) if record is not None else {}


def metadata_of(report: Report, output: Place | None) -> dict[str, Any]:
    """`output` is where the rows are, where that is not the user's own file."""
    shown: dict[str, Any] = {
        "dagster/row_count": report.rows,
        "rows_in": report.rows_in,
        "ok": report.ok,
        "failed": report.failed,
        "failure_rate": round(report.failure_rate, 6),
    }
    if len(report.schema):
        columns = [dg.TableColumn(field.name, str(field.type)) for field in report.schema]
        shown["dagster/column_schema"] = dg.TableSchema(columns)
    if report.failures:
        shown["failures_by_reason"] = _table(counted("reason", dict(report.failures.most_common())))
        shown["first_failures"] = _table([each._asdict() for each in report.failed_rows])
    if report.dropped:
        shown["dropped"] = report.dropped.total()
        shown["dropped_by_rule"] = _table(counted("rule", dict(report.dropped.most_common())))
    shown |= report.numbers
    shown |= {name: _table(rows) for name, rows in report.tables.items()}
    for key, counts in report.histograms.items():
        most = max(counts.values(), default=0)
        bars = [
            {key: value, "rows": count, "": "█" * max(1, round(_BAR * count / most))}
            for value, count in sorted(counts.items())
        ]
        shown[f"histogram_{key}"] = _table(bars)
    if report.warnings:
        shown["warnings"] = report.warnings
    if output is not None:
        shown["output"] = dg.MetadataValue.path(str(output))
    sample = report.sample
    if sample and turns_of(dict(sample[0])):  # conversations are read, other rows compared
        texts = [markdown(dict(row), most_chars=_TURN) for row in sample[:_CONVERSATIONS]]
        shown["sample"] = dg.MetadataValue.md("\n\n---\n\n".join(texts))
    else:
        shown["sample"] = _table(sample)
    return shown


def check_of(report: Report, rejected: str | None) -> dg.AssetCheckResult:
    """Whether the partition is complete: a table with a row for each thing that is looked at, the
    worst of which gives the severity. `rejected` says why the result is not accepted."""
    findings = report.findings(rejected)
    wrong = [finding for finding in findings if not finding.passed]
    is_error = any(finding.severity == "error" for finding in wrong)
    severity = dg.AssetCheckSeverity.ERROR if is_error else dg.AssetCheckSeverity.WARN
    table = [
        {"": "✓" if each.passed else "✗", "looked at": each.name, "found": each.told}
        for each in findings
    ]
    return dg.AssetCheckResult(
        check_name=COMPLETE,
        passed=not wrong,
        description="; ".join(finding.told for finding in wrong) or findings[0].told,
        severity=severity,
        metadata={"findings": _table(table)},
    )


def _table(rows: Sequence[Mapping[str, Any]]) -> dg.MarkdownMetadataValue:
    """A Markdown table; long cells are cut, line breaks and bars made harmless."""
    if not rows:
        return dg.MetadataValue.md("no rows")
    names = list(rows[0])
    cells = ([_cell(row.get(name)) for name in names] for row in rows)
    lines = [names, ["---"] * len(names), *cells]
    return dg.MetadataValue.md("\n".join(f"| {' | '.join(cells)} |" for cells in lines))


def _cell(value: Any) -> str:
    if value is None:
        return ""
    text = value if isinstance(value, str) else orjson.dumps(value, default=str).decode()
    text = " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
    return text if len(text) <= _CELL else text[:_CELL] + "…"
