"""VinePPO's credit on a chain whose values are known exactly: estimates, budgets, sharing, order, adaptive K, failures, the gradient."""

import functools
import math
import threading
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch

from openrl_reason.algorithms import vineppo
from openrl_reason.algorithms.online import OnlineTrainer
from openrl_reason.algorithms.vineppo import token_credit
from openrl_reason.core.trajectory import StopReason, Trajectory
from openrl_reason.errors import WorkerError
from openrl_reason.evaluation.intervals import wilson
from openrl_reason.rewards.base import RewardResult
from openrl_reason.workers.branching import BranchCall
from tests.algorithms.toy_chain import EOS, TOKENIZER, Chain, ToyPool, ToyRewarder, ids_of, parity, toy_vineppo, written

FAILED = RewardResult(math.nan, "error", detail="because")


def credited(trainer):
    """(rollouts, batch, metrics) of one collection."""
    rollouts = trainer.collect()
    return (rollouts, *trainer.credit(rollouts))


def by_step(batch, row, name):
    """{step: the number that all of its tokens carry}"""
    tokens = slice(int(batch.cu_seqlens[row]), int(batch.cu_seqlens[row + 1]))
    steps, values = batch.step_ids[tokens].tolist(), batch.tokens[name][tokens].tolist()
    found = {step: {repr(value) for other, value in zip(steps, values, strict=True) if other == step} for step in set(steps) - {-1}}
    assert all(len(values) == 1 for values in found.values()), found
    return {step: float(*values) for step, values in found.items()}


def branches_of(trainer, prompt_tokens=2):
    """{prefix ids: [(text of the whole response, stop reason)] by sample} of every branch that was sampled."""
    requests = {request.request_id: request for request in trainer.pool.branches()}
    found = defaultdict(dict)
    for completion in trainer.pool.returned:
        if request := requests.get(completion.request_id):
            ids = request.prompt_ids[prompt_tokens:] + completion.token_ids
            text = trainer.tokenizer.decode(ids, skip_special_tokens=True)
            found[tuple(request.prompt_ids)][int(request.request_id.split("/")[-1])] = text, str(completion.stop_reason)
    return {prefix: [samples[number] for number in sorted(samples)] for prefix, samples in found.items()}


# ---- values ------------------------------------------------------------------------------------------------------------------


def test_values_are_unbiased_and_vary_as_the_mean_of_k_coin_tosses_does():
    chain, text, repeats = Chain(end=0.2), "ca\nad\ne$", 250
    exact = [chain.value("b\n", "", 12), chain.value("b\n", "ca\n", 9), chain.value("b\n", "ca\nad\n", 6)]
    assert np.ptp(exact) > 0.1 and 0.1 < min(exact) and max(exact) < 0.9
    estimates = []
    for seed in range(repeats):
        _, batch, _ = credited(toy_vineppo(pool=written([text], siblings=1, chain=chain), prompts="b", samples=1, num_rollouts=9, seed=seed))
        values = by_step(batch, 0, "values")
        estimates.append([values[0], values[1], values[2]])
    estimates = np.array(estimates)
    for step, value in enumerate(exact):
        variance = value * (1 - value) / 9
        assert abs(estimates[:, step].mean() - value) < 4 * math.sqrt(variance / repeats)
        assert estimates[:, step].var() == pytest.approx(variance, rel=4 * math.sqrt(2 / repeats))
    correlation = np.corrcoef(estimates.T)
    assert abs(correlation[np.triu_indices(3, 1)]).max() < 4 / math.sqrt(repeats), "states must have samples of their own"


def test_a_late_state_is_not_granted_tokens_that_its_trajectory_did_not_have():
    """The reward of unfinished responses is 0, so that with a fresh budget (as published) the value would be larger by far."""
    chain, text = Chain(end=0.1), "a\nc\ne\ng\ni\ng$"
    fair, fresh = chain.value("b\n", "a\nc\ne\ng\ni\n", 2), chain.value("b\n", "a\nc\ne\ng\ni\n", 12)
    assert fresh > 2 * fair
    _, batch, metrics = credited(toy_vineppo(pool=written([text], siblings=1, chain=chain), prompts="b", samples=1, num_rollouts=900))
    assert by_step(batch, 0, "values")[5] == pytest.approx(fair, abs=4 * math.sqrt(fair * (1 - fair) / 900))
    assert metrics["credit/truncated_rate"] > 0.2


