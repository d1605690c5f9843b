"""CustomJSON: a file of conversations, a JSON array of turns in each line, to train on."""

from __future__ import annotations

from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

import orjson

from modelcall_assets.errors import InputError
from modelcall_assets.sources.base import Conversation, Source, check_turns
from modelcall_assets.sources.data import OneFile
from modelcall_assets.storage.formats import BLOCK_BYTES, format_of, line_blocks, open_lines
from modelcall_assets.storage.places import Place

MOST_TOLD = 20
"""Bad lines that an error names one by one."""


class CustomJSON(Source):
    """The turns are the user's and the assistant's, two at least and no system's. Blank lines do
    not count, and one bad line is the end of all."""

    paths = ("filepath",)

    def __init__(self, filepath: str | Place, **slicing: Any) -> None:
        super().__init__(**slicing)
        self.file = OneFile(filepath, "expected a JSON array of {role, content} in each line")
        self.origins = (self.file,)

    @property
    def name(self) -> str:
        return f"{super().name}/{PurePosixPath(str(self.file.where)).name}"

    def num_examples(self) -> int:
        return len(self._lines)

    def get_example(self, index: int) -> Conversation:
        return {"messages": orjson.loads(self._lines[index])}

    @cached_property
    def _lines(self) -> list[bytes]:
        (file,) = self.file.ready()
        lines, wrong = list[bytes](), list[str]()
        with open_lines(file.place, format_of(file.place)) as opened:
            for block, numbers, _ in line_blocks(opened, BLOCK_BYTES):
                for line, number in zip(block, numbers, strict=True):
                    try:
                        check_turns(orjson.loads(line))
                    except ValueError as error:
                        wrong.append(f"{file.place}, line {number}: {error}")
                lines += block
        if wrong:
            more = len(wrong) - MOST_TOLD
            told = [*wrong[:MOST_TOLD], *([f"and {more} more bad lines"] if more > 0 else [])]
            raise InputError("\n".join([*told, "correct these lines, or take them out"]))
        return lines
