"""Numbers on predicted values against loops that say what they mean, and against closed forms."""

import itertools
import math

import numpy as np
import pytest

from openrl_reason.evaluation.intervals import IntervalConfig, bootstrap
from openrl_reason.evaluation.value_accuracy import (
    Resamples,
    accuracy,
    calibration,
    count_pairs,
    noise_floor,
    position_bins,
    ranking_accuracy,
    truths,
)

INTERVALS = IntervalConfig(num_resamples=2000)


def some(seed, count=60, problems=12):
    rng = np.random.default_rng(seed)
    truth = rng.random(count)
    predictions = truth + rng.normal(0.05, 0.1, count)
    predictions[rng.random(count) < 0.1] = math.nan
    truth[3] = math.nan
    return truth, predictions, rng.integers(0, problems, count)


@pytest.mark.parametrize("seed", range(5))
def test_metrics_equal_a_loop_over_the_states_that_have_both_numbers(seed):
    truth, predictions, problems = some(seed)
    mask = np.arange(len(truth)) % 3 > 0
    found = accuracy(truth, predictions, Resamples(problems, INTERVALS), delta=0.1, mask=mask)
    pairs = [(x, y) for x, y, own in zip(predictions, truth, mask, strict=True) if own and math.isfinite(x) and math.isfinite(y)]
    errors = [x - y for x, y in pairs]
    assert found["num_states"] == len(pairs)
    assert found["mae"]["value"] == pytest.approx(sum(map(abs, errors)) / len(errors))
    assert found["rmse"]["value"] == pytest.approx(math.sqrt(sum(error**2 for error in errors) / len(errors)))
    assert found["bias"]["value"] == pytest.approx(sum(errors) / len(errors))
    assert found["within"]["value"] == pytest.approx(sum(abs(error) <= 0.1 for error in errors) / len(errors))
    assert found["correlation"]["value"] == pytest.approx(np.corrcoef(*zip(*pairs, strict=True))[0, 1])
    for metric in ("mae", "rmse", "bias", "correlation", "within"):
        assert found[metric]["low"] < found[metric]["value"] < found[metric]["high"]


def test_an_error_of_delta_counts_as_within_whatever_the_rounding():
    truth = np.array([0.1, 0.2, 0.3, 0.7])
    found = accuracy(truth, truth + 0.1, Resamples(np.arange(4), INTERVALS), delta=0.1)
    assert found["within"]["value"] == 1.0 and found["bias"]["value"] == pytest.approx(0.1)
    # All of four problems: the bootstrap would claim certainty.
    assert found["within"]["method"] == "wilson" and found["within"]["low"] == pytest.approx(0.51, abs=0.01)


@pytest.mark.parametrize("truth, predictions", [([0.5] * 4, [0.1, 0.9, 0.3, 0.2]), ([0.1, 0.9, 0.3, 0.2], [0.7] * 4), ([1e6] * 4, [1e6] * 4)])
def test_a_constant_has_no_correlation(truth, predictions):
    found = accuracy(np.array(truth), np.array(predictions), Resamples(np.arange(4), INTERVALS), delta=0.1)
    assert math.isnan(found["correlation"]["value"]) and found["correlation"]["method"] == "none" and math.isfinite(found["mae"]["value"])


def test_no_states_and_one_problem_have_no_intervals():
    empty = accuracy(np.zeros(0), np.zeros(0), Resamples(np.zeros(0), INTERVALS), delta=0.1)
    assert empty["num_states"] == 0 and math.isnan(empty["mae"]["value"]) and empty["mae"]["method"] == "none"
    one = accuracy(np.array([0.1, 0.4]), np.array([0.2, 0.2]), Resamples(np.array(["a", "a"]), INTERVALS), delta=0.1)
    assert one["mae"]["value"] == pytest.approx(0.15) and one["mae"]["method"] == "none"


def test_intervals_resample_problems():
    """With equally many states in each, the mean error is a mean over problems, whose bootstrap ``intervals`` has."""
    rng = np.random.default_rng(0)
    difficulty = rng.random(20)
    truth = np.zeros(80)
    predictions = np.repeat(difficulty, 4)  # the states of a problem say one thing
    config = IntervalConfig(num_resamples=20_000)
    found = accuracy(truth, predictions, Resamples(np.repeat(np.arange(20), 4), config), delta=0.1)["mae"]
    expected = bootstrap(difficulty, config)
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high), abs=0.01)
    as_if_independent = accuracy(truth, predictions, Resamples(np.arange(80), config), delta=0.1)["mae"]
    assert found["high"] - found["low"] > 1.6 * (as_if_independent["high"] - as_if_independent["low"])


def test_truths_of_rollouts_and_the_noise_floor_have_closed_forms():
    rewards = [np.array([1.0, 0, 0, 1]), np.array([1.0, math.nan, 1, 1]), np.array([math.nan])]
    found = truths(rewards)
    assert found.counts.tolist() == [4, 3, 0] and found.values[:2].tolist() == [0.5, 1.0] and math.isnan(found.values[2])
    assert found.stderrs[0] == pytest.approx(math.sqrt(0.5 * 0.5 / 3)) and found.stderrs[1] == 0
    assert found.variances[1] == pytest.approx(0.8 * 0.2 / 5)
    floor = noise_floor(found.take(slice(0, 2)))
    assert floor["noise_rmse"] == pytest.approx(math.sqrt((0.25 / 3 + 0) / 2))
    assert floor["noise_mae"] == pytest.approx(math.sqrt(2 / math.pi) * (math.sqrt(0.25 / 3) + 0) / 2)
    other = truths([np.array([2.0, 4.0, 6.0])])
    assert other.variances[0] == pytest.approx(other.stderrs[0] ** 2) == pytest.approx(4 / 3)


