"""`modelcall failures`: which rows have failed, for people and other programs."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace

import click

from modelcall_assets.cli.options import (
    chosen_files,
    file_option,
    reason_option,
    stage_of,
    stage_option,
    task_argument,
)
from modelcall_assets.cli.terminal import echo, json_option, print_rows
from modelcall_assets.records.outcome import count_of, short
from modelcall_assets.stages.report import by_count, one_line
from modelcall_assets.stages.source import FailedRow, failed_rows
from modelcall_assets.stages.task import Task

SHOWN = 50


@click.command()
@task_argument
@stage_option
@file_option
@reason_option
@click.option(
    "--limit", type=click.IntRange(1), help=f"Rows to show; default: {SHOWN}, --json: all."
)
@json_option
def failures(
    task: Task,
    stage: str | None,
    pattern: str | None,
    reason: str | None,
    limit: int | None,
    as_json: bool,
) -> None:
    """Show the failed rows of TASK, and how many failed for which reason.

    They are those of each file's latest result, one that was rejected too. docs/scores.md says what
    the reasons mean. `modelcall export --failures` copies whole rows. With --json a row is {file,
    record_id, reason, detail, attempts, endpoint, sample}, and texts are whole.

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
            print_rows([asdict(row)], as_json=True)
        elif len(shown) < (limit or SHOWN):
            shown.append(row)
    if not as_json:
        _show_failed(shown, counts, sum(file.manifest.rows for file in files))


def _show_failed(rows: Sequence[FailedRow], counts: Counter[str], of_rows: int) -> None:
    sample = ["sample"] if any(row.sample is not None for row in rows) else []
    names = ["file", "record_id", *sample, "reason", "detail", "attempts", "endpoint"]
    short_rows = (replace(r, record_id=short(r.record_id), detail=one_line(r.detail)) for r in rows)
    print_rows([{name: getattr(row, name) for name in names} for row in short_rows])
    total = counts.total()
    if total > len(rows):
        echo(f"… {total - len(rows):,} more; --limit shows them")
    text = f"{total:,} of {count_of(of_rows, 'row')} failed"
    echo(f"{text}: {by_count(counts)}" if total else text)
