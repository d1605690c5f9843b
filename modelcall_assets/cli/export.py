"""`modelcall export`: what tasks have published, for people and other programs."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import click

from modelcall_assets.cli.options import (
    TASK,
    chosen_files,
    file_option,
    force_option,
    load,
    misuse,
    parsed_where,
    refuse_existing,
    refuse_own,
    rejected_option,
    split_option,
    stage_of,
    stage_option,
    where_option,
)
from modelcall_assets.cli.terminal import echo, json_option, print_rows
from modelcall_assets.records import stem_of
from modelcall_assets.stages.asking import AskingStage
from modelcall_assets.stages.examples import OWN_FILES, Examples, Pairs, tell_trainer
from modelcall_assets.stages.export import (
    Form,
    export_dialogues,
    export_files,
    record_export,
)
from modelcall_assets.stages.report import by_count
from modelcall_assets.stages.selection import (
    Keep,
    Selection,
    Split,
    best_of,
    check_columns,
    named_split,
    stratified,
)
from modelcall_assets.stages.source import Published
from modelcall_assets.stages.task import Task
from modelcall_assets.storage.listing import matches
from modelcall_assets.storage.places import Place
from modelcall_assets.transforms.training import FORMS, PAIR_FORMS, REQUESTS, TASKS

SHOWN_FILES = 40
DIALOGUE_FOLDER = "codex_dialogue"


@dataclass(frozen=True)
class Asked:
    """The options of `export`."""

    tasks: tuple[Path, ...]
    stage: str | None
    pattern: str | None
    to: str | None
    into: str | None
    format: Literal["jsonl", "parquet"] | None
    output: str | None
    force: bool
    keep: Keep | None
    condition: str | None
    rejected: bool
    share: float | None
    size: int | None
    by: str | None
    seed: int
    best: str | None
    pairs: str | None
    margin: float | None
    model: str | None
    repeats: tuple[str, ...]
    old_names: bool
    keep_retries: bool
    dialogue_log: bool
    as_json: bool

    @property
    def one_file(self) -> PurePosixPath | None:
        """That all rows go to, without suffix."""
        path = PurePosixPath(self.into or ("tasks" if self.to == TASKS else ""))
        if path.is_absolute() or ".." in path.parts:
            raise misuse(
                "--into", "leads out of the folder", "a name, or a path below it", str(path)
            )
        return path.with_name(stem_of(path.name)) if path.name else None

    @property
    def repeat_by_pattern(self) -> dict[str, int]:
        found = dict[str, int]()
        for text in self.repeats:
            pattern, _, times = text.rpartition("=")
            if not pattern or not times.isdecimal() or not int(times):
                raise misuse("--repeat", "not a repetition", "GLOB=N, N from 1", text)
            found[pattern] = int(times)
        return found


@click.command()
@click.argument("tasks", metavar="TASK...", nargs=-1, required=True, type=TASK)
@stage_option
@file_option
@click.option(
    "--to",
    type=click.Choice([*FORMS, TASKS, REQUESTS]),
    help="A form that trainers read, in place of the rows as they are; docs/training.md has all.",
)
@click.option("--into", metavar="NAME", help="All rows in one file of this name.")
@click.option("--format", type=click.Choice(["jsonl", "parquet"]), help="Default: jsonl.")
@click.option(
    "--output",
    metavar="FOLDER",
    help="A folder or a URI. Default: <output folder of the task>_export/<stage, or form>, where "
    "earlier exports are replaced.",
)
@force_option
@click.option("--successes", "keep", flag_value="successes", help="Only good rows; the default.")
@click.option("--failures", "keep", flag_value="failures", help="Only failed rows.")
@click.option("--all", "keep", flag_value="all", help="Both, in their order.")
@where_option
@rejected_option
@split_option
@click.option(
    "--sample", "size", type=click.IntRange(1), help="Only so many rows, for people to label."
)
@click.option("--by", metavar="COLUMN", help="Of a sample: as many of each of its values.")
@click.option("--seed", default=42, show_default=True, help="Another seed: another split, sample.")
@click.option(
    "--best", metavar="SCORE", help="Of several samples of a record the one with the greatest."
)
@click.option(
    "--pairs", metavar="SCORE", help="Of the samples of a record the best and the worst, as a pair."
)
@click.option(
    "--margin", type=click.FloatRange(0, min_open=True), help="Of pairs: the least difference."
)
@click.option("--model", metavar="NAME", help="Of requests; default: the task's model, as asked.")
@click.option(
    "--repeat",
    "repeats",
    metavar="GLOB=N",
    multiple=True,
    help="Of a mixture: files that match count N times.",
)
@click.option(
    "--old-names",
    is_flag=True,
    help="As the old system: good rows in NAME.jsonl, failed ones in NAME_error.jsonl.",
)
@click.option(
    "--keep-retries",
    is_flag=True,
    help="Of old names: earlier files become NAME_success_retry_N.jsonl, NAME_error_retry_N.jsonl.",
)
@click.option(
    "--dialogue-log",
    is_flag=True,
    help=f"All conversations as one Markdown file; default: {DIALOGUE_FOLDER}/ in the project.",
)
@json_option
def export(**given: Any) -> None:
    """Copy what each TASK has published, a file for each input file, rows in their order.

    Takes the good rows of the last asset as JSONL unless told otherwise. A row is in the same part
    of a split whatever else is exported, so that nothing leaks from one into the other.

    \b
      modelcall export my_task.yaml --where 'score >= 4' --split 0.05
      modelcall export my_task.yaml --format parquet --all --output /data/scored
      modelcall export one.yaml two.yaml --to sharegpt --into chats --output training
      modelcall export my_task.yaml --best score --to openai
      modelcall export my_task.yaml --pairs score --margin 1 --to trl
      modelcall export my_task.yaml --stage responses --failures --to openai-batch
      modelcall export my_task.yaml --old-names --keep-retries
      modelcall export my_task.yaml --dialogue-log
    """
    asked = Asked(**given)
    _check_options(asked)
    tasks = [*map(load, asked.tasks)]
    stages = (stage_of(task, asked.stage) for task in tasks)
    found = (chosen_files(each, asked.pattern, rejected=asked.rejected) for each in stages)
    files = [*chain.from_iterable(found)]
    selection = _selection(asked, files)
    if asked.dialogue_log:
        now = datetime.now()
        root = str(tasks[0].spec.root / DIALOGUE_FOLDER)
        path = tasks[0].layout.place(asked.output or root) / f"codex_{now:%Y%m%d_%H%M%S}.md"
        echo(f"{export_dialogues(files, path, selection, now):,} conversations: {path}")
        return
    own = f"{tasks[0].stages[-1].folder}_export/{asked.to or files[0].stage.name}"
    folder = tasks[0].layout.place(asked.output or own)
    form, groups = _form(asked, tasks[0], files), _groups(asked, tasks, files)
    _check_targets(asked, tasks, folder, form, groups)
    exported = export_files(groups, folder, selection, form)
    if form.examples is not None:
        tell_trainer(form.examples, folder, exported.written, asked.repeat_by_pattern)
    options = {name: value for name, value in given.items() if value not in (None, False, ())}
    record_export(folder, options, files, exported, datetime.now(UTC))
    rows = [{"file": path, "rows": count} for path, count in exported.written.items()]
    rows_in = sum(file.manifest.rows for file in files)
    total = {"file": f"of {rows_in:,} rows", "rows": sum(exported.written.values())}
    print_rows(rows, as_json=asked.as_json, most=SHOWN_FILES, total=total)
    if left_out := exported.left_out:
        what = "records" if asked.pairs else "rows"
        echo(f"left out: {left_out.total():,} {what}: {by_count(left_out)}", err=asked.as_json)
    echo(f"exported: {folder}", err=asked.as_json)


def _check_options(asked: Asked) -> None:
    """UsageError where one needs another, or contradicts it."""
    to, keep, old = asked.to, asked.keep, asked.old_names
    others = (old, asked.share, asked.format, to, asked.into)
    has_failed = keep not in (None, "successes")
    of_its_own = "leave out --format, --split, --old-names, --to and --into"
    rules: list[tuple[object, str, str, str]] = [
        (asked.by and not asked.size, "--by", "is of a sample", "add --sample N"),
        (asked.margin and not asked.pairs, "--margin", "is of pairs", "add --pairs SCORE"),
        (asked.model and to != REQUESTS, "--model", "is of requests", f"add --to {REQUESTS}"),
        (asked.repeats and to != "mixture", "--repeat", "is of a mixture", "add --to mixture"),
        (asked.keep_retries and not old, "--keep-retries", "is of old names", "add --old-names"),
        (old and asked.format == "parquet", "--old-names", "the old files are JSONL", ""),
        (old and keep == "successes", "--old-names",
         "makes files of failed rows, --successes leaves them out", "leave one of them out"),
        (asked.dialogue_log and any(others), "--dialogue-log", "is one Markdown file", of_its_own),
        (len(asked.tasks) > 1 and not asked.output, "--output",
         "missing: several tasks have no folder of their own", ""),
        (to and (asked.format or old), "--to", "has files of its own",
         "leave out --format and --old-names"),
        (to not in (None, REQUESTS) and has_failed, "--to", f"{to} has no failed rows",
         f"leave out --{keep}, or use --to {REQUESTS}"),
        (asked.pairs and to not in PAIR_FORMS, "--pairs", "has forms of its own",
         f"add --to {' or '.join(PAIR_FORMS)}"),
        (asked.pairs and (asked.best or asked.size), "--pairs", "needs all samples",
         "leave out --best and --sample"),
    ]  # fmt: skip
    for is_broken, option, wrong, fix in rules:
        if is_broken:
            raise misuse(option, wrong, fix=fix)


def _selection(asked: Asked, files: Sequence[Published]) -> Selection:
    where = parsed_where(asked.condition, files)
    selection = Selection(asked.keep or ("all" if asked.old_names else "successes"), where)
    check_columns(filter(None, [asked.pairs]), files, "--pairs")
    check_columns(filter(None, [asked.best]), files, "--best")
    if asked.best is not None:
        selection, told = best_of(files, selection, asked.best)
        if told:
            echo(f"the best of each record: {by_count(told)}", err=True)
    if asked.size is not None:
        selection = stratified(files, selection, asked.size, asked.by, asked.seed)
    return selection


def _form(asked: Asked, task: Task, files: Sequence[Published]) -> Form:
    examples = None
    if asked.to is not None:
        pairs = None if asked.pairs is None else Pairs(asked.pairs, asked.margin or 0.0)
        examples = Examples(asked.to, pairs, _params(asked, task))
    split = Split(asked.share or 0.0, asked.seed)
    if asked.to in OWN_FILES:
        split = named_split(files, split.share, split.seed)
    return Form(asked.format or "jsonl", asked.old_names, asked.keep_retries, split, examples)


def _params(asked: Asked, task: Task) -> dict[str, Any]:
    """Of requests: as the first stage that asks a model sends them, for whoever is named."""
    if asked.to != REQUESTS or asked.model is not None:
        return {"model": asked.model}
    asking = next((stage for stage in task.stages if isinstance(stage, AskingStage)), None)
    if asking is None:
        raise misuse("--model", f"missing: {task.spec.name} asks no model")
    params = asking.model.request_params()
    return {name: params[name] for name in params.keys() - {"stream", "stream_options"}}


def _groups(
    asked: Asked, tasks: Sequence[Task], files: Sequence[Published]
) -> dict[PurePosixPath, list[Published]]:
    """Files by the path, without suffix, that they are written to together."""
    if asked.one_file is not None:
        return {asked.one_file: [*files]}
    groups = dict[PurePosixPath, list[Published]]()
    for file in files:
        folder = PurePosixPath(file.stage.spec.name if len(tasks) > 1 else "")
        groups.setdefault(folder / file.stem, []).append(file)
    twice = next((stem for stem, some in groups.items() if len(some) > 1), None)
    if twice is not None:
        wrong = f"several files would be written to {twice}"
        fix = "add --into NAME, or export them one by one with --file and --output"
        raise misuse("modelcall export", wrong, fix=fix)
    return groups


def _check_targets(
    asked: Asked,
    tasks: Sequence[Task],
    folder: Place,
    form: Form,
    stems: Collection[PurePosixPath],
) -> None:
    """An export may not replace what a task reads or has published, nor what is anybody's."""
    refuse_own(folder, tasks, "--output")
    names = [f"{stem}.jsonl" for stem in stems]
    for pattern in asked.repeat_by_pattern:
        if not any(matches(name, pattern) for name in names):
            raise misuse("--repeat", "no file matches", ", ".join(names[:3]), pattern)
    if asked.output is not None and not asked.keep_retries:
        paths = [path for stem in stems for _, _, path in form.targets(stem)]
        paths += [PurePosixPath(OWN_FILES[asked.to])] if asked.to in OWN_FILES else []
        refuse_existing((folder / path for path in paths), asked.force)
