"""`modelcall export`: copies of what a task has published."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Literal

import click
from rich.console import Console
from rich.table import Table

from modelcall_assets.cli.display import cell, echo
from modelcall_assets.cli.output import force_option, refuse_existing
from modelcall_assets.cli.selection import (
    chosen_files,
    file_option,
    parsed_where,
    rejected_option,
    stage_of,
    stage_option,
    where_option,
)
from modelcall_assets.cli.task_argument import load, task_argument
from modelcall_assets.errors import Problem, SetupError
from modelcall_assets.stages.export import (
    FileExport,
    Form,
    Keep,
    Selection,
    export_dialogues,
    export_file,
)
from modelcall_assets.stages.published import Published
from modelcall_assets.stages.task import Task
from modelcall_assets.storage.places import Place

SHOWN_FILES = 40
DIALOGUE_FOLDER = "codex_dialogue"
DIALOGUE_NAME = "codex_%Y%m%d_%H%M%S.md"


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
    files = chosen_files(loaded, "export", stage, pattern, rejected=rejected)
    where = parsed_where("export", condition, files)
    selection = Selection(keep or ("all" if old_names else "successes"), where)
    if dialogue_log:
        now = datetime.now()
        folder = loaded.layout.place(output or str(loaded.spec.root / DIALOGUE_FOLDER))
        path = folder / now.strftime(DIALOGUE_NAME)
        count = export_dialogues(files, path, selection, now)
        echo(f"{count:,} conversations: {path}")
        return
    form = Form(format, old_names, share or 0.0, seed)
    default = f"{loaded.output_folder}_export/{stage_of(loaded, 'export', stage).name}"
    folder = loaded.layout.place(output or default)
    _check_targets(loaded, files, folder, form)
    if output is not None and not force:
        targets = (path for file in files for _, _, path in form.targets(file.stem))
        refuse_existing("export", (folder / path for path in targets))
    _show([export_file(file, folder, selection, form) for file in files])
    echo(f"exported: {folder}")


def _check_options(
    format: str, share: float | None, keep: str | None, old_names: bool, dialogue_log: bool
) -> None:
    wrong: list[Problem] = []
    if old_names and format != "jsonl":
        wrong.append(Problem("modelcall export", "--old-names", "the old files are JSONL"))
    if old_names and keep == "successes":
        fix = "leave one of them out"
        told = "makes files of failed rows, --successes leaves them out"
        wrong.append(Problem("modelcall export", "--old-names", told, fix=fix))
    if dialogue_log and (old_names or share or format != "jsonl"):
        told = "is one Markdown file"
        fix = "leave out --format, --split and --old-names"
        wrong.append(Problem("modelcall export", "--dialogue-log", told, fix=fix))
    if wrong:
        raise SetupError(wrong)


def _check_targets(task: Task, files: Sequence[Published], folder: Place, form: Form) -> None:
    """An export may not replace what the task reads or has published, nor one file another."""
    for taken in (str(stage.folder) for stage in task.stages):
        if f"{folder}/".startswith(f"{taken}/"):
            wrong = "the folder is one of the task's own"
            raise SetupError(
                [Problem("modelcall export", "--output", wrong, have=taken, fix="choose another")]
            )
    counts = Counter(path for file in files for _, _, path in form.targets(file.stem))
    twice = [str(path) for path, count in counts.items() if count > 1]
    if twice:
        wrong = f"several files would be written to {twice[0]}"
        fix = "export them one by one with --file and --output"
        raise SetupError([Problem("modelcall export", "", wrong, fix=fix)])


def _show(exports: Sequence[FileExport]) -> None:
    table = Table()
    table.add_column("file", overflow="fold")
    table.add_column("rows", justify="right")
    table.add_column("exported", justify="right")
    table.add_column("to", overflow="fold")
    for each in exports[:SHOWN_FILES]:
        # Text, because a file name may hold what looks like markup.
        told = "\n".join(f"{path}: {rows:,}" for path, rows in each.written.items())
        table.add_row(cell(each.name), f"{each.rows_in:,}", f"{each.rows:,}", cell(told))
    if len(exports) > SHOWN_FILES:
        table.add_row(f"… {len(exports) - SHOWN_FILES:,} more")
    table.add_section()
    rows_in, rows = sum(each.rows_in for each in exports), sum(each.rows for each in exports)
    table.add_row(f"{len(exports)} files", f"{rows_in:,}", f"{rows:,}")
    Console().print(table)
