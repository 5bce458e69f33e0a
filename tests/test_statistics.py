"The workbook's statistics against scipy's own, closed forms and simulations, on random inputs."
import itertools
import math

import numpy as np
import pytest
from scipy import stats

from prx_nb.lab.statistics import (
    METHODS, Comparison, Interval, compare, correct, mean_interval, null_rates, p_value, paired_difference, power,
    resampled_rate, seeds_needed, verdict,
)


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


@pytest.mark.parametrize("seed", range(20))
def test_p_value_is_scipys_and_agrees_with_the_verdict(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 9))
    a, b = rng.normal(size=n) + rng.normal(), rng.normal(size=n)
    variant, baseline = dict(enumerate(a)) | {-5: 1.0}, dict(reversed(list(enumerate(b)))) | {99: 5.0}
    p = p_value(variant, baseline)
    np.testing.assert_allclose(p, stats.ttest_rel(a, b).pvalue, rtol=1e-9)
    assert (p < 0.05) == (verdict(paired_difference(variant, baseline), True) != "not distinguishable")


@pytest.mark.parametrize("variant, baseline", [
    ({0: 1.0}, {0: 2.0}),                                            # one seed
    ({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0}),                            # the same thing
    ({0: 0.5, 1: 0.75, 2: 0.25}, {0: 0.25, 1: 0.5, 2: 0.0}),         # equal differences
    ({0: 0.1 + 0.2, 1: 0.7, 2: 0.9}, {0: 0.2, 1: 0.6, 2: 0.8}),      # equal but for rounding
    ({0: 0.1 + 0.2, 1: 1.1 * 3}, {0: 0.3, 1: 3.3}),                  # no difference but rounding
])
def test_what_was_not_measured_has_no_p_value(variant, baseline):
    assert math.isnan(p_value(variant, baseline))
    c = compare({"it": (variant, baseline, True)})["it"]
    assert c.verdict == "not distinguishable" and math.isnan(c.p_corrected)


def closed_testing(p):
    "Holm's procedure by its definition: a hypothesis falls when Bonferroni rejects every set that holds it."
    sets = [s for k in range(1, len(p) + 1) for s in itertools.combinations(range(len(p)), k)]
    return [max(min(1.0, len(s) * min(p[j] for j in s)) for s in sets if i in s) for i in range(len(p))]


def step_up(p):
    "Benjamini and Hochberg by their definition: the smallest level at which a value is among those rejected."
    m, ranked = len(p), sorted(p)
    levels = sorted({min(1.0, m * v / (i + 1)) for i, v in enumerate(ranked)})
    rejected = lambda level: max((v for i, v in enumerate(ranked) if v <= (i + 1) * level / m * (1 + 1e-12)), default=-1.0)
    return [next((level for level in levels if v <= rejected(level)), 1.0) for v in p]


@pytest.mark.parametrize("seed", range(30))
def test_corrections_are_what_their_authors_define(seed):
    rng = np.random.default_rng(seed)
    p = rng.random(int(rng.integers(1, 9))) ** 3
    if seed % 3 == 0:
        p = p.round(1)                                               # ties, zeros and ones
    np.testing.assert_allclose(correct(p, "holm"), closed_testing(p), rtol=1e-9)
    np.testing.assert_allclose(correct(p, "bh"), step_up(p), rtol=1e-9)
    shuffle = rng.permutation(len(p))
    for method in METHODS:
        np.testing.assert_allclose(np.array(correct(p, method))[shuffle], correct(p[shuffle], method))
        padded = np.insert(p, rng.integers(0, len(p) + 1, 2), math.nan)
        got = np.array(correct(padded, method))
        np.testing.assert_allclose(got[~np.isnan(padded)], correct(p, method))
        assert np.isnan(got).sum() == 2, "not-a-number passes through and does not count"


def table(rng, n, real, effect=4.0, size=16, rho=0.7):
    "Pairs as `compare` takes them: correlated metrics, of which the first `real` are better."
    base = rng.normal(size=(n, size))
    d = rho**0.5 * rng.normal(size=(n, 1)) + (1 - rho) ** 0.5 * rng.normal(size=(n, size))
    d[:, :real] += effect
    return {k: (dict(enumerate(base[:, k] + d[:, k])), dict(enumerate(base[:, k])), True) for k in range(size)}


def test_corrected_tables_keep_their_promise(monkeypatch):
    rng = np.random.default_rng(0)
    rounds, wrong, share, plain = 250, dict.fromkeys(METHODS, 0), dict.fromkeys(METHODS, 0.0), 0
    for _ in range(rounds):
        nothing, mixed = table(rng, 4, 0), table(rng, 4, 5)
        plain += any(verdict(paired_difference(*pair[:2]), True) != "not distinguishable" for pair in nothing.values())
        for method in METHODS:
            wrong[method] += any(c.verdict != "not distinguishable" for c in compare(nothing, method).values())
            said = {k for k, c in compare(mixed, method).items() if c.verdict != "not distinguishable"}
            share[method] += len(said - set(range(5))) / max(len(said), 1)
    sure = 1.96 * (0.05 * 0.95 / rounds) ** 0.5
    assert plain / rounds > 0.25, "without a correction one table in three shows a difference where there is none"
    for method in METHODS:
        assert wrong[method] / rounds < 0.05 + sure and share[method] / rounds < 0.05 + sure


