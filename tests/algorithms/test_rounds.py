"""Sampling question by question gives what rounds would have given, sample by sample, whatever arrives when."""

import random

import numpy as np
import pytest

from openrl_reason.algorithms.collect import Collector
from openrl_reason.algorithms.rounds import FixedCount, QuestionSampler, UntilBalanced
from openrl_reason.core.seeds import derive_seed
from openrl_reason.workers.rollout_config import SamplingConfig
from tests.algorithms.scripted import TOKENIZER, ScriptedPool, ScriptedRewards, ScriptedTask


def by_rounds(letters, rule):
    """How many samples the question gets: the rule as published, one round after the other."""
    for number in range(1, rule.rounds + 1):
        seen = letters[: number * rule.samples_per_round]
        if sum(seen.count(letter) for letter in "RT") >= rule.per_side and seen.count("W") >= rule.per_side:
            break
    return number * rule.samples_per_round


def random_script(seed, num_questions, length):
    rng = random.Random(seed)
    weights = [rng.choice(([8, 1, 1], [1, 8, 1], [1, 1, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 3])) for _ in range(num_questions)]
    return {f"q{number}": "".join(rng.choices("RWF", weight, k=length)) for number, weight in enumerate(weights)}


def sample(script, rule, *, order=0, in_flight=5, how="mixed", pool=None, seed=(0, "collect")):
    task = ScriptedTask(script)
    pool = pool or ScriptedPool(script, order=order)
    collector = Collector(task, TOKENIZER, pool, ScriptedRewards(how, order))
    sampler = QuestionSampler(collector, rule, SamplingConfig(max_new_tokens=8), seed, 1.0, in_flight)
    return {part.items[0].prompt: part for part in sampler.run(task.items("train"))}, pool


def facts(found):
    """Everything that may not depend on order, engines or window."""
    return {
        question: [
            (t.trajectory_id, t.group_id, t.info["response"], t.reward, result.status)
            for t, result in zip(part.trajectories, part.results, strict=True)
        ]
        for question, part in found.items()
    }


@pytest.mark.parametrize(("per_side", "rounds", "samples_per_round"), [(4, 16, 1), (1, 6, 1), (2, 5, 3), (3, 1, 4), (4, 16, 2)])
def test_each_question_gets_the_samples_of_its_rounds_and_no_other(per_side, rounds, samples_per_round):
    rule = UntilBalanced(per_side, rounds, samples_per_round)
    for seed in range(8):
        script = random_script(seed, 12, rounds * samples_per_round)
        found, pool = sample(script, rule, order=seed)
        numbers = {question: len(part.trajectories) for question, part in found.items()}
        assert numbers == {question: by_rounds(letters, rule) for question, letters in script.items()}
        for question, part in found.items():
            assert [t.info["response"][0] for t in part.trajectories] == list(script[question][: len(part.trajectories)]), "in the order of the seeds"
        assert len(pool.requests) == sum(len(part.trajectories) for part in found.values()), "nothing is sampled in vain"


def test_results_depend_neither_on_arrival_nor_on_the_window():
    script, rule = random_script(3, 15, 16), UntilBalanced(4, 16)
    first = facts(sample(script, rule)[0])
    for order, in_flight, how in ((1, 1, "now"), (2, 3, "late"), (3, 100, "flush"), (4, 15, "mixed")):
        assert facts(sample(script, rule, order=order, in_flight=in_flight, how=how)[0]) == first
    assert facts(sample(script, rule, seed=(1, "collect"))[0]) != first


def test_a_sample_is_seeded_by_run_question_round_and_place():
    script, rule = {"q": "W" * 6, "p": "W" * 6}, UntilBalanced(2, 3, 2)
    _, pool = sample(script, rule)
    task = ScriptedTask(script)
    seeds = {request.request_id: request.seed for request in pool.requests}
    for item in task.items("train"):
        for number in range(6):
            assert seeds[f"0/collect/{item.task_id}/{number}"] == derive_seed(0, "collect", item.task_id, number // 2, number % 2)
    assert len(set(seeds.values())) == 12 and {request.group for request in pool.requests} == {f"0/collect/{i.task_id}" for i in task.items("train")}


def test_a_question_asks_at_once_for_all_that_it_is_sure_to_need():
    _, pool = sample({"q": "W" * 16}, UntilBalanced(4, 16))
    assert pool.most_waiting == 8
    _, pool = sample({f"q{number}": "R" * 4 for number in range(9)}, FixedCount(4), in_flight=3)
    assert pool.most_waiting <= 12 and len(pool.requests) == 36


def test_the_rule_never_takes_back_what_it_asked_for():
    rng = np.random.default_rng(0)
    for _ in range(2000):
        rule = UntilBalanced(int(rng.integers(1, 6)), int(rng.integers(1, 9)), int(rng.integers(1, 4)))
        right = wrong = known = 0
        asked = rule.certain(0, 0, 0)
        while known < asked:
            kind = rng.integers(3)
            right, wrong, known = right + (kind == 0), wrong + (kind == 1), known + 1
            again = rule.certain(right, wrong, known)
            assert asked <= again <= rule.rounds * rule.samples_per_round and again % rule.samples_per_round == 0
            asked = again


def test_stopping_early_drops_what_is_under_way():
    script = random_script(0, 12, 16)
    pool = ScriptedPool(script, at_once=1)  # and rewards at once: what is under way at the first question's end does not depend on the clock
    task = ScriptedTask(script)
    sampler = QuestionSampler(Collector(task, TOKENIZER, pool, ScriptedRewards("now")), UntilBalanced(4, 16), SamplingConfig(), (0,), 1.0, 12)
    questions = sampler.run(task.items("train"))
    next(questions)
    assert pool.num_unfinished
    questions.close()
    assert pool.aborted and not pool.num_unfinished


def test_an_error_of_the_rewards_ends_the_sampling():
    class Broken(ScriptedRewards):
        def score(self, kind):
            raise RuntimeError("cannot be loaded")

    script = {"q": "R" * 16}
    task = ScriptedTask(script)
    sampler = QuestionSampler(Collector(task, TOKENIZER, ScriptedPool(script), Broken("now")), UntilBalanced(4, 16), SamplingConfig(), (0,), 1.0, 1)
    with pytest.raises(RuntimeError, match="cannot be loaded"):
        list(sampler.run(task.items("train")))
