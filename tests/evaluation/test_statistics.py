"""Intervals against scipy's and against the truth that they must cover."""

import numpy as np
import pytest
import scipy.stats

from gsem.evaluation.statistics import (
    Interval,
    binomial_quantile,
    bootstrap,
    bootstrap_mean,
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


@pytest.mark.parametrize("level", [0.9, 0.95])
def test_the_t_interval_is_students(level):
    values = [0.5, 0.7, 0.9, 0.4]
    low, high = scipy.stats.t.interval(level, 3, loc=np.mean(values), scale=scipy.stats.sem(values))
    assert t_interval(values, level) == pytest.approx(Interval(np.mean(values), low, high))


@pytest.mark.parametrize("n", [1, 20, 100, 10_000])
def test_a_binomial_quantile_is_exceeded_in_at_most_so_many_cases(n):
    count = binomial_quantile(n, 0.003)
    assert scipy.stats.binom.sf(count, n, 0.003) <= 0.025 < scipy.stats.binom.sf(count - 1, n, 0.003)