def test_a_stop_string_ends_a_rollout_also_where_the_prefix_began_it():
    """The engine looks for stop strings in what it writes. A trajectory that went on to write "\\n\\nd" has a state in the middle of that."""
    stops = ("\n\nd", "e\nf")
    trainer = toy_vineppo(pool=ToyPool(Chain(end=0.05, newline=0.4)), prompts="bcde", samples=6, max_new_tokens=20, stop=stops)
    rollouts = trainer.collect()
    ended = {"train": 0, "branch": 0}
    for kind, samples in (("train", trainer.rewarder.samples), ("branch", trainer.rewarder.beside.samples)):
        for sample in samples:
            ends = [sample.response.find(stop) + len(stop) for stop in stops if stop in sample.response]
            assert not ends or (min(ends) == len(sample.response) and sample.stop_reason == "stop_string"), (kind, sample.response)
            assert sample.num_tokens == len(sample.response) + (sample.stop_reason == "eos")
            ended[kind] += bool(ends)
    assert ended["train"] and ended["branch"]
    _, metrics = trainer.credit(rollouts)
    cut = sum(sample.stop_reason == "length" for sample in trainer.rewarder.beside.samples)
    assert metrics["credit/truncated_rate"] == pytest.approx(cut / len(trainer.rewarder.beside.samples))


@pytest.mark.parametrize("num_steps", [1, 2, 5])
@pytest.mark.parametrize("max_steps", [None, 1, 3])
def test_the_states_asked_for_are_those_before_the_steps_each_with_what_is_left_of_the_budget(num_steps, max_steps):
    lines = ["ab\n", "c\n", "\n", "dd\n", "e"][5 - num_steps :]
    trainer = toy_vineppo(pool=written(["".join(lines) + "$"], siblings=1), prompts="b", samples=1, max_steps=max_steps, num_rollouts=3)
    _, batch, metrics = credited(trainer)
    prefixes = ["".join(lines[:step]) for step in range(num_steps if max_steps is None else min(num_steps, max_steps + 1))]
    expected = {(*ids_of("b\n" + prefix), 12 - len(ids_of(prefix))): 3 for prefix in prefixes}
    assert Counter((*request.prompt_ids, request.sampling.max_new_tokens) for request in trainer.pool.branches()) == expected
    assert metrics["credit/rollouts_per_trajectory"] == 3 * len(prefixes) and metrics["credit/rollouts_per_state"] == 3
    values = by_step(batch, 0, "values")
    assert sorted(values) == list(range(num_steps))
    assert [step for step, value in sorted(values.items()) if not math.isnan(value)] == list(range(len(prefixes)))


def test_branches_sample_as_the_trajectories_do_and_in_the_engine_that_has_their_prompt():
    trainer = toy_vineppo(prompts="bcd", samples=2)
    trainer.collect()
    groups = {tuple(request.prompt_ids): request.group for request in trainer.pool.requests if "/train/" in request.request_id}
    for request in trainer.pool.branches():
        assert request.group == groups[tuple(request.prompt_ids[:2])]
        assert request.sampling.temperature == trainer.sampling.temperature and request.sampling.stop == trainer.sampling.stop


# ---- advantages --------------------------------------------------------------------------------------------------------------


def naive_advantages(values, rewards, gamma):
    """Of each step whose value is known: discounted rewards up to the next known state, and that state's value. Of the others 0."""
    known = [step for step, value in enumerate(values) if not math.isnan(value)]
    advantages = [0.0] * len(rewards)
    for step, after in zip(known, [*known[1:], len(rewards)], strict=True):
        rest = values[after] if after < len(rewards) else 0.0
        earned = sum(gamma ** (k - step) * rewards[k] for k in range(step, after))
        advantages[step] = earned + gamma ** (after - step) * rest - values[step]
    return advantages


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.25])
@pytest.mark.parametrize("seed", range(25))
def test_credit_telescopes_and_every_token_carries_that_of_its_step(seed, gamma):
    """Values may be missing (a cap, failed rewards) and steps may own no token (a token that straddles two cuts)."""
    rng = np.random.default_rng(seed)
    num_steps = int(rng.integers(1, 9))
    owned = np.flatnonzero(np.arange(num_steps) * (rng.random(num_steps) < 0.7) + (np.arange(num_steps) == 0))
    step_ids = np.repeat(owned, rng.integers(1, 4, len(owned)))
    rewards = rng.normal(size=num_steps).astype(np.float32)
    cap = int(rng.integers(1, num_steps + 1))
    values = [
        float(rng.random()) if step in owned and step < cap and (step == 0 or rng.random() < 0.8) else math.nan for step in range(num_steps)
    ]
    trajectory = Trajectory.from_completion(
        [7, 8], rng.integers(0, 9, len(step_ids)), None, task_id="t", group_id="g", sample_index=0, step_ids=step_ids, rewards=rewards
    )
    before = list(values)
    advantages, own = token_credit(trajectory, values, gamma)
    np.testing.assert_equal(values, before)
    expected = naive_advantages(values, rewards.tolist(), gamma)
    assert advantages[:2].tolist() == [0, 0] and advantages[2:].tolist() == pytest.approx([expected[step] for step in step_ids], abs=1e-6)
    np.testing.assert_allclose(own, [math.nan] * 2 + [values[step] for step in step_ids], rtol=1e-6)
    first = {step: place + 2 for place, step in reversed(list(enumerate(step_ids.tolist())))}
    total = sum(gamma**step * float(advantages[place]) for step, place in first.items())
    assert total == pytest.approx(sum(gamma**step * float(reward) for step, reward in enumerate(rewards)) - values[0], abs=1e-5)


