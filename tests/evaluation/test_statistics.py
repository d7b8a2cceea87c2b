"""Intervals against scipy's and against the truth that they must cover."""

import math

import numpy as np
import pytest
import scipy.stats

from gsem.evaluation.statistics import (
    Interval,
    binomial_quantile,
    bootstrap,
    bootstrap_mean,
    mcnemar,
    paired_interval,
    t_interval,
    wilson_interval,
)


def test_the_bootstrap_of_a_mean_is_scipys():
    values = np.random.default_rng(1).beta(2, 1, size=300)
    found = bootstrap_mean(values, resamples=10_000, seed=0)
    theirs = scipy.stats.bootstrap((values,), np.mean, n_resamples=10_000, method="percentile", rng=1)
    assert found == pytest.approx((values.mean(), *theirs.confidence_interval), abs=0.0015)


def test_the_bootstrap_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    found = [bootstrap_mean(rng.binomial(1, 0.7, size=60), resamples=1000, seed=0) for _ in range(200)]
    assert 0.91 <= np.mean([low <= 0.7 <= high for _, low, high in found]) <= 0.99


def test_the_bootstrap_resamples_images_by_seed_and_stream():
    values = np.random.default_rng(2).random(40)

    def mean(counts: np.ndarray) -> np.ndarray:
        assert (counts.sum(1) == 40).all()
        return counts @ values / 40

    one, again, other, named = (
        bootstrap(mean, 40, resamples=1000, seed=seed, stream=stream)
        for seed, stream in ((0, "bootstrap"), (0, "bootstrap"), (1, "bootstrap"), (0, "slope"))
    )
    assert one == again == bootstrap_mean(values, resamples=1000, seed=0)[1:]
    assert len({one, other, named}) == 3


def test_resamples_that_are_not_kept_give_the_same_interval(monkeypatch):
    values = np.random.default_rng(2).random(40)
    kept = bootstrap_mean(values, resamples=1000, seed=0)
    monkeypatch.setattr("gsem.evaluation.statistics.KEPT", 0)
    assert bootstrap_mean(values, resamples=1000, seed=0) == kept


@pytest.mark.parametrize(("right", "n"), [(0, 4), (3, 4), (4, 4), (37, 80)])
def test_the_wilson_interval_is_scipys(right, n):
    theirs = scipy.stats.binomtest(right, n).proportion_ci(method="wilson")
    assert wilson_interval(right / n, n) == pytest.approx((right / n, theirs.low, theirs.high), abs=1e-6)


@pytest.mark.parametrize("n", [30, 100, 500])
@pytest.mark.parametrize(("lost", "gained"), [(0.0, 0.0), (0.005, 0.02), (0.05, 0.05), (0.2, 0.35)])
def test_the_paired_interval_of_verdicts_covers_the_truth(n, lost, gained):
    """Of two deterministic networks: also where only a few images differ, for which the bootstrap is too short."""
    u = np.random.default_rng(n).random((2000, n))
    d = np.where(u < lost, -1.0, np.where(u < lost + gained, 1.0, 0.0))
    found = np.array([paired_interval(one) for one in d])
    covered = (found[:, 1] <= gained - lost) & (gained - lost <= found[:, 2])
    assert covered.mean() >= 0.94
    if n * (lost + gained) >= 15:
        assert covered.mean() <= 0.97  # nor is it longer than it must be
    assert (found[:, 1] < found[:, 2]).all()
    np.testing.assert_allclose(found[:, 0], d.mean(1))


def test_the_paired_interval_of_probabilities_covers_the_truth():
    """Of stochastic networks: planted probabilities of each image, measured by 20 draws and by 100."""
    rng = np.random.default_rng(0)
    p = rng.beta(0.6, 0.4, (2000, 300))
    q = np.clip(p + 0.3 * rng.standard_normal(p.shape), 0, 1)
    everything = rng.beta(0.6, 0.4, 2_000_000)
    truth = (everything - np.clip(everything + 0.3 * rng.standard_normal(len(everything)), 0, 1)).mean()
    d = rng.binomial(20, p) / 20 - rng.binomial(100, q) / 100
    low, high = np.array([paired_interval(one)[1:] for one in d]).T
    assert 0.94 <= np.mean((low <= truth) & (truth <= high)) <= 0.98


def test_the_paired_interval_of_verdicts_is_bonetts_and_prices():
    """Their formula, by the counts: p12 = (n12 + 1)/(n + 2) and p21 likewise."""
    p12, p21 = (12 + 1) / 82, (5 + 1) / 82
    half = 1.959964 * np.sqrt((p12 + p21 - (p12 - p21) ** 2) / 82)
    values = np.repeat([1.0, -1.0, 0.0], [12, 5, 63])
    assert paired_interval(values) == pytest.approx((7 / 80, p12 - p21 - half, p12 - p21 + half))
    assert paired_interval(np.ones(3))[2] <= 1


@pytest.mark.parametrize(("one", "other"), [(0, 0), (1, 0), (0, 5), (3, 12), (12, 3), (7, 7), (40, 61)])
def test_mcnemars_test_is_the_binomial(one, other):
    if not one + other:
        assert mcnemar(one, other) == 1
        return
    assert mcnemar(one, other) == pytest.approx(scipy.stats.binomtest(one, one + other).pvalue)
    tail = sum(math.comb(one + other, k) for k in range(min(one, other) + 1)) / 2 ** (one + other)
    assert mcnemar(one, other) == pytest.approx(min(1.0, 2 * tail))


@pytest.mark.parametrize("level", [0.9, 0.95])
def test_the_t_interval_is_students(level):
    values = [0.5, 0.7, 0.9, 0.4]
    low, high = scipy.stats.t.interval(level, 3, loc=np.mean(values), scale=scipy.stats.sem(values))
    assert t_interval(values, level) == pytest.approx(Interval(np.mean(values), low, high))


@pytest.mark.parametrize("n", [1, 20, 100, 10_000])
def test_a_binomial_quantile_is_exceeded_in_at_most_so_many_cases(n):
    count = binomial_quantile(n, 0.003)
    assert scipy.stats.binom.sf(count, n, 0.003) <= 0.025 < scipy.stats.binom.sf(count - 1, n, 0.003)
