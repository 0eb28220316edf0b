"""Micro-batch plans: complete, within the limit, equal in number, balanced."""

import numpy as np
import pytest

from openrl_reason.core.partition import plan_micro_batches
from openrl_reason.workers.model_config import ModelConfig
from openrl_reason.workers.model_group import ModelGroup
from tests.helpers_models import random_batch


@pytest.mark.parametrize("seed", range(200))
def test_every_plan_is_complete_within_the_limit_and_equal_in_number(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 600, rng.integers(0, 80)).tolist()
    num_ranks, max_tokens = int(rng.integers(1, 6)), int(rng.integers(1, 1500))
    plan = plan_micro_batches(lengths, num_ranks, max_tokens)
    assert len(plan) == num_ranks and len({len(micro_batches) for micro_batches in plan}) == 1
    assert sorted(index for micro_batches in plan for indices in micro_batches for index in indices) == list(range(len(lengths)))
    for micro_batches in plan:
        for indices in micro_batches:
            assert len(indices) <= 1 or sum(lengths[index] for index in indices) <= max_tokens
    assert plan == plan_micro_batches(list(lengths), num_ranks, max_tokens)


@pytest.mark.parametrize("seed", range(50))
def test_a_round_of_a_group_is_one_micro_batch_for_each_rank(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 600, rng.integers(1, 60)).tolist()
    batch = random_batch(lengths)
    config = ModelConfig(path="", num_ranks=int(rng.integers(1, 6)), tokens_per_micro_batch=int(rng.integers(1, 1500)))
    group = ModelGroup(config, "critic", [None] * config.num_ranks, 1.0)
    rounds = group.rounds(batch)
    assert sorted(place for places, _ in rounds for place in places) == list(range(len(lengths)))
    for places, units in rounds:
        plan = group._plan(batch.select(places), units)
        assert {len(micro_batches) for micro_batches in plan} == {1}
        for (indices,) in plan:
            assert len(indices) <= 1 or sum(lengths[places[index]] for index in indices) <= config.tokens_per_micro_batch


def test_ranks_carry_about_the_same_and_forwards_are_few():
    lengths = np.random.default_rng(0).integers(16, 513, 256).tolist()
    for num_ranks in (1, 2, 3, 8):
        plan = plan_micro_batches(lengths, num_ranks, 4096)
        totals = [sum(lengths[index] for indices in micro_batches for index in indices) for micro_batches in plan]
        assert max(totals) <= 1.03 * sum(lengths) / num_ranks
        assert len(plan[0]) <= np.ceil(sum(lengths) / 4096 / num_ranks) + 1


def test_equal_lengths_that_fill_the_limit_waste_nothing():
    plan = plan_micro_batches([100] * 40, 2, 1000)
    assert [[len(indices) for indices in micro_batches] for micro_batches in plan] == [[10, 10], [10, 10]]


def test_one_long_sequence_does_not_hang_the_other_rank():
    assert plan_micro_batches([5000], 2, 4096) == [[[0]], [[]]]
    assert plan_micro_batches([], 2, 4096) == [[], []]


def test_thousands_of_sequences_are_planned_quickly():
    lengths = np.random.default_rng(1).integers(1, 4000, 20_000).tolist()
    plan_micro_batches(lengths, 8, 4096)  # a quadratic first fit would take minutes


@pytest.mark.parametrize(("num_ranks", "max_tokens"), [(0, 10), (1, 0)])
def test_impossible_settings_are_refused(num_ranks, max_tokens):
    with pytest.raises(ValueError, match="must be positive"):
        plan_micro_batches([1], num_ranks, max_tokens)