def test_the_published_examples():
    trajectory = Trajectory.from_completion([7], [1, 2, 3, 4, EOS], None, task_id="t", group_id="g", sample_index=0, step_ids=[0, 1, 1, 2, 2],
                                            rewards=[0, 0, 1])  # fmt: skip
    assert token_credit(trajectory, [0.5, 0.75, 0.25], 1.0)[0].tolist() == [0, 0.25, -0.5, -0.5, 0.75, 0.75]
    assert token_credit(trajectory, [0.5, 0.75, math.nan], 1.0)[0].tolist() == [0, 0.25, 0.25, 0.25, 0, 0]  # rollouts capped at 1


def test_a_response_without_a_token_has_no_credit_and_no_value():
    trajectory = Trajectory.from_completion([7, 8], [], None, task_id="t", group_id="g", sample_index=0, reward=1.0)
    advantages, values = token_credit(trajectory, [math.nan], 1.0)
    assert advantages.tolist() == [0, 0] and np.isnan(values).all()


@pytest.mark.parametrize("max_steps", [None, 1])
@pytest.mark.parametrize("seed", range(5))
def test_the_collection_as_a_whole_telescopes_and_equals_the_branches_that_were_sampled(seed, max_steps):
    trainer = toy_vineppo(prompts="bcde", samples=4, seed=seed, max_steps=max_steps)
    rollouts, batch, _ = credited(trainer)
    branches = branches_of(trainer)
    assert batch.num_sequences == 16 and (batch.tokens["advantages"][~batch.action_mask] == 0).all()
    for row, trajectory in enumerate(rollouts.trajectories):
        steps = trajectory.info["response"].splitlines(keepends=True) or [""]
        states = [tuple(trajectory.prompt_ids.tolist() + ids_of("".join(steps[:step]))) for step in range(len(steps))]
        values = [np.mean([text.count("a") % 2 and stop != "length" for text, stop in branches[state]]) for state in states[: (max_steps or 99) + 1]]
        values += [math.nan] * (len(steps) - len(values))
        assert by_step(batch, row, "values") == pytest.approx(dict(enumerate(values)), nan_ok=True, abs=1e-6)
        expected = naive_advantages(values, [0.0] * (len(steps) - 1) + [rollouts.rewards[row]], 1.0)
        assert by_step(batch, row, "advantages") == pytest.approx(dict(enumerate(expected)), abs=1e-6)
        assert sum(expected) == pytest.approx(rollouts.rewards[row] - values[0])


def every_response(chain, last, budget):
    """(token ids, probability) of all responses that the chain can write."""
    done, open_ones = [], [([], 1.0, last)]
    for _ in range(budget):
        longer = [
            ([*ids, token], probability * chain.table[state, action], action)
            for ids, probability, state in open_ones
            for action, token in enumerate(chain.tokens)
            if chain.table[state, action] > 0
        ]
        done += [(ids, probability) for ids, probability, action in longer if action == 0]
        open_ones = [one for one in longer if one[2] != 0]
    return done + [(ids, probability) for ids, probability, _ in open_ones]


def test_the_gradient_is_that_of_the_expected_reward():
    """Advantages times grad log pi, over all responses there are, against the exact gradient (dynamic programming) in the logits of the table.

    No response ends right after a line feed here: its end token belongs to the step before and takes that step's baseline, as published,
    where other tokens at that place take the baseline of the state; such a baseline depends on the action.
    """
    chain, budget = Chain("\nab", seed=3, end=0.25, end_after_newline=False), 5
    logits = torch.tensor(np.log(np.maximum(chain.table, 1e-30)), requires_grad=True)
    policy = logits.softmax(1)
    end, values = torch.tensor([0.0, 1.0]), torch.zeros(4, 2, dtype=torch.float64)
    for _ in range(budget):
        after = torch.stack([values[1], values[2].flip(0), values[3]])  # by action, and the parity before it
        values = policy[:, :1] * end + policy[:, 1:] @ after
    values[1, 0].backward()  # the prompt ends with a line feed
    assert values[1, 0].item() == pytest.approx(chain.value("b\n", "", budget))
    responses, probabilities = zip(*every_response(chain, 1, budget), strict=True)
    assert sum(probabilities) == pytest.approx(1)
    pool, count = written(responses, siblings=len(responses), chain=chain), len(responses)
    _, batch, _ = credited(toy_vineppo(pool=pool, prompts="b", samples=count, num_rollouts=50, max_new_tokens=budget))
    mask, states = batch.action_mask, torch.tensor([chain.state(int(token)) for token in batch.token_ids])
    before, action = states.roll(1)[mask], states[mask]
    weight = batch.tokens["advantages"][mask].double() * torch.tensor(probabilities, dtype=torch.float64)[batch.sequence_ids[mask]]
    score = -policy.detach()[before]
    score[torch.arange(len(score)), action] += 1.0
    estimate = torch.zeros(4, 4, dtype=torch.float64).index_add_(0, before, score * weight[:, None])
    exact = logits.grad
    assert torch.nn.functional.cosine_similarity(exact.flatten(), estimate.flatten(), dim=0) > 0.995
    assert float((estimate - exact).norm() / exact.norm()) < 0.1


