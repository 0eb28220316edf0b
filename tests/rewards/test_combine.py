"""Several rewards: the sum is what the weights say, each term is seen by itself, and a failure is never a silent 0."""

import json
import math
import random
import sys
import threading
from concurrent.futures import Future

import pytest
from reward_helpers import make_sample, score_all

from openrl_reason.config import parse_config, save_config
from openrl_reason.errors import ConfigError, WorkerError
from openrl_reason.rewards.base import RewardResult
from openrl_reason.rewards.build import build_rewarder
from openrl_reason.rewards.combine import CombinedRewards
from openrl_reason.rewards.config import RewardConfig, RewardTermConfig
from openrl_reason.rewards.penalties import length_penalty, overlong_penalty, repetition_penalty
from openrl_reason.tasks.base import TaskConfig, load_task
from openrl_reason.workers.grading import GraderPool


class Given:
    """Results decided beforehand, finished when the test says so."""

    def __init__(self, *results):
        self.results, self.futures = list(results), []

    def submit(self, sample):
        self.futures.append(Future())
        return self.futures[-1]

    def flush(self):
        for future, result in zip(self.futures, self.results, strict=True):
            future.set_exception(result) if isinstance(result, Exception) else future.set_result(result)

    def metrics(self):
        return {"calls": 1.0}

    def close(self):
        pass


def combined(*parts, steps=("a", "b"), **settings):
    """The combination of ``(weight, result)`` or ``(weight, result, required)`` parts."""
    terms = [RewardTermConfig("file.py:f", name=f"term{i}", weight=part[0], required=part[-1] is not False) for i, part in enumerate(parts)]
    config = RewardConfig(terms=tuple(terms), **settings)
    source = CombinedRewards(config, [(term, Given(part[1])) for term, part in zip(terms, parts, strict=True)])
    return score_all(source, [make_sample("ab", steps=steps)])[0], source.metrics()


FAILED = RewardResult(math.nan, "timeout", detail="too slow")


def test_a_response_that_was_cut_off_gets_its_worth_and_no_term_is_asked():
    given = Given(RewardResult(1.0, step_scores=(0.5, 0.5)))
    term = RewardTermConfig("file.py:f", name="term", weight=2.0)
    source = CombinedRewards(RewardConfig(terms=(term,), truncated=-0.5), [(term, given)])
    cut, whole = make_sample("ab", steps=("a", "b"), stop_reason="length"), make_sample("ab", steps=("a", "b"))
    first, second = source.submit(cut), source.submit(whole)
    assert first.done() and len(given.futures) == 1
    source.flush()
    assert (first.result().score, first.result().status, first.result().step_scores) == (-0.5, "no_answer", None)
    assert (second.result().score, second.result().step_scores) == (2.0, (1.0, 1.0))
    metrics = source.metrics()
    assert (metrics["reward/no_answer_rate"], metrics["reward/term/mean"]) == (0.5, 1.0)


def test_the_sum_is_weighted_and_every_term_is_kept_by_itself():
    result, metrics = combined((1.0, RewardResult(1.0, parsed="4")), (-0.5, RewardResult(0.5, logs={"n": 3.0})))
    assert (result.score, result.status, result.parsed) == (0.75, "ok", "4")
    assert (result.terms, result.logs, result.step_scores) == ({"term0": 1.0, "term1": 0.5}, {"term1/n": 3.0}, None)
    assert (metrics["reward/term0/mean"], metrics["reward/term1/mean"], metrics["reward/term1/std"]) == (1.0, 0.5, 0.0)
    assert (metrics["reward/term1/log/n"], metrics["reward/term1/calls"], metrics["reward/timeout_rate"]) == (3.0, 1.0, 0.0)


def test_a_failed_term_is_the_failure_of_the_reward():
    result, metrics = combined((1.0, RewardResult(1.0)), (0.1, FAILED))
    assert (result.status, result.detail) == ("timeout", "term1: too slow") and math.isnan(result.score)
    assert result.terms["term0"] == 1.0 and math.isnan(result.terms["term1"])
    assert (metrics["reward/timeout_rate"], metrics["reward/failed_rate"], metrics["reward/term1/failed_rate"]) == (1.0, 1.0, 1.0)
    assert (metrics["reward/term0/failed_rate"], math.isnan(metrics["reward/term1/mean"])) == (0.0, True)


def test_unless_it_is_not_required():
    result, metrics = combined((1.0, RewardResult(1.0)), (0.1, FAILED, False))
    assert (result.score, result.status) == (1.0, "ok")
    assert (metrics["reward/failed_rate"], metrics["reward/term1/failed_rate"]) == (0.0, 1.0)
    alone, _ = combined((0.1, FAILED, False))
    assert alone.status == "timeout" and math.isnan(alone.score), "with nothing else there is no reward"


def test_a_failure_is_worth_what_the_config_says():
    result, _ = combined((1.0, RewardResult(1.0)), (0.5, FAILED), timeout=-1.0)
    assert (result.score, result.status) == (0.5, "timeout")


