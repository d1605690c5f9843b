"""Build the demo's conversations from what is installed beside this interpreter.

`python demo/build_chats.py data/demo/chats` writes two data sets: `doctests`, real sessions of the
interactive prompt out of docstrings (several turns each), and `docstrings`, functions under what
their docstrings ask for. The same packages give the same files, and a file that is already there
with the same content is left alone.
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

MOST_SESSIONS = 300
MOST_FUNCTIONS = 700
LONGEST = 4_000
SYSTEM = "You are the interactive prompt of Python. Answer with what it prints, and nothing else."


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


def sessions(paths: list[Path], root: Path) -> Iterator[dict[str, object]]:
    """ShareGPT rows: what was typed, and what the prompt printed."""
    parser = doctest.DocTestParser()
    for path in paths:
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
            if len(turns) >= 5 and len(text) < LONGEST:
                name = f"{path.relative_to(root).as_posix()}#{number}"
                yield {"id": name, "conversations": turns}


def functions(paths: list[Path], root: Path) -> Iterator[dict[str, object]]:
    """Instruction rows: the first line of a docstring, and the function under it."""
    for path in paths:
        source = path.read_text(encoding="utf-8", errors="replace")
        for number, (node, text) in enumerate(docstrings(path)):
            code = ast.get_source_segment(source, node)
            if isinstance(node, ast.FunctionDef) and code and 200 < len(code) < LONGEST:
                yield {
                    "id": f"{path.relative_to(root).as_posix()}#{number}",
                    "instruction": f"Write a Python function `{node.name}`.",
                    "input": text.splitlines()[0],
                    "output": code,
                }


def write(target: Path, rows: list[dict[str, object]]) -> None:
    content = b"".join(orjson.dumps(row) + b"\n" for row in rows)
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists() or target.read_bytes() != content:
        temporary = target.with_suffix(".tmp")
        temporary.write_bytes(content)
        temporary.replace(target)


def main(folder: Path) -> None:
    library = Path(sysconfig.get_paths()["stdlib"])
    installed = Path(sysconfig.get_paths()["purelib"])
    paths = [
        *sorted(library.glob("*.py")),
        *sorted((installed / "sqlalchemy").rglob("*.py")),
        *sorted((installed / "rich").rglob("*.py")),
    ]
    roots = {path: library if path.parent == library else installed for path in paths}
    talks = [row for path in paths for row in sessions([path], roots[path])][:MOST_SESSIONS]
    asked = list(
        islice((row for path in paths for row in functions([path], roots[path])), MOST_FUNCTIONS)
    )
    write(folder / "doctests" / "train.jsonl", talks)
    write(folder / "docstrings" / "train.jsonl", asked)
    sys.stdout.write(f"{len(talks):,} sessions and {len(asked):,} functions in {folder}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
