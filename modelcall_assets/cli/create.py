"""`modelcall init` and `create-task`: a project, and a task for data that is there."""

import os
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

import click
import yaml

from modelcall_assets.cli.options import NEW_FILE, force_option, misuse, refuse_existing
from modelcall_assets.cli.terminal import echo, print_rows
from modelcall_assets.config.catalog import (
    find_root,
    is_root,
    legal_key,
    load_catalog,
    load_linked,
    load_model,
    parse_task,
)
from modelcall_assets.config.distillation import GENERATE
from modelcall_assets.config.files import Environment, load_yaml
from modelcall_assets.config.places import is_file, is_within, load_storage, shown_path
from modelcall_assets.config.prompt import parse_prompt
from modelcall_assets.config.spec import TaskSpec, placed
from modelcall_assets.errors import InputError, SetupError, did_you_mean
from modelcall_assets.records.outcome import Row, short
from modelcall_assets.stages.source import ROWS_LOOKED_AT, column_names
from modelcall_assets.stages.task import Task
from modelcall_assets.storage.files import write_bytes
from modelcall_assets.storage.formats import KINDS
from modelcall_assets.storage.rows import read_rows
from modelcall_assets.storage.values import dumps
from modelcall_assets.transforms.chatml import ChatmlOptions, to_chatml

STARTER = Path(__file__).parent.with_name("starter")
NEW_TASK = Path(__file__).with_name("new_task")  # a template of each kind
SHAPES = "configs/distillation/datasets.yaml"
UNUSED = {"score": (), "distil": ("template", "prompt")}
UNUSED["evaluate"] = (*UNUSED["distil"], "input", "text")
TEXTS = ("text", "content", "code", "body")  # are usually rated, the first that is there


@click.command()
@click.argument("folder", default=".", type=click.Path(file_okay=False, path_type=Path))
def init(folder: Path) -> None:
    """Make a project in FOLDER, by default here: models, prompts, templates, and a task that
    rates ten texts for free.

    Files that are there stay as they are; what is missing is added.

    \b
      modelcall init my_project
    """
    home, made = folder.resolve(), 0
    taken = next((each for each in home.parents if is_root(each)), None)
    if taken is not None and home.is_relative_to(taken / "configs"):
        raise misuse("FOLDER", f"in configs/ of the project {taken}", fix="choose another")
    for here, _, names in os.walk(STARTER, followlinks=True):
        for source in (Path(here, name) for name in sorted(names)):
            name = source.name.replace("gitignore", ".gitignore")  # git takes no notice of ours
            if os.path.lexists(path := folder / source.relative_to(STARTER).with_name(name)):
                echo(f"{path} is there already, and stays as it is")
            else:
                write_bytes(path, source.read_bytes())
                made += 1
    echo(f"{made} files made in {home}; next, in that folder:")
    echo("  modelcall rehearse -- modelcall run-task rehearsal")
    echo("  modelcall create-task my_task")
    echo("  modelcall ui --rehearse")


@click.command("create-task")
@click.argument("name")
@click.option("--kind", help="score texts, distil conversations, or evaluate a model.")
@click.option("--template", type=click.Choice(["basic", "distributed"]), help="Of --kind score.")
@click.option("--input", metavar="PLACE", help="The data: a folder, a file or a URI.")
@click.option("--text", metavar="COLUMN", help="The column that is rated, or answered.")
@click.option("--prompt", type=click.Path(), help="What to ask about a text that is rated.")
@click.option("--model", type=click.Path(), help="Whom to ask.")
@click.option("--output", type=NEW_FILE, help="Where it goes; default: configs/tasks/NAME.yaml.")
@force_option
def create_task(name: str, output: Path | None, force: bool, **given: str | None) -> None:
    """Write the file of a new task, called NAME, for data that is there.

    It looks at the data and asks for what no option says; without a terminal it takes what it would
    propose.
    Relative places begin at the project. A task that distils takes messages, ShareGPT, or questions
    with or without answers; one that evaluates begins with a benchmark that needs no download.

    \b
      modelcall create-task my_task --input data/my_texts
    """
    root = find_root(Path.cwd())
    path = (output or root / "configs/tasks" / f"{name}.yaml").resolve()
    sets = root / "configs/distillation" / f"{name}.yaml"
    if not re.fullmatch(r"\w[\w.-]{,60}", name):  # three bytes each fit a file's name
        raise misuse("NAME", "not a name", "at most 61 letters, digits, _, - and .", name)
    for spec in load_catalog(root).tasks:
        if spec.key == legal_key(name) and spec.path != path:
            raise misuse("NAME", f"{spec.file_name} has it", have=name, fix="choose another")
    kinds = sorted(each.stem for each in NEW_TASK.iterdir())
    likely = {"kind": "score"} if given["template"] and not given["kind"] else {}
    kind = _answer({**given, **likely}, "kind", "score", kinds)
    if unused := next((option for option in UNUSED[kind] if given[option] is not None), None):
        raise misuse(f"--{unused}", f"a task of --kind {kind} has none", fix="leave it out")
    files = {sets: ""} if kind == "distil" else {}
    refuse_existing([path, *files], force, "NAME")
    jobs = 2 if given["template"] == "distributed" else 1
    values: dict[str, Any] = {"task_name": name, "jobs": jobs, "datasets": shown_path(sets, root)}
    home = "data"
    if kind != "evaluate":
        values["input"] = place = _answer(given, "input", f"data/{name}")
        where, rows = _first_rows(root, name, place)
        home = "output" if is_within(str(root / home), where) else home
        if kind == "distil":
            files[sets] = _dumped({where.rpartition("/")[2]: _data_set(given["text"], rows)}) + "\n"
        elif is_file(where):
            raise misuse("--input", "a file", "the folder that it is in", place)
        else:
            values |= _rating(root, given, rows)
    values["model"] = model = _answer(given, "model", "configs/models/rehearsal.yaml")
    load_model(root / model, root)
    template = Template((NEW_TASK / f"{kind}.yaml").read_text("utf-8"))
    as_yaml = {field: _dumped(value) for field, value in values.items()}
    text = template.substitute(as_yaml, name=name, home=home)
    files[path] = re.sub(r"^( *[^\s#].*?) +# ", _aligned, text, flags=re.M)
    for file, text in files.items():
        write_bytes(file, text.encode())
        echo(f"made {shown_path(file, root)}")
    load_linked(path, root)
    free = "modelcall rehearse -- " if "rehearsal" in model else ""
    echo(f"next: modelcall check {shown_path(path, root)}")
    for command in ("modelcall plan", f"{free}modelcall try", f"{free}modelcall run-task"):
        echo(f"      {command} {name}")


