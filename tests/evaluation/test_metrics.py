"""Closed forms against enumeration of all subsets; what is left out, and what is said about it."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from openrl_reason.evaluation.intervals import IntervalConfig
from openrl_reason.evaluation.metrics import GradedSamples, estimates, group_tables, item_values, metric_names, pass_at_k, summary
from openrl_reason.evaluation.voting import maj_at_k, win_probability

QUICK = IntervalConfig(num_resamples=500)


def vote(answers, correct):
    """The rule as it is told: most frequent answer, ties by a fair draw, missing answers only if there is nothing else."""
    votes = Counter(answer for answer in answers if answer is not None)
    best = [answer for answer, count in votes.items() if count == max(votes.values())] if votes else [None]
    worth = [next(c for a, c in zip(answers, correct, strict=True) if a == answer) for answer in best]
    return sum(worth) / len(worth)


def graded(scores, answers=None, statuses=None, infos=None):
    scores = np.array(scores, dtype=float)
    answers = answers or [[None if math.isnan(s) else str(s) for s in row] for row in scores]
    statuses = statuses or [["timeout" if math.isnan(s) else "ok" for s in row] for row in scores]
    lengths = np.arange(scores.size).reshape(scores.shape)
    return GradedSamples(scores, answers, statuses, lengths, lengths % 4 == 3, infos or [{} for _ in scores])


@pytest.mark.parametrize("n", range(1, 9))
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
        assert pass_at_k(n, c, k) == pytest.approx(np.mean([max(subset) for subset in subsets]), abs=1e-12)


def test_pass_at_k_of_many_samples_neither_overflows_nor_loses_digits():
    assert pass_at_k(10_000, 1, 100) == pytest.approx(0.01, rel=1e-9)
    assert pass_at_k(10_000, 9_950, 51) == 1.0 and math.isnan(pass_at_k(3, 1, 4))


def test_maj_at_k_is_the_mean_over_all_subsets_ties_shared_and_missing_answers_abstaining():
    rng = np.random.default_rng(0)
    right = {"a": 1.0, "b": 0.0, "c": 0.0, "d": 0.0, None: 0.0}
    for n in range(1, 9):
        for _ in range(12):
            answers = [[*right][place] for place in rng.integers(0, len(right), n)]
            correct = [right[answer] for answer in answers]
            for k in range(1, n + 1):
                subsets = itertools.combinations(range(n), k)
                expected = np.mean([vote([answers[i] for i in chosen], [correct[i] for i in chosen]) for chosen in subsets])
                assert maj_at_k(answers, correct, k) == pytest.approx(expected, abs=1e-12), (answers, k)


@pytest.mark.parametrize(
    ("answers", "correct", "expected"),
    [
        (["7", "7", "8"], [1, 1, 0], 1.0),
        (["7", "8"], [1, 0], 0.5),  # a tie of two is shared
        (["7", "8", "9"], [1, 0, 0], 1 / 3),
        (["7", None, None, None], [1, 0, 0, 0], 1.0),  # abstentions never win against an answer
        ([None, None], [0, 0], 0.0),  # unless nothing else was given
        (["8", "8", "7", None], [0, 0, 1, 0], 0.0),
        (["7", "7", "8", "8", None], [1, 1, 0, 0, 0], 0.5),
        (["7"], [1], 1.0),
    ],
)
def test_tie_and_abstention_rules(answers, correct, expected):
    assert maj_at_k(answers, correct, len(answers)) == pytest.approx(expected)


def test_the_answers_of_a_large_vote_share_the_probability_of_winning():
    counts = (1, 1, 2, 5, 5, 9, 30, 40)
    for k in (1, 2, 7, 64, 100):
        assert sum(win_probability(count, counts, 7, k) for count in counts) == pytest.approx(1.0 - math.comb(7, k) / math.comb(100, k), abs=1e-9)
    assert win_probability(1, (1,) * 512, 0, 256) == pytest.approx(1 / 512, rel=1e-6)


def test_failed_gradings_are_left_out_counted_and_bounded():
    nan = float("nan")
    samples = graded([[1, 0], [1, nan], [nan, nan]])
    metrics = summary(samples, (2,), QUICK, "eval/x")
    assert metrics["eval/x/pass@1"] == pytest.approx(0.75)  # items 0.5 and 1
    assert metrics["eval/x/pass@2"] == 1.0  # only the first item has two graded samples
    assert metrics["eval/x/pass@1_failures_as_wrong"] == pytest.approx(1 / 3)
    assert metrics["eval/x/pass@2_failures_as_wrong"] == pytest.approx(2 / 3)
    assert metrics["eval/x/ungraded_rate"] == 0.5 and metrics["eval/x/timeout_count"] == 3
    clean = summary(graded([[1, 0]]), (), QUICK, "eval/x")
    assert not any("failures" in name or "count" in name for name in clean)


def test_all_gradings_failed_gives_no_number_rather_than_zero():
    metrics = summary(graded([[float("nan")]]), (), QUICK, "eval/x")
    assert math.isnan(metrics["eval/x/pass@1"]) and metrics["eval/x/pass@1_failures_as_wrong"] == 0.0


def test_a_missing_answer_is_a_wrong_answer():
    samples = graded([[1.0], [0.0]], answers=[["3"], [None]], statuses=[["ok"], ["no_answer"]])
    metrics = summary(samples, (), QUICK, "eval/x")
    assert (metrics["eval/x/pass@1"], metrics["eval/x/no_answer_rate"], metrics["eval/x/ungraded_rate"]) == (0.5, 0.5, 0.0)


def test_partial_scores_are_told_beside_the_share_that_is_right():
    samples = graded([[1.0, 0.5], [0.5, 0.5]])
    assert metric_names(samples, ()) == ["pass@1", "score"]
    assert item_values(samples, "pass@1").tolist() == [0.5, 0.0] and item_values(samples, "score").tolist() == [0.75, 0.5]


def test_there_is_no_vote_without_parsed_answers():
    samples = graded([[1.0, 0.0]], answers=[[None, None]])
    assert metric_names(samples, (2,)) == ["pass@1", "pass@2"]


def test_rates_and_lengths():
    metrics = summary(graded([[1, 0], [0, 0]], answers=[["1", "2"], [None, "2"]]), (), QUICK, "eval/x")
    assert (metrics["eval/x/response_length"], metrics["eval/x/response_length_median"]) == (1.5, 1.5)
    assert metrics["eval/x/truncated_rate"] == 0.25 and metrics["eval/x/distinct_answers"] == 1.5


def test_pass_at_1_is_the_mean_over_items_of_means_over_samples():
    nan = float("nan")
    assert estimates(graded([[1, 1, 1], [0, nan, nan]]), (), QUICK)["pass@1"].value == 0.5


def test_groups_a_list_counts_in_each_and_an_item_without_the_key_is_shown():
    infos = [{"level": 10, "type": ["a", "b"]}, {"level": 2, "type": ["a"]}, {"level": 2}]
    tables = group_tables(graded([[1], [0], [1]], infos=infos), ("level", "type", "topic"), (), QUICK)
    assert [(row["group"], row["items"], row["pass@1"]["value"]) for row in tables["level"]] == [("2", 2, 0.5), ("10", 1, 1.0)]
    assert [(row["group"], row["items"]) for row in tables["type"]] == [("(none)", 1), ("a", 2), ("b", 1)]
    assert tables["level"][0]["pass@1"]["method"] == "wilson" and "topic" not in tables