# ---- sharing and order -------------------------------------------------------------------------------------------------------


def test_identical_prefixes_are_sampled_once_and_unshared_ones_get_the_same_values(monkeypatch):
    texts = ["a\nb$", "a\nb$", "a\nc\nd$", "e$"]
    trainer = toy_vineppo(pool=written(texts, siblings=4), prompts="b", samples=4)
    _, shared, metrics = credited(trainer)
    assert len(trainer.pool.branches()) == 4 * 3  # "", "a\n", "a\nc\n"
    assert metrics["credit/unique_prefix_share"] == pytest.approx(3 / 8)
    monkeypatch.setattr(vineppo, "BranchCall", functools.partial(BranchCall, share=False))
    trainer = toy_vineppo(pool=written(texts, siblings=4), prompts="b", samples=4)
    _, alone, _ = credited(trainer)
    assert len(trainer.pool.branches()) == 4 * 8
    for name in ("values", "advantages"):
        assert torch.equal(shared.tokens[name].nan_to_num(9), alone.tokens[name].nan_to_num(9))


def test_equal_texts_after_different_prompts_have_samples_of_their_own():
    trainer = toy_vineppo(pool=written(["a\nb$", "a\nb$"], siblings=1), prompts="bc", samples=1, num_rollouts=50)
    _, batch, metrics = credited(trainer)
    assert len(trainer.pool.branches()) == 4 * 50 and metrics["credit/unique_prefix_share"] == 1
    seeds = [request.seed for request in trainer.pool.requests]
    assert len(set(seeds)) == len(seeds)


@pytest.mark.parametrize("adaptive", [{}, {"interval_width": 0.6, "max_rollouts": 20}])
def test_values_do_not_depend_on_the_order_of_completions_or_rewards(adaptive):
    results = []
    for order, answer in ((0, "now"), (1, "now"), (2, "flush"), (3, "late"), (4, "late")):
        trainer = toy_vineppo(pool=ToyPool(Chain(), order=order), rewarder=ToyRewarder(answer=answer), prompts="bcd", samples=3, **adaptive)
        _, batch, metrics = credited(trainer)
        steady = {name: value for name, value in metrics.items() if not name.startswith(("timing/", "perf/"))}
        results.append((batch.tokens["values"].nan_to_num(9), batch.tokens["advantages"], steady))
    assert len(results[0][0].unique()) > 3
    for values, advantages, metrics in results[1:]:
        assert torch.equal(values, results[0][0]) and torch.equal(advantages, results[0][1]) and metrics == results[0][2]


def test_branches_start_while_other_trajectories_generate():
    started = []

    class Watched(ToyPool):
        def submit(self, requests):
            requests = list(requests)
            super().submit(requests)
            if any("/branch/" in request.request_id for request in requests):
                started.append(sum("/train/" in completion.request_id for completion in self.returned))

    trainer = toy_vineppo(pool=Watched(Chain()), prompts="bcde", samples=4)
    trainer.collect()
    assert started[0] == 1 and sorted(started) == started and len(started) >= 16


def test_the_share_of_hidden_rollouts_counts_what_came_before_the_last_trajectory():
    trainer = toy_vineppo(pool=ToyPool(Chain(), first_in=True), prompts="bcde", samples=4)  # every trajectory before any branch
    assert credited(trainer)[2]["perf/branch_hidden_share"] == 0
    trainer = toy_vineppo(pool=ToyPool(Chain()), prompts="bcde", samples=4)
    metrics = credited(trainer)[2]
    last = max(place for place, completion in enumerate(trainer.pool.returned) if "/train/" in completion.request_id)
    branch_tokens = [len(c.token_ids) * ("/branch/" in c.request_id) for c in trainer.pool.returned]
    assert metrics["perf/branch_hidden_share"] == pytest.approx(sum(branch_tokens[:last]) / sum(branch_tokens))
    assert 0 < metrics["perf/branch_hidden_share"] < 1


def test_no_rollout_is_ever_trained_on():
    trainer = toy_vineppo(prompts="bcde", samples=4)
    rollouts, batch, _ = credited(trainer)
    sampled = [
        request.prompt_ids + completion.token_ids
        for request in trainer.pool.requests
        for completion in trainer.pool.returned
        if completion.request_id == request.request_id and "/train/" in request.request_id
    ]
    assert len(trainer.pool.branches()) > 16
    assert sorted(ids.tolist() for ids in batch.token_ids.split(batch.lengths.tolist())) == sorted(sampled)
    assert len(trainer.rewarder.samples) == 16 == len(rollouts.results), "rewards of branches have numbers of their own"


