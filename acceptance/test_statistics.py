"""`transforms/statistics.py` on random data beside scipy, statsmodels, scikit-learn, krippendorff,
which are in no environment of the project: see README.md."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from modelcall_assets.transforms.statistics import (
    Scale,
    alpha,
    kappa,
    mcnemar,
    mean,
    pass_at_k,
    proportion,
    standard_error,
    t_critical,
)

numpy = pytest.importorskip("numpy")
scipy_stats = pytest.importorskip("scipy.stats")
statsmodels = pytest.importorskip("statsmodels.api")
proportions = pytest.importorskip("statsmodels.stats.proportion")
tables = pytest.importorskip("statsmodels.stats.contingency_tables")
metrics = pytest.importorskip("sklearn.metrics")
krippendorff = pytest.importorskip("krippendorff")

VALUES = st.lists(st.floats(-1e3, 1e3).map(lambda value: round(value, 3)), min_size=2, max_size=60)
LABELS = st.integers(1, 6)
SCALES: tuple[Scale, ...] = ("nominal", "ordinal", "interval")


@given(st.integers(1, 10**7))
def test_t_critical(freedom: int) -> None:
    expected = scipy_stats.t.ppf(0.975, freedom)
    assert t_critical(freedom) == pytest.approx(expected, rel=1e-9)


@given(st.integers(1, 10**6), st.floats(0, 1))
def test_proportion(n: int, share: float) -> None:
    right = round(n * share)
    expected = proportions.proportion_confint(right, n, 0.05, "wilson")
    assert proportion(right, n)[1:3] == pytest.approx(expected, abs=1e-12)


@given(VALUES)
def test_mean(values: list[float]) -> None:
    assume(len({*values}) > 1)
    middle, error = numpy.mean(values), scipy_stats.sem(values)
    expected = scipy_stats.t.interval(0.95, len(values) - 1, middle, error)
    assert mean(values)[1:3] == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(VALUES, st.randoms(use_true_random=False), st.integers(2, 9))
def test_clusters(values: list[float], random: object, groups: int) -> None:
    clusters = [random.randrange(groups) for _ in values]  # type: ignore[attr-defined]
    assume(len({*clusters}) > 1)
    ones = numpy.ones(len(values))
    named = {"groups": numpy.array(clusters)}
    fit = statsmodels.OLS(values, ones).fit(cov_type="cluster", cov_kwds=named, use_t=True)
    assert standard_error(values, clusters) == pytest.approx(fit.bse[0], rel=1e-6, abs=1e-9)
    expected = fit.conf_int()[0]
    assert mean(values, clusters)[1:3] == pytest.approx(expected, rel=1e-6, abs=1e-7)


@given(st.integers(0, 400), st.integers(0, 400))
def test_mcnemar(lost: int, gained: int) -> None:
    assume(lost != gained)
    is_exact = lost + gained < 25
    expected = tables.mcnemar([[3, lost], [gained, 8]], exact=is_exact)
    assert mcnemar(lost, gained).p_value == pytest.approx(expected.pvalue, rel=1e-9)


@given(st.lists(st.tuples(LABELS, LABELS), min_size=1))
@pytest.mark.filterwarnings("ignore")
def test_kappa(pairs: list[tuple[int, int]]) -> None:
    one, two = zip(*pairs, strict=True)
    for squared in (False, True):
        named = "quadratic" if squared else None
        expected = metrics.cohen_kappa_score(one, two, weights=named, labels=range(1, 7))
        found = kappa(Counter(pairs), squared=squared)
        assert found == pytest.approx(expected, abs=1e-12, nan_ok=True)


@given(st.lists(st.lists(st.none() | LABELS, min_size=4, max_size=4), min_size=2))
def test_alpha(units: list[list[int | None]]) -> None:
    paired = [label for unit in units for label in unit if label and sum(map(bool, unit)) > 1]
    assume(len({*paired}) > 1)
    for scale in SCALES:
        table = numpy.array(units, float).T
        expected = krippendorff.alpha(reliability_data=table, level_of_measurement=scale)
        assert alpha(Counter(map(tuple, units)), scale) == pytest.approx(expected, abs=1e-9)


@given(st.integers(1, 200), st.floats(0, 1), st.floats(0, 1))
def test_pass_at_k(n: int, share: float, of: float) -> None:
    right, k = round(n * share), max(1, round(n * of))
    none_right = scipy_stats.hypergeom.pmf(0, n, right, k)
    assert pass_at_k(n, right, k) == pytest.approx(1 - none_right, abs=1e-9)
