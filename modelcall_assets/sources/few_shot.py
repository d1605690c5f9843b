"""Few-shot: questions with their answers before each question."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence, Set
from functools import cached_property
from typing import Any

from modelcall_assets.sources.base import Conversation, Source
from modelcall_assets.sources.gsm8k import text_of


class FewShot(Source):
    """`source`, with `n` conversations of `examples` before each: those at the indices `ids`, else
    as `seed` draws them. They are the same for all, or, with the column `same`, for all that have
    one value there, and so have they. ValueError when one of `source` could be among them; so
    `examples` is another split, or other rows of the same."""

    def __init__(
        self,
        source: Source,
        examples: Source,
        n: int = 5,
        seed: int = 42,
        ids: Sequence[int] | None = None,
        same: str | None = None,
        **slicing: Any,
    ) -> None:
        super().__init__(**slicing)
        self.source, self.examples = source, examples
        self.n, self.seed, self.ids, self.same = n, seed, ids, same
        self.origins = (*source.origins, *examples.origins)
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
    def shots(self) -> Mapping[str, list[dict[str, str]]]:
        """The turns before a question, by what it has in the column `same`."""
        rows = range(len(self.examples)) if self.ids is None else self.ids
        tested = {self.source.id_of(at) for at in range(len(self.source))}
        if both := [at for at in rows if self.examples.id_of(at) in tested]:
            fix = "take another split, or rows that are not asked (start, stop)"
            raise ValueError(f"examples: {self.examples.id_of(both[0])} is asked too; {fix}")
        asked, groups = set[tuple[str, ...]](), dict[str, Sequence[int]]()
        for each in self.source:
            asked.add(_question(each))
            groups[self._group(each)] = rows
        if self.same is not None:
            theirs = [(at, self._group(self.examples[at])) for at in rows]
            groups = {name: [at for at, own in theirs if own == name] for name in groups}
        return {name: self._turns(self._drawn(some, name), asked) for name, some in groups.items()}

    def num_examples(self) -> int:
        return len(self.source)

    def get_example(self, index: int) -> Conversation:
        asked = self.source[index]
        messages, shots = asked["messages"], self.shots[self._group(asked)]
        first = int(messages[0]["role"] == "system")
        return {**asked, "messages": [*messages[:first], *shots, *messages[first:]]}

    def id_of(self, index: int) -> str:
        return self.source.id_of(self._among_all(index))

    def evaluate(self, conversation: Conversation, completion: str) -> bool | float:
        return self.source.evaluate(conversation, completion)

    def _group(self, conversation: Conversation) -> str:
        if self.same is None:
            return ""
        if self.same not in conversation:
            have = ", ".join(conversation)
            raise ValueError(f"same: expected one of {have}; have {self.same!r}")
        return repr(conversation[self.same])

    def _drawn(self, rows: Sequence[int], group: str) -> Sequence[int]:
        """Of the rows that a group may have."""
        n, where = len(rows), f" where {self.same} is {group}" if group else ""
        if self.ids is None and self.n > n:
            raise ValueError(f"n: expected {n} examples at most{where}; have {self.n}")
        if self.ids and not rows:
            raise ValueError(f"ids: no example{where}")
        return rows if self.ids is not None else random.Random(self.seed).sample(rows, self.n)

    def _turns(self, rows: Sequence[int], asked: Set[tuple[str, ...]]) -> list[dict[str, str]]:
        turns: list[dict[str, str]] = []
        for at in rows:
            example = self.examples[at]
            if _question(example) in asked:
                fix = "take another seed or split, or rows that are not asked"
                raise ValueError(f"examples: {self.examples.id_of(at)} is asked too; {fix}")
            turns += [
                {"role": turn["role"], "content": text_of(turn["content"])}
                for turn in example["messages"]
                if turn["role"] != "system"
            ]
        return turns


def _question(conversation: Conversation) -> tuple[str, ...]:
    """What is said before the reference."""
    turns = conversation["messages"]
    asked = turns[:-1] if turns[-1:] and turns[-1]["role"] == "assistant" else turns
    return tuple(text_of(turn["content"]) for turn in asked if turn["role"] != "system")
