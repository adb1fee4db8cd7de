"""Intervals and tests against SciPy's own, and Holm's correction against a calculation by hand."""

import statistics

import numpy as np
import pytest
from scipy import stats

from alexlab.analysis import intervals


@pytest.mark.parametrize("n", [2, 3, 5, 30])
def test_the_interval_of_a_mean_is_students(n: int) -> None:
    values = np.random.default_rng(n).normal(0.6, 0.02, n).tolist()
    mean, std = statistics.fmean(values), statistics.stdev(values)
    expected = stats.t.interval(0.95, n - 1, mean, stats.sem(values))
    assert intervals.mean_interval(mean, std, n) == pytest.approx(expected)


@pytest.mark.parametrize(("n", "m"), [(2, 2), (3, 5), (20, 4)])
def test_the_difference_of_means_is_welchs(n: int, m: int) -> None:
    rng = np.random.default_rng(n)
    a, b = rng.normal(0.6, 0.02, n).tolist(), rng.normal(0.63, 0.05, m).tolist()
    samples = [(statistics.fmean(each), statistics.stdev(each), len(each)) for each in (a, b)]
    expected = stats.ttest_ind(a, b, equal_var=False).pvalue
    assert intervals.difference_of_means(*samples) == pytest.approx(expected)
    assert intervals.difference_of_means(*reversed(samples)) == pytest.approx(expected)


def test_holms_correction() -> None:
    """By hand: 3 * 0.01; 2 * 0.03; then 0.04, which may not be less than the one before. At most 1."""
    assert intervals.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert intervals.holm([0.9, 0.6]) == [1, 1]
    assert intervals.holm([]) == []


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (10, 10), (37, 60), (9210, 10_000), (1, 1)])
def test_the_interval_of_an_accuracy_is_wilsons(hits: int, n: int) -> None:
    expected = stats.binomtest(hits, n).proportion_ci(0.95, method="wilson")
    assert intervals.accuracy_interval(hits, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(("only_one", "only_other"), [(0, 0), (5, 5), (12, 3), (3, 12), (0, 7), (300, 250)])
def test_mcnemars_test_is_a_binomial_test_of_the_images_that_differ(only_one: int, only_other: int) -> None:
    both = only_one + only_other
    expected = stats.binomtest(only_one, both).pvalue if both else 1
    assert intervals.mcnemar(only_one, only_other) == pytest.approx(expected)
