"""Credit assignment equals its definitions, written as loops."""

import math

import pytest
import torch

from openrl_reason.core.credit import (
    RunningBaseline,
    discounted_returns,
    gae,
    group_advantages,
    vine_step_advantages,
    whiten,
)


def random_batch(lengths, seed=0, dtype=torch.float64, hole_rate=0.3):
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    rewards, values = (torch.randn(total, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    return rewards, values, torch.rand(total, generator=generator) >= hole_rate, cu_seqlens


def naive_gae(rewards, values, mask, cu_seqlens, gamma, lam):
    advantages = torch.zeros(len(rewards), dtype=torch.float64)
    for start, end in zip(cu_seqlens.tolist(), cu_seqlens[1:].tolist(), strict=False):
        next_value = running = 0.0
        for t in reversed(range(start, end)):
            if mask[t]:
                delta = float(rewards[t]) + gamma * next_value - float(values[t])
                running = delta + gamma * lam * running
                advantages[t], next_value = running, float(values[t])
    return advantages, torch.where(mask, advantages + values, 0.0)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (1.0, 0.95), (0.99, 0.95), (0.9, 0.0), (0.0, 1.0), (1e-4, 0.5)])
@pytest.mark.parametrize("hole_rate", [0.0, 0.3, 0.95])
def test_gae_equals_a_loop_over_the_action_tokens(gamma, lam, hole_rate):
    rewards, values, mask, cu_seqlens = random_batch([1, 70, 3, 0, 33, 200, 5], hole_rate=hole_rate)
    rewards[~mask] = values[~mask] = torch.nan  # what an observation carries is never looked at
    advantages, returns = gae(rewards, values, mask, cu_seqlens, gamma=gamma, lam=lam)
    expected_advantages, expected_returns = naive_gae(rewards, values, mask, cu_seqlens, gamma, lam)
    torch.testing.assert_close(advantages, expected_advantages, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(returns, expected_returns, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.999, 0.97), (0.3, 0.1)])
def test_gae_in_single_precision_stays_within_1e_5_over_long_sequences(gamma, lam):
    rewards, values, mask, cu_seqlens = random_batch([8192, 10_000], dtype=torch.float32)
    advantages, returns = gae(rewards, values, mask, cu_seqlens, gamma=gamma, lam=lam)
    expected_advantages, expected_returns = naive_gae(rewards, values, mask, cu_seqlens, gamma, lam)
    assert advantages.dtype == torch.float32
    assert (advantages - expected_advantages).abs().max() <= 1e-5
    assert (returns - expected_returns).abs().max() <= 1e-5


def test_undiscounted_gae_is_the_return_minus_the_value():
    rewards, values, mask, cu_seqlens = random_batch([9, 40])
    advantages, returns = gae(rewards, values, mask, cu_seqlens)
    expected = discounted_returns(rewards, mask, cu_seqlens, gamma=1.0)
    torch.testing.assert_close(returns, expected)
    torch.testing.assert_close(advantages, torch.where(mask, expected - values, 0.0))


def test_sequences_do_not_see_one_another():
    rewards, values, mask, cu_seqlens = random_batch([10, 35, 7])
    whole = gae(rewards, values, mask, cu_seqlens, gamma=0.9, lam=0.8)[0]
    part = slice(10, 45)
    alone = gae(rewards[part], values[part], mask[part], torch.tensor([0, 35]), gamma=0.9, lam=0.8)[0]
    torch.testing.assert_close(whole[part], alone)


@pytest.mark.parametrize("limit", [1, 50, 200])
def test_a_large_batch_taken_in_groups_of_sequences_gives_the_same(monkeypatch, limit):
    inputs = random_batch([1, 70, 3, 0, 33, 200, 5])
    whole = gae(*inputs, gamma=0.9, lam=0.8)
    monkeypatch.setattr("openrl_reason.core.credit._GROUP_TOKENS", limit)
    torch.testing.assert_close(gae(*inputs, gamma=0.9, lam=0.8), whole, rtol=0, atol=1e-14)


def test_whole_rewards_are_not_rounded_when_discounted():
    returns = discounted_returns(torch.tensor([0, 1]), torch.tensor([True, True]), torch.tensor([0, 2]), gamma=0.5)
    assert returns.tolist() == [0.5, 1.0]


def test_credit_of_nothing_is_nothing():
    empty = torch.zeros(0)
    assert gae(empty, empty, empty.bool(), torch.tensor([0]))[0].shape == (0,)
    three = torch.ones(3)
    assert not gae(three, three, torch.zeros(3, dtype=torch.bool), torch.tensor([0, 3]))[1].any()


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
def test_discounted_returns_equal_a_loop_and_skip_observations(gamma):
    rewards, _, mask, cu_seqlens = random_batch([1, 50, 8])
    expected = naive_gae(rewards, torch.zeros_like(rewards), mask, cu_seqlens, gamma, 1.0)[0]
    torch.testing.assert_close(discounted_returns(rewards, mask, cu_seqlens, gamma=gamma), expected)


