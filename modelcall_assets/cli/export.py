"""`modelcall export` and `failures`: what a task has published, for people and other programs."""

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Literal

import click
import orjson
from rich.console import Console

from modelcall_assets.cli.terminal import (
    cell,
    chosen_files,
    echo,
    echo_data,
    file_option,
    force_option,
    misuse,
    parsed_where,
    reason_option,
    refuse_existing,
    rejected_option,
    stage_of,
    stage_option,
    table_of,
    task_argument,
    where_option,
)
from modelcall_assets.records.outcome import short
from modelcall_assets.stages.export import Form, export_dialogues, export_file
from modelcall_assets.stages.report import by_count
from modelcall_assets.stages.selection import Keep, Selection, Split, stratified
from modelcall_assets.stages.source import FailedRow, Published, failed_rows
from modelcall_assets.stages.task import Task
from modelcall_assets.storage.places import Place

SHOWN_FILES = 40
MOST_CHUNKS = 9999
DETAIL_CHARS = 200
WIDE = 10_000
"""Columns of what is read by programs: no word is cut in two."""
DIALOGUE_FOLDER = "codex_dialogue"


@click.command()
@task_argument
@stage_option
@file_option
@click.option("--format", type=click.Choice(["jsonl", "parquet"]), default="jsonl")
@click.option(
    "--output",
    metavar="FOLDER",
    help="A folder or a URI. Default: <output folder of the task>_export/<stage>, where earlier "
    "exports are replaced.",
)
@force_option
@click.option("--successes", "keep", flag_value="successes", help="Only good rows; the default.")
@click.option("--failures", "keep", flag_value="failures", help="Only failed rows.")
@click.option("--all", "keep", flag_value="all", help="Both, in their order.")
@where_option
@rejected_option
@click.option(
    "--split",
    "share",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Put this share of the rows in validation/, the others in train/, by record id.",
)
@click.option(
    "--sample", "size", type=click.IntRange(1), help="Only so many rows, for people to label."
)
@click.option("--by", metavar="COLUMN", help="Of a sample: as many of each of its values.")
@click.option("--seed", default=42, show_default=True, help="Another seed: another split, sample.")
@click.option(
    "--old-names",
    is_flag=True,
    help="As the old system: good rows in NAME.jsonl, failed ones in NAME_error.jsonl.",
)
@click.option(
    "--dialogue-log",
    is_flag=True,
    help=f"All conversations as one Markdown file; default: {DIALOGUE_FOLDER}/ in the project.",
)
def export(
    task: Task,
    stage: str | None,
    pattern: str | None,
    format: Literal["jsonl", "parquet"],
    output: str | None,
    force: bool,
    keep: Keep | None,
    condition: str | None,
    rejected: bool,
    share: float | None,
    size: int | None,
    by: str | None,
    seed: int,
    old_names: bool,
    dialogue_log: bool,
) -> None:
    """Copy what TASK.yaml has published, a file for each input file, rows in their order.

    Takes the good rows of the last asset as JSONL unless told otherwise. A row is in the same part
    of a split whatever else is exported, so that nothing leaks from one into the other.

    \b
      modelcall export my_task.yaml --where 'score >= 4' --split 0.05
      modelcall export my_task.yaml --format parquet --all --output /data/scored
      modelcall export my_task.yaml --sample 200 --by score --output to_label
      modelcall export my_task.yaml --old-names
      modelcall export my_task.yaml --dialogue-log
    """
    _check_options(format, share, keep, old_names, dialogue_log)
    shown = stage_of(task, stage)
    files = chosen_files(shown, pattern, rejected=rejected)
    where = parsed_where(condition, files)
    selection = Selection(keep or ("all" if old_names else "successes"), where)
    if by is not None and size is None:
        raise misuse("--by", "is of a sample", fix="add --sample N")
    if size is not None:
        selection = stratified(files, selection, size, by, seed)
    if dialogue_log:
        now = datetime.now()
        folder = task.layout.place(output or str(task.spec.root / DIALOGUE_FOLDER))
        path = folder / f"codex_{now:%Y%m%d_%H%M%S}.md"
        echo(f"{export_dialogues(files, path, selection, now):,} conversations: {path}")
        return
    form = Form(format, old_names, Split(share or 0.0, seed))
    default = f"{task.stages[-1].folder}_export/{shown.name}"
    folder = task.layout.place(output or default)
    _check_targets(task, files, folder, form)
    if output is not None:
        targets = (path for file in files for _, _, path in form.targets(file.stem))
        refuse_existing((folder / path for path in targets), force)
    _show_exports(files, [export_file(file, folder, selection, form) for file in files])
    echo(f"exported: {folder}")


def _check_options(
    format: str, share: float | None, keep: str | None, old_names: bool, dialogue_log: bool
) -> None:
    if old_names and format != "jsonl":
        raise misuse("--old-names", "the old files are JSONL")
    if old_names and keep == "successes":
        wrong = "makes files of failed rows, --successes leaves them out"
        raise misuse("--old-names", wrong, fix="leave one of them out")
    if dialogue_log and (old_names or share or format != "jsonl"):
        fix = "leave out --format, --split and --old-names"
        raise misuse("--dialogue-log", "is one Markdown file", fix=fix)


def _check_targets(task: Task, files: Sequence[Published], folder: Place, form: Form) -> None:
    """An export may not replace what the task reads or has published, nor one file another."""
    for taken in (str(stage.folder) for stage in task.stages):
        if f"{folder}/".startswith(f"{taken}/"):
            wrong = "the folder is one of the task's own"
            raise misuse("--output", wrong, have=taken, fix="choose another")
    counts = Counter(path for file in files for _, _, path in form.targets(file.stem))
    if twice := [path for path, count in counts.items() if count > 1]:
        wrong = f"several files would be written to {twice[0]}"
        fix = "export them one by one with --file and --output"
        raise misuse("modelcall export", wrong, fix=fix)


def _show_exports(files: Sequence[Published], exports: Sequence[Mapping[str, int]]) -> None:
    """`exports` are the rows of each file by path."""
    rows: list[tuple[str, ...]] = []
    for file, written in zip(files, exports, strict=True):
        to = "\n".join(f"{path}: {count:,}" for path, count in written.items())
        rows.append((file.name, f"{file.manifest.rows:,}", f"{sum(written.values()):,}", to))
    rows_in = sum(file.manifest.rows for file in files)
    rows_out = sum(sum(written.values()) for written in exports)
    total = (f"{len(files)} files", f"{rows_in:,}", f"{rows_out:,}")
    columns = {"file": "fold", "rows": "right", "exported": "right", "to": "fold"}
    Console().print(table_of(columns, rows, SHOWN_FILES, total))


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
    """Show the failed rows that TASK.yaml has published, and how many failed for which reason.

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
