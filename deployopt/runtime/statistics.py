"""Figures of latency samples, each with its interval. Durations come in as nanoseconds and go out as milliseconds.

Percentiles carry distribution-free intervals from order statistics; they take the samples as independent. Where samples come in
blocks (and so share the machine's mood of the moment) the interval of the median is a bootstrap over whole blocks.
"""

from math import atan, cos, exp, pi, sin, sqrt
from statistics import NormalDist
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np

Samples = Union[Sequence[float], np.ndarray]
PERCENTILES = (50, 90, 95, 99)
MINIMUM_BLOCKS = 20  # the bootstrap of a median under-covers with fewer


class Percentile(NamedTuple):
    """A percentile and its interval in the samples' unit; all None, with the reason, where n is too small."""

    value: Optional[float]
    low: Optional[float]
    high: Optional[float]
    reason: Optional[str] = None


class Ratio(NamedTuple):
    """A ratio of medians and its 95 % interval."""

    value: float
    low: float
    high: float


def minimum_samples(q: float, confidence: float = 0.99) -> int:
    """Samples from which the q-quantile is worth stating: 64 for 0.90, 130 for 0.95, 662 for 0.99.

    MLPerf Inference's early-stopping rule: the smallest n for which, were the true tail above the quantile `1 - q` or heavier, at most one
    sample in it would be seen with probability at most `1 - confidence`: P(Binomial(n, 1 - q) ≤ 1) ≤ 1 - confidence.
    """
    n = 2
    while q ** (n - 1) * (q + n * (1 - q)) > 1 - confidence:
        n += 1
    return n


def _binomial_cdf(n: int, q: float) -> np.ndarray:
    """P(Binomial(n, q) ≤ k) for k = 0 … n."""
    k = np.arange(n + 1)
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    log_mass = log_factorial[n] - log_factorial - log_factorial[::-1] + k * np.log(q) + (n - k) * np.log1p(-q)
    return np.asarray(np.minimum(np.cumsum(np.exp(log_mass)), 1.0))


def percentile_with_interval(ordered: np.ndarray, q: float, confidence: float = 0.95) -> Percentile:
    """The q-quantile of sorted samples [n] and the order statistics that enclose the true one.

    Exact for any continuous distribution (Conover, Practical Nonparametric Statistics, 3.2): the number of samples below the true
    quantile is Binomial(n, q). Ties only widen it.

    Raises:
        ValueError: q not inside (0, 1).
    """
    if not 0 < q < 1:
        raise ValueError(f"wanted a quantile inside (0, 1), found {q}")
    n = len(ordered)
    needed = minimum_samples(q)
    if n < needed:
        return Percentile(None, None, None, f"{n} samples; p{q * 100:g} needs {needed}")
    tail = (1 - confidence) / 2
    cdf = _binomial_cdf(n, q)
    low = int(np.count_nonzero(cdf <= tail))  # rank, from 1
    high = int(np.searchsorted(cdf, 1 - tail)) + 1
    # minimum_samples leaves room for a rank on either side at 95 %; a higher confidence may run out of samples
    if low < 1 or high > n:
        return Percentile(float(np.quantile(ordered, q)), None, None, f"{n} samples; no {confidence:.0%} interval of p{q * 100:g}")
    return Percentile(float(np.quantile(ordered, q)), float(ordered[low - 1]), float(ordered[high - 1]))


def median_absolute_deviation(samples: np.ndarray) -> float:
    return float(np.median(np.abs(samples - np.median(samples))))


def _ms(value: Optional[float]) -> Optional[float]:
    return None if value is None else round(value * 1e-6, 6)


