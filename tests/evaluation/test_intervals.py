"""Intervals against published values and by coverage; paired tests against enumeration."""

import itertools
import math

import numpy as np
import pytest

from openrl_reason.evaluation.intervals import IntervalConfig, bootstrap, difference, estimate, mcnemar, sign_flip_test, wilson

CONFIG = IntervalConfig(num_resamples=2000)


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [  # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_has_the_published_values(successes, trials, low, high):
    interval = wilson(successes, trials)
    assert (round(interval.low, 4), round(interval.high, 4)) == (low, high)
    mirrored = wilson(trials - successes, trials)
    assert (mirrored.low, mirrored.high) == pytest.approx((1 - interval.high, 1 - interval.low))


def test_the_rule_says_which_interval_it_is():
    assert estimate(np.array([1.0, 0, 0]), CONFIG, one_trial_each=True).interval == wilson(1, 3)
    assert estimate(np.array([1.0, 0, 0]), CONFIG).interval.method == "bootstrap"
    assert estimate(np.array([0.0, 0, 0]), CONFIG).interval == wilson(0, 3)  # a bootstrap would claim to know
    assert estimate(np.array([0.5]), CONFIG).interval.method == "none"
    nothing = estimate(np.array([np.nan]), CONFIG)
    assert math.isnan(nothing.value) and nothing.num_items == 0


def test_the_bootstrap_is_that_of_resampled_items():
    values = np.random.default_rng(0).choice([0, 0.25, 0.5, 1.0], size=60)
    naive = values[np.random.default_rng(1).integers(0, 60, (50_000, 60))].mean(axis=1)
    interval = bootstrap(values, IntervalConfig(num_resamples=50_000))
    assert (interval.low, interval.high) == pytest.approx(tuple(np.quantile(naive, [0.025, 0.975])), abs=0.006)
    assert bootstrap(values, CONFIG) == bootstrap(values, CONFIG)


@pytest.mark.parametrize(("num_samples", "num_items"), [(1, 100), (4, 100)])
def test_intervals_cover_the_truth_about_as_often_as_they_say(num_samples, num_items):
    """Items of different difficulty: Beta(0.6, 1.4) has mean 0.3."""
    rng, covered, repeats = np.random.default_rng(5), 0, 400
    for _ in range(repeats):
        chances = rng.beta(0.6, 1.4, num_items)
        values = rng.binomial(num_samples, chances) / num_samples
        interval = estimate(values, IntervalConfig(num_resamples=500), one_trial_each=num_samples == 1).interval
        covered += interval.low <= 0.3 <= interval.high
    assert 0.91 <= covered / repeats <= 0.98


def test_mcnemar_is_the_exact_binomial_test():
    assert mcnemar(0, 0) == 1.0 and mcnemar(5, 5) == 1.0
    assert mcnemar(0, 5) == mcnemar(5, 0) == pytest.approx(2 / 32)
    assert mcnemar(2, 8) == pytest.approx(2 * sum(math.comb(10, i) for i in range(3)) / 2**10)
    assert 0 < mcnemar(900, 1100) < 1e-4


def test_the_sign_flip_test_agrees_with_all_flips():
    values = np.array([0.5, 0.25, -0.25, 0.75, 0.0, 0.5, 0.25])
    sums = [abs(sum(s * v for s, v in zip(signs, values, strict=True))) for signs in itertools.product((-1, 1), repeat=len(values))]
    exact = np.mean([total >= abs(values.sum()) - 1e-12 for total in sums])
    assert sign_flip_test(values, IntervalConfig(num_resamples=40_000)) == pytest.approx(exact, abs=0.01)
    assert sign_flip_test(np.zeros(4), CONFIG) == 1.0


def test_a_difference_of_nothing_is_not_certain():
    same = difference(np.zeros(100), CONFIG)
    assert same.interval.method == "wilson" and same.interval.high == pytest.approx(wilson(0, 100).high) == -same.interval.low
    assert difference(np.array([0.0, 1.0, 1.0, -1.0]), CONFIG).interval.method == "bootstrap"
