"""Packs repositories as Repomix and RenderGit do."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path
from xml.sax.saxutils import escape, quoteattr

Files = Mapping[str, str]

SUMMARY = "This section contains the contents of the repository's files."


def repomix_xml(files: Files, *, sections: str = "", newline: str = "\n") -> bytes:
    """Repomix trims contents first; here they stay as they are. `sections` come after the files."""
    entries = [line for path, content in files.items() for line in _entry(path, content)]
    lines = [
        *("This file is a merged representation of the entire codebase.", ""),
        *("<file_summary>", "<notes>", "- Some files may be missing.", "</notes>"),
        *("</file_summary>", "", "<directory_structure>", *files, "</directory_structure>", ""),
        *("<files>", SUMMARY, "", *entries, "</files>"),
    ]
    return (newline.join(lines) + newline + sections).encode()


def _entry(path: str, content: str) -> tuple[str, ...]:
    return f'<file path="{path}">', content, "</file>", ""


def parsable_xml(files: Files, *, prolog: str = "", sections: str = "") -> bytes:
    """All in one line but for the contents, as fast-xml-builder writes it."""
    entries = "".join(
        f"<file path={_attribute(path)}>{escape(content)}</file>" for path, content in files.items()
    )
    tree = escape("\n".join(files))
    summary = "<file_summary>It has &lt;files&gt; below.<notes>none</notes></file_summary>"
    structure = f"<directory_structure>{tree}</directory_structure>"
    return (
        f"{prolog}<repomix>{summary}{structure}<files>{SUMMARY}{entries}</files>{sections}</repomix>"
    ).encode()


def _attribute(path: str) -> str:
    return quoteattr(path.replace('"', "\0")).replace("\0", "&quot;")


def rendergit_cxml(files: Files, *, newline: str = "\n") -> bytes:
    lines = ["<documents>"]
    for index, (path, content) in enumerate(files.items(), 1):
        lines += [f'<document index="{index}">', f"<source>{path}</source>"]
        lines += ["<document_content>", content, "</document_content>", "</document>"]
    return newline.join([*lines, "</documents>"]).encode()


def lines_of(content: str) -> int:
    return content.count("\n") + 1 if content else 0


def checkout(folder: Path, files: Files) -> Path:
    """A new repository in `folder` with one commit."""
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content.encode())
    _git(folder, "init", "--quiet")
    _git(folder, "add", "--all", "--force")
    identity = ("-c", "user.name=Test", "-c", "user.email=test@example.com")
    _git(folder, *identity, "-c", "commit.gpgsign=false", "commit", "--quiet", "-m", "All of it")
    return folder


def tracked_texts(folder: Path) -> dict[str, str]:
    """What packers take of a checkout: the tracked files that are text, in git's order.
    CalledProcessError when it is none."""
    texts: dict[str, str] = {}
    for path in filter(None, _git(folder, "ls-files", "-z").split("\0")):
        data = (folder / path).read_bytes() if (folder / path).is_file() else b"\0"
        if b"\0" not in data:
            texts[path] = data.decode(errors="replace")
    return texts


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-c", "core.autocrlf=false", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True).stdout.decode()