# ---- adaptive K --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_rollouts", "width"), [(4, 0.5), (4, 0.7), (16, 0.5), (3, 0.25)])
def test_adaptive_sampling_goes_on_until_the_interval_is_narrow_and_no_further(num_rollouts, width):
    trainer = toy_vineppo(prompts="bcde", samples=3, num_rollouts=num_rollouts, interval_width=width, max_rollouts=40)
    credited(trainer)
    sizes = set()
    for samples in branches_of(trainer).values():
        scores = [text.count("a") % 2 and stop != "length" for text, stop in samples]

        def is_narrow(count, scores=scores):
            interval = wilson(sum(scores[:count]), count)
            return interval.high - interval.low <= width

        sizes.add(len(scores))
        assert len(scores) >= num_rollouts and (len(scores) == 40 or (len(scores) % num_rollouts == 0 and is_narrow(len(scores))))
        assert not any(is_narrow(count) for count in range(num_rollouts, len(scores), num_rollouts))
    assert len(sizes) > 1 or width == 0.7 or num_rollouts == 16


@pytest.mark.parametrize("score", [0.0, 1.0])
@pytest.mark.parametrize("answer", ["now", "flush"])
def test_rewards_that_are_all_alike_do_not_stop_before_the_interval_says_so(score, answer):
    """With the textbook interval p (1 - p) / n the first sample would do."""
    rewarder = ToyRewarder(lambda sample: RewardResult(score), answer=answer)
    trainer = toy_vineppo(rewarder=rewarder, prompts="bc", samples=2, num_rollouts=2, interval_width=0.3, max_rollouts=40)
    credited(trainer)
    count = next(n for n in range(2, 99, 2) if (interval := wilson(score * n, n)).high - interval.low <= 0.3)
    assert count > 2 and {len(samples) for samples in branches_of(trainer).values()} == {count}


def test_adaptive_sampling_of_rewards_beyond_0_and_1_ends_at_the_most_rollouts():
    trainer = toy_vineppo(rewarder=ToyRewarder(lambda sample: RewardResult(3.0)), num_rollouts=4, interval_width=0.3, max_rollouts=10)
    _, batch, _ = credited(trainer)
    assert {len(samples) for samples in branches_of(trainer).values()} == {10}
    assert {3.0} == set(batch.tokens["values"][batch.action_mask].tolist())


@pytest.mark.parametrize("answer", ["now", "flush"])
def test_a_state_with_no_budget_left_is_worth_what_it_has_and_is_waited_for(answer):
    """Engines do not write beyond the budget; whoever calls with a shorter one must not wait for rewards that nobody asked for."""
    text = "a\nc\ne\ng\ni\ng\nh"  # the last step begins where the budget of 12 ends
    for adaptive in ({}, {"interval_width": 0.6, "max_rollouts": 20}):
        scores = ToyRewarder(lambda sample: RewardResult(0.5 * (sample.response == "a\nc\ne\ng\ni\ng\n")), answer=answer)
        trainer = toy_vineppo(pool=written([text], siblings=1), rewarder=scores, prompts="b", samples=1, **adaptive)
        rollouts, found = trainer.collect(), []
        thread = threading.Thread(target=lambda t=trainer, r=rollouts, f=found: f.append(t.credit(r)), daemon=True)
        thread.start()
        thread.join(5)
        assert found, "credit waits for rewards that were never asked for"
        assert by_step(found[0][0], 0, "values")[6] == 0.5
        assert found[0][1]["credit/exhausted_states"] == 1


# ---- the root by its siblings ------------------------------------------------------------------------------------------------


def test_the_root_by_its_siblings_is_their_mean_without_the_response_itself_and_without_requests():
    trainer = toy_vineppo(prompts="bcde", samples=5, root_from_siblings=True)
    rollouts, batch, _ = credited(trainer)
    assert all(len(request.prompt_ids) > 2 for request in trainer.pool.branches())
    for row in range(20):
        first = row // 5 * 5
        others = [rollouts.rewards[place] for place in range(first, first + 5) if place != row]
        assert by_step(batch, row, "values")[0] == pytest.approx(np.mean(others))


def test_the_root_by_its_siblings_is_unbiased():
    chain, roots = Chain(end=0.2), []
    for seed in range(100):
        _, batch, _ = credited(toy_vineppo(pool=ToyPool(chain), prompts="b", samples=6, root_from_siblings=True, num_rollouts=1, seed=seed))
        roots.append(np.mean([by_step(batch, row, "values")[0] for row in range(6)]))
    value = chain.value("b\n", "", 12)
    assert abs(np.mean(roots) - value) < 4 * math.sqrt(value * (1 - value) / 600)