def test_no_answer_is_worth_0_unless_told_otherwise():
    none = RewardResult(0.3, "no_answer", None)
    assert combined((1.0, none), (1.0, RewardResult(0.5)))[0].score == 0.5
    assert combined((1.0, none), (1.0, RewardResult(0.5)))[0].status == "no_answer"
    assert combined((1.0, none), no_answer=-1.0)[0].score == -1.0
    assert math.isnan(combined((1.0, none), (1.0, RewardResult(0.5)), no_answer=None)[0].score)
    assert combined((1.0, none), (1.0, FAILED))[0].status == "timeout", "a failure outweighs it"


def test_step_rewards_are_kept_and_the_other_terms_go_onto_the_last_step():
    result, _ = combined((2.0, RewardResult(0.75, step_scores=(0.25, 0.5))), (1.0, RewardResult(1.0)))
    assert (result.step_scores, result.score) == ((0.5, 2.0), 2.5)
    both, _ = combined((1.0, RewardResult(3.0, step_scores=(1.0, 2.0))), (1.0, RewardResult(7.0, step_scores=(3.0, 4.0))))
    assert both.step_scores == (4.0, 6.0)
    failed, _ = combined((1.0, RewardResult(3.0, step_scores=(1.0, 2.0))), (1.0, FAILED))
    assert failed.step_scores is None


def test_a_term_that_does_not_apply_is_left_out_and_one_must_apply():
    skipped = RewardResult(math.nan)
    assert combined((1.0, skipped), (1.0, RewardResult(0.5)))[0].score == 0.5
    nothing, _ = combined((1.0, skipped))
    assert nothing.status == "error" and "no term" in nothing.detail


def test_an_error_that_must_stop_the_run_arrives():
    with pytest.raises(WorkerError, match="gone"):
        combined((1.0, RewardResult(1.0)), (1.0, WorkerError("gone")))


def test_metrics_are_the_same_to_the_bit_in_any_order_of_arrival():
    config, term = RewardConfig(), RewardTermConfig()
    scores = [random.Random(1).gauss(0, 1) * 10 ** (i % 7) for i in range(200)]
    seen = []
    for shuffled in (scores, random.Random(2).sample(scores, len(scores))):
        source = CombinedRewards(config, [(term, Given(*map(RewardResult, shuffled)))])
        score_all(source, [make_sample("x")] * len(scores))
        seen.append(source.metrics())
    assert seen[0] == seen[1]
    assert source.metrics() == {"reward/task/calls": 1.0}, "a report covers what was finished since the last"


def test_the_default_is_the_tasks_own_grader_and_penalties_add_to_it():
    task = load_task(TaskConfig())
    sample = make_sample("2+2=4\n#### 4", num_tokens=15)
    with GraderPool() as pool:
        alone = build_rewarder(RewardConfig(), task=task, grader=pool)
        assert [(r.score, r.status, r.parsed) for r in score_all(alone, [sample, make_sample("who knows")])] == [
            (1.0, "ok", "4"), (0.0, "no_answer", None),
        ]  # fmt: skip
        alone.close()
        terms = (
            RewardTermConfig(),
            RewardTermConfig("overlong", weight=0.5, options={"max_length": 20, "cache": 10}),
            RewardTermConfig("format", name="marked", options={"pattern": r".*#### \d+"}),
        )
        several = build_rewarder(RewardConfig(terms=terms), task=task, grader=pool)
        result = score_all(several, [sample])[0]
        assert (result.score, result.terms) == (1.75, {"task": 1.0, "overlong": -0.5, "marked": 1.0})
        several.close()
        assert pool.grade("#### 4", "4", "gsm8k").score == 1.0, "the pool is its owner's"


def test_a_pattern_that_backtracks_for_ever_is_a_timeout():
    config = RewardConfig(terms=(RewardTermConfig("format", options={"pattern": "(a+)+b"}),), deadline_s=0.5)
    source = build_rewarder(config, task=None, grader=None)
    results = score_all(source, [make_sample(text) for text in ("aab", "a" * 50, "aac")])
    assert [result.status for result in results] == ["ok", "timeout", "ok"]
    assert [result.score for result in results][::2] == [1.0, 0.0]
    source.close()


def test_a_callable_replaces_the_terms_and_may_not_meet_others():
    source = build_rewarder(RewardConfig(), task=None, grader=None, reward_function=lambda response, gold: float(response == gold))
    result = score_all(source, [make_sample("4")])[0]
    assert (result.score, result.terms) == (1.0, {"function": 1.0})
    source.close()
    with pytest.raises(ConfigError, match="reward.function"):
        build_rewarder(RewardConfig(function="a.py:f"), task=None, grader=None, reward_function=len)


def test_judges_come_from_whoever_can_make_them():
    terms = (RewardTermConfig("judge", name="kind"), RewardTermConfig("judge", name="clear", weight=2.0))
    given = {"kind": Given(RewardResult(0.25)), "clear": Given(RewardResult(0.5))}
    source = build_rewarder(RewardConfig(terms=terms), task=None, grader=None, make_judge=lambda term: given[term.name])
    assert score_all(source, [make_sample("4")])[0].score == 1.25


