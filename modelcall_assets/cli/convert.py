"""`modelcall split`, `join` and `migrate`: files of others."""

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from math import ceil
from pathlib import Path
from typing import Any

import click
import yaml

from modelcall_assets.cli.terminal import (
    EXISTING_FILE,
    NEW_FILE,
    echo,
    echo_data,
    force_option,
    misuse,
    refuse_existing,
)
from modelcall_assets.config.block import load_yaml
from modelcall_assets.config.catalog import SUFFIXES
from modelcall_assets.config.migrate import TREATMENTS, Migration, migrate_file
from modelcall_assets.errors import InputError
from modelcall_assets.records.secrets import looks_secret
from modelcall_assets.storage.files import open_input, publish, write_lines

MOST_CHUNKS = 9999


@click.command()
@click.argument("file", type=EXISTING_FILE)
@click.option("--chunks", type=click.IntRange(1, MOST_CHUNKS), required=True)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="Default: FILE without its suffix.",
)
@force_option
def split(file: Path, chunks: int, output: Path | None, force: bool) -> None:
    """Cut FILE.jsonl into NAME_split_0001.jsonl, NAME_split_0002.jsonl and so on.

    Every piece but the last has ceil(lines / chunks) lines, so that there may be fewer of them than
    asked for. Lines stay as they are.

    \b
      modelcall split big.jsonl --chunks 100 --output pieces
    """
    if file.suffix != ".jsonl":
        raise misuse(file.name, "only JSONL can be cut by lines")
    folder = output or file.with_suffix("")
    with open_input(file) as source:
        lines = sum(1 for _ in source)
    if not lines:
        raise InputError(f"{file}: there is no line in this file")
    size = ceil(lines / chunks)
    names = [f"{file.stem}_split_{number:04}.jsonl" for number in range(1, ceil(lines / size) + 1)]
    older = {path.name for path in folder.glob("*.jsonl")} - {*names}
    if older := sorted(name for name in older if name.startswith(f"{file.stem}_split_")):
        wrong = f"there are pieces of an earlier split, such as {older[0]}"
        fix = "delete them or choose another folder"
        raise misuse("--output", wrong, have=str(folder), fix=fix)
    refuse_existing((folder / name for name in names), force)
    with open_input(file) as source:
        for name in names:
            _write(folder / name, islice(source, size))
    fewer = "" if len(names) == chunks else f" ({chunks:,} were asked for)"
    echo(f"{lines:,} lines in {len(names):,} files of at most {size:,}{fewer}: {folder}")


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--output",
    type=NEW_FILE,
    metavar="FILE",
    help="Default: FOLDER_merged.jsonl, beside FOLDER.",
)
@force_option
def join(folder: Path, output: Path | None, force: bool) -> None:
    """Put the results of split pieces together, in the order of their paths.

    Looks into the sub-folders of FOLDER whose names contain "split", or into FOLDER itself if there
    are none. Files named *_error.jsonl become OUTPUT_error.jsonl, those with _retry in their names
    are left out.

    \b
      modelcall join results/my_model
      modelcall join results/my_model --output my_model.jsonl
    """
    good_path = output or folder.absolute().with_name(f"{folder.absolute().name}_merged.jsonl")
    error_path = good_path.with_name(f"{good_path.stem}_error{good_path.suffix}")
    below = [path for path in folder.iterdir() if path.is_dir() and "split" in path.name]
    results = (path for place in below or [folder] for path in place.glob("*.jsonl"))
    paths = sorted(path for path in results if "_retry" not in path.name)
    errors = [path for path in paths if "_error" in path.name]
    good = [path for path in paths if path not in errors]
    if not paths:
        raise InputError(f"{folder}: there are no results to join")
    if {path.resolve() for path in paths} & {good_path.resolve(), error_path.resolve()}:
        raise misuse("--output", "the output is one of the files to join", fix="choose another")
    refuse_existing((good_path, error_path), force)
    succeeded = _write(good_path, _lines(good))
    failed = _write(error_path, _lines(errors)) if errors else 0
    if not errors:
        error_path.unlink(missing_ok=True)
    rows = succeeded + failed
    rate = f" ({succeeded / rows:.2%})" if rows else ""
    echo(f"{len(good)} files: {succeeded:,} of {rows:,} rows succeeded{rate}: {good_path}")
    if errors:
        echo(f"{len(errors)} error files: {failed:,} rows: {error_path}")


def _lines(paths: Sequence[Path]) -> Iterator[bytes]:
    """All lines; the last one of a file ends as the others do."""
    for path in paths:
        with open_input(path) as file:
            for line in file:
                yield line if line.endswith(b"\n") else line + b"\n"


def _write(path: Path, lines: Iterator[bytes]) -> int:
    """Publish the lines; gives their number, blank ones left out."""
    count = 0

    def counted() -> Iterator[bytes]:
        nonlocal count
        for line in lines:
            count += bool(line.strip())
            yield line

    with publish(path) as out:
        write_lines(out, counted())
    return count


_OTHER_BREAKS = re.compile("[\x85\u2028\u2029\ufeff]")
"""YAML takes these for line breaks or drops them, unless they are escaped."""


@click.command()
@click.argument("old", type=EXISTING_FILE)
@click.option(
    "--output", type=NEW_FILE, help="Where to write the new file; default: standard output."
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
    refuse_existing([output] if output else [], force)
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
        for name, reason in new.of(treatment).items():
            yield f"{treatment}: {name}" + (f": {reason}" if reason else "")
    yield ", ".join(f"{len(new.of(treatment))} {treatment}" for treatment in TREATMENTS)
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
    body = yaml.dump(new.data, Dumper=_Dumper, allow_unicode=True, sort_keys=False, width=10**9)
    spaced = re.sub(r"\n(?=\w+:\n)", "\n\n", body)
    if yaml.safe_load(spaced) == new.data:  # an empty line can belong to the text before it
        body = spaced
    todo = {name: f"TODO {name}: {reason}" for name, reason in new.of("refused").items()}
    name = " ".join(old.name.split())
    head = f"# Migrated from {name}: `modelcall migrate` of that file tells what changed.\n"
    return head + _with_comments(body, new.hints | todo)


def _with_comments(text: str, comments: dict[str, str]) -> str:
    """Each comment above its field, or above the nearest block that is there; else at the end."""
    root, lines = yaml.compose(text, yaml.SafeLoader), text.splitlines(keepends=True)
    places: list[tuple[int, int, str]] = []
    for name, comment in comments.items():
        node, row, column = root, len(lines), 0
        for part in re.split(r"[.\[]", name):
            items = node.value if isinstance(node, yaml.MappingNode) else []
            key, node = next((item for item in items if item[0].value == part), (None, None))
            if key is not None:
                row, column = key.start_mark.line, key.start_mark.column
        places.append((row, column, comment))
    for row, column, comment in sorted(places, reverse=True):
        lines.insert(row, f"{' ' * column}# {' '.join(comment.split())}\n")
    return "".join(lines)


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as blocks, tabs and spaces at the end of lines included; a value that
    stands twice is written twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def analyze_scalar(self, scalar: str) -> Any:
        """A text can stand as it is also with tabs, and with spaces at the end of lines."""
        analysis = super().analyze_scalar(scalar)
        lines = scalar.replace("\t", "").split("\n")
        analysis.allow_block = analysis.allow_block or all(map(str.isprintable, lines))
        return analysis

    def represent_text(self, text: str) -> yaml.ScalarNode:
        style = '"' if _OTHER_BREAKS.search(text) else "|" if "\n" in text else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _Dumper.represent_text)
