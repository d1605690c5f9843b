"""Figures with their intervals, differences between two runs, agreement of judges.

Of scipy, statsmodels and scikit-learn (200 MB) that is a quantile of Student's t, and sums: these
lines are ours, and acceptance/test_statistics.py compares them. Booleans are numbers, 1 and 0.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import combinations
from statistics import NormalDist, fmean
from typing import Any, Literal, NamedTuple, Self, TypeVar

LEVEL = 0.95
EXACT_BELOW = 25
"""So many pairs that differ; from there on the chi-square form is close."""
_MOST_TERMS = 1000
"""Degrees of freedom up to which Student's t is summed up; beyond, its expansion has 10 digits."""
V = TypeVar("V", bound=Hashable)


class Estimate(NamedTuple):
    """A figure of `n` values and its interval, which is infinite where they are too few to say."""

    value: float
    low: float
    high: float
    n: int

    def within(self, least: float, most: float) -> Self:
        """Its interval ends where values do."""
        return self._replace(low=max(least, self.low), high=min(most, self.high))


class McNemar(NamedTuple):
    """`statistic` is chi-square's with one degree of freedom, None of the exact form."""

    p_value: float
    statistic: float | None


def proportion(successes: int, n: int) -> Estimate:
    """With Wilson's interval (1927), which is right at 0 of n and n of n too. Of independent items:
    for others see `share`. ValueError when n is 0."""
    if not n:
        raise ValueError("a proportion of nothing")
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    share, of = successes / n, 1 + z * z / n
    middle = (share + z * z / (2 * n)) / of
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / of
    low = middle - half if successes else 0.0
    return Estimate(share, low, middle + half if successes < n else 1.0, n)


def mean(values: Sequence[float], clusters: Sequence[Hashable] | None = None) -> Estimate:
    """With Student's interval, of one degree of freedom less than there are values, or clusters.
    `clusters[i]` is what value i shares with others: its subject, its file, or the item that it is
    one sample of. ValueError when there are no values."""
    if not values:
        raise ValueError("a mean of nothing")
    found, groups = fmean(values), len(values if clusters is None else {*clusters})
    half = math.inf
    if groups > 1:
        half = t_critical(groups - 1) * standard_error(values, clusters)
    return Estimate(found, found - half, found + half, len(values))


def share(values: Sequence[float], clusters: Sequence[Hashable] | None = None) -> Estimate:
    """A mean of booleans. Where each cluster is all right or all wrong, and none is larger than
    another, it is the `proportion` of clusters; else `mean`, within 0 and 1."""
    if clusters is None:
        return proportion(int(sum(values)), len(values))
    sizes, sums = Counter(clusters), defaultdict[Hashable, float](float)
    for cluster, value in zip(clusters, values, strict=True):
        sums[cluster] += value
    if len({*sizes.values()}) == 1 and all(sums[each] in (0, n) for each, n in sizes.items()):
        return proportion(sum(map(bool, sums.values())), len(sums))._replace(n=len(values))
    return mean(values, clusters).within(0, 1)


def standard_error(values: Sequence[float], clusters: Sequence[Hashable] | None = None) -> float:
    """Of a mean; with G clusters CR1, √(G/(G−1)·Σ over clusters of (Σ of deviations)²)/n, as of
    statsmodels' OLS on a constant with cov_type='cluster'. Miller's form (2024, Adding error bars
    to evals) lacks G/(G−1) and is too small for few clusters; with it, clusters of one value each
    give s/√n. NaN where there are not two clusters, or two values."""
    if not values:
        return math.nan
    middle = fmean(values)
    if clusters is None:
        groups, squares = len(values), math.fsum((value - middle) ** 2 for value in values)
    else:
        sums = defaultdict[Hashable, float](float)
        for cluster, value in zip(clusters, values, strict=True):
            sums[cluster] += value - middle
        groups, squares = len(sums), math.fsum(each * each for each in sums.values())
    return math.sqrt(groups / (groups - 1) * squares) / len(values) if groups > 1 else math.nan


@lru_cache(maxsize=4096)
def t_critical(freedom: int) -> float:
    """How many standard errors wide a half of an interval is: Student's t that a share LEVEL of
    the distribution lies within, ± (Abramowitz and Stegun 26.7.3 to 26.7.5)."""
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    if freedom > _MOST_TERMS:
        first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
        third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
        return z + first / freedom + second / freedom**2 + third / freedom**3
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2))
    scale *= 2 / math.sqrt(freedom * math.pi)
    t, before = z, 0.0
    while t > before * (1 + 1e-15):  # from below, since the distribution is concave
        density = scale * (1 + t * t / freedom) ** (-(freedom + 1) / 2)
        before, t = t, t + (LEVEL - _within(t, freedom)) / density
    return before


