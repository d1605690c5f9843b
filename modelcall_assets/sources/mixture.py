"""Several sources as one: mixed, or one after another."""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import accumulate
from typing import Any

from modelcall_assets.sources.base import Conversation, Source


class Sequence(Source):
    """One after another. It has a grader where its members share one; its baseline is the mean over
    their rows."""

    def __init__(self, sources: Iterable[Source], **slicing: Any) -> None:
        super().__init__(**slicing)
        self.sources = [*sources]
        self.origins = [origin for source in self.sources for origin in source.origins]
        graders = {source.grader for source in self.sources}
        self.grader = graders.pop() if len(graders) == 1 else None

    @property
    def name(self) -> str:
        return f"{super().name}({', '.join(source.name for source in self.sources)})"

    @property
    def baseline(self) -> float:  # type: ignore[override]
        rows = [*map(len, self.sources)]
        right = sum(n * each.baseline for n, each in zip(rows, self.sources, strict=True))
        return right / sum(rows) if any(rows) else 0.0

    def num_examples(self) -> int:
        return self._ends[-1] if self._ends else 0

    def get_example(self, index: int) -> Conversation:
        source, at = self._member(index)
        return source[at]

    def leaves(self) -> Iterator[Source]:
        return (leaf for source in self.sources for leaf in source.leaves())

    def member(self, index: int) -> tuple[Source, int]:
        source, at = self._member(self._among_all(index))
        return source.member(at)

    def id_of(self, index: int) -> str:
        """Of the member."""
        source, at = self.member(index)
        return source.id_of(at)

    def _member(self, index: int) -> tuple[Source, int]:
        row = self._order[index]
        at = bisect_right(self._ends, row)
        source = self.sources[at]
        return source, row - self._ends[at] + len(source)

    @cached_property
    def _ends(self) -> list[int]:
        return [*accumulate(map(len, self.sources))]

    @cached_property
    def _order(self) -> range | list[int]:
        return range(self.num_examples())


class Mixture(Sequence):
    """Shuffled with the seed 42, always in the same way. A source that is given twice counts
    twice."""

    @cached_property
    def _order(self) -> list[int]:
        order = [*range(self.num_examples())]
        random.Random(42).shuffle(order)
        return order
