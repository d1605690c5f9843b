"""A merge groups file: which JSONL files become one, and in which order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from modelcall_assets.config.block import Block, Text, did_you_mean, mistake
from modelcall_assets.config.problems import errors_in, validate
from modelcall_assets.errors import Problem


def _inside(text: str) -> str:
    """The relative path in its simplest spelling."""
    path = PurePosixPath(text)
    if path.is_absolute() or "://" in text:
        raise mistake("an absolute path", expected="one relative to the task's folder")
    if ".." in path.parts:
        raise mistake("the path leads out of the task's folder", fix="write it without ..")
    return path.as_posix()


def _output(text: str) -> str:
    path = PurePosixPath(_inside(text))
    if path.suffix != ".jsonl":
        raise mistake("merged files are JSONL", expected="a name that ends in .jsonl")
    if any(part.startswith(".") for part in path.parts):
        raise mistake("a hidden name", fix="write it without the dot in front")
    return path.as_posix()


class MergeGroup(Block):
    """One merged file and its members."""

    name: Text
    """What a task selects the group by."""
    output_file: Annotated[Text, AfterValidator(_output)]
    """The merged file, relative to the output folder; also the group's partition key."""
    input_files: Annotated[list[Annotated[Text, AfterValidator(_inside)]], Field(min_length=1)]
    """Members in order, relative to the input folder: paths, glob patterns, or bare names of files
    in sub-folders."""
    source_column: Text | None = None
    """Column to add to each row, with the path of the member that it comes from."""
    dedup: bool = False
    """Keep the first of several rows with the same content."""


class MergeGroupsFile(Block):
    """The shape of a merge groups file."""

    merge_groups: Annotated[list[MergeGroup], Field(min_length=1)]
    """Groups; each is one merged file."""


def parse_merge_groups(
    data: dict[str, Any], file: str
) -> tuple[Sequence[MergeGroup] | None, list[Problem]]:
    """The groups, and every problem of their file; no groups if one of them is an error."""
    parsed, problems = validate(MergeGroupsFile, data, file)
    if parsed is None:
        return None, problems
    problems += _twice(parsed.merge_groups, "name", file)
    problems += _twice(parsed.merge_groups, "output_file", file)
    return None if errors_in(problems) else parsed.merge_groups, problems


def selected(
    groups: Sequence[MergeGroup],
    names: Sequence[str],
    file: str,
    field: str = "distillation.merge_groups",
) -> tuple[list[MergeGroup], list[Problem]]:
    """The groups of those names in the order of their own file, all of them for no names; `field`
    of the task `file` gives the names, and is told about unknown ones."""
    if not names:
        return list(groups), []
    known = {group.name for group in groups}
    problems = [
        Problem(
            file,
            f"{field}[{position}]",
            "there is no such merge group",
            have=repr(name),
            fix=did_you_mean(name, known) or f"choose among {', '.join(sorted(known))}",
        )
        for position, name in enumerate(names)
        if name not in known
    ]
    return [group for group in groups if group.name in names], problems


def _twice(groups: Sequence[MergeGroup], field: str, file: str) -> Iterator[Problem]:
    first: dict[str, int] = {}
    for position, group in enumerate(groups):
        value: str = getattr(group, field)
        if (earlier := first.setdefault(value, position)) != position:
            wrong = f"merge_groups[{earlier}] has the same"
            place = f"merge_groups[{position}].{field}"
            yield Problem(file, place, wrong, have=repr(value), fix="give each group its own")
