"""`modelcall pipeline`, `preprocess`, `api-call` and `distillation-generate`, the commands of the
old system: each writes the task file that does the same, and runs it."""

import hashlib
import os
import shlex
import sys
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import click
import yaml

from modelcall_assets.cli.export import export
from modelcall_assets.cli.options import load, misuse
from modelcall_assets.cli.run import retry, run_task
from modelcall_assets.cli.terminal import echo
from modelcall_assets.config import Content
from modelcall_assets.config.catalog import find_root
from modelcall_assets.config.distillation import STEP_FIELDS
from modelcall_assets.config.places import is_uri
from modelcall_assets.config.task import TASK_FIELDS
from modelcall_assets.errors import Problem, SetupError
from modelcall_assets.records import decode_key, stem_of
from modelcall_assets.stages.export import ORIGINS
from modelcall_assets.stages.task import Task
from modelcall_assets.storage.listing import exists
from modelcall_assets.transforms.length import Length

FOLDER = "configs/tasks/one_off"
ENDS = "", "_error"
"""Of the names of answers."""
SCRIPTS = {"github": "github_raw_code", "repomix": "repo_xml", "triplet": "triplet_filter"}
_WHY = {old.path: old.instead for old in (*TASK_FIELDS, *STEP_FIELDS)}


class _Place(click.ParamType):
    """A path or a URI, as a task file in the project has it."""

    name = "path"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if is_uri(value):
            return value
        path, root = Path(os.path.abspath(value)), find_root(Path.cwd())  # noqa: PTH100
        return f"./{path.relative_to(root).as_posix()}" if path.is_relative_to(root) else str(path)


PLACE = _Place()


def _needless(field: str, *names: str) -> Callable[[Any], Any]:
    """An option of the old system with nothing to set here, as the field of a file has nothing."""

    def note(context: click.Context, option: click.Parameter, value: str | None) -> None:
        if value is not None:
            context.meta.setdefault(__name__, []).append(f"{option.opts[-1]} ({_WHY[field]})")

    return click.option(*names, expose_value=False, hidden=True, callback=note)


# The task


def _name(kind: str, source: str, target: str) -> str:
    """The same for the same target, whatever options are given."""
    digest = hashlib.sha256(target.encode()).hexdigest()[:6]
    return f"{kind}_{stem_of(PurePosixPath(source).name)}_{digest}"


def _task(name: str, content: Content) -> Task:
    """Writes its file. SetupError when there is one of somebody else, or one that was changed."""
    path = find_root(Path.cwd()) / FOLDER / f"{name}.yaml"
    known = {"task_name": name, **_given(content)}
    body = yaml.safe_dump(known, sort_keys=False, allow_unicode=True)
    if path.exists():
        head, _, rest = path.read_text("utf-8").partition("\n")
        if not head.endswith(_mark(rest)):
            wrong = "this command has not written it, or it was changed since"
            fix = f"run it as it is: modelcall run-task {path}; or move it away"
            raise SetupError([Problem(str(path), "", wrong, fix=fix)])
    command = " ".join(shlex.join(["modelcall", *sys.argv[1:]]).split())
    head = f"# Written by `{command}`, and anew until somebody changes it {_mark(body)}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{head}\n{body}", "utf-8")
    echo(f"task file: {path}")
    if needless := click.get_current_context().meta.get(__name__):
        echo(f"not needed here: {'; '.join(needless)}")
    return load(path)


def _given(content: Content) -> Content:
    """Without what the command was not told."""
    inner = {name: _given(v) if isinstance(v, dict) else v for name, v in content.items()}
    return {name: value for name, value in inner.items() if value not in (None, "", [], {})}


def _mark(text: str) -> str:
    """Shows that a file is as it was written."""
    return f"({hashlib.sha256(text.encode()).hexdigest()[:8]})"


# Running it


def _code(command: click.Command, **options: Any) -> int:
    """How it ends."""
    try:
        click.get_current_context().invoke(command, **options)
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def _refuse_others(task: Task, folder: str, names: Iterable[str]) -> None:
    """UsageError when a file is in the way that no export has left."""
    place = task.layout.place(task.spec.resolved(folder))
    for name in names:
        if exists(place / name) and not exists(place / ORIGINS / f"{name}.jsonl"):
            fix = "move it away; or name this folder in a task file, and `modelcall adopt` takes it"
            raise misuse("OUTPUT", f"{place / name} is there, and not by this command", fix=fix)


