"""`modelcall failures` and `retry`: what failed, and asking again."""

import sys
from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import asdict
from pathlib import Path

import click
import orjson
from rich.console import Console

from modelcall_assets.cli.run import run_files
from modelcall_assets.cli.terminal import (
    cell,
    chosen_files,
    echo,
    echo_data,
    file_option,
    load,
    misuse,
    parsed_where,
    stage_of,
    stage_option,
    table_of,
    task_argument,
    where_option,
)
from modelcall_assets.config.block import did_you_mean
from modelcall_assets.errors import InputError
from modelcall_assets.records.outcome import Reason, short
from modelcall_assets.stages.asking import AskingStage
from modelcall_assets.stages.published import FailedRow, failed_rows
from modelcall_assets.stages.standing import MAKE_ANEW, Wanted, out_of_date

DETAIL_CHARS = 200
SHOWN_IDS = 5


def _known(_context: click.Context, _option: click.Parameter, reason: str | None) -> str | None:
    if reason is not None and reason not in list(Reason):
        fix = did_you_mean(reason, Reason)
        raise misuse("--reason", "unknown", ", ".join(Reason), reason, fix)
    return reason


@click.command()
@task_argument
@stage_option
@file_option
@click.option("--reason", callback=_known, help="Only rows that failed for this reason.")
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
    files = chosen_files(load(task), stage, pattern, rejected=True)
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
        _show(shown, counts, sum(file.manifest.rows for file in files))


@click.command()
@task_argument
@stage_option
@file_option
@click.option("--reason", callback=_known, help="Only rows that failed for this reason.")
@click.option(
    "--ids", metavar="ID,…", help="Only these records, failed or not; `-` reads one a line."
)
@where_option
@click.option("--dry-run", is_flag=True, help="Only count the rows.")
def retry(
    task: Path,
    stage: str | None,
    pattern: str | None,
    reason: str | None,
    ids: str | None,
    condition: str | None,
    dry_run: bool,
) -> None:
    """Ask the model again for the failed rows of TASK.yaml, in files that are red or green.

    Materialises the files that have such rows once more; all other rows are read from the journal,
    and nothing is paid for them. With --ids or --where rows are asked anew that have an answer: it
    stays where the new one fails. A file that was never finished is for run-task.

    \b
      modelcall retry my_task.yaml
      modelcall retry my_task.yaml --reason timeout --file 'python/*'
      modelcall retry my_task.yaml --where 'score < 2'
      modelcall retry my_task.yaml --ids a17,b4
    """
    loaded = load(task)
    asked, files = stage_of(loaded, stage), chosen_files(loaded, stage, pattern, rejected=True)
    if not isinstance(asked, AskingStage):
        raise misuse(
            "--stage", f"{asked.name} asks nothing", fix="choose one that answers or rates"
        )
    wanted = Wanted(_ids(ids), parsed_where(condition, files), reason or "")
    chosen, found = dict[str, int](), set[str]()
    for file in files:
        rows = [name for _, name in wanted.rows(file)] if wanted else []
        if count := len(rows) if wanted else file.manifest.failed:
            chosen[file.key] = count
            found.update(rows if ids else ())
    if absent := sorted({*(wanted.ids or ())} - found):
        told = ", ".join(map(short, absent[:SHOWN_IDS])) + ", …" * (len(absent) > SHOWN_IDS)
        echo(f"warning: no such row: {told} ({len(absent):,} ids)", err=True)
    if old := out_of_date(asked, [file for file in files if file.key in chosen]):
        more = f" and {len(old) - 1:,} more files" * (len(old) > 1)
        raise InputError(f"{old[0]}{more}: {asked.name} out of date or gone; {MAKE_ANEW}")
    if not chosen:
        what = (
            " is chosen"
            if ids is not None or condition
            else " failed" + f" for {reason}" * bool(reason)
        )
        echo(f"{loaded.spec.name}: no row{what}, nothing to do")
    elif dry_run:
        for file in (file for file in files if file.key in chosen):
            echo(f"{file.name}: {chosen[file.key]:,} of {file.manifest.rows:,} rows")
    else:
        given = {
            "ids": [*(wanted.ids or ())],
            "where": condition,
            "reason": reason,
            "again": not wanted,
        }
        own = {name: value for name, value in given.items() if value}
        is_one = bool(stage or wanted.ids or condition)
        stages = [asked] if is_one else [each for each in loaded.stages if each.answers]
        options = {each.name: own for each in stages}

        def choose(present: Sequence[str]) -> Sequence[str]:
            return [key for key in present if asked.keys.of_groups or key in chosen]

        sys.exit(run_files(loaded, choose, options, chosen.keys()))


def _ids(given: str | None) -> Set[str] | None:
    """Those of the option; None when it is not given."""
    if given is None:
        return None
    names = sys.stdin.read().split("\n") if given == "-" else given.split(",")
    return {name for each in names if (name := each.strip())}


def _show(rows: Sequence[FailedRow], counts: Counter[str], of_rows: int) -> None:
    console = Console()
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
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in counts.most_common())
    text = f"{total:,} of {of_rows:,} rows failed"
    console.print(cell(f"{text}: {reasons}" if total else text))
