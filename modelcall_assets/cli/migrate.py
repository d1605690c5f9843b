"""`modelcall migrate`: a file of the old system becomes one of this project."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
import yaml

from modelcall_assets.cli.display import echo, echo_data
from modelcall_assets.cli.output import force_option, refuse_existing
from modelcall_assets.config.block import load_yaml
from modelcall_assets.config.catalog import SUFFIXES
from modelcall_assets.config.migrate import TREATMENTS, Migration, migrate_file
from modelcall_assets.records.secrets import looks_secret

_OTHER_BREAKS = re.compile("[\x85\u2028\u2029\ufeff]")
"""YAML takes these for line breaks or drops them, unless they are escaped."""


@click.command()
@click.argument("old", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where to write the new file; default: standard output.",
)
@force_option
def migrate(old: Path, output: Path | None, force: bool) -> None:
    """Rewrite OLD.yaml, a config file of the old system, for this project.

    Takes files of tasks, models, prompts, data sets and merge groups.

    Lists what is honoured, changed and refused. Exits with 1 when something was refused: a TODO
    stands at its place in the new file. API keys are replaced by references and never shown;
    comments of the old file are not carried over.

    \b
      modelcall migrate old/my_task.yaml --output configs/tasks/my_task.yaml
    """
    if output and output.suffix not in SUFFIXES:
        raise click.BadParameter("the new file is YAML: name it .yaml", param_hint="--output")
    if output and not force:
        refuse_existing("migrate", [output])
    new = migrate_file(load_yaml(old), old.name)
    if new.data is not None:
        text = _text_of(new, old)
        if output:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(text, "utf-8")
        else:
            echo_data(text)
    for line in _told(new):
        echo(line, err=output is None)
    if new.of("refused"):
        sys.exit(1)


def _told(new: Migration) -> Iterable[str]:
    """The list, the refused fields last."""
    for treatment in TREATMENTS:
        for line in new.of(treatment):
            yield f"{treatment}: {line.field}" + (f": {line.reason}" if line.reason else "")
    counts = [f"{len(new.of(treatment))} {treatment}" for treatment in TREATMENTS]
    yield ", ".join(counts)
    if new.data is None:
        yield "nothing is written"
    elif new.of("refused"):
        yield "look for TODO in the new file, then run `modelcall check` on it"
    elif new.data == new.old:
        yield "nothing to change: it is a file of this project already"


def _text_of(new: Migration, old: Path) -> str:
    """The file as it was when nothing changes, comments included; else written anew."""
    same = new.data == new.old and not new.of("refused") and old.suffix in SUFFIXES
    if same and not looks_secret(text := old.read_text("utf-8")):
        return text
    body = yaml.dump(
        new.data, Dumper=_Dumper, allow_unicode=True, sort_keys=False, width=sys.maxsize
    )
    spaced = re.sub(r"\n(?=\w+:\n)", "\n\n", body)
    if yaml.safe_load(spaced) == new.data:  # an empty line can belong to the text before it
        body = spaced
    comments = dict(new.hints)
    for line in new.of("refused"):
        comments[line.field] = f"TODO {line.field}: {line.reason}"
    name = " ".join(old.name.split())
    head = f"# Migrated from {name}: `modelcall migrate` of that file tells what changed.\n"
    return head + _with_comments(body, comments)


def _with_comments(text: str, comments: dict[str, str]) -> str:
    """Each comment above its field, or above the nearest block that is there."""
    root = yaml.compose(text, yaml.SafeLoader)
    lines = text.splitlines(keepends=True)
    places = [(*_place(root, name, len(lines)), comment) for name, comment in comments.items()]
    for row, column, comment in sorted(places, reverse=True):
        lines.insert(row, f"{' ' * column}# {' '.join(comment.split())}\n")
    return "".join(lines)


def _place(node: yaml.Node | None, name: str, end: int) -> tuple[int, int]:
    """Line and column of the field's key; the end of the file if not even its block is there."""
    row, column = end, 0
    for part in re.split(r"[.\[]", name):
        items = node.value if isinstance(node, yaml.MappingNode) else []
        found = next((item for item in items if item[0].value == part), None)
        if found is None:
            break
        key, node = found
        row, column = key.start_mark.line, key.start_mark.column
    return row, column


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as blocks; a value that stands twice is written twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def analyze_scalar(self, scalar: str) -> Any:
        analysis = super().analyze_scalar(scalar)
        analysis.allow_block = analysis.allow_block or _is_block(scalar)
        return analysis


def _is_block(text: str) -> bool:
    """Whether the text can stand as it is, tabs and spaces at the end of lines included."""
    return all(line.replace("\t", "").isprintable() for line in text.split("\n"))


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    style = '"' if _OTHER_BREAKS.search(text) else style
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)
