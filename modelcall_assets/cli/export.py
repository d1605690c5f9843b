"""`modelcall export`: what a task has published, for others."""

from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Literal

import click
from rich.console import Console

from modelcall_assets.cli.terminal import (
    chosen_files,
    echo,
    file_option,
    force_option,
    load,
    misuse,
    parsed_where,
    refuse_existing,
    rejected_option,
    stage_of,
    stage_option,
    table_of,
    task_argument,
    where_option,
)
from modelcall_assets.stages.export import (
    FileExport,
    Form,
    Keep,
    Selection,
    export_dialogues,
    export_file,
)
from modelcall_assets.stages.source import Published
from modelcall_assets.stages.task import Task
from modelcall_assets.storage.places import Place

SHOWN_FILES = 40
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
@click.option("--seed", default=42, show_default=True, help="Another seed is another split.")
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
    task: Path,
    stage: str | None,
    pattern: str | None,
    format: Literal["jsonl", "parquet"],
    output: str | None,
    force: bool,
    keep: Keep | None,
    condition: str | None,
    rejected: bool,
    share: float | None,
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
      modelcall export my_task.yaml --old-names
      modelcall export my_task.yaml --dialogue-log
    """
    loaded = load(task)
    _check_options(format, share, keep, old_names, dialogue_log)
    files = chosen_files(loaded, stage, pattern, rejected=rejected)
    where = parsed_where(condition, files)
    selection = Selection(keep or ("all" if old_names else "successes"), where)
    if dialogue_log:
        now = datetime.now()
        folder = loaded.layout.place(output or str(loaded.spec.root / DIALOGUE_FOLDER))
        path = folder / f"codex_{now:%Y%m%d_%H%M%S}.md"
        echo(f"{export_dialogues(files, path, selection, now):,} conversations: {path}")
        return
    form = Form(format, old_names, share or 0.0, seed)
    default = f"{loaded.output_folder}_export/{stage_of(loaded, stage).name}"
    folder = loaded.layout.place(output or default)
    _check_targets(loaded, files, folder, form)
    if output is not None:
        targets = (path for file in files for _, _, path in form.targets(file.stem))
        refuse_existing((folder / path for path in targets), force)
    _show([export_file(file, folder, selection, form) for file in files])
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


def _show(exports: Sequence[FileExport]) -> None:
    rows: list[tuple[str, ...]] = []
    for each in exports:
        to = "\n".join(f"{path}: {rows:,}" for path, rows in each.written.items())
        rows.append((each.name, f"{each.rows_in:,}", f"{each.rows:,}", to))
    rows_in, written = sum(each.rows_in for each in exports), sum(each.rows for each in exports)
    total = (f"{len(exports)} files", f"{rows_in:,}", f"{written:,}")
    columns = {"file": "fold", "rows": "right", "exported": "right", "to": "fold"}
    Console().print(table_of(columns, rows, SHOWN_FILES, total))
