"""Alarms fire on the trouble they are named after, at its steps, and stay quiet on a healthy run."""

import numpy as np
import pytest

from openrl_reason.observe.report_alarms import RULES, alarms, checks

HEALTHY = {
    "train/reward": 0.5, "train/loss": 0.1, "train/grad_norm": 1.0, "train/entropy": 0.8, "train/kl": 0.01, "train/zero_variance_groups": 0.3,
    "response_length/clip_ratio": 0.02, "sampling/logprob_difference/mean": 1e-5, "reward/timeout_rate": 0.0, "reward/error_rate": 0.0,
    "rollout/engine_restarts": 0.0, "train/skipped_update": 0.0, "critic/vf_explained_var": 0.6, "train/approx_kl": 0.001,
    "train/clip_fraction/high": 0.02, "reward/no_answer_rate": 0.1, "rollout/ungraded": 0.0, "reward/crashed_rate": 0.0, "reward/memory_rate": 0.0,
}  # fmt: skip


def run(changes=(), steps=200):
    """Records of a healthy run; ``changes`` are (metric, first step, last step, value or function of the step)."""
    rng = np.random.default_rng(0)
    records = [{"step": s, "event": "train", **{name: value * (1 + 0.05 * rng.random()) for name, value in HEALTHY.items()}} for s in range(steps)]
    for name, first, last, value in changes:
        for step in range(first, last + 1):
            records[step][name] = value(step) if callable(value) else value
    return records


def evaluations(scores, **more):
    return [{"step": 20 * place, "event": "eval", "eval/toy/pass@1": score, **more} for place, score in enumerate(scores)]


def test_a_healthy_run_raises_none():
    assert alarms(run() + evaluations([0.2, 0.4, 0.39, 0.5])) == []
    assert alarms([]) == []


@pytest.mark.parametrize(
    ("key", "metric", "value", "first", "last"),
    [
        ("zero_variance", "train/zero_variance_groups", 0.95, 104, 150),
        ("truncation", "response_length/clip_ratio", 0.9, 101, 153),
        ("logprob_gap", "sampling/logprob_difference/mean", 0.4, 100, 150),
        ("grader_timeout", "reward/timeout_rate", 0.2, 100, 150),
        ("grader_error", "reward/error_rate", 0.2, 100, 150),
        ("grader_crash", "reward/crashed_rate", 0.01, 100, 150),
        ("grader_memory", "reward/memory_rate", 0.01, 100, 150),
        ("no_answer", "reward/no_answer_rate", 0.9, 102, 157),
        ("ungraded", "rollout/ungraded", 3.0, 100, 150),
        ("kl", "train/kl", 4.0, 100, 152),
        ("update_size", "train/approx_kl", 0.5, 100, 150),
        ("clipping", "train/clip_fraction/high", 0.5, 101, 151),
        ("skipped_update", "train/skipped_update", 1.0, 100, 150),
        ("engine_restarts", "rollout/engine_restarts", 1.0, 100, 150),
        ("critic", "critic/vf_explained_var", -3.0, 100, 150),
    ],
)
def test_each_rule_fires_at_the_steps_of_its_trouble(key, metric, value, first, last):
    found = alarms(run([(metric, 100, 150, value)]))
    assert [alarm.key for alarm in found] == [key]
    assert found[0].metric == metric and found[0].advice and found[0].threshold
    assert abs(found[0].first_step - first) <= 5 and abs(found[0].last_step - last) <= 20  # a mean over a window comes late and goes late
    assert found[0].value == pytest.approx(value, rel=0.2)


def test_a_single_bad_step_is_no_alarm_for_rules_that_want_a_trend():
    assert alarms(run([("train/zero_variance_groups", 100, 100, 1.0), ("response_length/clip_ratio", 50, 50, 0.9)])) == []


def test_entropy_collapse_is_judged_by_where_it_started():
    found = alarms(run([("train/entropy", 50, 199, lambda step: 0.8 * 0.93 ** (step - 50))]))
    assert [alarm.key for alarm in found] == ["entropy_collapse"] and found[0].severity == "critical"
    assert 75 < found[0].first_step < 95 and found[0].last_step == 199
    assert alarms(run([("train/entropy", 0, 199, 0.1)])) == []  # low from the start on is how this model is


def test_values_that_are_no_numbers_and_spikes_of_the_gradient_are_told_apart():
    found = alarms(run([("train/loss", 70, 71, None), ("train/grad_norm", 120, 120, 90.0)]))
    assert [(alarm.key, alarm.first_step, alarm.num_steps, alarm.value) for alarm in found] == [
        ("not_a_number", 70, 2, None), ("gradient_spike", 120, 1, 90.0),
    ]  # fmt: skip


def test_reward_up_while_evaluation_falls_hints_at_a_hacked_reward():
    rising = [("train/reward", 0, 199, lambda step: 0.2 + 0.003 * step)]
    scores = [0.2, 0.35, 0.5, 0.5, 0.45, 0.4, 0.3]
    found = alarms(run(rising) + evaluations(scores))
    assert [(alarm.key, alarm.metric, alarm.first_step, alarm.last_step) for alarm in found] == [("reward_hacking", "eval/toy/pass@1", 80, 120)]
    assert alarms(run() + evaluations(scores)) == []  # the reward did not rise: the model just got worse
    uncertain = {"eval/toy/pass@1_stderr": 0.2}
    assert alarms(run(rising) + evaluations(scores, **uncertain)) == []  # all within the interval


def test_truncated_evaluations_are_found_in_their_own_records():
    found = alarms(run() + [{"step": 5, "event": "eval", "eval/a/truncated_rate": 0.5, "eval/b/truncated_rate": 0.1}])
    assert [(alarm.key, alarm.metric) for alarm in found] == [("eval_truncation", "eval/a/truncated_rate")]


def test_the_list_of_checks_names_every_rule_with_its_threshold():
    rows = checks()
    assert {rule.key for rule in RULES} < {row["key"] for row in rows} and all(row["threshold"] and row["title"] for row in rows)
    assert len({row["key"] for row in rows}) == len(rows)