def test_when_one_term_cannot_be_built_the_others_are_closed(tmp_path):
    (tmp_path / "good.py").write_text("def reward(response):\n    return 1.0\n")
    terms = (RewardTermConfig(f"{tmp_path}/good.py:reward"), RewardTermConfig(f"{tmp_path}/absent.py:reward", name="other"))
    before = set(threading.enumerate())
    with pytest.raises(ConfigError, match="absent"):
        build_rewarder(RewardConfig(terms=terms), task=None, grader=None)
    assert not set(threading.enumerate()) - before


def test_length_penalties_fall_from_0_at_the_target_to_minus_1():
    def of(count, **options):
        return length_penalty(make_sample("x", num_tokens=count), max_length=100, **options)

    assert [of(n, target=20) for n in (0, 20, 60, 100, 500)] == [0.0, 0.0, -0.5, -1.0, -1.0]
    assert [round(of(n, shape="cosine"), 6) for n in (0, 25, 50, 100)] == [0.0, -0.146447, -0.5, -1.0]


def test_overlong_shaping_is_dapos_equation():
    def dapo(length, max_length, cache):
        if length <= max_length - cache:
            return 0.0
        return ((max_length - cache) - length) / cache if length <= max_length else -1.0

    for length in range(0, 130):
        sample = make_sample("x", num_tokens=length)
        assert overlong_penalty(sample, max_length=100, cache=25) == pytest.approx(dapo(length, 100, 25))


def test_repetition_is_the_share_of_ngrams_seen_before():
    assert repetition_penalty(make_sample("a b c d e f g")) == 0.0
    assert repetition_penalty(make_sample("too short")) == 0.0
    assert repetition_penalty(make_sample("a a a a a a"), ngram=2) == pytest.approx(1 / 5 - 1)
    assert repetition_penalty(make_sample("loop " * 100_000)) < -0.999


GIVEN = [{"source": "task", "weight": 2}, {"source": "length", "options": {"max_length": 9}, "required": False}]


def test_terms_come_from_a_flag_or_from_yaml_and_are_saved_as_they_were(tmp_path):
    by_flag = parse_config(RewardConfig, ["--terms", json.dumps(GIVEN), "--timeout", "-1", "--no_answer", "null"], prog="test")
    assert by_flag.terms == (RewardTermConfig(weight=2.0), RewardTermConfig("length", options={"max_length": 9}, required=False))
    assert (by_flag.timeout, by_flag.no_answer) == (-1.0, None)
    save_config(by_flag, tmp_path / "config.yaml")
    assert parse_config(RewardConfig, ["--config", str(tmp_path / "config.yaml")], prog="test") == by_flag


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"function": "lenght"}, "did you mean 'length'"),
        ({"function": "a.py:f", "terms": (RewardTermConfig(),)}, "put it there"),
        ({"terms": (RewardTermConfig(), RewardTermConfig())}, "name of its own"),
        ({"terms": (RewardTermConfig(name="a/b"),)}, "slash"),
        ({"terms": (RewardTermConfig(weight=math.nan),)}, "finite"),
        ({"terms": (RewardTermConfig(form="batch"),)}, "form is for functions"),
        ({"terms": (RewardTermConfig("a.py:f", form="bach"),)}, "form is one of"),
        ({"terms": (RewardTermConfig(options={"x": 1}),)}, "task has no option"),
        ({"terms": (RewardTermConfig("length"),)}, "max_length"),
        ({"terms": (RewardTermConfig("length", options={"max_lenght": 3}),)}, "did you mean 'max_length'"),
        ({"terms": (RewardTermConfig("length", options={"max_length": "long"}),)}, "takes a int"),
        ({"terms": (RewardTermConfig("length", options={"max_length": 5, "target": 5}),)}, "target < max_length"),
        ({"terms": (RewardTermConfig("length", options={"max_length": 5, "shape": "round"}),)}, "linear or cosine"),
        ({"terms": (RewardTermConfig("overlong", options={"max_length": 5, "cache": 6}),)}, "cache"),
        ({"terms": (RewardTermConfig("repetition", options={"ngram": 0}),)}, "ngram"),
        ({"terms": (RewardTermConfig("format", options={"pattern": "("}),)}, "no regular expression"),
        ({"terms": (RewardTermConfig("http://a/", options={"send": ["images"]}),)}, "send takes"),
        ({"processes": 0}, "reward.processes"),
        ({"deadline_s": 0}, "reward.deadline_s"),
        ({"memory_mb": -1}, "reward.memory_mb"),
        ({"max_failed_rate": 2}, "reward.max_failed_rate"),
        ({"error": math.inf}, "reward.error"),
    ],
)
def test_settings_that_cannot_work_are_refused_with_their_name(settings, message):
    with pytest.raises(ConfigError, match=message):
        RewardConfig(**settings)


def test_the_settings_import_nothing_heavy():
    import subprocess

    code = "import sys, openrl_reason.rewards.config; print([m for m in ('torch', 'numpy', 'httpx', 'ray') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