def test_the_noise_floor_is_the_error_that_exact_values_show():
    rng = np.random.default_rng(1)
    exact = rng.random(4000)
    truth = truths([(rng.random(64) < value).astype(float) for value in exact])
    floor = noise_floor(truth)
    assert np.abs(truth.values - exact).mean() == pytest.approx(floor["noise_mae"], rel=0.05)
    assert math.sqrt(((truth.values - exact) ** 2).mean()) == pytest.approx(floor["noise_rmse"], rel=0.05)


@pytest.mark.parametrize("num_bins", [1, 3, 4, 7])
def test_every_step_boundary_falls_into_the_bin_of_its_fraction(num_bins):
    for num_steps in range(1, 50):
        for step in range(num_steps):
            expected = step * num_bins // num_steps  # in whole numbers
            assert position_bins(np.array([step / num_steps]), num_bins)[0] == expected
    assert position_bins(np.array([1.0]), num_bins)[0] == num_bins - 1


def test_calibration_compares_means_of_bins():
    predictions = np.array([0.0, 0.04, 0.46, 1.0, math.nan])
    found = calibration(np.array([0.2, 0.0, 0.5, 0.6, 0.3]), predictions, 10)
    rows = [row for row in found["bins"] if row["num_states"]]
    assert [row["num_states"] for row in rows] == [2, 1, 1]
    assert [row["prediction"] for row in rows] == pytest.approx([0.02, 0.46, 1.0])
    assert [row["truth"] for row in rows] == pytest.approx([0.1, 0.5, 0.6])
    assert found["error"] == pytest.approx((2 * 0.08 + 0.04 + 0.4) / 4)
    wide = calibration(np.array([0.0, 1.0]), np.array([-1.0, 3.0]), 4)
    assert (wide["bins"][0]["low"], wide["bins"][-1]["high"]) == (-1.0, 3.0) and sum(row["num_states"] for row in wide["bins"]) == 2
    assert math.isnan(calibration(np.zeros(0), np.zeros(0), 3)["error"])


def naive_pairs(truth, predictions):
    right = pairs = 0.0
    for (t1, p1), (t2, p2) in itertools.combinations(zip(truth, predictions, strict=True), 2):
        if t1 != t2:
            pairs += 1
            right += 0.5 if p1 == p2 else float((t1 - t2) * (p1 - p2) > 0)
    return pairs, right


@pytest.mark.parametrize("seed", range(20))
def test_pairs_equal_a_loop_with_ties_on_both_sides(seed):
    rng = np.random.default_rng(seed)
    truth = truths([(rng.random(4) < p).astype(float) for p in rng.random(6)])
    predictions = rng.integers(0, 4, 6) / 4
    found = count_pairs(truth, predictions)
    assert (found.pairs, found.right) == naive_pairs(truth.values, predictions)


def test_a_pair_is_significant_when_its_difference_is_more_than_noise():
    rewards = [np.repeat([1.0, 0.0], [k, 100 - k]) for k in (50, 52, 90)]
    found = count_pairs(truths(rewards), np.array([0.1, 0.2, 0.0]))
    assert (found.pairs, found.significant, found.right, found.significant_right) == (3, 2, 1.0, 0.0)
    # All against none of two: not significant, although both sample variances are 0.
    assert count_pairs(truths([np.zeros(2), np.ones(2)]), np.array([0.0, 1.0])).significant == 0
    assert count_pairs(truths([np.zeros(20), np.ones(20)]), np.array([0.0, 1.0])).significant == 1
    no_truth = count_pairs(truths([np.array([math.nan]), np.ones(20)]), np.array([0.0, 1.0]))
    assert no_truth.pairs == 0


def test_ranking_accuracy_pools_the_pairs_of_all_states():
    truth = truths([np.zeros(50), np.ones(50), np.repeat([1.0, 0], 25)])
    right, wrong, tied = (count_pairs(truth, np.array(p)) for p in ([0, 1, 0.5], [1, 0, 0.5], [0.3, 0.3, 0.3]))
    found = ranking_accuracy([right, wrong, tied, right], np.array(["a", "b", "c", "d"]), INTERVALS)
    assert found["accuracy"]["value"] == pytest.approx((3 + 0 + 1.5 + 3) / 12) and found["num_pairs"] == 12
    assert found["tied_share"] == pytest.approx(0.25) and found["significant_share"] == 1.0
    assert found["accuracy"]["low"] <= 0.5 and found["accuracy"]["high"] == pytest.approx(1.0)
    none = ranking_accuracy([], np.array([]), INTERVALS)
    assert none["num_pairs"] == 0 and math.isnan(none["accuracy"]["value"])