def summary(samples_ns: np.ndarray) -> Dict[str, Any]:
    """What a report says of samples [n]: n, p50 to p99 with `*_ci95`, mean, std, mad, 21 quantiles (0 %, 5 %, …, 100 %), in ms.

    A percentile that n cannot carry is None, and `reasons` says why.

    Raises:
        ValueError: no samples, or some that are not finite.
    """
    ordered = np.sort(np.asarray(samples_ns, dtype=np.float64))
    if len(ordered) == 0 or not np.isfinite(ordered).all():
        raise ValueError(f"wanted finite samples, found {len(ordered)} of which {int(np.isfinite(ordered).sum())} are finite")
    figures: Dict[str, Any] = {"n": len(ordered)}
    intervals: Dict[str, Any] = {}
    reasons: Dict[str, str] = {}
    for p in PERCENTILES:
        found = percentile_with_interval(ordered, p / 100)
        figures[f"p{p}"] = _ms(found.value)
        intervals[f"p{p}_ci95"] = None if found.low is None else [_ms(found.low), _ms(found.high)]
        if found.reason is not None:
            reasons[f"p{p}"] = found.reason
    figures["mean"] = _ms(float(ordered.mean()))
    figures["std"] = _ms(float(ordered.std(ddof=1))) if len(ordered) > 1 else None
    figures["mad"] = _ms(median_absolute_deviation(ordered))
    figures.update(intervals)
    figures["quantiles"] = [_ms(float(v)) for v in np.quantile(ordered, np.linspace(0, 1, 21))]
    figures["reasons"] = reasons
    return figures


def _within(t: float, freedom: int) -> float:
    """P(|T| < t) for Student's T (Abramowitz & Stegun 26.7.3 and 26.7.4)."""
    angle = atan(t / sqrt(freedom))
    odd = freedom % 2
    term = cos(angle) if odd else 1.0
    total = term if freedom > 1 else 0.0
    for k in range(2 + odd, freedom - 1, 2):
        term *= (k - 1) / k * cos(angle) ** 2
        total += term
    return 2 / pi * (angle + sin(angle) * total) if odd else sin(angle) * total


def students_t(freedom: int, confidence: float = 0.95) -> float:
    """The t that Student's T with so many degrees of freedom stays within, on both sides, with this probability: 12.7, 4.30, 3.18, …, 1.96.

    Raises:
        ValueError: no degree of freedom.
    """
    if freedom < 1:
        raise ValueError(f"wanted at least one degree of freedom, found {freedom}")
    low, high = 0.0, 1e4
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < confidence else (low, middle)
    return high


def ratio_over_lifetimes(ratios: Samples) -> Ratio:
    """The geometric mean of ratios [n ≥ 2], one for each process lifetime, and Student's 95 % interval of it.

    A process keeps its luck in memory layout and thread placement for life, so blocks of one lifetime err together and a bootstrap over them cannot
    see by how much. Lifetimes are independent: their spread holds every source of noise, that inside each of them included.

    Raises:
        ValueError: fewer than two, or a ratio that is not positive and finite.
    """
    logs = _logarithms(ratios, 2)
    half = students_t(len(logs) - 1) * float(logs.std(ddof=1)) / sqrt(len(logs))
    mean = float(logs.mean())
    return Ratio(exp(mean), exp(mean - half), exp(mean + half))


def floor_between_lifetimes(values: Samples) -> float:
    """Noise floor of a ratio of two values, each from a process lifetime of its own: the share (0.03 is 3 %) that it exceeds by chance once in twenty.

    Args:
        values: of one artifact, say its median latency in each of n ≥ 2 lifetimes. The floor is exp(t(n - 1) · s · √2) - 1 with the standard deviation s
            of their logarithms: the prediction interval of a difference.

    Raises:
        ValueError: fewer than two, or a value that is not positive and finite.
    """
    logs = _logarithms(values, 2)
    return exp(students_t(len(logs) - 1) * float(logs.std(ddof=1)) * sqrt(2)) - 1


def floor_of_ratios(ratios: Samples) -> float:
    """Noise floor of one more ratio of an artifact to itself, from n ≥ 1 such ratios, whose true value is 1: exp(t(n) · rms of their logarithms) - 1."""
    logs = _logarithms(ratios, 1)
    return exp(students_t(len(logs)) * float(np.sqrt(np.mean(logs**2)))) - 1


def widened(ratio: Ratio, floor: float) -> Ratio:
    """The ratio with an interval that reaches at least the noise floor to either side."""
    return Ratio(ratio.value, min(ratio.low, ratio.value / (1 + floor)), max(ratio.high, ratio.value * (1 + floor)))