def test_group_advantages_equal_their_formulas_whatever_the_order_of_the_groups():
    rewards = torch.tensor([1.0, 0.0, 3.0, 5.0, 2.0, 7.0])
    groups = torch.tensor([9, -4, 9, 9, -4, 3])
    rloo = group_advantages(rewards, groups, kind="rloo")
    torch.testing.assert_close(rloo, torch.tensor([1 - 4.0, -2.0, 3 - 3.0, 5 - 2.0, 2.0, 0.0]))
    grpo = group_advantages(rewards, groups, kind="grpo")
    torch.testing.assert_close(grpo, torch.tensor([-1.0, -(0.5**0.5), 0.0, 1.0, 0.5**0.5, 0.0]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(group_advantages(rewards, groups, kind="mean"), torch.tensor([-2.0, -1.0, 0.0, 2.0, 1.0, 0.0]))
    torch.testing.assert_close(group_advantages(rewards, groups, kind="none"), rewards)


@pytest.mark.parametrize("kind", ["rloo", "grpo", "mean"])
@pytest.mark.parametrize("rewards", [[0.1] * 7, [0.0] * 3, [1e6 / 3] * 11, [0.7], []])
def test_a_group_whose_rewards_are_equal_says_exactly_nothing(kind, rewards):
    advantages = group_advantages(torch.tensor(rewards), torch.zeros(len(rewards), dtype=torch.int64), kind=kind)
    assert (advantages == 0).all()


@pytest.mark.parametrize("kind", ["rloo", "grpo", "mean"])
def test_group_advantages_sum_to_zero(kind):
    groups = torch.randint(0, 9, (100,))
    advantages = group_advantages(torch.randn(100, dtype=torch.float64), groups, kind=kind)
    assert torch.zeros(9, dtype=torch.float64).index_add(0, groups, advantages).abs().max() < 1e-9


def test_an_unknown_group_kind_is_refused_and_integers_become_floats():
    with pytest.raises(ValueError, match="rloo, grpo, mean, none"):
        group_advantages(torch.zeros(2), torch.zeros(2), kind="ppo")
    assert group_advantages(torch.tensor([1, 0]), torch.tensor([0, 0]), kind="rloo").tolist() == [1.0, -1.0]


def test_vine_advantages_of_the_published_examples():
    assert vine_step_advantages([0.5, 0.75, 0.25], [0, 0, 1]) == [0.25, -0.5, 0.75]
    assert vine_step_advantages([0.5, 0.75], [0, 0, 1]) == [0.25, 0.25, 0.0]  # rollouts capped: the last known state absorbs the residual
    assert vine_step_advantages([0.4], [1]) == [0.6]
    assert vine_step_advantages([], []) == []


@pytest.mark.parametrize("seed", range(30))
def test_vine_advantages_telescope_also_when_values_are_missing(seed):
    generator = torch.Generator().manual_seed(seed)
    num_steps = int(torch.randint(1, 9, (1,), generator=generator))
    rewards = torch.randn(num_steps, generator=generator, dtype=torch.float64)
    values = torch.rand(num_steps, generator=generator, dtype=torch.float64)
    values[1:][torch.rand(num_steps - 1, generator=generator) < 0.3] = torch.nan
    before = values.clone()
    advantages = vine_step_advantages(values, rewards)
    assert len(advantages) == num_steps
    assert sum(advantages) == pytest.approx(float(rewards.sum() - values[0]))
    assert all(advantage == pytest.approx(0) for advantage, value in zip(advantages, values, strict=True) if math.isnan(value))
    torch.testing.assert_close(values, before, equal_nan=True)


def test_a_value_after_the_last_step_is_refused():
    with pytest.raises(ValueError, match="3 step values for 2 steps"):
        vine_step_advantages([0.1, 0.2, 0.3], [0, 1])


def test_whitening_uses_the_statistics_of_the_mask_alone():
    values, mask = torch.randn(50, dtype=torch.float64), torch.rand(50) < 0.5
    dirty = torch.where(mask, values * 3 + 5, torch.nan)
    white = whiten(dirty, mask)
    assert not white[~mask].any()
    assert white[mask].mean().abs() < 1e-9 and white[mask].std() == pytest.approx(1.0, abs=1e-6)
    scaled = whiten(dirty, mask, shift_mean=False)
    torch.testing.assert_close(scaled[mask].sign(), dirty[mask].sign())


@pytest.mark.parametrize("value", [1.0, 0.1, -3.0])
def test_equal_values_whose_mean_stays_are_not_scaled(value):
    """All responses right and a critic that says 0 everywhere: a common advantage of 1, not of 1e4."""
    values, mask = torch.full((7,), value), torch.tensor([True] * 6 + [False])
    assert torch.allclose(whiten(values, mask, shift_mean=False), torch.where(mask, values, 0.0))


def test_whitening_equal_values_or_nothing_gives_zeros():
    mask = torch.tensor([True, False, True])
    assert not whiten(torch.full((3,), 2.0), mask).any()
    assert not whiten(torch.ones(3), torch.zeros(3, dtype=torch.bool)).any()
    assert not whiten(torch.ones(3), torch.tensor([True, False, False])).any()


def test_the_running_baseline_never_contains_the_sample_it_is_subtracted_from():
    baseline = RunningBaseline(decay=0.5)
    assert baseline.advantages(torch.tensor([1.0, 3.0])).tolist() == [1.0, 3.0]
    assert baseline.value == pytest.approx(2.0)  # corrected for its start: not 1.0
    assert baseline.advantages(torch.tensor([5.0])).tolist() == [3.0]
    assert baseline.value == pytest.approx((0.25 * 2 + 0.5 * 5) / 0.75)
    again = RunningBaseline(decay=0.5)
    again.load_state_dict(baseline.state_dict())
    assert again.value == baseline.value
    with pytest.raises(ValueError, match="decay"):
        RunningBaseline(decay=1.0)