def _export(task: Task, folder: str, **options: Any) -> int:
    output = task.spec.resolved(folder)
    return _code(
        export, tasks=(task.spec.path,), output=output, force=True, rejected=True, **options
    )


@click.command()
@click.argument("source", metavar="INPUT")
@click.argument("target", metavar="OUTPUT")
@click.option("--fs", type=click.Choice(["local", "tos"]), default="local", show_default=True)
@click.option("--root", envvar="DATA_ROOT", default="", help="Of local paths; default $DATA_ROOT.")
def pipeline(source: str, target: str, fs: str, root: str) -> None:
    """Give each row of INPUT a score for its length, in OUTPUT: a trial without a model.

    Both are JSONL or Parquet. The score is len(text) / 100, 5 at most.

    \b
      modelcall pipeline data/in.jsonl data/out.jsonl
      modelcall pipeline bucket/in.jsonl bucket/out.jsonl --fs tos
    """
    start = "tos://" if fs == "tos" else f"{root}/" if root else ""
    source, target = (PLACE(text if is_uri(text) else start + text) for text in (source, target))
    folder, _, file = target.rpartition("/")
    stem, _, form = file.rpartition(".")
    if not stem or form not in ("jsonl", "parquet"):
        raise misuse("OUTPUT", "neither JSONL nor Parquet", "a name in .jsonl or .parquet", file)
    name = _name("pipeline", source, target)
    data = {"input_folder": source, "output_folder": f"{folder}/{ORIGINS}/{name}"}
    task = _task(name, {"data": data, "scorer": f"{Length.__module__}:{Length.__name__}"})
    _refuse_others(task, folder, [file])
    code = _code(run_task, task=task)
    sys.exit(_export(task, folder, into=stem, format=form, keep="all") or code)


@click.command()
@click.argument("script", type=click.Choice([*SCRIPTS]))
@click.option("--raw-path", type=PLACE, required=True, help="Folder of the input.")
@click.option("--output-dir", type=PLACE, required=True, help="Folder of the Parquet files.")
@click.option("--stat-dir", type=PLACE, help="Old stat files go to preprocess/ in it.")
@click.option("--num-proc", type=int, help="Processes within one file; at most one a core.")
@click.option("--max-tokens", type=int, help="Longer texts are truncated to so many tokens.")
@click.option("--num-files", type=int, help="Takes only the first files.")
@click.option(
    "--languages", "_", is_flag=True, expose_value=False, help="Sub-folders, named after it."
)
@click.argument("languages", metavar="[LANGUAGE]...", nargs=-1)
@_needless("preprocess.seed", "--seed")
@_needless("preprocess.batch_size", "--batch-size")
def preprocess(
    script: str, raw_path: str, output_dir: str, languages: tuple[str, ...], **options: Any
) -> None:
    """Clean and truncate the files of a folder, and ask nothing.

    \b
      modelcall preprocess github --raw-path data/code --output-dir data/clean
      modelcall preprocess repomix --raw-path packs --output-dir clean --languages Python Go
    """
    stats = options.pop("stat_dir")
    known = {"script_type": SCRIPTS[script], "stat_folder": stats, "languages": [*languages]}
    data = {"input_folder": raw_path, "output_folder": output_dir}
    content = {"data": data, "preprocess": {"enabled": True, **known, **options}}
    name = _name(f"preprocess_{script}", raw_path, output_dir)
    sys.exit(_code(run_task, task=_task(name, content)))


