"""Confidence intervals: bootstrap over images, Wilson, Clopper-Pearson, Student's t, paired differences; McNemar's
test; and how many events chance explains.

All intervals are two-sided 95% ones unless a level is given. scipy.stats takes most of a second to import, so it is
imported where a quantile of it is computed.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from gsem.rng import derive_seed

BLOCK = 500  # resamples drawn at a time, so that memory stays small
KEPT = 50_000_000  # counts of resamples that are kept for the next interval: 100 MB


class Interval(NamedTuple):
    """An estimate with its 95% interval."""

    mean: float
    low: float
    high: float

    def as_accuracy(self) -> dict[str, float]:
        """The interval of an accuracy, as files of audits hold it."""
        return {"accuracy": self.mean, "low": self.low, "high": self.high}


def bootstrap_mean(values: Float[np.ndarray, " n"], *, resamples: int, seed: int) -> Interval:
    """The mean of one value per image, with its percentile bootstrap interval over images."""
    n = len(values)
    low, high = bootstrap(lambda counts: counts @ values / n, n, resamples=resamples, seed=seed)
    return Interval(float(values.mean()), low, high)


def bootstrap(
    statistic: Callable[[Int[np.ndarray, "b n"]], Float[np.ndarray, " b"]],
    n: int,
    *,
    resamples: int,
    seed: int,
    stream: str = "bootstrap",
) -> tuple[float, float]:
    """The percentile bootstrap interval (low, high) of a statistic of n images (Efron 1979).

    Args:
        statistic: from how often each image is drawn, a row for each of b resamples, to its value in each of them.
        resamples: how many, a multiple of 500.
        seed, stream: of the random stream. Intervals that share them and n use the same resamples.
    """
    found = np.concatenate([statistic(counts) for counts in _resamples(seed, stream, n, resamples)])
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def _resamples(seed: int, stream: str, n: int, resamples: int) -> Iterable[Int[np.ndarray, "500 n"]]:
    """How often each of n images is drawn in each resample, in blocks."""
    make = _kept_resamples if n * resamples <= KEPT else _drawn_resamples
    return make(seed, stream, n, resamples)


@lru_cache(maxsize=2)
def _kept_resamples(seed: int, stream: str, n: int, resamples: int) -> list[Int[np.ndarray, "500 n"]]:
    # Every interval of a result uses the same ones; drawing them is nearly all of its time.
    return [counts.astype(np.uint16) for counts in _drawn_resamples(seed, stream, n, resamples)]


def _drawn_resamples(seed: int, stream: str, n: int, resamples: int) -> Iterator[Int[np.ndarray, "500 n"]]:
    rng = np.random.Generator(np.random.PCG64(derive_seed(seed, stream)))
    for _ in range(resamples // BLOCK):
        yield rng.multinomial(n, np.full(n, 1 / n), size=BLOCK)


def wilson_interval(share: float, n: int) -> Interval:
    """The 95% Wilson interval of a mean of `n` values in [0, 1]: never too short, also where all are 0 or 1.

    scipy's takes whole numbers of successes only.
    """
    z = 1.959964
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Interval(share, max(0.0, middle - half), min(1.0, middle + half))


def clopper_pearson_lower(count: int, n: int, alpha: float) -> float:
    """The one-sided lower bound of a probability of which `n` trials had `count` successes (Clopper, Pearson 1934).

    It lies above the true probability in at most `alpha` of cases: the largest p for which `count` or more successes
    have a probability of at most `alpha`.
    """
    from scipy.special import betaincinv

    return 0.0 if count == 0 else float(betaincinv(count, n - count + 1, alpha))


def t_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """The mean of at least two values, such as one for each seed, with Student's t-interval."""
    from scipy import stats

    n, mean = len(values), float(np.mean(values))
    half = float(stats.t.ppf((1 + level) / 2, n - 1)) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half)


def paired_interval(differences: Float[np.ndarray, " n"]) -> Interval:
    """The mean of one difference in [−1, 1] per image, with its 95% interval over images (Bonett & Price 2012).

    The interval is that of a normal mean of n + 2 values, the differences with −1 and 1 beside them. Where few images
    differ, the bootstrap and the plain normal interval are too short: in samples of 100 images, of which 1% and 2%
    differ in either direction, they hold the true difference in 85% of cases. This one is never empty, and too long
    where all differences are small.
    """
    n, z = len(differences), 1.959964
    middle = float(differences.sum()) / (n + 2)
    variance = (float(np.square(differences).sum()) + 2) / (n + 2) - middle**2
    half = z * math.sqrt(variance / (n + 2))
    return Interval(float(differences.mean()), max(-1.0, middle - half), min(1.0, middle + half))


def mcnemar(only_one: int, only_other: int) -> float:
    """The two-sided p-value of McNemar's exact test, from how many images one classifier alone gets wrong, and how many
    the other alone: how probable a split at least as uneven is if each such image falls to either with probability 1/2.
    """
    from scipy import stats

    n = only_one + only_other
    return min(1.0, 2 * float(stats.binom.cdf(min(only_one, only_other), n, 0.5)))


def binomial_quantile(n: int, p: float, level: float = 0.975) -> int:
    """The least count that a binomial (n, p) variable exceeds in at most 1 − `level` of cases."""
    from scipy import stats

    return int(stats.binom.ppf(level, n, p))
