"""`modelcall create-task`: a task file for data that is there."""

import re
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import yaml
from pydantic_core import PydanticCustomError

from modelcall_assets.cli.init import STARTER
from modelcall_assets.cli.options import NEW_FILE, force_option, misuse, refuse_existing
from modelcall_assets.cli.terminal import echo, print_rows
from modelcall_assets.config import problem_of
from modelcall_assets.config.catalog import find_root, legal_key, load_catalog, load_linked
from modelcall_assets.config.files import Environment, MissingVariable, load_yaml
from modelcall_assets.config.places import is_file, is_within, load_storage, resolve, shown_path
from modelcall_assets.config.prompt import parse_prompt
from modelcall_assets.config.spec import store_options
from modelcall_assets.errors import InputError, SetupError, did_you_mean
from modelcall_assets.records import is_data_file
from modelcall_assets.records.outcome import Row, short
from modelcall_assets.stages.source import ROWS_LOOKED_AT, column_names
from modelcall_assets.storage.files import write_bytes
from modelcall_assets.storage.listing import list_page, stat_file
from modelcall_assets.storage.places import Stores
from modelcall_assets.storage.rows import read_rows
from modelcall_assets.storage.values import dumps
from modelcall_assets.transforms.chatml import ChatmlOptions, to_chatml

BLOCKS = {
    "score": ("data_scoring", "data", "model", "prompt", "concurrency", "sensor"),
    "distil": ("data_distillation", "chatml_conversion", "generate_response", "sensor"),
    "evaluate": ("evaluation", "sources", "generate_response", "grading"),
}
"""The template of each kind, and what a new task has of it beside name and type."""
TEXTS = ("text", "content", "code", "body")
QUESTIONS = ("messages", "conversations", "conversation", "instruction", "question", "prompt")
ANSWERS = ("response", "output", "answer", "completion", "solution", "generated_solution")
KINDS = {
    str: "text",
    bool: "yes or no",
    int: "number",
    float: "number",
    list: "list",
    dict: "object",
}
BENCHMARK = {"name": "SpellingBee", "split": "test", "size": 100}
"""It is made here, without a download."""


