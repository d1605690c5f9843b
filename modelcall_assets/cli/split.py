"""`modelcall split` and `modelcall join`: a JSONL file in pieces, and the results of pieces as one.

For those who come from the old batch submission; a task reads large files as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from math import ceil
from pathlib import Path

import click

from modelcall_assets.cli.display import echo
from modelcall_assets.cli.output import force_option, refuse_existing
from modelcall_assets.errors import InputError, Problem, SetupError
from modelcall_assets.storage.files import open_input, publish
from modelcall_assets.storage.jsonl import write_lines

MOST_CHUNKS = 9999


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
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
        wrong = "only JSONL can be cut by lines"
        raise SetupError([Problem("modelcall split", file.name, wrong)])
    folder = output or file.with_suffix("")
    lines = _count(file)
    if not lines:
        raise InputError(f"{file}: there is no line in this file")
    size = ceil(lines / chunks)
    names = [f"{file.stem}_split_{number:04}.jsonl" for number in range(1, ceil(lines / size) + 1)]
    _refuse_leftovers(folder, file.stem, names)
    if not force:
        refuse_existing("split", (folder / name for name in names))
    with open_input(file) as source:
        for name in names:
            _write(folder / name, islice(source, size))
    fewer = "" if len(names) == chunks else f" ({chunks:,} were asked for)"
    echo(f"{lines:,} lines in {len(names):,} files of at most {size:,}{fewer}: {folder}")


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
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
    good, errors = _results(folder)
    if not good and not errors:
        raise InputError(f"{folder}: there are no results to join")
    inputs = {path.resolve() for path in (*good, *errors)}
    if inputs & {good_path.resolve(), error_path.resolve()}:
        wrong = "the output is one of the files to join"
        raise SetupError([Problem("modelcall join", "--output", wrong, fix="choose another")])
    if not force:
        refuse_existing("join", (good_path, error_path))
    succeeded = _write(good_path, _lines(good))
    failed = _write(error_path, _lines(errors)) if errors else 0
    if not errors:
        error_path.unlink(missing_ok=True)
    rows = succeeded + failed
    rate = f" ({succeeded / rows:.2%})" if rows else ""
    echo(f"{len(good)} files: {succeeded:,} of {rows:,} rows succeeded{rate}: {good_path}")
    if errors:
        echo(f"{len(errors)} error files: {failed:,} rows: {error_path}")


def _count(file: Path) -> int:
    with open_input(file) as source:
        return sum(1 for _ in source)


def _refuse_leftovers(folder: Path, stem: str, names: Sequence[str]) -> None:
    """Pieces of an earlier split that had more of them would look like pieces of this one."""
    there = {path.name for path in folder.glob("*.jsonl")} - {*names}
    if older := sorted(name for name in there if name.startswith(f"{stem}_split_")):
        wrong = f"there are pieces of an earlier split, such as {older[0]}"
        fix = "delete them or choose another folder"
        raise SetupError([Problem("modelcall split", "--output", wrong, have=str(folder), fix=fix)])


def _results(folder: Path) -> tuple[list[Path], list[Path]]:
    """Files of results and files of errors, each in path order."""
    below = [path for path in folder.iterdir() if path.is_dir() and "split" in path.name]
    found = (path for place in below or [folder] for path in place.glob("*.jsonl"))
    kept = sorted(path for path in found if "_retry" not in path.name)
    errors = [path for path in kept if "_error" in path.name]
    return [path for path in kept if "_error" not in path.name], errors


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