def _answer(given: Mapping[str, Any], option: str, likely: str, known: Sequence[str] = ()) -> str:
    """What the option says, else who sits at the terminal, else what is likely."""
    answer, told = given[option], ", ".join(known)
    if answer is None and not sys.stdin.isatty():
        if option == "input":
            raise misuse(
                "--input", "missing", "a folder, a file or a URI", fix=f"add --input {likely}"
            )
        echo(f"{option}: {likely}")
        return likely
    if answer is None:
        return click.prompt(option, likely, type=click.Choice(known) if known else str)
    if known and answer not in known:
        raise misuse(f"--{option}", "unknown", told, answer, did_you_mean(answer, known))
    return answer


def _first_rows(root: Path, name: str, place: str) -> tuple[str, list[Row]]:
    """Where the data is, and its first rows; bad lines are told. InputError when there are none."""
    step = {"input_path": place, "output_path": "/unused", "response_config_path": "unused"}
    task, problems = parse_task(
        {"task_name": name, "task_type": GENERATE, GENERATE: step}, "--input"
    )
    env = Environment.for_task(root)
    spec = task and TaskSpec(root, root, name, name, task, env, "--input")
    if spec is not None:
        spec, problems = placed(spec, load_storage(root))
    if spec is None or problems:
        raise SetupError(problems)
    files = Task(spec).inputs.files()
    for file in files:
        items = [*read_rows(file.place, limit=ROWS_LOOKED_AT)]
        for bad in (item for item in items if not isinstance(item, dict)):
            echo(f"warning: {file.uri}: {bad.detail}", err=True)
        if rows := [item for item in items if isinstance(item, dict)]:
            echo(f"{len(files):,} files; of the first {len(rows)} rows of {file.key_path}:")
            return spec.input_folder, rows
    raise InputError(f"{place}: no rows; put JSONL, Parquet or Arrow files there")


def _show(rows: Sequence[Row], likely: Collection[str]) -> None:
    shown: list[dict[str, Any]] = []
    for name in column_names(rows):
        found = [row[name] for row in rows if row.get(name) not in (None, "")]
        kinds = dict.fromkeys(KINDS.get(type(value), "an object") for value in found)
        text = found[0] if found and type(found[0]) is str else dumps(found[:1]).decode()[1:-1]
        filled, sample = f"{len(found)} of {len(rows)}", short(" ".join(text.split()))
        told = {"column": name, "holds": " or ".join(kinds), "filled": filled, "sample": sample}
        shown.append({**told, "likely": name in likely})
    print_rows(shown)


def _rating(root: Path, given: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, str]:
    """The column that is rated, and the prompt with its placeholder for it."""
    names = [*column_names(rows)]
    longest = max(names, key=lambda n: sum(len(v) for r in rows if type(v := r.get(n)) is str))
    likely = next((name for name in TEXTS if name in names), longest)
    _show(rows, [likely])
    text = _answer(given, "text", likely, names)
    file = _answer(given, "prompt", "configs/prompts/en_corpus_rating_v0.1.yaml")
    prompt, problems = parse_prompt(load_yaml(root / file, file), file)
    if prompt is None:
        raise SetupError(problems)
    known = prompt.placeholders
    placeholder = next((name for name in (text, "text", *sorted(known)) if name in known), text)
    return {"text": text, "prompt": file, "placeholder": placeholder}


def _data_set(text: str | None, rows: Sequence[Row]) -> dict[str, Any]:
    """The entry of a dataset config by which the rows are conversations: of questions in that
    column, else of a usual shape, first those with the most columns."""
    asked = {"format_style": "prompt_text_only", "column_mapping": {"prompt_text": text}}
    shapes: list[Any] = [asked] if text else [*load_yaml(STARTER / SHAPES).values()]
    names = column_names(rows)
    for shape in sorted(shapes, key=lambda shape: -len(shape["column_mapping"])):
        style, mapping = shape["format_style"], shape["column_mapping"]
        made = (to_chatml(row, ChatmlOptions(style, mapping)) for row in rows)
        if {*names}.issuperset(mapping.values()) and any(isinstance(row, dict) for row in made):
            _show(rows, mapping.values())
            return {"format_style": style, "column_mapping": mapping}
    option, fix = "--text" if text else "--input", f"name a column with --text, or see {SHAPES}"
    raise misuse(option, "neither conversations nor questions", have=", ".join(names), fix=fix)


def _aligned(line: re.Match[str]) -> str:
    return f"{line[1]:<38} # "


def _dumped(value: Any) -> str:
    text = yaml.safe_dump(value, allow_unicode=True, sort_keys=False, width=10**9)
    return text.removesuffix("...\n").strip()