@click.command("create-task")
@click.argument("name")
@click.option("--kind", help=f"{', '.join(BLOCKS)}: texts, conversations, or a model.")
@click.option(
    "--template",
    type=click.Choice(["basic", "distributed"]),
    help="basic: --kind score; distributed: the same, for several jobs that share the files.",
)
@click.option("--input", metavar="PLACE", help="The data: a folder, a file or a URI.")
@click.option("--text", metavar="COLUMN", help="The column that is rated, or answered.")
@click.option("--prompt", type=click.Path(), help="What to ask about a text that is rated.")
@click.option("--model", type=click.Path(), help="Whom to ask.")
@click.option("--output", type=NEW_FILE, help="Where it goes; default: configs/tasks/NAME.yaml.")
@force_option
def create_task(name: str, output: Path | None, force: bool, **options: str | None) -> None:
    """Write the file of a new task, called NAME, for data that is there.

    It looks at the data and asks what it has to know; without a terminal each answer is an option.
    Places are those of task files: relative ones begin at the project. A task that distils reads
    messages, ShareGPT, or questions with or without answers; one that evaluates begins with a
    benchmark that needs no download.

    \b
      modelcall create-task my_task
      modelcall create-task my_task --kind score --input data/my_texts --text text \\
        --prompt configs/prompts/en_corpus_rating_v0.1.yaml --model configs/models/rehearsal.yaml
    """
    root = find_root(Path.cwd())
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise misuse("NAME", "not a name", "letters, digits, _, - and .", name)
    path = (output or root / "configs/tasks" / f"{name}.yaml").resolve()
    sets = root / "configs/distillation" / f"{name}.yaml"
    for spec in load_catalog(root).tasks:
        if spec.key == legal_key(name) and spec.path != path:
            raise misuse("NAME", f"{spec.file_name} has it", have=name, fix="choose another")
    asked = _Asked(root, options)
    kind = "score" if options["template"] else asked.answer("kind", "score", BLOCKS)
    refuse_existing([path, *([sets] if kind == "distil" else [])], force, "NAME")
    home, values, files = f"data/{name}", dict[str, Any](), dict[Path, str]()
    if kind == "evaluate":
        values["sources.tasks"] = [BENCHMARK]
    else:
        place = asked.answer("input", home)
        where, rows = _first_rows(root, name, place)
        home = f"output/{name}" if is_within(str(root / "data"), where) else home
        names, likely = (
            [*column_names(rows)],
            _likely(rows, TEXTS if kind == "score" else QUESTIONS),
        )
        print_rows([_described(column, rows, column == likely) for column in names])
        text = asked.answer("text", likely, names)
        if kind == "score":
            prompt = asked.file("prompt", f"{{{text}}}", "{text}")
            values |= {"data.input_folder": place, "data.input_key": text}
            values["data.prompt_format_key"] = _placeholder(root, prompt, text)
            values["prompt.config_path"] = prompt
        else:
            values["chatml_conversion.dataset_config_path"] = shown_path(sets, root)
            values["chatml_conversion.input_dir"] = place
            files[sets] = yaml.safe_dump(_data_set(where, rows, text), allow_unicode=True)
    model = asked.file("model", "REHEARSAL")
    asks = "model.config_path" if kind == "score" else "generate_response.response_config_path"
    values |= {asks: model, "task_name": name}
    if options["template"] == "distributed":
        values |= {"distributed.enabled": True, "distributed.world_size": 2}
    files[path] = _filled_in(kind, home, values)
    for file, content in files.items():
        write_bytes(file, content.encode())
        echo(f"made {shown_path(file, root)}")
    load_linked(path, root)
    free = "modelcall rehearse -- " if "rehearsal" in model else ""
    echo(f"next: modelcall check {shown_path(path, root)}")
    echo(f"      modelcall plan {name}")
    echo(f"      {free}modelcall try {name}")
    echo(f"      {free}modelcall run-task {name}")


@dataclass(frozen=True)
class _Asked:
    """What is not among the options is asked on the terminal."""

    root: Path
    options: Mapping[str, str | None]

    def answer(
        self, option: str, likely: str, known: Collection[str] = (), is_path: bool = False
    ) -> str:
        """One of those known, or a file that is there. UsageError when there is no terminal."""
        told = ", ".join(known)

        def checked(text: str) -> str:
            if is_file(self.root / text) if is_path else not known or text in known:
                return text
            raise misuse(f"--{option}", "unknown", told, text, did_you_mean(text, known))

        if (given := self.options[option]) is not None:
            return checked(given)
        if not sys.stdin.isatty():
            raise misuse(f"--{option}", "missing", told, fix=f"add --{option} {likely}")
        question = f"{option} ({told})" if told else option
        return click.prompt(question, likely, value_proc=checked)

    def file(self, option: str, *words: str) -> str:
        """By default the first of configs/ that holds the first word which any of them holds."""
        found = sorted((self.root / "configs" / f"{option}s").glob("*.yaml"))
        fitting = (each for word in words for each in found if word in each.read_text("utf-8"))
        likely = shown_path(next(fitting, found[0] if found else Path("FILE")), self.root)
        return self.answer(option, likely, [shown_path(each, self.root) for each in found], True)


def _first_rows(root: Path, name: str, place: str) -> tuple[str, list[Row]]:
    """Where the data is, and its first rows; bad lines are told. InputError when there are none."""
    storage, env = load_storage(root), Environment.for_task(root)
    try:
        base = storage.file.data_root and resolve(storage.file.data_root, root, env, name)
        where = resolve(place, root, env, name, base)
    except MissingVariable as error:
        raise misuse("--input", f"variable {error.name} is not set", have=place) from None
    except PydanticCustomError as error:
        raise SetupError([problem_of(error, "--input", "", place)]) from None
    options, problems = store_options(storage, env, {"": where}, "--input")
    if problems:
        raise SetupError(problems)
    folder = Stores(options).place(where)
    files = [stat_file(folder)] if is_data_file(where) else list_page(folder)[0]
    for file in files:
        items = [*read_rows(file.place, limit=ROWS_LOOKED_AT)]
        for item in items:
            if not isinstance(item, dict):
                echo(f"warning: {file.uri}: {item.detail}", err=True)
        if rows := [item for item in items if isinstance(item, dict)]:
            echo(f"{len(files):,} files; of the first {len(rows)} rows of {file.key_path}:")
            return where, rows
    raise InputError(f"{where}: no rows in JSONL, Parquet or Arrow files; put the data there")


