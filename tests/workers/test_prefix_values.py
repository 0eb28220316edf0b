"""Values of growing states from a group: a state goes to the rank that keeps what it continues, and every value comes back in its place."""

import numpy as np
import pytest

from openrl_reason.workers.model_config import ScalarModelConfig
from openrl_reason.workers.model_worker import ModelWorker
from openrl_reason.workers.prefix_values import PrefixValues
from tests.helpers_models import VOCAB, write_tiny_model


class LocalRanks:
    """A group of ranks in this process."""

    def __init__(self, path, num_ranks):
        config = ScalarModelConfig(path=str(path), dtype="float32", head_init="small")
        self.workers, self.num_ranks = [ModelWorker(config, role="critic") for _ in range(num_ranks)], num_ranks

    def prefix_scores(self, prefixes, max_bytes):
        return [worker.prefix_scores(own, max_bytes) for worker, own in zip(self.workers, prefixes, strict=True)]

    @property
    def computed(self):
        return [worker._prefix_scorer.counts["computed_tokens"] for worker in self.workers]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("m") / "model")


def test_ranks_share_the_states_and_each_keeps_its_own(path):
    rng = np.random.default_rng(0)
    one, two = LocalRanks(path, 1), LocalRanks(path, 2)
    values = {group: PrefixValues(group, 1 << 30) for group in (one, two)}
    states = [tuple(rng.integers(2, VOCAB, 20).tolist()) for _ in range(8)]
    for _ in range(3):
        expected = values[one](states)
        assert values[two](states) == pytest.approx(expected, rel=1e-5, abs=1e-6) and len(set(expected)) == len(states)
        states = [(*state, *rng.integers(2, VOCAB, 4).tolist()) for state in states]
    assert sum(two.computed) == sum(one.computed) == 8 * (20 + 4 + 4)  # nothing is computed by both
    assert min(two.computed) == max(two.computed)


def test_without_a_cache_and_without_states(path):
    group = LocalRanks(path, 2)
    values = PrefixValues(group, 0)
    assert values([]).shape == (0,)
    states = [(2, 3, 4), (2, 3, 4, 5)]
    assert values(states) == pytest.approx(PrefixValues(LocalRanks(path, 1), 1 << 20)(states), rel=1e-5, abs=1e-6)
    values(states)
    assert sum(group.computed) == 2 * 7
