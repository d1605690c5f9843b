"""Figures with their intervals, differences between two runs, agreement of judges.

Of scipy, statsmodels and scikit-learn (200 MB) that is a quantile of Student's t, and sums: these
lines are ours, and acceptance/test_statistics.py compares them. Booleans are numbers, 1 and 0.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import lru_cache
from statistics import NormalDist, fmean
from typing import Literal, NamedTuple, TypeVar

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


class McNemar(NamedTuple):
    """`statistic` is chi-square's with one degree of freedom, None of the exact form."""

    p_value: float
    statistic: float | None


def proportion(successes: int, n: int, level: float = LEVEL) -> Estimate:
    """With Wilson's interval (1927), which is right at 0 of n and n of n too. Of independent items:
    for items in clusters, or with several samples, see `mean`. ValueError when n is 0."""
    if not n:
        raise ValueError("a proportion of nothing")
    z = NormalDist().inv_cdf((1 + level) / 2)
    share, of = successes / n, 1 + z * z / n
    middle = (share + z * z / (2 * n)) / of
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / of
    low = middle - half if successes else 0.0
    return Estimate(share, low, middle + half if successes < n else 1.0, n)


def mean(
    values: Sequence[float], clusters: Sequence[Hashable] | None = None, level: float = LEVEL
) -> Estimate:
    """With Student's interval, of one degree of freedom less than there are values, or clusters.
    `clusters[i]` is what value i shares with others: its subject, its file, or the item that it is
    one sample of. ValueError when there are no values."""
    if not values:
        raise ValueError("a mean of nothing")
    found, groups = fmean(values), len(values if clusters is None else {*clusters})
    half = math.inf
    if groups > 1:
        half = t_critical(groups - 1, level) * standard_error(values, clusters)
    return Estimate(found, found - half, found + half, len(values))


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
def t_critical(freedom: int, level: float = LEVEL) -> float:
    """How many standard errors wide a half of an interval is: Student's t that a share `level` of
    the distribution lies within, ± (Abramowitz and Stegun 26.7.3 to 26.7.5)."""
    z = NormalDist().inv_cdf((1 + level) / 2)
    if freedom > _MOST_TERMS:
        first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
        third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
        return z + first / freedom + second / freedom**2 + third / freedom**3
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2))
    scale *= 2 / math.sqrt(freedom * math.pi)
    t, before = z, 0.0
    while t > before * (1 + 1e-15):  # from below, since the distribution is concave
        density = scale * (1 + t * t / freedom) ** (-(freedom + 1) / 2)
        before, t = t, t + (level - _within(t, freedom)) / density
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


def centred(accuracy: float, baseline: float) -> float:
    """0 at what guessing gives, 1 at all right; ValueError when guessing is always right."""
    if baseline >= 1:
        raise ValueError(f"the baseline is {baseline}; expected less than 1")
    return (accuracy - baseline) / (1 - baseline)


def centred_mean(accuracies: Mapping[str, float], baselines: Mapping[str, float]) -> float:
    """Over tasks, each counted once; a task without a baseline has 0."""
    return fmean(centred(each, baselines.get(task, 0.0)) for task, each in accuracies.items())


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


def paired_difference(
    first: Sequence[float],
    second: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    level: float = LEVEL,
) -> Estimate:
    """The mean of second − first over the same items in the same order; see `mean`."""
    return mean([b - a for a, b in zip(first, second, strict=True)], clusters, level)


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


Weights = Literal["none", "linear", "quadratic"]
_DISTANCES: Mapping[Weights, Callable[[float, float], float]] = {
    "none": lambda a, b: float(a != b),
    "linear": lambda a, b: abs(a - b),
    "quadratic": lambda a, b: (a - b) ** 2,
}


def kappa(first: Sequence[V], second: Sequence[V], weights: Weights = "none") -> float:
    """Cohen's, of the labels that two raters gave to the same items. Weighted (1968), labels are
    numbers, and a disagreement counts as far as they are apart, or that squared: the usual weights
    of a scale 1, 2, 3, … NaN where both have one and the same label, and of nothing."""
    seen = Counter(zip(first, second, strict=True))
    theirs, distance = (Counter(first), Counter(second)), _DISTANCES[weights]
    observed = math.fsum(distance(*pair) * n for pair, n in seen.items())  # type: ignore[arg-type]
    expected = math.fsum(
        distance(a, b) * n * m  # type: ignore[arg-type]
        for a, n in theirs[0].items()
        for b, m in theirs[1].items()
    )
    return 1 - observed * len(first) / expected if expected else math.nan


Scale = Literal["nominal", "ordinal", "interval"]


def alpha(units: Iterable[Sequence[V | None]], scale: Scale = "nominal") -> float:
    """Krippendorff's (2011, Computing Krippendorff's alpha-reliability), of any number of raters.

    A unit has their labels, numbers unless the scale is nominal; None is one that is missing, and a
    unit with fewer than two does not count. NaN where all labels are the same. Both disagreements
    are sums of squares: of labels, or of their ranks, ties in the middle, on the ordinal scale.
    """
    rated = [found for unit in units if len(found := [v for v in unit if v is not None]) > 1]
    total = Counter[V](label for unit in rated for label in unit)
    n = total.total()
    if scale == "nominal":
        within = [(len(unit), _pairs(Counter(unit))) for unit in rated]
        observed = math.fsum(pairs / (size - 1) for size, pairs in within)
        expected = _pairs(total)
    else:
        numbers: dict[V, float] = {label: float(label) for label in total}  # type: ignore[arg-type]
        if scale == "ordinal":
            numbers = _ranks(total)
        places = [[numbers[label] for label in unit] for unit in rated]
        observed = math.fsum(2 * len(p) * _squares(p) / (len(p) - 1) for p in places)
        expected = 2 * n * _squares([place for unit in places for place in unit])
    return 1 - (n - 1) * observed / expected if expected else math.nan


def _pairs(counts: Counter[V]) -> int:
    """Of two different labels, each in both orders."""
    return counts.total() ** 2 - sum(n * n for n in counts.values())


def _squares(values: Sequence[float]) -> float:
    middle = fmean(values) if values else 0.0
    return math.fsum((value - middle) ** 2 for value in values)


def _ranks(counts: Counter[V]) -> dict[V, float]:
    below, ranks = 0, dict[V, float]()
    for label in sorted(counts):  # type: ignore[type-var]
        ranks[label] = below + counts[label] / 2
        below += counts[label]
    return ranks
