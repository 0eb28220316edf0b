"""The branch call: who gets which samples, within which budget, and that a killed engine changes nothing."""

import os
import signal
from collections import Counter
from dataclasses import replace

import pytest
from rollout_helpers import CONFIG, make_requests, make_tiny

from openrl_reason.core.trajectory import StopReason
from openrl_reason.errors import ConfigError
from openrl_reason.workers.branching import BranchCall, Prefix, branch
from openrl_reason.workers.rollout_config import Request, SamplingConfig
from tests.algorithms.toy_chain import Chain, ToyPool
from tests.clusters import local_ray

SAMPLING = SamplingConfig(temperature=0.7, top_p=0.9, stop=("zzz",), max_new_tokens=99)


def prefix(*ids, budget=8, **settings):
    return Prefix(tuple(ids), budget, **settings)


def open_call(pool=None, seed=(0, "branch", 0), **settings):
    return BranchCall(pool or ToyPool(Chain(end=0.02)), sampling=SAMPLING, seed=seed, **settings)


def taken(call):
    """{key: {sample: tokens}}; a sample that comes twice is an error."""
    found = {}
    for one in [*call.take_exhausted(), *filter(None, map(call.take, call.pool.generate()))]:
        samples = found.setdefault(one.key, {})
        assert one.sample not in samples
        samples[one.sample] = one.completion.token_ids
    assert call.num_open == 0 and call.take_exhausted() == []
    return found


def test_every_prefix_gets_its_samples_with_its_own_budget_and_the_sampling_of_the_call():
    call = open_call()
    keys = [call.ask(prefix(5, 6, budget=budget, group="g"), 3) for budget in (8, 3)]
    found = taken(call)
    assert sorted(found) == sorted(keys) and all(sorted(samples) == [0, 1, 2] for samples in found.values())
    assert all(len(ids) <= 3 for ids in found[keys[1]].values())
    for request, budget in zip(call.pool.requests, (8, 8, 8, 3, 3, 3), strict=True):
        assert request.sampling == replace(SAMPLING, max_new_tokens=budget) and request.prompt_ids == [5, 6] and request.group == "g"
    ids = [request.request_id for request in call.pool.requests]
    assert len(set(ids)) == len(ids) == call.counts["requests"] == 6
    assert call.counts["prompt_tokens"] == 12
    assert call.counts["generated_tokens"] == sum(len(tokens) for samples in found.values() for tokens in samples.values())


def test_a_prefix_without_a_budget_is_ended_by_its_length_without_a_request():
    call = open_call()
    key = call.ask(prefix(5, 6, budget=0), 2)
    assert call.pool.requests == [] and call.counts["exhausted"] == 1 and call.counts["requests"] == 0
    branches = call.take_exhausted()
    assert [(one.key, one.sample, one.completion.token_ids) for one in branches] == [(key, 0, []), (key, 1, [])]
    assert all(one.completion.stop_reason == StopReason.LENGTH for one in branches)
    call.more(key, 3)
    call.ask(prefix(5, 6, budget=0), 3)
    assert [one.sample for one in call.take_exhausted()] == [2] and call.counts["exhausted"] == 1


@pytest.mark.parametrize(("length", "budget"), [(12, 4), (15, 1), (16, 0), (17, 0)])
def test_the_context_of_the_engines_limits_what_a_branch_may_write(length, budget):
    call = open_call(ToyPool(Chain(), max_model_len=16))
    call.ask(prefix(*range(5, 5 + length), budget=30), 2)
    assert [request.sampling.max_new_tokens for request in call.pool.requests] == [budget] * 2 * (budget > 0)
    assert len(taken(call)) == 1


@pytest.mark.parametrize(("asked", "samples"), [(prefix(5), 0), (prefix(5), -1), (prefix(), 2), (prefix(5, budget=-1), 2)])
def test_what_cannot_be_continued_is_refused_and_leaves_nothing_behind(asked, samples):
    call = open_call()
    with pytest.raises(ConfigError, match="a prefix"):
        call.ask(asked, samples)
    assert call.pool.requests == [] and taken(call) == {}