def _within(t: float, freedom: int) -> float:
    """The share of Student's distribution between −t and t."""
    angle = math.atan2(t, math.sqrt(freedom))
    cosine, is_odd = math.cos(angle), freedom % 2
    term, total = (cosine if is_odd else 1.0), 0.0
    for at in range(2 + is_odd, freedom + 1, 2):
        total += term
        term *= cosine * cosine * (at - 1) / at
    total *= math.sin(angle)
    return (angle + total) * 2 / math.pi if is_odd else total


def centred_mean(accuracies: Mapping[str, float], baselines: Mapping[str, float]) -> float:
    """0 at what guessing gives, 1 at all right; over tasks, each counted once. A task without a
    baseline has 0; no baseline is 1."""
    shares = ((each, baselines.get(task, 0.0)) for task, each in accuracies.items())
    return fmean((accuracy - guess) / (1 - guess) for accuracy, guess in shares)


def pass_at_k(n: int, right: int, k: int) -> float:
    """That one of k samples is right, where so many of n were: 1 − C(n−right, k)/C(n, k), without
    bias (Chen et al. 2021, Evaluating large language models trained on code). ValueError when k is
    more than n."""
    return 1 - pass_hat_k(n, n - right, k)


def pass_hat_k(n: int, right: int, k: int) -> float:
    """That all of k samples are right, where so many of n were: C(right, k)/C(n, k), without bias
    (Yao et al. 2024, τ-bench). ValueError when k is more than n."""
    if not 1 <= k <= n:
        raise ValueError(f"k is {k}; expected 1 to {n}, the number of samples")
    return math.comb(right, k) / math.comb(n, k)


def majority(samples: Iterable[V]) -> V:
    """The most frequent; of several that are, the one that came first. ValueError when there are
    none."""
    counts = Counter(samples)
    return max(counts, key=counts.__getitem__)


def mcnemar(lost: int, gained: int) -> McNemar:
    """Whether so many items that became wrong and so many that became right differ by more than
    chance: the exact two-sided binomial test where fewer than 25 changed, else chi-square with
    Edwards' correction (1948)."""
    changed = lost + gained
    if changed < EXACT_BELOW:
        tail = sum(math.comb(changed, at) for at in range(min(lost, gained) + 1))
        return McNemar(min(1.0, 2 * tail / 2**changed), None)
    statistic = max(0, abs(lost - gained) - 1) ** 2 / changed
    return McNemar(math.erfc(math.sqrt(statistic / 2)), statistic)


def kappa(pairs: Mapping[tuple[V, V], int], *, squared: bool = False) -> float:
    """Cohen's, of how many items got which two labels from two raters. `squared`, labels are
    numbers, and a disagreement counts as far as they are apart, squared: the quadratic weights
    (1968) of a scale 1, 2, 3, … NaN where both have one and the same label, and of nothing."""
    first, second = Counter[V](), Counter[V]()
    for (a, b), n in pairs.items():
        first[a] += n
        second[b] += n
    distance = _squared if squared else _differ
    observed = math.fsum(distance(a, b) * n for (a, b), n in pairs.items())
    expected = math.fsum(
        distance(a, b) * n * m for a, n in first.items() for b, m in second.items()
    )
    return 1 - observed * first.total() / expected if expected else math.nan


Scale = Literal["nominal", "ordinal", "interval"]


def alpha(units: Mapping[tuple[V | None, ...], int], scale: Scale = "nominal") -> float:
    """Krippendorff's (2011, Computing Krippendorff's alpha-reliability), of any number of raters.

    A unit has their labels, numbers unless the scale is nominal; None is one that is missing, and a
    unit with fewer than two does not count; `units` says how many there are of each. NaN where all
    labels are the same. On the ordinal scale labels are their ranks, ties in the middle.
    """
    rated = [
        (labels, n)
        for unit, n in units.items()
        if len(labels := [label for label in unit if label is not None]) > 1
    ]
    total = Counter[V]()
    for labels, n in rated:
        for label in labels:
            total[label] += n
    if len(total) < 2:
        return math.nan
    size = total.total()
    places: Mapping[V, Any] = _ranks(total) if scale == "ordinal" else {v: v for v in total}
    distance = _differ if scale == "nominal" else _squared
    observed = math.fsum(
        2
        * n
        * sum(distance(places[a], places[b]) for a, b in combinations(labels, 2))
        / (len(labels) - 1)
        for labels, n in rated
    )
    if scale == "nominal":
        expected = float(size**2 - sum(n * n for n in total.values()))
    else:
        middle = math.fsum(places[label] * n for label, n in total.items()) / size
        squares = (_squared(places[label], middle) * n for label, n in total.items())
        expected = 2 * size * math.fsum(squares)
    return 1 - (size - 1) * observed / expected


def _differ(first: Any, second: Any) -> float:
    return float(first != second)


def _squared(first: Any, second: Any) -> float:
    return (first - second) ** 2


def _ranks(counts: Counter[V]) -> dict[V, float]:
    below, ranks = 0, dict[V, float]()
    for label in sorted(counts):  # type: ignore[type-var]
        ranks[label] = below + counts[label] / 2
        below += counts[label]
    return ranks