def test_a_root_none_of_whose_siblings_has_a_reward_is_counted_as_a_state_without_value():
    def score(sample):
        return FAILED if sample.response == "e" else parity(sample)

    trainer = toy_vineppo(
        pool=written(["a$", "e$"], siblings=2), rewarder=ToyRewarder(score), prompts="b", samples=2, root_from_siblings=True, max_failed_rate=1.0
    )
    _, batch, metrics = credited(trainer)
    assert metrics["credit/states_without_value"] == 1 == metrics["rollout/ungraded"]
    assert not batch.tokens["advantages"].any()  # nothing to compare it with


# ---- rewards per step --------------------------------------------------------------------------------------------------------


def step_rewards(text, bonus=0.0):
    steps = text.splitlines(keepends=True)
    scores = [0.5 * ("a" in step) - 0.25 * ("b" in step) for step in steps]
    if scores and text.count("a") % 2:
        scores[-1] += bonus
    return scores


@pytest.mark.parametrize("gamma", [1.0, 0.7])
@pytest.mark.parametrize("bonus", [0.0, 1.0])
def test_rewards_of_steps_are_discounted_from_the_state_on(gamma, bonus):
    """What the steps before a state earned is no part of its value, unless the rollout's own earned something else there."""

    def score(sample):
        scores = step_rewards(sample.response, bonus)
        return RewardResult(math.fsum(scores), step_scores=tuple(scores))

    trainer = toy_vineppo(rewarder=ToyRewarder(score), prompts="bcde", samples=4, gamma=gamma, num_rollouts=6)
    rollouts, batch, _ = credited(trainer)
    branches, ended_at_once = branches_of(trainer), 0
    for row, trajectory in enumerate(rollouts.trajectories):
        steps, rewards = trajectory.info["response"].splitlines(keepends=True), step_rewards(trajectory.info["response"], bonus)
        values = []
        for number in range(max(1, len(steps))):
            returns = []
            for text, _ in branches[tuple(trajectory.prompt_ids.tolist() + ids_of("".join(steps[:number])))]:
                earned = step_rewards(text, bonus)
                returns.append(sum(gamma ** (k - number) * earned[k] for k in range(number, len(earned))))
                returns[-1] += sum(earned[:number]) - sum(rewards[:number])
                ended_at_once += len(earned) == number > 0
            values.append(np.mean(returns))
        assert by_step(batch, row, "values") == pytest.approx(dict(enumerate(values)), abs=1e-6)
        expected = naive_advantages(values, rewards or [0.0], gamma)
        assert by_step(batch, row, "advantages") == pytest.approx(dict(enumerate(expected)), abs=1e-6)
    assert ended_at_once


# ---- failures ----------------------------------------------------------------------------------------------------------------


def failing(where, result=FAILED):
    """parity, and ``result`` for branches whose text ``where`` says."""
    return lambda sample: result if where(sample.response) else parity(sample)


def test_a_failed_reward_is_counted_and_the_value_is_the_mean_of_the_others():
    trainer = toy_vineppo(rewarder=ToyRewarder(failing(lambda text: text.endswith("d"))), prompts="bcde", samples=4, num_rollouts=12)
    rollouts, batch, metrics = credited(trainer)
    branches = branches_of(trainer)
    failed = sum(text.endswith("d") for samples in branches.values() for text, _ in samples)
    assert failed and metrics["credit/failed_rate"] == pytest.approx(failed / sum(map(len, branches.values())))
    checked = 0
    for row, place in enumerate(batch.sequences["places"].tolist()):
        trajectory = rollouts.trajectories[place]
        scores = [text.count("a") % 2 * (stop != "length") for text, stop in branches[tuple(trajectory.prompt_ids.tolist())] if text[-1:] != "d"]
        assert by_step(batch, row, "values")[0] == pytest.approx(np.mean(scores))
        checked += 1
    assert checked == batch.num_sequences == int(np.isfinite(rollouts.rewards).sum()) < 16, "ungraded trajectories are left out, no others"
    assert metrics["rollout/ungraded"] == 16 - checked


def test_a_state_whose_rewards_all_fail_has_no_value_and_the_step_before_it_takes_the_credit():
    text = "a\nb\nd$"
    broken = failing(lambda response: response.startswith("a\nb\n") and response != "a\nb\nd")
    trainer = toy_vineppo(pool=written([text], siblings=1), rewarder=ToyRewarder(broken), prompts="b", samples=1, max_failed_rate=0.9)
    _, batch, metrics = credited(trainer)
    values, advantages = by_step(batch, 0, "values"), by_step(batch, 0, "advantages")
    assert math.isnan(values[2]) and metrics["credit/states_without_value"] == 1
    assert advantages[2] == 0 and advantages[1] == pytest.approx(1 - values[1]) and advantages[0] == pytest.approx(values[1] - values[0])


