import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployopt.runtime.statistics import (
    Ratio,
    bootstrap_median,
    bootstrap_ratio,
    floor_between_lifetimes,
    floor_of_ratios,
    minimum_samples,
    moving_median_settled,
    paired_ratio,
    percentile_with_interval,
    ratio_over_lifetimes,
    students_t,
    summary,
    widened,
)


def test_minimum_samples_are_mlperfs():
    assert [minimum_samples(q) for q in (0.90, 0.95, 0.99)] == [64, 130, 662]


@pytest.mark.parametrize(("q", "n"), [(0.5, 40), (0.9, 64), (0.95, 130), (0.99, 700)])
def test_order_statistic_interval_covers(q, n):
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(1000):
        found = percentile_with_interval(np.sort(rng.random(n)), q)  # the true q-quantile of U(0, 1) is q
        covered += found.low <= q <= found.high
    assert 0.94 <= covered / 1000 <= 0.99


def test_percentile_is_null_with_the_reason_below_the_minimum():
    found = percentile_with_interval(np.arange(661.0), 0.99)
    assert found[:3] == (None, None, None)
    assert found.reason == "661 samples; p99 needs 662"


@given(st.lists(st.floats(1e3, 1e9), min_size=11, max_size=200), st.sampled_from([0.5, 0.9]))
def test_interval_encloses_the_percentile(samples, q):
    found = percentile_with_interval(np.sort(samples), q)
    if found.value is not None:
        assert found.low <= found.value <= found.high


def test_percentile_outside_the_unit_interval_is_refused():
    with pytest.raises(ValueError, match="inside"):
        percentile_with_interval(np.arange(100.0), 1.0)


def test_summary_is_in_milliseconds():
    figures = summary(np.linspace(1_000_000, 3_000_000, 1001))
    assert figures["n"] == 1001
    assert figures["p50"] == pytest.approx(2.0)
    assert figures["p99"] == pytest.approx(2.98)
    assert figures["mad"] == pytest.approx(0.5)
    assert figures["p50_ci95"][0] < 2.0 < figures["p50_ci95"][1]
    assert len(figures["quantiles"]) == 21
    assert figures["quantiles"] == sorted(figures["quantiles"])
    assert figures["reasons"] == {}


def test_summary_of_few_samples_says_what_is_missing():
    figures = summary(np.full(70, 1e6))
    assert figures["p90"] == 1.0
    assert figures["p95"] is None
    assert set(figures["reasons"]) == {"p95", "p99"}


@pytest.mark.parametrize("bad", [[], [1.0, float("nan")]])
def test_summary_refuses_what_is_not_finite(bad):
    with pytest.raises(ValueError, match="finite samples"):
        summary(np.array(bad))


def _rounds(rng, n, drift, outliers):
    """Block medians of two equal sessions: 2 % noise each, a mood of the machine common to each round, blocks that were disturbed."""
    mood = np.exp(rng.normal(0, drift, n))
    pair = np.exp(rng.normal(0, 0.02, (2, n))) * mood
    return pair * np.where(rng.random((2, n)) < outliers, 1 + rng.exponential(0.5, (2, n)), 1)


@pytest.mark.parametrize("drift", [0.0, 0.05])
@pytest.mark.parametrize("outliers", [0.0, 0.1])
@pytest.mark.parametrize("n", [20, 40])
def test_paired_ratio_covers(n, drift, outliers):
    rng = np.random.default_rng(1)
    covered = 0
    for seed in range(1000):
        ratio = bootstrap_ratio(*_rounds(rng, n, drift, outliers), paired=True, resamples=500, seed=seed)
        covered += ratio.low <= 1 <= ratio.high
    assert 0.93 <= covered / 1000 <= 0.98


def test_pairing_halves_the_interval_under_drift():
    a, b = _rounds(np.random.default_rng(2), 40, 0.05, 0)
    paired, unpaired = bootstrap_ratio(a, b, paired=True), bootstrap_ratio(a, b, paired=False)
    assert paired.high - paired.low < 0.5 * (unpaired.high - unpaired.low)


