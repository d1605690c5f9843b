"""`modelcall failures` and `modelcall retry`: which rows failed, and once more for them."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import click
import orjson
from rich.console import Console
from rich.table import Table

from modelcall_assets.cli.display import cell, echo, echo_data
from modelcall_assets.cli.run_task import run_files
from modelcall_assets.cli.selection import chosen_files, file_option, stage_option
from modelcall_assets.cli.task_argument import load, task_argument
from modelcall_assets.config.block import did_you_mean
from modelcall_assets.errors import Problem, SetupError
from modelcall_assets.records.outcome import Reason, short
from modelcall_assets.stages.published import FailedRow, Published, failed_rows

DETAIL_CHARS = 200


@click.command()
@task_argument
@stage_option
@file_option
@click.option("--reason", help="Only rows that failed for this reason.")
@click.option("--limit", type=click.IntRange(1), help="Rows to show; default: 50, --json: all.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per row, and nothing else.")
def failures(
    task: Path,
    stage: str | None,
    pattern: str | None,
    reason: str | None,
    limit: int | None,
    as_json: bool,
) -> None:
    """Show the failed rows that TASK.yaml has published, and how many failed for which reason.

    docs/scores.md says what the reasons mean. `modelcall export --failures` copies whole rows.

    \b
      modelcall failures my_task.yaml
      modelcall failures my_task.yaml --reason content_filter --limit 5
      modelcall failures my_task.yaml --json | jq .record_id
    """
    _check_reason("failures", reason)
    files = chosen_files(load(task), "failures", stage, pattern, rejected=True)
    counts: Counter[str] = Counter()
    shown: list[FailedRow] = []
    for row in _failed(files, reason):
        counts[row.reason] += 1
        if limit is not None and counts.total() > limit and as_json:
            return
        if as_json:
            echo_data(orjson.dumps(asdict(row)).decode() + "\n")
        elif len(shown) < (limit or 50):
            shown.append(row)
    if not as_json:
        _show(shown, counts, sum(file.manifest.rows for file in files))


@click.command()
@task_argument
@file_option
@click.option("--reason", help="Only files with rows that failed for this reason.")
@click.option("--dry-run", is_flag=True, help="Only name the files.")
def retry(task: Path, pattern: str | None, reason: str | None, dry_run: bool) -> None:
    """Ask the model again for the failed rows of TASK.yaml, in files that are red or green.

    Materialises the files that have failed rows once more; rows that succeeded are read from the
    journal, and nothing is paid for them. A file that was never finished is for run-task.

    \b
      modelcall retry my_task.yaml
      modelcall retry my_task.yaml --reason timeout --file 'python/*'
    """
    _check_reason("retry", reason)
    loaded = load(task)
    files = chosen_files(loaded, "retry", None, pattern, rejected=True)
    keys = [file.key for file in files if _has_failed(file, reason)]
    if not keys:
        why = f" for {reason}" if reason else ""
        echo(f"{loaded.spec.name}: no row failed{why}, nothing to do")
        return
    if dry_run:
        for file in files:
            if file.key in keys:
                echo(f"{file.name}: {file.manifest.failed:,} of {file.manifest.rows:,} rows")
        return

    def choose(present: Sequence[str]) -> Sequence[str]:
        is_of_groups = loaded.stages[-1].keys.of_groups
        return present if is_of_groups else [key for key in present if key in keys]

    sys.exit(run_files(loaded, choose, again=True))


def _check_reason(command: str, reason: str | None) -> None:
    if reason is not None and reason not in list(Reason):
        fix, expected = did_you_mean(reason, list(Reason)), ", ".join(Reason)
        raise SetupError(
            [Problem(f"modelcall {command}", "--reason", "unknown", expected, reason, fix)]
        )


def _failed(files: Sequence[Published], reason: str | None) -> Iterator[FailedRow]:
    rows = (row for file in files for row in failed_rows(file))
    return (row for row in rows if reason is None or row.reason == reason)


def _has_failed(file: Published, reason: str | None) -> bool:
    return bool(file.manifest.failed if reason is None else file.manifest.failures.get(reason))


def _show(rows: Sequence[FailedRow], counts: Counter[str], of_rows: int) -> None:
    console = Console()
    if rows:
        table = Table()
        for name in ("file", "record", "reason", "detail", "attempts", "endpoint"):
            table.add_column(name, overflow="fold")
        for row in rows:
            detail = " ".join(row.detail.split())
            cut = detail if len(detail) <= DETAIL_CHARS else f"{detail[:DETAIL_CHARS]}…"
            cells = (row.file, short(row.record_id), row.reason, cut)
            attempts = "" if row.attempts is None else str(row.attempts)
            table.add_row(*map(cell, cells), attempts, cell(row.endpoint or ""))
        console.print(table)
    total = counts.total()
    if total > len(rows):
        console.print(f"… {total - len(rows):,} more; --limit shows them", highlight=False)
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in counts.most_common())
    text = f"{total:,} of {of_rows:,} rows failed"
    console.print(cell(f"{text}: {reasons}" if total else text))