def test_too_many_failed_rewards_of_rollouts_stop_the_run_with_their_number():
    broken = failing(lambda response: response != "a\nb")
    for allowed in (0.3, 1.0):
        trainer = toy_vineppo(pool=written(["a\nb$"], siblings=1), rewarder=ToyRewarder(broken), prompts="b", samples=1, max_failed_rate=allowed)
        rollouts = trainer.collect()
        if allowed == 1:
            batch, _ = trainer.credit(rollouts)
            assert (batch.tokens["advantages"] == 0).all(), "of a root without a value nothing is known"
        else:
            with pytest.raises(WorkerError, match=r"\d of 8 rewards of rollouts failed \(error \d\); --reward.max_failed_rate is 0.3; .*because"):
                trainer.credit(rollouts)


def test_a_failure_that_has_a_worth_counts_in_the_value_as_it_does_on_a_trajectory():
    """--reward.timeout 0: a response whose grading takes too long trains with 0, and a state is worth what its responses train with."""
    worth = RewardResult(0.0, "timeout")
    trainer = toy_vineppo(
        pool=written(["a\nb$"], siblings=1), rewarder=ToyRewarder(lambda sample: worth if "d" in sample.response else RewardResult(1.0)),
        prompts="b", samples=1, num_rollouts=40,
    )  # fmt: skip
    _, batch, metrics = credited(trainer)
    branches = branches_of(trainer)
    means = [np.mean(["d" not in text for text, _ in branches[tuple(ids_of("b\n" + prefix))]]) for prefix in ("", "a\n")]
    assert 0 < means[0] < 1
    assert by_step(batch, 0, "values") == pytest.approx(dict(enumerate(means)))
    assert metrics["credit/failed_rate"] == pytest.approx(1 - np.mean(means))


def test_answers_that_are_missing_and_do_not_train_are_no_failures():
    """--reward.no_answer null: such rollouts say nothing of the value, and a run whose policy seldom answers goes on."""
    nothing = failing(lambda response: response != "a\nb" and "a" not in response[2:], RewardResult(math.nan, "no_answer"))
    trainer = toy_vineppo(pool=written(["a\nb$"], siblings=1), rewarder=ToyRewarder(nothing), prompts="b", samples=1, max_failed_rate=0.0)
    _, _, metrics = credited(trainer)
    assert metrics["credit/failed_rate"] == 0


def test_a_rollout_with_a_reward_that_float32_does_not_hold_says_nothing_of_the_value():
    huge = failing(lambda response: response != "a\nb" and "c" in response, RewardResult(1e300))
    trainer = toy_vineppo(pool=written(["a\nb$"], siblings=1), rewarder=ToyRewarder(huge), prompts="b", samples=1, max_failed_rate=1.0)
    _, batch, _ = credited(trainer)
    assert batch.tokens["advantages"].abs().max() <= 1


def test_a_trajectory_without_a_reward_is_left_out_and_is_no_ones_sibling():
    texts = ["a$", "b\nc$", "a\nd$", "c$"]
    results = []
    for broken in (False, True):
        rewarder = ToyRewarder(failing(lambda response, broken=broken: broken and response == "a"))
        trainer = toy_vineppo(pool=written(texts, siblings=4), rewarder=rewarder, prompts="b", samples=4, root_from_siblings=True)
        results.append(credited(trainer)[1])
    whole, part = results
    assert part.sequences["places"].tolist() == [1, 2, 3]
    assert by_step(part, 0, "values")[0] == pytest.approx(1 / 2) and by_step(whole, 1, "values")[0] == pytest.approx(2 / 3)
    assert by_step(part, 1, "values")[1] == by_step(whole, 2, "values")[1]


# ---- responses of every kind -------------------------------------------------------------------------------------------------


def decoder_without_a_stream():
    class Plain:
        """A tokenizer that does not say which token wrote what."""

        eos_token_id = EOS

        def __call__(self, *args, **kwargs):
            return TOKENIZER(*args, **kwargs)

        def decode(self, *args, **kwargs):
            return TOKENIZER.decode(*args, **kwargs)

    return Plain()


@pytest.mark.parametrize("settings", [{"tokenizer": decoder_without_a_stream()}, {"step_kind": lambda text: text.split("\n")}])
def test_a_response_that_nothing_cuts_is_one_step_and_none_is_dropped(settings):
    trainer = toy_vineppo(prompts="bcde", samples=4, **settings)
    rollouts, batch, metrics = credited(trainer)
    assert batch.num_sequences == 16
    for row in range(16):
        values, advantages = by_step(batch, row, "values"), by_step(batch, row, "advantages")
        assert list(values) == [0] and advantages[0] == pytest.approx(rollouts.rewards[row] - values[0])
    many = sum("\n" in trajectory.info["response"].rstrip("\n") for trajectory in rollouts.trajectories)
    assert metrics["credit/unsplit_rate"] == (many / 16 if "tokenizer" in settings else 0) and many