def test_seeds_come_from_the_identity_of_the_call_the_prefix_and_the_sample_and_from_nothing_else():
    asked = [prefix(5, 6), prefix(7), prefix(5, 6, budget=7), prefix(5, 6, identity="other"), prefix(5, 67), prefix(56, 7)]

    def tokens_of(order, **settings):
        call = open_call(ToyPool(Chain(end=0.02), order=len(order)), **settings)
        for index in order:
            call.ask(asked[index], 4)
        return taken(call)

    one = tokens_of([0, 1, 2, 3, 4, 5])
    assert len({key for key in one}) == 6 and len({tuple(ids) for samples in one.values() for ids in samples.values()}) > 20
    assert tokens_of([5, 3, 1, 0, 2, 4]) == one and tokens_of([0, 0, 1, 2, 3, 4, 5, 1]) == one
    assert {key: one[key] for key in tokens_of([2])} == tokens_of([2])
    assert tokens_of([0, 1, 2, 3, 4, 5], seed=(0, "branch", 1)) != one
    assert tokens_of([0, 1, 2, 3, 4, 5], seed=(0, "branch", "0")) != one


def test_the_group_is_where_a_prefix_is_sampled_and_not_what_it_is():
    call = open_call()
    assert call.ask(prefix(5, group="a"), 2) == call.ask(prefix(5, group="b"), 2)
    assert len(call.pool.requests) == 2 and call.counts["asked"] == 2 and call.counts["shared"] == 1


def test_top_ups_add_samples_and_repeat_none():
    call = open_call()
    key = call.ask(prefix(5, 6), 2)
    call.ask(prefix(5, 6), 1)
    first = taken(call)
    call.more(key, 2)
    assert call.num_open == 0
    call.more(key, 5)
    call.ask(prefix(5, 6), 6)
    then = taken(call)
    assert sorted(first[key]) == [0, 1] and sorted(then[key]) == [2, 3, 4, 5]
    at_once = open_call()
    at_once.ask(prefix(5, 6), 6)
    assert taken(at_once)[key] == first[key] | then[key]
    assert len({request.seed for request in call.pool.requests}) == 6


def test_unshared_calls_sample_the_same_for_everyone_who_asks():
    call = open_call(share=False)
    keys = [call.ask(prefix(5, 6), 3) for _ in range(3)]
    found = taken(call)
    assert len(set(keys)) == 3 and len(call.pool.requests) == 9
    shared = open_call()
    shared.ask(prefix(5, 6), 3)
    assert all(found[key] == taken_once for key, taken_once in zip(keys, [*taken(shared).values()] * 3, strict=True))


def test_completions_of_others_are_left_to_them():
    call = open_call()
    call.ask(prefix(5, 6), 2)
    other = Request("somebody", [7], seed=1, sampling=SamplingConfig(max_new_tokens=2))
    found = [(completion.request_id, call.take(completion)) for completion in call.pool.generate([other])]
    assert sorted(one is None for _, one in found) == [False, False, True] and ("somebody", None) in found
    again = next(completion for completion in call.pool.returned if completion.request_id != "somebody")
    assert call.take(again) is None, "a completion counts once"


def test_the_whole_call_in_one_loop():
    branches = list(branch(ToyPool(Chain()), [prefix(5), prefix(6, budget=0), prefix(5)], 3, sampling=SAMPLING, seed=(1,)))
    assert Counter(one.key for one in branches) == {prefix(5).key: 3, prefix(6, budget=0).key: 3}


