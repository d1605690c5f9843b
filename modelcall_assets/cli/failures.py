"""`modelcall failures`: which rows have failed, for people and other programs."""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict

import click
import orjson
from rich.console import Console

from modelcall_assets.cli.options import (
    chosen_files,
    file_option,
    reason_option,
    stage_of,
    stage_option,
    task_argument,
)
from modelcall_assets.cli.terminal import cell, echo_data, table_of
from modelcall_assets.records.outcome import short
from modelcall_assets.stages.report import by_count
from modelcall_assets.stages.source import FailedRow, failed_rows
from modelcall_assets.stages.task import Task

DETAIL_CHARS = 200
WIDE = 10_000
"""Columns of what is read by programs: no word is cut in two."""


@click.command()
@task_argument
@stage_option
@file_option
@reason_option
@click.option("--limit", type=click.IntRange(1), help="Rows to show; default: 50, --json: all.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per row, and nothing else.")
def failures(
    task: Task,
    stage: str | None,
    pattern: str | None,
    reason: str | None,
    limit: int | None,
    as_json: bool,
) -> None:
    """Show the failed rows that TASK has published, and how many failed for which reason.

    docs/scores.md says what the reasons mean. `modelcall export --failures` copies whole rows. With
    --json a row is {file, record_id, reason, detail, attempts, endpoint}.

    \b
      modelcall failures my_task.yaml
      modelcall failures my_task.yaml --reason content_filter --limit 5
      modelcall failures my_task.yaml --json | jq .record_id
    """
    files = chosen_files(stage_of(task, stage), pattern, rejected=True)
    counts: Counter[str] = Counter()
    shown: list[FailedRow] = []
    rows = (row for file in files for row in failed_rows(file))
    for row in (row for row in rows if reason is None or row.reason == reason):
        counts[row.reason] += 1
        if limit is not None and counts.total() > limit and as_json:
            return
        if as_json:
            echo_data(orjson.dumps(asdict(row)).decode() + "\n")
        elif len(shown) < (limit or 50):
            shown.append(row)
    if not as_json:
        _show_failed(shown, counts, sum(file.manifest.rows for file in files))


def _show_failed(rows: Sequence[FailedRow], counts: Counter[str], of_rows: int) -> None:
    console = Console() if sys.stdout.isatty() else Console(width=WIDE)
    if rows:
        names = ("file", "record", "reason", "detail", "attempts", "endpoint")
        cells = list[tuple[str, ...]]()
        for row in rows:
            detail = " ".join(row.detail.split())
            cut = detail if len(detail) <= DETAIL_CHARS else f"{detail[:DETAIL_CHARS]}…"
            attempts = "" if row.attempts is None else str(row.attempts)
            told = (row.file, short(row.record_id), row.reason, cut, attempts)
            cells.append((*told, row.endpoint or ""))
        console.print(table_of(dict.fromkeys(names, "fold"), cells))
    total = counts.total()
    if total > len(rows):
        console.print(f"… {total - len(rows):,} more; --limit shows them", highlight=False)
    text = f"{total:,} of {of_rows:,} rows failed"
    console.print(cell(f"{text}: {by_count(counts)}" if total else text))
