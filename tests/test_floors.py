"""The floors of docs/architecture.md: an import may only point down, and never to a test."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "modelcall_assets"
ROOT = Path(__file__).parent.parent / PACKAGE

FLOOR = {
    "errors": 0,
    "records": 0,
    "config": 1,
    "storage": 1,
    "journal": 1,
    "transforms": 1,
    "llm": 2,
    "stages": 3,
    "sources": 3,
    "grading": 3,
    "rehearsal": 4,
    "defs": 4,
    "definitions": 4,
    "cli": 4,
}
NEIGHBOURS = {
    ("records", "errors"),
    ("journal", "storage"),
    ("sources", "grading"),
    ("grading", "sources"),
    ("stages", "sources"),
    ("stages", "grading"),
    ("definitions", "defs"),
    ("cli", "defs"),
    ("cli", "rehearsal"),
}
"""The only imports between two parts of one floor."""
KNOWN_BELOW = {"rehearsal": {"errors"}}
"""The rehearsal endpoint stands for somebody else's server: it knows nothing of ours."""

ONLY_IN = {
    "dagster": {"defs", "definitions"},
    "aiohttp": {"llm", "sources", "storage"},  # an environment's; what s3fs lets through of it
    "httptools": {"llm", "rehearsal"},
    "openai": {"llm"},
    "fsspec": {"storage"},
    "s3fs": {"storage"},
    "huggingface_hub": {"sources"},
}
NO_THIRD_PARTY_BUT_PYDANTIC = {"errors", "records"}


def imported(path: Path) -> Iterator[str]:
    """Every module that the file imports, lazily too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, f"{path}: relative import"
            yield node.module


IMPORTS = [
    (str(relative := path.relative_to(ROOT)), relative.parts[0].removesuffix(".py"), module)
    for path in sorted(ROOT.rglob("*.py"))
    for module in imported(path)
]
"""(file, its part, imported module)"""


def test_every_part_has_a_floor():
    parts = {part for _, part, _ in IMPORTS} - {"__init__"}
    assert parts <= set(FLOOR)
    assert len(IMPORTS) > 300


def test_imports_point_down():
    wrong = []
    for file, part, module in IMPORTS:
        if not module.startswith(PACKAGE + "."):
            continue
        target = module.split(".")[1]
        down = FLOOR[target] < FLOOR[part]
        if part in KNOWN_BELOW:
            down = target in KNOWN_BELOW[part]
        if target != part and not down and (part, target) not in NEIGHBOURS:
            wrong.append(f"{file} imports {module}")
    assert wrong == []


@pytest.mark.parametrize("library", ONLY_IN)
def test_library_is_known_in_one_place(library: str):
    users = {part for _, part, module in IMPORTS if module.split(".")[0] == library}
    assert users <= ONLY_IN[library]


def test_the_ground_floor_knows_only_the_standard_library():
    import sys

    allowed = set(sys.stdlib_module_names) | {"pydantic", PACKAGE}
    wrong = [
        f"{file} imports {module}"
        for file, part, module in IMPORTS
        if part in NO_THIRD_PARTY_BUT_PYDANTIC and module.split(".")[0] not in allowed
    ]
    assert wrong == []


def test_no_test_module_is_imported():
    """What tests share lies in modules that are no tests."""
    files = [*ROOT.with_name("tests").glob("*.py"), *ROOT.with_name("acceptance").glob("*.py")]
    assert len(files) > 50
    wrong = [
        f"{file.name} imports {module}"
        for file in files
        for module in imported(file)
        if module.rpartition(".")[2].startswith("test_") or module.startswith("tests")
    ]
    assert wrong == []