def _logarithms(values: Samples, least: int) -> np.ndarray:
    found = np.asarray(values, dtype=np.float64)
    if len(found) < least or not (np.isfinite(found) & (found > 0)).all():
        raise ValueError(f"wanted values above zero, at least {least}, found {found.tolist()}")
    return np.asarray(np.log(found))


def _resampled_medians(blocks: np.ndarray, draws: np.ndarray) -> np.ndarray:
    return np.asarray(np.median(blocks[draws], axis=1))


def _interval(estimates: np.ndarray, n: int) -> Tuple[float, float]:
    """95 % expanded percentile interval of bootstrap estimates from n values.

    The plain percentile interval is too narrow by sqrt((n - 1) / n) and by using z for t; asking for the quantiles of
    Φ(-t(n - 1) · sqrt(n / (n - 1))) instead mends both (Hesterberg 2015, What Teachers Should Know About the Bootstrap, 4.1.1). BCa is not used:
    its acceleration rests on the jackknife, which is inconsistent for a median (Efron & Tibshirani 1993, 11.6).
    """
    if n == 1:
        return float(estimates.min()), float(estimates.max())
    tail = NormalDist().cdf(-students_t(n - 1) * (n / (n - 1)) ** 0.5)
    low, high = np.quantile(estimates, [tail, 1 - tail])
    return float(low), float(high)


def bootstrap_median(blocks: Samples, resamples: int = 2000, seed: int = 0) -> Tuple[float, float]:
    """95 % bootstrap interval of the median of block medians [n]; whole blocks are drawn."""
    values = np.asarray(blocks, dtype=np.float64)
    draws = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    return _interval(_resampled_medians(values, draws), len(values))


def paired_ratio(a: Samples, b: Samples) -> float:
    """Median over the rounds that both have of a[i] / b[i]: what slowed a whole round cancels."""
    rounds = min(len(a), len(b))
    return float(np.median(np.asarray(a[:rounds], dtype=np.float64) / np.asarray(b[:rounds], dtype=np.float64)))


def bootstrap_ratio(a: Samples, b: Samples, *, paired: bool, resamples: int = 2000, seed: int = 0) -> Ratio:
    """How many times b goes into a: a ratio of block medians [n], [m] with a 95 % bootstrap interval.

    Paired: a[i] and b[i] were timed in the same round, and the ratio is the median over rounds of a[i] / b[i]. What slowed a whole round cancels
    inside it, so the interval is about half as wide under drift as that of median(a) / median(b) and covers as it should
    (measured in tests/runtime/test_statistics.py). Unpaired: median(a) / median(b), each resampled on its own.

    Raises:
        ValueError: paired sequences of different lengths, an empty one, or a value that is not positive and finite.
    """
    left, right = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if paired and len(left) != len(right):
        raise ValueError(f"paired blocks come from the same rounds: wanted equal numbers, found {len(left)} and {len(right)}")
    for values in (left, right):
        if len(values) == 0 or not (np.isfinite(values) & (values > 0)).all():
            raise ValueError("wanted block medians above zero, at least one")
    rng = np.random.default_rng(seed)
    of_a = rng.integers(len(left), size=(resamples, len(left)))
    if paired:
        return Ratio(paired_ratio(left, right), *_interval(_resampled_medians(left / right, of_a), len(left)))
    of_b = rng.integers(len(right), size=(resamples, len(right)))
    estimates = _resampled_medians(left, of_a) / _resampled_medians(right, of_b)
    return Ratio(float(np.median(left) / np.median(right)), *_interval(estimates, min(len(left), len(right))))


def moving_median_settled(samples: Sequence[float], tolerance: float = 0.02, minimum_window: int = 5) -> bool:
    """Whether the medians of the last two windows, each a quarter of the samples and at least `minimum_window`, differ by at most `tolerance`.

    The window grows with the samples: a slow drift is seen late, noise is averaged out.
    """
    window = max(minimum_window, len(samples) // 4)
    if len(samples) < 2 * window:
        return False
    recent: List[float] = list(samples[-window:])
    before: List[float] = list(samples[-2 * window : -window])
    reference = float(np.median(before))
    return abs(float(np.median(recent)) - reference) <= tolerance * reference
