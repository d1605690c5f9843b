"""`modelcall pipeline`, `preprocess`, `api-call` and `distillation-generate`, the commands of the
old system: each writes the task file that does the same, and runs it."""

import hashlib
import os
import shlex
import sys
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

import click
import yaml

from modelcall_assets.cli.export import export
from modelcall_assets.cli.options import load, misuse
from modelcall_assets.cli.run import retry, run_task
from modelcall_assets.cli.terminal import echo
from modelcall_assets.config.catalog import find_root
from modelcall_assets.config.distillation import STEP_FIELDS
from modelcall_assets.config.places import is_uri
from modelcall_assets.config.task import TASK_FIELDS
from modelcall_assets.records import decode_key, stem_of
from modelcall_assets.stages.export import ORIGINS
from modelcall_assets.stages.task import Task
from modelcall_assets.storage.files import write_bytes
from modelcall_assets.storage.listing import exists
from modelcall_assets.transforms.length import Length

OLD_KEY = "code_corpus_description_and_sample"
SCRIPTS = {"github": "github_raw_code", "repomix": "repo_xml", "triplet": "triplet_filter"}
NEEDLESS = {old.path: old.instead for old in (*TASK_FIELDS, *STEP_FIELDS) if not old.works}


def path(text: str) -> str:
    """As a task file in the project has it; a URI stays."""
    here, root = Path(os.path.abspath(text)), find_root(Path.cwd())  # noqa: PTH100
    inside = f"./{here.relative_to(root).as_posix()}" if here.is_relative_to(root) else str(here)
    return text if is_uri(text) else inside


NEEDED: dict[str, Any] = {"type": path, "required": True}
OFF: dict[str, Any] = {"flag_value": False, "default": None}


def _sets(field: str, *names: str, **options: Any) -> Callable[[Any], Any]:
    """An option that is this field of the task file; where nothing is to be set that is told."""

    def put(context: click.Context, option: click.Parameter, value: Any) -> Any:
        if value is not None and field in NEEDLESS:
            context.meta.setdefault("needless", []).append(f"{option.opts[-1]} ({NEEDLESS[field]})")
        elif value is not None:
            context.meta.setdefault("fields", {})[field] = value
        return value

    options |= {"hidden": field in NEEDLESS, "show_default": True, "callback": put}
    return click.option(*names, **options)


def _task(kind: str, source: str, target: str, **more: Any) -> Task:
    """Of the command's options and `more` fields. Its file is written, the same one for the same
    places. UsageError when there is one that somebody else has written, or has changed."""
    name = f"{kind}_{stem_of(PurePosixPath(source).name)}_{_digest(source + target)[:6]}"
    told, content = click.get_current_context().meta, dict[str, Any](task_name=name)
    for field, value in {**more, **told.get("fields", {})}.items():
        block, _, own = field.partition(".")
        content |= {block: {**content.get(block, {}), own: value}} if own else {block: value}
    if "debug" in content:
        content["debug"]["enabled"] = True
    body = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    file = find_root(Path.cwd()) / f"configs/tasks/one_off/{name}.yaml"
    if file.exists():
        head, _, rest = file.read_text("utf-8").partition("\n")
        if not head.endswith(_digest(rest)):
            wrong = "this command has not written it, or it was changed since"
            fix = f"run it as it is: modelcall run-task {file}; or move it away"
            raise misuse(str(file), wrong, fix=fix)
    command = " ".join(shlex.join(["modelcall", *sys.argv[1:]]).split())
    head = f"# Written by `{command}`, and anew until it is changed: {_digest(body)}"
    write_bytes(file, f"{head}\n{body}".encode())
    echo(f"task file: {file}")
    if needless := told.get("needless"):
        echo(f"not needed here: {'; '.join(needless)}")
    return load(file)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _code(command: click.Command, **options: Any) -> int:
    """How the command ends."""
    try:
        click.get_current_context().invoke(command, **options)
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def _leave(task: Task, folder: str, names: Iterable[str], **form: Any) -> NoReturn:
    """Runs the task and puts copies of its latest rows into the folder, of rejected results too.
    UsageError when a file is in the way that no export has left."""
    output = task.spec.resolved(folder)
    place = task.layout.place(output)
    for name in names:
        if exists(place / name) and not exists(place / ORIGINS / f"{name}.jsonl"):
            fix = "move it away; or name this folder in a task file, and `modelcall adopt` takes it"
            raise misuse("OUTPUT", f"{place / name} is there, and not by this command", fix=fix)
    fresh = click.get_current_context().params.get("fresh", False)
    code = _code(run_task, task=task, fresh=fresh)
    if form.get("keep_retries"):
        code = _code(retry, task=load(task.spec.path)) or code
    form |= {"tasks": (task.spec.path,), "output": output, "force": True, "rejected": True}
    sys.exit(_code(export, **form) or code)


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
    start = "tos://" if fs == "tos" else os.path.join(root, "")  # noqa: PTH118
    source, target = (path(text if is_uri(text) else start + text) for text in (source, target))
    folder, _, file = target.rpartition("/")
    stem, _, form = file.rpartition(".")
    if not stem or form not in ("jsonl", "parquet"):
        raise misuse("OUTPUT", "neither JSONL nor Parquet", "a name in .jsonl or .parquet", file)
    data = {"input_folder": source, "output_folder": f"{folder}/{ORIGINS}/pipeline_{stem}"}
    scorer = f"{Length.__module__}:{Length.__name__}"
    task = _task("pipeline", source, target, data=data, scorer=scorer)
    _leave(task, folder, [file], into=stem, format=form, keep="all")