# ---- real engines ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    pytest.importorskip("vllm")
    pytest.importorskip("ray")
    from openrl_reason.workers.rollout import RolloutPool

    class Placement:
        def actor_options(self, role, index):
            return {"num_cpus": 0.1}

    folder = make_tiny(tmp_path_factory.mktemp("models") / "tiny")
    with local_ray(), RolloutPool(replace(CONFIG, num_engines=2), folder, placement=Placement()) as made:
        yield made


def prefixes_of(trajectories, budget):
    """States in the middle of responses, and those responses' prompts, some of them twice."""
    states = []
    for request, completion in trajectories:
        for cut in (0, 5, 20):
            ids = tuple(request.prompt_ids + completion.token_ids[:cut])
            states.append(Prefix(ids, budget - min(cut, len(completion.token_ids)), identity=request.group, group=request.group))
    return states


def test_a_killed_engine_loses_doubles_and_changes_no_branch(pool):
    requests = make_requests(6, siblings=2, seed=3, max_new_tokens=60)
    by_id = {request.request_id: request for request in requests}
    trajectories = sorted(((by_id[c.request_id], c) for c in pool.generate(requests)), key=lambda pair: pair[0].request_id)
    states, sampling = prefixes_of(trajectories, 60), SamplingConfig()
    distinct = {state.key for state in states}
    assert len(distinct) < len(states)

    def tokens(seed, after=None):
        before, found, number = Counter(pool.stats()), {}, 0
        for number, one in enumerate(branch(pool, states, 4, sampling=sampling, seed=seed)):
            assert (one.key, one.sample) not in found
            found[one.key, one.sample] = one.completion.token_ids, one.completion.stop_reason, one.completion.logprobs
            if number == after:
                os.kill(pool._seats[0].about["pid"], signal.SIGKILL)
        stats = Counter(pool.stats())
        stats.subtract(before)
        assert stats["completed"] == stats["requests"] == len(found) == 4 * len(distinct)
        return found, stats

    straight, _ = tokens((0, "branch", 1))
    killed, stats = tokens((0, "branch", 1), after=3)
    assert stats["restarts"] >= 1 and stats["resubmitted"] >= 1
    assert {key: value[:2] for key, value in killed.items()} == {key: value[:2] for key, value in straight.items()}
    other, _ = tokens((0, "branch", 2))
    assert {key: value[0] for key, value in other.items()} != {key: value[0] for key, value in straight.items()}
    budgets = {state.key: state.budget for state in states}
    assert all(len(ids) <= budgets[key] for (key, _), (ids, _, _) in straight.items())
    assert len({tuple(ids) for ids, _, _ in straight.values()}) > len(straight) // 2, "samples of a prefix are different ones"


def test_branches_are_served_while_trajectories_generate_and_share_their_prefix(pool):
    requests = make_requests(6, siblings=2, seed=4, max_new_tokens=60)
    call = BranchCall(pool, sampling=SamplingConfig(), seed=(0, "branch", 3))
    by_id, branches, trajectories = {request.request_id: request for request in requests}, {}, {}
    for completion in pool.generate(requests):
        found = call.take(completion)
        if found is None:
            request = by_id[completion.request_id]
            trajectories[completion.request_id] = completion
            half = len(completion.token_ids) // 2
            call.ask(Prefix(tuple(request.prompt_ids + completion.token_ids[:half]), 60 - half, group=request.group), 3)
        else:
            assert (found.key, found.sample) not in branches
            branches[found.key, found.sample] = found
    assert len(trajectories) == 12 and call.num_open == 0 and len(branches) == call.counts["requests"] >= 3 * 6
    assert call.counts["cached_prompt_tokens"] > 0.3 * call.counts["prompt_tokens"]
    again = {(one.key, one.sample): one.completion.token_ids
             for one in branch(pool, [call._asked[key][0] for key in {key for key, _ in branches}], 3, sampling=SamplingConfig(),
                               seed=(0, "branch", 3))}  # fmt: skip
    assert again == {key: one.completion.token_ids for key, one in branches.items()}
