"""How the numbers of many rows are distributed."""

from collections import Counter
from collections.abc import Mapping
from typing import Any, Self

MOST_VALUES = 500


class Distribution:
    """Of numbers: how many rows have each, rounded to three digits and, from 500 different ones on,
    to two; and their sum, which is exact. Those of several files are added."""

    def __init__(self, counts: Mapping[Any, int] | None = None, total: float | None = None):
        self.counts = Counter[float](counts or {})
        exact = sum(value * rows for value, rows in self.counts.items())
        self.sum = exact if total is None else total
        self._digits = 3

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Self:
        """From its `plain` form."""
        return cls(dict(plain["values"]), plain["sum"])

    @property
    def plain(self) -> dict[str, Any]:
        """As a manifest has it."""
        return {"sum": self.sum, "values": [*self.counts.items()]}

    @property
    def rows(self) -> int:
        return self.counts.total()

    def add(self, value: float) -> None:
        self.sum += value
        self.counts[_rounded(value, self._digits)] += 1
        self._coarsen()

    def join(self, other: "Distribution") -> None:
        self.sum += other.sum
        self.counts.update(other.counts)
        self._coarsen()

    @property
    def mean(self) -> float:
        return self.sum / self.rows

    def quantile(self, share: float) -> float:
        """The value that so large a share of the rows does not exceed; half of the way to the next
        one where the share ends between them."""
        left, ordered = share * self.rows, sorted(self.counts)
        for at, value in enumerate(ordered[:-1]):
            left -= self.counts[value]
            if left <= 0:
                return value if left else (value + ordered[at + 1]) / 2
        return ordered[-1]

    def numbers(self, name: str) -> dict[str, float]:
        """What is shown of a field of that name."""
        return {f"{name}_mean": self.mean, f"{name}_median": self.quantile(0.5)}

    def bins(self, most: int = 20) -> list[tuple[str, int]]:
        """Of values or of ranges of one width, in ascending order."""
        ordered = sorted(self.counts.items())
        if len(ordered) <= most:
            return [(f"{value:g}", rows) for value, rows in ordered]
        low, width = ordered[0][0], (ordered[-1][0] - ordered[0][0]) / most
        found = [0] * most
        for value, rows in ordered:
            found[min(most - 1, int((value - low) / width))] += rows
        ends = [low + width * at for at in range(most + 1)]
        return [(f"{ends[at]:.3g} – {ends[at + 1]:.3g}", rows) for at, rows in enumerate(found)]

    def _coarsen(self) -> None:
        if len(self.counts) > MOST_VALUES:
            self._digits, values = 2, self.counts
            self.counts = Counter[float]()
            for value, rows in values.items():
                self.counts[_rounded(value, 2)] += rows


def _rounded(value: float, digits: int) -> float:
    is_short = isinstance(value, int) and abs(value) < 10**digits
    return value if is_short else float(f"{value:.{digits}g}")
