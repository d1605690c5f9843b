"""Intervals, tests and agreement: what reference libraries gave, published examples, laws, and how
often an interval holds the truth.

The numbers of the libraries are those of scipy 1.17.1, statsmodels 0.15.0, scikit-learn 1.9.1 and
krippendorff 0.9.0, by the expression above each table. acceptance/test_statistics.py compares with
whatever is installed, on random data.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelcall_assets.transforms.statistics import (
    Estimate,
    Scale,
    alpha,
    centred_mean,
    kappa,
    majority,
    mcnemar,
    mean,
    pass_at_k,
    pass_hat_k,
    proportion,
    share,
    standard_error,
    t_critical,
)

# scipy.stats.t.ppf(0.975, freedom)
CRITICAL = [
    (1, 12.706204736174694),
    (2, 4.302652729749462),
    (3, 3.1824463052837078),
    (4, 2.7764451051977934),
    (7, 2.364624251592784),
    (29, 2.045229642132703),
    (30, 2.0422724563012378),
    (120, 1.9799304050824402),
    (999, 1.9623414611334493),
    (1000, 1.9623390808264083),
    (1001, 1.9623367052808798),
    (5000, 1.9604385517065073),
    (1000000, 1.959966356814107),
]
# statsmodels.stats.proportion.proportion_confint(k, n, 0.05, "wilson")
WILSON = [
    (0, 1, 0.0, 0.7934506856227627),
    (1, 1, 0.2065493143772374, 1.0),
    (0, 20, 0.0, 0.1611251580528194),
    (20, 20, 0.8388748419471804, 0.9999999999999999),
    (1, 9, 0.019890887638544935, 0.4349997055766561),
    (7, 10, 0.39677814746114537, 0.8922087325936989),
    (81, 263, 0.2552885198782742, 0.36620957698280004),
    (15, 148, 0.06238639953073628, 0.16048724172330803),
    (500, 1000, 0.4690696003681042, 0.5309303996318958),
    (99999, 100000, 0.9999433529034099, 0.9999982347522698),
]
# scipy.stats.t.interval(0.95, n - 1, numpy.mean(v), scipy.stats.sem(v)), v = values(n)
STUDENT = [
    (2, 1.25, -14.632755920218369, 17.13275592021837),
    (3, 0.9166666666666666, -2.5037242574930363, 4.33705759082637),
    (10, 1.0, 0.31509790650298386, 1.684902093497016),
    (57, 1.0087719298245614, 0.7722560525651205, 1.2452878070840023),
    (400, 1.000625, 0.9152404628989164, 1.0860095371010838),
]
# f = OLS(v, ones).fit(cov_type="cluster", cov_kwds={"groups": c}, use_t=True); f.bse, f.conf_int()
# (statsmodels.api), v = values(n), c = clusters(n, g)
CLUSTERED = [
    (4, 2, 0.9375, -10.849566940163776, 12.974566940163776),
    (12, 3, 0.11111111111111106, -0.49513385957496514, 2.328467192908299),
    (57, 7, 0.053679501930281086, 0.837939797237069, 1.1796040624120543),
    (57, 57, 0.11806662825597361, 0.7722560525651206, 1.2452878070840028),
    (400, 31, 0.027571675343547798, 0.9418573651186741, 1.0593926348813274),
]
# mcnemar([[0, lost], [gained, 0]], exact=lost + gained < 25)
# (statsmodels.stats.contingency_tables)
MCNEMAR = [
    (0, 0, 1.0, None),
    (1, 0, 1.0, None),
    (0, 6, 0.03125, None),
    (3, 9, 0.14599609375, None),
    (12, 12, 1.0, None),
    (4, 20, 0.001543879508972168, None),
    (24, 0, 1.1920928955078125e-07, None),
    (5, 20, 0.005110260660855866, 7.84),
    (10, 40, 4.109787809945878e-05, 16.82),
    (1000, 1100, 0.030745034758993192, 4.667142857142857),
]
# sklearn.metrics.cohen_kappa_score(x, y, weights=w, labels=range(k)), w None and quadratic
KAPPA = [
    (5, 2, 0.0, 0.0),
    (30, 3, 0.5, 0.6666666666666667),
    (97, 5, 0.5198019801980198, 0.6122448979591837),
    (250, 10, 0.5583596214511041, 0.95),
]
# krippendorff.alpha(numpy.array(units(n, r, k), float).T, level_of_measurement=s), s in SCALES
SCALES: tuple[Scale, ...] = ("nominal", "ordinal", "interval")
ALPHA = [
    (6, 2, 2, 0.5333333333333333, 0.5333333333333333, 0.5333333333333333),
    (20, 3, 4, 0.5480769230769231, 0.392471590909091, 0.30882352941176483),
    (97, 5, 7, 0.6722021937562322, 0.6929229579836984, 0.6446433008475746),
]


def values(n: int) -> list[float]:
    return [(7 * i * i + 3 * i) % 11 / 4 for i in range(n)]


def clusters(n: int, groups: int) -> list[int]:
    return [i * i % groups if groups < n else i for i in range(n)]


def units(n: int, raters: int, labels: int) -> list[list[int | None]]:
    def label(i: int, j: int) -> int | None:
        return None if (i * j + i) % 5 == 3 else (i * i + (0 if i % 4 else j)) % labels

    return [[label(i, j) for j in range(raters)] for i in range(n)]


def kappas(one: Sequence[Any], two: Sequence[Any]) -> tuple[float, float]:
    """Plain, and of squared distances."""
    pairs = Counter(zip(one, two, strict=True))
    return kappa(pairs), kappa(pairs, squared=True)


def alphas(said: Iterable[Sequence[Any]]) -> list[float]:
    """On each of the scales."""
    counts = Counter(map(tuple, said))
    return [alpha(counts, scale) for scale in SCALES]


@pytest.mark.parametrize(("freedom", "t"), CRITICAL)
def test_t_critical(freedom: int, t: float) -> None:
    assert t_critical(freedom) == pytest.approx(t, rel=1e-10)


@pytest.mark.parametrize(("right", "n", "low", "high"), WILSON)
def test_proportion(right: int, n: int, low: float, high: float) -> None:
    assert proportion(right, n) == pytest.approx((right / n, low, high, n), abs=1e-13)


@pytest.mark.parametrize(("n", "middle", "low", "high"), STUDENT)
def test_mean(n: int, middle: float, low: float, high: float) -> None:
    assert mean(values(n)) == pytest.approx((middle, low, high, n), rel=1e-12)


@pytest.mark.parametrize(("n", "groups", "error", "low", "high"), CLUSTERED)
def test_clusters(n: int, groups: int, error: float, low: float, high: float) -> None:
    own = clusters(n, groups)
    assert standard_error(values(n), own) == pytest.approx(error, rel=1e-12)
    assert mean(values(n), own)[1:3] == pytest.approx((low, high), rel=1e-12)


@pytest.mark.parametrize(("lost", "gained", "p_value", "statistic"), MCNEMAR)
def test_mcnemar(lost: int, gained: int, p_value: float, statistic: float | None) -> None:
    for pair in (lost, gained), (gained, lost):
        found = mcnemar(*pair)
        assert found.p_value == pytest.approx(p_value, rel=1e-12)
        assert found.statistic == (None if statistic is None else pytest.approx(statistic))


@pytest.mark.parametrize(("n", "k", "plain", "quadratic"), KAPPA)
def test_kappa(n: int, k: int, plain: float, quadratic: float) -> None:
    one = [(3 * i * i + i) % k for i in range(n)]
    two = [(3 * i * i + i + (i % 3 == 0)) % k for i in range(n)]
    assert kappas(one, two) == pytest.approx((plain, quadratic), abs=1e-13)


@pytest.mark.parametrize(("n", "raters", "labels", "nominal", "ordinal", "interval"), ALPHA)
def test_alpha(
    n: int, raters: int, labels: int, nominal: float, ordinal: float, interval: float
) -> None:
    found = alphas(units(n, raters, labels))
    assert found == pytest.approx([nominal, ordinal, interval], abs=1e-13)


class TestPublishedExamples:
    def test_mcnemar_with_few_changes(self) -> None:
        """R's contingencytables, McNemar_exact_cond_test_paired_2x2, airway hyper-responsiveness
        of 21 children (Bentur et al. 2009): 1 and 7 changed, 2 · (1 + 8) / 2⁸ = 0.070."""
        found = mcnemar(1, 7)
        assert (round(found.p_value, 3), found.statistic) == (0.070, None)

    def test_mcnemar_with_many(self) -> None:
        """mlxtend's user guide, McNemar's test, example 2, [[9945, 25], [15, 15]]: χ² = 2.025,
        p = 0.154728923485."""
        assert mcnemar(25, 15) == pytest.approx((0.154728923485, 2.025), abs=1e-12)

    def test_kappa_as_sas_prints_it(self) -> None:
        """statsmodels, test_inter_rater.py, from the printout of a SAS example: κ = 0.4842."""
        counts = [0, 4, 1], [0, 8, 0], [0, 1, 5]
        pairs = {(i, j): n for i, row in enumerate(counts) for j, n in enumerate(row)}
        assert kappa(pairs) == pytest.approx(0.4842, abs=5e-5)

    def test_kappa_of_anxiety(self) -> None:
        """R's irr, kappa2(anxiety[,2:3]), as in statsmodels, test_inter_rater.py: −0.006289308,
        squared 0.2520325. Nobody of the two said 5, and irr counts in ranks."""
        one = [3, 6, 4, 6, 2, 4, 2, 4, 3, 3, 2, 3, 3, 3, 2, 2, 1, 3, 3, 4]
        two = [2, 1, 4, 4, 3, 2, 1, 6, 1, 1, 1, 2, 3, 3, 1, 1, 3, 3, 2, 2]
        one, two = ([min(label, 5) for label in labels] for labels in (one, two))
        assert kappas(one, two) == pytest.approx((-0.006289308, 0.2520325), abs=5e-8)

    def test_alpha_of_three_coders_with_missing_labels(self) -> None:
        """Wikipedia, Krippendorff's alpha, a computational example, as the package krippendorff has
        it: 0.691 nominal, 0.811 interval."""
        rows = ".....34121133.3", "1.213343.......", "..21344.21133.4"
        said = [[None if c == "." else int(c) for c in unit] for unit in zip(*rows, strict=True)]
        nominal, _, interval = alphas(said)
        assert (nominal, interval) == pytest.approx((0.691, 0.811), abs=5e-4)

    def test_alpha_of_four_observers_with_missing_labels(self) -> None:
        """Krippendorff 2011, Computing Krippendorff's alpha-reliability, section C: 0.743 nominal,
        0.815 ordinal, 0.849 interval."""
        rows = "123321412...", "1233224125.3", ".3332342251.", "12332441251."
        said = [[None if c == "." else int(c) for c in unit] for unit in zip(*rows, strict=True)]
        assert alphas(said) == pytest.approx([0.743, 0.815, 0.849], abs=5e-4)


class TestSamples:
    @pytest.mark.parametrize(("n", "right", "k"), [(5, 2, 1), (5, 2, 3), (7, 0, 4), (6, 6, 2)])
    def test_pass_is_the_share_of_all_choices(self, n: int, right: int, k: int) -> None:
        choices = [*combinations([True] * right + [False] * (n - right), k)]
        assert pass_at_k(n, right, k) == pytest.approx(sum(map(any, choices)) / len(choices))
        assert pass_hat_k(n, right, k) == pytest.approx(sum(map(all, choices)) / len(choices))

    def test_pass_of_thousands(self) -> None:
        assert pass_at_k(20_000, 1, 10_000) == pytest.approx(0.5)
        assert pass_hat_k(20_000, 19_999, 10_000) == pytest.approx(0.5)

    @pytest.mark.parametrize("k", [0, 4])
    def test_k_is_one_of_the_samples(self, k: int) -> None:
        for estimate in (pass_at_k, pass_hat_k):
            with pytest.raises(ValueError, match=f"k is {k}; expected 1 to 3"):
                estimate(3, 1, k)

    def test_majority(self) -> None:
        assert majority("BACAB") == "B"  # as many as A, and first
        assert majority([False, True, True]) is True
        with pytest.raises(ValueError):
            majority([])


class TestCentred:
    def test_over_tasks(self) -> None:
        accuracies = {"arc": 0.55, "mmlu": 0.1, "gsm8k": 0.3}
        found = centred_mean(accuracies, {"arc": 0.25, "mmlu": 0.25})
        assert found == pytest.approx((0.4 - 0.2 + 0.3) / 3)


class TestShare:
    def test_clusters_that_are_all_right_or_all_wrong_are_the_items(self) -> None:
        alike = share([1, 1, 0, 0, 0, 0], [1, 1, 2, 2, 3, 3])
        assert alike == proportion(1, 3)._replace(n=6)
        assert share([0, 0, 0]) == proportion(0, 3)

    @pytest.mark.parametrize("values", [[1, 0, 0, 0], [1, 1, 1, 0]])
    def test_others_are_a_mean_within_0_and_1(self, values: list[float]) -> None:
        found, plain = share(values, "aabb"), mean(values, "aabb")
        assert plain.low < 0 and plain.high > 1
        assert (found.value, found.low, found.high) == (plain.value, 0, 1)

    def test_clusters_of_several_sizes_are_a_mean(self) -> None:
        values, clusters = [1, 1, 0] * 20, [n // 3 * 2 + (n % 3 == 2) for n in range(60)]
        assert share(values, clusters) == mean(values, clusters)


class TestEdges:
    def test_of_nothing(self) -> None:
        for empty in (lambda: proportion(0, 0), lambda: mean([])):
            with pytest.raises(ValueError, match="of nothing"):
                empty()
        assert math.isnan(standard_error([])) and math.isnan(standard_error([2.0]))
        assert math.isnan(kappa({})) and math.isnan(alpha({}))

    def test_one_value_or_cluster_says_nothing(self) -> None:
        assert mean([2.0]) == Estimate(2.0, -math.inf, math.inf, 1)
        assert mean([1, 3], ["a", "a"]) == Estimate(2.0, -math.inf, math.inf, 2)

    def test_agreement_without_a_difference_anywhere(self) -> None:
        assert math.isnan(kappa({("a", "a"): 3})) and math.isnan(alpha({("a", "a"): 2}))
        assert math.isnan(alpha({(0.1, 0.1, 0.1): 1, (0.1, None, None): 1}, "interval"))

    def test_lengths_must_fit(self) -> None:
        with pytest.raises(ValueError):
            mean([1, 2, 3], [1, 2])

    def test_as_many_gained_as_lost(self) -> None:
        assert mcnemar(40, 40) == (1.0, 0.0)


NUMBERS = st.lists(st.integers(-9, 9), min_size=2)
PAIRS = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1)


@given(NUMBERS)
def test_clusters_of_one_value_each_are_none(numbers: list[int]) -> None:
    assert mean(numbers, range(len(numbers))) == pytest.approx(mean(numbers))


@given(NUMBERS, st.integers(2, 4))
def test_copies_of_each_value_add_nothing_when_they_are_clusters(
    numbers: list[int], copies: int
) -> None:
    once = mean(numbers)
    found = mean(numbers * copies, [*range(len(numbers))] * copies)
    assert found[:3] == pytest.approx(once[:3])


@given(PAIRS)
def test_kappa_and_alpha_do_not_care_who_is_first(pairs: list[tuple[int, int]]) -> None:
    one, two = zip(*pairs, strict=True)
    assert kappas(one, two) == pytest.approx(kappas(two, one), nan_ok=True)
    turned = alphas(zip(two, one, strict=True))
    assert alphas(pairs) == pytest.approx(turned, nan_ok=True)


@given(PAIRS, st.integers(2, 5), st.integers(-3, 3))
def test_a_scale_may_be_moved_and_stretched(
    pairs: list[tuple[int, int]], factor: int, shift: int
) -> None:
    one, two = zip(*pairs, strict=True)
    moved = [[label * factor + shift for label in labels] for labels in (one, two)]
    assert kappas(*moved) == pytest.approx(kappas(one, two), nan_ok=True)
    assert alphas(zip(*moved, strict=True)) == pytest.approx(alphas(pairs), nan_ok=True)


@given(st.lists(st.tuples(*[st.none() | st.integers(1, 3)] * 3), min_size=1), st.integers(2, 4))
def test_counts_are_as_many_units(said: list[tuple[int | None, ...]], copies: int) -> None:
    units = Counter(said)
    for scale in SCALES:
        found = alpha({unit: n * copies for unit, n in units.items()}, scale)
        assert found == pytest.approx(alpha(Counter(said * copies), scale), nan_ok=True)


def numbers_of(random: Random, size: int) -> list[float]:
    """Of a cluster, around a middle of its own; 3 in the mean."""
    middle = random.gauss(3, 1)
    return [random.gauss(middle, 1) for _ in range(size)]


def samples_of(random: Random, size: int) -> list[bool]:
    """Of an item that is as hard as it is; half of them right in the mean."""
    share = random.betavariate(2, 2)
    return [random.random() < share for _ in range(size)]


@pytest.mark.parametrize(
    ("draw", "truth", "sizes"),
    [(numbers_of, 3, [2, 3, 4, 5, 6] * 6), (samples_of, 0.5, [4] * 30)],
    ids=["30 clusters of 2 to 6 numbers", "30 items with 4 samples"],
)
def test_95_of_100_intervals_hold_the_truth(
    draw: Callable[[Random, int], list[float]], truth: float, sizes: list[int]
) -> None:
    runs, random = 20_000, Random(2)
    own = [cluster for cluster, size in enumerate(sizes) for _ in range(size)]
    held = 0
    for _ in range(runs):
        found = mean([value for size in sizes for value in draw(random, size)], own)
        held += found.low <= truth <= found.high
    assert 0.945 <= held / runs <= 0.955