@click.command()
@click.option("--input-folder", type=PLACE, required=True, help="Folder of rows.")
@click.option("--output-folder", type=PLACE, required=True, help="Folder of the scores.")
@click.option("--model-config-path", type=PLACE, required=True, help="The model file.")
@click.option("--prompt-config-path", type=PLACE, required=True, help="The prompt file.")
@click.option("--input-key", default="text", show_default=True, help="Column to score.")
@click.option(
    "--prompt-format-key",
    default="code_corpus_description_and_sample",
    show_default=True,
    help="Placeholder of the prompt that receives it.",
)
@click.option("--max-concurrent-files", type=int, default=2, show_default=True)
@click.option("--max-concurrent-requests", type=int, default=10, show_default=True)
@click.option("--debug-files", type=int, help="Takes only the first files.")
@click.option("--debug-items", type=int, help="Takes only the first rows of each file.")
@click.option("--disable-format-validation-retry", "as_it_comes", is_flag=True, help="No repairs.")
@click.option("--no-resume", "--delete-existing", "fresh", is_flag=True, help="Asks all rows anew.")
@click.option("--job-index", type=int, default=0, help="Which of those jobs this is, from 0.")
@click.option("--world-size", type=int, default=1, help="Jobs that share the files.")
@_needless("data.stat_folder", "--stat-folder")
@_needless("concurrency.chunk_size", "--chunk-size")
@_needless("concurrency.parquet_save_interval", "--parquet-save-interval")
def api_call(
    input_folder: str,
    output_folder: str,
    fresh: bool,
    job_index: int,
    world_size: int,
    **given: Any,
) -> None:
    """Score the rows of a folder with a model and a prompt.

    \b
      modelcall api-call --input-folder data/texts --output-folder data/scores
        --model-config-path configs/models/m.yaml --prompt-config-path configs/prompts/p.yaml
    """
    limits = {"max_files": given["debug_files"], "max_items_per_file": given["debug_items"]}
    content: Content = {
        "data": {
            **{"input_folder": input_folder, "output_folder": output_folder},
            **{name: given[name] for name in ("input_key", "prompt_format_key")},
        },
        "model": {"config_path": given["model_config_path"]},
        "prompt": {"config_path": given["prompt_config_path"]},
        "concurrency": {name: n for name, n in given.items() if name.startswith("max_concurrent")},
        "debug": {"enabled": any(limits.values()) or None, **limits},
        "retry": {"enable_format_validation_retry": False} if given["as_it_comes"] else {},
    }
    task = _task(_name("api_call", input_folder, output_folder), content)
    jobs = {"job_index": job_index, "world_size": world_size}
    sys.exit(_code(run_task, task=task, fresh=fresh, **jobs))


@click.command("distillation-generate")
@click.option("-i", "--input-path", "source", type=PLACE, required=True, help="Conversations.")
@click.option("-o", "--output-path", "folder", type=PLACE, required=True, help="Of the answers.")
@click.option("-m", "--model-config", "model", type=PLACE, required=True, help="The model file.")
@click.option("-c", "--concurrency", type=int, default=30, show_default=True, help="In flight.")
@click.option(
    "--retry", "again", is_flag=True, help="Asks again for failed rows, in done files too."
)
@click.option("--no-resume", "fresh", is_flag=True, help="Asks all rows anew.")
@click.option("--log-dir", type=PLACE, help="Folder of log files.")
@_needless("generate_response.batch_size", "-b", "--batch-size")
@_needless("generate_response.flush_interval_secs", "-f", "--flush-interval")
@_needless("logging.level", "--log-level")
def distillation_generate(
    source: str,
    folder: str,
    model: str,
    concurrency: int,
    again: bool,
    fresh: bool,
    log_dir: str | None,
) -> None:
    """Answer the conversations of a JSONL file: NAME.jsonl, and NAME_error.jsonl of failed rows.

    \b
      modelcall distillation-generate -i chats.jsonl -o answers -m configs/models/m.yaml
      modelcall distillation-generate -i chats.jsonl -o answers -m configs/models/m.yaml --retry
    """
    name = _name("response_gen", source, folder)
    step = {"response_config_path": model, "input_path": source, "concurrency": concurrency}
    step["output_path"] = f"{folder}/{ORIGINS}/{name}"
    content = {"task_type": "data_distillation", "generate_response": step}
    task = _task(name, {**content, "logging": {"log_dir": log_dir}})
    stems = map(stem_of, map(decode_key, task.stages[0].keys.now()))
    _refuse_others(task, folder, (f"{stem}{end}.jsonl" for stem in stems for end in ENDS))
    code = _code(run_task, task=task, fresh=fresh)
    if again:
        code = _code(retry, task=load(task.spec.path))
    sys.exit(_export(task, folder, old_names=True, keep_retries=again) or code)