def test_ratio_finds_a_slowdown_of_five_percent():
    rng, found = np.random.default_rng(3), 0
    for seed in range(200):
        a, b = _rounds(rng, 20, 0.05, 0)
        found += bootstrap_ratio(1.05 * a, b, paired=True, resamples=500, seed=seed).low > 1
    assert found / 200 > 0.95


def test_ratio_is_repeatable_and_of_a_over_b():
    a, b = np.full(20, 3.0), np.full(20, 2.0)
    assert bootstrap_ratio(a, b, paired=True) == (1.5, 1.5, 1.5)
    noisy = a + np.random.default_rng(0).random(20)
    assert bootstrap_ratio(noisy, b, paired=False, seed=4) == bootstrap_ratio(noisy, b, paired=False, seed=4)


@pytest.mark.parametrize(("a", "b"), [([1.0], [1.0, 2.0]), ([], []), ([0.0], [1.0]), ([float("nan")], [1.0])])
def test_ratio_refuses_what_it_cannot_compare(a, b):
    with pytest.raises(ValueError, match="wanted"):
        bootstrap_ratio(a, b, paired=True)


def test_bootstrap_median_covers():
    rng = np.random.default_rng(5)
    intervals = [bootstrap_median(rng.normal(1, 0.1, 20), resamples=500, seed=seed) for seed in range(1000)]
    assert 0.93 <= np.mean([low <= 1 <= high for low, high in intervals]) <= 0.98


def test_moving_median_settles_when_the_drift_ends():
    falling = np.linspace(2, 1, 40)
    assert not moving_median_settled(falling)
    assert moving_median_settled([*falling, *np.ones(40)])
    assert not moving_median_settled([1.0] * 9)


def test_students_t_is_the_tables():
    assert [round(students_t(n), 3) for n in (1, 2, 3, 4, 9, 30, 1000)] == [12.706, 4.303, 3.182, 2.776, 2.262, 2.042, 1.962]
    assert students_t(10, 0.9) == pytest.approx(1.812, abs=1e-3)
    with pytest.raises(ValueError, match="degree of freedom"):
        students_t(0)


def _lifetimes(rng, n, layout, rounds=20):
    """Paired ratios of n lifetimes, each with a bias of its own that all of its rounds share."""
    bias = np.exp(rng.normal(0, layout, n))
    return [paired_ratio(*_rounds(rng, rounds, 0.05, 0.05)) * b for b in bias]


@pytest.mark.parametrize("layout", [0.0, 0.01, 0.03])
@pytest.mark.parametrize("n", [3, 5, 10])
def test_ratio_over_lifetimes_covers_where_blocks_cannot(n, layout):
    rng = np.random.default_rng(7)
    found = [ratio_over_lifetimes(_lifetimes(rng, n, layout)) for _ in range(2000)]
    assert 0.93 <= np.mean([r.low <= 1 <= r.high for r in found]) <= 0.97


@pytest.mark.parametrize("n", [3, 7])
def test_floors_are_exceeded_once_in_twenty(n):
    rng, beyond_lifetimes, beyond_ratios = np.random.default_rng(8), 0, 0
    for _ in range(4000):
        medians, ratios = np.exp(rng.normal(0, 0.02, n + 2)), np.exp(rng.normal(0, 0.02, n + 1))
        beyond_lifetimes += abs(np.log(medians[n] / medians[n + 1])) > np.log1p(floor_between_lifetimes(medians[:n]))
        beyond_ratios += abs(np.log(ratios[n])) > np.log1p(floor_of_ratios(ratios[:n]))
    assert 0.035 <= beyond_lifetimes / 4000 <= 0.065
    assert 0.035 <= beyond_ratios / 4000 <= 0.065


def test_widening_never_narrows():
    assert widened(Ratio(1.0, 0.99, 1.01), 0.05) == (1.0, pytest.approx(1 / 1.05), 1.05)
    assert widened(Ratio(1.0, 0.5, 2.0), 0.05) == (1.0, 0.5, 2.0)


@pytest.mark.parametrize("bad", [[1.0], [1.0, 0.0], [1.0, float("inf")]])
def test_lifetimes_must_be_two_and_positive(bad):
    with pytest.raises(ValueError, match="wanted values above zero, at least 2"):
        ratio_over_lifetimes(bad)
