"""`modelcall failures` and `retry`: what failed, and asking again."""

import sys
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import orjson
from rich.console import Console

from modelcall_assets.cli.run import go_on, run_retry, told_retry
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
from modelcall_assets.records.outcome import NEVER_ASKED, Reason, short
from modelcall_assets.stages.asking import AskingStage
from modelcall_assets.stages.source import FailedRow, Published, failed_rows
from modelcall_assets.stages.stage import Stage
from modelcall_assets.stages.standing import MAKE_ANEW, Retry, Wanted, out_of_date
from modelcall_assets.stages.task import Task

DETAIL_CHARS = 200
SHOWN_IDS = 5
WIDE = 10_000
"""Columns of what is read by programs: no word is cut in two."""


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

    docs/scores.md says what the reasons mean. `modelcall export --failures` copies whole rows. With
    --json a row is {file, record_id, reason, detail, attempts, endpoint}.

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
    stays where the new one fails. A file that was never finished is for run-task, and so is one
    that is out of date. A retry of chosen rows that was killed is gone on with by the same command,
    or by run-task.

    \b
      modelcall retry my_task.yaml
      modelcall retry my_task.yaml --reason timeout --file 'python/*'
      modelcall retry my_task.yaml --where 'score < 2'
      modelcall retry my_task.yaml --ids a17,b4
    """
    loaded = load(task)
    asked = _stage_with(loaded, reason) if reason and not stage else stage_of(loaded, stage)
    if not asked.answers:
        raise misuse(
            "--stage", f"{asked.name} asks nothing", fix="choose one that answers or rates"
        )
    if reason in NEVER_ASKED:
        fix = "mend the input, then run the task"
        raise misuse("--reason", f"nothing was asked about rows with {reason}", fix=fix)
    files = chosen_files(loaded, asked.name, pattern, rejected=True)
    names = _ids(ids)
    given = {"ids": sorted(names or ()), "where": condition, "reason": reason}
    choice = {name: value for name, value in given.items() if value}
    choice |= {"again": True} if names is None and not choice else {}
    if (killed := Retry.killed(loaded)) and not dry_run:
        is_same = (killed.stages[-1], killed.choice) == (asked.name, choice)
        if is_same and killed.files.keys() <= {file.key for file in files}:
            sys.exit(go_on(loaded))
        echo(f"warning: {told_retry(killed)} is given up", err=True)
    wanted = Wanted(names, parsed_where(condition, files), reason or "")
    stages = [asked] if wanted or stage else [each for each in loaded.stages if each.answers]
    chosen = _chosen(files, wanted)
    _refuse_old(asked, [file for file in files if file.key in chosen], choice)
    if not chosen:
        is_chosen = ids is not None or condition
        what = " is chosen" if is_chosen else " failed" + f" for {reason}" * bool(reason)
        echo(f"{loaded.spec.name}: no row{what}, nothing to do")
    elif dry_run:
        for file in (file for file in files if file.key in chosen):
            echo(f"{file.name}: {chosen[file.key]:,} of {file.manifest.rows:,} rows")
    else:
        publications = {each.key: each.manifest.published for each in files if each.key in chosen}
        sys.exit(run_retry(loaded, Retry([each.name for each in stages], choice, publications)))


def _stage_with(task: Task, reason: str) -> Stage:
    """The first that asks and has rows which failed for that reason: the next ones only say it
    after it."""
    asking = [stage for stage in task.stages if stage.answers]
    for stage in asking[:-1]:
        made = (stage.latest(key) for key in stage.keys.now())
        if any(each is not None and each.failures.get(reason) for each in made):
            return stage
    return task.stages[-1]


def _chosen(files: Sequence[Published], wanted: Wanted) -> dict[str, int]:
    """How many rows of which files, by key; ids that no row has are named on standard error."""
    chosen, absent = dict[str, int](), {*(wanted.ids or ())}
    for file in files:
        rows = [name for _, name in wanted.rows(file)] if wanted else []
        absent.difference_update(rows)
        failures = file.manifest.failures.items()
        failed = sum(count for reason, count in failures if reason not in NEVER_ASKED)
        if count := len(rows) if wanted else failed:
            chosen[file.key] = count
    if absent:
        told = ", ".join(map(short, sorted(absent)[:SHOWN_IDS])) + ", …" * (len(absent) > SHOWN_IDS)
        hint = "; with --ids -, ids may hold commas"
        echo(f"warning: no such row is chosen: {told} ({len(absent):,} ids){hint}", err=True)
    return chosen


def _refuse_old(stage: Stage, files: Sequence[Published], choice: Mapping[str, Any]) -> None:
    if isinstance(stage, AskingStage) and (old := out_of_date(stage, files, choice)):
        more = f" and {len(old) - 1:,} more files" * (len(old) > 1)
        raise InputError(f"{old[0]}{more}: {stage.name} out of date or gone; {MAKE_ANEW}")


def _ids(given: str | None) -> Set[str] | None:
    """Those of the option; None when it is not given."""
    if given is None:
        return None
    if given != "-":
        return {name for each in given.split(",") if (name := each.strip())}
    lines = sys.stdin.read().removeprefix("\ufeff").split("\n")
    return {name for each in lines if (name := each.removesuffix("\r"))}


def _show(rows: Sequence[FailedRow], counts: Counter[str], of_rows: int) -> None:
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
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in counts.most_common())
    text = f"{total:,} of {of_rows:,} rows failed"
    console.print(cell(f"{text}: {reasons}" if total else text))
