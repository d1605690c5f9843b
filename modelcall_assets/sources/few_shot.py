"""Few-shot: questions with their answers before each question."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from modelcall_assets.sources.base import Conversation, Source
from modelcall_assets.sources.gsm8k import text_of
from modelcall_assets.storage.listing import FileInfo


class FewShot(Source):
    """`source`, with the same `n` conversations of `examples` before each: those at the indices
    `ids`, else as `seed` draws them. ValueError when one of `source` could be among them; so
    `examples` is another split, or other rows of the same."""

    def __init__(
        self,
        source: Source,
        examples: Source,
        n: int = 5,
        seed: int = 42,
        ids: Sequence[int] | None = None,
        **slicing: Any,
    ) -> None:
        super().__init__(**slicing)
        self.source, self.examples = source, examples
        self.n, self.seed, self.ids = n, seed, ids
        self.grader, self.baseline = source.grader, source.baseline
        self.eval_type = source.eval_type
        if type(n) is not int or n < 0:
            raise ValueError(f"n: expected a whole number of 0 or more; have {n!r}")
        if ids is not None and any(type(at) is not int for at in ids):
            raise ValueError(f"ids: expected indices of rows; have {ids!r}")
        if source.name == examples.name:
            _ = self.shots

    @property
    def name(self) -> str:
        return self.source.name

    @cached_property
    def shots(self) -> list[dict[str, str]]:
        """The turns before each question."""
        rows = range(len(self.examples)) if self.ids is None else self.ids
        tested = {self.source.id_of(at) for at in range(len(self.source))}
        if both := [at for at in rows if self.examples.id_of(at) in tested]:
            fix = "take another split, or rows that are not asked (start, stop)"
            raise ValueError(f"examples: {self.examples.id_of(both[0])} is asked too; {fix}")
        if self.ids is None:
            if self.n > len(rows):
                raise ValueError(f"n: expected {len(rows)} examples at most; have {self.n}")
            rows = random.Random(self.seed).sample(rows, self.n)
        asked = {_question(self.source[at]) for at in range(len(self.source))}
        for at in rows:
            if _question(self.examples[at]) in asked:
                fix = "take another seed or split, or rows that are not asked"
                raise ValueError(f"examples: {self.examples.id_of(at)} is asked too; {fix}")
        turns = [turn for at in rows for turn in self.examples[at]["messages"]]
        return [
            {"role": turn["role"], "content": text_of(turn["content"])}
            for turn in turns
            if turn["role"] != "system"
        ]

    def num_examples(self) -> int:
        return len(self.source)

    def get_example(self, index: int) -> Conversation:
        asked = self.source[index]
        messages = asked["messages"]
        first = int(messages[0]["role"] == "system")
        return {**asked, "messages": [*messages[:first], *self.shots, *messages[first:]]}

    def id_of(self, index: int) -> str:
        return self.source.id_of(self._among_all(index))

    def evaluate(self, conversation: Conversation, completion: str) -> bool | float:
        return self.source.evaluate(conversation, completion)

    def files(self) -> list[FileInfo]:
        return [*self.source.files(), *self.examples.files()]

    def fetch(self) -> list[FileInfo]:
        return [*self.source.fetch(), *self.examples.fetch()]


def _question(conversation: Conversation) -> tuple[str, ...]:
    """What is said before the reference."""
    turns = conversation["messages"]
    asked = turns[:-1] if turns[-1:] and turns[-1]["role"] == "assistant" else turns
    return tuple(text_of(turn["content"]) for turn in asked if turn["role"] != "system")