def _likely(rows: Sequence[Row], usual: Sequence[str]) -> str:
    """The first of the usual columns that is there, else the one with the longest texts."""
    names = column_names(rows)
    longest = max(names, key=lambda n: sum(len(v) for r in rows if type(v := r.get(n)) is str))
    return next((name for name in usual if name in names), longest)


def _described(name: str, rows: Sequence[Row], is_likely: bool) -> dict[str, Any]:
    found = [row[name] for row in rows if row.get(name) not in (None, "")]
    kinds = dict.fromkeys(KINDS.get(type(value), "other") for value in found)
    sample = found[0] if found else ""
    text = sample if isinstance(sample, str) else dumps(sample).decode()
    return {
        "column": name,
        "kind": " / ".join(kinds),
        "filled": f"{len(found)} of {len(rows)}",
        "sample": short(" ".join(text.split())),
        "likely": "this one" if is_likely else "",
    }


def _placeholder(root: Path, file: str, column: str) -> str:
    """Of the prompt, that for the text."""
    prompt, problems = parse_prompt(load_yaml(root / file, file), file)
    if prompt is None:
        raise SetupError(problems)
    names = prompt.placeholders
    return next((name for name in (column, "text", *sorted(names)) if name in names), column)


def _data_set(where: str, rows: Sequence[Row], column: str) -> dict[str, Any]:
    """The entry of a dataset config by which the rows are conversations."""
    names = column_names(rows)
    styles = [("messages", {"messages": column}), ("sharegpt", {"conversations": column})]
    for answer in (name for name in ANSWERS if name in names and name != column):
        asked = {"prompt": column, "response": answer}
        if "input" in names:
            styles.append(("instruction_input", {**asked, "input": "input"}))
        styles.append(("prompt_response", asked))
    for style, mapping in (*styles, ("prompt_text_only", {"prompt_text": column})):
        options = ChatmlOptions(style, mapping)
        if any(isinstance(to_chatml(row, options), dict) for row in rows):
            key = where.rstrip("/").rpartition("/")[2]
            return {key: {"format_style": style, "column_mapping": mapping}}
    expected = "messages, ShareGPT's list, or a text"
    raise misuse("--text", "no row has a conversation or a question there", expected, column)


def _filled_in(kind: str, home: str, values: Mapping[str, Any]) -> str:
    """The template with these values, by field, and without the blocks that hold only defaults."""
    template, *names = BLOCKS[kind]
    file = f"configs/tasks/templates/{template}_template.yaml"
    text = re.sub(r"data/my_[a-z]+", home, (STARTER / file).read_text("utf-8"))
    wanted = {"task_name", "task_type", *names, *(each.partition(".")[0] for each in values)}
    blocks = [each for each in re.split(r"(?m)^(?=\w)", text) if each.partition(":")[0] in wanted]
    for at, block in enumerate(blocks):
        for place, value in values.items():
            if place.partition(".")[0] == block.partition(":")[0]:
                blocks[at] = block = _with(block, place.rpartition(".")[2], value)
    head = f"# {file} has the other fields, which stand at their default.\n"
    return head + "".join(blocks).replace("REQUIRED. ", "").rstrip() + "\n"


def _with(block: str, name: str, value: Any) -> str:
    """The value in place of the one that is there; the comment beside it stays."""
    shown = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**9)
    line = rf"(?m)^( *){name}:[^#\n]*(.*)(?:\n\1 +.*)*"
    first = shown.removesuffix("...\n").strip()
    return re.sub(line, lambda found: f"{found[1]}{name}: {first}  {found[2]}".rstrip(), block)