def test_a_comparison_holds_what_the_single_functions_give():
    rng = np.random.default_rng(3)
    pairs = {("x", "KID"): ({0: 1.0, 1: 2.1, 2: 2.9}, {0: 5.0, 1: 6.2, 2: 6.8}, False),
             ("x", "style"): ({0: 1.0, 1: 2.1, 2: 2.9}, {0: 5.0, 1: 6.2, 2: 6.8}, True),
             ("y", "KID"): (dict(enumerate(rng.normal(size=3))), dict(enumerate(rng.normal(size=3))), False),
             ("y", "one seed"): ({0: 3.0}, {0: 1.0, 1: 2.0}, True)}
    for method in METHODS:
        found = compare(pairs, method)
        assert list(found) == list(pairs)
        corrected = correct([p_value(v, b) for v, b, _ in pairs.values()], method)
        for (name, (v, b, _)), q in zip(pairs.items(), corrected):
            assert found[name].difference.mean == paired_difference(v, b).mean
            assert (found[name].difference.low <= 0 <= found[name].difference.high) == (found[name].verdict == "not distinguishable") or name[1] == "one seed"
            np.testing.assert_equal([found[name].p, found[name].p_corrected], [p_value(v, b), q])
    assert [c.verdict for c in found.values()] == ["better", "worse", "not distinguishable", "not distinguishable"]
    strict = compare(pairs, confidence=1 - 1e-9)
    assert all(c.verdict == "not distinguishable" for c in strict.values()) and strict["x", "KID"].difference.low < -100
    assert isinstance(strict["x", "KID"], Comparison) and compare({}) == {}


def test_resampled_rate_is_five_percent_of_nothing_and_the_power_of_something():
    rng = np.random.default_rng(4)
    pool = lambda shift=0.0: rng.normal(shift, 1, 400)              # so large that draws hardly overlap
    for n in (2, 3, 6):
        rate = resampled_rate(pool(), pool(), n, 5000, rng)
        assert abs(rate.share - 0.05) < 0.015 and rate.low < 0.05 < rate.high
        seen = resampled_rate(pool(2.0), pool(), n, 5000, rng).share
        assert abs(seen - power(n, 2.0, 2**0.5)) < 0.06


def test_the_rates_interval_is_honest_about_small_pools():
    rng = np.random.default_rng(6)
    for size, n in ((8, 3), (20, 3), (20, 5)):
        rates = [resampled_rate(rng.normal(size=size), rng.normal(size=size), n, 1000, rng) for _ in range(60)]
        assert np.mean([r.low <= 0.05 <= r.high for r in rates]) >= 0.9
        assert abs(np.mean([r.share for r in rates]) - 0.05) < 0.02
        naive = 1.96 * (0.05 * 0.95 / 1000) ** 0.5                   # as if the draws were independent
        assert np.median([r.high - r.low for r in rates]) > 2 * naive
    one = [1.0, 2.0, 3.0]
    rate = resampled_rate(one, [0.0, 5.0, 10.0], 3)                   # three against three: one comparison in fact
    assert rate.high - rate.low > 0.5


def test_each_draw_uses_a_run_once():
    a, b = 10.0 ** np.arange(4), -(10.0 ** np.arange(4))
    calls = []
    original = stats.ttest_rel
    try:
        stats.ttest_rel = lambda x, y, **k: calls.append((x, y)) or original(x, y, **k)
        resampled_rate(a, b, 4, 50)
    finally:
        stats.ttest_rel = original
    for x, pool in zip(calls[0], (a, b)):
        assert (np.sort(x, axis=1) == np.sort(pool)).all()
    assert len({tuple(np.round(x - y)) for x, y in zip(*calls[0])}) > 5, "and pairs them anew"


def test_null_rates_are_those_of_each_metric_and_pair_by_no_order():
    rng = np.random.default_rng(9)
    values = {name: tuple(dict(enumerate(rng.normal(size=12))) for _ in "ab") for name in ("KID", "val")}
    frame = null_rates(values, n=4, resamples=500)
    assert list(frame.columns) == ["metric", "rate", "low", "high", "seeds"] and list(frame.metric) == ["KID", "val"]
    for name, rate, low, high, seeds in frame.values:
        own = resampled_rate(list(values[name][0].values()), list(values[name][1].values()), 4, 500)
        assert (rate, low, high, seeds) == (own.share, own.low, own.high, 12)
    turned = {name: tuple(dict(reversed(pool.items())) for pool in pools) for name, pools in values.items()}
    assert null_rates(turned, n=4, resamples=500).equals(frame)
    constant = null_rates({"background": ({s: 0.0 for s in range(6)}, {s: 0.0 for s in range(6)})})
    assert constant.rate[0] == 0 and constant.high[0] > 0.05, "six equal runs do not prove that nothing is ever called"


def test_bad_tables_are_refused():
    with pytest.raises(ValueError, match="no correction 'bonferroni'; there are bh, holm"):
        correct([0.1], "bonferroni")
    for bad in (-0.1, 1.5, math.inf):
        with pytest.raises(ValueError, match=r"lies in \[0, 1\]"):
            correct([0.5, bad])
    with pytest.raises(ValueError, match="KID: .*finite"):
        compare({"KID": ({0: math.nan, 1: 1.0}, {0: 1.0, 1: 1.0}, True)})
    for a, b, n in (([1.0, 2.0], [1.0] * 5, 3), ([1.0] * 5, [1.0] * 5, 1), ([1.0, math.inf, 2.0], [1.0] * 5, 2)):
        with pytest.raises(ValueError, match=f"n = {n} with pools of {len(a)} and {len(b)}"):
            resampled_rate(a, b, n)
