"""The examples of the documentation."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

ROOT = Path(__file__).parent.parent


def blocks(page: Path, language: str) -> list[str]:
    found = re.findall(
        rf"^ *```{language}\n(.*?)^ *```", page.read_text(), re.DOTALL | re.MULTILINE
    )
    return [textwrap.dedent(text) for text in found]


def write_examples(page: Path, root: Path) -> list[Path]:
    """The files in a project's folder that Python and YAML of a page are, by their first lines."""
    paths = []
    for text in (*blocks(page, "python"), *blocks(page, "yaml")):
        path = root / text.splitlines()[0].removeprefix("# ")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        paths.append(path)
    return paths
