"The workbook's statistics against scipy's own, on random inputs."
import math

import numpy as np
import pytest
from scipy import stats

from prx_nb.lab.statistics import Interval, mean_interval, paired_difference, power, seeds_needed, verdict


@pytest.mark.parametrize("n", [2, 3, 7, 40])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_mean_interval_is_scipys(n, confidence):
    values = np.random.default_rng(n).normal(3, 2, n)
    ours = mean_interval(list(values), confidence)
    low, high = stats.t.interval(confidence, n - 1, loc=values.mean(), scale=stats.sem(values))
    np.testing.assert_allclose([ours.mean, ours.low, ours.high], [values.mean(), low, high], rtol=1e-10)
    assert ours.n == n


@pytest.mark.parametrize("seed", range(20))
def test_difference_and_verdict_are_those_of_the_paired_t_test(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 9))
    a, b = rng.normal(size=n) + rng.normal(), rng.normal(size=n)
    test = stats.ttest_rel(a, b)
    ours = paired_difference(dict(enumerate(a)), dict(enumerate(b)) | {99: 5.0})
    low, high = test.confidence_interval(0.95)
    np.testing.assert_allclose([ours.low, ours.high], [low, high], rtol=1e-9)
    for higher in (True, False):
        expected = "not distinguishable" if test.pvalue >= 0.05 else "better" if (a.mean() > b.mean()) == higher else "worse"
        assert verdict(ours, higher) == expected


def test_pairing_goes_by_seed_and_not_by_order():
    baseline = {0: 1.0, 1: 10.0, 2: 100.0}
    variant = {-1: 50.0, 2: 101.0, 0: 2.0, 1: 11.0}
    assert paired_difference(variant, baseline) == Interval(1.0, 1.0, 1.0, 3)


def test_power_is_the_share_of_simulated_experiments_that_see_the_effect():
    rng = np.random.default_rng(1)
    d = rng.normal(1.2, 0.8, (20_000, 4))
    seen = (stats.ttest_1samp(d, 0, axis=1).pvalue < 0.05).mean()
    assert abs(power(4, 1.2, 0.8) - seen) < 0.015
    assert abs(power(4, -1.2, 0.8) - seen) < 0.015


@pytest.mark.parametrize("effect, spread", [(3, 1), (1, 1), (0.3, 0.7), (-0.2, 0.5)])
def test_seeds_needed_is_the_smallest(effect, spread):
    n = seeds_needed(effect, spread)
    assert power(n, effect, spread) >= 0.8 and (n == 2 or power(n - 1, effect, spread) < 0.8)


def test_bad_values_are_refused():
    for values in ([], [1.0, math.inf], [math.nan]):
        with pytest.raises(ValueError, match="finite"):
            mean_interval(values)
    with pytest.raises(ValueError, match=r"the variant has \[0\], the baseline \[1\]"):
        paired_difference({0: 1.0}, {1: 1.0})
    with pytest.raises(ValueError, match="more than 50 seeds"):
        seeds_needed(0.01, 1.0, most=50)
    assert verdict(mean_interval([0.1] * 3), True) == "not distinguishable", "no scatter seen is not certainty"
    assert verdict(mean_interval([4.0]), True) == "not distinguishable"
