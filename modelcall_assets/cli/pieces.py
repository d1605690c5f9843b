"""`modelcall split` and `join`: files of lines in pieces, for what runs elsewhere."""

from collections.abc import Iterator, Sequence
from itertools import islice
from math import ceil
from pathlib import Path

import click

from modelcall_assets.cli.options import (
    EXISTING_FILE,
    NEW_FILE,
    force_option,
    misuse,
    refuse_existing,
)
from modelcall_assets.cli.terminal import echo
from modelcall_assets.errors import InputError
from modelcall_assets.records.outcome import count_of
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
    told = f"{count_of(lines, 'line')} in {count_of(len(names), 'file')} of at most {size:,}"
    echo(f"{told}{fewer}: {folder}")


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
    told = f"{succeeded:,} of {count_of(rows, 'row')} succeeded{rate}"
    echo(f"{count_of(len(good), 'file')}: {told}: {good_path}")
    if errors:
        told = f"{count_of(len(errors), 'error file')}: {count_of(failed, 'row')}"
        echo(f"{told}: {error_path}")


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