@click.command()
@click.argument("script", type=click.Choice([*SCRIPTS]))
@_sets("data.input_folder", "--raw-path", **NEEDED, help="Folder of the input.")
@_sets("data.output_folder", "--output-dir", **NEEDED, help="Of Parquet files.")
@_sets("preprocess.stat_folder", "--stat-dir", type=path, help="Of stat files, in preprocess/.")
@_sets("preprocess.num_proc", "--num-proc", type=int, help="Processes within one file.")
@_sets("preprocess.max_tokens", "--max-tokens", type=int, help="Where texts are truncated.")
@_sets("preprocess.num_files", "--num-files", type=int, help="Takes only the first files.")
@_sets("preprocess.seed", "--seed")
@_sets("preprocess.batch_size", "--batch-size")
@click.option("--languages", "_", is_flag=True, expose_value=False, help="Only these folders.")
@click.argument("languages", metavar="[LANGUAGE]...", nargs=-1)
def preprocess(script: str, languages: Any, raw_path: str, output_dir: str, **_: Any) -> None:
    """Clean and truncate the files of a folder, and ask nothing.

    \b
      modelcall preprocess github --raw-path data/code --output-dir data/clean
      modelcall preprocess repomix --raw-path packs --output-dir clean --languages Python Go
    """
    chosen = {"languages": [*languages]} if languages else {}
    block = {"enabled": True, "script_type": SCRIPTS[script], **chosen}
    task = _task(f"preprocess_{script}", raw_path, output_dir, preprocess=block)
    sys.exit(_code(run_task, task=task))


@click.command()
@_sets("data.input_folder", "--input-folder", **NEEDED, help="Folder of rows.")
@_sets("data.output_folder", "--output-folder", **NEEDED, help="Of the scores.")
@_sets("model.config_path", "--model-config-path", **NEEDED, help="Model file.")
@_sets("prompt.config_path", "--prompt-config-path", **NEEDED, help="Prompt file.")
@_sets("data.input_key", "--input-key", default="text", help="Column to score.")
@_sets("data.prompt_format_key", "--prompt-format-key", default=OLD_KEY, help="Its placeholder.")
@_sets("concurrency.max_concurrent_files", "--max-concurrent-files", type=int, default=2)
@_sets("concurrency.max_concurrent_requests", "--max-concurrent-requests", type=int, default=10)
@_sets("debug.max_files", "--debug-files", type=int, help="Takes only the first files.")
@_sets("debug.max_items_per_file", "--debug-items", type=int, help="Only the first rows of each.")
@_sets("retry.enable_format_validation_retry", "--disable-format-validation-retry", **OFF)
@_sets("data.stat_folder", "--stat-folder")
@_sets("concurrency.chunk_size", "--chunk-size")
@_sets("concurrency.parquet_save_interval", "--parquet-save-interval")
@click.option("--no-resume", "--delete-existing", "fresh", is_flag=True, help="Asks all rows anew.")
@click.option("--job-index", type=int, default=0, help="Which of those jobs this is, from 0.")
@click.option("--world-size", type=int, default=1, help="Jobs that share the files.")
def api_call(
    input_folder: str, output_folder: str, fresh: bool, job_index: int, world_size: int, **_: Any
) -> None:
    """Score the rows of a folder with a model and a prompt.

    \b
      modelcall api-call --input-folder data/texts --output-folder data/scores \\
        --model-config-path configs/models/m.yaml --prompt-config-path configs/prompts/p.yaml
    """
    task = _task("api_call", input_folder, output_folder)
    sys.exit(_code(run_task, task=task, fresh=fresh, job_index=job_index, world_size=world_size))


@click.command()
@_sets("generate_response.input_path", "-i", "--input-path", **NEEDED, help="Conversations.")
@click.option("-o", "--output-path", "folder", **NEEDED, help="Of the answers.")
@_sets("generate_response.response_config_path", "-m", "--model-config", **NEEDED)
@_sets("generate_response.concurrency", "-c", "--concurrency", type=int, default=30)
@_sets("generate_response.batch_size", "-b", "--batch-size")
@_sets("generate_response.flush_interval_secs", "-f", "--flush-interval")
@_sets("logging.level", "--log-level")
@_sets("logging.log_dir", "--log-dir", type=path, help="Folder of log files.")
@click.option("--retry", "again", is_flag=True, help="Asks again for failed rows.")
@click.option("--no-resume", "fresh", is_flag=True, help="Asks all rows anew.")
def distillation_generate(input_path: str, folder: str, again: bool, **_: Any) -> None:
    """Answer the conversations of a JSONL file: NAME.jsonl, and NAME_error.jsonl of failed rows.

    \b
      modelcall distillation-generate -i chats.jsonl -o answers -m configs/models/m.yaml
      modelcall distillation-generate -i chats.jsonl -o answers -m configs/models/m.yaml --retry
    """
    step = {"output_path": f"{folder}/{ORIGINS}/{stem_of(PurePosixPath(input_path).name)}"}
    more = {"task_type": "data_distillation", "generate_response": step}
    task = _task("response_gen", input_path, folder, **more)
    stems = map(stem_of, map(decode_key, task.stages[0].keys.now()))
    names = [f"{stem}{end}.jsonl" for stem in stems for end in ("", "_error")]
    _leave(task, folder, names, old_names=True, keep_retries=again)