def test_the_callers_task_keeps_its_way_of_cutting_steps(monkeypatch):
    trainer = toy_vineppo(step_kind="newline", prompts="b")
    monkeypatch.setattr(OnlineTrainer, "prepare", lambda self: setattr(self, "task", self._task))
    trainer.config = replace(trainer.config, vine=replace(trainer.config.vine, step_kind="fixed:2"))
    given = trainer._task
    trainer.prepare()
    assert given.step_kind == "newline" and trainer.task.step_kind == trainer.beside().step_kind == "fixed:2"


def test_empty_and_cut_responses_keep_their_place_and_the_end_token_its_step():
    texts = ["$", "\n$", "a\n\nb", "a" * 12, "a\nb$", "\n\n\n$"]
    trainer = toy_vineppo(pool=written(texts, siblings=6), prompts="b", samples=6)
    rollouts, batch, _ = credited(trainer)
    assert batch.num_sequences == 6
    assert [sorted(by_step(batch, row, "values")) for row in range(6)] == [[0], [0], [0, 1, 2], [0], [0, 1], [0, 1, 2]]
    for row, trajectory in enumerate(rollouts.trajectories):
        advantages, values = by_step(batch, row, "advantages"), by_step(batch, row, "values")
        assert sum(advantages.values()) == pytest.approx(rollouts.rewards[row] - values[0], abs=1e-6)
        assert trajectory.step_ids[-1] == max(advantages), "the end token belongs to the last step"
    assert rollouts.trajectories[2].stop_reason == StopReason.LENGTH and rollouts.rewards[2] == 0


def byte_fallback_tokenizer():
    """As SentencePiece makes them: bytes as tokens of their own, and tokens that hold a line feed in the middle."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    entries = ["<pad>", "<|endoftext|>", *(f"<0x{byte:02X}>" for byte in range(256)), *"abcdefghij\n", "a\nb", "c\n", "\n\nd", "e\nf\ng"]
    tokenizer = Tokenizer(models.BPE({entry: index for index, entry in enumerate(entries)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<pad>"), entries


@pytest.mark.parametrize("kind", ["newline", "gsm8k", "sentence", "fixed:3"])
@pytest.mark.parametrize("vocabulary", ["bytes", "fallback"])
def test_states_are_cut_between_tokens_as_they_were_sampled(vocabulary, kind):
    """Characters of several bytes, bytes that are no character, and tokens that reach over a cut: every token belongs to one step, that of its
    first character, and a prefix is the sampled ids themselves."""
    if vocabulary == "bytes":
        tokenizer, samples = TOKENIZER, [ids_of(text) + [EOS] for text in ("é\n日本. Ab\n😀😀\nz", "日\n\n\n本\n", "😀")]
        samples += [[*ids_of("a\n😀b\n")[:4], *ids_of("x\n"), EOS], ids_of("a\n日")[:-1]]
    else:
        tokenizer, entries = byte_fallback_tokenizer()
        samples = [
            [entries.index(word) for word in words]
            for words in (
                ["a", "a\nb", "c", "\n", "d", "<|endoftext|>"], ["e\nf\ng", "c\n", "a", "<|endoftext|>"], ["a", "\n\nd", "e\nf\ng", "e\nf\ng"],
                ["<0xE6>", "<0x97>", "<0xA5>", "\n", "<0xE6>", "<0x97>", "<0xA5>", "a\nb", "<|endoftext|>"], ["a\nb", "<0xE6>"],
                ["a\nb", "<|endoftext|>"],
            )
        ]  # fmt: skip
    trainer = toy_vineppo(
        pool=written(samples, siblings=len(samples)), prompts="b", samples=len(samples), max_new_tokens=40, tokenizer=tokenizer, step_kind=kind
    )
    trainer.task.encode_prompt = lambda item, tokenizer: [5, 6]
    rollouts, batch, metrics = credited(trainer)
    assert batch.num_sequences == len(samples)
    requested = {tuple(request.prompt_ids): request.sampling.max_new_tokens for request in trainer.pool.branches()}
    for row, (ids, trajectory) in enumerate(zip(samples, rollouts.trajectories, strict=True)):
        assert trajectory.response_ids.tolist() == ids
        steps = trajectory.step_ids[2:]
        assert (np.diff(steps) >= 0).all() and steps[0] == 0 and steps[-1] < trajectory.num_steps
        for start in np.flatnonzero(np.diff(steps, prepend=-1)):
            assert requested[(5, 6, *ids[:start])] == 40 - start
            assert vocabulary == "fallback" or row == 3 or "\ufffd" not in tokenizer.decode(ids[:start])
        values, advantages = by_step(batch, row, "values"), by_step(batch, row, "advantages")
        assert sum(advantages.values()) == pytest.approx(rollouts.rewards[row] - values[0], abs=1e-6)
    assert metrics["credit/unsplit_rate"] == 0 or vocabulary == "bytes"
