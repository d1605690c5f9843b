"""Build the demo's inputs from what is installed beside this interpreter.

`python demo/build_inputs.py data/demo` writes two folders. In `corpus` are JSONL and Parquet files
of source code, one per package, of records {id, text, path, package, lines}. In `chats` are two
data sets: `doctests`, real sessions of the interactive prompt out of docstrings (several turns
each), and `docstrings`, functions under what their docstrings ask for. The same packages give the
same files, and a file that is already there with the same content is left alone.
"""

from __future__ import annotations

import ast
import doctest
import sys
import sysconfig
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

PACKAGES = (
    "dagster",
    "dagster_graphql",
    "sqlalchemy",
    "openai",
    "aiohttp",
    "pygments",
    "rich",
    "pip",
)
RECORDS_PER_PACKAGE = 500
LONGEST_FILE = 60_000
SHORTEST_FILE = 200
MOST_SESSIONS = 300
MOST_FUNCTIONS = 700
LONGEST_CHAT = 4_000
SYSTEM = "You are the interactive prompt of Python. Answer with what it prints, and nothing else."

Row = dict[str, object]


def records(package: Path, site: Path) -> Iterator[Row]:
    """Source files of one package, in path order, neither tiny nor huge."""
    for path in sorted(package.rglob("*.py")):
        text = path.read_text(encoding="utf-8", errors="replace")
        if SHORTEST_FILE <= len(text) <= LONGEST_FILE:
            relative = path.relative_to(site).as_posix()
            yield {
                "id": relative,
                "text": text,
                "path": relative,
                "package": package.name,
                "lines": text.count("\n"),
            }


def docstrings(path: Path) -> Iterator[tuple[ast.AST, str]]:
    """The functions, classes and modules of a file that have a docstring."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
    except (SyntaxError, ValueError):
        return
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, kinds) and (text := ast.get_docstring(node)):
            yield node, text


def sessions(path: Path, root: Path) -> Iterator[Row]:
    """ShareGPT rows: what was typed, and what the prompt printed."""
    parser = doctest.DocTestParser()
    for number, (_, text) in enumerate(docstrings(path)):
        try:
            examples = parser.get_examples(text)
        except ValueError:
            continue
        turns = [{"from": "system", "value": SYSTEM}]
        for example in examples:
            if example.want:
                turns.append({"from": "human", "value": example.source.strip()})
                turns.append({"from": "gpt", "value": example.want.strip()})
        if len(turns) >= 5 and len(text) < LONGEST_CHAT:
            name = f"{path.relative_to(root).as_posix()}#{number}"
            yield {"id": name, "conversations": turns}


def functions(path: Path, root: Path) -> Iterator[Row]:
    """Instruction rows: the first line of a docstring, and the function under it."""
    source = path.read_text(encoding="utf-8", errors="replace")
    for number, (node, text) in enumerate(docstrings(path)):
        code = ast.get_source_segment(source, node)
        if isinstance(node, ast.FunctionDef) and code and 200 < len(code) < LONGEST_CHAT:
            yield {
                "id": f"{path.relative_to(root).as_posix()}#{number}",
                "instruction": f"Write a Python function `{node.name}`.",
                "input": text.splitlines()[0],
                "output": code,
            }


def write(target: Path, rows: list[Row]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(".tmp")
    if target.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), temporary)
    else:
        temporary.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    if target.exists() and target.read_bytes() == temporary.read_bytes():
        temporary.unlink()
    else:
        temporary.replace(target)


def build_corpus(folder: Path, site: Path) -> None:
    """Every second package becomes a Parquet file."""
    total = 0
    for number, name in enumerate(PACKAGES):
        if rows := list(islice(records(site / name, site), RECORDS_PER_PACKAGE)):
            write(folder / f"{name}.{'parquet' if number % 2 else 'jsonl'}", rows)
            total += len(rows)
    sys.stdout.write(f"{total:,} records of installed source code in {folder}\n")


def build_chats(folder: Path, site: Path) -> None:
    library = Path(sysconfig.get_paths()["stdlib"])
    roots = dict.fromkeys(sorted(library.glob("*.py")), library)
    for package in ("sqlalchemy", "rich"):
        roots |= dict.fromkeys(sorted((site / package).rglob("*.py")), site)
    talks = (row for path, root in roots.items() for row in sessions(path, root))
    asked = (row for path, root in roots.items() for row in functions(path, root))
    kept = {
        "doctests": list(islice(talks, MOST_SESSIONS)),
        "docstrings": list(islice(asked, MOST_FUNCTIONS)),
    }
    for name, rows in kept.items():
        write(folder / name / "train.jsonl", rows)
    sizes = f"{len(kept['doctests']):,} sessions and {len(kept['docstrings']):,} functions"
    sys.stdout.write(f"{sizes} in {folder}\n")


def main(folder: Path) -> None:
    site = Path(sysconfig.get_paths()["purelib"])
    build_corpus(folder / "corpus", site)
    build_chats(folder / "chats", site)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
