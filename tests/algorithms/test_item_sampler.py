"""Which items a step sees."""

from openrl_reason.algorithms.common import ItemSampler


def test_each_epoch_is_a_permutation_and_the_next_follows_without_a_gap():
    sampler = ItemSampler(list(range(10)), seed=3)
    seen = [item for step in range(5) for item in sampler.items(step, 4)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10)) and seen[:10] != seen[10:]


def test_a_step_depends_on_seed_and_step_alone():
    straight, resumed = ItemSampler(list(range(100)), seed=1), ItemSampler(list(range(100)), seed=1)
    expected = [straight.items(step, 7) for step in range(40)]
    assert resumed.items(31, 7) == expected[31]
    assert ItemSampler(list(range(100)), seed=2).items(31, 7) != expected[31]


def test_a_step_larger_than_the_data_repeats_it():
    assert sorted(ItemSampler([0, 1, 2], seed=0).items(1, 6)) == [0, 0, 1, 1, 2, 2]
